"""Pyramid Attention Broadcast (PAB), arXiv:2408.12588: outputs of attention modules kept for the next steps.

    step i at time t computes every module where  i % every == 0  or not low < t < high,  and in the first step;
    elsewhere the module gives the output of the step before

What is kept is the output of the module: projections, norms, rotation, attention and output projection are all left
out (in a single block of HunyuanVideo, whose output projection also takes the feed-forward half, all but that one).
Cross-attention is not kept. The rule is that of the hook in diffusers, and so are its numbers, 100 < t < 800 and every
second step; those behind the combination in VORTA's paper are unknown (inferred to be the same).

Times are known before sampling, so the rule is a row of bools made on the host, `schedule`, and data to the program.
Both sides of the guidance lie in one batch, hence each has its own cache.

Differs from the hook: it counts the calls of a module, which are two a step where the sides of the guidance run one
after the other (then each side meets the other's cache); here a call is a step.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxrepro.config import UserError
from jaxrepro.models.video_dit import Around, Config
from jaxrepro.ops import checks


def schedule(t: Any, *, every: int = 2, low: float = 100.0, high: float = 800.0) -> np.ndarray:
    """(n,) whether each step computes attention, from its times t (n,) in 0 .. 1000, in the order of sampling."""
    t = np.asarray(t, np.float64)
    if t.ndim != 1 or not t.size or not ((t >= 0) & (t <= 1000)).all():
        raise UserError(f"t is {t.tolist()!r:.80}: the times of the steps, each in 0 .. 1000")
    checks.whole("every", every)  # 1 computes every step
    if not low <= high:
        raise UserError(f"times from {low} to {high} keep nothing: low must not exceed high")
    step = np.arange(t.size)
    return (step % every == 0) | ~((low < t) & (t < high))


def _shape(cfg: Config, rows: int, tokens: int) -> tuple[int, ...]:
    return cfg.layers, rows, tokens, cfg.d


def empty(cfg: Config, *, rows: int, tokens: int) -> Float[Array, "l b s d"]:
    """A cache before the first step. rows: of the model, twice the videos with guidance; tokens: video and text."""
    return jnp.zeros(_shape(cfg, rows, tokens), cfg.dtype)


def cache_bytes(cfg: Config, *, rows: int, tokens: int) -> int:
    """Bytes of a cache: 39.9e9 for HunyuanVideo in bfloat16, one video of 108,000 tokens and 256 of text."""
    return math.prod(_shape(cfg, rows, tokens)) * jnp.dtype(cfg.dtype).itemsize


def broadcast(computes: Bool[Array, ""]) -> Around:
    """The hook around the attention modules of a video model, in one step; its state is the cache.

    Where `computes` is False no module runs: the branch is taken while the program runs, with no new compilation.
    """

    def around(module, layer, cache):
        sizes = [x.shape[1] for x in jax.eval_shape(module)]
        read = lambda: jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
        new = lambda: jnp.concatenate(module(), 1).astype(cache.dtype)
        o = jax.lax.cond(computes, new, read)
        # written back also where it was read: behind the branch, the update is done in place
        cache = jax.lax.dynamic_update_index_in_dim(cache, o, layer, 0)
        return tuple(jnp.split(o, np.cumsum(sizes)[:-1].tolist(), axis=1)), cache

    return around
