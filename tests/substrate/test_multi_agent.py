"""The many-agent interface: joining and splitting teams, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.envs.multi_agent import MultiAgentEnv


class Teams(MultiAgentEnv):
    """Only the shape of an environment: what `join`, `split` and `check_actions` need."""

    def __init__(self, sizes, actions=3):
        self.teams, self.sizes, self.actions = tuple(sizes), dict(sizes), actions

    @property
    def default_params(self):
        return None

    def reset(self, key, params):
        raise NotImplementedError

    def step_env(self, key, state, actions, params):
        raise NotImplementedError

    def is_truncated(self, state, params):
        raise NotImplementedError

    def observe(self, state, params):
        raise NotImplementedError

    def num_actions(self, team):
        return self.actions


def test_an_environment_must_have_every_method():
    class Part(MultiAgentEnv):
        pass

    with pytest.raises(TypeError, match="step_env"):
        Part()


def test_teams_are_joined_in_their_own_order_also_inside_jit():
    env = Teams({"red": 2, "blue": 3})  # jit would sort blue first
    per_team = {"blue": jnp.array([3, 4, 5]), "red": jnp.array([1, 2])}
    assert env.join(per_team).tolist() == [1, 2, 3, 4, 5]
    assert jax.jit(env.join)(per_team).tolist() == [1, 2, 3, 4, 5]
    back = jax.jit(env.split)(jnp.arange(5))
    assert back["red"].tolist() == [0, 1] and back["blue"].tolist() == [2, 3, 4]
    assert env.num_agents == 5


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2))
def test_split_undoes_join_of_any_tree_on_any_axis(sizes, axis):
    env = Teams({f"team_{9 - i}": n for i, n in enumerate(sizes)})
    shape = (2,) * axis + (sum(sizes), 3)
    x = np.arange(np.prod(shape)).reshape(shape)
    tree = {"x": x, "y": x[..., 0]}
    back = env.join(env.split(tree, axis), axis)
    np.testing.assert_array_equal(back["x"], tree["x"])
    np.testing.assert_array_equal(back["y"], tree["y"])


def test_what_does_not_fit_the_teams_is_one_line():
    env = Teams({"red": 2, "blue": 3})
    with pytest.raises(
        UserError, match=r"got \['red'\] where a dict with the teams \['red', 'blue'\]"
    ):
        env.join({"red": jnp.zeros(2)})
    with pytest.raises(UserError, match="got ndarray where"):
        env.check_actions(np.zeros(5))
    with pytest.raises(UserError, match=r"blue has 3 agents, its array is of shape \(2,\)"):
        env.join({"red": jnp.zeros(2), "blue": jnp.zeros(2)})
    with pytest.raises(
        UserError, match=r"shape \(4,\) cannot be split into teams of 2 red and 3 blue"
    ):
        env.split(jnp.zeros(4))


@pytest.mark.parametrize(
    "red, message",
    [
        ([0, 3], r"action 3 of red 1 is outside 0\.\.2; choose one of 3 actions"),
        ([-1, 0], r"action -1 of red 0 is outside 0\.\.2"),
        ([0.0, 1.0], "actions of red are float64"),
        ([0, 1, 2], "red has 2 agents"),
        ([[0], [1]], r"of shape \(2, 1\); they must be 2 integers"),
    ],
)
def test_actions_that_no_agent_has_are_refused(red, message):
    env = Teams({"red": 2, "blue": 1})
    env.check_actions({"red": np.array([0, 2]), "blue": jnp.array([1])})
    with pytest.raises(UserError, match=message) as error:
        env.check_actions({"red": np.array(red), "blue": np.array([1])})
    assert "\n" not in str(error.value)


def test_environments_are_equal_only_where_their_class_says_what_tells_them_apart():
    class Named(Teams):
        @property
        def static(self):
            return self.actions

    class Paid(Named):
        """Has an attribute that the class above does not know."""

        def __init__(self, pay):
            super().__init__({"red": 1})
            self.pay = pay

    assert (
        Named({"red": 1}) == Named({"red": 1})
        and len({Named({"red": 1}, n) for n in (2, 2, 3)}) == 2
    )
    assert (
        Paid(1) != Paid(2)
        and Paid(1) != Named({"red": 1})
        and Teams({"red": 1}) != Teams({"red": 1})
    )
    same = Paid(1)
    assert same == same and hash(same) == hash(same)
