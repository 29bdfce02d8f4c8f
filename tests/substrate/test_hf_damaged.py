"""Model files that cannot be trusted: pickles, damaged headers and indices, counts that are not there."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.models import hf, tensors

sys.path.insert(0, str(Path(__file__).parent))
from hf_models import CFG, DECODER, edit, random_decoder, random_params


@pytest.fixture(scope="module")
def decoder():
    """Parameters of a plain decoder."""
    return random_decoder()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    hf.save(folder, random_params(CFG), CFG)
    return folder


def test_more_layers_than_tensors_are_refused_before_a_table_is_made(decoder, folder, tmp_path):
    hf.save(tmp_path / "out", decoder, DECODER)
    for where, cfg, message in (
        (
            tmp_path / "out",
            dataclasses.replace(DECODER, layers=2 * 10**9),
            "num_hidden_layers is 2",
        ),
        (
            folder,
            dataclasses.replace(CFG, vision=dataclasses.replace(CFG.vision, depth=2 * 10**9)),
            "depth of the tower is 2000000000, but there are",
        ),
    ):
        with pytest.raises(UserError, match=message):
            hf.load(where, cfg)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused_wherever_it_stands(name, decoder, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match=f"{name} is a pickle, .* never read; take .* safetensors"):
        hf.load(tmp_path, DECODER)
    with pytest.raises(UserError, match="is a pickle"):
        hf.load(tmp_path / name, DECODER)
    (tmp_path / hf.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UserError, match="is a pickle"):
        hf.load(tmp_path, DECODER)


@pytest.mark.parametrize("magic", [b"PK\x03\x04" + bytes(20), b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j"])
def test_a_pickle_under_the_name_of_safetensors_is_named(magic, tmp_path):
    (tmp_path / hf.SINGLE).write_bytes(magic)
    with pytest.raises(UserError, match="is a pickle"):
        hf.load(tmp_path, DECODER)


def header(spec, length=None):
    text = spec if isinstance(spec, bytes) else json.dumps(spec).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NONE = {"c": {"dtype": "F32", "shape": [0], "data_offsets": [6, 6]}}  # no bytes, so no overlap


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(b"{}", 2**62), "header of 4611686018427387904 bytes in a file of 10"),
        (header(b"{}" + bytes(30), 20), "not a readable"),
        (header(b"[" * 100_000), "not a readable"),
        (
            header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
            "download complete",
        ),
        (header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}), "impossible"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}), "impossible"),
        (header({"a": {"dtype": "F8_E4M3", "shape": [], "data_offsets": [0, 1]}}), "F8_E4M3"),
        (header({"a": {"shape": []}}), "not a readable"),
        (
            header({n: F32 | {"data_offsets": [p, p + 8]} for n, p in (("b", 4), ("a", 0))} | NONE)
            + bytes(12),
            "the tensors a and b overlap",
        ),
        (header({"a": F32 | {"dtype": "\x1b\n" * 999}}), r"of dtype '\\x1b\\n"),
    ],
)
def test_a_damaged_header_is_one_line(content, message, tmp_path):
    (tmp_path / hf.SINGLE).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        hf.load(tmp_path, DECODER)
    assert "\n" not in str(error.value)


def test_names_of_foreign_tensors_are_shown_short_and_without_control(decoder, tmp_path):
    hf.save(tmp_path / "out", decoder, DECODER)
    odd = {"\x1b[31m\n": np.zeros(1, np.float32), "a" * 5000: np.zeros(1, np.float32)}
    bad = edit(tmp_path / "out", tmp_path, lambda tensors: tensors.update(odd))
    with pytest.raises(UserError, match="2 unexpected: ") as error:
        hf.load(bad, DECODER)
    text = str(error.value).removeprefix(str(bad))
    assert text.isprintable() and r"\x1b[31m\n" in text and len(text) < 200
    (bad / hf.INDEX).write_text(json.dumps({"weight_map": {"\x1b" * 999: "b" * 999}}))
    with pytest.raises(UserError, match="names the shard 'bbb") as error:
        hf.load(bad, DECODER)
    assert len(str(error.value).removeprefix(str(bad))) < 200


def test_a_header_above_the_limit_of_the_format_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "MAX_HEADER", 10)
    (tmp_path / hf.SINGLE).write_bytes(header(b"{}" + b" " * 20))
    with pytest.raises(UserError, match="header of 22 bytes, the format allows 10"):
        hf.load(tmp_path, DECODER)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": {"a": 3}}, "has no weight_map"),
        ({"weight_map": {"a": "../secret.safetensors"}}, "which is not in the folder"),
        ({"weight_map": {"a": "b.safetensors"}}, r"names the shard 'b\.safetensors', which is not"),
    ],
)
def test_a_broken_index_is_one_line(index, message, tmp_path):
    (tmp_path / hf.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        hf.load(tmp_path, DECODER)


def test_a_file_instead_of_a_folder_is_named(folder):
    with pytest.raises(UserError, match="is a file: give the folder"):
        hf.load(folder / hf.SINGLE, CFG)
