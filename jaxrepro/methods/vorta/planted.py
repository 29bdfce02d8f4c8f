"""Heads whose right branch is known by construction: does the router of VORTA (arXiv:2505.18809) find it?

Seven heads on a grid of 8 x 12 x 12 tokens, with features F_s(p) = sqrt(2/64) cos(p W + phi), W ~ N(0, 1)/s, so that
F_s(p) F_s(p') is about exp(-|p - p'|^2 / 2 s^2):

    local    q = k = sqrt(12) F_1(place)                                       sliding is right
    smooth   q = sqrt(12) F_0.7(bucket), k = sqrt(12) F_0.7(bucket + half the grid), one v a bucket: coreset is right
    fine     k = sqrt(14) random unit vectors, q = k in another order          full is right
    switch   smooth above t = 500, local below                                 coreset, then sliding

The first three are planted twice. Nothing but the routers is trained, on 20 L_last + reg L_reg, both means over heads:
100 steps of AdamW at 1e-2. With gates that add up to 1, the error of a mixture is a quadratic form of the 3 x 3 Gram
matrix of the branches' errors, mean_tokens (sum_j g_j (f_j - f_full))^2 = g' G g, so a run takes less than a second.
`mixture_loss` is the same loss by the attention itself, as in training.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrepro.config import UserError
from jaxrepro.methods.vorta import objective, router, setting
from jaxrepro.methods.vorta.objective import Terms
from jaxrepro.models.params import initialise
from jaxrepro.models.video_parts import Aux, sinusoid
from jaxrepro.ops import routed
from jaxrepro.ops.routed import Branch
from jaxrepro.ops.video_grid import VideoGrid
from jaxrepro.train.state import init_state
from jaxrepro.train.step import make_step

GRID = VideoGrid((8, 12, 12), (2, 3, 3), window=(3, 3, 3), bucket=(2, 2, 2), rate=0.5)
FEATURES, VALUES, WIDTH = 64, 16, 96  # of q and k; of v; of the time's sinusoid
SWITCH = 500.0  # t at which the last head changes
HEADS = 7
CHECKED = (900.0, 700.0, 300.0, 100.0)  # times at which routes are checked


class Heads(NamedTuple):
    """q, k, v (1, S, 8, 64) in the layout of GRID: two local, two smooth, two fine, the switch above and below."""

    q: Any
    k: Any
    v: Any


def heads(seed: int, grid: VideoGrid = GRID) -> Heads:
    """The planted heads of a seed; v has zeros behind its `VALUES` numbers."""
    rng = np.random.default_rng(seed)
    place = np.indices(grid.size).reshape(3, -1).T
    side = np.array(grid.size) // grid.bucket
    bucket = place // grid.bucket

    def features(*points: np.ndarray, scale: float) -> list[np.ndarray]:
        w = rng.normal(size=(3, FEATURES)) / scale
        phase = rng.uniform(0, 2 * np.pi, FEATURES)
        return [math.sqrt(24 / FEATURES) * np.cos(p @ w + phase) for p in points]

    def local():
        (x,) = features(place, scale=1.0)
        return x, x, rng.normal(size=(len(place), VALUES))

    def smooth():
        q, k = features(bucket, (bucket + side // 2) % side, scale=0.7)
        rows = rng.normal(size=(math.prod(side), VALUES))
        return q, k, rows[np.ravel_multi_index(bucket.T, side)]

    def fine():
        x = rng.normal(size=(len(place), FEATURES))
        x *= math.sqrt(14) / np.linalg.norm(x, axis=1, keepdims=True)
        return x[rng.permutation(len(x))], x, rng.normal(size=(len(place), VALUES))

    kinds = (local, local, smooth, smooth, fine, fine, smooth, local)
    q, k, v = (np.stack(x, 1)[grid.order] for x in zip(*(kind() for kind in kinds)))
    v = np.pad(v, ((0, 0), (0, 0), (0, FEATURES - VALUES)))
    q = q * math.sqrt(FEATURES)  # attention divides by it; the logits are to be q k
    return Heads(*(jnp.asarray(x[None], jnp.float32) for x in (q, k, v)))


@jax.jit
def gram(planted: Heads) -> Float[Array, "h 3 3"]:
    """Mean products of the branches' errors against full attention, for each of the eight heads."""
    o = [f(*planted, GRID)[0, ..., :VALUES] for f in routed.BRANCHES]
    e = jnp.stack([x - o[0] for x in o])  # (3, s, h, values)
    return jnp.einsum("nshi,mshi->hnm", e, e) / (e.shape[1] * VALUES)


def _at(x: Float[Array, "h ..."], t: Float[Array, "b"]) -> Float[Array, "b h2 ..."]:
    """What the seven heads are at each time, of what the eight are."""
    early = (t > SWITCH).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.concatenate(
        [jnp.broadcast_to(x[:6], (len(t), *x[:6].shape)), jnp.where(early, x[6], x[7])[:, None]],
        axis=1,
    )


def _gates(params: Any, t: Float[Array, "b"], silu: bool = True) -> Float[Array, "b 1 h 3"]:
    return router.gates(params, sinusoid(t, WIDTH)[:, 0], silu=silu)


def _total(g, last, t, reg):
    """(loss_sum, weight_sum, aux) of the distillation errors `last` (b,)."""
    terms = Terms(jnp.zeros_like(t), last, objective.regulariser(g), jnp.zeros_like(t))
    each = objective.combine(terms, t, diff=0.0, reg=reg)
    return each.sum(), jnp.asarray(len(t), jnp.float32), {"last": last.sum()}


def gram_loss(
    params: dict[str, Array],
    batch: dict[str, Array],
    *,
    reg: float | Float[Array, ""],
    silu: bool = True,
) -> tuple[Array, Array, dict[str, Array]]:
    """20 L_last + reg L_reg from {"t" (b,), "gram" (b, 7, 3, 3)}."""
    g = _gates(params, batch["t"], silu)
    last = jnp.einsum("bhn,bhnm,bhm->bh", g[:, 0], batch["gram"], g[:, 0]).mean(1)
    return _total(g, last, batch["t"], reg)


def mixture_loss(
    params: dict[str, Array],
    batch: dict[str, Array],
    *,
    reg: float | Float[Array, ""],
    silu: bool = True,
) -> tuple[Array, Array, dict[str, Array]]:
    """The same from {"t" (b,), "q", "k", "v" (b, S, 7, 64)}, by soft and full attention."""
    g = _gates(params, batch["t"], silu)
    qkv = batch["q"], batch["k"], batch["v"]
    mixed = objective.soft(g, GRID)(*qkv, 0, Aux(GRID.size, 0))
    error = (mixed - jax.lax.stop_gradient(routed.full(*qkv, GRID)))[..., :VALUES]
    return _total(g, jnp.square(error).mean((1, 2, 3)), batch["t"], reg)


def gram_batch(key: PRNGKeyArray, grams: Float[Array, "h 3 3"], n: int) -> dict[str, Array]:
    """n times of one interval, and the Gram matrices of the seven heads there."""
    t = objective.timesteps(key, n)
    return {"t": t, "gram": _at(grams, t)}


def mixture_batch(key: PRNGKeyArray, planted: Heads, n: int) -> dict[str, Array]:
    """The same times, and the seven heads themselves."""
    t = objective.timesteps(key, n)
    rows = {k: _at(jnp.moveaxis(x[0], 1, 0), t) for k, x in planted._asdict().items()}
    return {"t": t} | {k: jnp.moveaxis(x, 2, 1) for k, x in rows.items()}


@partial(jax.jit, static_argnames=("steps", "mixture", "silu"))
def train(
    key: PRNGKeyArray,
    of: Heads | Float[Array, "h 3 3"],
    reg: float | Float[Array, ""],
    *,
    steps: int = 100,
    mixture: bool = False,
    silu: bool = True,
) -> dict[str, Array]:
    """Routers after `steps` steps on 4 times each, from the Gram matrices, or (mixture) from the heads.

    silu: see `router.gates`; without it a router is linear in the sinusoid.
    """
    loss, batch = (mixture_loss, mixture_batch) if mixture else (gram_loss, gram_batch)
    begin, draw = jax.random.split(key)
    rule = setting.optimizer()
    params = initialise(begin, router.declare_sizes(1, WIDTH, HEADS))
    step = make_step(partial(loss, reg=reg, silu=silu), rule, max_grad_norm=1.0)
    state, _ = jax.lax.scan(
        lambda state, i: (step(state, batch(jax.random.fold_in(draw, i), of, 4))[0], None),
        init_state(params, rule),
        jnp.arange(steps),
    )
    return state.params


def chosen(params: dict[str, Array], *, silu: bool = True) -> Int[Array, "n h"]:
    """The branch of each head at the times `CHECKED`."""
    return _gates(params, jnp.array(CHECKED), silu)[:, 0].argmax(-1)


def right() -> Int[Array, "n h"]:
    """The branch that was planted, likewise."""
    still = [Branch.sliding] * 2 + [Branch.coreset] * 2 + [Branch.full] * 2
    rows = [[*still, Branch.coreset if t > SWITCH else Branch.sliding] for t in CHECKED]
    return jnp.array(rows, jnp.int32)


def recovered(params: dict[str, Array], *, silu: bool = True) -> Bool[Array, "n h"]:
    """Whether each head took its branch, at each of the times `CHECKED`."""
    return chosen(params, silu=silu) == right()


def study(seeds: int = 5, *, first: int = 0) -> dict[str, float]:
    """Shares of seeds, first, first + 1, ..., in which routes are found; of heads, where nothing pays for sparseness.

    static: all six heads at the paper's weights, 0.02 beside 20. switch: all seven at 1 beside 20; switch_half: at 0.5,
    where some seeds still have the last head at full for some time. paper_switch: the last head alone at the paper's
    weights. drift: the mean share of the six at weight 0, where all go to full attention, which has no error.
    """
    if seeds < 1 or first < 0:
        raise UserError(f"{seeds} seeds from {first} on: use 1 or more, from 0 or more")
    which = range(first, first + seeds)
    grams = jnp.stack([gram(heads(seed)) for seed in which])
    keys = jnp.stack([jax.random.key(seed) for seed in which])

    @jax.vmap
    def found(key, grams, reg):
        return recovered(train(key, grams, reg))

    at = lambda reg: np.asarray(found(keys, grams, jnp.full(seeds, reg)))  # (seeds, times, heads)
    paper, half, strong, none = at(0.02), at(0.5), at(1.0), at(0.0)
    return {
        "planted/static": float(paper[..., :6].all((1, 2)).mean()),
        "planted/switch": float(strong.all((1, 2)).mean()),
        "planted/switch_half": float(half.all((1, 2)).mean()),
        "planted/paper_switch": float(paper[..., 6].all(1).mean()),
        "planted/drift": float(none[..., :6].mean()),
    }
