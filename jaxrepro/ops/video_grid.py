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
from numbers import Real
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxrepro.config import UserError
from jaxrepro.ops import checks
from jaxrepro.ops import video_places as places

AXES = ("frames", "height", "width")
PADDINGS = ("auto", "strict")
TILE, TILES, BUCKET = (6, 9, 8), (4, 5, 5), (2, 3, 2)  # see `VideoGrid.propose`


def tokens(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Token grid of a video of `frames` x `height` x `width` pixels: VAE 4 x 8 x 8, patches 1 x 2 x 2."""
    for name, n in (("frames", frames), ("height", height), ("width", width)):
        checks.whole(name, n)
    if (frames - 1) % 4:
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
            object.__setattr__(self, name, checks.sizes(name, getattr(self, name), AXES))
        if self.padding not in PADDINGS:
            raise UserError(f"padding={self.padding!r} must be one of {PADDINGS}")
        for axis, n in zip(AXES, self.window):
            if n % 2 == 0:
                raise UserError(
                    f"window of {n} tiles along {axis} must be odd; take {n - 1} or {n + 1}"
                )
        if not isinstance(self.rate, Real) or not 0 <= self.rate < 1:
            raise UserError(
                f"rate={self.rate!r} must be a number in [0, 1): the share of a bucket that is dropped"
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
                            f"{axis}: {n} tokens do not divide by a {name} of {part}; "
                            f'take {_nearest(n, part, n)}, or padding="auto"'
                        )

    @classmethod
    def propose(
        cls,
        size: tuple[int, int, int],
        *,
        window: tuple[int, int, int] = (3, 3, 3),
        rate: float = 0.5,
        padding: str = "auto",
    ) -> "VideoGrid":
        """A grid whose tiles and buckets are near the published ones, and divide where they can.

        Along each axis a tile is the divisor nearest to 6 frames, 9 rows, 8 columns that leaves at least 4, 5
        and 5 tiles, so that 3 of them are few. That gives the tiles of VORTA for HunyuanVideo (30, 45, 80) and
        Wan 2.1 14B (20, 45, 80); no rule is published, so this one is inferred. A bucket is likewise near
        (2, 3, 2). "auto" cuts tiles and buckets where a size has no divisor within a factor of 2 (1.5 of
        buckets); "strict" takes the nearest there is, and may give tiles of one token.
        """
        grid = cls(size, (1, 1, 1), window, (1, 1, 1), 0.0, padding)  # checks the size
        tile, bucket = [], []
        for n, at, tiles, of in zip(grid.size, TILE, TILES, BUCKET):
            tile.append(_part(n, at, max(n // tiles, 1), 2, padding))
            bucket.append(_part(n, of, n, 1.5, padding))
        return cls(size, tuple(tile), window, tuple(bucket), rate, padding)

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

    def to_layout(self, x: Shaped[Array, "b s ..."]) -> Shaped[Array, "b s ..."]:
        """Rows from raster order to the order of the layout; what follows the S video tokens stays."""
        return to_layout(x, self)

    def to_raster(self, x: Shaped[Array, "b s ..."]) -> Shaped[Array, "b s ..."]:
        """Rows from the order of the layout to raster order; what follows the S video tokens stays."""
        return to_raster(x, self)

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


def _nearest(n, wanted, most):
    """The divisor of n up to `most` whose ratio to `wanted` is nearest to 1."""
    found = [d for d in range(1, most + 1) if n % d == 0]
    return min(found, key=lambda d: max(d / wanted, wanted / d))


def _part(n, wanted, most, factor, padding):
    """Size of a tile or bucket along an axis of n tokens."""
    divisor, free = _nearest(n, wanted, most), min(wanted, most)
    near = max(divisor / free, free / divisor) <= factor
    return divisor if near or padding == "strict" else free


class Rectangles(NamedTuple):
    """Windows that equally many query tiles share, as dense attention of g rectangles. Places are of the layout."""

    tiles: int  # query tiles of each
    queries: (
        np.ndarray
    )  # (g, rows) places of query tokens; rows past the end count on, maybe past all places
    keys: (
        np.ndarray
    )  # (g, s) places of key tokens, then of all text slots; the rest counts on in the same way
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
    order = _ravel_order(grid, np.arange(grid.length))
    return _fixed(order), _fixed(_inverse(grid, np.arange(grid.length)))


def _ravel_order(grid, place):
    return places.ravel(places.tokens_at(place, grid.size, grid.tile, grid.bucket), grid.size)


def _inverse(grid, raster):
    return places.places_of(places.unravel(raster, grid.size), grid.size, grid.tile, grid.bucket)


def _fixed(x):
    x = np.asarray(x, np.int32)
    x.flags.writeable = False  # it is cached
    return x


@lru_cache(maxsize=64)
def cells(grid: VideoGrid, part: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Cells of shape `part` with m slots each, and where each token went.

    (G, m) place in the layout of each slot, the centre's first, missing ones last and -1; (S,) slot, counted
    through all cells, of each place of the layout.
    """
    return tuple(map(_fixed, _cells(grid, part, np)))


def _cells(grid, part, xp):
    sizes, m = (grid.size, grid.tile, grid.bucket, part), math.prod(part)
    cell, j = xp.arange(math.prod(-(-n // p) for n, p in zip(grid.size, part))), xp.arange(m)
    at, count = places.cell_slots(cell[:, None], j, *sizes)
    return xp.where(j < count, at, -1), places.slots_at(xp.arange(grid.length), *sizes)


def cells_in_program(grid: VideoGrid, part: tuple[int, int, int]) -> tuple[Any, Any]:
    """`cells` as a program reads them: computed where they are large."""
    slots, place = cells(grid, part)
    return tuple(
        places.in_program(table, lambda j=j: _cells(grid, part, jnp)[j])
        for j, table in enumerate((slots, place))
    )


@lru_cache(maxsize=64)
def buckets(grid: VideoGrid) -> Buckets:
    """The buckets of a grid, and the rows that coreset attention attends to."""
    slots, place = cells(grid, grid.bucket)
    kept = _kept(grid)[(slots >= 0).sum(1)]
    exists = np.arange(1 + kept.max()) <= kept[:, None]
    contiguous = bool((slots.ravel() == np.arange(slots.size)).all())
    rows = _fixed(np.flatnonzero(exists))
    return Buckets(
        slots, place, kept, rows, _fixed(_back(exists, np)), contiguous, bool(exists.all())
    )


def _kept(grid):
    """Margins that stay of a bucket of so many tokens, from none to all."""
    return _fixed([max(grid.kept(n), 0) for n in range(1 + math.prod(grid.bucket))])


def _back(exists, xp):
    number = xp.cumsum(exists.ravel()).reshape(exists.shape) - 1
    return xp.where(exists, number, number[:, :1]).ravel()


def bucket_table(grid: VideoGrid, name: str) -> Any:
    """A field of `buckets` as a program reads it: computed where it is large; `kept` (1,) where all are equal."""
    table = buckets(grid)
    if name == "kept" and (table.kept == table.kept[0]).all():
        return table.kept[:1]

    def compute():
        slots, place = _cells(grid, grid.bucket, jnp)
        if name in ("slots", "place"):
            return slots if name == "slots" else place
        kept = jnp.asarray(_kept(grid))[jnp.sum(slots >= 0, axis=1)]
        if name == "kept":
            return kept
        exists = jnp.arange(1 + int(table.kept.max())) <= kept[:, None]
        if name == "back":
            return _back(exists, jnp)
        return jnp.flatnonzero(exists, size=len(table.rows))

    return places.in_program(getattr(table, name), compute)


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
    return _fixed([np.concatenate([r, r[-1] + 1 + np.arange(width - len(r))]) for r in rows])


def to_layout(x: Shaped[Array, "b s ..."], grid: VideoGrid) -> Shaped[Array, "b s ..."]:
    """Rows of tokens from raster order to the order of the layout; what follows the S video tokens stays."""
    return _reorder(x, grid, False)


def to_raster(x: Shaped[Array, "b s ..."], grid: VideoGrid) -> Shaped[Array, "b s ..."]:
    """Rows of tokens from the order of the layout to raster order; what follows the S video tokens stays."""
    return _reorder(x, grid, True)


def _reorder(x, grid, back):
    s = grid.length
    if x.shape[1] < s:
        raise UserError(
            f"{x.shape[1]} rows are fewer than the {s} tokens of grid {grid.size}; give all of them"
        )
    if places.divides(grid.tile, grid.size):
        y = _transposed(x[:, :s], grid, back)
    else:
        table, compute = (grid.inverse, _inverse) if back else (grid.order, _ravel_order)
        index = places.in_program(table, lambda: compute(grid, jnp.arange(s)))
        y = jnp.take(x, index, axis=1, mode="clip", unique_indices=True)
    return y if x.shape[1] == s else jnp.concatenate([y, x[:, s:]], axis=1)


def _transposed(x, grid, back):
    """`_reorder` where no tile is cut: axes change places, and inside whole buckets the centre comes first."""
    shape = (len(x), *x.shape[2:])
    nested = places.divides(grid.bucket, grid.tile)
    part = grid.bucket if nested else (1, 1, 1)
    split = [n for t, p, whole in zip(grid.tile, part, grid.size) for n in (whole // t, t // p, p)]
    outer, inner, last = ([1 + 3 * a + level for a in range(3)] for level in range(3))
    turn = [0, *outer, *inner, *last, *range(10, 9 + x.ndim - 1)]
    m = math.prod(part)
    slots = places.unslot(np.arange(m), part) if nested else np.arange(1)
    if not back:
        x = x.reshape(shape[0], *split, *shape[1:]).transpose(turn)
        x = x.reshape(shape[0], -1, m, *shape[1:])
        return jnp.take(x, slots, axis=2).reshape(shape[0], -1, *shape[1:])
    x = jnp.take(x.reshape(shape[0], -1, m, *shape[1:]), np.argsort(slots), axis=2)
    x = x.reshape(shape[0], *(split[a - 1] for a in turn[1:10]), *shape[1:])
    return x.transpose(np.argsort(turn)).reshape(shape[0], -1, *shape[1:])
