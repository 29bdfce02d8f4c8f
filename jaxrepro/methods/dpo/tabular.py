"""A policy without a network: one logit an answer. Here a loss's optimum is known exactly.

    pi*(y) proportional to ref(y) exp(r(y) / beta)                  DPO, arXiv:2305.18290 eq. 4, at the optimum

Descent on the expected loss over all ordered pairs, each weighted by ref(y_1) ref(y_2) and the
probability that y_1 is preferred: infinitely much data, and no sampling error.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


class Table(NamedTuple):
    """Log-probabilities of the reference and rewards of the answers to one prompt."""

    ref: Float[Array, "a"]
    reward: Float[Array, "a"]


def optimum(table: Table, beta: float) -> Float[Array, "a"]:
    """The distribution that maximises E r - beta KL(pi || ref)."""
    return jax.nn.softmax(table.ref + table.reward / beta)


def bradley_terry(table: Table) -> Float[Array, "a a"]:
    """P(row beats column)."""
    return jax.nn.sigmoid(table.reward[:, None] - table.reward)


def fit(
    loss: Callable,
    table: Table,
    preference: Float[Array, "a a"],
    *,
    steps: int = 3000,
    lr: float = 0.1,
) -> Float[Array, "a"]:
    """The distribution after `steps` of Adam from the reference, the rate falling to 0 along a cosine.

    loss(p, q) -> (n,): per-pair losses of log-probabilities p, q (n, 2) of policy and reference, column 0
    the chosen answer. preference: P(row beats column). Adam, because losses differ in scale by orders.
    """
    a = table.ref.shape[0]
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(a), jnp.arange(a), indexing="ij"), -1).reshape(-1, 2)
    ref = jax.nn.log_softmax(table.ref)
    weight = (jnp.exp(ref[:, None] + ref) * preference * (1 - jnp.eye(a))).reshape(-1)

    def expected(logits):
        p = jax.nn.log_softmax(logits)
        return jnp.sum(weight * loss(p[pairs], ref[pairs]))

    rule = optax.adam(optax.cosine_decay_schedule(lr, steps), eps=1e-12)

    def step(_, carry):
        logits, opt = carry
        updates, opt = rule.update(jax.grad(expected)(logits), opt)
        return optax.apply_updates(logits, updates), opt

    return jax.nn.softmax(jax.lax.fori_loop(0, steps, step, (ref, rule.init(ref)))[0])


def total_variation(p: Float[Array, "a"], q: Float[Array, "a"]) -> Float[Array, ""]:
    """Half the sum of absolute differences."""
    return 0.5 * jnp.abs(p - q).sum()


def entropy(p: Float[Array, "a"]) -> Float[Array, ""]:
    """In nats."""
    return -jnp.sum(jax.scipy.special.xlogy(p, p))


def kl(p: Float[Array, "a"], q: Float[Array, "a"]) -> Float[Array, ""]:
    """KL(p || q) in nats."""
    return jnp.sum(jax.scipy.special.xlogy(p, p) - p * jnp.log(q))
