"""A config as the parts of a run: environment, setting, mesh; everything is checked here, before anything is written."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.envs.battle import OFFICIAL, Battle, BattleParams
from jaxrepro.methods.bmf import arena, checks
from jaxrepro.methods.bmf.learning import Plan
from jaxrepro.methods.bmf.rollout import SCRIPTS, Game
from jaxrepro.methods.bmf.setting import Setting
from jaxrepro.train.state import step_key

LARGEST = 1e6  # of a reward, in size
REWARDS = {  # of config.env -> of BattleParams
    "step_reward": "step_reward",
    "dead_reward": "dead_penalty",
    "attack_reward": "attack_penalty",
    "hit_reward": "attack_opponent_reward",
    "kill_reward": "kill_reward",
}
SELF = "self"  # an opponent: the player itself


class Parts(NamedTuple):
    """What the stages of a run share."""

    config: Any
    plan: Plan
    mesh: Any
    seeds: tuple[int, ...]


def setting_of(config: Any) -> Setting:
    """The algorithmic choices of a resolved config."""
    return Setting(preset=config.preset, algorithm=config.algorithm, **config.bmf.to_dict())


def params_of(config: Any) -> BattleParams:
    """The rewards and the horizon of a config; rewards that are left out are those of the official code."""
    env = config.env
    given = {ours: env[name] for name, ours in REWARDS.items() if env[name] is not None}
    return OFFICIAL.replace(horizon=env.horizon, **given)


def environment(config: Any, side: str | None = None) -> Battle:
    """The battle of a config; side: instead of the config's."""
    env = config.env
    if env.name != "battle":
        raise UserError(f"env.name={env.name!r}: battle is the environment that there is")
    return Battle(
        env.map_size,
        minimap=env.minimap,
        extra_features=env.extra_features,
        resolution=env.resolution,
        side=env.side if side is None else side,
    )


def check(config: Any) -> None:
    """UserError for settings that can't work, before anything is read."""
    setting, v = setting_of(config), config.vae
    env = environment(config)
    least = (
        ("steps", config.steps, 0),
        ("seeds", config.seeds, 1),
        ("envs", config.envs, 1),
        ("micro_batches", config.micro_batches, 1),
        ("env.horizon", config.env.horizon, 2),
        ("vae.steps", v.steps, 0),
        ("vae.updates", v.updates, 1),
        ("vae.warmup", v.warmup, 0),
        ("vae.batch", v.batch, 0),
        ("eval.n", config.eval.n, 2),
        ("eval.horizon", config.eval.horizon, 2),
        ("typed.seeds", config.typed.seeds, 0),
        ("collapse.steps", config.collapse.steps, 0),
    )
    for name, value, low in least:
        if value < low:
            raise UserError(f"{name}={value}; use {low} or more")
    if v.batch and v.replay < v.batch:
        raise UserError(
            f"vae.replay={v.replay} holds no batch of vae.batch={v.batch}; use as many or more"
        )
    if config.envs % config.micro_batches:
        raise UserError(
            f"micro_batches={config.micro_batches} does not divide envs={config.envs}; use a divisor"
        )
    agents = min(env.sizes.values())
    if setting.grouped and setting.groups > agents:
        raise UserError(
            f"bmf.groups={setting.groups} of teams of {agents} agents; use 1 to {agents}"
        )
    if setting.grouped and not (config.env.extra_features and config.env.minimap):
        raise UserError(
            "env.minimap=false or env.extra_features=false: groups are reported by places, which are among these "
            "features; leave both true"
        )
    if unknown := sorted({*config.eval.opponents} - {*SCRIPTS}):
        raise UserError(f"eval.opponents={', '.join(unknown)}: {', '.join(SCRIPTS)} are known")
    if config.eval.tie not in arena.TIES:
        raise UserError(f"eval.tie={config.eval.tie!r}: {' or '.join(arena.TIES)}")
    if config.eval.noise and config.eval.noise < 4:
        raise UserError(
            f"eval.noise={config.eval.noise} games: a quarter of them is held out; use 4 or more, or 0 for none"
        )
    if config.eval.n % 2:
        raise UserError(
            f"eval.n={config.eval.n}: half of the games are played from each side; use an even number"
        )
    if setting.grouped and not v.steps and not config.init_from:
        raise UserError(
            f"algorithm={config.algorithm} groups agents by a VAE: set vae.steps above 0, or init_from to a run that "
            "trained one"
        )
    if setting.grouped and v.steps and v.warmup > v.steps:
        raise UserError(
            f"vae.warmup={v.warmup} of vae.steps={v.steps}: beta would never reach its value; use at most {v.steps}"
        )
    if setting.mask_id_features and not config.env.extra_features:
        raise UserError(
            "bmf.mask_id_features=true without env.extra_features: there are no bits of an index to mask; set one of the two"
        )
    for name in REWARDS:
        value = config.env[name]
        if value is not None and not abs(value) <= LARGEST:
            raise UserError(f"env.{name}={value}; a reward must be a number up to {LARGEST:g}")
    if not config.steps and config.init_from:
        raise UserError(
            f"steps=0 with init_from={config.init_from}: its VAE is there and no policy is to be trained; set steps above 0"
        )
    if not config.steps and not (setting.grouped and v.steps):
        raise UserError(
            f"steps=0 and no VAE to train for algorithm={config.algorithm}: nothing to do"
        )
    axis(sharding.abstract_mesh(config.mesh), config.seeds, config.envs)


def axis(mesh: Any, seeds: int, envs: int) -> P:
    """How (seeds, envs) lie on the mesh: by seeds where these divide, else by episodes; UserError where neither does."""
    if (parts := sharding.row_parts(mesh)) == 1:
        return P()
    rows = tuple(a for a in ("data", "fsdp") if mesh.shape[a] > 1)
    if not seeds % parts:
        return P(rows)
    if not envs % parts:
        return P(None, rows)
    raise UserError(
        f"envs={envs} episodes of seeds={seeds} do not divide over {parts} devices; use a multiple of {parts} of either"
    )


def plan_of(config: Any) -> Plan:
    """The static part of a run's updates."""
    setting = setting_of(config)
    game = Game(environment(config), params_of(config), (setting, setting))
    v = config.vae
    return Plan(
        game=game,
        setting=setting,
        steps=config.env.horizon,
        envs=config.envs,
        updates=v.updates,
        batch=v.batch,
        replay=v.replay if v.batch else 0,
        warmup=v.warmup if setting.vae_reduction == "fixed" else 0,
        micro_batches=config.micro_batches,
    )


def prepare(config: Any) -> Parts:
    """The parts of a run on the devices that are here."""
    mesh = sharding.abstract_mesh(config.mesh, devices=jax.device_count())
    axis(mesh, config.seeds, config.envs)
    seeds = tuple(range(config.seed, config.seed + config.seeds))
    return Parts(config, plan_of(config), sharding.make_mesh(config.mesh), seeds)


def looked_at(plan: Plan) -> None:
    """UserError that names the field, where the first observations hold numbers that are not finite."""
    env = plan.game.env
    obs, _ = env.reset(jax.random.key(0), plan.game.params)
    for team in env.teams:
        checks.checked(checks.finite)(**obs[team]._asdict())


def keys_of(parts: Parts, stage: str, step: Any) -> Any:
    """(seeds,) keys of a step: those of `train.state.step_key` for each seed."""
    return jax.vmap(lambda seed: step_key(seed, stage, step))(jnp.array(parts.seeds))


def state_at(parts: Parts, abstract: Any) -> Any:
    """Shardings of a state: its arrays lead with the seed, but for `step`."""
    spec = axis(parts.mesh, len(parts.seeds), parts.plan.envs)
    by_seed = NamedSharding(parts.mesh, P(*spec[:1]))
    found = jax.tree.map(lambda _: by_seed, abstract)
    return found.replace(step=NamedSharding(parts.mesh, P()))


def one(tree: Any, k: int) -> Any:
    """What seed number k of a run has."""
    return jax.tree.map(lambda x: x[k], tree)
