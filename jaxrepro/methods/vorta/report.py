"""What a VORTA run leaves for a reader: its table, routers, moving pictures, and the curve of error over FLOPs."""

from typing import Any

import numpy as np

from jaxrepro.data import video, video_output
from jaxrepro.files import whole, writing
from jaxrepro.methods.vorta import analysis, router_files, routes
from jaxrepro.methods.vorta.evaluation import Found
from jaxrepro.methods.vorta.setting import Setting
from jaxrepro.train.loop import Run

SHOWN = ("dense", "routed", "coreset", "sliding", "random")
COLOURS = {"routed": "#b5480f", "coreset": "#1f5fa8", "sliding": "#2c7a4b", "random": "0.45"}
COLOURS |= {"average": "#7a3b8f", "static": "#8a6d00"}
GIFS = 4


def write(run: Run, s: Setting, found: Found, routers: Any) -> None:
    """routes.json, router.safetensors, and in samples/ the heat map, the curve and GIFs."""
    routes.save(run.path("routes.json"), found.table)
    router_files.save(run.path("router.safetensors"), routers, s.cfg)
    title = f"{found.table.model}: {routes.fraction(found.table.table, s.grid.flops):.2f} of full attention"
    heat = run.path("samples/routes.png")
    analysis.draw(heat, found.table.table, timesteps=found.table.t.tolist(), title=title)
    curve(run.path("samples/curve.png"), found.curve)
    if found.ids is None:
        return
    names = [name for name in SHOWN if name in found.videos]
    for i, ids in enumerate(found.ids[:GIFS]):
        films = [video.to_pictures(found.videos[name][i]) for name in names]
        path = run.path(f"samples/{i}-{video.caption(ids).replace(' ', '-')}.gif")
        video_output.write_gif(path, video_output.beside(films, names, scale=6))


def curve(path: Any, points: dict[str, list[tuple[float, float]]]) -> None:
    """Error to the dense video over the share of attention FLOPs, a line for each kind of table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, pairs in points.items():
        x, y = np.array(sorted(pairs)).T
        mine = name == "routed"
        axis.plot(x, y, color=COLOURS[name], marker="o", ms=4, lw=2.2 if mine else 1.2, label=name)
    axis.set_xlabel("attention FLOPs, share of full")
    axis.set_ylabel("latent error to dense (MSE)")
    axis.set_ylim(bottom=0)
    axis.grid(color="0.9", lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    with writing(path), whole(path) as file:
        figure.savefig(file, format="png")


def lines(results: dict[str, float]) -> list[str]:
    """The headline numbers as text."""
    found = []
    for key, value in results.items():
        parts = key.split("/")
        if parts[0] == "test" and len(parts) == 3 and parts[2] == "error":
            share = results[f"test/{parts[1]}/flops"]
            found.append(f"{parts[1]:8} error {value:.5f} at {share:.3f} of full attention")
    return found
