"""Updates of BMF: clipping by sub-network, micro-batches, seeds side by side, learning; checks of what is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmf_small import AGENTS, ENVS, STEPS, VIEW, episodes, params_of, small

from jaxrepro.config import UserError
from jaxrepro.methods.bmf import checks, groups, networks, objective, training

FIXED = small()
update = jax.jit(training.update_policy, static_argnums=1, static_argnames="micro_batches")


@pytest.fixture(scope="module")
def state():
    return training.policy_state(params_of(FIXED)[0], FIXED)


@pytest.fixture(scope="module")
def updated(state):
    return update(state, FIXED, episodes(FIXED))


def test_each_sub_network_is_clipped_by_its_own_norm():
    rule = training.clip_each(0.5)
    grads = {"base": {"a": jnp.array([3.0, 0]), "b": jnp.array([4.0])}, "actor": jnp.array([0.3])}
    found = rule.update(grads, rule.init(grads))[0]
    np.testing.assert_allclose(found["base"]["a"], [0.3, 0], rtol=1e-5)  # 5 -> 0.5
    np.testing.assert_allclose(found["base"]["b"], [0.4], rtol=1e-5)
    np.testing.assert_array_equal(found["actor"], grads["actor"])
    rule = training.clip_each(0)
    for a, b in zip(*map(jax.tree.leaves, (rule.update(grads, rule.init(grads))[0], grads))):
        np.testing.assert_array_equal(a, b)


def test_metrics_are_means_over_agents_that_acted(state, updated):
    total, weight, aux = jax.jit(lambda p: objective.loss(p, FIXED, episodes(FIXED)))(state.params)
    metrics = updated[1]
    np.testing.assert_allclose(metrics["loss"], total / weight, rtol=1e-5)
    for name, x in aux.items():
        np.testing.assert_allclose(metrics[name], x / weight, rtol=1e-4, atol=1e-6)
    assert metrics["nonfinite"] == 0 and updated[0].step == 1


@pytest.mark.slow
def test_micro_batches_are_the_same_update(state, updated):
    batch = episodes(FIXED)
    split = update(state, FIXED, batch, micro_batches=ENVS)
    for a, b in zip(*map(jax.tree.leaves, (split, updated))):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6)


@pytest.mark.slow
def test_seeds_side_by_side_equal_seeds_alone(state, updated):
    other = training.policy_state(params_of(FIXED, 1)[0], FIXED)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), state, other)
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), episodes(FIXED))
    mapped = jax.jit(jax.vmap(functools.partial(_step, FIXED)))(both, batch)
    for a, b in zip(*map(jax.tree.leaves, (mapped, updated))):
        np.testing.assert_allclose(a[0], b, rtol=1e-3, atol=2e-6)
    assert np.any(mapped[1]["loss"][0] != mapped[1]["loss"][1])


def _step(setting, state, batch):
    return training.update_policy(state, setting, batch)


def test_a_step_that_is_not_finite_leaves_the_policy_alone(state):
    batch = episodes(FIXED)
    bad = batch._replace(reward=batch.reward.at[0, 0, 1].set(jnp.nan))
    new, metrics = update(state, FIXED, bad)
    assert metrics["nonfinite"] == 1
    for a, b in zip(*map(jax.tree.leaves, (new, state))):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_the_rewarded_action_becomes_more_likely():
    """Episodes in which action 2 alone pays 1: its probability rises from 1/5 or so to above 1/2."""
    setting = small(lr=0.03, hidden=8)
    batch = episodes(FIXED)
    before = networks_mean(setting, batch, params_of(setting)[0])

    def one(state, i):
        logits = logits_of(setting, state.params, batch)
        action = networks.draw(setting, logits, jax.random.fold_in(jax.random.key(0), i))
        paid = batch._replace(action=action, reward=(action == 2).astype(jnp.float32))
        return training.update_policy(state, setting, paid)

    state = training.policy_state(params_of(setting)[0], setting)
    state, metrics = jax.jit(lambda s: jax.lax.scan(one, s, jnp.arange(120)))(state)
    assert before < 0.4
    assert networks_mean(setting, batch, state.params) > 0.5
    assert metrics["value_loss"][-1] < metrics["value_loss"][0]


def logits_of(setting, params, batch):
    vectors = groups.mean_field_input(params, setting, batch.groups)
    return networks.policy(params, setting, batch.view, batch.features, vectors)


def networks_mean(setting, batch, params):
    pi = jax.jit(lambda p: jax.nn.softmax(logits_of(setting, p, batch)))(params)
    return float(pi[..., 2][np.asarray(batch.mask)].mean())


def test_rows_of_the_vae_are_the_steps_of_the_agents():
    batch, p = episodes(FIXED), params_of(FIXED)[0]
    rows = jax.jit(lambda p: training.vae_batch(p, FIXED, batch))(p)
    n = STEPS * ENVS * AGENTS
    assert [len(x) for x in rows] == [n] * 5
    t, e, i = 3, 1, 4
    row = (t * ENVS + e) * AGENTS + i
    x = np.concatenate([np.asarray(batch.view[t, e, i]).ravel(), batch.features[t, e, i]])
    np.testing.assert_array_equal(rows.x[row], x)
    assert rows.action[row] == batch.action[t, e, i] and rows.mask[row] == batch.mask[t, e, i]
    assert rows.reward[row] == batch.reward[t, e, i]
    after = jax.jit(lambda p: objective.next_values(p, FIXED, batch))(p)
    np.testing.assert_allclose(rows.next_value[row], after[t, e, i], rtol=1e-5)
    plain = training.vae_batch(p, small("official"), batch)
    assert not plain.next_value.any()


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_an_observation_that_is_not_finite_is_refused_by_name(value):
    @checks.checked
    @jax.jit
    def f(view, features):
        checks.finite(view=view, features=features)
        return view.sum() + features.sum()

    view, features = jnp.zeros((2, *VIEW)), jnp.ones((2, 3))
    assert f(view, features) == 6
    with pytest.raises(UserError, match=r"^features has 1 numbers that are NaN or infinite; obs"):
        f(view, features.at[1, 2].set(value))
    with pytest.raises(UserError, match=r"^view has 1 numbers that are NaN or infinite"):
        f(view.at[0, 0, 0, 0].set(value), features)
