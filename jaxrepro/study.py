"""A method's claims as runs on disk: which there are, where each lies, what they have left, the report.

A run's folder carries the hash of its resolved configuration (and of its warm-up's), so finished runs
are found again and a changed config starts afresh beside the old runs. `jaxrepro.reproduce` starts them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxrepro import claims, config, results, stats
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


def load(
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


# ---- what is on disk ----


def outcome(job: Job) -> Outcome:
    """What a job has left so far: its summary when it is finished, else why there is none."""
    summary = _read(job.workdir / "summary.json")
    if summary is not None:
        numbers = {k: float(v) for k, v in summary.items() if _is_number(v)}
        return Outcome(numbers, _read(job.workdir / "items.json"))
    return Outcome(None, error=note(job).get("error"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def note(job: Job) -> dict[str, Any]:
    """What `keep` noted: minutes, error."""
    return _read(job.workdir / NOTE) or {}


def keep(job: Job, minutes: float, error: str | None) -> None:
    """Adds to the minutes that a job has taken, and notes why it failed."""
    minutes += note(job).get("minutes", 0.0)
    results.write_json(job.workdir / NOTE, {"minutes": minutes, "error": error})


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
    notes = [note(job) for job in jobs(study)]
    metrics: dict[str, list[str]] = {}
    for c in study.claimset.claims:
        metrics.setdefault(c.arm, []).append(c.metric)
        if c.baseline is not None:
            metrics.setdefault(c.baseline, []).append(c.baseline_metric or c.metric)
    shown = list(
        dict.fromkeys([*(m for keys in metrics.values() for m in keys), *study.claimset.show])
    )
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
        "run_commits": sorted({commit(job) for job in jobs(study)} - {""}),
        "minutes": sum(n.get("minutes", 0.0) for n in notes),
        "seeds": list(study.seeds),
        "claims": [_claim_record(v) for v in verdicts],
        "arms": {arm: _arm_record(runs, shown) for arm, runs in found.items()},
        "complete": all(
            run.summary is not None for runs in found.values() for run in runs.values()
        ),
    }


def commit(job: Job) -> str:
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
