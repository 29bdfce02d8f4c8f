"""How soon a run learns: games until its return comes to that of another algorithm at its end.

A run's return is `episode_return` of its metrics, smoothed by a mean over the tenth of its updates that ended last. Both sides learn
in self-play, so a return is earned against an opponent of the run's own strength: it tells how runs went, not who is
stronger, which the games of a tournament tell.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrepro import config as configuration
from jaxrepro.config import UserError
from jaxrepro.methods.bmf.learning import POLICY, VAE
from jaxrepro.train import metrics

RETURN = "episode_return"


class Curve(NamedTuple):
    """The smoothed return of a run; a mean over its seeds, where it has several."""

    games: np.ndarray  # played until then, increasing
    returns: np.ndarray

    @property
    def final(self) -> float:
        return float(self.returns[-1])

    def reaches(self, target: float) -> int | None:
        """Games until the return is target or more for the first time; None where it never is."""
        found = np.flatnonzero(self.returns >= target)
        return int(self.games[found[0]]) if found.size else None


def curve(rows: Sequence[Mapping[str, Any]], envs: int) -> Curve:
    """The curve of lines of metrics: the policy learns in both stages, on `envs` games an update."""
    stages = {stage: [row for row in rows if row["stage"] == stage] for stage in (VAE, POLICY)}
    before = max((row["step"] for row in stages[VAE]), default=0)
    points = [(row["step"], row[RETURN]) for row in stages[VAE] if RETURN in row]
    points += [(before + row["step"], row[RETURN]) for row in stages[POLICY] if RETURN in row]
    if not points:
        raise UserError(f"no line of the metrics has {RETURN}; was the policy trained?")
    steps, values = np.array(points, np.float64).T
    width = max(len(values) // 10, 1)
    smooth = np.convolve(values, np.full(width, 1 / width), "valid")
    return Curve(envs * steps[width - 1 :].astype(int), smooth)


def read(workdir: Path) -> Curve:
    """The curve of a run's workdir."""
    config = configuration.saved(workdir / "config.json")
    return curve(metrics.read(workdir / metrics.FILE), config.envs)


def compare(curves: Mapping[str, Sequence[Curve]], to: str) -> dict[str, dict[str, list]]:
    """{entry: {"final": returns, "games": numbers}}, one of each a run: games until its return is the mean final one of `to`.

    None where a run never comes to it.
    """
    target = float(np.mean([c.final for c in curves[to]]))
    return {
        name: {"final": [c.final for c in found], "games": [c.reaches(target) for c in found]}
        for name, found in curves.items()
    }


def table(found: Mapping[str, Mapping[str, Sequence]], to: str) -> str:
    """Markdown of what `compare` found."""
    lines = [
        f"| entry | return at the end, by run | games until the mean return of {to} at its end |",
        "|---" * 3 + "|",
    ]
    for name, row in found.items():
        final = ", ".join(f"{x:.2f}" for x in row["final"])
        games = ", ".join("never" if n is None else str(n) for n in row["games"])
        lines.append(f"| {name} | {final} | {games} |")
    return "\n".join(lines)
