"""Declarations of parameters: from one tree of `Param` come initial values, shapes and logical axes."""

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray


@dataclass(frozen=True)
class Param:
    """The one declaration of a tensor: shape, a logical axis per dimension, initialiser.

    std is that of a normal initialiser, or of a uniform one around zero; the strings "zeros" and "ones"
    are constants.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float | str
    uniform: bool = False


def fan_in(shape: tuple[int, ...], axes: tuple[str, ...], inputs: int = 1) -> Param:
    """A weight whose first `inputs` dimensions are contracted: std 1 / sqrt(their product)."""
    return Param(shape, axes, 1 / math.sqrt(math.prod(shape[:inputs])))


def stacked(tree: Any, layers: int) -> Any:
    """The declarations of `layers` equal layers with the leading axis "layers"."""
    stack = lambda p: replace(p, shape=(layers, *p.shape), axes=("layers", *p.axes))
    return jax.tree.map(stack, tree)


def initialise(key: PRNGKeyArray, declared: Any) -> Any:
    """Draw float32 parameters; a tensor's numbers depend on its path, not on its neighbours."""

    def draw(path, p: Param):
        if isinstance(p.std, str):
            return getattr(jnp, p.std)(p.shape, jnp.float32)
        name = zlib.crc32(jax.tree_util.keystr(path).encode())
        own = jax.random.fold_in(key, name)
        if p.uniform:
            reach = math.sqrt(3) * p.std
            return jax.random.uniform(own, p.shape, jnp.float32, minval=-reach, maxval=reach)
        return jax.random.normal(own, p.shape, jnp.float32) * p.std

    return jax.tree_util.tree_map_with_path(draw, declared)


def shapes(declared: Any) -> Any:
    """The abstract tree (float32 ShapeDtypeStruct) of a tree of declarations."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), declared)


def count(declared: Any) -> int:
    """Number of parameters of a tree of declarations."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(declared))
