"""Games to look at: a GIF and a replay file (envs/replay.py) of what trained teams do."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrepro.config import UserError
from jaxrepro.envs import replay
from jaxrepro.envs.replay import Replay
from jaxrepro.methods.bmf import build, evaluation, rollout
from jaxrepro.methods.bmf.build import Parts
from jaxrepro.methods.bmf.rollout import SCRIPTS, Game


def write(s: Parts, params: Any, path: Path, *, seed: int) -> None:
    """A GIF of the first seed's team against itself."""
    replay.write_gif(path, game(s, params, build.SELF, seed))


def game(s: Parts, params: Any, opponent: str, seed: int) -> Replay:
    """A game of the first seed's team, red, against "self", "random" or "rush"; UserError for others."""
    if opponent not in (build.SELF, *SCRIPTS):
        raise UserError(
            f"--prompt={opponent!r:.40} plays nothing; {', '.join((build.SELF, *SCRIPTS))} are known"
        )
    env = build.environment(s.config, side="left")
    alike = opponent == build.SELF
    player = evaluation.learnt(params, 0)
    where = Game(env, s.plan.game.params, (s.plan.setting, s.plan.setting if alike else opponent))
    program = jax.jit(lambda who, key: rollout.film(where, who, s.plan.steps, key))
    who = (player, player if alike else None)
    states, actions, n = jax.device_get(program(who, jax.random.key(seed)))
    states = jax.tree.map(lambda x: x[: n + 1], states)
    actions = {team: np.asarray(x[:n]) for team, x in actions.items()}
    return replay.record(env, states, actions, where.params)


def sample(s: Parts, params: Any, workdir: Any, *, opponent: str, n: int, seed: int) -> list[str]:
    """n games below workdir/films, each as a GIF and a replay; returns the paths of both."""
    if n < 1:
        raise UserError(f"--n={n}: one game or more")
    found = []
    for i in range(seed, seed + n):
        played = game(s, params, opponent, i)
        folder = Path(workdir) / "films"
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, save in ((".gif", replay.write_gif), (".npz", replay.save_replay)):
            path = folder / f"{opponent}-{i}{suffix}"
            save(path, played)
            found.append(str(path))
    return found
