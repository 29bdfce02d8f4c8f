"""Helper: a run of twelve steps that fits a line."""

import time

import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxrepro.train.state import init_state
from jaxrepro.train.step import compile_step, make_step

ADAM = optax.adam(0.05)
STEPS = 12


def config(**changes):
    c = ConfigDict({"method": "toy", "seed": 0, "steps": STEPS, "lr": 0.05, "mesh": {"data": 1}})
    c.checkpoint = ConfigDict({"every": 4, "keep": 2})
    c.eval = ConfigDict({"every": 5})
    c.log = ConfigDict({"tensorboard": False, "curves": False, "every": 1, "wandb": ""})
    c.data = ConfigDict({"path": ""})
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


def loss(params, batch):
    error = batch["x"] @ params["w"] - batch["y"]
    return (error**2).sum(), error.size, {}


STEP = compile_step(make_step(loss, ADAM, micro_batches=2))


def init():
    return init_state({"w": jnp.zeros(4)}, ADAM)


def data(i):
    rng = np.random.default_rng(i)
    return {"x": rng.normal(size=(8, 4)).astype("f"), "y": rng.normal(size=8).astype("f")}


def train(run, *, until=None, stage="rl", batch=data, sleep=0.0):
    """The loop of a method; `until` abandons it after that many steps as a kill would."""
    state = run.restore(init, stage=stage)
    for i in run.steps(state, run.config.steps):
        state, m = STEP(state, batch(i))
        run.log(i, m, ids=[f"row{i}"])
        run.save(i, state)
        time.sleep(sleep)
        if until is not None and i + 1 == until:
            return state
    return state
