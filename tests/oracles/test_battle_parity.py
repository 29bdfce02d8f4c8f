"""The battle equals MAgent2 0.3.4, step by step: its engine and its PettingZoo interface, with one OpenMP thread."""

import ctypes
import dataclasses
import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when the engine is loaded: threads race for kills

import jax
import numpy as np
import pytest

magent2 = pytest.importorskip("magent2")
pytest.importorskip("pettingzoo")

from battle_serial import minstd_shuffle, rushing
from magent2.environments import battle_v4
from magent2.environments.battle.battle import get_config

from jaxrepro.envs.battle import OFFICIAL, Battle

pytestmark = pytest.mark.oracle
KEY = jax.random.key(0)
REWARDS = {
    name: value
    for name, value in dataclasses.asdict(OFFICIAL).items()
    if name not in ("horizon", "kill_reward")
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Where another library has started OpenMP before, the variable comes too late."""
    ctypes.CDLL("libgomp.so.1").omp_set_num_threads(1)


def compiled(n, **options):
    """The environment; its reset, step and PettingZoo's look, compiled, with numpy arrays as results."""
    env = Battle(n, **options)

    def begin():
        obs, state = env.reset(KEY, OFFICIAL)
        return env.restart(KEY, state, OFFICIAL) if env.side == "alternate" else (obs, state)

    def step(state, actions, order):
        return env.step_env(KEY, state, env.split(actions), OFFICIAL, order)

    host = lambda f: lambda *x: jax.device_get(f(*x))
    return env, *(host(jax.jit(f)) for f in (begin, step, env.pettingzoo_observation))


class World:
    """What `rushing` needs to know."""

    def __init__(self, env, state):
        self.pos = [tuple(p) for p in state.pos.tolist()]
        self.alive, self.red = state.alive, env.sizes["red"]

    def team(self, i):
        return int(i >= self.red)


def order_of(state, actions, seed):
    """All agents, attackers in the engine's order first; and the engine's next seed."""
    attackers = [i for i in range(len(actions)) if state.alive[i] and actions[i] >= 13]
    shuffled, seed = minstd_shuffle(attackers, seed)
    rest = [i for i in range(len(actions)) if i not in set(attackers)]
    return np.array(shuffled + rest), seed


def engine(n, seed, swapped, minimap):
    """A started engine: (GridWorld, handles)."""
    world = magent2.GridWorld(get_config(n, minimap, seed, **REWARDS), map_size=n)
    handles = world.get_handles()
    world.reset()
    env = Battle(n)
    teams = handles[::-1] if swapped else handles
    for handle, cells in zip(teams, (env.left, env.right)):  # ids follow the order of this
        world.add_agents(handle, method="custom", pos=[[int(x), int(y), 0] for x, y in cells])
    return world, handles


@pytest.mark.parametrize("n", [20, 28, 40])
@pytest.mark.parametrize("seed, swapped, minimap", [(0, False, True), (3, False, True), (7, True, True), (1, False, False)])  # fmt: skip
def test_the_engine_is_matched_for_100_random_and_100_rushing_steps(n, seed, swapped, minimap):
    side = "alternate" if swapped else "left"
    env, begin, step, _ = compiled(n, side=side, minimap=minimap)
    obs, state = begin()
    world, handles = engine(n, seed, swapped, minimap)
    rng, dead, draws = np.random.default_rng(seed), 0, seed
    a = env.sizes["red"]
    parts = list(zip(env.teams, handles, (slice(a), slice(a, None))))

    def agree():
        for team, handle, part in parts:
            alive = state.alive[part]
            if not alive.any():
                assert world.get_num(handle) == 0
                continue
            np.testing.assert_array_equal(world.get_pos(handle), state.pos[part][alive])
            view, features = world.get_observation(handle)
            ours = obs[team].view[alive]
            if minimap and np.isnan(view).any():  # shares of an army without survivors: 0 / 0
                others = state.alive[a:] if team == "red" else state.alive[:a]
                assert not others.any() and not np.isnan(view[..., :6]).any()
                ours, view = ours[..., :6], view[..., :6]
            np.testing.assert_array_equal(ours, view)
            np.testing.assert_array_equal(obs[team].features[alive], features)
            assert not obs[team].view[~alive].any() and not obs[team].features[~alive].any()

    agree()
    for k in range(200):
        actions = rushing(World(env, state), rng, 0.0 if k < 100 else 0.8)
        order, draws = order_of(state, actions, draws)
        before = state.alive
        for _, handle, part in parts:
            world.set_action(handle, actions[part][before[part]].astype(np.int32))
        over = world.step()
        obs, state, reward, terminated, info = step(state, actions.astype(np.int32), order)
        for team, handle, part in parts:
            was = before[part]
            np.testing.assert_allclose(reward[team][was], world.get_reward(handle), atol=1e-6)
            np.testing.assert_array_equal(~terminated[team][was], world.get_alive(handle))
            assert not reward[team][~was].any()
        assert bool(info["episode_over"]) == over
        world.clear_dead()
        agree()
        dead = (~state.alive).sum()
        if over:
            break
    assert dead >= 5, "nothing was tried"


@pytest.mark.parametrize("n", [20, 28, 40])
@pytest.mark.parametrize("minimap, extra", [(True, True), (True, False), (False, True), (False, False)])  # fmt: skip
def test_the_pettingzoo_interface_is_matched(n, minimap, extra):
    env, begin, step, look = compiled(n, minimap=minimap, extra_features=extra)
    theirs = battle_v4.parallel_env(
        map_size=n, minimap_mode=minimap, extra_features=extra, max_cycles=180, **REWARDS
    )
    seen, _ = theirs.reset(seed=5)
    _, state = begin()
    names = [f"{team}_{i}" for team in env.teams for i in range(env.sizes[team])]
    where = {name: i for i, name in enumerate(names)}
    assert names == theirs.possible_agents
    rng, draws, dead, a = np.random.default_rng(n), 5, 0, env.sizes["red"]

    def agree():
        ours = env.join(look(state))
        assert ours.shape[1:] == theirs.observation_space("red_0").shape
        got = np.asarray(ours)[[where[name] for name in seen]]
        want = np.stack(list(seen.values()))
        np.testing.assert_allclose(got, want, atol=1e-6)

    agree()
    for k in range(200):
        actions = rushing(World(env, state), rng, 0.0 if k < 100 else 0.8)
        living = list(theirs.agents)
        assert living == [name for name, lives in zip(names, state.alive) if lives]
        chosen = {name: int(actions[where[name]]) for name in living}
        if k == 0:
            # its reset notes the sizes of the teams before it places them: in the first step of an episode blue
            # does what red was told
            actions[a:] = actions[:a]
        order, draws = order_of(state, actions, draws)
        seen, rewards, ended, cut, _ = theirs.step(chosen)
        _, state, reward, terminated, info = step(state, actions.astype(np.int32), order)
        got = np.concatenate([reward[team] for team in env.teams])
        np.testing.assert_allclose(
            [got[where[x]] for x in rewards], list(rewards.values()), atol=1e-6
        )
        over = np.concatenate([terminated[team] for team in env.teams]) | info["episode_over"]
        assert {x: bool(over[where[x]]) for x in ended} == ended
        assert set(cut.values()) == {k + 1 >= 180}
        agree()
        dead = (~state.alive).sum()
        if not theirs.agents:
            break
    assert dead >= 5, "nothing was tried"
