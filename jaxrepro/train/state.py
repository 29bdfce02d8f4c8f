"""The state of a training run: what a checkpoint holds, and nothing else.

No random key and no data cursor: the key of a step is `step_key(seed, stage, step)`, its batch is
`dataset[step]`, so resuming needs neither.
"""

import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxrepro.sharding import like_params, path_of, replicated


@struct.dataclass
class State:
    """step: int32 scalar, updates done in this stage; params: float32 tree; opt: of the optimiser;
    extra: the method's own arrays (averages, reference, replay, environment) or None."""

    step: Any
    params: Any
    opt: Any
    extra: Any = None


def trainable_mask(trainable, params):
    """Tree of bools from None (all), a tree of bools, a regular expression, or `f(path, leaf)`.

    A path reads "text/layers/wq"; an expression must match all of it.
    """
    if trainable is None:
        return jax.tree.map(lambda _: True, params)
    if isinstance(trainable, str):
        pattern = re.compile(trainable)
        trainable = lambda path, leaf: pattern.fullmatch(path) is not None
    if callable(trainable):
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: bool(trainable(path_of(keys), leaf)), params
        )
    return jax.tree.map(bool, trainable)


def select(params, mask):
    """The trained part: frozen leaves become empty nodes, so that they get no moments."""
    return jax.tree.map(lambda keep, x: x if keep else optax.MaskedNode(), mask, params)


def merge(part, params, mask):
    """Inverse of `select`: trained leaves from `part`, the others from `params`."""
    leaves = iter(jax.tree.leaves(part))
    return jax.tree.map(lambda keep, x: next(leaves) if keep else x, mask, params)


def init_state(params, optimizer, *, trainable=None, extra=None) -> State:
    """A fresh state at step 0; `trainable` as in `make_step`, and the same there."""
    opt = optimizer.init(select(params, trainable_mask(trainable, params)))
    return State(step=jnp.zeros((), jnp.int32), params=params, opt=opt, extra=extra)


def state_shardings(abstract: State, params_shardings, mesh) -> State:
    """Shardings of a state: moments and copies of parameters lie as the parameters, rest everywhere."""
    return State(
        step=replicated(mesh),
        params=params_shardings,
        opt=like_params(abstract.opt, params_shardings, mesh),
        extra=like_params(abstract.extra, params_shardings, mesh),
    )


def step_key(seed, stage: str, step):
    """The random key of one step of one stage: a function of the three, whatever ran before."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))
    return jax.random.fold_in(key, step)
