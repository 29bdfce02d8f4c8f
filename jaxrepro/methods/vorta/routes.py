"""Route tables of VORTA, arXiv:2505.18809 (v2): which branch each head takes in each step, known before sampling.

    route[s, l, h] = argmax_j g(t_s)[l, h, j],    0 (full) where max_j g < tau

Gates depend on the time alone, so a sampler's times give the whole table, and the table is data: one program runs all
steps, and a table can be saved, read and replaced by another one. tau = 0.3 is the official default and does nothing,
since the largest of three shares is at least 1/3; above that it is a knob: more full heads, nearer to the dense model.
Heads that are kept are not scaled by their gate.

The other tables here are what a router is compared with: one branch everywhere, full heads at random places, one route
for all times, and the best table for given errors of each branch (how sliding-tile attention picks windows a head
without training, arXiv:2502.04507; how many full heads it may take is ours).
"""

import math
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
    """The table of a sampler's times t (steps,). static: the gates' mean over t decides for all of them."""
    t = _times(t)
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

    With flops (of each branch) the number of full heads is the one that costs as much as `routes`, or `cost` where it is
    given; UserError where none comes within 2 %.
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
        if abs(found[n] - wanted) > EQUAL * wanted:
            raise UserError(
                f"heads of {', '.join(rest)} cost {found[0]:.3g} to {found[-1]:.3g} of full attention, not {wanted:.3g} "
                f"within {EQUAL:.0%}; compare at another share"
            )
    table[order[:n]] = full
    return routes._replace(table=table.reshape(routes.table.shape))


def searched(routes: Routes, errors: Any, *, full: int | None = None) -> Routes:
    """The table of least error: each head's best branch but full, and full where that saves most.

    errors: (steps, layers, heads, 3), of each branch against full attention, measured beforehand. full: how many
    heads may be full (None: as many as in `routes`).
    """
    errors = np.asarray(errors, np.float64)
    if errors.shape != (*routes.table.shape, len(BRANCHES)) or not np.isfinite(errors).all():
        raise UserError(
            f"errors of shape {errors.shape} for routes {routes.table.shape}: finite numbers, one a branch and head"
        )
    dense = BRANCHES.index("full")
    sparse = errors.copy()
    sparse[..., dense] = np.inf
    table = sparse.argmin(-1).astype(np.int8).ravel()
    saved = (sparse.min(-1) - errors[..., dense]).ravel()
    n = int((routes.table == dense).sum()) if full is None else full
    table[np.argsort(-saved, kind="stable")[:n]] = dense
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


def describe(routes: Routes, flops: Sequence[float] | None = None) -> str:
    """Lines of text: sizes, each branch's share, its shares in the first and last third of the steps, FLOPs."""
    _check(routes)
    steps, layers, heads = routes.table.shape
    third = max(math.ceil(steps / 3), 1)
    share = lambda table, j: f"{(table == j).mean():.1%}"
    lines = [
        f"{routes.model}: {steps} steps (t {routes.t[0]:g} to {routes.t[-1]:g}), {layers} blocks, {heads} heads"
    ]
    for j, name in enumerate(BRANCHES):
        first, last = share(routes.table[:third], j), share(routes.table[-third:], j)
        lines.append(f"  {name:8}{share(routes.table, j):>7}  (early {first}, late {last})")
    if flops is not None:
        lines.append(f"  attention FLOPs: {fraction(routes.table, flops):.3f} of full")
    return "\n".join(lines)
