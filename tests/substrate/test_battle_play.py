"""Scripted battles, invariants over whole games, mirrored worlds, pictures and replay files."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxrepro.config import UserError
from jaxrepro.envs import battle_policies as policies
from jaxrepro.envs import battle_rules as rules
from jaxrepro.envs import replay as replays
from jaxrepro.envs.battle import OFFICIAL, Battle

T = 40
ENV = Battle(20)
BLOWS = range(rules.FIRST_ATTACK, rules.NUM_ACTIONS)


@cache
def game():
    """f(key) -> (obs, state, actions, reward, info) of T steps, red rushes and blue does so half of the time."""
    red, blue = policies.rush(ENV, "red"), policies.rush(ENV, "blue")
    chance = policies.random(ENV, "blue")

    def step(state, key):
        keys = jax.random.split(key, 5)
        either = jax.random.bernoulli(keys[0], 0.5, (ENV.sizes["blue"],))
        chosen = jnp.where(either, blue(keys[1], None, state), chance(keys[2], None, state))
        actions = {"red": red(keys[3], None, state), "blue": chosen}
        obs, after, reward, ended, info = ENV.step_env(keys[4], state, actions, OFFICIAL)
        return after, (obs, after, actions, reward, ended, info)

    def play(key):
        obs, state = ENV.reset(key, OFFICIAL)
        _, out = jax.lax.scan(step, state, jax.random.split(key, T))
        whole = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), (obs, state), out[:2])
        return *whole, *out[2:]

    return jax.jit(play)


@pytest.fixture(scope="module")
def played():
    return jax.device_get(game()(jax.random.key(1)))


@cache
def stepper(env):
    return jax.jit(env.step_env)


def moment(states, k):
    return jax.tree.map(lambda x: jnp.asarray(x[k]), states)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_a_game_keeps_its_invariants(seed):
    obs, states, _, reward, ended, info = jax.device_get(game()(jax.random.key(seed)))
    for k in range(T + 1):
        at = {tuple(p): i for i, p in enumerate(states.pos[k].tolist()) if states.alive[k, i]}
        assert len(at) == states.alive[k].sum()  # one a cell
        want = rules.walls(20)
        for (x, y), i in at.items():
            assert want[y, x] == rules.EMPTY
            want[y, x] = i
        np.testing.assert_array_equal(states.occupied[k], want)
    assert (states.alive[1:] <= states.alive[:-1]).all()  # nobody rises
    hp = states.hp[states.alive]
    assert (hp >= 0).all() and (hp <= 10).all() and (states.hp[~states.alive] < 0).all()
    for team, part in zip(ENV.teams, (slice(12), slice(12, None))):
        alive = states.alive[:, part]
        np.testing.assert_array_equal(ended[team], ~alive[1:])
        np.testing.assert_array_equal(info["alive_before"][team], alive[:-1])
        np.testing.assert_array_equal(info["alive_after"][team], alive[1:])
        assert not reward[team][~alive[:-1]].any()
        assert not obs[team].view[~alive].any() and not obs[team].features[~alive].any()
        assert (obs[team].view[alive][:, 6, 6, 1] == 1).all()  # all see themselves
        other = slice(12, None) if team == "red" else slice(12)
        died = states.alive[:-1, other].sum(1) - states.alive[1:, other].sum(1)
        np.testing.assert_array_equal(info["kills"][team], died)
        # each kill is paid once: 5 - 0.1 - 0.005, but to who is killed in the same step, which has its penalty
        paid = (reward[team] > 4).sum(1)
        assert (paid <= died).all()
    over = ~(states.alive[1:, :12].any(1) & states.alive[1:, 12:].any(1))
    np.testing.assert_array_equal(info["episode_over"], over)
    np.testing.assert_array_equal(states.t, np.arange(T + 1))


def test_rush_beats_a_half_random_army(played):
    _, states, *_ = played
    lost = (~states.alive[-1]).reshape(2, 12).sum(1)
    assert lost[1] > lost[0]


def test_the_actions_of_the_dead_change_nothing(played):
    _, states, actions, *_ = played
    dead = ~states.alive[T // 2]
    assert dead.sum() >= 2
    state = moment(states, T // 2)
    chosen = np.concatenate([actions[t][T // 2] for t in ENV.teams])
    outs = []
    for other in (0, 13, 20):
        acts = ENV.split(jnp.asarray(np.where(dead, other, chosen)))
        outs.append(jax.device_get(stepper(ENV)(jax.random.key(0), state, acts, OFFICIAL)))
    jax.tree.map(np.testing.assert_array_equal, outs[0], outs[1])
    jax.tree.map(np.testing.assert_array_equal, outs[0], outs[2])


MIRRORED = np.array(
    [rules.OFFSETS.tolist().index([-dx, dy]) for dx, dy in rules.MOVES.tolist()]
    + [13 + rules.ATTACKS.tolist().index([-dx, dy]) for dx, dy in rules.ATTACKS.tolist()]
)


def test_a_mirrored_battle_has_mirrored_results(played):
    """Where nobody wants another's target: all act in turn, so that no order matters."""
    _, states, actions, *_ = played
    env, step, acted = ENV, stepper(ENV), 0
    for k in range(0, T, 4):
        state = moment(states, k)
        chosen = np.concatenate([actions[t][k] for t in env.teams])
        alive = np.flatnonzero(states.alive[k])
        for i in alive[:: max(1, len(alive) // 3)]:
            one = np.full(24, rules.STAY)
            one[i] = chosen[i]
            pos = jnp.stack([19 - state.pos[:, 0], state.pos[:, 1]], -1)
            there = state.replace(pos=pos, occupied=state.occupied[:, ::-1])
            key = jax.random.key(0)
            _, a, r, *_ = step(key, state, env.split(jnp.asarray(one)), OFFICIAL)
            _, b, s, *_ = step(key, there, env.split(jnp.asarray(MIRRORED[one])), OFFICIAL)
            np.testing.assert_array_equal(b.pos, np.stack([19 - a.pos[:, 0], a.pos[:, 1]], -1))
            np.testing.assert_array_equal(b.hp, a.hp)
            np.testing.assert_array_equal(b.occupied, a.occupied[:, ::-1])
            jax.tree.map(np.testing.assert_array_equal, dict(r), dict(s))
            acted += chosen[i] != rules.STAY
    assert acted > 10


def test_sides_change_with_the_episode_and_by_chance():
    env = Battle(12, side="alternate")
    key = jax.random.key(0)
    _, state = jax.jit(env.reset)(key, OFFICIAL)
    red_x, restart = [], jax.jit(env.restart)
    for _ in range(4):
        red_x.append(int(state.pos[0, 0]))
        _, state = restart(key, state, OFFICIAL)
    assert red_x == [1, 9, 1, 9]
    # ids follow the left army, which is placed first: bit 1 of the ids 2 and 3 of red on the right
    _, right = restart(key, state, OFFICIAL)
    assert int(right.pos[0, 0]) == 9 and int(state.pos[0, 0]) == 1
    observe = jax.jit(env.observe)
    ids = lambda state: observe(state, OFFICIAL)["red"].features[:, :2] @ jnp.array([1.0, 2.0])
    np.testing.assert_array_equal(ids(state), [0, 1])
    np.testing.assert_array_equal(ids(right), [2, 3])
    draw = jax.jit(jax.vmap(lambda k: Battle(12, side="random").reset(k, OFFICIAL)[1].swapped))
    share = np.mean(draw(jax.random.split(key, 400)))
    assert 0.4 < share < 0.6  # four standard deviations
    assert Battle(12).deterministic_reset and not env.deterministic_reset


def test_the_horizon_truncates_and_terminates_nobody(played):
    _, states, *_ = played
    params = OFFICIAL.replace(horizon=7)
    cut = [bool(ENV.is_truncated(moment(states, k), params)) for k in range(10)]
    assert cut == [False] * 7 + [True] * 3


def test_the_drawn_order_gives_every_attacker_the_same_chance():
    """Two reds strike at a blue whose next blow kills: each kills in half of the games."""
    env = Battle(12)
    _, state = jax.jit(env.reset)(jax.random.key(0), OFFICIAL)
    pos = jnp.array([[4, 5], [6, 5], [5, 5], [9, 9]])
    state = state.replace(
        pos=pos, hp=jnp.array([10.0, 10, 1, 10]), occupied=rules.occupancy(pos, state.alive, 12)
    )
    acts = {"red": jnp.array([17, 16]), "blue": jnp.array([6, 6])}
    keys = jax.random.split(jax.random.key(1), 400)
    run = jax.jit(jax.vmap(lambda key: env.step_env(key, state, acts, OFFICIAL)[2]["red"]))
    reward = np.asarray(run(keys))
    np.testing.assert_allclose(np.sort(reward, 1), [[-0.105, 4.895]] * 400, rtol=1e-5)
    assert abs((reward[:, 0] > 4).mean() - 0.5) < 0.1  # four standard deviations


def test_simultaneous_attackers_all_strike():
    """Red and blue with 1 hp strike at each other: in sequence one of them lives, at once neither does."""
    outs = {}
    for how in ("sequential", "simultaneous"):
        env = Battle(12, resolution=how)
        _, state = jax.jit(env.reset)(jax.random.key(0), OFFICIAL)
        pos = jnp.array([[4, 5], [1, 1], [5, 5], [9, 9]])
        state = state.replace(
            pos=pos, hp=jnp.array([1.0, 10, 1, 10]), occupied=rules.occupancy(pos, state.alive, 12)
        )
        acts = {"red": jnp.array([17, 6]), "blue": jnp.array([16, 6])}
        _, after, _, _, info = stepper(env)(jax.random.key(0), state, acts, OFFICIAL)
        outs[how] = int(after.alive.sum()), int(info["kills"]["red"] + info["kills"]["blue"])
    assert outs == {"sequential": (3, 1), "simultaneous": (2, 2)}


@pytest.mark.parametrize("minimap", [True, False])
@pytest.mark.parametrize("extra", [True, False])
def test_fewer_observations_are_parts_of_the_whole_one(played, minimap, extra):
    obs, states, *_ = played
    env = Battle(20, minimap=minimap, extra_features=extra)
    state = moment(states, T // 2)
    got, picture = jax.jit(
        lambda state: (env.observe(state, OFFICIAL), env.pettingzoo_observation(state))
    )(state)
    for team in env.teams:
        view, features = obs[team].view[T // 2], obs[team].features[T // 2]
        channels = slice(None) if minimap else [0, 1, 2, 4, 5]
        columns = np.r_[: 32 * extra, 32 : 32 + 2 * minimap].astype(int)
        np.testing.assert_array_equal(got[team].view, view[..., channels])
        np.testing.assert_array_equal(got[team].features, features[:, columns])
    shape = picture["red"].shape
    assert shape == (12, 13, 13, {(1, 1): 41, (1, 0): 9, (0, 1): 37, (0, 0): 5}[minimap, extra])


@pytest.fixture(scope="module")
def recorded(played):
    _, states, actions, *_ = played
    return replays.record(ENV, states, actions, OFFICIAL)


def test_a_replay_comes_back_as_it_was_saved(recorded, tmp_path):
    path = tmp_path / "game.npz"
    replays.save_replay(path, recorded)
    again = replays.load_replay(path)
    for a, b in zip(recorded, again):
        np.testing.assert_array_equal(a, b)
    assert again.params["kill_reward"] == 5 and again.map_size == 20 and again.red == 12


def damaged(recorded, **fields):
    arrays = {k: getattr(recorded, k) for k in ("pos", "alive", "hp", "actions")}
    whole = arrays | {"version": 1, "map_size": 20, "red": 12, "names": np.array(["a"]), "values": np.array([1.0])}  # fmt: skip
    return {k: v for k, v in (whole | fields).items() if v is not None}


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"version": 2}, "replay version 2; this program reads version 1"),
        ({"version": None}, "replay version None"),
        ({"hp": None}, "lacks hp"),
        ({"pos": np.zeros((3, 24, 2), int)}, "pos is int64 of shape"),
        ({"actions": np.zeros((T, 24))}, "actions is float64"),
        ({"red": 25}, "red=25 of 24 agents is not possible"),
        ({"map_size": 13}, "off the map of 13"),
        ({"map_size": np.zeros(2)}, "no numbers"),
        ({"hp": np.full((T + 1, 24), np.nan)}, "an hp is no number"),
        ({"values": np.zeros(3)}, "no numbers"),
        ({"alive": np.array(["x", None], object)}, "no replay file, or damaged"),
    ],
)
def test_a_replay_that_is_damaged_is_refused_in_one_line(recorded, tmp_path, fields, text):
    path = tmp_path / "game.npz"
    np.savez(path, **damaged(recorded, **fields))
    with pytest.raises(UserError, match=text) as caught:
        replays.load_replay(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no npz", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_replay_is_refused(tmp_path, content):
    (tmp_path / "game.npz").write_bytes(content)
    with pytest.raises(UserError, match="no replay file, or damaged"):
        replays.load_replay(tmp_path / "game.npz")
    with pytest.raises(UserError, match="there is no replay"):
        replays.load_replay(tmp_path / "other.npz")
    with pytest.raises(UserError, match="is a folder"):
        replays.load_replay(tmp_path)


def test_a_picture_shows_walls_teams_and_blows(played, recorded):
    _, states, actions, *_ = played
    state = jax.tree.map(lambda x: x[0], states)
    picture = replays.render(state, scale=4)
    assert picture.shape == (80, 80, 3) and picture.dtype == np.uint8
    assert (picture[0] == replays.PALETTE[1]).all()
    cell = lambda i: picture[state.pos[i, 1] * 4, state.pos[i, 0] * 4].astype(int)
    assert cell(0)[0] > cell(0)[2] and cell(12)[2] > cell(12)[0]  # red is red
    coloured = (picture != replays.PALETTE[0]).any(-1) & (picture != replays.PALETTE[1]).any(-1)
    assert coloured.sum() == 24 * 16
    every = replays.frames(recorded, scale=4)
    assert every.shape == (T + 1, 80, 80, 3)
    np.testing.assert_array_equal(every[0], picture)
    k = next(k for k in range(T) if (actions["red"][k][states.alive[k, :12]] >= 13).any())
    i = next(i for i in range(12) if states.alive[k, i] and actions["red"][k, i] in BLOWS)
    x, y = states.pos[k, i] + rules.OFFSETS[actions["red"][k, i]]
    assert (every[k + 1][y * 4 + 1, x * 4 + 1] == replays.PALETTE[2]).all()
    assert not (every[0] == replays.PALETTE[2]).all(-1).any()
    now = jax.tree.map(lambda x: x[k + 1], states)
    assert (replays.render(now, scale=4)[y * 4 + 1, x * 4 + 1] == replays.PALETTE[2]).all()
    with pytest.raises(UserError, match="scale is 0"):
        replays.render(state, scale=0)


def test_a_gif_has_the_pictures_of_the_replay(recorded, tmp_path):
    path = tmp_path / "game.gif"
    replays.write_gif(path, recorded, fps=10, scale=2)
    want = replays.frames(recorded, scale=2)
    with Image.open(path) as gif:
        assert gif.info["loop"] == 0
        shown, times = [], []
        for k in range(gif.n_frames):
            gif.seek(k)
            shown.append(np.asarray(gif.convert("RGB")))
            times.append(gif.info["duration"])
    # equal pictures one after another are one that lasts longer
    distinct = [w for k, w in enumerate(want) if k == 0 or (w != want[k - 1]).any()]
    np.testing.assert_array_equal(np.stack(shown), np.stack(distinct))
    assert sum(times) == 100 * (T + 1)
    with pytest.raises(UserError, match="fps is 0"):
        replays.write_gif(path, recorded, fps=0)
