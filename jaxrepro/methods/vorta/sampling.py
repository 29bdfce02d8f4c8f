"""Sampling with routed attention: VORTA, arXiv:2505.18809 (v2), in its hard form.

    in step i, head h of block l attends by branch table[i, l, h] alone, unscaled

The gates depend on the time alone, so the table is known before sampling (routes.py) and is data to the program, as are
the solver's numbers, the guidance scale and the schedule of caching: one scan over the steps, compiled once for all
tables and grids of times of one length. Dense sampling is the same program with a table of zeros, or without a table
attention as the model has it.

HunyuanVideo takes its guidance as an input; Wan 2.1 runs with and without its text, both sides in one batch under one
route. Samplers are those of ops/flow: Euler, on a few steps of its grid too (`flow.few`), and UniPC.

Under a mesh (`jax.set_mesh`) with `sequence` > 1 heads are spread over its devices (ulysses.py).

Differs from the official code: all rows of a batch may have their own route, where there the first one decides for all;
text lengths are those of each row, in the side without text too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrepro.config import UserError
from jaxrepro.methods.vorta import caching, router
from jaxrepro.methods.vorta.ulysses import spread
from jaxrepro.models import video_dit, video_parts
from jaxrepro.models.video_dit import Attend, Condition, Config
from jaxrepro.models.video_parts import grid_of
from jaxrepro.models.wan import WanConfig
from jaxrepro.ops import checks, flow, routed
from jaxrepro.ops.video_grid import VideoGrid

Branches = tuple[Callable[..., Array], ...]


class Walk(NamedTuple):
    """Between two steps."""

    state: flow.State  # of the solver
    cache: Any = None  # of the attention modules; None = nothing is kept


def hard(
    route: Int[Array, "l h"] | Int[Array, "b l h"],
    grid: VideoGrid,
    *,
    order: Int[Array, "l h"] | None = None,
    chunk: int = 4,
    branches: Branches = routed.BRANCHES,
) -> Attend:
    """Attention of a video model by the branch of each head; the model's layout must be `grid`. Forward only.

    order: of the heads over the devices of a mesh (`ulysses.balance`). chunk: heads of a branch computed at once.
    branches: of `router.branches(cfg)`; Wan's are not these, which are HunyuanVideo's.
    """
    by = spread(partial(routed.routed, chunk=chunk, branches=branches))

    def attend(q, k, v, layer, aux):
        if aux.grid != grid.size:
            raise UserError(
                f"the route's grid is {grid.size}, the latents have {aux.grid} tokens: make the grid for them"
            )
        mine = jnp.take(route, layer, axis=-2)
        heads = None if order is None else order[layer]
        return by(q, k, v, mine, grid, text=aux.length, order=heads)

    return attend


def start(
    cfg: Config, plan: flow.Plan, noise: Float[Array, "b c f h w"], *, text: int, sides: int = 1
) -> Walk:
    """A walk from noise with an empty cache. text: slots that attention sees; sides: 2 with guidance by an empty text."""
    tokens = int(np.prod(grid_of(noise.shape, cfg.patch))) + text
    return Walk(flow.start(plan, noise), caching.empty(cfg, rows=sides * len(noise), tokens=tokens))


def step(
    params: dict,
    cfg: Config,
    walk: Walk,
    row: flow.Plan,
    condition: Condition,
    route: Int[Array, "l h"] | Int[Array, "b l h"] | None,
    *,
    grid: VideoGrid | None = None,
    computes: Bool[Array, ""] | None = None,
    order: Int[Array, "l h"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    chunk: int = 4,
    branches: Branches | None = None,
) -> Walk:
    """One step of all rows at the time row.t. Pure: for programs that show or stop a sampling between its steps.

    row: the plan at this step. condition: with `scale`, of 2 b rows (`flow.both`), the empty ones second.
    computes: whether attention is computed (`caching.schedule`); then the walk has a cache.
    """
    x = walk.state.x
    if scale is not None:
        x = jnp.concatenate([x, x])
        if route is not None and route.ndim == 3:
            route = jnp.concatenate([route, route])
    attend, layout = video_dit.full, None
    if route is not None:
        branches = router.branches(cfg) if branches is None else branches
        attend = hard(route, grid, order=order, chunk=chunk, branches=branches)
        layout = grid
    around = None if computes is None else caching.broadcast(computes)
    t = jnp.full(len(x), row.t)
    v = video_dit.apply(
        params,
        cfg,
        x,
        t,
        condition,
        attend=attend,
        layout=layout,
        around=around,
        state=walk.cache,
    )
    v, cache = (v, None) if around is None else v
    if scale is not None:
        v = flow.guide(v, scale)
    return Walk(flow.step(row, walk.state, v), cache)


def sample(
    params: dict,
    cfg: Config,
    noise: Float[Array, "b c f h w"],
    condition: Condition,
    table: Any,
    plan: flow.Plan,
    *,
    grid: VideoGrid | None = None,
    empty: Condition | None = None,
    scale: float | None = None,
    computes: Any = None,
    order: Any = None,
    chunk: int = 4,
    branches: Branches | None = None,
) -> Float[Array, "b c f h w"]:
    """Latents (float32) from noise (float32), jitted; a program for each shape, number of steps and config.

    table: (n, l, h) branches of the n steps, or (n, b, l, h), each row its own (rows then run one after another); None =
    dense. plan: `flow.euler` or `flow.unipc`, of n steps. grid: of the tokens, with a table. empty, scale: the other
    side of classifier-free guidance and its scale, which HunyuanVideo has not (Condition.guidance). computes: (n,)
    bools of `caching.schedule`; None = nothing is kept. order: (n, l, h) of `ulysses.balance`. branches: default
    `router.branches(cfg)`. UserError where these do not fit together.
    """
    n, b = len(plan.t), len(noise)
    checks.whole("chunk", chunk)
    if (empty is None) != (scale is None):
        raise UserError("guidance needs both `empty`, the condition without text, and `scale`")
    if table is not None:
        table = _branch_table(table, (n, cfg.layers, cfg.heads), b)
        if grid is None:
            raise UserError("a table of routes needs `grid`, the VideoGrid of the latents' tokens")
    for name, x, shape in (
        ("computes", computes, (n,)),
        ("order", order, (n, cfg.layers, cfg.heads)),
    ):
        if x is not None and np.shape(x) != shape:
            raise UserError(f"{name} has shape {np.shape(x)}: this sampling needs {shape}")
    _fit(cfg, b, condition, empty, plan, scale, computes, order)
    if empty is not None:
        condition = flow.both(condition, empty)
    computes, order = (None if x is None else jnp.asarray(x) for x in (computes, order))
    rows = jax.tree.map(jnp.asarray, plan), table, computes, order
    return _sample(
        params,
        noise,
        condition,
        rows,
        None if scale is None else jnp.asarray(scale, jnp.float32),
        cfg=cfg,
        grid=grid,
        chunk=chunk,
        branches=router.branches(cfg) if branches is None else branches,
    )


def _branch_table(table, shape, b):
    """The table as int32; UserError for a shape that fits neither all rows nor each."""
    n, *rest = shape
    if np.shape(table) not in (shape, (n, b, *rest)):
        raise UserError(
            f"the table has shape {np.shape(table)}: {n} steps, {rest[0]} blocks and {rest[1]} heads need "
            f"{shape}, or {(n, b, *rest)} with a route for each row"
        )
    routed.check_table(table)
    return jnp.asarray(table, jnp.int32)


def _fit(cfg, b, condition, empty, plan, scale, computes, order):
    """UserError for numbers that a compiled program could not refuse, and for sides of a guidance that differ."""
    video_parts.check_condition(cfg, b, condition)
    if empty is not None:
        flow.check_scale(scale)
        video_parts.check_condition(cfg, b, empty)
        for name, one, other in zip(Condition._fields, condition, empty):
            sizes = [None if x is None else x.shape for x in (one, other)]
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"Condition.{name} has shape {sizes[0]}, that of `empty` {sizes[1]}: pad both to the same"
                )
    times = checks.known(plan.t)
    if times is not None and not ((times >= 0) & (times <= 1000)).all():
        raise UserError(f"the plan's times are {times.tolist()}: they lie in 0 .. 1000")
    first = None if computes is None else checks.known(computes)
    if first is not None and (first.dtype != bool or not first[0]):
        raise UserError(
            f"computes is {first.tolist()!r:.60}: bools, the first True, since nothing is kept before it"
        )
    heads = checks.known(order)
    if heads is not None and (np.sort(heads) != np.arange(heads.shape[-1])).any():
        raise UserError(
            f"order must hold each of {heads.shape[-1]} heads once in every step and block"
        )


@partial(jax.jit, static_argnames=("cfg", "grid", "chunk", "branches"))
def _sample(params, noise, condition, rows, scale, *, cfg, grid, chunk, branches):
    plan, _, computes, _ = rows
    walk = Walk(flow.start(plan, noise))
    if computes is not None:
        text = 0 if isinstance(cfg, WanConfig) else condition.text.shape[1]
        walk = start(cfg, plan, noise, text=text, sides=1 if scale is None else 2)

    def body(walk, each):
        row, route, computes, order = each
        walk = step(
            params,
            cfg,
            walk,
            row,
            condition,
            route,
            grid=grid,
            computes=computes,
            order=order,
            scale=scale,
            chunk=chunk,
            branches=branches,
        )
        return walk, None

    return jax.lax.scan(body, walk, rows)[0].state.x
