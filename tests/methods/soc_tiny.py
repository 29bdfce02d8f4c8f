"""Helper: SOC at its smallest, compiled fast and each program once."""

import sys
from pathlib import Path

from jaxrepro import config as configuration
from jaxrepro.train import policy

sys.path.insert(0, str(Path(__file__).parents[1]))
import compiled

SHAPE = dict(d=32, layers=1, heads=4, kv=2, head_dim=8, ffn=48)
SETTINGS = {
    "steps": 4,
    "sft.batch": 8,
    "sft.warmup": 1,
    "data.n": 40,
    "eval.n": 6,
    "eval.batch": 4,
    "decode.beams": (1, 3),
    "decode.width": 3,
    "decode.penalties": (),
    "decode.temperatures": (),
    "checkpoint.every": 2,
    "log.tensorboard": False,
    "log.curves": False,
}


def config(**changes):
    """The config of size tiny with SETTINGS; `soc__lam=0` sets soc.lam."""
    changes = {k.replace("__", "."): v for k, v in changes.items()}
    return configuration.load("configs/soc.py:tiny", SETTINGS | changes)


def small(folder):
    """A small model under the name of its shape, quick compilation, programs cached in `folder`."""
    return compiled.small(folder, (policy.SHAPES, "tiny_2", policy.SHAPES["tiny_2"] | SHAPE))
