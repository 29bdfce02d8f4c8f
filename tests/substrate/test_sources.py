"""Rows of a data path: they know file and line, a split's name at the hub, and nothing of their fields."""

import gzip
import json

import pytest

from jaxrepro.config import UserError
from jaxrepro.data import sources


def put(path, items):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(x) + "\n" for x in items)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_row_knows_its_file_and_line(tmp_path, suffix):
    path = put(tmp_path / f"a.{suffix}", [{"x": 1}])
    with (gzip.open if suffix.endswith("gz") else open)(path, "at") as file:
        file.write('\n{"x": 2}\n')
    found = sources.load(str(path))
    assert found == {
        "train": [
            sources.Row(f"a.{suffix}:1", f"{path} line 1", {"x": 1}),
            sources.Row(f"a.{suffix}:3", f"{path} line 3", {"x": 2}),
        ]
    }


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with (gzip.open if suffix.endswith("gz") else open)(path, "wb") as file:
        file.write(b'\xef\xbb\xbf{"x": "\\ud83d\\ude00"}\n')  # two halves are one character
    assert sources.read_jsonl(path)[0].fields == {"x": "\U0001f600"}


@pytest.mark.parametrize("text", ["\\ud800", "a\\udfffb", "\\ud800\\ud800"])
@pytest.mark.parametrize("record", ['{{"x": "{}"}}', '{{"{}": 1}}', '{{"x": [{{"y": "{}"}}]}}'])
def test_half_a_character_names_file_and_line(tmp_path, text, record):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\n' + record.format(text) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl line 2: \\ud[8f][0f][0f] is half a character"):
        sources.read_jsonl(path)


def test_splits_of_a_folder_are_its_files(tmp_path):
    put(tmp_path / "x_train.jsonl", [{"x": 1}])
    assert sources.load(str(tmp_path)).keys() == {"train"}
    put(tmp_path / "x_test.jsonl", [{"x": 2}])
    for place in (tmp_path, tmp_path / "x_train.jsonl"):
        found = sources.load(str(place))
        assert [r.fields for r in found["test"]] == [{"x": 2}]
    assert sources.load(str(tmp_path / "x_test.jsonl")).keys() == {"train"}


def test_a_hubs_split_is_the_first_of_the_names_that_is_there(monkeypatch):
    import datasets

    asked = []
    there = ["train", "train_prefs", "test_prefs"]
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: there)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, split: asked.append((*a, split)) or [{"x": split}]
    )
    splits = {"train": ("train_prefs", "train"), "test": ("test", "test_prefs")}
    found = sources.load("a/b", "c", splits=splits)
    assert asked == [("a/b", "c", "train_prefs"), ("a/b", "c", "test_prefs")]
    assert found["test"] == [sources.Row("a/b test_prefs 0", "a/b split test_prefs row 0", {"x": "test_prefs"})]  # fmt: skip
    with pytest.raises(UserError, match=r"data\.path=a/b has no split dev; it has train, train_p"):
        sources.load("a/b", splits={"train": ("dev",)})
