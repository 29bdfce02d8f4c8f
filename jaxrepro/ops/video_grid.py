"""Where the tokens of a video lie: tiles, windows of tiles, buckets. Host arithmetic, no array of a model.

Geometry of VORTA, arXiv:2505.18809 (v2), and of sliding-tile attention, arXiv:2502.04507:

    token grid          (f, h, w) = ((frames - 1)/4 + 1, height/16, width/16)
    tiles               n_a = ceil(size_a / tile_a) along axis a
    centre of a window  c_a = clip(q_a, win_a//2, n_a - 1 - win_a//2)      shifted inside at borders, never cut
    tile q sees tile k  |c_a - k_a| <= win_a//2 on all three axes
    margins of a bucket of m tokens that stay beside its centre: floor(m (1 - rate)) - 1

Tiles with one centre see one box of tiles, so a sliding window is prod_a max(n_a - win_a + 1, 1) dense
rectangles without a mask (`rectangles`), in a few classes of equal size.

**Layout.** The ops take the S = f h w tokens of a video tile by tile; inside a tile bucket by bucket where the
tile divides by the bucket, else in raster order; inside a bucket its centre first, then its margins in raster
order. Then the buckets are a reshape; elsewhere they are an index array. Nothing depends on the order of
tokens except what knows positions, so a model reorders tokens and position tables once (`to_layout`).

**Padding.** "auto" takes any size, and no layout holds a padded token: it is always S long. Tiles and buckets
are cut off at the far end of each axis, each on its own grid. A tile that is cut pads the rows of its
rectangle, and a window over cut tiles is shorter: keys lie at the front, so one length says which are real.
A bucket that is cut has its centre in the middle of what is left of it, keeps the same share of its margins
(at least the centre), and its missing slots are neither matched nor centres. "strict" refuses such sizes.
"""

import dataclasses
import itertools
import math
from fractions import Fraction
from functools import lru_cache
from numbers import Integral
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxrepro.config import UserError

AXES = ("frames", "height", "width")
PADDINGS = ("auto", "strict")


def tokens(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Token grid of a video of `frames` x `height` x `width` pixels: VAE 4 x 8 x 8, patches 1 x 2 x 2."""
    if frames < 1 or (frames - 1) % 4:
        raise UserError(
            f"frames={frames} is not 4 n + 1; take {4 * max(round((frames - 1) / 4), 0) + 1}"
        )
    for axis, n in (("height", height), ("width", width)):
        if n < 16 or n % 16:
            raise UserError(f"{axis}={n} does not divide by 16; take {16 * max(round(n / 16), 1)}")
    return (frames - 1) // 4 + 1, height // 16, width // 16


@dataclasses.dataclass(frozen=True)
class VideoGrid:
    """A token grid with its tiles, window and buckets; hashable, so a static argument of jit.

    size, tile, bucket: tokens along (frames, height, width). window: tiles, odd. rate: the share of a bucket
    that coreset attention drops, in [0, 1). A UserError names the axis and both numbers.
    """

    size: tuple[int, ...]
    tile: tuple[int, ...]
    window: tuple[int, ...] = (3, 3, 3)
    bucket: tuple[int, ...] = (2, 3, 2)
    rate: float = 0.5
    padding: str = "auto"

    def __post_init__(self):
        for name in ("size", "tile", "window", "bucket"):
            value = tuple(getattr(self, name))
            if len(value) != 3 or not all(isinstance(n, Integral) and n > 0 for n in value):
                raise UserError(
                    f"{name}={value} must be three whole numbers above 0, one for each of {AXES}"
                )
            object.__setattr__(self, name, tuple(map(int, value)))
        if self.padding not in PADDINGS:
            raise UserError(f"padding={self.padding!r} must be one of {PADDINGS}")
        for axis, n in zip(AXES, self.window):
            if n % 2 == 0:
                raise UserError(
                    f"window of {n} tiles along {axis} must be odd; take {n - 1} or {n + 1}"
                )
        if not 0 <= self.rate < 1:
            raise UserError(
                f"rate={self.rate} must be in [0, 1): the share of a bucket that is dropped"
            )
        if self.kept(math.prod(self.bucket)) < 0:
            m = math.prod(self.bucket)
            raise UserError(
                f"rate={self.rate} leaves none of the {m} tokens of bucket {self.bucket}; take at most {1 - 1 / m:.3g}"
            )
        if self.padding == "strict":
            for name in ("tile", "bucket"):
                for axis, n, part in zip(AXES, self.size, getattr(self, name)):
                    if n % part:
                        raise UserError(
                            f'{axis}: {n} tokens do not divide by a {name} of {part}; take a divisor, or padding="auto"'
                        )

    @property
    def length(self) -> int:
        """S, the number of tokens."""
        return math.prod(self.size)

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Number of tiles along each axis."""
        return tuple(-(-n // t) for n, t in zip(self.size, self.tile))

    @property
    def exact(self) -> bool:
        """Whether every tile and every bucket is whole."""
        return not any(n % p for part in (self.tile, self.bucket) for n, p in zip(self.size, part))

    @property
    def order(self) -> np.ndarray:
        """(S,) raster index of the token at each place of the layout."""
        return _layout(self)[0]

    @property
    def inverse(self) -> np.ndarray:
        """(S,) place in the layout of each token in raster order."""
        return _layout(self)[1]

    @property
    def flops(self) -> tuple[float, float, float]:
        """Work of full, coreset and sliding attention between video tokens, as shares of full attention."""
        seen = 1.0  # pairs of query and key, axis by axis
        for n, tile, groups in zip(self.size, self.tile, self.windows()):
            spans = [[min(r.stop * tile, n) - r.start * tile for r in pair] for pair in groups]
            seen *= sum(queries * keys for queries, keys in spans) / n**2
        return 1.0, (len(buckets(self).rows) / self.length) ** 2, seen

    def kept(self, m: int) -> int:
        """Margins that stay of a bucket of m tokens; below 0 where not even the centre would."""
        return (
            math.floor(m * (1 - Fraction(str(self.rate)))) - 1
        )  # a float 1 - 0.9 would round down

    def centres(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each axis, the window centre of every tile. Where the window is wider than the grid the upper bound wins."""
        return tuple(
            np.minimum(np.maximum(np.arange(n), w // 2), n - 1 - w // 2)
            for n, w in zip(self.tiles, self.window)
        )

    def windows(self) -> tuple[list[tuple[range, range]], ...]:
        """For each axis, the distinct windows: (tiles whose window it is, tiles that they see)."""
        axes = []
        for n, w, centre in zip(self.tiles, self.window, self.centres()):
            groups = []
            for c in np.unique(centre):
                members = np.flatnonzero(centre == c)
                start = max(int(c) - w // 2, 0)
                groups.append((range(members[0], members[-1] + 1), range(start, start + min(w, n))))
            axes.append(groups)
        return tuple(axes)


class Rectangles(NamedTuple):
    """Windows that equally many query tiles share, as dense attention of g rectangles. Places are of the layout."""

    tiles: int  # query tiles of each
    queries: np.ndarray  # (g, rows) places of query tokens; rows past the end repeat place 0
    keys: np.ndarray  # (g, s) places of key tokens, then of all text slots; the rest repeat place 0
    lengths: np.ndarray  # (g,) how many of the keys are video tokens


class Buckets(NamedTuple):
    """The buckets of a grid: G of m slots, centre first, and which rows of them are attended to."""

    slots: (
        np.ndarray
    )  # (G, m) place in the layout of each slot, -1 = missing; missing slots are last
    place: np.ndarray  # (S,) slot, counted through all buckets, of each place of the layout
    kept: np.ndarray  # (G,) margins that stay
    rows: np.ndarray  # (P,) of the G (1 + k) rows "centre, then the margins that stay", k = max kept, those that exist
    back: (
        np.ndarray
    )  # (G (1 + k),) the row of P that each reads; its bucket's centre where it does not exist
    contiguous: bool  # slots are 0, 1, 2, ...: grouping the layout is a reshape
    whole: bool  # all rows exist


@lru_cache(maxsize=64)
def _layout(grid: VideoGrid):
    raster = np.arange(grid.length)
    tile, bucket = _cell(grid, grid.tile), _cell(grid, grid.bucket)
    nested = not any(t % b for t, b in zip(grid.tile, grid.bucket))
    keys = (raster, _margin(grid, grid.bucket), bucket, tile) if nested else (raster, tile)
    order = np.lexsort(keys)  # the last key counts most
    return _fixed(order), _fixed(np.argsort(order))


def _cell(grid, part):
    """(S,) number of the cell of shape `part` that each token, in raster order, lies in."""
    at = np.indices(grid.size).reshape(3, -1) // np.reshape(part, (3, 1))
    return np.ravel_multi_index(at, [-(-n // p) for n, p in zip(grid.size, part)])


def _margin(grid, part):
    """(S,) whether each token, in raster order, is not the centre of its cell, or of what is left of it."""
    size, part = np.reshape(grid.size, (3, 1)), np.reshape(part, (3, 1))
    at = np.indices(grid.size).reshape(3, -1)
    left = np.minimum(part, size - at // part * part)
    return (at % part != left // 2).any(0)


def _fixed(x):
    x = np.asarray(x, np.int32)
    x.flags.writeable = False  # it is cached
    return x


@lru_cache(maxsize=64)
def cells(grid: VideoGrid, part: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Cells of shape `part` with m slots each, in the order of the layout, and where each token went.

    (G, m) place in the layout of each slot, the centre's first, missing ones last and -1; (S,) slot, counted
    through all cells, of each place of the layout.
    """
    cell, m = _cell(grid, part), math.prod(part)
    tokens = np.lexsort((np.arange(grid.length), _margin(grid, part), cell))
    count = np.bincount(cell)
    slots = np.full((len(count), m), -1)
    slots[np.arange(m) < count[:, None]] = grid.inverse[tokens]
    slots = slots[np.argsort(slots[:, 0])]
    place = np.empty(grid.length, np.int64)
    place[slots[slots >= 0]] = np.flatnonzero(slots >= 0)
    return _fixed(slots), _fixed(place)


@lru_cache(maxsize=64)
def buckets(grid: VideoGrid) -> Buckets:
    """The buckets of a grid, and the rows that coreset attention attends to."""
    slots, place = cells(grid, grid.bucket)
    kept = np.maximum([grid.kept(int(n)) for n in (slots >= 0).sum(1)], 0)
    exists = np.arange(1 + kept.max()) <= kept[:, None]
    number = np.cumsum(exists).reshape(exists.shape) - 1
    back = np.where(exists, number, number[:, :1]).ravel()
    contiguous = bool((slots.ravel() == np.arange(slots.size)).all())
    rows = _fixed(np.flatnonzero(exists))
    return Buckets(slots, place, _fixed(kept), rows, _fixed(back), contiguous, bool(exists.all()))


class Window(NamedTuple):
    """Query tiles that see one box of tiles; sorted places of the layout."""

    queries: np.ndarray  # (t,) of their tokens
    keys: np.ndarray  # (s,) of the tokens of the box
    tiles: int  # how many query tiles


def shared_windows(grid: VideoGrid) -> list[Window]:
    """Every window once, with all tokens that see it."""
    at = grid.inverse.reshape(grid.size)
    box = lambda spans: np.sort(
        at[tuple(slice(r.start * t, r.stop * t) for r, t in zip(spans, grid.tile))].ravel()
    )
    found = []
    for windows in itertools.product(*grid.windows()):
        queries, keys = zip(*windows)
        found.append(Window(box(queries), box(keys), math.prod(map(len, queries))))
    return found


class Items(NamedTuple):
    """Query rows in the order of their windows, in items of equally many rows of one window."""

    windows: list[Window]  # neighbours share keys
    queries: np.ndarray  # (r,) place of each row; rows past the end of a window repeat place 0
    back: np.ndarray  # (S,) the row of each place
    window: np.ndarray  # (items,) the window of each


@lru_cache(maxsize=64)
def items(grid: VideoGrid, rows: int) -> Items:
    """Every query of a grid in items of `rows` rows, for kernels that read keys where they lie."""
    windows = sorted(shared_windows(grid), key=lambda w: int(w.keys[0]))
    back = np.empty(grid.length, np.int64)
    queries, window = [], []
    for g, one in enumerate(windows):
        back[one.queries] = rows * len(window) + np.arange(len(one.queries))
        queries.append(np.pad(one.queries, (0, -len(one.queries) % rows)))
        window += [g] * (len(queries[-1]) // rows)
    return Items(windows, _fixed(np.concatenate(queries)), _fixed(back), _fixed(window))


def runs(keys: np.ndarray) -> list[tuple[int, int]]:
    """(first, end) of the runs of places that lie together, of sorted places."""
    edge = np.flatnonzero(np.diff(keys) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(keys, edge)]


@lru_cache(maxsize=64)
def rectangles(grid: VideoGrid, text: int = 0) -> tuple[tuple[Rectangles, ...], np.ndarray]:
    """The windows by class, most shared first, and (S,) the row of each token among all their query rows.

    text: slots of text that follow the S places and are keys of every window.
    """
    classes: dict[int, list] = {}
    for window in shared_windows(grid):
        classes.setdefault(window.tiles, []).append(window[:2])
    found, back, start = [], np.empty(grid.length, np.int64), 0
    extra = np.arange(grid.length, grid.length + text)
    for tiles in sorted(classes, reverse=True):
        queries, keys = zip(*classes[tiles])
        rows = max(map(len, queries))
        for i, q in enumerate(queries):
            back[q] = start + i * rows + np.arange(len(q))
        start += rows * len(queries)
        lengths = _fixed([len(k) for k in keys])
        keys = [np.concatenate([k, extra]) for k in keys]
        found.append(Rectangles(tiles, _padded(queries), _padded(keys), lengths))
    return tuple(found), _fixed(back)


def _padded(rows):
    width = max(map(len, rows))
    return _fixed([np.pad(r, (0, width - len(r))) for r in rows])


def to_layout(x: Shaped[Array, "b s ..."], grid: VideoGrid) -> Shaped[Array, "b s ..."]:
    """Rows of tokens from raster order to the order of the layout; what follows the S video tokens stays."""
    return _reorder(x, grid, grid.order)


def to_raster(x: Shaped[Array, "b s ..."], grid: VideoGrid) -> Shaped[Array, "b s ..."]:
    """Rows of tokens from the order of the layout to raster order; what follows the S video tokens stays."""
    return _reorder(x, grid, grid.inverse)


def _reorder(x, grid, index):
    rest = np.arange(grid.length, x.shape[1], dtype=np.int32)
    return jnp.take(x, np.concatenate([index, rest]), axis=1, mode="clip")
