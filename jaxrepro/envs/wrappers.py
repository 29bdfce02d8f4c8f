"""What other interfaces of environments need of `MultiAgentEnv`: episodes that begin again, flat rows, agents' names.

`AutoReset` is for whoever scans without looking at the ends of episodes. The other wrappers are modules of their own,
because each needs its package:

    gymnax_env.Gymnax                       one team, the policies of the others given
    jaxmarl_env.JaxMARL                     a dict of agents, parameters fixed
    pettingzoo_env.PettingZooParallel       a host object with numpy rows, as MAgent2's
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool

from jaxrepro.envs.multi_agent import Key, MultiAgentEnv, PerTeam


@struct.dataclass
class AutoResetState:
    env: Any  # of the environment
    first: Any  # () bool: what is observed now is the beginning of an episode


class AutoReset:
    """An environment that begins its next episode in the step that ends one, by its rules or by the horizon.

    Learners clear what belongs to an episode (mean fields, labels) where `state.first`. params are fixed, so that the
    first observation and state of an environment whose episodes all begin alike are computed once, here.
    """

    def __init__(self, env: MultiAgentEnv, params: Any = None):
        self.env = env
        self.params = env.default_params if params is None else params
        self._start = None
        if env.deterministic_reset:
            self._start = jax.jit(env.reset)(jax.random.key(0), self.params)

    def reset(self, key: Key) -> tuple[PerTeam, AutoResetState]:
        """(obs, state) of a first episode."""
        obs, state = self.env.reset(key, self.params) if self._start is None else self._start
        return obs, AutoResetState(state, jnp.bool_(True))

    def step(
        self, key: Key, state: AutoResetState, actions: PerTeam
    ) -> tuple[PerTeam, AutoResetState, PerTeam, PerTeam, Bool[Array, ""], dict[str, Any]]:
        """(obs, state, reward, terminated, truncated, info): of the step; obs and state of the next episode if it ended.

        terminated: team -> (A,), truncated: (). info has also `final_observation`, what was seen before the reset;
        it costs nothing inside jit where it is not used.
        """
        of_step, of_reset = jax.random.split(key)
        seen, after, reward, terminated, info = self.env.step_env(
            of_step, state.env, actions, self.params
        )
        truncated = self.env.is_truncated(after, self.params)
        done = info["episode_over"] | truncated
        if self._start is None:
            _, fresh = self.env.restart(of_reset, after, self.params)
        else:
            _, fresh = self._start
        # the state is chosen first and looked at once: choosing between two observations costs more than looking
        env = select(done, fresh, after)
        obs = self.env.observe(env, self.params)
        info = {**info, "final_observation": seen}
        return obs, AutoResetState(env, done), reward, terminated, truncated, info


def select(which: Bool[Array, ""], yes: Any, no: Any) -> Any:
    """One of two trees of equal structure, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), yes, no)


def flat(obs: Any) -> Array:
    """A team's observation as one array: an array as it is, a tree as rows (A, d) of float32, leaves side by side."""
    leaves = jax.tree.leaves(obs)
    if len(leaves) == 1:
        return leaves[0]
    return jnp.concatenate([x.reshape(len(x), -1).astype(jnp.float32) for x in leaves], -1)


def flat_shapes(env: MultiAgentEnv, params: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes (A, ...) and kinds of what `flat` gives of each team; nothing is computed."""
    obs, _ = jax.eval_shape(env.reset, jax.random.key(0), params)
    return {team: jax.eval_shape(flat, obs[team]) for team in env.teams}


def agent_names(env: MultiAgentEnv) -> list[str]:
    """red_0, red_1, ..., blue_0, ...: the agents' names in other interfaces, in the order of `join`."""
    return [f"{team}_{i}" for team in env.teams for i in range(env.sizes[team])]
