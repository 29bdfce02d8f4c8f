"""Losses of a pair that carries more than an order: scores, ties, several objectives, age, safety.

Notation as in pairwise.py; r is a reward-model score.
"""

import jax
import jax.numpy as jnp

from jaxrepro.methods.dpo import links
from jaxrepro.methods.dpo.links import logistic
from jaxrepro.methods.dpo.spec import variant


def gap(x):
    return x[:, 0] - x[:, 1]


@variant(
    "2402.10571",
    "official",
    needs="reference scores",
    schema="scored",
    choices={"offset": ("log", "identity", "ratio")},
)
def odpo(s, batch, *, beta=0.1, alpha=1.0, offset="log"):
    """S(beta D - alpha f(r_w, r_l)), f = log(r_w - r_l), r_w - r_l or log(r_w / r_l). Wants r_w > r_l."""
    if offset == "ratio":
        f = jnp.log(batch.scores[:, 0] / batch.scores[:, 1])
    else:
        f = gap(batch.scores)
        f = jnp.log(f) if offset == "log" else f
    return logistic(beta * s.d - alpha * f)


@variant("2405.19316", "inferred", needs="reference scores", schema="scored")
def edpo(s, batch, *, beta=0.1):
    """e-DPO, a reward model distilled: (r_w - r_l - beta D)^2."""
    return (gap(batch.scores) - beta * s.d) ** 2


@variant("2409.06691", "inferred", needs="reference probability")
def gdpo_soft(s, batch, *, beta=0.1):
    """Geometric DPO: S(beta (2 P - 1) D), P = P(chosen beats rejected) in [.5, 1]."""
    return logistic(beta * (2 * batch.probability - 1) * s.d)


@variant("2405.00675", "official", needs="reference scores", schema="scored")
def sppo_soft(s, batch, *, beta=0.001):
    """SPPO: sum over both responses of (a - (P - 1/2)/beta)^2 / 2; scores are their win probabilities P."""
    return 0.5 * ((s.a[:, :2] - (batch.scores - 0.5) / beta) ** 2).sum(-1)


def _rao_kupper(mu, ties, alpha):
    """-log of P(w) = sigmoid(mu - alpha), or of P(tie) = (e^(2 alpha) - 1) P(w) P(l)."""
    tie = logistic(mu - alpha) + logistic(-mu - alpha) - jnp.log(jnp.expm1(2 * alpha))
    return jnp.where(ties, tie, logistic(mu - alpha))


@variant("2411.02442", "official", needs="reference ties", schema="tie")
def todo(s, batch, *, beta=0.01, alpha=0.5):
    """TODO: Rao-Kupper's law of ties of mu = beta D, with threshold alpha."""
    return _rao_kupper(beta * s.d, batch.ties, alpha)


@variant("2409.17431", "inferred", needs="reference ties", schema="tie")
def dpo_rk(s, batch, *, beta=0.1, nu=3.0):
    """DPO-RK: the same law, threshold log nu."""
    return _rao_kupper(beta * s.d, batch.ties, jnp.log(nu))


@variant("2409.17431", "inferred", needs="reference ties", schema="tie")
def dpo_d(s, batch, *, beta=0.1, nu=1.0):
    """DPO-D, Davidson: P(w) = 1/(1 + e^-mu + 2 nu e^(-mu/2)), P(tie) = 2 nu e^(-mu/2) P(w)."""
    mu = beta * s.d
    half = jnp.log(2 * nu) - mu / 2
    total = jax.nn.logsumexp(jnp.stack([jnp.zeros_like(mu), -mu, half]), axis=0)
    return total - jnp.where(batch.ties, half, 0.0)


@variant(
    "2310.03708",
    "official",
    needs="reference rewards",
    schema="multi",
    choices={"link": ("logistic", "hinge")},
)
def modpo(s, batch, *, beta=0.1, weights=(0.5, 0.5), link="logistic"):
    """MODPO: S((beta D - sum_j w_j (r_j(y_w) - r_j(y_l)))/w_0); w_0 belongs to the pair's own objective."""
    other = sum(w * gap(batch.rewards[..., j]) for j, w in enumerate(weights[1:]))
    return links.link(link, (beta * s.d - other) / weights[0])


@variant("2407.18676", "inferred", needs="reference age")
def ns_dpo(s, batch, *, beta=0.1, gamma=0.95):
    """NS-DPO: gamma^age S(beta D), age = steps of time since the label."""
    return gamma**batch.age * logistic(beta * s.d)


@variant(
    "MoJSnVZ59d", "inferred", needs="reference unsafe", notes=("source is OpenReview MoJSnVZ59d",)
)
def safedpo(s, batch, *, beta=0.1, delta=10.0):
    """SafeDPO: the safe response becomes the chosen one; then S(beta D - (h_l - h_w) delta), h = unsafe."""
    unsafe = batch.unsafe.astype(s.p.dtype)
    harm = unsafe[:, 1] - unsafe[:, 0]  # -1 where only the chosen is unsafe: turn the pair round
    d = jnp.where(harm < 0, -s.d, s.d)
    return logistic(beta * d - jnp.abs(harm) * delta)


@variant(
    "2410.08458",
    "inferred",
    needs="scores reward_head",
    schema="scored",
    notes=("P = sigmoid(p_w - p_l); alpha and gamma are ours, no default in the source",),
)
def drdo(s, batch, *, alpha=0.1, gamma=2.0):
    """DRDO: ((r_w - r_l) - (rh_w - rh_l))^2 - alpha (1-P)^gamma log P, rh a head of the policy."""
    z = s.p[:, 0] - s.p[:, 1]
    contrast = jnp.exp(gamma * jax.nn.log_sigmoid(-z)) * logistic(z)
    return (gap(batch.scores) - gap(batch.reward_head)) ** 2 + alpha * contrast
