"""The VORTA run: what it writes, one pre-trained model for all, resumed steps that are the same, what is refused."""

import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxrepro import cli
from jaxrepro import config as configuration
from jaxrepro import sample as command
from jaxrepro.config import UserError
from jaxrepro.data import latents, video
from jaxrepro.methods.vorta import drawing, evaluation, report, router_files, routes, run, setting
from jaxrepro.models import video_dit
from jaxrepro.ops import flow
from jaxrepro.train import memory, metrics
from jaxrepro.train.loop import Run

sys.path.insert(0, str(Path(__file__).parent))
import vorta_tiny as tiny


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    with tiny.small(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A run of four steps without interruption."""
    folder = tmp_path_factory.mktemp("vorta") / "whole"
    return folder, run.run(tiny.config(cache), folder)


def test_a_run_leaves_routes_routers_and_pictures(finished, cache):
    folder, results = finished
    table = routes.load(folder / "routes.json")
    assert table.table.shape == (4, 1, 2) and table.model == "small"
    shares = [results[f"routes/{name}"] for name in ("full", "coreset", "sliding")]
    assert sum(shares) == pytest.approx(1)
    assert shares == [(table.table == j).mean() for j in range(3)]
    films = sorted((folder / "samples").glob("*.gif"))
    assert len(films) == 2
    with Image.open(films[0]) as film:
        assert film.n_frames == 2
    assert (folder / "samples" / "routes.png").is_file()
    assert (folder / "samples" / "curve.png").is_file()
    saved = router_files.load(folder / "router.safetensors", tiny.SHAPE)
    s, _, trained = run.trained(tiny.config(cache), folder)
    jax.tree.map(np.testing.assert_array_equal, saved, trained)
    fresh = setting.router.init(jax.random.key(0), s.cfg)
    assert np.abs(saved["bias"] - fresh["bias"]).max() > 1e-3


def test_errors_are_against_the_dense_video_at_costs_that_are_told(finished, cache):
    folder, results = finished
    # the same videos again, from the checkpoint and as files
    made = Path(run.sample(tiny.config(cache), folder, n=2)[-1]).parent
    dense, routed = (
        latents.Latents(made / "latents" / name).arrays([0, 1])["latents"]
        for name in ("dense", "routed")
    )
    error = np.square(dense - routed).mean()
    assert error > 0 and results["test/routed/error"] == pytest.approx(error, rel=1e-5)
    seen = [video.to_pictures(x).astype(float) for x in (dense, routed)]
    psnr = [10 * np.log10(255**2 / np.square(a - b).mean()) for a, b in zip(*seen)]
    assert results["test/routed/psnr"] == pytest.approx(np.mean(psnr), rel=1e-4)
    assert "test/routed/ssim" not in results  # pictures of 8 x 8 pixels
    for name in ("routed", "random", "static", "all_sliding"):
        assert 0 < results[f"test/{name}/flops"] <= 1
    assert results["test/random/flops"] == pytest.approx(results["test/routed/flops"])
    assert results["test/all_sliding/flops"] == 0.25
    assert results["test/all_sliding/error"] > 0
    texts = latents.Latents(made / "latents" / "dense").arrays([0, 1])["text"]
    for name, x in (("dense", dense), ("routed", routed)):
        right = video.recognise(x) == texts.argmax(-1)
        assert results[f"test/{name}/recognised"] == right.mean()


def test_cached_and_few_steps_are_measured_beside_dense_and_routed(finished):
    _, results = finished
    # attention in steps 0, 1, 2 of t = 1000, 900, 750, 500: the last is odd and below 800
    assert results["test/pab/reused"] == 0.25 and results["test/dense_pab/flops"] == 0.75
    assert results["test/few/dense/flops"] == 0.5
    for name in ("dense_pab", "few/dense"):
        assert results[f"test/{name}/error"] > 1e-8
    mine = results["test/routed/flops"]
    assert 0 < results["test/routed_pab/flops"] < mine and 0 < results["test/few/routed/flops"] < 1
    assert results["test/few/routed/error_to_few"] != results["test/few/routed/error"]


def test_the_end_of_a_run_says_shares_work_and_a_prediction_that_is_called_one(finished):
    _, results = finished
    # one block of a model of this size: its linear layers are not left out
    assert results["test/routed/flops"] == pytest.approx(results["work/attention"])
    assert results["work/attention"] < results["work/model"] <= 1
    *errors, shares, predicted = report.lines(results)
    assert len(errors) == 8 and errors[0].startswith("routed ")
    assert "coreset" in shares and f"of the model {results['work/model']:.3f}" in shares
    assert predicted.startswith("predicted, not measured")
    assert f"{1 / results['work/model']:.2f} times" in predicted


@pytest.mark.slow
def test_the_run_that_trains_the_model_has_it_as_all_others_do(tmp_path):
    config = tiny.config(tmp_path / "c", model__dtype="bfloat16")
    s = setting.prepare(config)
    with Run(config, tmp_path / "w", show=()) as open_run:
        mine = run.model(open_run, s)
    others = run.load(s, setting.kept_at(s))
    assert {x.dtype for x in jax.tree.leaves(mine)} == {jnp.dtype("bfloat16")}
    jax.tree.map(np.testing.assert_array_equal, mine, others)


def test_no_curve_moves_heads_to_a_branch_that_is_left_out(cache):
    curve = dict(decode__taus=(0.6, 0.9))
    assert evaluation.taus(tiny.config(cache, **curve)) == [0.3, 0.6, 0.9]
    assert evaluation.taus(tiny.config(cache, **curve, router__without="full")) == [0.3]


def test_a_dry_run_plans_the_stage_that_needs_more():
    # 2 video models of float32 and two moments of each parameter, or routers beside a frozen bfloat16 model
    at = lambda size, **change: run.plan(configuration.load(f"configs/vorta.py:{size}", change))
    assert at("gpu").stage == "pretrain"
    big = memory.estimate(at("gpu"))
    assert big["optimiser moments"] > 2 * big["gradients"] * 0.99 > 6e8
    assert at("paper_hunyuan").stage == "router"
    assert memory.estimate(at("paper_hunyuan"))["total"] < 70e9  # of 80


def test_the_model_is_trained_once_for_all_seeds_and_arms(finished, cache, tmp_path):
    (kept,) = cache.iterdir()
    config = tiny.config(cache, seed=1, router__timeless=True, loss__reg=0.1)
    assert setting.kept_at(setting.prepare(config)) == kept
    for change in ({"pretrain__steps": 3}, {"grid__size": (2, 4, 6)}, {"pretrain__seed": 1}):
        other = tiny.config(cache, **change)
        assert setting.kept_at(setting.prepare(other)) != kept
    lines = metrics.read(finished[0] / metrics.FILE)
    assert [line["stage"] for line in lines].count("pretrain") == 2


def test_a_table_from_a_file_takes_the_routers_place(finished, cache, tmp_path):
    folder, results = finished
    table = routes.load(folder / "routes.json")
    routes.save(tmp_path / "all.json", routes.uniform(table, "sliding"))
    only = dict(steps=0, decode__pab=0, decode__few=0, decode__controls=())
    config = tiny.config(cache, decode__table=str(tmp_path / "all.json"), **only)
    found = run.run(config, tmp_path / "w")
    assert found["routes/sliding"] == 1 and "gates/full" not in found
    assert found["test/routed/error"] == results["test/all_sliding/error"]
    assert not (tmp_path / "w" / "router.safetensors").exists()  # there are no routers
    routes.save(tmp_path / "few.json", table._replace(table=table.table[1:], t=table.t[1:]))
    for name, text in (("few", "routes are for 3 steps from t = 900"), ("none", "none.json")):
        config = tiny.config(cache, decode__table=str(tmp_path / f"{name}.json"), **only)
        with pytest.raises(UserError, match=text):
            run.run(config, tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_the_sampler_the_shift_and_the_cache_change_what_they_should(cache):
    plan = lambda few=False, **change: drawing.plan(tiny.config(cache, **change), few=few).t
    assert plan().tolist() == [1000, 900, 750, 500]
    assert plan(few=True).tolist() == [1000, 750]
    assert plan(decode__sampler="unipc", decode__few=0)[0] == 999
    assert plan(decode__shift=1.0).tolist() == [1000, 750, 500, 250]
    steps = lambda **change: drawing.computes(tiny.config(cache, **change)).tolist()
    assert steps() == [True, True, True, False]
    assert steps(decode__pab=3) == [True, True, False, True]  # 900 lies beyond 800
    assert steps(decode__pab_times=(600.0, 950.0)) == [True, False, True, True]


def test_a_way_of_sampling_is_its_rows_of_the_table_its_steps_and_its_guidance(cache, monkeypatch):
    config = tiny.config(cache, decode__guidance=3.0)
    s, seen = setting.prepare(config), []
    steps = np.array([[[0, 1]], [[1, 1]], [[2, 0]], [[2, 1]]], np.int8)  # no two are equal
    found = routes.Routes(steps, drawing.plan(config).t, "small")
    take = lambda *given, **more: seen.append((*given[4:], more)) or given[2]
    monkeypatch.setattr(drawing.sampling, "sample", take)
    prompts = run.sources.test_prompts(config, s.cfg, s.grid, 1)
    want = {  # table, times, steps that compute
        "dense": (0 * steps, [1000, 900, 750, 500], None),
        "routed": (steps, [1000, 900, 750, 500], None),
        "dense_pab": (0 * steps, [1000, 900, 750, 500], [True, True, True, False]),
        "routed_pab": (steps, [1000, 900, 750, 500], [True, True, True, False]),
        "few/dense": (0 * steps[[0, 2]], [1000, 750], None),
        "few/routed": (steps[[0, 2]], [1000, 750], None),
    }
    assert set(want) == set(drawing.ways(config))
    for name, (table, times, computes) in want.items():
        drawing.sample(s, None, prompts, drawing.way(config, name, found))
        mine, plan, more = seen.pop()
        np.testing.assert_array_equal(mine, table)
        assert plan.t.tolist() == times and more["scale"] == 3 and more["empty"] is prompts.empty
        assert computes == (None if more["computes"] is None else more["computes"].tolist())
        assert more["grid"] == s.grid and more["branches"] is drawing.branches(s)


@pytest.mark.slow
def test_guidance_leads_away_from_an_empty_text(finished, cache):
    folder, _ = finished
    config = tiny.config(cache, decode__guidance=3.0, decode__steps=1, decode__few=0)
    s, params, routers = run.trained(config, folder)
    prompts = run.sources.test_prompts(config, s.cfg, s.grid, 1)
    assert prompts.empty is not None and not prompts.empty.text.any()
    table = evaluation.table_of(s, params, routers, 0.3)
    x = drawing.sample(s, params, prompts, drawing.way(config, "dense", table))
    # one step of Euler ends at noise - v, and v = v_empty + 3 (v_given - v_empty)
    two = flow.both(prompts.given, prompts.empty)
    x2, t = jnp.concatenate([prompts.noise] * 2), jnp.full(2, 1000.0)
    given, empty = jax.jit(lambda p: video_dit.apply(p, s.cfg, x2, t, two))(params)
    want = np.asarray(prompts.noise[0] - (empty + 3 * (given - empty)))
    np.testing.assert_allclose(x[0], want, atol=1e-4 * np.abs(want).max())
    assert np.abs(given - empty).max() > 1e-3
    plain = run.sources.test_prompts(tiny.config(cache), s.cfg, s.grid, 1)
    assert plain.empty is None


def test_sample_writes_videos_latents_and_routes_of_a_run(finished, cache, capsys):
    folder, _ = finished
    words = [f"--workdir={folder}", "--prompt=red disc right slow", "--n=2", "--seed=1"]
    assert cli.guard(command.main, words) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines() if line]
    made = printed[-1].parent
    films = [
        made / way / f"red disc right slow-{i}.gif" for way in ("dense", "routed") for i in range(2)
    ]
    assert printed == [*films, made / "latents", made / "routes.json"]
    assert all(path.exists() for path in printed)
    kept = latents.Latents(made / "latents" / "routed")
    assert kept.shape == (4, 2, 8, 8) and kept.ids == [f"{i}/red disc right slow" for i in range(2)]
    assert np.abs(kept[0]["latents"] - kept[1]["latents"]).max() > 1e-3  # each its own noise
    np.testing.assert_array_equal(kept[0]["text"].argmax(-1), [0, 4, 10, 18])
    table = routes.load(made / "routes.json")
    np.testing.assert_array_equal(table.table, routes.load(folder / "routes.json").table)


def test_sample_needs_no_run_where_routers_are_given(finished, cache, tmp_path, capsys):
    folder, _ = finished
    flags = tiny.SETTINGS | {"pretrain.cache": cache, "steps": 0, "decode.videos": ("routed_pab",)}
    flags |= {"router.path": folder / "router.safetensors"}
    words = ["--config=configs/vorta.py:tiny", *(f"--config.{k}={v}" for k, v in flags.items())]
    assert cli.guard(command.main, [*words, f"--workdir={tmp_path / 'w'}", "--n=2"]) == 0
    out = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [Path(p).name for p in out][2:] == ["latents", "routes.json"] and "routed_pab" in out[0]
    for extra, text in (
        ([], "--workdir=FOLDER is required"),
        (["--workdir=x", "--config.steps=3"], "--config.steps=3 would be trained"),
        (["--workdir=x", "--prompt=red disc"], "one word of each of disc, square"),
        (["--workdir=x", "--prompt=red red disc slow"], "one word of each"),
        (["--workdir=x", "--temperature=1"], "--temperature: video models have none"),
        (["--workdir=x", "--config.decode.videos=('best',)"], "decode.videos=best: dense, routed"),
        (["--workdir=x", "--config.pretrain.seed=7"], "there is no pre-trained model at"),
    ):
        assert cli.guard(command.main, [*words, *extra]) == 2
        assert text in capsys.readouterr().err
    assert cli.guard(command.main, ["--config=configs/soc.py:tiny", "--workdir=x"]) == 2
    assert "soc samples what a run trained" in capsys.readouterr().err
    assert not Path("x").exists()


@pytest.mark.slow
def test_a_resumed_run_takes_the_same_steps(finished, cache, tmp_path):
    whole, results = finished
    first = tmp_path / "first"
    run.run(tiny.config(cache, steps=2, eval__n=1), first)
    for name in ("summary.json", "samples"):  # as if it had been stopped
        path = first / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run.run(tiny.config(cache), first)
    assert again == results
    same = router_files.load(first / "router.safetensors", tiny.SHAPE)
    right = router_files.load(whole / "router.safetensors", tiny.SHAPE)
    jax.tree.map(np.testing.assert_array_equal, same, right)


@pytest.mark.slow
def test_routers_from_a_file_are_evaluated_as_in_their_own_run(finished, cache, tmp_path):
    folder, results = finished
    path = str(folder / "router.safetensors")
    again = run.run(tiny.config(cache, steps=0, router__path=path), tmp_path / "w")
    assert again == results
    assert run.evaluate(tiny.config(cache), folder, n=2).items() <= results.items()


@pytest.mark.slow
def test_searched_tables_cost_the_same_and_coreset_is_coreset(finished, cache, tmp_path):
    folder, _ = finished
    names = ("searched", "windows", "coreset", "all_coreset", "average")
    change = dict(steps=0, router__path=str(folder / "router.safetensors"), decode__controls=names)
    change |= dict(decode__pab=0, decode__few=0)
    found = run.run(tiny.config(cache, **change), tmp_path / "w")
    other = run.run(tiny.config(cache, **change, router__coarse="average_frames"), tmp_path / "a")
    for results in (found, other):
        assert results["test/all_coreset/flops"] == 0.25
        for name in {*names} - {"all_coreset"}:
            assert results[f"test/{name}/flops"] == pytest.approx(
                results["test/routed/flops"], rel=0.02
            )
    for name in {*names} - {"searched"}:  # whatever the routers were trained with
        key = f"test/{name}/error"
        assert other[key] == pytest.approx(found[key], rel=1e-4) and found[key] > 0
    assert other["test/searched/error"] != pytest.approx(found["test/searched/error"], rel=0.01)


@pytest.mark.slow
def test_eight_devices_train_and_sample_as_one_does(cache, tmp_path, capsys):
    """Rows over four devices, tokens and heads over two (Ulysses)."""
    change = dict(eval__n=4, steps=2, router__without="full", decode__controls=("all_sliding",))
    change |= dict(decode__pab=0, decode__few=0)
    results = [
        run.run(tiny.config(cache / name, mesh=mesh, **change), tmp_path / name)
        for name, mesh in (("one", (1, 1, 1, 1)), ("eight", (2, 2, 2, 1)))
    ]
    load = results[1].pop("routes/load")
    assert 1 <= load <= 2 and "heads over 2 devices: the fullest has" in capsys.readouterr().out
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert results[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    one, eight = (
        router_files.load(tmp_path / name / "router.safetensors", tiny.SHAPE)
        for name in ("one", "eight")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, eight)


REFUSED = {
    "router.micro_batches=3 does not divide router.batch=4": {"router__micro_batches": 3},
    "router.without='dense' is not one of": {"router__without": "dense"},
    "coarse='mean' is not one of": {"router__coarse": "mean"},
    "loss.power=3": {"loss__power": 3},
    "loss.reg=-1.0": {"loss__reg": -1.0},
    "decode.tau=1.5": {"decode__taus": (1.5,)},
    "decode.tau=0.6 moves heads to full attention": {
        "decode__tau": 0.6,
        "router__without": "full",
    },
    "decode.sampler='ddim'": {"decode__sampler": "ddim"},
    "decode.kernel='fast' is not pallas; leave it out": {"decode__kernel": "fast"},
    "decode.kernel=pallas: kernel='mosaic' needs": {"decode__kernel": "pallas"},
    "decode.controls=best": {"decode__controls": ("best",)},
    "decode.few=5 steps of a grid of 4": {"decode__few": 5},
    "decode.few=2 steps are taken by Euler's method": {"decode__sampler": "unipc"},
    "decode.pab=1: attention every 2 steps or more": {"decode__pab": 1},
    "decode.pab_times=(800.0, 100.0)": {"decode__pab_times": (800.0, 100.0)},
    "decode.guidance=-1.0": {"decode__guidance": -1.0},
    "decode.empty='x' serves Wan's guidance": {"decode__empty": "x"},
    "decode.videos=routed_pab: dense, routed": {
        "decode__videos": ("routed_pab",),
        "decode__pab": 0,
    },
    "decode.format='avi' is not one of gif, mp4": {"decode__format": "avi"},
    "decode.fps=60; use more than 0 and up to 50 for gif": {"decode__fps": 60},
    "decode.vae='x' reads latents of a released model": {"decode__vae": "x"},
    "data.kind='films' is not one of shapes, clips, folder": {"data__kind": "films"},
    "data.path is read with data.kind=folder": {"data__path": "x"},
    "data.path is needed with data.kind=folder": {"data__kind": "folder"},
    "data.clips names 0 clips": {"data__kind": "clips", "data__clips": ()},
    "neither a video file nor one of": {"data__kind": "clips", "data__clips": ("no",)},
    "model.shape='huge'": {"model__shape": "huge"},
    "give its folder as model.path": {"model__shape": "wan_1_3b", "data__kind": "folder"},
    "moving shapes have 4 channels and texts 21 wide": {"model__shape": "wan_1_3b"},
    "has no pooled text for HunyuanVideo": {"model__shape": "hunyuan_tiny"},
    "steps=0 without router.path or decode.table": {"steps": 0},
    "there is no file gone.safetensors": {"steps": 0, "router__path": "gone.safetensors"},
    "window of 2 tiles along height must be odd": {"grid__window": (1, 2, 1)},
    "mesh.sequence=4 does not divide the 2 attention heads": {"mesh": (2, 1, 4, 1)},
    "mesh.tensor=2 splits the heads": {"mesh": (1, 4, 1, 2)},
    "router.batch / router.micro_batches=2 does not divide over data * fsdp = 4": {
        "mesh": (4, 1, 2, 1),
        "router__micro_batches": 2,
    },
    "router.batch / router.micro_batches=4 does not divide over data * fsdp = 8": {
        "mesh": (-1, 1, 1, 1)
    },
    "pretrain.batch=2 does not divide over data * fsdp = 4": {
        "mesh": (2, 2, 2, 1),
        "pretrain__batch": 2,
    },
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(text, cache, tmp_path):
    with pytest.raises(UserError) as error:
        run.run(tiny.config(cache, **REFUSED[text]), tmp_path / "w")
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "w").exists()
