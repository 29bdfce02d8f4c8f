"""Losses of one response with a label or a reward, and of unlearning. a = log pi - log ref of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrepro.methods.dpo.links import logistic
from jaxrepro.methods.dpo.sequence import mean_tokens, nll
from jaxrepro.methods.dpo.spec import Result, variant

sg = jax.lax.stop_gradient
sigma = jax.nn.sigmoid


@variant(
    "2402.01306",
    "TRL",
    needs="reference labels kl_p kl_q",
    schema="unpaired",
    set_level=True,
    min_batch=2,
    notes=("mismatched responses come from the batch in its order: shuffle before, not after",),
)
def kto(s, batch, *, beta=0.1, lambda_d=1.0, lambda_u=1.0):
    """Desirable: lam_D (1 - sigmoid(beta (a - z0))); undesirable: lam_U (1 - sigmoid(beta (z0 - a))).

    z0 = max(0, mean over the batch of the log-ratio of mismatched responses (x_i, y_{i-1})), no gradient.
    """
    z0 = sg(jax.nn.relu((batch.kl_p - batch.kl_q).mean()))
    z = beta * (s.a[:, 0] - z0)
    return Result(
        jnp.where(batch.labels, lambda_d * sigma(-z), lambda_u * sigma(z)), None, {"kl": z0}
    )


@variant("2408.06266", "TRL", needs="reference labels", schema="unpaired")
def apo_zero_unpaired(s, batch, *, beta=0.1, lambda_d=1.0, lambda_u=1.0):
    """Desirable: lam_D (1 - sigmoid(beta a)); undesirable: lam_U sigmoid(beta a)."""
    z = beta * s.a[:, 0]
    return jnp.where(batch.labels, lambda_d * sigma(-z), lambda_u * sigma(z))


class RunningMean(NamedTuple):
    """Mean of everything seen; the first count is all but 0, so that the first batch sets the mean."""

    mean: Float[Array, ""]
    count: Float[Array, ""]

    @classmethod
    def start(cls):
        return cls(jnp.zeros((), jnp.float32), jnp.asarray(1e-24, jnp.float32))

    def update(self, x: Float[Array, "b"]) -> "RunningMean":
        """Merged with the mean of a batch, each with its count."""
        count = self.count + x.size
        return RunningMean(self.mean + (sg(x).mean() - self.mean) * x.size / count, count)


@variant(
    "2404.04656",
    "TRL",
    needs="reference labels",
    schema="unpaired",
    set_level=True,
    state=RunningMean.start,
)
def bco(s, batch, state, *, beta=0.1):
    """Desirable: S(beta a - d); undesirable: rho S(-(beta a - d)). d = running mean of beta a, this batch included.

    rho is `Batch.prompt_weight`, made by `density_ratio`; without it 1.
    """
    reward = beta * s.a[:, 0]
    state = RunningMean(*state).update(reward)
    z = reward - state.mean
    rho = 1.0 if batch.prompt_weight is None else batch.prompt_weight
    return Result(
        jnp.where(batch.labels, logistic(z), rho * logistic(-z)), state, {"delta": state.mean}
    )


def density_ratio(
    desirable: Float[Array, "b"], *, smallest: float = 0.5, largest: float = 10.0
) -> Float[Array, "b"]:
    """rho = P/(1-P), clipped; P = P(the prompt has a desirable response), from a classifier of prompts."""
    return jnp.clip(desirable / (1 - desirable + 1e-8), smallest, largest)


@variant(
    "2405.19107",
    "inferred",
    needs="reference scores value",
    schema="unpaired",
    notes=("tau .1 is ours",),
)
def dro(s, batch, *, tau=0.1):
    """DRO: (r - V(x) - tau a)^2 / 2, a value head V trained with it."""
    return 0.5 * (batch.scores[:, 0] - batch.value - tau * s.a[:, 0]) ** 2


@variant(
    "2312.02554",
    "inferred",
    needs="reference labels",
    schema="unpaired",
    choices={"positive": ("nll", "logistic")},
)
def ulma(s, batch, *, beta=0.1, positive="nll"):
    """ULMA: positives NLL (demonstrations) or S(beta a); negatives -log(1 - sigmoid(beta a))."""
    z = beta * s.a[:, 0]
    good = nll(s, batch, per="sum") if positive == "nll" else logistic(z)
    return jnp.where(batch.labels, good, logistic(-z))


def _retain(s, batch, kind):
    """What keeps the rest: of response 1, the token mean of its NLL or KL(ref || pi); 0 where there is none."""
    if s.p.shape[1] == 1 or kind == "none":
        return 0.0
    if kind == "nll":
        return nll(s, batch, 1)
    return s.response_sum("kl")[:, 1] / mean_tokens(s.length[:, 1], batch)


KEPT = "retain=kl is a mean over the kept tokens, as retain=nll is (inferred)"


@variant(
    "2404.05868",
    "official",
    schema="forget",
    choices={"retain": ("nll", "kl", "none")},
    notes=(KEPT,),
)
def npo(s, batch, *, beta=0.1, retain="nll", retain_weight=1.0):
    """NPO: (2/beta) S(-beta a) of response 0, to be forgotten, + what keeps response 1, if there is one."""
    return 2 / beta * logistic(-beta * s.a[:, 0]) + retain_weight * _retain(s, batch, retain)


@variant(
    "2410.07163",
    "official",
    needs="",
    schema="forget",
    choices={"retain": ("nll", "kl", "none")},
    notes=("gamma stands inside beta, as in the official code", KEPT),
)
def simnpo(s, batch, *, beta=2.5, gamma=0.0, forget_weight=0.1375, retain="nll", retain_weight=1.0):
    """SimNPO: weight (2/beta) S(beta (-pb - gamma)) of response 0 + what keeps response 1."""
    forget = 2 / beta * logistic(beta * (-s.pb[:, 0] - gamma))
    return forget_weight * forget + retain_weight * _retain(s, batch, retain)
