"""Tabular Q-learning on the Ising environment, as the authors of mean-field Q have it (arXiv:1802.05438).

    Q[i, k, a] += alpha (r - Q[i, k, a])                                    no bootstrap: an action ends its episode
    pi(a | k)  = softmax(Q[i, k] / T),   T = max(arg, 0.3 * 0.99^(floor(t / 2000) + 1))

From the code at https://github.com/mlii/mfrl. Its mean field is the neighbourhood itself, k neighbours up of four.
The decay matters only where arg is below 0.3. With rewards on the neighbours after the move Q does not converge to
`envs.ising.REWARD_TABLE`: what k promised has changed by then.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

ALPHA = 0.1


def init(sites: int, neighbours: int = 4, actions: int = 2) -> Float[Array, "n k a"]:
    """Zeros (sites, neighbours + 1, actions)."""
    return jnp.zeros((sites, neighbours + 1, actions), jnp.float32)


def temperature(t: Any, least: float = 1.0) -> Any:
    """T at step t; least: the code's argument."""
    return jnp.maximum(least, 0.3 * 0.99 ** (jnp.asarray(t) // 2000 + 1))


def act(
    key: Array, q: Float[Array, "n k a"], up: Integer[Array, "n"], temperature: Any
) -> Integer[Array, "n"]:
    """A draw from softmax(Q / T) for every site; up (n,): neighbours that are up."""
    return jax.random.categorical(key, values(q, up) / temperature).astype(jnp.int32)


def values(q: Float[Array, "n k a"], up: Integer[Array, "n"]) -> Float[Array, "n a"]:
    """Q of each site for what it sees."""
    return jnp.take_along_axis(q, up[:, None, None], axis=1)[:, 0]


def update(
    q: Float[Array, "n k a"],
    up: Integer[Array, "n"],
    action: Integer[Array, "n"],
    reward: Float[Array, "n"],
    *,
    alpha: float = ALPHA,
) -> Float[Array, "n k a"]:
    """Q after one step of all sites; up is what they saw before they acted."""
    at = jnp.arange(q.shape[0]), up, action
    return q.at[at].add(alpha * (reward - q[at]))
