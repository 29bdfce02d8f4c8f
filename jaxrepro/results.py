"""Files under results/: where a number came from, atomic writes, and RESULTS.md rendered from them.

A file is `<method>-<size>-<device>.json` (written by reproduce) or `bench-<name>-<shape>-<device>.json`
(written by bench). It holds everything that RESULTS.md prints, so rendering needs no run and no
device, and it gives the same text on every machine.
"""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxrepro import files

SCHEMA = 1
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")

HEADER = """# Results

Rendered by `python -m jaxrepro.reproduce --render` from the files in `results/`; not edited by hand.
A claim added after its runs began is named in its method's README. Intervals are 95 %; how a verdict follows from one stands at
the top of `jaxrepro/claims.py`. Negative and unresolved results stay. *Stale* means that the config,
the claims or the benchmark's shapes have changed since; the numbers are then those of the commit named
beside them.
"""


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed versions of Python and `packages`; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device() -> dict[str, Any]:
    """Platform, kind and number of jax's devices; starts jax."""
    import jax

    found = jax.devices()
    kind = found[0].device_kind if found[0].platform != "cpu" else _cpu_name()
    return {"platform": found[0].platform, "kind": kind, "count": len(found)}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_slug(found: Mapping[str, Any]) -> str:
    """Part of a file's name: "cpu", "h200", "8xh100", "4xtpu-v5e"."""
    if found["platform"] == "cpu":
        return "cpu"
    words = re.sub(r"[^a-z0-9]+", "-", str(found["kind"]).lower()).strip("-").split("-")
    words = [w for w in words if w not in ("nvidia", "geforce", "rtx", "amd", "instinct")]
    for tail in ("hbm3", "hbm3e", "hbm2", "hbm2e", "pcie", "sxm", "sxm4", "sxm5", "nvl"):
        words = [w for w in words if w != tail]
    words = [w for w in words if not re.fullmatch(r"\d+gb", w)] or ["device"]
    count = int(found.get("count", 1))
    return (f"{count}x" if count > 1 else "") + "-".join(words)


def provenance(found: Mapping[str, Any], packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """What every results file records beside its numbers."""
    return {
        "schema": SCHEMA,
        "commit": files.commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": versions(packages),
        "device": dict(found),
        "cores": cores(),
    }


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a results file, whole or not at all; nan and inf become null."""
    files.write_json(path, _finite(data))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Every results file of `folder`, in the order of names; files of another schema are refused."""
    found = []
    for path in sorted(folder.glob("*.json")):
        data = files.read_json(path)
        if data.get("schema") != SCHEMA:
            raise ValueError(
                f"{path} has schema {data.get('schema')!r}, this version reads {SCHEMA}; run it again"
            )
        found.append(data)
    return found


Stale = Callable[[Mapping[str, Any]], str]  # "" where a file is current, else the reason


def render(found: list[dict[str, Any]], stale: Stale) -> str:
    """RESULTS.md as text."""
    parts = [HEADER]
    for kind, title, section in (
        ("claims", "## Claims", _claims_section),
        ("bench", "## Benchmarks", _bench_section),
    ):
        chosen = [data for data in found if data["kind"] == kind]
        parts.append(title + "\n")
        parts += [section(data, stale(data)) for data in chosen] or ["None measured yet.\n"]
    return "\n".join(parts)


def number(x: float | None, digits: int = 4) -> str:
    """A number as RESULTS.md prints it; "-" where there is none."""
    if x is None or not math.isfinite(x):
        return "-"
    return f"{x:.{digits}g}" if x == 0 or abs(x) < 1e5 else f"{x:,.0f}"


def interval_text(mean: float | None, lo: float | None, hi: float | None) -> str:
    """`mean [lo, hi]`, in three decimals; without the brackets where there is no interval."""
    if mean is None or not math.isfinite(mean):
        return "-"
    fixed = lambda x: f"{x:.3f}" if abs(x) < 1e3 else f"{x:,.0f}"
    if lo is None or hi is None or not (math.isfinite(lo) and math.isfinite(hi)):
        return fixed(mean)
    return f"{fixed(mean)} [{fixed(lo)}, {fixed(hi)}]"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def where(data: Mapping[str, Any]) -> str:
    made = data["device"]
    kind = made["kind"] if made.get("count", 1) == 1 else f"{made['count']} x {made['kind']}"
    versions_ = ", ".join(f"{k} {v}" for k, v in data["versions"].items())
    commits = data.get("run_commits") or [data["commit"]]
    return (
        f"{kind}, {data['cores']} cores; commit {', '.join(commits)}, {data['date']}; {versions_}"
    )


def _claims_section(data: Mapping[str, Any], stale: str) -> str:
    lines = [f"### {data['method']}, size {data['size']}, {data['slug']}\n"]
    if stale:
        lines.append(f"**Stale**: {stale}.\n")
    lines.append(f"{where(data)}; {data['minutes']:.0f} minutes; seeds {_spread(data['seeds'])}.\n")
    rows = [
        [
            c["name"] + (f": {c['says']}" if c["says"] else ""),
            f"`{c['sentence']}`",
            interval_text(c["mean"], c["lo"], c["hi"]),
            f"{c['n']} {c['over']}",
            f"**{c['verdict']}**" + (f" ({c['note']})" if c["note"] else ""),
        ]
        for c in data["claims"]
    ]
    lines.append(_table(["claim", "test", "mean [95 % interval]", "over", "verdict"], rows))
    if data["arms"]:
        metrics = list(dict.fromkeys(m for arm in data["arms"].values() for m in arm["metrics"]))
        cell = lambda name, m: interval_text(*_cell(data["arms"][name]["metrics"].get(m)))
        arms = list(data["arms"])
        if len(metrics) > len(arms):  # the longer side goes down the page
            rows = [[m] + [cell(name, m) for name in arms] for m in metrics]
            lines.append(_table(["metric (mean over seeds)", *arms], rows))
        else:
            rows = [[name] + [cell(name, m) for m in metrics] for name in arms]
            lines.append(_table(["arm (mean over seeds)", *metrics], rows))
    return "\n".join(lines)


def _cell(cell: Mapping[str, Any] | None) -> tuple[Any, Any, Any]:
    return (None, None, None) if cell is None else (cell["mean"], cell["lo"], cell["hi"])


def _spread(seeds: list[int]) -> str:
    whole = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds))


def _bench_section(data: Mapping[str, Any], stale: str) -> str:
    lines = [f"### {data['name']}, shape {data['shape']}, {data['slug']}\n"]
    if stale:
        lines.append(f"**Stale**: {stale}.\n")
    lines.append(
        f"{where(data)}; {data['rounds']} interleaved rounds, load {data['load'][0]:.1f} "
        "at the start.\n"
    )
    for group in data["groups"]:
        lines.append(f"{group['what']} ({group['unit']})\n")
        lines.append(_table(*bench_rows(group)))
    lines += [f"- {note}" for note in data["notes"]]
    return "\n".join(lines) + ("\n" if data["notes"] else "")


def bench_rows(group: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of one group of a benchmark, as the terminal and RESULTS.md show it."""
    head = ["case", "median", "quartiles", f"speed / {group['peer']}", "first call s"]
    rows = []
    for case in group["cases"]:
        ratio = "" if case["ratio"] is None else interval_ratio(case["ratio"])
        quartiles = f"{number(case['q1'])} to {number(case['q3'])}"
        rows.append(
            [case["case"], number(case["median"]), quartiles, ratio, number(case["first_s"], 3)]
        )
    return head, rows


def interval_ratio(ratio: Mapping[str, float]) -> str:
    """`2.31x (2.25 to 2.40)`: median and quartiles over the rounds."""
    return f"{ratio['median']:.2f}x ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
