"""Returns and loss of BMF by hand, what ends an agent's steps, self-play."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmf_small import ACTIONS, AGENTS, ENVS, FEATURES, STEPS, VIEW, episodes, params_of, small

from jaxrepro.config import UserError
from jaxrepro.methods.bmf import groups, networks, objective

G = 0.95


def _total(p, setting, batch):
    total, weight, aux = objective.loss(p, setting, batch)
    return total, (weight, aux)


# one program a setting: ((loss, (weight, aux)), gradient)
slope = jax.jit(jax.value_and_grad(_total, has_aux=True), static_argnums=1)


def loss(p, setting, batch):
    (total, (weight, aux)), _ = slope(p, setting, batch)
    return total, weight, aux


SETTINGS = {
    "official": small("official"),
    "fixed": small(),
    "ac": small(algorithm="ac"),
    "mf_ac": small(algorithm="mf_ac"),
}


def by_hand(**options):
    """Two agents, three steps; the second dies in step 1."""
    reward = jnp.array([[1.0, 2], [3, 4], [5, 100]])
    value = jnp.array([[10.0, 20], [30, 40], [50, 200]])
    mask = jnp.array([[True, True], [True, True], [True, False]])
    after = jnp.array([[True, True], [True, False], [True, False]])
    end = jnp.array([60.0, 300])
    f = jax.jit(functools.partial(objective.returns, gamma=G, **options))
    return f(reward, value, end, mask, after)


# official: the survivor ends with 5 + .95 50 = 52.5, the dead with 4 + .95 40 = 42
def test_official_returns_bootstrap_with_the_last_value_also_of_the_dead():
    found = by_hand(bootstrap="official")
    right = [[1 + G * (3 + G * 52.5), 2 + G * 42], [3 + G * 52.5, 42], [52.5, 0]]
    np.testing.assert_allclose(found, right, rtol=1e-6)


# fixed: the survivor ends with 5 + .95 60 = 62, the dead with 4
def test_fixed_returns_are_zero_beyond_death_and_the_final_value_beyond_the_horizon():
    found = by_hand(bootstrap="fixed")
    right = [[1 + G * (3 + G * 62), 2 + G * 4], [3 + G * 62, 4], [62, 0]]
    np.testing.assert_allclose(found, right, rtol=1e-6)


@pytest.mark.parametrize("bootstrap, beyond", [("official", 10.0), ("fixed", 30.0)])
def test_an_episode_that_ends_early_bootstraps_with_what_followed_it(bootstrap, beyond):
    reward, value = jnp.array([[1.0], [7], [7]]), jnp.array([[10.0], [30], [50]])
    mask, after = jnp.array([[True], [False], [False]]), jnp.ones((3, 1), bool)
    f = functools.partial(objective.returns, gamma=G, bootstrap=bootstrap)
    found = f(reward, value, jnp.array([90.0]), mask, after)
    np.testing.assert_allclose(found[:, 0], [1 + G * beyond, 0, 0], rtol=1e-6)


def test_an_unknown_bootstrap_is_refused():
    with pytest.raises(UserError, match="bootstrap='zero' is not one of official, fixed"):
        by_hand(bootstrap="zero")


@functools.partial(jax.jit, static_argnums=1)
def _forward(p, setting, view, features, state):
    vectors = groups.mean_field_input(p, setting, state)
    return networks.policy_and_value(p, setting, view, features, vectors)


def of_agents(setting, batch, p):
    """(probabilities, values, values after each step) in float64, from the networks' own outputs."""
    logits, value = _forward(p, setting, batch.view, batch.features, batch.groups)
    last = jax.tree.map(lambda x: x[None].repeat(STEPS, 0), (batch.final_view, batch.final_features, batch.final_groups))  # fmt: skip
    final = _forward(p, setting, *last)[1][0]  # in the shapes of a program that is there already
    logits = np.float64(logits)
    pi = np.exp(logits - logits.max(-1, keepdims=True))
    pi = np.clip(pi / pi.sum(-1, keepdims=True), 1e-10, 1)
    return pi, np.float64(value), np.concatenate([value[1:], final[None]]).astype(float)


@pytest.mark.parametrize("name", ["official", "fixed"])
def test_the_loss_equals_the_formula_agent_by_agent(name):
    setting = SETTINGS[name]
    batch, p = episodes(setting), params_of(setting)[0]
    pi, value, beyond = of_agents(setting, batch, p)
    policy_loss, value_loss, entropy, n = 0.0, 0.0, 0.0, 0
    for e in range(ENVS):
        for i in range(AGENTS):
            steps = np.flatnonzero(batch.mask[:, e, i])
            last = steps[-1]
            if name == "official":
                r = value[last, e, i]
            else:
                r = beyond[last, e, i] if batch.alive_after[last, e, i] else 0.0
            for t in steps[::-1]:
                r = float(batch.reward[t, e, i]) + G * r
                lp = np.log(pi[t, e, i] + 1e-6)
                policy_loss -= (r - value[t, e, i]) * lp[int(batch.action[t, e, i])]
                value_loss += (r - value[t, e, i]) ** 2
                entropy -= (pi[t, e, i] * lp).sum()
                n += 1
    total, weight, aux = loss(p, setting, batch)
    assert weight == n == int(batch.mask.sum()) < STEPS * ENVS * AGENTS
    np.testing.assert_allclose(aux["policy_loss"], policy_loss, rtol=1e-4)
    np.testing.assert_allclose(aux["value_loss"], value_loss, rtol=1e-4)
    np.testing.assert_allclose(aux["entropy"], entropy, rtol=1e-4)
    right = policy_loss + 0.1 * value_loss - 0.08 * entropy
    np.testing.assert_allclose(total, right, rtol=1e-4)


slow = [pytest.param(name, marks=pytest.mark.slow) for name in ("ac", "mf_ac")]


@pytest.mark.parametrize("name", ["official", "fixed", *slow])
def test_every_parameter_learns_from_finite_gradients(name):
    setting = SETTINGS[name]
    (total, _), g = slope(params_of(setting)[0], setting, episodes(setting))
    assert np.isfinite(total)
    assert set(g) == {"base", "actor", "critic", *(["attention"] if name == "fixed" else [])}
    for path, x in jax.tree_util.tree_leaves_with_path(g):
        assert np.isfinite(x).all() and np.any(x), path


def test_masked_rows_change_nothing():
    setting = SETTINGS["fixed"]
    batch, p = episodes(setting), params_of(setting)[0]
    # not the row behind an episode's end: survivors bootstrap there
    gone = ~np.asarray(batch.mask) & ~np.concatenate([np.ones_like(batch.mask[:1]), np.asarray(batch.mask & batch.alive_after)[:-1]])  # fmt: skip
    assert gone.sum() > 10
    where = lambda x, junk: jnp.where(gone.reshape(*gone.shape, *[1] * (x.ndim - 3)), junk, x)
    other = batch._replace(
        view=where(batch.view, 9.0),
        features=where(batch.features, -9.0),
        reward=where(batch.reward, jnp.inf),
        action=where(batch.action, 0),
    )
    for a, b in zip(*map(jax.tree.leaves, (slope(p, setting, batch), slope(p, setting, other)))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_loss_does_not_know_in_which_order_agents_stand():
    setting = SETTINGS["fixed"]
    batch, p = episodes(setting), params_of(setting)[0]
    order = np.random.default_rng(0).permutation(AGENTS)
    agents = {"view", "features", "action", "reward", "mask", "alive_after"}
    moved = batch._replace(
        **{k: getattr(batch, k)[:, :, order] for k in agents},
        final_view=batch.final_view[:, order],
        final_features=batch.final_features[:, order],
        groups=batch.groups._replace(labels=batch.groups.labels[:, :, order]),
        final_groups=batch.final_groups._replace(labels=batch.final_groups.labels[:, order]),
    )
    a, b = loss(p, setting, batch), loss(p, setting, moved)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
    assert a[1] == b[1]


def test_next_values_are_zero_at_death_and_have_no_gradient():
    setting = SETTINGS["fixed"]
    batch, p = episodes(setting), params_of(setting)[0]
    f = lambda p: (lambda x: (x.sum(), x))(objective.next_values(p, setting, batch))
    g, found = jax.jit(jax.grad(f, has_aux=True))(p)
    beyond = of_agents(setting, batch, p)[2]
    right = np.where(batch.mask & batch.alive_after, beyond, 0)
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)
    assert not any(np.any(x) for x in jax.tree.leaves(g))


def test_the_opponent_becomes_almost_the_learner_where_it_lost_and_stays_itself_elsewhere():
    learner = {"base": jnp.array([1.0, 2.0]), "actor": jnp.array(3.0)}
    opponent = {"base": jnp.array([5.0, -2.0]), "actor": jnp.array(0.1)}
    f = functools.partial(objective.self_play, learner, opponent, tau=0.01)
    won = f(jnp.array(1.0), jnp.array(0.5))
    np.testing.assert_allclose(won["base"], [0.99 * 1 + 0.01 * 5, 0.99 * 2 - 0.01 * 2], rtol=1e-6)
    np.testing.assert_allclose(won["actor"], 0.99 * 3 + 0.01 * 0.1, rtol=1e-6)
    for reward in (0.5, 0.4):  # a tie, a defeat
        same = f(jnp.array(reward), jnp.array(0.5))
        for a, b in zip(*map(jax.tree.leaves, (same, opponent))):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_bmf_of_one_group_has_the_loss_of_mf_ac_plus():
    bmf, plus = small("official", groups=1), small("official", algorithm="mf_ac_plus")
    p = params_of(bmf)[0]
    a, b = (loss(p, s, episodes(s)) for s in (bmf, plus))
    for x, y in zip(*map(jax.tree.leaves, (a, b))):
        np.testing.assert_array_equal(x, y)


def test_sizes_of_small_episodes_are_what_the_tests_assume():
    batch = episodes(SETTINGS["fixed"])
    assert batch.view.shape == (STEPS, ENVS, AGENTS, *VIEW)
    assert batch.features.shape[-1] == FEATURES and int(batch.action.max()) < ACTIONS
    died = np.asarray(batch.mask & ~batch.alive_after).any(0)
    assert 0 < died.sum() < died.size
