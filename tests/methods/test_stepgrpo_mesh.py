"""The losses of StepGRPO are the same numbers on every mesh, and for every split into micro-batches."""

import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrepro.methods.stepgrpo import run
from jaxrepro.models import qwen2_vl
from jaxrepro.train import metrics
from jaxrepro.train.step import accumulate

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import meshes
import stepgrpo_tiny as tiny

pytestmark = pytest.mark.slow
QUESTIONS, SAMPLES = 8, 2


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    with tiny.small(tmp_path_factory.mktemp("programs"), layers=2):
        yield


@pytest.fixture(scope="module")
def problem():
    """Setting, parameters, a batch of rows of the warm-up and one of rollouts."""
    sizes = {"base__batch": QUESTIONS, "sft__batch": QUESTIONS, "rl__batch": QUESTIONS}
    s = run.prepare(tiny.config(**sizes, rl__samples=SAMPLES))
    params = jax.jit(partial(qwen2_vl.init, cfg=s.task.cfg))(jax.random.key(0))
    batch = partial(s.task.batches, size=QUESTIONS, seed=0)
    rng = np.random.default_rng(0)
    shape = QUESTIONS, SAMPLES, s.task.encoder.max_completion
    rows = dict(batch("rl", solutions=False)[0].arrays)
    rows["tokens"] = rng.integers(7, s.task.cfg.text.vocab, shape).astype(np.int32)
    rows["length"] = rng.integers(1, shape[2] + 1, shape[:2]).astype(np.int32)
    rows["advantage"] = rng.normal(size=shape[:2]).astype(np.float32)
    rows["ref_lp"] = -rng.uniform(3, 6, shape).astype(np.float32)
    rows["lp_sampler"] = rows["ref_lp"]
    return s, params, batch("sft", solutions=True)[0].arrays, rows


@pytest.mark.parametrize("name", ["sft", "rl"])
def test_loss_and_gradient_are_the_same_on_every_mesh(problem, name):
    s, params, sft, rl = problem
    loss, batch = {"sft": (run.sft_loss, sft), "rl": (run.rl_loss, rl)}[name]
    meshes.check(partial(loss, s=s), params, qwen2_vl.axes(s.task.cfg), batch)


def test_micro_batches_give_the_gradient_of_the_whole_batch(problem):
    s, params, _, rows = problem
    loss = partial(run.rl_loss, s=s)
    sums = jax.jit(accumulate, static_argnums=(0, 3))
    whole = sums(loss, params, rows, 1)
    for m in (2, 4):
        meshes.assert_same(sums(loss, params, rows, m), whole, name=f"split {m}")


def test_a_run_on_a_mesh_logs_what_a_run_on_one_device_logs(tmp_path):
    """Rollouts, rewards and updates; seven test questions do not divide over the devices."""
    lines = []
    for name, mesh in (("one", (1, 1, 1, 1)), ("mesh", (2, 2, 1, 2))):
        c = tiny.config(base__steps=0, sft__steps=1, steps=1, eval__n=7, mesh=mesh)
        results = run.run(c, tmp_path / name)
        assert results["after/test/n"] == 7
        lines.append(metrics.read(tmp_path / name / "metrics.jsonl"))
    for a, b in zip(*lines, strict=True):
        assert a.pop("stage") == b.pop("stage")
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
