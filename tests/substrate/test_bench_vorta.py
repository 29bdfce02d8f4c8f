"""The benchmark of video attention: its work by hand, errors that it must see, and its tables at tiny sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.bench import _video_goals, _video_step, harness, vorta
from jaxrepro.bench import _video_numerics as numerics
from jaxrepro.methods.vorta import analysis
from jaxrepro.models import video_dit
from jaxrepro.ops import coreset
from jaxrepro.ops.video_grid import VideoGrid

LAYER = vorta.SHAPES["small"]["layers"]["trial with text"] | {"size": [2, 3, 8], "tile": [2, 3, 2]}
LAYER |= {"window": [1, 1, 3], "heads": 2}
SHAPE = vorta.SHAPES["small"] | {"layers": {"one": LAYER}, "heads": ["all"], "step": None}
SHAPE |= {"head_dim": 8}


def test_work_counts_pairs_of_the_definition_and_valid_text_alone():
    # 48 video tokens in 4 tiles of 12, 5 of 8 text slots valid; a window is 3 of 4 tiles; buckets keep 6 of 12
    want = {"dense": 53**2, "coreset": 29**2, "sliding": 48 * 36 + 48 * 5 + 5 * 53}
    assert numerics.pairs(LAYER) == pytest.approx(want)


def test_the_published_shapes_have_the_work_of_their_grids():
    # FLOPs of a layer: 4 pairs heads head_dim; a window of Wan 14B holds 27 tiles of 5 9 8 tokens, 9720 of 72000
    layers = vorta.SHAPES["video"]["layers"]
    flops = lambda name, kind: 4 * 128 * layers[name]["heads"] * numerics.pairs(layers[name])[kind]
    assert flops("HunyuanVideo", "dense") == pytest.approx(4 * 128 * 24 * 108256**2)
    assert flops("Wan 14B", "sliding") == pytest.approx(4 * 128 * 40 * 72000 * 9720)
    assert flops("Wan 14B", "coreset") == pytest.approx(flops("Wan 14B", "dense") / 4)


def test_the_grids_of_the_models_are_those_of_the_analysis():
    layers = vorta.SHAPES["video"]["layers"]
    names = {"HunyuanVideo": "hunyuan", "Wan 14B": "wan_14b", "Wan 1.3B": "wan_1_3b"}
    for name, model in names.items():
        assert numerics.grid_of(layers[name]) == analysis.grid_of(model)
        assert layers[name]["heads"] == video_dit.PRESETS[model].heads
    assert vorta.SHAPES["step"]["layers"]["HunyuanVideo"] == layers["HunyuanVideo"]


def test_wrong_outputs_are_seen_and_right_ones_pass():
    data = vorta.inputs(SHAPE, LAYER, 2)
    verdict = lambda kind, o: numerics.right(kind, numerics.errors(LAYER, kind, data, o), [])
    dropped = numerics.match(numerics.grid_of(LAYER), data[0][0, :48, 0]) != np.arange(48)
    for kind, f in vorta.branches(LAYER).items():
        o = jax.jit(f)(*data)
        assert verdict(kind, o)
        assert not verdict(kind, 1.05 * o)
        assert not verdict(kind, o.at[:, 53:].set(1e-9))  # padded text
        assert not verdict(kind, o.at[:, 48:53].multiply(1.1))  # valid text
        if kind == "coreset":
            assert not verdict(kind, o.at[0, :48, 0].multiply(1 + 0.1 * dropped[:, None]))


def test_keys_of_a_wrong_match_are_seen(monkeypatch):
    data = vorta.inputs(SHAPE, LAYER, 2)
    original = coreset.match
    monkeypatch.setattr(coreset, "match", lambda x, grid: original(x[..., ::-1, :], grid))
    o = jax.jit(vorta.branches(LAYER)["coreset"])(*data)  # each head by the match of the other
    assert not numerics.right("coreset", numerics.errors(LAYER, "coreset", data, o), [])


def test_the_match_of_the_definition_is_that_of_the_program():
    grid = VideoGrid(
        (3, 4, 5), (2, 2, 2), (1, 1, 1)
    )  # buckets of 2 x 3 x 2 tokens, cut on two axes
    x = jax.random.normal(jax.random.key(0), (1, grid.length, 1, 8))
    where = coreset.unpool(
        coreset.pool(jnp.arange(60.0)[None, :, None, None], found := coreset.match(x, grid), grid),
        found,
        grid,
    )
    np.testing.assert_array_equal(numerics.match(grid, x[0, :, 0]), where.ravel())


def test_text_slots_that_are_partly_filled_and_a_window_of_all_tiles_are_tried():
    notes = []
    assert vorta.numerics(SHAPE | {"valid": [0]}, "one", notes) == {"dense", "coreset", "sliding"}
    kinds = [f"{kind}, {n} of 8" for n in (5, 0) for kind in ("dense", "coreset", "sliding")]
    assert all(any(kind in note for note in notes) for kind in kinds) and len(notes) == 7
    assert "a window of all tiles against dense" in notes[-1]


def test_rates_take_the_work_of_each_case():
    timings = {name: harness.Timing(1.0, (s,)) for name, s in (("dense", 2.0), ("sliding", 0.5))}
    one = harness.group("attention", "s", timings, peers=["dense"])
    got = vorta.rates(one, {"dense": 4e12, "sliding": 2e12})
    assert [c["median"] for c in got["cases"]] == [2.0, 4.0]
    assert one["cases"][1]["ratio"]["median"] == 4.0


def test_tables_come_in_their_order_and_are_kept_at_once(monkeypatch):
    """Of the order alone: nothing is computed."""
    quick = lambda cases, rounds, warmup=1: {n: harness.Timing(1.0, (1.0,)) for n in cases}
    monkeypatch.setattr(harness, "interleave", quick)  # nothing is timed
    monkeypatch.setattr(vorta, "parts", lambda *_: {"match": None})
    monkeypatch.setattr(vorta, "numerics", lambda *_: {"dense", "coreset", "sliding"})
    monkeypatch.setattr(vorta, "waits", lambda f, *data: lambda: None)
    kept = []
    report = vorta.bench(SHAPE, 1, lambda report: kept.append(len(report.groups)))
    assert kept == [0, 3] and len(report.groups) == 3  # numerics, then a layer
    assert [g["unit"] for g in report.groups] == ["s", "effective TFLOP/s", "s"]
    assert any("nothing is claimed about speed" in note for note in report.notes)
    assert any("needs a Hopper GPU: not run" in note for note in report.notes)


SECONDS = {
    "dense": 10.0,
    numerics.MIXED: 4.0,
    numerics.KEPT: 5.0,
    numerics.REUSED: 1.0,
    numerics.ALL_FULL: 12.5,
}
SECONDS |= {numerics.OTHERS: 0.5}
STEP = {name: harness.Timing(9.0, (s, s)) for name, s in SECONDS.items()}
REUSED = 9  # steps of 50 at shift 7; see the next test


def test_a_video_is_projected_from_its_steps():
    # PAB computes every second step for 100 < t < 800 of 50 steps at shift 7: counted by hand from sigma(s)
    sigma = [7 * s / (1 + 6 * s) for s in (1 - j / 50 for j in range(50))]
    reused = sum(0.1 < x < 0.8 and j % 2 for j, x in enumerate(sigma))
    assert reused == REUSED
    got = _video_step.projection("x", STEP)
    with_pab = [5 * (50 - reused) + reused, 4 * (50 - reused) + 0.5 * reused]
    medians = [c["median"] for c in got["cases"]]
    assert medians == [500, 200, *with_pab, 60, 24]
    assert f"{reused} steps reused" in got["cases"][2]["case"]
    assert got["cases"][5]["ratio"]["median"] == pytest.approx(500 / 24)


def test_goals_take_the_figures_of_the_tables():
    name, timing = (
        "HunyuanVideo",
        lambda **s: {n.replace("_", " "): harness.Timing(1, (t,)) for n, t in s.items()},
    )
    seconds = timing(dense=1.0, sliding=0.1, coreset=1.26)
    one = harness.group(f"{name}: attention, 9 rows, 24 heads", "s", seconds, peers=["dense"])
    parts = timing(match=0.01, pool=0.02, unpool=0.03, attend=1.0) | {
        numerics.SAME_LENGTH: harness.Timing(1, (0.96,))
    }
    groups = [
        one,
        vorta.rates(one, {"dense": 5e14, "sliding": 4.4e13, "coreset": 1e14}),
        harness.group(f"{name}: parts of coreset attention, 24 heads", "s", parts),
        harness.group(f"{name}: a step of the model", "s", STEP),
        harness.group(f"{name}: a step of the model, kernel mosaic", "s", timing(dense=99.0)),
        _video_step.projection(name, STEP),
    ]
    said = dict(
        line.rsplit(": ", 1)
        for line in _video_goals.goals(groups, {"dense": 10.0, "routed": 12.0, "programs": 2})
    )
    got = {key.removeprefix(f"goal: {name}: ").split(",")[0]: value for key, value in said.items()}
    assert got == {
        "window groups": "440, NOT met",
        "the kernel": "not measured",
        "coreset attention without match": "0.8, NOT met",  # 0.96 / (1.26 - 0.01 - 0.02 - 0.03)
        "match": "0.06, NOT met",
        "a routed step": "2.5, met",
        "PAB": f"{(4 * 50 - 3.5 * REUSED) / (5 * 50 - 4 * REUSED):.3g}, NOT met",
        "memory of a routed step": "1.2, NOT met",
        "the routed program with all heads full": "0.8, NOT met",
        "programs for steps of changing routes": "2, NOT met",
    }
    assert _video_goals.goals(groups[:0], {}) == []
    assert _video_goals.Goal("within", 601.0, 543.4, 600.6).verdict == "goal: within: 601, NOT met"


def test_the_profile_predicts_what_pab_should_save():
    # attention modules take 9.5 of 10 s of a dense step and 3.5 of 4 s of a routed one, which 9 of 50 steps reuse:
    # 50 steps of 4 s fall to 41 of 4 s and 9 of 0.5 s
    line = _video_step.profile(STEP)
    assert "take 95% of a dense one and 88% of a routed one" in line
    assert "in 9 of 50 steps" in line and f"be {200 / (41 * 4 + 9 * 0.5):.2f} times" in line


def test_without_a_gpu_every_goal_is_named_and_none_is_met():
    lines = _video_goals.unmeasured(vorta.SHAPES["video"]["layers"], ["HunyuanVideo"])
    assert len(set(lines)) == len(lines) == 18
    assert all(x.startswith("goal: ") and x.endswith(": not measured without a GPU") for x in lines)
    for figure in ("572 TFLOP/s", "450", "520", "0.95", "0.05", "2.4 times", "0.9 of", "1.1 of"):
        assert any(figure in line for line in lines)


def test_without_nvidia_smi_nothing_is_said_of_the_device(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _video_goals.device_state("a step") == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '690.10 W, 1755 MHz, 3201 MHz, 61'\n")
    program.chmod(0o755)
    (line,) = _video_goals.device_state("a step")
    assert line == "a step: right behind it 690.10 W, SM 1755 MHz, memory 3201 MHz, 61 C"


@pytest.mark.slow
def test_a_run_at_small_sizes_has_every_table():
    report = vorta.bench(vorta.SHAPES["small"], 1)
    whats = [g["what"] for g in report.groups]
    assert sum("parts of coreset" in w for w in whats) == 2
    step, video = report.groups[-2:]
    assert [c["case"] for c in step["cases"]][:2] == ["dense", numerics.MIXED]
    assert "projection" in video["what"] and "6 steps" in video["cases"][5]["case"]
    counted = [note for note in report.notes if "50 different routes" in note]
    assert len(counted) == 1 and counted[0].endswith("dense 1, routed 1, with PAB 1")
    assert sum(" temporary, by XLA" in note for note in report.notes) == 3
    assert sum("not measured without a GPU" in note for note in report.notes) == 18
    assert sum(note.startswith("profile of a step") for note in report.notes) == 1
    assert not any("WRONG" in note for note in report.notes)
    assert all(np.isfinite(c["median"]) for g in report.groups for c in g["cases"])
