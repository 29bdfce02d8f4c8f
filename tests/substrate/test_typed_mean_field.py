"""TypedMeanField-v0: the environment as stated, and its closed forms against least squares on samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from jaxrepro.config import UserError
from jaxrepro.envs import typed_mean_field as tmf
from jaxrepro.envs.typed_mean_field import TypedMeanField, TypedMeanFieldParams

N, K, SIGMA, NOISE = 12, 4, 1.3, 0.4
PARAMS = TypedMeanFieldParams(sigma=SIGMA, reward_noise=NOISE)
KNOWN = {"sigma": SIGMA, "reward_noise": NOISE}


@pytest.fixture(scope="module")
def world():
    """(environment, 20,000 steps of one draw of types), numpy."""
    env = TypedMeanField(N, K)
    sampled = jax.jit(env.steps, static_argnums=1)(jax.random.key(0), 20_000, PARAMS)
    return env, jax.tree.map(np.asarray, sampled)


def least_squares(mean, reward):
    """Error of the best line through the origin for each agent, and its own standard error. (n, N) each."""
    slope = (mean * reward).sum(0) / np.maximum((mean**2).sum(0), 1e-12)
    error = (reward - slope * mean) ** 2
    return error.mean(0), error.std(0) / np.sqrt(len(error))


def mean_of(weights, action):
    return action @ np.asarray(weights, np.float64).T


def assert_equal(measured, expected):
    error, deviation = measured
    np.testing.assert_array_less(deviation, 0.03)
    np.testing.assert_array_less(np.abs(error - expected), 4.5 * deviation + 1e-6)


def test_types_are_of_equal_size_and_actions_are_theirs(world):
    _, steps = world
    assert np.bincount(steps.type, minlength=K).tolist() == [N // K] * K
    for k in range(K):
        same = steps.action[:, steps.type == k]
        assert (same == same[:, :1]).all()
    m = np.stack([steps.action[:, steps.type == k][:, 0] for k in range(K)], 1)
    np.testing.assert_allclose(np.cov(m.T), np.eye(K) * SIGMA**2, atol=0.05)
    assert np.abs(m.mean(0)).max() < 0.03


def test_a_reward_is_the_types_action_and_noise(world):
    _, steps = world
    noise = steps.reward - steps.action
    np.testing.assert_allclose(np.cov(noise.T), np.eye(N) * NOISE**2, atol=0.005)


def test_agents_see_the_embedding_of_their_type_under_noise(world):
    env, steps = world
    np.testing.assert_allclose(steps.obs.mean(0), env.embedding[steps.type], atol=0.01)
    np.testing.assert_allclose(steps.obs.std(0), 0.3, atol=0.01)
    found = KMeans(K, n_init=3, random_state=0).fit_predict(steps.obs[0])
    assert adjusted_rand_score(found, steps.type) == 1


def test_without_a_mean_the_error_is_both_variances(world):
    _, steps = world
    assert_equal(least_squares(np.zeros_like(steps.reward), steps.reward), SIGMA**2 + NOISE**2)
    np.testing.assert_allclose(tmf.error_of_mean(jnp.zeros(K), 0, **KNOWN), SIGMA**2 + NOISE**2)


def test_the_mean_over_everybody_leaves_the_aggregation_noise(world):
    _, steps = world
    everybody = np.full((N, N), 1 / N)
    expected = SIGMA**2 * 3 / 4 + NOISE**2
    np.testing.assert_allclose(tmf.error_of_global_mean(K, **KNOWN), expected)
    np.testing.assert_allclose(
        tmf.error_of_mean(jnp.full(K, 1 / K), 2, **KNOWN), expected, rtol=1e-6
    )
    one = tmf.error_of_groups(jnp.zeros(N, int), jnp.asarray(steps.type), number=K, **KNOWN)
    np.testing.assert_allclose(one, expected, rtol=1e-5)
    assert_equal(least_squares(mean_of(everybody, steps.action), steps.reward), expected)


def test_the_mean_over_the_own_type_leaves_the_noise_of_the_reward(world):
    _, steps = world
    same = (steps.type[:, None] == steps.type) / (N // K)
    assert_equal(least_squares(mean_of(same, steps.action), steps.reward), NOISE**2)
    for itself in (True, False):
        error = tmf.error_of_groups(
            jnp.asarray(steps.type) + 7, jnp.asarray(steps.type), number=K, itself=itself, **KNOWN
        )
        np.testing.assert_allclose(error, NOISE**2, atol=1e-6)


@pytest.mark.parametrize("itself", [True, False])
def test_any_labels_have_the_error_of_the_closed_form(world, itself):
    _, steps = world
    labels = np.random.default_rng(3).integers(0, 3, N)
    labels[0] = 9  # alone in its group: without itself it sees nothing
    same = (labels[:, None] == labels) * (1.0 if itself else 1 - np.eye(N))
    weights = same / np.maximum(same.sum(1, keepdims=True), 1)
    expected = tmf.error_of_groups(
        jnp.asarray(labels), jnp.asarray(steps.type), number=K, itself=itself, **KNOWN
    )
    assert_equal(least_squares(mean_of(weights, steps.action), steps.reward), expected)
    np.testing.assert_allclose(expected[0], NOISE**2 + (0 if itself else SIGMA**2), atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.integers(0, 5), st.floats(0.1, 3))
def test_no_mean_is_better_than_the_own_type_or_worse_than_none(share, own, sigma):
    share = np.array(share)
    share = share / share.sum() if share.sum() > 0 else share
    error = float(
        tmf.error_of_mean(jnp.asarray(share), own % len(share), sigma=sigma, reward_noise=0.5)
    )
    assert 0.25 - 1e-4 <= error <= sigma**2 + 0.25 + 1e-4


def test_every_step_is_an_episode_of_its_own_with_fresh_numbers():
    env = TypedMeanField(8, 2)
    params = env.default_params
    step = jax.jit(env.step_env)
    obs, state = env.reset(jax.random.key(1), params)
    action = env.behaviour(state)
    obs_, after, reward, terminated, info = step(jax.random.key(2), state, action, params)
    assert (
        terminated["agents"].all() and info["episode_over"] and info["alive_after"]["agents"].all()
    )
    assert env.is_truncated(after, params) and not env.is_truncated(state, params)
    assert (after.type == state.type).all() and (after.m != state.m).all()
    assert (obs["agents"] != obs_["agents"]).all()
    np.testing.assert_allclose(env.observe(after, params)["agents"], obs_["agents"], rtol=1e-5)
    # what other types do changes nothing, what the own type does changes its mean
    other = jnp.where(state.type == 1, action["agents"] + 5.0, action["agents"])
    moved = step(jax.random.key(2), state, {"agents": other}, params)[2]["agents"]
    np.testing.assert_allclose(
        moved - reward["agents"], np.where(state.type == 1, 5.0, 0.0), atol=1e-5
    )


@pytest.mark.parametrize(
    "agents, types, message",
    [
        (10, 4, "10 agents of 4 types: types are of equal size"),
        (4, 4, "take a multiple of 4 from 8 on"),
        (8, 0, "types=0 must be a whole number of at least 1"),
        (8.0, 2, "agents=8.0 must be a whole number"),
        ("a", 2, "agents='a' must be a whole number"),
    ],
)
def test_types_that_cannot_be_of_equal_size_are_refused(agents, types, message):
    with pytest.raises(UserError, match=message):
        TypedMeanField(agents, types)
    with pytest.raises(UserError, match="seed=-1"):
        TypedMeanField(seed=-1)


def test_environments_that_are_made_alike_are_equal():
    """As static arguments of jit they then share a program."""
    assert TypedMeanField(8, 2) == TypedMeanField(8, 2)
    assert hash(TypedMeanField(8, 2)) == hash(TypedMeanField(8, 2))
    assert TypedMeanField(8, 2) != TypedMeanField(8, 2, seed=1)


def test_continuous_actions_have_no_number():
    with pytest.raises(UserError, match="continuous actions"):
        TypedMeanField().num_actions("agents")
