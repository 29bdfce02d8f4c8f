"""Is the mean of a group worth what its closed form says? Critics of BMF on `TypedMeanField`, without any battle.

32 agents of 4 hidden types, sigma = 1, sigma_n = 0.5. A VAE is trained on observations alone, its posterior means are
clustered anew in every step, and critics are fitted to rewards from observation and mean field; the own action is not
among their inputs. Networks, groups and VAE are the method's own (networks.py, groups.py, vae.py), at a small size.

    arm        mean field                                     least error
    none       none                                           sigma^2 + sigma_n^2             = 1.25
    mf         mean of everybody (MF-AC+)                     sigma^2 (1 - 1/4) + sigma_n^2   = 1.00
    bilevel    of the group, and attention between groups     sigma_n^2                       = 0.25
    mixed      attention between groups alone                 sigma_n^2, if it attends to the own group
    cosine     the official code's mixture                    that of its weights; not known in closed form
    random     of random groups                               that of the random groups
    true       as bilevel, of the true types                  sigma_n^2                       = 0.25

A ratio is a critic's error on held-out steps over the least error.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrepro.envs import typed_mean_field as world
from jaxrepro.envs.typed_mean_field import Steps, TypedMeanField
from jaxrepro.methods.bmf import diagnostics, groups, networks, training, vae
from jaxrepro.methods.bmf.setting import Setting, of_preset
from jaxrepro.methods.bmf.vae import VAEBatch

AGENTS, TYPES, FEATURES = 32, 4, world.EMBEDDING
TRAIN, TEST = 2048, 1024  # steps
VAE_STEPS, STEPS, BATCH = 400, 800, 32  # updates, and steps of the world in one
VIEW = (1, 1, 1)  # the networks want a view: a single zero

_SMALL = dict(
    groups=TYPES, vae_target="state", vae_hidden=64, latent=8, hidden=64, vae_lr=3e-3, lr=3e-3, clip=0.0
)  # fmt: skip
ARMS: dict[str, Setting] = {
    "none": of_preset("fixed", algorithm="ac", **_SMALL),
    "mf": of_preset("fixed", algorithm="mf_ac_plus", **_SMALL),
    "bilevel": of_preset("fixed", **_SMALL),
    "mixed": of_preset("fixed", mf_form="mixed", **_SMALL),
    "cosine": of_preset("fixed", mf_form="mixed", inter="cosine", **_SMALL),
    "random": of_preset("fixed", algorithm="bmf_random", **_SMALL),
    "true": of_preset("fixed", **_SMALL),
}


def study(seeds: int, *, first: int = 0) -> dict[str, float]:
    """Means over `seeds` draws of types, data and networks, and the worst of them; keys "typed/<arm>/...".

    ratio, worst_ratio; deviation: the largest distance of a ratio from 1.
    """
    found = [draw(seed) for seed in range(first, first + seeds)]
    mean = lambda name: float(np.mean([f[name] for f in found]))
    results = {f"typed/{name}": mean(name) for name in found[0]}
    for arm in ARMS:
        if f"{arm}/ratio" in found[0]:
            ratios = np.array([f[f"{arm}/ratio"] for f in found])
            results[f"typed/{arm}/worst_ratio"] = float(ratios.max())
            results[f"typed/{arm}/deviation"] = float(np.abs(ratios - 1).max())
    results["typed/worst_ari"] = min(f["ari"] for f in found)
    return results


def draw(seed: int) -> dict[str, float]:
    """One draw: error, and ratio to the least error, of each arm; adjusted Rand index of the groups; KL of the VAE."""
    env = TypedMeanField(AGENTS, TYPES, seed=seed)
    params, keys = env.default_params, jax.random.split(jax.random.key(seed), 5)
    data = env.steps(keys[0], TRAIN + TEST, params)
    rewards = {"sigma": params.sigma, "reward_noise": params.reward_noise}
    learnt, seen = _fit_vae(data.obs, keys[1])
    found = {"kl_per_dim": float(seen["kl_per_dim"]), "active_units": float(seen["active_units"])}
    least = {
        "none": params.sigma**2 + params.reward_noise**2,
        "mf": world.error_of_global_mean(TYPES, **rewards),
        **dict.fromkeys(("bilevel", "mixed", "true"), params.reward_noise**2),
    }
    for arm, setting in ARMS.items():
        state = _groups(arm, setting, learnt, data, keys[2])
        if arm == "random":
            of_labels = partial(world.error_of_groups, types=data.type, number=TYPES, **rewards)
            least[arm] = float(jax.vmap(of_labels)(state.labels[TRAIN:]).mean())
        if arm == "bilevel":
            same = jax.vmap(lambda x: diagnostics.adjusted_rand(x, data.type, TYPES))
            found["ari"] = float(same(state.labels).mean())
        error = float(_fit_critic(setting, data.obs, state, data.reward, keys[3]))
        found[f"{arm}/error"] = error
        if arm in least:
            found[f"{arm}/ratio"] = error / float(least[arm])
    return found


@jax.jit
def _fit_vae(obs: Any, key: Any) -> Any:
    """A VAE of observations (n, N, 8), and `vae.monitor` of its last update."""
    setting = ARMS["bilevel"]
    begin, learn = jax.random.split(key)
    x = _flat(obs[:TRAIN]).reshape(TRAIN * AGENTS, -1)
    state = training.vae_state(vae.init_vae(begin, setting, x.shape[-1], 1), setting)
    rows = BATCH * AGENTS
    zero = jnp.zeros(rows)

    def step(state, key):
        pick, noise = jax.random.split(key)
        at = jax.random.randint(pick, (rows,), 0, len(x))
        batch = VAEBatch(x[at], zero.astype(jnp.int32), zero, zero, jnp.ones(rows, bool))
        return training.update_vae(state, setting, batch, noise)

    state, metrics = jax.lax.scan(step, state, jax.random.split(learn, VAE_STEPS))
    return state.params, {k: v[-1] for k, v in metrics.items()}


def _flat(obs):
    return jnp.concatenate([jnp.zeros((*obs.shape[:-1], 1)), obs], -1)


def _groups(arm: str, setting: Setting, learnt: Any, data: Steps, key: Any) -> Any:
    """The mean fields' state of every step: leaves (n, ...). Every step is the first of an episode."""
    labels = data.type if arm == "true" else None
    return _group(setting, learnt, data.obs, data.action, labels, key)


@partial(jax.jit, static_argnames="setting")
def _group(setting: Setting, learnt: Any, obs: Any, action: Any, labels: Any, key: Any) -> Any:
    start = groups.init_groups(setting, AGENTS, 1, 1 + FEATURES)
    everyone = jnp.ones(AGENTS, bool)

    def one(x, action, key):
        state = groups.update_groups(learnt, setting, start, 0, x, action[:, None], everyone, key)
        if labels is None:
            return state
        z = groups.latents(learnt, setting, x, action[:, None], key)
        actions, count = groups.group_means(action[:, None], labels, TYPES)
        keys = groups.group_means(z, labels, TYPES)[0]
        return state._replace(labels=labels, actions=actions, keys=keys, count=count)

    return jax.vmap(one)(_flat(obs), action, jax.random.split(key, len(obs)))


@cache
def _critic_program(setting: Setting):
    rule = optax.adam(optax.linear_schedule(setting.lr, 0.0, STEPS))

    def value(params, obs, state):
        vectors = groups.mean_field_input(params, setting, state)
        view = jnp.zeros((*obs.shape[:-1], *VIEW))
        return networks.value(params, setting, view, obs, vectors)

    def fit(obs, state, reward, key):
        begin, learn = jax.random.split(key)
        params = networks.init_policy(begin, setting, VIEW, FEATURES, 1)

        def step(carry, key):
            params, opt = carry
            at = jax.random.randint(key, (BATCH,), 0, TRAIN)
            rows = obs[at], jax.tree.map(lambda x: x[at], state)
            wrong = lambda p: ((value(p, *rows) - reward[at]) ** 2).mean()
            change, opt = rule.update(jax.grad(wrong)(params), opt)
            return (optax.apply_updates(params, change), opt), None

        start = params, rule.init(params)
        (params, _), _ = jax.lax.scan(step, start, jax.random.split(learn, STEPS))
        rest = obs[TRAIN:], jax.tree.map(lambda x: x[TRAIN:], state)
        return ((value(params, *rest) - reward[TRAIN:]) ** 2).mean()

    return jax.jit(fit)


def _fit_critic(setting: Setting, obs: Any, state: Any, reward: Any, key: Any) -> Any:
    """Held-out error of a critic."""
    return _critic_program(setting)(obs, state, reward, key)
