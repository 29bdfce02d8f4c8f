"""What a trained team is worth: games against scripted players and against itself, its groups, its VAE.

`test/<opponent>/<number>` are `arena.numbers`, over the games of all seeds; `test/<opponent>/worst_win_lo` is the lower
end of the interval of the seed that won least. `test/vae/...` and `test/groups/...` are from games against itself, and
so is `test/noise/...`: held-out errors of critics that see no mean field, that of the team, those of the groups.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro.methods.bmf import (
    arena,
    build,
    diagnostics,
    groups,
    learning,
    networks,
    objective,
    training,
    vae,
)
from jaxrepro.methods.bmf.build import Parts
from jaxrepro.methods.bmf.rollout import Game, Learnt, episodes
from jaxrepro.train.state import step_key

GAMES = 16  # that tell what VAE and groups are
SHOWN = ("win", "kills", "losses", "tie", "attack_rate")


def learnt(params: Mapping[str, Any], k: int) -> Learnt:
    """What seed number k of a run has learnt."""
    return Learnt(build.one(params["policy"], k), build.one(params["vae"], k))


def evaluate(s: Parts, params: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a run's parameters {"policy", "vae"}, which lead with the seed."""
    config, results = s.config, {}
    opponents = [*config.eval.opponents, *([build.SELF] if config.eval.self_play else [])]
    for opponent in opponents:
        tallies = [play(s, learnt(params, k), opponent, seed) for k, seed in enumerate(s.seeds)]
        found = arena.numbers(arena.join(tallies), config.eval.tie)
        each = [arena.numbers(tally)["win_lo"] for tally in tallies]
        if opponent != build.SELF:
            found["worst_win_lo"] = min(each)
        results |= {f"test/{opponent}/{name}": value for name, value in found.items()}
    if s.plan.setting.grouped:
        results |= {f"test/{name}": value for name, value in latents(s, params).items()}
    if s.plan.setting.grouped and config.eval.noise:
        results |= {f"test/noise/{name}": value for name, value in noise(s, params).items()}
    return results


def play(s: Parts, player: Learnt, opponent: str, seed: int) -> arena.Tally:
    """`eval.n` games of a seed's player, of at most `eval.horizon` steps."""
    env = build.environment(s.config, side="left")
    against = s.plan.setting if opponent == build.SELF else opponent
    steps = s.config.eval.horizon
    game = Game(env, s.plan.game.params.replace(horizon=steps), (s.plan.setting, against))
    other = player if opponent == build.SELF else None
    return arena.play(game, (player, other), n=s.config.eval.n, steps=steps, seed=seed)


def latents(s: Parts, params: Mapping[str, Any]) -> dict[str, float]:
    """Whether the VAE says anything (`vae.monitor`), and what the groups are, in `GAMES` games that were not learnt from.

    Means over the seeds. groups/...: of the first grouping, in the step that made it; groups/amid/...: of the groups that
    the same agents have in the middle of their game. groups/persistence is left out where no pair is left to keep.
    """
    program = jax.jit(partial(_latents, s.plan))
    found = [
        program(learnt(params, k), step_key(seed, "test", 0)) for k, seed in enumerate(s.seeds)
    ]
    found = {name: float(jnp.stack([f[name] for f in found]).mean()) for name in found[0]}
    kept = found.pop("groups/pairs_kept", 0.0)
    if found.get("groups/pairs"):
        found["groups/persistence"] = kept / found["groups/pairs"]
    return found


def _latents(plan, player, key):
    keys = jax.random.split(key, 3)
    batch, score = episodes(
        plan.game, (player, player), plan.steps, jax.random.split(keys[0], GAMES)
    )
    rows = training.vae_batch(player.policy, plan.setting, batch)
    seen = vae.vae_loss(player.vae, plan.setting, rows, keys[1])[1]
    found = {f"vae/{k}": v for k, v in seen.items()}
    report = jax.vmap(partial(_report, plan.setting, player.vae))
    middle = jnp.maximum(score.steps // 2, 1)
    for where, t in (("groups", jnp.ones_like(middle)), ("groups/amid", middle)):
        # groups at t are those that step t - 1 made or kept
        at = lambda x, t: x[t, jnp.arange(GAMES)]
        before = (at(x, t - 1) for x in (batch.view, batch.features, batch.action))
        labels = jnp.where(at(batch.mask, t - 1), at(batch.groups.labels, t), -1)
        numbers = report(*before, labels, jax.random.split(keys[2], GAMES))
        found |= {f"{where}/{k}": v.mean() for k, v in numbers.items()}
    return found | {f"groups/{k}": v for k, v in learning.pairs(plan, batch).items()}


def noise(s: Parts, params: Mapping[str, Any]) -> dict[str, float]:
    """Held-out squared errors of critics of the return (`diagnostics.aggregation_noise`), means over the seeds.

    none, team, groups: what they see beside the observation, in `eval.noise` games of a player against itself, of which
    the last quarter is held out. constant: of one number for all; variance: of the held-out returns.
    """
    games = s.config.eval.noise
    program = jax.jit(partial(_seen_and_returned, s.plan, games))
    found = []
    for k, seed in enumerate(s.seeds):
        played, critics = jax.random.split(step_key(seed, "noise", 0))
        *rows, keep = jax.device_get(program(learnt(params, k), played))
        x, team, of_groups, target = (jnp.asarray(row[keep]) for row in rows)
        held = keep.reshape(games, -1)[-(games // 4) :].sum()
        errors = diagnostics.aggregation_noise(
            critics, x, {"team": team, "groups": of_groups}, target, held_out=int(held)
        )
        found.append({**errors, "variance": target[len(target) - held :].var()})
    return {name: float(np.mean([f[name] for f in found])) for name in found[0]}


def _seen_and_returned(plan, n, player, key):
    """Rows (game, step, agent) of observation, mean of the team, vectors of groups, return; which of them count."""
    batch, _ = episodes(plan.game, (player, player), plan.steps, jax.random.split(key, n))
    setting, state = plan.setting, batch.groups
    of_groups = groups.mean_field_input(player.policy, setting, state)
    members = state.count / jnp.maximum(state.count.sum(-1, keepdims=True), 1)
    team = jnp.einsum("...g,...gn->...n", members, state.actions)[..., None, :]
    team = jnp.broadcast_to(team, of_groups[0].shape)
    nothing = jnp.zeros(batch.reward.shape)
    target = objective.returns(
        batch.reward, nothing, nothing[0], batch.mask, batch.alive_after,
        gamma=setting.gamma, bootstrap="fixed",
    )  # fmt: skip
    x = networks.observation(setting, batch.view, batch.features)
    rows = x, team, jnp.concatenate(of_groups, -1), target, batch.mask
    return [jnp.swapaxes(row, 0, 1).reshape(-1, *row.shape[3:]) for row in rows]


def _report(setting, vae_params, view, features, action, labels, key):
    x = networks.observation(setting, view, features)
    z = groups.latents(vae_params, setting, x, action, key)
    centre = view[:, view.shape[1] // 2, view.shape[2] // 2]
    health, place = centre[:, 2], features[:, -2:]
    return diagnostics.group_report(labels, z, place, health, setting.groups, key)


def lines(results: Mapping[str, float]) -> list[str]:
    """What a run says at its end."""
    found = []
    opponents = dict.fromkeys(k.split("/")[1] for k in results if k.endswith("/win"))
    for name in opponents:
        row = {k: results[f"test/{name}/{k}"] for k in SHOWN}
        low, high = (results[f"test/{name}/win_{end}"] for end in ("lo", "hi"))
        found.append(
            f"against {name}: more kills in {row['win']:.0%} [{low:.0%}, {high:.0%}] of {results[f'test/{name}/n']:.0f} "
            f"games, ties {row['tie']:.0%}, {row['kills']:.1f} : {row['losses']:.1f} killed, "
            f"attacks {row['attack_rate']:.0%} of actions"
        )
    return found
