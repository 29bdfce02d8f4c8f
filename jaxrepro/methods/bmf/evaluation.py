"""What a trained team is worth: games against scripted players and against itself, its groups, its VAE.

`test/<opponent>/<number>` are `arena.numbers`, over the games of all seeds; `test/<opponent>/worst_win_lo` is the lower
end of the interval of the seed that won least. `test/vae/...` and `test/groups/...` are from games against itself.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrepro.methods.bmf import (
    arena,
    build,
    diagnostics,
    groups,
    learning,
    networks,
    training,
    vae,
)
from jaxrepro.methods.bmf.build import Parts
from jaxrepro.methods.bmf.rollout import Game, Learnt, episodes
from jaxrepro.train.state import step_key

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
    return results


def play(s: Parts, player: Learnt, opponent: str, seed: int) -> arena.Tally:
    """`eval.n` games of a seed's player."""
    env = build.environment(s.config, side="left")
    against = s.plan.setting if opponent == build.SELF else opponent
    game = Game(env, s.plan.game.params, (s.plan.setting, against))
    other = player if opponent == build.SELF else None
    return arena.play(game, (player, other), n=s.config.eval.n, steps=s.plan.steps, seed=seed)


def latents(s: Parts, params: Mapping[str, Any]) -> dict[str, float]:
    """Whether the VAE says anything (`vae.monitor`), and what the groups are: means over the seeds, games not learnt from."""
    program = jax.jit(partial(_latents, s.plan))
    found = [
        program(learnt(params, k), step_key(seed, "test", 0)) for k, seed in enumerate(s.seeds)
    ]
    return {name: float(jnp.stack([f[name] for f in found]).mean()) for name in found[0]}


def _latents(plan, player, key):
    keys = jax.random.split(key, 3)
    games = jax.random.split(keys[0], plan.envs)
    batch, _ = episodes(plan.game, (player, player), plan.steps, games)
    rows = training.vae_batch(player.policy, plan.setting, batch)
    seen = vae.vae_loss(player.vae, plan.setting, rows, keys[1])[1]
    # groups at t are those that step t - 1 made; just after a grouping, so that they are of what is looked at
    again = learning.second_grouping(plan)
    t, labels = again or 1, batch.groups.labels
    before = batch.view[t - 1], batch.features[t - 1], batch.action[t - 1]
    report = jax.vmap(partial(_report, plan.setting, player.vae))
    of_groups = report(*before, labels[t], labels[1], jax.random.split(keys[2], plan.envs))
    if again is None:
        del of_groups["persistence"]  # there is no second grouping
    return {f"vae/{k}": v for k, v in seen.items()} | {
        f"groups/{k}": v.mean() for k, v in of_groups.items()
    }


def _report(setting, vae_params, view, features, action, labels, first, key):
    x = networks.observation(setting, view, features)
    z = groups.latents(vae_params, setting, x, action, key)
    centre = view[:, view.shape[1] // 2, view.shape[2] // 2]
    health, place = centre[:, 2], features[:, -2:]
    return diagnostics.group_report(labels, first, z, place, health, setting.groups, key)


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
