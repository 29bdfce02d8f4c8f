"""The kinds of data of a VORTA run: shapes, clips, folders; what is tested on is not trained on; runs of each."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.data import clip_latents, latents, video_clips, video_output
from jaxrepro.files import write_json
from jaxrepro.methods.vorta import run, setting, sources
from jaxrepro.models import video_dit, video_files
from jaxrepro.models.hunyuan_video import HunyuanVideoConfig

sys.path.insert(0, str(Path(__file__).parent))
import vorta_tiny as tiny

RELEASED = dict(channels=16, out_channels=16, text=latents.TEXT)
CLIPS = {"data__kind": "clips", "data__channels": 6, "data__patch": (2, 2, 2)}


def film(seed, frames=40):
    """A smooth picture that moves, (frames, 16, 16, rgb)."""
    at = np.indices((frames, 16, 16)).astype(float)
    waves = [np.sin(at[0] / 5 + at[1] * k / 3 + at[2] / 4 + seed + k) for k in range(3)]
    return ((np.stack(waves, -1) + 1) * 127).astype(np.uint8)


@pytest.fixture
def clips(monkeypatch):
    """Two clips without files."""
    made = {"a.mp4": film(0), "b.mp4": film(5)}
    monkeypatch.setattr(video_clips, "frames", lambda name, **size: made[name])
    sources.clips.cache_clear()
    yield made
    sources.clips.cache_clear()


def parts(config):
    return config, setting.geometry(config), setting.grid_of(config)


def batch(config, split, n=4, seed=0):
    return sources.dataset(*parts(config), split, batch=n, seed=seed)[0]


def test_shapes_are_made_for_the_grid_and_tests_are_others(tmp_path):
    config = tiny.config(tmp_path)
    one, other = batch(config, "train"), batch(config, "test")
    assert one.arrays["latents"].shape == (4, 4, 2, 8, 8)
    assert not set(one.ids) & set(other.ids)
    x = one.arrays["latents"]
    assert sources.pictures(*parts(config), x).shape == (4, 2, 8, 8, 3)


def test_clips_are_cut_in_time_and_their_components_come_from_the_training_part(clips, tmp_path):
    config = tiny.config(tmp_path, **CLIPS, data__clips=tuple(clips))
    found = batch(config, "train", 6)
    assert found.arrays["latents"].shape == (6, 6, 2, 8, 8)  # 4 frames of 16 x 16 pixels
    assert found.arrays["text"].shape == (6, 1, 21) and (found.arrays["text"].sum(-1) == 1).all()
    which = [list(clips).index(e["clip"]) for e in found.examples]
    np.testing.assert_array_equal(found.arrays["text"][:, 0].argmax(-1), which)
    rows = sources.clips_of(*parts(config)).rows
    for split, frames in (("train", slice(30)), ("test", slice(30, 40))):
        for row in rows[split]:
            at = int(row["id"].split("/")[-1])
            np.testing.assert_array_equal(row["pixels"], clips[row["clip"]][frames][at : at + 4])
    assert len(rows["train"]) == 28 and len(rows["test"]) == 8  # one every 2 frames
    tests = batch(config, "test", 8)
    seen = sources.pictures(*parts(config), tests.arrays["latents"]).astype(float)
    truth = np.stack([e["pixels"] for e in tests.examples])
    assert np.abs(seen - truth).mean() < 6  # of 255, by 6 of 24 components
    before = sources.clips_of(*parts(config)).pca.basis
    sources.clips.cache_clear()
    for pixels in clips.values():
        pixels[30:] = 255 - pixels[30:]
    np.testing.assert_array_equal(sources.clips_of(*parts(config)).pca.basis, before)


def test_a_prompt_names_a_clip(clips, tmp_path):
    config = tiny.config(tmp_path, **CLIPS, data__clips=tuple(clips))
    prompts = sources.prompted(*parts(config), "b.mp4", n=2, seed=3)
    assert prompts.names == ["b.mp4"] * 2 and prompts.given.text.argmax(-1).tolist() == [[1], [1]]
    assert np.abs(prompts.noise[0] - prompts.noise[1]).max() > 1
    with pytest.raises(UserError, match=r"--prompt='c' is not one of data.clips: a.mp4, b.mp4"):
        sources.prompted(*parts(config), "c", n=1, seed=0)


def encoded(folder, n, *, seed=0, model="other", shape=(4, 2, 8, 8), width=21, **more):
    """A folder of n items of normal latents and texts of 3 tokens, the last of which counts for odd items alone."""
    rng = np.random.default_rng(seed)
    normal = lambda *s: rng.normal(size=s).astype(np.float32)
    items = [
        {
            "id": f"item {i}",
            "latents": normal(*shape),
            "text": normal(3, width),
            "length": 2 + i % 2,
        }
        | {name: normal(size) for name, size in more.items()}
        for i in range(n)
    ]
    latents.write(folder, items, model=model, normalised=True)
    return items


def test_a_folder_gives_its_items_and_its_empty_text(tmp_path):
    items = encoded(tmp_path / "train", 5)
    tests = encoded(tmp_path / "test", 3, seed=1)
    config = tiny.config(
        tmp_path,
        data__kind="folder",
        data__path=str(tmp_path / "train"),
        data__test=str(tmp_path / "test"),
        data__channels=4,
        decode__guidance=2.0,
        decode__empty="item 0",
    )
    found = batch(config, "train", 5)
    order = [int(name.split()[1]) for name in found.ids]
    assert sorted(order) == list(range(5))
    np.testing.assert_array_equal(
        found.arrays["latents"], np.stack([items[i]["latents"] for i in order])
    )
    sources.ready(*parts(config))
    prompts = sources.test_prompts(*parts(config), 2)
    assert prompts.names == ["item 1", "item 2"]  # it is not sampled for
    np.testing.assert_array_equal(prompts.given.text[0], tests[1]["text"])
    np.testing.assert_array_equal(prompts.empty.text[1, :2], tests[0]["text"][:2])
    assert not prompts.empty.text[:, 2].any()  # not valid
    one = sources.prompted(*parts(config), "item 1", n=1, seed=0)
    np.testing.assert_array_equal(one.given.text[0], tests[1]["text"])
    assert sources.pictures(*parts(config), np.zeros((1, 4, 2, 8, 8), np.float32)) is None
    for change, text in (
        ({"decode.empty": "item 9"}, "decode.empty='item 9' is no item of"),
        ({"decode.empty": None}, "name its item of data.test as decode.empty, or set decode.guid"),
        ({"grid.size": (4, 4, 4)}, "2 latent frames, 4 are asked for"),
        ({"grid.size": (2, 4, 8)}, "set grid.size"),
        ({"data.test": None}, "data.test is needed with data.kind=folder"),
        ({"eval.n": 3}, "3 videos of 2 test texts: eval.n .* may be 2 at most"),
    ):
        bad = config.copy_and_resolve_references()
        bad.update_from_flattened_dict(change)
        with pytest.raises(UserError, match=text):
            sources.ready(*parts(bad))
    encoded(tmp_path / "wide", 1, width=22)
    config.data.test = str(tmp_path / "wide")
    with pytest.raises(UserError, match="texts are 22 wide, the model reads 21"):
        sources.ready(*parts(config))


def given_model(folder, kind, **sizes):
    """A folder with the config.json of a model of two heads that reads 16 channels and texts 4096 wide."""
    cfg = video_dit.PRESETS[f"{kind}_tiny"]
    cfg = dataclasses.replace(cfg, frequencies=256, **(RELEASED | sizes))
    folder.mkdir()
    write_json(folder / "config.json", video_files.to_diffusers(cfg))
    return {"model__path": str(folder), "data__kind": "folder"}


@pytest.mark.parametrize(
    "mine, other", [("wan", "hunyuan"), ("wan", "other"), ("hunyuan", "wan"), ("hunyuan", "other")]
)
def test_latents_of_another_model_are_refused_before_anything_is_written(mine, other, tmp_path):
    pooled = {"pooled": latents.POOLED} if "hunyuan" in (mine, other) else {}
    # more frames than the model's grid, of which the last are taken: the shape fits
    encoded(tmp_path / "x", 2, model=other, shape=(16, 3, 8, 8), width=latents.TEXT, **pooled)
    made = given_model(tmp_path / "m", mine, **({"pooled": 768} if mine == "hunyuan" else {}))
    paths = dict(data__path=str(tmp_path / "x"), data__test=str(tmp_path / "x"))
    says = f"x: encoded for {other}, this model reads latents and texts of {mine}: encode them"
    with pytest.raises(UserError, match=says) as error:
        run.run(tiny.config(tmp_path, **made, **paths), tmp_path / "w")
    assert "\n" not in str(error.value) and not (tmp_path / "w").exists()


@pytest.mark.parametrize("kind, there, needed", [("other", 0, 768), ("hunyuan", 768, 8)])
def test_a_model_that_reads_pooled_text_is_given_it(kind, there, needed, tmp_path):
    sizes = RELEASED if kind == "hunyuan" else dict(channels=4, out_channels=4, text=21)
    made = given_model(tmp_path / "m", "hunyuan", **sizes, pooled=needed)
    shape, more = (sizes["channels"], 2, 8, 8), {"pooled": there} if there else {}
    encoded(tmp_path / "x", 1, model=kind, shape=shape, width=sizes["text"], **more)
    config = tiny.config(tmp_path, **made, data__test=str(tmp_path / "x"), steps=0)
    says = rf"pooled texts of {there} numbers .*, HunyuanVideo reads {needed}"
    with pytest.raises(UserError, match=says):
        sources.ready(*parts(config))


def test_texts_have_as_many_slots_in_tests_as_in_training(tmp_path):
    """Wan reads padding: with less of it the same text would be another one."""
    for name, n in (("train", 2), ("test", 1)):  # texts of 2 and 3 tokens; of 2
        encoded(tmp_path / name, n)
    paths = dict(data__path=str(tmp_path / "train"), data__test=str(tmp_path / "test"))
    config = tiny.config(tmp_path, data__kind="folder", data__channels=4, **paths)
    for split in ("train", "test"):
        assert batch(config, split, 1).arrays["text"].shape == (1, 3, 21)
    encoded(tmp_path / "wan", 1, model="wan", shape=(16, 2, 8, 8), width=latents.TEXT)
    folder = dict(data__path=str(tmp_path / "wan"), data__test=str(tmp_path / "wan"))
    config = tiny.config(tmp_path, **given_model(tmp_path / "m", "wan"), **folder)
    assert batch(config, "test", 1).arrays["text"].shape == (1, 512, latents.TEXT)


def test_a_command_makes_a_folder_of_clips(clips, tmp_path, capsys):
    out = tmp_path / "made"
    words = [str(out), "--clips", *clips, "--size", "2", "8", "8", "--patch", "2", "2", "2"]
    assert clip_latents.main([*words, "--channels", "6"]) == 0
    assert "28 to train, 8 to test" in capsys.readouterr().out
    config = tiny.config(
        tmp_path,
        data__kind="folder",
        data__path=str(out / "train"),
        data__test=str(out / "test"),
        data__channels=6,
    )
    sources.ready(*parts(config))
    same = tiny.config(tmp_path, **CLIPS, data__clips=tuple(clips))
    one, other = batch(config, "test", 8), batch(same, "test", 8)
    for name in ("latents", "text"):
        np.testing.assert_array_equal(one.arrays[name], other.arrays[name])
    seen = [sources.pictures(*parts(c), one.arrays["latents"]) for c in (config, same)]
    np.testing.assert_array_equal(*seen)
    assert clip_latents.main(words) == 2  # it exists
    assert clip_latents.main([str(tmp_path / "b"), *words[1:-1], "0"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_a_run_on_clips_from_files(tmp_path):
    pytest.importorskip("av")
    for i in range(2):
        video_output.write_mp4(tmp_path / f"{i}.mp4", film(5 * i), fps=10)
    names = tuple(str(tmp_path / f"{i}.mp4") for i in range(2))
    config = tiny.config(tmp_path / "c", **CLIPS, data__clips=names, decode__pab=0, decode__few=0)
    with tiny.small(tmp_path / "programs"):
        results = run.run(config, tmp_path / "w")
        made = run.sample(config, tmp_path / "w", n=2)
    assert len(list((tmp_path / "w" / "samples").glob("*.gif"))) == 2
    assert [Path(p).suffix for p in made] == [".gif"] * 4 + ["", ".json"]
    assert "test/dense/recognised" not in results
    folder = Path(made[-1]).parent / "latents"
    dense, routed = (latents.Latents(folder / n).arrays([0, 1]) for n in ("dense", "routed"))
    error = np.square(dense["latents"] - routed["latents"]).mean()
    assert results["test/routed/error"] == pytest.approx(error, rel=1e-5) and error > 0


@pytest.mark.slow
def test_a_run_on_a_folder_and_a_model_of_hunyuan_video(tmp_path):
    """Lengths of text, pooled text and embedded guidance through training, caching, few steps and samples."""
    cfg = dataclasses.replace(video_dit.PRESETS["hunyuan_tiny"], double=1, single=1, **RELEASED)
    cfg = dataclasses.replace(cfg, pooled=latents.POOLED, frequencies=256)
    assert isinstance(cfg, HunyuanVideoConfig)
    video_files.save(tmp_path / "model", video_dit.init(jax.random.key(0), cfg), cfg)
    kind = dict(model="hunyuan", shape=(16, 2, 8, 8), width=latents.TEXT, pooled=latents.POOLED)
    for seed, name in enumerate(("train", "test")):
        encoded(tmp_path / name, 4, seed=seed, **kind)
    config = tiny.config(
        tmp_path / "c",
        model__path=str(tmp_path / "model"),
        data__kind="folder",
        data__path=str(tmp_path / "train"),
        data__test=str(tmp_path / "test"),
        decode__guidance=6.0,
        decode__videos=("routed_pab", "few/routed"),
    )
    with tiny.small(tmp_path / "programs"):
        results = run.run(config, tmp_path / "w")
        made = run.sample(config, tmp_path / "w", prompt="item 1", n=2, seed=4)
    assert results["test/routed_pab/error"] > 0 and 0 < results["work/model"] < 1
    assert [Path(p).name for p in made] == ["latents", "routes.json"]  # no VAE, no films
    kept = latents.Latents(Path(made[0]) / "few-routed")
    assert kept.model == "hunyuan" and kept.ids == ["0/item 1", "1/item 1"]
    assert kept[0]["length"] == 3 and kept[0]["pooled"].shape == (768,)
    own = latents.Latents(tmp_path / "w" / "samples" / "videos" / "latents" / "dense")
    assert own.ids == ["0/item 0", "1/item 1"] and own.shape == (16, 2, 8, 8)
