"""Attention, the XLA reference: grouped queries, any boolean mask, softmax in float32.

    lse = log sum_s exp(q k_s / sqrt(i)),    o = sum_s exp(q k_s / sqrt(i) - lse) v_s

Two disjoint sets of keys combine exactly by their log-sum-exp, so tokens that many rows share (a
prompt and its n completions) are stored and read once:

    o = sigmoid(lse_1 - lse_2) o_1 + sigmoid(lse_2 - lse_1) o_2
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MASKED = -1e30  # finite, so that a row without any key gives zeros and not NaN


def attend(
    q: Float[Array, "b t h i"],
    k: Float[Array, "b s k i"],
    v: Float[Array, "b s k i"],
    mask: Bool[Array, "#b #1 #t s"],
) -> tuple[Float[Array, "b t h i"], Float[Array, "b t h"]]:
    """Attention output and its log-sum-exp (float32); query head j reads kv head j // (h / k).

    A query whose mask is False everywhere gets o = 0 and lse = MASKED.
    """
    b, t, h, i = q.shape
    kv = k.shape[2]
    grouped = q.reshape(b, t, kv, h // kv, i)
    scores = jnp.einsum("btkgi,bski->bkgts", grouped, k, preferred_element_type=jnp.float32)
    keep = mask[:, :, None]  # (b, 1, 1, t, s)
    scores = jnp.where(keep, scores * i**-0.5, MASKED)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.where(keep, jnp.exp(scores - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    o = jnp.einsum("bkgts,bski->btkgi", (weights / total).astype(v.dtype), v)
    lse = jnp.where(some, top + jnp.log(total), MASKED)[..., 0]  # (b, k, g, t)
    return o.reshape(b, t, h, i), jnp.moveaxis(lse, -1, 1).reshape(b, t, h)


def merge(
    o_1: Float[Array, "*b i"],
    lse_1: Float[Array, "*b"],
    o_2: Float[Array, "*b i"],
    lse_2: Float[Array, "*b"],
) -> Float[Array, "*b i"]:
    """Attention over the union of two disjoint sets of keys, from the output and lse of each."""
    share = jax.nn.sigmoid(lse_1 - lse_2)[..., None]
    return (o_1 * share + o_2 * (1 - share)).astype(o_1.dtype)
