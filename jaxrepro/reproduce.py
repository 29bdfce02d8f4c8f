"""Runs what a method claims, arms x seeds, and says what held.

    python -m jaxrepro.reproduce --config=configs/stepgrpo.py:tiny [--seeds=5] [--arms=a,b] [--jobs=2]
    python -m jaxrepro.reproduce --render

Every run is a subprocess of the launcher, `python -m jaxrepro.launch --config=... --workdir=...`, and
the command is printed: a reader can repeat any single number. A process of its own also means that a
run's memory, compiled functions and signal handlers go with it, that one run which the system kills
costs one run, and that this process never holds a device. The price is about three seconds of imports
a run; compiled functions come from the cache on disk.

Finished runs are found again (study.py), interrupted ones continue from their checkpoint. Order: seed
by seed, the warm-up, then the arms, so that whatever is finished pairs. Only the whole study of a size,
without `--config.x=`, is written to results/.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple

from absl import flags

from jaxrepro import cli, config, files, results
from jaxrepro.claims import PRELUDE, ClaimSet, Outcome
from jaxrepro.config import UserError
from jaxrepro.study import (
    Job,
    Study,
    collect,
    commit,
    config_hash,
    jobs,
    keep,
    load,
    note,
    outcome,
    publish,
    report,
    show,
)

Start = Callable[[Study, Job, bool], Any]  # a process: poll(), terminate(), wait(timeout=), kill()
POLL = 0.2  # seconds between two looks at the runs


class Running(NamedTuple):
    """A run that has been started."""

    job: Job
    label: str
    process: Any
    since: float


def command(study: Study, job: Job) -> list[str]:
    """The launcher's command line for a job."""
    words = [f"--config={study.spec}", f"--workdir={job.workdir}", *job.words]
    return [sys.executable, "-m", "jaxrepro.launch", *words]


def start(study: Study, job: Job, quiet: bool = False) -> subprocess.Popen:
    """Starts a job; quiet: what it prints goes to output.txt in its folder."""
    paths = [str(config.ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    if not quiet:
        return subprocess.Popen(command(study, job), env=env)
    with files.writing(job.workdir):
        job.workdir.mkdir(parents=True, exist_ok=True)
        with open(job.workdir / "output.txt", "ab") as out:
            return subprocess.Popen(command(study, job), env=env, stdout=out, stderr=out)


def execute(
    study: Study,
    *,
    arms: Sequence[str] = (),
    at_once: int = 1,
    start: Start = start,
    say: Callable = print,
) -> dict[str, dict[int, Outcome]]:
    """Starts what is not finished, `at_once` runs at a time, and returns outcomes[arm][seed].

    `arms` limits what is started. An arm waits for the warm-up of its seed, and is not started where
    that failed. Raises UserError when the launcher refuses a run, and SystemExit when a run was stopped
    from outside; the other runs are then told to save and end.
    """
    known = list(study.claimset.arms)
    if unknown := [a for a in arms if a not in known]:
        raise UserError(f"--arms={','.join(arms)}: {unknown[0]!r} is not one of {', '.join(known)}")
    wanted = [j for j in jobs(study) if not arms or j.arm in (*arms, PRELUDE)]
    waiting = [(f"[{i}/{len(wanted)}] {j.arm} seed {j.seed}", j) for i, j in enumerate(wanted, 1)]
    running: list[Running] = []
    failed: set[int] = set()  # the seeds whose warm-up failed
    try:
        while waiting or running:
            warming = {j.seed for _, j in waiting if j.arm == PRELUDE}
            warming |= {r.job.seed for r in running if r.job.arm == PRELUDE}
            ready = [x for x in waiting if x[1].arm == PRELUDE or x[1].seed not in warming]
            if ready and len(running) < at_once:
                waiting.remove(ready[0])
                label, job = ready[0]
                if outcome(job).summary is not None:
                    say(f"{label}: finished before at commit {commit(job)}, {job.workdir}")
                elif job.seed in failed:
                    keep(job, 0.0, "its warm-up failed")
                else:
                    say(f"{label}: {shlex.join(['python', *command(study, job)[1:]])}", flush=True)
                    process = start(study, job, at_once > 1)
                    running.append(Running(job, label, process, monotonic()))
                continue
            ended = [r for r in running if r.process.poll() is not None]
            for run in ended:
                running.remove(run)
                _settle(study, run, failed, say)
            if not ended:
                sleep(POLL)
    except BaseException:
        _stop(running)
        raise
    return collect(study)


def _minutes(run: Running) -> float:
    return (monotonic() - run.since) / 60


def _settle(study: Study, run: Running, failed: set[int], say: Callable) -> None:
    """Notes how a run ended."""
    job, code = run.job, run.process.poll()
    keep(job, _minutes(run), None if code == 0 else f"exit code {code}")
    if code == 2 and not (job.workdir / "metrics.jsonl").exists():
        # bad input, which all runs share; after the start it is a run that diverged: a result
        output = job.workdir / "output.txt"
        where = f"see the end of {output}" if output.exists() else "see the line above"
        raise UserError(f"{run.label}: the launcher refused it, {where}")
    if code in (130, 143, -2, -15):
        raise SystemExit(143 if code in (143, -15) else 130)
    if outcome(job).summary is None:
        reason = note(job).get("error") or "ended without a summary.json"
        keep(job, 0.0, reason)
        say(f"{run.label}: FAILED, {reason}")
        if job.arm == PRELUDE:
            failed.add(job.seed)
    else:
        _warn(study.claimset, job, say)


def _stop(running: Sequence[Running]) -> None:
    """Ends the runs; each writes its checkpoint first."""
    for run in running:
        run.process.terminate()
    for run in running:
        try:
            run.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            run.process.kill()
            run.process.wait()
        keep(run.job, _minutes(run), None)  # minutes of an interrupted run count too


def _warn(claimset: ClaimSet, job: Job, say: Callable) -> None:
    """Says at once, not after the last seed, that a claim asks for a metric that no run writes."""
    found = outcome(job).summary
    wanted = {c.metric for c in claimset.claims if c.arm == job.arm}
    wanted |= {c.baseline_metric or c.metric for c in claimset.claims if c.baseline == job.arm}
    for key in sorted(wanted - set(found)):
        hint = config.did_you_mean(key, sorted(found))
        say(f"warning: {job.arm} wrote no metric {key}{hint}")


def stale(data: Mapping[str, Any]) -> str:
    """Why a results file no longer belongs to the code beside it; "" where it does."""
    if data["kind"] == "bench":
        from jaxrepro.bench import harness

        return harness.stale(data)
    try:
        now = load(data["config"], words=data["overrides"], seeds=len(data["seeds"]))
        if now.claimset.fingerprint() != data["claims_hash"]:
            return "the claims have changed since"
        if config_hash(now) != data["config_hash"]:
            return "the config has changed since"
    except UserError:
        return "the config is gone or no longer reads"
    return ""


def render(root: Path | None = None) -> str:
    """RESULTS.md of a clone (this one by default) as text."""
    root = root or config.ROOT
    try:
        return results.render(results.read_all(root / "results"), stale)
    except ValueError as e:
        raise UserError(str(e)) from e


def device() -> dict[str, Any]:
    """results.device() of a fresh process: this one must not hold the accelerator."""
    code = "import json; from jaxrepro import results; print(json.dumps(results.device()))"
    env = os.environ | {"PYTHONPATH": str(config.ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    if run.returncode:
        raise UserError(f"jax finds no device: {(run.stderr.splitlines() or ['?'])[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


# ---- command line ----


def _parser() -> flags.FlagValues:
    parser = flags.FlagValues()
    text = {"flag_values": parser}
    flags.DEFINE_integer("seeds", None, "seeds of every arm; default: the claims' own", **text)
    flags.DEFINE_string("workdir", None, "of all runs; default runs/reproduce/NAME-SIZE", **text)
    flags.DEFINE_list(
        "arms", [], "start only these arms (and the warm-up); the report shows all", **text
    )
    flags.DEFINE_integer(
        "jobs",
        1,
        "runs at a time; above 1 each prints to output.txt in its folder",
        lower_bound=1,
        **text,
    )
    flags.DEFINE_bool("only_report", False, "start nothing, report what is finished", **text)
    flags.DEFINE_bool(
        "render", False, "write RESULTS.md from results/; alone or after the runs", **text
    )
    return parser


USAGE = """usage: python -m jaxrepro.reproduce --config=configs/NAME.py[:size] [flags]
       python -m jaxrepro.reproduce --render
Runs arms x seeds of a method's claims, prints verdicts, writes results/NAME-SIZE-DEVICE.json."""


def main(argv: Sequence[str]) -> None:
    """The command; `argv` without the program's name."""
    spec, words, rest = None, [], []
    for word in argv:
        if word.startswith("--config="):
            spec = word.partition("=")[2]
        elif word.startswith(("--config.", "--noconfig.")):
            words.append(word)
        elif word == "--config":
            raise UserError("write --config=configs/NAME.py[:size], with the equals sign")
        else:
            rest.append(word)
    parser = _parser()
    cli.parse_flags(parser, rest, USAGE)
    if spec is None and not parser["render"].value:
        raise UserError("--config=configs/NAME.py[:size] is required (or --render alone)")
    if spec is not None:
        _run(spec, words, parser)
    if parser["render"].value:
        text = render()
        files.write_text(config.ROOT / "RESULTS.md", text)
        print(f"wrote {config.ROOT / 'RESULTS.md'}")


def _run(spec: str, words: Sequence[str], parser: flags.FlagValues) -> None:
    asked = load(spec, words=words, seeds=parser["seeds"].value, workdir=parser["workdir"].value)
    cli.exit_on_sigterm()
    if not parser["only_report"].value:
        try:
            execute(asked, arms=parser["arms"].value, at_once=parser["jobs"].value, start=start)
        except (KeyboardInterrupt, SystemExit):
            print("stopped; the same command continues here", file=sys.stderr)
            raise
    data = report(asked, device())
    show(data)
    path, reason = publish(asked, data, config.ROOT / "results")
    print(f"\nwrote {path}" + (f"; not to results/, because {reason}" if reason else ""))


if __name__ == "__main__":
    cli.main(main)
