"""GGUF files: what a writer of other hands wrote is what is read; damaged files are one line."""

import dataclasses
import struct
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.data import text
from jaxrepro.models import gguf, hf, names, transformer
from jaxrepro.models.transformer import TransformerConfig

library = pytest.importorskip("gguf")
sys.path.insert(0, str(Path(__file__).parents[1]))
from gguf_files import KIND, LLAMA, QWEN2, QWEN3, SHAPE, drawn, rows, write  # noqa: E402

CORPUS = "the capital of France is Paris. 12 + 345 = 357, isn't it?\n\n  ünïcode 日本" * 4
FAMILIES = [(LLAMA, "llama"), (QWEN2, "qwen2"), (QWEN3, "qwen3")]


@pytest.fixture(scope="module")
def params():
    return {cfg: drawn(cfg) for cfg, _ in FAMILIES}


@pytest.fixture(scope="module")
def file(params, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "a.gguf", params[LLAMA], LLAMA)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("cfg", "architecture"), FAMILIES)
def test_weights_and_config_come_back(params, cfg, architecture, tmp_path):
    path = write(tmp_path / "a.gguf", params[cfg], cfg, architecture)
    read = gguf.read_config(path)
    assert read == cfg
    equal(gguf.load(path, read), params[cfg])


@pytest.mark.parametrize(("cfg", "architecture"), FAMILIES)
def test_a_folder_of_hugging_face_made_from_the_file_holds_the_same(
    params, cfg, architecture, tmp_path
):
    path = write(tmp_path / "a.gguf", params[cfg], cfg, architecture, kind=KIND.Q8_0)
    read = gguf.load(path)
    hf.save(tmp_path / "out", read, gguf.read_config(path))
    again = hf.read_config(tmp_path / "out")
    assert dataclasses.replace(again, family=None) == cfg
    equal(hf.load(tmp_path / "out", again), read)


def test_biases_of_a_llama_file_are_untangled_like_its_rows(tmp_path):
    cfg = TransformerConfig(**SHAPE, qkv_bias=True)
    params = drawn(cfg)
    equal(gguf.load(write(tmp_path / "a.gguf", params, cfg)), params)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16", "BF16"])
def test_every_format_is_read_as_the_library_reads_it(params, kind, tmp_path):
    kind = KIND[kind]
    path = write(tmp_path / "a.gguf", params[LLAMA], LLAMA, kind=kind)
    read = gguf.load(path)
    for name, leaf in names.leaves(params[LLAMA]):
        for i, part in enumerate(leaf if name.startswith("layers/") else [leaf]):
            w = rows(part, name, LLAMA, "llama")
            if w.ndim > 1:
                w = library.dequantize(library.quantize(w, kind), kind)
            found = dict(names.leaves(read))[name]
            found = found[i] if name.startswith("layers/") else found
            np.testing.assert_array_equal(rows(found, name, LLAMA, "llama"), w)


def test_the_header_is_what_the_library_reads(file):
    theirs, ours = library.GGUFReader(file), gguf.open_file(file)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == pytest.approx(fields)
    assert {t.name: (int(t.tensor_type), t.data_offset, t.n_bytes) for t in theirs.tensors} == {
        name: (s.kind, s.offset, s.size) for name, s in ours.tensors.items()
    }


@pytest.mark.parametrize("shape", [(1, 2, 1, 2), (1, 4, 1, 1), (8, 1, 1, 1)])
def test_sharded_equals_unsharded(params, file, shape):
    mesh = sharding.make_mesh(shape, devices=jax.devices()[: int(np.prod(shape))])
    axes, abstract = transformer.axes(LLAMA), transformer.abstract(LLAMA)
    places = sharding.shard_tree(axes, abstract, mesh)
    read = gguf.load(file, LLAMA, shardings=places)
    equal(read, params[LLAMA])
    jax.tree.map(lambda x, s: pytest.fail("elsewhere") if x.sharding != s else None, read, places)


def test_the_dtype_is_the_callers(params, file):
    read = gguf.load(file, LLAMA, dtype="bfloat16")
    equal(read, jax.tree.map(lambda x: x.astype("bfloat16"), params[LLAMA]))


def test_missing_unexpected_and_misshapen_tensors_are_listed(params, tmp_path):
    extra = {"blk.0.odd": np.ones(4), "output_norm.weight": np.ones(7)}
    path = write(
        tmp_path / "a.gguf", params[LLAMA], LLAMA, extra=extra, skip=("blk.1.ffn_up.weight",)
    )
    with pytest.raises(
        UserError, match=r"1 missing: blk\.1\.ffn_up.*1 unexpected: blk\.0\.odd"
    ) as e:
        gguf.load(path)
    assert "output_norm.weight is (7,), expected (64,)" in str(e.value)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("gemma", {}, "architecture 'gemma' is not supported: one of llama, qwen2, qwen3"),
        ("llama", {"extra": {gguf.SCALED: np.ones(8)}}, "scaled RoPE"),
        ("llama", {"fields": [("add_expert_count", 8)]}, "mixture of experts"),
        ("llama", {"skip": ("token_embd.weight",)}, "no tensor token_embd.weight"),
        ("llama", {"extra": {"token_embd.weight": np.ones(4)}}, r"token_embd.weight is \(4,\)"),
    ],
)
def test_models_that_cannot_run_are_refused(params, architecture, changes, message, tmp_path):
    path = write(tmp_path / "a.gguf", params[LLAMA], LLAMA, architecture, **changes)
    with pytest.raises(UserError, match=message):
        gguf.read_config(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.head_count", 0, "head_count is 0; it must be one int from 1 to 2147483647"),
        (
            "attention.head_count",
            np.array([4, 2]),
            r"head_count is array\(\[4, 2\]\).*for all layers",
        ),
        ("attention.head_count_kv", 0, "head_count_kv is 0"),
        ("attention.key_length", 0, "key_length is 0"),
        ("embedding_length", 0, "embedding_length is 0"),
        ("embedding_length", "64", "embedding_length is '64'"),
        ("feed_forward_length", 0, "feed_forward_length is 0"),
        ("feed_forward_length", -1, "feed_forward_length is -1"),
        ("block_count", 1.5, r"block_count is 1\.5"),
        ("block_count", True, "block_count is True"),
        ("block_count", 2**30, "block_count is 1073741824, but there are 20 tensors"),
        ("block_count", 2**40, "block_count is 1099511627776; it must be"),
        ("block_count", None, "has no llama.block_count"),
        ("rope.freq_base", float("nan"), "freq_base is nan; it must be one float from 1 to "),
        ("attention.layer_norm_rms_epsilon", float("inf"), "epsilon is inf"),
        ("rope.scaling.type", np.array([1, 2]), r"scaled RoPE \(\[1 2\]\)"),
        ("rope.dimension_count", 8, "dimension_count is 8; RoPE of a part of the head's 16"),
        ("rope.scale_linear", 4.0, "scale_linear stretches RoPE"),
        ("rope.scaling.factor", 2.0, "scaling.factor stretches RoPE"),
        ("rope.scale_linear", np.array([1.0]), "scale_linear is array"),
        ("attention.sliding_window", -1, "sliding_window is -1"),
        ("expert_count", np.array([0, 8]), "mixture of experts"),
    ],
)
def test_metadata_of_no_model_is_one_line(file, key, value, message):
    found = gguf.open_file(file)
    found.metadata[f"llama.{key}"] = value
    with pytest.raises(UserError, match=message) as error:
        gguf.read_config(found)
    assert "\n" not in str(error.value)


def test_what_a_header_says_of_rope_and_windows_is_taken(file, params, tmp_path):
    found = gguf.open_file(file)
    found.metadata["llama.rope.dimension_count"] = SHAPE["head_dim"]
    found.metadata["llama.rope.scale_linear"] = 1.0
    found.metadata["llama.attention.sliding_window"] = 0
    assert gguf.read_config(found) == LLAMA
    found.metadata["llama.attention.sliding_window"] = 8
    assert gguf.read_config(found) == dataclasses.replace(LLAMA, window=8)
    found = gguf.open_file(write(tmp_path / "a.gguf", params[QWEN2], QWEN2, "qwen2"))
    found.metadata["qwen2.attention.sliding_window"] = 8
    with pytest.raises(UserError, match="sliding_window is 8, but which layers have it"):
        gguf.read_config(found)


@given(cut=st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_a_truncated_file_is_one_line(file, tmp_path_factory, cut):
    whole = file.read_bytes()
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    path.write_bytes(whole[: int(cut * (len(whole) - 1))])
    with pytest.raises(UserError, match=r"^[^\n]*not a readable GGUF file[^\n]*$"):
        gguf.open_file(path)


@given(at=st.integers(0, 1500), byte=st.integers(0, 255))
@settings(deadline=None, max_examples=150)
def test_a_damaged_header_is_read_or_refused(file, tmp_path_factory, at, byte):
    data = bytearray(file.read_bytes())
    data[at] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(data)
    try:
        found = gguf.open_file(path)
        assert all(s.offset + s.size <= len(data) for s in found.tensors.values())
        with np.errstate(all="ignore"):  # weights read in a format that they were not written in
            gguf.load(found, gguf.read_config(found))
    except UserError as error:
        assert "\n" not in str(error)


def test_files_that_are_no_gguf_and_counts_beyond_the_file_are_refused(tmp_path):
    path = tmp_path / "a.gguf"
    array = struct.pack("<Q1sIIQ", 1, b"k", 9, 0, 2**60)
    for content, message in (
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(40), "first four bytes"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "version"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "header"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array, "header"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "header"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            gguf.open_file(path)
    with pytest.raises(UserError, match="cannot be read"):
        gguf.open_file(tmp_path / "none.gguf")


# ---- the tokenizer


@pytest.fixture(scope="module")
def backend():
    """A byte-pair tokenizer of SmolLM's kind, trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[text.ENDOFTEXT, text.IM_START, text.IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS], trainer)
    return backend


def with_tokenizer(path, backend, pre="smollm", model="gpt2"):
    import json

    writer = library.GGUFWriter(str(path), "llama")
    vocabulary = backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t.startswith("<|") else 1 for t in tokens])
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in merges])
    writer.add_bos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tokenizer(backend, tmp_path_factory):
    path = with_tokenizer(tmp_path_factory.mktemp("tokenizer") / "a.gguf", backend)
    return text.load_tokenizer(path)


@given(st.text(max_size=30) | st.sampled_from([CORPUS, "12 345", f"a{text.IM_END}b"]))
@settings(deadline=None, max_examples=100)
def test_the_tokenizer_in_the_file_gives_the_original_ids(backend, tokenizer, string):
    ids = tokenizer.encode(string)
    assert ids == backend.encode(string).ids
    assert tokenizer.decode(ids, skip_special=False) == string


def test_the_saved_tokenizer_is_the_same_in_transformers_and_here(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(CORPUS)["input_ids"] == tokenizer.encode(CORPUS)
    ends = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ends == (1, tokenizer.eos, tokenizer.pad)
    again = text.load_tokenizer(tmp_path)
    assert again.encode(CORPUS) == tokenizer.encode(CORPUS)
    assert (again.template, again.named["bos_token"]) == (text.CHATML, text.IM_START)
    assert again.specials == [text.ENDOFTEXT, text.IM_START, text.IM_END]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model": "llama"}, "only byte-pair"), ({"pre": "odd"}, "pre-tokenizer 'odd' is unknown")],
)
def test_other_tokenizers_are_refused(backend, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        text.load_tokenizer(with_tokenizer(tmp_path / "a.gguf", backend, **changes))


def test_a_file_without_a_tokenizer_is_refused(file):
    with pytest.raises(UserError, match="only byte-pair"):
        text.load_tokenizer(file)


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-2"])
def test_every_way_to_cut_words_gives_the_text_back(backend, pre, tmp_path):
    read = text.load_tokenizer(with_tokenizer(tmp_path / "a.gguf", backend, pre=pre))
    assert read.decode(read.encode(CORPUS)) == CORPUS
