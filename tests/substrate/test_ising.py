"""The Ising environment: rewards, two lattices that never meet, and the physics that its table stands for."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.envs.ising import (
    REWARD_ON,
    REWARD_TABLE,
    Ising,
    IsingParams,
    IsingState,
    heat_bath,
    magnetisation,
    neighbour_sum,
)

PARAMS = IsingParams()
CRITICAL = 1 / math.log(1 + math.sqrt(2))  # 1.1346: half of Onsager's T_I


def around(spin, row, column):
    """Sum of the four neighbours of one site, by hand."""
    n = len(spin)
    return sum(
        int(spin[(row + y) % n][(column + x) % n]) for y, x in ((0, 1), (0, -1), (1, 0), (-1, 0))
    )


def walk(key, state, steps, temperature):
    """Heat bath from a state: spins (steps, n, n) of the environment's own steps."""
    env = Ising(state.spin.shape[-1])
    policy = jnp.log(heat_bath(temperature))

    def step(state, key):
        up = env.observe(state, PARAMS)["spins"]
        action = jax.random.categorical(key, policy[up])
        state = env.step_env(key, state, {"spins": action}, PARAMS)[1]
        return state, state.spin

    return jax.lax.scan(step, state, jax.random.split(key, steps))[1]


walks = jax.jit(jax.vmap(walk, (0, None, None, None)), static_argnums=2)


SMALL = {on: Ising(4, reward_on=on) for on in REWARD_ON}
observes = jax.jit(SMALL["new"].observe)
moves = {on: jax.jit(env.step_env) for on, env in SMALL.items()}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(REWARD_ON))
def test_rewards_are_half_the_spin_times_its_neighbours_of_then_or_now(seed, reward_on):
    n, rng = 4, np.random.default_rng(seed)
    before, action = rng.choice([-1, 1], (n, n)), rng.integers(0, 2, n * n)
    state = IsingState(jnp.asarray(before, jnp.int32), jnp.int32(0))
    obs, after, reward, terminated, info = jax.device_get(
        moves[reward_on](jax.random.key(0), state, {"spins": jnp.asarray(action)}, PARAMS)
    )
    after, seen = after.spin, np.asarray(observes(state, PARAMS)["spins"])
    np.testing.assert_array_equal(after.ravel(), 2 * action - 1)
    sites = list(itertools.product(range(n), repeat=2))
    for i, (row, column) in enumerate(sites):
        assert seen[i] == (around(before, row, column) + 4) / 2
        assert obs["spins"][i] == (around(after, row, column) + 4) / 2
        of = before if reward_on == "observed" else after
        assert reward["spins"][i] == 0.5 * after[row, column] * around(of, row, column)
    if reward_on == "observed":
        np.testing.assert_array_equal(reward["spins"], REWARD_TABLE[seen, action])
    assert not terminated["spins"].any() and info["alive_after"]["spins"].all()
    assert not info["episode_over"]


def test_the_table_is_that_of_the_authors_code():
    assert REWARD_TABLE.tolist() == [[2, -2], [1, -1], [0, 0], [-1, 1], [-2, 2]]


def test_the_horizon_truncates_and_does_not_terminate():
    env = Ising(4)
    params = env.default_params.replace(horizon=2)
    _, state = env.reset(jax.random.key(0), params)
    assert set(np.unique(state.spin)) <= {-1, 1} and not env.is_truncated(state, params)
    for _ in range(2):
        _, state, _, terminated, _ = env.step_env(
            jax.random.key(0), state, {"spins": jnp.zeros(16, jnp.int32)}, params
        )
    assert env.is_truncated(state, params) and not terminated["spins"].any()


def test_even_and_odd_sites_are_two_lattices_that_never_meet():
    spin = np.where(np.add.outer(range(10), range(10)) % 2, -1, 1)
    m = magnetisation(jnp.asarray(spin))
    assert (float(m.whole), float(m.even), float(m.odd)) == (0, 1, -1)
    # what the odd sites are changes what the even ones do at odd steps alone
    other = np.where(np.add.outer(range(10), range(10)) % 2, 1, spin)
    starts = IsingState(jnp.asarray(np.stack([spin, other]), jnp.int32), jnp.zeros(2, jnp.int32))
    a, b = jax.jit(jax.vmap(walk, (None, 0, None, None)), static_argnums=2)(
        jax.random.key(1), starts, 6, 1.0
    )
    even = np.add.outer(range(10), range(10)) % 2 == 0
    for t in range(6):  # t + 1 steps after the start
        same = even if t % 2 else ~even
        np.testing.assert_array_equal(a[t][same], b[t][same])
    assert (a != b).any()


def test_heat_bath_of_the_table_is_that_of_an_ising_model_at_twice_the_temperature():
    for t in (0.5, 1.0, 3.0):
        up = 1 / (1 + np.exp(-2 * (2 * np.arange(5) - 4) / (2 * t)))
        np.testing.assert_allclose(heat_bath(t)[:, 1], up, rtol=1e-5)


def test_energy_of_the_small_torus_equals_its_sum_over_all_states():
    # 4 x 4: 65,536 states, each weighed by exp(sum over bonds s s' / T_I), T_I = 2 T
    t, n = 1.5, 4
    bits = (np.arange(2**16)[:, None] >> np.arange(16)) & 1
    spin = (2 * bits - 1).reshape(-1, n, n)
    bonds = sum(spin * np.roll(spin, 1, axis) for axis in (1, 2)).sum((1, 2))
    weight = np.exp(bonds / (2 * t))
    expected = (bonds * weight).sum() / weight.sum() / (2 * n * n)
    start = IsingState(jnp.ones((n, n), jnp.int32), jnp.int32(0))
    spins = walks(jax.random.split(jax.random.key(2), 64), start, 600, t)[:, 50:]
    # one lattice is the even sites of a step and the odd ones of the next: so is each bond of it
    per_bond = np.asarray(spins[:, :-1] * neighbour_sum(spins)[:, 1:]).mean((1, 2, 3)) / 4
    error = per_bond.std(ddof=1) / np.sqrt(len(per_bond))
    assert error < 0.004
    assert abs(per_bond.mean() - expected) < 4 * error


def test_order_below_and_disorder_above_the_critical_temperature():
    start = IsingState(jnp.ones((10, 10), jnp.int32), jnp.int32(0))
    keys = jax.random.split(jax.random.key(3), 16)

    def order(t):
        m = magnetisation(walks(keys, start, 400, t)[:, 100:])
        return float(jnp.abs(m.even).mean()), float(jnp.abs(m.odd).mean())

    # Onsager, Yang: m = (1 - sinh(2 / T_I)^-4)^(1/8), 0.9796 at T_I = 1.6
    exact = (1 - math.sinh(2 / 1.6) ** -4) ** 0.125
    assert 0.8 < CRITICAL < 2.0
    for m in order(0.8):
        assert abs(m - exact) < 0.01
    for m in order(2.0):
        assert m < 0.25


def test_both_lattices_may_be_ordered_with_opposite_signs():
    spin = jnp.asarray(np.where(np.add.outer(range(10), range(10)) % 2, -1, 1), jnp.int32)
    spins = walks(jax.random.split(jax.random.key(4), 4), IsingState(spin, jnp.int32(0)), 50, 0.6)
    m = magnetisation(spins[:, -1])
    assert (jnp.abs(m.even) > 0.9).all() and (jnp.abs(m.odd) > 0.9).all()
    assert (m.even * m.odd < 0).all() and (jnp.abs(m.whole) < 0.1).all()


@pytest.mark.parametrize("size", [2, 5, 0, -10, 10.0, True])
def test_a_torus_that_does_not_split_in_two_is_refused(size):
    with pytest.raises(UserError, match=f"size {size}: the torus must have an even number"):
        Ising(size)


def test_lattices_that_are_made_alike_are_equal():
    assert Ising(4) == Ising(4) and hash(Ising(4)) == hash(Ising(4))
    assert len({Ising(4), Ising(6), Ising(4, reward_on="observed")}) == 3


def test_an_unknown_reward_lists_the_known():
    with pytest.raises(UserError, match="reward_on 'old' is not one of new, observed"):
        Ising(reward_on="old")


def test_what_is_no_spin_is_refused_and_keeps_the_spin_inside_jit():
    env = Ising(4)
    _, state = env.reset(jax.random.key(0), env.default_params)
    wrong = {"spins": jnp.full(16, 5)}
    with pytest.raises(UserError, match=r"action 5 of spins 0 is outside 0\.\.1"):
        env.step_env(jax.random.key(0), state, wrong, env.default_params)
    after = jax.jit(env.step_env)(jax.random.key(0), state, wrong, env.default_params)[1]
    np.testing.assert_array_equal(after.spin, state.spin)
