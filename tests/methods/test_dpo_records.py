"""Files and data sets of preferences: lines, splits, sides, equal responses; labels that balance."""

import gzip
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.methods.dpo import records

sys.path.insert(0, str(Path(__file__).parent))
from dpo_records import PAIR, SAID, says

QUICK = settings(deadline=None, max_examples=40)


def put(path, items):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(x) + "\n" for x in items)
    return path


def pairs(n, start=0):
    return [PAIR | {"prompt": f"{i} + 1"} for i in range(start, start + n)]


def test_a_file_is_checked_line_by_line(tmp_path):
    path = put(tmp_path / "pairs.jsonl", [*pairs(16), {"prompt": "a", "chosen": "b"}])
    with pytest.raises(UserError) as e:
        records.load(path=str(path))
    assert str(e.value) == (
        f"{path} line 17: field 'rejected' is missing; a pair has prompt, chosen, rejected"
    )


def test_a_file_is_split_by_prompts_and_a_test_file_beside_it_stays(tmp_path, capsys):
    path = put(tmp_path / "p_train.jsonl.gz", pairs(80))
    found = records.load(path=str(path), test=3)
    assert len(found.test) == 3 and found.train[0]["id"].startswith("p_train.jsonl.gz:")
    assert not {records.asked(r) for r in found.train} & {records.asked(r) for r in found.test}
    put(tmp_path / "p_test.jsonl.gz", pairs(10, start=75))
    for place in (path, tmp_path):
        found = records.load(path=str(place), test=1)
        assert (len(found.train), len(found.test)) == (75, 10)
    assert "left out: 5 training items" in capsys.readouterr().out


def test_the_steps_of_a_question_stay_on_one_side(tmp_path):
    rows = [r | {"prefix": "1 " * i} for r in pairs(40) for i in range(3)]
    found = records.load(path=str(put(tmp_path / "s.jsonl", rows)), schema="step", test=1000)
    sides = [{r["prompt"][0]["content"] for r in side} for side in found]
    assert not sides[0] & sides[1] and len(found.train) == 3 * len(sides[0])


def test_equal_responses_are_kept_and_said_once(tmp_path, capsys):
    rows = [r | ({"rejected": "2"} if i < 3 else {}) for i, r in enumerate(pairs(40))]
    found = records.load(path=str(put(tmp_path / "a.jsonl", rows)), test=40)
    assert len(found.train) + len(found.test) == 40
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "3 of 40 records have two equal responses; kept" in out


def test_ultrafeedbacks_splits_are_found_on_the_hub(monkeypatch):
    import datasets

    def load(name, subset, *, split):
        rows = pairs(20) if split == "train_prefs" else pairs(5, start=100)
        return [
            r
            | {
                "chosen": [says("user", r["prompt"]), SAID],
                "rejected": [says("user", r["prompt"]), says("assistant", "3")],
                "score_chosen": 8.0,
                "score_rejected": 4.5,
            }
            for r in rows
        ]

    splits = ["train_prefs", "train_sft", "test_prefs", "test_sft"]
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: splits)
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = records.load(path="HuggingFaceH4/ultrafeedback_binarized", schema="scored")
    assert (len(found.train), len(found.test)) == (20, 5)
    assert found.train[0]["id"] == "HuggingFaceH4/ultrafeedback_binarized train_prefs 0"
    assert found.train[1]["prompt"] == [says("user", "1 + 1")]
    assert found.train[1]["scores"] == [8.0, 4.5]
    splits[:] = ["train_sft"]
    with pytest.raises(UserError, match=r"has no split train or train_prefs; it has train_sft"):
        records.load(path="HuggingFaceH4/ultrafeedback_binarized")


def test_images_do_not_come_from_a_path():
    with pytest.raises(UserError, match=r"data\.schema=image is no text"):
        records.load(path="x", schema="image")


# ---- unpaired records


def labelled(good, bad):
    return [{"label": True}] * good + [{"label": False}] * bad


@pytest.mark.parametrize(
    ("good", "bad", "weights", "message"),
    [
        (12, 10, {}, None),
        (10, 10, {}, None),
        (15, 10, {}, None),
        (5, 10, {}, r"weigh 0.5 to 1.*weight of desirable ones to 2 \.\. 3$"),
        (30, 10, {}, r"weigh 3 to 1.*weight of undesirable ones to 2 \.\. 3$"),
        (5, 10, {"desirable": 2.5}, None),
        (30, 10, {"undesirable": 2.0}, None),
        (0, 3, {}, "KTO needs both"),
        (3, 0, {}, "KTO needs both"),
    ],
)
def test_ktos_weights_must_balance_the_labels(good, bad, weights, message):
    found = records.balance(labelled(good, bad), **weights)
    if message is None:
        assert found is None
    else:
        assert re.search(message, found)
    with pytest.raises(UserError, match="must be above 0"):
        records.balance(labelled(1, 1), desirable=0.0)


@given(st.integers(1, 200), st.integers(1, 200), st.floats(0.1, 10), st.floats(0.1, 10))
@QUICK
def test_the_suggested_weights_balance(good, bad, desirable, undesirable):
    weights = {"desirable": desirable, "undesirable": undesirable}
    found = records.balance(labelled(good, bad), **weights)
    if found is None:
        return
    name, _, ends = found.partition("set the weight of ")[2].partition(" ones to ")
    low, high = map(float, ends.split(" .. "))
    weights[name] = (low + high) / 2
    assert records.balance(labelled(good, bad), **weights) is None
