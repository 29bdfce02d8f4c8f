"""Sliding-tile attention: the mask and the window groups are its definition, for any size and text."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import video_oracle as oracle
from hypothesis import given, settings

from jaxrepro.ops.routed import full
from jaxrepro.ops.sliding import sliding_groups, sliding_reference
from jaxrepro.ops.video_grid import VideoGrid, to_layout, to_raster

EXACT = VideoGrid((4, 6, 4), (2, 3, 1), (1, 3, 3), padding="strict")
CUT = VideoGrid((5, 4, 3), (2, 2, 2))
WIDE = VideoGrid((4, 3, 4), (2, 3, 2), (5, 3, 3))  # the window is wider than the grid
BOTH = pytest.mark.parametrize("op", [sliding_reference, sliding_groups])


def run(op, grid, qkv, **more):
    """op on raster rows, as numpy, compiled."""
    f = jax.jit(
        lambda q, k, v: to_raster(op(*(to_layout(x, grid) for x in (q, k, v)), grid, **more), grid)
    )
    return np.asarray(f(*map(jnp.asarray, qkv)))


@BOTH
@pytest.mark.parametrize("grid", [EXACT, CUT, WIDE])
def test_it_is_the_definition_with_text_of_any_length(op, grid):
    valid = [0, 2, 3]
    qkv = oracle.draw(0, grid.size, b=3, text=3)
    want = [
        oracle.sliding(*rows, grid.size, grid.tile, grid.window, n)
        for rows, n in zip(np.swapaxes(qkv, 0, 1), valid)
    ]
    with oracle.float64():
        got = run(op, grid, qkv, text=jnp.asarray(valid))
        assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(got[0, grid.length :], 0)  # no text is valid: zeros, not NaN
    got = run(op, grid, qkv.astype("float32"), text=jnp.asarray(valid))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(oracle.GRIDS)
def test_both_are_the_definition_on_any_grid(grid):
    grid = VideoGrid(**grid)
    qkv = oracle.draw(1, grid.size, h=1)
    want = oracle.sliding(*qkv[:, 0], grid.size, grid.tile, grid.window)
    with oracle.float64():
        for op in (sliding_reference, sliding_groups):
            np.testing.assert_allclose(run(op, grid, qkv)[0], want, rtol=0, atol=1e-12)


@BOTH
def test_a_window_over_all_tiles_is_dense_attention(op):
    qkv = oracle.draw(2, WIDE.size, text=2)
    text = jnp.asarray([1])
    with oracle.float64():
        want = run(full, WIDE, qkv, text=text)
        np.testing.assert_allclose(run(op, WIDE, qkv, text=text), want, rtol=0, atol=1e-12)


@BOTH
def test_a_window_of_one_token_gives_its_value(op):
    grid = VideoGrid((3, 2, 4), (1, 1, 1), (1, 1, 1))
    qkv = oracle.draw(3, grid.size, dtype="float32")
    np.testing.assert_allclose(run(op, grid, qkv), qkv[2], rtol=1e-6)


@pytest.mark.parametrize("grid", [EXACT, CUT])
def test_the_gradient_of_the_groups_is_that_of_the_mask(grid):
    qkv = oracle.draw(4, grid.size, b=2, text=2)
    with oracle.float64():
        weight = jnp.asarray(oracle.draw(5, grid.size, b=2, text=2)[0])
        text = jnp.asarray([2, 1])
        loss = lambda op, *qkv: jnp.vdot(weight, jnp.sin(op(*qkv, grid, text=text)))
        slope = lambda op: jax.jit(jax.grad(partial(loss, op), argnums=(0, 1, 2)))
        got, want = (
            slope(op)(*map(jnp.asarray, qkv)) for op in (sliding_groups, sliding_reference)
        )
        for a, b in zip(got, want):
            assert np.abs(b).max() > 0.1
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@BOTH
def test_padded_text_influences_nothing_and_rows_are_apart(op):
    text = jnp.asarray([1, 3])
    qkv = oracle.draw(6, CUT.size, b=2, text=3, dtype="float32")
    loud = qkv.copy()
    loud[:, 0, CUT.length + 1 :] = 1e4
    whole = run(op, CUT, qkv, text=text)
    np.testing.assert_array_equal(run(op, CUT, loud, text=text), whole)
    for r in range(2):
        alone = run(op, CUT, qkv[:, r : r + 1], text=text[r : r + 1])
        np.testing.assert_allclose(alone[0], whole[r], rtol=0, atol=1e-6)


def test_half_precision_stays_near_the_definition():
    qkv = oracle.draw(7, CUT.size)
    want = oracle.sliding(*qkv[:, 0], CUT.size, CUT.tile, CUT.window)
    got = run(sliding_groups, CUT, [jnp.asarray(x, jnp.bfloat16) for x in qkv])
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got[0].astype("float32"), want, rtol=0, atol=2e-2)


def test_strict_and_auto_agree_where_sizes_divide():
    auto = VideoGrid(EXACT.size, EXACT.tile, EXACT.window)
    qkv = oracle.draw(8, EXACT.size, dtype="float32")
    np.testing.assert_array_equal(run(sliding_groups, auto, qkv), run(sliding_groups, EXACT, qkv))
