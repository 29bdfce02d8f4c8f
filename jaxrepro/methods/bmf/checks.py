"""Checks of what a BMF run is given, for programs that are compiled with them."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax.numpy as jnp
from jax.experimental import checkify

from jaxrepro.config import UserError


def finite(**fields: Any) -> None:
    """checkify errors that name the field, where one has NaN or infinity; inside `checked` functions alone."""
    for name, x in fields.items():
        wrong = ~jnp.isfinite(x)
        checkify.check(
            ~wrong.any(),
            name + " has {n} numbers that are NaN or infinite; observations must be finite",
            n=wrong.sum(),
        )


def checked(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, which may call `finite`; what it finds is raised as a UserError. Jit inside f, or jit nothing: it waits for f."""
    tested = checkify.checkify(f, errors=checkify.user_checks)

    @wraps(f)
    def call(*args, **kwargs):
        error, out = tested(*args, **kwargs)
        if error.get():
            raise UserError(error.get().split(" (`check` failed)")[0])
        return out

    return call
