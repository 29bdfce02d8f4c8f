"""MAgent2's battle: two armies on a square map, each agent moves up to two cells or strikes a neighbour.

Source: MAgent2 0.3.4, `battle_v4` (https://github.com/Farama-Foundation/MAgent2), its engine as executed with one
thread; equal to it bit for bit for maps below 100 cells, given the order in which attackers strike. Above that the
engine moves agents in bands of columns, which is not done here.

A step: attacks in a random order, recovery of 0.1 hp, moves by index, red first, then rewards.

    step_reward                             for everyone alive at the start of the step
    + attack_penalty                        for each blow, also one that meets nothing, a wall or a friend
    + attack_opponent_reward                for a blow that an enemy survives
    + kill_reward                           for the blow that kills; no attack_opponent_reward with it
    dead_penalty (+ attack_opponent_reward) instead of all that for who is killed (and has struck an enemy before)

What differs from the engine: dead agents stay in their rows instead of being removed, with observation and reward 0;
an army without survivors has no share of the minimap, where the engine divides 0 by 0; the order of attackers is drawn from a
key, unless it is given.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxrepro.config import UserError
from jaxrepro.envs import battle_observation as looks
from jaxrepro.envs import battle_rules as rules
from jaxrepro.envs import replay
from jaxrepro.envs.battle_observation import BattleObservation
from jaxrepro.envs.multi_agent import Key, MultiAgentEnv, PerTeam
from jaxrepro.ops.checks import known

RESOLUTIONS = ("sequential", "simultaneous")
SIDES = ("left", "alternate", "random")  # where red starts


@struct.dataclass
class BattleParams:
    """Rewards of a step and its number of steps. The defaults are MAgent2's."""

    step_reward: Any = -0.005
    dead_penalty: Any = -0.1
    attack_penalty: Any = -0.1
    attack_opponent_reward: Any = 0.2
    kill_reward: Any = 5.0
    horizon: Any = 1000


# of the official code of Bi-level Mean Field, arXiv:2505.06706
OFFICIAL = BattleParams(dead_penalty=-0.5, attack_opponent_reward=0.5, horizon=400)


@struct.dataclass
class BattleState:
    """A world. n agents: red, then blue."""

    pos: Any  # (n, 2) int32: x, y; the dead keep where they fell
    hp: Any  # (n,) float32
    alive: Any  # (n,) bool
    action: Any  # (n,) int32: the last, -1 before the first
    reward: Any  # (n,) float32: of the last step
    occupied: Any  # (y, x) int32: who stands there, rules.EMPTY or rules.WALL
    t: Any  # () int32: steps so far
    swapped: Any  # () bool: red started on the right
    episode: Any  # () int32: how many `restart` has begun
    fought: Any  # (n,) bool: alive at the start of the last step
    lagged_reward: Any  # (n,) float32: of the step before the last


class Battle(MultiAgentEnv):
    """The battle for a map of map_size x map_size cells.

    minimap, extra_features: what is seen, as `battle_observation` says. resolution: "sequential" is exact;
    "simultaneous" lets all attackers strike, also those who are killed in the same step, and gives a kill to the
    first fatal blow; the engine does not do so. side: where red starts, "left", "alternate" (by the episodes that
    `restart` counts) or "random".
    """

    teams = ("red", "blue")

    def __init__(
        self,
        map_size: Any = 40,
        minimap: Any = True,
        extra_features: Any = True,
        resolution: str = "sequential",
        side: str = "left",
    ):
        self.left, self.right = rules.start(map_size)
        for name, value, choices in (
            ("resolution", resolution, RESOLUTIONS),
            ("side", side, SIDES),
        ):
            if value not in choices:
                raise UserError(
                    f"{name}={value!r:.40} is unknown; choose one of {', '.join(choices)}"
                )
        for name, value in (("minimap", minimap), ("extra_features", extra_features)):
            if not isinstance(value, bool):
                raise UserError(f"{name}={value!r:.40} must be True or False")
        self.map_size, self.minimap, self.extra_features = map_size, minimap, extra_features
        self.resolution, self.side = resolution, side
        self.sizes = dict.fromkeys(self.teams, len(self.left))

    @property
    def static(self) -> tuple[Any, ...]:
        return self.map_size, self.minimap, self.extra_features, self.resolution, self.side

    @property
    def default_params(self) -> BattleParams:
        """MAgent2's rewards and horizon."""
        return BattleParams()

    @property
    def deterministic_reset(self) -> bool:
        """Whether every episode begins alike."""
        return self.side == "left"

    def num_actions(self, team: str) -> int:
        """21: thirteen moves, of which 6 stays, then eight attacks."""
        return rules.NUM_ACTIONS

    def reset(self, key: Key, params: BattleParams) -> tuple[PerTeam, BattleState]:
        """(obs, state) of a first episode."""
        return self._begin(key, params, jnp.int32(0))

    def restart(
        self, key: Key, state: BattleState, params: BattleParams
    ) -> tuple[PerTeam, BattleState]:
        """(obs, state) of the episode after that of `state`: a reset that knows whose turn the left side is."""
        return self._begin(key, params, state.episode + 1)

    def _begin(self, key, params, episode):
        swapped = {
            "left": jnp.bool_(False),
            "alternate": episode % 2 == 1,
            "random": jax.random.bernoulli(key),
        }[self.side]
        left, right = jnp.asarray(self.left), jnp.asarray(self.right)
        pos = jnp.where(swapped, jnp.concatenate([right, left]), jnp.concatenate([left, right]))
        n = self.num_agents
        everyone, nothing = jnp.ones(n, bool), jnp.zeros(n, jnp.float32)
        state = BattleState(
            pos=pos,
            hp=jnp.full(n, rules.FULL_HP, jnp.float32),
            alive=everyone,
            action=jnp.full(n, -1, jnp.int32),
            reward=nothing,
            occupied=rules.occupancy(pos, everyone, self.map_size),
            t=jnp.int32(0),
            swapped=swapped,
            episode=episode,
            fought=everyone,
            lagged_reward=nothing,
        )
        return self.observe(state, params), state

    def step_env(
        self,
        key: Key,
        state: BattleState,
        actions: PerTeam,
        params: BattleParams,
        attack_order: Int[Array, " n"] | None = None,
    ) -> tuple[PerTeam, BattleState, PerTeam, PerTeam, dict[str, Any]]:
        """One step as `MultiAgentEnv` has it; nothing is truncated here.

        actions: team -> (A,) integers 0 to 20; others are refused where they are known, and inside jit they stay, as do
        the dead. attack_order: a permutation of all
        agents, who strikes first (those who do not attack count for nothing); None draws it from the key.
        """
        self.check_known(actions)
        given = self.join(actions).astype(jnp.int32)
        before = state.alive
        action = jnp.where((given >= 0) & (given < rules.NUM_ACTIONS) & before, given, rules.STAY)
        red = self.sizes["red"]
        place = self._places(key, attack_order)
        fight = rules.attack(
            state.pos, state.hp, before, state.occupied, action, place, red,
            simultaneous=self.resolution == "simultaneous",
        )  # fmt: skip
        alive = before & ~fight.died
        hp = jnp.where(alive, jnp.minimum(rules.FULL_HP, fight.hp + rules.RECOVERY), fight.hp)
        pos = rules.move(state.pos, alive, state.occupied, action)
        number = lambda x: jnp.asarray(x, jnp.float32)
        earned = number(params.step_reward) + jnp.where(
            fight.killed, number(params.kill_reward) + number(params.attack_penalty), 0.0
        ) + jnp.where(fight.acted & ~fight.killed, number(params.attack_penalty), 0.0)  # fmt: skip
        earned = jnp.where(fight.died, number(params.dead_penalty), earned)
        earned += jnp.where(fight.hit, number(params.attack_opponent_reward), 0.0)
        reward = jnp.where(before, earned, 0.0)
        state = state.replace(
            pos=pos,
            hp=hp,
            alive=alive,
            action=jnp.where(before, action, state.action),
            reward=reward,
            occupied=rules.occupancy(pos, alive, self.map_size),
            t=state.t + 1,
            fought=before,
            lagged_reward=state.reward,
        )
        lost = jnp.stack([fight.died[:red].sum(), fight.died[red:].sum()])
        info = {
            "alive_before": self.split(before),
            "alive_after": self.split(alive),
            "kills": {"red": lost[1], "blue": lost[0]},
            "episode_over": ~(alive[:red].any() & alive[red:].any()),
        }
        out = self.split(reward), self.split(~alive)
        return self.observe(state, params), state, *out, info

    def _places(self, key, attack_order):
        n = self.num_agents
        index = jnp.arange(n, dtype=jnp.int32)
        if attack_order is None:
            # distinct random numbers are a random order; the index in the low bits keeps them distinct
            bits = (n - 1).bit_length()
            chance = jax.random.bits(key, (n,), jnp.uint32) >> (32 - rules.PLACE_BITS)
            return (chance >> bits << bits).astype(jnp.int32) | index
        order = jnp.asarray(attack_order)
        if order.shape != (n,) or not jnp.issubdtype(order.dtype, jnp.integer):
            raise UserError(
                f"attack_order is {order.dtype} of shape {order.shape}; it must be a permutation of the {n} agents"
            )
        here = known(order)
        if here is not None and (np.sort(here) != np.arange(n)).any():
            raise UserError(
                f"attack_order leaves an agent out; it must be a permutation of 0 to {n - 1}"
            )
        return jnp.zeros(n, jnp.int32).at[order].set(index)

    def render(self, state: BattleState) -> np.ndarray:
        """A picture of a world, uint8 (height, width, 3): `replay.render`."""
        return replay.render(state)

    def is_truncated(self, state: BattleState, params: BattleParams) -> Bool[Array, ""]:
        """Whether `params.horizon` steps are done."""
        return state.t >= params.horizon

    def observe(self, state: BattleState, params: BattleParams) -> dict[str, BattleObservation]:
        """What the living see, after the dead are cleared away: the engine's low-level interface."""
        return self._look(state, state.alive, state.reward)

    def pettingzoo_observation(self, state: BattleState) -> dict[str, Array]:
        """What MAgent2's PettingZoo interface returns: team -> (A, 13, 13, c + f), features as planes behind the view.

        It looks before the dead are cleared away: those killed in the last step still see and count on the minimap, and
        the reward among the features is that of the step before. 0 for who was dead before the last step. Not taken over
        is a slip of that interface: in the first step after its reset, blue does what red was told.
        """
        seen = self._look(state, state.fought, state.lagged_reward, state.fought & ~state.alive)
        return {team: looks.tiled(seen[team]) for team in self.teams}

    def _look(self, state, observers, reward, killed=None):
        n = self.num_agents
        half = n // 2  # ids go to the left army first
        ids = jnp.where(state.swapped, (np.arange(n) + half) % n, np.arange(n))
        seen = looks.Seen(
            state.occupied, state.pos, state.hp, observers, ids, state.action, reward, killed
        )
        what = {"minimap": self.minimap, "extra_features": self.extra_features}
        return dict(zip(self.teams, looks.observe(seen, self.sizes["red"], **what)))
