"""The kernel for TPUs: its lists are the windows, it is the window groups, and it lowers. It has not run on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import video_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.ops.sliding import sliding, sliding_groups
from jaxrepro.ops.sliding_tpu import block_lists, block_rows, sliding_tpu
from jaxrepro.ops.video_grid import VideoGrid, items


@settings(max_examples=30, deadline=None, derandomize=True)
@given(oracle.GRIDS, st.sampled_from([4, 8, 16]), st.integers(0, 5))
def test_the_lists_hold_the_keys_of_each_window_and_text_once(grid, block, slots):
    grid = VideoGrid(**grid)
    text = np.arange(grid.length, grid.length + slots)
    lists = block_lists(grid, slots, block, 16)
    for window, one in zip(items(grid, 16).windows, lists):
        keys = [np.arange(j * block + low, j * block + high) for j, low, high in one]
        np.testing.assert_array_equal(
            np.sort(np.concatenate(keys)), np.concatenate([window.keys, text])
        )


def test_blocks_are_tiles_where_the_chip_takes_them():
    assert block_rows(VideoGrid((30, 45, 80), (6, 9, 8))) == 432  # HunyuanVideo
    assert (
        block_rows(VideoGrid((20, 45, 80), (5, 9, 8))) == 256
    )  # Wan 14B: 360 is not a multiple of 16


@pytest.mark.parametrize("text", [None, [0, 3]])
def test_interpreted_it_is_the_window_groups(text):
    grid = VideoGrid((5, 4, 3), (2, 2, 2))  # cut tiles; blocks that two runs share
    slots = 0 if text is None else 4
    qkv = map(jnp.asarray, oracle.draw(0, grid.size, b=2, i=8, text=slots, dtype="float32"))
    q, k, v = qkv
    text = None if text is None else jnp.asarray(text)
    got = jax.jit(
        lambda q, k, v: sliding_tpu(q, k, v, grid, text=text, block=8, rows=8, interpret=True)
    )(4 * q, k, v)
    want = sliding_groups(4 * q, k, v, grid, text=text)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "tile", "text"), [((6, 9, 32), (6, 9, 8), 256), ((5, 9, 32), (5, 9, 8), 0)]
)
def test_it_lowers_for_a_tpu_at_the_shapes_of_published_models(size, tile, text):
    grid = VideoGrid(size, tile, (1, 1, 3))
    x = jax.ShapeDtypeStruct((1, grid.length + text, 2, 128), jnp.bfloat16)
    f = jax.jit(lambda q, k, v: sliding_tpu(q, k, v, grid))
    assert "tpu_custom_call" in f.trace(x, x, x).lower(lowering_platforms=("tpu",)).as_text()


def test_without_a_tpu_it_is_refused_and_auto_is_the_groups():
    grid = VideoGrid((2, 2, 2), (1, 1, 1), (1, 1, 1))
    q, k, v = map(jnp.asarray, oracle.draw(1, grid.size, dtype="float32"))
    with pytest.raises(UserError, match="needs a TPU, not cpu"):
        sliding(q, k, v, grid, kernel="tpu")
    with pytest.raises(UserError, match="must be one of auto, groups"):
        sliding(q, k, v, grid, kernel="triton")
    for name in ("auto", "groups", "reference"):
        np.testing.assert_allclose(sliding(q, k, v, grid, kernel=name), v, rtol=1e-6)
