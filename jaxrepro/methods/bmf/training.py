"""The updates of a BMF run: one full-batch step of the policy, one of the autoencoder. Pure; callers jit and vmap.

The gradient of each sub-network (base, actor, critic, attention) is clipped by its own norm, then Adam.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from jaxrepro.methods.bmf import networks, objective, vae
from jaxrepro.methods.bmf.objective import Trajectories
from jaxrepro.methods.bmf.setting import Setting
from jaxrepro.methods.bmf.vae import VAEBatch
from jaxrepro.train.state import State, init_state
from jaxrepro.train.step import global_norm, make_step

NOT_ZERO = 1e-6  # torch adds it to the norm that it clips by


def clip_each(limit: float | int) -> optax.GradientTransformation:
    """Scales each top-level entry of a gradient by min(1, limit / (its norm + 1e-6)); limit 0: by 1."""

    def update(grads, state, params=None):
        del params
        if not limit:
            return grads, state
        scaled = {}
        for name, part in grads.items():
            scale = jnp.minimum(1.0, limit / (global_norm(part) + NOT_ZERO))
            scaled[name] = jax.tree.map(lambda g, scale=scale: g * scale, part)
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(setting: Setting) -> optax.GradientTransformation:
    """Adam at a constant rate on gradients that are clipped by sub-network."""
    return optax.chain(clip_each(setting.clip), optax.adam(setting.lr))


def make_vae_optimizer(setting: Setting) -> optax.GradientTransformation:
    """Adam at a constant rate, nothing clipped."""
    return optax.adam(setting.vae_lr)


def policy_state(params: Any, setting: Setting) -> State:
    """The state of a policy before its first update."""
    return init_state(params, make_optimizer(setting))


def vae_state(params: Any, setting: Setting) -> State:
    """The state of an autoencoder before its first update."""
    return init_state(params, make_vae_optimizer(setting))


def update_policy(
    state: State, setting: Setting, batch: Trajectories, *, micro_batches: int = 1
) -> tuple[State, dict[str, Array]]:
    """One step on whole episodes. Metrics: those of `make_step`, and `objective.loss`'s aux as means.

    micro_batches: a divisor of the environments; less memory, the same gradient.
    """

    def loss(params, rows):
        if micro_batches > 1:
            rows = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), rows[0]), rows[1]
        episodes, final = rows
        return objective.loss(params, setting, episodes._replace(**final))

    final = {name: getattr(batch, name) for name in batch._fields if name.startswith("final_")}
    rows = batch._replace(**dict.fromkeys(final)), final
    if micro_batches > 1:  # which are cut along the first axis
        rows = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), rows[0]), final
    step = make_step(loss, make_optimizer(setting), micro_batches=micro_batches)
    return step(state, rows)


def vae_batch(params: Any, setting: Setting, batch: Trajectories) -> VAEBatch:
    """What the autoencoder learns from: every (step, environment, agent) as a row; params: of the policy."""
    flat = lambda x: x.reshape(-1, *x.shape[3:])
    if setting.vae_target == "state_action_value":
        after = objective.next_values(params, setting, batch)
    else:
        after = jnp.zeros(batch.mask.shape)
    x = networks.observation(setting, batch.view, batch.features)
    return VAEBatch(*map(flat, (x, batch.action, batch.reward, after, batch.mask)))


def update_vae(
    state: State,
    setting: Setting,
    batch: VAEBatch,
    key: PRNGKeyArray,
    *,
    warmth: Array | float = 1.0,
    micro_batches: int = 1,
) -> tuple[State, dict[str, Array]]:
    """One step on all rows of a batch. Metrics: those of `make_step` and `vae.monitor`.

    warmth: of beta, as `vae.loss_sums` has it.
    micro_batches: a divisor of the rows; less memory, the same gradient, with the same noise.
    """
    total = batch.mask.sum().astype(jnp.float32)
    noise = jax.random.normal(key, (*batch.mask.shape, setting.latent))
    rows = batch, noise, total, jnp.asarray(warmth, jnp.float32)

    def loss(params, rows):
        return vae.loss_sums(params, setting, *rows)

    step = make_step(loss, make_vae_optimizer(setting), micro_batches=micro_batches)
    state, metrics = step(state, rows)
    return state, vae.monitor(metrics)
