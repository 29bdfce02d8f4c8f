"""The benchmark of video attention: its work by hand, errors that it must see, and its tables at tiny sizes."""

import numpy as np
import pytest

from jaxrepro.bench import _video_numerics as numerics
from jaxrepro.bench import harness, vorta

LAYER = vorta.SHAPES["small"]["layers"]["joint"] | {"size": [2, 3, 8], "tile": [2, 3, 2]}
LAYER |= {"window": [1, 1, 3], "heads": 2}
SHAPE = vorta.SHAPES["small"] | {"layers": {"one": LAYER}, "heads": [], "step": None, "head_dim": 8}


def test_work_counts_pairs_of_the_definition_and_valid_text_alone():
    # 48 video tokens in 4 tiles of 12, 5 of 8 text slots valid; a window is 3 of 4 tiles; buckets keep 6 of 12
    want = {"dense": 53**2, "coreset": 29**2, "sliding": 48 * 36 + 48 * 5 + 5 * 53}
    assert numerics.pairs(LAYER) == pytest.approx(want)


def test_the_published_shapes_have_the_work_of_the_specification():
    # FLOPs of a layer, arXiv:2505.18809's grids: 4 pairs heads head_dim; 11664 of 108000 keys in a window
    layers = vorta.SHAPES["video"]["layers"]
    flops = lambda name, kind: 4 * 128 * layers[name]["heads"] * numerics.pairs(layers[name])[kind]
    assert flops("HunyuanVideo", "dense") == pytest.approx(4 * 128 * 24 * 108256**2)
    assert flops("Wan 14B", "sliding") == pytest.approx(4 * 128 * 40 * 72000 * 9720)
    assert flops("Wan 14B", "coreset") == pytest.approx(flops("Wan 14B", "dense") / 4)


def test_wrong_outputs_are_seen_and_right_ones_pass():
    data = vorta.inputs(SHAPE, LAYER, 2)
    for kind, f in vorta.branches(LAYER).items():
        o = f(*data)
        notes = []
        assert numerics.right(kind, numerics.errors(LAYER, kind, data, o), notes)
        assert not numerics.right(kind, numerics.errors(LAYER, kind, data, 1.05 * o), notes)
        assert "WRONG" not in notes[0] and "WRONG" in notes[1]


def test_rates_take_the_work_of_each_case():
    timings = {name: harness.Timing(1.0, (s,)) for name, s in (("dense", 2.0), ("sliding", 0.5))}
    one = harness.group("attention", "s", timings, peers=["dense"])
    got = vorta.rates(one, {"dense": 4e12, "sliding": 2e12})
    assert [c["median"] for c in got["cases"]] == [2.0, 4.0]
    assert one["cases"][1]["ratio"]["median"] == 4.0


def test_a_table_is_kept_as_soon_as_it_is_there(monkeypatch):
    quick = lambda cases, rounds, warmup=1: {n: harness.Timing(1.0, (1.0,)) for n in cases}
    monkeypatch.setattr(harness, "interleave", quick)  # nothing is timed
    monkeypatch.setattr(vorta, "parts", lambda *_: {"match": None})
    monkeypatch.setattr(vorta, "right", lambda name, found, notes: True)
    monkeypatch.setattr(vorta, "errors", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(vorta, "waits", lambda f, *data: lambda: None)
    kept = []
    report = vorta.bench(SHAPE, 1, lambda report: kept.append(len(report.groups)))
    assert kept == [0, 3] and len(report.groups) == 3  # numerics, then a layer
    assert [g["unit"] for g in report.groups] == ["s", "effective TFLOP/s", "s"]
    assert any("nothing is claimed about speed" in note for note in report.notes)
    assert any("needs a Hopper GPU: not run" in note for note in report.notes)


def test_a_video_is_projected_from_its_steps():
    # PAB computes every second step for 100 < t < 800 of 50 steps at shift 7: counted by hand from sigma(s)
    sigma = [7 * s / (1 + 6 * s) for s in (1 - j / 50 for j in range(50))]
    reused = sum(0.1 < x < 0.8 and j % 2 for j, x in enumerate(sigma))
    seconds = {"dense": 10.0, vorta.MIXED: 4.0, vorta.KEPT: 5.0, vorta.REUSED: 1.0}
    got = vorta.projection("x", {n: harness.Timing(9.0, (s, s)) for n, s in seconds.items()})
    medians = [c["median"] for c in got["cases"]]
    assert medians == [500, 200, 5 * (50 - reused) + reused, 60, 24]
    assert f"{reused} steps reused" in got["cases"][2]["case"]
    assert got["cases"][4]["ratio"]["median"] == pytest.approx(500 / 24)


@pytest.mark.slow
def test_a_run_at_small_sizes_has_every_table():
    report = vorta.bench(vorta.SHAPES["small"], 1)
    whats = [g["what"] for g in report.groups]
    assert sum("parts of coreset" in w for w in whats) == 2
    step, video = report.groups[-2:]
    assert [c["case"] for c in step["cases"]][:2] == ["dense", "routed, all heads full"]
    assert "projection" in video["what"] and "steps reused" in video["cases"][2]["case"]
    assert any("3 programs" in n and "50 different routes" in n for n in report.notes)
    assert sum("GiB temporary" in note for note in report.notes) == 3
    assert not any("WRONG" in note for note in report.notes)
    assert all(np.isfinite(c["median"]) for g in report.groups for c in g["cases"])
