"""Routed sampling against dense sampling of the same noise and texts, and against other tables at the same cost.

The error is the mean squared difference of the final latents to those of the dense model. A control has full heads at
random places, as many as give it the FLOPs of the router's table (within 2 %), and its other heads all take

    coreset, sliding     one branch
    random               either, at random
    average              attention between means of two frames, in the place of coreset attention
    static               the router's own branches, one route for all times (its FLOPs are its own)

A larger tau moves heads to full attention: the curve of error over FLOPs.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrepro.config import UserError
from jaxrepro.data import video
from jaxrepro.methods.vorta import router, routes, setting
from jaxrepro.methods.vorta.routes import Routes
from jaxrepro.methods.vorta.setting import Setting
from jaxrepro.models import video_dit

CONTROLS = ("coreset", "sliding", "random", "average", "static")
AVERAGE = "average_frames"
REST = {"random": ("coreset", "sliding"), "sliding": ("sliding",)}  # the others: coreset


class Found(NamedTuple):
    """What an evaluation found."""

    numbers: dict[str, float]
    curve: dict[str, list[tuple[float, float]]]  # name -> (FLOP share, error), by tau
    table: Routes  # at decode.tau
    videos: dict[str, np.ndarray]  # name -> latents, at decode.tau
    ids: np.ndarray | None  # of the texts, where videos are of moving shapes


def examine(s: Setting, params: Any, routers: Any) -> Found:
    """Numbers, tables and videos of trained routers."""
    decode = s.config.decode
    arrays, noise, given = setting.asked(s, s.config.eval.n)
    times = setting.plan_of(s.config).t
    draw = {False: setting.sampler(s)}
    if "average" in decode.controls:
        averaging = setting.branches_of(s.config, s.cfg, AVERAGE)
        draw[True] = setting.sampler(s, averaging)

    def sample(table: Routes, average: bool = False) -> np.ndarray:
        return setting.host(draw[average](params, noise, given, jnp.asarray(table.table)))

    make = lambda tau, static=False: routes.make(
        routers,
        params,
        s.cfg,
        times,
        model=s.config.model.shape,
        tau=tau,
        static=static,
        **setting.gate_options(s.config),
    )
    table = make(decode.tau)
    videos = {"dense": sample(routes.uniform(table, "full"))}
    numbers = shares(table) | gates(s, params, routers, times)
    curve: dict[str, list[tuple[float, float]]] = {}
    for tau in sorted({decode.tau, *decode.taus}):
        prefix = "test" if tau == decode.tau else f"test/tau{tau:g}"
        mine = make(tau)
        cost = routes.fraction(mine.table, flops(s))
        for name in ("routed", *decode.controls):
            if name == "static" and s.config.router.timeless:
                continue
            found = mine if name == "routed" else control(s, mine, name, make(tau, True), cost)
            if found is None:
                continue
            average = name == "average"
            x = sample(found, average)
            share = routes.fraction(found.table, flops(s, AVERAGE if average else None))
            error = float(np.square(x - videos["dense"]).mean())
            numbers |= {f"{prefix}/{name}/error": error, f"{prefix}/{name}/flops": share}
            curve.setdefault(name, []).append((share, error))
            if tau == decode.tau:
                videos[name] = x
    ids = arrays.get("ids")
    if ids is not None and noise.shape[2] > 1:  # one frame shows no motion
        for name in ("dense", "routed"):
            right = (video.recognise(videos[name]) == ids).mean()
            numbers[f"test/{name}/recognised"] = float(right)
    return Found(numbers, curve, table, videos, ids)


def control(s: Setting, mine: Routes, name: str, still: Routes, cost: float) -> Routes | None:
    """The table of a control; None where it cannot cost the same."""
    if name == "static":
        return still
    rest = REST.get(name, ("coreset",))
    each = flops(s, AVERAGE if name == "average" else None)
    try:
        return routes.random(mine, seed=s.config.seed, rest=rest, flops=each, cost=cost)
    except UserError:
        return None


def flops(s: Setting, coarse: str | None = None) -> tuple[float, float, float]:
    """Work of each branch as a share of full attention; text of HunyuanVideo is left out."""
    full, middle, sliding = s.grid.flops
    cell = router.COARSE[coarse or s.config.router.coarse]
    if cell is not router.COARSE["coreset"] and cell is not router.COARSE["merge"]:
        sides = cell.keywords["cell"]
        kept = math.prod(-(-n // c) / n for n, c in zip(s.grid.size, sides))
        middle = kept**2
    return full, middle, sliding


def shares(table: Routes) -> dict[str, float]:
    """Share of heads of each branch: of all steps, of the first third, of the last third."""
    steps = len(table.t)
    third = max(steps // 3, 1)
    parts = {"": slice(None), "_early": slice(third), "_late": slice(steps - third, None)}
    return {
        f"routes/{name}{part}": float((table.table[rows] == j).mean())
        for j, name in enumerate(router.BRANCHES)
        for part, rows in parts.items()
    }


def gates(s: Setting, params: Any, routers: Any, times: Any) -> dict[str, float]:
    """Mean gates over the sampler's times, and the mean of the largest."""
    e = video_dit.time_embedding(params, s.cfg, jnp.asarray(times))
    g = np.asarray(router.gates(routers, e, **setting.gate_options(s.config)))
    found = {f"gates/{name}": float(g[..., j].mean()) for j, name in enumerate(router.BRANCHES)}
    return found | {"gates/largest": float(g.max(-1).mean())}
