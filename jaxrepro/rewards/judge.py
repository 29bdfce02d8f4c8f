"""Judges of several completions to one prompt: scores, or the probability that one beats another.

    judge(prompt, completions, example) -> n scores, or n rows of n probabilities P(i beats j)
    P(y beats y') = sigmoid((s(y) - s(y')) / temperature)                  Bradley and Terry, 1952

A judge runs on the host and is pure, deterministic, and bounded by length and never by a clock, as a reward is. None
is unscorable: `ask` counts it. A config names a built-in, or "module:function" of a module of `ROOMS`; a name from
a config must not reach other code. A program may pass any function instead of a name.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrepro.config import UserError, did_you_mean
from jaxrepro.rewards import maths

Judge = Callable[[str, Sequence[str], Mapping], Sequence]
ROOMS = ("jaxrepro.rewards", "jaxrepro.methods")


class Verdict(NamedTuple):
    """What a judge said about n completions."""

    scores: (
        np.ndarray
    )  # (n,) float64, nan = unscorable; of probabilities: their mean over the others
    beats: np.ndarray | None  # (n, n) float64 P(i beats j), 1/2 on the diagonal, nan = unscorable
    unscorable: int  # completions without a score


# Judges ------------------------------------------------------------------------------------------


def answer(prompt: str, completions: Sequence[str], example: Mapping) -> list[float | None]:
    """1 where the stated answer equals that of example["solution"], else 0; None where that has none."""
    if not isinstance(example.get("solution"), str):
        raise UserError(
            f"example {example.get('id', '')}: the judge 'answer' needs its solution; give the data one, "
            "or take another judge"
        )
    return [maths.reward(example, text)["accuracy"] for text in completions]


def length(prompt: str, completions: Sequence[str], example: Mapping) -> list[float | None]:
    """Characters of a completion: a judge whose bias is known, for tests."""
    return [float(len(text)) for text in completions]


def pairwise(score: Judge, *, temperature: float = 1.0) -> Judge:
    """The judge that turns scores into P(y beats y'); temperature 0 gives 1, 0 and 1/2 for a tie."""
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise UserError(f"the judge's temperature is {temperature}; use a number from 0")

    def judge(
        prompt: str, completions: Sequence[str], example: Mapping
    ) -> list[list[float | None]]:
        scores = score(prompt, completions, example)
        return [[_beats(a, b, temperature) for b in scores] for a in scores]

    return judge


def _beats(a: float | None, b: float | None, temperature: float) -> float | None:
    if a is None or b is None:
        return None
    if a == b:
        return 0.5
    if temperature == 0:
        return float(a > b)
    # tanh neither overflows nor loses P(i beats j) + P(j beats i) = 1.
    return 0.5 + 0.5 * math.tanh((a - b) / temperature / 2)


JUDGES: dict[str, Judge] = {"answer": answer, "length": length}


# Finding and asking one ----------------------------------------------------------------------------


def resolve(name: str | Judge) -> Judge:
    """The judge of a name: a built-in or "module:function"; a function is itself. UserError otherwise."""
    if callable(name):
        return name
    if name in JUDGES:
        return JUDGES[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise UserError(f"no judge {name!r}{did_you_mean(name, list(JUDGES))}, or module:function")
    if not any(module.startswith(room + ".") for room in ROOMS):
        raise UserError(
            f"judge {name!r}: the module must be in {' or '.join(ROOMS)}, so that a config cannot run "
            "other code; put the function there"
        )
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as e:
        raise UserError(f"judge {name!r}: {module} cannot be imported ({e})") from e
    own = inspect.isfunction(found) and found.__module__ == module and function[:1] != "_"
    if not own or not _takes_three(found):
        raise UserError(
            f"judge {name!r}: {module} defines no function {function}(prompt, completions, example)"
        )
    return found


def _takes_three(function: Callable) -> bool:
    try:
        inspect.signature(function).bind("", [], {})
    except TypeError:
        return False
    return True


def ask(judge: Judge, prompt: str, completions: Sequence[str], example: Mapping) -> Verdict:
    """The judge's verdict, checked. UserError for another number of values, for one that is not finite, or
    for probabilities that do not add up to 1 over the two orders."""
    said = list(judge(prompt, list(completions), example))
    n = len(completions)
    matrix = bool(said) and isinstance(said[0], list | tuple | np.ndarray)
    rows = [list(row) for row in said] if matrix else [said]
    if len(said) != n or any(len(row) != n for row in rows):
        shape = f"{len(said)} rows of {len(rows[0])}" if matrix else f"{len(said)} values"
        raise _wrong(judge, f"gave {shape} for {n} completions")
    values = np.array([[_value(x, judge) for x in row] for row in rows], np.float64)
    if not matrix:
        return Verdict(values.reshape(n), None, int(np.isnan(values).sum()))
    return of_probabilities(_probabilities(values, judge))


def of_probabilities(beats: np.ndarray) -> Verdict:
    """The verdict of P(i beats j) (n, n); a completion's score is the mean over the others."""
    others = ~np.isnan(beats) & ~np.eye(len(beats), dtype=bool)
    count = others.sum(1)
    total = np.where(others, beats, 0.0).sum(1)
    scores = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return Verdict(scores, beats, int((count == 0).sum()))


def _value(x: Any, judge: Judge) -> float:
    if x is None:
        return math.nan
    if not isinstance(x, bool | int | float | np.number) or not math.isfinite(x):
        raise _wrong(judge, f"gave {x!r:.40}, which is no finite number and not None")
    return float(x)


def _probabilities(values: np.ndarray, judge: Judge) -> np.ndarray:
    """The matrix with 1/2 on its diagonal and nan on both sides of what is unknown."""
    beats = np.where(np.isnan(values.T), np.nan, values)
    np.fill_diagonal(beats, 0.5)
    if ((beats < 0) | (beats > 1)).any():
        raise _wrong(judge, "gave a probability outside [0, 1]")
    if (np.abs(beats + beats.T - 1) > 1e-6).any():
        raise _wrong(judge, "gave P(i beats j) + P(j beats i) other than 1; average both orders")
    return beats


def _wrong(judge: Judge, what: str) -> UserError:
    return UserError(f"judge {getattr(judge, '__name__', 'of this run')} {what}")
