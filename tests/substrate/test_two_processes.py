"""A run of two processes is the run of one: same numbers, same files, and each resumes the other's."""

import functools
import json
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import pytest

import jaxrepro.methods
from jaxrepro import cli, evaluate, launch
from jaxrepro import config as configuration
from jaxrepro.models import transformer
from jaxrepro.train import checkpoint
from jaxrepro.train import metrics as report

sys.path.insert(0, str(Path(__file__).parents[1]))
import meshes
import processes

FAST = " ".join(f"--{name}={str(value).lower()}" for name, value in meshes.QUICK.items())
ENV = {"XLA_FLAGS": FAST, "JAX_ENABLE_COMPILATION_CACHE": "0"}


@pytest.fixture(scope="module", autouse=True)
def decoder():
    """The method `decoder` beside the real ones, and quick compilation here as in ENV."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=meshes.QUICK))
        patch.setattr(cli, "setup_jax", lambda: None)
        patch.setattr(cli, "exit_on_sigterm", lambda: None)
        path = [*jaxrepro.methods.__path__, str(processes.METHODS)]
        patch.setattr(jaxrepro.methods, "__path__", path)
        yield
    for name in [n for n in sys.modules if n.startswith("jaxrepro.methods.decoder")]:
        del sys.modules[name]


def words(workdir, **changes):
    changes = [f"--config.{k}={v}" for k, v in changes.items()]
    return [processes.DECODER, f"--workdir={workdir}", *changes]


def alone(workdir, **changes):
    """One process, the eight devices of this one."""
    assert cli.guard(launch.main, words(workdir, **changes)) == 0


def rewound(workdir, target, step=3):
    """A copy of a finished run as it was after its checkpoint at `step`."""
    shutil.copytree(workdir, target)
    (target / "summary.json").unlink()
    for later in (target / "checkpoints" / "train").iterdir():
        if later.name.isdigit() and int(later.name) > step:
            shutil.rmtree(later)
    return target


def params(workdir):
    from jaxrepro.methods.decoder import run

    config = configuration.load(str(processes.FIXTURES / "launch" / "decoder.py"))
    return checkpoint.load(workdir, transformer.abstract(run.model(config)))


def assert_same_run(workdir, other, *, steps=6):
    """Parameters to 1e-6 of each leaf's largest entry; files with the same lines, each once."""
    assert checkpoint.find(workdir)[2] == checkpoint.find(other)[2] == steps
    meshes.assert_same(params(workdir), params(other), tolerance=1e-6, name="parameter")
    a, b = (report.read(w / "metrics.jsonl") for w in (workdir, other))
    assert [x["step"] for x in a] == [x["step"] for x in b] == [*range(1, steps + 1)]
    for x, y in zip(a, b):
        assert x.pop("stage") == y.pop("stage") and x == pytest.approx(y, rel=1e-5)
    a, b = (json.loads((w / "summary.json").read_text()) for w in (workdir, other))
    assert a == pytest.approx(b, rel=1e-6) and a["after"] < a["before"]
    a, b = (sorted(p.name for p in w.iterdir()) for w in (workdir, other))
    assert a == b


def test_two_processes_train_as_one_and_either_resumes_the_other(tmp_path, capfd):
    one, two = tmp_path / "one", tmp_path / "two"
    alone(one)
    one_then_two = rewound(one, tmp_path / "one_then_two")
    runs = [["launch", *words(w)] for w in (two, one_then_two)]
    ended = processes.finish(processes.start(runs, env=ENV))
    for i, (code, text) in enumerate(ended):
        assert code == 0, text
        assert text.count(f"process {i} of 2 (flags at ") == 2
        assert "4 of 8 devices are local" in text
        assert text.count("train: resuming at step 3") == (i == 0)  # said once
    assert_same_run(two, one)
    assert_same_run(one_then_two, one)
    two_then_one = rewound(two, tmp_path / "two_then_one")
    alone(two_then_one)
    assert "train: resuming at step 3" in capfd.readouterr().out
    assert_same_run(two_then_one, one)


# ---- what does not fit the devices ----


@pytest.mark.parametrize(
    ("spec", "changes", "said"),
    [
        (processes.DECODER, {"mesh": "(3,1,1,1)"}, "takes 3 devices, there are 8"),
        (processes.DECODER, {"mesh": "(2,2,2,2)"}, "takes 16 devices, there are 8"),
        (processes.DECODER, {"mesh": "(-1,3,1,1)"}, "needs a multiple of 3 devices"),
        (processes.DECODER, {"mesh": "(1,1,1,8)"}, "does not divide the attention heads (4)"),
        (processes.DECODER, {"batch": 6}, "config.batch=6 does not divide over data * fsdp = 4"),
        ("--config=configs/stepgrpo.py", {"mesh": "(5,1,1,1)"}, "takes 5 devices, there are 8"),
        ("--config=configs/stepgrpo.py", {"mesh": "(1,1,1,8)"}, "attention heads (4)"),
        ("--config=configs/stepgrpo.py", {"mesh": "(8,1,1,1)", "rl.batch": 12}, "rl.batch=12"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line_and_leaves_nothing(
    tmp_path, capsys, spec, changes, said
):
    workdir = tmp_path / "run"
    changes = [f"--config.{k}={v}" for k, v in changes.items()]
    assert cli.guard(launch.main, [spec, f"--workdir={workdir}", *changes]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert not workdir.exists()


# ---- slow: other meshes, signals, failures, a whole method ----


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, shared by the slow runs."""
    return ENV | {
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
    }


@pytest.mark.slow
def test_another_mesh_goes_on_from_the_checkpoint_and_evaluates_it(tmp_path, cache, capfd):
    """Two processes begin on one mesh, go on on another; one process evaluates on one device more."""
    two = tmp_path / "two"
    run = lambda **changes: processes.start([["launch", *words(two, **changes)]], env=cache)
    assert [code for code, _ in processes.finish(run(steps=3, mesh="(1,4,1,2)"))] == [0, 0]
    ended = processes.finish(run(mesh="(4,1,2,1)", remat="full", micro_batches=2))
    assert all(code == 2 and "remat (none there, full here)" in text for code, text in ended)
    assert all(text.count("error:") == 1 for _, text in ended)
    assert [code for code, _ in processes.finish(run(mesh="(4,1,2,1)"))] == [0, 0]
    one = tmp_path / "one"
    alone(one)
    meshes.assert_same(params(two), params(one), tolerance=1e-4, name="parameter")
    capfd.readouterr()
    assert cli.guard(evaluate.main, [f"--workdir={two}"]) == 0
    here = float(capfd.readouterr().out.split()[-1])
    ended = processes.finish(processes.start([["evaluate", f"--workdir={two}"]], env=cache))
    assert all(code == 0 for code, _ in ended)
    there = [line for line in ended[0][1].splitlines() if line.startswith("test/nll")]
    assert float(there[0].split()[-1]) == pytest.approx(here, rel=1e-3)
    assert "test/nll" not in ended[1][1]  # said once
    summary = json.loads((two / "summary.json").read_text())
    assert summary["after"] == pytest.approx(here, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("told", [(0,), (1,), (0, 1)])
def test_sigterm_to_any_process_saves_one_step_in_all(tmp_path, cache, told):
    workdir = tmp_path / "run"
    slow = words(workdir, steps=1000, **{"log.sleep": 0.05, "checkpoint.every": 5})
    pair = processes.start([["launch", *slow]], env=cache)
    while not any(x["step"] > 7 for x in report.read(workdir / "metrics.jsonl")):
        assert all(p.poll() is None for p in pair), processes.finish(pair)
        time.sleep(0.05)
    for i in told:
        pair[i].send_signal(signal.SIGTERM)
    ended = processes.finish(pair, timeout=60)
    assert [code for code, _ in ended] == [143, 143], ended
    step = checkpoint.find(workdir)[2]
    assert f"SIGTERM; saved step {step}" in ended[0][1]
    assert report.read(workdir / "metrics.jsonl")[-1]["step"] == step
    alone(workdir, **{"steps": step + 2, "checkpoint.every": 5})
    lines = [x["step"] for x in report.read(workdir / "metrics.jsonl")]
    assert lines == [*range(1, step + 3)]


@pytest.mark.slow
def test_sigterm_in_a_later_stage_is_not_lost(tmp_path, cache):
    """Stages begin again at step 1: an agreement on step numbers of the first would never come."""
    workdir = tmp_path / "run"
    changes = {"stages": 3, "steps": 40, "log.sleep": 0.05, "checkpoint.every": 1}
    pair = processes.start([["launch", *words(workdir, **changes)]], env=cache)
    while not any(x["stage"] == "train2" for x in report.read(workdir / "metrics.jsonl")):
        assert all(p.poll() is None for p in pair), processes.finish(pair)
        time.sleep(0.02)
    pair[1].send_signal(signal.SIGTERM)
    ended = processes.finish(pair, timeout=60)
    assert [code for code, _ in ended] == [143, 143], ended


@pytest.mark.slow
def test_what_one_process_finds_wrong_ends_all_in_one_line(tmp_path, cache):
    """A workdir that is taken, one that is not shared, and a fault in one process alone."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text("{")
    ended = processes.finish(processes.start([["launch", *words(workdir)]], env=cache))
    assert all(code == 2 and "is damaged" in text for code, text in ended), ended
    for where, change in ((tmp_path / "a", "user"), (tmp_path / "b", "bug")):
        pair = processes.start([["launch", *words(where, fail_in_1=change)]], env=cache)
        begun = time.monotonic()
        ended = processes.finish(pair, timeout=100)
        assert ended[1][0] == {"user": 2, "bug": 1}[change], ended[1]
        assert "only here" in ended[1][1]
        assert ended[0][0] != 0 and time.monotonic() - begun < 90
        assert not (where / "summary.json").exists()
    homes = [tmp_path / "home0", tmp_path / "home1"]
    address = processes.free_address()
    pair = []
    for i, home in enumerate(homes):
        home.mkdir()
        where = dict(address=address, cwd=home, only=i)
        pair += processes.start([["launch", *words("run")]], env=cache, **where)
    ended = processes.finish(pair)
    assert all(code == 2 and "a disk that all machines share" in text for code, text in ended)
    assert not any((home / "run").exists() for home in homes)


@pytest.mark.slow
def test_stepgrpo_in_two_processes_is_stepgrpo_in_one(tmp_path, cache):
    """Images, base stage, warm-up, rollouts, rewards, updates, evaluation and the report."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
    import stepgrpo_tiny as tiny

    settings = tiny.SETTINGS | {"mesh": "(2,2,1,2)", "sft.steps": 1, "steps": 1, "eval.n": 7}
    # No group has two rewards yet, so the gradient is rounding, which AdamW would blow up to a step of lr.
    settings |= {"rl.lr": 1e-7}
    settings = [f"--config.{k}={v}" for k, v in settings.items()]
    launch = lambda name: [
        ["launch", "--config=configs/stepgrpo.py", f"--workdir={tmp_path / name}", *settings]
    ]
    for name, shape in (("two", dict(count=2)), ("one", dict(count=1, devices=8))):
        ended = processes.finish(processes.start(launch(name), env=cache, **shape), timeout=500)
        assert all(code == 0 for code, _ in ended), ended
        assert sum("after warm-up" in text for _, text in ended) == 1
    read = lambda name, file: json.loads((tmp_path / name / file).read_text())
    assert read("two", "summary.json") == pytest.approx(read("one", "summary.json"), abs=1e-4)
    for file in ("once/before.json", "items.json"):
        assert read("two", file) == read("one", file), file
    lines = [report.read(tmp_path / name / "metrics.jsonl") for name in ("two", "one")]
    for a, b in zip(*lines, strict=True):
        assert a.pop("stage") == b.pop("stage")
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    assert (tmp_path / "two" / "samples.md").exists()
