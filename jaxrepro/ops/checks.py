"""What callers give to the ops of videos, checked while a program is traced: one line for what does not fit together.

A traced array has a shape and a kind, which are always checked. Its numbers are checked where they are known.
"""

from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro.config import UserError


def known(x: Any) -> np.ndarray | None:
    """The numbers of an array; None while it is traced, and of None."""
    try:
        return None if x is None else np.asarray(x)
    except jax.errors.TracerArrayConversionError:
        return None


def is_whole(n: Any) -> bool:
    """Whether n is a whole number, not a bool."""
    return isinstance(n, Integral) and not isinstance(n, bool)


def whole(name: str, n: Any, *, least: int = 1) -> int:
    """n as an int; UserError where it is no whole number of at least `least`."""
    if not is_whole(n) or n < least:
        raise UserError(f"{name}={n!r:.40} must be a whole number of at least {least}")
    return int(n)


def sizes(name: str, value: Any, of: tuple[str, ...]) -> tuple[int, ...]:
    """value as ints; UserError where it is not one whole number above 0 for each name in `of`."""
    try:
        value = tuple(value)
    except TypeError:
        value = (value,)
    if len(value) != len(of) or not all(is_whole(n) and n > 0 for n in value):
        count = {3: "three"}.get(len(of), len(of))
        raise UserError(
            f"{name}={value} must be {count} whole numbers above 0, one for each of {of}"
        )
    return tuple(map(int, value))


def is_integer(x: Any) -> bool:
    """Whether an array, or a list, holds whole numbers."""
    return jnp.issubdtype(kind(x), jnp.integer)


def kind(x: Any) -> Any:
    """The dtype of an array or a list."""
    return x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype


def attention(q: Any, k: Any, v: Any, video: int, text: Any = None) -> None:
    """UserError for q, k, v that are not of one shape (b, s, h, i), rows fewer than the video's tokens, and text
    that is not (b,) whole numbers up to the slots of text behind the video."""
    shapes = [np.shape(x) for x in (q, k, v)]
    if len(shapes[0]) != 4 or len(set(shapes)) > 1:
        raise UserError(
            f"q, k and v have shapes {', '.join(map(str, shapes))}: all must be the same (rows of a batch, tokens, "
            "heads, head size)"
        )
    b, s = shapes[0][:2]
    if s < video:
        raise UserError(f"{s} rows are fewer than the {video} tokens of the grid; give all of them")
    if text is None:
        return
    if getattr(text, "shape", None) != (b,) or not is_integer(text):
        raise UserError(
            f"text is {str(text)!r:.40}: the valid text of each row must be an array of {b} whole numbers, "
            f"such as jnp.full({b}, n)"
        )
    values, slots = known(text), s - video
    if values is not None and b and (values.min() < 0 or values.max() > slots):
        raise UserError(
            f"text={values.tolist()}: valid text must be 0 to {slots}, the text slots of a row"
        )


def route(x: Any, b: int, heads: int, branches: int) -> None:
    """UserError for a route that is not a branch for each head, (heads,) or (b, heads)."""
    if np.shape(x) not in ((heads,), (b, heads)) or not is_integer(x):
        raise UserError(
            f"the route has shape {np.shape(x)} of {kind(x)}: give "
            f"whole numbers, one for each of {heads} heads, or a row of them for each of {b} videos"
        )
    values = known(x)
    if values is not None and values.size and (values.min() < 0 or values.max() >= branches):
        raise UserError(f"route={values.tolist()} must hold branches 0 to {branches - 1}")
