"""Losses on responses that the policy, its reference or a mixture of both has just written.

How the responses come about (sampling, judging, rounds) is the online loop's; here are the losses.
"""

import jax
import jax.numpy as jnp

from jaxrepro.methods.dpo.links import logistic, policy_kl
from jaxrepro.methods.dpo.spec import variant

sg = jax.lax.stop_gradient


def _pair(s, beta, link):
    if link == "ipo":
        return (s.d - 1 / (2 * beta)) ** 2
    return logistic(beta * s.d)


def _chosen(x, index):
    return jnp.take_along_axis(x, index[:, None], 1)[:, 0]


@variant("2402.04792", "TRL", choices={"link": ("logistic", "ipo")})
def online_dpo(s, batch, *, beta=0.1, link="logistic"):
    """OAIF: DPO or IPO on two samples of the policy, ordered by a judge."""
    return _pair(s, beta, link)


@variant(
    "2401.01335",
    "official",
    notes=("chosen: a human's; rejected: the last iterate's, which is the reference",),
)
def spin(s, batch, *, beta=0.1):
    """SPIN: DPO against the responses of the last iterate."""
    return logistic(beta * s.d)


@variant("2405.21046", "TRL", needs="reference explore", choices={"link": ("logistic", "ipo")})
def xpo(s, batch, *, beta=0.1, alpha=1e-5, link="logistic"):
    """XPO: S(beta D) + alpha log pi(y_ref); `explore` is the index of the reference's own sample.

    The term is added to a loss: it pushes the log-prob of what the reference writes down.
    """
    return _pair(s, beta, link) + alpha * _chosen(s.p, batch.explore)


@variant("2405.19332", "official", needs="reference explore")
def selm(s, batch, *, beta=0.01, alpha=1e-3):
    """SELM: S(beta D) + alpha beta a(y), y the response of index `explore`."""
    return logistic(beta * s.d) + alpha * beta * _chosen(s.a, batch.explore)


@variant("2312.00886", "TRL", needs="reference scores tokens", schema="unpaired")
def nash_md(s, batch, *, beta=0.1):
    """Nash-MD: -(P - 1/2) log pi(y) + beta sum_t sg(log pi/ref)_t log pi_t; scores hold P(y beats y').

    y comes from the policy, y' from the geometric mixture of policy and reference. A policy gradient: its
    value means nothing.
    """
    t = s.tokens
    lp, ref = (jnp.where(t.mask, x, 0.0)[:, 0] for x in (t.lp, t.ref_lp))
    return (sg(lp - ref) * lp).sum(-1) * beta - (batch.scores[:, 0] - 0.5) * s.plain[:, 0]


@variant("2403.08635", "inferred", notes=("both samples of the mixture: online.kind=ipo_md",))
def ipo_md(s, batch, *, beta=0.1):
    """IPO-MD: (D - 1/(2 beta))^2 on two samples of the mixture of policy and reference."""
    return (s.d - 1 / (2 * beta)) ** 2


@variant("2406.01462", "inferred", schema="sampled", notes=("lam .01 is ours",))
def hypo(s, batch, *, beta=0.1, lam=0.01):
    """HyPO: S(beta D) + lam KL(pi || ref), the KL from response 2, a sample of the policy."""
    return logistic(beta * s.d) + lam * policy_kl(s.a[:, 2], s.p[:, 2])


@variant("2405.00747", "inferred", schema="sampled", notes=("alpha .1 and beta .01 are ours",))
def spo_soft(s, batch, *, alpha=0.1, beta=0.01):
    """Soft preference optimisation: S(alpha (p_w - p_l)) + beta KL(pi || ref) from response 2."""
    return logistic(alpha * (s.p[:, 0] - s.p[:, 1])) + beta * policy_kl(s.a[:, 2], s.p[:, 2])


@variant(
    "2410.04166",
    "inferred",
    needs="reference kl",
    notes=("beta .5 is ours; KL over both responses",),
)
def pmpo(s, batch, *, alpha=0.5, beta=0.5):
    """PMPO: -alpha p_w + (1 - alpha) p_l + beta KL(ref || pi), the mean of both responses' token sums."""
    kl = s.response_sum("kl")[:, :2].mean(-1)
    return -alpha * s.p[:, 0] + (1 - alpha) * s.p[:, 1] + beta * kl
