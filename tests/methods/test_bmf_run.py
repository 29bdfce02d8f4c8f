"""The BMF run: stages, what it writes, resume, seeds side by side, devices, and what it refuses."""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxrepro import cli, evaluate, launch, sample
from jaxrepro.config import UserError
from jaxrepro.envs import replay
from jaxrepro.envs.battle import Battle
from jaxrepro.methods.bmf import build, evaluation, learning, run, training
from jaxrepro.methods.bmf.groups import GroupState
from jaxrepro.methods.bmf.learning import POLICY, VAE
from jaxrepro.methods.bmf.objective import Trajectories
from jaxrepro.methods.bmf.rollout import episodes
from jaxrepro.train.checkpoint import Checkpoints
from jaxrepro.train.state import State

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import bmf_tiny as tiny


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    with tiny.small(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two updates of the VAE and two of the policy without interruption."""
    folder = tmp_path_factory.mktemp("bmf") / "whole"
    return folder, run.run(tiny.config(), folder)


def cut(monkeypatch, config, folder, stage):
    """A run that is stopped after the first step of a stage, and goes on."""
    save = run.Run.save

    def once(self, i, state, **more):
        save(self, i, state, **more)
        if self.stage == stage and i == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "save", once)
        with pytest.raises(KeyboardInterrupt):
            run.run(config, folder)
    return run.run(config, folder)


@pytest.fixture(scope="module")
def ungrouped(tmp_path_factory):
    """A run of AC."""
    folder = tmp_path_factory.mktemp("ac") / "whole"
    return folder, run.run(tiny.config(algorithm="ac"), folder)


def test_a_run_without_groups_has_one_stage_and_leaves_a_film(ungrouped):
    folder, results = ungrouped
    assert {row["stage"] for row in metrics(folder)} == {POLICY}
    assert results["test/self/n"] == 4 and "test/vae/kl_per_dim" not in results
    with Image.open(folder / "films" / "self.gif") as gif:
        assert 1 < gif.n_frames <= 9


@pytest.mark.slow
def test_a_run_without_groups_that_was_stopped_goes_on_bit_for_bit(
    ungrouped, tmp_path, monkeypatch
):
    folder, results = ungrouped
    config = tiny.config(algorithm="ac")
    assert cut(monkeypatch, config, tmp_path / "cut", POLICY) == results
    a, b = (run.trained(config, at)[1]["policy"] for at in (folder, tmp_path / "cut"))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder, stage, step):
    """Leaves of the whole state of a checkpoint, as bytes on disk are read."""
    s = tiny.parts()
    keys = build.keys_of(s, stage, 0)
    begin = partial(learning.begin_vae, s.plan)
    if stage == POLICY:
        made = jax.eval_shape(jax.vmap(begin), keys)
        begin = lambda key, vae, extra: learning.begin_policy(s.plan, key, vae, extra)
        keys = keys, made["params"], made["extra"]
    else:
        keys = (keys,)
    target = State(
        step=jax.ShapeDtypeStruct((), np.int32), **jax.eval_shape(jax.vmap(begin), *keys)
    )
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), target)
    with Checkpoints(folder, stage, read_only=True) as found:
        return jax.device_get(found.restore(target, step))


@pytest.mark.slow
def test_a_run_leaves_its_numbers_a_film_and_both_stages(finished):
    folder, results = finished
    assert json.loads((folder / "summary.json").read_text()) == results
    for name in ("win", "win_lo", "kills", "losses", "tie", "attack_rate", "margin"):
        assert np.isfinite(results[f"test/self/{name}"])
    assert results["test/self/n"] == 4
    for name in ("vae/kl_per_dim", "vae/active_units", "groups/ari_position", "groups/silhouette"):
        assert np.isfinite(results[f"test/{name}"])
    stages = [row["stage"] for row in metrics(folder)]
    assert stages == [VAE] * 2 + [POLICY] * 2
    with Image.open(folder / "films" / "self.gif") as gif:
        assert 1 < gif.n_frames <= 9


@pytest.mark.slow
def test_the_vae_learns_in_its_stage_and_is_frozen_afterwards(finished):
    folder, _ = finished
    early, late = (saved(folder, VAE, i).params for i in (1, 2))
    after = saved(folder, POLICY, 2).params["vae"]
    same = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    assert not same(early, late)
    assert same(late, after)


@pytest.mark.slow
def test_the_policy_goes_on_from_the_stage_of_the_vae(finished):
    folder, _ = finished
    s = tiny.parts()
    last = saved(folder, VAE, 2).extra
    begun = learning.begin_policy(s.plan, jax.random.key(0), None, last)
    assert all(
        map(
            np.array_equal,
            jax.tree.leaves(begun["params"]["policy"]),
            jax.tree.leaves(last["policy"]),
        )
    )
    steps = [
        leaf for leaf in jax.tree.leaves(saved(folder, POLICY, 2).opt) if leaf.dtype == np.int32
    ]
    assert [int(x) for leaf in steps for x in leaf] == [4], "Adam counts both stages"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [VAE, POLICY])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(finished, tmp_path, monkeypatch, stage):
    folder, results = finished
    assert cut(monkeypatch, tiny.config(), tmp_path / "cut", stage) == results
    a, b = (saved(f, POLICY, 2) for f in (folder, tmp_path / "cut"))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    times = lambda rows: [{k: v for k, v in row.items() if k != "time"} for row in rows]
    assert times(metrics(folder)) == times(metrics(tmp_path / "cut"))


@pytest.mark.slow
def test_init_from_gives_the_vae_and_a_new_policy(finished, tmp_path):
    folder, _ = finished
    config = tiny.config(init_from=str(folder), steps=1)
    run.run(config, tmp_path / "arm")
    assert {row["stage"] for row in metrics(tmp_path / "arm")} == {POLICY}
    s, params = run.trained(config, tmp_path / "arm")
    given = saved(folder, VAE, 2).params
    assert all(map(np.array_equal, jax.tree.leaves(params["vae"]), jax.tree.leaves(given)))
    fresh = jax.vmap(partial(learning.begin_policy, s.plan))(build.keys_of(s, "policy begins", 0))
    moved = jax.tree.map(
        lambda a, b: float(abs(a - b).max()), params["policy"], fresh["params"]["policy"]
    )
    assert max(jax.tree.leaves(moved)) < 1.1 * s.plan.setting.lr, (
        "one step of Adam from a new policy"
    )


@pytest.mark.slow
def test_evaluate_and_sample_use_what_was_trained(finished, capsys):
    folder, results = finished
    again = run.evaluate(tiny.config(), folder)
    assert {k: again[k] for k in again} == {k: results[k] for k in again}
    assert cli.guard(evaluate.main, [f"--workdir={folder}", "--n=2"]) == 0
    assert cli.guard(sample.main, [f"--workdir={folder}", "--prompt=rush", "--n=2"]) == 0
    names = sorted(p.name for p in (folder / "films").iterdir())
    assert names == ["rush-0.gif", "rush-0.npz", "rush-1.gif", "rush-1.npz", "self.gif"]
    assert replay.load_replay(folder / "films" / "rush-0.npz").map_size == 14
    capsys.readouterr()
    assert cli.guard(sample.main, [f"--workdir={folder}", "--prompt=coward"]) == 2
    assert "self, random, rush are known" in capsys.readouterr().err


def begun(s, **more):
    keys = build.keys_of(s, "policy begins", 0)
    vae = jax.vmap(partial(learning.init_vae, s.plan))(keys)
    made = jax.vmap(lambda k, v: learning.begin_policy(s.plan, k, v))(keys, vae)
    return State(step=np.int32(0), **made)


def updated(s):
    step = jax.jit(run.stepping(s, POLICY))
    state, _ = step(begun(s), build.keys_of(s, POLICY, 0))
    return jax.device_get(state.params["policy"])


@pytest.mark.slow
def test_seeds_side_by_side_learn_as_each_alone():
    both = updated(tiny.parts(seed=3, seeds=2))
    for k in range(2):
        alone = updated(tiny.parts(seed=3 + k))
        for a, b in zip(jax.tree.leaves(build.one(both, k)), jax.tree.leaves(build.one(alone, 0))):
            np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"seeds": 2, "envs": 1}, {"seeds": 1, "envs": 2}])
def test_two_devices_learn_as_one(shape, tmp_path):
    """Seeds are spread over the devices where they divide, else the games."""
    found = []
    for mesh in ((1, 1, 1, 1), (2, 1, 1, 1)):
        config = tiny.config(mesh=mesh, steps=1, **{"vae.steps": 1}, **shape)
        folder = tmp_path / str(mesh[0])
        run.run(config, folder)
        found.append(run.trained(config, folder)[1]["policy"])
    for a, b in zip(*map(jax.tree.leaves, found)):
        np.testing.assert_allclose(jax.device_get(a), jax.device_get(b), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "ac"},
        {"algorithm": "mf_ac"},
        {"algorithm": "mf_ac_plus"},
        {"algorithm": "bmf_random"},
        {"preset": "official", "vae.batch": 0, "vae.updates": 1},
        {"bmf.cluster_on": "observation", "bmf.inter": "cosine_positive", "micro_batches": 2},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_algorithm_runs_to_its_end(tmp_path, changes):
    results = run.run(tiny.config(**changes), tmp_path / "run")
    assert np.isfinite(list(results.values())).all()
    grouped = not changes.get("algorithm", "bmf").endswith(("ac", "plus"))
    assert ("test/vae/kl_per_dim" in results) == grouped


def test_the_official_opponent_keeps_a_vae_of_its_own():
    s = tiny.parts(preset="official", **{"vae.batch": 0, "vae.updates": 1})
    begin = lambda s: jax.eval_shape(partial(learning.begin_vae, s.plan), jax.random.key(0))
    made = begin(s)
    assert made["extra"]["replay"] is None
    assert jax.tree.map(lambda x: x.shape, made["extra"]["opponent_vae"]) == jax.tree.map(
        lambda x: x.shape, made["params"]
    )
    after = learning.begin_policy(
        s.plan,
        jax.random.key(0),
        1.0,
        dict(policy=2.0, policy_opt=3.0, opponent=4.0, opponent_vae=5.0),
    )
    assert after["extra"] == {"opponent": 4.0, "opponent_vae": 5.0}
    assert begin(tiny.parts())["extra"]["opponent_vae"] is None


def test_pairs_count_in_games_that_go_on_and_have_more_agents_than_groups():
    """Groups 0 0 0 1 1 1 at first; made anew in step 2 (seen in step 3) as 0 0 1 1 1 0: of 6 pairs 2 are kept."""
    s = tiny.parts(**{"bmf.groups": 2, "bmf.group_interval": 2})
    first, second = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 0])
    one = np.ones((5, 3, 6), bool)
    labels = np.stack([first, first, first, second, second])[:, None].repeat(3, 1)
    mask = one.copy()
    mask[2:, 1] = False  # over before the second grouping, and its labels stand still
    labels[3:, 1] = first
    mask[1:, 2, 2:] = False  # two live on: each is a group
    labels[3:, 2] = [0, 1, -1, -1, -1, -1]
    groups = GroupState(jnp.asarray(labels), None, None, None, None)
    nothing = Trajectories(*[None] * len(Trajectories._fields))
    batch = nothing._replace(groups=groups, mask=jnp.asarray(mask))
    found = learning.pairs(s.plan, batch)
    assert float(found["pairs"]) == pytest.approx(6 / 3)
    assert float(found["pairs_kept"]) == pytest.approx(2 / 3)
    once = dataclasses.replace(s.plan, steps=3)
    assert learning.pairs(once, batch) == {}


def test_beta_rises_to_its_value_and_not_with_the_official_reduction():
    warm = lambda **changes: tiny.parts(**{"vae.warmup": 2, **changes}).plan
    assert warm().warmup == 2 and warm(**{"bmf.vae_reduction": "official"}).warmup == 0
    plan = dataclasses.replace(warm(), warmup=4, updates=1, batch=0)
    half = dataclasses.replace(
        plan, warmup=0, setting=dataclasses.replace(plan.setting, beta=plan.setting.beta / 2)
    )
    rng = np.random.default_rng(0)
    shapes = learning.init_replay(dataclasses.replace(plan, batch=16)).rows
    rows = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0, 1, x.shape), x.dtype), shapes)
    rows = rows._replace(mask=jnp.ones(len(rows.mask), bool))
    params = tiny.learnt(tiny.parts()).vae
    learnt = []
    for p, step in ((plan, 1), (half, 1), (plan, 3), (plan, 9)):
        state = training.vae_state(params, plan.setting).replace(step=jnp.int32(step))
        after = learning.update_vae(p, state, {"replay": None}, rows, jax.random.key(0))[0]
        # Adam's first moment is the gradient times 0.1; its step would hide the size of beta
        learnt.append(np.asarray(after.opt[0].mu["encoder"]["mean"]["kernel"]))
    # 2 of 4 steps, in a program that knows beta / 2: sums of float32 in another order
    np.testing.assert_allclose(learnt[0], learnt[1], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(learnt[2], learnt[3])  # the whole of beta from the fourth on
    assert np.abs(learnt[2] - learnt[0]).max() > 1e-3 * np.abs(learnt[0]).max()


def test_the_buffer_is_a_ring_of_living_agents():
    s = tiny.parts()
    replay = learning.init_replay(s.plan)
    n, m = 32, 4  # an eighth of the buffer at a time
    rows = jax.tree.map(
        lambda x: np.resize(np.arange(20), (20, *x.shape[1:])).astype(x.dtype), replay.rows
    )
    alive = np.arange(20) % 2 == 0
    rows = rows._replace(action=np.arange(20, dtype=np.int32), mask=alive)
    for i in range(9):
        replay = learning.remember(replay, rows, jax.random.key(i))
        assert int(replay.cursor) == (i + 1) * m % n
        written = min((i + 1) * m, n)
        assert int(replay.rows.mask.sum()) == written
        assert (np.asarray(replay.rows.action[:written]) % 2 == 0).all()
        newest = np.asarray(replay.rows.action)[[(i * m + j) % n for j in range(m)]]
        assert len(set(newest)) == m, "drawn without replacement"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env.map_size": 11}, "map_size ≥ 12"),
        ({"bmf.groups": 0}, "groups=0; use a whole number from 1 up"),
        ({"bmf.groups": 5}, "bmf.groups=5 of teams of 2 agents; use 1 to 2"),
        ({"bmf.group_interval": 0}, "group_interval=0; use a whole number from 1 up"),
        ({"bmf.mf_form": "three"}, "mf_form='three' is not one of bilevel, mixed"),
        ({"algorithm": "dqn"}, "algorithm='dqn' is not one of ac, mf_ac"),
        (
            {"mesh": (4, 1, 1, 1)},
            "envs=2 episodes of seeds=1 do not divide over 4 devices; use a multiple of 4",
        ),
        ({"vae.steps": 0}, "set vae.steps above 0, or init_from"),
        ({"vae.replay": 8}, "vae.replay=8 holds no batch of vae.batch=16"),
        ({"eval.n": 3}, "use an even number"),
        ({"eval.noise": 3}, "use 4 or more, or 0 for none"),
        ({"eval.horizon": 1}, "eval.horizon=1; use 2 or more"),
        ({"vae.warmup": 3}, "vae.warmup=3 of vae.steps=2: beta would never reach its value"),
        ({"env.kill_reward": 1e39}, "env.kill_reward=1e+39; a reward must be a number up to 1e+06"),
        ({"eval.opponents": ("coward",)}, "random, rush are known"),
        ({"eval.tie": "none"}, "half or both"),
        ({"micro_batches": 3}, "micro_batches=3 does not divide envs=2; use a divisor"),
        ({"steps": 0, "algorithm": "ac"}, "nothing to do"),
        ({"env.side": "up"}, "side='up' is unknown; choose one of left"),
        ({"env.minimap": False}, "leave both true"),
        ({"env.name": "gather"}, "battle is the environment that there is"),
        ({"seeds": 0}, "seeds=0; use 1 or more"),
        ({"steps": 0, "init_from": "runs/a"}, "no policy is to be trained; set steps above 0"),
        (
            {"env.step_reward": float("nan")},
            "env.step_reward=nan; a reward must be a number up to 1e+06",
        ),
        (
            {"algorithm": "ac", "env.extra_features": False, "bmf.mask_id_features": True},
            "there are no bits of an index to mask",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_work_is_refused_in_one_line_and_leaves_nothing(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        run.run(tiny.config(**changes), tmp_path / "run")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_baselines_without_groups_do_not_ask_how_many_there_are():
    build.check(tiny.config(algorithm="ac", **{"bmf.groups": 9}))


def test_observations_that_are_not_finite_stop_a_run_by_name(tmp_path, monkeypatch):
    observe = Battle.observe

    def broken(self, state, params):
        seen = observe(self, state, params)
        return {team: obs._replace(features=obs.features * np.nan) for team, obs in seen.items()}

    monkeypatch.setattr(Battle, "observe", broken)
    with pytest.raises(UserError, match=r"features has \d+ numbers that are NaN or infinite"):
        run.run(tiny.config(algorithm="ac"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_preset_is_exit_code_2(capsys):
    assert cli.guard(launch.main, ["--config=configs/bmf.py", "--config.preset=best"]) == 2
    assert "preset='best' is not one of official, fixed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_vae_of_other_observations_is_refused_by_name(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(UserError, match=r"1,1238\] there and float32\[1,1217\] here"):
        run.run(tiny.config(init_from=str(folder), **{"bmf.vae_target": "state"}), tmp_path / "run")


@pytest.mark.parametrize(
    "size",
    [
        "tiny",
        pytest.param("gpu", marks=pytest.mark.slow),
        pytest.param("paper", marks=pytest.mark.slow),
    ],
)
def test_a_dry_run_tells_the_shapes_of_every_size(size, capsys):
    assert cli.guard(launch.main, [f"--config=configs/bmf.py:{size}", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "batch view: float32[" in out and "memory per device" in out


@pytest.mark.slow
def test_critics_of_the_noise_see_the_last_actions_of_the_living_and_fit_returns():
    s, n = tiny.parts(**{"eval.noise": 4}), 4
    player, key = tiny.learnt(s), jax.random.key(3)
    _, team, of_groups, target, keep = evaluation._seen_and_returned(s.plan, n, player, key)
    batch, _ = episodes(s.plan.game, (player, player), s.plan.steps, jax.random.split(key, n))
    steps, _, agents = batch.mask.shape
    back = lambda rows: np.asarray(rows).reshape(n, steps, agents, *rows.shape[1:])
    done, alive = np.eye(21)[np.asarray(batch.action)], np.asarray(batch.mask)
    reward = np.asarray(batch.reward)
    for game in range(n):
        for t in range(steps):
            if not alive[t, game].any():
                continue
            last = done[t - 1, game][alive[t - 1, game]].mean(0) if t else np.zeros(21)
            np.testing.assert_allclose(back(team)[game, t, 0], last, atol=1e-6)
        for agent in range(agents):
            lived = alive[:, game, agent]
            found = back(target)[game, lived, agent]
            discounted = [
                sum(0.95**k * r for k, r in enumerate(reward[lived, game, agent][t:]))
                for t in range(lived.sum())
            ]
            np.testing.assert_allclose(found, discounted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(back(keep), np.swapaxes(alive, 0, 1))
    assert of_groups.shape[-1] == 2 * 21
    params = jax.tree.map(lambda p: p[None], player._asdict())
    errors = evaluation.noise(s, params)
    assert set(errors) == {"none", "team", "groups", "constant", "variance"}
    assert 0 < errors["none"] < 1.5 * errors["constant"]
