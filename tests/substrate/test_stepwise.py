"""Step-wise data: the literal format, its corruptions, JSONL records with one line for each fault."""

import gzip
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxrepro.config import UserError
from jaxrepro.data import stepwise
from jaxrepro.data.stepformat import blocks, join, solution_text
from jaxrepro.data.stepwise import (
    caption_of,
    check_key_steps,
    corrupt,
    drop_reflective,
    from_conversation,
    read_jsonl,
    with_format_noise,
    write_jsonl,
    write_objects,
)

GOOD = {
    "image_path": None,
    "problem": "1 + 2",
    "solution": solution_text("none", "add", ["1 + 2 = 3"], "3"),
    "key_steps": {"Steps": [["1 + 2 = 3", "2 + 1 = 3"], "3"]},
}


def lines(path, *records):
    raw = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def valid(text):
    """The rule of the paper's code (StepRVR), written a second time."""
    needed = (
        "### Image Description:",
        "### Rationales:",
        "### Step 1:",
        "### The final answer is:",
    )
    numbers = [int(n) for n in re.findall(r"### Step (\d+):", text)]
    last = max((m.end() for m in re.finditer(r"### Step \d+:", text)), default=0)
    complete = all(header in text for header in needed)
    return complete and text.find(needed[3]) >= last and numbers == [*range(1, len(numbers) + 1)]


def test_solution_text_is_the_literal_format():
    assert solution_text("A cat.", "Count.", ["one", "two"], "2") == (
        "### Image Description:\nA cat.\n\n### Rationales:\nCount.\n\n### Let's think step by step.\n\n"
        "### Step 1:\none\n\n### Step 2:\ntwo\n\n### The final answer is:\n2"
    )


def test_blocks_and_join_are_inverse():
    text = solution_text("a\nb", "c", ["d", "e"], "f")
    assert join((b.header, b.text) for b in blocks(text)) == text and valid(text)
    assert blocks("lead " + text)[0].start == 5 and blocks("") == []


@given(st.integers(1, 6), st.integers(0, 10_000))
@settings(deadline=None, max_examples=100)
def test_every_corruption_is_invalid_and_deterministic(steps, seed):
    text = solution_text("d", "r", [f"s {i}" for i in range(steps)], "1")
    broken = corrupt(text, np.random.default_rng(seed))
    assert valid(text) and not valid(broken)
    assert broken == corrupt(text, np.random.default_rng(seed))


def test_format_noise_hits_its_share_of_examples():
    examples = [{"id": f"x/{i}", "solution": GOOD["solution"]} for i in range(1000)]
    noisy = [with_format_noise(e, 0.15, seed=1) for e in examples]
    assert 110 < sum(not valid(e["solution"]) for e in noisy) < 190
    assert noisy == [with_format_noise(e, 0.15, seed=1) for e in examples]
    assert noisy != [with_format_noise(e, 0.15, seed=2) for e in examples]
    assert all(valid(e["solution"]) for e in examples)


def test_a_caption_keeps_the_description_alone():
    caption = caption_of({"id": "a", "image": None, **GOOD})
    assert caption["solution"] == "### Image Description:\nnone" and caption["key_steps"] == {
        "Steps": []
    }


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_written_examples_read_back(tmp_path, name):
    image = Image.new("RGB", (30, 20), "red")
    wrote = [{"id": str(i), "image": image if i else None, **GOOD, "answer": "3"} for i in range(2)]
    assert write_jsonl(tmp_path / name, wrote) == 2
    examples, errors = read_jsonl(tmp_path / name)
    assert not errors and [e["id"] for e in examples] == ["0", "1"]
    assert examples[0]["image"] is None
    with Image.open(examples[1]["image"]) as opened:
        assert np.array_equal(np.asarray(opened), np.asarray(image))
    for e in examples:
        assert {k: e[k] for k in ("problem", "solution", "key_steps", "answer")} == {
            k: v for k, v in {**GOOD, "answer": "3"}.items() if k != "image_path"
        }
    assert {p.name for p in tmp_path.iterdir()} == {name, "a_images"}


def test_relative_images_belong_to_the_folder_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "deep" / "x.png")
    path = lines(tmp_path / "deep" / "a.jsonl", {**GOOD, "image_path": "x.png"})
    monkeypatch.chdir(tmp_path)
    assert read_jsonl("deep/a.jsonl").examples[0]["image"] == str(tmp_path / "deep" / "x.png")
    assert path.exists()


FAULTS = {
    "not JSON": b"{",
    "not UTF-8": b'{"problem": "\xff"}',
    "lone surrogate": json.dumps({**GOOD, "problem": "\ud800"}).encode(),
    "too deep": b"[" * 100_000,
    "not an object": [1],
    "no problem": {**GOOD, "problem": None},
    "empty solution": {**GOOD, "solution": "  "},
    "missing image": {**GOOD, "image_path": "nowhere.png"},
    "unreadable image": {**GOOD, "image_path": "broken.png"},
    "image is a folder": {**GOOD, "image_path": "."},
    "list of images": {**GOOD, "image_path": ["a.png"]},
    "NUL in a path": {**GOOD, "image_path": "a\0b"},
    "long path": {**GOOD, "image_path": "a" * 5000},
    "key_steps missing": {k: v for k, v in GOOD.items() if k != "key_steps"},
    "key_steps is a list": {**GOOD, "key_steps": ["a"]},
    "Steps missing": {**GOOD, "key_steps": {}},
    "Steps is a text": {**GOOD, "key_steps": {"Steps": "a"}},
    "empty key step": {**GOOD, "key_steps": {"Steps": [""]}},
    "empty group": {**GOOD, "key_steps": {"Steps": [[]]}},
    "empty alternative": {**GOOD, "key_steps": {"Steps": [["a", " "]]}},
    "number as key step": {**GOOD, "key_steps": {"Steps": [3]}},
    "duplicate id": {**GOOD, "id": "first"},
    "id is an object": {**GOOD, "id": {}},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_record_is_named_by_line_and_loses_nothing_else(tmp_path, fault):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    path = lines(tmp_path / "a.jsonl", {**GOOD, "id": "first"}, FAULTS[fault], GOOD)
    with pytest.raises(UserError, match=r"a\.jsonl:2") as error:
        read_jsonl(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 6000
    examples, errors = read_jsonl(path, strict=False)
    assert [e["id"] for e in examples] == ["first", "a.jsonl:3"] and len(errors) == 1
    if "image" in fault and "list" not in fault:
        assert FAULTS[fault]["image_path"].strip(".") in errors[0]


@pytest.mark.parametrize("given", [{}, {"key_steps": None}, {"key_steps": {}}])
def test_only_sft_data_may_lack_key_steps(tmp_path, given):
    path = lines(tmp_path / "a.jsonl", {"problem": "a", "solution": "b", **given})
    assert read_jsonl(path, need_key_steps=False).examples[0]["key_steps"] == {"Steps": []}
    with pytest.raises(UserError, match="key_steps"):
        read_jsonl(path)


def test_a_cleaner_may_look_at_empty_groups_and_texts():
    raw = {"Steps": [[], "", ["a", " "]], "Rationales": 3}
    assert check_key_steps(raw, empty=True) == raw
    with pytest.raises(UserError, match="key step 0"):
        check_key_steps({"Steps": [3]}, empty=True)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("old")
    with pytest.raises(TypeError):
        write_objects(target, [{"a": 1}, {"b": object()}])
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


@given(st.lists(st.binary(max_size=40) | st.sampled_from([json.dumps(GOOD).encode()]), max_size=6))
@settings(deadline=None, max_examples=60)
def test_any_bytes_read_without_a_traceback(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_bytes(b"\n".join(records))
    good = [line for line in path.read_bytes().split(b"\n") if line == json.dumps(GOOD).encode()]
    assert len(read_jsonl(path, strict=False).examples) == len(good)


def test_a_cut_archive_keeps_the_records_before_the_cut(tmp_path):
    rng = np.random.default_rng(0)
    records = [{**GOOD, "noise": rng.bytes(200).hex()} for _ in range(200)]
    whole = gzip.compress(b"\n".join(json.dumps(r).encode() for r in records))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    examples, errors = read_jsonl(tmp_path / "a.jsonl.gz", strict=False)
    assert 20 < len(examples) < 200 and len(errors) == 1
    with pytest.raises(UserError, match="can't be read on"):
        read_jsonl(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("content", [None, b"", b"\n\n"])
def test_a_missing_or_empty_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jsonl"):
        read_jsonl(tmp_path / "a.jsonl")


def test_a_file_that_is_no_archive_or_a_folder_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "b.jsonl").mkdir()
    for name in ("a.jsonl.gz", "b.jsonl"):
        with pytest.raises(UserError, match=name):
            read_jsonl(tmp_path / name, strict=False)


def test_reflective_conversations_are_dropped_and_counted():
    turns = lambda answer: {
        "messages": [
            {"role": "user", "content": "<image>Q"},
            {"role": "assistant", "content": answer},
        ],
        "images": ["a.png"],
    }
    other = lambda answer: {
        "conversations": [
            {"from": "human", "value": stepwise.REFLECTION},
            {"from": "gpt", "value": answer},
        ]
    }
    kept, dropped = drop_reflective(
        [
            turns("fine"),
            turns(f"x {stepwise.REFLECTION} y"),
            other("fine"),
            other(stepwise.REFLECTION),
        ]
    )
    assert dropped == 2 and kept == [turns("fine"), other("fine")]
    example = from_conversation(turns("fine"), name="m/0", folder="pics")
    assert (example["problem"], example["solution"], example["image"]) == (
        "Q",
        "fine",
        "pics/a.png",
    )
    with pytest.raises(UserError, match="m/1"):
        from_conversation({"messages": []}, name="m/1")
