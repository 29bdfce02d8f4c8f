"""JaxMARL's and PettingZoo's own loops and tests drive our worlds, and MAgent2's battle is one of them."""

import jax
import numpy as np
import pytest

pytestmark = [
    pytest.mark.oracle,
    # of PettingZoo's own examples, which its tests import; whatever else they warn of is ours
    pytest.mark.filterwarnings("ignore:The old environment creation API:DeprecationWarning"),
]
jaxmarl = pytest.importorskip("jaxmarl")
pettingzoo = pytest.importorskip("pettingzoo")

from gymnax.experimental import RolloutWrapper
from jaxmarl.wrappers.baselines import CTRolloutManager, LogWrapper
from pettingzoo.utils.conversions import parallel_to_aec
from small_teams import Strike, StrikeParams

from jaxrepro.envs.battle import Battle, BattleParams
from jaxrepro.envs.gymnax_env import Gymnax
from jaxrepro.envs.ising import Ising
from jaxrepro.envs.jaxmarl_env import JaxMARL
from jaxrepro.envs.pettingzoo_env import PettingZooParallel

WORLDS = {
    "battle": lambda: (Battle(12), BattleParams(horizon=15)),
    "plain battle": lambda: (Battle(12, minimap=False, extra_features=False), BattleParams(horizon=15)),
    "ising": lambda: (Ising(4), Ising(4).default_params.replace(horizon=15)),
    "strike": lambda: (Strike(), StrikeParams(horizon=15)),
}  # fmt: skip


@pytest.fixture(params=WORLDS, scope="module")
def world(request):
    return WORLDS[request.param]()


def test_jaxmarl_random_loop_drives_any_world(world):
    """The loop of its tutorial, tutorials/mpe_introduction.py."""
    env = JaxMARL(*world)
    key = jax.random.PRNGKey(0)
    key, key_r = jax.random.split(key)
    obs, state = env.reset(key_r)
    ends = []
    for _ in range(20):
        key, key_s, key_a = jax.random.split(key, 3)
        key_a = jax.random.split(key_a, env.num_agents)
        actions = {
            agent: env.action_space(agent).sample(key_a[i]) for i, agent in enumerate(env.agents)
        }
        obs, state, rewards, dones, infos = env.step(key_s, state, actions)
        assert set(obs) == set(rewards) == set(env.agents) == set(dones) - {"__all__"}
        ends.append(bool(dones["__all__"]))
        for agent in env.agents:
            assert obs[agent].shape == env.observation_space(agent).shape
            assert bool(dones[agent]) >= ends[-1]
        assert {x.shape for x in infos.values()} == {(env.num_agents,)}
    assert any(ends)


def test_jaxmarl_logs_the_returns_of_a_scanned_rollout():
    env = LogWrapper(JaxMARL(Battle(12), BattleParams(horizon=5)))

    def step(state, key):
        of_step, of_act = jax.random.split(key)
        keys = jax.random.split(of_act, env.num_agents)
        actions = {a: env.action_space(a).sample(k) for a, k in zip(env.agents, keys)}
        _, state, reward, done, info = env.step(of_step, state, actions)
        return state, (env.stack_agent_values(reward), done["__all__"], info)

    _, state = env.reset(jax.random.key(0))
    _, (reward, done, info) = jax.jit(lambda s, k: jax.lax.scan(step, s, k))(
        state, jax.random.split(jax.random.key(1), 10)
    )
    assert done.tolist() == ([False] * 4 + [True]) * 2
    np.testing.assert_allclose(info["returned_episode_returns"][9], reward[5:].sum(0), rtol=1e-5)
    assert (info["returned_episode_lengths"][9] == 5).all()


def test_jaxmarl_rollout_manager_of_its_q_learning_drives_the_battle():
    env = CTRolloutManager(JaxMARL(Battle(12), BattleParams(horizon=5)), batch_size=3)
    obs, state = env.batch_reset(jax.random.key(0))
    for i in range(6):
        keys = jax.random.split(jax.random.key(i), env.num_agents)
        actions = {a: env.batch_sample(k, a) for a, k in zip(env.agents, keys)}
        obs, state, reward, done, _ = env.batch_step(jax.random.key(i), state, actions)
        total = sum(reward[a] for a in env.agents)
        np.testing.assert_allclose(reward["__all__"], total, rtol=1e-5)
        assert done["__all__"].tolist() == [i == 4] * 3
    assert obs["red_0"].shape == (3, 13 * 13 * 7 + 34 + 4) and env.max_action_space == 21


def test_gymnax_own_rollout_drives_the_battle_against_a_random_army():
    at_random = lambda key, obs, state: jax.random.randint(key, (len(obs.view),), 0, 21)
    env = Gymnax(Battle(12), "blue", at_random)
    params = {"env": BattleParams(horizon=10), "max_steps_in_episode": 10}
    rollout = RolloutWrapper(env=env, env_params=params)
    obs, action, reward, _, done, total = rollout.batch_rollout(
        jax.random.split(jax.random.key(0), 2), None
    )
    assert obs.shape == (2, 10, 2, 13 * 13 * 7 + 34) and action.shape == (2, 10, 2)
    assert done[:, -1].all() and not done[:, :-1].any()
    np.testing.assert_allclose(total[:, 0], reward.sum(1), rtol=1e-5)
    # two agents pay 0.005 a step each and 0.1 a blow
    blows = (action >= 13).sum(-1)
    assert (reward[blows == 0] <= -0.01 + 1e-6).all() and reward.shape == (2, 10)


def test_pettingzoo_accepts_any_world_as_parallel(world):
    from pettingzoo.test import parallel_api_test

    env = PettingZooParallel(*world)
    assert isinstance(env, pettingzoo.ParallelEnv)
    parallel_api_test(env, num_cycles=50)


# no environment of ours says how large its observations can be
@pytest.mark.filterwarnings(
    "ignore:Agent's (minimum|maximum) observation space value is:UserWarning"
)
def test_pettingzoo_accepts_the_battle_one_agent_at_a_time():
    from pettingzoo.test import api_test

    api_test(parallel_to_aec(PettingZooParallel(*WORLDS["battle"]())), num_cycles=100)


# 2 v 2 on 12 x 12: red_0 walks from (1, 4) up to blue_0 at (9, 4), kills it with six blows, then blue_1 at (9, 6).
# Nobody else strikes, so the order of attackers decides nothing.
WALK = [8, 8, 8, 7] + [17] * 6 + [12] + [17] * 6


@pytest.mark.parametrize("minimap", [False, True])
@pytest.mark.parametrize("extra", [False, True])
def test_a_game_is_told_as_magent2_tells_it(minimap, extra):
    battle_v4 = pytest.importorskip("magent2.environments").battle_v4
    forms = {"minimap_mode": minimap, "extra_features": extra}
    theirs = battle_v4.parallel_env(map_size=12, max_cycles=400, **forms)
    env = PettingZooParallel(Battle(12, minimap, extra), BattleParams(horizon=400))
    assert theirs.possible_agents == env.possible_agents
    expected, _ = theirs.reset(seed=0)
    obs, _ = env.reset()
    for agent in env.agents:
        assert env.observation_space(agent).shape == theirs.observation_space(agent).shape
    rng = np.random.default_rng(0)
    for t, action in enumerate([None, *WALK]):
        if action is not None:
            actions = {"red_0": action, "red_1": int(rng.choice([0, 2, 10, 12])) if t > 1 else 6}
            # MAgent2's reset counts its teams before it places them, and in the first step blue gets red's actions;
            # so they are the same here: 8 leads into a wall
            blue = (action, 6) if t == 1 else (6, 6)
            actions |= dict(zip(("blue_0", "blue_1"), blue))
            actions = {agent: actions[agent] for agent in env.agents}
            expected, *their_rest = theirs.step(actions)
            obs, *rest = env.step(actions)
            for ours, others in zip(rest, their_rest):
                assert list(ours) == list(others)
                for agent in ours:
                    assert ours[agent] == pytest.approx(others[agent], abs=1e-6), (t, agent)
        assert list(obs) == list(expected)
        for agent in obs:
            np.testing.assert_allclose(
                obs[agent], expected[agent], atol=1e-6, err_msg=f"{t} {agent}"
            )
        assert env.agents == theirs.agents
    assert not env.agents
