"""Win rate against KL: do losses beat DPO, or have they only moved further?

    python -m jaxrepro.methods.dpo.frontier [--results=results/dpo-tiny-cpu.json] [--picture=frontier.png]

A policy that moves further from its start usually wins more, so losses of one setting each can't be ranked by win
rate alone. DPO's own temperature draws a line of win rate against KL; a loss is compared with the line at its KL,
seed by seed. Between its points the line is straight in sqrt(KL), after the reward-KL curves of
arXiv:2210.10760; it begins at the start (KL 0, win rate 1/2), and beyond its last point it is level, which is said.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrepro import config, files, stats
from jaxrepro.config import UserError
from jaxrepro.exits import guard

FILE = config.ROOT / "results" / "dpo-tiny-cpu.json"
LINE = ("sigmoid_100", "sigmoid_30", "sigmoid", "sigmoid_3")  # DPO of beta 1, .3, .1, .03
LOSSES = (
    "ipo",
    "hinge",
    "exo_pair",
    "nca_pair",
    "apo_zero",
    "sigmoid_norm",
    "simpo",
    "orpo",
    "dpop",
)
KL, WIN, LENGTH = "after/test/kl", "after/test/win_rate", "after/test/length"


class Row(NamedTuple):
    """One arm over its seeds."""

    name: str
    kl: stats.Interval
    win: stats.Interval
    above: (
        stats.Interval | None
    )  # win rate minus the line's at the same KL; None for the line itself
    beyond: int  # seeds whose KL the line does not reach
    length: float  # mean tokens a sample


def level(kl: float, line: Sequence[tuple[float, float]]) -> float:
    """Win rate of the line at a KL; line: points (KL, win rate)."""
    x, y = np.array(sorted([(0.0, 0.5), *line])).T
    return float(np.interp(np.sqrt(max(kl, 0.0)), np.sqrt(np.maximum(x, 0.0)), y))


def seeds_of(data: Any) -> list[str]:
    """Seeds that every arm has finished; UserError where there are none."""
    if not isinstance(data, Mapping) or not isinstance(data.get("arms"), Mapping):
        raise UserError("these are no results of a study; name a file of `jaxrepro.reproduce`")
    arms = data["arms"]
    if lacks := [name for name in (*LINE, *LOSSES) if name not in arms]:
        raise UserError(
            f"the results lack the arms {', '.join(lacks)}; run the whole study of configs/dpo.py:tiny"
        )
    done = lambda found: {s for s, run in found.items() if {KL, WIN, LENGTH} <= set(run)}
    seeds = set.intersection(*(done(arms[name]["per_seed"]) for name in (*LINE, *LOSSES)))
    if not seeds:
        raise UserError(
            "no seed has finished every arm of the line and of the losses; finish the study"
        )
    return sorted(seeds, key=int)


def rows(data: Any) -> list[Row]:
    """The line's arms, then the losses by how far they are above it; over `seeds_of`."""
    seeds = seeds_of(data)
    arms = {name: arm["per_seed"] for name, arm in data["arms"].items()}
    found = []
    for name in (*LINE, *LOSSES):
        kl, win, length = ([arms[name][s][metric] for s in seeds] for metric in (KL, WIN, LENGTH))
        above, beyond = None, 0
        if name in LOSSES:
            lines = [[(arms[a][s][KL], arms[a][s][WIN]) for a in LINE] for s in seeds]
            above = stats.student_t([w - level(k, line) for k, w, line in zip(kl, win, lines)])
            beyond = sum(k > max(line)[0] for k, line in zip(kl, lines))
        found.append(
            Row(
                name,
                stats.student_t(kl),
                stats.student_t(win),
                above,
                beyond,
                float(np.mean(length)),
            )
        )
    return found[: len(LINE)] + sorted(found[len(LINE) :], key=lambda row: -row.above.mean)


def text(x: stats.Interval) -> str:
    """A mean with its interval."""
    return f"{x.mean:.3f} [{x.lo:.3f}, {x.hi:.3f}]"


def table(found: Sequence[Row], seeds: int) -> str:
    """Markdown."""
    lines = [
        "| loss | KL to the start, nats | win rate against the start | above DPO's line at its KL | tokens a sample |"
    ]
    lines += ["|---|---|---|---|---|"]
    for row in found:
        above = "the line" if row.above is None else text(row.above)
        if row.beyond:
            above += f" (further than the line in {row.beyond} of {seeds} seeds)"
        lines += [
            f"| `{row.name}` | {text(row.kl)} | {text(row.win)} | {above} | {row.length:.1f} |"
        ]
    return "\n".join(lines)


def draw(found: Sequence[Row], path: Path) -> None:
    """The line and the losses with intervals over seeds, and once more where they crowd."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    line = sorted((row.kl.mean, row.win.mean) for row in found if row.above is None)
    losses = [row for row in found if row.above is not None]
    x = np.linspace(0, line[-1][0], 200)
    for axes in panels:
        axes.plot(x, [level(k, line) for k in x], color="0.7", label="DPO, beta 1 to .03")
        axes.plot(*np.array(line).T, "o", color="0.7")
        for i, row in enumerate(losses):
            spread = {
                f"{a}err": [[v.mean - v.lo], [v.hi - v.mean]]
                for a, v in (("x", row.kl), ("y", row.win))
            }
            axes.errorbar(
                row.kl.mean,
                row.win.mean,
                **spread,
                fmt="o",
                color=colormaps["tab10"](i),
                label=row.name,
                elinewidth=0.8,
            )
        axes.set(xlabel="KL to the start, nats a response")
    panels[0].set(ylabel="win rate against the start")
    far = [row for row in losses if row.kl.mean > line[-1][0] / 2] or losses
    ends = [e for row in far for e in (row.win.lo, row.win.hi)]
    panels[1].set(
        xlim=(min(r.kl.lo for r in far) - 0.2, max(r.kl.hi for r in far) + 0.2),
        ylim=(min(ends) - 0.01, max(ends) + 0.01),
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    with files.whole(path) as file:
        figure.savefig(file, format="png", dpi=110)


def command(argv: Sequence[str]) -> None:
    """Print the table and draw the picture that the flags ask for."""
    p = argparse.ArgumentParser(
        prog="frontier", description="Losses beside DPO's win rate at equal KL."
    )
    p.add_argument("--results", default=FILE, help="results of the study of configs/dpo.py:tiny")
    p.add_argument("--picture", help="where to draw the picture (PNG)")
    a = p.parse_args(argv)
    data = files.read_json(a.results)
    found, seeds = rows(data), seeds_of(data)
    print(f"{len(seeds)} seeds\n\n{table(found, len(seeds))}")
    if a.picture:
        draw(found, Path(a.picture))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command."""
    return guard(command, argv)


if __name__ == "__main__":
    sys.exit(main())
