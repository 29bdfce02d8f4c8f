"""Benchmarks: interleaving, ratios, discovery, files. A clock that the cases move; nothing is timed."""

import json
import types

import pytest

from jaxrepro import cli, files, results
from jaxrepro.bench import harness


class FakeClock:
    """Cases advance it by their own cost; it remembers their order."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def case(self, name, cost, first=0.0):
        def run():
            self.now += first if name not in self.calls else cost
            self.calls.append(name)

        return run


def test_rounds_are_interleaved_in_alternating_order_and_compilation_is_apart():
    clock = FakeClock()
    cases = {"ours": clock.case("ours", 1.0, first=9.0), "peer": clock.case("peer", 2.0, first=3.0)}
    got = harness.interleave(cases, 3, clock=clock)
    assert got["ours"] == harness.Timing(9.0, (1.0, 1.0, 1.0))
    assert got["peer"] == harness.Timing(3.0, (2.0, 2.0, 2.0))
    assert clock.calls[4:] == ["ours", "peer", "peer", "ours", "ours", "peer"]


def timings(**seconds):
    return {name: harness.Timing(5.0, tuple(values)) for name, values in seconds.items()}


def test_ratios_are_taken_round_by_round_against_the_fastest_peer():
    got = harness.group(
        "sampling",
        "tokens/s",
        timings(slow=[9.0, 9.0, 9.0], peer=[2.0, 4.0, 8.0], ours=[1.0, 2.0, 2.0]),
        work=100.0,
        peers=("slow", "peer"),
    )
    assert got["peer"] == "peer"
    by_name = {c["case"]: c for c in got["cases"]}
    assert by_name["ours"]["ratio"]["median"] == 2.0  # 2, 2, 4
    assert by_name["ours"]["median"] == 50.0 and by_name["ours"]["first_s"] == 5.0
    assert by_name["peer"]["ratio"] is None
    assert by_name["slow"]["ratio"]["median"] == pytest.approx(4 / 9)


def test_without_a_peer_there_is_no_ratio():
    got = harness.group("step", "s", timings(ours=[1.0]), peers=())
    assert got["peer"] == "-" and got["cases"][0]["ratio"] is None


def test_every_benchmark_is_found_by_its_name_and_declares_shapes():
    assert "grpo" in harness.names() and "harness" not in harness.names()
    assert not any(n.startswith("_") for n in harness.names())
    for name in harness.names():
        module = harness.load(name)
        assert module.SHAPES and callable(module.bench)
        json.dumps(module.SHAPES)


@pytest.fixture
def fake(monkeypatch):
    group = harness.group("work", "s", timings(peer=[2.0], jaxrepro=[1.0]), peers=("peer",))
    module = types.ModuleType("fake")
    module.SHAPES = {"small": {"n": 1}, "large": {"n": 2}}
    module.bench = lambda shape, rounds: harness.Report([group], ["a note"], ("numpy",))
    monkeypatch.setattr(harness, "names", lambda: ["fake"])
    monkeypatch.setattr(harness, "load", lambda name: module)
    monkeypatch.setattr(files, "commit", lambda *_: "abc123")
    return module


def test_the_command_writes_a_file_that_results_can_render(fake, tmp_path, capsys):
    harness.main(["fake", f"--results={tmp_path}"])
    shown = capsys.readouterr().out
    assert "2.00x (2.00 to 2.00)" in shown and "a note" in shown
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("bench-fake-small-") and path.suffix == ".json"
    text = results.render(results.read_all(tmp_path), harness.stale)
    assert "### fake, shape small" in text and "2.00x" in text and "**Stale**" not in text
    fake.SHAPES["small"]["n"] = 3
    assert "**Stale**: the benchmark's shape has changed" in results.render(
        results.read_all(tmp_path), harness.stale
    )


def test_tables_that_a_benchmark_tells_of_are_on_disk_when_it_dies(fake, tmp_path):
    def dies(shape, rounds, save):
        save(harness.Report([harness.group("work", "s", timings(ours=[1.0]))], ["first"]))
        raise KeyboardInterrupt

    fake.bench = dies
    with pytest.raises(KeyboardInterrupt):
        harness.main(["fake", f"--results={tmp_path}"])
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text())
    assert kept["notes"] == ["first"] and kept["groups"][0]["cases"][0]["case"] == "ours"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["fake", "--shape=huge"], "--shape=huge is unknown; fake has small, large"),
        (["fake", "--rounds=0"], "--rounds=0 is not possible"),
        (["fake", "--rounds=x"], "invalid literal for int"),
        (["--rounds=1"], "NAME is missing"),
        (["fake", "--rounds=1", "more"], "not understood: more"),
        (["fake", "--round=3"], "unknown flag --round; did you mean --rounds?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(fake, argv, says, capsys):
    assert cli.guard(harness.main, argv) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_an_unknown_benchmark_names_the_known_ones(capsys):
    assert cli.guard(harness.main, ["nothing"]) == 2
    assert "benchmark 'nothing' does not exist; there are" in capsys.readouterr().err


def test_a_gpu_runs_the_shape_that_is_made_for_it(monkeypatch):
    for backend, wanted in [("gpu", ["2b", "qwen2_1_5b"]), ("cpu", ["tiny", "smollm2"])]:
        monkeypatch.setattr("jax.default_backend", lambda backend=backend: backend)
        assert [harness.default_shape(harness.load(n)) for n in ("grpo", "lm")] == wanted


def test_a_benchmark_without_a_shape_for_gpus_runs_its_first(fake, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert harness.run("fake")["shape"] == "small"


def test_a_peer_stays_away_from_an_accelerator_and_one_note_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    for backend, peer, said in [("cpu", True, 0), ("gpu", True, 1), ("gpu", False, 0)]:
        monkeypatch.setattr("jax.default_backend", lambda backend=backend: backend)
        notes = []
        assert harness.has_peer({"peer": peer}, notes) == (peer and not said)
        assert len(notes) == said and all("CPUs only" in note for note in notes)


@pytest.mark.parametrize(
    ("device", "slug"),
    [
        ({"platform": "cpu", "kind": "AMD EPYC", "count": 8}, "cpu"),
        ({"platform": "gpu", "kind": "NVIDIA H200", "count": 1}, "h200"),
        ({"platform": "gpu", "kind": "NVIDIA H100 80GB HBM3", "count": 8}, "8xh100"),
        ({"platform": "tpu", "kind": "TPU v5 lite", "count": 4}, "4xtpu-v5-lite"),
    ],
)
def test_a_device_has_a_short_name(device, slug):
    assert results.device_slug(device) == slug


def test_results_hold_null_where_a_number_is_not_finite(tmp_path):
    results.write_json(tmp_path / "x.json", {"a": float("nan"), "b": [1.5, float("inf")]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1.5, None]}
