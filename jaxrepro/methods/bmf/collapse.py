"""Does the VAE keep its latents? Its official loss and the repaired one on observations of real battles.

The official code averages the squared error over all numbers and adds the KL up over the batch: the KL weighs as many
times more as the batch has numbers, and the posterior becomes the prior. Groups of its samples are then random. Both
losses are trained here on the same observations, at most 960, of 20 x 20 battles, with 128 hidden units, `steps` full-batch updates
each; agents rush at the enemy in 60 % of their actions and act at random in the others, or always at random.

    collapse/<loss>/<data>/kl_per_dim, active_units, variance, spread, reconstruction     `vae.monitor`
    collapse/<loss>/<data>/agreement_of_samples, agreement_of_means
        adjusted Rand index of two groupings of the same agents with other random numbers, of samples (as the official
        code clusters) and of posterior means: 0 = groups are chance. Means agree with themselves but for the starts of
        K-means, also those of a collapsed VAE: only samples tell whether the posterior says anything
    collapse/<loss>/<data>/linear_kl_per_dim
        what the best linear VAE would keep (probabilistic PCA, in closed form): see `linear_kl_per_dim`
"""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro.envs import battle_policies
from jaxrepro.envs.battle import OFFICIAL, Battle
from jaxrepro.methods.bmf import diagnostics, groups, networks, training, vae
from jaxrepro.methods.bmf.kmeans import kmeans
from jaxrepro.methods.bmf.setting import Setting, of_preset
from jaxrepro.methods.bmf.vae import VAEBatch

HIDDEN = 128
STEPS = 40  # of the battle: with 24 agents at most 960 observations of the living
RUSHING = {"rush": 0.6, "random": 0.0}  # data -> share of actions
LOSSES = {  # the input is the same, the observation alone
    "official": of_preset("official", vae_hidden=HIDDEN, vae_lr=1e-3),
    "fixed": of_preset("fixed", vae_target="state", vae_hidden=HIDDEN, vae_lr=1e-3),
}


def study(steps: int, *, seed: int = 0) -> dict[str, float]:
    """What is left of the latents after `steps` updates; keys as above."""
    keys = jax.random.split(jax.random.key(seed), 2)
    results = {}
    for data, share in RUSHING.items():
        x, alive = observations(share, keys[0])
        rows = np.asarray(x)[np.asarray(alive)]
        for loss, setting in LOSSES.items():
            found = _program(loss, steps)(x, alive, keys[1])
            found["linear_kl_per_dim"] = linear_kl_per_dim(rows, setting)
            results |= {f"collapse/{loss}/{data}/{k}": float(v) for k, v in found.items()}
    return results


def observations(share: float, key: Any) -> tuple[Any, Any]:
    """(40, 24, 1217): what agents see in a battle in which each action is a rush with chance `share`; who is alive."""
    return _record(jnp.float32(share), key)


def linear_kl_per_dim(rows: np.ndarray, setting: Setting) -> float:
    """KL to the prior, in nats a latent, of the linear VAE that is best for rows (n, d) under the loss of `setting`.

    Up to a factor the loss is |x~ - x|^2 + w KL, a Gaussian of variance w / 2: w = beta in the repaired loss, beta d n in
    the official one. Such a VAE is probabilistic PCA (Lucas et al., arXiv:1911.02469): it keeps the principal components
    whose variance v is above w / 2, with log(2 v / w) / 2 nats each, and no others.
    """
    n, d = rows.shape
    weight = setting.beta * (d * n if setting.vae_reduction == "official" else 1)
    centred = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    variances = np.linalg.svd(centred, compute_uv=False)[: setting.latent] ** 2 / n
    kept = np.maximum(2 * variances / weight, 1)
    return float(np.log(kept).sum() / 2 / setting.latent)


@jax.jit
def _record(share: Any, key: Any) -> Any:
    env = Battle(20)
    setting = LOSSES["fixed"]
    begin, play = jax.random.split(key)
    obs, state = env.reset(begin, OFFICIAL)

    def step(carry, key):
        obs, state = carry
        keys = jax.random.split(key, 6)
        actions = {}
        for i, team in enumerate(env.teams):
            rush = battle_policies.rush(env, team)(keys[2 * i], obs, state)
            other = battle_policies.random(env, team)(keys[2 * i + 1], obs, state)
            coin = jax.random.uniform(jax.random.fold_in(keys[4], i), rush.shape)
            actions[team] = jnp.where(coin < share, rush, other)
        alive = state.alive
        new, state, *_ = env.step_env(keys[5], state, actions, OFFICIAL)
        x = {team: networks.observation(setting, *obs[team]) for team in env.teams}
        return (new, state), (env.join(x), alive)

    return jax.lax.scan(step, (obs, state), jax.random.split(play, STEPS))[1]


@cache
def _program(loss: str, steps: int):
    return jax.jit(partial(_train, loss, steps))


def _train(loss: str, steps: int, x: Any, alive: Any, key: Any) -> dict[str, Any]:
    setting, rows = LOSSES[loss], x.reshape(-1, x.shape[-1])
    zero = jnp.zeros(len(rows))
    batch = VAEBatch(rows, zero.astype(jnp.int32), zero, zero, alive.reshape(-1))
    begin, learn, last, group = jax.random.split(key, 4)
    state = training.vae_state(vae.init_vae(begin, setting, x.shape[-1], 21), setting)

    def step(state, key):
        return training.update_vae(state, setting, batch, key)[0], None

    params = jax.lax.scan(step, state, jax.random.split(learn, steps))[0].params
    seen = vae.vae_loss(params, setting, batch, last)[1]
    names = "kl_per_dim", "active_units", "variance", "spread", "reconstruction"
    found = {name: seen[name] for name in names}
    for what, on in (("samples", "sample"), ("means", "mean")):
        groupings = jax.vmap(partial(_agreement, params, replace(setting, cluster_on=on)))
        same = groupings(x, alive, jax.random.split(group, len(x)))
        found[f"agreement_of_{what}"] = same.mean()
    return found


def _agreement(params, setting, x, alive, key):
    """Two groupings of one step's agents."""
    nothing = jnp.zeros(len(x), jnp.int32)

    def grouping(key):
        draw, start = jax.random.split(key)
        z = groups.latents(params, setting, x, nothing, draw)
        return kmeans(z, alive, setting.groups, start).labels

    first, second = map(grouping, jax.random.split(key))
    return diagnostics.adjusted_rand(first, second, setting.groups)
