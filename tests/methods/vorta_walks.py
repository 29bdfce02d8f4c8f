"""Helper: tiny video models with everything that a sampling of VORTA needs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro.models import video_dit
from jaxrepro.models.video_dit import Condition
from jaxrepro.models.wan import WanConfig
from jaxrepro.ops.video_grid import VideoGrid

# one block of a kind: every further one is compiled again
WAN = replace(video_dit.PRESETS["wan_tiny"], layers=1, ffn=8)
HUNYUAN = replace(video_dit.PRESETS["hunyuan_tiny"], double=1, single=1, ffn=8)
GRID = VideoGrid((4, 2, 2), tile=(1, 2, 2), window=(1, 1, 1), bucket=(2, 2, 1))
SLOTS = 3


def drawn(cfg):
    """Parameters with biases and norms that show."""
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape) + (len(x.shape) == 1), x.dtype)
    return jax.tree.map(draw, video_dit.abstract(cfg))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def noise(b, seed=1):
    """Latents of GRID."""
    return normal(seed, b, 4, 4, 4, 4)


def condition(cfg, b, seed=2):
    """Of HunyuanVideo the first row has two valid text tokens, the others three."""
    text = Condition(normal(seed, b, SLOTS, 12))
    if isinstance(cfg, WanConfig):
        return text
    return text._replace(
        length=jnp.array([2, 3, 3][:b]), pooled=normal(3, b, 8), guidance=jnp.full(b, 6000.0)
    )


def tokens(cfg):
    """What attention sees of a video."""
    return GRID.length + (0 if isinstance(cfg, WanConfig) else SLOTS)
