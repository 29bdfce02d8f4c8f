"""Generated picture questions with step-wise solutions: counting coloured cells, reading bar charts.

`grid_count` is a 4 x 4 grid of coloured cells on 112 x 112 pixels, one cell a merged patch of Qwen2-VL.
`toy_chart` is a bar chart on 280 x 280 pixels with integer values from 1 to 12, whose numbers stand
above the bars in half of the charts and must be read off the axis in the others.

Every generator is a pure function example(split, index, seed), so a data set is an index and every
process draws the same one. Splits are separate random streams over a space that is so large that two
pictures are equal only by a negligible chance; digits (data/digits.py) has disjoint scans instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.data import digits
from jaxrepro.data.stepformat import solution_text
from jaxrepro.data.stepwise import caption_of, format_pieces

SPLITS = ("train", "validation", "test")
COLOURS = {
    "red": (214, 51, 46),
    "green": (58, 160, 76),
    "blue": (52, 105, 205),
    "yellow": (245, 200, 40),
}
TREES = ("oak", "elm", "ash", "fir", "yew", "bay")
PLACES = ("in the park", "by the lake", "on the hill")
BARS = (
    (66, 114, 180),
    (221, 132, 60),
    (92, 160, 92),
    (190, 78, 82),
    (134, 112, 178),
    (140, 116, 96),
)
TOP = 12

GRID_PIECES = (
    *format_pieces(5),
    *(str(n) for n in range(17)),
    *COLOURS,
    *("how many", "cells", "more", "than", "or", "are there"),
    *(
        "row",
        "has",
        "count",
        "is",
        "+",
        "-",
        "=",
        "add the rows",
        "add the counts",
        "compare the counts",
    ),
)
CHART_PIECES = (
    *format_pieces(6),
    *(str(n) for n in range(2 * TOP + 1)),
    *TREES,
    *PLACES,
    *(
        "a bar chart of trees",
        "what is the sum of",
        "how many more",
        "which tree is the",
        "and",
        "than",
    ),
    *("tallest", "shortest", "largest", "smallest", "is", "are", "+", "-", "=", "the"),
    *("read and add", "read and subtract", "read and compare"),
)


def _rng(stream: int, split: str, index: int, seed: int) -> np.random.Generator:
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if index < 0 or seed < 0:
        raise UserError(f"index is {index} and seed {seed}; both must be 0 or more")
    return np.random.default_rng([stream, SPLITS.index(split), index, seed])


def grid_count(split: str, index: int, seed: int = 0) -> dict[str, Any]:
    """Count one colour, add two, or compare two, in a 4 x 4 grid; labels are in `cells` (row by row)."""
    rng = _rng(10, split, index, seed)
    names = [*COLOURS]
    # Uneven shares: with equal ones nearly every count would be 3, 4 or 5.
    cells = rng.choice(len(names), size=(4, 4), p=rng.dirichlet(np.ones(len(names))))
    a, b = (int(i) for i in rng.choice(len(names), size=2, replace=False))
    kind = ("one", "sum", "more")[rng.integers(3)]
    image = _draw_cells(cells, rng)
    count = lambda i: int((cells == i).sum())
    if count(a) < count(b) and kind == "more":
        a, b = b, a
    x, y, first, second = count(a), count(b), names[a], names[b]
    if kind == "one":
        rows = [int((row == a).sum()) for row in cells]
        groups = [
            [f"row {r} has {n} {first}", f"row {r} = {n}"] for r, n in enumerate(rows, start=1)
        ]
        groups.append([f"{' + '.join(map(str, rows))} = {x}", f"{first} count is {x}"])
        problem, rationale, answer = f"how many {first} cells are there", "add the rows", x
    else:
        groups = [
            [f"{name} count is {n}", f"{name} count = {n}", f"{name} = {n}", f"{n} {name} cells"]
            for name, n in ((first, x), (second, y))
        ]
        if kind == "sum":
            groups.append([*dict.fromkeys([f"{x} + {y} = {x + y}", f"{y} + {x} = {x + y}"])])
            problem = f"how many {first} or {second} cells are there"
            rationale, answer = "add the counts", x + y
        else:
            groups.append([f"{x} - {y} = {x - y}"])
            problem = f"how many more {first} than {second} cells are there"
            rationale, answer = "compare the counts", x - y
    description = "\n".join(" ".join(names[i] for i in row) for row in cells)
    solution = solution_text(description, rationale, [g[0] for g in groups], str(answer))
    return {
        "id": f"grid_count/{split}/{seed}/{index}",
        "image": image,
        "problem": problem,
        "solution": solution,
        "key_steps": {"Steps": groups},
        "answer": str(answer),
        "cells": [names[i] for i in cells.ravel()],
    }


def _draw_cells(cells: np.ndarray, rng: np.random.Generator) -> Any:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (112, 112), (250, 250, 248))
    draw = ImageDraw.Draw(image)
    shades = np.clip(
        np.array([*COLOURS.values()])[cells] + rng.integers(-14, 15, (4, 4, 3)), 0, 255
    )
    for (r, c), _ in np.ndenumerate(cells):
        x, y = 28 * c, 28 * r
        draw.rounded_rectangle(
            (x + 3, y + 3, x + 24, y + 24), radius=5, fill=tuple(shades[r, c].tolist())
        )
    return image


def toy_chart(split: str, index: int, seed: int = 0) -> dict[str, Any]:
    """A bar chart of three to five kinds; sum or difference of two, or the tallest or shortest one.

    Labels are in `values` (kind to height).
    """
    rng = _rng(11, split, index, seed)
    n = int(rng.integers(3, 6))
    names = [TREES[i] for i in rng.choice(len(TREES), size=n, replace=False)]
    heights = [int(v) for v in rng.choice(np.arange(1, TOP + 1), size=n, replace=False)]
    place = PLACES[rng.integers(len(PLACES))]
    values = dict(zip(names, heights))
    kind = ("sum", "more", "tallest", "shortest")[rng.integers(4)]
    i, j = (int(k) for k in rng.choice(n, size=2, replace=False))
    numbered, colours = bool(rng.integers(2)), rng.permutation(len(BARS))[:n]
    image = _draw_chart(values, f"Trees {place}", numbered, [BARS[k] for k in colours])
    read = lambda name: [f"{name} is {values[name]}", f"{name} = {values[name]}"]
    if kind in ("sum", "more"):
        if kind == "more" and heights[i] < heights[j]:
            i, j = j, i
        x, y = heights[i], heights[j]
        groups = [read(names[i]), read(names[j])]
        if kind == "sum":
            groups.append([f"{x} + {y} = {x + y}", f"{y} + {x} = {x + y}"])
            problem, rationale = f"what is the sum of {names[i]} and {names[j]}", "read and add"
            answer = str(x + y)
        else:
            groups.append([f"{x} - {y} = {x - y}"])
            problem, rationale = f"how many more {names[i]} than {names[j]}", "read and subtract"
            answer = str(x - y)
    else:
        extreme, pick = ("largest", max) if kind == "tallest" else ("smallest", min)
        answer = pick(values, key=values.get)
        groups = [
            *map(read, names),
            [f"{values[answer]} is the {extreme}", f"{answer} is the {kind}"],
        ]
        problem, rationale = f"which tree is the {kind}", "read and compare"
    bars = " ".join(f"{name} {value}" for name, value in values.items())
    description = f"a bar chart of trees {place}\n{bars}"
    return {
        "id": f"toy_chart/{split}/{seed}/{index}",
        "image": image,
        "problem": problem,
        "solution": solution_text(description, rationale, [g[0] for g in groups], answer),
        "key_steps": {"Steps": groups},
        "answer": answer,
        "values": values,
    }


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _draw_chart(values: dict[str, int], title: str, numbered: bool, colours: list) -> Any:
    from PIL import Image, ImageDraw

    left, right, top, bottom, ink = 34, 270, 56, 250, (40, 40, 44)
    image = Image.new("RGB", (280, 280), "white")
    draw = ImageDraw.Draw(image)
    height = lambda value: bottom - round((bottom - top) * value / TOP)
    draw.text((152, 9), title, fill=ink, font=_font(16), anchor="ma")
    for value in range(TOP + 1):
        y = height(value)
        draw.line((left, y, right, y), fill=(206, 206, 210) if value % 2 == 0 else (236, 236, 238))
        if value % 2 == 0:
            draw.text((left - 6, y), str(value), fill=ink, font=_font(13), anchor="rm")
    slot = (right - left) / len(values)
    for k, (name, value) in enumerate(values.items()):
        middle, half = left + slot * (k + 0.5), slot * 0.32
        box = (math.floor(middle - half), height(value), math.ceil(middle + half), bottom)
        draw.rectangle(box, fill=colours[k])
        draw.text((middle, bottom + 6), name, fill=ink, font=_font(15), anchor="ma")
        if numbered:
            draw.text(
                (middle, height(value) - 3), str(value), fill=ink, font=_font(14), anchor="mb"
            )
    draw.line((left, top, left, bottom), fill=ink)
    draw.line((left, bottom, right, bottom), fill=ink)
    return image


def grid_equation(index: int, seed: int = 0) -> dict[str, Any]:
    """A text-only drill of the sums and differences of two counts, or of the counts of four rows."""
    rng = _rng(12, "train", index, seed)
    if rng.integers(2):
        rows = rng.integers(0, 5, size=4).tolist()
        text = f"{' + '.join(map(str, rows))} = {sum(rows)}"
    else:
        x, y = rng.multinomial(16, rng.dirichlet(np.ones(3)))[:2].tolist()
        text = _pair(x, y, bool(rng.integers(2)))
    return digits.drill(f"grid_count/equation/{seed}/{index}", text)


def chart_equation(index: int, seed: int = 0) -> dict[str, Any]:
    """A text-only drill of the sum or the difference of two heights."""
    rng = _rng(13, "train", index, seed)
    x, y = rng.integers(1, TOP + 1, size=2).tolist()
    return digits.drill(f"toy_chart/equation/{seed}/{index}", _pair(x, y, bool(rng.integers(2))))


def _pair(x: int, y: int, add: bool) -> str:
    return f"{x} + {y} = {x + y}" if add else f"{max(x, y)} - {min(x, y)} = {abs(x - y)}"


class Generator(NamedTuple):
    """One generated task: examples, text-only drills, vocabulary, longest texts in its own tokens."""

    example: Callable[..., dict[str, Any]]  # (split, index, seed=0) -> example
    equation: Callable[..., dict[str, Any]]  # (index, seed=0) -> text-only example
    pieces: tuple[str, ...]
    max_steps: int
    max_problem: int  # tokens of the question
    max_solution: int  # tokens of the solution and the end of turn
    visual: int  # visual tokens of an image; four patches each

    def base(
        self, split: str, index: int, seed: int = 0, *, captions: float = 0.75
    ) -> dict[str, Any]:
        """A caption with probability `captions`, else an equation: the stage before any reasoning."""
        if np.random.default_rng([14, index, seed]).random() < captions:
            return caption_of(self.example(split, index, seed))
        return self.equation(index, seed)


GENERATORS = {
    "digits": Generator(
        digits.example, digits.equation, digits.PIECES, digits.MAX_STEPS, 5, 43, 16
    ),
    "grid_count": Generator(grid_count, grid_equation, GRID_PIECES, 5, 7, 68, 16),
    "toy_chart": Generator(toy_chart, chart_equation, CHART_PIECES, 6, 4, 54, 100),
}


def generator(name: str) -> Generator:
    """The generator of that name; UserError lists the names."""
    if name not in GENERATORS:
        raise UserError(f"no generator {name!r}; choose from {', '.join(GENERATORS)}")
    return GENERATORS[name]
