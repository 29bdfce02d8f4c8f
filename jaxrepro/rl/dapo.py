"""DAPO: An Open-Source LLM Reinforcement Learning System at Scale, Yu et al., arXiv:2503.14476.

What DAPO adds to GRPO, and where it lives:
    clip-higher, eps 0.2 / 0.28, no KL      `surrogates.surrogate(clip=CLIP)`, beta = 0
    token-level loss                        `surrogates.aggregate(mode="dapo")`
    dynamic sampling                        `informative` and `select` here; the caller samples again
    overlong filtering                      `masks.mask_truncated`
    soft overlong punishment                `overlong_penalty` here, counted in TOKENS
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrepro.config import UserError

CLIP = (0.2, 0.28)


def informative(
    reward: Float[Array, "b n"], mask: Bool[Array, "b n"] | None = None
) -> Bool[Array, "b"]:
    """Groups whose scorable rewards differ. The others have advantage 0 and are to be sampled again (eq. 11)."""
    keep = jnp.isfinite(reward) if mask is None else jnp.isfinite(reward) & mask
    return jnp.where(keep, reward, -jnp.inf).max(1) > jnp.where(keep, reward, jnp.inf).min(1)


class Selection(NamedTuple):
    index: Int[np.ndarray, "k"]  # groups to train on, in the order in which they were sampled
    missing: int  # how many more informative groups the batch needs


def select(keep: Bool[np.ndarray, "b"], size: int) -> Selection:
    """Host side: the first `size` informative groups out of all that were sampled so far."""
    if size < 1:
        raise UserError(f"batch is {size} groups; dynamic sampling needs at least 1")
    index = np.flatnonzero(keep)[:size]
    return Selection(index, size - len(index))


def overlong_penalty(
    length: Int[Array, "*b"], *, max_length: int, buffer: int = 4096
) -> Float[Array, "*b"]:
    """Reward term of eq. 13: 0 up to max_length - buffer tokens, then linear, -1 from max_length on."""
    if not 0 < buffer <= max_length:
        raise UserError(
            f"overlong buffer is {buffer} tokens; it must lie in 1..max_length ({max_length})"
        )
    over = (length - (max_length - buffer)).astype(jnp.float32) / buffer
    return -jnp.clip(over, min=0.0, max=1.0)
