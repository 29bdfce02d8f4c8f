"""Ising model as a many-agent environment: every site of a torus chooses its spin and is paid for agreeing.

From the Ising task of "Mean Field Multi-Agent Reinforcement Learning" by Yang et al. (arXiv:1802.05438) and its
authors' code (https://github.com/mlii/mfrl). Action 0 is spin -1 (down), 1 is +1 (up). Site i sees
k_i in 0 .. 4, how many of its four neighbours are up, and gets

    r_i = 0.5 s_i sum_j s_j                              over the neighbours j of i

All sites move at once, which leaves two readings of s_j:

    reward_on="new"       s_j after the move, as the authors' code has it. What a site earns then depends on what its
                          neighbours do now, not on what it saw
    reward_on="observed"  s_j that the site saw, so r_i = s_i (k_i - 2) = REWARD_TABLE[k_i, action]. Values learnt from
                          it are the table, and drawing with probability softmax(table[k] / T) is heat bath:
                          P(up | k) = 1 / (1 + exp(-2 (2k - 4) / T_I)) with T_I = 2 T. So order appears below
                          T = 1.135, half of Onsager's 2.269

A move at once splits the lattice in two that never meet: what the even sites do depends on the odd ones a step before,
and these on the even ones two steps before. Each is an Ising model of its own whose rows of even and odd sites are a
step apart. Both may be ordered with opposite signs, so |m| near 0 does not mean disorder: see `magnetisation`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Integer

from jaxrepro.config import UserError
from jaxrepro.envs.multi_agent import Key, MultiAgentEnv, PerTeam
from jaxrepro.ops.checks import is_whole

REWARD_ON = ("new", "observed")
ACTIONS = 2
SMALLEST = 4  # on a torus of 2 x 2 the left and the right neighbour are one site
TEAM = "spins"
# (k, action): what a site gets that agrees or disagrees with k neighbours up of four; [k, up] = k - 2.
REWARD_TABLE = np.stack([2.0 - np.arange(5), np.arange(5) - 2.0], axis=1).astype(np.float32)


@struct.dataclass
class IsingParams:
    horizon: Any = 10_000  # steps of an episode


@struct.dataclass
class IsingState:
    spin: Any  # (n, n) int32, -1 or 1
    time: Any  # () int32, steps since the reset


class Magnetisation(NamedTuple):
    """Mean spins in -1 .. 1: of all sites, of those with an even sum of row and column, of the odd ones."""

    whole: Any
    even: Any
    odd: Any


class Ising(MultiAgentEnv):
    """One team, "spins", of n x n sites in row-major order. Nobody dies and nothing terminates.

    size: n, even and at least 4. UserError otherwise, and for an unknown reward_on.
    """

    teams = (TEAM,)

    def __init__(self, size: Any = 10, *, reward_on: str = "new"):
        if not is_whole(size) or size < SMALLEST or size % 2:
            raise UserError(
                f"size {size!r:.40}: the torus must have an even number of rows, at least {SMALLEST}; on an odd one even sites "
                "would be neighbours of even ones"
            )
        if reward_on not in REWARD_ON:
            raise UserError(f"reward_on {reward_on!r} is not one of {', '.join(REWARD_ON)}")
        self.size, self.reward_on = size, reward_on
        self.sizes = {TEAM: size * size}

    @property
    def static(self) -> tuple[Any, ...]:
        return self.size, self.reward_on

    @property
    def default_params(self) -> IsingParams:
        return IsingParams()

    def num_actions(self, team: str) -> int:
        return ACTIONS

    def reset(self, key: Key, params: IsingParams) -> tuple[PerTeam, IsingState]:
        """Every spin is a fair coin."""
        up = jax.random.bernoulli(key, 0.5, (self.size, self.size))
        state = IsingState(jnp.where(up, 1, -1).astype(jnp.int32), jnp.int32(0))
        return self.observe(state, params), state

    def observe(self, state: IsingState, params: IsingParams) -> dict[str, Integer[Array, "n"]]:
        """Neighbours that are up, (n * n,) int32 in 0 .. 4."""
        return {TEAM: (neighbour_sum(state.spin) // 2 + 2).reshape(-1)}

    def step_env(
        self, key: Key, state: IsingState, actions: PerTeam, params: IsingParams
    ) -> tuple[PerTeam, IsingState, PerTeam, PerTeam, dict[str, Any]]:
        """All sites take their spins at once; the key is not used. Inside jit, what is no action keeps the spin."""
        self.check_known(actions)
        given = actions[TEAM].reshape(state.spin.shape)
        spin = jnp.where(given == 1, 1, jnp.where(given == 0, -1, state.spin))
        around = neighbour_sum(spin if self.reward_on == "new" else state.spin)
        state = IsingState(spin, state.time + 1)
        everyone = jnp.ones(self.sizes[TEAM], bool)
        info = {
            "alive_before": {TEAM: everyone},
            "alive_after": {TEAM: everyone},
            "kills": {TEAM: jnp.int32(0)},
            "episode_over": jnp.bool_(False),
        }
        reward = (0.5 * spin * around).astype(jnp.float32).reshape(-1)
        return self.observe(state, params), state, {TEAM: reward}, {TEAM: ~everyone}, info

    def is_truncated(self, state: IsingState, params: IsingParams) -> Bool[Array, ""]:
        return state.time >= params.horizon


def neighbour_sum(spin: Integer[Array, "*b n n"]) -> Integer[Array, "*b n n"]:
    """Sum of the four neighbours of each site on the torus, -4 .. 4."""
    return sum(jnp.roll(spin, by, axis) for by in (1, -1) for axis in (-2, -1))


def magnetisation(spin: Integer[Array, "*b n n"]) -> Magnetisation:
    """Mean spins (*b,) of the whole lattice and of its even and odd sites.

    Order is |even| and |odd| near 1. They have one sign or two: the lattices that they belong to never meet.
    """
    n = spin.shape[-1]
    even = (jnp.add.outer(jnp.arange(n), jnp.arange(n)) % 2 == 0).astype(jnp.float32)
    half = n * n / 2
    m_even, m_odd = ((spin * mask).sum((-2, -1)) / half for mask in (even, 1 - even))
    return Magnetisation((m_even + m_odd) / 2, m_even, m_odd)


def heat_bath(temperature: Float[Array, "*b"] | float) -> Float[Array, "*b k a"]:
    """Probabilities (..., 5, 2) of down and up given k: softmax(REWARD_TABLE / T), T_I = 2 T of the Ising model."""
    t = jnp.asarray(temperature, jnp.float32)[..., None, None]
    return jax.nn.softmax(REWARD_TABLE / t, axis=-1)
