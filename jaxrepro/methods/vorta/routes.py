"""Route tables of VORTA, arXiv:2505.18809 (v2): which branch each head takes in each step, known before sampling.

    route[s, l, h] = argmax_j g(t_s)[l, h, j],    0 (full) where max_j g < tau

Gates depend on the time alone, so a sampler's times give the whole table, and the table is data: one program runs all
steps, and a table can be saved, read and replaced by another one. tau = 0.3 is the official default and does nothing,
since the largest of three shares is at least 1/3; above that it is a knob: more full heads, nearer to the dense model.
Heads that are kept are not scaled by their gate.

The other tables here are what a router is compared with: one branch everywhere, full heads at random places, one route
for all times, and the best table for given errors of each branch (how sliding-tile attention picks windows a head
without training, arXiv:2502.04507; that its cost is given is ours).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrepro.config import UserError
from jaxrepro.files import read_json, write_json
from jaxrepro.methods.vorta.router import BRANCHES, gates
from jaxrepro.models import video_dit
from jaxrepro.models.video_dit import Config

FORMAT, VERSION = "vorta-routes", 1
KEYS = ("format", "version", "model", "branches", "t", "routes")
TAU = 0.3
EQUAL = 0.02  # how far apart FLOPs may be that count as equal


class Routes(NamedTuple):
    """A table and what it was made for. Indices are those of `BRANCHES`."""

    table: np.ndarray  # (steps, layers, heads) int8
    t: np.ndarray  # (steps,) float32, in 0 .. 1000
    model: str


def choose(g: Any, *, tau: float = TAU) -> np.ndarray:
    """The branch of each head (..., l, h) int8 from gates (..., l, h, 3); UserError where a gate is not finite."""
    g = np.asarray(g, np.float32)
    if g.ndim < 3 or g.shape[-1] != len(BRANCHES):
        raise UserError(
            f"gates of shape {g.shape}: (..., blocks, heads, {len(BRANCHES)}), one number for each of "
            f"{', '.join(BRANCHES)}"
        )
    if not 0 <= tau <= 1:
        raise UserError(f"tau={tau} must be in [0, 1]: below it the largest gate gives full")
    if not np.isfinite(g).all():
        place = [int(n) for n in np.argwhere(~np.isfinite(g))[0][-3:-1]]
        raise UserError(
            f"the gates of block {place[0]}, head {place[1]} are not finite: the router is damaged; load another one"
        )
    route = g.argmax(-1).astype(np.int8)
    route[g.max(-1) < tau] = BRANCHES.index("full")
    return route


def make(
    router: dict[str, Any],
    params: dict[str, Any],
    cfg: Config,
    t: Any,
    *,
    model: str,
    tau: float = TAU,
    without: Sequence[str] = (),
    timeless: bool = False,
    static: bool = False,
) -> Routes:
    """The table of a sampler's times t (steps,). static: the gates' mean over t decides for all of them.

    UserError for a tau that would move heads to a branch that is left out.
    """
    t = _times(t)
    if "full" in without and tau > 0.5:  # the largest of two shares is at least a half
        raise UserError(f"tau={tau} moves heads to full attention, which is left out; use 0 to 0.5")
    g = gates(
        router,
        video_dit.time_embedding(params, cfg, jnp.asarray(t)),
        without=without,
        timeless=timeless,
    )
    g = np.asarray(g)
    if static:
        g = np.broadcast_to(g.mean(0), g.shape)
    return Routes(choose(g, tau=tau), t, model)


def _times(t):
    t = np.asarray(t, np.float32)
    if t.ndim != 1 or not t.size:
        raise UserError(f"times of shape {t.shape}: give one row of them, one a step")
    if not ((t >= 0) & (t <= 1000)).all():  # also where nan
        raise UserError(f"t is {t.tolist()}: times lie in 0 .. 1000")
    return t


def fraction(table: np.ndarray, flops: Sequence[float]) -> float:
    """Work of the table's attention as a share of full attention; flops: of each branch, `VideoGrid.flops`."""
    return float(np.asarray(flops, np.float64)[table].mean())


def fits(routes: Routes, cfg: Config, t: Any) -> None:
    """UserError where a table is not for this model or not for these times."""
    shape = routes.table.shape[1:]
    if shape != (cfg.layers, cfg.heads):
        raise UserError(
            f"routes are for {shape[0]} blocks of {shape[1]} heads, the model has {cfg.layers} of {cfg.heads}"
        )
    t = np.asarray(t, np.float32)
    if routes.t.shape != t.shape or not np.allclose(routes.t, t, atol=1e-2):
        raise UserError(
            f"routes are for {len(routes.t)} steps from t = {routes.t[0]:g}, the sampler takes {len(t)} from "
            f"{t[0]:g}: make them for its times"
        )


# --- tables to compare with ---------------------------------------------------------------------


def uniform(routes: Routes, branch: str) -> Routes:
    """All heads of all steps by one branch."""
    return routes._replace(table=np.full_like(routes.table, _number(branch)))


def _number(branch: str) -> int:
    if branch not in BRANCHES:
        raise UserError(f"branch={branch!r} is not one of {', '.join(BRANCHES)}")
    return BRANCHES.index(branch)


def random(
    routes: Routes,
    *,
    seed: int,
    rest: Sequence[str] = ("coreset", "sliding"),
    flops: Sequence[float] | None = None,
    cost: float | None = None,
) -> Routes:
    """As many full heads as in `routes`, at random places; each other head takes one of `rest`, at random.

    With flops (of each branch) the number of full heads is the one that costs as much as `routes`, or `cost` where that
    is given; UserError where none comes within 2 %.
    """
    rng = np.random.default_rng(seed)
    size = routes.table.size
    numbers = np.array([_number(name) for name in rest], np.int8)
    table = rng.choice(numbers, size)
    order = rng.permutation(size)
    full = BRANCHES.index("full")
    if flops is None:
        n = int((routes.table == full).sum())
    else:
        wanted = fraction(routes.table, flops) if cost is None else cost
        each = np.asarray(flops, np.float64)
        more = np.cumsum(each[full] - each[table[order]]) / size
        found = fraction(table, flops) + np.concatenate([[0.0], more])
        n = int(np.abs(found - wanted).argmin())
        _equal(found[n], wanted, (found[0], found[-1]), ", ".join(rest))
    table[order[:n]] = full
    return routes._replace(table=table.reshape(routes.table.shape))


def _equal(found, wanted, between, names):
    if abs(found - wanted) > EQUAL * wanted:
        raise UserError(
            f"heads of {names} cost {between[0]:.3g} to {between[1]:.3g} of full attention, not {wanted:.3g} within "
            f"{EQUAL:.0%}; compare at another share"
        )


def searched(
    routes: Routes, errors: Any, *, flops: Sequence[float], cost: float | None = None
) -> Routes:
    """The table of least error at the cost of `routes`, or at `cost`: the branches that minimise error + price x FLOPs.

    errors: (steps, layers, heads, 3), of each branch against full attention (search.py). flops: of each branch. The
    price is the lowest at which the table is no dearer; heads that change just there fill what is left. UserError where
    no table comes within 2 %.
    """
    errors, each = np.asarray(errors, np.float64), np.asarray(flops, np.float64)
    if errors.shape != (*routes.table.shape, len(BRANCHES)) or not np.isfinite(errors).all():
        raise UserError(
            f"errors of shape {errors.shape} for routes {routes.table.shape}: finite numbers, one a branch and head"
        )
    wanted = fraction(routes.table, flops) if cost is None else cost
    best = lambda price: (errors + price * each).argmin(-1).astype(np.int8)
    gaps = np.abs(np.subtract.outer(each, each))
    low, high = 0.0, 1 + 2 * errors.max() / gaps[gaps > 0].min(initial=np.inf)
    for _ in range(60):  # halvings: down to what float64 tells apart
        middle = (low + high) / 2
        low, high = (low, middle) if fraction(best(middle), flops) <= wanted else (middle, high)
    table, dearer = best(high).ravel(), best(low).ravel()
    room = (wanted * (1 + 1e-9) - fraction(table, flops)) * table.size
    for head in np.flatnonzero(table != dearer):
        more = each[dearer[head]] - each[table[head]]
        if more <= room:
            table[head], room = dearer[head], room - more
    _equal(fraction(table, flops), wanted, (each.min(), each.max()), "the best branches")
    return routes._replace(table=table.reshape(routes.table.shape))


# --- files --------------------------------------------------------------------------------------


def save(path: Any, routes: Routes) -> None:
    """Write a table as JSON: a line of digits for each block of each step."""
    _check(routes)
    lines = [["".join(map(str, row)) for row in step] for step in routes.table.tolist()]
    values = (FORMAT, VERSION, routes.model, list(BRANCHES), routes.t.tolist(), lines)
    write_json(path, dict(zip(KEYS, values)))


def _check(routes):
    table = routes.table
    if table.ndim != 3 or not table.size or table.min() < 0 or table.max() >= len(BRANCHES):
        raise UserError(
            f"a table of shape {table.shape}: (steps, layers, heads) of 0 to {len(BRANCHES) - 1}"
        )
    if len(_times(routes.t)) != len(table):
        raise UserError(f"{len(table)} steps of routes, {len(routes.t)} times: one a step")


def load(path: Any) -> Routes:
    """The table of a file; UserError that names the file and what is wrong with it."""
    found = read_json(path)
    wrong = lambda text: UserError(f"{Path(path)}: {text}; write it with routes.save")
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise wrong(f"it is no route table ({FORMAT})")
    if found.get("version") != VERSION:
        raise wrong(f"its version is {found.get('version')!r:.40}, this program reads {VERSION}")
    if set(found) != set(KEYS):
        missing, more = sorted(set(KEYS) - set(found)), sorted(set(found) - set(KEYS))
        raise wrong(f"missing: {', '.join(missing) or 'none'}, unexpected: {', '.join(more)[:80]}")
    if found["branches"] != list(BRANCHES):
        raise wrong(f"its branches are {found['branches']!r:.80}, ours {', '.join(BRANCHES)}")
    if not isinstance(found["model"], str):
        raise wrong("model is no text")
    t = found["t"]
    if not (isinstance(t, list) and t and all(_is_time(x) for x in t)):
        raise wrong("t is no list of times in 0 .. 1000")
    steps = found["routes"]
    digits = {str(j) for j in range(len(BRANCHES))}
    rows = (
        [row for step in steps for row in step]
        if isinstance(steps, list) and all(isinstance(step, list) and step for step in steps)
        else []
    )
    if not rows or not all(isinstance(row, str) and row and set(row) <= digits for row in rows):
        raise wrong(f"routes are no lines of 0 to {len(BRANCHES) - 1}, one a block and step")
    if len({len(step) for step in steps}) > 1 or len({len(row) for row in rows}) > 1:
        raise wrong("its steps differ in blocks or heads")
    if len(steps) != len(t):
        raise wrong(f"it has {len(steps)} steps and {len(t)} times")
    table = np.array([[[int(c) for c in row] for row in step] for step in steps], np.int8)
    return Routes(table, np.array(t, np.float32), found["model"])


def _is_time(x):
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= 1000
