"""TypedMeanField-v0: how much an average over everybody hides, in closed form. Ours.

N agents belong to K hidden types of equal size. An agent sees the embedding of its type (R^8, fixed) under noise
N(0, 0.3^2). Each step draws m_k ~ N(0, sigma^2) for every type, the behaviour of agent i is the number a_i = m_k(i),
and its reward is the mean action of its type plus N(0, sigma_n^2), so

    a_i = m_k(i)            r_i = m_k(i) + N(0, sigma_n^2)

Every step is an episode of its own. A critic predicts r_i without seeing a_i. What mean may it see?

    a mean a = sum_k w_k m_k with shares w (sum 1):   Cov(m_k, a) = w_k sigma^2,  Var(a) = sigma^2 sum_l w_l^2
    the best predictor is linear, since all is normal: E[m_k | a] = a w_k / sum_l w_l^2
    its error:   E (r_i - E[r_i | a])^2 = sigma^2 (1 - w_k^2 / sum_l w_l^2) + sigma_n^2

    nothing                    sigma^2 + sigma_n^2
    everybody, w_k = 1/K       sigma^2 (1 - 1/K) + sigma_n^2
    the agent's own type       sigma_n^2

What the mean over everybody adds, sigma^2 (1 - 1/K), is the "aggregation noise" of mean fields; grouping removes it if
the groups are the types. `error_of_mean` and `error_of_groups` give the errors of any shares and any labels, those of
random groups and of means without the agent itself among them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Integer

from jaxrepro.config import UserError
from jaxrepro.envs.multi_agent import Key, MultiAgentEnv, PerTeam
from jaxrepro.ops.checks import whole

EMBEDDING = 8
TEAM = "agents"


@struct.dataclass
class TypedMeanFieldParams:
    obs_noise: Any = 0.3  # standard deviation in each of the 8 coordinates
    sigma: Any = 1.0  # of the types' actions
    reward_noise: Any = 0.5  # sigma_n
    horizon: Any = 1


@struct.dataclass
class TypedMeanFieldState:
    type: Any  # (N,) int32, hidden; drawn at the reset, N / K of each
    m: Any  # (K,) float32, the types' actions in this step
    noise: Any  # (N, 8) float32, of the observation, standard normal
    time: Any  # () int32


class Steps(NamedTuple):
    """Independent steps under `behaviour`, of one draw of types."""

    obs: Any  # (n, N, 8)
    action: Any  # (n, N)
    reward: Any  # (n, N)
    type: Any  # (N,) int32


class TypedMeanField(MultiAgentEnv):
    """One team, "agents", with continuous actions (N,). `behaviour` gives those that the closed forms are about.

    agents: N, a multiple of types, at least two of each. seed: of the embeddings. UserError otherwise.
    """

    teams = (TEAM,)

    def __init__(self, agents: Any = 32, types: Any = 4, *, seed: Any = 0):
        whole("agents", agents), whole("types", types), whole("seed", seed, least=0)
        if agents < 2 * types or agents % types:
            raise UserError(
                f"{agents} agents of {types} types: types are of equal size, at least two agents each; "
                f"take a multiple of {types} from {2 * types} on"
            )
        self.types, self.seed, self.sizes = types, seed, {TEAM: agents}
        self.embedding = (
            np.random.default_rng(seed).normal(size=(types, EMBEDDING)).astype("float32")
        )

    @property
    def static(self) -> tuple[Any, ...]:
        return self.sizes[TEAM], self.types, self.seed

    @property
    def default_params(self) -> TypedMeanFieldParams:
        return TypedMeanFieldParams()

    def num_actions(self, team: str) -> int:
        raise UserError(
            "TypedMeanField has continuous actions, no number of them; take behaviour(state)"
        )

    def reset(self, key: Key, params: TypedMeanFieldParams) -> tuple[PerTeam, TypedMeanFieldState]:
        """Types in random order and the first step's actions and noise."""
        of_types, of_step = jax.random.split(key)
        everybody = jnp.arange(self.sizes[TEAM], dtype=jnp.int32) % self.types
        types = jax.random.permutation(of_types, everybody)
        state = self._fresh(of_step, types, params, jnp.int32(0))
        return self.observe(state, params), state

    def _fresh(self, key, types, params, time):
        of_m, of_noise = jax.random.split(key)
        m = params.sigma * jax.random.normal(of_m, (self.types,))
        noise = jax.random.normal(of_noise, (self.sizes[TEAM], EMBEDDING))
        return TypedMeanFieldState(types, m, noise, time)

    def observe(
        self, state: TypedMeanFieldState, params: TypedMeanFieldParams
    ) -> dict[str, Float[Array, "n 8"]]:
        """The noisy embedding of each agent's type."""
        return {TEAM: jnp.asarray(self.embedding)[state.type] + params.obs_noise * state.noise}

    def behaviour(self, state: TypedMeanFieldState) -> dict[str, Float[Array, "n"]]:
        """What the agents do: a_i = m_k(i)."""
        return {TEAM: state.m[state.type]}

    def step_env(
        self, key: Key, state: TypedMeanFieldState, actions: PerTeam, params: TypedMeanFieldParams
    ) -> tuple[PerTeam, TypedMeanFieldState, PerTeam, PerTeam, dict[str, Any]]:
        """Rewards of actions (N,), and the next, independent step of the same agents."""
        of_reward, of_step = jax.random.split(key)
        everyone = jnp.ones(self.sizes[TEAM], bool)
        one = jax.nn.one_hot(state.type, self.types)
        mean = actions[TEAM] @ one / (self.sizes[TEAM] // self.types)
        reward = mean[state.type] + params.reward_noise * jax.random.normal(
            of_reward, (self.sizes[TEAM],)
        )
        state = self._fresh(of_step, state.type, params, state.time + 1)
        info = {
            "alive_before": {TEAM: everyone},
            "alive_after": {TEAM: everyone},
            "kills": {TEAM: jnp.int32(0)},
            "episode_over": jnp.bool_(True),
        }
        return self.observe(state, params), state, {TEAM: reward}, {TEAM: everyone}, info

    def is_truncated(
        self, state: TypedMeanFieldState, params: TypedMeanFieldParams
    ) -> Bool[Array, ""]:
        return state.time >= params.horizon

    def steps(self, key: Key, n: int, params: TypedMeanFieldParams) -> Steps:
        """n independent steps under `behaviour`, all of the same agents: a data set for critics."""
        of_reset, of_steps = jax.random.split(key)
        _, first = self.reset(of_reset, params)

        def one(key):
            of_state, of_step = jax.random.split(key)
            state = self._fresh(of_state, first.type, params, jnp.int32(0))
            action = self.behaviour(state)
            reward = self.step_env(of_step, state, action, params)[2]
            return self.observe(state, params)[TEAM], action[TEAM], reward[TEAM]

        return Steps(*jax.vmap(one)(jax.random.split(of_steps, n)), first.type)


def error_of_mean(
    share: Float[Array, "*b k"],
    own: Integer[Array, "*b"] | int,
    *,
    sigma: Any = 1.0,
    reward_noise: Any = 0.5,
) -> Float[Array, "*b"]:
    """Least squared error of an agent of type `own` that sees a mean with shares `share` of the types (sum 1).

    A mean over nobody (all shares 0) tells nothing. Derivation in the module's docstring.
    """
    share = jnp.asarray(share, jnp.float32)
    own = jnp.broadcast_to(jnp.asarray(own), share.shape[:-1])
    w = jnp.take_along_axis(share, own[..., None], -1)[..., 0]
    square = (share**2).sum(-1)
    explained = jnp.where(square > 0, w**2 / jnp.where(square > 0, square, 1.0), 0.0)
    return sigma**2 * (1 - explained) + reward_noise**2


def error_of_groups(
    labels: Integer[Array, "n"],
    types: Integer[Array, "n"],
    *,
    number: int,
    sigma: Any = 1.0,
    reward_noise: Any = 0.5,
    itself: bool = True,
) -> Float[Array, "n"]:
    """Least squared error of each agent that sees the mean action of its group: labels, types in 0 .. number - 1.

    It knows the group's shares of types: no critic does better from this mean. itself=False leaves the agent out of
    its own mean. The labels' values do not matter; a group is who has the same label.
    """
    same = (labels[:, None] == labels).astype(jnp.float32)
    same = same if itself else same * (1 - jnp.eye(labels.size))
    count = same @ jax.nn.one_hot(types, number)  # (n, k)
    share = count / jnp.maximum(count.sum(-1, keepdims=True), 1)
    return error_of_mean(share, types, sigma=sigma, reward_noise=reward_noise)


def error_of_global_mean(types: int, *, sigma: Any = 1.0, reward_noise: Any = 0.5) -> Any:
    """sigma^2 (1 - 1/K) + sigma_n^2: the mean over everybody, itself included."""
    return sigma**2 * (1 - 1 / types) + reward_noise**2
