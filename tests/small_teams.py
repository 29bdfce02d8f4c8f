"""A world small enough to follow by hand, with teams of different sizes, observations and actions."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxrepro.envs.multi_agent import MultiAgentEnv


@struct.dataclass
class StrikeParams:
    horizon: Any = 5


@struct.dataclass
class StrikeState:
    alive: Any  # (5,) bool: red_0 .. red_2, blue_0, blue_1
    time: Any
    luck: Any  # drawn at each reset where the world is lucky, else 0
    episode: Any


class Strike(MultiAgentEnv):
    """Action 0 does nothing, k strikes agent k - 1 of the other team dead, all at once. 1 a victim, -1 for dying."""

    teams = ("red", "blue")

    def __init__(self, lucky=False):
        self.sizes = {"red": 3, "blue": 2}
        self.deterministic_reset = not lucky

    @property
    def default_params(self):
        return StrikeParams()

    def num_actions(self, team):
        return {"red": 3, "blue": 4}[team]

    def _begin(self, key, params, episode):
        luck = jnp.float32(0) if self.deterministic_reset else jax.random.uniform(key)
        state = StrikeState(jnp.ones(5, bool), jnp.int32(0), luck, episode)
        return self.observe(state, params), state

    def reset(self, key, params):
        return self._begin(key, params, jnp.int32(0))

    def restart(self, key, state, params):
        return self._begin(key, params, state.episode + 1)

    def observe(self, state, params):
        alive = state.alive.astype(jnp.float32)
        row = jnp.concatenate([alive, state.time[None].astype(jnp.float32), state.luck[None]])
        red = jnp.where(state.alive[:3, None], row, 0)
        own = jnp.where(state.alive[3:], state.time + 1, 0)
        return {"red": red, "blue": {"all": red[:2, :3], "own": own}}

    def step_env(self, key, state, actions, params):
        before = self.split(state.alive)
        struck = {}
        for team, other in (("red", "blue"), ("blue", "red")):
            action = jnp.where(before[team], actions[team], 0)
            hit = jax.nn.one_hot(action - 1, self.sizes[other], dtype=bool) & before[other]
            struck[other] = hit
        died = {team: struck[team].any(0) for team in self.teams}
        after = {team: before[team] & ~died[team] for team in self.teams}
        reward = {
            team: struck[other].sum(1).astype(jnp.float32) - died[team]
            for team, other in (("red", "blue"), ("blue", "red"))
        }
        info = {
            "alive_before": before,
            "alive_after": after,
            "kills": {"red": died["blue"].sum(), "blue": died["red"].sum()},
            "episode_over": ~(after["red"].any() & after["blue"].any()),
        }
        state = state.replace(alive=self.join(after), time=state.time + 1)
        terminated = {team: ~after[team] for team in self.teams}
        return self.observe(state, params), state, reward, terminated, info

    def is_truncated(self, state, params):
        return state.time >= params.horizon
