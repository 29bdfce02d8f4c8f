"""Sliding-tile attention as one kernel for Hopper GPUs (Pallas, Mosaic GPU), which reads windows in place.

The definition is that of sliding.py: queries of one window see one box of tiles, and text. A box of tiles is a
few runs of keys that lie together in the layout (nine of three tiles, for a window of 3 x 3 x 3 tiles), so nothing
is gathered but the queries, once, into the order of their windows.

    grid     one block of threads an SM; block c works on items c, c + ctas, ... of (batch, head, 128 query rows)
    memory   one warpgroup; copies blocks of keys and values by TMA into a ring of buffers
    compute  two warpgroups of 64 rows; S = Q K^T, online softmax in powers of two, O = O + P V, by wgmma.
             While one multiplies, the other takes its exponentials: they meet at a barrier, half a block apart

Blocks of `Blocks.main` keys are whole and need no mask. What is left of a run is a masked block of `Blocks.tail`
keys, and valid text comes last, masked by its length. Runs begin where the copy allows it, at multiples of 8 rows.

Mosaic multiplies P V in groups of keys as wide as the swizzle of V: 64 keys at 128 bytes, 16 at 32 bytes. So a
block of 144, which divides the runs of HunyuanVideo (1296), swizzles V by 32 bytes; 128 + 64 keeps 128 bytes, and
masks 48 of 1344 keys there. Which is faster has not been measured.

**Experimental.** The kernel was lowered for CUDA, and ran in the interpreter, where products are `jnp.dot` instead
of wgmma. It has not run on a GPU yet, so that `sliding.sliding` takes it only by name. The gradient is that of
`sliding_groups`, which computes the output again. Needs jax 0.10.2 or newer.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxrepro.config import UserError
from jaxrepro.ops.sliding import with_groups
from jaxrepro.ops.video_grid import VideoGrid, items, runs

ROWS = 64  # query rows of a warpgroup, and of a wgmma
WARPGROUPS = 2  # warpgroups that compute
ALIGN = 8  # rows of a tile of shared memory: a copy that begins inside one would read zeros
SMS = 132  # of an H100 or H200
SHARED = 227 * 1024  # bytes that a block of threads may have
LOG2E = 1.4426950408889634


class Blocks(NamedTuple):
    """How keys are cut: sizes in rows, multiples of 16, and how many blocks are in flight."""

    main: int
    tail: int
    stages: int = 2


class Plan(NamedTuple):
    """The key blocks of g windows, as host arrays. Places are of the layout."""

    blocks: Blocks
    count: np.ndarray  # (g, 2) whole and masked blocks
    whole: np.ndarray  # (g, n) first row of each block
    masked: np.ndarray  # (g, m, 3) first row, then from where and up to where its rows count


def choose_blocks(lengths: tuple[int, ...]) -> Blocks:
    """144 keys where that divides every run; else 128, and the smallest tail that takes the longest rest."""
    if all(n % 144 == 0 for n in lengths):
        return Blocks(144, 16)
    return Blocks(128, max(-(-(n % 128) // 64) * 64 for n in lengths) or 64)


@lru_cache(maxsize=64)
def make_plan(grid: VideoGrid, rows: int, blocks: Blocks | None = None) -> Plan:
    """The plan of a grid whose keys, text included, lie in `rows` rows, a multiple of 8."""
    spans = [runs(w.keys) for w in items(grid, WARPGROUPS * ROWS).windows]
    blocks = blocks or choose_blocks(tuple({b - a for each in spans for a, b in each}))
    if max(blocks[:2]) > rows:
        raise UserError(
            f"{rows} rows of keys are fewer than a block of {max(blocks[:2])}; take kernel='groups'"
        )
    whole, masked = [], []
    for each in spans:
        cuts = [_cut(a, b, rows, blocks) for a, b in each]
        whole.append([at for some, _ in cuts for at in some])
        masked.append([m for _, some in cuts for m in some])
    count = np.asarray([(len(a), len(b)) for a, b in zip(whole, masked)], np.int32)
    table = lambda lists, empty: np.asarray(
        [x + [empty] * (max(1, *map(len, lists)) - len(x)) for x in lists], np.int32
    )
    return Plan(blocks, count, table(whole, 0), table(masked, [0, 0, 0]))


def _cut(start, end, rows, blocks):
    """A run in blocks: first rows of whole ones, and (first row, from, up to) of masked ones."""
    whole, masked = [], []
    at = start - start % ALIGN

    def mask(at):
        first = min(at, rows - blocks.tail)
        masked.append([first, max(start, at) - first, min(end - first, blocks.tail)])
        return at + blocks.tail

    if at < start:
        at = mask(at)
    while at + blocks.main <= end:
        whole.append(at)
        at += blocks.main
    while at < end:
        at = mask(at)
    return whole, masked


class Wgmma:
    """What the compute warpgroups do on the device; `Dots` is the same for the interpreter."""

    @staticmethod
    def scores(q, k, issued):
        """q (t, i) k^T (s, i) in float32; calls `issued` once the tensor cores have their work."""

        def body(total):
            plgpu.wgmma(total, q, k.transpose((1, 0)))
            issued()
            return total[...]

        return pl.run_scoped(body, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))

    @staticmethod
    def add_values(o, p, v):
        """o (t, i) + p (t, s) v (s, i)."""
        return pl.run_state(lambda total: plgpu.wgmma(total, p, v))(plgpu.ACC.init(o))

    @staticmethod
    def rows(x):
        """A number a row, as it lies beside the scores."""
        return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1))

    @staticmethod
    def square(x):
        """A number a row and column, as scores lie."""
        return plgpu.layout_cast(x, plgpu.Layout.WGMMA)

    @staticmethod
    def columns(shape):
        """The column of each score."""
        return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


class Dots:
    """`Wgmma` without registers and layouts. Its reads of shared memory are not those of the tensor cores, so that
    they are committed before a copy may write there again."""

    @staticmethod
    def scores(q, k, issued):
        s = jnp.dot(q[...], k[...].T, preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        issued()
        return s

    @staticmethod
    def add_values(o, p, v):
        v = v[...]
        plgpu.commit_smem()
        return o + jnp.dot(p, v, preferred_element_type=jnp.float32)

    rows = square = staticmethod(lambda x: x)

    @staticmethod
    def columns(shape):
        return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _kernel(
    q_ref, k_ref, v_ref, text_ref, window_ref, count_ref, whole_ref, masked_ref, o_ref,  # memory of the GPU
    q_tile, k_ring, v_ring, q_ready, k_ready, v_ready, k_free, v_free, turn,  # shared memory
    *, blocks, kinds, video, slots, math,
):  # fmt: skip
    b, _, h, i = q_ref.shape
    main, tail, stages = blocks
    per_head = window_ref.shape[0]
    me, ctas = jax.lax.axis_index("cta"), jax.lax.axis_size("cta")
    warpgroup = jax.lax.axis_index("warpgroup")
    first_text = video - video % ALIGN

    def each_item(body, carry):
        """carry of body(batch, head, item, carry) over the items of this block of threads."""

        def one(n, carry):
            n = me + n * ctas
            head = jax.lax.div(n, per_head)
            return body(jax.lax.div(head, h), jax.lax.rem(head, h), jax.lax.rem(n, per_head), carry)

        return jax.lax.fori_loop(0, pl.cdiv(b * h * per_head - me, ctas), one, carry)

    def each_block(batch, item, visit, carry):
        """carry of visit(size, first row, mask, carry) over the key blocks of an item; mask: (from, up to) or None."""
        g = window_ref[item]

        def whole(n, carry):
            return visit(main, whole_ref[g, n], None, carry)

        def masked(n, carry):
            at, low, high = (masked_ref[g, n, c] for c in range(3))
            return visit(tail, at, (low, high), carry)

        def text(n, carry):
            start = first_text + n * main
            at = jnp.minimum(start, k_ref.shape[1] - main)
            return visit(main, at, (jnp.maximum(start, video) - at, video + valid - at), carry)

        for kind, (some, body) in enumerate(zip(kinds, (whole, masked))):
            if some:
                carry = jax.lax.fori_loop(0, count_ref[g, kind], body, carry)
        if not slots:
            return carry
        valid = text_ref[batch]
        n = jnp.where(valid > 0, pl.cdiv(video - first_text + valid, main), 0)
        return jax.lax.fori_loop(0, n, text, carry)

    @pl.when(warpgroup == WARPGROUPS)
    def _memory():
        plgpu.set_max_registers(40, action="decrease")

        def fetch(batch, head, size, at, step):
            slot = jax.lax.rem(step, stages)
            for source, ring, ready, free in (
                (k_ref, k_ring, k_ready, k_free),
                (v_ref, v_ring, v_ready, v_free),
            ):
                pl.when(step >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                plgpu.copy_gmem_to_smem(
                    source.at[batch, pl.ds(at, size), head],
                    ring.at[slot, pl.ds(0, size)],
                    ready.at[slot],
                )
            return step + 1

        def item(batch, head, item, step):
            body = lambda size, at, _, step: fetch(batch, head, size, at, step)
            return each_block(batch, item, body, step)

        steps = each_item(item, jnp.int32(0))
        for back in range(stages):  # no barrier may be left with a completion that nobody saw

            @pl.when(steps > back)
            def _drain(back=back):
                slot = jax.lax.rem(steps - 1 - back, stages)
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

    @pl.when(warpgroup < WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        tile = q_tile.at[warpgroup]

        def meet():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def attend(size, _, mask, carry):
            step, o, top, total = carry
            slot = jax.lax.rem(step, stages)
            here = pl.ds(0, size)
            plgpu.barrier_wait(k_ready.at[slot])
            s = math.scores(tile, k_ring.at[slot, here], meet)
            plgpu.barrier_arrive(k_free.at[slot])
            if mask is not None:
                column = math.columns(s.shape)
                s = jnp.where((column >= mask[0]) & (column < mask[1]), s, -jnp.inf)
            wide = lambda x, like: jax.lax.broadcast_in_dim(x, like.shape, [0])
            scale = LOG2E * i**-0.5
            # finite, since every block has a key that counts
            now = jnp.maximum(top, s.max(axis=1) * scale)
            fade = jnp.exp2(top - now)
            p = jnp.exp2(s * scale - wide(now, s))
            o = o * wide(fade, o)
            total = total * fade + p.sum(axis=1)
            p = p.astype(q_ref.dtype)
            if math is Wgmma:  # else the compiler moves exponentials behind the barrier
                o, total, now, p = jax.lax.optimization_barrier((o, total, now, p))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_wait(turn)
            o = math.add_values(o, p, v_ring.at[slot, here])
            plgpu.barrier_arrive(v_free.at[slot])
            return step + 1, o, now, total

        def item(batch, head, item, step):
            mine = q_ref.at[batch, pl.ds((item * WARPGROUPS + warpgroup) * ROWS, ROWS), head]
            plgpu.copy_gmem_to_smem(mine, tile, q_ready.at[warpgroup])
            plgpu.barrier_wait(q_ready.at[warpgroup])
            zeros = math.rows(jnp.zeros(ROWS, jnp.float32))
            top = math.rows(jnp.full(ROWS, -jnp.inf, jnp.float32))
            start = step, math.square(jnp.zeros((ROWS, i), jnp.float32)), top, zeros
            step, o, _, total = each_block(batch, item, attend, start)
            tile[...] = (o / jax.lax.broadcast_in_dim(total, o.shape, [0])).astype(tile.dtype)
            plgpu.commit_smem()
            rows = pl.ds((item * WARPGROUPS + warpgroup) * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(tile, o_ref.at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0)
            return step

        pl.when(warpgroup == 1)(meet)  # half a block behind the other
        each_item(item, jnp.int32(0))
        pl.when(warpgroup == 0)(meet)


def _swizzled(shape, dtype, width=128):
    """Shared memory of (..., rows, i) as wgmma and TMA take it; width: bytes of the swizzle."""
    tiling = plgpu.TilingTransform((ALIGN, width // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(width)))


def _shared(blocks, i, dtype):
    """Buffers and barriers of a block of threads."""
    width = 2 * next(n for n in (64, 32, 16) if blocks.main % n == 0 and blocks.tail % n == 0)
    ring = (blocks.stages, max(blocks[:2]), i)
    size = 2 * int(np.prod(ring)) + WARPGROUPS * ROWS * i
    if size * jnp.dtype(dtype).itemsize > SHARED - 1024:
        raise UserError(
            f"{blocks} of head size {i} needs more than {SHARED} bytes of shared memory; take fewer stages"
        )
    ready = plgpu.Barrier(num_barriers=blocks.stages)
    free = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=blocks.stages)
    return [
        _swizzled((WARPGROUPS, ROWS, i), dtype),
        _swizzled(ring, dtype),
        _swizzled(ring, dtype, width),
        *(
            plgpu.Barrier(num_barriers=WARPGROUPS),
            ready,
            ready,
            free,
            free,
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
    ]


def _video(q, k, v, text, grid, blocks, ctas, interpret):
    """Outputs of the video tokens."""
    n, slots, i = grid.length, k.shape[1] - grid.length, q.shape[3]
    k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % ALIGN), (0, 0), (0, 0))) for x in (k, v))
    plan, order = make_plan(grid, k.shape[1], blocks), items(grid, WARPGROUPS * ROWS)
    q = jnp.take(q, order.queries, axis=1, mode="clip")
    math = Wgmma if interpret is None else Dots
    run = plgpu.kernel(
        partial(
            _kernel, blocks=plan.blocks, kinds=plan.count.any(0), video=n, slots=slots, math=math
        ),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=_shared(plan.blocks, i, q.dtype),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )
    o = run(q, k, v, text, *map(jnp.asarray, (order.window, plan.count, plan.whole, plan.masked)))
    return jnp.take(o, order.back, axis=1, mode="clip")


def sliding_mosaic(
    q: Float[Array, "b s h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    grid: VideoGrid,
    *,
    text: Int[Array, "b"] | None = None,
    blocks: Blocks | None = None,
    ctas: int = SMS,
    interpret: Any = None,
) -> Float[Array, "b s h i"]:
    """Sliding-tile attention by the kernel; half precision, head size 64 or 128.

    blocks: how keys are cut (None = `choose_blocks`). ctas: blocks of threads, at most one an SM. interpret:
    parameters of Pallas's GPU interpreter, for tests. UserError for what the kernel does not take.
    """
    if q.shape[3] not in (64, 128):
        raise UserError(
            f"head size {q.shape[3]} must be 64 or 128 for kernel='mosaic'; take kernel='groups'"
        )
    if interpret is None and q.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"{q.dtype} must be bfloat16 or float16 for kernel='mosaic'; take kernel='groups'"
        )
    video = partial(_video, grid=grid, blocks=blocks, ctas=ctas, interpret=interpret)
    return with_groups(video, q, k, v, grid, text)
