"""Losses whose items depend on each other, or on earlier batches: sorts, means, moving averages.

All of them are plain jnp on the global batch: under jit, sharded arrays give the same numbers as one
device. Cutting a batch into micro-batches makes another loss; `programs.prepare` gives the right one its slopes.

The moving averages of beta-DPO and alpha-DPO are updated before use, start at 0 and are not corrected for
that start, as in the official code: the first standard deviation is a tenth of the batch's, and where the
policy is still the reference it is 0. Hence `eps`, and `bias_correction` as an option.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrepro.config import UserError
from jaxrepro.methods.dpo.links import logistic
from jaxrepro.methods.dpo.spec import Result, variant

sg = jax.lax.stop_gradient


# ---- optimal transport


@variant("2406.05882", "TRL", set_level=True)
def aot(s, batch, *, beta=0.01, label_smoothing=0.0):
    """AOT: d = sort(p_w - p_l) - sort(q_w - q_l) over the batch; (1-e) S(beta d) + e S(-beta d)."""
    d = jnp.sort(s.p[:, 0] - s.p[:, 1]) - jnp.sort(s.q[:, 0] - s.q[:, 1])
    return logistic(beta * d, label_smoothing)


@variant("2406.05882", "TRL", set_level=True)
def aot_unpaired(s, batch, *, beta=0.01, label_smoothing=0.0):
    """The same with d = sort(a_w) - sort(a_l)."""
    return logistic(beta * (jnp.sort(s.a_w) - jnp.sort(s.a_l)), label_smoothing)


# ---- distributional robustness, all pairs of a batch, halves


@variant("2407.07880", "official", set_level=True)
def dr_dpo(s, batch, *, beta=0.1, beta_prime=1.0):
    """Dr. DPO: -b' log mean_i exp(-S(beta D_i)/b'), the same value for each item."""
    losses = logistic(beta * s.d)
    least = sg(losses.min())  # taken out: keeps the digits where beta_prime is large
    value = least - beta_prime * jnp.log1p(jnp.expm1(-(losses - least) / beta_prime).mean())
    return jnp.broadcast_to(value, losses.shape)


@variant("2402.10958", "inferred", needs="reference embedding", set_level=True)
def rpo_rel(s, batch, *, beta=0.1, tau=0.5):
    """Relative preference optimisation: sum_j w_ij S(beta (a_w,i - a_l,j)) over prompts j.

    w_i = softmax_j(-cosine distance of the prompts / tau).
    """
    x = batch.embedding / jnp.linalg.norm(batch.embedding, axis=-1, keepdims=True)
    w = jax.nn.softmax((x @ x.T - 1) / tau, axis=-1)
    return (w * logistic(beta * (s.a_w[:, None] - s.a_l[None, :]))).sum(-1)


@variant("2402.01306", "public", set_level=True, notes=("an early estimate of KTO's KL; use kto",))
def kto_pair(s, batch, *, beta=0.1):
    """Mean of 1 - sigmoid(beta (a_w - K_l)) and 1 - sigmoid(beta (K_w - a_l)), K = max(0, batch mean a)."""
    k = sg(jax.nn.relu(s.a.mean(0)))
    return 0.5 * (jax.nn.sigmoid(beta * (k[1] - s.a_w)) + jax.nn.sigmoid(beta * (s.a_l - k[0])))


# ---- moving averages


class Ema(NamedTuple):
    """Moving mean and standard deviation of a margin, and how often they were updated."""

    mean: Float[Array, ""]
    std: Float[Array, ""]
    steps: Float[Array, ""]

    @classmethod
    def start(cls):
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))

    def update(self, x: Float[Array, "b"], *, decay) -> "Ema":
        if x.shape[0] < 2:
            raise UserError("a batch of 1 has no standard deviation; use 2 pairs or more")
        x = sg(x)
        mean = decay * self.mean + (1 - decay) * x.mean()
        std = decay * self.std + (1 - decay) * x.std(ddof=1)
        return Ema(mean, std, self.steps + 1)

    def read(self, *, decay, bias_correction: bool) -> tuple[Array, Array]:
        scale = 1 / (1 - decay**self.steps) if bias_correction else 1.0
        return self.mean * scale, self.std * scale


def select(
    key, log_weight: Float[Array, "b"], kept: int | Float[Array, ""], *, smallest: float = -87.0
) -> Bool[Array, "b"]:
    """True at `kept` items, drawn without replacement with weights exp(log_weight) (Gumbel top-k).

    Uniform where every weight would underflow in float32, so that one outlying average keeps nobody out.
    """
    log_weight = jnp.where((log_weight < smallest).all(), 0.0, log_weight)
    noisy = log_weight + jax.random.gumbel(key, log_weight.shape, log_weight.dtype)
    rank = jnp.argsort(jnp.argsort(-noisy))
    return rank < kept


@variant(
    "2407.08639",
    "official",
    needs="reference key",
    set_level=True,
    min_batch=2,
    state=Ema.start,
    notes=("the official 0/0 where policy = reference is avoided by eps",),
)
def beta_dpo(
    s, batch, state, *, beta=0.1, alpha=0.6, rho=0.2, decay=0.9, floor=1e-3, eps=1e-6, bias_correction=False
):  # fmt: skip
    """beta-DPO: mean over kept pairs of S(beta_b D), beta_b = max(1e-3, beta (1 + alpha (mean_kept D - M0))).

    (1 - rho) of the pairs are kept, drawn with weight exp(-((D - M0)/s0)^2/2) around the moving mean M0
    and deviation s0. A dropped pair has loss 0 and a kept one b/kept times its own, so that the mean
    over items is the mean over kept pairs.
    """
    d = sg(s.d)
    b = d.shape[0]
    kept = jnp.maximum(jnp.floor((1 - rho) * b + 1e-3), 1.0)  # .8 * 10 may be rounded below 8
    state = Ema(*state).update(d, decay=decay)
    mean, std = state.read(decay=decay, bias_correction=bias_correction)
    keep = select(batch.key, -0.5 * ((d - mean) / (std + eps)) ** 2, kept)
    gain = jnp.where(keep, d, 0.0).sum() / kept - mean
    beta_b = jnp.maximum(floor, beta * (1 + alpha * gain))
    per_item = jnp.where(keep, logistic(beta_b * s.d), 0.0) * (b / kept)
    return Result(per_item, state, {"beta": beta_b, "margin_mean": mean, "margin_std": std})


@variant("2410.10148", "official", set_level=True, min_batch=2, state=Ema.start)
def alpha_dpo(
    s, batch, state, *, beta=2.5, gamma=0.6, alpha=0.2, decay=0.9, eps=1e-6, bias_correction=False
):
    """alpha-DPO: S(beta [(pb_w - pb_l) - sg(gamma + alpha (M - mu)/sd)]), M = D of mean log-probs."""
    m = sg((s.pb - s.qb)[:, 0] - (s.pb - s.qb)[:, 1])
    state = Ema(*state).update(m, decay=decay)
    mean, std = state.read(decay=decay, bias_correction=bias_correction)
    target = gamma + alpha * (m - mean) / (std + eps)
    z = beta * (s.pb[:, 0] - s.pb[:, 1] - target)
    return Result(logistic(z), state, {"margin_mean": mean, "margin_std": std})
