"""Games of BMF: lagged mean fields, masks, worlds that stand still, sides, and two loops that count alike."""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.envs.battle import OFFICIAL, Battle
from jaxrepro.envs.battle_rules import FIRST_ATTACK
from jaxrepro.methods.bmf import rollout
from jaxrepro.methods.bmf.rollout import Game

sys.path.insert(0, str(Path(__file__).parent))
import bmf_tiny as tiny

STEPS, GAMES = 60, 4


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    with tiny.small(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def played():
    """Games of a learner with random parameters against a rush, long enough to end."""
    s = tiny.parts(env__horizon=STEPS)
    game = dataclasses.replace(s.plan.game, players=(s.plan.setting, "rush"))
    who = tiny.learnt(s), None
    keys = jax.random.split(jax.random.key(3), GAMES)
    batch, score = jax.jit(lambda keys: rollout.episodes(game, who, STEPS, keys, 5))(keys)
    counted = jax.jit(lambda keys: rollout.scores(game, who, STEPS, keys, 5))(keys)
    return game, jax.device_get((batch, score, counted))


def test_games_end_early_and_rows_after_the_end_are_masked(played):
    _, (batch, score, _) = played
    assert (score.steps < STEPS).any(), "no game ended before the horizon: the test shows nothing"
    for e, n in enumerate(score.steps):
        assert batch.mask[0, e].all() and batch.mask[n - 1, e].any()
        assert not batch.mask[n:, e].any()


def test_a_game_that_is_over_stands_still_with_its_last_observation(played):
    _, (batch, score, _) = played
    e = int(score.steps.argmin())
    n = score.steps[e]
    assert n < STEPS
    for t in range(n, STEPS):
        np.testing.assert_array_equal(batch.view[t, e], batch.final_view[e])
        np.testing.assert_array_equal(batch.features[t, e], batch.final_features[e])
        np.testing.assert_array_equal(batch.groups.labels[t, e], batch.final_groups.labels[e])


def test_the_dead_are_masked_from_the_step_after_their_death_on(played):
    _, (batch, score, _) = played
    died = 0
    for e, n in enumerate(score.steps):
        for t in range(n - 1):
            np.testing.assert_array_equal(batch.mask[t + 1, e], batch.alive_after[t, e])
        died += int((~batch.alive_after[n - 1, e]).sum())
    assert died == score.kills[:, 1].sum() > 0


def test_a_step_sees_the_mean_actions_of_the_step_before_and_nothing_at_first(played):
    game, (batch, score, _) = played
    assert not batch.groups.actions[0].any() and (batch.groups.labels[0] == -1).all()
    for e, n in enumerate(score.steps):
        for t in range(1, n):
            labels = batch.groups.labels[t, e]
            # grouped are those alive at the start of the step before
            np.testing.assert_array_equal(labels >= 0, batch.mask[t - 1, e])
            one_hot = np.eye(game.env.num_actions("red"))[batch.action[t - 1, e]]
            for k in range(game.players[0].groups):
                mine = one_hot[labels == k]
                mean = mine.mean(0) if len(mine) else np.zeros(one_hot.shape[1])
                np.testing.assert_allclose(batch.groups.actions[t, e, k], mean, atol=1e-6)


def test_scores_are_the_sums_of_what_was_recorded(played):
    _, (batch, score, _) = played
    reward = np.where(batch.mask, batch.reward, 0).sum((0, 2))
    np.testing.assert_allclose(score.reward[:, 0], reward, rtol=1e-5)
    np.testing.assert_array_equal(score.acted[:, 0], batch.mask.sum((0, 2)))
    attacks = (batch.mask & (batch.action >= FIRST_ATTACK)).sum((0, 2))
    np.testing.assert_array_equal(score.attacks[:, 0], attacks)


def test_counting_alone_plays_the_same_games(played):
    _, (_, score, counted) = played
    for name, a, b in zip(score._fields, score, counted):
        np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=name)


def test_sides_alternate_by_the_number_of_the_game():
    s = tiny.parts()
    assert s.plan.game.env.side == "alternate"
    left = []
    for episode in range(4):
        world = rollout.begin(s.plan.game, jax.random.key(0), episode)
        x = world.state.pos[:, 0]
        half = len(x) // 2
        left.append(bool(x[:half].mean() < x[half:].mean()))
    assert left == [True, False, True, False]


@pytest.mark.slow
def test_one_group_in_the_mixed_form_plays_as_the_mean_field_of_the_team_bit_for_bit():
    changes = dict(bmf__groups=1, bmf__mf_form="mixed", bmf__inter="cosine")
    grouped, plain = tiny.parts(**changes), tiny.parts(algorithm="mf_ac_plus", **changes)
    policy, vae = tiny.learnt(grouped)
    keys = jax.random.split(jax.random.key(0), 2)
    found = []
    for s, who in ((grouped, rollout.Learnt(policy, vae)), (plain, rollout.Learnt(policy))):
        play = jax.jit(partial(rollout.episodes, s.plan.game, steps=8))
        found.append(play((who, who), keys=keys)[0])
    for name in ("view", "features", "action", "reward", "mask", "final_view"):
        a, b = (np.asarray(getattr(batch, name)) for batch in found)
        np.testing.assert_array_equal(a, b, err_msg=name)
    a, b = (batch.groups.actions for batch in found)
    np.testing.assert_array_equal(a, b)
    assert jnp.any(a != 0)


def test_a_film_has_the_states_of_the_game_from_its_start_to_its_end():
    game = Game(Battle(12), tiny.parts().plan.game.params.replace(horizon=STEPS), ("rush", "rush"))
    film = jax.jit(lambda key: rollout.film(game, (None, None), STEPS, key))
    states, actions, n = film(jax.random.key(1))
    assert 0 < n < STEPS and states.pos.shape[0] == STEPS + 1
    alive = np.asarray(states.alive[: n + 1])
    assert alive[0].all() and alive[n - 1][:2].any() and alive[n - 1][2:].any()
    assert not (alive[n][:2].any() and alive[n][2:].any()), "the last state is that of the end"
    assert set(actions) == {"red", "blue"}


def test_an_unknown_player_is_one_line():
    with pytest.raises(ValueError, match="player 'coward' is not one of random, rush"):
        Game(Battle(12), OFFICIAL, ("rush", "coward"))
