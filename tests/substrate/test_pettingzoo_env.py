"""The PettingZoo form of a small world, followed by hand, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_teams import Strike, StrikeParams

from jaxrepro.config import UserError
from jaxrepro.envs.battle import Battle
from jaxrepro.envs.ising import Ising
from jaxrepro.envs.pettingzoo_env import PettingZooParallel

RED, BLUE = ["red_0", "red_1", "red_2"], ["blue_0", "blue_1"]
WORLD = Strike()


def begun(**options):
    env = PettingZooParallel(WORLD, StrikeParams(horizon=3), **options)
    env.reset()
    return env


def acts(env, **actions):
    return {agent: actions.get(agent, 0) for agent in env.agents}


def test_who_dies_is_told_so_once_and_gone_afterwards():
    env = begun()
    assert env.agents == env.possible_agents == RED + BLUE and env.num_agents == 5
    obs, reward, terminated, truncated, infos = env.step(acts(env, red_0=2, blue_0=3))
    for returned in (obs, reward, terminated, truncated, infos):
        assert list(returned) == RED + BLUE
    assert reward == {"red_0": 1, "red_1": 0, "red_2": -1, "blue_0": 1, "blue_1": -1}
    assert [agent for agent, dead in terminated.items() if dead] == ["red_2", "blue_1"]
    assert obs["red_0"].tolist() == [1, 1, 0, 1, 0, 1, 0] and not obs["red_2"].any()
    assert env.agents == ["red_0", "red_1", "blue_0"]
    # what the dead want does not count; the rest of blue dies, so everybody is terminated
    obs, reward, terminated, _, _ = env.step({**acts(env, red_1=1), "blue_1": 1})
    assert reward == {"red_0": 0, "red_1": 1, "blue_0": -1} and set(obs) == set(terminated)
    assert all(terminated.values()) and env.agents == [] and env.max_num_agents == 5


def test_the_horizon_truncates_everybody_and_terminates_nobody():
    env = begun()
    for last in (False, False, True):
        _, _, terminated, truncated, _ = env.step(acts(env))
        assert set(truncated.values()) == {last} and not any(terminated.values())
    assert env.agents == []
    obs, _ = env.reset()
    assert env.agents == RED + BLUE and obs["red_0"].tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_resets_go_on_to_the_next_episode_and_a_seed_begins_anew():
    lucky = PettingZooParallel(Strike(lucky=True))
    luck = [float(lucky.reset(seed=seed)[0]["red_0"][6]) for seed in (7, None, 7, None)]
    assert luck[:2] == luck[2:] and luck[0] != luck[1]
    env = begun()
    assert env._state.episode == 0
    env.reset()
    assert env._state.episode == 1
    env.reset(seed=0, options={"anything": 1})
    assert env._state.episode == 0


def test_rows_belong_to_their_spaces_and_to_the_caller():
    env = begun()
    obs, _ = env.reset()
    for agent in env.agents:
        assert env.observation_space(agent).contains(obs[agent])
        assert env.observation_space(agent) is env.observation_space(agent)
    obs["red_0"][:] = 9  # writable, and nobody else's
    assert obs["red_1"].max() == 1
    assert [env.action_space(agent).n for agent in ("red_0", "blue_1")] == [3, 4]
    spins = PettingZooParallel(Ising(4))
    first, _ = spins.reset()
    assert spins.observation_space("spins_15").contains(first["spins_15"])


def test_environments_with_a_form_of_their_own_show_it():
    class Own(Strike):
        def pettingzoo_observation(self, state):
            return {"red": jnp.full((3, 2), state.time), "blue": jnp.zeros((2, 1))}

    env = PettingZooParallel(Own())
    obs, _ = env.reset()
    assert obs["red_1"].shape == env.observation_space("red_1").shape == (2,)
    assert env.step(acts(env))[0]["red_2"].tolist() == [1, 1]


def test_a_picture_is_drawn_where_the_world_can_be_drawn():
    class Drawn(Strike):
        def render(self, state):
            return np.full((2, 2, 3), int(state.time), np.uint8)

    env = PettingZooParallel(Drawn(), render_mode="rgb_array")
    with pytest.raises(UserError, match="no world to render yet"):
        env.render()
    env.reset()
    env.step(acts(env))
    assert env.render().max() == 1 and begun().render() is None
    with pytest.raises(UserError, match="render_mode 'human' is not one of None, rgb_array"):
        PettingZooParallel(Drawn(), render_mode="human")
    battle = PettingZooParallel(Battle(12), render_mode="rgb_array")
    battle.reset()
    assert battle.render().shape == (96, 96, 3) and len(np.unique(battle.render())) > 3
    with pytest.raises(UserError, match="render_mode 'rgb_array' is not one of None"):
        PettingZooParallel(WORLD, render_mode="rgb_array")


def test_a_seed_determines_an_episode():
    def play(seed):
        env = PettingZooParallel(Strike(lucky=True), seed=seed)
        return [float(env.reset()[0]["red_0"][6]) for _ in range(3)]

    assert play(1) == play(1) != play(2)


@pytest.mark.parametrize(
    "actions, message",
    [
        ({"red_0": 3}, r"action 3 of red_0 must be an integer in 0\.\.2"),
        ({"blue_1": -1}, r"action -1 of blue_1 must be an integer in 0\.\.3"),
        ({"red_1": 0.5}, r"action 0\.5 of red_1 must be an integer"),
        ({"red_1": [1, 2]}, r"action \[1, 2\] of red_1 must be an integer"),
        ({"green_0": 1}, "there is no agent 'green_0'; take the names in possible_agents"),
    ],
)
def test_actions_that_an_agent_does_not_have_are_refused(actions, message):
    env = begun()
    with pytest.raises(UserError, match=message) as error:
        env.step({**acts(env), **actions})
    assert "\n" not in str(error.value)


def test_a_step_needs_a_world_and_an_action_of_everybody():
    env = PettingZooParallel(WORLD)
    with pytest.raises(UserError, match=r"call reset\(\) first"):
        env.step({})
    env.reset()
    with pytest.raises(UserError, match="no action for red_1; give one for each"):
        env.step({"red_0": np.int32(1)})
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"seed {seed} is not in"):
            env.reset(seed=seed)


def test_numpy_and_jax_integers_are_actions_too():
    env = begun()
    env.step({**acts(env), "red_0": np.int64(1), "red_1": jnp.int32(2)})
    assert not env.agents  # both of blue are dead
