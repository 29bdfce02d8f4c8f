"""Games that are counted: sides, ties, intervals; tournaments of trained teams; the studies of types and of collapse."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize
from scipy.stats import binomtest

from jaxrepro.config import UserError
from jaxrepro.envs.battle import OFFICIAL, Battle
from jaxrepro.methods.bmf import arena, collapse, progress, run, tournament, typed
from jaxrepro.methods.bmf.arena import Tally
from jaxrepro.methods.bmf.rollout import Game
from jaxrepro.methods.bmf.setting import of_preset

sys.path.insert(0, str(Path(__file__).parent))
import bmf_tiny as tiny


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    with tiny.small(tmp_path_factory.mktemp("programs")):
        yield


def tally(kills, losses):
    both = np.ones((len(kills), 1)) * [1, 0.5]
    return Tally(np.stack([kills, losses], 1), 2 * both, 3 * both, 4 * both, 5 * both[:, 0])


def test_shares_are_counts_and_their_intervals_are_scipys():
    found = arena.numbers(tally([3, 1, 2, 0, 5, 1], [1, 1, 4, 0, 0, 0]))
    counts = {"win": 3, "points": 4, "tie": 2}  # points: three games won, two ties
    for name, count in counts.items():
        interval = binomtest(count, 6).proportion_ci(method="wilson")
        assert found[name] == pytest.approx(count / 6)
        assert (found[f"{name}_lo"], found[f"{name}_hi"]) == pytest.approx(tuple(interval))
    assert found["margin"] == pytest.approx(1.0) and found["kills"] == 2 and found["losses"] == 1
    assert found["attack_rate"] == 0.75 and found["return"] == 2 and found["n"] == 6


def test_ties_count_half_or_as_a_win_of_both():
    one = tally([1, 0, 0], [1, 0, 2])
    assert one.points("half").sum() + one.other().points("half").sum() == 3
    assert one.points("both").sum() + one.other().points("both").sum() == 5
    np.testing.assert_array_equal(one.other().wins, [False, False, True])
    other = arena.numbers(one.other())
    assert (other["attack_rate"], other["return"]) == (0.75, 1)


def test_a_rush_beats_random_play_from_both_sides():
    env = Battle(14)
    game = Game(env, OFFICIAL.replace(horizon=80), ("rush", "random"))
    found = arena.play(game, (None, None), n=16, steps=80)
    assert found.wins[:8].mean() > 0.8 and found.wins[8:].mean() > 0.8
    lost = arena.play(game.swapped(), (None, None), n=16, steps=80)
    assert lost.wins.mean() < 0.2
    assert (found.steps <= 80).all() and (found.acted > 0).all()
    rush, random = found.attacks.sum(0) / found.acted.sum(0)
    assert random == pytest.approx(8 / 21, abs=0.05) and rush > 1.1 * random


def test_an_interval_over_teams_covers_what_both_sides_vary_by():
    """By simulation: teams have strengths of their own, so that pairs that share one are not independent."""
    rng = np.random.default_rng(0)
    inside, draws = 0, 1000
    for _ in range(draws):
        mine, theirs, pairs = (rng.normal(size=n) for n in ((5, 1), (1, 5), (5, 5)))
        found = tournament.over_teams(0.5 + 0.05 * mine + 0.05 * theirs + 0.02 * pairs)
        inside += found.lo <= 0.5 <= found.hi
    assert 0.93 < inside / draws < 0.985
    one = tournament.over_teams(
        [[0.3, 0.4, 0.5]]
    )  # one team: Student's interval of the others, t = 4.303
    half = 4.302653 * 0.1 / 3**0.5
    assert (one.lo, one.hi) == pytest.approx((0.4 - half, 0.4 + half))
    assert not tournament.over_teams([[0.5]]).resolved
    assert not tournament.over_teams(
        [[0.5, 0.5]] * 2
    ).resolved  # alike: it has not shrunk to a point


def test_an_odd_number_of_games_is_refused():
    game = Game(Battle(12), OFFICIAL, ("rush", "random"))
    with pytest.raises(UserError, match="3 games cannot be played equally often from both sides"):
        arena.play(game, (None, None), n=3, steps=5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two algorithms without groups, the first with two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    run.run(tiny.config(algorithm="ac", seeds=2, steps=1), folder / "plain")
    run.run(tiny.config(algorithm="mf_ac_plus", steps=1), folder / "mean")
    return folder


@pytest.mark.slow
def test_a_tournament_plays_every_pair_of_teams_and_writes_it(runs, tmp_path, capsys):
    words = [str(runs / "plain"), str(runs / "mean"), "rush", "--games=4"]
    assert tournament.main([*words, f"--json={tmp_path / 'out.json'}"]) == 0
    out = capsys.readouterr().out
    assert "ac against mf_ac_plus: 2 pairs of teams, 4 games each" in out
    assert "| rush |" in out and "| ac : rush |" in out
    found = json.loads((tmp_path / "out.json").read_text())
    plain, mean = str(runs / "plain"), str(runs / "mean")
    assert found["teams"] == {
        "ac": [f"{plain}#0", f"{plain}#1"],
        "mf_ac_plus": [f"{mean}#0"],
        "rush": ["rush"],
    }
    pairs = found["pairs"]
    assert len(pairs) == 6 and pairs["ac/rush"]["n"] == 8 and pairs["ac/rush"]["teams"] == 2
    for a, b in (("ac", "rush"), ("ac", "mf_ac_plus"), ("mf_ac_plus", "rush")):
        one, other = pairs[f"{a}/{b}"], pairs[f"{b}/{a}"]
        assert one["points"] + other["points"] == pytest.approx(1)
        assert (one["kills"], one["losses"]) == (other["losses"], other["kills"])
    assert pairs["rush/ac"]["kills"] >= pairs["ac/rush"]["kills"]
    assert pairs["rush/ac"]["return"] == pairs["ac/rush"]["other_return"]
    assert "| mf_ac_plus |" in out.split("games until the mean return of mf_ac_plus")[1]
    runs_of = found["reach"]["runs"]
    assert len(runs_of["ac"]["final"]) == 1 and runs_of["mf_ac_plus"]["games"] != [None]
    assert found["resolution"] == "sequential"


def lines_of(stage, returns):
    return [{"stage": stage, "step": i, "episode_return": r} for i, r in enumerate(returns, 1)]


def test_games_until_a_return_are_counted_over_both_stages_by_hand():
    rows = [
        *lines_of("vae", range(10)),
        *lines_of("policy", range(10, 20)),
        {"stage": "policy", "step": 10},
    ]
    found = progress.curve(
        rows, envs=4
    )  # means of two: .5, 1.5, ..., 18.5 after 2, 3, ..., 20 updates
    np.testing.assert_allclose(found.returns, np.arange(19) + 0.5)
    assert found.games.tolist() == [*range(8, 81, 4)] and found.final == 18.5
    assert found.reaches(0.5) == 8 and found.reaches(10.0) == 48 and found.reaches(18.6) is None
    other = progress.curve(lines_of("policy", [1.0, 3.0]), envs=1)
    assert progress.compare({"a": [found], "b": [other]}, "b") == {
        "a": {"final": [18.5], "games": [20]},
        "b": {"final": [3.0], "games": [2]},
    }
    with pytest.raises(UserError, match="no line of the metrics has episode_return"):
        progress.curve([{"stage": "policy", "step": 1, "loss": 0.0}], envs=1)


@pytest.mark.slow
def test_teams_of_different_maps_do_not_play(runs, tmp_path, capsys):
    run.run(tiny.config(algorithm="ac", steps=1, env__map_size=12), tmp_path / "other")
    assert tournament.main([str(runs / "plain"), str(tmp_path / "other")]) == 2
    assert "other#0 was trained on another map" in capsys.readouterr().err
    assert tournament.main([str(runs / "plain"), str(runs / "plain"), "rush"]) == 2
    assert "plain#0 is named twice" in capsys.readouterr().err
    again = runs / ".." / runs.name / "plain"
    assert tournament.main([str(runs / "plain"), str(again), "rush"]) == 2
    assert "plain#0 is named twice" in capsys.readouterr().err
    run.run(tiny.config(algorithm="ac", steps=2), tmp_path / "longer")
    assert tournament.main([str(runs / "plain"), str(tmp_path / "longer"), "rush"]) == 2
    assert "are both ac and differ in how they learnt" in capsys.readouterr().err
    assert tournament.main([str(runs / "plain")]) == 2
    assert "two entries or more are needed" in capsys.readouterr().err
    assert tournament.main([f"a={runs / 'plain'}", f"a={runs / 'mean'}", "rush"]) == 2
    assert "are both a and differ in how they learnt; give them names" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "rush"], "nowhere is no workdir of a run, nor one of random, rush"),
        (["random", "rush"], "only scripts are to play; name a workdir"),
        (["a/b=random", "rush"], "a/b=random: NAME of NAME=RUN must be a word without /"),
        (["=random", "rush"], "=random: NAME of NAME=RUN must be a word without /"),
    ],
)
def test_what_cannot_play_is_one_line(words, message, capsys):
    assert tournament.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_critics_reach_their_closed_forms_on_hidden_types():
    """0.75 sigma^2 + sigma_n^2 = 1 and sigma_n^2 = 0.25, by hand; random groups by the shares of their members."""
    found = typed.draw(7)
    assert found["mf/error"] == pytest.approx(1.0, rel=0.1)
    assert found["none/error"] == pytest.approx(1.25, rel=0.1)
    assert found["bilevel/error"] < 1.15 * 0.25 and found["true/error"] < 1.15 * 0.25
    assert found["random/ratio"] == pytest.approx(1.0, rel=0.15)
    assert found["random/error"] > 3 * found["bilevel/error"]
    assert found["ari"] > 0.9


@pytest.mark.slow
def test_the_official_loss_leaves_nothing_in_the_latents_of_battles():
    """The specification's bounds, of the official loss and of the repaired one; what is kept is of a linear VAE's order."""
    found = collapse.study(1000)
    assert found["collapse/official/rush/kl_per_dim"] < 1e-3
    assert found["collapse/official/rush/active_units"] == 0
    for data in ("rush", "random"):
        official, fixed = (
            found[f"collapse/{loss}/{data}/kl_per_dim"] for loss in ("official", "fixed")
        )
        assert fixed > 0.02 and official < 1e-3
        assert fixed > found[f"collapse/fixed/{data}/linear_kl_per_dim"] / 2
        assert found[f"collapse/fixed/{data}/active_units"] > 0
        assert abs(found[f"collapse/official/{data}/agreement_of_samples"]) < 0.05


def test_the_best_linear_vae_keeps_components_above_half_the_weight_of_the_kl():
    """One component of variance v, by scipy: the least v (1 - b a)^2 + b^2 s + w KL(N(a x, s)) over a, b, s."""
    rows = np.random.default_rng(0).normal(size=(500, 1)) * np.sqrt(3.0)
    v = rows.var()
    for weight in (0.5, 1.0, 4.0, 8.0):
        kl = lambda a, s: (s + a * a * v - 1 - np.log(s)) / 2

        def loss(p, weight=weight, kl=kl):
            a, b, s = p[0], p[1], np.exp(p[2])
            return v * (1 - b * a) ** 2 + b * b * s + weight * kl(a, s)

        found = optimize.minimize(loss, [0.5, 0.5, 0.0], tol=1e-12).x
        setting = of_preset("fixed", beta=weight, latent=1)
        expected = kl(found[0], np.exp(found[2]))
        assert collapse.linear_kl_per_dim(rows, setting) == pytest.approx(expected, abs=1e-3)
    official = of_preset("official", latent=1)
    assert collapse.linear_kl_per_dim(rows, official) == 0  # 500 rows: it weighs 500 times as much
