"""Arithmetic over handwritten digits: the task of size tiny, from data that scikit-learn carries.

The 1,797 scans (8 x 8, 17 grey levels; Alpaydin & Kaynak 1998, the test part of the UCI set) are split
at random into 1077 / 360 / 360 for train / validation / test. The *scans* are disjoint; the writers are
not (scikit-learn doesn't say who wrote which), so the test accuracy speaks of new scans, not new hands.

An image is a 2 x 2 grid of scans on 112 x 112 pixels, each enlarged to 48 x 48 (bicubic) and moved by
up to 4 pixels inside its quadrant. A question adds one cell, or twice one cell, to another:

    top-left + 2 * bottom-right

`example`, `caption` and `equation` (the last two for the base stage) are pure functions of their arguments, so a data set is an index.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.data.stepformat import solution_text
from jaxrepro.data.stepwise import caption_of, format_pieces

SPLITS = {"train": 1077, "validation": 360, "test": 360}
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
SIDE, DIGIT, JITTER = 56, 48, 4
NUMBERS = range(-18, 37)
MAX_STEPS = 4
PIECES = (
    *format_pieces(MAX_STEPS),
    *(str(n) for n in NUMBERS),
    *PLACES,
    *("+", "-", "*", "=", "is", "the", "grid", "shows"),
    *("add", "subtract", "two", "digits", "double", "then"),
)


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans enlarged to (1797, 48, 48) uint8, white ink on black, and their labels (1797,)."""
    from PIL import Image
    from sklearn.datasets import load_digits

    raw, labels = load_digits(return_X_y=True)
    grey = (raw.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    bicubic = Image.Resampling.BICUBIC
    large = [np.asarray(Image.fromarray(g).resize((DIGIT, DIGIT), bicubic)) for g in grey]
    return np.stack(large), labels.astype(np.int64)


@cache
def split_ids(split: str) -> np.ndarray:
    """Scan numbers of a split; the three splits are disjoint and cover all scans."""
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    order = np.random.default_rng(0).permutation(sum(SPLITS.values()))
    ends = np.cumsum([*SPLITS.values()])
    return np.split(order, ends[:-1])[list(SPLITS).index(split)]


def _rng(stream: int, split: str, index: int, seed: int) -> np.random.Generator:
    split_ids(split)  # refuses an unknown split
    if index < 0 or seed < 0:
        raise UserError(f"index is {index} and seed {seed}; both must be 0 or more")
    return np.random.default_rng([stream, list(SPLITS).index(split), index, seed])


def _grid(rng: np.random.Generator, split: str) -> tuple[Any, list[int], list[int]]:
    """A PIL image of mode L, the four scan numbers and their labels, places in reading order."""
    from PIL import Image

    images, labels = scans()
    ids = rng.choice(split_ids(split), size=4, replace=False)
    canvas = np.zeros((2 * SIDE, 2 * SIDE), np.uint8)
    at = rng.integers(0, 2 * JITTER + 1, size=(4, 2)) + (SIDE - DIGIT) // 2 - JITTER
    for place, (scan, (y, x)) in enumerate(zip(ids, at)):
        y, x = y + SIDE * (place // 2), x + SIDE * (place % 2)
        canvas[y : y + DIGIT, x : x + DIGIT] = images[scan]
    return Image.fromarray(canvas), ids.tolist(), labels[ids].tolist()


def _describe(digits: list[int]) -> str:
    return "the grid shows " + " ".join(map(str, digits))


def example(split: str, index: int, seed: int = 0, *, subtract: bool = False) -> dict[str, Any]:
    """One question: id, PIL image, problem, solution, key_steps, answer, and the labels and scans.

    subtract=True draws the sign as well (results from -18 to 27).
    """
    rng = _rng(0, split, index, seed)
    image, ids, digits = _grid(rng, split)
    first, second = rng.choice(4, size=2, replace=False)
    factor = int(rng.integers(1, 3))
    sign = "-" if subtract and rng.integers(2) else "+"
    return {
        "id": f"digits/{split}/{seed}/{index}",
        "image": image,
        **_question(digits, int(first), int(second), factor, sign),
        "digits": digits,
        "scans": ids,
    }


def _question(digits: list[int], first: int, second: int, factor: int, sign: str) -> dict[str, Any]:
    a, b = digits[first], digits[second]
    term = factor * b
    answer = a + term if sign == "+" else a - term
    verb = "add" if sign == "+" else "subtract"
    rationale = f"double then {verb}" if factor == 2 else f"{verb} two digits"
    groups = [_reading(PLACES[first], a), _reading(PLACES[second], b)]
    if factor == 2:
        groups.append(_product(factor, b))
    groups.append(_sum(a, sign, term))
    term_text = PLACES[second] if factor == 1 else f"{factor} * {PLACES[second]}"
    return {
        "problem": f"{PLACES[first]} {sign} {term_text}",
        "solution": solution_text(
            _describe(digits), rationale, [g[0] for g in groups], str(answer)
        ),
        "key_steps": {"Steps": groups},
        "answer": str(answer),
    }


def _reading(place: str, digit: int) -> list[str]:
    return [f"{place} is {digit}", f"{place} = {digit}", f"{place} shows {digit}"]


def _product(a: int, b: int) -> list[str]:
    return [
        *dict.fromkeys([f"{a} * {b} = {a * b}", f"{b} * {a} = {a * b}", f"{b} + {b} = {a * b}"])
    ]


def _sum(a: int, sign: str, b: int) -> list[str]:
    if sign == "-":
        return [f"{a} - {b} = {a - b}"]
    return [*dict.fromkeys([f"{a} + {b} = {a + b}", f"{b} + {a} = {a + b}"])]


def caption(split: str, index: int, seed: int = 0) -> dict[str, Any]:
    """An image of `example` and its description alone."""
    return caption_of(example(split, index, seed))


def equation(index: int, seed: int = 0, *, subtract: bool = False) -> dict[str, Any]:
    """A text-only drill of the equations that solutions use: doubling, or a sum of the same range."""
    rng = _rng(2, "train", index, seed)
    a, b, factor = int(rng.integers(10)), int(rng.integers(10)), int(rng.integers(1, 3))
    if rng.integers(3) == 0:
        text = _product(2, b)[0]
    else:
        sign = "-" if subtract and rng.integers(2) else "+"
        text = _sum(a, sign, factor * b)[0]
    return drill(f"digits/equation/{seed}/{index}", text)


def drill(name: str, text: str) -> dict[str, Any]:
    """A text-only example that completes an equation; the completion is the whole equation."""
    left, right = text.split(" = ")
    return {
        "id": name,
        "image": None,
        "problem": left,
        "solution": text,
        "key_steps": {"Steps": []},
        "answer": right,
    }
