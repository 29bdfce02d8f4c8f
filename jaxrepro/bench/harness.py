"""How peers are timed side by side, and what is kept.

Every round runs each case once, in an order that alternates, so that a machine whose load drifts
slows all of them alike; ratios are taken round by round, then their median and quartiles. The first
call of a case, which compiles, is timed apart. A case must block until its work is done.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from jaxrepro import results
from jaxrepro.config import ROOT, UserError


class Timing(NamedTuple):
    """Seconds of one case: its first call (with compilation), and one number a round."""

    first_s: float
    seconds: tuple[float, ...]


@dataclass
class Report:
    """What a benchmark returns: groups of cases that did the same work, and notes on how."""

    groups: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    packages: tuple[str, ...] = ()  # peers whose versions are recorded too


Clock = Callable[[], float]


def interleave(
    cases: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warmup: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Times each case `rounds` times, interleaved; `warmup` more untimed calls after the first."""
    if rounds < 1:
        raise UserError(f"--rounds={rounds} is not possible; 1 is the least")
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for name, run in cases.items():
        start = clock()
        run()
        first[name] = clock() - start
        for _ in range(warmup):
            run()
    order = list(cases)
    for i in range(rounds):
        for name in order if i % 2 == 0 else reversed(order):
            start = clock()
            cases[name]()
            seconds[name].append(clock() - start)
    return {name: Timing(first[name], tuple(seconds[name])) for name in cases}


def group(
    what: str,
    unit: str,
    timings: Mapping[str, Timing],
    *,
    work: float | int | None = None,
    peers: Sequence[str] = (),
) -> dict[str, Any]:
    """One table: `work` / seconds (a rate) or, without `work`, the seconds themselves.

    Ratios say how many times as fast a case is as the *fastest* of `peers`: a peer is shown at its best.
    """
    known = [p for p in peers if p in timings]
    peer = min(known, key=lambda p: float(np.median(timings[p].seconds)), default="")
    cases = []
    for name, timing in timings.items():
        seconds = np.asarray(timing.seconds)
        values = seconds if work is None else work / seconds
        ratio = None
        if peer and name != peer:
            ratio = _quartiles(np.asarray(timings[peer].seconds) / seconds)
        cases.append(
            {"case": name, **_quartiles(values), "first_s": timing.first_s, "ratio": ratio}
            | {"seconds": list(timing.seconds)}
        )
    return {"what": what, "unit": unit, "peer": peer or "-", "cases": cases}


def _quartiles(values: np.ndarray) -> dict[str, float]:
    q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "q1": float(q1), "q3": float(q3)}


# ---- finding and running ----


def names() -> list[str]:
    """The benchmarks of this package."""
    here = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return sorted(n for n in here if n != "harness" and not n.startswith("_"))


def load(name: str) -> ModuleType:
    """The module of a benchmark. Raises UserError."""
    if name not in names():
        raise UserError(f"benchmark {name!r} does not exist; there are {', '.join(names())}")
    return importlib.import_module(f"jaxrepro.bench.{name}")


def shape_hash(module: ModuleType, shape: str) -> str:
    """Hash of a shape's numbers: what "stale" is decided by."""
    text = json.dumps(module.SHAPES[shape], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stale(data: Mapping[str, Any]) -> str:
    """Why a bench-*.json no longer belongs to the code; "" where it does."""
    try:
        module = load(data["name"])
    except UserError:
        return "the benchmark is gone"
    if data["shape"] not in module.SHAPES:
        return f"the benchmark has no shape {data['shape']} any more"
    if shape_hash(module, data["shape"]) != data["shape_hash"]:
        return "the benchmark's shape has changed since"
    return ""


def default_shape(module: ModuleType) -> str:
    """The shape that runs where none is named: on a GPU the module's GPU_SHAPE, else its first."""
    import jax

    first = next(iter(module.SHAPES))
    return getattr(module, "GPU_SHAPE", first) if jax.default_backend() == "gpu" else first


def has_peer(shape: Mapping[str, Any], notes: list[str]) -> bool:
    """Whether torch runs beside us; where the shape has a peer and it does not, a note says why."""
    import jax

    if not shape["peer"]:
        return False
    if jax.default_backend() != "cpu":
        notes.append("the peer runs on CPUs only: jaxrepro alone on this device")
        return False
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        notes.append(
            "torch is not installed: jaxrepro alone. `pip install torch==2.13.0` adds the peer."
        )
        return False
    return True


def run(
    name: str,
    shape: str | None = None,
    rounds: int | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Runs a benchmark; the content of its JSON file.

    rounds: None = the benchmark's `ROUNDS`, else five.
    save: called with the content so far, where the benchmark tells of its tables one by one (`save` is a
    parameter of its `bench`), so that a process that dies leaves those it had.
    """
    # torch's threads wait for each other spinning, which starves them on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read when jax starts
    module = load(name)
    rounds = getattr(module, "ROUNDS", 5) if rounds is None else rounds
    if rounds < 1:
        raise UserError(f"--rounds={rounds} is not possible; 1 is the least")
    shape = shape or default_shape(module)
    if shape not in module.SHAPES:
        raise UserError(f"--shape={shape} is unknown; {name} has {', '.join(module.SHAPES)}")
    start, busy = time.monotonic(), list(os.getloadavg())

    def content(report: Report) -> dict[str, Any]:
        device = results.device()
        return {
            "kind": "bench",
            **results.provenance(device, (*results.PACKAGES, *report.packages)),
            "name": name,
            "shape": shape,
            "shape_hash": shape_hash(module, shape),
            "slug": results.device_slug(device),
            "rounds": rounds,
            "load": busy,
            "minutes": (time.monotonic() - start) / 60,
            "groups": report.groups,
            "notes": report.notes,
        }

    more = {}
    if save is not None and "save" in inspect.signature(module.bench).parameters:
        more["save"] = lambda report: save(content(report))
    return content(module.bench(module.SHAPES[shape], rounds, **more))


def show(data: Mapping[str, Any]) -> str:
    """The tables of a result for a terminal."""
    lines = [f"{data['name']}, shape {data['shape']}: {results.where(data)}", ""]
    for one in data["groups"]:
        head, rows = results.bench_rows(one)
        widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
        lines.append(f"{one['what']} ({one['unit']})")
        for row in [head, *rows]:
            cells = [
                c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))
            ]
            lines.append("  " + "  ".join(cells).rstrip())
        lines.append("")
    return "\n".join(lines + [f"- {note}" for note in data["notes"]])


USAGE = """usage: python -m jaxrepro.bench NAME [flags]
Runs a benchmark beside its peers, prints tables, writes results/bench-NAME-SHAPE-DEVICE.json.
NAME is one of {names}."""


def main(argv: Sequence[str]) -> None:
    """The command; raises UserError for bad input."""
    from absl import flags

    from jaxrepro import cli

    parser = flags.FlagValues()
    text = {"flag_values": parser}
    flags.DEFINE_string(
        "shape", None, "sizes to run; default: the benchmark's for this device", **text
    )
    flags.DEFINE_integer("rounds", None, "interleaved rounds; default: the benchmark's", **text)
    flags.DEFINE_bool("json", False, "print the JSON instead of the tables", **text)
    flags.DEFINE_string("results", str(ROOT / "results"), "folder to write to", **text)
    usage = USAGE.format(names=", ".join(names()))
    (name,) = cli.parse_flags(parser, argv, usage, words=("NAME",))
    folder = Path(parser["results"].value)

    def save(data: Mapping[str, Any]) -> Path:
        path = folder / f"bench-{data['name']}-{data['shape']}-{data['slug']}.json"
        results.write_json(path, data)
        return path

    data = run(name, parser["shape"].value, parser["rounds"].value, save)
    path = save(data)
    shown = json.dumps(data, indent=1) if parser["json"].value else f"{show(data)}\n\nwrote {path}"
    print(shown)
