"""A decoder of the Llama, Mistral, Qwen2 and Qwen3 families as a pure function on a plain pytree.

Sources: Qwen2-VL (arXiv:2409.12191) for the three position streams (M-RoPE), GQA (arXiv:2305.13245),
RoPE (arXiv:2104.09864), SwiGLU (arXiv:2002.05202), sliding windows (arXiv:2310.06825), norms of
queries and keys (Qwen3, arXiv:2505.09388). One layer; biases and the norms m where a family has them:

    x = x + Wo attention(rope(m(Wq n(x) + bq)), rope(m(Wk n(x) + bk)), Wv n(x) + bv) + bo
    x = x + Wd (silu(Wg n(x)) * Wu n(x)),    n = RMSNorm over d,  m = RMSNorm over a head

A row attends to [prefix] + [own tokens: causal, same segment]; in a layer with a window w, to the last
w of them, itself included. The prefix is the keys and values of a prompt that n rows share; one
mechanism serves prefill, rollout and training on completions. Layers are stacked (a leading axis,
`lax.scan`; training) or a tuple (unrolled; decode). A layer may hold adapters (models/lora.py).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxrepro.config import UserError
from jaxrepro.models import lora
from jaxrepro.models import params as declarations
from jaxrepro.models.lora import Lora
from jaxrepro.models.params import Param, fan_in, initialise, shapes, stacked
from jaxrepro.models.rope import RopeScaling, frequencies
from jaxrepro.ops.attention import attend, attend_packed, merge
from jaxrepro.ops.dense import dense, einsum32
from jaxrepro.ops.logprob import OUTSIDE
from jaxrepro.sharding import constrain

# A scan copies what the backward pass keeps into stacked arrays. Of a few layers, that costs more time
# than the loop saves, and compiling them one by one is no slower.
SHALLOW = 4
ACTIVATION = ("batch", "seq", "act_embed")
DTYPES = ("float32", "bfloat16", "float16")
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # what attention makes is kept, the feed-forward layer is computed again
    "names": jax.checkpoint_policies.save_only_these_names("qkv", "attn_out", "mlp_in"),
}


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and numerics of a decoder; `mrope_sections` (in half-channels) turns M-RoPE on.

    window: tokens that a token sees, itself included, in the layers `window_layers` (None: in all).
    family: who wrote the model, for its config.json (models/families.py); None: whoever could have.
    used: columns of the logits that are tokens (None: all): models pad their vocabulary, and padding is neither drawn
    nor counted in a log-probability.
    """

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
    rope_scaling: RopeScaling | None = None
    o_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    family: str | None = None
    lora: Lora | None = None
    used: int | None = None

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
        if self.window is not None and self.window < 1:
            raise UserError(f"window {self.window} leaves nothing to see: at least 1, or None")
        some = self.window_layers
        if some is not None and (
            self.window is None or list(some) != sorted(set(some) & set(range(self.layers)))
        ):
            raise UserError(
                f"window_layers {some} need a window and ascending layers below {self.layers}"
            )
        if self.used is not None and not 0 < self.used <= self.vocab:
            raise UserError(f"used {self.used} must lie in 1 .. {self.vocab}, the vocabulary")

    def using(self, tokens: int) -> "TransformerConfig":
        """The same decoder, of whose vocabulary the first `tokens` ids are tokens."""
        return replace(self, used=tokens if tokens < self.vocab else None)

    @classmethod
    def from_hf(cls, config: dict, **overrides) -> "TransformerConfig":
        """The decoder of a Hugging Face config.json (Llama, Mistral, Qwen2, Qwen3, Qwen2-VL's text).

        Old and new spelling. UserError for an unknown architecture and for what this one cannot run.
        """
        from jaxrepro.models import families  # it imports this module

        return cls(**(families.fields(config) | overrides))

    def slides(self, layer: int) -> bool:
        """Whether a layer has the window."""
        return self.window is not None and (
            self.window_layers is None or layer in self.window_layers
        )


# --- parameters ------------------------------------------------------------------------------


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
    if cfg.o_bias:
        layer["bo"] = Param((d,), ("norm",), "zeros")
    if cfg.qk_norm:
        layer["q_norm"] = layer["k_norm"] = Param((i,), ("head_dim",), "ones")
    if cfg.lora is not None:
        layer["lora"] = lora.declare(cfg.lora, layer)
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
    return declarations.count(declare(cfg))


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


def resize_vocab(
    params: dict, cfg: TransformerConfig, n: int, *, key: PRNGKeyArray | None = None
) -> tuple[dict, TransformerConfig]:
    """Parameters and config with n rows of the embedding, and columns of an untied head.

    Old rows are kept, rows from n on are cut. New ones are the mean of the old; with `key` they are
    drawn, each channel from a normal of the old rows' mean and standard deviation.
    """
    if n < 1:
        raise UserError(f"a vocabulary of {n} tokens is empty: at least 1")

    def resize(rows, salt):
        old = rows.astype(jnp.float32)
        new = jnp.broadcast_to(old.mean(0), (max(n - cfg.vocab, 0), cfg.d))
        if key is not None:
            own = jax.random.fold_in(key, salt)
            new = new + old.std(0) * jax.random.normal(own, new.shape, jnp.float32)
        return jnp.concatenate([rows[:n], new.astype(rows.dtype)])

    out = params | {"embed": resize(params["embed"], 0)}
    if not cfg.tied:
        out["head"] = resize(params["head"].T, 1).T
    return out, replace(cfg, vocab=n, used=None)


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
    # the table's d is whole for the lookup, as a weight's is; else XLA gives every device all rows
    w = constrain(params["embed"], "vocab", None)
    return constrain(w[tokens].astype(cfg.dtype), *ACTIVATION)


def head(params: dict, cfg: TransformerConfig) -> Float[Array, "d v"]:
    """The output matrix (the transposed embedding where tied)."""
    return params["embed"].T if cfg.tied else params["head"]


def logits(
    params: dict, cfg: TransformerConfig, hidden: Float[Array, "*b d"]
) -> Float[Array, "*b v"]:
    """float32 logits of final hidden states, OUTSIDE in columns of padding; for long sequences see ops.logprob."""
    w = head(params, cfg).astype(hidden.dtype)
    z = einsum32("...d,dv->...v", hidden, w)
    return z if cfg.used is None else jnp.where(jnp.arange(cfg.vocab) < cfg.used, z, OUTSIDE)


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
    frequency = frequencies(cfg.head_dim // 2, cfg.rope_theta, cfg.rope_scaling)
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
    age: Int[Array, "b t s"] | None = None,
) -> tuple[Float[Array, "b t d"], KV | Cache]:
    """Hidden states after the final norm, and these tokens' KV or, with `cache`, the cache after them.

    segment: tokens see only tokens of their own segment, 0 is padding (on the right); with a cache
    of per-row lengths it only says how many of the t tokens of a row are real.
    age: how many tokens back of each new token a slot of the cache lies (0 is itself), negative where
    the token does not see it: for rings and trees. By default slots are in the order of the tokens.
    """
    mode = "train" if cache is None else "decode"
    pin = partial(constrain, mode=mode)
    x = pin(x.astype(cfg.dtype), *ACTIVATION)
    b, t, _ = x.shape
    cos, sin = rope_angles(cfg, position)
    start = None
    if cache is None:
        age = jnp.arange(t)[:, None] - jnp.arange(t)
        own = (age >= 0)[None, None]
        if segment is not None:
            # padding sees earlier padding: finite numbers that nobody reads
            own = own & (segment[:, None, :, None] == segment[:, None, None, :])
    else:
        params = unstack(params)
        size, start = cache.kv.v[0].shape[2], cache.length
        if t > size:
            raise UserError(f"{t} tokens do not fit a cache of {size}: make the cache larger")
        if age is None:  # (b, t, size) or (t, size)
            age = (start[..., None] + jnp.arange(t))[..., None] - jnp.arange(size)
        own = (age >= 0).reshape(-1, 1, t, size)
    if prefix is not None and b % prefix.mask.shape[0]:
        raise ValueError(f"{b} rows do not split over {prefix.mask.shape[0]} prefixes")
    masks = Masks(own, None if prefix is None else prefix.mask[:, None, None, :])
    near, slides = None, None  # where some layers have a window: their masks, and which they are
    if cfg.window is not None:
        near = _near(masks, age, cfg.window, b)
        if cfg.window_layers is None:
            masks = near
        else:
            slides = jnp.asarray([cfg.slides(j) for j in range(cfg.layers)])

    def layer(x, w, slides, shared, old):
        see = masks
        if slides is not None:
            see = jax.tree.map(lambda a, b: jnp.where(slides, a, b), near, masks)
        x, kv = _layer(w, cfg, x, cos, sin, see, shared, old, start)
        return pin(x, *ACTIVATION), kv

    if cfg.remat != "none" and cache is None:
        layer = jax.checkpoint(layer, policy=REMAT[cfg.remat])

    layers = params["layers"]
    shared = None if prefix is None else prefix.kv
    if isinstance(layers, tuple):
        out = []
        for j, w in enumerate(layers):
            of = lambda kv: None if kv is None else type(kv)(kv.k[j], kv.v[j])  # noqa: B023
            window = None if slides is None else slides[j]
            x, kv = layer(x, w, window, of(shared), of(cache and cache.kv))
            out.append(kv)
        kv = type(out[0])(*map(tuple, zip(*out)))
    else:
        if shared is not None and isinstance(shared.k, tuple):
            shared = type(shared)(jnp.stack(shared.k), jnp.stack(shared.v))
        each = lambda x, ws: layer(x, *ws, None)
        x, kv = jax.lax.scan(each, x, (layers, slides, shared), unroll=cfg.layers <= SHALLOW)
    x = rms_norm(x, params["norm"], cfg.eps)
    if cache is None:
        return x, kv
    return x, Cache(kv, start + (t if segment is None else (segment > 0).sum(-1)))


class Masks(NamedTuple):
    """What queries see of their own row (b or 1, 1, t, s) and of their prefix (p, 1, n t or 1, s)."""

    own: Any
    prefix: Any


def _near(masks, age, window, b):
    """The masks of a layer with a window: distances count tokens, across prefix and own row."""
    t, size = masks.own.shape[-2:]
    own = masks.own & (age < window).reshape(-1, 1, t, size)  # a segment lies in one piece
    if masks.prefix is None:
        return Masks(own, None)
    real = masks.prefix[:, 0]  # (p, 1, s)
    order = jnp.cumsum(real, -1)  # a key's place in its prompt, from 1
    mine = jnp.broadcast_to(masks.own.sum(-1), (b, 1, t))  # a query's place in its own row, from 1
    distance = mine.reshape(len(real), -1, 1) + order[..., -1:] - order
    return Masks(own, (real & (distance < window))[:, None])


def _layer(w, cfg, x, cos, sin, masks, shared, old, start):
    """One decoder layer; returns its output and its keys and values (or the updated cache)."""

    def project(x, name, inputs=1):
        y = dense(x, w[name], inputs=inputs)
        if name in w.get("lora", ()):
            y = y + lora.delta(x, w["lora"][name], cfg.lora, inputs=inputs)
        return y

    y = rms_norm(x, w["attn_norm"], cfg.eps)
    q, k, v = (project(y, n) for n in ("wq", "wk", "wv"))
    if cfg.qkv_bias:
        q, k, v = (a + w[n].astype(y.dtype) for a, n in ((q, "bq"), (k, "bk"), (v, "bv")))
    if cfg.qk_norm:
        q, k = (rms_norm(a, w[n], cfg.eps) for a, n in ((q, "q_norm"), (k, "k_norm")))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    q, k, v = checkpoint_name((q, k, v), "qkv")
    if old is None:
        kv = KV(k, v)
        o, lse = attend(q, k, v, masks.own)
    else:
        kv = _write(old, k, v, start)
        o, lse = attend_packed(q, kv.k, kv.v, masks.own)
    if shared is not None:
        b, t, h, i = q.shape
        p = masks.prefix.shape[0]  # the rows of one prompt become more queries of one row
        see = attend_packed if isinstance(shared, Packed) else attend
        o_p, lse_p = see(q.reshape(p, -1, h, i), *shared, masks.prefix)
        o = merge(o_p.reshape(b, t, h, i), lse_p.reshape(b, t, h), o, lse)
    o = project(checkpoint_name(o, "attn_out"), "wo", inputs=2)
    x = checkpoint_name(x + (o + w["bo"].astype(o.dtype) if cfg.o_bias else o), "mlp_in")
    y = rms_norm(x, w["mlp_norm"], cfg.eps)
    gate, up = project(y, "gate"), project(y, "up")
    x = x + project(jax.nn.silu(gate) * up, "down")
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
