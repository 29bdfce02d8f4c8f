"""A many-agent environment as a parallel environment of PettingZoo: a host object, one world, numpy rows.

    env = PettingZooParallel(Battle())
    obs, infos = env.reset(seed=0)
    while env.agents:
        obs, reward, terminated, truncated, infos = env.step({agent: ... for agent in env.agents})

Behaves as MAgent2 0.3.4's own (https://github.com/Farama-Foundation/MAgent2, `environments/magent_env.py`): agents are
named red_0, red_1, ..., blue_0, ...; who dies in a step is still in its five dicts and gone from `agents` afterwards;
when the rules end the episode everybody is terminated. What agents see is `env.pettingzoo_observation(state)` where
the environment has it. The battle's is as MAgent2's: seen before the dead are cleared away, so that they see
once more, and with a last reward that lags a step. Other environments show `wrappers.flat` of their observation, in which
the dead are 0.

The package pettingzoo is not needed; where it is installed this is a `ParallelEnv` of its. For training thousands of
worlds take the environment itself: every step here copies all rows to the host.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from gymnasium import spaces

from jaxrepro.config import LARGEST_SEED, UserError
from jaxrepro.envs.multi_agent import MultiAgentEnv
from jaxrepro.envs.wrappers import agent_names, flat

try:
    from pettingzoo import ParallelEnv
except ImportError:
    ParallelEnv = object


class PettingZooParallel(ParallelEnv):
    """One world of an environment.

    params: of the environment. seed: of all random numbers until `reset` gets one. render_mode: None, or "rgb_array"
    where the environment has `render(state)`, and `render()` gives a picture. UserError for other modes, for an
    action that is missing, unknown or out of range, and for a step without a reset.
    """

    def __init__(
        self,
        env: MultiAgentEnv,
        params: Any = None,
        *,
        seed: int = 0,
        render_mode: str | None = None,
    ):
        modes = ["rgb_array"] if hasattr(env, "render") else []
        if render_mode not in (None, *modes):
            raise UserError(
                f"render_mode {render_mode!r} is not one of {', '.join(['None', *modes])}"
            )
        self.metadata = {"name": type(env).__name__.lower(), "render_modes": modes}
        self.render_mode = render_mode
        self.env = env
        self.params = env.default_params if params is None else params
        self.possible_agents = agent_names(env)
        self.agents = []
        self._state, self._key = None, _key(seed)
        self._row = {agent: i for i, agent in enumerate(self.possible_agents)}
        # jitted once for the whole program, not once an object
        self._reset, self._restart, self._step = (
            partial(f, env) for f in (_reset, _restart, _step)
        )
        seen = jax.eval_shape(_reset, env, self._key, self.params)[0]
        self._observation_spaces, self._action_spaces = {}, {}
        for agent, team in self._of_agents():
            self._observation_spaces[agent] = _box(seen[team].shape[1:], seen[team].dtype)
            self._action_spaces[agent] = spaces.Discrete(env.num_actions(team))

    def _of_agents(self):
        """(agent, its team), in the order of `possible_agents`."""
        teams = [team for team in self.env.teams for _ in range(self.env.sizes[team])]
        return zip(self.possible_agents, teams)

    def observation_space(self, agent: str) -> spaces.Box:
        return self._observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Discrete:
        return self._action_spaces[agent]

    @property
    def observation_spaces(self) -> dict[str, spaces.Box]:
        return self._observation_spaces

    @property
    def action_spaces(self) -> dict[str, spaces.Discrete]:
        return self._action_spaces

    @property
    def num_agents(self) -> int:
        """Agents that are left."""
        return len(self.agents)

    @property
    def max_num_agents(self) -> int:
        return len(self.possible_agents)

    @property
    def unwrapped(self) -> "PettingZooParallel":
        return self

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
        """(observations, infos) of the next episode; with a seed of a first one. options are not used."""
        if seed is not None:
            self._state, self._key = None, _key(seed)
        self._key, key = jax.random.split(self._key)
        if self._state is None:
            seen, self._state = self._reset(key, self.params)
        else:
            seen, self._state = self._restart(key, self._state, self.params)
        self.agents = self.possible_agents[:]
        return self._rows(seen), {agent: {} for agent in self.agents}

    def step(
        self, actions: Mapping[str, Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, bool], dict[str, bool], dict]:
        """(observations, rewards, terminations, truncations, infos) of the agents that were left before it."""
        if not self.agents:
            raise UserError("no agent is left or the world has not begun; call reset() first")
        self._key, key = jax.random.split(self._key)
        seen, self._state, reward, terminated, truncated = self._step(
            key, self._state, self._per_team(actions), self.params
        )
        reward, terminated, truncated = jax.device_get((reward, terminated, truncated))
        agents = self.agents
        rewards = {agent: float(reward[self._row[agent]]) for agent in agents}
        terminations = {agent: bool(terminated[self._row[agent]]) for agent in agents}
        truncations = dict.fromkeys(agents, bool(truncated))
        observations = self._rows(seen)
        self.agents = [a for a in agents if not (terminations[a] or truncations[a])]
        return observations, rewards, terminations, truncations, {agent: {} for agent in agents}

    def render(self) -> np.ndarray | None:
        """The world as uint8 (height, width, 3); None without a render mode."""
        if self.render_mode is None:
            return None
        if self._state is None:
            raise UserError("there is no world to render yet; call reset() first")
        return np.asarray(self.env.render(self._state))

    def close(self) -> None:
        """Nothing is held that needs closing."""

    def _per_team(self, actions):
        """team -> (A,) int32; 0 for who is gone, as nothing listens to it."""
        unknown = [agent for agent in actions if agent not in self._row]
        if unknown:
            raise UserError(f"there is no agent {unknown[0]!r}; take the names in possible_agents")
        joined = np.zeros(len(self._row), np.int32)
        for agent in self.agents:
            if agent not in actions:
                raise UserError(f"no action for {agent}; give one for each of env.agents")
            action = np.asarray(actions[agent])
            if action.shape != () or not self._action_spaces[agent].contains(action[()]):
                raise UserError(
                    f"action {actions[agent]!r:.40} of {agent} must be an integer in "
                    f"0..{self._action_spaces[agent].n - 1}"
                )
            joined[self._row[agent]] = action
        return self.env.split(joined)

    def _rows(self, seen):
        """agent -> its own writable row, for the agents that are left."""
        rows = {team: np.array(x) for team, x in jax.device_get(seen).items()}
        joined = [np.asarray(row) for team in self.env.teams for row in rows[team]]
        return {agent: joined[self._row[agent]] for agent in self.agents}


def _key(seed):
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed {seed} is not in 0..{LARGEST_SEED}")
    return jax.random.key(seed)


def _box(shape, dtype):
    if np.issubdtype(dtype, np.integer):
        return spaces.Box(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype)
    return spaces.Box(-np.inf, np.inf, shape, dtype)


def _seen(env, obs, state):
    """What PettingZoo's agents see: the environment's own form for it, or the rows of `obs`."""
    if hasattr(env, "pettingzoo_observation"):
        return env.pettingzoo_observation(state)
    return {team: flat(obs[team]) for team in env.teams}


@partial(jax.jit, static_argnums=0)
def _reset(env, key, params):
    obs, state = env.reset(key, params)
    return _seen(env, obs, state), state


@partial(jax.jit, static_argnums=0)
def _restart(env, key, state, params):
    obs, state = env.restart(key, state, params)
    return _seen(env, obs, state), state


@partial(jax.jit, static_argnums=0)
def _step(env, key, state, actions, params):
    obs, state, reward, terminated, info = env.step_env(key, state, actions, params)
    terminated = env.join(terminated) | info["episode_over"]
    truncated = env.is_truncated(state, params)
    return _seen(env, obs, state), state, env.join(reward), terminated, truncated
