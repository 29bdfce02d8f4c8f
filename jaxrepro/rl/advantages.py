"""Advantages of a group of samples of one question: pure, no critic.

    grpo       A_i = (r_i - mean_group) / (std_group + 1e-4)            arXiv:2402.03300, DeepSeekMath (GRPO)
    dr_grpo    A_i =  r_i - mean_group                                  arXiv:2503.20783, Dr. GRPO
    batch_std  A_i = (r_i - mean_group) / (std_batch + 1e-4)
    rloo       A_i =  r_i - mean_{j != i} r_j = M / (M - 1) (r_i - mean_group)    arXiv:2402.14740, RLOO
    gdpo       per part: grpo; weighted sum of parts; (x - mean) / (std + 1e-4) over the whole batch

Standard deviations have ddof = 1. Two departures from the bare formulas. A group whose rewards are all
equal gets exactly 0 by a max == min test: in float32 the mean of 3, 5 or 6 equal rewards can be off by
one ulp, which the small floor would amplify to 2e-3. An unscorable sample (mask False, or a reward that
is not finite) is left out of every baseline and gets advantage 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxrepro.config import UserError

MODES = ("grpo", "dr_grpo", "batch_std", "rloo", "gdpo")


class Advantages(NamedTuple):
    value: Float[Array, "b n"]
    zero_std: Bool[
        Array, "b"
    ]  # groups without a gradient: rewards all equal, or fewer than two scorable
    frac_zero_std: Float[Array, ""]


def group_advantage(
    reward: Float[Array, "b n"] | Float[Array, "b n c"],
    mask: Bool[Array, "b n"] | None = None,
    *,
    mode: str = "grpo",
    weights: Sequence[float] | None = None,
    eps: float = 1e-4,
) -> Advantages:
    """Advantage of each of n samples of b questions. See "DeepSeekMath" by Shao et al. (arXiv:2402.03300).

    `reward` may hold c parts, which are summed with `weights` (default 1 each) before the group is
    compared; mode "gdpo" normalises each part first. `mask` is False at unscorable samples.
    Raises UserError when n < 2, for an unknown mode, or when `weights` do not fit the parts.
    """
    if mode not in MODES:
        raise UserError(f"advantage mode is {mode!r}; choose one of {', '.join(MODES)}")
    if reward.shape[1] < 2:
        raise UserError(
            f"group size is {reward.shape[1]}; a group-relative advantage needs at least 2 samples a question"
        )
    parts = reward.astype(jnp.float32)
    parts = parts[..., None] if parts.ndim == 2 else parts  # (b, n, c)
    c = parts.shape[-1]
    if weights is not None and len(weights) != c:
        raise UserError(
            f"{len(weights)} reward weights for {c} reward parts; give one weight a part"
        )
    w = jnp.ones(c) if weights is None else jnp.asarray(weights, jnp.float32)
    keep = jnp.isfinite(parts).all(-1)
    keep = keep if mask is None else keep & mask
    parts = jnp.where(keep[..., None], parts, 0.0)  # 0 * inf would be nan

    if mode == "gdpo":
        group = [_centre(parts[..., k], keep, axis=1) for k in range(c)]
        x = sum(w[k] * jnp.where(g.flat, 0.0, g.x / (g.std + eps)) for k, g in enumerate(group))
        flat = jnp.stack([g.flat for g in group]).all(0)
        batch = _centre(x, keep, axis=None)
        value = jnp.where(batch.flat, 0.0, batch.x / (batch.std + eps))
    else:
        total = parts @ w
        group = _centre(total, keep, axis=1)
        flat, value = group.flat, group.x
        if mode == "grpo":
            value = value / (group.std + eps)
        elif mode == "batch_std":
            value = value / (_centre(total, keep, axis=None).std + eps)
        elif mode == "rloo":
            value = value * group.count / jnp.maximum(group.count - 1, 1)
    value = jnp.where(keep & ~flat, value, 0.0)
    return Advantages(value, flat[:, 0], flat[:, 0].astype(jnp.float32).mean())


class _Centred(NamedTuple):
    x: Array  # minus the mean
    std: Array  # ddof 1, keepdims
    count: Array  # keepdims
    flat: Array  # keepdims: all kept values equal


def _centre(x: Array, keep: Array, axis: int | None) -> _Centred:
    count = keep.sum(axis, keepdims=True)
    mean = jnp.where(keep, x, 0.0).sum(axis, keepdims=True) / jnp.maximum(count, 1)
    d = jnp.where(keep, x - mean, 0.0)
    std = jnp.sqrt((d * d).sum(axis, keepdims=True) / jnp.maximum(count - 1, 1))
    hi = jnp.where(keep, x, -jnp.inf).max(axis, keepdims=True)
    lo = jnp.where(keep, x, jnp.inf).min(axis, keepdims=True)
    return _Centred(d, std, count, hi <= lo)  # an empty set has hi = -inf < lo = inf


def scored(
    rewards: Sequence[Sequence[float | None]],
) -> tuple[Float[np.ndarray, "b n"], Bool[np.ndarray, "b n"]]:
    """Host side: rewards of b groups as (value, mask); None, NaN and infinity become 0 with mask False.

    Raises UserError when the groups differ in size.
    """
    sizes = sorted({len(row) for row in rewards})
    if len(sizes) != 1:
        raise UserError(f"groups have {sizes} samples; every question needs the same number")
    mask = np.array([[r is not None and math.isfinite(r) for r in row] for row in rewards], bool)
    value = np.array(
        [[r if keep else 0.0 for r, keep in zip(*pair)] for pair in zip(rewards, mask)], np.float32
    )
    return value, mask
