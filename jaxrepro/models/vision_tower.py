"""The vision tower of Qwen2-VL (arXiv:2409.12191, section 2.1): image patches to language-model features.

    x_0 = patches W                                       one row = one 2 x 14 x 14 x 3 cuboid
    x   = x + proj(attention(rope(qkv(LN x)))),  x = x + fc2(quick_gelu(fc1(LN x)))
    out = fc2(gelu(fc1(concat of 4 neighbouring LN x)))   the merger: a 2 x 2 block becomes one feature

Patches arrive in block order (frame, block row, block column, 2 x 2 inside the block), so that the
convolution of the original is one matmul and the merger one reshape. Rotary angles are two-dimensional:
half of the frequencies turn with the patch's row, half with its column. Attention sees one frame of one
image: the patches of the same segment.

Departure: the original runs a flat list of patches of all images; here rows are padded to one length
(segment 0), so that a batch has a leading axis that splits and shards. Padding attends to padding only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxrepro.config import UserError
from jaxrepro.models.transformer import REMAT, SHALLOW, Param, fan_in, initialise, stacked
from jaxrepro.ops.attention import attend
from jaxrepro.ops.dense import dense

# The tower is a small part of the model: it splits over fsdp and is whole on every tensor rank, so that
# its heads need not divide by what the decoder's heads divide by. "norm" is the name of an unsplit axis.
WHOLE = "norm"
SIZES = ("depth", "embed", "heads", "mlp", "out", "patch", "temporal", "merge", "channels")


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower; `out` is the width of the language model. The defaults are the released ones."""

    depth: int = 32
    embed: int = 1280
    heads: int = 16
    mlp: int = 5120
    out: int = 1536
    patch: int = 14
    temporal: int = 2
    merge: int = 2
    channels: int = 3
    rope_theta: float = 10_000.0
    eps: float = 1e-6
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        for name in SIZES:
            if not getattr(self, name) >= 1:
                raise UserError(
                    f"vision {name} is {getattr(self, name)!r:.60}; it must be at least 1"
                )
        if self.embed % self.heads or (self.embed // self.heads) % 4:
            raise UserError(
                f"vision embed {self.embed} over {self.heads} heads must give a head size divisible by 4 "
                "(two rotary axes); change vision embed or heads"
            )
        if self.remat not in REMAT:
            raise UserError(f"remat {self.remat!r} is unknown: one of {', '.join(REMAT)}")

    @property
    def head_dim(self) -> int:
        return self.embed // self.heads

    @property
    def columns(self) -> int:
        """Numbers in one flattened patch: channels * temporal * patch * patch."""
        return self.channels * self.temporal * self.patch * self.patch


class Vision(NamedTuple):
    """Images of a batch of rows; each row holds its images one after the other, padding at the end."""

    patches: Any  # (b, p, c) float32
    position: Any  # (b, p, 2) int32: row and column of the patch in its image
    segment: Any  # (b, p) int32: 0 = padding, else one id per frame of an image


def grid_positions(grid: Sequence[int], merge: int) -> np.ndarray:
    """Row and column (t*h*w, 2) int32 of each patch of a (t, h, w) grid, in block order. Host only."""
    t, h, w = grid
    at = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), -1)  # (h, w, 2)
    at = at.reshape(h // merge, merge, w // merge, merge, 2).swapaxes(1, 2).reshape(h * w, 2)
    return np.tile(at, (t, 1)).astype(np.int32)


def declare(cfg: VisionConfig) -> dict[str, Any]:
    """Tree of `Param`: the one declaration of every tensor; those of the blocks are stacked."""
    e, h, i, f = cfg.embed, cfg.heads, cfg.head_dim, cfg.mlp
    wide = e * cfg.merge**2
    norm = {"scale": Param((e,), (WHOLE,), "ones"), "bias": Param((e,), (WHOLE,), "zeros")}

    def dense(shape, axes, inputs=1):
        bias = Param(shape[inputs:], axes[inputs:], "zeros")
        return {"kernel": fan_in(shape, axes, inputs), "bias": bias}

    layer = {
        "norm1": norm,
        "qkv": dense((e, 3, h, i), ("embed", WHOLE, WHOLE, "head_dim")),
        "proj": dense((h, i, e), (WHOLE, "head_dim", "embed"), inputs=2),
        "norm2": norm,
        "fc1": dense((e, f), ("embed", WHOLE)),
        "fc2": dense((f, e), (WHOLE, "embed")),
    }
    return {
        "patch": fan_in((cfg.columns, e), (WHOLE, "embed")),
        "layers": stacked(layer, cfg.depth),
        "merger": {
            "norm": norm,
            "fc1": dense((wide, wide), ("embed", WHOLE)),
            "fc2": dense((wide, cfg.out), (WHOLE, "embed")),
        },
    }


def init(key: PRNGKeyArray, cfg: VisionConfig) -> dict[str, Any]:
    """Random float32 parameters."""
    return initialise(key, declare(cfg))


def axes(cfg: VisionConfig) -> dict[str, Any]:
    """Tree of tuples of logical axis names, one per dimension."""
    return jax.tree.map(lambda p: p.axes, declare(cfg))


def layer_norm(x: Float[Array, "*b d"], p: dict[str, Any], eps: float) -> Float[Array, "*b d"]:
    """Layer normalisation over the last axis, computed in float32, returned in the dtype of x."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return (y * p["scale"] + p["bias"]).astype(x.dtype)


def rotary(
    position: Int[Array, "b p 2"], cfg: VisionConfig
) -> tuple[Float[Array, "b p i"], Float[Array, "b p i"]]:
    """Cosine and sine of the two-dimensional rotation, float32: [row | column] angles, repeated twice."""
    n = cfg.head_dim // 2
    inv_freq = 1.0 / cfg.rope_theta ** (jnp.arange(0, n, 2, dtype=jnp.float32) / n)
    angle = position.astype(jnp.float32)[..., None] * inv_freq  # (b, p, 2, n / 2)
    angle = jnp.tile(angle.reshape(*position.shape[:-1], n), 2)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "b p h i"], cos: Float[Array, "b p i"], sin: Float[Array, "b p i"]
) -> Float[Array, "b p h i"]:
    """Turn the pairs (j, j + i/2) of x by the given angles, in float32."""
    y = x.astype(jnp.float32)
    a, b = jnp.split(y, 2, axis=-1)
    turned = jnp.concatenate([-b, a], axis=-1)
    return (y * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)


def apply(params: dict[str, Any], cfg: VisionConfig, vision: Vision) -> Float[Array, "b q d"]:
    """Features (b, p / merge^2, out) in `cfg.dtype`; those of padded patches are finite and mean nothing.

    p must be a multiple of merge^2. Pure: jit, grad, vmap it at will.
    """
    b, p, _ = vision.patches.shape
    if p % cfg.merge**2:
        raise UserError(f"{p} patches in a row: pad to a multiple of merge^2 = {cfg.merge**2}")
    dtype = jnp.dtype(cfg.dtype)
    cos, sin = rotary(vision.position, cfg)
    # Padding forms a segment of its own: no row of the softmax is empty, and no image sees it.
    mask = (vision.segment[:, :, None] == vision.segment[:, None, :])[:, None]  # (b, 1, p, p)

    def affine(x, w, inputs=1):
        return dense(x, w["kernel"], inputs=inputs) + w["bias"].astype(dtype)

    def block(x, w):
        qkv = affine(layer_norm(x, w["norm1"], cfg.eps), w["qkv"])
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        o, _ = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, mask)
        x = x + affine(o.astype(dtype), w["proj"], inputs=2)
        y = affine(layer_norm(x, w["norm2"], cfg.eps), w["fc1"])
        y = y * jax.nn.sigmoid(1.702 * y)  # quick_gelu
        return x + affine(y, w["fc2"]), None

    if cfg.remat != "none":
        block = jax.checkpoint(block, policy=REMAT[cfg.remat])
    x = dense(vision.patches.astype(dtype), params["patch"])
    x, _ = jax.lax.scan(block, x, params["layers"], unroll=cfg.depth <= SHALLOW)

    merger = params["merger"]
    x = layer_norm(x, merger["norm"], cfg.eps).reshape(b, p // cfg.merge**2, -1)
    x = jax.nn.gelu(affine(x, merger["fc1"]), approximate=False)
    return affine(x, merger["fc2"])
