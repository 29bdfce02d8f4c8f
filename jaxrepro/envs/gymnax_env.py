"""A many-agent environment as one of gymnax 1.0: one team learns, the policies of the others are part of the world.

    env = Gymnax(Battle(), "red", opponent)
    obs, state = env.reset(key, env.default_params)
    obs, state, reward, terminated, truncated, info = env.step(key, state, action, env.default_params)

The contract is that of gymnax 1.0.1 (https://github.com/RobertTLange/gymnax, `environments/environment.py`): six
values, scalar reward and flags, a reset inside the step, and in info `terminated`, `truncated` and
`final_observation`. The action is an array (A,), one integer an agent.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces
from jaxtyping import Array, Bool, Integer

from jaxrepro.config import UserError
from jaxrepro.envs.multi_agent import Key, MultiAgentEnv
from jaxrepro.envs.wrappers import flat, flat_shapes, select

Policy = Callable[
    [Key, Any, Any], Array
]  # (key, obs of its team, state of the world) -> actions (A,)
REWARDS = {"sum": jnp.sum, "mean": jnp.mean}


@struct.dataclass
class GymnaxParams:
    env: Any  # parameters of the environment
    max_steps_in_episode: Any  # truncates, as does the environment's own horizon


@struct.dataclass
class GymnaxState:
    env: Any  # of the environment
    time: Any  # () int32, steps of this episode
    over: Any  # () bool: the last step terminated


class AgentActions(spaces.Space):
    """An integer in 0 .. n - 1 for each agent of a team."""

    def __init__(self, n: int, agents: int):
        self.n, self.shape, self.dtype = n, (agents,), jnp.dtype(jnp.int32)

    def sample(self, key: Key) -> Integer[Array, " agents"]:
        return jax.random.randint(key, self.shape, 0, self.n, self.dtype)

    def contains(self, x: Any) -> Bool[Array, ""]:
        x = jnp.asarray(x)
        if x.shape != self.shape or not jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.bool_(False)
        return ((x >= 0) & (x < self.n)).all()


class Gymnax(environment.Environment):
    """The world of one team.

    opponent: the policy of the other team, or a dict team -> policy where there are several. A policy
    `(key, obs, state) -> actions (A,)` is traced; obs is what its team sees, state the world's. reward: "sum" or "mean"
    over all agents of the team, dead ones with 0. The observation is `wrappers.flat` of the team's, its agents first.
    UserError for an unknown team or reward, and for a team without a policy.
    """

    def __init__(
        self,
        env: MultiAgentEnv,
        team: str,
        opponent: Policy | Mapping[str, Policy] | None = None,
        *,
        reward: str = "sum",
    ):
        if team not in env.teams:
            raise UserError(f"team {team!r} is not one of {', '.join(env.teams)}")
        if reward not in REWARDS:
            raise UserError(f"reward {reward!r} is not one of {', '.join(REWARDS)}")
        others = [other for other in env.teams if other != team]
        if callable(opponent) and len(others) == 1:
            opponent = {others[0]: opponent}
        if callable(opponent) or set(opponent or {}) != set(others):
            given = "one policy" if callable(opponent) else sorted(opponent or {})
            raise UserError(f"the other teams are {others}, got {given}; give a policy for each")
        self.env, self.team, self.reward, self.opponents = env, team, reward, dict(opponent or {})

    @property
    def name(self) -> str:
        return type(self.env).__name__

    @property
    def default_params(self) -> GymnaxParams:
        params = self.env.default_params
        return GymnaxParams(params, params.horizon)

    @property
    def num_actions(self) -> int:
        """Actions of each agent of the team."""
        return self.env.num_actions(self.team)

    def action_space(self, params: GymnaxParams | None = None) -> AgentActions:
        return AgentActions(self.num_actions, self.env.sizes[self.team])

    def observation_space(self, params: GymnaxParams | None = None) -> spaces.Box:
        params = self.default_params if params is None else params
        seen = flat_shapes(self.env, params.env)[self.team]
        return spaces.Box(-jnp.inf, jnp.inf, seen.shape, seen.dtype)

    def observe(self, key: Any, state: GymnaxState, action: Any, params: GymnaxParams) -> Array:
        return flat(self.env.observe(state.env, params.env)[self.team])

    def get_obs(self, state: GymnaxState, params: Any = None, key: Any = None) -> Array:
        return self.observe(key, state, None, self.default_params if params is None else params)

    def is_truncated(self, state: GymnaxState, params: GymnaxParams) -> Bool[Array, ""]:
        """Whether either horizon is reached."""
        late = state.time >= params.max_steps_in_episode
        return late | self.env.is_truncated(state.env, params.env)

    def is_terminated(self, state: GymnaxState, params: GymnaxParams) -> Bool[Array, ""]:
        """Whether the step that led to a state terminated."""
        return state.over

    def reset_env(self, key: Key, params: GymnaxParams) -> tuple[Array, GymnaxState]:
        obs, state = self.env.reset(key, params.env)
        return flat(obs[self.team]), _begun(state)

    def step_env(
        self, key: Key, state: GymnaxState, action: Integer[Array, " agents"], params: GymnaxParams
    ) -> tuple[Array, GymnaxState, Array, Array, dict[str, Any]]:
        """(obs, state, reward (), terminated (), info), without a reset.

        terminated: the rules ended the episode, or all agents of the team are dead. info: the environment's, and
        `agent_reward` and `agent_terminated` (A,) of the team.
        """
        of_step, of_others, actions = key, (), {self.team: action}
        if self.opponents:
            of_step, *of_others = jax.random.split(key, 1 + len(self.opponents))
            obs = self.env.observe(state.env, params.env)
        for of_other, (team, policy) in zip(of_others, self.opponents.items()):
            actions[team] = policy(of_other, obs[team], state.env)
        obs, env, reward, terminated, info = self.env.step_env(
            of_step, state.env, actions, params.env
        )
        mine, dead = reward[self.team], terminated[self.team]
        over = info["episode_over"] | dead.all()
        info = {**info, "agent_reward": mine, "agent_terminated": dead}
        state = GymnaxState(env, state.time + 1, over)
        return flat(obs[self.team]), state, REWARDS[self.reward](mine), over, info

    @partial(jax.jit, static_argnames=("self",))
    def step(
        self,
        key: Key,
        state: GymnaxState,
        action: Integer[Array, " agents"],
        params: GymnaxParams | None = None,
    ) -> tuple[Array, GymnaxState, Array, Array, Array, dict[str, Any]]:
        """(obs, state, reward, terminated, truncated, info). gymnax's step, but the next episode is the environment's
        `restart`, which may count episodes, where gymnax's would always be its first."""
        params = self.default_params if params is None else params
        of_step, of_reset = jax.random.split(key)
        obs, after, reward, terminated, info = self.step_env(of_step, state, action, params)
        truncated = self.is_truncated(after, params)
        _, fresh = self.env.restart(of_reset, after.env, params.env)
        state = select(terminated | truncated, _begun(fresh), after)
        info = {
            **info,
            "terminated": terminated,
            "truncated": truncated,
            "final_observation": obs,
        }
        return self.observe(None, state, None, params), state, reward, terminated, truncated, info


def _begun(state):
    return GymnaxState(state, jnp.int32(0), jnp.bool_(False))
