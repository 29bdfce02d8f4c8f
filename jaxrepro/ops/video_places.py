"""Where a token of a video lies in the layout of video_grid.py, as arithmetic instead of tables.

A table of 100,000 places is a constant of a megabyte in every program that reads it, and windows of sliding
attention hold eight times as many. Here a place is computed from its number, by the same functions on the host
(numpy) and inside a program (jax). `in_program` takes the table while it is small.

A box of `size` cut into cells of `part` holds them one behind the other, in raster order; those at the far end
of an axis may be smaller. Sizes of a cell may hence be arrays, as coordinates are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SMALL = 1 << 12  # entries up to which a table is a constant
WIDTH = 512  # entries of a row of `counted`
JUMPS = 16  # of a row, at most
Triple = Sequence[Any]  # along frames, height, width


def in_program(table: np.ndarray, compute: Callable[[], Any]) -> Any:
    """A table as a program reads it: itself while it is small, else what `compute` makes of less."""
    return table if table.size <= SMALL else compute()


def counted(table: np.ndarray) -> Any:
    """A table whose numbers mostly count up by one, from its jumps; itself where it has too many."""
    flat = table.ravel()
    past = -len(flat) % WIDTH
    rows = np.concatenate([flat, flat[-1] + 1 + np.arange(past)]).reshape(-1, WIDTH)
    jump = np.diff(rows, axis=1) - 1
    most = int((jump != 0).sum(1).max())
    if most > JUMPS:
        return table
    at = np.argsort(jump == 0, axis=1, kind="stable")[:, :most]  # jumps first, in their order
    size = np.take_along_axis(jump, at, 1).astype(np.int32)
    i = jnp.arange(WIDTH, dtype=jnp.int32)
    made = rows[:, :1].astype(np.int32) + i
    for n in range(most):
        made += jnp.where(i > at[:, n : n + 1].astype(np.int32), size[:, n : n + 1], 0)
    return made.ravel()[: len(flat)].reshape(table.shape)


def ravel(at: Triple, size: Triple) -> Any:
    """Raster number of coordinates in a box."""
    return (at[0] * size[1] + at[1]) * size[2] + at[2]


def unravel(n: Any, size: Triple) -> list[Any]:
    """Coordinates of a raster number in a box."""
    row = n // size[2]
    return [row // size[1], row % size[1], n % size[2]]


def enter(at: Triple, size: Triple, part: Triple) -> tuple[Any, list[Any], list[Any]]:
    """Of the cell that holds coordinates: how many tokens lie before it, where in it they are, its size."""
    cell = [a // p for a, p in zip(at, part)]
    box = _cut(cell, size, part)
    before = cell[0] * part[0] * size[1] * size[2]
    before = before + box[0] * (cell[1] * part[1] * size[2] + box[1] * cell[2] * part[2])
    return before, [a - c * p for a, c, p in zip(at, cell, part)], box


def find(n: Any, size: Triple, part: Triple) -> tuple[Any, list[Any], list[Any]]:
    """Of the cell that holds token n, counted cell by cell: its number inside, the cell's corner and size."""
    cell, box = [], []
    for a, behind in enumerate((size[1] * size[2], size[2], 1)):
        span = math.prod(box, start=part[a] * behind)  # of the tokens of one cell along this axis
        cell.append(n // span)
        n = n - cell[-1] * span
        box += _cut(cell[a:], size[a : a + 1], part[a : a + 1])
    return n, [c * p for c, p in zip(cell, part)], box


def _cut(cell, size, part):
    least = jnp.minimum if any(isinstance(x, jax.Array) for x in (*cell, *size)) else np.minimum
    return [least(p, n - c * p) for c, n, p in zip(cell, size, part)]


def _centre(box):
    return ravel([n // 2 for n in box], box)


def slot(n: Any, box: Triple) -> Any:
    """The slot of raster number n of a bucket: its centre comes first."""
    return (n != _centre(box)) * (n + (n < _centre(box)))


def unslot(j: Any, box: Triple) -> Any:
    """The raster number of slot j of a bucket."""
    return (j == 0) * _centre(box) + (j != 0) * (j - (j <= _centre(box)))


def divides(part: Triple, whole: Triple) -> bool:
    """Whether parts fill a whole box."""
    return not any(n % p for n, p in zip(whole, part))


def tokens_at(place: Any, size: Triple, tile: Triple, bucket: Triple) -> list[Any]:
    """Coordinates of the token at a place of the layout."""
    n, corner, box = find(place, size, tile)
    if divides(bucket, tile):
        n, inner, box = find(n, box, bucket)
        corner = [a + b for a, b in zip(corner, inner)]
        n = unslot(n, box)
    return [a + b for a, b in zip(corner, unravel(n, box))]


def places_of(at: Triple, size: Triple, tile: Triple, bucket: Triple) -> Any:
    """The place in the layout of the token with these coordinates."""
    before, at, box = enter(at, size, tile)
    if not divides(bucket, tile):
        return before + ravel(at, box)
    more, at, box = enter(at, box, bucket)
    return before + more + slot(ravel(at, box), box)


def _grouped(size, tile, part):
    """The grid of cells of `part`, and the groups of them that lie together: tiles where cells fill them."""
    cells = [-(-n // p) for n, p in zip(size, part)]
    return cells, [t // p for t, p in zip(tile, part)] if divides(part, tile) else cells


def cell_slots(
    cell: Any, j: Any, size: Triple, tile: Triple, bucket: Triple, part: Triple
) -> tuple[Any, Any]:
    """The place in the layout of slot j of each cell of `part` (any number where the slot is missing), and how
    many slots the cell has. Cells in the order of tiles where they fill them, else in raster order."""
    n, corner, box = find(cell, *_grouped(size, tile, part))
    start = [(a + b) * p for a, b, p in zip(corner, unravel(n, box), part)]
    box = [b + 0 for b in _cut([a // p for a, p in zip(start, part)], size, part)]
    at = [a + b for a, b in zip(start, unravel(unslot(j, box), box))]
    return places_of(at, size, tile, bucket), math.prod(box)


def slots_at(place: Any, size: Triple, tile: Triple, bucket: Triple, part: Triple) -> Any:
    """The slot, counted through all cells of `part`, of a place of the layout."""
    at = tokens_at(place, size, tile, bucket)
    cell = [a // p for a, p in zip(at, part)]
    _, inside, box = enter(at, size, part)
    before, group, left = enter(cell, *_grouped(size, tile, part))
    return (before + ravel(group, left)) * math.prod(part) + slot(ravel(inside, box), box)
