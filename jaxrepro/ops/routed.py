"""Attention whose heads each take one of three branches: full, coreset or sliding.

VORTA, arXiv:2505.18809 (v2). A branch is a function f(q, k, v, grid, *, text) -> o of `BRANCHES`; another
tuple gives other branches the same routing. For gates g (b, h, 3) and a route r (h)

    soft    o_h = sum_j g_hj f_j(q_h, k_h, v_h)       `mix`, for training
    hard    o_h = f_(r_h)(q_h, k_h, v_h)              `routed`, for sampling; r is data

`routed` compiles once for all routes: heads are sorted by branch, and each branch loops over its heads, a
chunk at a time and then one by one, as often as the route says. Work follows the route, without padding. A
loop of unknown length has no gradient backwards; `attention` with a branch and `mix` have one.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrepro.config import UserError
from jaxrepro.ops import checks
from jaxrepro.ops.attention import attend_joint
from jaxrepro.ops.coreset import coreset
from jaxrepro.ops.sliding import by_kernel, sliding_groups
from jaxrepro.ops.video_grid import VideoGrid, to_layout, to_raster


class Branch(IntEnum):
    """The branches, in the order of gates and routes."""

    full = 0
    coreset = 1
    sliding = 2


def full(
    q: Float[Array, "b s h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    grid: VideoGrid,
    *,
    text: Int[Array, "b"] | None = None,
) -> Float[Array, "b s h i"]:
    """Dense attention between all video tokens and valid text; a padded text row gives 0."""
    checks.attention(q, k, v, grid.length, text)
    return attend_joint(q, k, v, grid.length, text)


BRANCHES: tuple[Callable[..., Array], ...] = (full, coreset, sliding_groups)


def attention(
    q: Float[Array, "b s h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    grid: VideoGrid,
    *,
    branch: str | int | Int[Array, "h"] = "sliding",
    text: Int[Array, "b"] | None = None,
    order: str = "raster",
    kernel: str = "auto",
    branches: tuple[Callable[..., Array], ...] | None = None,
) -> Float[Array, "b s h i"]:
    """Attention of a video by one branch for all heads, or by a route: an array of one branch a head.

        grid = VideoGrid.propose(video_grid.tokens(frames=117, height=720, width=1280))     # or tiles of your own
        o = attention(q, k, v, grid, branch="sliding", text=jnp.array([77]))      # rows: 108,000 of video, then text

    Rows are the S tokens of the grid, in raster order (f, h, w) or in that of `video_grid.to_layout`
    (order="layout"), then text slots, of which the first text[b] are valid (None = all). q and k are normed
    and rotated; the scale is 1 / sqrt(i). Tiles, window, buckets and the share that is dropped are the grid's.
    A UserError names what does not fit.

    kernel: of sliding attention, a name of `sliding.KERNELS`. branches: other functions in place of full, coreset
    and sliding, in this order, such as partial(coreset, shared=True); they choose their kernel themselves.
    A branch has a gradient in q, k and v (picks of coreset attention are constants). A route is data, with one
    program for all routes, and forward only; `mix` is for training.
    """
    checks.attention(q, k, v, grid.length, text)
    if order not in ("raster", "layout"):
        raise UserError(f"order={order!r} must be 'raster' or 'layout'")
    if branches is None:
        branches = (full, coreset, by_kernel(kernel))
    elif kernel != "auto":
        raise UserError(f"kernel={kernel!r} beside `branches`: give one of them")
    if one := isinstance(branch, (str, int)):
        branch = _number(branch)
    else:
        checks.route(branch, len(q), q.shape[2], len(branches))
    if order == "raster":
        q, k, v = (to_layout(x, grid) for x in (q, k, v))
    if one:
        o = branches[branch](q, k, v, grid, text=text)
    else:
        o = routed(q, k, v, jnp.asarray(branch), grid, text=text, branches=branches)
    return to_raster(o, grid) if order == "raster" else o


def _number(branch):
    try:
        return Branch[branch] if isinstance(branch, str) else Branch(branch)
    except (KeyError, ValueError):
        names = ", ".join(f"{b.name} ({b.value})" for b in Branch)
        raise UserError(f"branch={branch!r} must be one of {names}, or an array of them") from None


def check_table(table: Any) -> None:
    """UserError for a table of routes, of any shape, that holds anything but numbers of branches."""
    values = checks.known(table)
    if values is None or not values.size:
        return
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= len(Branch):
        raise UserError(
            f"the table holds {values.min()} to {values.max()}: branches are whole numbers, 0 to {len(Branch) - 1}"
        )


def mix(
    q: Float[Array, "b s h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    gates: Float[Array, "b h n"],
    grid: VideoGrid,
    *,
    text: Int[Array, "b"] | None = None,
    chunk: int | None = None,
    branches: tuple[Callable[..., Array], ...] = BRANCHES,
) -> Float[Array, "b s h i"]:
    """All branches of all heads, weighted by their gates and added in float32.

    chunk: heads computed at once, and again for the gradient (None = all, kept): a bound on memory.
    """

    checks.attention(q, k, v, grid.length, text)
    b, h = len(q), q.shape[2]
    if gates.shape != (b, h, len(branches)):
        raise UserError(
            f"the gates have shape {gates.shape}: {b} rows, {h} heads and {len(branches)} branches need "
            f"{(b, h, len(branches))}"
        )

    def some(heads):
        q, k, v, gates = heads
        weight = lambda j: gates[:, None, :, j, None]
        total = sum(weight(j) * f(q, k, v, grid, text=text) for j, f in enumerate(branches))
        return total.astype(q.dtype)

    if chunk is None or checks.whole("chunk", chunk) >= h:
        return some((q, k, v, gates))
    if h % chunk:
        raise UserError(f"chunk={chunk} does not divide {h} heads; take a divisor")
    parts = lambda x, axis: jnp.moveaxis(
        x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :]), axis, 0
    )
    o = jax.lax.map(jax.checkpoint(some), (parts(q, 2), parts(k, 2), parts(v, 2), parts(gates, 1)))
    return jnp.moveaxis(o, 0, 2).reshape(q.shape)


def routed(
    q: Float[Array, "b s h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    route: Int[Array, "h"] | Int[Array, "b h"],
    grid: VideoGrid,
    *,
    text: Int[Array, "b"] | None = None,
    chunk: int = 4,
    branches: tuple[Callable[..., Array], ...] = BRANCHES,
) -> Float[Array, "b s h i"]:
    """Each head by its branch. One program for all routes; forward only.

    route: the branch of each head; (b, h) gives every row its own, and rows then run one after another.
    chunk: heads of a branch computed at once; what is left of them runs one by one.
    """
    checks.attention(q, k, v, grid.length, text)
    checks.route(route, len(q), q.shape[2], len(branches))
    route, chunk = jnp.asarray(route), checks.whole("chunk", chunk)
    if route.ndim == 2:
        text = jnp.full(len(q), q.shape[1] - grid.length) if text is None else text
        row = lambda x: routed(
            *(y[None] for y in x[:3]), x[3], grid, text=x[4][None], chunk=chunk, branches=branches
        )[0]
        return jax.lax.map(row, (q, k, v, route, text))
    heads = jnp.argsort(route, stable=True)
    o, start = jnp.zeros_like(q), jnp.zeros((), jnp.int32)
    for j, f in enumerate(branches):
        count = jnp.sum(route == j, dtype=jnp.int32)
        for size in sorted({1, min(chunk, len(heads))}, reverse=True):
            times = count // size
            o = _loop(f, size, start, times, o, (q, k, v), heads, grid, text)
            start, count = start + times * size, count - times * size
    return o


def _loop(f, size, start, times, o, qkv, heads, grid, text):
    """o with the outputs of `times` x `size` heads, from `start` on in the order of `heads`."""

    def body(n, o):
        some = jax.lax.dynamic_slice_in_dim(heads, start + n * size, size)
        new = f(*(jnp.take(x, some, axis=2, mode="clip") for x in qkv), grid, text=text)
        for c in range(size):
            # an update of one head after the other is done in place, a scatter may not be
            o = jax.lax.dynamic_update_slice_in_dim(o, new[:, :, c : c + 1], some[c], axis=2)
        return o

    return jax.lax.fori_loop(0, times, body, o)
