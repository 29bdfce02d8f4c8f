"""Planted routes: the construction is what it says, and the router finds it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.methods.vorta import planted


@pytest.fixture(scope="module")
def grams():
    return jnp.stack([planted.gram(planted.heads(seed)) for seed in range(5)])


@partial(jax.jit, static_argnames=("steps", "silu"))
@partial(jax.vmap, in_axes=(0, 0, None, None, None))
def found(key, grams, reg, steps, silu):
    params = planted.train(key, grams, reg, steps=steps, silu=silu)
    return planted.recovered(params, silu=silu)


def trained(grams, reg, steps=100, silu=True):
    """Whether each head took its branch: (seeds, times, heads)."""
    keys = jnp.stack([jax.random.key(seed) for seed in range(len(grams))])
    return np.asarray(found(keys, grams, reg, steps, silu))


# A window holds 0.42 of the keys. All weight of a fine query lies on one key with a value of variance 1: sliding attention
# loses it for 0.58 of the queries, coreset attention for half of them, and gives most of the others another query's output.
def test_each_head_has_the_branch_that_was_planted(grams):
    error = np.asarray(jnp.diagonal(grams, axis1=2, axis2=3))  # (seeds, heads, branches)
    assert np.abs(error[..., 0]).max() == 0
    local, smooth, fine = error[:, [0, 1, 7]], error[:, [2, 3, 6]], error[:, 4:6]
    assert local[..., 2].max() < 1e-3 and local[..., 1].min() > 0.5
    assert smooth[..., 1].max() < 1e-6 and smooth[..., 2].min() > 0.6
    assert fine[..., 1].min() > 0.9 and fine[..., 2].min() > 0.5


def test_all_six_static_heads_are_recovered_in_five_of_five_seeds(grams):
    right = trained(grams, 0.02)  # the weights of the paper
    assert right[..., :6].all()
    assert not right[:, 2:, 6].any()  # the head that switches is not, at these weights


def test_the_head_that_switches_in_time_is_recovered_in_five_of_five_seeds(grams):
    assert trained(grams, 1.0).all()
    # behind a SiLU the time's sinusoid loses half of its amplitude; without one half of the penalty is enough
    assert trained(grams, 0.5, silu=False).all()
    assert trained(grams, 0.5)[..., :6].all()


def test_without_a_penalty_heads_drift_to_full(grams):
    right = trained(grams, 0.0)
    assert right[..., 4:6].all()  # full is right there
    assert right[..., :4].mean() < 0.5


def test_the_gram_matrix_gives_the_loss_of_the_real_mixture():
    made = planted.heads(0)
    key, reg = jax.random.key(3), 0.5
    params = planted.train(jax.random.key(0), planted.gram(made), reg, steps=3)
    small = planted.gram_loss(params, planted.gram_batch(key, planted.gram(made), 1), reg=reg)
    real = jax.jit(lambda p: planted.mixture_loss(p, planted.mixture_batch(key, made, 1), reg=reg))
    np.testing.assert_allclose(small[0], real(params)[0], rtol=1e-4)


@pytest.mark.slow
def test_the_real_mixture_recovers_all_routes():
    params = planted.train(jax.random.key(0), planted.heads(0), 1.0, mixture=True)
    assert planted.recovered(params).all()


@pytest.mark.slow
def test_how_often_all_seven_are_recovered_in_twenty_seeds():
    """The numbers of the method's README."""
    grams = jnp.stack([planted.gram(planted.heads(seed)) for seed in range(20)])
    right = lambda *how: int(trained(grams, *how).all((1, 2)).sum())
    assert right(0.5) >= 15  # 17 where this was written
    assert right(0.5, 400) == right(0.5, 100, False) == 20
    assert [right(reg) for reg in (1.0, 2.0, 5.0)] == [20, 20, 20]
    # without the SiLU the paper's weights leave more heads at full: 17 where this was written
    six = lambda silu: int(trained(grams, 0.02, 100, silu)[..., :6].all((1, 2)).sum())
    assert six(True) == 20 and six(False) >= 15


def test_runs_of_other_seeds_plant_other_heads(monkeypatch):
    planted_, made = [], planted.heads(0)
    monkeypatch.setattr(planted, "heads", lambda seed: planted_.append(seed) or made)
    monkeypatch.setattr(planted, "gram", lambda _: jnp.zeros((8, 3, 3)))
    monkeypatch.setattr(planted, "train", lambda *_: {})
    monkeypatch.setattr(planted, "recovered", lambda _: planted.right() == 1)
    assert planted.study(2, first=6)["planted/static"] == 0
    assert planted_ == [6, 7]
    with pytest.raises(UserError, match="0 seeds from 3 on"):
        planted.study(0, first=3)
