"""The battle: golden values of MAgent2 0.3.4, duels by hand, and equality with one that plays agent after agent."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battle_serial import Serial, minstd_shuffle, rushing

from jaxrepro.config import UserError
from jaxrepro.envs.battle import OFFICIAL, Battle, BattleParams
from jaxrepro.envs.battle_rules import occupancy

KEY = jax.random.key(0)
REWARDS = dataclasses.asdict(OFFICIAL)


@cache
def world(map_size, **options):
    """An environment with its compiled reset and step; attack_order is data."""
    env = Battle(map_size, **options)
    step = lambda key, state, actions, params, order: env.step_env(
        key, state, env.split(actions), params, order
    )
    return env, jax.jit(env.reset), jax.jit(step)


def begin(map_size, **options):
    env, reset, step = world(map_size, **options)
    return env, reset(KEY, OFFICIAL)[1], step


def placed(env, state, cells, **fields):
    """The state with agents at cells {index: (x, y)}; all others are dead."""
    pos, alive = np.array(state.pos), np.zeros(env.num_agents, bool)
    for i, cell in cells.items():
        pos[i], alive[i] = cell, True
    fields = {"pos": jnp.asarray(pos), "alive": jnp.asarray(alive)} | fields
    occupied = occupancy(fields["pos"], fields["alive"], env.map_size)
    return state.replace(occupied=occupied, **fields)


def actions(env, chosen, rest=6):
    out = np.full(env.num_agents, rest, np.int32)
    for i, a in chosen.items():
        out[i] = a
    return jnp.asarray(out)


@pytest.mark.parametrize(
    "n, red, blue, at",
    [
        (40, [232, 1316, 1316, 128, 0, 0, 128], [168, 1316, 1316, 128, 0, 0, 128], [(12.8, 30.4), (48.0, 30.4)]),
        (20, [119, 132, 132, 24, 0, 0, 24], [87, 132, 132, 24, 0, 0, 24], [(1.8, 5.4), (9.0, 5.4)]),
    ],
)  # fmt: skip
def test_a_reset_has_the_sums_of_magent2(n, red, blue, at):
    env, reset, _ = world(n)
    obs, _ = reset(KEY, OFFICIAL)
    for team, want, where in zip(env.teams, (red, blue), at):
        np.testing.assert_allclose(obs[team].view.sum((0, 1, 2)), want, rtol=1e-6)
        np.testing.assert_allclose(obs[team].features[:, -2:].sum(0), where, rtol=1e-6)


# as MAgent2 0.3.4 places them
@pytest.mark.parametrize(
    "n, size", [(12, 2), (20, 12), (28, 25), (40, 64), (45, 81), (64, 144), (80, 256)]
)
def test_armies_have_the_size_of_magent2(n, size):
    assert Battle(n).sizes == {"red": size, "blue": size}


def test_three_moves_and_seven_volleys_have_the_numbers_of_magent2():
    env, state, step = begin(20)
    both = lambda red, blue: jnp.repeat(jnp.array([red, blue], jnp.int32), 12)
    order = jnp.arange(24)
    columns, hps = [], []
    for k, (red, blue) in enumerate([(8, 4)] * 3 + [(7, 6)] + [(17, 16)] * 5):
        _, state, reward, *_ = step(KEY, state, both(red, blue), OFFICIAL, order)
        columns.append((int(state.pos[:12, 0].sum()), int(state.pos[12:, 0].sum())))
        hps.append(float(state.hp[:12].sum()))
        for team in env.teams:
            np.testing.assert_allclose(reward[team].sum(), -0.06 if k < 4 else 0.74, atol=1e-6)
        np.testing.assert_allclose(state.hp[:12].sum(), state.hp[12:].sum(), rtol=1e-6)
    assert columns[:4] == [(44, 156), (60, 156), (76, 156), (88, 156)]
    np.testing.assert_allclose(hps[4:], [112.4, 104.8, 97.2, 89.6, 82.0], rtol=1e-6)
    # the engine's shuffle with seed 0, all of the first volleys drawn: kills on both sides
    x = 0
    for _ in range(6):
        shuffled, x = minstd_shuffle(range(24), x)
    got = []
    for _ in range(2):
        _, state, reward, *_ = step(KEY, state, both(17, 16), OFFICIAL, jnp.array(shuffled))
        numbers = [reward[t].sum() for t in env.teams]
        numbers += [state.alive[:12].sum(), state.alive[12:].sum()]
        alive_hp = jnp.where(state.alive, state.hp, 0)
        got.append([*numbers, alive_hp[:12].sum(), alive_hp[12:].sum()])
        living = [i for i in range(24) if state.alive[i]]
        shuffled, x = minstd_shuffle(living, x)
        shuffled += [i for i in range(24) if i not in living]
        if len(got) == 1:
            at = jnp.where(state.alive, state.pos[:, 0], 0)
            assert (int(at[:12].sum()), int(at[12:].sum())) == (78, 123)
    np.testing.assert_allclose(got[0], [13.345, 2.555, 11, 9, 81.8, 80.6], rtol=1e-5)
    np.testing.assert_allclose([*got[1][:2], *got[1][4:]], [-1.155, -0.945, 82.1, 80.7], rtol=1e-5)


def test_a_duel_takes_six_blows():
    env, state, step = begin(12)
    state = placed(env, state, {0: (5, 5), 2: (6, 5)})
    before, got = [], []
    for _ in range(6):
        before.append(float(state.hp[2]))
        _, state, reward, ended, info = step(
            KEY, state, actions(env, {0: 17}), OFFICIAL, jnp.arange(4)
        )
        got.append((float(reward["red"][0]), float(reward["blue"][0]), bool(info["episode_over"])))
    np.testing.assert_allclose(before, [10, 8.1, 6.2, 4.3, 2.4, 0.5], rtol=1e-6)
    np.testing.assert_allclose(got[:5], [(0.395, -0.005, False)] * 5, rtol=1e-5)
    np.testing.assert_allclose(got[5], (4.895, -0.5, True), rtol=1e-6)
    assert ended["blue"][0] and not ended["red"][0]
    assert info["kills"]["red"] == 1 and info["kills"]["blue"] == 0


@pytest.fixture(scope="module")
def ring():
    """Eight reds around a blue, on the map of 28; the reds' actions that strike it."""
    env, state, step = begin(28)
    around = [(9, 9), (10, 9), (11, 9), (9, 10), (11, 10), (9, 11), (10, 11), (11, 11)]
    strike = [20, 19, 18, 17, 16, 15, 14, 13]
    cells = dict(enumerate(around)) | {25: (10, 10), 26: (20, 20)}
    return env, placed(env, state, cells), step, strike


def test_five_blows_at_once_leave_nothing_but_life_and_the_sixth_kills(ring):
    env, state, step, strike = ring
    order = jnp.arange(env.num_agents)
    _, five, reward, *_ = step(
        KEY, state, actions(env, dict(enumerate(strike[:5]))), OFFICIAL, order
    )
    assert five.alive[25] and five.hp[25] == np.float32(0.1)
    np.testing.assert_allclose(reward["red"][:5], 0.395, rtol=1e-5)
    _, again, reward, *_ = step(
        KEY, five, actions(env, dict(enumerate(strike[:5]))), OFFICIAL, order[::-1]
    )
    assert not again.alive[25]
    np.testing.assert_allclose(reward["red"][:5], [-0.105] * 4 + [4.895], rtol=1e-5)
    _, six, reward, *_ = step(
        KEY, state, actions(env, dict(enumerate(strike[:6]))), OFFICIAL, order
    )
    assert not six.alive[25]
    np.testing.assert_allclose(reward["red"][:6], [0.395] * 5 + [4.895], rtol=1e-5)


def test_who_is_killed_before_its_turn_does_not_strike(ring):
    env, state, step, strike = ring
    chosen = dict(enumerate(strike[:6])) | {25: 13}  # at red 0
    for last in (True, False):
        order = np.r_[np.arange(25), 26:50, 25] if last else np.r_[25, 0:25, 26:50]
        _, after, reward, *_ = step(KEY, state, actions(env, chosen), OFFICIAL, jnp.asarray(order))
        assert not after.alive[25]
        assert after.hp[0] == np.float32(10 if last else 8.1)
        # a blow that hit still pays, on top of the penalty for dying
        np.testing.assert_allclose(reward["blue"][0], -0.5 if last else 0.0, atol=1e-6)


def test_a_move_into_a_cell_that_is_left_depends_on_the_order():
    env, state, step = begin(12)
    for cells, want in (
        ({0: (3, 3), 1: (4, 3)}, [(3, 3), (5, 3)]),
        ({1: (3, 3), 0: (4, 3)}, [(5, 3), (4, 3)]),
    ):
        here = placed(env, state, cells | {2: (9, 9)})
        _, after, *_ = step(KEY, here, actions(env, {0: 7, 1: 7}), OFFICIAL, jnp.arange(4))
        np.testing.assert_array_equal(after.pos[:2], want)


def test_a_blow_at_a_friend_a_wall_or_nothing_costs_and_does_no_harm():
    env, state, step = begin(12)
    for cells, action in (({0: (3, 3), 1: (4, 3)}, 17), ({0: (1, 3)}, 16), ({0: (5, 5)}, 14)):
        here = placed(env, state, cells | {2: (9, 9)})
        _, after, reward, *_ = step(KEY, here, actions(env, {0: action}), OFFICIAL, jnp.arange(4))
        np.testing.assert_allclose(reward["red"][0], -0.105, rtol=1e-6)
        assert (after.hp == 10).all() and (after.alive == here.alive).all()


@cache
def before_clearing(env):
    return jax.jit(env.pettingzoo_observation)


def join(env, per_team):
    return jax.tree.map(lambda *x: np.concatenate(x), *(per_team[team] for team in env.teams))


def compare(env, serial, state, obs):
    pictures, (state, obs) = before_clearing(env)(state), jax.device_get((state, obs))
    np.testing.assert_array_equal(state.pos, serial.pos)
    np.testing.assert_array_equal(state.alive, serial.alive)
    np.testing.assert_array_equal(state.hp, np.array(serial.hp, np.float32))
    np.testing.assert_allclose(state.reward, serial.reward, atol=1e-6)
    views, numbers = serial.look()
    seen = join(env, obs)
    np.testing.assert_array_equal(seen.view, views)
    np.testing.assert_allclose(seen.features, numbers, atol=1e-6)
    views, numbers = serial.look(before_clearing=True)
    both = join(env, pictures)
    np.testing.assert_array_equal(both[..., :7], views)
    np.testing.assert_allclose(both[:, 3, 5, 7:], numbers, atol=1e-6)


@pytest.mark.parametrize(
    "n, steps, seed, swapped", [(12, 60, 0, False), (20, 60, 1, True), (28, 50, 2, False)]
)
def test_every_step_equals_the_battle_that_plays_agent_after_agent(n, steps, seed, swapped):
    env, state, step = begin(n)
    if swapped:
        env, _, step = world(n, side="alternate")
        _, state = jax.jit(env.restart)(KEY, state, OFFICIAL)
    obs = jax.jit(env.observe)(state, OFFICIAL)
    serial, rng = Serial(n, REWARDS, swapped), np.random.default_rng(seed)
    compare(env, serial, state, obs)
    deaths = 0
    for k in range(steps):
        chosen = rushing(serial, rng, 0.3 if k < steps // 3 else 0.9)
        order = rng.permutation(env.num_agents)
        over = serial.step(chosen, order)
        chosen = jnp.asarray(chosen, jnp.int32)
        obs, state, reward, ended, info = step(KEY, state, chosen, OFFICIAL, jnp.asarray(order))
        compare(env, serial, state, obs)
        np.testing.assert_array_equal(env.join(reward), state.reward)
        np.testing.assert_array_equal(env.join(ended), ~state.alive)
        assert bool(info["episode_over"]) == over
        deaths = len(serial.alive) - sum(serial.alive)
        if over:
            break
    assert deaths >= (1 if n == 12 else 5)  # else nothing was tried


@pytest.mark.parametrize("n", [0, 11, 12.0, True, "40"])
def test_a_map_below_twelve_is_refused(n):
    with pytest.raises(UserError, match="map_size ≥ 12"):
        Battle(n)


def test_unknown_options_name_the_choices():
    with pytest.raises(UserError, match="choose one of sequential, simultaneous"):
        Battle(12, resolution="exact")
    with pytest.raises(UserError, match="choose one of left, alternate, random"):
        Battle(12, side="right")


def test_actions_outside_the_range_are_refused_on_the_host():
    env = Battle(12)
    good = {"red": np.array([0, 20]), "blue": np.array([6, 13])}
    env.check_actions(good)
    for bad in (-1, 21):
        with pytest.raises(UserError, match=rf"action {bad} of blue 1 is outside 0\.\.20"):
            env.check_actions(good | {"blue": np.array([6, bad])})
    _, state, _ = begin(12)
    with pytest.raises(UserError, match=r"action 99 of red 0 is outside 0\.\.20"):
        env.step_env(KEY, state, good | {"red": np.array([99, 0])}, OFFICIAL)


def test_what_is_shown_is_chosen_by_true_or_false():
    with pytest.raises(UserError, match="minimap='no' must be True or False"):
        Battle(12, minimap="no")


def test_an_order_that_is_no_permutation_is_refused():
    env, state, _ = begin(12)
    acts = env.split(jnp.zeros(4, jnp.int32))
    with pytest.raises(UserError, match="must be a permutation of the 4 agents"):
        env.step_env(KEY, state, acts, OFFICIAL, attack_order=jnp.arange(3))
    for wrong in ([0, 0, 1, 2], [0, 1, 2, 4]):
        with pytest.raises(UserError, match="must be a permutation of 0 to 3"):
            env.step_env(KEY, state, acts, OFFICIAL, attack_order=jnp.array(wrong))


def test_the_parameters_are_those_of_magent2_and_of_the_official_code():
    assert Battle(12).default_params == BattleParams(-0.005, -0.1, -0.1, 0.2, 5.0, 1000)
    assert BattleParams(-0.005, -0.5, -0.1, 0.5, 5.0, 400) == OFFICIAL
