"""Helper: a preference run on the letters at its smallest, compiled fast and each program once."""

import sys
from pathlib import Path

from jaxrepro import config
from jaxrepro.train import policy

sys.path.insert(0, str(Path(__file__).parents[1]))
import compiled

SHAPE = dict(d=16, layers=1, heads=2, kv=1, head_dim=8, ffn=16)
SETTINGS = {
    "steps": 4,
    "sft.steps": 2,
    "sft.batch": 4,
    "sft.warmup": 1,
    "dpo.batch": 4,
    "dpo.warmup": 1,
    "data.n": 16,
    "eval.n": 4,
    "eval.samples": 2,
    "eval.batch": 4,
    "online.slots": 8,
    "checkpoint.every": 2,
    "log.tensorboard": False,
    "log.curves": False,
}


def settings(**changes):
    """The config with `changes`, whose names have "__" for a dot."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return config.load("configs/dpo.py", SETTINGS | named)


def small(folder):
    """A model of one thin layer under the name of its shape."""
    entry = policy.SHAPES, "letters", policy.SHAPES["letters"] | SHAPE
    return compiled.small(folder, entry)
