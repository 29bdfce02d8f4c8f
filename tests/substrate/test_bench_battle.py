"""The benchmark of the battle: same steps for all, goals by their figures, and its peers where they are installed."""

import importlib.util

import numpy as np
import pytest

from jaxrepro.bench import _bmf_update, battle, harness


def test_goals_are_judged_on_their_device_alone():
    lines = battle.verdicts({battle.ENGINE: 1.25, battle.PETTINGZOO: 29.9}, "cpu")
    assert [line.rsplit(": ", 1)[1] for line in lines] == [
        "29.9, NOT met",
        "1.25, met",
        "not measured",
    ]
    lines = battle.verdicts({battle.ENGINE: 100.0}, "gpu")
    assert [line.rsplit(": ", 1)[1] for line in lines] == ["not measured"] * 2 + ["100, met"]
    assert all(x.endswith("not measured") for x in battle.verdicts({}, "cpu"))


def test_without_the_peers_ours_runs_alone_and_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(_bmf_update, "update", lambda shape, seeds: lambda: None)
    report = battle.bench(battle.SHAPES["trial"], 1)
    group, update = report.groups
    assert [c["case"] for c in group["cases"]] == [battle.OURS] and group["peer"] == "-"
    assert [c["case"] for c in update["cases"]] == [_bmf_update.ONE, _bmf_update.MANY]
    one, many = (c["seconds"][0] for c in update["cases"])  # a seed's share of the time
    (line,) = (x for x in report.notes if "seeds at once" in x)
    assert f"not measured ({many / one:.2f} on this cpu)" in line
    assert battle.MISSING in report.notes and report.packages == ()
    (case,) = group["cases"]
    # 2 worlds, 3 steps, 2 v 2
    np.testing.assert_allclose(case["median"], 2 * 3 * 4 / case["seconds"][0])


def test_every_step_is_observed_and_paid():
    run, n = battle.ours(battle.SHAPES["trial"])
    (obs, state), reward = run()
    assert n == 4 and obs["red"].view.shape == (2, 2, 13, 13, 7)
    assert (np.asarray(state.env.t) == 3).all()
    assert reward.shape == (3,) and (np.asarray(reward) < 0).all()
    assert (np.asarray(obs["red"].features[..., 10:31]).sum(-1) == 1).all()  # the last action


@pytest.mark.slow
def test_an_update_of_many_seeds_is_that_of_each():
    many = _bmf_update.update(_bmf_update.SHAPES["trial"], 2)()
    state, metrics = many
    assert metrics["loss"].shape == (2,) and np.isfinite(np.asarray(metrics["loss"])).all()
    assert not np.array_equal(*np.asarray(state["params"]["policy"]["actor"]["logits"]["bias"]))


@pytest.mark.oracle
def test_the_peers_take_the_steps_that_their_time_is_scaled_from(monkeypatch):
    pytest.importorskip("magent2")
    from jaxrepro.bench import _magent

    engine, wrapped = _magent.Engine(12, 5), _magent.PettingZoo(12, 5)
    assert engine.run() == wrapped.run() == 4
    assert engine.t == 5 and wrapped.world.frames == 5
    fixed = lambda cases, rounds: {n: harness.Timing(1.0, (2.0,)) for n in cases}
    monkeypatch.setattr(harness, "interleave", fixed)
    report = battle.bench(battle.SHAPES["trial"], 1)
    first, second, _ = report.groups
    # ours makes 6 steps of a world, the engine 4 and PettingZoo 3, all in 2 s
    ratios = [g["cases"][0]["ratio"]["median"] for g in (first, second)]
    assert ratios == [1.5, 2.0] and report.packages == ("magent2", "pettingzoo")
