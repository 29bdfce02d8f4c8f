"""What a route table does: shares of branches, work, predicted speed-up, and a picture.

    python -m jaxrepro.methods.vorta.analysis table.json --out picture.png [--model hunyuan] [--times MS MS MS MS]

A route table r (steps, layers, heads) says which branch (0 full, 1 coreset, 2 sliding) each head of each block takes
in each sampling step. Work counts 2 FLOPs a multiply-add, of one forward pass, for S video tokens, T of text, width
d = heads x i, P tokens that coreset attention keeps and the share w of the pairs of S tokens that windows see:

    a head of     full         coreset        sliding                                    (text in self-attention)
    4 i x         (S + T)^2    (P + T)^2      w S^2 + S T + T (S + T)

Wan has no text there (T = 0) but in a cross-attention, 4 S T d. Linear layers are counted where tokens go through
them: the blocks, the patches and the output. Modulation, the time and text embeddings and HunyuanVideo's refiner,
whose work does not grow with the video, are left out.

Time follows work only as far as the kernels do, so `predict` takes measured times of the branches and of the rest
of a step, and its result is a projection.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from jaxrepro.config import UserError
from jaxrepro.files import whole, writing
from jaxrepro.methods.vorta.presets import PRESETS
from jaxrepro.models import video_dit
from jaxrepro.models.hunyuan_video import HunyuanVideoConfig
from jaxrepro.ops.routed import Branch
from jaxrepro.ops.video_grid import VideoGrid, buckets

Route = Integer[np.ndarray, "steps layers heads"]
COLOURS = {"full": "#b8470d", "coreset": "#1f5fa8", "sliding": "#2c8a5b"}
TEXT = {name: preset.text for name, preset in PRESETS.items()}


def grid_of(model: str) -> VideoGrid:
    """The token grid of a public model at the paper's size, window (3, 3, 3) and bucket (2, 3, 2)."""
    if model not in PRESETS:
        raise UserError(f"model {model!r:.60} is not one of {', '.join(PRESETS)}")
    return VideoGrid(PRESETS[model].size, PRESETS[model].tile)


# Shares ------------------------------------------------------------------------------------------------


def check(route: Route) -> Route:
    """The table; UserError where it is empty or holds anything but branches."""
    if not route.size:
        raise UserError(f"the route table is empty: {route.shape} steps, layers, heads")
    wrong = (route < 0) | (route >= len(Branch))
    if wrong.any():
        at = tuple(int(n) for n in np.argwhere(wrong)[0])
        raise UserError(
            f"the route table holds {route[at]} at step, layer, head {at}; branches are 0 to {len(Branch) - 1}"
        )
    return route


def shares(route: Route) -> Float[np.ndarray, "steps layers branch"]:
    """Share of heads of each branch, of each block at each step; `.mean(1)` by step, `.mean(0)` by layer."""
    return np.stack([(check(route) == branch).mean(2) for branch in Branch], axis=-1)


# Work --------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """FLOPs of one forward pass at each step."""

    attention: Float[np.ndarray, "steps"]  # self-attention, as routed
    dense: float  # self-attention, all full
    rest: float  # everything else that is counted

    @property
    def attention_share(self) -> float:
        """Of dense self-attention, over all steps."""
        return float(self.attention.mean()) / self.dense

    @property
    def share(self) -> float:
        """Of the dense model, over all steps."""
        return float(self.attention.mean() + self.rest) / (self.dense + self.rest)


def branch_flops(cfg: video_dit.Config, grid: VideoGrid, text: int = 0) -> Float[np.ndarray, "3"]:
    """FLOPs of one head of one block in each branch. text: valid text tokens (Wan: they do not count here)."""
    s, p = grid.length, len(buckets(grid).rows)
    t = text if isinstance(cfg, HunyuanVideoConfig) else 0
    pairs = [(s + t) ** 2, (p + t) ** 2, grid.flops[2] * s**2 + s * t + t * (s + t)]
    return 4.0 * cfg.head_dim * np.array(pairs)


def rest_flops(cfg: video_dit.Config, grid: VideoGrid, text: int = 0) -> float:
    """FLOPs of a forward pass without self-attention."""
    s, d, f = grid.length, cfg.d, cfg.ffn
    ends = s * d * math.prod(cfg.patch) * (cfg.channels + cfg.out_channels)
    if isinstance(cfg, HunyuanVideoConfig):
        double = 4 * d * d + 2 * d * f  # weights, for video and text apart
        single = 3 * d * d + d * f + (d + f) * d
        return 2.0 * ((s + text) * (cfg.double * double + cfg.single * single) + ends)
    of_video, of_text = (
        6 * d * d + 2 * d * f,
        2 * d * d,
    )  # queries and outputs of both, feed-forward
    blocks = cfg.layers * (s * of_video + text * of_text + 2 * s * text * d)
    return 2.0 * (blocks + ends)


def work(route: Route, cfg: video_dit.Config, grid: VideoGrid, text: int = 0) -> Work:
    """Work of a table. text: valid text tokens, 256 at most for HunyuanVideo, 512 for Wan."""
    check(route)
    if route.shape[1:] != (cfg.layers, cfg.heads):
        raise UserError(
            f"the route table has {route.shape[1]} layers of {route.shape[2]} heads, the model "
            f"{cfg.layers} of {cfg.heads}"
        )
    if text < 0:
        raise UserError(f"text is {text}; it must be 0 tokens or more")
    flops = branch_flops(cfg, grid, text)
    dense = cfg.layers * cfg.heads * float(flops[0])
    return Work(flops[route].sum((1, 2)), dense, rest_flops(cfg, grid, text))


# Time --------------------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Measured times, in one unit."""

    full: float  # of one head of one block, one forward pass
    coreset: float  # pooling included
    sliding: float  # gathering included
    rest: float  # of a step without self-attention, of the same number of passes


class Prediction(NamedTuple):
    """Times of a video in the unit of `Times`, and their ratios."""

    dense: float
    routed: float
    attention_speedup: float
    speedup: float


def predict(route: Route, times: Times) -> Prediction:
    """A projection: heads add up, and nothing else changes with the route."""
    if not all(math.isfinite(t) and t >= 0 for t in times) or not times.full > 0:
        raise UserError(f"times {tuple(times)} must be finite, 0 or more, and full above 0")
    per_head = np.array([times.full, times.coreset, times.sliding])
    attention = float(per_head[check(route)].sum())
    dense, rest = route.size * times.full, len(route) * times.rest
    faster = dense / attention if attention else math.inf
    routed = attention + rest
    return Prediction(dense + rest, routed, faster, (dense + rest) / routed if routed else math.inf)


# Picture -----------------------------------------------------------------------------------------------


def draw(
    path: Any, route: Route, *, timesteps: Sequence[float] | None = None, title: str = ""
) -> None:
    """A PNG: share of each branch by layer and step, over steps, over layers, and the branch of each head."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    part = shares(route)
    steps, layers, _ = route.shape
    if timesteps is not None and len(timesteps) != steps:
        raise UserError(f"{len(timesteps)} timesteps for a table of {steps} steps")
    figure = Figure(figsize=(12, 7.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.10)
    axes = figure.subplots(2, 3, height_ratios=(1.15, 1))
    for axis, branch in zip(axes[0], Branch):
        colours = LinearSegmentedColormap.from_list("", ["#f6f6f4", COLOURS[branch.name]])
        box = (0.5, steps + 0.5, layers - 0.5, -0.5)
        image = axis.imshow(
            100 * part[..., branch].T, aspect="auto", cmap=colours, vmin=0, vmax=100, extent=box
        )
        bar = figure.colorbar(image, ax=axis, pad=0.02, aspect=28)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, length=0)
        _name(axis, branch.name, f"{100 * part[..., branch].mean():.1f} % of heads")
        _whole_ticks(axis, "step", "layer")
    _over_steps(axes[1, 0], part.mean(1), timesteps)
    _over_layers(axes[1, 1], part.mean(0))
    _heads(axes[1, 2], route)
    for axis in axes.flat:
        axis.tick_params(labelsize=8, color="0.7")
        axis.spines[:].set_visible(False)
    figure.suptitle(
        title or "Branches of the heads", x=0.01, ha="left", fontsize=13, fontweight="bold"
    )
    with writing(path), whole(path) as file:
        figure.savefig(file, format="png")


def _name(axis, left, right=""):
    axis.set_title(left, loc="left", fontsize=11)
    axis.set_title(right, loc="right", fontsize=9, color="0.4")


def _whole_ticks(axis, x, y):
    from matplotlib.ticker import MaxNLocator

    for way, label in ((axis.xaxis, x), (axis.yaxis, y)):
        way.set_major_locator(MaxNLocator(6, integer=True))
        way.set_label_text(label, fontsize=9)


def _over_steps(axis, part, timesteps):
    """Stacked shares by step; the time of a step above."""
    at = np.arange(1, len(part) + 1)
    bottom = np.zeros(len(part))
    for branch in reversed(Branch):
        axis.bar(at, 100 * part[:, branch], 1.0, 100 * bottom, color=COLOURS[branch.name])
        bottom += part[:, branch]
    axis.set_xlim(0.5, len(part) + 0.5)
    axis.set_ylim(0, 100)
    _name(axis, "by step", "full on top, sliding below")
    _whole_ticks(axis, "step", "% of heads")
    if timesteps is not None:
        shown = sorted({round(n) for n in np.linspace(1, len(part), min(len(part), 5))})
        axis.set_xticks(shown, [f"{n}\nt = {timesteps[n - 1]:.0f}" for n in shown])


def _over_layers(axis, part):
    """Stacked shares by layer, the first on top as in the maps above."""
    left = np.zeros(len(part))
    for branch in Branch:
        axis.barh(
            np.arange(len(part)), 100 * part[:, branch], 1.0, 100 * left, color=COLOURS[branch.name]
        )
        left += part[:, branch]
    axis.set_ylim(len(part) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    _name(axis, "by layer", "full left, sliding right")
    _whole_ticks(axis, "% of heads", "layer")


def _heads(axis, route):
    """The most frequent branch of each head, paler the less often it takes it."""
    from matplotlib.colors import to_rgb

    often = np.stack([(route == branch).mean(0) for branch in Branch], axis=-1)
    colour = np.array([to_rgb(COLOURS[branch.name]) for branch in Branch])[often.argmax(-1)]
    strength = 0.25 + 0.75 * (often.max(-1, keepdims=True) - 1 / 3) * 1.5
    axis.imshow(1 - strength * (1 - colour), aspect="auto", interpolation="nearest")
    _name(axis, "by head", "most frequent; pale: it changes")
    _whole_ticks(axis, "head", "layer")


# Command -----------------------------------------------------------------------------------------------


def report(route: Route, model: str, times: Times | None = None) -> str:
    """Shares, work where the model is a public one, and the predicted speed-up where there are times (ms)."""
    part = shares(route).mean((0, 1))
    steps, layers, heads = route.shape
    named = ", ".join(f"{b.name} {100 * part[b]:.1f} %" for b in Branch)
    lines = [f"{model or 'model'}: {steps} steps x {layers} layers x {heads} heads: {named}"]
    if model in PRESETS:
        of = work(route, video_dit.PRESETS[model], grid_of(model), TEXT[model])
        before, after = of.dense + of.rest, of.attention.mean() + of.rest
        lines.append(
            f"work of a forward pass: self-attention {of.attention_share:.3f} of dense, model {of.share:.3f} "
            f"({after / 1e15:.2f} of {before / 1e15:.2f} PFLOP)"
        )
    if times is not None:
        p = predict(route, times)
        lines.append(
            f"predicted from the times given: self-attention {p.attention_speedup:.2f} x, video {p.speedup:.2f} x "
            f"({p.routed / 1e3:.1f} of {p.dense / 1e3:.1f} s)"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    from jaxrepro.methods.vorta import routes

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("table", type=Path, help="route table, JSON")
    parser.add_argument("--out", type=Path, help="picture to write, .png")
    parser.add_argument("--model", help=f"{', '.join(PRESETS)}; default: what the table says")
    parser.add_argument(
        "--times",
        type=float,
        nargs=4,
        metavar="MS",
        help="measured milliseconds: full, coreset, sliding of one head of one block; rest of a step",
    )
    flags = parser.parse_args(argv)
    try:
        given = routes.load(flags.table)
        model = given.model if flags.model is None else flags.model
        if flags.model is not None:
            grid_of(model)  # refuses an unknown name
        text = report(given.table, model, Times(*flags.times) if flags.times else None)
        if flags.out is not None:
            draw(flags.out, given.table, timesteps=given.t.tolist(), title=text.split(":")[0])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
