"""Sampling of flow-matching models: time grids and solvers as tables made on the host, steps that a scan may run.

    x_sigma = (1 - sigma) x_0 + sigma noise,   v = noise - x_0,   the model sees t = 1000 sigma
    sigma = shift s / (1 + (shift - 1) s)                                       s uniform, from 1 down

Euler (arXiv:2210.02747):   x' = x + (sigma' - sigma) v.
UniPC (arXiv:2302.04867, order 2, B(h) = e^h - 1 as "bh2", predicting x_0): with a = 1 - sigma, lam = log a / sigma,
h = lam' - lam, e = expm1(-h), m = x - sigma v, and r = (lam of the step before - lam) / h,

    predict   x' = (sigma' / sigma) x - a' e (m + 0.5 D),   D = (m of the step before - m) / r
    correct   x' = (sigma' / sigma) x - a' e (m + rho_1 D + rho_2 (m' - m))

Each is linear in x and in the last m, so a step is a product with one row of a table. Order 1 drops D: in the first
step, and in the last prediction, whose sigma' is 0.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrepro.config import UserError
from jaxrepro.ops import checks

TIMES = 1000  # t of sigma 1


class Euler(NamedTuple):
    """Rows of the Euler solver; every leaf leads with the step."""

    t: Any  # (n,) what the model sees
    sigma: Any  # (n,)
    change: Any  # (n,) of sigma in the step


class UniPC(NamedTuple):
    """Rows of the second-order solver; every leaf leads with the step."""

    t: Any  # (n,)
    sigma: Any  # (n,)
    correct: Any  # (n, 4): of the state before, m of this step, of the last, of the one before
    predict: Any  # (n, 3): of the corrected state, m of this step, of the last


Plan = Euler | UniPC


class State(NamedTuple):
    """Between two steps. Euler uses x alone."""

    x: Any  # what the model sees next
    before: Any = None  # the state that x was predicted from
    last: Any = None  # m of the last step
    second: Any = None  # m of the step before that


def _check(steps: int, shift: float) -> None:
    checks.whole("steps", steps)
    if not isinstance(shift, Real) or not 0 < shift < math.inf:
        raise UserError(f"shift is {shift!r}: a positive number")


def _shifted(s: np.ndarray, shift: float) -> np.ndarray:
    return shift * s / (1 + (shift - 1) * s)


def few(steps: int, n: int) -> tuple[int, ...]:
    """n of the steps of a grid, evenly, its first among them: what a distilled model is sampled at."""
    if checks.whole("n", n) > checks.whole("steps", steps):
        raise UserError(f"{n} steps out of a grid of {steps}: 1 to {steps}")
    return tuple(int(j) for j in np.linspace(0, steps, n, endpoint=False))


def euler(*, steps: int = 50, shift: float = 7.0, picks: Sequence[int] | None = None) -> Euler:
    """HunyuanVideo's grid of `steps`; picks: the steps of it that are taken (`few`), the last one always ends at 0."""
    _check(steps, shift)
    sigma = _shifted(np.linspace(1, 0, steps + 1)[:-1], shift)
    if picks is not None:
        picks = np.asarray(picks)
        if (
            picks.ndim != 1
            or not picks.size
            or picks.dtype.kind not in "iu"
            or picks[0] < 0
            or picks[-1] >= steps
            or (np.diff(picks) <= 0).any()
        ):
            raise UserError(
                f"picks {picks.tolist()} must be whole numbers that ascend within 0 .. {steps - 1}"
            )
        sigma = sigma[picks]
    change = np.diff(np.append(sigma, 0))
    return Euler(*(np.asarray(a, np.float32) for a in (TIMES * sigma, sigma, change)))


def unipc(*, steps: int = 50, shift: float = 5.0) -> UniPC:
    """Wan's grid of `steps`; t is whole numbers."""
    _check(steps, shift)
    s = 1 - np.linspace(1, 1 / TIMES, steps + 1)
    sigma = _shifted(s, shift)[::-1][:-1]
    t = np.floor(TIMES * sigma)
    sigma = np.append(sigma, 0)
    a = 1 - sigma
    with np.errstate(divide="ignore"):
        lam = np.log(a) - np.log(sigma)  # inf where sigma is 0
    correct, predict = np.zeros((steps, 4)), np.zeros((steps, 3))
    correct[0, 0] = 1
    for i in range(steps):
        order = 1 if i in (0, steps - 1) else 2
        h = lam[i + 1] - lam[i]
        e = np.expm1(-h)
        scale = -a[i + 1] * e  # of m, and of the differences
        r = (lam[i - 1] - lam[i]) / h if order == 2 else 1.0
        d = 0.5 / r if order == 2 else 0.0
        predict[i] = sigma[i + 1] / sigma[i], scale * (1 - d), scale * d
        if i + 1 < steps:  # the correction of this prediction, by the next step's m
            one, two = _rho(h, e, r) if order == 2 else (0.0, 0.5)
            correct[i + 1] = (
                sigma[i + 1] / sigma[i],
                scale * two,
                scale * (1 - one / r - two),
                scale * one / r,
            )
    tables = (t, sigma[:-1], correct, predict)
    return UniPC(*(np.asarray(a, np.float32) for a in tables))


def _rho(h: float, e: float, r: float) -> np.ndarray:
    """Weights of the two differences of an order 2 correction."""
    phi = e / -h - 1
    b_1 = phi / e
    b_2 = (phi / -h - 0.5) * 2 / e
    return np.linalg.solve([[1.0, 1.0], [r, 1.0]], [b_1, b_2])


def start(plan: Plan, x: Float[Array, "..."]) -> State:
    """The state of pure noise x, float32."""
    x = x.astype(jnp.float32)
    if isinstance(plan, Euler):
        return State(x)
    return State(x, x, jnp.zeros_like(x), jnp.zeros_like(x))


def step(row: Plan, state: State, v: Float[Array, "..."]) -> State:
    """One step, from the velocity at state.x; row: the plan at this step, its leaves without the leading axis."""
    v = v.astype(jnp.float32)
    if isinstance(row, Euler):
        return State(state.x + row.change * v)
    m = state.x - row.sigma * v
    c, p = row.correct, row.predict
    x = c[0] * state.before + c[1] * m + c[2] * state.last + c[3] * state.second
    return State(p[0] * x + p[1] * m + p[2] * state.last, x, m, state.last)


def both(given: Any, empty: Any) -> Any:
    """Two conditions as one batch, whose velocities `guide` takes: trees of (b, ...) become (2b, ...), the empty one second."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), given, empty)


def check_scale(scale: Any) -> None:
    """UserError where the scale of a guidance is known and not finite."""
    value = checks.known(scale)
    if value is not None and not np.isfinite(value).all():
        raise UserError(f"the scale of the guidance is {value}: a finite number, 1 for none")


def guide(v: Float[Array, "b2 ..."], scale: float | Array) -> Float[Array, "b ..."]:
    """Classifier-free guidance: v_empty + scale (v_given - v_empty), float32, of the velocities of `both`.

    The sides share the time, so a route that depends on the time alone serves both.
    """
    check_scale(scale)
    given, empty = jnp.split(v.astype(jnp.float32), 2)
    return empty + scale * (given - empty)
