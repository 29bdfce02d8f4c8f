"""The kernel for Hopper: its plan is the windows, its algorithm that of the window groups, and it lowers for CUDA.

Nothing here runs on a GPU. The interpreter runs the kernel with `jnp.dot` in place of wgmma; the kernel with wgmma
is lowered, which finds what Mosaic does not take.
"""

from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import video_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.ops.sliding import sliding, sliding_groups
from jaxrepro.ops.video_grid import VideoGrid, items

if tuple(map(int, metadata.version("jax").split(".")[:3])) < (0, 10, 2):
    pytest.skip("the kernel needs jax 0.10.2", allow_module_level=True)

from jaxrepro.ops import sliding_mosaic as kernel
from jaxrepro.ops.sliding_mosaic import Blocks, sliding_mosaic


@settings(max_examples=30, deadline=None, derandomize=True)
@given(oracle.GRIDS, st.sampled_from([(16, 16), (32, 16), (16, 32)]), st.integers(0, 9))
def test_the_blocks_of_a_plan_are_the_keys_of_each_window_once(grid, sizes, slots):
    grid, blocks = VideoGrid(**grid), Blocks(*sizes)
    rows = max(-(-(grid.length + slots) // 8) * 8, max(sizes))
    plan = kernel.make_plan(grid, rows, blocks)
    order = items(grid, 128)
    for g, window in enumerate(order.windows):
        n, m = plan.count[g]
        spans = [(at, 0, blocks.main) for at in plan.whole[g, :n]]
        spans += [tuple(each) for each in plan.masked[g, :m]]
        assert all(at % 8 == 0 and low < high for at, low, high in spans)
        assert all(at >= 0 and at + blocks.tail <= rows for at, _, _ in plan.masked[g, :m])
        keys = np.concatenate([np.arange(at + low, at + high) for at, low, high in spans])
        np.testing.assert_array_equal(np.sort(keys), window.keys)
        assert set(order.window[order.back[window.queries] // 128]) == {g}
    np.testing.assert_array_equal(order.queries[order.back], np.arange(grid.length))


@pytest.mark.parametrize(
    ("size", "tile", "blocks", "waste"),
    [
        # tiles and grids of arXiv:2505.18809; a run is three tiles along the width: 1296, 1080 and 360 keys
        ((30, 45, 80), (6, 9, 8), (144, 16, 2), 1.0),
        ((20, 45, 80), (5, 9, 8), (128, 64, 2), 1088 / 1080),
        ((20, 30, 52), (5, 6, 4), (128, 128, 2), 384 / 360),
    ],
)
def test_blocks_of_the_published_grids(size, tile, blocks, waste):
    run = 3 * int(np.prod(tile))
    got = kernel.choose_blocks((run,))
    assert got == blocks
    rows = run // got.main * got.main + (run % got.main > 0) * got.tail
    assert rows / run == pytest.approx(waste)


def interpreter():
    """Parameters of the interpreter, and a function that says whether it saw a race; both moved between versions."""
    try:
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params
    except ImportError:
        pytest.skip("this jax keeps Pallas's GPU interpreter elsewhere")
    return params.InterpretGPUParams(
        detect_races=True
    ), lambda: gpu_callbacks.get_races().races_found


WHOLE = VideoGrid((2, 3, 9), (1, 3, 3), (1, 1, 3))  # 2 windows of 27 keys
CUT = VideoGrid(
    (1, 4, 7), (1, 3, 3), (1, 1, 3)
)  # 2 windows of 21 and 7 keys, tiles cut on two axes
LONG = VideoGrid((2, 8, 16), (2, 8, 9), (1, 1, 1))  # 2 windows of 144 and 112 keys: three items


@pytest.mark.parametrize(
    ("grid", "blocks"),
    [
        (WHOLE, Blocks(16, 16)),  # the second window, and text, begin inside a tile of 8 rows
        pytest.param(CUT, Blocks(16, 16), marks=pytest.mark.slow),
        # the two choices for the published models
        pytest.param(LONG, Blocks(144, 16), marks=pytest.mark.slow),
        pytest.param(LONG, Blocks(128, 64), marks=pytest.mark.slow),
    ],
    ids=["whole", "cut", "144", "128 + 64"],
)
def test_interpreted_without_races_it_is_the_window_groups(grid, blocks):
    how, races = interpreter()
    b = 1 if grid is LONG else 2
    data = oracle.draw(0, grid.size, b=b, h=1, i=64, text=5, dtype="float32")
    q, k, v = map(jnp.asarray, data)
    text = jnp.asarray([3, 0][:b])
    q = 4 * q  # logits whose maximum moves from block to block
    got = sliding_mosaic(q, k, v, grid, text=text, blocks=blocks, ctas=3, interpret=how)
    want = sliding_groups(q, k, v, grid, text=text)
    assert not races()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def lowered(grid, *, text=0, blocks=None, i=128, slope=False):
    x = jax.ShapeDtypeStruct((1, grid.length + text, 2, i), jnp.bfloat16)

    def f(q, k, v):
        return sliding_mosaic(q, k, v, grid, blocks=blocks)

    if slope:
        f = jax.grad(lambda *x, f=f: f(*x).sum(dtype=jnp.float32))
    return jax.jit(f).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("size", "tile", "text", "blocks"),
    [
        # one row of tiles of the published models: their runs, blocks and heads, so the same kernel
        ((6, 9, 32), (6, 9, 8), 256, None),
        ((6, 9, 32), (6, 9, 8), 256, Blocks(128, 64)),
        ((5, 9, 32), (5, 9, 8), 0, None),
        ((5, 6, 16), (5, 6, 4), 0, None),
    ],
)
def test_it_lowers_for_cuda_at_the_shapes_of_published_models(size, tile, text, blocks):
    grid = VideoGrid(size, tile, (1, 1, 3))
    assert "mosaic_gpu_v2" in lowered(grid, text=text, blocks=blocks)


def test_its_gradient_is_that_of_the_window_groups():
    # two tiles that see themselves: the kernel's output is not needed for the gradient
    text = lowered(VideoGrid((2, 8, 32), (2, 8, 16), (1, 1, 1)), i=64, slope=True)
    assert "mosaic_gpu_v2" not in text and "exponential" in text


def test_what_the_kernel_does_not_take_is_one_line():
    grid = VideoGrid((2, 8, 16), (2, 8, 8), (1, 1, 1))
    q = jnp.zeros((1, grid.length, 1, 64), jnp.bfloat16)
    cases = [
        (q[..., :32], {}, "head size 32"),
        (q.astype(jnp.float32), {}, "float32 must be"),
        (q, {"blocks": Blocks(512, 64)}, "256 rows of keys are fewer"),
        (q, {"blocks": Blocks(256, 64, 4)}, "shared memory"),
    ]
    for x, more, says in cases:
        with pytest.raises(UserError, match=says):
            jax.eval_shape(lambda x=x, more=more: sliding_mosaic(x, x, x, grid, **more))
    with pytest.raises(UserError, match="compute capability 9"):
        sliding(q, q, q, grid, kernel="mosaic")
