"""The router of VORTA, arXiv:2505.18809 (v2): how each head attends, from the time alone.

    g = softmax(reshape(silu(e) W + b, (h, 3)))            one linear layer a block; e = e(t) (b, d)

e is the model's time embedding before text and guidance are added (`video_dit.time_embedding`), so that g depends
on neither content, prompt, block input nor side of the guidance: the routes of a whole sampling are known before it
starts (routes.py).

Differs from the paper: it prints softmax(t W) in the order full, sliding, coreset. SiLU, bias and the order full,
coreset, sliding are those of the official code and its weights. Routers are float32 whatever the model is: their
numbers are about 0.02, steps of 1e-2 become smaller than what bfloat16 resolves there.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxrepro.config import UserError
from jaxrepro.models import params as declarations
from jaxrepro.models.params import Param
from jaxrepro.models.video_dit import Config
from jaxrepro.models.wan import WanConfig
from jaxrepro.ops import coreset, routed, sliding

BRANCHES = tuple(branch.name for branch in routed.Branch)  # full, coreset, sliding
COARSE: dict[str, Callable[..., Array]] = {  # what may take the place of coreset attention
    "coreset": coreset.coreset,
    "merge": coreset.merge,
    "average_frames": partial(coreset.average, cell=(2, 1, 1)),
    "average_height": partial(coreset.average, cell=(1, 2, 1)),
    "average_width": partial(coreset.average, cell=(1, 1, 2)),
}


def declare_sizes(layers: int, d: int, heads: int) -> dict[str, Param]:
    """One linear layer a block, drawn as torch draws one: uniform within 1 / sqrt(d), the bias too."""
    shape, axes = (heads, len(BRANCHES)), ("heads", "norm")
    std = (3 * d) ** -0.5  # of a uniform number within 1 / sqrt(d)
    return {
        "kernel": Param((layers, d, *shape), ("layers", "norm", *axes), std, uniform=True),
        "bias": Param((layers, *shape), ("layers", *axes), std, uniform=True),
    }


def declare(cfg: Config) -> dict[str, Param]:
    """The routers of a model: {"kernel": (l, d, h, 3), "bias": (l, h, 3)}."""
    return declare_sizes(cfg.layers, cfg.d, cfg.heads)


def init(key: PRNGKeyArray, cfg: Config) -> dict[str, Array]:
    """Random float32 routers."""
    return declarations.initialise(key, declare(cfg))


def abstract(cfg: Config) -> dict[str, Any]:
    """The tree of ShapeDtypeStruct that `init` returns."""
    return declarations.shapes(declare(cfg))


def axes(cfg: Config) -> dict[str, Any]:
    """The tree of tuples of logical axis names."""
    return jax.tree.map(lambda p: p.axes, declare(cfg))


def count(cfg: Config) -> int:
    """Number of parameters."""
    return declarations.count(declare(cfg))


def gates(
    router: dict[str, Array],
    embedding: Float[Array, "b d"],
    *,
    without: Sequence[str] = (),
    timeless: bool = False,
    silu: bool = True,
) -> Float[Array, "b l h 3"]:
    """Weights of full, coreset and sliding attention for each row, block and head; float32, they add up to 1.

    without: names of branches that no head may take, their gates are 0. timeless: the bias alone, one route for
    all times (the paper's ablation without the time). silu: False = a linear layer on e itself, as the paper prints it.
    """
    bias = router["bias"].astype(jnp.float32)
    x = embedding.astype(jnp.float32)
    x = jax.nn.silu(x) if silu else x
    if timeless:
        logits = jnp.broadcast_to(bias, (len(x), *bias.shape))
    else:
        kernel = router["kernel"].astype(jnp.float32)
        logits = bias + jnp.einsum("bd,ldhn->blhn", x, kernel, precision="highest")
    if len(without):
        logits = jnp.where(_open(without), logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


def _open(without: Sequence[str]) -> np.ndarray:
    """(3,) whether a branch may be taken."""
    if unknown := sorted(set(without) - set(BRANCHES)):
        raise UserError(f"without={unknown}: branches are {', '.join(BRANCHES)}")
    if set(without) == set(BRANCHES):
        raise UserError(f"without={tuple(without)} leaves no branch; keep one at least")
    return np.array([name not in without for name in BRANCHES])


@lru_cache(maxsize=64)
def branches(
    cfg: Config, *, coarse: str = "coreset", shared: bool | None = None, kernel: str = "auto"
) -> tuple[Callable[..., Array], ...]:
    """Full, coarse and sliding attention as `ops.routed` takes them; equal arguments give the same objects.

    coarse: of `COARSE`; all but coreset are comparisons. shared: whether keys follow the match of the queries (None:
    as in the official code, yes for Wan 2.1, no for HunyuanVideo). kernel: of sliding attention, a name of
    `ops.sliding.KERNELS`; UserError where it cannot run.
    """
    if coarse not in COARSE:
        raise UserError(f"coarse={coarse!r} is not one of {', '.join(COARSE)}")
    middle = COARSE[coarse]
    if coarse in ("coreset", "merge"):
        middle = partial(middle, shared=isinstance(cfg, WanConfig) if shared is None else shared)
    return routed.full, middle, sliding.by_kernel(kernel)
