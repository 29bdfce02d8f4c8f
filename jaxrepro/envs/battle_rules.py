"""The rules of MAgent2's battle, resolved for all agents at once: attacks, moves, and where the armies start.

Source: MAgent2 0.3.4 (https://github.com/Farama-Foundation/MAgent2), its C++ engine as executed. The engine goes
through the agents one after another; that order defines the results here, bit for bit, but nothing here loops over
agents. Both phases are well-founded: what happens to an agent depends only on agents that came before it. So

    attacks   death[v] = place of the hit that kills v = f(death)[v]; an attacker acts if death[it] is later than its place
    moves     moved[i] = g(moved)[i], from agents with a lower index that want i's target or stand on it

have one fixed point each, and iterating f or g from any start reaches it: after r rounds everything that hangs on
chains of at most r events is final. A round is a few gathers; most steps need two to five.

An array of agents lists both teams, red first. x is the column, y the row; a cell is y n + x.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrepro.config import UserError
from jaxrepro.ops.checks import is_whole

FULL_HP, DAMAGE, RECOVERY = 10.0, 2.0, 0.1
LEAST_MAP = 12
EMPTY, WALL = -1, -2  # of the occupancy grid; others are indices of agents
NEVER = np.iinfo(np.int32).max  # place of a hit that does not come
PLACE_BITS = 26  # of a place in the order of attackers: beside 5 bits of an action in an int32

MOVES = np.array(  # (dx, dy) of actions 0 to 12: the disc of radius 2, row by row
    [(x, y) for y in range(-2, 3) for x in range(-2, 3) if x * x + y * y <= 4], np.int32
)
ATTACKS = np.array(  # of actions 13 to 20: the eight neighbours, row by row
    [(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1) if (x, y) != (0, 0)], np.int32
)
STAY, FIRST_ATTACK, NUM_ACTIONS = 6, len(MOVES), len(MOVES) + len(ATTACKS)
OFFSETS = np.concatenate([MOVES, ATTACKS])


def start(map_size: Any) -> tuple[np.ndarray, np.ndarray]:
    """Cells (x, y) of the left and of the right army, (A, 2) int32 each; UserError for a map that is too small."""
    n = map_size
    if not is_whole(n) or n < LEAST_MAP:
        raise UserError(f"map_size={n!r:.40}: map_size ≥ {LEAST_MAP}, a whole number, is needed")
    side = 2 * int((0.04 * n * n) ** 0.5)
    rows = range((n - side) // 2, (n - side) // 2 + side, 2)
    armies = []
    for first in (n // 2 - 3 - side, n // 2 + 3):
        columns = range(first, first + side, 2)
        cells = [(x, y) for x in columns for y in rows if 0 < x < n - 1 and 0 < y < n - 1]
        armies.append(np.array(cells, np.int32))
    left, right = armies
    return left, right[: len(left)]


def walls(map_size: int) -> np.ndarray:
    """(n, n) int32 occupancy grid without agents: `WALL` on the border ring, else `EMPTY`."""
    grid = np.full((map_size, map_size), WALL, np.int32)
    grid[1:-1, 1:-1] = EMPTY
    return grid


def occupancy(pos: Int[Array, "n 2"], alive: Bool[Array, " n"], map_size: int) -> Array:
    """(n, n) int32: who stands where, `EMPTY` or `WALL`."""
    cell = jnp.where(alive, pos[:, 1] * map_size + pos[:, 0], map_size * map_size)
    grid = jnp.asarray(walls(map_size)).reshape(-1)
    who = jnp.arange(len(pos), dtype=jnp.int32)
    return grid.at[cell].set(who, mode="drop").reshape(map_size, map_size)


class Attacks(NamedTuple):
    """What the attacks of a step did; (n,) each."""

    hp: Array  # float32, after all hits; negative where it killed
    died: Array  # bool, in this step
    acted: Array  # bool: swung, at whatever, before it may have died
    hit: Array  # bool: a blow that its victim survived
    killed: Array  # bool: the blow that killed


def attack(
    pos: Int[Array, "n 2"],
    hp: Float[Array, " n"],
    alive: Bool[Array, " n"],
    occupied: Int[Array, "y x"],
    action: Int[Array, " n"],
    place: Int[Array, " n"],
    red: int,
    *,
    simultaneous: bool = False,
) -> Attacks:
    """Attacks one after another, by `place`.

    action: `STAY` for the dead and for whatever is no action. place: distinct, of `PLACE_BITS` bits; lower strikes
    first. red: the first so many agents are one team. A blow costs 2 hp and kills where hp falls below 0; the dead
    strike no more and blows on their cell meet nothing. simultaneous: an agent strikes although it is killed by an
    earlier blow of the step; the first round then is the last.
    """
    n, size = len(pos), occupied.shape[-1]
    grid = occupied.reshape(-1)
    cell = pos[:, 1] * size + pos[:, 0]
    back = ATTACKS[:, 1] * size + ATTACKS[:, 0]
    team = jnp.arange(n) >= red
    # who strikes at each agent: the eight cells around it, (n, 8); the dead keep a place that is on the map
    near = jnp.take(grid, cell[:, None] - back, mode="clip")
    who = jnp.maximum(near, 0)
    code = jnp.where(action >= FIRST_ATTACK, place * 32 + action, 0)[who]  # one gather for both
    strikes = (near >= 0) & (code % 32 == np.arange(FIRST_ATTACK, NUM_ACTIONS))
    strikes &= alive[:, None] & (team[who] != team[:, None])
    when = jnp.where(strikes, code // 32, NEVER)
    hps = [hp]  # after 0, 1, ... blows, subtracted one by one as float32 wants it
    for _ in range(len(ATTACKS)):
        hps.append(hps[-1] - DAMAGE)
    needed = sum((h >= 0).astype(jnp.int32) for h in hps[1:]) + 1
    earlier = when[:, None, :] < when[:, :, None]

    def deaths(death):
        acts = strikes & (when < death[who])
        before = (earlier & acts[:, None, :]).sum(-1)
        fatal = acts & (before + 1 == needed[:, None])
        return jnp.where(fatal, when, NEVER).min(-1), acts

    def again(carry):
        death, _ = carry
        new, _ = deaths(death)
        return new, jnp.any(new != death)

    # a first round outside: where nobody dies, there is no loop at all
    never = jnp.full(n, NEVER, jnp.int32)
    death, _ = deaths(never)
    if simultaneous:
        fall = never  # when each agent stops to strike
    else:
        death, _ = jax.lax.while_loop(lambda c: c[1], again, (death, jnp.any(death != never)))
        fall = death
    _, acts = deaths(fall)
    blows = (acts & (when <= death[:, None])).sum(-1)
    left = hps[0]
    for k, h in enumerate(hps[1:], 1):
        left = jnp.where(blows >= k, h, left)

    acted = (action >= FIRST_ATTACK) & (place < fall)
    aim = jnp.asarray(OFFSETS)[action]
    target = jnp.take(grid, cell + aim[:, 1] * size + aim[:, 0], mode="clip")
    victim = jnp.maximum(target, 0)
    enemy = acted & (target >= 0) & (team[victim] != team)
    end = death[victim]
    return Attacks(left, death != NEVER, acted, enemy & (end > place), enemy & (end == place))


def move(
    pos: Int[Array, "n 2"],
    alive: Bool[Array, " n"],
    occupied: Int[Array, "y x"],
    action: Int[Array, " n"],
) -> Int[Array, "n 2"]:
    """Moves one after another, by index; where everyone stands then.

    A move is legal if its target is inside the ring of walls and empty at that moment; it jumps over others. occupied:
    at the start of the step; `alive` says who still stands there.
    """
    n, size = len(pos), occupied.shape[-1]
    grid = occupied.reshape(-1)
    index = jnp.arange(n, dtype=jnp.int32)
    aim = pos + jnp.asarray(OFFSETS)[action]
    wants = alive & (action < FIRST_ATTACK) & (action != STAY)
    wants &= ((aim > 0) & (aim < size - 1)).all(-1)
    target = jnp.where(wants, aim[:, 1] * size + aim[:, 0], -1 - index)  # else a cell of its own
    here = jnp.take(grid, target, mode="clip")
    blocker = jnp.maximum(here, 0)
    free = (here < 0) | ~alive[blocker]
    follows = wants & (blocker < index)
    # who else may want the target: those within a move of it
    around = np.delete(MOVES, STAY, 0)
    near = jnp.take(grid, target[:, None] - (around[:, 1] * size + around[:, 0]), mode="clip")
    rival = jnp.maximum(near, 0)
    rivals = (near >= 0) & (rival < index[:, None]) & (target[rival] == target[:, None])

    def again(carry):
        moved, _ = carry
        new = (free & wants) | (follows & moved[blocker])
        new &= ~(rivals & moved[rival]).any(-1)
        return new, jnp.any(new != moved)

    moved, _ = jax.lax.while_loop(lambda c: c[1], again, (free & wants, jnp.any(wants)))
    return jnp.where(moved[:, None], aim, pos)
