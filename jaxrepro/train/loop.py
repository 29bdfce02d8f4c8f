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
A workdir holds config.json, metrics.jsonl, tensorboard/, checkpoints/, curves.png, summary.json. Until the
first `restore` has succeeded it stays as it was (`train.workdir`).
SIGTERM: the step in progress ends, its state is saved, the process exits with code 143 (128 + 15).

In a run of several processes each of them makes the same calls. Process 0 alone looks at the workdir
and writes its files, checkpoints apart, and tells the others what it found; a SIGTERM to any of them
lets all save the same step.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrepro import distributed
from jaxrepro.config import UserError
from jaxrepro.files import write_json, writing
from jaxrepro.sharding import place
from jaxrepro.train import curves
from jaxrepro.train import metrics as report
from jaxrepro.train.checkpoint import BEST, Checkpoints, load, on_device, stages_in
from jaxrepro.train.profile import Profile
from jaxrepro.train.state import State, step_key
from jaxrepro.train.step import NONFINITE
from jaxrepro.train.workdir import SUMMARY, Workdir

TERMINATED = 143  # exit code after SIGTERM


class Run:
    """One training run in one workdir; see the module for its use.

    resume: auto (go on where there is a checkpoint), never (delete what the run left, start again),
    must (refuse to start without a checkpoint). profile: "start:count". show: names of the metrics on the
    progress line.
    Attributes: workdir, finished (bool), results (summary of a finished run), stage.
    """

    def __init__(self, config, workdir, *, resume="auto", profile=None, show=("loss",)):
        self._folder = Workdir(workdir, config, resume)
        self.config, self.workdir = config, self._folder.path
        self.finished, self.results, self.stage = False, {}, "train"
        self._show = tuple(show)
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
        self._metrics = self._saves = self._best = self._progress = None
        self._best_value = self._pending = self._previous = None
        self._total, self._over, self._looping, self._stop = None, False, False, False
        self._asked = {"steps": 0, "again": 1, "time": time.monotonic()}
        self._begun = False  # whether every process knows that the workdir is of this run
        self._restored: set[str] = set()  # stages

    # --- start and end -------------------------------------------------------------------------

    def __enter__(self):
        try:
            self._open()
        except BaseException:
            self._folder.release()
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
                    if self._curves and self._folder.begun:
                        curves.draw(self.workdir)
            except Exception:
                if kind is None:
                    raise  # else the error that ended the run is the one to show
            finally:
                if self._previous is not None:
                    signal.signal(signal.SIGTERM, self._previous)
                    self._previous = None
                self._folder.release()

    def _open(self) -> None:
        found = distributed.first(self._folder.claim)
        if jax.process_count() > 1:
            try:
                distributed.together(lambda: self._folder.sees(found["seal"]))
            finally:
                if self._writer:
                    self._folder.unseal()
        if found["results"] is not None:
            self.finished, self.results = True, found["results"]
            self.say(f"{self.workdir} is finished:")
            for name, value in self.results.items():
                self.say(f"  {name} = {value:.6g}")
        elif self._writer:
            self._metrics = report.Metrics(
                self.workdir, tensorboard=self._tensorboard, wandb=self._wandb
            )

    def _begin(self) -> None:
        """The workdir is of this run from here on. Collective, once."""
        if not self._begun:
            distributed.first(self._folder.begin)
            self._begun = True

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
        self._restored.add(stage)
        abstract = jax.eval_shape(init) if abstract is None else abstract
        target = on_device(abstract, shardings)
        places = jax.tree.map(lambda x: x.sharding, target)
        step = None
        if distributed.first(lambda: self._folder.has(stage)):
            self._saves = Checkpoints(self.workdir, stage, keep=self._keep)
            step = self._saves.latest()
        if step is not None:
            self._over = self._saves.done()
            self.say(f"{stage}: resuming at step {step}")
            state = self._saves.restore(target, step)
        else:
            state = jax.jit(init, out_shardings=places)() if jit else place(init(), places)
            if init_from:
                self.say(f"{stage}: starting from {init_from}")
                params = load(init_from, target.params, stage=init_stage, shardings=places.params)
                state = state.replace(params=params)
        self._begin()  # not before: what was refused above leaves the workdir as it was
        if self._saves is None:
            self._saves = Checkpoints(self.workdir, stage, keep=self._keep)
        if self._metrics is not None:
            self._metrics.rewind(stage, step)
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
        if built := [s for s in stages if s not in self._restored]:
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
        self._begin()
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
        if self._writer:
            self._folder.begin()
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

        For what cannot be measured again after a resume (accuracy before training). JSON values only; one
        that comes before the first `restore` is written there, when the start has proved possible.
        `of`: what the value depends on and a resumed run may change; another one is measured anew.
        """
        file, of = f"once/{name}.json", json.loads(json.dumps(of))

        def kept() -> dict[str, Any] | None:
            found = self._folder.kept(file)
            return found if found is not None and found["of"] == of else None

        def keep() -> Any:
            self._folder.keep(file, {"of": of, "value": value})
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
        self._begin()
        self.wait()

        def write() -> dict[str, float]:
            path = self.workdir / SUMMARY
            with writing(path):
                write_json(path, numbers)
            return numbers

        self.results = distributed.first(write)
        return self.results
