"""The VORTA run: what it writes, one pre-trained model for all, resumed steps that are the same, what is refused."""

import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxrepro.config import UserError
from jaxrepro.methods.vorta import router_files, routes, run, setting
from jaxrepro.train import metrics

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
    assert table.table.shape == (2, 1, 2) and table.model == "small"
    shares = [results[f"routes/{name}"] for name in ("full", "coreset", "sliding")]
    assert sum(shares) == pytest.approx(1)
    assert shares == [(table.table == j).mean() for j in range(3)]
    films = sorted((folder / "samples").glob("*.gif"))
    assert len(films) == 2 and Image.open(films[0]).n_frames == 2
    assert (folder / "samples" / "routes.png").is_file()
    assert (folder / "samples" / "curve.png").is_file()
    saved = router_files.load(folder / "router.safetensors", tiny.SHAPE)
    s, _, trained = run.trained(tiny.config(cache), folder)
    jax.tree.map(np.testing.assert_array_equal, saved, trained)
    fresh = setting.router.init(jax.random.key(0), s.cfg)
    assert np.abs(saved["bias"] - fresh["bias"]).max() > 1e-3


def test_errors_are_against_the_dense_video_at_costs_that_are_told(finished):
    _, results = finished
    for name in ("routed", "random", "static"):
        assert results[f"test/{name}/error"] >= 0
        assert 0 < results[f"test/{name}/flops"] <= 1
    assert 0 <= results["test/dense/recognised"] <= 1


def test_the_model_is_trained_once_for_all_seeds_and_arms(finished, cache, tmp_path):
    (kept,) = cache.iterdir()
    config = tiny.config(cache, seed=1, router__timeless=True, loss__reg=0.1)
    assert setting.kept_at(setting.prepare(config)) == kept
    for change in ({"pretrain__steps": 3}, {"grid__size": (2, 4, 6)}, {"pretrain__seed": 1}):
        other = tiny.config(cache, **change)
        assert setting.kept_at(setting.prepare(other)) != kept
    lines = metrics.read(finished[0] / metrics.FILE)
    assert [line["stage"] for line in lines].count("pretrain") == 2


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


REFUSED = {
    "router.micro_batches=3 does not divide router.batch=4": {"router__micro_batches": 3},
    "router.chunk=3 does not divide 2 heads": {"router__chunk": 3},
    "router.without='dense' is not one of": {"router__without": "dense"},
    "coarse='mean' is not one of": {"router__coarse": "mean"},
    "loss.power=3": {"loss__power": 3},
    "loss.reg=-1.0": {"loss__reg": -1.0},
    "decode.tau=1.5": {"decode__taus": (1.5,)},
    "decode.sampler='ddim'": {"decode__sampler": "ddim"},
    "decode.controls=best": {"decode__controls": ("best",)},
    "model.shape='huge'": {"model__shape": "huge"},
    "give its folder as model.path": {"model__shape": "wan_1_3b"},
    "steps=0 without router.path": {"steps": 0},
    "window of 2 tiles along height must be odd": {"grid__window": (1, 2, 1)},
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(text, cache, tmp_path):
    with pytest.raises(UserError) as error:
        run.run(tiny.config(cache, **REFUSED[text]), tmp_path / "w")
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "w").exists()
