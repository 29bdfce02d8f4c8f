"""What an agent of the battle sees: a picture of its neighbourhood, a minimap, and numbers about itself.

Source: MAgent2 0.3.4, its C++ engine as executed; equal to it bit for bit.

    view      (13 y, 13 x, c) centred on the agent, cells with dx² + dy² ≤ 36, else 0. Channels:
              0 wall; 1 presence and 2 hp / 10 of the own team, then those of the other. Cells off the map are 0.
              With minimap a channel behind each hp: share of a team's agents in the bin, over the whole 13 x 13, and
              1 more in the observer's own bin, in both channels; a bin is ceil(n / 13) cells wide
    features  10 bits of the id, lowest first; last action one-hot (none before the first); last reward; x / n, y / n

One gather brings the neighbourhoods: a cell of the grid is one 32-bit code, two bits of what it is above the bits
of hp / 10, a float32 between 0 and 1 whose two upper bits are free.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrepro.envs.battle_rules import FULL_HP, NUM_ACTIONS, WALL

RADIUS = 6
VIEW = 2 * RADIUS + 1
ID_BITS = 10
RED, BLUE, STONE = 1, 2, 3  # what a cell holds
KIND = 30  # lowest bit of what it holds
_STEPS = np.arange(-RADIUS, RADIUS + 1)
DISC = _STEPS[:, None] ** 2 + _STEPS**2 <= RADIUS**2


class BattleObservation(NamedTuple):
    """What the agents of a team see; 0 for those who see nothing."""

    view: Any  # (A, 13, 13, c) float32; c = 7 with minimap, else 5
    features: Any  # (A, f) float32; f = 34, 32 (extra features alone), 2 (minimap alone) or 0


class Seen(NamedTuple):
    """A world as it is looked at. Arrays of agents are (n, ...), red first."""

    occupied: Any  # (y, x) int32
    pos: Any  # (n, 2) int32
    hp: Any  # (n,) float32
    observers: Any  # (n,) bool: who looks
    ids: Any  # (n,) int32
    action: Any  # (n,) int32, -1 before the first
    reward: Any  # (n,) float32
    killed: Any = None  # (n,) bool: off the map, yet still counted on the minimap


def bin_width(map_size: int) -> int:
    """Cells across a bin of the minimap."""
    return -(-map_size // VIEW)


def sizes(minimap: bool, extra_features: bool) -> tuple[int, int]:
    """Channels of the view and number of features."""
    return 7 if minimap else 5, (ID_BITS + NUM_ACTIONS + 1) * extra_features + 2 * minimap


def observe(
    seen: Seen, red: int, *, minimap: bool, extra_features: bool
) -> tuple[BattleObservation, BattleObservation]:
    """What red, the first `red` agents, and blue see."""
    codes = neighbourhoods(seen, red)
    shares = minimap_shares(seen, red) if minimap else None
    numbers = features(seen, minimap=minimap, extra_features=extra_features)
    found = []
    for team, part in ((RED, slice(None, red)), (BLUE, slice(red, None))):
        own_bin = None
        if minimap:
            at = seen.pos[part] // bin_width(seen.occupied.shape[-1])
            own_bin = jnp.where(seen.observers[part], at[:, 1] * VIEW + at[:, 0], -1)
        found.append(BattleObservation(view(codes[part], team, shares, own_bin), numbers[part]))
    return tuple(found)


def neighbourhoods(seen: Seen, red: int) -> Int[Array, "n 13 13"]:
    """The codes around each agent, also beyond the disc; 0 off the map, and for those who do not look."""
    n, size = len(seen.pos), seen.occupied.shape[-1]
    # as int32, whose top bit is a sign
    kind = jnp.where(jnp.arange(n) < red, RED << KIND, BLUE - 4 << KIND)
    share = jax.lax.bitcast_convert_type(jnp.maximum(_divided(seen.hp, FULL_HP), 0.0), jnp.int32)
    # wall (-2) and empty (-1) are the last two rows of the table
    table = jnp.concatenate([kind | share, jnp.array([STONE - 4 << KIND, 0])])
    # 6 cells of padding less 6 of radius: the corner of what an agent sees is its own x and y. Who does not look is
    # shown the nothing below; a mask instead would turn the copy of rows into a copy of numbers, three times as slow
    grid = jnp.pad(table[seen.occupied], [(RADIUS, RADIUS + VIEW), (RADIUS, RADIUS)])
    y = jnp.where(seen.observers, seen.pos[:, 1], size + 2 * RADIUS)
    corner = lambda x, y: jax.lax.dynamic_slice(grid, (y, x), (VIEW, VIEW))
    return jax.vmap(corner)(seen.pos[:, 0], y)


def _divided(x, by):
    # XLA multiplies by the reciprocal of what is one number for many, which rounds otherwise than the engine's
    # division. So it must look as if each x had a divisor of its own
    return x / jnp.where(jnp.isnan(x), x, jnp.asarray(by, jnp.float32))


def minimap_shares(seen: Seen, red: int) -> Float[Array, "2 13 13"]:
    """Share of its team's agents in each bin, (red and blue, y, x)."""
    size = seen.occupied.shape[-1]
    width = bin_width(size)
    grid = jnp.pad(seen.occupied, [(0, VIEW * width - size)] * 2, constant_values=WALL)
    grid = grid.reshape(VIEW, width, VIEW, width)
    count = jnp.stack([((grid >= 0) & (grid < red)).sum((1, 3)), (grid >= red).sum((1, 3))])
    if seen.killed is not None:
        at = seen.pos // width
        there = lambda axis: (at[:, axis, None] == np.arange(VIEW)).astype(jnp.int32)
        team = (np.arange(len(at)) >= red)[:, None] == np.array([False, True])
        gone = (team & seen.killed[:, None]).astype(jnp.int32)
        count += jnp.einsum("nt,ny,nx->tyx", gone, there(1), there(0))
    total = jnp.maximum(count.sum((1, 2), keepdims=True), 1)  # an army that is dead has no share
    return _divided(count.astype(jnp.float32), total)


def view(
    codes: Int[Array, "a 13 13"],
    team: int,
    shares: Float[Array, "2 13 13"] | None,
    own_bin: Int[Array, " a"] | None,
) -> Float[Array, "a 13 13 c"]:
    """The pictures of a team's agents from the codes around them. own_bin: y 13 + x, -1 = looks at nothing."""
    kind = jnp.where(DISC, jax.lax.shift_right_logical(codes, KIND), 0)
    share = jax.lax.bitcast_convert_type(codes & ((1 << KIND) - 1), jnp.float32)
    channels = [(kind == STONE).astype(jnp.float32)]
    for who in (team, RED + BLUE - team):
        channels += [(kind == who).astype(jnp.float32), jnp.where(kind == who, share, 0.0)]
        if shares is not None:
            here = own_bin[:, None, None] == np.arange(VIEW**2).reshape(VIEW, VIEW)
            looks = own_bin[:, None, None] >= 0
            channels.append(jnp.where(looks, shares[who - RED] + here, 0.0))
    return jnp.stack(channels, -1)


def features(seen: Seen, *, minimap: bool, extra_features: bool) -> Float[Array, "n f"]:
    """The numbers about each agent."""
    parts = []
    if extra_features:
        parts.append((seen.ids[:, None] >> np.arange(ID_BITS)) & 1)
        parts.append(seen.action[:, None] == np.arange(NUM_ACTIONS))
        parts.append(seen.reward[:, None])
    if minimap:
        parts.append(_divided(seen.pos.astype(jnp.float32), seen.occupied.shape[-1]))
    if not parts:
        return jnp.zeros((len(seen.pos), 0))
    numbers = jnp.concatenate([part.astype(jnp.float32) for part in parts], -1)
    return jnp.where(seen.observers[:, None], numbers, 0.0)


def tiled(seen: BattleObservation) -> Float[Array, "a 13 13 k"]:
    """The one array of MAgent2's PettingZoo interface: behind the view, each feature as a plane."""
    *plane, _ = seen.view.shape
    planes = jnp.broadcast_to(seen.features[:, None, None], (*plane, seen.features.shape[-1]))
    return jnp.concatenate([seen.view, planes], -1)
