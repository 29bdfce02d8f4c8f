"""The interface of environments with many agents, in teams whose shapes may differ.

An environment is static and hashable: sizes and rules are its attributes, numbers that may change between runs are
`params`, and everything that moves is `state`, a pytree. So `jax.vmap` over keys and states gives many worlds, and
one over params gives a sweep.

    obs, state = env.reset(key, params)
    obs, state, reward, terminated, info = env.step_env(key, state, actions, params)

What belongs to agents is a dict team -> array (a pytree, for observations) that leads with the agents of that team.
No agent is ever removed: the dead stay in their rows, with reward 0, observation 0 and their action ignored, and
`terminated` latches at death. The order of arguments is gymnax's (https://github.com/RobertTLange/gymnax), without
its reset inside a step: learners scan a fixed number of steps under a mask, because mean fields, group labels and
identities live in the learner and must be cleared with the episode. `envs.wrappers` adds resets and other interfaces.
"""

import abc
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray, UInt32

from jaxrepro.config import UserError
from jaxrepro.ops.checks import known

Key = PRNGKeyArray | UInt32[Array, "2"]  # a typed key, or the raw one that older code makes
PerTeam = Mapping[str, Any]  # team -> array or pytree of arrays (A_team, ...)
INFO = ("alive_before", "alive_after", "kills", "episode_over")  # what every info has


class MultiAgentEnv(abc.ABC):
    """Teams of agents in one world. Methods are pure: jit, vmap and scan them at will.

    teams: names, in the order of `join`. sizes: agents a team, team -> A.
    `step_env` may be called after the end of an episode, as a scan of fixed length does; what it returns then means
    nothing, but is finite.
    """

    teams: tuple[str, ...]
    sizes: dict[str, int]
    deterministic_reset = False  # whether every episode begins alike, whatever the key

    @property
    def static(self) -> tuple[Any, ...]:
        """What tells two environments of this very class apart; those that equal share their compiled programs."""
        return (id(self),)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((type(self), self._identity()))

    def _identity(self):
        # a subclass may have more attributes than the class knows whose `static` it inherits
        return self.static if "static" in vars(type(self)) else id(self)

    @property
    @abc.abstractmethod
    def default_params(self) -> Any:
        """The parameters of the environment's source. They have `horizon`, the steps of an episode."""

    @abc.abstractmethod
    def reset(self, key: Key, params: Any) -> tuple[PerTeam, Any]:
        """(obs, state) of a new episode; obs: team -> (A, ...)."""

    def restart(self, key: Key, state: Any, params: Any) -> tuple[PerTeam, Any]:
        """(obs, state) of the episode after that of `state`: a reset that may depend on how many there were."""
        return self.reset(key, params)

    @abc.abstractmethod
    def step_env(
        self, key: Key, state: Any, actions: PerTeam, params: Any
    ) -> tuple[PerTeam, Any, PerTeam, PerTeam, dict[str, Any]]:
        """One step of all agents, without any reset: (obs, state, reward, terminated, info).

        actions: team -> (A,) integers, or floats where `num_actions` says that they are continuous. reward: team ->
        (A,) float32, what each agent earned in this step, its death included. terminated: team -> (A,) bool, True
        from the step of the agent's death on. info:
            alive_before, alive_after   team -> (A,) bool: at the start and at the end of this step
            kills                       team -> () int32: agents of other teams that this team killed in this step
            episode_over                () bool: the rules ended the episode; the horizon is `is_truncated`
        """

    @abc.abstractmethod
    def is_truncated(self, state: Any, params: Any) -> Bool[Array, ""]:
        """Whether the horizon is reached; never a reason to set `terminated`."""

    @abc.abstractmethod
    def observe(self, state: Any, params: Any) -> PerTeam:
        """What the agents see in a state: team -> (A, ...), 0 for the dead. Equals the obs of reset and step_env."""

    @abc.abstractmethod
    def num_actions(self, team: str) -> int:
        """Number of discrete actions of a team's agents; UserError where they are continuous."""

    @property
    def num_agents(self) -> int:
        """Agents of all teams."""
        return sum(self.sizes[team] for team in self.teams)

    def join(self, per_team: PerTeam, axis: int = 0) -> Any:
        """The agents of all teams on one axis, in the order of `teams`: (A, ...) each -> (sum of A, ...).

        Never concatenate `dict.values()`: jit sorts the keys of a dict. axis: that of the agents, 1 behind a vmap.
        UserError where a team is missing, unknown, or has another number of agents.
        """
        self._check(per_team, axis)
        return jax.tree.map(
            lambda *x: jnp.concatenate(x, axis), *(per_team[team] for team in self.teams)
        )

    def split(self, joined: Any, axis: int = 0) -> dict[str, Any]:
        """The inverse of `join`: (sum of A, ...) -> team -> (A, ...)."""
        for x in jax.tree.leaves(joined):
            if np.ndim(x) <= axis or np.shape(x)[axis] != self.num_agents:
                raise UserError(
                    f"an array of shape {np.shape(x)} cannot be split into teams of {self._sizes()}: axis {axis} "
                    f"must hold {self.num_agents} agents"
                )
        ends = np.cumsum([0, *(self.sizes[team] for team in self.teams)]).tolist()
        return {
            team: jax.tree.map(lambda x: jax.lax.slice_in_dim(x, a, b, axis=axis), joined)  # noqa: B023
            for team, (a, b) in zip(self.teams, pairwise(ends))
        }

    def check_actions(self, actions: Any) -> None:
        """UserError for actions of unknown teams, of a wrong shape or kind, or outside 0 .. num_actions - 1.

        On the host, for concrete arrays (A,): inside jit no value can be refused, and there an action out of range
        means nothing.
        """
        self._check(actions, 0)
        for team in self.teams:
            given, last = np.asarray(actions[team]), self.num_actions(team) - 1
            if given.shape != (self.sizes[team],) or not np.issubdtype(given.dtype, np.integer):
                raise UserError(
                    f"actions of {team} are {given.dtype} of shape {given.shape}; they must be "
                    f"{self.sizes[team]} integers, one an agent"
                )
            wrong = np.flatnonzero((given < 0) | (given > last))
            if wrong.size:
                raise UserError(
                    f"action {given[wrong[0]]} of {team} {wrong[0]} is outside 0..{last}; "
                    f"choose one of {last + 1} actions"
                )

    def check_known(self, actions: Any) -> None:
        """`check_actions` of what is no traced array."""
        if all(known(x) is not None for x in jax.tree.leaves(actions)):
            self.check_actions(actions)

    def _check(self, per_team, axis):
        if not isinstance(per_team, Mapping) or set(per_team) != set(self.teams):
            given = sorted(per_team) if isinstance(per_team, Mapping) else type(per_team).__name__
            raise UserError(f"got {given} where a dict with the teams {list(self.teams)} is needed")
        for team in self.teams:
            for x in jax.tree.leaves(per_team[team]):
                if np.ndim(x) <= axis or np.shape(x)[axis] != self.sizes[team]:
                    raise UserError(
                        f"{team} has {self.sizes[team]} agents, its array is of shape {np.shape(x)}; "
                        f"axis {axis} must hold its agents"
                    )

    def _sizes(self):
        return " and ".join(f"{self.sizes[team]} {team}" for team in self.teams)
