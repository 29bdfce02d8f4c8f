"""What sampling is told and what it leaves: names of films, the kernel of sliding attention, prompts without latents."""

import sys
from pathlib import Path

import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.data import latents
from jaxrepro.methods.vorta import drawing, router, samples, sampling, setting, sources
from jaxrepro.methods.vorta.drawing import Way
from jaxrepro.ops import sliding

sys.path.insert(0, str(Path(__file__).parent))
import vorta_tiny as tiny


def test_films_are_named_by_their_prompts_and_counted():
    given = ["A dog, running.", "a/b\\c", "A dog, running.", "", "é" * 300, "../x", "a/b\\c"]
    assert samples.film_names(given) == [
        "A dog, running.-0",
        "a-b-c-0",
        "A dog, running.-1",
        "video-0",
        "é" * 100 + "-0",
        "x-0",
        "a-b-c-1",
    ]


@pytest.fixture
def by_kernel(monkeypatch):
    """Kernels under the names of the real ones, on any device."""
    kernels = {"auto": sliding.sliding_groups}
    monkeypatch.setattr(sliding, "by_kernel", kernels.__getitem__)
    drawing._try.cache_clear()
    router.branches.cache_clear()
    yield kernels
    drawing._try.cache_clear()
    router.branches.cache_clear()


def test_the_kernel_of_a_config_reaches_every_way_and_not_the_training(
    by_kernel, monkeypatch, tmp_path
):
    def fast(q, k, v, grid, *, text=None):
        return sliding.sliding_groups(q, k, v, grid, text=text)

    seen = []
    keep = lambda *given, branches, **_: seen.append(branches[2]) or given[2]
    monkeypatch.setattr(sampling, "sample", keep)
    by_kernel["mosaic"] = fast
    for kernel in (None, "pallas"):
        config = tiny.config(tmp_path, decode__kernel=kernel)
        s = setting.prepare(config)
        prompts = sources.test_prompts(config, s.cfg, s.grid, 2)
        table = np.zeros((4, s.cfg.layers, s.cfg.heads), np.int8)
        for way in (Way(table), Way(table, cached=True), Way(table, coarse="merge")):
            drawing.sample(s, None, prompts, way)
        assert s.branches[2] is sliding.sliding_groups
    assert seen == 3 * [sliding.sliding_groups] + 3 * [fast]


def test_a_kernel_that_does_not_take_the_model_is_refused_before_weights_are_read(
    by_kernel, tmp_path
):
    def picky(q, *others, **more):
        raise UserError(f"head size {q.shape[3]} must be 64; take kernel='groups'")

    by_kernel["mosaic"] = picky
    s = setting.prepare(tiny.config(tmp_path, decode__kernel="pallas"))
    with pytest.raises(UserError) as error:
        drawing.kernel(s)
    size = s.cfg.head_dim
    assert str(error.value) == (
        f"decode.kernel=pallas: head size {size} must be 64; leave decode.kernel out for window groups"
    )


def test_prompts_without_latents_are_sampled_for_and_not_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    text = rng.normal(size=(3, 2, 21)).astype(np.float32)
    items = [{"id": name, "text": x} for name, x in zip(("a dog", "a cat", "empty"), text)]
    latents.write(tmp_path / "prompts", items, model="other", normalised=True)
    config = tiny.config(
        tmp_path,
        steps=0,
        router__path="r.safetensors",
        data__kind="folder",
        data__test=str(tmp_path / "prompts"),
        data__channels=4,
        decode__guidance=2.0,
        decode__empty="empty",
    )
    s = setting.prepare(config)
    of = config, s.cfg, s.grid
    config.model.path = "somewhere"  # nothing is trained, so nothing else is read
    sources.ready(*of)
    found = sources.test_prompts(*of, 2)
    assert found.names == ["a dog", "a cat"] and found.noise.shape == (2, 4, 2, 8, 8)
    np.testing.assert_array_equal(found.given.text, text[:2])
    np.testing.assert_array_equal(found.empty.text, np.stack([text[2]] * 2))
    one = sources.prompted(*of, "a cat", n=1, seed=0)
    np.testing.assert_array_equal(one.given.text[0], text[1])
    config.data.path = config.data.test
    with pytest.raises(
        UserError, match=r"holds prompts alone: data.path needs latents to train on"
    ):
        sources.folder(*of, "train")
