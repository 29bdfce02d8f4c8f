"""The autoencoder that gives each agent of BMF, arXiv:2505.06706, its latent z.

    m, log s2 = encoder([x; e_a]),   z = m + s eps,   x~, a~ = decoder(z)
    L_R1 = |x~ - x|^2 - log p(a | a~),   L_KL = sum_d (s2 + m^2 - 1 - log s2) / 2
    L_R2 = ((f(x, z) - r) / gamma - sg V(s'))^2,   V(s') = 0 where the agent died
    L    = L_R1 + beta L_KL + lambda L_R2

x is an agent's flat observation, e_a its action, one-hot. `vae_target` says what is there: "state" (the official code:
x alone), "state_action", or "state_action_value" (the framework figure). How the value head is built, its division by
gamma (`r2_divide_gamma`; the figure shows none) and beta = lambda = 1 are inferred.

`vae_reduction` says how L_R1 and L_KL meet: "official" averages the squared error over agents and entries and adds
the KL over agents and latents, so that the weight of the KL grows with the batch and the posterior collapses to the
prior; "fixed" adds over entries and latents and averages over agents, both alike. `monitor` shows which of the two
happened.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxrepro.methods.bmf.layers import Dense
from jaxrepro.methods.bmf.setting import Setting

ACTIVE = 0.01  # variance over agents above which a latent's mean counts as in use

Params = Mapping[str, Any]


class VAEBatch(NamedTuple):
    """What agents saw, did and got; leaves lead with the agent, `mask` says which count."""

    x: Any  # (n, d) observation
    action: Any  # (n,) int32, or (n, actions) where actions are vectors
    reward: Any  # (n,)
    next_value: Any  # (n,) V(s'), 0 where the agent died
    mask: Any  # (n,) bool


class Encoder(nn.Module):
    """Mean and log variance of q(z | inputs)."""

    hidden: int
    latent: int

    @nn.compact
    def __call__(self, inputs):
        h = nn.relu(Dense(self.hidden, name="hidden")(inputs))
        return Dense(self.latent, name="mean")(h), Dense(self.latent, name="log_variance")(h)


class Decoder(nn.Module):
    """z to what was encoded: the observation, and logits of the action where there are any."""

    hidden: int
    outputs: int

    @nn.compact
    def __call__(self, z):
        h = nn.leaky_relu(Dense(self.hidden, name="hidden")(z), 0.01)
        return Dense(self.outputs, name="out")(h)


class ValueHead(nn.Module):
    """f(x, z): reward plus (discounted) next value."""

    hidden: int

    @nn.compact
    def __call__(self, x, z):
        h = nn.relu(Dense(self.hidden, name="hidden")(jnp.concatenate([x, z], -1)))
        return Dense(1, name="out")(h)[..., 0]


def init_vae(
    key: PRNGKeyArray, setting: Setting, observation_size: int, num_actions: int
) -> dict[str, Any]:
    """Float32 parameters {"encoder", "decoder"[, "value"]}, drawn as torch draws linear layers."""
    inputs = observation_size + (num_actions if setting.vae_target != "state" else 0)
    x, z = jnp.zeros(observation_size), jnp.zeros(setting.latent)
    keys = jax.random.split(key, 3)
    encoder = Encoder(setting.vae_hidden, setting.latent)
    params = {
        "encoder": encoder.init(keys[0], jnp.zeros(inputs))["params"],
        "decoder": Decoder(setting.vae_hidden, inputs).init(keys[1], z)["params"],
    }
    if setting.vae_target == "state_action_value":
        params["value"] = ValueHead(setting.hidden).init(keys[2], x, z)["params"]
    return params


def action_vectors(
    action: Int[Array, "*b"] | Float[Array, "*b n"], num_actions: int
) -> Float[Array, "*b n"]:
    """Actions as vectors: whole numbers become one-hot, vectors stay."""
    if jnp.issubdtype(action.dtype, jnp.integer):
        return jax.nn.one_hot(action, num_actions)
    return action


def encode(
    params: Params,
    setting: Setting,
    x: Float[Array, "*b d"],
    action: Int[Array, "*b"] | Float[Array, "*b n"],
) -> tuple[Float[Array, "*b z"], Float[Array, "*b z"]]:
    """Mean and log variance of the posterior of each agent."""
    inputs = x
    if setting.vae_target != "state":
        n = params["encoder"]["hidden"]["kernel"].shape[0] - x.shape[-1]
        inputs = jnp.concatenate([x, action_vectors(action, n)], -1)
    return Encoder(setting.vae_hidden, setting.latent).apply({"params": params["encoder"]}, inputs)


def sample(
    mean: Float[Array, "*b z"], log_variance: Float[Array, "*b z"], noise: Float[Array, "*b z"]
) -> Float[Array, "*b z"]:
    """z = m + exp(log s2 / 2) eps."""
    return mean + jnp.exp(log_variance / 2) * noise


def decode(params: Params, setting: Setting, z: Float[Array, "*b z"]) -> Float[Array, "*b o"]:
    """The observation and, where actions are encoded, the action's logits behind it."""
    outputs = params["decoder"]["out"]["bias"].shape[0]
    return Decoder(setting.vae_hidden, outputs).apply({"params": params["decoder"]}, z)


def kl_to_prior(
    mean: Float[Array, "*b z"], log_variance: Float[Array, "*b z"]
) -> Float[Array, "*b z"]:
    """KL of N(m, s2) to N(0, 1) of each latent, in nats."""
    return (jnp.exp(log_variance) + mean**2 - 1 - log_variance) / 2


def loss_sums(
    params: Params,
    setting: Setting,
    batch: VAEBatch,
    noise: Float[Array, "n z"],
    total: Float[Array, ""],
    warmth: Float[Array, ""] | float = 1.0,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Array]]:
    """(loss_sum, agents, aux) of some agents out of `total`; loss = loss_sum / agents over all of them.

    warmth: what beta is multiplied by, 0 to 1, where it rises from 0 (KL annealing, arXiv:1511.06349).
    aux: sums over agents, as `monitor` reads them. In the "official" reduction an agent's KL counts `total` times.
    """
    weight = batch.mask.astype(jnp.float32)
    kept = lambda v: jnp.where(batch.mask, v, 0)  # 0 times infinity would be no 0
    x = jnp.where(batch.mask[:, None], batch.x.astype(jnp.float32), 0)
    mean, log_variance = encode(params, setting, x, batch.action)
    z = sample(mean, log_variance, noise)
    out = decode(params, setting, z)
    size = x.shape[-1]
    squared = ((out[:, :size] - x) ** 2).sum(-1)
    kl, beta = kl_to_prior(mean, log_variance), setting.beta * warmth
    if setting.vae_reduction == "official":
        each = squared / size + beta * total * kl.sum(-1)
    else:
        each = squared + beta * kl.sum(-1)
    aux = {
        "reconstruction": squared / size,
        "kl_per_dim": kl.mean(-1),
        "variance": jnp.exp(log_variance).mean(-1),
        "latent": mean,
        "latent_square": mean**2,
    }
    if setting.vae_target != "state":
        taken = action_vectors(batch.action, out.shape[-1] - size)
        aux["action_nll"] = -(taken * jax.nn.log_softmax(out[:, size:])).sum(-1)
        each = each + aux["action_nll"]
    if setting.vae_target == "state_action_value":
        found = ValueHead(setting.hidden).apply({"params": params["value"]}, x, z) - kept(
            batch.reward
        )
        right = jax.lax.stop_gradient(kept(batch.next_value))
        if setting.r2_divide_gamma:
            found = found / setting.gamma
        aux["value_error"] = (found - right) ** 2
        each = each + setting.r2_weight * aux["value_error"]
    aux = {k: jnp.tensordot(weight, v, 1) for k, v in aux.items()}
    return (each * weight).sum(), weight.sum(), aux


def vae_loss(
    params: Params, setting: Setting, batch: VAEBatch, key: PRNGKeyArray
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """L of all agents of a batch, and `monitor`'s numbers. Pure: jit, grad, vmap it at will."""
    total = batch.mask.sum().astype(jnp.float32)
    noise = jax.random.normal(key, (*batch.mask.shape, setting.latent))
    loss, weight, aux = loss_sums(params, setting, batch, noise, total)
    n = jnp.maximum(weight, 1)
    return loss / n, monitor({k: v / n for k, v in aux.items()})


def monitor(means: Mapping[str, Array]) -> dict[str, Array]:
    """Whether the posterior still says anything, from the means over agents of `loss_sums`' aux.

    kl_per_dim: nats a latent. active_units: latents whose mean varies over agents (variance > 0.01). spread: that
    variance, averaged over latents. variance: mean s2. A collapsed posterior has kl_per_dim, spread and active_units
    near 0 and variance near 1. The others (reconstruction: squared error an entry) pass through.
    """
    spread = jnp.maximum(means["latent_square"] - means["latent"] ** 2, 0)
    found = {k: v for k, v in means.items() if k not in ("latent", "latent_square")}
    return found | {
        "active_units": (spread > ACTIVE).sum(-1).astype(jnp.float32),
        "spread": spread.mean(-1),
    }
