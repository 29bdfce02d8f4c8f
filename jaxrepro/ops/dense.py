"""Matrix products: of token arrays with weights split into heads, and with float32 results."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrepro.sharding import splits_tokens

_stay = jax.lax.optimization_barrier


class Flipped(NamedTuple):
    """A weight that lies (*outputs, *inputs); `dense` takes it too.

    With the few tokens of a decode step, XLA's CPU kernels multiply it about 1.5 times as fast.
    """

    w: Any


def flip(w: Float[Array, "..."], inputs: int = 1) -> Flipped:
    """The same weight, of `inputs` leading input axes, with its outputs first."""
    return Flipped(jnp.transpose(w, (*range(inputs, w.ndim), *range(inputs))))


def dense(x: Float[Array, "b t ..."], w: Array | Flipped, *, inputs: int = 1) -> Array:
    """x (b, t, *inputs) times w (*inputs, *outputs), in the dtype of x: (b, t, *outputs).

    `inputs`: how many leading axes of w are summed over. Tokens of all rows form one matrix, for which
    XLA's CPU kernels are about a fifth faster; where the mesh splits t, rows stay apart, because a
    merged axis could not keep both splits.
    """
    lead = x.shape[:2]
    if isinstance(w, Flipped):
        w = w.w.astype(x.dtype)
        outputs = w.shape[: w.ndim - inputs]
        # the barriers keep XLA from turning the product round again
        columns = _stay(x.reshape(math.prod(lead), -1).T)
        y = _stay(w.reshape(math.prod(outputs), -1) @ columns)
        return y.T.reshape(*lead, *outputs)
    size = math.prod(w.shape[:inputs])
    rows = x.reshape(*lead, size) if splits_tokens() else x.reshape(-1, size)
    y = jnp.matmul(rows, w.astype(x.dtype).reshape(size, -1))
    return y.reshape(*lead, *w.shape[inputs:])


def einsum32(formula: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """einsum of two arrays of one dtype, accumulated and returned in float32 (float64 stays).

    XLA's CPU client has no product that reads bfloat16 and writes float32, so there the operands are
    widened first: the products are the same, because those of two bfloat16 numbers fit float32.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if jax.default_backend() == "cpu":
        x, y = x.astype(wide), y.astype(wide)
    return jnp.einsum(formula, x, y, preferred_element_type=wide)
