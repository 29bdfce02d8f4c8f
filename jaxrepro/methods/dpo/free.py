"""Losses of a pair without a reference policy, and of triples with a gold response.

p is the sum of log pi over a response, pb its mean over tokens; S(z) = -log sigmoid(z).
"""

import jax
import jax.numpy as jnp

from jaxrepro.methods.dpo import links
from jaxrepro.methods.dpo.links import hinge, log1mexp, logistic
from jaxrepro.methods.dpo.sequence import nll
from jaxrepro.methods.dpo.spec import variant

sg = jax.lax.stop_gradient


def gap(x, w=0):
    return x[:, w] - x[:, w + 1]


@variant(
    "2405.16436",
    "TRL",
    needs="",
    divergence=True,
    choices={"per": ("token", "sequence", "sum")},
    notes=("token mean, as TRL; the official RPO and IRPO divide per sequence: per",),
)
def sft(s, batch, *, per="token"):
    """NLL of the chosen response: mean over the chosen tokens of the global batch."""
    return nll(s, batch, per=per)


@variant(
    "2403.07691",
    "TRL",
    needs="",
    notes=("NLL of the response; TRL and the official code include the prompt: prompt_nll",),
)
def orpo(s, batch, *, lam=0.1, prompt_nll=False, nll_weight=1.0):
    """NLL(chosen) + lam S(log odds_w - log odds_l), log odds = pb - log(1 - e^pb).

    With `prompt_nll` the NLL is also over the prompt: `Batch.prompt_p` and `prompt_n`; the mean over
    tokens is then of this batch (or of `Batch.mean_chosen_tokens`, prompts included).
    """
    log_odds = gap(s.pb) - gap(log1mexp(s.pb))
    if prompt_nll:
        lp, n = s.plain[:, 0] + batch.prompt_p, s.n[:, 0] + batch.prompt_n
        mean_n = n.mean() if batch.mean_chosen_tokens is None else batch.mean_chosen_tokens
        likelihood = -lp / mean_n
    else:
        likelihood = nll(s, batch)
    return nll_weight * likelihood + lam * logistic(log_odds)


@variant(
    "2405.14734",
    "TRL",
    needs="",
    notes=("gamma is beta times the paper's gamma/beta ratio", "nll_weight > 0 is CPO-SimPO"),
)
def simpo(s, batch, *, beta=2.0, gamma=1.0, label_smoothing=0.0, nll_weight=0.0):
    """S(beta (pb_w - pb_l) - gamma)."""
    loss = logistic(beta * gap(s.pb) - gamma, label_smoothing)
    return loss + nll_weight * nll(s, batch) if nll_weight else loss


@variant(
    "2401.08417",
    "TRL",
    needs="",
    choices={"link": ("logistic", "hinge", "ipo")},
    notes=("relaxed: the later form of the official repository, no longer the paper's",),
)
def cpo(s, batch, *, beta=0.1, alpha=1.0, label_smoothing=0.0, link="logistic", relaxed=False):
    """S(beta (p_w - p_l)) + alpha NLL(y_w). `link` ipo: (pb_w - pb_l - 1/(2 beta))^2.

    `relaxed` multiplies p_l by min(1, .9 exp(.4 |pb_w - pb_l|) - 1).
    """
    p_w, p_l = s.p[:, 0], s.p[:, 1]
    if relaxed:
        p_l = p_l * jnp.minimum(1.0, 0.9 * links.exp(0.4 * jnp.abs(gap(s.pb))) - 1)
    if link == "ipo":
        loss = (gap(s.pb) - 1 / (2 * beta)) ** 2
    elif link == "hinge":
        loss = hinge(beta * (p_w - p_l))
    else:
        loss = logistic(beta * (p_w - p_l), label_smoothing)
    return loss + alpha * nll(s, batch)


@variant("2501.03884", "TRL", needs="")
def alphapo(s, batch, *, alpha=0.25, beta=2.5, gamma=0.1):
    """S(beta (r_w - r_l) - gamma), r = (1 - e^(-alpha pb))/alpha; alpha 0 is SimPO."""
    if isinstance(alpha, float) and alpha == 0.0:
        return logistic(beta * gap(s.pb) - gamma)
    r = -jnp.expm1(jnp.clip(-alpha * s.pb, -links.MAX_EXPONENT, links.MAX_EXPONENT)) / alpha
    return logistic(beta * gap(r) - gamma)


@variant("2305.10425", "public", needs="", notes=("NLL is a sum over tokens, as in HALOs",))
def slic_hf(s, batch, *, delta=1.0, lam=0.1):
    """SLiC-HF: max(0, delta - p_w + p_l) + lam NLL(y_w)."""
    return jax.nn.relu(delta - gap(s.p)) + lam * nll(s, batch, per="sum")


@variant("2502.00883", "official", needs="")
def simper(s, batch):
    """SimPER: -e^pb_w + e^pb_l, inverse perplexities."""
    return -gap(jnp.exp(s.pb))


@variant(
    "2304.05302",
    "official",
    needs="scores",
    schema="ranked",
    notes=(
        "rank_weight 100 is the released trainer's; it averages the NLL over padding too, we do not",
        "the paper's form is weight 1 with a summed NLL (unverified)",
    ),
)
def rrhf(s, batch, *, rank_weight=100.0, nll_weight=1.0, length_power=1.0):
    """weight * sum_{r_i < r_j} max(0, pb_i - pb_j) + NLL(best response)."""
    pb = s.p / s.length**length_power
    valid = jnp.ones_like(s.p, bool) if batch.valid is None else batch.valid
    r = batch.scores
    worse = (r[:, :, None] < r[:, None, :]) & valid[:, :, None] & valid[:, None, :]  # (b, i, j)
    rank = jnp.where(worse, jax.nn.relu(pb[:, :, None] - pb[:, None, :]), 0.0).sum((1, 2))
    best = jnp.where(valid, r, -jnp.inf).argmax(-1)
    return rank_weight * rank + nll_weight * nll(s, batch, best)


@variant(
    "2405.16681", "TRL", needs="gold", schema="triple", notes=("Triple Preference Optimization",)
)
def tpo(s, batch, *, beta=0.01, alpha=1.0):
    """S(beta (p_w - p_l)) + alpha NLL(gold)."""
    return logistic(beta * gap(s.p, 1)) + alpha * nll(s, batch)


@variant("2405.16681", "TRL", needs="gold", schema="triple")
def tpo_l(s, batch, *, beta=0.01, alpha=1.0, gamma=0.5):
    """S(beta (pb_w - pb_l) - gamma) + alpha NLL(gold)."""
    return logistic(beta * gap(s.pb, 1) - gamma) + alpha * nll(s, batch)
