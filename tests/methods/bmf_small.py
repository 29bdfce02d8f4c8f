"""Helper: small BMF settings and random episodes in which agents die, grouped as in a run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro.methods.bmf import groups, networks, vae
from jaxrepro.methods.bmf.objective import Trajectories
from jaxrepro.methods.bmf.setting import Setting, of_preset

VIEW, FEATURES, ACTIONS, AGENTS, ENVS, STEPS = (3, 3, 2), 12, 5, 7, 2, 6
SIZE = 18 + FEATURES
SMALL = dict(hidden=6, vae_hidden=10, latent=3, attention_dim=4, groups=3, group_interval=2)


def small(preset: str = "fixed", **changes) -> Setting:
    return of_preset(preset, **(SMALL | changes))


@functools.lru_cache
def _policy(setting):
    make = lambda key: networks.init_policy(key, setting, VIEW, FEATURES, ACTIONS)
    return jax.eval_shape(make, jax.random.key(0))


@functools.lru_cache
def _vae(target):
    make = lambda key: vae.init_vae(key, small(vae_target=target), SIZE, ACTIONS)
    return jax.eval_shape(make, jax.random.key(0))


@functools.lru_cache
def params_of(setting: Setting, seed: int = 0):
    """(policy, VAE) parameters, drawn by numpy: to compile a draw for each leaf takes seconds."""
    shape = dict(mf_form=setting.mf_form, hidden=setting.hidden, inter="cosine")
    if setting.algorithm in ("ac", "mf_ac"):
        shape["algorithm"] = setting.algorithm
    elif setting.attends:
        shape |= dict(inter="attention", attention_key=setting.attention_key)
    rng = np.random.default_rng(seed)
    draw = lambda s: jnp.asarray(rng.uniform(-0.4, 0.4, s.shape), jnp.float32)
    return jax.tree.map(draw, (_policy(small(**shape)), _vae(setting.vae_target)))


def rolled(setting: Setting, vae_params, view, features, action, alive, key):
    """The group states before each step, and after the last, of one environment."""
    x = networks.observation(setting, view, features)
    first = groups.init_groups(setting, alive.shape[1], ACTIONS, SIZE)

    def step(state, row):
        t, x, a, m = row
        new = groups.update_groups(
            vae_params, setting, state, t, x, a, m, jax.random.fold_in(key, t)
        )
        return new, state

    last, seen = jax.lax.scan(step, first, (jnp.arange(len(x)), x, action, alive))
    return seen, last


@functools.lru_cache
def episodes(setting: Setting, seed: int = 0) -> Trajectories:
    """Two environments; agents die one after another, in the second one all but one group's worth."""
    rng = np.random.default_rng(seed)
    shape = (STEPS, ENVS, AGENTS)
    death = rng.integers(2, 2 * STEPS, size=(ENVS, AGENTS))
    death[0, :2] = 0, 2 * STEPS  # one dies in the first step, one lives
    death[1] = [2 * STEPS] * 2 + [3] * (AGENTS - 2)  # two survivors: fewer than groups
    end = [STEPS, STEPS - 1]  # the second episode ends a step early
    t = np.arange(STEPS)[:, None, None]
    mask = (t <= death) & (t < np.array(end)[:, None])
    alive_after = t < death
    numbers = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    view, features = numbers(STEPS + 1, *shape[1:], *VIEW), numbers(STEPS + 1, *shape[1:], FEATURES)
    action = jnp.asarray(rng.integers(0, ACTIONS, shape), jnp.int32)
    alive = jnp.asarray(t <= death)
    key = jax.random.split(jax.random.key(seed), ENVS)
    seen, last = jax.jit(
        jax.vmap(functools.partial(rolled, setting), in_axes=(None, 1, 1, 1, 1, 0), out_axes=(1, 0))
    )(params_of(setting)[1], view[:-1], features[:-1], action, alive, key)
    return Trajectories(
        view[:-1], features[:-1], action, numbers(*shape), jnp.asarray(mask),
        jnp.asarray(alive_after), seen, view[-1], features[-1], last,
    )  # fmt: skip
