"""Wrappers of many-agent environments, followed by hand in a small world and driven by the interfaces' own loops."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments.environment import Environment
from gymnax.experimental import RolloutWrapper
from small_teams import Strike, StrikeParams

from jaxrepro.config import UserError
from jaxrepro.envs.battle import Battle, BattleParams
from jaxrepro.envs.gymnax_env import Gymnax, GymnaxParams
from jaxrepro.envs.ising import Ising
from jaxrepro.envs.jaxmarl_env import JaxMARL
from jaxrepro.envs.multi_agent import INFO, MultiAgentEnv
from jaxrepro.envs.wrappers import AutoReset, agent_names, flat, flat_shapes

NOTHING = {"red": jnp.zeros(3, jnp.int32), "blue": jnp.zeros(2, jnp.int32)}
KEY = jax.random.key(0)


def acts(red=(0, 0, 0), blue=(0, 0)):
    return {"red": jnp.array(red), "blue": jnp.array(blue)}


def asleep(key, obs, state):
    """The opponent that does nothing."""
    return jnp.zeros(2, jnp.int32)


# AutoReset ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["alike", "lucky"])
def again(request):
    """(wrapped, its jitted step) with a horizon of 3."""
    wrapped = AutoReset(Strike(lucky=request.param), StrikeParams(horizon=3))
    return wrapped, jax.jit(wrapped.step)


def test_an_episode_begins_again_where_the_rules_or_the_horizon_end_it(again):
    wrapped, step = again
    obs, state = wrapped.reset(KEY)
    assert state.first
    # both of blue die in the first step: the rules end the episode
    seen, state, reward, terminated, truncated, info = step(KEY, state, acts(red=(1, 2, 0)))
    assert reward["red"].tolist() == [1, 1, 0] and reward["blue"].tolist() == [-1, -1]
    assert terminated["blue"].all() and info["episode_over"] and not truncated
    assert state.first and state.env.alive.all() and state.env.time == 0
    assert seen["red"][:, :6].tolist() == obs["red"][:, :6].tolist()
    assert info["final_observation"]["red"][0, :6].tolist() == [1, 1, 1, 0, 0, 1]
    # three steps of nothing: the horizon does, and nobody is terminated by it
    for last in (False, False, True):
        _, state, _, terminated, truncated, info = step(KEY, state, NOTHING)
        assert bool(state.first) == bool(truncated) == last
        assert not terminated["red"].any() and not info["episode_over"]
    assert state.env.time == 0


def test_only_a_beginning_that_is_always_alike_is_cached(again):
    wrapped, step = again
    luck = []
    for seed in range(3):
        state = wrapped.reset(jax.random.key(seed))[1]
        state = step(jax.random.key(seed), state, acts(red=(1, 2, 0)))[1]
        luck.append(float(state.env.luck))
    assert len(set(luck)) == (1 if wrapped.env.deterministic_reset else 3)
    assert (wrapped._start is not None) == wrapped.env.deterministic_reset


def test_worlds_of_a_batch_begin_again_on_their_own():
    wrapped = AutoReset(Strike(lucky=True))
    _, state = jax.jit(jax.vmap(wrapped.reset))(jax.random.split(KEY, 2))
    actions = {"red": jnp.array([[1, 2, 0], [1, 0, 0]]), "blue": jnp.zeros((2, 2), int)}
    state = jax.jit(jax.vmap(wrapped.step))(jax.random.split(KEY, 2), state, actions)[1]
    assert state.first.tolist() == [True, False]
    assert state.env.time.tolist() == [0, 1] and state.env.episode.tolist() == [1, 0]


def test_armies_change_sides_with_the_episodes_of_the_battle():
    env = Battle(12, minimap=False, extra_features=False, side="alternate")
    wrapped = AutoReset(env, BattleParams(horizon=3))

    def step(state, key):
        actions = {team: jax.random.randint(key, (2,), 0, 21) for team in env.teams}
        obs, state, _, _, truncated, info = wrapped.step(key, state, actions)
        seen = obs["red"].view, env.observe(state.env, wrapped.params)["red"].view
        return state, (state, truncated, seen, info["final_observation"]["red"].view)

    state = wrapped.reset(KEY)[1]
    _, (states, truncated, (obs, looked), final) = jax.device_get(
        jax.jit(lambda state, keys: jax.lax.scan(step, state, keys))(
            state, jax.random.split(KEY, 7)
        )
    )
    assert truncated.tolist() == [False, False, True] * 2 + [False]
    assert states.first.tolist() == truncated.tolist()
    assert states.env.swapped.tolist() == [False, False, True, True, True, False, False]
    assert states.env.t.tolist() == [1, 2, 0, 1, 2, 0, 1]
    np.testing.assert_array_equal(obs, looked)
    # both armies of a reset stand where the other stood; what was seen before it is kept
    assert states.env.pos[2, :, 0].tolist() == [9, 9, 1, 1]
    same = [bool((a == b).all()) for a, b in zip(obs, final)]
    assert same == [not end for end in truncated.tolist()]


# flat --------------------------------------------------------------------------------------------------


def test_flat_rows_hold_every_leaf_and_know_their_shapes_beforehand():
    env = Strike()
    obs, _ = env.reset(KEY, StrikeParams())
    assert flat(obs["red"]) is obs["red"]
    assert flat(obs["blue"]).tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    shapes = flat_shapes(env, StrikeParams())
    assert (shapes["red"].shape, shapes["blue"].shape) == ((3, 7), (2, 4))
    assert flat_shapes(Ising(4), Ising(4).default_params)["spins"].dtype == jnp.int32
    assert agent_names(env) == ["red_0", "red_1", "red_2", "blue_0", "blue_1"]


# gymnax ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    return Gymnax(Strike(), "red", asleep)


def test_gymnax_gets_its_six_values_with_scalar_reward_and_flags(alone):
    assert isinstance(alone, Environment) and (alone.name, alone.num_actions) == ("Strike", 3)
    params = alone.default_params.replace(max_steps_in_episode=3)
    obs, state = alone.reset(KEY, params)
    np.testing.assert_array_equal(obs, alone.get_obs(state))
    assert obs.shape == alone.observation_space(params).shape == (3, 7)
    obs, state, reward, terminated, truncated, info = alone.step(
        KEY, state, jnp.array([1, 0, 0]), params
    )
    assert reward.shape == terminated.shape == truncated.shape == () and reward == 1
    assert not terminated and not truncated and state.time == 1
    assert info["agent_reward"].tolist() == [1, 0, 0]
    assert obs[0].tolist() == [1, 1, 1, 0, 1, 1, 0]
    # the last of blue dies: terminated, the next episode is there, what was seen is in info
    obs, state, reward, terminated, truncated, info = alone.step(
        KEY, state, jnp.array([0, 2, 2]), params
    )
    assert terminated and not truncated and reward == 2  # both struck it
    assert info["terminated"] and info["final_observation"][0].tolist() == [1, 1, 1, 0, 0, 2, 0]
    assert obs[0].tolist() == [1, 1, 1, 1, 1, 0, 0] and state.time == 0 and state.env.episode == 1
    for last in (False, False, True):
        _, state, _, terminated, truncated, _ = alone.step(KEY, state, jnp.zeros(3, int), params)
        assert not terminated and bool(truncated) == last


def test_an_own_team_without_survivors_terminates_and_its_opponent_sees_the_world():
    def strikes(key, obs, state):
        assert set(obs) == {"all", "own"}  # blue's own observation
        return jnp.where(state.time == 0, jnp.array([1, 2]), jnp.array([3, 0]))

    env = Gymnax(Strike(), "red", {"blue": strikes}, reward="mean")
    params = env.default_params
    _, state = env.reset(KEY, params)
    _, state, reward, terminated, _, info = env.step(KEY, state, jnp.zeros(3, int), params)
    np.testing.assert_allclose(reward, -2 / 3, rtol=1e-6)
    assert not terminated and info["agent_terminated"].tolist() == [True, True, False]
    _, after, reward, terminated, _ = env.step_env(KEY, state, jnp.zeros(3, int), params)
    assert terminated and env.is_terminated(after, params)
    assert env.discount(after, params) == 0 and env.discount(state, params) == 1


class OfOne(MultiAgentEnv):
    """A gymnax environment as a team of one, to be wrapped back."""

    teams = ("me",)

    def __init__(self, env):
        self.env, self.sizes = env, {"me": 1}

    @property
    def default_params(self):
        return self.env.default_params

    def num_actions(self, team):
        return self.env.num_actions

    def reset(self, key, params):
        obs, state = self.env.reset_env(key, params)
        return {"me": obs[None]}, state

    def observe(self, state, params):
        return {"me": self.env.get_obs(state, params)[None]}

    def step_env(self, key, state, actions, params):
        obs, state, reward, over, _ = self.env.step_env(key, state, actions["me"][0], params)
        everyone, kills = {"me": jnp.ones(1, bool)}, {"me": jnp.int32(0)}
        info = dict(zip(INFO, (everyone, {"me": ~over[None]}, kills, over)))
        return {"me": obs[None]}, state, {"me": reward[None]}, {"me": over[None]}, info

    def is_truncated(self, state, params):
        return self.env.is_truncated(state, params)


def test_a_gymnax_environment_wrapped_twice_is_itself():
    env, params = gymnax.make("CartPole-v1")
    params = params.replace(max_steps_in_episode=12)  # some episodes fall, some are truncated
    twice = Gymnax(OfOne(env), "me")
    twice_params = GymnaxParams(params, 500)

    def step(carry, key):
        (_, state), (_, own) = carry
        action = jax.random.bernoulli(key, 0.85, (1,)).astype(jnp.int32)
        of_twice = twice.step(key, state, action, twice_params)
        of_one = env.step(key, own, action[0], params)
        return (of_twice[:2], of_one[:2]), (of_twice, of_one)

    begun = twice.reset(KEY, twice_params), env.reset(KEY, params)
    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    _, (mine, theirs) = jax.device_get(run(begun, jax.random.split(KEY, 60)))
    assert theirs[3].any() and theirs[4].any()
    near = {
        "rtol": 0,
        "atol": 1e-6,
    }  # XLA fuses the same formulas otherwise: the last bit of numbers about 1
    np.testing.assert_allclose(mine[0][:, 0], theirs[0], **near)
    for ours, gymnaxs in zip(mine[2:5], theirs[2:5]):
        np.testing.assert_array_equal(ours, gymnaxs)
    for name in ("terminated", "truncated"):
        np.testing.assert_array_equal(mine[5][name], theirs[5][name])
    last = mine[5]["final_observation"][:, 0], theirs[5]["final_observation"]
    np.testing.assert_allclose(*last, **near)


def test_gymnax_own_rollout_drives_a_team_at_random(alone):
    rollout = RolloutWrapper(env=alone, env_params={"max_steps_in_episode": 4}, num_env_steps=40)
    obs, action, reward, next_obs, done, total = rollout.batch_rollout(
        jax.random.split(KEY, 3), None
    )
    assert obs.shape == next_obs.shape == (3, 40, 3, 7) and rollout.input_shape == (3, 7)
    assert action.shape == (3, 40, 3) and reward.shape == done.shape == (3, 40)
    assert alone.action_space().contains(action[0, 0]) and set(np.unique(action)) == {0, 1, 2}
    first = np.asarray(done).argmax(1)
    assert (first < 4).all()
    for world in range(3):
        until = np.asarray(reward)[world, : first[world] + 1].sum()
        assert total[world, 0] == until
        # after the end of an episode time is 0 again, else one more
        t, ends = np.asarray(obs)[world, :, 0, 5], np.asarray(done)[world, :-1]
        np.testing.assert_array_equal(t[1:], np.where(ends, 0, t[:-1] + 1))


def test_gymnax_own_rollout_takes_its_length_from_the_horizon():
    rollout = RolloutWrapper(env=Gymnax(Ising(4), "spins"), env_params=None)
    assert rollout.num_env_steps == 10_000
    params = rollout.env.default_params.replace(max_steps_in_episode=6)
    rollout = RolloutWrapper(env=rollout.env, env_params=params)
    obs, _, _, _, done, _ = rollout.single_rollout(KEY, None)
    assert obs.shape == (6, 16) and done.tolist() == [False] * 5 + [True]


def test_actions_of_a_team_are_known_to_its_space(alone):
    space = alone.action_space()
    assert space.contains([0, 2, 1]) and not space.contains([0, 3, 1])
    assert not space.contains([0, 1]) and not space.contains([0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Gymnax(Strike(), "green", asleep), "team 'green' is not one of red, blue"),
        (lambda: Gymnax(Strike(), "red"), r"the other teams are \['blue'\], got \[\]"),
        (lambda: Gymnax(Strike(), "red", {"red": asleep}), r"got \['red'\]; give a policy for"),
        (lambda: Gymnax(Ising(4), "spins", asleep), r"other teams are \[\], got one policy"),
        (lambda: Gymnax(Strike(), "red", asleep, reward="max"), "'max' is not one of sum, mean"),
    ],
)
def test_a_team_without_opponents_or_rewards_is_refused(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# JaxMARL -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def marl():
    return JaxMARL(Strike(), StrikeParams(horizon=3))


def named(env, **actions):
    return {agent: jnp.int32(actions.get(agent, 0)) for agent in env.agents}


def test_jaxmarl_gets_a_dict_of_agents_and_everybody_is_done_at_the_end(marl):
    obs, state = marl.reset(KEY)
    assert list(marl.agents) == agent_names(marl.env) and set(obs) == set(marl.agents)
    for agent in marl.agents:
        assert obs[agent].shape == marl.observation_space(agent).shape
    assert (marl.action_space("red_1").n, marl.action_space("blue_0").n) == (3, 4)
    obs, state, reward, done, info = marl.step(KEY, state, named(marl, red_0=2, blue_0=3))
    assert {k: float(v) for k, v in reward.items() if v} == {
        "red_0": 1,
        "red_2": -1,
        "blue_0": 1,
        "blue_1": -1,
    }
    assert {k for k, v in done.items() if v} == {"red_2", "blue_1"}
    assert obs["red_2"].tolist() == [0] * 7 and obs["red_0"][5] == 1
    assert info["alive_before"].all() and info["alive_after"].tolist() == [1, 1, 0, 1, 0]
    assert info["team_kills"].tolist() == [1, 1, 1, 1, 1]
    # blue is gone: all done, and what is observed is a beginning
    obs, state, _, done, _ = marl.step(KEY, state, named(marl, red_0=1, red_2=1))
    assert all(done.values()) and "__all__" in done
    assert obs["red_2"][:5].tolist() == [1] * 5 and state.episode == 1
    for last in (False, False, True):
        _, state, _, done, _ = marl.step(KEY, state, named(marl))
        assert bool(done["__all__"]) == bool(done["red_0"]) == last


def test_jaxmarl_may_begin_where_it_is_told(marl):
    _, start = marl.reset(KEY)
    start = start.replace(alive=jnp.array([True, False, True, True, True]))
    _, state = marl.reset(KEY)
    obs, state, _, done, _ = marl.step(KEY, state, named(marl, red_0=1, red_1=2), start)
    assert done["__all__"] and state.alive.tolist() == [True, False, True, True, True]
    np.testing.assert_array_equal(obs["red_0"], marl.get_obs(start)["red_0"])


def test_jaxmarl_agents_are_in_the_order_of_join_with_more_than_ten(marl):
    wrapped = JaxMARL(Ising(4))
    obs, state = wrapped.reset(KEY)
    expected = wrapped.env.observe(state, wrapped.params)["spins"]
    assert [int(obs[agent]) for agent in wrapped.agents] == expected.tolist()
    action = {agent: jnp.int32(i % 3 == 0) for i, agent in enumerate(wrapped.agents)}
    state = wrapped.step(KEY, state, action)[1]
    assert ((state.spin.reshape(-1) == 1) == (np.arange(16) % 3 == 0)).all()
    assert wrapped.get_avail_actions(state)["spins_11"].tolist() == [True, True]


def test_jaxmarl_wants_an_action_of_everybody(marl):
    _, state = marl.reset(KEY)
    with pytest.raises(UserError, match="no action for red_1, red_2, blue_1; give one"):
        marl.step(KEY, state, {"red_0": jnp.int32(0), "blue_0": jnp.int32(0)})
