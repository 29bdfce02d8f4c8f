"""Import and export of safetensors: bitwise round trips, spellings, shards, dtypes, shardings, bad files."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.models import hf, qwen2_vl, tensors, transformer

sys.path.insert(0, str(Path(__file__).parent))
from hf_models import CFG, DECODER, UNTIED, edit, random_decoder, random_params


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def params():
    return random_params(CFG)


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    hf.save(folder, params, CFG)
    return folder


@pytest.fixture(scope="module")
def decoder():
    """Parameters of a plain decoder."""
    return random_decoder()


@pytest.mark.parametrize("cfg", [CFG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("shard", [10**9, 5_000], ids=["one file", "shards"])
def test_round_trip_is_bitwise(cfg, shard, tmp_path):
    params = random_params(cfg)
    hf.save(tmp_path / "out", params, cfg, max_shard_bytes=shard)
    assert hf.read_config(tmp_path / "out") == cfg
    equal(hf.load(tmp_path / "out", cfg), params)


def test_the_file_holds_the_names_of_the_hub(folder, params):
    tensors = load_file(folder / hf.SINGLE)
    assert len(tensors) == 2 * 12 + 2 + 2 * 12 + 7
    assert "lm_head.weight" not in tensors
    assert tensors["visual.patch_embed.proj.weight"].shape == (16, 3, 2, 2, 2)
    np.testing.assert_array_equal(
        tensors["visual.patch_embed.proj.weight"].reshape(16, -1).T, params["vision"]["patch"]
    )
    np.testing.assert_array_equal(
        tensors["model.layers.1.self_attn.q_proj.weight"],
        params["text"]["layers"]["wq"][1].reshape(16, 16).T,
    )
    np.testing.assert_array_equal(
        tensors["visual.blocks.1.attn.qkv.bias"],
        params["vision"]["layers"]["qkv"]["bias"][1].reshape(-1),
    )


def test_shards_respect_their_size_and_are_indexed(params, tmp_path):
    hf.save(tmp_path / "out", params, CFG, max_shard_bytes=5_000)
    index = json.loads((tmp_path / "out" / hf.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    total = 0
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert set(tensors) == {k for k, v in index["weight_map"].items() if v == file}
        size = sum(t.nbytes for t in tensors.values())
        assert size <= 5_000 or len(tensors) == 1
        total += size
    assert total == index["metadata"]["total_size"] == 4 * qwen2_vl.count(CFG)


def test_the_spelling_of_transformers_in_memory_is_read(folder, params, tmp_path):
    def rename(tensors):
        for name in list(tensors):
            new = f"model.{name}" if name.startswith("visual.") else name
            new = "model.language_model." + name[6:] if name.startswith("model.") else new
            tensors[new] = tensors.pop(name)

    equal(hf.load(edit(folder, tmp_path, rename), CFG), params)


def test_listed_layers_and_device_arrays_export_like_stacked_ones(params, folder, tmp_path):
    listed = params | {"text": transformer.unstack(jax.tree.map(jnp.asarray, params["text"]))}
    hf.save(tmp_path / "out", listed, CFG)
    assert (tmp_path / "out" / hf.SINGLE).read_bytes() == (folder / hf.SINGLE).read_bytes()


def test_bfloat16_goes_out_and_comes_in(params, tmp_path):
    half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    hf.save(tmp_path / "half", half, CFG)
    hf.save(tmp_path / "cast", params, CFG, dtype="bfloat16")
    assert (tmp_path / "half" / hf.SINGLE).read_bytes() == (
        tmp_path / "cast" / hf.SINGLE
    ).read_bytes()
    equal(hf.load(tmp_path / "half", CFG, dtype="bfloat16"), half)
    equal(hf.load(tmp_path / "half", CFG), jax.tree.map(lambda x: x.astype(np.float32), half))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_each_device_reads_its_slice(folder, params):
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    want = sharding.shard_tree(
        qwen2_vl.axes(CFG),
        qwen2_vl.abstract(CFG),
        mesh,
        overrides={"text/layers/wk": P("fsdp")[:0]},
    )
    placed = hf.load(folder, CFG, shardings=want)
    equal(placed, params)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, placed, want))
    gate = placed["text"]["layers"]["gate"]
    assert gate.addressable_shards[0].data.shape == (2, 4, 12)
    layers = NamedSharding(mesh, P("tensor"))  # a split over the stack of layers
    tree = jax.tree.map(lambda _: NamedSharding(mesh, P()), want)
    tree["text"]["layers"]["wq"] = layers
    equal(hf.load(folder, CFG, shardings=tree), params)


def test_missing_unexpected_and_misshapen_keys_are_listed(folder, tmp_path):
    def spoil(tensors):
        del tensors["visual.merger.ln_q.bias"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros(3, np.float32)
        tensors["model.norm.weight"] = np.zeros(3, np.float32)

    with pytest.raises(UserError) as error:
        hf.load(edit(folder, tmp_path, spoil), CFG)
    text = str(error.value)
    assert "2 missing: " in text and "visual.merger.ln_q.bias" in text
    assert "model.layers.1.mlp.up_proj.weight" in text
    assert "1 unexpected: model.layers.2.mlp.up_proj.weight" in text
    assert "model.norm.weight is (3,), expected (16,)" in text


def test_a_stored_copy_of_a_tied_head_must_equal_the_embedding(folder, params, tmp_path):
    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    good = edit(folder, tmp_path, copy)
    equal(hf.load(good, CFG), params)
    bad = tmp_path / "bad"
    bad.mkdir()
    tensors = load_file(good / hf.SINGLE)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, bad / hf.SINGLE)
    with pytest.raises(UserError, match="tied is True, but lm_head"):
        hf.load(bad, CFG)


def test_a_tensor_under_both_spellings_is_refused(folder, tmp_path):
    def twice(tensors):
        tensors["model.visual.merger.ln_q.bias"] = tensors["visual.merger.ln_q.bias"].copy()

    with pytest.raises(UserError, match=r"visual\.merger\.ln_q\.bias is stored twice"):
        hf.load(edit(folder, tmp_path, twice), CFG)


def test_broken_folders_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="has neither"):
        hf.load(tmp_path, CFG)
    with pytest.raises(UserError, match=r"no config\.json"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        hf.read_config(tmp_path)
    whole = (folder / hf.SINGLE).read_bytes()
    for content in (b"", b"x" * 100, whole[:50], whole[:-4], b"\x02" + bytes(7) + b"[]"):
        (tmp_path / hf.SINGLE).write_bytes(content)
        with pytest.raises(UserError, match="not a readable safetensors file"):
            hf.load(tmp_path, CFG)
    save_file({"a": np.zeros(2, np.int64)}, tmp_path / hf.SINGLE)
    with pytest.raises(UserError, match="of floats"):
        hf.load(tmp_path, CFG)


def test_a_missing_shard_or_tensor_of_the_index_is_named(params, tmp_path):
    out = tmp_path / "out"
    hf.save(out, params, CFG, max_shard_bytes=20_000)
    index = json.loads((out / hf.INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"]["model.extra"] = first
    (out / hf.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"in no shard: model\.extra"):
        hf.load(out, CFG)
    (out / first).unlink()
    with pytest.raises(UserError, match=f"names the shard '{first}'"):
        hf.load(out, CFG)


def test_export_refuses_a_used_folder_and_foreign_trees(params, folder, tmp_path):
    with pytest.raises(UserError, match="exists: choose a new folder"):
        hf.save(folder, params, CFG)
    with pytest.raises(UserError, match="unknown to the format: text/lora"):
        hf.save(tmp_path / "out", params | {"text": params["text"] | {"lora": np.ones(2)}}, CFG)
    with pytest.raises(UserError, match="missing from the tree: text/head"):
        hf.save(tmp_path / "out", params, UNTIED)
    wide = params | {"text": params["text"] | {"embed": np.zeros((41, 16), np.float32)}}
    with pytest.raises(UserError, match=r"text/embed: shape \(41, 16\)"):
        hf.save(tmp_path / "out", wide, CFG)
    with pytest.raises(UserError, match="as int8"):
        hf.save(tmp_path / "out", params, CFG, dtype="int8")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(params, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(hf, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        hf.save(tmp_path / "out", params, CFG)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    hf.save(tmp_path / "out", params, CFG)
    equal(hf.load(tmp_path / "out", CFG), params)


# --- plain decoders, tokenizers, foreign files ----------------------------------------------------


@pytest.mark.parametrize("shard", [10**9, 3_000], ids=["one file", "shards"])
def test_a_plain_decoder_goes_round_under_the_names_of_its_family(decoder, tmp_path, shard):
    hf.save(tmp_path / "out", decoder, DECODER, max_shard_bytes=shard)
    assert hf.read_config(tmp_path / "out") == DECODER
    assert hf.read_config(tmp_path / "out", dtype="bfloat16").dtype == "bfloat16"
    equal(hf.load(tmp_path / "out", DECODER), decoder)
    names = {name for line in hf.table(DECODER) for name in line.names}
    assert {"lm_head.weight", "model.layers.1.self_attn.q_norm.weight"} <= names
    assert "model.layers.0.self_attn.o_proj.bias" in names and len(names) == 2 * 15 + 3


def test_an_unknown_architecture_lists_the_known_ones(tmp_path):
    for text, message in (
        ('{"model_type": "mamba"}', "'mamba' is unknown; the known ones are llama, mistral"),
        ("[]", "no JSON object"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            hf.read_config(tmp_path)


def test_rows_beyond_the_tokenizer_are_kept(decoder, tmp_path):
    hf.save(tmp_path / "out", decoder, DECODER)
    wide = dataclasses.replace(DECODER, vocab=64)
    with pytest.raises(UserError, match=r"embed_tokens.weight is \(40, 16\), expected \(64, 16\)"):
        hf.load(tmp_path / "out", wide)
    grown, cfg = transformer.resize_vocab(hf.load(tmp_path / "out", DECODER), DECODER, 64)
    assert cfg == wide
    hf.save(tmp_path / "wide", grown, cfg)
    equal(hf.load(tmp_path / "wide", hf.read_config(tmp_path / "wide")), jax.device_get(grown))


def test_devices_that_hold_the_same_slice_read_it_once(decoder, tmp_path, monkeypatch):
    hf.save(tmp_path / "out", decoder, DECODER)
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    want = sharding.shard_tree(transformer.axes(DECODER), transformer.abstract(DECODER), mesh)
    read, real = [], tensors.Stored.map
    monkeypatch.setattr(tensors.Stored, "map", lambda t: read.append(t.offset) or real(t))
    equal(hf.load(tmp_path / "out", DECODER, shardings=want), decoder)
    counts = {offset: read.count(offset) for offset in read}
    assert max(counts.values()) == 2 and min(counts.values()) == 1  # two halves, or one whole


def test_tokenizer_ids_and_files_go_with_the_model(decoder, tmp_path):
    source = tmp_path / "base"
    source.mkdir()
    with pytest.raises(UserError, match="holds no tokenizer"):
        hf.save(tmp_path / "out", decoder, DECODER, tokenizer=source)
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"never copied")
    (source / "config.json").write_text('{"eos_token_id": 3, "bos_token_id": null}')
    (source / "generation_config.json").write_text('{"eos_token_id": [3, 4], "pad_token_id": 5}')
    assert hf.token_ids(source) == {"eos_token_id": [3, 4], "pad_token_id": 5}
    card = {"README.md": "about it"}
    hf.save(tmp_path / "out", decoder, DECODER, tokenizer=source, files=card)
    found = {p.name for p in (tmp_path / "out").iterdir()}
    config = "config.json", "generation_config.json"
    assert found == {hf.SINGLE, *config, "tokenizer.json", "README.md"}
    config, generation = (json.loads((tmp_path / "out" / name).read_text()) for name in config)
    assert generation == {"eos_token_id": [3, 4], "pad_token_id": 5}
    assert config["eos_token_id"] == [3, 4] and "pad_token_id" not in config
    hf.save(tmp_path / "given", decoder, DECODER, ids={"eos_token_id": 7})
    assert hf.token_ids(tmp_path / "given") == {"eos_token_id": 7}

    class Broken:
        def __init__(self):
            self.ids = {}

        def save(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        hf.save(tmp_path / "broken", decoder, DECODER, tokenizer=Broken())
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out", "given"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "generation_config.json",
            [2],
            "generation_config.json is damaged: it holds no JSON object",
        ),
        (
            "generation_config.json",
            {"eos_token_id": [2, 40]},
            r"eos_token_id is \[2, 40\]; .* to 39",
        ),
        ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ("generation_config.json", {"pad_token_id": [1, 2]}, "pad_token_id is a list of 2"),
        ("config.json", {"eos_token_id": 1.5}, "eos_token_id is 1.5"),
        (
            "config.json",
            {"bos_token_id": -1},
            "bos_token_id is -1; it must be a token id from 0 to 39",
        ),
    ],
)
def test_ids_that_are_no_tokens_are_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        hf.token_ids(tmp_path, 40)
    assert "\n" not in str(error.value)


def test_the_table_covers_the_released_sizes():
    for cfg in (qwen2_vl.qwen2_vl_2b(), qwen2_vl.qwen2_vl_7b()):
        lines = hf.table(cfg)
        shapes = [line.file_shape for line in lines for _ in line.names]
        assert sum(int(np.prod(s)) for s in shapes) == qwen2_vl.count(cfg)
        named = {name: line.file_shape for line in lines for name in line.names}
        assert named["visual.merger.mlp.2.weight"] == (cfg.text.d, 5120)
        assert named["visual.blocks.31.attn.qkv.weight"] == (3840, 1280)
        assert ("lm_head.weight" in named) != cfg.text.tied
