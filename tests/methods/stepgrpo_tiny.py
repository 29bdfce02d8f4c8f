"""Helper: StepGRPO at its smallest, compiled fast and each program once."""

import sys
from pathlib import Path

from jaxrepro import config as configuration
from jaxrepro.data.synthetic import generator
from jaxrepro.methods.stepgrpo import task

sys.path.insert(0, str(Path(__file__).parents[1]))
import compiled

TEXT = dict(d=32, heads=4, kv=2, head_dim=8, ffn=32, mrope_sections=(1, 2, 1))
VISION = dict(embed=32, heads=4, mlp=32, out=32)
LONGEST = generator("digits").max_solution + 5
# Base stage and warm-up are the same program, and so are the updates of runs of any length.
SETTINGS = {
    "steps": 2,
    "base.steps": 1,
    "base.batch": 4,
    "base.lr": 1e-3,
    "base.b2": 0.99,
    "base.max_completion": LONGEST,
    "sft.steps": 2,
    "sft.batch": 4,
    "sft.lr": 1e-3,
    "sft.b2": 0.99,
    "sft.stop_accuracy": 0.0,
    "rl.batch": 4,
    "rl.samples": 2,
    "rl.lr": 2e-2,
    "rl.warmup": 20,
    "checkpoint.every": 1,
    "checkpoint.keep": 5,
    "eval.n": 8,
    "eval.validation_n": 8,
    "eval.batch": 8,
    "log.tensorboard": False,
    "log.curves": False,
}


def config(**changes):
    """The config of size tiny with SETTINGS; `rl__lr=1` sets rl.lr."""
    changes = {k.replace("__", "."): v for k, v in changes.items()}
    return configuration.load("configs/stepgrpo.py:tiny", SETTINGS | changes)


def small(folder, layers=1):
    """A small model under the name of size tiny, quick compilation, programs cached in `folder`."""
    shape = TEXT | {"layers": layers}, VISION | {"depth": layers}
    return compiled.small(folder, (task.SHAPES, "tiny", shape))
