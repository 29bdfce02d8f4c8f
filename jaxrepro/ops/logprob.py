"""Log-probabilities of chosen tokens without the (tokens, vocabulary) array.

    lp = z_y / T - lse(z / T),    z = h W;    H = lse - sum_j p_j z_j / T    (nats)
    d lp / d z_j = ([j = y] - p_j) / T,    d H / d z_j = -p_j (log p_j + H) / T

Tokens go through in chunks. Forward keeps h and the lse; backward computes the logits again (where
there is one chunk, they are kept) and sums dW in float32. A chunk takes the same number of positions of
every batch row, so a batch that is sharded stays where it lies.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrepro.ops.dense import einsum32
from jaxrepro.sharding import constrain, parts_of


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


def token_log_probs(
    hidden: Float[Array, "*b d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "*b"],
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
    entropy: bool = False,
) -> Any:
    """float32 log-probability (nats) of each target [, entropy of its distribution], any leading axes.

    head is float32 or not; the product runs in hidden's dtype and accumulates in float32. Both
    outputs are differentiable in hidden and head. Mask what comes out: there is no mask here. The
    first axis of three or more is the batch; memory is chunk * v floats (at least batch * v) on each
    device over which the mesh splits the batch.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be > 0: greedy has no log-probability")
    rows = hidden.shape[0] if hidden.ndim > 2 else 1
    chunk *= parts_of(rows)  # of each device
    flat = hidden.reshape(rows, -1, hidden.shape[-1])
    out = _scored(
        flat,
        head,
        targets.reshape(rows, -1),
        float(temperature),
        max(1, chunk // rows),
        entropy,
    )
    out = tuple(a.reshape(targets.shape) for a in out)
    return out if entropy else out[0]


def _logits(h, head, temperature):
    z = einsum32("brd,dv->brv", h, head.astype(h.dtype))
    return z if temperature == 1.0 else z / temperature


def _forward(z, targets, entropy):
    """(lse, lp[, entropy]) of one chunk, from its logits."""
    lse = jax.nn.logsumexp(z, axis=-1)
    picked = jnp.take_along_axis(z, targets[..., None], axis=-1, mode="clip")[..., 0]
    out = (lse, picked - lse)
    return (*out, lse - jnp.sum(jnp.exp(z - lse[..., None]) * z, axis=-1)) if entropy else out


def _backward(z, h, head, targets, g, lse, ent, temperature, parts=1):
    """(dh, dW) of one chunk; g and ent are (g_lp,) and () or (g_lp, g_entropy) and (entropy,).

    parts > 1: dW (parts, d, v) is the sum of each part of the rows.
    """
    lp = z - lse[..., None]
    p = jnp.exp(lp)
    dz = g[0][..., None] * ((jnp.arange(z.shape[-1]) == targets[..., None]) - p)
    if ent:
        dz = dz - g[1][..., None] * p * (lp + ent[0][..., None])
    dz = (dz / temperature).astype(h.dtype)
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


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _scored(hidden, head, targets, temperature, r, entropy):
    """(lp[, entropy]) of hidden (b, t, d), r positions of every row at a time."""
    return _fwd(hidden, head, targets, temperature, r, entropy)[0]


def _fwd(hidden, head, targets, temperature, r, entropy):
    n, r = _chunks(hidden.shape[1], r)
    z = None
    if n <= 1:
        z = _logits(hidden, head, temperature)
        out = _forward(z, targets, entropy)
    else:
        xs = (_split(hidden, n, r), _split(targets, n, r))
        one = lambda x: _forward(_logits(x[0], head, temperature), x[1], entropy)
        out = jax.lax.map(one, xs)
        out = tuple(_join(a, hidden.shape[1]) for a in out)
    return out[1:], (z, hidden, head, targets, out[0], out[2:])


def _bwd(temperature, r, entropy, saved, g):
    z, hidden, head, targets, lse, ent = saved
    n, r = _chunks(hidden.shape[1], r)
    if n <= 1:
        dh, dw = _backward(z, hidden, head, targets, g, lse, ent, temperature)
    else:
        parts = parts_of(hidden.shape[0])

        def body(dw, xs):
            h, y, *rest = xs
            z = _logits(h, head, temperature)
            dh, more = _backward(z, h, head, y, *rest, temperature, parts)
            return dw + more, dh

        xs = jax.tree.map(lambda a: _split(a, n, r), (hidden, targets, g, lse, ent))
        zeros = jnp.zeros(head.shape, jnp.float32)
        if parts > 1:
            zeros = _by_part(jnp.zeros((parts, *head.shape), jnp.float32))
        dw, dh = jax.lax.scan(body, zeros, xs)
        dw = dw.sum(0) if parts > 1 else dw
        dh = _join(dh, hidden.shape[1])
    return dh, dw.astype(head.dtype), None


_scored.defvjp(_fwd, _bwd)
