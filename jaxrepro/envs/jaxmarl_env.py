"""A many-agent environment with the interface of JaxMARL 0.2 (https://github.com/FLAIROx/JaxMARL).

    env = JaxMARL(Battle())
    obs, state = env.reset(key)
    obs, state, reward, done, info = env.step(key, state, {agent: action for agent in env.agents})

Agents are named as in MAgent2, red_0, red_1, ..., blue_0, .... JaxMARL knows no parameters of an environment, so they
are fixed here. Its package is not needed: spaces are gymnax's, which its own wrappers take too.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gymnax.environments import spaces
from jaxtyping import Array, Bool

from jaxrepro.config import UserError
from jaxrepro.envs.multi_agent import Key, MultiAgentEnv, PerTeam
from jaxrepro.envs.wrappers import agent_names, flat, flat_shapes, select


class JaxMARL:
    """All agents of all teams, each under its name.

    An agent's observation is its row of `wrappers.flat`. It is done when it is dead, and everybody is, with
    `__all__`, when the rules or the horizon end the episode; `step` then begins the next one. Every array of info has
    one number an agent, (num_agents,), in the order of `agents`, as JaxMARL's baselines reshape it.
    """

    def __init__(self, env: MultiAgentEnv, params: Any = None):
        self.env = env
        self.params = env.default_params if params is None else params
        self.num_agents, self.agents = env.num_agents, agent_names(env)
        self.agent_classes = {
            team: [f"{team}_{i}" for i in range(env.sizes[team])] for team in env.teams
        }
        seen = flat_shapes(env, self.params)
        self.observation_spaces, self.action_spaces = {}, {}
        for team, agents in self.agent_classes.items():
            box = spaces.Box(-jnp.inf, jnp.inf, seen[team].shape[1:], seen[team].dtype)
            actions = spaces.Discrete(env.num_actions(team))
            self.observation_spaces |= dict.fromkeys(agents, box)
            self.action_spaces |= dict.fromkeys(agents, actions)

    @property
    def name(self) -> str:
        return type(self.env).__name__

    def observation_space(self, agent: str) -> spaces.Box:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Discrete:
        return self.action_spaces[agent]

    @partial(jax.jit, static_argnums=0)
    def reset(self, key: Key) -> tuple[dict[str, Array], Any]:
        """(obs, state): agent -> its observation."""
        obs, state = self.env.reset(key, self.params)
        return self._seen(obs), state

    @partial(jax.jit, static_argnums=0)
    def step(
        self, key: Key, state: Any, actions: dict[str, Any], reset_state: Any = None
    ) -> tuple[dict[str, Array], Any, dict[str, Array], dict[str, Array], dict[str, Array]]:
        """One step, and the next episode where this one ended. reset_state: begin it there."""
        of_step, of_reset = jax.random.split(key)
        _, after, reward, done, info = self.step_env(of_step, state, actions)
        if reset_state is None:
            _, reset_state = self.env.restart(of_reset, after, self.params)
        state = select(done["__all__"], reset_state, after)
        return self.get_obs(state), state, reward, done, info

    def step_env(
        self, key: Key, state: Any, actions: dict[str, Any]
    ) -> tuple[dict[str, Array], Any, dict[str, Array], dict[str, Array], dict[str, Array]]:
        """(obs, state, reward, done, info) without a reset; actions: agent -> () integer, of the dead too."""
        missing = [agent for agent in self.agents if agent not in actions]
        if missing:
            raise UserError(
                f"no action for {', '.join(missing):.60}; give one for each of env.agents, dead or not"
            )
        per_team = {
            team: jnp.stack([jnp.asarray(actions[agent]) for agent in agents])
            for team, agents in self.agent_classes.items()
        }
        obs, state, reward, terminated, info = self.env.step_env(key, state, per_team, self.params)
        over = info["episode_over"] | self.env.is_truncated(state, self.params)
        done = {**self._apart({team: x | over for team, x in terminated.items()}), "__all__": over}
        kills = {team: jnp.full(n, info["kills"][team]) for team, n in self.env.sizes.items()}
        numbers = {
            "alive_before": self.env.join(info["alive_before"]),
            "alive_after": self.env.join(info["alive_after"]),
            "team_kills": self.env.join(kills),
        }
        return self._seen(obs), state, self._apart(reward), done, numbers

    @partial(jax.jit, static_argnums=0)
    def get_obs(self, state: Any) -> dict[str, Array]:
        """agent -> its observation in a state."""
        return self._seen(self.env.observe(state, self.params))

    @partial(jax.jit, static_argnums=0)
    def get_avail_actions(self, state: Any) -> dict[str, Bool[Array, "a"]]:
        """All actions of every agent; those of the dead do nothing."""
        return {agent: jnp.ones(space.n, bool) for agent, space in self.action_spaces.items()}

    def _seen(self, obs: PerTeam) -> dict[str, Array]:
        return self._apart({team: flat(obs[team]) for team in self.env.teams})

    def _apart(self, per_team: PerTeam) -> dict[str, Array]:
        return {
            agent: per_team[team][i]
            for team, agents in self.agent_classes.items()
            for i, agent in enumerate(agents)
        }
