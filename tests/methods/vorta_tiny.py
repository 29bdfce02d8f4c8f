"""Helper: VORTA at its smallest, compiled fast and each program once."""

import dataclasses
import functools
import sys
from pathlib import Path

from jaxrepro import config as configuration
from jaxrepro.methods.vorta import setting

sys.path.insert(0, str(Path(__file__).parents[1]))
import compiled

SHAPE = dataclasses.replace(
    setting.SHAPES["small"], heads=2, head_dim=12, layers=1, ffn=16, frequencies=16
)
SETTINGS = {
    "steps": 4,
    "grid.size": (2, 4, 4),
    "grid.tile": (2, 2, 2),  # with the window both sparse branches cost 0.25
    "grid.window": (1, 1, 1),
    "pretrain.steps": 2,
    "pretrain.batch": 4,
    "pretrain.warmup": 1,
    "model.remat": "none",
    "decode.steps": 4,  # t = 1000, 900, 750, 500
    "decode.taus": (),
    "decode.controls": ("random", "static", "all_sliding"),
    "decode.pab": 2,
    "decode.few": 2,
    "eval.n": 2,
    "planted.seeds": 0,
    "checkpoint.every": 2,
    "log.tensorboard": False,
    "log.curves": False,
}


@functools.cache
def base():
    """The config of size tiny with SETTINGS, read once."""
    return configuration.load("configs/vorta.py:tiny", SETTINGS)


def config(cache, **changes):
    """A copy of `base` with its own cache; `loss__reg=0.0` sets loss.reg."""
    made = base().copy_and_resolve_references()
    changes = {k.replace("__", "."): v for k, v in changes.items()}
    made.update_from_flattened_dict({"pretrain.cache": str(cache)} | changes)
    return made


def small(folder):
    """A small model under the name of its shape, quick compilation, programs cached in `folder`."""
    return compiled.small(folder, (setting.SHAPES, "small", SHAPE))
