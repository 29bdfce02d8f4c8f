"""The video diffusion transformers, HunyuanVideo and Wan 2.1, behind one set of functions.

    params = init(key, cfg)
    velocity = apply(params, cfg, latents, t, Condition(text, ...), attend=full)

The kind of `cfg` says which model it is. How the tokens attend is the caller's: `attend(q, k, v, layer, aux)`, in
video_parts. A router on the time alone takes `time_embedding(params, cfg, t)`.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxrepro.models import hunyuan_video, wan
from jaxrepro.models import params as declarations
from jaxrepro.models.hunyuan_video import HunyuanVideoConfig
from jaxrepro.models.params import initialise, shapes
from jaxrepro.models.video_parts import Around, Attend, Aux, Condition, Layout, compute, full
from jaxrepro.models.wan import WanConfig

__all__ = ["Around", "Attend", "Aux", "Condition", "Layout", "compute", "full"]

Config = HunyuanVideoConfig | WanConfig
PRESETS: dict[str, Config] = {
    "hunyuan": HunyuanVideoConfig(),
    "wan_14b": WanConfig(),
    "wan_1_3b": WanConfig(heads=12, layers=30, ffn=8960),
    "hunyuan_tiny": HunyuanVideoConfig(
        heads=2,
        head_dim=16,
        double=2,
        single=2,
        refiner=1,
        ffn=64,
        channels=4,
        out_channels=4,
        text=12,
        pooled=8,
        rope=(4, 6, 6),
        frequencies=32,
    ),
    "wan_tiny": WanConfig(
        heads=2, head_dim=16, layers=2, ffn=64, channels=4, out_channels=4, text=12, frequencies=32
    ),
}


def module(cfg: Config) -> ModuleType:
    """The module of a config's model."""
    return hunyuan_video if isinstance(cfg, HunyuanVideoConfig) else wan


def declare(cfg: Config) -> dict[str, Any]:
    """One Param per tensor; the blocks of a kind are stacked."""
    return module(cfg).declare(cfg)


def init(key: PRNGKeyArray, cfg: Config) -> dict[str, Any]:
    """Random float32 parameters."""
    return initialise(key, declare(cfg))


def abstract(cfg: Config) -> dict[str, Any]:
    """The tree of ShapeDtypeStruct that `init` returns; allocates nothing."""
    return shapes(declare(cfg))


def axes(cfg: Config) -> dict[str, Any]:
    """The tree of tuples of logical axis names, one name per dimension."""
    return jax.tree.map(lambda p: p.axes, declare(cfg))


def count(cfg: Config) -> int:
    """Number of parameters."""
    return declarations.count(declare(cfg))


def time_embedding(params: dict, cfg: Config, t: Float[Array, "b"]) -> Float[Array, "b d"]:
    """The embedding of time t in 0 .. 1000 alone, before text and guidance are added; float32."""
    return module(cfg).time_embedding(params, cfg, t)


def apply(
    params: dict,
    cfg: Config,
    latents: Float[Array, "b c frames rows columns"],
    t: Float[Array, "b"],
    condition: Condition,
    *,
    attend: Attend = full,
    layout: Layout | None = None,
    collect: Callable[[Array, Array | None, Array], Any] | None = None,
    around: Around | None = None,
    state: Any = None,
) -> Float[Array, "b c2 frames rows columns"] | tuple[Array, Any] | tuple[Array, Any, Any]:
    """The velocity (float32) of noisy latents at time t.

    attend(q, k, v, layer, aux): how tokens see each other (default: all of them).
    layout: the order of video tokens that it wants.
    collect(video, text, layer): called behind each block; its results come second, stacked over the blocks.
    around(module, layer, state): called for each attention module; what it makes of `state` comes last.
    """
    model = module(cfg)
    return model.apply(
        params,
        cfg,
        latents,
        t,
        condition,
        attend=attend,
        layout=layout,
        collect=collect,
        around=around,
        state=state,
    )
