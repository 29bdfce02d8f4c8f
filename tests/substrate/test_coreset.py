"""Coreset attention: picks, pooling and outputs are those of the definition, cut buckets and ties included."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import video_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.ops.coreset import average, coreset, match, merge, pool, unpool
from jaxrepro.ops.routed import full
from jaxrepro.ops.video_grid import VideoGrid, buckets, to_layout, to_raster

EXACT = VideoGrid((4, 6, 4), (2, 3, 4), padding="strict")  # buckets are a reshape
LOOSE = VideoGrid((6, 6, 4), (3, 3, 4))  # tiles of 3 frames, buckets of 2
CUT = VideoGrid((5, 4, 3), (2, 2, 2), bucket=(2, 2, 2))


def run(op, grid, qkv, **more):
    """op on raster rows, as numpy, compiled."""
    f = jax.jit(
        lambda q, k, v: to_raster(op(*(to_layout(x, grid) for x in (q, k, v)), grid, **more), grid)
    )
    return np.asarray(f(*map(jnp.asarray, qkv)))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("grid", [EXACT, LOOSE, CUT])
def test_it_is_the_definition_with_text_of_any_length(grid, shared):
    valid = [0, 2]
    qkv = oracle.draw(0, grid.size, b=2, text=2)
    want = [
        oracle.coreset(*rows, grid.size, grid.bucket, grid.kept, n, shared)
        for rows, n in zip(np.swapaxes(qkv, 0, 1), valid)
    ]
    op = partial(coreset, shared=shared, text=jnp.asarray(valid))
    with oracle.float64():
        got = run(op, grid, qkv)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    if not shared:
        got = run(op, grid, qkv.astype("float32"))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(oracle.GRIDS)
def test_it_is_the_definition_on_any_grid(grid):
    grid = VideoGrid(**grid)
    qkv = oracle.draw(1, grid.size, h=1)
    want = oracle.coreset(*qkv[:, 0], grid.size, grid.bucket, grid.kept)
    with oracle.float64():
        np.testing.assert_allclose(run(coreset, grid, qkv)[0], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", [coreset, merge])
@pytest.mark.parametrize("size", [(4, 6, 4), (5, 4, 3)])
def test_nothing_dropped_is_dense_attention(op, size):
    grid = VideoGrid(size, (2, 3, 4), rate=0.0)
    qkv = oracle.draw(2, size, text=2)
    text = jnp.asarray([1])
    with oracle.float64():
        want = run(full, grid, qkv, text=text)
        np.testing.assert_allclose(run(op, grid, qkv, text=text), want, rtol=0, atol=1e-12)


def constant_in_buckets(seed, grid, of):
    """q, k, v whose tokens `of` (0 to 2) are equal inside each bucket."""
    qkv = oracle.draw(seed, grid.size)
    for tokens in oracle.members(grid.size, grid.bucket):
        for j in of:
            qkv[j, :, tokens] = qkv[j, :, tokens[0]]
    return qkv


def test_equal_tokens_inside_buckets_give_dense_attention():
    qkv = constant_in_buckets(3, EXACT, (0, 1, 2))
    with oracle.float64():
        want = run(full, EXACT, qkv)
        np.testing.assert_allclose(run(coreset, EXACT, qkv), want, rtol=0, atol=1e-12)


def test_a_merged_centre_counts_as_often_as_it_stands_for_tokens():
    # buckets of unequal sizes, so that without counts the outputs would differ; values are means of any values
    qkv = constant_in_buckets(4, CUT, (0, 1))
    with oracle.float64():
        want = run(full, CUT, qkv)
        np.testing.assert_allclose(run(merge, CUT, qkv), want, rtol=0, atol=1e-12)
        assert np.abs(run(coreset, CUT, qkv) - want).max() > 1e-2


@pytest.mark.parametrize("grid", [EXACT, CUT])
def test_the_least_similar_margins_are_kept_with_ties_in_order(grid):
    table = buckets(grid)
    run = jax.jit(partial(match, grid=grid))

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(st.integers(0, 2**31 - 1))
    def check(seed):
        # one-hot tokens with signs, and zeros: cosines are -1, 0 and 1 exactly, so most are tied
        rng = np.random.default_rng(seed)
        x = np.eye(3)[rng.integers(0, 3, grid.length)] * rng.integers(-1, 2, (grid.length, 1))
        found = run(to_layout(jnp.asarray(x, jnp.float32)[None, :, None], grid))
        want = {c: m for c, m, _ in oracle.picks(x, grid.size, grid.bucket, grid.kept)}
        for slots, kept, chosen in zip(table.slots, table.kept, np.asarray(found.kept[0, :, :, 0])):
            assert chosen[0] == 0
            raster = grid.order[slots[chosen[: 1 + kept]]].tolist()
            assert raster[1:] == want[raster[0]]

    check()


def test_equal_tokens_keep_the_first_margins():
    found = jax.jit(partial(match, grid=EXACT))(jnp.ones((1, EXACT.length, 2, 4)))
    assert (found.kept == jnp.arange(6)[:, None]).all()
    assert (found.source[0, 0, :, 0] == jnp.asarray([0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0])).all()


@pytest.mark.parametrize("grid", [EXACT, LOOSE, CUT])
def test_unpooling_gives_back_what_was_pooled_and_copies_centres(grid):
    x = to_layout(jnp.asarray(oracle.draw(5, grid.size, b=2, dtype="float32")[0]), grid)

    @jax.jit
    def both(x):
        m = match(x, grid)
        small = pool(x, m, grid)
        return small, to_raster(unpool(small, m, grid), grid)

    small, back = both(x)
    assert small.shape[1] == len(buckets(grid).rows)
    x = np.asarray(to_raster(x, grid))
    for b, h in np.ndindex(2, 2):
        want = x[b, :, h].copy()
        for c, _, dropped in oracle.picks(x[b, :, h], grid.size, grid.bucket, grid.kept):
            want[dropped] = want[c]
        np.testing.assert_array_equal(back[b, :, h], want)


@pytest.mark.parametrize("grid", [EXACT, CUT])
def test_tokens_without_length_give_numbers(grid):
    qkv = oracle.draw(6, grid.size, dtype="float32")
    qkv[:2, :, ::2] = 0
    assert np.isfinite(run(coreset, grid, qkv)).all()


@pytest.mark.parametrize("op", [coreset, average, merge])
def test_the_gradient_is_that_of_the_values_with_fixed_picks(op):
    with oracle.float64():
        x = jnp.asarray(oracle.draw(7, CUT.size, text=1))
        step = jnp.asarray(oracle.draw(8, CUT.size, text=1))
        loss = jax.jit(lambda x: jnp.sum(jnp.sin(op(*x, CUT))))
        slope = jnp.vdot(jax.jit(jax.grad(loss))(x), step)
        eps = 1e-6
        want = (loss(x + eps * step) - loss(x - eps * step)) / (2 * eps)
        np.testing.assert_allclose(slope, want, rtol=1e-6)


@pytest.mark.parametrize("cell", [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
@pytest.mark.parametrize("grid", [EXACT, CUT])
def test_averaging_attends_between_means_of_cells(grid, cell):
    q, k, v = oracle.draw(9, grid.size, text=2)[:, 0]
    n = grid.length
    groups = oracle.members(grid.size, cell)
    small = [np.stack([x[g].mean(0) for g in groups] + [x[n]]) for x in (q, k, v)]
    o = oracle.softmax_attention(*small, np.ones((len(groups) + 1,) * 2, bool))
    want = np.zeros_like(q)
    for g, row in zip(groups, o):
        want[g] = row
    want[n] = o[-1]
    with oracle.float64():
        got = run(
            partial(average, cell=cell, text=jnp.asarray([1])), grid, np.stack([q, k, v])[:, None]
        )
    np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-12)


def test_merging_is_its_definition():
    q, k, v = oracle.draw(10, CUT.size, h=1)[:, 0]
    grid = CUT
    of = lambda x: oracle.picks(x[:, 0], grid.size, grid.bucket, grid.kept)
    rows = lambda x, picks: np.concatenate(
        [[x[[c, *dropped]].mean(0), *x[kept]] for c, kept, dropped in picks]
    )
    counts = np.concatenate([[1 + len(dropped), *np.ones(len(kept))] for _, kept, dropped in of(k)])
    logits = rows(q, of(q))[:, 0] @ rows(k, of(k))[:, 0].T / 2 + np.log(counts)
    weights = np.exp(logits)
    o = weights / weights.sum(1, keepdims=True) @ rows(v, of(k))[:, 0]
    want, at = np.zeros_like(q), 0
    for c, kept, dropped in of(q):
        want[[c, *dropped], 0] = o[at]
        want[kept, 0] = o[at + 1 : at + 1 + len(kept)]
        at += 1 + len(kept)
    with oracle.float64():
        got = run(merge, grid, np.stack([q, k, v])[:, None])
    np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-12)
