"""A table of routes without training: what each branch does to each head is measured, and the best are taken.

    error[s, l, h, j] = mean over videos, tokens and channels of (f_j(q, k, v) - f_full(q, k, v))^2

at the times of the sampler, in the dense model, on training videos with noise. `routes.searched` turns errors into the
table of least error at a given cost. So sliding-tile attention picks its window for each head and step without training
(arXiv:2502.04507), `windows` being its branches: full attention and two windows. The time of a search is that of
sampling all branches once, hence it is done for the model's own times alone.

Differs from that paper: the cost is given and the errors are minimised, there a bound on the error is; two windows.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrepro.methods.vorta import objective
from jaxrepro.methods.vorta.objective import Batch
from jaxrepro.models import video_dit
from jaxrepro.models.video_dit import Condition, Config
from jaxrepro.ops import routed, sliding
from jaxrepro.ops.video_grid import VideoGrid

Branches = tuple[Callable[..., Array], ...]


@lru_cache(maxsize=8)
def windows(grid: VideoGrid) -> Branches:
    """Full attention, sliding attention with two more tiles along every axis, and with the grid's window."""
    return routed.full, partial(_within, wide(grid)), sliding.sliding_groups


def wide(grid: VideoGrid) -> VideoGrid:
    """The same grid and layout with the larger window."""
    return dataclasses.replace(grid, window=tuple(n + 2 for n in grid.window))


def _within(mine, q, k, v, grid, *, text=None):
    del grid
    return sliding.sliding_groups(q, k, v, mine, text=text)


@partial(jax.jit, static_argnames=("cfg", "grid", "branches"))
def errors(
    params: dict,
    cfg: Config,
    latents: Float[Array, "b c frames rows columns"],
    noise: Float[Array, "b c frames rows columns"],
    condition: Condition,
    t: Float[Array, "n"],
    *,
    grid: VideoGrid,
    branches: Branches,
) -> Float[Array, "n l h branch"]:
    """Errors of every branch in every head of the dense model, at each of the times t; the first branch is full."""
    cfg = dataclasses.replace(cfg, remat="none")  # nothing is differentiated
    seen = []  # from attention to the hook around it, inside one block

    def attend(q, k, v, layer, aux):
        o, *others = (f(q, k, v, grid, text=aux.length) for f in branches)
        error = lambda x: jnp.square((x - o).astype(jnp.float32)).mean((0, 1, 3))
        seen.append(jnp.stack([jnp.zeros(q.shape[2]), *map(error, others)], -1))
        return o

    def around(module, layer, found):
        outputs = module()
        return outputs, found.at[layer].set(seen.pop())

    def at(time):
        times = jnp.full(len(latents), time)
        x = objective.noisy(Batch(latents, noise, times, condition))
        empty = jnp.zeros((cfg.layers, cfg.heads, len(branches)))
        given = (params, cfg, x, times, condition)
        how = dict(attend=attend, layout=grid, around=around, state=empty)
        return video_dit.apply(*given, **how)[1]

    return jax.lax.map(at, t)
