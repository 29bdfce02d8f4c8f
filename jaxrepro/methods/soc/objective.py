"""Supervised Optimism Correction: Be Confident When LLMs Are Sure, arXiv:2504.07527 (v2): the losses.

A decoder's logits are read as a soft Q-function of the token-level decision process (temperature 1):

    Q(s, a) = z(s)[a],    V(s) = logsumexp_a Q(s, a),    pi(a | s) = exp(Q(s, a) - V(s))
    L_SFT = E[V(s_t) - Q(s_t, y_t)],    L_V = E[-V(s_t)],    L_SOC = L_SFT + lam L_V
    a token, fused:  l_t = (1 - lam) V_t - z_t[y_t] = -(lp_t + lam V_t),    dl/dz = (1 - lam) pi - onehot(y)

over the states of the demonstrations; a row of the gradient sums to -lam. No official code exists. From a
summary of the paper come V, L_V and lam = 0.2; that both terms share one mask, and a temperature of 1, are
[inferred]. What follows from the formulas, ours:

    L_SOC = CE - lam KL(U || pi) - lam mean_a z - lam log v,    U uniform over v tokens

so SOC is negative label smoothing with e = -lam / (1 - lam), and a drift of all logits that leaves pi alone.
It has no lower bound: adding c to all logits lowers it by lam c. Of independent logits, gradient descent
ends in the projection of p / (1 - lam) onto the simplex, p the distribution of the data: every token
loses the same amount and what falls below zero is gone (`sharpened`).

The other variants are controls that ask which part of it matters; none is in the paper.

    centred      l_t = -lp - lam (V - mean_a z)                  SOC without the drift, the same fixed point
    smoothing    l_t = -(1 - e) lp + e (V - mean_a z)            the same / (1 - lam), written as smoothing
    entropy      l_t = -lp + lam H(pi)
    contrastive  l_t = -lp - lam (V - V')                        V' at the same place of a corrupted row
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrepro.config import UserError

LAM = 0.2  # of the paper, which calls 0.1 to 0.3 stable
NORMALISE = ("token", "sequence")
SCORES = ("logprob", "q", "q_minus_mean_logit")


class Stats(NamedTuple):
    """Statistics of the next-token distribution at each position, float32; None = not asked for."""

    lp: Float[Array, "*b"]  # log pi of the target
    lse: Float[Array, "*b"] | None = None  # V
    mean_logit: Float[Array, "*b"] | None = None
    entropy: Float[Array, "*b"] | None = None  # nats
    lse_corrupted: Float[Array, "*b"] | None = None  # V of the same position in a corrupted row


class Variant(NamedTuple):
    """needs: fields of Stats beside lp; formula(stats, lam) -> loss of each token."""

    needs: tuple[str, ...]
    formula: Callable[[Stats, float], Array]


def _smoothing(s: Stats, lam: float) -> Array:
    e = -lam / (1 - lam)
    return -(1 - e) * s.lp + e * (s.lse - s.mean_logit)


VARIANTS = {
    "soc": Variant(("lse",), lambda s, lam: -(s.lp + lam * s.lse)),
    "centred": Variant(
        ("lse", "mean_logit"), lambda s, lam: -(s.lp + lam * (s.lse - s.mean_logit))
    ),
    "smoothing": Variant(("lse", "mean_logit"), _smoothing),
    "entropy": Variant(("entropy",), lambda s, lam: -s.lp + lam * s.entropy),
    "contrastive": Variant(
        ("lse", "lse_corrupted"), lambda s, lam: -(s.lp + lam * (s.lse - s.lse_corrupted))
    ),
}


def check(
    lam: float,
    variant: str = "soc",
    *,
    allow_degenerate: bool = False,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    logit_softcap: float | None = None,
) -> None:
    """UserError for an unknown variant, for lam outside [0, 1), and for what works against V.

    lam >= 1 removes the normaliser: no logit is pushed down any more and training diverges.
    allow_degenerate lets it (and lam < 0) through, but for smoothing, whose e has a pole at 1.
    z_loss pulls V down where lam > 0 pushes it up, label_smoothing undoes it, and a soft cap bounds V.
    """
    if variant not in VARIANTS:
        raise UserError(f"soc.variant={variant!r} is not one of {', '.join(VARIANTS)}")
    outside = not 0 <= lam < 1
    if not abs(lam) < float("inf") or (outside and not allow_degenerate):
        raise UserError(
            f"soc.lam={lam} must lie in [0, 1): from 1 on nothing pushes a logit down and training "
            "diverges; the paper's is 0.2, soc.allow_degenerate=true shows it"
        )
    if lam >= 1 and variant == "smoothing":
        raise UserError(f"soc.lam={lam} has no label smoothing -lam / (1 - lam); use less than 1")
    for name, value, low in (("z_loss", z_loss, 0), ("label_smoothing", label_smoothing, 0)):
        if not low <= value < (1 if name == "label_smoothing" else float("inf")):
            raise UserError(f"soc.{name}={value} is no weight; use 0 for none")
        if lam and value:
            raise UserError(f"soc.{name}={value} works against soc.lam={lam}; set one of them to 0")
    if lam and logit_softcap:
        raise UserError(
            f"the model caps its logits at {logit_softcap}, which bounds V; use soc.lam=0 or "
            "another model"
        )


def stats(logits: Float[Array, "*b v"], targets: Int[Array, "*b"]) -> Stats:
    """All statistics from whole logits, which are made float32 first: for oracles and small vocabularies.

    A column of -inf is padding and counts nowhere. For large vocabularies see ops.logprob.token_stats.
    """
    z = logits.astype(jnp.float32)
    real = z > -jnp.inf
    lse = jax.nn.logsumexp(z, axis=-1)
    picked = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
    some = jnp.where(real, z, 0.0)
    p = jnp.where(real, jnp.exp(some - lse[..., None]), 0.0)
    entropy = lse - jnp.sum(p * some, axis=-1)
    return Stats(picked - lse, lse, some.sum(-1) / real.sum(-1), entropy)


def per_token(
    s: Stats,
    *,
    lam: float,
    variant: str = "soc",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Float[Array, "*b"]:
    """The loss of each token, nats; with lam = 0 the negative log-likelihood itself, of any variant.

    z_loss adds z_loss * V^2 and label_smoothing replaces a share of the target by the uniform
    distribution; `check` refuses both beside lam.
    """
    out = VARIANTS[variant].formula(s, lam) if lam else -s.lp
    if label_smoothing:
        out = (1 - label_smoothing) * out + label_smoothing * (s.lse - s.mean_logit)
    return out + z_loss * s.lse**2 if z_loss else out


def needs(variant: str, lam: float, z_loss: float = 0.0, label_smoothing: float = 0.0) -> set[str]:
    """The fields of Stats that `per_token` reads, lp among them."""
    found = {"lp", *(VARIANTS[variant].needs if lam else ())}
    found |= {"lse", "mean_logit"} if label_smoothing else set()
    return found | {"lse"} if z_loss else found


def aggregate(
    loss: Float[Array, "b t"], mask: Bool[Array, "b t"], *, normalise: str = "token"
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum and weight of the tokens under the mask; both are sums, so that a batch may be cut anywhere.

    token: every token weighs the same, the weight is their number. sequence: every row with a token
    weighs the same, the sum is over the rows' means. What is not under the mask may be anything, nan too.
    """
    if normalise not in NORMALISE:
        raise UserError(f"soc.normalise={normalise!r} is not one of {', '.join(NORMALISE)}")
    if normalise == "token":
        return jnp.sum(loss, where=mask), mask.sum().astype(jnp.float32)
    count = mask.sum(-1)
    rows = jnp.sum(loss, axis=-1, where=mask) / jnp.maximum(count, 1)
    return rows.sum(), (count > 0).sum().astype(jnp.float32)


def score(s: Stats, mask: Bool[Array, "*b t"], mode: str = "logprob") -> Float[Array, "*b"]:
    """Score of a response, summed over its tokens, without a length penalty.

    logprob: sum (Q - V), what beam search ranks by. q: sum Q; a shift of a state's logits changes it, so it
    compares nothing across prefixes and serves diagnosis only. q_minus_mean_logit: sum (Q - mean_a Q).
    """
    if mode not in SCORES:
        raise UserError(f"score {mode!r} is not one of {', '.join(SCORES)}")
    per_token = s.lp
    if mode != "logprob":
        per_token = per_token + s.lse - (s.mean_logit if mode == "q_minus_mean_logit" else 0.0)
    return jnp.sum(per_token, axis=-1, where=mask)


# Independent logits ------------------------------------------------------------------------------


def sharpened(p: Float[Array, "*b v"], lam: float) -> Float[Array, "*b v"]:
    """Where gradient descent on independent logits ends for the data distribution p: with S the kept set,

        pi(a) = max(0, (p(a) - r) / (1 - lam)),    r = (sum_S p - (1 - lam)) / |S|,    S = {a: p(a) > r}

    the Euclidean projection of p / (1 - lam) onto the simplex; r = lam / v where nothing is dropped.
    """
    if not 0 <= lam < 1:
        raise UserError(f"lam={lam} must lie in [0, 1): beyond there is no fixed point")
    down = jnp.flip(jnp.sort(p, axis=-1), -1)
    size = jnp.arange(1, p.shape[-1] + 1)
    r = (jnp.cumsum(down, axis=-1) - (1 - lam)) / size
    kept = jnp.sum(down > r, axis=-1, keepdims=True)
    return jnp.maximum(0.0, p - jnp.take_along_axis(r, kept - 1, axis=-1)) / (1 - lam)


def descend(
    p: Float[Array, "*b v"], *, lam: float, lr: float, steps: int, centred: bool = False
) -> Float[Array, "*b v"]:
    """Logits after `steps` of gradient descent from 0 on E_{y ~ p} l, one free logit for each token.

    Their mean is lr lam steps / v exactly; with `centred` it stays 0 and pi is the same.
    """

    def step(_, z):
        g = (1 - lam) * jax.nn.softmax(z) - p
        return z - lr * (g + lam / p.shape[-1] * centred)

    return jax.lax.fori_loop(0, steps, step, jnp.zeros_like(p))
