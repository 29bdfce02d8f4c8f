"""Intervals behind every printed number: pure numpy, no state.

- Student t over seeds: mean +- t_{n-1} s / sqrt(n); of two arms, over the differences of seeds that
  the arms share. "Student" (1908), Biometrika 6(1).
- Wilson score interval for one run's accuracy, (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) /
  (1 + z^2/n): Wilson (1927), JASA 22(158).
- Percentile bootstrap over items for two arms of one seed: Efron (1979), Annals of Statistics 7(1).

There is no McNemar test here: it answers whether two arms differ and says nothing about by how
much, and a second verdict beside the bootstrap's interval could disagree with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
Values = Sequence | np.ndarray  # of numbers


class Interval(NamedTuple):
    """An estimate with its two-sided interval; lo and hi are nan where n is too small for one."""

    mean: float
    lo: float
    hi: float
    n: int  # what was resampled or averaged: seeds or items

    @property
    def resolved(self) -> bool:
        """Whether there is an interval at all."""
        return bool(np.isfinite([self.mean, self.lo, self.hi]).all())


def _clean(values: Values, name: str) -> np.ndarray:
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}; a non-empty list of numbers is needed")
    return x


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not between 0 and 1; 0.95 means 95 %")


def student_t(values: Values, *, level: float = LEVEL) -> Interval:
    """Mean of `values` with its Student t interval; no interval (nan) for fewer than two values.

    Non-finite values give a non-finite mean and no interval: a diverged seed is never dropped.
    """
    from scipy.special import stdtrit

    _check_level(level)
    x = _clean(values, "values")
    mean = float(x.mean())
    if x.size < 2 or not np.isfinite(x).all():
        return Interval(mean, float("nan"), float("nan"), x.size)
    half = float(stdtrit(x.size - 1, (1 + level) / 2) * x.std(ddof=1) / np.sqrt(x.size))
    return Interval(mean, mean - half, mean + half, x.size)


def paired_t(a: Values, b: Values, *, level: float = LEVEL) -> Interval:
    """Mean of a - b with its Student t interval; a[i] and b[i] share the seed i."""
    return student_t(_paired(a, b), level=level)


def wilson(successes: int | float, n: int, *, level: float = LEVEL) -> Interval:
    """Proportion successes / n with its Wilson score interval, which stays inside [0, 1]."""
    from scipy.special import ndtri

    _check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: 0 <= successes <= n and n >= 1 are needed")
    z, p = float(ndtri((1 + level) / 2)), successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # p = 0 and p = 1 touch the border exactly; rounding must not push them over it
    return Interval(p, max(0.0, float(centre - half)), min(1.0, float(centre + half)), n)


def bootstrap(
    values: Values, *, level: float = LEVEL, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of `values` with the percentile interval of `draws` resamples; the same every time."""
    _check_level(level)
    x = _clean(values, "values")
    mean = float(x.mean())
    if x.size < 2 or not np.isfinite(x).all():
        return Interval(mean, float("nan"), float("nan"), x.size)
    rng = np.random.default_rng(seed)
    rows = max(1, min(draws, 4_000_000 // x.size))  # bounded memory for large evaluation sets
    means = np.concatenate(
        [
            x[rng.integers(0, x.size, (min(rows, draws - i), x.size))].mean(axis=1)
            for i in range(0, draws, rows)
        ]
    )
    lo, hi = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(lo), float(hi), x.size)


def paired_bootstrap(
    a: Values, b: Values, *, level: float = LEVEL, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of a - b with its bootstrap interval; a[i] and b[i] are outcomes on the same item i."""
    return bootstrap(_paired(a, b), level=level, draws=draws, seed=seed)


def _paired(a: Values, b: Values) -> np.ndarray:
    x, y = _clean(a, "a"), _clean(b, "b")
    if x.shape != y.shape:
        raise ValueError(f"a has {x.size} values, b {y.size}; pairs need as many of each")
    return x - y
