"""Error to the dense video over the work of attention: of a run, and of a study over its seeds.

    python -m jaxrepro.methods.vorta.curve [--results=results/vorta-tiny-cpu.json] [--arm=vorta] [--picture=curve.png]

A larger tau moves heads to full attention: a line for each kind of table. Ways that are made of the dense model and
the routers by fewer steps or cached attention (drawing.py) are single points: do routes save work better than they?
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrepro import config, files, stats
from jaxrepro.config import UserError
from jaxrepro.exits import guard
from jaxrepro.files import whole, writing
from jaxrepro.methods.vorta import analysis, drawing

FILE = config.ROOT / "results" / "vorta-tiny-cpu.json"
KEY = re.compile(r"test/(?:tau(?P<tau>[0-9.]+)/)?(?P<name>.+)/error")
COLOURS = analysis.COLOURS | {"routed": analysis.COLOURS["full"], "random": "0.45"}
COLOURS |= {"average": "#7a3b8f", "static": "#8a6d00", "searched": "0.15", "windows": "#3f9c9c"}
COLOURS |= {"all_coreset": "#7fa8d6", "all_sliding": "#8cc4a2"}
MARKS = {"dense_pab": "s", "routed_pab": "D", "few/dense": "^", "few/routed": "v"}

Points = dict[str, list[tuple[float, stats.Interval]]]  # name -> (share of FLOPs, error), by tau


def points(*runs: Mapping[str, float]) -> Points:
    """The curve of runs that differ in their seed: means, and Student t intervals where there are several.

    runs: numbers as an evaluation leaves them. At one tau seeds differ in work, too: shares are means. What a seed
    has not measured is left out.
    """
    found: Points = {}
    for key in runs[0]:
        match = KEY.fullmatch(key)
        if match is None or not all(key in run for run in runs):
            continue
        shares = [run[key.removesuffix("error") + "flops"] for run in runs]
        point = float(np.mean(shares)), stats.student_t([run[key] for run in runs])
        found.setdefault(match["name"], []).append(point)
    return {name: sorted(line) for name, line in found.items()}


def draw(path: Any, found: Points) -> None:
    """The picture: lines for tables, marks for fewer steps and cached attention, bars for intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, line in found.items():
        x, y = [share for share, _ in line], [error.mean for _, error in line]
        spread = np.array([(e.mean - e.lo, e.hi - e.mean) for _, e in line]).T
        alone, mine = name in drawing.WAYS and name != "routed", name == "routed"
        colour = COLOURS["routed" if "routed" in name else name] if name in COLOURS else "0.5"
        colour = COLOURS["routed"] if alone and "routed" in name else colour
        axis.errorbar(
            x,
            y,
            yerr=None if np.isnan(spread).any() else spread,
            label=name,
            color=colour,
            marker=MARKS.get(name, "o"),
            ms=6 if alone else 4,
            ls="none" if alone else "-",
            lw=2.2 if mine else 1.2,
            elinewidth=0.8,
            capsize=2,
        )
    axis.set(xlabel="attention FLOPs, share of full", ylabel="latent error to dense (MSE)")
    axis.set_ylim(bottom=0)
    axis.grid(color="0.9", lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    with writing(path), whole(path) as file:
        figure.savefig(file, format="png")


def table(found: Points) -> str:
    """Markdown: a row for each point."""
    lines = ["| sampled by | share of full attention | error to the dense video |", "|---|---|---|"]
    for name, line in found.items():
        for share, error in line:
            spread = "" if np.isnan(error.lo) else f" [{error.lo:.3f}, {error.hi:.3f}]"
            lines.append(f"| {name} | {share:.3f} | {error.mean:.3f}{spread} |")
    return "\n".join(lines)


def of_results(data: Any, arm: str) -> Points:
    """The curve of an arm, over its seeds; UserError where these are no such results."""
    if not isinstance(data, Mapping) or not isinstance(data.get("arms"), Mapping):
        raise UserError("these are no results of a study; name a file of `jaxrepro.reproduce`")
    if arm not in data["arms"]:
        raise UserError(f"--arm={arm!r:.60} is not one of {', '.join(data['arms'])}")
    runs = list(data["arms"][arm]["per_seed"].values())
    if not runs or not (found := points(*runs)):
        raise UserError(f"no seed of the arm {arm} has errors to draw; finish the study")
    return found


def command(argv: Sequence[str]) -> None:
    """Print the curve of an arm, and draw it where the flags say so."""
    p = argparse.ArgumentParser(prog="curve", description=__doc__.split("\n\n")[0])
    p.add_argument("--results", default=FILE, help="results of a study of configs/vorta.py")
    p.add_argument("--arm", default="vorta", help="arm of the study (default: %(default)s)")
    p.add_argument("--picture", type=Path, help="where to draw the picture (PNG)")
    flags = p.parse_args(argv)
    found = of_results(files.read_json(flags.results), flags.arm)
    print(table(found))
    if flags.picture:
        draw(flags.picture, found)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command."""
    return guard(command, argv)


if __name__ == "__main__":
    sys.exit(main())
