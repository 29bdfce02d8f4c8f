"""How a run samples: each way of `WAYS` is rows of data to the program of sampling.py.

    dense, routed             all heads full; by the table of the routers, or of decode.table
    dense_pab, routed_pab     attention computed in some steps alone (caching.py)
    few/dense, few/routed     decode.few steps of the grid of times, for distilled models

Sliding attention is by window groups, or by the Pallas kernel of decode.kernel; the control `windows` keeps groups.
Where the mesh has a `sequence` axis heads lie on its devices in the order that spreads the table's work best.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.methods.vorta import caching, router, routes, sampling, search, ulysses
from jaxrepro.methods.vorta.routes import Routes
from jaxrepro.methods.vorta.setting import Setting
from jaxrepro.methods.vorta.sources import Prompts
from jaxrepro.models.video_dit import Config
from jaxrepro.ops import flow, sliding

SAMPLERS = {"euler": flow.euler, "unipc": flow.unipc}
WAYS = ("dense", "routed", "dense_pab", "routed_pab", "few/dense", "few/routed")
WINDOWS = "windows"  # sliding attention with a larger window, in the place of coreset attention
KERNELS = (None, "pallas")


class Way(NamedTuple):
    """One way to sample."""

    table: Int[np.ndarray, "n l h"]
    few: bool = False
    cached: bool = False
    coarse: str | None = None  # second branch, of router.COARSE or WINDOWS; None = the routers' own


def check(config: Any) -> None:
    """UserError for settings of decode that can't work."""
    decode = config.decode
    if decode.sampler not in SAMPLERS:
        raise UserError(f"decode.sampler={decode.sampler!r} is not one of {', '.join(SAMPLERS)}")
    plan(config)
    if decode.kernel not in KERNELS:
        raise UserError(
            f"decode.kernel={decode.kernel!r:.60} is not pallas; leave it out for window groups"
        )
    if not 0 <= decode.few <= decode.steps:
        raise UserError(
            f"decode.few={decode.few} steps of a grid of {decode.steps}; use 1 to {decode.steps}, 0 = off"
        )
    if decode.few and decode.sampler != "euler":
        raise UserError(
            f"decode.few={decode.few} steps are taken by Euler's method; set decode.sampler=euler, or few=0"
        )
    if decode.pab < 0 or decode.pab == 1:
        raise UserError(f"decode.pab={decode.pab}: attention every 2 steps or more, 0 = off")
    if len(decode.pab_times) != 2 or not 0 <= decode.pab_times[0] < decode.pab_times[1] <= 1000:
        raise UserError(
            f"decode.pab_times={tuple(decode.pab_times)}; use two times, 0 <= low < high <= 1000"
        )
    if not 0 <= decode.guidance < math.inf:
        raise UserError(f"decode.guidance={decode.guidance}; use a number from 0 up, 1 = none")
    able = ways(config)
    if unknown := [name for name in decode.videos if name not in able]:
        raise UserError(
            f"decode.videos={', '.join(unknown)[:60]}: {', '.join(able)} are there"
            + ("" if decode.pab and decode.few else "; decode.pab and decode.few bring more")
        )
    if not decode.videos:
        raise UserError("decode.videos is empty; use one of " + ", ".join(able))


def ways(config: Any) -> list[str]:
    """The names of `WAYS` that a config has."""
    off = () if config.decode.pab else ("dense_pab", "routed_pab")
    off += () if config.decode.few else ("few/dense", "few/routed")
    return [name for name in WAYS if name not in off]


def plan(config: Any, *, few: bool = False) -> flow.Plan:
    """Times and solver. few: decode.few steps of the same grid."""
    decode = config.decode
    grid = dict(steps=decode.steps, shift=decode.shift)
    if few:
        return flow.euler(picks=flow.few(decode.steps, decode.few), **grid)
    return SAMPLERS[decode.sampler](**grid)


def computes(config: Any) -> Bool[np.ndarray, "n"]:
    """The steps in which attention is computed under decode.pab."""
    low, high = config.decode.pab_times
    return caching.schedule(plan(config).t, every=config.decode.pab, low=low, high=high)


def given(config: Any, cfg: Config) -> Routes | None:
    """The table of decode.table; UserError where it is not for this model and these times."""
    if not config.decode.table:
        return None
    found = routes.load(config.decode.table)
    routes.fits(found, cfg, plan(config).t)
    return found


def way(config: Any, name: str, found: Routes) -> Way:
    """One of `WAYS`; the table is that of all steps."""
    few, cached = name.startswith("few/"), name.endswith("_pab")
    table = found.table if "routed" in name else np.zeros_like(found.table)
    if few:
        table = table[list(flow.few(config.decode.steps, config.decode.few))]
    return Way(table, few, cached)


# Work ---------------------------------------------------------------------------------------------


def kernel(s: Setting) -> str:
    """The kernel of sliding attention, a name of `ops.sliding.KERNELS`.

    UserError where decode.kernel cannot run: on this device, with this jax, or for this model and grid.
    """
    if not s.config.decode.kernel:
        return "auto"
    name = "tpu" if jax.default_backend() == "tpu" else "mosaic"
    try:
        _try(name, s.cfg, s.grid)
    except UserError as error:
        reason = str(error).partition("; take ")[0]
        raise UserError(
            f"decode.kernel={s.config.decode.kernel}: {reason}; leave decode.kernel out for window groups"
        ) from error
    return name


@lru_cache(maxsize=8)
def _try(name, cfg, grid):
    """Trace a kernel for one head of a model, without running it; UserError where it refuses."""
    f = sliding.by_kernel(name)
    one = jax.ShapeDtypeStruct((1, grid.length, 1, cfg.head_dim), cfg.dtype)
    jax.eval_shape(lambda q, k, v: f(q, k, v, grid), one, one, one)


def branches(s: Setting, coarse: str | None = None) -> tuple[Any, ...]:
    """The functions of a way's branches; equal arguments give the same objects."""
    if coarse == WINDOWS:
        return search.windows(s.grid)
    section = s.config.router
    return router.branches(
        s.cfg, coarse=coarse or section.coarse, shared=section.shared, kernel=kernel(s)
    )


def flops(s: Setting, coarse: str | None = None) -> tuple[float, float, float]:
    """Work of each branch as a share of full attention; text of HunyuanVideo is left out."""
    full, middle, sliding = s.grid.flops
    if coarse == WINDOWS:
        return full, search.wide(s.grid).flops[2], sliding
    cell = router.COARSE[coarse or s.config.router.coarse]
    if cell is not router.COARSE["coreset"] and cell is not router.COARSE["merge"]:
        sides = cell.keywords["cell"]
        kept = math.prod(-(-n // c) / n for n, c in zip(s.grid.size, sides))
        middle = kept**2
    return full, middle, sliding


def work(s: Setting, way: Way) -> float:
    """Work of attention as a share of the dense video in all steps."""
    each = np.asarray(flops(s, way.coarse))[way.table].mean((1, 2))
    if way.cached:
        each = each * computes(s.config)
    return float(each.sum() / s.config.decode.steps)


class Load(NamedTuple):
    """Heads on the devices of `sequence`: the work of the fullest over the mean, of all blocks and steps."""

    devices: int
    mean: float
    worst: float
    before: float  # the mean, heads in the model's order


def load(s: Setting, table: Int[np.ndarray, "n l h"]) -> Load | None:
    """How evenly a table's work is spread; None on one device."""
    parts = s.mesh.shape["sequence"]
    if parts == 1:
        return None
    costs = flops(s)
    _, found = ulysses.balance(table, parts=parts, costs=costs)
    order = np.broadcast_to(np.arange(table.shape[-1]), table.shape)
    before = ulysses.imbalance(table, order, parts=parts, costs=costs)
    return Load(parts, float(found.mean()), float(found.max()), float(before.mean()))


# Sampling -----------------------------------------------------------------------------------------


def sample(s: Setting, params: Any, prompts: Prompts, way: Way) -> Float[np.ndarray, "b c f h w"]:
    """Latents on the host; UserError where a number is not finite."""
    config, parts = s.config, s.mesh.shape["sequence"]
    order = None
    if parts > 1:
        order, _ = ulysses.balance(way.table, parts=parts, costs=flops(s, way.coarse))
    rows = prompts.noise, prompts.given, prompts.empty
    if s.mesh.size > 1:
        divides = len(prompts.noise) % sharding.row_parts(s.mesh) == 0
        at = sharding.batch_sharding(s.mesh) if divides else sharding.replicated(s.mesh)
        rows = sharding.place(rows, at)

    def run(noise: Any, given: Any, empty: Any) -> Any:
        return sampling.sample(
            params,
            s.cfg,
            noise,
            given,
            way.table,
            plan(config, few=way.few),
            grid=s.grid,
            empty=empty,
            scale=None if empty is None else config.decode.guidance,
            computes=computes(config) if way.cached else None,
            order=order,
            branches=branches(s, way.coarse),
        )

    x = np.asarray(sharding.fetch(sharding.on_mesh(s.mesh, run)(*rows)), np.float32)
    if not np.isfinite(x).all():
        raise UserError(
            "sampling gave numbers that are not finite; try model.dtype=float32 or other weights"
        )
    return x
