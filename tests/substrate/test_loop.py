"""The loop: resume is exact, signals save, NaN is never saved, workdirs are guarded."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.train import metrics as report
from jaxrepro.train.checkpoint import load, steps_in
from jaxrepro.train.loop import TERMINATED, Run
from jaxrepro.train.state import init_state
from jaxrepro.train.workdir import may_differ, moved

sys.path.insert(0, str(Path(__file__).parent))
from toy_run import ADAM, STEP, STEPS, config, data, init, train


def kill(run):
    """What the kernel does for a killed process: the lock goes, nothing is written."""
    run._saves.wait()
    run._metrics._file.close()
    run._folder.release()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Workdir, last state and metrics of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    with Run(config(), workdir) as run:
        state = train(run)
        run.summary({"test/loss": 1.0, "test/n": 8})
    return workdir, state, report.read(workdir / "metrics.jsonl")


@pytest.mark.parametrize("until", [3, 6, 8, 11])
def test_an_abandoned_run_resumes_to_the_same_bits_and_lines(tmp_path, whole, until):
    run = Run(config(), tmp_path).__enter__()
    train(run, until=until)
    kill(run)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"stage": "rl", "st')  # a line cut off by the kill
    with Run(config(), tmp_path) as run:
        state = run.restore(init, stage="rl")
        assert int(state.step) == until // 4 * 4
        assert [x["step"] for x in report.read(tmp_path / "metrics.jsonl")] == [
            *range(1, until // 4 * 4 + 1)
        ]
        state = train(run)
    np.testing.assert_array_equal(state.params["w"], whole[1].params["w"])
    assert report.read(tmp_path / "metrics.jsonl") == whole[2]


def test_a_finished_run_shows_its_summary_and_more_steps_reopen_it(whole, tmp_path, capsys):
    workdir = Path(shutil.copytree(whole[0], tmp_path / "copy"))
    before = (workdir / "metrics.jsonl").read_text()
    for resume in ("auto", "must"):
        with Run(config(), workdir, resume=resume) as run:
            assert run.finished and run.results == {"test/loss": 1.0, "test/n": 8.0}
    assert "test/loss = 1" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_text() == before
    with Run(config(**{"checkpoint.every": 2, "log.every": 3, "mesh.data": 8}), workdir) as run:
        assert run.finished
    with Run(config(steps=STEPS + 1), workdir) as run:
        assert not run.finished
        assert list(run.steps(run.restore(init, stage="rl"), STEPS + 1)) == [STEPS]
    assert not (workdir / "summary.json").exists()


def test_a_workdir_of_another_config_names_the_keys(whole):
    with pytest.raises(UserError, match=r"another config: lr \(0.05 there, 0.1 here\), seed \(0"):
        Run(config(lr=0.1, seed=1), whole[0]).__enter__()
    with pytest.raises(UserError, match="another config"):
        Run(config(lr=0.1), whole[0], resume="never").__enter__()
    assert (whole[0] / "summary.json").exists()
    free = ["steps", "rl.steps", "checkpoint.every", "eval.n", "decode.beams", "mesh.data"]
    assert all(map(may_differ, free))
    bound = ["lr", "rl.lr", "seed", "init_from", "every_token", "meshes", "model.path"]
    assert not any(map(may_differ, bound))


def test_other_data_is_refused_and_data_that_moved_is_the_same(tmp_path):
    old, new, other = (tmp_path / name for name in ("a/maths", "b/maths", "b/physics"))
    for folder in (old, other):
        folder.mkdir(parents=True)
    with Run(config(**{"data.path": str(old)}), tmp_path / "run") as run:
        train(run)
        run.summary({"test/loss": 1.0})
    start = lambda path: Run(config(**{"data.path": str(path)}), tmp_path / "run")
    new.mkdir()
    for path in (
        other,
        "openai/maths",
        "",
        new,
        f"{other}/../maths",
    ):  # `old` is still there: another folder
        said = rf"another config: data.path \({old} there, {path} here\)"
        with pytest.raises(UserError, match=said):
            start(path).__enter__()
    new.rmdir()
    old.rename(new)
    with start(new) as run:
        assert run.finished
    with pytest.raises(UserError, match=r"data.path"):
        start(other).__enter__()
    old.symlink_to(new)
    with start(new) as run:
        assert run.finished


def test_a_name_of_a_hub_is_no_folder_that_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Run(config(**{"data.path": "openai/maths"}), "run") as run:
        train(run, until=1)
    Path("maths").mkdir()
    for path in (tmp_path / "maths", "other/maths"):
        with pytest.raises(UserError, match=r"data.path \(openai/maths there"):
            Run(config(**{"data.path": str(path)}), "run").__enter__()
    assert not moved(None, str(tmp_path / "maths")) and not moved(str(tmp_path / "maths"), None)


# ---- what is refused changes nothing ----


def contents(folder):
    """Name -> bytes of every file, the lock apart, and the names of folders."""
    found = {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob("*")}
    return {name: data for name, data in found.items() if name.name != "lock"}


def wide():
    return init_state({"w": jnp.zeros(5)}, ADAM)


@pytest.mark.parametrize("resume", ["auto", "must", "never"])
def test_a_refused_restore_leaves_a_finished_run_as_it_was(whole, tmp_path, resume):
    workdir = Path(shutil.copytree(whole[0], tmp_path / "copy"))
    before = contents(workdir)

    def start(error, **settings):
        more = config(**{"steps": STEPS + 1, "log.curves": True})
        with pytest.raises(UserError, match=error), Run(more, workdir, resume=resume) as run:
            run.once("start", lambda: 1)
            assert run.once("start", lambda: 2) == 1
            run.restore(settings.pop("init", wide), stage="rl", **settings)
        assert contents(workdir) == before

    if resume == "never":
        start("has no checkpoint", init_from=tmp_path / "nothing")
        start("does not fit", init_from=whole[0])
    else:
        start("does not fit: params/w is float32")
    with Run(config(), workdir) as run:
        assert run.finished and run.results == {"test/loss": 1.0, "test/n": 8.0}


def test_a_refused_first_start_leaves_nothing_and_later_ones_their_folder(tmp_path):
    workdir = tmp_path / "runs" / "a"

    def refused(**settings):
        with (
            pytest.raises(UserError, match="no checkpoint"),
            Run(config(), workdir, **settings) as run,
        ):
            run.once("before", lambda: 0.5)
            run.restore(init, stage="rl", init_from=tmp_path / "nothing")

    for resume in ("auto", "must", "never"):
        refused(resume=resume)
        assert not (tmp_path / "runs").exists()
    workdir.mkdir(parents=True)
    (workdir / "note").write_text("")
    refused()
    assert [p.name for p in workdir.iterdir()] == ["note"]
    with Run(config(lr=0.1), workdir) as run:  # the corrected command
        assert run.once("before", lambda: 0.25) == 0.25
        train(run, until=1)
        assert json.loads((workdir / "once" / "before.json").read_text())["value"] == 0.25


def test_a_kill_before_the_run_begins_leaves_the_workdir_to_another_config(tmp_path):
    run = Run(config(), tmp_path).__enter__()
    run._folder._lock.close()  # what the kernel does
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]
    with Run(config(lr=0.1), tmp_path) as run:
        train(run, until=1)
    assert (tmp_path / "config.json").exists()


def test_a_lock_that_was_taken_away_is_no_lock(tmp_path, monkeypatch):
    """A start that is refused removes its lock; one that has opened that file must not believe in it."""
    import fcntl

    first = Run(config(), tmp_path / "run").__enter__()
    flock, done = fcntl.flock, []

    def late(file, how):
        if not done:
            done.append(first.__exit__(None, None, None))  # removes file and folder in between
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with Run(config(), tmp_path / "run"):
        assert (tmp_path / "run" / "lock").read_text().startswith("process ")
        with pytest.raises(UserError, match="is in use"):
            Run(config(), tmp_path / "run").__enter__()


def test_resume_never_starts_again_and_must_wants_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"resume=must, but .* has no checkpoint"):
        Run(config(), tmp_path, resume="must").__enter__()
    with Run(config(), tmp_path) as run:
        train(run, until=5)
        assert run.once("before", lambda: {"accuracy": 0.5}) == {"accuracy": 0.5}
        for name in ("items.json", "samples.md", "samples/0.png"):
            run.path(name).write_text("")
    with Run(config(), tmp_path, resume="must") as run:
        assert int(run.restore(init, stage="rl").step) == 4
        assert run.once("before", lambda: {"accuracy": 0.9}) == {"accuracy": 0.5}
        assert run.once("before", lambda: 0.7, of=["other questions"]) == 0.7
    with Run(config(), tmp_path, resume="never") as run:
        assert int(run.restore(init, stage="rl").step) == 0
        assert run.once("before", lambda: 1) == 1
    assert not {"items.json", "samples.md", "samples"} & {p.name for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match="resume='maybe' is unknown"):
        Run(config(), tmp_path, resume="maybe")


def test_a_lock_keeps_two_runs_apart(tmp_path):
    said = f"is in use by process {os.getpid()} on .*wait"
    with Run(config(), tmp_path), pytest.raises(UserError, match=said):
        Run(config(), tmp_path).__enter__()
    with Run(config(), tmp_path):
        pass


def test_sigterm_saves_the_step_in_progress_and_exits_143(tmp_path, whole):
    def batch(i):
        if i == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return data(i)

    with pytest.raises(SystemExit) as stop, Run(config(), tmp_path) as run:
        train(run, batch=batch)
    assert stop.value.code == TERMINATED == 143
    assert steps_in(tmp_path / "checkpoints" / "rl") == [4, 6]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with Run(config(), tmp_path) as run:
        state = train(run)
    np.testing.assert_array_equal(state.params["w"], whole[1].params["w"])
    assert report.read(tmp_path / "metrics.jsonl") == whole[2]


def test_non_finite_numbers_stop_the_run_and_are_never_saved(tmp_path):
    def batch(i):
        rows = data(i)
        if i == 7:  # the next save is due right after this step
            rows["x"][3, 0] = np.nan
        return rows

    said = r"rl step 8: .*loss is nan.* \(batch: row7\); not saved"
    with pytest.raises(UserError, match=said), Run(config(), tmp_path) as run:
        train(run, batch=batch)
    assert steps_in(tmp_path / "checkpoints" / "rl") == [4]
    assert report.read(tmp_path / "metrics.jsonl")[-1]["step"] == 7
    with pytest.raises(UserError, match="grad is inf"), Run(config(), tmp_path) as run:
        run.restore(init, stage="rl")
        run.log(4, {"grad": float("inf"), "absent": None})
    with Run(config(), tmp_path) as run, pytest.raises(UserError, match="test/loss is nan"):
        run.summary({"test/loss": float("nan")})


def test_an_early_stop_is_not_repeated(tmp_path):
    def until_five(run):
        state = run.restore(init, stage="sft")
        taken = []
        for i in run.steps(state, STEPS):
            state, m = STEP(state, data(i))
            run.log(i, m)
            run.save(i, state)
            taken.append(i)
            if i + 1 == 8:  # a step that the cadence has saved already
                run.save(i, state, final=True)
                break
        return taken

    with Run(config(), tmp_path) as run:
        assert until_five(run) == list(range(8))
        train(run, stage="rl", until=2)
    with Run(config(), tmp_path) as run:
        assert until_five(run) == []
        state = run.restore(init, stage="rl")
        assert int(state.step) == 0
    stages = [(x["stage"], x["step"]) for x in report.read(tmp_path / "metrics.jsonl")]
    assert stages == [("sft", i + 1) for i in range(8)]


def test_a_stage_that_another_was_built_on_is_not_trained_further(tmp_path):
    def both(first, second):
        with Run(config(), tmp_path / "run", show=()) as run:
            for stage, total in (("sft", first), ("rl", second)):
                state = run.restore(init, stage=stage)
                for i in run.steps(state, total):
                    state, m = STEP(state, data(i))
                    run.log(i, m)
                    run.save(i, state)
            return int(state.step)

    assert both(4, 4) == 4
    assert both(4, 6) == 6  # the last stage may go on
    with pytest.raises(UserError, match=r"sft ended at step 4 and rl went on .* sft\.steps=8"):
        both(8, 6)


def test_a_run_starts_from_the_parameters_of_another(tmp_path, whole):
    with Run(config(), tmp_path) as run:
        state = run.restore(init, stage="rl", init_from=whole[0])
        assert int(state.step) == 0
        np.testing.assert_array_equal(state.params["w"], whole[1].params["w"])
        assert not np.any(state.opt[0].mu["w"])
        with pytest.raises(UserError, match="has no checkpoint"):
            run.restore(init, stage="other", init_from=tmp_path / "nothing")


def test_the_best_state_is_kept_beside_the_latest(tmp_path):
    scores = [1, 3, 2, 5, 4, 0]
    states = []
    with Run(config(steps=6), tmp_path) as run:
        state = run.restore(init, stage="rl")
        for i in run.steps(state, 6):
            state, _ = STEP(state, data(i))
            states.append(np.asarray(state.params["w"]))
            run.save(i, state, best=scores[i])
    shapes = jax.eval_shape(lambda: state.params)
    np.testing.assert_array_equal(load(tmp_path, shapes, stage="rl-best")["w"], states[3])
    np.testing.assert_array_equal(load(tmp_path, shapes)["w"], states[5])


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .* choose another --workdir"):
        Run(config(), tmp_path / "file" / "run").__enter__()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        Run(config(), tmp_path).__enter__()
    (tmp_path / "config.json").write_text('{"format": 0}')
    with pytest.raises(UserError, match="has format 0, this version reads 1"):
        Run(config(), tmp_path).__enter__()


def killed(workdir, send, wait):
    """Run this file as a training process and send it a signal `wait` s after its first line."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(workdir)], env=os.environ | {"PYTHONPATH": str(Path.cwd())}
    )
    lines = workdir / "metrics.jsonl"
    while process.poll() is None and not (lines.exists() and lines.stat().st_size):
        time.sleep(0.02)
    time.sleep(wait)
    process.send_signal(send)
    return process.wait(timeout=60)


@pytest.mark.slow
def test_killed_processes_resume_to_the_same_bits(tmp_path, whole):
    rng = random.Random(0)
    for send in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        code = killed(tmp_path, send, rng.uniform(0, 0.8))
        assert code in (0, -send, TERMINATED)
    with Run(config(), tmp_path) as run:
        state = train(run)
    np.testing.assert_array_equal(state.params["w"], whole[1].params["w"])
    assert report.read(tmp_path / "metrics.jsonl") == whole[2]


if __name__ == "__main__":
    with Run(config(), sys.argv[1]) as run:
        train(run, sleep=0.2)
