"""The diffusion transformer of HunyuanVideo, arXiv:2412.03603, as its public checkpoint has it.

    e = MLP(sin t) + MLP(pooled text) + MLP(sin guidance)                      every modulation is Linear(silu(e))
    dual block, for video and text apart, attention over both:
        x += g1 Wo attend(rope(n(Wq y)), rope(n(Wk y)), Wv y),   y = LN(x) (1 + c1) + s1        (s1 c1 g1 s2 c2 g2)
        x += g2 FF(LN(x) (1 + c2) + s2)
    single block, on [video; text]:   x += g W [attend(...); gelu(W1 y)],      y = LN(x) (1 + c) + s       (s, c, g)
    velocity = W (LN(x) (1 + c) + s),                                              here the scale comes first (c, s)

n is RMSNorm over a head; text is not rotated. Text states first pass a refiner: two blocks of attention among
the valid tokens, gated by the time and their own mean.

Departures: vectors of conditioning, modulation and sums of the residual stream are float32 whatever `dtype` is;
rows of padded text get 0 from attention (nothing that is read depends on them); the mean of no text is 0, not NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxrepro.config import UserError
from jaxrepro.models.params import Param, stacked
from jaxrepro.models.transformer import REMAT, SHALLOW, rms_norm
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
from jaxrepro.ops import attention
from jaxrepro.ops.dense import dense
from jaxrepro.sharding import constrain

COUNTS = ("heads", "head_dim", "double", "single", "refiner", "ffn")
COUNTS += ("channels", "out_channels", "text", "pooled", "frequencies")
CHANNELS = "first"  # inside an output token


@dataclass(frozen=True)
class HunyuanVideoConfig:
    """Sizes and numerics; the defaults are the released model, 12,821,012,544 parameters.

    double, single, refiner: numbers of blocks. text, pooled: widths of the text encoders' outputs.
    guidance: whether the guidance scale is an input. rope: channels of a head that turn with frame, row, column.
    """

    heads: int = 24
    head_dim: int = 128
    double: int = 20
    single: int = 40
    refiner: int = 2
    ffn: int = 12288
    channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    text: int = 4096
    pooled: int = 768
    guidance: bool = True
    rope: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 256.0
    frequencies: int = 256
    eps: float = 1e-6
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        check(self, COUNTS)
        if len(self.rope) != 3 or any(n % 2 for n in self.rope) or sum(self.rope) != self.head_dim:
            raise UserError(
                f"rope {self.rope} must be three even numbers whose sum is head_dim, {self.head_dim}"
            )

    @property
    def d(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_dim

    @property
    def layers(self) -> int:
        """Blocks with joint attention: what `layer` counts, the dual ones first."""
        return self.double + self.single


def declare(cfg: HunyuanVideoConfig) -> dict[str, Any]:
    """One Param per tensor; the blocks of a kind are stacked."""
    d, h, i, f = cfg.d, cfg.heads, cfg.head_dim, cfg.ffn
    p = cfg.patch[0] * cfg.patch[1] * cfg.patch[2]
    modulation = lambda n: linear((d, n, d), ("embed", "norm", "mlp"))
    norm = {"scale": Param((d,), ("norm",), "ones"), "bias": Param((d,), ("norm",), "zeros")}
    heads = {name: linear((d, h, i), ("embed", "heads", "head_dim")) for name in "qkv"}
    norms = {name: Param((i,), ("head_dim",), "ones") for name in ("q_norm", "k_norm")}
    feed = {"fc1": linear((d, f), ("embed", "mlp")), "fc2": linear((f, d), ("mlp", "embed"))}
    out = {"o": linear((h, i, d), ("heads", "head_dim", "embed"), inputs=2)}
    stream = {"mod": modulation(6), **heads, **norms, **out, **feed}
    single = {
        "mod": modulation(3),
        **heads,
        **norms,
        "fc1": feed["fc1"],
        "out": linear((h * i + f, d), ("mlp", "embed")),  # attention's rows, then those of fc1
    }
    # the refiner's own layers are four times as wide as the trunk, whatever ffn is
    wide = {
        "fc1": linear((d, 4 * d), ("embed", "mlp")),
        "fc2": linear((4 * d, d), ("mlp", "embed")),
    }
    refiner = {"norm1": norm, **heads, **out, "norm2": norm, **wide, "mod": modulation(2)}
    tree = {
        "patch": linear((cfg.channels * p, d), ("norm", "embed")),
        "time": mlp(cfg.frequencies, d),
        "pooled": mlp(cfg.pooled, d),
        "text": {
            "time": mlp(cfg.frequencies, d),
            "mean": mlp(cfg.text, d),
            "proj": linear((cfg.text, d), ("norm", "embed")),
            "layers": stacked(refiner, cfg.refiner),
        },
        "double": stacked({"video": stream, "text": stream}, cfg.double),
        "single": stacked(single, cfg.single),
        "mod": modulation(2),
        "out": linear((d, cfg.out_channels * p), ("embed", "norm")),
    }
    if cfg.guidance:
        tree["guidance"] = mlp(cfg.frequencies, d)
    return tree


def time_embedding(
    params: dict, cfg: HunyuanVideoConfig, t: Float[Array, "b"]
) -> Float[Array, "b d"]:
    """The embedding of time t in 0 .. 1000 alone, before text and guidance are added; float32."""
    return two_layers(sinusoid(t, cfg.frequencies), params["time"], jax.nn.silu)[:, 0]


def refine(
    params: dict,
    cfg: HunyuanVideoConfig,
    t: Float[Array, "b"],
    text: Float[Array, "b t c"],
    length: Int[Array, "b"] | None,
) -> Float[Array, "b t d"]:
    """Text states as the trunk reads them; `params` are those of "text"."""
    slots = text.shape[1]
    if length is None:
        length = jnp.full(text.shape[0], slots)
    valid = jnp.arange(slots) < length[:, None]  # (b, t)
    states = jnp.where(valid[..., None], text.astype(jnp.float32), 0)
    mean = states.sum(1, keepdims=True) / jnp.maximum(length, 1)[:, None, None]
    c = two_layers(sinusoid(t, cfg.frequencies), params["time"], jax.nn.silu)
    c = jax.nn.silu(c + two_layers(mean, params["mean"], jax.nn.silu))
    # the first key is open to everyone, so that no row is empty; only padding reads it where it is padding itself
    mask = (valid[:, None] & valid[:, :, None]) | (jnp.arange(slots) == 0)
    x = affine(states.astype(cfg.dtype), params["proj"])

    def norm(x, w):
        return (normalise(x, cfg.eps) * w["scale"] + w["bias"]).astype(x.dtype)

    def block(x, w):
        g_1, g_2 = chunks(affine(c, w["mod"]))
        y = norm(x, w["norm1"])
        o, _ = attention.attend(*(affine(y, w[name]) for name in "qkv"), mask[:, None])
        x = add(x, g_1, affine(o, w["o"], inputs=2))
        return add(x, g_2, two_layers(norm(x, w["norm2"]), w, jax.nn.silu)), None

    return jax.lax.scan(block, x, params["layers"], unroll=cfg.refiner <= SHALLOW)[0]


def _embedding(params, cfg, t, condition):
    """What modulates the trunk, after its silu: (b, 1, d) float32."""
    e = time_embedding(params, cfg, t)[:, None]
    if condition.pooled is None:
        raise UserError("HunyuanVideo needs Condition.pooled, the pooled text embedding (b, c)")
    e = e + two_layers(condition.pooled.astype(jnp.float32)[:, None], params["pooled"], jax.nn.silu)
    if cfg.guidance != (condition.guidance is not None):
        needs = "needs" if cfg.guidance else "has no input for"
        raise UserError(
            f"this model {needs} Condition.guidance: guidance is {cfg.guidance} in its config"
        )
    if cfg.guidance:
        e = e + two_layers(
            sinusoid(condition.guidance, cfg.frequencies), params["guidance"], jax.nn.silu
        )
    return jax.nn.silu(e)


def _heads(w, cfg, y, cos=None, sin=None):
    """Queries, keys and values of a stream, normalised, and rotated where there are tables."""
    q, k, v = (affine(y, w[name]) for name in "qkv")
    q, k = (rms_norm(a, w[name], cfg.eps) for a, name in ((q, "q_norm"), (k, "k_norm")))
    if cos is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, k, v


def _feed(x, w, cfg, shift, scale, gate):
    """The feed-forward half of a dual block."""
    return add(x, gate, two_layers(modulate(x, shift, scale, cfg.eps), w, gelu))


def _dual(x, y, w, cfg, e, cos, sin, see, through):
    """A dual block: video x and text y after it, and the state."""
    a, b = w["video"], w["text"]
    s_1, c_1, g_1, s_2, c_2, g_2 = chunks(affine(e, a["mod"]))
    u_1, d_1, h_1, u_2, d_2, h_2 = chunks(affine(e, b["mod"]))
    n = x.shape[1]

    def module():
        video = _heads(a, cfg, modulate(x, s_1, c_1, cfg.eps), cos, sin)
        text = _heads(b, cfg, modulate(y, u_1, d_1, cfg.eps))
        o = see(*(jnp.concatenate(pair, 1) for pair in zip(video, text)))
        return affine(o[:, :n], a["o"], inputs=2), affine(o[:, n:], b["o"], inputs=2)

    (p, r), state = through(module)
    x, y = checkpoint_name((add(x, g_1, p), add(y, h_1, r)), "mlp_in")
    return _feed(x, a, cfg, s_2, c_2, g_2), _feed(y, b, cfg, u_2, d_2, h_2), state


def _single(z, w, cfg, e, cos, sin, see, through):
    """A single block on z = [video; text], and the state."""
    shift, scale, gate = chunks(affine(e, w["mod"]))
    y = modulate(z, shift, scale, cfg.eps)

    def module():
        o = see(*_heads(w, cfg, y, cos, sin))
        return (o.reshape(*o.shape[:2], -1),)

    (o,), state = through(module)
    n = o.shape[-1]
    m = gelu(affine(y, w["fc1"]))
    # a product each: [o; m] would be an activation of all heads and all of the mlp, which a mesh splits
    # differently; so only rows of the weight change places
    kernel = w["out"]["kernel"]
    both = dense(o, kernel[:n]) + dense(m, kernel[n:]) + w["out"]["bias"].astype(z.dtype)
    return add(z, gate, both), state


def apply(
    params: dict,
    cfg: HunyuanVideoConfig,
    latents: Float[Array, "b c frames rows columns"],
    t: Float[Array, "b"],
    condition: Condition,
    *,
    attend: Attend = full,
    layout: Layout | None = None,
    collect: Callable[[Array, Array, Array], Any] | None = None,
    around: Around | None = None,
    state: Any = None,
) -> Float[Array, "b c2 frames rows columns"] | tuple[Array, Any] | tuple[Array, Any, Any]:
    """The velocity (float32) of noisy latents at time t in 0 .. 1000.

    With `collect(video, text, layer)`, called behind each block, also its results, stacked over all blocks.
    With `around(module, layer, state)`, called for each attention module, at last the state behind all blocks.
    UserError for latents that the patch does not divide, and for a condition that the model does not have.
    """
    grid = grid_of(latents.shape, cfg.patch)
    check_input(cfg, latents, t, condition)
    e = _embedding(params, cfg, t, condition)
    y = refine(params["text"], cfg, t, condition.text, condition.length)
    x = affine(patchify(latents, cfg.patch).astype(cfg.dtype), params["patch"])
    x, cos, sin = arrange(x, *rope_tables(grid, cfg.rope, cfg.rope_theta), layout)
    x = constrain(x, *ACTIVATION)
    n = x.shape[1]
    slots = y.shape[1]
    aux = Aux(grid, slots, condition.length)
    # a rotation by nothing for text: no tokens are moved to leave it out
    still = [jnp.pad(a, ((0, slots), (0, 0)), constant_values=c) for a, c in ((cos, 1), (sin, 0))]

    def see(layer):
        def call(q, k, v):
            q, k, v = checkpoint_name((q, k, v), "qkv")
            return checkpoint_name(attend(q, k, v, layer, aux), "attn_out")

        return call

    def through(layer, state):
        return lambda module: (around or compute)(module, layer, state)

    def out(x, y, layer):
        return None if collect is None else collect(x, y, layer)

    def dual(carry, each):
        (x, y, state), (w, layer) = carry, each
        x, y, state = _dual(x, y, w, cfg, e, cos, sin, see(layer), through(layer, state))
        return (x, y, state), out(x, y, layer)

    def single(carry, each):
        (z, state), (w, layer) = carry, each
        z, state = _single(z, w, cfg, e, *still, see(layer), through(layer, state))
        return (z, state), out(z[:, :n], z[:, n:], layer)

    if cfg.remat != "none":
        dual, single = (jax.checkpoint(f, policy=REMAT[cfg.remat]) for f in (dual, single))
    layer = jnp.arange(cfg.layers)
    first, rest = layer[: cfg.double], layer[cfg.double :]
    (x, y, state), some = jax.lax.scan(
        dual, (x, y, state), (params["double"], first), unroll=cfg.double <= SHALLOW
    )
    z = jnp.concatenate([x, y], 1)
    (z, state), more = jax.lax.scan(
        single, (z, state), (params["single"], rest), unroll=cfg.single <= SHALLOW
    )
    x = z[:, :n] if layout is None else layout.to_raster(z[:, :n])
    scale, shift = chunks(affine(e, params["mod"]))
    x = affine(modulate(x, shift, scale, cfg.eps), params["out"]).astype(jnp.float32)
    x = unpatchify(x, grid, cfg.patch, channels=CHANNELS)
    some = jax.tree.map(lambda *a: jnp.concatenate(a), some, more)
    return results(x, collect, some, around, state)
