"""Losses that look at single tokens: weights of tokens (stage 1, sequence.py), KL or entropy at positions.

Notation as in pairwise.py.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrepro.methods.dpo.links import logistic
from jaxrepro.methods.dpo.sequence import SeqStats
from jaxrepro.methods.dpo.spec import variant

sg = jax.lax.stop_gradient


def gap(x):
    return x[:, 0] - x[:, 1]


@variant(
    "2406.10957",
    "official",
    weighting="subsample",
    notes=("one subset for policy and reference; the official code draws two: independent",),
)
def sampo(s, batch, *, beta=0.1, independent=False):
    """SamPO: S(beta D), D from min(n_w, n_l) random tokens of each response."""
    return logistic(beta * s.d)


@variant(
    "2502.14340", "official", weighting="decay", notes=("gamma^1 at the first token, as the code",)
)
def d2po_decay(s, batch, *, beta=0.1, gamma=0.98):
    """D2PO: S(beta D) with log-probs discounted by gamma^t."""
    return logistic(beta * s.d)


@variant("2404.11999", "official", needs="reference kl")
def tdpo1(s, batch, *, beta=0.1):
    """S(beta (D - (K_l - K_w))), K = sum_t KL(ref || pi) over the response."""
    return logistic(beta * (s.d + gap(s.response_sum("kl"))))


@variant("2404.11999", "official", needs="reference kl")
def tdpo2(s, batch, *, beta=0.1, alpha=0.5):
    """S(beta (D - alpha (K_l - sg(K_w))))."""
    k = s.response_sum("kl")
    return logistic(beta * (s.d - alpha * (k[:, 1] - sg(k[:, 0]))))


@variant(
    "2410.04350",
    "official",
    needs="reference weights",
    weighting="weights",
    notes=("the token-KL term is off by default; kl_alpha .5 where it is on, and then needs kl",),
)
def tis_dpo(s, batch, *, beta=0.1, kl_alpha=0.0):
    """S(beta (sum_t w_t a_t over y_w - the same over y_l) - TDPO2's term); w from `importance`."""
    d = s.d
    if kl_alpha:
        k = s.response_sum("kl")
        d = d - kl_alpha * (k[:, 1] - sg(k[:, 0]))
    return logistic(beta * d)


def importance(
    log_ratio: Float[Array, "b k t"], *, clip=1.5, low=0.7, high=1.3
) -> Float[Array, "b k t"]:
    """Token weights of TIS-DPO from log pi_DPO(token) - log pi_reverse-DPO(token): clipped, scaled.

    Clip +-1.5 and range [.7, 1.3] are the official ones. That the map is affine, and mirrored for
    rejected responses (index 1), is unverified.
    """
    sign = jnp.where(jnp.arange(log_ratio.shape[1]) == 1, -1.0, 1.0)[:, None]
    x = jnp.clip(sign * log_ratio, -clip, clip)
    return low + (high - low) * (x + clip) / (2 * clip)


@variant(
    "2406.14868",
    "inferred",
    needs="reference turn",
    weighting="turns",
    notes=("turn weight gamma^i (1-gamma^(T-i))/(1-gamma^T)",),
)
def dmpo(s, batch, *, beta=0.1, gamma=0.7):
    """DMPO: S(beta D), turns discounted and normalised by the number of turns."""
    return logistic(beta * s.d)


def dispersion(s: SeqStats, vocab, c) -> Float[Array, "b"]:
    """phi = -c log Hbar: Hbar the reference's mean token entropy over log V, averaged over the pair.

    "MallowsPO" by Chen et al. (arXiv:2405.14953). Large where answers are all but certain; Hbar is at least
    1e-6, as a certain reference has 0, or by rounding less.
    """
    entropy = s.response_sum("ref_entropy") / s.length
    return sg(-c * jnp.log(jnp.maximum(entropy[:, :2].mean(-1) / jnp.log(vocab), 1e-6)))


@variant(
    "2405.14953",
    "official",
    needs="reference ref_entropy vocab",
    choices={"link": ("logistic", "ipo")},
    notes=("beta 10 belongs to length_norm; with sums take .1",),
)
def mallows(s, batch, *, beta=10.0, c=0.29, length_norm=True, link="logistic"):
    """S(beta phi D), or (phi D - 1/(2 beta))^2; D of mean log-ratios with `length_norm`."""
    z = dispersion(s, batch.vocab, c) * (gap(s.a / s.length) if length_norm else s.d)
    return logistic(beta * z) if link == "logistic" else (z - 1 / (2 * beta)) ** 2


@variant(
    "2410.04203",
    "official",
    needs="reference ref_entropy vocab",
    notes=("beta, c and h are MallowsPO's and SimPO's scale, not the paper's table",),
)
def rainbow(s, batch, *, beta=10.0, c=0.29, mix=0.5, h=0.5):
    """RainbowPO: S(beta phi [(pb_w - pb_l) - m (qb_w - qb_l) - (1-m) h])."""
    z = gap(s.pb) - mix * gap(s.qb) - (1 - mix) * h
    return logistic(beta * dispersion(s, batch.vocab, c) * z)
