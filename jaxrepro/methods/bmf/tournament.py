"""Trained teams against each other: `python -m jaxrepro.methods.bmf.tournament RUN RUN ...`

RUN is the workdir of a finished run (its last policy), or one of the names random, rush; NAME=RUN gives it a name, without
which it is that of its algorithm and preset. Runs of one name are one entry, whose seeds each play; they must be alike but for
their seeds. Every pair of teams plays --games games, half of them with sides swapped. A row of the table is an entry's
share of points against the column, with the 95 % interval (Wilson over games: it speaks of these trained teams). Beside
it stands an interval over teams, as if both sides' seeds were drawn anew. Kills, ties and attacks of both sides show whether
anybody fights.
With runs of mf_ac_plus, or whichever entry --reach names, a last table says after how many games each run earned what those earn at
their end (progress.py).
"""

import argparse
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.special import stdtrit

from jaxrepro import config as configuration
from jaxrepro import files, stats
from jaxrepro.config import UserError
from jaxrepro.exits import guard
from jaxrepro.methods.bmf import arena, build, evaluation, progress, run
from jaxrepro.methods.bmf.arena import Tally
from jaxrepro.methods.bmf.rollout import SCRIPTS, Game, Learnt
from jaxrepro.train import metrics

REACH = "mf_ac_plus"  # whose final return the others are to reach


class Team(NamedTuple):
    """A seed of an entry."""

    entry: str
    name: str  # of the workdir, and the seed
    player: Any  # Setting, or a script's name
    learnt: Learnt | None
    game: Any  # (environment, rewards and horizon); None of a script
    training: Any = None  # what else of its config must be alike among seeds
    identity: Any = None  # the folder, however it was named, and the seed


def load(word: str) -> list[Team]:
    """The teams of RUN or NAME=RUN, one a seed; a script's name is a team. UserError for what is neither."""
    name, named, source = word.partition("=")
    if not named or Path(word).is_dir():  # a folder's name may hold the sign
        name, source = "", word
    elif not name or "/" in name:
        raise UserError(f"{word}: NAME of NAME=RUN must be a word without /")
    if source in SCRIPTS:
        return [Team(name or source, source, source, None, None)]
    path = Path(source)
    if not (path / "config.json").is_file():
        raise UserError(f"{source} is no workdir of a run, nor one of {', '.join(SCRIPTS)}")
    config = configuration.saved(path / "config.json")
    if config.method != "bmf":
        raise UserError(f"{source} is a run of {config.method}, not of bmf")
    with config.unlocked():
        config.mesh = (1, 1, 1, 1)
    s, params = run.trained(config, path)
    entry = config.algorithm + ("" if config.preset == "fixed" else f" ({config.preset})")
    entry = name or entry
    where = build.environment(config, side="left"), s.plan.game.params
    training = {key: config[key] for key in ("steps", "envs")} | {"vae": config.vae.to_dict()}
    training["new policy"] = bool(config.init_from)  # whose VAE differs from seed to seed
    return [
        Team(
            entry,
            f"{path}#{seed}",
            s.plan.setting,
            evaluation.learnt(params, k),
            where,
            training,
            (path.resolve(), seed),
        )
        for k, seed in enumerate(s.seeds)
    ]


def rules(teams: Sequence[Team]) -> tuple[Any, Any]:
    """The environment and the rewards that all teams were trained on; UserError where they differ."""
    found = [(team.name, team.game) for team in teams if team.game is not None]
    if not found:
        raise UserError("only scripts are to play; name a workdir, which says on what map")
    for name, game in found[1:]:
        if game != found[0][1]:
            raise UserError(
                f"{name} was trained on another map, horizon or other rewards than {found[0][0]}; let runs of the same "
                "environment play"
            )
    return found[0][1]


def tournament(
    teams: Sequence[Team], *, games: int, seed: int = 0, say: Any = print
) -> dict[tuple[str, str], list[list[Tally]]]:
    """The tallies of every pair of entries in both orders, (first, second) -> a row for each team of the first."""
    env, params = rules(teams)
    entries: dict[str, list[Team]] = {}
    for team in teams:
        entries.setdefault(team.entry, []).append(team)
    for name, found in entries.items():
        identities = [team.identity for team in found]
        if twice := [team.name for team in found if identities.count(team.identity) > 1]:
            raise UserError(f"{twice[0]} is named twice; name each run once")
        learnt = lambda team: (team.player, team.training)
        if other := [team for team in found if learnt(team) != learnt(found[0])]:
            raise UserError(
                f"{found[0].name} and {other[0].name} are both {name} and differ in how they learnt; give them names, as in "
                f"{name}-a=RUN {name}-b=RUN"
            )
    if len(entries) < 2:
        raise UserError(f"all runs are {', '.join(entries)}; two entries or more are needed")
    found = {}
    for (a, mine), (b, theirs) in combinations(entries.items(), 2):
        tallies: list[Tally] = []
        for i, (x, y) in enumerate(product(mine, theirs)):  # rows of a table: mine
            where = Game(env, params, (x.player, y.player))
            learnt = x.learnt, y.learnt
            each = jax.random.fold_in(jax.random.key(seed), i)
            tallies.append(
                arena.play(
                    where,
                    learnt,
                    n=games,
                    steps=params.horizon,
                    seed=int(jax.random.bits(each) >> 1),
                )
            )
        n = len(theirs)
        found[a, b] = [tallies[i : i + n] for i in range(0, len(tallies), n)]
        found[b, a] = [[row[i].other() for row in found[a, b]] for i in range(n)]
        say(f"{a} against {b}: {len(tallies)} pairs of teams, {games} games each")
    return found


def numbers(
    found: dict[tuple[str, str], list[list[Tally]]], tie: str
) -> dict[str, dict[str, float]]:
    """{"a/b": arena.numbers of all games, attack_rate and return of both sides, and points_lo_teams, points_hi_teams}."""
    results = {}
    for (a, b), rows in found.items():
        every = arena.join([tally for row in rows for tally in row])
        result = arena.numbers(every, tie)
        result |= {"teams": float(len(rows)), "other_teams": float(len(rows[0]))}
        other = arena.numbers(every.other(), tie)
        result |= {f"other_{name}": other[name] for name in ("attack_rate", "return")}
        interval = over_teams([[tally.points(tie).mean() for tally in row] for row in rows])
        if interval.resolved:
            result |= {"points_lo_teams": interval.lo, "points_hi_teams": interval.hi}
        results[f"{a}/{b}"] = result
    return results


def over_teams(points: Any) -> stats.Interval:
    """Mean of a table, teams of one entry by teams of the other, with the 95 % interval if both were drawn anew.

    Pairs that share a team are not independent: the variance is that of the rows' means over their number and that of
    the columns' over theirs, with Welch's degrees of freedom. A side with one team adds nothing, so the interval then
    speaks about the other side alone; no interval where both have one.
    """
    x = np.asarray(points, np.float64)
    parts = [(m.var(ddof=1) / m.size, m.size - 1) for m in (x.mean(1), x.mean(0)) if m.size > 1]
    variance = sum(v for v, _ in parts)
    mean, nan = float(x.mean()), float("nan")
    if not parts:
        return stats.Interval(mean, nan, nan, 1)
    if variance == 0:  # all alike: nothing says how much others would differ
        return stats.Interval(mean, nan, nan, x.size)
    freedom = variance**2 / sum(v**2 / df for v, df in parts)
    half = float(stdtrit(freedom, (1 + stats.LEVEL) / 2) * np.sqrt(variance))
    return stats.Interval(mean, max(mean - half, 0.0), min(mean + half, 1.0), x.size)


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown: points of rows against columns, then fights."""
    names = list(dict.fromkeys(key.split("/")[0] for key in results))
    lines = [
        "| points of row against column | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for a in names:
        cells = []
        for b in names:
            row = results.get(f"{a}/{b}")
            cells.append(
                ""
                if row is None
                else f"{row['points']:.2f} [{row['points_lo']:.2f}, {row['points_hi']:.2f}]"
            )
        lines.append(f"| {a} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| pair | games | kills | reward of an agent | ties | attacks of actions | points, over teams |",
        "|---" * 7 + "|",
    ]
    for key, row in results.items():
        a, b = key.split("/")
        spread = "one team each" if row["teams"] * row["other_teams"] == 1 else "all alike"
        if "points_lo_teams" in row:
            spread = (
                f"{row['points']:.2f} [{row['points_lo_teams']:.2f}, {row['points_hi_teams']:.2f}]"
            )
        lines.append(
            f"| {a} : {b} | {row['n']:.0f} | {row['kills']:.1f} : {row['losses']:.1f} | "
            f"{row['return']:.2f} : {row['other_return']:.2f} | {row['tie']:.0%} | "
            f"{row['attack_rate']:.0%} : {row['other_attack_rate']:.0%} | {spread} |"
        )
    return "\n".join(lines)


def learning_curves(teams: Sequence[Team]) -> dict[str, list[progress.Curve]]:
    """Entry -> the curves of its workdirs, one for all seeds of a workdir; those without metrics are left out."""
    folders: dict[str, dict[Path, None]] = {}
    for team in teams:
        if team.identity and (team.identity[0] / metrics.FILE).is_file():
            folders.setdefault(team.entry, {})[team.identity[0]] = None
    return {entry: [progress.read(path) for path in found] for entry, found in folders.items()}


def command(argv: Sequence[str]) -> None:
    """Play the tournament that the words ask for, and print its table."""
    p = argparse.ArgumentParser(prog="tournament", description=__doc__.split("\n\n")[0])
    p.add_argument("runs", nargs="+", metavar="RUN", help="a workdir, random or rush")
    p.add_argument(
        "--games", type=int, default=100, help="of each pair of teams (default: %(default)s)"
    )
    p.add_argument(
        "--tie", choices=arena.TIES, default="half", help="what a tie counts (default: %(default)s)"
    )
    p.add_argument("--seed", type=int, default=0, help="of the games (default: %(default)s)")
    p.add_argument(
        "--reach",
        metavar="ENTRY",
        help=f"whose return the others are to reach (default: {REACH}, where it plays)",
    )
    p.add_argument("--json", type=Path, help="where to write all numbers")
    flags = p.parse_args(argv)
    teams = [team for source in flags.runs for team in load(source)]
    curves = learning_curves(teams)
    reach = flags.reach or (REACH if REACH in curves else None)
    if reach and reach not in curves:
        raise UserError(
            f"--reach={reach}: {', '.join(curves) or 'no entry'} learnt; name one that did"
        )
    results = numbers(tournament(teams, games=flags.games, seed=flags.seed), flags.tie)
    print("\n" + table(results))
    learnt = progress.compare(curves, reach) if reach else {}
    if learnt:
        print("\n" + progress.table(learnt, reach))
    resolution = rules(teams)[0].resolution
    if resolution != "sequential":
        print(f"\nAttacks were {resolution}: these are not MAgent2's rules.")
    if flags.json:
        teams_of = {
            name: [t.name for t in teams if t.entry == name]
            for name in dict.fromkeys(t.entry for t in teams)
        }
        files.write_json(
            flags.json,
            {
                "commit": files.commit(),
                "teams": teams_of,
                "games": flags.games,
                "tie": flags.tie,
                "resolution": resolution,
                "pairs": results,
                "reach": {"entry": reach, "runs": learnt},
            },
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command."""
    return guard(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())
