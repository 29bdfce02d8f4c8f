"""Helper: attention over a video by its definitions, in numpy, in raster order, token by token."""

import contextlib
import itertools

import jax
import numpy as np
from hypothesis import strategies as st

sides = lambda low, high: st.tuples(*[st.integers(low, high)] * 3)
# arguments, because a checked constructor may not run inside a strategy
GRIDS = st.fixed_dictionaries(
    {
        "size": sides(1, 5),
        "tile": sides(1, 4),
        "window": st.tuples(*[st.sampled_from([1, 3, 5])] * 3),
        "bucket": sides(1, 3).filter(lambda bucket: np.prod(bucket) > 3),
        "rate": st.sampled_from([0.0, 0.25, 0.5]),
    }
)


@contextlib.contextmanager
def float64():
    """64-bit jax; its switch moved in jax 0.8."""
    if hasattr(jax, "enable_x64"):
        with jax.enable_x64(True):
            yield
    else:
        from jax.experimental import enable_x64

        with enable_x64():
            yield


def draw(seed, size, *, b=1, h=2, i=4, text=0, dtype="float64"):
    """q, k, v (b, s, h, i) of a grid and text slots, as numpy."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, b, int(np.prod(size)) + text, h, i)).astype(dtype)


def softmax_attention(q, k, v, see):
    """q (t, h, i), k and v (s, h, i), see (t, s); a query that sees nothing gives 0."""
    logits = np.einsum("thi,shi->hts", q, k) / np.sqrt(q.shape[-1])
    logits = np.where(see, logits, -np.inf)
    weights = np.exp(logits - np.maximum(logits.max(-1, keepdims=True), -1e30))
    total = weights.sum(-1, keepdims=True)
    return np.einsum("hts,shi->thi", weights / np.where(total == 0, 1, total), v)


def joint(see, slots, text):
    """(s, s) of video pairs, with text slots of which the first `text` are valid."""
    n = len(see)
    whole = np.ones((n + slots, n + slots), bool)
    whole[:n, :n] = see
    whole[n + text :] = whole[:, n + text :] = False
    return whole


def window_pairs(size, tile, window):
    """(S, S) by the definition: |clip(q, w//2, n-1-w//2) - k| <= w//2 in tiles, on every axis."""
    positions = list(itertools.product(*map(range, size)))
    see = np.zeros((len(positions),) * 2, bool)
    for (i, q), (j, k) in itertools.product(enumerate(positions), repeat=2):
        ok = True
        for a in range(3):
            n, half = -(-size[a] // tile[a]), window[a] // 2
            centre = min(max(q[a] // tile[a], half), n - 1 - half)
            ok &= abs(centre - k[a] // tile[a]) <= half
        see[i, j] = ok
    return see


def sliding(q, k, v, size, tile, window, text=0):
    """One row, q (S + slots, h, i)."""
    see = joint(window_pairs(size, tile, window), len(q) - int(np.prod(size)), text)
    return softmax_attention(q, k, v, see)


def members(size, bucket):
    """For each bucket, raster indices of its tokens, the centre first."""
    found = []
    for corner in itertools.product(*(range(0, n, b) for n, b in zip(size, bucket))):
        spans = [range(c, min(c + b, n)) for c, b, n in zip(corner, bucket, size)]
        tokens = [int(np.ravel_multi_index(p, size)) for p in itertools.product(*spans)]
        centre = int(np.ravel_multi_index([s[len(s) // 2] for s in spans], size))
        found.append([centre, *(t for t in tokens if t != centre)])
    return found


def picks(x, size, bucket, kept):
    """One head, x (S, i): for each bucket (centre, margins kept, margins dropped); kept(m) of m tokens stay."""
    unit = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    found = []
    for centre, *margins in members(size, bucket):
        order = np.argsort([unit[centre] @ unit[t] for t in margins], kind="stable")
        k = max(kept(1 + len(margins)), 0)
        found.append((centre, [margins[o] for o in order[:k]], [margins[o] for o in order[k:]]))
    return found


def coreset(q, k, v, size, bucket, kept, text=0, shared=False):
    """One row, q (S + slots, h, i)."""
    n = int(np.prod(size))
    o = np.zeros_like(q)
    words = list(range(n, n + text))
    for h in range(q.shape[1]):
        of_q = picks(q[:n, h], size, bucket, kept)
        of_k = of_q if shared else picks(k[:n, h], size, bucket, kept)
        rows = [t for c, m, _ in of_q for t in (c, *m)] + words
        keys = [t for c, m, _ in of_k for t in (c, *m)] + words
        one = slice(h, h + 1)
        see = np.ones((len(rows), len(keys)), bool)
        o[rows, one] = softmax_attention(q[rows, one], k[keys, one], v[keys, one], see)
        for c, _, dropped in of_q:
            o[dropped, h] = o[c, h]
    return o
