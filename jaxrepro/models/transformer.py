"""A decoder of the Qwen2 and Llama family as a pure function on a plain pytree.

Sources: Qwen2-VL (arXiv:2409.12191) for the three position streams (M-RoPE), GQA (arXiv:2305.13245),
RoPE (arXiv:2104.09864), SwiGLU (arXiv:2002.05202). One layer, all projections bias-free but q, k, v:

    x = x + Wo attention(rope(Wq n(x) + bq), rope(Wk n(x) + bk), Wv n(x) + bv),    n = RMSNorm
    x = x + Wd (silu(Wg n(x)) * Wu n(x))

A row attends to [prefix] + [own tokens: causal, same segment]. The prefix is the keys and values of
a prompt that n rows share; one mechanism serves prefill, rollout and training on completions.
Layers are stacked (a leading axis, `lax.scan`; training) or a tuple (unrolled; decode).
"""

import math
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxrepro.config import UserError
from jaxrepro.ops.attention import attend, attend_packed, merge
from jaxrepro.ops.dense import dense, einsum32

# A scan copies what the backward pass keeps into stacked arrays. Of a few layers, that costs more time
# than the loop saves, and compiling them one by one is no slower.
SHALLOW = 4
DTYPES = ("float32", "bfloat16", "float16")
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and numerics of a decoder; `mrope_sections` (in half-channels) turns M-RoPE on."""

    vocab: int
    d: int
    layers: int
    heads: int
    kv: int
    head_dim: int
    ffn: int
    rope_theta: float = 1e6
    mrope_sections: tuple[int, ...] | None = None
    eps: float = 1e-6
    qkv_bias: bool = True
    tied: bool = True
    max_positions: int = 32768
    dtype: str = "float32"
    remat: str = "none"
    embed_std: float = 0.02

    def __post_init__(self):
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs, make it even")
        if self.heads % self.kv:
            raise UserError(f"heads {self.heads} is not a multiple of kv heads {self.kv}")
        if self.mrope_sections is not None and sum(self.mrope_sections) != self.head_dim // 2:
            raise UserError(
                f"mrope_sections {tuple(self.mrope_sections)} sum to {sum(self.mrope_sections)}, "
                f"head_dim / 2 is {self.head_dim // 2}: they must be equal"
            )
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} is unknown: one of {', '.join(DTYPES)}")
        if self.remat not in REMAT:
            raise UserError(f"remat {self.remat!r} is unknown: one of {', '.join(REMAT)}")

    @classmethod
    def from_hf(cls, config: dict, **overrides) -> "TransformerConfig":
        """The text part of a Hugging Face config.json of Qwen2, Qwen2-VL, Llama or Mistral."""
        text = config.get("text_config") or config
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "mrope"):
            raise UserError(f"rope type {kind!r} is not supported: default or mrope")
        if text.get("hidden_act", "silu") != "silu":
            raise UserError(f"hidden_act {text['hidden_act']!r} is not supported: silu")
        heads, sections = text["num_attention_heads"], rope.get("mrope_section")
        family = str(text.get("model_type", config.get("model_type", "")))
        fields = {
            "vocab": text["vocab_size"],
            "d": text["hidden_size"],
            "layers": text["num_hidden_layers"],
            "heads": heads,
            "kv": text.get("num_key_value_heads") or heads,
            "head_dim": text.get("head_dim") or text["hidden_size"] // heads,
            "ffn": text["intermediate_size"],
            "rope_theta": float(rope.get("rope_theta") or text.get("rope_theta") or 1e4),
            "mrope_sections": tuple(sections) if sections else None,
            "eps": text["rms_norm_eps"],
            "qkv_bias": family.startswith("qwen2") or bool(text.get("attention_bias", False)),
            "tied": config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
            "max_positions": text.get("max_position_embeddings", 32768),
        }
        return cls(**(fields | overrides))


# --- parameters ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Param:
    """The one declaration of a tensor: shape, a logical axis per dimension, initialiser.

    std is that of a normal initialiser; the strings "zeros" and "ones" are constants.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float | str


def fan_in(shape: tuple[int, ...], axes: tuple[str, ...], inputs: int = 1) -> Param:
    """A weight whose first `inputs` dimensions are contracted: std 1 / sqrt(their product)."""
    return Param(shape, axes, 1 / math.sqrt(math.prod(shape[:inputs])))


def stacked(tree: Any, layers: int) -> Any:
    """The declarations of `layers` equal layers with the leading axis "layers"."""
    return jax.tree.map(lambda p: Param((layers, *p.shape), ("layers", *p.axes), p.std), tree)


def initialise(key: PRNGKeyArray, declared: Any) -> Any:
    """Draw float32 parameters; a tensor's numbers depend on its path, not on its neighbours."""

    def draw(path, p: Param):
        if isinstance(p.std, str):
            return getattr(jnp, p.std)(p.shape, jnp.float32)
        name = zlib.crc32(jax.tree_util.keystr(path).encode())
        return jax.random.normal(jax.random.fold_in(key, name), p.shape, jnp.float32) * p.std

    return jax.tree_util.tree_map_with_path(draw, declared)


def shapes(declared: Any) -> Any:
    """The abstract tree (float32 ShapeDtypeStruct) of a tree of declarations."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), declared)


def declare(cfg: TransformerConfig) -> dict:
    """One Param per tensor; layers are stacked, `head` is absent where tied to the embedding."""
    d, h, k, i, f = cfg.d, cfg.heads, cfg.kv, cfg.head_dim, cfg.ffn
    norm = Param((d,), ("norm",), "ones")
    layer = {
        "attn_norm": norm,
        "wq": fan_in((d, h, i), ("embed", "heads", "head_dim")),
        "wk": fan_in((d, k, i), ("embed", "kv_heads", "head_dim")),
        "wv": fan_in((d, k, i), ("embed", "kv_heads", "head_dim")),
        "wo": fan_in((h, i, d), ("heads", "head_dim", "embed"), inputs=2),
        "mlp_norm": norm,
        "gate": fan_in((d, f), ("embed", "mlp")),
        "up": fan_in((d, f), ("embed", "mlp")),
        "down": fan_in((f, d), ("mlp", "embed")),
    }
    if cfg.qkv_bias:
        layer["bq"] = Param((h, i), ("heads", "head_dim"), "zeros")
        layer["bk"] = Param((k, i), ("kv_heads", "head_dim"), "zeros")
        layer["bv"] = Param((k, i), ("kv_heads", "head_dim"), "zeros")
    tree = {
        "embed": Param((cfg.vocab, d), ("vocab", "embed"), cfg.embed_std),
        "layers": stacked(layer, cfg.layers),
        "norm": norm,
    }
    if not cfg.tied:
        tree["head"] = fan_in((d, cfg.vocab), ("embed", "vocab"))
    return tree


def init(key: PRNGKeyArray, cfg: TransformerConfig) -> dict:
    """Random float32 parameters with stacked layers."""
    return initialise(key, declare(cfg))


def abstract(cfg: TransformerConfig) -> dict:
    """The tree of ShapeDtypeStruct that `init` returns; allocates nothing."""
    return shapes(declare(cfg))


def axes(cfg: TransformerConfig) -> dict:
    """The tree of tuples of logical axis names, one name per dimension."""
    return jax.tree.map(lambda p: p.axes, declare(cfg))


def count(cfg: TransformerConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(declare(cfg)))


def unstack(params: dict) -> dict:
    """The same parameters with `layers` as a tuple of dicts (decode)."""
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params
    take = lambda j: jax.tree.map(lambda w: w[j], layers)
    n = jax.tree.leaves(layers)[0].shape[0]
    return params | {"layers": tuple(map(take, range(n)))}


def stack(params: dict) -> dict:
    """The same parameters with `layers` as one dict of stacked tensors (training)."""
    layers = params["layers"]
    if not isinstance(layers, tuple):
        return params
    return params | {"layers": jax.tree.map(lambda *w: jnp.stack(w), *layers)}


# --- forward ---------------------------------------------------------------------------------


class KV(NamedTuple):
    """Keys and values: stacked (l, b, s, k, i), or a tuple of (b, s, k, i), one per layer."""

    k: Any
    v: Any


class Packed(NamedTuple):
    """Keys (b, k, i, s) and values (b, k, s, i), a tuple of one per layer: how decode reads them."""

    k: Any
    v: Any


class Prefix(NamedTuple):
    """A prompt that n rows share: row r of x attends to prefix r // n where `mask` (b, s)."""

    kv: KV | Packed
    mask: Any


class Cache(NamedTuple):
    """Own tokens of each row; make one with `new_cache`.

    length: (b,) int32, where each row writes next, or () when all rows are at the same place
    (then the write is one slice in place). Slots at and beyond `length` are never read.
    """

    kv: Packed
    length: Any


def new_cache(cfg: TransformerConfig, rows: int, size: int, *, lockstep: bool = False) -> Cache:
    """An empty cache of `size` slots per row; lockstep: all rows always hold equally many tokens."""
    empty = lambda *shape: tuple(jnp.zeros(shape, cfg.dtype) for _ in range(cfg.layers))
    kv = Packed(
        empty(rows, cfg.kv, cfg.head_dim, size),
        empty(rows, cfg.kv, size, cfg.head_dim),
    )
    return Cache(kv, jnp.zeros(() if lockstep else (rows,), jnp.int32))


def pack(kv: KV) -> Packed:
    """Keys and values of `apply` as decode reads them; once, before the loop."""
    k, v = (a if isinstance(a, tuple) else tuple(a) for a in kv)
    return Packed(
        tuple(jnp.transpose(a, (0, 2, 3, 1)) for a in k), tuple(jnp.swapaxes(a, 1, 2) for a in v)
    )


def embed(params: dict, cfg: TransformerConfig, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Token embeddings in cfg.dtype."""
    return params["embed"][tokens].astype(cfg.dtype)


def head(params: dict, cfg: TransformerConfig) -> Float[Array, "d v"]:
    """The output matrix (the transposed embedding where tied)."""
    return params["embed"].T if cfg.tied else params["head"]


def logits(
    params: dict, cfg: TransformerConfig, hidden: Float[Array, "*b d"]
) -> Float[Array, "*b v"]:
    """float32 logits of final hidden states; for long sequences see ops.logprob."""
    w = head(params, cfg).astype(hidden.dtype)
    return einsum32("...d,dv->...v", hidden, w)


def rms_norm(x: Float[Array, "*b d"], weight: Float[Array, "d"], eps: float) -> Array:
    """RMSNorm in float32, cast back, then times the weight."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * weight.astype(x.dtype)


def rope_angles(
    cfg: TransformerConfig, position: Int[Array, "b t"] | Int[Array, "b 3 t"]
) -> tuple[Float[Array, "b t 1 c"], Float[Array, "b t 1 c"]]:
    """cos and sin (float32) of the rotation of each half-channel; one or three position streams.

    M-RoPE sections [a, b, c, a, b, c] over the half-duplicated channels take stream 0, 1, 2, 0, 1, 2:
    both halves agree, so one half says it all.
    """
    half = cfg.head_dim // 2
    frequency = (cfg.rope_theta ** (-np.arange(half) / half)).astype(np.float32)
    if position.ndim == 2:
        where = position[..., None]  # (b, t, 1)
    elif cfg.mrope_sections is None:
        raise UserError("three position streams need mrope_sections in the model config")
    else:
        stream = np.repeat(np.arange(len(cfg.mrope_sections)), cfg.mrope_sections)
        where = jnp.swapaxes(position, 1, 2)[:, :, stream]  # (b, t, half)
    angle = (where.astype(jnp.float32) * frequency)[:, :, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "b t h i"], cos: Array, sin: Array) -> Float[Array, "b t h i"]:
    """Rotate the pairs (j, j + i/2) in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def apply(
    params: dict,
    cfg: TransformerConfig,
    x: Float[Array, "b t d"],
    *,
    position: Int[Array, "b t"] | Int[Array, "b 3 t"],
    segment: Int[Array, "b t"] | None = None,
    prefix: Prefix | None = None,
    cache: Cache | None = None,
) -> tuple[Float[Array, "b t d"], KV | Cache]:
    """Hidden states after the final norm, and these tokens' KV or, with `cache`, the cache after them.

    segment: tokens see only tokens of their own segment, 0 is padding (on the right); with a cache
    of per-row lengths it only says how many of the t tokens of a row are real.
    """
    x = x.astype(cfg.dtype)
    b, t, _ = x.shape
    cos, sin = rope_angles(cfg, position)
    start = None
    if cache is None:
        own = jnp.tril(jnp.ones((t, t), bool))[None, None]
        if segment is not None:
            # padding sees earlier padding: finite numbers that nobody reads
            own = own & (segment[:, None, :, None] == segment[:, None, None, :])
    else:
        params = unstack(params)
        size, start = cache.kv.v[0].shape[2], cache.length
        if t > size:
            raise UserError(f"{t} tokens do not fit a cache of {size}: make the cache larger")
        last = start[..., None] + jnp.arange(t)  # (b, t) or (t,)
        own = (jnp.arange(size) <= last[..., None]).reshape(-1, 1, t, size)
    if prefix is not None and b % prefix.mask.shape[0]:
        raise ValueError(f"{b} rows do not split over {prefix.mask.shape[0]} prefixes")

    def layer(x, w, shared, old):
        return _layer(w, cfg, x, cos, sin, own, shared, prefix and prefix.mask, old, start)

    if cfg.remat != "none" and cache is None:
        layer = jax.checkpoint(layer, policy=REMAT[cfg.remat])

    layers = params["layers"]
    shared = None if prefix is None else prefix.kv
    if isinstance(layers, tuple):
        out = []
        for j, w in enumerate(layers):
            at = lambda kv: None if kv is None else type(kv)(kv.k[j], kv.v[j])  # noqa: B023
            x, kv = layer(x, w, at(shared), at(cache and cache.kv))
            out.append(kv)
        kv = type(out[0])(*map(tuple, zip(*out)))
    else:
        if shared is not None and isinstance(shared.k, tuple):
            shared = type(shared)(jnp.stack(shared.k), jnp.stack(shared.v))
        each = lambda x, ws: layer(x, *ws, None)
        x, kv = jax.lax.scan(each, x, (layers, shared), unroll=cfg.layers <= SHALLOW)
    x = rms_norm(x, params["norm"], cfg.eps)
    if cache is None:
        return x, kv
    return x, Cache(kv, start + (t if segment is None else (segment > 0).sum(-1)))


def _layer(w, cfg, x, cos, sin, own, shared, shared_mask, old, start):
    """One decoder layer; returns its output and its keys and values (or the updated cache)."""
    y = rms_norm(x, w["attn_norm"], cfg.eps)
    q, k, v = (dense(y, w[n]) for n in ("wq", "wk", "wv"))
    if cfg.qkv_bias:
        q, k, v = (a + w[n].astype(y.dtype) for a, n in ((q, "bq"), (k, "bk"), (v, "bv")))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if old is None:
        kv = KV(k, v)
        o, lse = attend(q, k, v, own)
    else:
        kv = _write(old, k, v, start)
        o, lse = attend_packed(q, kv.k, kv.v, own)
    if shared is not None:
        b, t, h, i = q.shape
        p = shared_mask.shape[0]  # the rows of one prompt become more queries of one row
        see = attend_packed if isinstance(shared, Packed) else attend
        o_p, lse_p = see(q.reshape(p, -1, h, i), *shared, shared_mask[:, None, None, :])
        o = merge(o_p.reshape(b, t, h, i), lse_p.reshape(b, t, h), o, lse)
    x = x + dense(o, w["wo"], inputs=2)
    y = rms_norm(x, w["mlp_norm"], cfg.eps)
    gate, up = dense(y, w["gate"]), dense(y, w["up"])
    x = x + dense(jax.nn.silu(gate) * up, w["down"])
    return x, kv


def _write(old, k, v, start):
    """Put k, v (b, t, k, i) into a layer of a cache from slot `start` on: one for all rows, or one each."""
    if start.ndim == 0:
        put = jax.lax.dynamic_update_slice_in_dim
        return Packed(
            put(old.k, jnp.transpose(k, (0, 2, 3, 1)), start, axis=3),
            put(old.v, jnp.swapaxes(v, 1, 2), start, axis=2),
        )
    b, t = k.shape[:2]
    row, slot = jnp.arange(b)[:, None], start[:, None] + jnp.arange(t)
    return Packed(old.k.at[row, :, :, slot].set(k), old.v.at[row, :, slot].set(v))
