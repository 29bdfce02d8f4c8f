"""Losses of K candidates of a prompt. r = scores (b, k), a = log pi - log ref, pb = mean log-prob.

`Batch.valid` says which candidates exist, so lists may be ragged; a missing one changes nothing.
"""

import jax
import jax.numpy as jnp

from jaxrepro.methods.dpo.links import logistic
from jaxrepro.methods.dpo.sequence import nll
from jaxrepro.methods.dpo.spec import variant

sg = jax.lax.stop_gradient
NEGATIVE = -1e30  # a logit without probability whose gradient is 0, not nan


def _valid(s, batch):
    return jnp.ones_like(s.p, bool) if batch.valid is None else batch.valid


def _log_softmax(x, valid):
    """log softmax over valid candidates; 0 at the others."""
    return jnp.where(valid, jax.nn.log_softmax(jnp.where(valid, x, NEGATIVE), -1), 0.0)


def _softmax(x, valid):
    return jnp.where(valid, jax.nn.softmax(jnp.where(valid, x, NEGATIVE), -1), 0.0)


@variant("2402.05369", "official", needs="reference scores", schema="ranked")
def infonca(s, batch, *, beta=0.01, alpha=1e-4):
    """-sum_k P_k log softmax(beta a)_k, P = softmax(r/alpha)."""
    valid = _valid(s, batch)
    target = _softmax(batch.scores / alpha, valid)
    return -(target * _log_softmax(beta * s.a, valid)).sum(-1)


@variant("2402.05369", "official", needs="reference scores", schema="ranked")
def nca_reward(s, batch, *, beta=0.01, alpha=1e-4):
    """NCA: sum_k P_k S(beta a_k) + mean_k S(-beta a_k)."""
    valid = _valid(s, batch)
    target = _softmax(batch.scores / alpha, valid)
    share = valid / valid.sum(-1, keepdims=True)
    return (target * logistic(beta * s.a) + share * logistic(-beta * s.a)).sum(-1)


@variant(
    "2402.00856", "official", needs="reference scores", schema="ranked", notes=("beta_r 1 is ours",)
)
def exo_rw(s, batch, *, beta=0.1, beta_r=1.0):
    """KL(softmax(beta a) || softmax(r/beta_r))."""
    valid = _valid(s, batch)
    log_q = _log_softmax(beta * s.a, valid)
    log_p = _log_softmax(batch.scores / beta_r, valid)
    return (jnp.where(valid, jnp.exp(log_q), 0.0) * (log_q - log_p)).sum(-1)


@variant("2306.17492", "official", needs="scores", schema="ranked")
def pro(s, batch, *, sft_weight=0.05):
    """PRO: sum over ranks k < K of log(e^(T_k pb_k) + sum_{i>k} e^(T_ki pb_i)) - T_k pb_k, best first.

    T_ki = r_k - r_i, T_k = max_i T_ki; + sft_weight (K-1)^2 times the summed NLL of the best.
    """
    valid = _valid(s, batch)
    r = jnp.where(valid, batch.scores, -jnp.inf)
    order = jnp.argsort(-r, axis=-1)
    r, pb, ok = (jnp.take_along_axis(x, order, -1) for x in (batch.scores, s.pb, valid))
    later = jnp.triu(jnp.ones((r.shape[1],) * 2, bool), 1) & ok[:, None, :]  # (b, k, i): i after k
    t = r[:, :, None] - r[:, None, :]
    t_max = jnp.where(later, t, 0.0).max(-1)
    others = jnp.where(later, t * pb[:, None, :], NEGATIVE)
    own = t_max * pb
    rank = jax.nn.logsumexp(jnp.concatenate([own[..., None], others], -1), axis=-1) - own
    ranked = jnp.where(later.any(-1), rank, 0.0).sum(-1)
    pairs = (ok.sum(-1) - 1.0) ** 2
    return ranked + sft_weight * pairs * nll(s, batch, order[:, 0], per="sum")


@variant(
    "2402.01878", "inferred", needs="reference scores", schema="ranked", notes=("beta .1 is ours",)
)
def lipo(s, batch, *, beta=0.1):
    """LiPO-lambda: sum over r_i > r_j of |G_i - G_j| |1/log(1+rank_i) - 1/log(1+rank_j)| S(s_i - s_j).

    G = 2^r - 1, s = beta a; ranks from 1 by s, without gradient.
    """
    valid = _valid(s, batch)
    score = beta * s.a
    key = jnp.where(valid, sg(score), -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-key, axis=-1), axis=-1) + 1.0
    gain, discount = 2.0**batch.scores, 1 / jnp.log1p(rank)
    weight = jnp.abs(_pairs(gain)) * jnp.abs(_pairs(discount))
    better = (_pairs(batch.scores) > 0) & valid[:, :, None] & valid[:, None, :]
    return jnp.where(better, weight * logistic(_pairs(score)), 0.0).sum((1, 2))


def _pairs(x):
    """x_i - x_j as (b, i, j)."""
    return x[:, :, None] - x[:, None, :]


@variant(
    "2405.13516", "inferred", needs="scores", schema="ranked", notes=("temperature 2 is ours",)
)
def lire(s, batch, *, temperature=2.0):
    """LIRE: -sum_k r_k softmax(p/T)_k."""
    return -(batch.scores * _softmax(s.p / temperature, _valid(s, batch))).sum(-1)


@variant(
    "2410.12138", "inferred", schema="ranked", notes=("first half chosen, second half rejected",)
)
def mdpo_multi(s, batch, *, beta=0.1):
    """Multi-sample DPO: S(beta (mean a of the chosen group - mean a of the rejected group))."""
    half = s.p.shape[1] // 2
    return logistic(beta * (s.a[:, :half].mean(-1) - s.a[:, half:].mean(-1)))


@variant(
    "2403.03419",
    "inferred",
    schema="ranked",
    notes=("self-samples first, the rejected response last",),
)
def d2o(s, batch, *, beta=0.1):
    """D2O: S(beta (mean a of self-samples - a_l)): dispreferred responses without positives."""
    return logistic(beta * (s.a[:, :-1].mean(-1) - s.a[:, -1]))


def soft_ndcg(score, gain, valid, tau):
    """Normalised discounted cumulative gain with NeuralSort's relaxed permutation; 1 is best."""
    n = valid.sum(-1).astype(score.dtype)[:, None, None]
    both = valid[:, :, None] & valid[:, None, :]
    spread = jnp.where(both, jnp.abs(_pairs(score)), 0.0).sum(-1)  # (b, j)
    place = jnp.arange(1, score.shape[1] + 1)[None, :, None]
    logit = (n + 1 - 2 * place) * score[:, None, :] - spread[:, None, :]
    permutation = _softmax(logit / tau, valid[:, None, :])  # (b, place, j)
    discount = jnp.where(place[..., 0] <= n[..., 0], 1 / jnp.log2(1.0 + place[..., 0]), 0.0)
    gain = jnp.where(valid, gain, 0.0)
    ideal = (-jnp.sort(-gain, -1) * discount).sum(-1)
    return ((permutation @ gain[..., None])[..., 0] * discount).sum(-1) / jnp.maximum(ideal, 1e-9)


@variant(
    "2410.04346",
    "inferred",
    needs="reference scores",
    schema="ranked",
    notes=(
        "tau 1 and NeuralSort without Sinkhorn are ours: the relaxed NDCG of a wrong order may pass 1",
        "gain is 2^r - 1",
    ),
)
def opo(s, batch, *, beta=0.1, tau=1.0):
    """OPO: 1 - NDCG of beta a against scores, sorting relaxed."""
    return 1 - soft_ndcg(beta * s.a, 2.0**batch.scores - 1, _valid(s, batch), tau)


@variant(
    "2410.18127",
    "inferred",
    needs="scores",
    schema="ranked",
    notes=("of mean log-probs, without reference; sorting networks replaced by NeuralSort",),
)
def drpo(s, batch, *, beta=1.0, tau=1.0):
    """DRPO: 1 - NDCG of beta pb against scores, sorting relaxed."""
    return 1 - soft_ndcg(beta * s.pb, 2.0**batch.scores - 1, _valid(s, batch), tau)
