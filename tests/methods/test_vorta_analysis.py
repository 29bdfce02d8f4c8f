"""What route tables cost, against counts by hand; the picture; the command."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxrepro.config import UserError
from jaxrepro.methods.vorta import analysis
from jaxrepro.methods.vorta.analysis import Times
from jaxrepro.models import video_dit
from jaxrepro.ops.routed import Branch, routed
from jaxrepro.ops.video_grid import VideoGrid, tokens

TINY = video_dit.PRESETS["wan_tiny"]  # 2 layers of 2 heads
GRID = VideoGrid((2, 3, 4), (1, 1, 2), (1, 1, 1), (2, 3, 2))
ROUTE = np.array([[[0, 1], [2, 2]], [[1, 1], [1, 2]]], np.int8)

tables = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 999))
table = lambda t: np.random.default_rng(t[3]).integers(0, 3, t[:3]).astype(np.int8)


def one_line(call, *words):
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_shares_are_counts_of_heads():
    part = analysis.shares(ROUTE)
    np.testing.assert_array_equal(part[0], [[0.5, 0.5, 0], [0, 0, 1]])
    np.testing.assert_array_equal(part.mean((0, 1)), [1 / 8, 4 / 8, 3 / 8])


@given(tables)
@settings(max_examples=20, deadline=None)
def test_shares_sum_to_one_and_do_not_depend_on_the_order_of_heads(t):
    route = table(t)
    part = analysis.shares(route)
    np.testing.assert_allclose(part.sum(-1), 1)
    np.testing.assert_array_equal(analysis.shares(route[:, :, ::-1].copy()), part)


# tokens, blocks, heads of 128, and weights of a block's matrices that a video token meets: of HunyuanVideo the first 20
# blocks have text apart, so that theirs are counted once. 720p, for 1.3B 480p
RELEASED = {
    "hunyuan": ((117, 720, 1280), 108_000, 60, 24, 20 * (4 * 3072**2 + 2 * 3072 * 12288)
                + 40 * (3 * 3072**2 + 3072 * 12288 + (3072 + 12288) * 3072)),
    "wan_14b": ((77, 720, 1280), 72_000, 40, 40, 40 * (6 * 5120**2 + 2 * 5120 * 13824)),
    "wan_1_3b": ((77, 480, 832), 31_200, 30, 12, 30 * (6 * 1536**2 + 2 * 1536 * 8960)),
}  # fmt: skip
# share of the pairs that a window of 3 x 3 x 3 tiles keeps: of 5 x 5 x 10 tiles, of 4 x 5 x 10, of 4 x 5 x 13
KEPT = {"hunyuan": 27 / 250, "wan_14b": 27 / 200, "wan_1_3b": 27 / 260}


@pytest.mark.parametrize("model", RELEASED)
def test_work_of_the_released_models_is_two_flops_for_a_product_and_a_sum(model):
    video, length, layers, heads, weights = RELEASED[model]
    cfg, grid, text = video_dit.PRESETS[model], analysis.grid_of(model), analysis.TEXT[model]
    assert grid.size == tokens(*video) and grid.length == length
    assert (cfg.layers, cfg.heads) == (layers, heads)
    beside = text if model == "hunyuan" else 0  # Wan's text is not in its self-attention
    kept = length // 12 * 6  # of a bucket of twelve the centre and five margins
    pairs = [(length + beside) ** 2, (kept + beside) ** 2]
    pairs += [KEPT[model] * length**2 + 2 * beside * length + beside**2]
    found = analysis.branch_flops(cfg, grid, text)
    np.testing.assert_allclose(found, 4 * 128 * np.array(pairs), rtol=1e-9)
    ends = length * cfg.d * 4 * (16 + 16)
    np.testing.assert_allclose(analysis.rest_flops(cfg, grid, 0), 2 * (length * weights + ends))


def test_a_dense_video_of_hunyuan_takes_the_500_pflop_of_the_paper():
    cfg, grid = video_dit.PRESETS["hunyuan"], analysis.grid_of("hunyuan")
    route = np.zeros((50, cfg.layers, cfg.heads), np.int8)
    of = analysis.work(route, cfg, grid, 256)
    assert of.attention_share == of.share == 1
    np.testing.assert_allclose(50 * (of.dense + of.rest) / 1e15, 505, rtol=2e-3)
    half = np.where(np.arange(24) % 2, 2, 1)[None, None].repeat(60, 1).astype(np.int8)
    assert round(analysis.work(half, cfg, grid, 0).attention_share, 2) == 0.18


def test_work_is_counted_by_hand_on_a_small_grid():
    # S = 24: coreset keeps 6 of 12 in both buckets, a tile of two tokens sees itself; 4 i = 64
    np.testing.assert_array_equal(
        analysis.branch_flops(TINY, GRID, text=5), [64 * 24**2, 64 * 12**2, 64 * 24 * 2]
    )
    hunyuan = video_dit.PRESETS["hunyuan_tiny"]
    pairs = [29**2, 17**2, 24 * 2 + 24 * 5 + 5 * 29]
    np.testing.assert_allclose(analysis.branch_flops(hunyuan, GRID, text=5), 64 * np.array(pairs))
    of = analysis.work(ROUTE, TINY, GRID, 5)
    np.testing.assert_allclose(of.attention, [64 * (576 + 144 + 96), 64 * (3 * 144 + 48)])
    # d = 32, f = 64: 10,240 weights a token, 2,048 a text token, 24 x 5 pairs of width 32; patches of 4 x 4 in and out
    blocks = 2 * (24 * 10_240 + 5 * 2048 + 2 * 24 * 5 * 32)
    assert of.rest == 2 * (blocks + 24 * 32 * (16 + 16))


@given(st.sampled_from(["hunyuan_tiny", "wan_tiny"]), st.integers(1, 3))
@settings(max_examples=6, deadline=None)
def test_linear_work_is_two_flops_a_weight_and_token(name, layers):
    cfg = video_dit.PRESETS[name]
    more = {"double": layers, "single": layers} if name == "hunyuan_tiny" else {"layers": layers}
    cfg = dataclasses.replace(cfg, **more)
    # matrices of the blocks, without modulations and what belongs to text alone
    skipped = ("mod", "double/text", "cross/k/", "cross/v/")
    weights = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(video_dit.abstract(cfg))
        if (key := "/".join(p.key for p in path)).startswith(("layers/", "double/", "single/"))
        and key.endswith("kernel")
        and not any(word in key for word in skipped)
    )
    ends = 2 * 24 * cfg.d * 4 * (cfg.channels + cfg.out_channels)
    assert analysis.rest_flops(cfg, GRID, 0) == 2 * 24 * weights + ends


@given(tables, st.lists(st.floats(0.01, 10), min_size=4, max_size=4))
@settings(max_examples=30, deadline=None)
def test_a_prediction_is_the_sum_of_what_its_heads_take(t, times):
    route, times = table(t), Times(*times)
    found = analysis.predict(route, times)
    heads = [times[Branch(int(b))] for b in route.ravel()]
    np.testing.assert_allclose(found.routed, sum(heads) + len(route) * times.rest)
    dense = analysis.predict(np.zeros_like(route), times)
    np.testing.assert_allclose(dense.speedup, 1)
    np.testing.assert_allclose(found.speedup, dense.routed / found.routed)
    if min(times[:3]) == times.full:
        assert found.speedup <= 1 + 1e-9


def test_a_step_of_hunyuan_by_hand():
    # 60 layers of 24 heads, half coreset (2.6 ms), half sliding (1.3): 2.81 s instead of 15.12, beside 3.5 s of others
    route = np.where(np.arange(24) % 2, 2, 1)[None, None].repeat(60, 1).astype(np.int8)
    found = analysis.predict(route, Times(10.5, 2.6, 1.3, 3500.0))
    np.testing.assert_allclose([found.dense, found.routed], [18_620, 6_308])
    np.testing.assert_allclose(found.speedup, 2.952, atol=1e-3)
    np.testing.assert_allclose(found.attention_speedup, 10.5 / 1.95)


def test_the_picture_shows_the_colour_of_the_branch(tmp_path):
    route = np.full((6, 3, 4), Branch.sliding, np.int8)
    times = [1000.0 - 150 * i for i in range(6)]
    analysis.draw(tmp_path / "x.png", route, timesteps=times, title="x")
    with Image.open(tmp_path / "x.png") as image:
        pixels = np.asarray(image.convert("RGB"), int).reshape(-1, 3)
    colour = lambda name: [int(analysis.COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)]
    share = {b.name: (abs(pixels - colour(b.name)).max(1) < 3).mean() for b in Branch}
    assert share["sliding"] > 0.2 and share["full"] + share["coreset"] < 0.05  # their colour bars
    one_line(lambda: analysis.draw("", ROUTE, timesteps=[1.0]), "1 timesteps", "2 steps")


def test_what_is_no_table_is_one_line():
    wrong = ROUTE.copy()
    wrong[1, 0, 1] = 3
    one_line(lambda: analysis.shares(wrong), "holds 3", "(1, 0, 1)")
    one_line(lambda: analysis.shares(ROUTE[:0]), "empty")
    one_line(lambda: analysis.work(ROUTE[:, :1], TINY, GRID), "1 layers of 2", "2 of 2")
    one_line(lambda: analysis.work(ROUTE, TINY, GRID, -1), "text is -1")
    one_line(lambda: analysis.grid_of("sora"), "sora", "wan_14b")
    one_line(lambda: analysis.predict(ROUTE, Times(0.0, 1.0, 1.0, 1.0)), "full above 0")
    one_line(lambda: analysis.predict(ROUTE, Times(1.0, float("nan"), 1.0, 1.0)), "finite")


def test_the_command_reads_a_table_and_writes_a_picture(tmp_path, capsys):
    routes = pytest.importorskip("jaxrepro.methods.vorta.routes")
    path, out = tmp_path / "table.json", tmp_path / "picture.png"
    route = np.ones((2, 60, 24), np.int8)
    routes.save(path, routes.Routes(route, np.array([1000, 500], np.float32), "hunyuan"))
    times = ["--times", "10.5", "2.6", "1.3", "3500"]
    assert analysis.main([str(path), "--out", str(out), *times]) == 0
    said = capsys.readouterr().out
    assert "coreset 100.0 %" in said and "self-attention 0.251 of dense" in said
    assert "self-attention 4.04 x" in said and out.stat().st_size > 10_000
    assert analysis.main([str(path), "--model", "sora"]) == 2
    assert analysis.main([str(tmp_path / "no.json")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.slow
def test_routed_attention_takes_less_time_the_more_heads_are_sparse():
    grid = VideoGrid((8, 12, 12), (2, 3, 3), (1, 3, 3), (2, 2, 2))
    q, k, v = (jax.random.normal(jax.random.key(i), (1, grid.length, 6, 32)) for i in range(3))
    run = jax.jit(lambda route: routed(q, k, v, route, grid, chunk=1))

    def seconds(route):
        """Of the processor, which other programs do not lengthen."""
        found = []
        for _ in range(6):
            start = time.process_time()
            jax.block_until_ready(run(jnp.asarray(route)))
            found.append(time.process_time() - start)
        return min(found[1:])

    times = [seconds([0] * (6 - n) + [1, 2, 1, 2, 1, 2][:n]) for n in (0, 2, 4, 6)]
    assert times == sorted(times, reverse=True) and times[-1] < 0.7 * times[0], times
