"""Games between players that have learnt: played on both sides, counted, with intervals.

A game is won by who has killed more. Each half of the games is played from the other side, red moves first.
"""

from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np

from jaxrepro import stats
from jaxrepro.config import UserError
from jaxrepro.methods.bmf import rollout
from jaxrepro.methods.bmf.rollout import Game, Learnt

TIES = ("half", "both")  # what a tie counts as: half a game, or a game won by both


class Tally(NamedTuple):
    """Games of a player against another: numpy arrays, (games,), or (games, 2) of the player and of the other."""

    killed: np.ndarray  # agents that each killed
    reward: np.ndarray  # of an agent
    attacks: np.ndarray
    acted: np.ndarray
    steps: np.ndarray  # (games,)

    @property
    def kills(self) -> np.ndarray:
        return self.killed[:, 0]

    @property
    def losses(self) -> np.ndarray:
        return self.killed[:, 1]

    @property
    def wins(self) -> np.ndarray:
        return self.kills > self.losses

    @property
    def ties(self) -> np.ndarray:
        return self.kills == self.losses

    def points(self, tie: str = "half") -> np.ndarray:
        """1 for a game that is won, for a tie 0.5 ("half") or 1 ("both"; points of both sides then add up to more
        than 1, as in the mean-field authors' evaluation)."""
        return self.wins + self.ties * {"half": 0.5, "both": 1.0}[tie]

    def other(self) -> "Tally":
        """The same games from the other side."""
        return Tally(*(x[:, ::-1] if x.ndim > 1 else x for x in self))


def join(tallies: list[Tally]) -> Tally:
    """All games of several tallies."""
    return Tally(*map(np.concatenate, zip(*tallies)))


@lru_cache(maxsize=64)
def _program(game: Game, steps: int):
    return jax.jit(lambda learnt, keys: rollout.scores(game, learnt, steps, keys))


def play(
    game: Game,
    learnt: tuple[Learnt | None, Learnt | None],
    *,
    n: int,
    steps: int,
    seed: int = 0,
) -> Tally:
    """n games of the first player against the second, half of them with sides swapped. n: an even number."""
    if n < 2 or n % 2:
        raise UserError(
            f"{n} games cannot be played equally often from both sides; use an even number"
        )
    key = jax.random.key(seed)
    halves = (game, learnt, 0), (game.swapped(), learnt[::-1], 1)
    found = []
    for side, (where, who, own) in enumerate(halves):
        keys = jax.random.split(jax.random.fold_in(key, side), n // 2)
        score = jax.device_get(_program(where, steps)(who, keys))
        mine = slice(None, None, -1) if own else slice(None)  # the player first
        agents = np.array([game.env.sizes[team] for team in game.env.teams])
        both = score.kills, score.reward / agents, score.attacks, score.acted
        found.append(Tally(*(x[:, mine] for x in both), score.steps))
    return join(found)


def numbers(tally: Tally, tie: str = "half") -> dict[str, float]:
    """Shares with 95 % intervals (Wilson) and means.

    win: share of games with more kills than the other side; points: with ties counted as `tie` says; attack_rate: share
    of actions that are attacks, which is near 0 where armies keep apart.
    """
    n, points = tally.kills.size, tally.points(tie)
    found = {"n": float(n)}
    for name, x in (("win", tally.wins), ("points", points), ("tie", tally.ties)):
        interval = stats.wilson(float(x.sum()), n)
        found |= {name: interval.mean, f"{name}_lo": interval.lo, f"{name}_hi": interval.hi}
    found |= {name: float(getattr(tally, name).mean()) for name in ("kills", "losses", "steps")}
    margin = stats.student_t((tally.kills - tally.losses).astype(float))
    found |= {"margin": margin.mean, "margin_lo": margin.lo, "margin_hi": margin.hi}
    found["return"] = float(tally.reward[:, 0].mean())
    found["attack_rate"] = float(tally.attacks[:, 0].sum() / max(tally.acted[:, 0].sum(), 1))
    return found
