"""The loop around a training step: workdir, resume, metrics, signals. A method *calls* it.

    with Run(config, workdir) as run:
        if run.finished:
            return run.results
        state = run.restore(init, stage="rl", init_from=config.init_from)
        for i in run.steps(state, total):
            state, m = step(state, data[i])
            run.log(i, m, ids=...)
            run.save(i, state)
        run.summary({...})

Order of a start: resume (the stage's latest checkpoint) -> init_from -> scratch.
A workdir holds config.json, metrics.jsonl, tensorboard/, checkpoints/, curves.png, summary.json.
SIGTERM: the step in progress ends, its state is saved, the process exits with code 143 (128 + 15).

In a run of several processes each of them makes the same calls. Process 0 alone looks at the workdir
and writes its files, checkpoints apart, and tells the others what it found; a SIGTERM to any of them
lets all save the same step.
"""

import contextlib
import datetime
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrepro import distributed
from jaxrepro.config import UserError
from jaxrepro.files import commit, read_json, write_json, writing
from jaxrepro.sharding import place
from jaxrepro.train import curves
from jaxrepro.train import metrics as report
from jaxrepro.train.checkpoint import BEST, FOLDER, Checkpoints, load, on_device, stages_in
from jaxrepro.train.profile import Profile
from jaxrepro.train.state import State, step_key
from jaxrepro.train.step import NONFINITE

FORMAT = 1
TERMINATED = 143  # exit code after SIGTERM
SHARED = 10.0  # seconds until a network disk shows what another machine wrote
RESUME = ("auto", "never", "must")
OURS = (FOLDER, "once", report.FILE, report.EVENTS, curves.FILE, "summary.json")
OURS += ("samples.md", "samples", "items.json", "answers.jsonl")


def may_differ(key: str) -> bool:
    """Whether a resumed run may have another value of this dotted key."""
    head, last = key.split(".")[0], key.split(".")[-1]
    free = last in ("steps", "every", "path") or head in ("eval", "decode", "mesh", "log")
    return free or key == "checkpoint.keep"


def _again(key: str) -> bool:
    """Whether another value of this key means that a finished run is not finished."""
    return key.split(".")[-1] == "steps" or key.split(".")[0] in ("eval", "decode")


def _flat(tree, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for name in tree for k, v in _flat(tree[name], f"{prefix}.{name}".strip(".")).items()
    }


class Run:
    """One training run in one workdir; see the module for its use.

    resume: auto (go on where there is a checkpoint), never (delete what the run left, start again),
    must (refuse to start without a checkpoint). profile: "start:count". show: names of the metrics on the
    progress line.
    Attributes: workdir, finished (bool), results (summary of a finished run), stage.
    """

    def __init__(self, config, workdir, *, resume="auto", profile=None, show=("loss",)):
        if resume not in RESUME:
            raise UserError(f"resume={resume!r} is unknown; use one of {', '.join(RESUME)}")
        self.config, self.workdir = config, Path(workdir).expanduser().absolute()
        self.finished, self.results, self.stage = False, {}, "train"
        self._resume, self._show = resume, tuple(show)
        checkpoint, log = config.get("checkpoint") or {}, config.get("log") or {}
        self._every = int(checkpoint.get("every", 0) or 0)
        self._keep = int(checkpoint.get("keep", 2))
        self._log_every = max(int(log.get("every", 1)), 1)
        self._tensorboard = bool(log.get("tensorboard", True))
        self._curves = bool(log.get("curves", True))
        self._wandb = log.get("wandb", None)
        self._writer = jax.process_index() == 0
        one = "" if self._writer else f"process{jax.process_index()}"
        self._profile = Profile(profile, self.workdir / "profile" / one)
        self._lock = self._metrics = self._saves = self._best = self._progress = None
        self._best_value = self._pending = self._previous = None
        self._total, self._over, self._looping, self._stop = None, False, False, False
        self._asked = {"steps": 0, "again": 1, "time": time.monotonic()}
        self._begun: set[str] = set()  # the stages that this process has restored

    # --- start and end -------------------------------------------------------------------------

    def __enter__(self):
        try:
            self._open()
        except BaseException:
            self._release()
            raise
        if threading.current_thread() is threading.main_thread():
            # In a run of several processes this takes the signal from jax, too: see _told_to_stop.
            self._previous = signal.signal(signal.SIGTERM, self._terminate) or signal.SIG_DFL
        return self

    def __exit__(self, kind, error, trace):
        self._looping = False
        try:
            self._profile.stop()
            if kind is None or issubclass(kind, SystemExit):
                self._flush()
        finally:
            try:
                self._close_stage()
                if self._metrics is not None:
                    self._metrics.close()
                    if self._curves and not self.finished:
                        curves.draw(self.workdir)
            except Exception:
                if kind is None:
                    raise  # else the error that ended the run is the one to show
            finally:
                if self._previous is not None:
                    signal.signal(signal.SIGTERM, self._previous)
                    self._previous = None
                self._release()

    def _take_lock(self) -> None:
        import fcntl

        path = self.workdir / "lock"
        with writing(path):
            self._lock = open(path, "a+")  # noqa: SIM115 - held for the whole run
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise UserError(
                f"{self.workdir} is in use by {holder}; wait for it, or choose another --workdir"
            ) from None
        except OSError:
            return  # a file system without locks
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        self._lock.flush()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()  # the kernel lets go of the lock, also after kill -9
            self._lock = None

    def _open(self) -> None:
        found = distributed.first(self._claim)
        distributed.together(lambda: self._sees(found["seal"]))
        if found["results"] is not None:
            self.finished, self.results = True, found["results"]
            self.say(f"{self.workdir} is finished:")
            for name, value in self.results.items():
                self.say(f"  {name} = {value:.6g}")
        elif self._writer:
            self._metrics = report.Metrics(
                self.workdir, tensorboard=self._tensorboard, wandb=self._wandb
            )

    def _claim(self) -> dict[str, Any]:
        """Process 0 takes the workdir: its results where the run is finished, and what to see there."""
        with writing(self.workdir):
            self.workdir.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        plain = getattr(self.config, "to_dict", lambda: self.config)()
        plain = json.loads(json.dumps(plain, default=str))
        path, summary = self.workdir / "config.json", self.workdir / "summary.json"
        changed = self._compare(path, plain) if path.exists() else []
        if self._resume == "never":
            self._wipe()
        if self._resume == "must" and not summary.exists() and not stages_in(self.workdir):
            raise UserError(
                f"resume=must, but {self.workdir} has no checkpoint; use --resume=auto to start"
            )
        finished = summary.exists() and not any(map(_again, changed))
        results = read_json(summary) if finished else None
        if not finished:
            summary.unlink(missing_ok=True)
            record = {"format": FORMAT, "config": plain, "command": sys.argv, "commit": commit()}
            record["jax"] = jax.__version__
            record["started"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            with writing(path):
                write_json(path, record)
        return {"results": results, "seal": zlib.crc32(path.read_bytes())}

    def _sees(self, seal: int) -> None:
        """Whether the workdir of this process is that of process 0."""
        path, deadline = self.workdir / "config.json", time.monotonic() + SHARED
        while True:
            with contextlib.suppress(OSError):
                if zlib.crc32(path.read_bytes()) == seal:
                    return
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.workdir} on {os.uname().nodename} is not the folder that process 0 "
                    "writes; give a --workdir on a disk that all machines share"
                )
            time.sleep(0.2)

    def _compare(self, path: Path, plain: dict) -> list[str]:
        """Keys that differ from the workdir's config; UserError where one of them must not."""
        old = read_json(path)
        if old.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {old.get('format')}, this version reads {FORMAT}; "
                "use the version that wrote it, or another --workdir"
            )
        a, b = _flat(old["config"]), _flat(plain)
        missing = object()
        differ = [k for k in sorted(set(a) | set(b)) if a.get(k, missing) != b.get(k, missing)]
        foreign = [k for k in differ if not may_differ(k)]
        if foreign:
            shown = [
                f"{k} ({a.get(k, 'absent')} there, {b.get(k, 'absent')} here)" for k in foreign[:5]
            ]
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise UserError(
                f"{self.workdir} holds a run of another config: {', '.join(shown)}{more}; "
                "choose another --workdir"
            )
        return differ

    def _wipe(self) -> None:
        with writing(self.workdir):
            for name in OURS:
                path = self.workdir / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    # --- state ---------------------------------------------------------------------------------

    def restore(
        self,
        init: Callable[[], State],
        *,
        stage: str = "train",
        shardings=None,
        init_from=None,
        init_stage: str | None = None,
        abstract: State | None = None,
        jit: bool = True,
    ) -> State:
        """The state at which `stage` goes on: its latest checkpoint, else `init_from`, else `init()`.

        init: no arguments; jitted with `shardings` as out_shardings unless `jit=False` (parameters
        read from files would become constants of the program). shardings: tree like the state
        (default: first device). init_from: a workdir or checkpoint whose parameters replace those of
        `init()`, `init_stage` names its stage (default: the last). abstract: shapes of the state,
        where `jax.eval_shape(init)` would be costly.
        """
        self._flush()
        self._close_stage()
        self.stage, self._total, self._over = stage, None, False
        self._begun.add(stage)
        self._saves = Checkpoints(self.workdir, stage, keep=self._keep)
        abstract = jax.eval_shape(init) if abstract is None else abstract
        target = on_device(abstract, shardings)
        places = jax.tree.map(lambda x: x.sharding, target)
        step = self._saves.latest()
        if self._metrics is not None:
            self._metrics.rewind(stage, step)
        if step is not None:
            self._over = self._saves.done()
            self.say(f"{stage}: resuming at step {step}")
            return self._saves.restore(target, step)
        state = jax.jit(init, out_shardings=places)() if jit else place(init(), places)
        if init_from:
            self.say(f"{stage}: starting from {init_from}")
            params = load(init_from, target.params, stage=init_stage, shardings=places.params)
            state = state.replace(params=params)
        return state

    def key(self, i: int, *, stage: str | None = None):
        """Random key of step i of a stage (default: this one)."""
        return step_key(int(self.config.get("seed", 0)), stage or self.stage, i)

    def steps(self, state: State, total: int) -> Iterator[int]:
        """Indices of the steps still to do: state.step .. total - 1; none after an early stop."""
        start, self._total = int(state.step), int(total)
        if self._over or start >= self._total:
            return
        stages = distributed.first(lambda: stages_in(self.workdir)) if start else []
        if built := [s for s in stages if s not in self._begun]:
            raise UserError(
                f"stage {self.stage} ended at step {start} and {built[0]} went on from there; "
                f"{self.stage}.steps={total} would change what it started from. Keep {start}, or "
                "choose another --workdir"
            )
        if self._writer:
            self._progress = report.Progress(self.stage, start, self._total, show=self._show)
        self._looping = True
        try:
            for i in range(start, self._total):
                self._profile.before(i)
                yield i
                if self._progress is not None:
                    self._progress.step(i + 1)
            self._flush()
            if self._stop and jax.process_count() == 1:  # it came after the last save
                self._saves.wait()
                raise SystemExit(TERMINATED)
        finally:
            self._looping = False
            self._profile.stop()
            if self._progress is not None:
                self._progress.close()
                self._progress = None

    def save(
        self, i: int, state: State, *, final: bool = False, best: float | int | None = None
    ) -> None:
        """After step i: save where `checkpoint.every` says, at the last step, and on SIGTERM.

        final: end the stage early; it is not repeated on resume. best: a score, higher is better;
        the best state so far is kept besides as stage "<stage>-best".
        """
        stop, done = self._told_to_stop(), i + 1
        due = bool(self._every) and done % self._every == 0
        if best is not None:
            self._keep_best(done, state, float(best))
        if due or final or stop or done == self._total:
            self._flush()  # the last numbers are checked, and on disk, before the state they belong to
            self._saves.save(done, state, n=self._total, done=final)
        if final:
            self._over = True
        if stop:
            self._saves.wait()
            self.say(f"{self.stage}: SIGTERM; saved step {done}")
            raise SystemExit(TERMINATED)

    def _keep_best(self, done: int, state: State, value: float) -> None:
        if self._best is None:
            self._best = Checkpoints(self.workdir, self.stage + BEST, keep=1)
            step = self._best.latest()
            self._best_value = None if step is None else self._best.meta(step)["best"]
        if math.isfinite(value) and (self._best_value is None or value > self._best_value):
            self._flush()
            self._best.save(done, state, n=self._total, best=value)
            self._best_value = value

    def _close_stage(self) -> None:
        saves, self._saves, self._best, best = self._saves, None, None, self._best
        try:
            if saves is not None:
                saves.close()
        finally:
            if best is not None:
                best.close()

    def _terminate(self, *_) -> None:
        alone = jax.process_count() == 1
        # The others would wait for one that leaves outside the loop: they agree at the next save.
        if self._stop or (alone and not self._looping):  # asked twice, or nothing to save
            raise SystemExit(TERMINATED)
        self._stop = True

    def _told_to_stop(self) -> bool:
        """Whether any process got SIGTERM: the same answer everywhere, asked about once a second.

        jax's own agreement (`reached_preemption_sync_point`) counts on being asked with ever higher
        numbers; stages begin again at 1, and orbax asks it in the background with older steps.
        """
        if jax.process_count() == 1:
            return self._stop
        self._asked["steps"] += 1
        if self._asked["steps"] < self._asked["again"]:
            return False
        seconds = time.monotonic() - self._asked["time"]
        votes = distributed.gather([self._stop, self._asked["steps"] / max(seconds, 1e-3)])
        again = max(int(votes[0][1]), 1)  # steps a second, as process 0 counts them
        self._asked = {"steps": 0, "again": again, "time": time.monotonic()}
        return any(stop for stop, _ in votes)

    # --- numbers and files ---------------------------------------------------------------------

    def log(self, i: int, values: dict[str, Any], *, ids=None) -> None:
        """Metrics of step i (-1: before the first): scalars, on the device or not; None = not measured.

        They are fetched at the next call, so that the device never waits. A number that is not
        finite ends the run; `ids` names the batch in that message.
        """
        self._flush()
        for value in values.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._pending = (self.stage, i + 1, dict(values), ids)

    def _flush(self) -> None:
        if self._pending is None:
            return
        (stage, step, values, ids), self._pending = self._pending, None
        numbers = {k: np.asarray(v).item() for k, v in values.items() if v is not None}
        flag = numbers.pop(NONFINITE, 0)
        wrong = [f"{k} is {v}" for k, v in numbers.items() if not math.isfinite(v)]
        if flag or wrong:
            shown = [str(x) for x in ids] if ids is not None else []
            batch = (
                f" (batch: {', '.join(shown[:8])}{', ...' if len(shown) > 8 else ''})"
                if shown
                else ""
            )
            raise UserError(
                f"{stage} step {step}: {', '.join(wrong) or 'the update is not finite'}{batch}; "
                "not saved; lower the learning rate or look at these rows"
            )
        if self._progress is not None:
            self._progress.numbers(numbers)
        if self._metrics is not None and (step % self._log_every == 0 or step in (0, self._total)):
            self._metrics.write(stage, step, numbers)

    def say(self, text: str) -> None:
        """Print a line, once in a run of several processes."""
        if self._writer:
            print(text, flush=True)

    def path(self, name: str) -> Path:
        """A file of the run; its folder is made."""
        path = self.workdir / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def wait(self) -> None:
        """Until what was saved is on the disk, for others to read."""
        if self._saves is not None:
            self._saves.wait()

    def once(self, name: str, function: Callable[[], Any], *, of: Any = None) -> Any:
        """`function()`, or what it returned when an earlier start of this run called it.

        For what cannot be measured again after a resume (accuracy before training). JSON values only.
        `of`: what the value depends on and a resumed run may change; another one is measured anew.
        """
        path = self.workdir / "once" / f"{name}.json"
        of = json.loads(json.dumps(of))

        def kept() -> dict[str, Any] | None:
            found = read_json(path) if path.exists() else None
            return found if found is not None and found["of"] == of else None

        def keep() -> Any:
            with writing(path):
                write_json(path, {"of": of, "value": value})
            return value

        if (found := distributed.first(kept)) is not None:
            return found["value"]
        value = json.loads(json.dumps(function()))
        return distributed.first(keep)

    def summary(self, values: dict[str, Any]) -> dict[str, float]:
        """Write summary.json: the run is finished. Keys `<split>/<metric>`; returns plain floats."""
        self._flush()
        numbers = {k: float(np.asarray(v)) for k, v in values.items()}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise UserError(f"summary: {name} is {value}; a result must be a finite number")
        self.wait()

        def write() -> dict[str, float]:
            path = self.workdir / "summary.json"
            with writing(path):
                write_json(path, numbers)
            return numbers

        self.results = distributed.first(write)
        return self.results
