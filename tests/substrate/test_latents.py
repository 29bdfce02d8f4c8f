"""Folders of latents: what is written is read, by every process its part; what is wrong is one line."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.data import latents
from jaxrepro.data.latents import Latents


def examples(n=5, frames=3, tokens=6, seed=0, width=770):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return [
        {
            "id": f"clip {i}",
            "latents": draw(16, frames, 2, 4),
            "text": draw(tokens, width),
            "mask": np.arange(tokens) < i % (tokens + 1),
            "pooled": draw(768),
        }
        for i in range(n)
    ]


def stored(folder, **kw):
    given = {"model": "hunyuan", "normalised": True, "max_shard_bytes": 60_000} | kw
    data = examples()
    assert latents.write(folder, data, **given) == 5
    return data


def one_line(call, *words):
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_what_is_written_is_read_from_several_shards(tmp_path):
    data = stored(tmp_path / "x")
    assert len(list((tmp_path / "x").glob("*.safetensors"))) == 3
    found = Latents(tmp_path / "x", slots=8)
    assert (len(found), found.shape, found.ids) == (5, (16, 3, 2, 4), [e["id"] for e in data])
    for example, item in zip(data, found):
        n = int(example["mask"].sum())
        np.testing.assert_array_equal(item["latents"], example["latents"])
        np.testing.assert_array_equal(item["pooled"], example["pooled"])
        np.testing.assert_array_equal(item["text"][:n], example["text"][:n])
        assert item["length"] == n and item["text"].shape == (8, 770) and not item["text"][n:].any()


def test_the_last_frames_are_used(tmp_path):
    data = stored(tmp_path / "x")
    found = Latents(tmp_path / "x", frames=2)
    np.testing.assert_array_equal(found[3]["latents"], data[3]["latents"][:, 1:])
    assert found.shape == (16, 2, 2, 4) and found[3]["text"].shape == (256, 770)
    one_line(lambda: Latents(tmp_path / "x", frames=4), "clip 0", "3 latent frames", "4")
    one_line(lambda: Latents(tmp_path / "x", frames=0), "frames is 0")
    one_line(lambda: Latents(tmp_path / "x", slots=3), "clip 4", "4 text tokens", "3")


def test_constants_are_those_of_the_public_vaes():
    # config.json of the VAEs: scaling_factor 0.476986; latents_mean and latents_std
    x = np.ones((2, 16, 1, 1, 1), np.float32)
    np.testing.assert_allclose(latents.normalise(x, "hunyuan"), 0.476986, rtol=1e-6)
    z = latents.normalise(x, "wan")[0, :, 0, 0, 0]
    np.testing.assert_allclose(z[[0, 15]], [1.7571 / 2.8184, 1.2921 / 1.9160], rtol=1e-6)
    assert latents.normalise(x, "other").tolist() == x.tolist()
    one_line(lambda: latents.normalise(x[:, :8], "wan"), "8 channels", "16")
    one_line(lambda: latents.normalise(x, "sora"), "sora", "hunyuan")


@given(st.sampled_from(latents.MODELS), st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_denormalising_undoes_normalising(model, seed):
    x = np.random.default_rng(seed).normal(size=(2, 16, 3, 2, 2)).astype(np.float32) * 3
    back = latents.denormalise(latents.normalise(x, model), model)
    np.testing.assert_allclose(back, x, atol=1e-5)


def test_latents_of_a_vae_are_normalised_when_they_are_read(tmp_path):
    data = stored(tmp_path / "x", model="wan", normalised=False)
    item = Latents(tmp_path / "x")[2]
    np.testing.assert_array_equal(item["latents"], latents.normalise(data[2]["latents"], "wan"))
    assert item["text"].shape == (512, 770) and "pooled" not in item


def test_row_0_of_a_packed_text_is_the_pooled_vector(tmp_path):
    data = examples()
    packed = [
        {k: e[k] for k in ("id", "latents", "mask")}
        | {"text": latents.pack(e["pooled"], e["text"])}
        for e in data
    ]
    latents.write(tmp_path / "x", packed, model="hunyuan", normalised=True, packed=True)
    stored(tmp_path / "y")
    one, other = Latents(tmp_path / "x"), Latents(tmp_path / "y")
    for i in range(5):
        for name in ("latents", "text", "pooled", "length"):
            np.testing.assert_array_equal(one[i][name], other[i][name])
    assert packed[0]["text"].shape == (7, 770)
    one_line(lambda: latents.pack(data[0]["pooled"], data[0]["text"][:, :700]), "768")


def test_half_precision_is_kept_in_the_file_and_float32_for_the_model(tmp_path):
    data = examples(1)
    data[0]["latents"] = data[0]["latents"].astype(ml_dtypes.bfloat16)
    latents.write(tmp_path / "x", data, model="hunyuan", normalised=True)
    item = Latents(tmp_path / "x")[0]
    np.testing.assert_array_equal(item["latents"], data[0]["latents"].astype(np.float32))
    assert item["latents"].dtype == np.float32


@pytest.mark.parametrize("seed", [None, 3])
def test_the_parts_of_all_processes_are_the_batch_of_one(tmp_path, seed):
    stored(tmp_path / "x")
    found = Latents(tmp_path / "x", slots=6)
    whole = latents.dataset(found, batch=4, seed=seed)
    parts = [latents.dataset(found, batch=4, seed=seed, part=(i, 2)) for i in range(2)]
    for step in (0, 1, 7):
        batch = whole[step]
        assert {n: x.shape for n, x in batch.arrays.items()} == {
            "latents": (4, 16, 3, 2, 4),
            "text": (4, 6, 770),
            "length": (4,),
            "pooled": (4, 768),
        }
        for name, x in batch.arrays.items():
            np.testing.assert_array_equal(np.concatenate([p[step].arrays[name] for p in parts]), x)
        assert parts[1][step].ids == batch.ids == whole[step].ids
    order = [name for step in range(5) for name in whole[step].ids]
    assert sorted(order[:5]) == found.ids and (order[:5] == found.ids) == (seed is None)
    one_line(lambda: latents.dataset(found, batch=3, part=(0, 2)), "batch of 3", "2 processes")


def test_only_what_is_asked_for_is_read(tmp_path):
    stored(tmp_path / "x")
    found = Latents(tmp_path / "x", slots=6)
    (tmp_path / "x" / "latents-00002.safetensors").unlink()
    assert found[0]["id"] == "clip 0"
    one_line(lambda: Latents(tmp_path / "x"), "latents-00002.safetensors", "not in the folder")


def damaged(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.update(format="other"), ["format"]),
        (lambda x: x.update(version=2), ["version 2"]),
        (lambda x: x.update(model="sora"), ["hunyuan, wan, other"]),
        (lambda x: x.update(packed=1), ["packed", "true or false"]),
        (lambda x: x.update(items=[]), ["items"]),
        (lambda x: x["items"][1].pop("length"), ["item 1", "length"]),
        (lambda x: x["items"][1].update(length=7), ["clip 1", "length 7", "6 text states"]),
        (lambda x: x["items"][1].update(length=1.5), ["item 1", "whole number"]),
        (lambda x: x["items"][1].update(id="clip 9"), ["clip 9", "has no latents"]),
        (lambda x: x["items"][1].update(id="clip 0"), ["clip 0", "twice"]),
        (lambda x: x["items"][1].update(file="../a"), ["item 1", "outside the folder"]),
        (
            lambda x: x["items"][1].update(file="latents-00002.safetensors"),
            ["latents-00002", "clip 1", "lies in latents-0000"],
        ),
    ],
)
def test_a_damaged_index_is_one_line_that_names_the_place(tmp_path, change, words):
    stored(tmp_path / "x")
    damaged(tmp_path / "x", change)
    one_line(lambda: Latents(tmp_path / "x"), "x/", *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.pop("latents"), ["example 3", "no latents"]),
        (lambda e: e.pop("pooled"), ["example 3", "no pooled"]),
        (lambda e: e.update(text=np.zeros((6, 770), int)), ["example 3", "text is int64"]),
        (lambda e: e.update(mask=np.array([1, 0, 1, 0, 0, 0])), ["example 3", "mask"]),
        (lambda e: e.update(mask=np.ones(4)), ["example 3", "mask", "(6,)"]),
        (lambda e: e.update(latents=e["latents"][:8]), ["clip 3", "(8, 3, 2, 4)"]),
        (lambda e: e.update(latents=e["latents"][0]), ["clip 3", "4 axes"]),
        (lambda e: e.update(pooled=e["pooled"][:5]), ["clip 3", "(768,)"]),
        (lambda e: e.update(text=e["text"][:, :9]), ["text is [9, 770] wide"]),
        (lambda e: e.update(id="clip 1"), ["clip 1", "twice"]),
    ],
)
def test_examples_that_could_not_be_read_again_are_not_written(tmp_path, change, words):
    data = examples()
    change(data[3])
    one_line(lambda: latents.write(tmp_path / "x", data, model="hunyuan", normalised=True), *words)
    assert not list(tmp_path.iterdir())
    one_line(lambda: latents.write(tmp_path / "x", [], model="wan", normalised=True), "no examples")


def test_a_number_that_is_not_finite_names_its_item(tmp_path):
    data = examples(2)
    data[1]["latents"][0, 0, 0, 0] = np.nan
    latents.write(tmp_path / "x", data, model="hunyuan", normalised=True)
    found = Latents(tmp_path / "x")
    assert found[0]["id"] == "clip 0"
    one_line(lambda: found[1], "latents-00000.safetensors", "clip 1", "not finite")


def test_a_folder_may_hold_prompts_alone(tmp_path):
    data = examples(3)
    prompts = [{k: x for k, x in e.items() if k != "latents"} for e in data]
    latents.write(tmp_path / "x", prompts, model="hunyuan", normalised=True)
    found = Latents(tmp_path / "x", frames=7, slots=6)
    assert found.shape is None and found.ids == ["clip 0", "clip 1", "clip 2"]
    assert found[2].keys() == {"id", "text", "length", "pooled"}
    np.testing.assert_array_equal(found[2]["text"][:2], data[2]["text"][:2])
    batch = latents.dataset(found, batch=2)[0].arrays
    assert {n: x.shape for n, x in batch.items()} == {
        "text": (2, 6, 770),
        "length": (2,),
        "pooled": (2, 768),
    }
    mixed = lambda: latents.write(
        tmp_path / "y", [prompts[0], data[1]], model="wan", normalised=True
    )
    one_line(mixed, "example 1 has latents, the first has none")
    assert not (tmp_path / "y").exists()
