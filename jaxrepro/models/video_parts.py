"""What the video diffusion transformers share: patches, rotary tables, time embedding, modulation, and the
contract of their attention.

A model calls `attend(q, k, v, layer, aux)` once a block and knows nothing of how it is done. q, k and v are
(b, s, h, i), normalised and rotated: the video tokens, then `aux.text` text tokens of which the first
`aux.length` of each row are valid. `layer` counts the blocks from 0 and is a traced integer, so that it may
index a table. What comes back has the shape of q; rows of padding are 0.

Around it lies the attention module: projections to q, k and v, norms, rotation, attention, and the projection of its
output where the model has one. A model calls `around(module, layer, state)` once a block, and `module()` computes the
module's outputs: (video, text) in a block that keeps them apart, else one array of all tokens; each (b, tokens, d).
Whoever has the outputs from elsewhere need not call it. `state` is handed from block to block.

Video tokens are in raster order (frame, row, column), the column fastest, unless a `Layout` says otherwise.
Everything but attention works token by token, so the order is changed once behind the patch embedding and
once before the output.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrepro.config import UserError
from jaxrepro.models.params import Param, fan_in
from jaxrepro.models.transformer import DTYPES, REMAT
from jaxrepro.ops.attention import attend_joint
from jaxrepro.ops.checks import known
from jaxrepro.ops.dense import dense
from jaxrepro.sharding import constrain

ACTIVATION = ("batch", "seq", "act_embed")
AXES = ("frames", "rows", "columns")
PERIOD = 1e4  # the longest period of the time embedding


class Condition(NamedTuple):
    """What a video is made from. Wan reads `text` alone, every token of it: pad with zeros.

    length, pooled and guidance belong to HunyuanVideo. Valid text is a prefix of `length` tokens; the guidance
    scale comes times 1000.
    """

    text: Any  # (b, t, c)
    length: Any = None  # (b,) int
    pooled: Any = None  # (b, c)
    guidance: Any = None  # (b,)


@runtime_checkable
class Layout(Protocol):
    """An order of `length` video tokens: rows (b, s, ...) from raster order to it and back."""

    @property
    def length(self) -> int: ...

    def to_layout(self, x: Any) -> Any: ...

    def to_raster(self, x: Any) -> Any: ...


class Aux(NamedTuple):
    """What attention may want to know beside q, k and v; `grid` and `text` are no arrays."""

    grid: tuple[int, int, int]  # tokens in (frames, rows, columns)
    text: int  # text slots at the end
    length: Any = None  # (b,) valid text; None: all


Attend = Callable[[Array, Array, Array, Array, Aux], Array]
Outputs = tuple[Array, ...]  # of an attention module
Around = Callable[[Callable[[], Outputs], Array, Any], tuple[Outputs, Any]]


def full(
    q: Float[Array, "b s h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    layer: Any,
    aux: Aux,
) -> Float[Array, "b s h i"]:
    """Attention of every token to every token."""
    del layer
    return attend_joint(q, k, v, q.shape[1] - aux.text, aux.length)


def compute(module: Callable[[], Outputs], layer: Any, state: Any) -> tuple[Outputs, Any]:
    """The attention module's outputs, computed."""
    del layer
    return module(), state


# --- declarations -----------------------------------------------------------------------------


def linear(shape: tuple[int, ...], axes: tuple[str, ...], inputs: int = 1) -> dict[str, Param]:
    """A weight and its bias."""
    # the rows of a weight lie apart (fsdp), those of a bias do not pay for it
    own = tuple("norm" if axis == "embed" else axis for axis in axes[inputs:])
    return {"kernel": fan_in(shape, axes, inputs), "bias": Param(shape[inputs:], own, "zeros")}


def mlp(inputs: int, d: int) -> dict[str, Any]:
    """Two layers from `inputs` numbers to d."""
    return {
        "fc1": linear((inputs, d), ("norm", "mlp")),
        "fc2": linear((d, d), ("mlp", "embed")),
    }


def check(cfg: Any, counts: tuple[str, ...]) -> None:
    """UserError for a config whose named fields are no counts, or whose numerics are unknown."""
    for name in counts:
        if not getattr(cfg, name) >= 1:
            raise UserError(f"{name} is {getattr(cfg, name)!r:.60}; it must be at least 1")
    if len(cfg.patch) != 3 or min(cfg.patch) < 1:
        raise UserError(f"patch {cfg.patch} must be three sizes of at least 1: {', '.join(AXES)}")
    if cfg.dtype not in DTYPES:
        raise UserError(f"dtype {cfg.dtype!r} is unknown: one of {', '.join(DTYPES)}")
    if cfg.remat not in REMAT:
        raise UserError(f"remat {cfg.remat!r} is unknown: one of {', '.join(REMAT)}")


def check_input(cfg: Any, latents: Any, t: Any, condition: Condition) -> None:
    """UserError for latents, times and conditions that are not of this model or of one batch, and times outside
    0 .. 1000; numbers are checked as far as they are known while tracing."""
    b, channels = latents.shape[:2]
    if channels != cfg.channels:
        raise UserError(f"latents of {channels} channels: this model takes {cfg.channels}")
    if t.shape != (b,):
        raise UserError(f"t has shape {t.shape}: give a time for each of {b} videos")
    times = known(t)
    if times is not None and not ((times >= 0) & (times <= 1000)).all():
        raise UserError(f"t is {times.tolist()}: times lie in 0 .. 1000")
    check_condition(cfg, b, condition)


def check_condition(cfg: Any, b: int, condition: Condition) -> None:
    """UserError for a condition whose shapes are not those of b videos of this model, and for lengths beyond the
    text, as far as they are known while tracing."""
    if condition.text is None or condition.text.ndim != 3:
        raise UserError("Condition.text is needed, the text embeddings (b, tokens, width)")
    slots = condition.text.shape[1]
    pooled = (b, getattr(cfg, "pooled", None))
    sizes = {"text": (b, slots, cfg.text), "length": (b,), "pooled": pooled, "guidance": (b,)}
    for name, shape in sizes.items():
        x = getattr(condition, name)
        if x is not None and x.shape != shape:
            raise UserError(
                f"Condition.{name} has shape {x.shape}: {b} videos of this model need {shape}"
            )
    lengths = known(condition.length)
    if lengths is not None and not ((lengths >= 0) & (lengths <= slots)).all():
        raise UserError(f"length is {lengths.tolist()}: the text has {slots} tokens")


# --- layers -----------------------------------------------------------------------------------


def affine(x: Float[Array, "b t ..."], w: dict[str, Array], inputs: int = 1) -> Array:
    """x (b, t, *inputs) through a `linear`, in the dtype of x."""
    return dense(x, w["kernel"], inputs=inputs) + w["bias"].astype(x.dtype)


def two_layers(x: Float[Array, "b t c"], w: dict[str, Any], act: Any) -> Float[Array, "b t d"]:
    """An `mlp`."""
    return affine(act(affine(x, w["fc1"])), w["fc2"])


def gelu(x: Array) -> Array:
    """GELU by its tanh approximation, as both models were trained."""
    return jax.nn.gelu(x, approximate=True)


def normalise(x: Float[Array, "*b d"], eps: float) -> Float[Array, "*b d"]:
    """Layer normalisation without weights, float32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)


def modulate(x: Float[Array, "b t d"], shift: Array, scale: Array, eps: float) -> Array:
    """LayerNorm(x) (1 + scale) + shift in float32, in the dtype of x; shift and scale (b, 1, d)."""
    return (normalise(x, eps) * (1 + scale) + shift).astype(x.dtype)


def add(x: Float[Array, "b t d"], gate: Array, y: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """x + gate y, added in float32 and pinned to the mesh."""
    x = (x.astype(jnp.float32) + gate * y.astype(jnp.float32)).astype(x.dtype)
    return constrain(x, *ACTIVATION)


def chunks(x: Float[Array, "b t n d"]) -> list[Float[Array, "b t d"]]:
    """The n vectors of a modulation, in the order of the checkpoint."""
    return [x[:, :, j] for j in range(x.shape[2])]


def sinusoid(t: Float[Array, "b"], width: int) -> Float[Array, "b 1 c"]:
    """Cosines, then sines, of t at width / 2 periods from 2 pi to 2 pi PERIOD (exclusive); float32."""
    half = width // 2
    frequency = np.exp(-math.log(PERIOD) * np.arange(half) / half).astype(np.float32)
    angle = t.astype(jnp.float32)[:, None, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def rope_tables(
    grid: tuple[int, int, int], dims: tuple[int, int, int], theta: float
) -> tuple[Float[Array, "s c"], Float[Array, "s c"]]:
    """cos and sin (float32) of each token's rotation of each pair of channels, tokens in raster order.

    Of a head's pairs the first dims[0] / 2 turn with the frame, then dims[1] / 2 with the row, dims[2] / 2 with the
    column. Angles are float64 on the host, one axis at a time; only their grid is made by the program.
    """
    parts = []
    for axis, (n, dim) in enumerate(zip(grid, dims)):
        angle = np.arange(n)[:, None] * theta ** -(np.arange(0, dim, 2) / dim)
        shape = [n if a == axis else 1 for a in range(3)] + [dim // 2]
        parts.append([f(angle).astype(np.float32).reshape(shape) for f in (np.cos, np.sin)])
    spread = lambda a: jnp.broadcast_to(a, (*grid, a.shape[-1])).reshape(-1, a.shape[-1])
    cos, sin = (jnp.concatenate([spread(a) for a in side], -1) for side in zip(*parts))
    return cos, sin


def rotate(x: Float[Array, "b s h i"], cos: Array, sin: Array) -> Float[Array, "b s h i"]:
    """Rotate the neighbouring pairs (2j, 2j + 1) of the first channels, in float32."""
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b, cos, sin = y[..., 0], y[..., 1], cos[:, None], sin[:, None]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape).astype(x.dtype)


# --- patches ----------------------------------------------------------------------------------


def grid_of(shape: tuple[int, ...], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tokens in (frames, rows, columns) of latents (..., frames, rows, columns); UserError where a patch cuts them."""
    for name, n, p in zip(AXES, shape[-3:], patch):
        if n % p:
            raise UserError(
                f"{n} {name} of the latents are no multiple of the patch's {p}: crop or pad them"
            )
    return tuple(n // p for n, p in zip(shape[-3:], patch))


def patchify(
    x: Float[Array, "b c frames rows columns"],
    patch: tuple[int, int, int],
    *,
    channels: str = "first",
) -> Float[Array, "b s p"]:
    """Latents as tokens in raster order; inside a token (c, frame, row, column), or c last."""
    b, c = x.shape[:2]
    f, h, w = grid_of(x.shape, patch)
    p, q, r = patch
    x = x.reshape(b, c, f, p, h, q, w, r)
    inner = (1, 3, 5, 7) if channels == "first" else (3, 5, 7, 1)
    return x.transpose(0, 2, 4, 6, *inner).reshape(b, f * h * w, -1)


def unpatchify(
    x: Float[Array, "b s p"],
    grid: tuple[int, int, int],
    patch: tuple[int, int, int],
    *,
    channels: str = "first",
) -> Float[Array, "b c frames rows columns"]:
    """The inverse of `patchify`."""
    (f, h, w), (p, q, r) = grid, patch
    if channels == "first":
        x = x.reshape(x.shape[0], f, h, w, -1, p, q, r).transpose(0, 4, 1, 5, 2, 6, 3, 7)
    else:
        x = x.reshape(x.shape[0], f, h, w, p, q, r, -1).transpose(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(*x.shape[:2], f * p, h * q, w * r)


def results(velocity: Array, collect: Any, some: Any, around: Any, state: Any) -> Any:
    """What `apply` returns: the velocity, and beside it what the given hooks made."""
    more = (some,) * (collect is not None) + (state,) * (around is not None)
    return (velocity, *more) if more else velocity


def arrange(
    x: Float[Array, "b s d"], cos: Array, sin: Array, layout: Layout | None
) -> tuple[Array, Array, Array]:
    """Tokens and rotary tables in the order of the layout."""
    if layout is None:
        return x, cos, sin
    if layout.length != x.shape[1]:
        raise UserError(
            f"the layout is of {layout.length} video tokens, the latents have {x.shape[1]}: make it for their grid"
        )
    return layout.to_layout(x), *(layout.to_layout(a[None])[0] for a in (cos, sin))
