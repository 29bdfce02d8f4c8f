"""A method's claims as data, and the rules that turn runs into verdicts.

A config file's `get_claims(size)` returns plain dicts and tuples (`parse_claims` says which), so that
config files import nothing but ml_collections.

Rules. I is the 95 % interval over the seeds: Student t, of the paired differences where there is a
baseline. Three verdicts, nothing between them:

    kind               | holds                       | contradicted
    paired_difference  | I of arm - baseline beyond `bound` in the claimed direction | I beyond it on the other side
    threshold          | I of the arm likewise                                       | likewise
    target             | I inside [bound - margin, bound + margin]                   | I wholly outside
    equivalence        | I of arm - baseline inside [-margin, margin]                | I wholly outside
    every_seed         | each seed's arm (- baseline) is `bound` or better           | some seed's is worse

Anything else is "not resolved", and so is a claim that lacks a run, a metric or a finite number in any
seed: a seed that failed is never dropped. Equivalence by the whole 95 % interval is two one-sided
tests at 2.5 % each, stricter than the customary 90 % interval. With one seed the interval is over the
items of the evaluation (Wilson for one arm's zeros and ones, bootstrap otherwise), if the run left
per-item outcomes: it then speaks about this one training run and not about others. Claims are judged
one by one, without a correction for their number.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxrepro import stats
from jaxrepro.config import UserError

KINDS = ("paired_difference", "threshold", "target", "equivalence", "every_seed")
HOLDS, UNRESOLVED, CONTRADICTED = "holds", "not resolved", "contradicted"
RIGHT = ("accuracy", "exact_match")  # metrics that are the mean of a split's items
PRELUDE = "prelude"  # may be named as a claim's baseline: the shared warm-up


@dataclass(frozen=True)
class Claim:
    """One sentence that runs can support or contradict."""

    name: str
    kind: str
    arm: str
    metric: str  # key of the arm's summary.json
    baseline: str | None = None  # another arm, "prelude", or the same arm with another metric
    baseline_metric: str | None = None  # where the baseline's key differs: "before/test/accuracy"
    direction: str = ">"  # paired_difference, threshold
    bound: int | float = 0.0  # of the difference; the threshold; the target
    margin: float | None = (
        None  # target: tolerance; equivalence: largest difference without meaning
    )
    says: str = ""  # the claim as a sentence

    @property
    def sentence(self) -> str:
        """The formula that is tested, as printed beside the verdict."""
        left = f"{self.arm}: {self.metric}"
        if self.baseline is not None:
            other = self.baseline_metric or self.metric
            left = f"{self.metric}: {self.arm} - {self.baseline}"
            if other != self.metric:
                left = f"{self.arm}: {self.metric} - {self.baseline}: {other}"
        if self.kind == "equivalence":
            return f"{left} within +-{self.margin:g}"
        if self.kind == "target":
            return f"{left} = {self.bound:g} +- {self.margin:g}"
        if self.kind == "every_seed":
            return f"every seed, {left} {self.direction}= {self.bound:g}"
        return f"{left} {self.direction} {self.bound:g}"


@dataclass(frozen=True)
class ClaimSet:
    """What a method claims at one size, and the runs that it takes."""

    claims: tuple[Claim, ...]
    arms: Mapping[str, Mapping[str, Any]]  # arm -> {"rl.lr": 1e-5, ...}
    seeds: int
    common: Mapping[str, Any]  # overrides of every run; a command line's --config.x wins over them
    prelude: Mapping[str, Any] | None  # overrides of the shared warm-up, or None: no warm-up
    show: tuple[str, ...] = ()  # metrics that stand in the table of arms beside those of the claims

    def fingerprint(self) -> str:
        """Hash of everything in it but the prose and what is shown."""
        data = asdict(self)
        del data["show"]
        for claim in data["claims"]:
            del claim["says"]
        text = json.dumps(data, sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Outcome(NamedTuple):
    """What one run left: its summary, per-item outcomes by metric or split, or the reason for neither."""

    summary: Mapping[str, float] | None
    items: Mapping[str, Sequence[float]] | None = None
    error: str | None = None


class Verdict(NamedTuple):
    """A judged claim; `values` and `baseline_values` are per seed, None where missing."""

    claim: Claim
    verdict: str
    interval: stats.Interval
    over: str  # "seeds" or "items"
    values: tuple[float | None, ...]
    baseline_values: tuple[float | None, ...] | None
    note: str


def parse_claims(raw: Mapping[str, Any], where: str = "get_claims") -> ClaimSet:
    """Checks what `get_claims(size)` returned; every error is one line.

    {"seeds": 5,
     "common": {"rl.steps": 60},                      # optional
     "prelude": {"stage": "sft"},                     # optional
     "show": ("after/test/length",),                  # optional: more metrics in the table of arms
     "arms": {"ours": {}, "plain": {"rl.alpha": 0.0}},
     "claims": ({"name": "better", "kind": "paired_difference", "arm": "ours", "baseline": "plain",
                 "metric": "after/test/accuracy", "direction": ">", "bound": 0.0},)}
    """
    _keys(raw, {"arms", "claims"}, {"seeds", "common", "prelude", "show"}, where)
    arms = {str(k): _overrides(v, f"{where}: arm {k!r}") for k, v in raw["arms"].items()}
    for arm in arms:
        if arm == PRELUDE or not arm.replace("_", "").replace("-", "").isalnum():
            raise UserError(
                f"{where}: arm {arm!r}: use letters, digits, - and _, and not 'prelude'"
            )
    if not arms:
        raise UserError(f"{where}: arms is empty; name at least one, as in {{'ours': {{}}}}")
    prelude = raw.get("prelude")
    if prelude is not None:
        prelude = _overrides(prelude, f"{where}: prelude")
    seeds = raw.get("seeds", 5)
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise UserError(f"{where}: seeds={seeds!r} is not a whole number of at least 1")
    claims = tuple(_claim(c, arms, prelude is not None, where) for c in raw["claims"])
    names = [c.name for c in claims]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: claim {name!r} appears twice; names must differ")
    common = _overrides(raw.get("common", {}), f"{where}: common")
    show = raw.get("show", ())
    if isinstance(show, str) or not all(isinstance(metric, str) for metric in show):
        raise UserError(f"{where}: show={show!r}; a tuple of metrics' names is needed")
    return ClaimSet(claims, arms, seeds, common, prelude, tuple(show))


def _keys(raw: Any, needed: set[str], optional: set[str], where: str) -> None:
    if not isinstance(raw, Mapping):
        raise UserError(
            f"{where} gave a {type(raw).__name__}; a dict with {sorted(needed)} is needed"
        )
    if missing := sorted(needed - set(raw)):
        raise UserError(f"{where} lacks {missing}; it has {sorted(raw)}")
    if unknown := sorted(set(raw) - needed - optional):
        raise UserError(
            f"{where} has unknown keys {unknown}; known are {sorted(needed | optional)}"
        )


def _overrides(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise UserError(
            f"{where} is a {type(raw).__name__}; a dict such as {{'rl.lr': 1e-5}} is needed"
        )
    for key, value in raw.items():
        if isinstance(value, Mapping):
            raise UserError(f"{where}: {key!r} is nested; write its keys as '{key}.name'")
        if key in ("seed", "init_from"):
            raise UserError(f"{where}: {key!r} is set by reproduce itself; take it out")
    return {str(k): v for k, v in raw.items()}


def _claim(raw: Any, arms: Mapping[str, Any], prelude: bool, where: str) -> Claim:
    name = raw.get("name", "?") if isinstance(raw, Mapping) else "?"
    where = f"{where}: claim {name!r}"
    optional = {"baseline", "baseline_metric", "direction", "bound", "margin", "says"}
    _keys(raw, {"name", "kind", "arm", "metric"}, optional, where)
    for key in ("bound", "margin"):
        value = raw.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{where}: {key}={value!r} is not a number")
    claim = Claim(**raw)
    if claim.kind not in KINDS:
        raise UserError(f"{where}: kind={claim.kind!r} is not one of {', '.join(KINDS)}")
    known = set(arms) | ({PRELUDE} if prelude else set())
    for who in (claim.arm, claim.baseline):
        if who is not None and who not in known:
            raise UserError(f"{where}: arm {who!r} is not one of {', '.join(sorted(known))}")
    if claim.direction not in (">", "<"):
        raise UserError(f"{where}: direction={claim.direction!r} is not '>' or '<'")
    paired = claim.kind in ("paired_difference", "equivalence")
    if paired and claim.baseline is None:
        raise UserError(f"{where}: kind {claim.kind} needs a baseline, the arm to compare with")
    alone = claim.kind in ("threshold", "target")
    if alone and (claim.baseline or claim.baseline_metric) is not None:
        raise UserError(f"{where}: kind {claim.kind} takes no baseline; use paired_difference")
    if paired and claim.baseline == claim.arm and claim.baseline_metric in (None, claim.metric):
        raise UserError(f"{where}: {claim.arm!r} is compared with itself; give baseline_metric")
    if claim.kind in ("target", "equivalence") and not (claim.margin or 0) > 0:
        raise UserError(f"{where}: kind {claim.kind} needs margin > 0, got {claim.margin!r}")
    if claim.kind in ("paired_difference", "threshold", "every_seed") and claim.margin is not None:
        raise UserError(f"{where}: kind {claim.kind} takes bound, not margin")
    if claim.kind == "equivalence" and claim.bound:
        raise UserError(f"{where}: kind equivalence takes margin, not bound")
    return claim


def decide(claim: Claim, interval: stats.Interval) -> str:
    """The verdict that an interval gives, by the table at the top of this file."""
    if not interval.resolved:
        return UNRESOLVED
    lo, hi = interval.lo, interval.hi
    if claim.kind in ("target", "equivalence"):
        centre = claim.bound if claim.kind == "target" else 0.0
        low, high = centre - claim.margin, centre + claim.margin
        if low <= lo and hi <= high:
            return HOLDS
        return CONTRADICTED if hi < low or lo > high else UNRESOLVED
    if claim.direction == "<":
        lo, hi, bound = -hi, -lo, -claim.bound
    else:
        bound = claim.bound
    if lo > bound:
        return HOLDS
    return CONTRADICTED if hi < bound else UNRESOLVED


def judge(claim: Claim, runs: Mapping[str, Mapping[int, Outcome]], seeds: Sequence[int]) -> Verdict:
    """Verdict of one claim over `seeds`, from runs[arm][seed]."""
    values, notes = _values(runs.get(claim.arm, {}), claim.metric, seeds, claim.arm)
    base = None
    if claim.baseline is not None:
        other = claim.baseline_metric or claim.metric
        base, more = _values(runs.get(claim.baseline, {}), other, seeds, claim.baseline)
        notes += [n for n in more if n not in notes]
    over, interval = "seeds", stats.Interval(float("nan"), float("nan"), float("nan"), 0)
    full = [
        (v, 0.0 if base is None else base[i])
        for i, v in enumerate(values)
        if v is not None and (base is None or base[i] is not None)
    ]
    if full:
        interval = stats.paired_t([a for a, _ in full], [b for _, b in full])
    if len(seeds) == 1 and len(full) == 1:
        over, interval, note = _over_items(claim, runs, seeds[0], interval)
        notes += [note]
    verdict = UNRESOLVED
    if len(full) == len(seeds):
        verdict = decide(claim, interval)
        if claim.kind == "every_seed":
            sign = -1 if claim.direction == "<" else 1
            worst = min(sign * (a - b) for a, b in full)
            verdict = HOLDS if worst >= sign * claim.bound else CONTRADICTED
            notes.append(f"worst seed {sign * worst:+.3f}")
    return Verdict(
        claim=claim,
        verdict=verdict,
        interval=interval,
        over=over,
        values=tuple(values),
        baseline_values=None if base is None else tuple(base),
        note="; ".join(notes),
    )


def _values(
    runs: Mapping[int, Outcome], metric: str, seeds: Sequence[int], arm: str
) -> tuple[list[float | None], list[str]]:
    values, notes = [], []
    for seed in seeds:
        run = runs.get(seed, Outcome(None, error="no run"))
        value = None if run.summary is None else run.summary.get(metric)
        if run.summary is None:
            notes.append(f"{arm} seed {seed}: {run.error or 'not finished'}")
        elif value is None:
            notes.append(f"{arm} seed {seed}: no metric {metric}")
        elif not math.isfinite(value):
            notes.append(f"{arm} seed {seed}: {metric} is {value}")
            value = None
        values.append(None if value is None else float(value))
    return values, notes


def _over_items(
    claim: Claim, runs: Mapping[str, Mapping[int, Outcome]], seed: int, fallback: stats.Interval
) -> tuple[str, stats.Interval, str]:
    a = _items(runs[claim.arm][seed], claim.metric)
    if a is None:
        return "seeds", fallback, "one seed and no per-item outcomes"
    if claim.baseline is None:
        if set(np.unique(a)) <= {0.0, 1.0}:
            return "items", stats.wilson(float(a.sum()), a.size), "one seed: over items"
        return "items", stats.bootstrap(a), "one seed: over items"
    b = _items(runs[claim.baseline][seed], claim.baseline_metric or claim.metric)
    if b is None or a.shape != b.shape:
        return "seeds", fallback, "one seed and no per-item outcomes that pair"
    return "items", stats.paired_bootstrap(a, b), "one seed: over items"


def _items(run: Outcome, metric: str) -> np.ndarray | None:
    """Outcomes behind a metric: items[metric], or items[split] where the metric is a share of right items."""
    split, _, leaf = metric.rpartition("/")
    items = run.items or {}
    found = items.get(metric, items.get(split) if leaf in RIGHT else None)
    if found is None or len(found) < 2:
        return None
    x = np.asarray(found, np.float64)
    # a list whose mean is another number than the summary's belongs to something else
    ok = np.isfinite(x).all() and abs(x.mean() - run.summary[metric]) < 1e-6 + 1e-4 * abs(x.mean())
    return x if ok else None
