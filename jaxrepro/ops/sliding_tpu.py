"""Sliding-tile attention as one TPU kernel (Pallas), which reads windows in place.

The definition is that of sliding.py. Keys lie in blocks of equally many rows; a window lists the blocks that hold
its keys, and which of their rows count, and text ends every list. The lists are scalars that the chip has before
the kernel starts (scalar prefetch), so that its pipeline fetches the next block of a list while the last is used.

    grid    (batch, head, item, place in the list);  an item is `rows` queries of one window
    each    S = Q K^T / sqrt(i), online softmax, O = O + P V;  the output is written at the end of the list

A block is a tile where every tile is whole and has a multiple of 16 tokens (HunyuanVideo: 432, so that nothing is
masked), else 256 rows. **Experimental**: lowered for TPU and interpreted, it has not run on one; `sliding.sliding`
takes it only by name. The gradient is that of `sliding_groups`, which computes the output again.
"""

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxrepro.ops.attention import MASKED
from jaxrepro.ops.sliding import with_groups
from jaxrepro.ops.video_grid import VideoGrid, items, runs

LANES = 128  # of a vector register: one number a row is kept in all of them


def block_rows(grid: VideoGrid) -> int:
    """Rows of a key block."""
    tile = math.prod(grid.tile)
    return tile if grid.exact and tile % 16 == 0 else 256


@lru_cache(maxsize=64)
def block_lists(grid: VideoGrid, slots: int, block: int, rows: int) -> np.ndarray:
    """(g, n, 3) key blocks of each window: number, then from where and up to where its rows count.

    Text slots are last; lists that end early repeat their last block, of which nothing counts.
    """
    lists = []
    for window in items(grid, rows).windows:
        spans = [*runs(window.keys), *([(grid.length, grid.length + slots)] if slots else [])]
        lists.append(
            [
                (j, max(start - j * block, 0), min(end - j * block, block))
                for start, end in spans
                for j in range(start // block, -(-end // block))
            ]
        )
    longest = max(map(len, lists))
    return np.asarray([x + [(x[-1][0], 0, 0)] * (longest - len(x)) for x in lists], np.int32)


def _kernel(
    window_ref,
    lists_ref,
    text_ref,
    q_ref,
    k_ref,
    v_ref,
    o_ref,
    top,
    total,
    sum_,
    *,
    n,
    block,
    video,
):
    """One block of keys for one item; scratch holds maximum, sum of weights and sum of values."""
    batch, item, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    entry = (window_ref[item] * n + j) * 3
    number, low, high = (lists_ref[entry + c] for c in range(3))

    @pl.when(j == 0)
    def _start():
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)
        sum_[...] = jnp.zeros_like(sum_)

    @pl.when(low < high)
    def _attend():
        q, k, v = q_ref[...], k_ref[...], v_ref[...]
        s = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        column = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
        end = jnp.minimum(high, video + text_ref[batch] - number * block)
        see = (column >= low) & (column < end)
        s = jnp.where(see, s * q.shape[1] ** -0.5, MASKED)
        old = top[:, :1]
        now = jnp.maximum(old, s.max(axis=1, keepdims=True))
        fade = jnp.exp(old - now)
        p = jnp.where(see, jnp.exp(s - now), 0)
        total[...] = total[...] * fade + p.sum(axis=1, keepdims=True)
        sum_[...] = sum_[...] * fade + jnp.dot(
            p.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        top[...] = jnp.broadcast_to(now, top.shape)

    @pl.when(j == n - 1)
    def _end():
        o_ref[...] = (sum_[...] / total[:, :1]).astype(o_ref.dtype)


def _video(q, k, v, text, *, grid, block, rows, interpret):
    """Outputs of the video tokens."""
    b, s, h, i = q.shape
    order, lists = items(grid, rows), block_lists(grid, s - grid.length, block, rows)
    n = lists.shape[1]
    heads_first = lambda x: jnp.swapaxes(
        x, 1, 2
    )  # the last two axes of a block are those of a matrix
    q = heads_first(jnp.take(q, order.queries, axis=1, mode="clip"))
    k, v = (heads_first(jnp.pad(x, ((0, 0), (0, -s % block), (0, 0), (0, 0)))) for x in (k, v))

    def keys(batch, head, item, j, window, lists, text):
        return batch, head, lists[(window[item] * n + j) * 3], 0

    mine = pl.BlockSpec(
        (None, None, rows, i), lambda batch, head, item, j, *_: (batch, head, item, 0)
    )
    theirs = pl.BlockSpec((None, None, block, i), keys)
    number = pltpu.VMEM((rows, LANES), jnp.float32)
    o = pl.pallas_call(
        partial(_kernel, n=n, block=block, video=grid.length),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b, h, len(order.window), n),
            in_specs=[mine, theirs, theirs],
            out_specs=mine,
            scratch_shapes=[number, number, pltpu.VMEM((rows, i), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        interpret=interpret,
    )(jnp.asarray(order.window), jnp.asarray(lists.ravel()), text, q, k, v)
    return jnp.take(heads_first(o), order.back, axis=1, mode="clip")


def sliding_tpu(
    q: Float[Array, "b s h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    grid: VideoGrid,
    *,
    text: Int[Array, "b"] | None = None,
    block: int | None = None,
    rows: int = 256,
    interpret: bool = False,
) -> Float[Array, "b s h i"]:
    """Sliding-tile attention by the kernel.

    block: key rows of a block (None = `block_rows`). rows: query rows of an item; both multiples of 16 on a TPU.
    interpret: runs it with jax's own operations, for tests.
    """
    block = block or block_rows(grid)
    video = partial(_video, grid=grid, block=block, rows=rows, interpret=interpret)
    return with_groups(video, q, k, v, grid, text)
