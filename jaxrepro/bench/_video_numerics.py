"""What attention of a video ought to compute: its grid, its work, and its outputs in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

DENSE = "dense"
WORST, MEAN = (
    2e-2,
    2e-3,
)  # errors in bfloat16, relative to the largest and to the mean size of an output


def grid_of(layer: Mapping[str, Any]) -> Any:
    """The token grid of a layer."""
    from jaxrepro.ops.video_grid import VideoGrid

    return VideoGrid(*(tuple(layer[name]) for name in ("size", "tile", "window")))


def pairs(layer: Mapping[str, Any]) -> dict[str, float]:
    """Pairs of query and key of one head, by branch; only valid text counts."""
    from jaxrepro.ops.video_grid import buckets

    grid, valid = grid_of(layer), layer["valid"]
    n, pooled = grid.length, len(buckets(grid).rows)
    text = valid * (n + valid)  # what text sees
    return {
        DENSE: float((n + valid) ** 2),
        "coreset": float((pooled + valid) ** 2),
        "sliding": grid.flops[2] * n**2 + n * valid + text,
    }


def errors(
    layer: Mapping[str, Any], kind: str, data: tuple[Any, ...], o: Any
) -> tuple[float, float]:
    """Largest and mean error of o over queries of three windows, against float32, relative to the output's size."""
    import jax
    import jax.numpy as jnp

    from jaxrepro.ops import coreset as pooling
    from jaxrepro.ops.attention import attend
    from jaxrepro.ops.video_grid import items

    q, k, v, _ = data
    grid, valid = grid_of(layer), layer["valid"]
    n = grid.length
    rng = np.random.default_rng(0)
    words = np.arange(n, n + valid)

    def compare(rows, keys, qkv=(q, k, v), o=o):
        q, k, v = (
            x.astype(jnp.float32) for x in (qkv[0][:, rows], qkv[1][:, keys], qkv[2][:, keys])
        )
        want = attend(q, k, v, jnp.ones((1, 1, 1, k.shape[1]), bool))[0]
        off = jnp.abs(o[:, rows].astype(jnp.float32) - want)
        size = jnp.abs(want)
        return float(off.max() / size.max()), float(off.mean() / size.mean())

    some = lambda places: np.sort(rng.permutation(places)[:64])
    with jax.default_matmul_precision("highest"):
        if kind == "coreset":
            of_q = pooling.match(q[:, :n], grid)
            of_k = of_q if layer["shared"] else pooling.match(k[:, :n], grid)
            small = lambda x, m: jnp.concatenate(
                [pooling.pool(x[:, :n], m, grid), x[:, n:]], axis=1
            )
            qkv = small(q, of_q), small(k, of_k), small(v, of_k)
            p = qkv[0].shape[1] - layer["text"]
            seen = np.arange(p + valid)
            found = [compare(some(np.arange(p)), seen, qkv, small(o, of_q)) for _ in range(3)]
        else:
            windows = items(grid, 128).windows
            found = []
            for g in rng.choice(len(windows), 3):
                keys = np.arange(n) if kind == DENSE else windows[g].keys
                found.append(compare(some(windows[g].queries), np.concatenate([keys, words])))
    worst, mean = zip(*found)
    return max(worst), max(mean)


def right(name: str, found: tuple[float, float], notes: list[str]) -> bool:
    """Whether errors are within the limits of bfloat16; a note says what they are."""
    ok = found[0] <= WORST and found[1] <= MEAN
    verdict = "" if ok else f"; WRONG, not timed (limits {WORST:g} and {MEAN:g})"
    notes.append(
        f"{name}: errors against float32 {found[0]:.1e} at most, {found[1]:.1e} mean{verdict}"
    )
    return ok
