"""Routed sampling against dense sampling of the same noise and texts, and against other tables at the same cost.

The error is the mean squared difference of the final latents to those of the dense model in all steps. A control has
full heads at random places, as many as give it the FLOPs of the router's table (within 2 %); its other heads all take

    coreset, sliding            one branch
    random                      either, at random
    average                     attention between means of two frames, in the place of coreset attention

Two controls of the same FLOPs need no training: they are searched by errors that are measured head by head (search.py),

    searched                    among the router's own branches
    windows                     among full attention and two windows of sliding-tile attention

and others cost what they cost:

    all_coreset, all_sliding    one branch in all heads (all_sliding: sliding-tile attention with one window)
    static                      the router's own branches, one route for all times

What is called coreset is coreset attention, whatever the routers were trained with. A larger tau moves heads to full
attention: the curve of error over FLOPs (where full attention is left out there is none). With decode.pab and
decode.few the ways of drawing.py that they bring are measured too.

Where latents can be seen, PSNR and SSIM (data/video_similarity.py) compare pictures with those of the dense video.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.data import video, video_similarity
from jaxrepro.methods.vorta import analysis, drawing, router, routes, search, setting, sources
from jaxrepro.methods.vorta.drawing import Way, flops
from jaxrepro.methods.vorta.routes import Routes
from jaxrepro.methods.vorta.setting import Setting
from jaxrepro.models import video_dit

CONTROLS = ("coreset", "sliding", "random", "average", "all_coreset", "all_sliding", "static")
CONTROLS += (SEARCHED := ("searched", "windows"))
COARSE = {"average": "average_frames", "windows": drawing.WINDOWS}
COARSE |= {"coreset": "coreset", "all_coreset": "coreset"}
REST = {"random": ("coreset", "sliding"), "sliding": ("sliding",)}  # the others: coreset


class Found(NamedTuple):
    """What an evaluation found."""

    numbers: dict[str, float]
    table: Routes  # at decode.tau, or of decode.table
    videos: dict[str, np.ndarray]  # name -> latents, at decode.tau
    pictures: dict[
        str, np.ndarray
    ]  # name -> uint8 (b, frames, rows, columns, rgb), where they can be seen
    prompts: sources.Prompts
    notes: list[str]  # what was left out, and why; how heads lie on devices


def table_of(s: Setting, params: Any, routers: Any, tau: float, *, static: bool = False) -> Routes:
    """The routers' table at the times of decode."""
    return routes.make(
        routers,
        params,
        s.cfg,
        drawing.plan(s.config).t,
        model=s.config.model.shape,
        tau=tau,
        static=static,
        **setting.gate_options(s.config),
    )


def evaluate(s: Setting, params: Any, routers: Any) -> Found:
    """Numbers, tables and videos of trained routers, or of decode.table where it is given (routers: None or unused)."""
    config, decode = s.config, s.config.decode
    prompts = sources.test_prompts(config, s.cfg, s.grid, config.eval.n)
    given = drawing.given(config, s.cfg)
    make = lambda tau, **k: table_of(s, params, routers, tau, **k) if given is None else given
    draw = lambda way: drawing.sample(s, params, prompts, way)
    table = make(decode.tau)
    videos = {"dense": draw(drawing.way(config, "dense", table))}
    against = lambda x, name="dense": float(np.square(x - videos[name]).mean())
    numbers, notes = shares(table) | works(s, table, prompts), []
    if given is None:
        numbers |= gates(s, params, routers, table.t)
    measured: dict[str, np.ndarray] = {}  # errors of branches, for controls that are searched
    for tau in taus(s.config) if given is None else (decode.tau,):
        prefix = "test" if tau == decode.tau else f"test/tau{tau:g}"
        mine = make(tau)
        for name in ("routed", *decode.controls):
            still = make(tau, static=True) if name == "static" and given is None else None
            try:
                if name == "routed":
                    way = Way(mine.table)
                elif name in SEARCHED:
                    if name not in measured:
                        measured[name] = errors(s, params, COARSE.get(name))
                    way = searched(s, mine, name, measured[name])
                else:
                    way = control(s, mine, name, still)
            except UserError as error:
                notes.append(f"{prefix}/{name} is left out: {error}")
                continue
            if way is None:
                continue
            x, share = draw(way), drawing.work(s, way)
            numbers |= {f"{prefix}/{name}/error": against(x), f"{prefix}/{name}/flops": share}
            if tau == decode.tau:
                videos[name] = x
    for name in drawing.ways(config):
        if name not in videos:
            way = drawing.way(config, name, table)
            videos[name] = draw(way)
            numbers[f"test/{name}/error"] = against(videos[name])
            numbers[f"test/{name}/flops"] = drawing.work(s, way)
    if decode.few:
        numbers["test/few/routed/error_to_few"] = against(videos["few/routed"], "few/dense")
    if decode.pab:
        numbers["test/pab/reused"] = 1 - float(drawing.computes(config).mean())
    if load := drawing.load(s, table.table):
        numbers["routes/load"] = load.mean
        notes.append(
            f"heads over {load.devices} devices: the fullest has {load.mean:.2f} of the mean work (at most "
            f"{load.worst:.2f}), in the model's order {load.before:.2f}"
        )
    pictures = {k: sources.pictures(config, s.cfg, s.grid, x) for k, x in videos.items()}
    pictures = {name: seen for name, seen in pictures.items() if seen is not None}
    for name in [name for name in pictures if name != "dense"]:
        numbers |= likeness(f"test/{name}", pictures[name], pictures["dense"])
    if prompts.words is not None and prompts.noise.shape[2] > 1:  # one frame shows no motion
        for name in ("dense", "routed"):
            right = (video.recognise(videos[name]) == prompts.words).mean()
            numbers[f"test/{name}/recognised"] = float(right)
    return Found(numbers, table, videos, pictures, prompts, notes)


def taus(config: Any) -> list[float]:
    """decode.tau and those of the curve; the former alone where there is no full attention to move heads to."""
    curve = () if config.router.without == "full" else config.decode.taus
    return sorted({config.decode.tau, *curve})


def likeness(prefix: str, pictures: np.ndarray, dense: np.ndarray) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM to the dense video's pictures; SSIM where they are large enough."""
    found = {f"{prefix}/psnr": float(video_similarity.psnr(pictures, dense).mean())}
    if min(dense.shape[2:4]) >= video_similarity.LEAST:
        found[f"{prefix}/ssim"] = float(video_similarity.ssim(pictures, dense).mean())
    return found


def searched(s: Setting, mine: Routes, name: str, errors: Any) -> Way:
    """The table of least error at the cost of `mine`; UserError where none costs the same."""
    coarse = COARSE.get(name)
    cost = routes.fraction(mine.table, flops(s))
    return Way(
        routes.searched(mine, errors, flops=flops(s, coarse), cost=cost).table, coarse=coarse
    )


def errors(s: Setting, params: Any, coarse: str | None) -> Float[np.ndarray, "n l h branch"]:
    """Of each branch in each head, on a batch of the router's; UserError where there is no training data."""
    config = s.config
    rows = setting.rows_of(s, setting.videos(s)[0].arrays)
    noise = jax.random.normal(jax.random.key(config.seed), rows["latents"].shape)
    fixed = dict(grid=s.grid, branches=drawing.branches(s, coarse))
    t = jnp.asarray(drawing.plan(config).t)
    run = lambda *given: search.errors(params, s.cfg, *given, t, **fixed)
    run = sharding.on_mesh(s.mesh, run)
    found = np.array(sharding.fetch(run(rows["latents"], noise, rows["condition"])))
    if config.router.without and coarse is None:  # dearer than any other table
        left_out = router.BRANCHES.index(config.router.without)
        found[..., left_out] = max(found.max(), 1.0) * found.size
    return found


def control(s: Setting, mine: Routes, name: str, still: Routes | None) -> Way | None:
    """A control of the table `mine`; None where static is no other table, UserError where it can't cost the same."""
    coarse = COARSE.get(name)
    if name == "static":
        return None if still is None or s.config.router.timeless else Way(still.table)
    if name.startswith("all_"):
        return Way(routes.uniform(mine, name.removeprefix("all_")).table, coarse=coarse)
    rest = REST.get(name, ("coreset",))
    cost = routes.fraction(mine.table, flops(s))
    found = routes.random(mine, seed=s.config.seed, rest=rest, flops=flops(s, coarse), cost=cost)
    return Way(found.table, coarse=coarse)


def shares(table: Routes) -> dict[str, float]:
    """Share of heads of each branch: of all steps, of the first third, of the last third."""
    steps = len(table.t)
    third = max(steps // 3, 1)
    parts = {"": slice(None), "_early": slice(third), "_late": slice(steps - third, None)}
    part = analysis.shares(table.table).mean(1)  # (steps, branch)
    return {
        f"routes/{name}{which}": float(part[rows, j].mean())
        for j, name in enumerate(router.BRANCHES)
        for which, rows in parts.items()
    }


def works(s: Setting, table: Routes, prompts: sources.Prompts) -> dict[str, float]:
    """FLOPs as a share of the dense model's, of self-attention and of all that analysis.py counts, and a prediction.

    The prediction is 1 / the share of all: as if time followed work. None of it for averages in the place of coreset
    attention, which analysis.py does not count.
    """
    if s.config.router.coarse not in ("coreset", "merge"):
        return {}
    given = prompts.given
    text = given.text.shape[1] if given.length is None else int(np.asarray(given.length).mean())
    found = analysis.work(table.table, s.cfg, s.grid, text)
    return {
        "work/attention": found.attention_share,
        "work/model": found.share,
        "work/predicted_speedup": 1 / found.share,
    }


def gates(s: Setting, params: Any, routers: Any, times: Any) -> dict[str, float]:
    """Mean gates over the sampler's times, and the mean of the largest."""
    e = video_dit.time_embedding(params, s.cfg, jnp.asarray(times))
    g = np.asarray(router.gates(routers, e, **setting.gate_options(s.config)))
    found = {f"gates/{name}": float(g[..., j].mean()) for j, name in enumerate(router.BRANCHES)}
    return found | {"gates/largest": float(g.max(-1).mean())}
