"""What attention of a video ought to compute: its grid, its work, and its outputs, by numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# names of cases
DENSE, KERNEL, SAME_LENGTH = "dense", "sliding, kernel", "dense of the same length"
MIXED = "routed, coreset and sliding"
ALL_FULL = "routed, all heads full"
KEPT, REUSED = "routed, with PAB, computing", "routed, with PAB, reusing"
OTHERS = "attention modules left out"  # all but what PAB saves
WITH_PAB, PREDICTED = "routed, with PAB", "routed, with PAB as the profile predicts"  # of a video
CHUNK = 4  # heads that a branch computes at once
WARMUP = 3  # calls of a case that are not timed, behind the first
WORST, MEAN = 2e-2, 2e-3  # errors in bfloat16
LIMITS = (
    "errors of cases below: the largest and the mean difference to numpy, relative to the largest and the mean size "
    f"of an output; limits {WORST:g} and {MEAN:g}"
)


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
    """Largest and mean error of o over some queries, against numpy, relative to the output's size.

    Of dense and sliding attention the queries are of three windows; of coreset attention they are tokens that attend
    and tokens that were dropped, whose match is made here, bucket by bucket; and valid text. Padded text must be 0.
    """
    grid, valid = grid_of(layer), layer["valid"]
    n = grid.length
    q, k, v, o = (_host(x)[0] for x in (*data[:3], o))
    if o[n + valid :].any():
        return float("inf"), float("inf")
    words, found = np.arange(n, n + valid), []
    for head in range(q.shape[1]):
        for at, rows, keys in _examples(layer, kind, q[:n, head], k[:n, head], words):
            logits = (q[rows, head] @ k[keys, head].T).astype(np.float64) * q.shape[2] ** -0.5
            weights = np.exp(logits - logits.max(1, keepdims=True))
            want = weights @ v[keys, head] / weights.sum(1, keepdims=True)
            found.append(difference(o[at, head], want))
    worst, mean = zip(*found)
    return max(worst), max(mean)


def _host(x):
    """A float32 host array."""
    return np.asarray(x.astype(np.float32))


def _examples(layer, kind, q, k, words):
    """(places of outputs, places of the queries they are of, places of the keys) of a head; words: of valid text."""
    from jaxrepro.ops.video_grid import items

    grid = grid_of(layer)
    rng, every = np.random.default_rng(0), np.arange(grid.length)
    some = lambda places: rng.permutation(places)[:64]
    if kind == "coreset":
        of_q = match(grid, q)
        of_k = of_q if layer["shared"] else match(grid, k)
        seen = np.unique(of_k)  # a dropped token is no key
        own = of_q == every
        found = [(at, of_q[at], seen) for at in (some(every[own]), some(every[~own]))]
    else:
        seen, windows = every, items(grid, 128).windows
        picked = [windows[g] for g in rng.choice(len(windows), 3)]
        places = [(some(w.queries), every if kind == DENSE else w.keys) for w in picked]
        found = [(at, at, keys) for at, keys in places]
    text = some(words)
    found.append((text, text, seen))
    return [(at, rows, np.concatenate([keys, words])) for at, rows, keys in found if len(at)]


def match(grid: Any, x: Any) -> np.ndarray:
    """(S,) for each place the place whose output it takes: its own where it attends, else its bucket's centre.

    x (S, i) of one head. By the definition and in float64, bucket by bucket from the raster, not by the program's own
    tables: the margins of least cosine to the centre attend.
    """
    x = _host(x).astype(np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    place = np.asarray(grid.inverse).reshape(grid.size)
    source = np.arange(grid.length)
    for corner in np.ndindex(*(-(-n // b) for n, b in zip(grid.size, grid.bucket))):
        box = place[tuple(slice(c * b, c * b + b) for c, b in zip(corner, grid.bucket))]
        centre = box[tuple(n // 2 for n in box.shape)]
        margins = box[box != centre]
        kept = max(int(box.size * (1 - grid.rate) + 1e-9) - 1, 0)
        order = np.argsort(x[margins] @ x[centre], kind="stable")
        source[margins[order[kept:]]] = centre
    return source


def difference(o: Any, want: Any) -> tuple[float, float]:
    """Largest and mean difference of two outputs, relative to the size of the second."""
    o, want = _host(o), _host(want)
    off, size = np.abs(o - want), np.abs(want)
    return float(off.max() / size.max()), float(off.mean() / size.mean())


def told(layer: Mapping[str, Any]) -> str:
    """How many text slots of a layer are filled, in words; "" where it has none."""
    return f", {layer['valid']} of {layer['text']} text tokens valid" if layer["text"] else ""


def right(name: str, found: tuple[float, float], notes: list[str]) -> bool:
    """Whether errors are within the limits of bfloat16; a note says what they are."""
    ok = found[0] <= WORST and found[1] <= MEAN
    notes.append(f"{name}: {found[0]:.1e}, {found[1]:.1e}{'' if ok else '; WRONG, not timed'}")
    return ok
