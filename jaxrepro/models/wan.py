"""The text-to-video diffusion transformer of Wan 2.1, arXiv:2503.20314, as its public checkpoints have it.

    e = MLP(sin t),   m = table + Linear(silu(e)) : (6, d),   text = MLP(UMT5 states)
    x += g1 Wo attend(rope(n(Wq y)), rope(n(Wk y)), Wv y),   y = LN(x) (1 + c1) + s1        (s1 c1 g1 s2 c2 g2)
    x += Wo' attention(n(Wq' LN'(x)), n(Wk' text), Wv' text)                                 no gate; LN' has weights
    x += g2 FF(LN(x) (1 + c2) + s2)
    velocity = W (LN(x) (1 + c) + s),   (s, c) = table' + e

n is RMSNorm over all heads together. A block has its own table; Linear(silu(e)) is one for all. Every text
token is read, zero padding too, as in training.

Departure: vectors of conditioning and modulation and sums of the residual stream are float32 whatever `dtype` is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxrepro.config import UserError
from jaxrepro.models.params import Param, stacked
from jaxrepro.models.transformer import REMAT, SHALLOW
from jaxrepro.models.video_parts import (
    ACTIVATION,
    Around,
    Attend,
    Aux,
    Condition,
    Layout,
    add,
    affine,
    arrange,
    check,
    check_input,
    chunks,
    compute,
    full,
    gelu,
    grid_of,
    linear,
    mlp,
    modulate,
    normalise,
    patchify,
    results,
    rope_tables,
    rotate,
    sinusoid,
    two_layers,
    unpatchify,
)
from jaxrepro.ops.attention import attend_prefix
from jaxrepro.sharding import constrain

COUNTS = ("heads", "head_dim", "layers", "ffn", "channels", "out_channels", "text", "frequencies")
CHANNELS = "last"  # inside an output token


@dataclass(frozen=True)
class WanConfig:
    """Sizes and numerics; the defaults are Wan 2.1 14B, 14,288,491,584 parameters.

    text: width of the text encoder's output. positions: the largest grid that a checkpoint was made for, an axis.
    """

    heads: int = 40
    head_dim: int = 128
    layers: int = 40
    ffn: int = 13824
    channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    text: int = 4096
    rope_theta: float = 10_000.0
    positions: int = 1024
    frequencies: int = 256
    eps: float = 1e-6
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        check(self, COUNTS)
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs, make it even")

    @property
    def d(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_dim

    @property
    def rope(self) -> tuple[int, int, int]:
        """Channels of a head that turn with frame, row and column: 44, 42, 42 of 128."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side


def declare(cfg: WanConfig) -> dict[str, Any]:
    """One Param per tensor; the blocks are stacked."""
    d, h, i, f = cfg.d, cfg.heads, cfg.head_dim, cfg.ffn
    p = cfg.patch[0] * cfg.patch[1] * cfg.patch[2]
    across = Param((h, i), ("heads", "head_dim"), "ones")
    attn = {
        **{name: linear((d, h, i), ("embed", "heads", "head_dim")) for name in "qkv"},
        "q_norm": across,
        "k_norm": across,
        "o": linear((h, i, d), ("heads", "head_dim", "embed"), inputs=2),
    }
    layer = {
        "table": Param((6, d), ("norm", "norm"), d**-0.5),
        "attn": attn,
        "cross_norm": {
            "scale": Param((d,), ("norm",), "ones"),
            "bias": Param((d,), ("norm",), "zeros"),
        },
        "cross": attn,
        "fc1": linear((d, f), ("embed", "mlp")),
        "fc2": linear((f, d), ("mlp", "embed")),
    }
    return {
        "patch": linear((cfg.channels * p, d), ("norm", "embed")),
        "time": mlp(cfg.frequencies, d),
        "mod": linear((d, 6, d), ("embed", "norm", "mlp")),
        "text": mlp(cfg.text, d),
        "layers": stacked(layer, cfg.layers),
        "table": Param((2, d), ("norm", "norm"), d**-0.5),
        "out": linear((d, cfg.out_channels * p), ("embed", "norm")),
    }


def time_embedding(params: dict, cfg: WanConfig, t: Float[Array, "b"]) -> Float[Array, "b d"]:
    """The embedding of time t in 0 .. 1000; float32."""
    return two_layers(sinusoid(t, cfg.frequencies), params["time"], jax.nn.silu)[:, 0]


def _norm(x: Float[Array, "b s h i"], weight: Float[Array, "h i"], eps: float) -> Array:
    """RMSNorm over all heads of a token together, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean((-2, -1), keepdims=True) + eps)
    return y.astype(x.dtype) * weight.astype(x.dtype)


def _heads(w, cfg, y, source):
    """Queries of y, keys and values of `source`."""
    q = _norm(affine(y, w["q"]), w["q_norm"], cfg.eps)
    k = _norm(affine(source, w["k"]), w["k_norm"], cfg.eps)
    return q, k, affine(source, w["v"])


def _block(x, w, cfg, m, text, cos, sin, see, through):
    """One block, and the state."""
    s_1, c_1, g_1, s_2, c_2, g_2 = chunks(m + w["table"].astype(jnp.float32))

    def module():
        y = modulate(x, s_1, c_1, cfg.eps)
        q, k, v = _heads(w["attn"], cfg, y, y)
        o = see(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return (affine(o, w["attn"]["o"], inputs=2),)

    (o,), state = through(module)
    x = add(x, g_1, o)
    y = normalise(x, cfg.eps) * w["cross_norm"]["scale"] + w["cross_norm"]["bias"]
    o = attend_prefix(*_heads(w["cross"], cfg, y.astype(x.dtype), text))
    x = checkpoint_name(x + affine(o, w["cross"]["o"], inputs=2), "mlp_in")
    return add(x, g_2, two_layers(modulate(x, s_2, c_2, cfg.eps), w, gelu)), state


def apply(
    params: dict,
    cfg: WanConfig,
    latents: Float[Array, "b c frames rows columns"],
    t: Float[Array, "b"],
    condition: Condition,
    *,
    attend: Attend = full,
    layout: Layout | None = None,
    collect: Callable[[Array, None, Array], Any] | None = None,
    around: Around | None = None,
    state: Any = None,
) -> Float[Array, "b c2 frames rows columns"] | tuple[Array, Any] | tuple[Array, Any, Any]:
    """The velocity (float32) of noisy latents at time t in 0 .. 1000.

    With `collect(video, None, layer)`, called behind each block, also its results, stacked over all blocks.
    With `around(module, layer, state)`, called for each attention module, at last the state behind all blocks.
    UserError for latents that the patch does not divide, or larger than `positions`, and for a condition that the
    model does not have.
    """
    grid = grid_of(latents.shape, cfg.patch)
    if max(grid) > cfg.positions:
        raise UserError(
            f"latents of {grid} tokens: positions is {cfg.positions}, the most of an axis"
        )
    for name in ("length", "pooled", "guidance"):
        if getattr(condition, name) is not None:
            raise UserError(f"Wan reads no Condition.{name}: leave it None")
    check_input(cfg, latents, t, condition)
    e = time_embedding(params, cfg, t)[:, None]
    m = affine(jax.nn.silu(e), params["mod"])
    text = two_layers(condition.text.astype(cfg.dtype), params["text"], gelu)
    x = affine(patchify(latents, cfg.patch).astype(cfg.dtype), params["patch"])
    x, cos, sin = arrange(x, *rope_tables(grid, cfg.rope, cfg.rope_theta), layout)
    x = constrain(x, *ACTIVATION)
    aux = Aux(grid, 0)

    def block(carry, each):
        (x, state), (w, layer) = carry, each

        def see(q, k, v):
            q, k, v = checkpoint_name((q, k, v), "qkv")
            return checkpoint_name(attend(q, k, v, layer, aux), "attn_out")

        def through(module):
            return (around or compute)(module, layer, state)

        x, state = _block(x, w, cfg, m, text, cos, sin, see, through)
        return (x, state), None if collect is None else collect(x, None, layer)

    if cfg.remat != "none":
        block = jax.checkpoint(block, policy=REMAT[cfg.remat])
    each = (params["layers"], jnp.arange(cfg.layers))
    (x, state), some = jax.lax.scan(block, (x, state), each, unroll=cfg.layers <= SHALLOW)
    if layout is not None:
        x = layout.to_raster(x)
    shift, scale = chunks(e[:, :, None] + params["table"].astype(jnp.float32))
    x = affine(modulate(x, shift, scale, cfg.eps), params["out"]).astype(jnp.float32)
    x = unpatchify(x, grid, cfg.patch, channels=CHANNELS)
    return results(x, collect, some, around, state)
