"""Token-level rewards, returns and whitening: REINFORCE++ (arXiv:2501.03262).

    r_t = [t is the last token] R - beta k1_t            k1_t = log pi_old(t) - log pi_ref(t)
    G_t = sum_{u >= t} gamma^(u - t) r_u                 gamma = 1
    A_t = (G_t - mean) / sqrt(max(var, 1e-8))            over ALL action tokens of the whole rollout batch
    loss = -min(rho_t A_t, clip(rho_t, 0.8, 1.2) A_t)    `surrogates.surrogate(clip=(0.2, 0.2))`

`whiten` sees the whole batch: call it before micro-batches are cut. Constant returns give exactly 0 by a
max == min test, since the formula alone leaves rounding noise divided by the floor of 1e-4.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrepro.rl import masks
from jaxrepro.rl.kl import kl

CLIP = (0.2, 0.2)


def token_reward(
    outcome: Float[Array, "*b"],
    lp: Float[Array, "*b t"],
    ref_lp: Float[Array, "*b t"],
    mask: Bool[Array, "*b t"],
    *,
    beta: float,
    kind: str = "k1",
    clamp: float | None = None,
) -> Float[Array, "*b t"]:
    """Outcome on the last action token, minus beta times the KL estimate on each action token.

    See "REINFORCE++" by Hu et al. (arXiv:2501.03262). `lp` is the policy that sampled. 0 where masked.
    """
    penalty = beta * kl(
        jnp.where(mask, lp, 0.0), jnp.where(mask, ref_lp, 0.0), kind=kind, clamp=clamp
    )
    return jax.lax.stop_gradient(jnp.where(masks.last(mask), outcome[..., None], 0.0) - penalty)


def return_to_go(
    reward: Float[Array, "*b t"], mask: Bool[Array, "*b t"], *, gamma: float = 1.0
) -> Float[Array, "*b t"]:
    """Discounted sum of the rewards from each action token on; masked tokens take no time and earn nothing."""

    def back(g, x):
        r, m = x
        g = jnp.where(m, r + gamma * g, g)
        return g, jnp.where(m, g, 0.0)

    time_first = (jnp.moveaxis(reward, -1, 0), jnp.moveaxis(mask, -1, 0))
    _, g = jax.lax.scan(back, jnp.zeros_like(reward[..., 0]), time_first, reverse=True)
    return jnp.moveaxis(g, 0, -1)


def whiten(
    x: Float[Array, "*b"], mask: Bool[Array, "*b"], *, floor: float = 1e-8
) -> Float[Array, "*b"]:
    """Mean 0 and (biased) variance 1 over the kept values of the whole array; 0 elsewhere."""
    count = jnp.maximum(mask.sum(), 1)
    d = jnp.where(mask, x - jnp.where(mask, x, 0.0).sum() / count, 0.0)
    var = (d * d).sum() / count
    flat = jnp.where(mask, x, -jnp.inf).max() <= jnp.where(mask, x, jnp.inf).min()
    return jnp.where(flat, 0.0, d / jnp.sqrt(jnp.maximum(var, floor)))


def reinforce_pp_advantage(
    outcome: Float[Array, "*b"],
    lp: Float[Array, "*b t"],
    ref_lp: Float[Array, "*b t"],
    mask: Bool[Array, "*b t"],
    *,
    beta: float,
    gamma: float = 1.0,
) -> Float[Array, "*b t"]:
    """Whitened return-to-go of each action token. See "REINFORCE++" by Hu et al. (arXiv:2501.03262)."""
    reward = token_reward(outcome, lp, ref_lp, mask, beta=beta)
    return whiten(return_to_go(reward, mask, gamma=gamma), mask)
