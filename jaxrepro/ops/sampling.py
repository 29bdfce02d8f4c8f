"""Drawing tokens from logits without sorting the vocabulary.

    z = logits / T;   top-k keeps z_j >= the k-th largest;   top-p keeps j with sum_{p_i > p_j} p_i < P
    min-p keeps p_j >= m max p  (arXiv:2407.01082);   a seen token has z / r where z > 0, else z r
    (repetition penalty r, arXiv:1909.05858)

The second is the sorted definition ("the shortest head of the sorted list whose mass reaches P") with
all ties of its last token kept. Its threshold is found by bisection over the bit patterns of float32,
which is exact in 30 sweeps; inside a top-k set the sweeps read k numbers. The order is that of Hugging
Face: top-k, then top-p of what is left, then min-p.

A draw inverts the cumulative distribution, so a row needs one random number per token instead of one
per entry of the vocabulary, and it depends on nothing but its own key and logits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

BLOCK = 256  # entries of one block of the two-level cumulative sum
GROUP = 64  # entries of one group of the two-level search for the largest
ONE = 0x3F800000  # the bits of 1.0f


def nucleus_floor(p: Float[Array, "*b v"], top_p: float) -> Float[Array, "*b 1"]:
    """The smallest t with sum of {p_i > t} < top_p; p >= t is the nucleus. Exact for float32 p <= 1."""

    def halve(_, bounds):
        low, high = bounds  # the mass above low is >= top_p (or low = 0), above high it is < top_p
        middle = (low + high) // 2
        t = jax.lax.bitcast_convert_type(middle, jnp.float32)
        small = jnp.sum(jnp.where(p > t, p, 0.0), axis=-1, keepdims=True) < top_p
        return jnp.where(small, low, middle), jnp.where(small, middle, high)

    shape = (*p.shape[:-1], 1)
    bounds = jnp.zeros(shape, jnp.int32), jnp.full(shape, ONE, jnp.int32)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 30, halve, bounds)[1], jnp.float32)


def largest(z: Float[Array, "*b v"], k: int) -> tuple[Float[Array, "*b k"], Int[Array, "*b k"]]:
    """`jax.lax.top_k`, ties included, in about one sweep of a long row.

    The k largest lie in the k groups of consecutive entries whose maxima are largest.
    """
    v = z.shape[-1]
    if k * GROUP * 4 > v:
        return tuple(jax.lax.top_k(z, k))
    lead = z.shape[:-1]
    pad = [(0, 0)] * len(lead) + [(0, -v % GROUP)]
    groups = jnp.pad(z, pad, constant_values=-jnp.inf).reshape(*lead, -1, GROUP)
    # in ascending order, so that equal entries stay in the order of their indices
    chosen = jnp.sort(jax.lax.top_k(groups.max(-1), k)[1], axis=-1)
    some = jnp.take_along_axis(groups, chosen[..., None], axis=-2).reshape(*lead, -1)
    best, at = jax.lax.top_k(some, k)
    group = jnp.take_along_axis(chosen, at // GROUP, axis=-1)
    return best, group * GROUP + at % GROUP


def greedy(z: Float[Array, "*b v"]) -> Int[Array, "*b"]:
    """`jnp.argmax` of rows without NaN as two plain reductions, which CPUs vectorise."""
    v = z.shape[-1]
    best = z == z.max(-1, keepdims=True)
    return jnp.min(jnp.where(best, jnp.arange(v, dtype=jnp.int32), v - 1), axis=-1)


def penalise(
    z: Float[Array, "*b v"], seen: Bool[Array, "*b v"], penalty: float
) -> Float[Array, "*b v"]:
    """Logits in which seen tokens are `penalty` times less likely to repeat; before the temperature."""
    return jnp.where(seen, jnp.where(z < 0, z * penalty, z / penalty), z)


def truncate(
    z: Float[Array, "*b v"], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Array, "*b v"]:
    """Tempered logits with -inf outside the top-k set (0 = all), then its top-p set, then min-p.

    All ties of the last token kept by top-k or top-p are kept.
    """
    z = _nucleus(z, top_k, top_p)
    if min_p > 0:
        z = jnp.where(jnp.exp(z - z.max(-1, keepdims=True)) >= min_p, z, -jnp.inf)
    return z


def _nucleus(z, top_k, top_p):
    cut_k, cut_p = 0 < top_k < z.shape[-1], top_p < 1.0
    if cut_k:
        best = largest(z, top_k)[0]
        floor = best[..., -1:]
        if cut_p:
            ties = jnp.sum(z == floor, axis=-1, keepdims=True)
            inside = jnp.sum(best == floor, axis=-1, keepdims=True)
            e = jnp.exp(best - best[..., :1])
            total = e.sum(-1, keepdims=True) + (ties - inside) * e[..., -1:]
            p = e / total
            reach = nucleus_floor(p, top_p)
            floor = jnp.min(jnp.where(p >= reach, best, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(z >= floor, z, -jnp.inf)
    if cut_p:
        p = jax.nn.softmax(z, axis=-1)
        return jnp.where(p >= nucleus_floor(p, top_p), z, -jnp.inf)
    return z


def draw(keys: Key[Array, "b"], z: Float[Array, "b v"]) -> Int[Array, "b"]:
    """One token per row from softmax(z); -inf is never drawn. Row j uses keys[j] alone."""
    u = jax.vmap(lambda key: jax.random.uniform(key))(keys)
    p = jnp.exp(z - z.max(-1, keepdims=True))
    b, v = p.shape
    if v <= 4 * BLOCK:
        return _invert(p, u)[0]
    blocks = jnp.pad(p, ((0, 0), (0, -v % BLOCK))).reshape(b, -1, BLOCK)
    outer, rest = _invert(blocks.sum(-1), u)
    block = jnp.take_along_axis(blocks, outer[:, None, None], axis=1)[:, 0]
    return outer * BLOCK + _invert(block, rest)[0]


def _invert(w, u):
    """First index whose cumulative weight exceeds u * total, and how far u lies into it, in [0, 1)."""
    c = jnp.cumsum(w, axis=-1)
    # a parallel sum is not monotone to the last bit: an entry of weight 0 may never be the answer
    c = jnp.where(w > 0, c, 0.0)
    target = (u * c.max(-1))[:, None]  # u < 1, so some entry lies above
    v = w.shape[-1]
    index = jnp.min(jnp.where(c > target, jnp.arange(v, dtype=jnp.int32), v - 1), axis=-1)
    at = index[:, None]
    weight = jnp.take_along_axis(w, at, 1)
    inside = (target - (jnp.take_along_axis(c, at, 1) - weight)) / weight
    return index, jnp.clip(inside[:, 0], min=0.0, max=1 - 2.0**-23)
