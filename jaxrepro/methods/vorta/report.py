"""What a VORTA run leaves for a reader: its table, routers, moving pictures, and the curve of error over FLOPs.

routes.json, router.safetensors
samples/routes.png, curve.png       the heat map; error over FLOPs
        I-NAME.gif                  moving shapes and clips: videos of some ways beside each other
        videos/                     a released model: latents/WAY, and with decode.vae a film of each video and way
"""

import shutil
from typing import Any

from jaxrepro.data import video_output
from jaxrepro.methods.vorta import analysis, curve, router, router_files, routes, samples
from jaxrepro.methods.vorta.evaluation import Found
from jaxrepro.methods.vorta.setting import Setting
from jaxrepro.train.loop import Run

# in films, from left to right
SHOWN = ("dense", "routed", "routed_pab", "few/routed", "coreset", "sliding", "random")
GIFS = 4


def write(run: Run, s: Setting, found: Found, routers: Any) -> None:
    """All of them, into the run's workdir."""
    routes.save(run.path("routes.json"), found.table)
    if routers is not None:
        router_files.save(run.path("router.safetensors"), routers, s.cfg)
    title = f"{found.table.model}: {routes.fraction(found.table.table, s.grid.flops):.2f} of full attention"
    heat = run.path("samples/routes.png")
    analysis.draw(heat, found.table.table, timesteps=found.table.t.tolist(), title=title)
    curve.draw(run.path("samples/curve.png"), curve.points(found.numbers))
    names = [name for name in SHOWN if name in found.videos]
    if s.config.data.kind == "folder":
        folder = run.path("samples/videos")
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped while it wrote
        videos = {name: found.videos[name] for name in names}
        samples.save(s, folder, found.prompts, videos, found.pictures)
        return
    height = found.pictures["dense"].shape[2]
    for i, text in enumerate(found.prompts.names[:GIFS]):
        path = run.path(f"samples/{i}-{samples.plain(text)}.gif")
        films = [found.pictures[name][i] for name in names]
        video_output.write_gif(path, video_output.beside(films, names, scale=max(96 // height, 1)))


def lines(results: dict[str, float]) -> list[str]:
    """The headline numbers as text: each way of sampling, the table's shares and work, the prediction."""
    found = []
    for key, value in results.items():
        name = key.removeprefix("test/").removesuffix("/error")
        if key == f"test/{name}/error" and not name.startswith("tau"):
            share = results[f"test/{name}/flops"]
            line = f"{name:11} error {value:.5f} at {share:.3f} of full attention"
            likeness = ("psnr", "PSNR {:.1f} dB"), ("ssim", "SSIM {:.3f}")
            parts = [
                text.format(results[f"test/{name}/{k}"])
                for k, text in likeness
                if f"test/{name}/{k}" in results
            ]
            found.append(", ".join([line, *parts]))
    parts = (f"{name} {results[f'routes/{name}']:.1%}" for name in router.BRANCHES)
    line = f"routes: {', '.join(parts)} of heads"
    if "work/model" in results:
        line += f"; work of attention {results['work/attention']:.3f}, of the model {results['work/model']:.3f}"
    found.append(line)
    if "work/predicted_speedup" in results:
        found.append(
            f"predicted, not measured: {results['work/predicted_speedup']:.2f} times as fast as dense if time followed "
            "work; python -m jaxrepro.bench vorta measures the kernels"
        )
    return found
