"""Runs what a method claims, arms x seeds, and says what held.

    python -m jaxrepro.reproduce --config=configs/stepgrpo.py:tiny [--seeds=5] [--arms=a,b]
    python -m jaxrepro.reproduce --render

Every run is a subprocess of the launcher, `python -m jaxrepro.launch --config=... --workdir=...`, and
the command is printed: a reader can repeat any single number. A process of its own also means that a
run's memory, compiled functions and signal handlers go with it, that one run which the system kills
costs one run, and that this process never holds a device. The price is about three seconds of imports
a run; compiled functions come from the cache on disk.

A run's folder carries the hash of its resolved configuration (and of its warm-up's), so finished runs
are found again, interrupted ones continue from their checkpoint, and a changed config starts afresh
beside the old runs. Order: seed by seed, the warm-up, then the arms, so that whatever is finished
pairs. Only the whole study of a size, without `--config.x=`, is written to results/.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from jaxrepro import claims, cli, config, files, results, stats
from jaxrepro.claims import PRELUDE, ClaimSet, Outcome, Verdict
from jaxrepro.config import UserError

OWN = ("seed", "init_from")  # differ between the runs of one arm
FREE = (*OWN, "checkpoint.*", "log.*")  # change no result
NOTE = "reproduce.json"  # our own file in a run's folder: minutes, error


@dataclass(frozen=True)
class Study:
    """The runs that one command asks for; paths and hashes follow from it."""

    spec: str  # configs/x.py:size
    method: str
    size: str
    claimset: ClaimSet
    words: tuple[str, ...]  # --config.x=y of the command line
    seeds: tuple[int, ...]
    workdir: Path


class Job(NamedTuple):
    """One run of the launcher."""

    arm: str
    seed: int
    workdir: Path
    words: tuple[str, ...]  # --config.x=y in the order in which they apply


Launch = Callable[[Study, Job], int]  # runs a job to its end and returns the exit code


def study(
    spec: str,
    *,
    words: Sequence[str] = (),
    seeds: int | None = None,
    workdir: str | Path | None = None,
) -> Study:
    """Reads a config file's claims at a size. Raises UserError for whatever does not fit."""
    module, path, size = _module(spec)
    if not callable(getattr(module, "get_claims", None)):
        raise UserError(f"{path} has no get_claims(size), so it claims nothing to reproduce")
    claimset = claims.parse_claims(module.get_claims(size), f"{path.name}:{size}")
    for word in words:
        key = word.lstrip("-").removeprefix("no").removeprefix("config.").partition("=")[0]
        if not word.startswith(("--config.", "--noconfig.")):
            raise UserError(f"not understood: {word}; overrides look like --config.key=value")
        if "=" not in word and not word.startswith("--no"):
            raise UserError(f"{word} needs its value in the same word: {word}=VALUE")
        if key in OWN:
            raise UserError(
                f"--config.{key} is set by reproduce itself; use --seeds for more seeds"
            )
        if arms := [a for a, over in claimset.arms.items() if key in over]:
            raise UserError(
                f"--config.{key} is what arm {arms[0]} varies; override another key, or edit {path}"
            )
    count = claimset.seeds if seeds is None else seeds
    if count < 1:
        raise UserError(f"--seeds={count} is not possible; 1 is the least, the claims ask for "
                        f"{claimset.seeds}")  # fmt: skip
    default = Path("runs") / "reproduce" / f"{path.stem}-{size}"
    return Study(
        spec=f"{spec.partition(':')[0]}:{size}",
        method=path.stem,
        size=size,
        claimset=claimset,
        words=tuple(words),
        seeds=tuple(range(count)),
        workdir=Path(workdir or default),
    )


def _module(spec: str) -> tuple[Any, Path, str]:
    name = Path(spec.partition(":")[0])
    path = name if name.is_file() else config.ROOT / name
    size = config.take_config([f"--config={spec}"]).size  # a missing file is reported from here
    return config.load_module(path), path, size or "default"


def _words(overrides: Mapping[str, Any]) -> tuple[str, ...]:
    text = lambda v: str(v).lower() if isinstance(v, bool) else v if isinstance(v, str) else repr(v)
    return tuple(f"--config.{k}={text(v)}" for k, v in overrides.items() if v is not None)


def jobs(study: Study) -> list[Job]:
    """All runs of a study, in the order in which they are started."""
    common = _words(study.claimset.common) + study.words
    warm = None if study.claimset.prelude is None else common + _words(study.claimset.prelude)
    hashes = _hashes(study)
    found = []
    for seed in study.seeds:
        mine = (f"--config.seed={seed}",)
        init: tuple[str, ...] = ()
        if warm is not None:
            folder = study.workdir / f"{PRELUDE}-{hashes[PRELUDE][:8]}" / f"seed{seed}"
            found.append(Job(PRELUDE, seed, folder, warm + mine))
            init = (f"--config.init_from={folder}",)
        for arm, overrides in study.claimset.arms.items():
            folder = study.workdir / f"{arm}-{hashes[arm][:8]}" / f"seed{seed}"
            found.append(Job(arm, seed, folder, common + _words(overrides) + mine + init))
    return found


def _hashes(study: Study) -> dict[str, str]:
    """Arm -> hash of its resolved configuration and of its warm-up's, without the seed."""
    common = _words(study.claimset.common) + study.words
    of = lambda words: config.fingerprint(config.load(study.spec, words), FREE)
    found = {}
    prelude = study.claimset.prelude
    if prelude is not None:
        found[PRELUDE] = of(common + _words(prelude))
    for arm, overrides in study.claimset.arms.items():
        text = of(common + _words(overrides)) + found.get(PRELUDE, "")
        found[arm] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def config_hash(study: Study) -> str:
    """Hash of every arm's configuration: what "stale" is decided by."""
    text = json.dumps(_hashes(study), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ---- running ----


def command(study: Study, job: Job) -> list[str]:
    """The launcher's command line for a job."""
    words = [f"--config={study.spec}", f"--workdir={job.workdir}", *job.words]
    return [sys.executable, "-m", "jaxrepro.launch", *words]


def launch(study: Study, job: Job) -> int:
    """Runs a job in a subprocess; a SIGTERM or Ctrl-C reaches it, so that it saves first."""
    paths = [str(config.ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    process = subprocess.Popen(command(study, job), env=env)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(timeout=120)  # the run writes its checkpoint
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def outcome(job: Job) -> Outcome:
    """What a job has left so far: its summary when it is finished, else why there is none."""
    summary = _read(job.workdir / "summary.json")
    if summary is not None:
        numbers = {k: float(v) for k, v in summary.items() if _is_number(v)}
        return Outcome(numbers, _read(job.workdir / "items.json"))
    return Outcome(None, error=_note(job).get("error"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _note(job: Job) -> dict[str, Any]:
    return _read(job.workdir / NOTE) or {}


def execute(
    study: Study, *, arms: Sequence[str] = (), launch: Launch = launch, say: Callable = print
) -> dict[str, dict[int, Outcome]]:
    """Starts what is not finished and returns outcomes[arm][seed]. `arms` limits what is started.

    An arm whose warm-up failed is not started. Raises UserError when the launcher refuses a run, and
    SystemExit when a run was stopped from outside.
    """
    todo = jobs(study)
    known = list(study.claimset.arms)
    if unknown := [a for a in arms if a not in known]:
        raise UserError(f"--arms={','.join(arms)}: {unknown[0]!r} is not one of {', '.join(known)}")
    wanted = [j for j in todo if not arms or j.arm in (*arms, PRELUDE)]
    failed = set()
    for i, job in enumerate(wanted):
        label = f"[{i + 1}/{len(wanted)}] {job.arm} seed {job.seed}"
        if outcome(job).summary is not None:
            say(f"{label}: finished before, {job.workdir}")
            continue
        if job.seed in failed:
            _keep(job, 0.0, "its warm-up failed")
            continue
        say(f"{label}: {shlex.join(['python', *command(study, job)[1:]])}", flush=True)
        start, code = time.monotonic(), None
        try:
            code = launch(study, job)
        finally:  # minutes of an interrupted run count too
            error = None if code == 0 else f"exit code {code}"
            _keep(job, (time.monotonic() - start) / 60, error if code is not None else None)
        if code == 2 and not (job.workdir / "metrics.jsonl").exists():
            # bad input, which all runs share; after the start it is a run that diverged: a result
            raise UserError(f"{label}: the launcher refused it, see the line above")
        if code in (130, 143, -2, -15):
            raise SystemExit(143 if code in (143, -15) else 130)
        if outcome(job).summary is None:
            reason = _note(job).get("error") or "ended without a summary.json"
            _keep(job, 0.0, reason)
            say(f"{label}: FAILED, {reason}")
            if job.arm == PRELUDE:
                failed.add(job.seed)
        else:
            _warn(study.claimset, job, say)
    return collect(study)


def _keep(job: Job, minutes: float, error: str | None) -> None:
    minutes += _note(job).get("minutes", 0.0)
    results.write_json(job.workdir / NOTE, {"minutes": minutes, "error": error})


def _warn(claimset: ClaimSet, job: Job, say: Callable) -> None:
    """Says at once, not after the last seed, that a claim asks for a metric that no run writes."""
    found = outcome(job).summary
    wanted = {c.metric for c in claimset.claims if c.arm == job.arm}
    wanted |= {c.baseline_metric or c.metric for c in claimset.claims if c.baseline == job.arm}
    for key in sorted(wanted - set(found)):
        hint = config.did_you_mean(key, sorted(found))
        say(f"warning: {job.arm} wrote no metric {key}{hint}")


def collect(study: Study) -> dict[str, dict[int, Outcome]]:
    """outcomes[arm][seed] of what is on disk; starts nothing."""
    found: dict[str, dict[int, Outcome]] = {}
    for job in jobs(study):
        found.setdefault(job.arm, {})[job.seed] = outcome(job)
    return found


# ---- reporting ----


def report(study: Study, device: Mapping[str, Any]) -> dict[str, Any]:
    """The content of results/<method>-<size>-<device>.json from what is on disk."""
    found = collect(study)
    verdicts = [claims.judge(c, found, study.seeds) for c in study.claimset.claims]
    notes = [_note(job) for job in jobs(study)]
    metrics: dict[str, list[str]] = {}
    for c in study.claimset.claims:
        metrics.setdefault(c.arm, []).append(c.metric)
        if c.baseline is not None:
            metrics.setdefault(c.baseline, []).append(c.baseline_metric or c.metric)
    shown = list(dict.fromkeys(m for keys in metrics.values() for m in keys))
    return {
        "kind": "claims",
        **results.provenance(device),
        "method": study.method,
        "size": study.size,
        "slug": results.device_slug(device),
        "config": study.spec,
        "overrides": list(study.words),
        "config_hash": config_hash(study),
        "claims_hash": study.claimset.fingerprint(),
        "run_commits": sorted({_commit(job) for job in jobs(study)} - {""}),
        "minutes": sum(n.get("minutes", 0.0) for n in notes),
        "seeds": list(study.seeds),
        "claims": [_claim_record(v) for v in verdicts],
        "arms": {arm: _arm_record(runs, shown) for arm, runs in found.items()},
        "complete": all(
            run.summary is not None for runs in found.values() for run in runs.values()
        ),
    }


def _commit(job: Job) -> str:
    """The commit that the run itself recorded in its config.json."""
    saved = _read(job.workdir / "config.json") or {}
    return str(saved.get("commit") or "")


def _claim_record(v: Verdict) -> dict[str, Any]:
    c = v.claim
    return {
        "name": c.name,
        "says": c.says,
        "sentence": c.sentence,
        "kind": c.kind,
        "arm": c.arm,
        "metric": c.metric,
        "baseline": c.baseline,
        "baseline_metric": c.baseline_metric,
        "direction": c.direction,
        "bound": c.bound,
        "margin": c.margin,
        "mean": v.interval.mean,
        "lo": v.interval.lo,
        "hi": v.interval.hi,
        "n": v.interval.n,
        "over": v.over,
        "values": list(v.values),
        "baseline_values": None if v.baseline_values is None else list(v.baseline_values),
        "verdict": v.verdict,
        "note": v.note,
    }


def _arm_record(runs: Mapping[int, Outcome], shown: Sequence[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"metrics": {}, "per_seed": {}}
    for seed, run in runs.items():
        record["per_seed"][str(seed)] = run.summary or {"error": run.error or "not finished"}
    for key in shown:
        values = [r.summary[key] for r in runs.values() if r.summary and key in r.summary]
        if values and all(map(math.isfinite, values)):
            mean, lo, hi, n = stats.student_t(values)
            record["metrics"][key] = {"mean": mean, "lo": lo, "hi": hi, "n": n}
    return record


def publish(study: Study, data: Mapping[str, Any], folder: Path) -> tuple[Path, str]:
    """Writes the report; (path, "" or why it went to the workdir instead of `folder`)."""
    reason = ""
    if study.words:
        reason = f"it has overrides ({' '.join(study.words)})"
    elif not data["complete"] and not any(c["n"] for c in data["claims"]):
        reason = "no run is finished"
    elif any(
        run.get("error") == "not finished"
        for arm in data["arms"].values()
        for run in arm["per_seed"].values()
    ):
        reason = "runs are missing"
    elif len(study.seeds) < study.claimset.seeds:
        reason = f"it has {len(study.seeds)} seeds of {study.claimset.seeds}"
    results.write_json(study.workdir / "result.json", data)
    if reason:
        return study.workdir / "result.json", reason
    path = folder / f"{study.method}-{study.size}-{data['slug']}.json"
    results.write_json(path, data)
    return path, ""


def show(data: Mapping[str, Any], say: Callable = print) -> None:
    """Prints mean, interval and verdict of every claim."""
    say(
        f"\n{data['method']}:{data['size']}, {len(data['seeds'])} seeds, {data['minutes']:.1f} minutes"
    )
    for c in data["claims"]:
        text = results.interval_text(c["mean"], c["lo"], c["hi"])
        say(f"  {c['verdict'].upper():<14} {c['name']}: {c['sentence']}")
        say(
            f"  {'':<14} {text} over {c['n']} {c['over']}"
            + (f" ({c['note']})" if c["note"] else "")
        )
        if c["says"]:
            say(f"  {'':<14} {c['says']}")


def stale(data: Mapping[str, Any]) -> str:
    """Why a results file no longer belongs to the code beside it; "" where it does."""
    if data["kind"] == "bench":
        from jaxrepro.bench import harness

        return harness.stale(data)
    try:
        now = study(data["config"], words=data["overrides"], seeds=len(data["seeds"]))
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
    add = lambda define, *args: define(*args, flag_values=parser)
    add(
        flags.DEFINE_integer, "seeds", None, "seeds of every arm; the claims' own number by default"
    )
    add(
        flags.DEFINE_string,
        "workdir",
        None,
        "folder of all runs; runs/reproduce/NAME-SIZE by default",
    )
    add(
        flags.DEFINE_list,
        "arms",
        [],
        "start only these arms (and the warm-up); the report shows all",
    )
    add(flags.DEFINE_bool, "only_report", False, "start nothing, report what is finished")
    add(
        flags.DEFINE_bool,
        "render",
        False,
        "write RESULTS.md from results/; alone or after the runs",
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
    asked = study(spec, words=words, seeds=parser["seeds"].value, workdir=parser["workdir"].value)
    cli.exit_on_sigterm()
    if not parser["only_report"].value:
        try:
            execute(asked, arms=parser["arms"].value, launch=launch)
        except (KeyboardInterrupt, SystemExit):
            print("stopped; the same command continues here", file=sys.stderr)
            raise
    data = report(asked, device())
    show(data)
    path, reason = publish(asked, data, config.ROOT / "results")
    print(f"\nwrote {path}" + (f"; not to results/, because {reason}" if reason else ""))


if __name__ == "__main__":
    cli.main(main)
