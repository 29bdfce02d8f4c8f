"""Tabular Q-learning on the Ising environment: the schedule, one update, and what is learnt from either reward."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro.envs.ising import REWARD_TABLE, Ising, IsingParams
from jaxrepro.methods.bmf import ising_q

PARAMS = IsingParams()


def learn(key, reward_on, steps, temperature):
    env = Ising(10, reward_on=reward_on)
    of_reset, of_steps = jax.random.split(key)
    obs, state = env.reset(of_reset, PARAMS)

    def step(carry, key):
        obs, state, q, visits = carry
        up = obs["spins"]
        action = ising_q.act(key, q, up, temperature)
        obs, state, reward, _, _ = env.step_env(key, state, {"spins": action}, PARAMS)
        q = ising_q.update(q, up, action, reward["spins"])
        visits = visits.at[jnp.arange(100), up, action].add(1)
        return (obs, state, q, visits), None

    q = ising_q.init(100)
    carry = (obs, state, q, jnp.zeros_like(q))
    return jax.lax.scan(step, carry, jax.random.split(of_steps, steps))[0][2:]


learned = jax.jit(learn, static_argnums=(1, 2))


def test_values_learnt_from_observed_neighbours_are_the_table():
    q, visits = learned(jax.random.key(5), "observed", 1500, 3.0)
    q, visits = np.asarray(q), np.asarray(visits)
    # the reward is certain, so n visits leave 0.9^n of the table: exact at any number of them
    np.testing.assert_allclose(q, REWARD_TABLE * (1 - 0.9**visits), atol=2e-5)
    assert (visits > 0).all()
    assert np.abs(q - REWARD_TABLE)[visits > 80].max() < 1e-3 and (visits > 80).mean() > 0.7


def test_values_learnt_from_new_neighbours_stay_at_nothing_when_hot():
    # each goes up and down with a tenth of its last rewards; their mean over 100 sites has a deviation of about 0.03
    q, _ = learned(jax.random.key(5), "new", 1500, 3.0)
    assert np.abs(np.asarray(q).mean(0)).max() < 0.1


def test_temperature_falls_to_the_least_by_a_hundredth_each_2000_steps():
    t = ising_q.temperature(jnp.array([0, 1999, 2000, 400_000]), 0.1)
    np.testing.assert_allclose(t, [0.297, 0.297, 0.29403, 0.1], rtol=1e-5)
    assert ising_q.temperature(0) == 1.0


def test_an_update_moves_a_tenth_of_the_way_at_the_pair_that_was_visited():
    q = ising_q.update(
        ising_q.init(2), jnp.array([0, 3]), jnp.array([1, 0]), jnp.array([-2.0, 1.0])
    )
    expected = np.zeros((2, 5, 2))
    expected[0, 0, 1], expected[1, 3, 0] = -0.2, 0.1
    np.testing.assert_allclose(q, expected, rtol=1e-6)
    assert ising_q.values(q, jnp.array([0, 3])).tolist() == [
        [0, np.float32(-0.2)],
        [np.float32(0.1), 0],
    ]
