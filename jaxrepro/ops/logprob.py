"""Statistics of next-token distributions, of a chunk of tokens at a time.

    z = h W / T,    lse = logsumexp(z),    lp = z_y - lse,    p = exp(z - lse),    H = lse - sum_j p_j z_j   (nats)
    d lp / d z_j = [j = y] - p_j,    d lse / d z_j = p_j,    d H / d z_j = -p_j (log p_j + H)
    KL(q || p) = sum_j q_j (log q_j - log p_j),    d KL / d z_j = p_j - q_j

Where all tokens fit into one chunk, their logits (tokens, vocabulary) are held, and kept for backward. Where they
do not, that array never exists: forward keeps h and the lse, backward computes the logits of each chunk again and
sums dW in float32. A chunk takes the same number of positions of every batch row, so a batch that is sharded stays
where it lies.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrepro.ops.dense import einsum32
from jaxrepro.sharding import constrain, parts_of

GRADED = ("lp", "lse", "entropy", "mean_logit")
CURVES = ("max_prob", "top1", "absmax", "log_sum_p2")  # no gradient flows through these
MOST = 1 << 26  # logits that are held at a time: 256 MiB in float32
OUTSIDE = -1e30  # a logit beyond the vocabulary: finite, so that 0 * it is 0


class Tokens(NamedTuple):
    """A batch of token rows; `response` is True on the tokens that are scored, aligned to tokens."""

    tokens: Any  # (b, t) int32
    response: Any  # (b, t) bool
    segment: Any  # (b, t) int32, 0 = padding (on the right)
    position: Any  # (b, t) or (b, 3, t) int32


def shift(
    tokens: Int[Array, "b t"], response: Bool[Array, "b t"], segment: Int[Array, "b t"]
) -> tuple[Int[Array, "b t"], Bool[Array, "b t"]]:
    """Targets and mask of each position: position j predicts token j + 1 of the same segment.

    The only place that shifts by one. The last position predicts nothing (mask False).
    """
    later = lambda a: jnp.pad(a[:, 1:], ((0, 0), (0, 1)))
    same = (later(segment) == segment) & (later(segment) > 0)
    return later(tokens), later(response) & same


def chunk_of(vocab: int) -> int:
    """Positions whose logits are held at a time where nothing is said: a power of two, at most 1024."""
    return min(1024, 1 << max(0, (MOST // vocab).bit_length() - 1))


def token_log_probs(
    hidden: Float[Array, "*b d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "*b"],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    entropy: bool = False,
    vocab: int | None = None,
) -> Any:
    """float32 log-probability (nats) of each target [, entropy of its distribution]: see `token_stats`."""
    want = ("lp", "entropy") if entropy else ("lp",)
    how = dict(temperature=temperature, chunk=chunk, vocab=vocab)
    out = token_stats(hidden, head, targets, want, **how)
    return tuple(out.values()) if entropy else out["lp"]


def token_stats(
    hidden: Float[Array, "*b d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "*b"],
    want: tuple[str, ...],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    vocab: int | None = None,
) -> dict[str, Float[Array, "*b"]]:
    """The statistics `want` of each position's distribution, float32, any leading axes.

    lp: log-probability of the target; lse: of the logits; entropy (nats); mean_logit: these are
    differentiable in hidden and head. max_prob; top1: 1 where the target is the likeliest token; absmax:
    of the logits; log_sum_p2: log sum_j p_j^2: through these no gradient flows.

    head is float32 or not; the product runs in hidden's dtype and accumulates in float32. Mask what
    comes out: there is no mask here. The first axis of three or more is the batch; memory is chunk * v
    floats (at least batch * v; None: `chunk_of`) on each device over which the mesh splits the batch. vocab: columns of the
    head from there on are padding, and count nowhere.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be > 0: greedy has no log-probability")
    if unknown := set(want) - {*GRADED, *CURVES}:
        raise ValueError(f"{sorted(unknown)} are not among {', '.join(GRADED + CURVES)}")
    kind = _kind(tuple(want), _some(vocab, head))
    out = _chunked(hidden, head, targets, None, kind, temperature, chunk)
    return dict(zip(want, out))


def token_kl(
    hidden: Float[Array, "*b d"],
    head: Float[Array, "d v"],
    ref_hidden: Float[Array, "*b d"],
    ref_head: Float[Array, "d v"],
    *,
    chunk: int | None = None,
    vocab: int | None = None,
) -> Float[Array, "*b"]:
    """KL(reference || policy) of each position's distribution (nats, float32), chunked as `token_stats`.

    Differentiable in the policy's hidden and head; the reference is constant. vocab: see `token_stats`.
    """
    kind = _kl_kind(_some(vocab, head))
    return _chunked(hidden, head, jax.lax.stop_gradient(ref_hidden), ref_head, kind, 1.0, chunk)[0]


def _some(vocab: int | None, head) -> int | None:
    """How many columns count; None for all."""
    v = head.shape[-1]
    if vocab is not None and not 0 < vocab <= v:
        raise ValueError(f"vocab {vocab} must lie in 1 .. {v}, the columns of the head")
    return None if vocab == v else vocab


class _Kind(NamedTuple):
    """What is computed of the logits z (b, r, v) of a chunk.

    forward(z, rows, other) -> (lse (b, r), outputs, each (b, r)); backward(z, rows, other, lse, outputs,
    gradients of the outputs) -> dz. rows: what else belongs to the positions; other: to none.
    """

    forward: Callable
    backward: Callable


@lru_cache
def _kind(want, vocab):
    return _Kind(
        partial(_stats, want=want, vocab=vocab), partial(_stats_grad, want=want, vocab=vocab)
    )


@lru_cache
def _kl_kind(vocab):
    return _Kind(partial(_kl, vocab=vocab), partial(_kl_grad, vocab=vocab))


def _inside(z, vocab):
    """Logits with OUTSIDE in the columns from `vocab` on, and where they are real (None: everywhere)."""
    if vocab is None:
        return z, None
    real = jnp.arange(z.shape[-1]) < vocab
    return jnp.where(real, z, OUTSIDE), real


def _stats(z, targets, _, *, want, vocab):
    z, real = _inside(z, vocab)
    lse = jax.nn.logsumexp(z, axis=-1)
    size = z.shape[-1] if vocab is None else vocab

    def one(name):
        if name == "lse":
            return lse
        if name in ("lp", "top1"):
            picked = jnp.take_along_axis(z, targets[..., None], axis=-1, mode="clip")[..., 0]
            if name == "lp":
                return picked - lse
            return (picked >= z.max(-1)).astype(jnp.float32)
        if name == "entropy":
            return lse - jnp.sum(jnp.exp(z - lse[..., None]) * z, axis=-1)
        if name == "mean_logit":
            return jnp.sum(z, axis=-1, where=real) / size
        if name == "max_prob":
            return jnp.exp(z.max(-1) - lse)
        if name == "absmax":
            return jnp.max(jnp.abs(z), axis=-1, where=real, initial=0.0)
        return jax.nn.logsumexp(2 * z, axis=-1) - 2 * lse  # log_sum_p2

    return lse, tuple(map(one, want))


def _stats_grad(z, targets, _, lse, out, g, *, want, vocab):
    z, real = _inside(z, vocab)
    lp = z - lse[..., None]
    p = jnp.exp(lp)
    by = {name: (a[..., None], b[..., None]) for name, a, b in zip(want, g, out)}
    dz = 0.0
    if "lp" in by:
        dz = by["lp"][0] * ((jnp.arange(z.shape[-1]) == targets[..., None]) - p)
    if "lse" in by:
        dz = dz + by["lse"][0] * p
    if "entropy" in by:
        dz = dz - by["entropy"][0] * p * (lp + by["entropy"][1])
    if "mean_logit" in by:
        share = 1 / z.shape[-1] if vocab is None else real / vocab
        dz = dz + by["mean_logit"][0] * share
    return jnp.broadcast_to(dz, z.shape)


def _kl(z, ref_hidden, ref_head, *, vocab):
    z, _ = _inside(z, vocab)
    lse = jax.nn.logsumexp(z, axis=-1)
    q = jax.nn.log_softmax(_inside(_logits(ref_hidden, ref_head, 1.0), vocab)[0])
    return lse, (jnp.sum(jnp.exp(q) * (q - (z - lse[..., None])), axis=-1),)


def _kl_grad(z, ref_hidden, ref_head, lse, _, g, *, vocab):
    z, _ = _inside(z, vocab)
    q = jax.nn.softmax(_inside(_logits(ref_hidden, ref_head, 1.0), vocab)[0])
    return g[0][..., None] * (jnp.exp(z - lse[..., None]) - q)


def _chunked(hidden, head, rows, other, kind, temperature, chunk):
    """The outputs of `kind`, each of the leading axes of `hidden`."""
    lead = hidden.shape[:-1]
    b = lead[0] if len(lead) > 1 else 1
    chunk = (chunk or chunk_of(head.shape[-1])) * parts_of(b)  # of each device
    flat = lambda a: a.reshape(b, -1, *a.shape[len(lead) :])
    settings = (kind, float(temperature), max(1, chunk // b))
    out = _scored(flat(hidden), head, flat(rows), other, *settings)
    return tuple(a.reshape(lead) for a in out)


def _logits(h, head, temperature):
    z = einsum32("brd,dv->brv", h, head.astype(h.dtype))
    return z if temperature == 1.0 else z / temperature


def _backward(z, h, head, rows, g, lse, out, *, other, kind, temperature, parts=1):
    """(dh, dW) of one chunk, from its logits. parts > 1: dW (parts, d, v), summed over each part's rows."""
    dz = (kind.backward(z, rows, other, lse, out, g) / temperature).astype(h.dtype)
    dh = jnp.einsum("brv,dv->brd", dz, head.astype(h.dtype))
    if parts == 1:
        return dh, einsum32("brd,brv->dv", h, dz)
    apart = lambda a: a.reshape(parts, -1, *a.shape[1:])
    return dh, _by_part(einsum32("pbrd,pbrv->pdv", apart(h), apart(dz)))


def _by_part(dw):
    """Each device keeps the sum of its own rows; without this XLA adds up all of dW at every chunk."""
    return constrain(dw, "batch", None, "vocab")


def _chunks(t: int, r: int) -> tuple[int, int]:
    """Number of chunks of at most r of t positions, and their equal size."""
    n = -(-t // r)
    return n, -(-t // n) if n else 0


def _split(a, n, r):
    """(b, t, ...) -> (n, b, r, ...), zeros at the end."""
    a = jnp.pad(a, ((0, 0), (0, n * r - a.shape[1])) + ((0, 0),) * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(a.shape[0], n, r, *a.shape[2:]), 1, 0)


def _join(a, t):
    """The inverse of _split."""
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :t]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _scored(hidden, head, rows, other, kind, temperature, r):
    """Outputs of hidden (b, t, d), each (b, t), r positions of every row at a time."""
    return _fwd(hidden, head, rows, other, kind, temperature, r)[0]


def _fwd(hidden, head, rows, other, kind, temperature, r):
    n, r = _chunks(hidden.shape[1], r)
    z = None
    if n <= 1:
        z = _logits(hidden, head, temperature)
        lse, out = kind.forward(z, rows, other)
    else:
        xs = (_split(hidden, n, r), _split(rows, n, r))
        one = lambda x: kind.forward(_logits(x[0], head, temperature), x[1], other)
        lse, out = jax.lax.map(one, xs)
        lse, out = jax.tree.map(lambda a: _join(a, hidden.shape[1]), (lse, out))
    return out, (z, hidden, head, rows, other, lse, out)


def _bwd(kind, temperature, r, saved, g):
    z, hidden, head, rows, other, lse, out = saved
    n, r = _chunks(hidden.shape[1], r)
    back = partial(_backward, other=other, kind=kind, temperature=temperature)
    if n <= 1:
        dh, dw = back(z, hidden, head, rows, g, lse, out)
    else:
        parts = parts_of(hidden.shape[0])

        def body(dw, xs):
            h, *rest = xs
            dh, more = back(_logits(h, head, temperature), h, head, *rest, parts=parts)
            return dw + more, dh

        xs = jax.tree.map(lambda a: _split(a, n, r), (hidden, rows, g, lse, out))
        zeros = jnp.zeros(head.shape, jnp.float32)
        if parts > 1:
            zeros = _by_part(jnp.zeros((parts, *head.shape), jnp.float32))
        dw, dh = jax.lax.scan(body, zeros, xs)
        dw = dw.sum(0) if parts > 1 else dw
        dh = _join(dh, hidden.shape[1])
    nothing = jax.tree.map(lambda a: None if _is_int(a) else jnp.zeros_like(a), (rows, other))
    return dh, dw.astype(head.dtype), *nothing


def _is_int(a):
    return jnp.issubdtype(a.dtype, jnp.integer)


_scored.defvjp(_fwd, _bwd)
