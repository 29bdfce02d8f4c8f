"""Policy-gradient surrogates of language-model RL and their reductions.

    rho_t = exp(lp_t - old_t)                                   token level; PPO, arXiv:1707.06347
    rho   = exp(mean_t (lp_t - old_t))                          sequence level; GSPO, arXiv:2507.18071
    l = -min(rho A, clip(rho, 1 - low, 1 + high) A)             clip-higher (high > low): DAPO, arXiv:2503.14476
    l = min(l, -c A) where A < 0                                dual clip, arXiv:1912.09729
    rho <- min(rho, delta) in the unclipped branch              two-sided cap

Reductions return (sum, weight): micro-batches and devices add both and divide once. So `dapo` is exact
for every split, and `bnpo`, whose definition is the token mean of the *local* batch, is the one mode
that depends on how the batch was cut. Sequences without a scored token count in no weight.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrepro.config import UserError

LEVELS = ("token", "sequence")
AGGREGATES = ("grpo", "bnpo", "dapo", "dr_grpo", "sequence_sum")


def ratio(
    lp: Float[Array, "*b t"],
    old_lp: Float[Array, "*b t"],
    mask: Bool[Array, "*b t"],
    *,
    level: str = "token",
) -> Float[Array, "*b s"]:
    """Probability ratio new / old: one a token (s = t), or one a sequence (s = 1) at level "sequence".

    See "Group Sequence Policy Optimization" by Zheng et al. (arXiv:2507.18071), eq. 7. 1 at masked tokens.
    """
    d = jnp.where(mask, lp, 0.0) - jnp.where(mask, old_lp, 0.0)
    if level == "token":
        return jnp.exp(d)
    if level == "sequence":
        return jnp.exp(d.sum(-1, keepdims=True) / jnp.maximum(mask.sum(-1, keepdims=True), 1))
    raise UserError(f"ratio level is {level!r}; choose one of {', '.join(LEVELS)}")


def surrogate(
    rho: Float[Array, "*b t"],
    advantage: Float[Array, "*b s"],
    *,
    clip: tuple[float, float] | None = None,
    dual: float | None = None,
    delta: float | None = None,
) -> Float[Array, "*b t"]:
    """Loss to minimise, one value a ratio. `advantage` has s = 1 (one a sequence) or s = t (one a token).

    See "Proximal Policy Optimization Algorithms" by Schulman et al. (arXiv:1707.06347), eq. 7, and
    "Mastering Complex Control in MOBA Games" by Ye et al. (arXiv:1912.09729) for `dual`.
    `clip` = (low, high); None: no clipping. Raises UserError for bounds that make no sense.
    """
    if clip is not None and not (0 < clip[0] < 1 and clip[1] > 0):
        raise UserError(f"clip is {clip}; low must lie in (0, 1) and high above 0")
    if dual is not None and dual <= 1:
        raise UserError(
            f"dual clip is {dual}; it bounds the ratio of bad samples and must exceed 1"
        )
    if delta is not None and delta <= 1 + (clip[1] if clip else 0.0):
        raise UserError(f"delta is {delta}; the two-sided cap must exceed 1 + the upper clip")
    a = jax.lax.stop_gradient(advantage)
    free = (rho if delta is None else jnp.clip(rho, max=delta)) * a
    gain = (
        free
        if clip is None
        else jnp.minimum(free, jnp.clip(rho, min=1 - clip[0], max=1 + clip[1]) * a)
    )
    if dual is not None:
        gain = jnp.where(a < 0, jnp.maximum(gain, dual * a), gain)
    return -gain


def clipped(
    rho: Float[Array, "*b t"], advantage: Float[Array, "*b s"], clip: tuple[float, float]
) -> tuple[Bool[Array, "*b t"], Bool[Array, "*b t"]]:
    """Where the clip removes the gradient: (below with A < 0, above with A > 0)."""
    return (rho < 1 - clip[0]) & (advantage < 0), (rho > 1 + clip[1]) & (advantage > 0)


def aggregate(
    loss: Float[Array, "*b t"],
    mask: Bool[Array, "*b t"],
    *,
    mode: str = "grpo",
    max_length: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Reduce per-token losses to (sum, weight); the loss is sum / weight after all parts are added.

    grpo          sum_i (sum_t l / len_i), weight = sequences                arXiv:2402.03300
    bnpo          (sum l / sum len, 1): the token mean of what this call sees
    dapo          sum l, weight = tokens                                     arXiv:2503.14476
    dr_grpo       sum l, weight = sequences * max_length                     arXiv:2503.20783
    sequence_sum  sum l, weight = sequences
    """
    if mode not in AGGREGATES:
        raise UserError(f"loss mode is {mode!r}; choose one of {', '.join(AGGREGATES)}")
    if mode == "dr_grpo" and (max_length is None or max_length < 1):
        raise UserError(
            f"max_length is {max_length}; loss mode dr_grpo divides by it, give the generation limit"
        )
    loss = jnp.where(mask, loss, 0.0)
    length = mask.sum(-1).astype(jnp.float32)
    tokens, rows = length.sum(), (length > 0).sum().astype(jnp.float32)
    if mode == "grpo":
        return (loss.sum(-1) / jnp.maximum(length, 1)).sum(), rows
    if mode == "bnpo":
        return loss.sum() / jnp.maximum(tokens, 1), (tokens > 0).astype(jnp.float32)
    if mode == "dapo":
        return loss.sum(), tokens
    return loss.sum(), rows * max_length if mode == "dr_grpo" else rows


def importance_weight(
    lp: Float[Array, "*b t"],
    lp_sampler: Float[Array, "*b t"],
    mask: Bool[Array, "*b t"],
    *,
    cap: float = 2.0,
) -> Float[Array, "*b t"]:
    """Truncated weight min(pi_train / pi_sampler, cap) of each token, without gradient; 1 at masked tokens.

    Corrects for a sampler whose numbers differ from the trainer's (other kernels, other precision).
    """
    if cap < 1:
        raise UserError(f"sampler correction cap is {cap}; it must be at least 1")
    d = jnp.where(mask, lp, 0.0) - jnp.where(mask, lp_sampler, 0.0)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(d), cap))


def sampler_gap(
    lp: Float[Array, "*b t"], lp_sampler: Float[Array, "*b t"], mask: Bool[Array, "*b t"]
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Per sequence: sum and maximum over scored tokens of |log pi_train - log pi_sampler|, in nats."""
    gap = jax.lax.stop_gradient(jnp.where(mask, jnp.abs(lp - lp_sampler), 0.0))
    return gap.sum(-1), gap.max(-1)
