"""Tiles, windows and buckets of a video: the published counts, any size, and errors that name both numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import video_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.ops import video_places
from jaxrepro.ops.sliding import window_mask
from jaxrepro.ops.video_grid import (
    VideoGrid,
    bucket_table,
    buckets,
    cells,
    cells_in_program,
    rectangles,
    to_layout,
    to_raster,
    tokens,
)

HUNYUAN = VideoGrid((30, 45, 80), (6, 9, 8), padding="strict")
WAN = VideoGrid((20, 45, 80), (5, 9, 8), padding="strict")


def test_a_video_has_the_token_grids_of_the_paper():
    assert tokens(117, 720, 1280) == (30, 45, 80)
    assert tokens(77, 720, 1280) == (20, 45, 80)
    assert tokens(81, 720, 1280) == (21, 45, 80)
    assert tokens(77, 480, 832) == (20, 30, 52)


@pytest.mark.parametrize(
    ("grid", "tiles", "classes"),
    [(HUNYUAN, 250, {8: 8, 4: 32, 2: 26, 1: 6}), (WAN, 200, {8: 8, 4: 28, 2: 12})],
)
def test_tiles_share_as_many_windows_as_counted_by_hand(grid, tiles, classes):
    assert math.prod(grid.tiles) == tiles
    found, back = rectangles(grid, 5)
    assert {c.tiles: len(c.queries) for c in found} == classes
    per_tile = math.prod(grid.tile)
    assert all(c.queries.shape[1] == c.tiles * per_tile for c in found)
    assert all(c.keys.shape[1] == 27 * per_tile + 5 for c in found)
    assert all((c.lengths == 27 * per_tile).all() for c in found)
    rows = np.concatenate([c.queries.ravel() for c in found])
    np.testing.assert_array_equal(rows[back], np.arange(grid.length))


def test_shares_of_the_work_are_those_of_the_paper():
    full, coreset, sliding = HUNYUAN.flops
    assert (full, coreset) == (1.0, 0.25)
    assert sliding == pytest.approx(27 / 250, rel=1e-12)
    assert WAN.flops[2] == pytest.approx(27 / 200, rel=1e-12)


@pytest.mark.parametrize(("rate", "kept"), [(0.0, 11), (0.25, 8), (0.5, 5), (0.75, 2), (0.9, 0)])
def test_a_bucket_of_12_keeps_the_margins_of_the_formula(rate, kept):
    grid = VideoGrid((4, 6, 4), (2, 3, 2), rate=rate)
    assert grid.kept(12) == kept
    assert grid.flops[1] == pytest.approx(((kept + 1) / 12) ** 2)


def test_kept_margins_are_counted_in_whole_numbers():
    # 10 (1 - 0.9) is 0.99999... in floating point, which would leave no centre
    assert VideoGrid((2, 5, 1), (2, 5, 1), bucket=(2, 5, 1), rate=0.9).kept(10) == 0


def test_the_centre_of_a_bucket_is_the_middle_of_every_axis():
    for bucket, slot in (((2, 3, 2), 9), ((2, 2, 2), 7)):
        grid = VideoGrid(bucket, bucket, bucket=bucket)
        assert grid.order[0] == slot
        assert grid.order[1:].tolist() == [i for i in range(math.prod(bucket)) if i != slot]


def test_a_grid_is_a_static_argument():
    assert hash(HUNYUAN) == hash(VideoGrid((30, 45, 80), (6, 9, 8), padding="strict"))
    assert HUNYUAN != WAN


@settings(max_examples=60, deadline=None, derandomize=True)
@given(oracle.GRIDS)
def test_layout_windows_and_buckets_hold_every_token_once(grid):
    grid = VideoGrid(**grid)
    s = grid.length
    np.testing.assert_array_equal(np.sort(grid.order), np.arange(s))
    np.testing.assert_array_equal(grid.order[grid.inverse], np.arange(s))
    tile = np.stack(np.unravel_index(grid.order, grid.size)) // np.reshape(grid.tile, (3, 1))
    assert (np.diff(np.ravel_multi_index(tile, grid.tiles)) >= 0).all()  # tile by tile

    see = oracle.window_pairs(grid.size, grid.tile, grid.window)[grid.order][:, grid.order]
    np.testing.assert_array_equal(window_mask(grid), see)
    classes, back = rectangles(grid)
    windows = sum(len(c.queries) for c in classes)
    assert windows == math.prod(max(n - w + 1, 1) for n, w in zip(grid.tiles, grid.window))
    queries = np.concatenate([c.queries.ravel() for c in classes])
    np.testing.assert_array_equal(queries[back], np.arange(s))
    keys = [
        sorted(keys[:length])
        for c in classes
        for keys, length in zip(c.keys, c.lengths)
        for _ in range(c.queries.shape[1])
    ]
    assert all(keys[back[t]] == np.flatnonzero(see[t]).tolist() for t in range(s))
    assert grid.flops[2] == pytest.approx(see.mean())

    table = buckets(grid)
    want = {tuple(m) for m in oracle.members(grid.size, grid.bucket)}
    assert {tuple(grid.order[row[row >= 0]]) for row in table.slots} == want
    np.testing.assert_array_equal(table.slots.ravel()[table.place], np.arange(s))
    assert (table.kept < (table.slots >= 0).sum(1)).all()
    assert len(table.rows) == (1 + table.kept).sum()
    np.testing.assert_array_equal(table.back[table.rows], np.arange(len(table.rows)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(oracle.GRIDS)
def test_a_cut_grid_is_the_whole_one_without_its_padding(grid):
    grid = VideoGrid(**grid)
    whole = tuple(n * t for n, t in zip(grid.tiles, grid.tile))
    inside = np.array([(np.array(p) < grid.size).all() for p in np.ndindex(*whole)])
    see = oracle.window_pairs(whole, grid.tile, grid.window)[inside][:, inside]
    np.testing.assert_array_equal(window_mask(grid), see[grid.order][:, grid.order])


def test_buckets_are_a_reshape_where_the_tile_divides_by_them():
    assert buckets(HUNYUAN).contiguous and buckets(HUNYUAN).whole
    assert not buckets(WAN).contiguous  # tiles of 5 frames, buckets of 2
    assert buckets(WAN).whole
    native = VideoGrid(tokens(81, 720, 1280), (7, 9, 8))  # 21 frames of tokens
    assert not buckets(native).whole
    assert len(buckets(native).slots) == 11 * 15 * 40


def test_reordering_and_back_changes_nothing_and_leaves_text_alone():
    grid = VideoGrid((3, 4, 5), (2, 2, 3))
    x = jnp.arange(2 * 64).reshape(2, 64)
    y = to_layout(x, grid)
    np.testing.assert_array_equal(y[0, :60], grid.order)
    np.testing.assert_array_equal(y[:, 60:], x[:, 60:])
    np.testing.assert_array_equal(to_raster(y, grid), x)


@pytest.mark.parametrize(
    "grid",
    [
        VideoGrid((4, 6, 4), (2, 3, 4)),  # buckets fill tiles
        VideoGrid((6, 6, 4), (3, 3, 4)),  # they do not
        VideoGrid((5, 7, 3), (4, 3, 2)),  # both are cut
    ],
)
def test_what_a_program_computes_of_a_layout_is_its_tables(grid, monkeypatch):
    monkeypatch.setattr(video_places, "SMALL", -1)
    table = buckets(grid)
    names = ("slots", "place", "kept", "rows", "back")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, grid.length + 3)), jnp.float32)

    @jax.jit
    def run(x):
        found = [bucket_table(grid, name) for name in names]
        return found, cells_in_program(grid, (2, 1, 1)), to_layout(x, grid), to_raster(x, grid)

    found, pairs, there, back = run(x)
    for name, one in zip(names, found):
        want = getattr(table, name)
        np.testing.assert_array_equal(jnp.broadcast_to(one, want.shape), want, err_msg=name)
    for one, want in zip(pairs, cells(grid, (2, 1, 1))):
        np.testing.assert_array_equal(one, want)
    rest = [*range(grid.length, grid.length + 3)]
    np.testing.assert_array_equal(there, x[:, [*grid.order, *rest]])
    np.testing.assert_array_equal(back, x[:, [*grid.inverse, *rest]])


@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize("grid", [VideoGrid((6, 9, 8), (2, 3, 2)), VideoGrid((7, 9, 8), (2, 4, 3))])
def test_tables_of_windows_are_computed_from_a_few_jumps(grid, text, monkeypatch):
    monkeypatch.setattr(video_places, "WIDTH", 32)
    classes, back = rectangles(grid, text)
    for table in (back, *(x for c in classes for x in (c.queries, c.keys))):
        made = video_places.counted(table)
        assert isinstance(made, jnp.ndarray)
        np.testing.assert_array_equal(made, table)


def test_a_table_without_order_stays_a_table():
    table = np.random.default_rng(0).permutation(1000).astype(np.int32)
    assert video_places.counted(table) is table


@pytest.mark.parametrize(
    ("size", "tile", "bucket"),
    [
        ((30, 45, 80), (6, 9, 8), (2, 3, 2)),  # published, as the next
        ((20, 45, 80), (5, 9, 8), (2, 3, 2)),
        ((30, 48, 80), (6, 8, 8), (2, 3, 2)),  # arXiv:2502.04507
        ((20, 30, 52), (5, 6, 4), (2, 3, 2)),
        ((21, 45, 80), (3, 9, 8), (3, 3, 2)),
        ((31, 68, 120), (6, 9, 8), (2, 4, 2)),  # 31 frames, 68 rows: the last tiles are cut
    ],
)
def test_a_proposed_grid_is_the_published_one_where_there_is_one(size, tile, bucket):
    grid = VideoGrid.propose(size)
    assert (grid.tile, grid.bucket, grid.window) == (tile, bucket, (3, 3, 3))
    if grid.exact:
        assert VideoGrid.propose(size, padding="strict").tile == tile


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.tuples(*[st.integers(1, 90)] * 3))
def test_any_size_has_a_proposal_and_a_strict_one_divides(size):
    assert all(t <= n for t, n in zip(VideoGrid.propose(size, rate=0.0).tile, size))
    assert VideoGrid.propose(size, rate=0.0, padding="strict").exact


GOOD = {"size": (4, 6, 4), "tile": (2, 3, 2)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"size": (5, 6, 4)},
            r'frames: 5 tokens do not divide by a tile of 2; take 1, or padding="auto"',
        ),
        ({"size": (4, 6, 5)}, r"width: 5 tokens do not divide by a tile of 2"),
        ({"bucket": (2, 4, 2)}, r"height: 6 tokens do not divide by a bucket of 4"),
        ({"window": (3, 2, 3)}, r"window of 2 tiles along height must be odd; take 1 or 3"),
        ({"window": (0, 3, 3)}, r"window=\(0, 3, 3\) must be three whole numbers above 0"),
        ({"rate": 1.0}, r"rate=1.0 must be a number in \[0, 1\)"),
        ({"rate": -0.1}, r"rate=-0.1 must be a number in"),
        ({"rate": float("nan")}, r"rate=nan must be a number in"),
        ({"rate": 0.95}, r"rate=0.95 leaves none of the 12 tokens of bucket \(2, 3, 2\)"),
        ({"size": (4, 6)}, r"size=\(4, 6\) must be three"),
        ({"padding": "some"}, r"padding='some' must be one of"),
    ],
)
def test_what_does_not_fit_is_one_line_with_its_axis_and_numbers(change, says):
    VideoGrid(**GOOD, padding="strict")
    with pytest.raises(UserError, match=says) as error:
        VideoGrid(**{**GOOD, "padding": "strict", **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((116, 720, 1280), r"frames=116 is not 4 n \+ 1; take 117"),
        ((0, 720, 1280), r"frames=0 must be a whole number of at least 1"),
        ((117, 721, 1280), r"height=721 does not divide by 16; take 720"),
        ((117, 720, 8), r"width=8 does not divide by 16; take 16"),
    ],
)
def test_a_video_size_without_whole_tokens_is_refused(shape, says):
    with pytest.raises(UserError, match=says):
        tokens(*shape)
