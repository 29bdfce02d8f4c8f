"""curves.png: every metric of a run over its updates, one block of panels a stage.

Points are what was measured, the line is their moving average; the number beside a title is where the
line ends. What never changed is one line of text under the stage's name instead of a panel.
"""

from pathlib import Path
from typing import Any

import numpy as np

from jaxrepro.files import whole, writing
from jaxrepro.train import metrics

FILE = "curves.png"
COLUMNS = 5
FIRST, LAST = ("loss", "reward", "accuracy"), ("grad_norm", "param_norm", "lr", "weight")
COLOURS = ("#1f5fa8", "#b5480f", "#2c7a4b", "#7a3b8f", "#8a6d00")  # of the stages
EXACT = ("param_norm", "lr")  # without noise: no average
MANY = 20  # points from which on a line is their average

Series = dict[str, tuple[np.ndarray, np.ndarray]]


def series(lines: list[dict[str, Any]]) -> dict[str, Series]:
    """Stage -> metric -> (steps, values) of the lines of metrics.jsonl, in the order to show them."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in lines:
        stage = found.setdefault(line["stage"], {})
        for name, value in line.items():
            if name not in ("stage", "step") and isinstance(value, int | float):
                stage.setdefault(name, []).append((line["step"], value))
    place = {name: i - len(FIRST) for i, name in enumerate(FIRST)}
    place |= {name: i + 1 for i, name in enumerate(LAST)}
    return {
        stage: {
            name: tuple(np.array(points, float).T)
            for name, points in sorted(values.items(), key=lambda item: place.get(item[0], 0))
        }
        for stage, values in found.items()
    }


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average. The window shrinks at the start, where curves are steep, and is cut at the end."""
    total = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    half = np.minimum(window // 2, at)
    stop = np.minimum(at + half + 1, len(y))
    return (total[stop] - total[at - half]) / (stop - at + half)


def draw(workdir: Any) -> Path | None:
    """Draws curves.png of a workdir; None where no number was measured twice."""
    workdir = Path(workdir)
    stages, constant = {}, {}
    for stage, values in series(metrics.read(workdir / metrics.FILE)).items():
        same = {k for k, (_, y) in values.items() if np.ptp(y) == 0}
        panels = {k: v for k, v in values.items() if k not in same}
        if panels:
            stages[stage] = panels
            constant[stage] = [f"{k} {values[k][1][0]:.4g}" for k in values if k in same]
    if not stages:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [-(-len(panels) // COLUMNS) for panels in stages.values()]
    heights = [1.95 * n + 0.4 for n in rows]
    figure = Figure(figsize=(3.1 * COLUMNS, sum(heights)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    blocks = figure.subfigures(len(stages), 1, height_ratios=heights, squeeze=False)[:, 0]
    for i, (stage, block) in enumerate(zip(stages, blocks)):
        block.suptitle(stage, x=0.008, ha="left", fontsize=14, fontweight="bold")
        if constant[stage]:
            text, at = f"constant: {', '.join(constant[stage])}", 0.025 + 0.009 * len(stage)
            block.text(at, 1 - 0.15 / heights[i], text, va="center", fontsize=9, color="0.4")
        axes = block.subplots(rows[i], COLUMNS, squeeze=False).flat
        for (name, (x, y)), axis in zip(stages[stage].items(), axes):
            _panel(axis, name, x, y, COLOURS[i % len(COLOURS)])
        for axis in axes:
            axis.set_visible(False)
    figure.supxlabel(
        "updates of the stage; line: moving average, which ends at the number above",
        fontsize=9,
        color="0.4",
    )
    path = workdir / FILE
    with writing(path), whole(path) as file:
        figure.savefig(file, format="png")
    return path


def _panel(axis: Any, name: str, x: np.ndarray, y: np.ndarray, colour: str) -> None:
    line = y
    if name in EXACT:
        axis.plot(x, y, color=colour, lw=1.5)
    elif len(y) < MANY:
        axis.plot(x, y, color=colour, lw=1.2, marker="o", ms=3)
    else:
        line = smooth(y, max(len(y) // 12, 3))
        axis.plot(x, y, ".", color=colour, ms=4 if len(y) < 300 else 2.5, alpha=0.35, mew=0)
        axis.plot(x, line, color=colour, lw=1.5)
    axis.set_title(name.replace("_", " "), loc="left", fontsize=10)
    axis.set_title(f"{line[-1]:.4g}", loc="right", fontsize=9, color="0.4")
    axis.grid(color="0.9", lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("0.7")
    axis.tick_params(labelsize=8, color="0.7")
    axis.locator_params(nbins=5)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.margins(x=0.02)
