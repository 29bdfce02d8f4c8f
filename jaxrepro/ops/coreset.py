"""Coreset attention: dense attention between the tokens of a video that differ most from their neighbours.

The coreset branch of VORTA, arXiv:2505.18809 (v2). In a bucket of m tokens with centre c (video_grid.py)

    match     s_j = cos(x_c, x_j) of every margin j;  the k least similar are kept                `match`
    pool      the centre and the k kept margins of every bucket                                   `pool`
    attend    dense, over P = sum_buckets (1 + k) tokens, and text
    unpool    centre and kept margins take their own output, dropped ones that of their centre    `unpool`

Nothing is averaged: a dropped token is absent as key and value. x is q or k after norm and rotation, so that
queries and keys have a match each (HunyuanVideo); with `shared`, that of the queries serves all (Wan 2.1).
Ties keep the order of the slots. Margins are ranked by counting comparisons, m being about 12: no sort, and
the same picks on every device up to the rounding of the cosines, which are float32. Picks are constants for
the gradient; values flow through the gathers.

Two other ways to coarsen, with the same signature, for comparison: `average` (the paper's ablation: mean over
cells) and `merge` (ours: a centre is the mean of itself and what its bucket dropped, and as a key it counts
as often as it stands for tokens).

Rows are places of the layout of video_grid.py, then text slots; `text` says how many of these are valid.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrepro.ops import checks
from jaxrepro.ops.attention import attend_joint
from jaxrepro.ops.video_grid import AXES, VideoGrid, bucket_table, buckets, cells_in_program

EPS = 1e-12  # the least norm that a cosine divides by
FEATURES = 8  # how head sizes may grow: cuDNN takes multiples


class Match(NamedTuple):
    """What a head keeps of every bucket (g buckets of m slots; slot 0 is the centre)."""

    kept: Int[Array, "b g k h"]  # the slot of each row that attends; row 0 is the centre
    source: Int[Array, "b g m h"]  # the row whose output each slot takes; 0 = its centre's


def match(x: Float[Array, "b s h i"], grid: VideoGrid) -> Match:
    """The margins that are least similar to their centre, head by head. x: the S video tokens, no text."""
    table, of_bucket = buckets(grid), bucket_table(grid, "kept")
    x = jax.lax.stop_gradient(_grouped(x, grid))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), EPS)
    similarity = (x[:, :, :1] * x[:, :, 1:]).sum(-1)  # (b, g, m - 1, h)
    if (table.slots < 0).any():  # missing slots rank last, behind all that may be kept
        missing = (bucket_table(grid, "slots")[:, 1:] < 0)[None, :, :, None]
        similarity = jnp.where(missing, jnp.inf, similarity)
    mine, other = similarity[:, :, :, None], similarity[:, :, None]
    slot = np.arange(similarity.shape[2])
    earlier = (slot[:, None] > slot)[..., None]  # (mine, other, 1): ties keep their order
    rank = jnp.sum((other < mine) | ((other == mine) & earlier), axis=3, dtype=jnp.int32)
    k = int(table.kept.max())
    here = rank[:, :, None] == np.arange(k)[:, None, None]  # (b, g, k, m - 1, h)
    kept = jnp.sum(here * (1 + slot)[:, None].astype(np.int32), axis=3, dtype=jnp.int32)
    stays = rank < of_bucket[:, None, None]
    centre = jnp.zeros_like(rank, shape=(*rank.shape[:2], 1, rank.shape[3]))
    return Match(
        jnp.concatenate([centre, kept], axis=2),
        jnp.concatenate([centre, jnp.where(stays, 1 + rank, 0)], axis=2),
    )


def _grouped(x, grid):
    """(b, S, ...) to (b, g, m, ...); a missing slot holds another token, which nothing reads."""
    table = buckets(grid)
    if not table.contiguous:
        slots = bucket_table(grid, "slots").ravel()
        x = jnp.take(x, jnp.maximum(slots, 0), axis=1, mode="clip")
    return x.reshape(x.shape[0], *table.slots.shape, *x.shape[2:])


def _pick(x, index):
    """x (b, g, m, h, i) at index (b, g, k, h) of axis m."""
    return jnp.take_along_axis(x, index[..., None], axis=2, mode="clip")


def _rows(x, grid):
    """(b, g, 1 + k, h, i) to the P rows that exist."""
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    if buckets(grid).whole:
        return x
    return jnp.take(x, bucket_table(grid, "rows"), axis=1, mode="clip")


def pool(x: Float[Array, "b s h i"], match: Match, grid: VideoGrid) -> Float[Array, "b p h i"]:
    """The P tokens that attend: centre and kept margins, bucket by bucket."""
    return _rows(_pick(_grouped(x, grid), match.kept), grid)


def unpool(y: Float[Array, "b p h i"], match: Match, grid: VideoGrid) -> Float[Array, "b s h i"]:
    """The S outputs: a token's own where it attended, else that of its centre."""
    table = buckets(grid)
    if not table.whole:
        y = jnp.take(y, bucket_table(grid, "back"), axis=1, mode="clip")
    y = _pick(y.reshape(y.shape[0], len(table.slots), -1, *y.shape[2:]), match.source)
    y = y.reshape(y.shape[0], -1, *y.shape[3:])
    if table.contiguous:
        return y
    return jnp.take(y, bucket_table(grid, "place"), axis=1, mode="clip")


def coreset(
    q: Float[Array, "b s h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    grid: VideoGrid,
    *,
    text: Int[Array, "b"] | None = None,
    shared: bool = False,
) -> Float[Array, "b s h i"]:
    """Coreset attention. text: valid text slots of each row (None = all); a padded text row gives 0.

    shared: keys and values follow the match of the queries.
    """
    checks.attention(q, k, v, grid.length, text)
    of_q, of_k = _matches(q, k, grid, shared)
    small = lambda x, m: pool(x[:, : grid.length], m, grid)
    video = small(q, of_q), small(k, of_k), small(v, of_k)
    return _attend(video, (q, k, v), grid, text, lambda y: unpool(y, of_q, grid))


def _matches(q, k, grid, shared):
    n = grid.length
    of_q = match(q[:, :n], grid)
    return of_q, of_q if shared else match(k[:, :n], grid)


def _attend(video, qkv, grid, text, grow, log_count=None):
    """Attention between shrunk video tokens and text; `grow` gives every token its output."""
    joint = [jnp.concatenate([x, y[:, grid.length :]], axis=1) for x, y in zip(video, qkv)]
    if log_count is not None:
        joint = _weighted(*joint, log_count)
    p, i = video[0].shape[1], video[0].shape[3]
    o = attend_joint(*joint, p, text)[..., :i]
    return jnp.concatenate([grow(o[:, :p]), o[:, p:]], axis=1)


def average(
    q: Float[Array, "b s h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    grid: VideoGrid,
    *,
    text: Int[Array, "b"] | None = None,
    cell: tuple[int, int, int] = (2, 1, 1),
) -> Float[Array, "b s h i"]:
    """Attention between the means of cells of `cell` tokens; every token takes the output of its cell.

    The paper's ablation, with cells of two tokens along one axis. Its code is not public: that q, k and v are
    all averaged, after norm and rotation, and that outputs are copied, is inferred (unverified).
    """
    checks.attention(q, k, v, grid.length, text)
    slots, place = cells_in_program(grid, checks.sizes("cell", cell, AXES))
    at = jnp.maximum(slots, 0).ravel()
    there = (slots >= 0)[None, :, :, None, None]

    def mean(x):
        x = jnp.take(x, at, axis=1, mode="clip")
        return _mean(x.reshape(x.shape[0], *slots.shape, *x.shape[2:]), there)

    grow = lambda y: jnp.take(y, place // slots.shape[1], axis=1, mode="clip")
    return _attend(tuple(map(mean, (q, k, v))), (q, k, v), grid, text, grow)


def _mean(x, there):
    """Mean over the slots of x (b, g, m, h, i) that are there."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    total = jnp.sum(jnp.where(there, x, 0), axis=2, dtype=wide)
    return (total / jnp.sum(there, axis=2, dtype=wide)).astype(x.dtype)


def merge(
    q: Float[Array, "b s h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    grid: VideoGrid,
    *,
    text: Int[Array, "b"] | None = None,
    shared: bool = False,
) -> Float[Array, "b s h i"]:
    """Coreset attention whose centres are the mean of themselves and of what their bucket dropped.

    A key that is the mean of n tokens has log n added to its logits, as n equal keys would have. Ours, not the
    paper's.
    """
    checks.attention(q, k, v, grid.length, text)
    of_q, of_k = _matches(q, k, grid, shared)
    there = (bucket_table(grid, "slots") >= 0)[None, :, :, None]
    in_centre = lambda m: (m.source == 0) & there  # (b, g, m, h)

    def shrink(x, m):
        x = _grouped(x[:, : grid.length], grid)
        centre = _mean(x, in_centre(m)[..., None])
        rest = _pick(x, m.kept[:, :, 1:])
        return _rows(jnp.concatenate([centre[:, :, None], rest], axis=2), grid)

    wide = jnp.promote_types(k.dtype, jnp.float32)
    count = jnp.sum(in_centre(of_k), axis=2, keepdims=True, dtype=wide)
    log_count = jnp.pad(jnp.log(count), [(0, 0), (0, 0), (0, of_k.kept.shape[2] - 1), (0, 0)])
    log_count = _rows(log_count[..., None], grid)[..., 0]
    video = shrink(q, of_q), shrink(k, of_k), shrink(v, of_k)
    return _attend(video, (q, k, v), grid, text, lambda y: unpool(y, of_q, grid), log_count)


def _weighted(q, k, v, log_count):
    """q, k, v whose logits q k / sqrt(i) gain log_count (b, p, h): one more feature, so any attention takes it."""
    i = q.shape[-1]
    wide = i + FEATURES
    more = lambda x, feature: jnp.concatenate(
        [x, jnp.pad(feature[..., None].astype(x.dtype), [(0, 0)] * 3 + [(0, FEATURES - 1)])],
        axis=-1,
    )
    log_count = jnp.pad(log_count, [(0, 0), (0, k.shape[1] - log_count.shape[1]), (0, 0)])  # text
    # attention divides by sqrt(wide), but the logits of i features are to be divided by sqrt(i)
    q = more(q * math.sqrt(wide / i), jnp.ones_like(q[..., 0]))
    return q, more(k, log_count * math.sqrt(wide)), more(v, jnp.zeros_like(v[..., 0]))
