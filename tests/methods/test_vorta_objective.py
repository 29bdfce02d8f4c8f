"""The loss of the routers: each term by hand, times, who gets a gradient, and what must not change it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vorta_walks import drawn

from jaxrepro.config import UserError
from jaxrepro.methods.vorta import objective, router
from jaxrepro.methods.vorta.objective import Batch, Terms
from jaxrepro.models import video_dit
from jaxrepro.models.video_dit import Condition
from jaxrepro.ops.video_grid import VideoGrid

GRID = VideoGrid((4, 2, 2), (1, 2, 2), window=(3, 1, 1), bucket=(2, 2, 2))
# five blocks are one program that is run five times; up to four are a program each
WAN = replace(video_dit.PRESETS["wan_tiny"], layers=5, ffn=8)
HUNYUAN = replace(video_dit.PRESETS["hunyuan_tiny"], double=1, single=1)
WEIGHTS = dict(diff=1.0, reg=0.3, last=20.0, hidden=0.5)


def batch_of(cfg, times=(900.0, 120.0)):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    b = len(times)
    condition = Condition(draw(b, 5, 12))
    if cfg is HUNYUAN:
        condition = condition._replace(
            length=jnp.array([3, 5]), pooled=draw(b, 8), guidance=jnp.full(b, 1000.0)
        )
    return Batch(draw(b, 4, 4, 4, 4), draw(b, 4, 4, 4, 4), jnp.array(times), condition)


@partial(jax.jit, static_argnames=("cfg", "chunk"))
def wan_loss(r, params, batch, cfg=WAN, chunk=None):
    """(loss, weight, aux), its gradient to routers and model."""
    fn = partial(objective.loss, cfg=cfg, grid=GRID, chunk=chunk, **WEIGHTS)

    def total(r, params):
        loss, weight, aux = fn(r, batch, params=params)
        return loss, (weight, aux)

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(r, params)


@pytest.fixture(scope="module")
def wan():
    r, params, batch = router.init(jax.random.key(1), WAN), drawn(WAN), batch_of(WAN)
    return r, params, batch, wan_loss(r, params, batch)


def test_times_run_from_1000_at_noise_to_1():
    u = jnp.array([0.0, 0.0009, 0.2, 0.9989, 0.9999, 1.0])
    assert objective.time_of(u).tolist() == [1000, 1000, 800, 2, 1, 1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_times_of_a_step_share_one_interval(seed):
    t = np.asarray(objective.timesteps(jax.random.key(seed), 16))
    assert t.min() >= 1 and t.max() <= 1000 and (t == np.round(t)).all()
    assert len(set((1000 - t) // 200)) == 1 and len(set(t)) > 1


def test_times_without_intervals_are_everywhere():
    t = np.asarray(objective.timesteps(jax.random.key(0), 2000, intervals=1))
    assert np.histogram(t, bins=5, range=(1, 1000))[0].min() > 300
    with pytest.raises(UserError, match="0 intervals"):
        objective.timesteps(jax.random.key(0), 4, intervals=0)


def test_the_x0_error_is_the_velocity_error_times_sigma_squared():
    batch = batch_of(WAN)
    v = jnp.ones_like(batch.noise)
    plain = objective.diffusion_error(v, batch)
    sigma = np.array([0.9, 0.12])
    np.testing.assert_allclose(plain, np.square(1 - (batch.noise - batch.latents)).mean((1, 2, 3, 4)), rtol=1e-5)  # fmt: skip
    other = objective.diffusion_error(v, batch, target="x0")
    np.testing.assert_allclose(other, plain * sigma**2, rtol=1e-4)
    with pytest.raises(UserError, match="target='noise'"):
        objective.diffusion_error(v, batch, target="noise")


def test_the_penalty_is_a_sum_over_blocks_and_a_mean_over_heads():
    third = jnp.full((2, 60, 24, 3), 1 / 3)
    np.testing.assert_allclose(objective.regulariser(third), 60 / 9, rtol=1e-6)
    g = jnp.array([[[[0.5, 0.5, 0.0], [0.1, 0.0, 0.9]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]])
    np.testing.assert_allclose(objective.regulariser(g), [(0.25 + 0.01) / 2 + 0.5], rtol=1e-6)
    np.testing.assert_allclose(objective.regulariser(g, power=1), [0.6 / 2 + 0.5], rtol=1e-6)
    with pytest.raises(UserError, match="power=3"):
        objective.regulariser(g, power=3)


def test_below_200_the_diffusion_loss_hands_its_weight_over():
    e = Terms(*(jnp.full(3, x) for x in (1.0, 0.1, 10.0, 0.01)))
    t = jnp.array([200.0, 199.0, 1.0])
    with_hidden = objective.combine(e, t, hidden=5.0)
    np.testing.assert_allclose(
        with_hidden, [1 + 0.2 + 2 + 0.05, 0.2 + 1.5 * 2.05, 0.2 + 1.5 * 2.05], rtol=1e-6
    )
    # w_last = 40 where it is the only one, as in the official code
    np.testing.assert_allclose(objective.combine(e, t), [1 + 0.2 + 2, 0.2 + 4, 0.2 + 4], rtol=1e-6)
    np.testing.assert_allclose(objective.combine(e, t, rebalance=0.0), 3.2, rtol=1e-6)
    np.testing.assert_allclose(objective.combine(e, t, diff=0.0), 2.2, rtol=1e-6)
    np.testing.assert_allclose(objective.combine(e, t, last=0.0), 1.2, rtol=1e-6)


def test_the_loss_is_its_terms_of_two_runs_of_the_model(wan):
    r, params, batch, ((total, (weight, aux)), _) = wan
    g = router.gates(r, video_dit.time_embedding(params, WAN, batch.t))
    run = jax.jit(
        lambda attend: video_dit.apply(params, WAN, objective.noisy(batch), batch.t, batch.condition,
                                       attend=attend, layout=GRID, collect=lambda x, _, l: x),
        static_argnums=0,
    )  # fmt: skip
    # Wan's own branches, without being named above: keys follow the match of the queries
    mixed, states = run(objective.soft(g, GRID, branches=router.branches(WAN)))
    dense, dense_states = run(video_dit.full)
    mean = lambda x: np.square(x).mean((1, 2, 3, 4))
    hidden = np.square(states - dense_states).mean((2, 3)).sum(0)
    diffusion = mean(mixed - (batch.noise - batch.latents))
    reg = np.square(g[..., 0]).mean(2).sum(1)
    last = mean(mixed - dense)
    right = [
        diffusion[0] + 0.3 * reg[0] + 20 * last[0] + 0.5 * hidden[0],
        0.3 * reg[1] + 1.5 * (20 * last[1] + 0.5 * hidden[1]),
    ]
    np.testing.assert_allclose(total, sum(right), rtol=1e-5)
    assert weight == 2 and last.min() > 1e-5 and hidden.min() > 1e-5
    np.testing.assert_allclose(aux["hidden"], hidden.sum(), rtol=1e-4)
    np.testing.assert_allclose(aux["last"], last.sum(), rtol=1e-4)
    np.testing.assert_allclose(aux["full"] + aux["coreset"] + aux["sliding"], 2, rtol=1e-5)
    reference = mean(dense - (batch.noise - batch.latents))
    np.testing.assert_allclose(aux["reference_diffusion"], reference.sum(), rtol=1e-5)


def test_only_routers_have_a_gradient_and_those_of_every_block(wan):
    *_, (_, (to_router, to_model)) = wan
    assert not any(np.any(x) for x in jax.tree.leaves(to_model))
    for leaf in to_router.values():
        assert (np.abs(leaf).max(tuple(range(1, leaf.ndim))) > 1e-6).all()


def test_each_video_has_its_own_time_and_rule(wan):
    r, params, batch, ((total, _), (slope, _)) = wan
    twice = [jax.tree.map(lambda x, i=i: x[jnp.array([i, i])], batch) for i in (0, 1)]
    alone = [wan_loss(r, params, rows) for rows in twice]  # each is twice what one video costs
    np.testing.assert_allclose(2 * total, sum(one[0][0] for one in alone), rtol=1e-5)
    together = jax.tree.map(jnp.add, *(one[1][0] for one in alone))
    slope = jax.tree.map(lambda x: 2 * x, slope)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), slope, together)


@pytest.mark.slow
def test_heads_in_chunks_and_blocks_computed_again_give_the_same(wan):
    r, params, batch, ((total, _), (slope, _)) = wan
    (other, _), (again, _) = wan_loss(r, params, batch, replace(WAN, remat="full"), 1)
    np.testing.assert_allclose(other, total, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (again, slope))):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


@pytest.mark.slow
def test_full_gates_of_a_model_with_text_cost_nothing_to_keep():
    params = drawn(HUNYUAN)
    r = jax.tree.map(lambda s: jnp.zeros(s.shape), router.abstract(HUNYUAN))
    fn = jax.jit(lambda r, b: objective.loss(r, b, params=params, cfg=HUNYUAN, grid=GRID))
    early, late = (batch_of(HUNYUAN, times) for times in ((900.0, 700.0), (190.0, 120.0)))
    _, _, even = fn(r, early)
    assert even["last"] > 1e-5
    np.testing.assert_allclose(even["reg"], 2 * 2 / 9, rtol=1e-5)
    r["bias"] = r["bias"].at[..., 0].set(100.0)
    total, _, dense = fn(r, early)
    assert dense["last"] < 1e-10
    np.testing.assert_allclose(dense["diffusion"], dense["reference_diffusion"], rtol=1e-5)
    # the penalty of two blocks of two videos; below t = 200 nothing is left beside it
    np.testing.assert_allclose(total, 4 * 0.02 + dense["diffusion"], rtol=1e-5)
    np.testing.assert_allclose(fn(r, late)[0], 4 * 0.02, rtol=1e-5)
