"""Losses with a state, and losses of a batch that is cut into micro-batches."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.methods.dpo import batchwise
from jaxrepro.methods.dpo.registry import Batch, SeqStats, loss, resolve

sys.path.insert(0, str(Path(__file__).parent))
from dpo_golden import GOLDEN, close, items, log_ratios, mean, slope

PRNG = jax.random.key(0)


# ---- states


def test_running_mean_is_the_mean_of_everything():
    rng = np.random.default_rng(0)
    state, seen = None, []
    batch = Batch(labels=jnp.arange(4) < 2)
    for _ in range(4):
        a = rng.normal(size=(4, 1)) * 3
        seen.append(0.1 * a)
        per_item, state, curves = loss(resolve("bco"), log_ratios(a), batch, state)
        close(state.mean, np.mean(seen), atol=1e-6)
        close(curves["delta"][0], np.mean(seen), atol=1e-6)
    z = 0.1 * a[:, 0] - np.mean(seen)
    close(per_item, np.where(np.arange(4) < 2, np.logaddexp(0, -z), np.logaddexp(0, z)))


def test_moving_averages_start_at_zero_and_can_be_corrected():
    x = jnp.array([1.0, 2.0, 4.0])
    state = batchwise.Ema.start().update(x, decay=0.9)
    close(state.mean, 0.1 * x.mean())
    close(state.std, 0.1 * x.std(ddof=1))
    close(state.read(decay=0.9, bias_correction=True), [x.mean(), x.std(ddof=1)])


@pytest.mark.parametrize("name", ["beta_dpo", "alpha_dpo"])
def test_first_step_at_the_reference_is_defined(name):
    seq = GOLDEN._replace(p=GOLDEN.q)
    value, state, _ = loss(resolve(name), seq, Batch(key=PRNG))
    assert np.isfinite(value).all() and all(np.isfinite(x) for x in state)


def test_selection_keeps_the_share_and_prefers_the_middle():
    counts = np.zeros(10)
    log_weight = -0.5 * (jnp.arange(10) - 4.5) ** 2
    for i in range(40):
        keep = batchwise.select(jax.random.key(i), log_weight, 4)
        assert int(keep.sum()) == 4
        counts += np.asarray(keep)
    assert counts[4:6].min() > counts[[0, 9]].max()
    far = sum(
        np.asarray(
            batchwise.select(jax.random.key(i), jnp.full(10, -1e6) - 1e5 * jnp.arange(10), 4)
        )
        for i in range(40)
    )
    assert far.min() > 5  # underflow everywhere: uniform


def test_dropped_pairs_have_no_gradient_and_the_mean_is_over_kept_ones():
    batch = Batch(key=PRNG)
    seq = log_ratios(np.random.default_rng(1).normal(size=(4, 2)))
    g = slope("beta_dpo", seq, batch, rho=0.5)
    kept = np.asarray(g)[:, 0] != 0
    assert kept.sum() == 2
    value = items("beta_dpo", seq, batch, rho=0.5)
    beta = float(loss(resolve("beta_dpo", rho=0.5), seq, batch)[2]["beta"][0])
    close(value.mean(), np.logaddexp(0, -beta * np.asarray(seq.d))[kept].mean())


# ---- micro-batches


def test_token_mean_of_a_cut_batch_is_that_of_the_whole():
    whole = mean("sft")
    n = GOLDEN.n[:, 0].mean()
    halves = [SeqStats(*(x[i::2] for x in GOLDEN[:3])) for i in range(2)]
    parts = [items("sft", half, Batch(mean_chosen_tokens=n)) for half in halves]
    close(np.concatenate(parts).mean(), whole)
    close(whole, -GOLDEN.p[:, 0].sum() / GOLDEN.n[:, 0].sum())


def test_beta_of_a_batch_is_measured_from_the_moving_mean():
    seen = (
        jnp.array([2.0, -1.5, 1.0, -2.5]) + 4.0
    )  # kept margins of mean 3.75, moving mean before 1
    state = batchwise.Ema(jnp.array(1.0), jnp.array(1.0), jnp.array(3.0))
    seq = log_ratios(jnp.stack([seen, jnp.zeros(4)], 1))
    per_item, after, curves = loss(resolve("beta_dpo", rho=0), seq, Batch(key=PRNG), state)
    moving = 0.9 * 1.0 + 0.1 * 3.75
    beta = 0.1 * (1 + 0.6 * (3.75 - moving))
    close([after.mean, curves["beta"][0]], [moving, beta])
    close(per_item, np.logaddexp(0, -beta * np.asarray(seen)))


def test_targets_and_moving_averages_have_no_gradient():
    state = batchwise.Ema(jnp.array(0.1), jnp.array(0.5), jnp.array(3.0))
    m = np.asarray((GOLDEN.pb - GOLDEN.qb)[:, 0] - (GOLDEN.pb - GOLDEN.qb)[:, 1])
    mean_, std = 0.09 + 0.1 * m.mean(), 0.45 + 0.1 * m.std(ddof=1)
    z = 2.5 * np.asarray(GOLDEN.pb[:, 0] - GOLDEN.pb[:, 1] - 0.6 - 0.2 * (m - mean_) / std)
    g = jax.grad(lambda p: items("alpha_dpo", GOLDEN._replace(p=p), None, state).sum())(GOLDEN.p)
    want = -2.5 / (1 + np.exp(z))
    close(g[:, 0] * GOLDEN.n[:, 0], want, rtol=1e-4)
    close(g[:, 1] * GOLDEN.n[:, 1], -want, rtol=1e-4)
