"""Helper: BMF runs at their smallest, 2 against 2 on a map of 12, compiled fast and each program once."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro import config as configuration
from jaxrepro.methods.bmf import build, learning
from jaxrepro.methods.bmf.rollout import Learnt

sys.path.insert(0, str(Path(__file__).parents[1]))
import compiled

SETTINGS = {
    "steps": 2,
    "envs": 2,
    "env.map_size": 14,
    "env.horizon": 8,
    "bmf.hidden": 8,
    "bmf.vae_hidden": 8,
    "bmf.latent": 3,
    "bmf.groups": 2,
    "bmf.group_interval": 3,
    "vae.steps": 2,
    "vae.updates": 2,
    "vae.warmup": 1,
    "vae.batch": 16,
    "vae.replay": 32,
    "eval.n": 4,
    "eval.opponents": (),  # itself
    "eval.horizon": 8,
    "eval.noise": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 3,
    "log.tensorboard": False,
    "log.curves": False,
}


def config(**changes):
    """The config of size tiny with SETTINGS; `bmf__groups=3` sets bmf.groups."""
    changes = {k.replace("__", "."): v for k, v in changes.items()}
    return configuration.load("configs/bmf.py:tiny", SETTINGS | changes)


def parts(**changes):
    return build.prepare(config(**changes))


def drawn(shapes, seed=0):
    """Arrays of these shapes by numpy: to compile a draw for each leaf takes seconds."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.uniform(-0.3, 0.3, s.shape), s.dtype), shapes)


def learnt(s, seed=0):
    """A player of one seed with random parameters."""
    key = jax.random.key(0)
    policy = drawn(jax.eval_shape(lambda: learning.init_policy(s.plan, key)), seed)
    if not s.plan.setting.grouped:
        return Learnt(policy)
    return Learnt(policy, drawn(jax.eval_shape(lambda: learning.init_vae(s.plan, key)), seed + 1))


def small(folder):
    """Quick compilation, programs cached in `folder`."""
    return compiled.small(folder)
