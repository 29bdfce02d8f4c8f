"""Scripted players of the battle, to test with and to measure trained ones against.

Each is made for an environment and a team: policy(key, obs, state) -> (A,) int32 actions. The obs is not looked at, so
it may be None; the actions of the dead mean nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrepro.envs import battle_rules as rules
from jaxrepro.envs.battle import Battle, BattleState
from jaxrepro.envs.multi_agent import Key

Policy = Callable[[Key, Any, BattleState], Array]


def random(env: Battle, team: str) -> Policy:
    """Each of the 21 actions alike."""

    def policy(key, obs, state):
        return jax.random.randint(key, (env.sizes[team],), 0, rules.NUM_ACTIONS, jnp.int32)

    return policy


def rush(env: Battle, team: str) -> Policy:
    """At the nearest enemy, wherever it is: strikes it where it stands beside it, else moves as near as it can.

    Of enemies and of free cells that are equally near one is drawn. Who has no enemy stays.
    """
    other = next(t for t in env.teams if t != team)

    def policy(key, obs, state):
        sides = env.split({"pos": state.pos, "alive": state.alive})
        of_enemies, of_moves = jax.random.split(key)
        mine, theirs = sides[team]["pos"], sides[other]
        return _rush(of_enemies, of_moves, mine, theirs["pos"], theirs["alive"], state.occupied)

    return policy


def _rush(of_enemies, of_moves, mine, theirs, alive, occupied):
    gap = theirs - mine[:, None]  # (a, enemies, 2)
    far = (gap**2).sum(-1) + jax.random.uniform(of_enemies, gap.shape[:2])
    nearest = jnp.where(alive, far, jnp.inf).argmin(-1)
    to = jnp.take_along_axis(gap, nearest[:, None, None], 1)  # (a, 1, 2)
    strike = (to == rules.ATTACKS).all(-1)  # (a, 8)
    cell = mine[:, None] + rules.MOVES
    cell = jnp.clip(cell, 0, occupied.shape[-1] - 1)  # what is off the map is the wall beside it
    free = occupied[cell[..., 1], cell[..., 0]] == rules.EMPTY
    free = free.at[:, rules.STAY].set(True)
    rest = ((to - rules.MOVES) ** 2).sum(-1) + jax.random.uniform(of_moves, free.shape)
    step = jnp.where(free, rest, jnp.inf).argmin(-1)
    action = jnp.where(strike.any(-1), rules.FIRST_ATTACK + strike.argmax(-1), step)
    return jnp.where(alive.any(), action, rules.STAY).astype(jnp.int32)
