"""Moving coloured shapes, rendered straight into latents: videos for small diffusion transformers.

A latent has four channels on a grid (frames, rows, columns): red, green, blue and coverage, each in 0 .. 1 before
it is normalised to about mean 0 and variance 1, as the latents of a video VAE are. One shape moves at constant
velocity over a still wave of grey, and what leaves on one side comes back on the other. So a video has structure
near by (edges), far away in space (the wave) and in time (the path).

Its text is four tokens, a shape, a colour, a direction and a speed: "red disc right slow". Place and wave are left
to chance. `recognise` reads the four back from a video, so a sampled video can be checked against its text.

A video is a function of (split, index, seed, size) alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer, UInt8

from jaxrepro.config import UserError

CHANNELS = 4
SIZE = (8, 16, 16)  # frames, rows, columns; 8 x 8 x 8 tokens of patches (1, 2, 2)
LEAST = (1, 8, 8)  # a shape on fewer rows or columns cannot be told from another
SPLITS = ("train", "test")
SHAPES = ("disc", "square", "triangle", "cross")
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "magenta": (0.85, 0.20, 0.80),
    "cyan": (0.10, 0.80, 0.85),
}
DIRECTIONS = (  # clockwise in steps of 45 degrees; rows count downwards
    "right",
    "down-right",
    "down",
    "down-left",
    "left",
    "up-left",
    "up",
    "up-right",
)
SPEEDS = {"slow": 0.5, "steady": 1.0, "fast": 2.0}  # cells of the grid a frame
FIELDS = (SHAPES, tuple(COLOURS), DIRECTIONS, tuple(SPEEDS))
VOCABULARY = tuple(word for field in FIELDS for word in field)
STARTS = tuple(sum(map(len, FIELDS[:i])) for i in range(len(FIELDS)))  # first id of each field
RADIUS = 0.2  # of a shape, in shorter sides of the grid
GREY, WAVE = 0.4, 0.2  # mean and amplitude of the background
# Measured over 4,000 videos of the default size.
MEAN = np.array([0.414, 0.411, 0.412, 0.130], np.float32)
STD = np.array([0.186, 0.167, 0.181, 0.307], np.float32)


class Videos(NamedTuple):
    """Videos and their text."""

    latents: Any  # (n, c, frames, rows, columns) float32, normalised
    ids: Any  # (n, 4) int32 into VOCABULARY: shape, colour, direction, speed


def moving_shapes(
    n: int,
    *,
    split: str = "train",
    start: int = 0,
    seed: int = 0,
    size: tuple[int, int, int] = SIZE,
) -> Videos:
    """Videos start .. start + n - 1 of a split, as `models.video_dit.apply` takes them; numpy.

    size: (frames, rows, columns) of the latents. UserError for an unknown split, a negative number, a size that is
    too small.
    """
    if n < 1:
        raise UserError(f"n is {n}; at least one video is needed")
    rows = [_video(split, start + i, seed, size) for i in range(n)]
    return Videos(np.stack([x for x, _ in rows]), np.stack([ids for _, ids in rows]))


def example(
    split: str, index: int, seed: int = 0, *, size: tuple[int, int, int] = SIZE
) -> dict[str, Any]:
    """One video: id, latents (c, frames, rows, columns), ids (4,), caption. For `batches.Generated`."""
    latents, ids = _video(split, index, seed, size)
    name = f"shapes/{split}/{seed}/{index}"
    return {"id": name, "latents": latents, "ids": ids, "caption": caption(ids)}


def arrays(examples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """{"latents" (b, c, frames, rows, columns), "ids" (b, 4), "text" (b, 4, 21)}. For `batches.dataset`."""
    ids = np.stack([e["ids"] for e in examples])
    return {"latents": np.stack([e["latents"] for e in examples]), "ids": ids, "text": states(ids)}


def states(ids: Integer[Any, "b t"], width: int | None = None) -> Float[np.ndarray, "b t d"]:
    """Text states for a model: one-hot float32 rows of `width` (None: the vocabulary's 21). Zeros are no text."""
    width = len(VOCABULARY) if width is None else width
    if width < len(VOCABULARY):
        raise UserError(f"text states of width {width} cannot hold {len(VOCABULARY)} words; widen")
    return np.eye(len(VOCABULARY), width, dtype=np.float32)[np.asarray(ids)]


def caption(ids: Integer[Any, "t"]) -> str:
    """The text of four ids: "red disc right slow"."""
    shape, colour, direction, speed = (VOCABULARY[int(i)] for i in ids)
    return f"{colour} {shape} {direction} {speed}"


def to_pictures(
    latents: Float[Any, "*b c frames rows columns"],
) -> UInt8[np.ndarray, "*b frames rows columns rgb"]:
    """The pictures of latents, coverage left out; what lies beyond black or white is cut."""
    channels = np.moveaxis(np.asarray(latents, np.float32), -4, -1)
    if channels.shape[-1] != CHANNELS:
        raise UserError(
            f"latents have {channels.shape[-1]} channels, moving shapes have {CHANNELS}"
        )
    rgb = (channels * STD + MEAN)[..., :3]
    return (np.clip(rgb, 0, 1) * 255).round().astype(np.uint8)


# Rendering ---------------------------------------------------------------------------------------------


def _video(split, index, seed, size):
    """Normalised latents (c, frames, rows, columns) and ids (4,) of one video."""
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if index < 0 or seed < 0:
        raise UserError(f"index is {index} and seed {seed}; both must be 0 or more")
    if len(size) != 3 or any(n < least for n, least in zip(size, LEAST)):
        raise UserError(f"size {tuple(size)} must be (frames, rows, columns) of at least {LEAST}")
    rng = np.random.default_rng([SPLITS.index(split), index, seed])
    chosen = [int(rng.integers(len(field))) for field in FIELDS]
    sides = np.array(size[1:])
    place = rng.uniform(0, sides)
    x = _render(chosen, place, _wave(rng, sides), size)
    x = (x - MEAN) / STD
    return np.moveaxis(x, -1, 0).astype(np.float32), np.add(chosen, STARTS).astype(np.int32)


def _render(chosen, place, background, size):
    """(frames, rows, columns, 4) in 0 .. 1."""
    shape, colour, direction, speed = chosen
    steps = np.arange(size[0])[:, None] * velocity(direction, speed)
    sides = np.array(size[1:])
    cover = _cover(shape, place + steps, sides)[..., None]
    ink = np.array(list(COLOURS.values())[colour])
    rgb = cover * ink + (1 - cover) * background[..., None]
    return np.concatenate([rgb, cover], axis=-1)


def velocity(direction: int, speed: int) -> Float[np.ndarray, "2"]:
    """(rows, columns) a frame, of the numbers of a direction and a speed."""
    angle = direction * math.pi / 4
    return np.array([math.sin(angle), math.cos(angle)]) * list(SPEEDS.values())[speed]


def _wave(rng, sides):
    """A still grey (rows, columns): one period along rows, columns or a diagonal."""
    periods = [(0, 1), (1, 0), (1, 1), (1, -1)][rng.integers(4)]
    at = np.indices(sides)
    turns = sum(k * x / n for k, x, n in zip(periods, at, sides))
    return GREY + WAVE * np.cos(2 * math.pi * (turns + rng.uniform()))


def _cover(shape, places, sides):
    """(n, rows, columns) share of each cell that a shape at places (n, 2) covers: about, by its distance from the edge."""
    sides = np.reshape(sides, (2, 1, 1))
    at = np.indices(sides.ravel()) - np.reshape(places, (-1, 2, 1, 1))
    at = (at + sides / 2) % sides - sides / 2  # from the nearest copy of the shape
    return np.clip(0.5 - OUTSIDE[SHAPES[shape]](at[:, 0], at[:, 1], RADIUS * sides.min()), 0, 1)


# Cells from (y, x) to the edge of a shape of "radius" r, below 0 inside. Their areas are close to that of the disc.
OUTSIDE = {
    "disc": lambda y, x, r: np.hypot(x, y) - r,
    "square": lambda y, x, r: np.maximum(abs(x), abs(y)) - 0.9 * r,
    "triangle": lambda y, x, r: np.maximum(0.5 * (math.sqrt(3) * abs(x) - y), y) - 0.75 * r,
    "cross": lambda y, x, r: np.minimum(_box(y, x, 1.3 * r, 0.4 * r), _box(y, x, 0.4 * r, 1.3 * r)),
}


def _box(y, x, height, width):
    return np.maximum(abs(y) - height, abs(x) - width)


# Recognition -------------------------------------------------------------------------------------------


def recognise(latents: Float[Any, "n c frames rows columns"]) -> Int[np.ndarray, "n 4"]:
    """The ids of what is seen in videos; of clean ones the ids that they were made from.

    Needs two frames. The shape is the one whose amplitude spectrum is most alike, which does not depend on where it
    is; motion is the turn of the first Fourier component of the coverage along rows and along columns.
    """
    x = np.moveaxis(np.asarray(latents, np.float64), 1, -1) * STD + MEAN
    if x.shape[1] < 2:
        raise UserError("one frame shows no motion; give at least two")
    cover, rgb = np.clip(x[..., 3], 0, 1), x[..., :3]
    ids = [_shape_of(cover), _colour_of(cover, rgb), *_motion_of(cover)]
    return (np.stack(ids, axis=1) + STARTS).astype(np.int32)


def _shape_of(cover):
    sides = np.array(cover.shape[-2:])
    spectrum = lambda x: np.abs(np.fft.rfft2(x - x.mean((-2, -1), keepdims=True)))
    # on a cell and between cells, where edges are softer
    places = [(y, x) for y in (0, 0.5) for x in (0, 0.5)]
    known = np.stack([spectrum(_cover(i, places, sides)).mean(0) for i in range(len(SHAPES))])
    known /= np.linalg.norm(known, axis=(-2, -1), keepdims=True)
    seen = spectrum(cover).mean(1)
    return np.einsum("nyx,kyx->nk", seen, known).argmax(1)


def _colour_of(cover, rgb):
    weight = cover**4  # edges show the background
    total = np.maximum(weight.sum((1, 2, 3)), 1e-9)
    mean = np.einsum("ntyx,ntyxc->nc", weight, rgb) / total[:, None]
    known = np.array(list(COLOURS.values()))
    return ((mean[:, None] - known) ** 2).sum(-1).argmin(1)


def _motion_of(cover):
    moved = []
    for axis, n in ((2, cover.shape[2]), (3, cover.shape[3])):
        line = cover.sum(5 - axis)  # (n, frames, cells of this axis)
        turn = np.einsum("nty,y->nt", line, np.exp(2j * math.pi * np.arange(n) / n))
        moved.append(np.angle((turn[:, 1:] * turn[:, :-1].conj()).sum(1)) * n / (2 * math.pi))
    known = np.array([[velocity(d, s) for s in range(len(SPEEDS))] for d in range(len(DIRECTIONS))])
    gap = ((np.stack(moved, -1)[:, None, None] - known) ** 2).sum(-1)  # (n, directions, speeds)
    return np.unravel_index(gap.reshape(len(gap), -1).argmin(1), gap.shape[1:])
