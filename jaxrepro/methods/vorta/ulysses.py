"""Ulysses sequence parallelism (arXiv:2309.14509) for attention whose heads differ: tokens to heads and back.

    outside attention each of p devices has s / p neighbouring video tokens, all heads, and all text tokens
    q, k, v   (b, s / p, h, i)  -- all-to-all -->  (b, s, h / p, i), text narrowed to the same heads
    o         (b, s, h / p, i)  -- all-to-all -->  (b, s / p, h, i), text gathered over heads

Between the two a device has whole videos of some heads, so that any attention runs there unchanged. In raster order a
device's tokens are neighbouring frames, in the layout of a VideoGrid neighbouring tiles; the exchange puts the parts
together in the order in which they were cut, and nothing is moved in between.

Each device gets as many heads as the others, but a head's branch decides what it costs. Routes are known before
sampling, so `balance` chooses which heads go together: among all ways to deal them out in equal numbers, one whose
most loaded device has the least to do. `spread` takes that order as data.

Differs from the official code: there heads are sorted by branch before the exchange, so that each branch's number of
heads must divide by p; and its sliding branch takes the frames of p devices for interleaved and so permutes them, here
p devices give what one does.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxrepro.config import UserError
from jaxrepro.ops import checks, routed
from jaxrepro.sharding import BATCH

AXIS = "sequence"


def spread(f: Callable[..., Array], *, axis: str = AXIS) -> Callable[..., Array]:
    """`f`, with heads spread over the devices of `axis` of the mesh in force (`jax.set_mesh`); without one, `f`.

    f(q, k, v, choice, grid, *, text=None) -> o, such as `routed.mix` or `routed.routed`: q, k, v (b, S + slots, h, i);
    choice gates (b, h, n), or a route (h,) or (b, h) of integers. What comes back also takes `order` (h,): the heads in
    the order of the devices. UserError where heads or tokens do not divide by the devices, and for a mesh whose
    `tensor` > 1 splits the heads already.
    """

    def call(q, k, v, choice, grid, *, text=None, order=None):
        mesh = jax.sharding.get_abstract_mesh()
        if axis not in mesh.axis_names or mesh.shape[axis] == 1:
            return f(q, k, v, choice, grid, text=text)
        check(mesh, heads=q.shape[2], tokens=grid.length, axis=axis)
        return _exchange(f, mesh, axis, (q, k, v), choice, grid, text, order)

    return call


def check(mesh: Any, *, heads: int, tokens: int, axis: str = AXIS) -> None:
    """UserError where heads or video tokens do not divide by the devices of `axis`, or `tensor` splits the heads."""
    parts = mesh.shape[axis]
    if parts > 1 and mesh.shape.get("tensor", 1) > 1:
        raise UserError(
            f"mesh.tensor={mesh.shape['tensor']} splits the heads that mesh.{axis}={parts} would: set tensor to 1"
        )
    for n, what in ((heads, "attention heads"), (tokens, "video tokens")):
        if n % parts:
            raise UserError(
                f"mesh.{axis}={parts} does not divide the {n} {what}; take {math.gcd(n, parts)} or another divisor"
            )


def _exchange(f, mesh, axis, qkv, choice, grid, text, order):
    n, h = grid.length, qkv[0].shape[2]
    slots = qkv[0].shape[1] - n
    share = h // mesh.shape[axis]
    # a route's heads are its last axis, those of gates the last but one
    head_axis = choice.ndim - (1 if jnp.issubdtype(choice.dtype, jnp.integer) else 2)
    pick = partial(jnp.take, mode="clip")

    def device(video, words, choice, text, order):
        if order is not None:
            video, words = jax.tree.map(lambda x: pick(x, order, axis=2), (video, words))
            choice = pick(choice, order, axis=head_axis)
        start = jax.lax.axis_index(axis) * share
        own = lambda x, at: jax.lax.dynamic_slice_in_dim(x, start, share, at)
        video = [jax.lax.all_to_all(x, axis, 2, 1, tiled=True) for x in video]
        if words is not None:
            video = [jnp.concatenate([x, own(y, 2)], 1) for x, y in zip(video, words)]
        o = f(*video, own(choice, head_axis), grid, text=text)
        found = [jax.lax.all_to_all(o[:, :n], axis, 1, 2, tiled=True)]
        if words is not None:
            found.append(jax.lax.all_gather(o[:, n:], axis, axis=2, tiled=True))
        if order is not None:
            back = jnp.argsort(order)
            found = [pick(x, back, axis=2) for x in found]
        return found

    rows = _rows(mesh, len(qkv[0]))
    tokens, each = P(rows, axis), P(rows)
    run = jax.shard_map(
        device,
        in_specs=(tokens, each, each if choice.ndim > 1 else P(), each, P()),
        out_specs=[tokens, each] if slots else [tokens],
        check_vma=False,  # loops whose carries start as constants do not type-check under it
    )
    # without text there is nothing to gather; XLA of jax 0.11 breaks down over arrays without rows
    video, words = [x[:, :n] for x in qkv], [x[:, n:] for x in qkv] if slots else None
    return jnp.concatenate(run(video, words, choice, text, order), 1)


def _rows(mesh, b):
    """The mesh axes over which b rows lie; all rows everywhere where they do not divide."""
    axes = tuple(a for a in BATCH if mesh.shape.get(a, 1) > 1)
    return axes if axes and b % math.prod(mesh.shape[a] for a in axes) == 0 else None


# --- which heads go together ------------------------------------------------------------------


def balance(
    table: Any, *, parts: int, costs: Sequence[float] = (1.0, 0.25, 0.11)
) -> tuple[np.ndarray, np.ndarray]:
    """The order (n, l, h) of the heads over `parts` devices, and the load (n, l): the most of a device over the mean.

    table: (n, l, h) branches of every step, block and head. costs: of a head in full, coreset and sliding attention;
    measured ones serve best, `VideoGrid.flops` is close. Heads in one device keep their order. The load is the least
    that equal numbers of heads allow.
    """
    table, costs = np.asarray(table), tuple(map(float, costs))
    if table.ndim != 3:
        raise UserError(
            f"the table has shape {table.shape}: (steps, blocks, heads), one route for all rows"
        )
    routed.check_table(table)
    if table.shape[-1] % checks.whole("parts", parts):
        raise UserError(f"{parts} devices do not divide {table.shape[-1]} heads; take a divisor")
    if len(costs) != 3 or not all(0 < c < math.inf for c in costs):
        raise UserError(f"costs={costs}: three positive numbers, of full, coreset and sliding")
    order = np.empty(table.shape, np.int32)
    for at in np.ndindex(table.shape[:2]):
        order[at] = _deal(table[at], parts, costs)
    return order, imbalance(table, order, parts=parts, costs=costs)


def imbalance(table: Any, order: Any, *, parts: int, costs: Sequence[float]) -> np.ndarray:
    """(n, l): the cost of the most loaded device over the mean, heads (n, l, h) in that order."""
    cost = np.asarray(costs)[np.take_along_axis(np.asarray(table), np.asarray(order), -1)]
    cost = cost.reshape(*cost.shape[:2], parts, -1).sum(-1)
    return cost.max(-1) / cost.mean(-1)


def _deal(route, parts, costs):
    """Heads (h,) in the order of the devices, by the numbers of each branch that each device takes."""
    heads = [list(np.flatnonzero(route == j)) for j in range(3)]
    order = []
    for hand in _hands(tuple(map(len, heads)), parts, costs):
        order += sorted(heads[j].pop() for j, n in enumerate(hand) for _ in range(n))
    return order


@cache
def _hands(counts, parts, costs):
    """For each device the numbers of full, coreset and sliding heads; the largest cost is the least possible.

    best[d][a, c] = min over hands (x, y) of max(best[d - 1][a - x, c - y], cost of the hand), d devices that hold a full
    and c coreset heads between them, each a given number in all: the rest of a hand is sliding.
    """
    share = sum(counts) // parts
    hands = [(x, y, share - x - y) for x in range(share + 1) for y in range(share + 1 - x)]
    cost = {hand: float(np.dot(hand, costs)) for hand in hands}
    best = [np.full((counts[0] + 1, counts[1] + 1), np.inf)]
    best[0][0, 0] = 0
    for _ in range(parts):
        new = np.full_like(best[0], np.inf)
        for x, y, z in hands:
            if x <= counts[0] and y <= counts[1]:
                last = best[-1][: counts[0] + 1 - x, : counts[1] + 1 - y]
                np.minimum(new[x:, y:], np.maximum(last, cost[x, y, z]), out=new[x:, y:])
        best.append(new)
    dealt, (a, c) = [], counts[:2]
    for d in range(parts, 0, -1):
        fits = [h for h in hands if h[0] <= a and h[1] <= c]
        hand = min(fits, key=lambda h: max(best[d - 1][a - h[0], c - h[1]], cost[h]))
        dealt.append(hand)
        a, c = a - hand[0], c - hand[1]
    return tuple(dealt)
