"""A killed or terminated run of StepGRPO, started again, ends with the same bits as one left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrepro import config as configuration
from jaxrepro.methods.stepgrpo import run
from jaxrepro.models import qwen2_vl
from jaxrepro.train import metrics, optim
from jaxrepro.train.checkpoint import Checkpoints, on_device
from jaxrepro.train.state import init_state

sys.path.insert(0, str(Path(__file__).parent))
import stepgrpo_tiny as tiny

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 12
SETTINGS = tiny.SETTINGS | {
    "steps": STEPS,
    "base.steps": STEPS,
    "sft.steps": STEPS,
    "checkpoint.every": 3,
    "checkpoint.keep": 1,
}


def launch(workdir, cache):
    """The launcher as a user starts it."""
    words = [f"--config.{k}={v}" for k, v in SETTINGS.items()]
    command = [sys.executable, "-m", "jaxrepro.launch", "--config=configs/stepgrpo.py"]
    env = os.environ | {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    with (workdir.parent / f"{workdir.name}.log").open("a") as out:
        command += [f"--workdir={workdir}", *words]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)


def finish(workdir, cache):
    assert launch(workdir, cache).wait(timeout=600) == 0, log(workdir)


def log(workdir):
    return (workdir.parent / f"{workdir.name}.log").read_text()[-3000:]


def interrupt(workdir, cache, send, stage, step, delay):
    """Send a signal `delay` seconds after the line of a step of a stage; the exit code."""
    process = launch(workdir, cache)
    path = workdir / metrics.FILE
    seen = lambda x: x["stage"] == stage and x["step"] >= step
    while not any(map(seen, metrics.read(path))):
        assert process.poll() is None, log(workdir)
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(send)
    return process.wait(timeout=120)


def states(workdir):
    """Stage -> (step, arrays) of the last checkpoints: parameters, moments, counts."""
    c = configuration.load("configs/stepgrpo.py", SETTINGS)
    shapes = qwen2_vl.abstract(run.prepare(c).task.cfg)
    found = {}
    for stage in ("base", "sft", "rl"):
        adam = optim.optimizer(c[stage], steps=STEPS)
        target = on_device(jax.eval_shape(partial(init_state, optimizer=adam), shapes))
        with Checkpoints(workdir, stage, read_only=True) as saved:
            found[stage] = jax.device_get(saved.restore(target))
    return found


def files(workdir):
    names = ("summary.json", "items.json", "once/before.json")
    found = {name: json.loads((workdir / name).read_text()) for name in names}
    return found | {"metrics": metrics.read(workdir / metrics.FILE)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted, and the folder of its compiled programs."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder / "run", folder / "cache")
    return folder / "run", folder / "cache"


def test_a_run_that_is_killed_in_every_stage_ends_with_the_same_bits(whole, tmp_path):
    workdir, cache = tmp_path / "run", whole[1]
    rng = random.Random(0)
    for send, stage in (
        (signal.SIGKILL, "base"),
        (signal.SIGTERM, "sft"),
        (signal.SIGKILL, "sft"),
        (signal.SIGKILL, "rl"),
        (signal.SIGTERM, "rl"),
    ):
        again = metrics.read(workdir / metrics.FILE)
        done = max((x["step"] for x in again if x["stage"] == stage), default=0)
        step, delay = rng.randint(done + 1, done + 2), rng.uniform(0, 0.05)
        code = interrupt(workdir, cache, send, stage, step, delay)
        assert code == (143 if send == signal.SIGTERM else -send), log(workdir)
        last = metrics.read(workdir / metrics.FILE)[-1]
        assert last["stage"] == stage and last["step"] < STEPS  # it was stopped in the middle
        assert not (workdir / "summary.json").exists()
    finish(workdir, cache)
    assert "SIGTERM; saved step" in log(workdir)
    assert files(workdir) == files(whole[0])
    jax.tree.map(np.testing.assert_array_equal, states(workdir), states(whole[0]))
