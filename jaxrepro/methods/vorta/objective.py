"""VORTA: Efficient Video Diffusion via Routing Sparse Attention, arXiv:2505.18809 (v2): the loss of the routers.

A frozen flow-matching model v with clean latents x_0, noise n, sigma = t / 1000 and x_t = (1 - sigma) x_0 + sigma n
runs twice: densely, v_ref, and with every head's attention a mixture of its branches f_j, v_mix,

    o_h    = sum_j g_hj f_j(q_h, k_h, v_h),    g = gates(t)                    `soft`, router.py

    L_diff = mean (v_mix - (n - x_0))^2                                        `diffusion_error`
    L_last = mean (v_mix - v_ref)^2                                            distillation, weight 20
    L_reg  = sum over blocks, mean over heads of g_full^2                      `regulariser`, weight 0.02
    L_hid  = sum over blocks of mean (x_mix - x_ref)^2 behind the block        weight 0
    L      = w_d L_diff + w_r L_reg + w_l L_last + w_h L_hid                   `combine`
    t < 200:  w_d = 0,  w_l and w_h times 1 + 1 / (how many of the two are on)

Only the routers learn. The gradient of L_last crosses the blocks through v_mix; nothing flows into v_ref, which starts
from the same patch embeddings, and those depend on no router. Weights, sum over blocks and the rule below t = 200 are
those of the official code.

Times come from one of five intervals an optimiser step, `timesteps`: u = (u_i + j) / 5 with one j for the step and
u_i for each video, t = 1000 - min(floor(1000 u), 999).

Differs from the official code: L_hid has its own weight (there it is multiplied by itself); u = 1 gives t = 1 (there an
index beyond the end); each video has its own time, gates and rule below t = 200 (there those of the first one serve
all); L_hid reads video tokens, whether text counted is unknown (inferred). L_last is a mean over velocities, which are
the projected patches in another order.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxrepro.config import UserError
from jaxrepro.methods.vorta.router import BRANCHES, gates
from jaxrepro.methods.vorta.router import branches as branches_of
from jaxrepro.methods.vorta.ulysses import spread
from jaxrepro.models import video_dit
from jaxrepro.models.video_dit import Attend, Condition, Config
from jaxrepro.ops import routed
from jaxrepro.ops.video_grid import VideoGrid

TIMES = 1000  # t of pure noise
TARGETS = ("velocity", "x0")


class Batch(NamedTuple):
    """Videos at their times; every leaf leads with the video."""

    latents: Any  # (b, c, f, h, w), clean
    noise: Any  # (b, c, f, h, w), standard normal
    t: Any  # (b,) in 0 .. 1000
    condition: Condition


class Terms(NamedTuple):
    """The terms of the loss of each video, before their weights."""

    diffusion: Float[Array, "b"]
    last: Float[Array, "b"]
    reg: Float[Array, "b"]
    hidden: Float[Array, "b"]


def timesteps(key: PRNGKeyArray, n: int, *, intervals: int = 5) -> Float[Array, "n"]:
    """Times 1 .. 1000 of the n videos of an optimiser step, all from one interval. intervals: 1 = all times."""
    if n < 1 or intervals < 1:
        raise UserError(f"{n} times from {intervals} intervals: both must be 1 or more")
    which, where = jax.random.split(key)
    j = jax.random.randint(which, (), 0, intervals)
    return time_of((jax.random.uniform(where, (n,)) + j) / intervals)


def time_of(u: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The time at the share u in [0, 1] of the way from noise to video, a whole number from 1000 down to 1."""
    return TIMES - jnp.minimum(jnp.floor(TIMES * u), TIMES - 1)


def noisy(batch: Batch) -> Float[Array, "b c f h w"]:
    """x_t of the batch."""
    sigma = _sigma(batch)
    return (1 - sigma) * batch.latents + sigma * batch.noise


def _sigma(batch):
    return batch.t[:, None, None, None, None] / TIMES


def _mean(x):
    """Mean over all but the first axis."""
    return x.mean(tuple(range(1, x.ndim)))


def diffusion_error(
    velocity: Float[Array, "b c f h w"], batch: Batch, *, target: str = "velocity"
) -> Float[Array, "b"]:
    """Mean squared error of each video against n - x_0, or of x_t - sigma v against x_0."""
    if target == "velocity":
        return _mean(jnp.square(velocity - (batch.noise - batch.latents)))
    if target == "x0":
        return _mean(jnp.square(noisy(batch) - _sigma(batch) * velocity - batch.latents))
    raise UserError(f"target={target!r} is not one of {', '.join(TARGETS)}")


def regulariser(g: Float[Array, "b l h n"], *, power: int = 2) -> Float[Array, "b"]:
    """Gates of full attention, squared (power 1: as they are): a mean over heads, a sum over blocks."""
    if power not in (1, 2):
        raise UserError(f"power={power}: the gates' penalty is of power 1 or 2")
    return (g[..., BRANCHES.index("full")] ** power).mean(2).sum(1)


def combine(
    terms: Terms,
    t: Float[Array, "b"],
    *,
    diff: float = 1.0,
    reg: float | Float[Array, ""] = 0.02,
    last: float = 20.0,
    hidden: float = 0.0,
    rebalance: float = 200.0,
) -> Float[Array, "b"]:
    """L of each video. Below t = `rebalance` (0: nowhere) the diffusion loss hands its weight to the other two.

    Where there is none to take it (last = hidden = 0) the diffusion loss keeps it.
    """
    shares = jnp.ones_like(t), jnp.ones_like(t)
    on = (last > 0) + (hidden > 0)
    if diff > 0 and on:
        late = t < rebalance
        shares = jnp.where(late, 0.0, 1.0), jnp.where(late, 1 + 1 / on, 1.0)
    own, other = shares
    kept = last * terms.last + hidden * terms.hidden
    return own * diff * terms.diffusion + reg * terms.reg + other * kept


def soft(
    g: Float[Array, "b l h n"],
    grid: VideoGrid,
    *,
    branches: tuple[Callable[..., Array], ...] = routed.BRANCHES,
    chunk: int | None = None,
) -> Attend:
    """Attention of a video model as the mixture of branches by the gates of each row and block.

    The model's layout must be `grid`. branches: of `router.branches(cfg)`; Wan's are not these, which are HunyuanVideo's.
    chunk: heads computed at once, and again for the gradient. Heads lie on the devices of the mesh's `sequence` axis
    (ulysses.py), where one is in force.
    """

    by = spread(partial(routed.mix, chunk=chunk, branches=branches))

    def attend(q, k, v, layer, aux):
        return by(q, k, v, g[:, layer], grid, text=aux.length)

    return attend


def dense(grid: VideoGrid) -> Attend:
    """Full attention; where the mesh in force has a `sequence` axis its heads lie on those devices, as in `soft`."""
    by = spread(lambda q, k, v, _, grid, *, text=None: routed.full(q, k, v, grid, text=text))

    def attend(q, k, v, layer, aux):
        return by(q, k, v, jnp.zeros(q.shape[2], jnp.int32), grid, text=aux.length)

    return attend


def loss(
    router: dict[str, Array],
    batch: Batch,
    *,
    params: dict[str, Any],
    cfg: Config,
    grid: VideoGrid,
    branches: tuple[Callable[..., Array], ...] | None = None,
    without: Sequence[str] = (),
    timeless: bool = False,
    chunk: int | None = None,
    target: str = "velocity",
    power: int = 2,
    diff: float = 1.0,
    reg: float = 0.02,
    last: float = 20.0,
    hidden: float = 0.0,
    rebalance: float = 200.0,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Array]]:
    """L summed over the videos, their number, and curves as sums. Pure: jit, grad, vmap it at will.

    params: of the model, frozen. branches: None = `router.branches(cfg)`, as `sampling.sample` has them. without,
    timeless: as in `router.gates`. aux: diffusion, reference_diffusion (of the dense model), last, reg, hidden (where
    it counts), and the gates' means full, coreset, sliding. With `cfg.remat` = "full" a block keeps its input and is
    computed again for the gradient, all branches included.
    """
    params = jax.lax.stop_gradient(params)
    x = noisy(batch)
    g = gates(
        router,
        video_dit.time_embedding(params, cfg, batch.t),
        without=without,
        timeless=timeless,
    )
    velocity = partial(
        video_dit.apply, params, cfg, x, batch.t, batch.condition, layout=grid
    )  # of an attention
    branches = branches_of(cfg) if branches is None else branches
    mixture = soft(g, grid, branches=branches, chunk=chunk)
    apart = jnp.zeros_like(batch.t)
    if hidden > 0:
        reference, states = jax.lax.stop_gradient(
            velocity(attend=dense(grid), collect=lambda video, text, layer: video)
        )

        def difference(video, text, layer):
            gap = video.astype(jnp.float32) - states[layer].astype(jnp.float32)
            return _mean(jnp.square(gap))

        routed_velocity, apart = velocity(attend=mixture, collect=difference)
        apart = apart.sum(0)
    else:
        reference = jax.lax.stop_gradient(velocity(attend=dense(grid)))
        routed_velocity = velocity(attend=mixture)
    terms = Terms(
        diffusion_error(routed_velocity, batch, target=target),
        _mean(jnp.square(routed_velocity - reference)),
        regulariser(g, power=power),
        apart,
    )
    each = combine(
        terms, batch.t, diff=diff, reg=reg, last=last, hidden=hidden, rebalance=rebalance
    )
    aux = {name: getattr(terms, name).sum() for name in ("diffusion", "last", "reg")}
    aux["reference_diffusion"] = diffusion_error(reference, batch, target=target).sum()
    if hidden > 0:
        aux["hidden"] = apart.sum()
    aux |= {name: g[..., j].mean((1, 2)).sum() for j, name in enumerate(BRANCHES)}
    return each.sum(), jnp.asarray(len(batch.t), jnp.float32), aux
