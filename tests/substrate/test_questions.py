"""Questions: right chains, sides without a common text, readers that name the line, rows as they say."""

import gzip
import json
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.data import chat, questions
from jaxrepro.data.questions import Encoder
from jaxrepro.data.text import closed_vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return closed_vocabulary(questions.chain_pieces())


def texts(items):
    return {" ".join(e["problem"].split()) for e in items}


# ---- the generator


@given(st.integers(0, 10**6), st.booleans())
@settings(deadline=None, max_examples=150)
def test_a_chain_is_right_step_by_step_and_in_the_vocabulary(tokenizer, index, held):
    e = questions.chain(index, "train 0", held=held)
    words = e["problem"].split()
    total = int(words[0])
    for sign, by, line in zip(words[1::2], words[2::2], e["solution"].splitlines()):
        after = total + int(by) if sign == "+" else total - int(by)
        assert line == f"{total} {sign} {by} = {after}" and 0 <= after <= questions.LARGEST
        total = after
    assert e["solution"].splitlines()[-1] == f"#### {total}"
    assert questions.final(e["solution"]) == str(total)
    assert questions.held_out(e["problem"]) == held
    for field in ("problem", "solution"):
        assert tokenizer.decode(tokenizer.encode(e[field])) == e[field]


def test_test_chains_are_in_no_training_stream_and_the_same_for_every_seed():
    a, b = questions.load(test=50, seed=0), questions.load(test=50, seed=1)
    assert a.test == b.test and a.train[0] != b.train[0]
    drawn = texts(a.train[i] for i in range(400))
    assert len(drawn) > 300 and not drawn & texts(a.test)
    assert a.train[7] == questions.load(seed=0).train[7]


@given(st.text(max_size=20), st.integers(1, 3))
def test_spaces_do_not_move_a_text_to_the_other_side(text, n):
    words = text.split() or ["x"]
    assert questions.held_out(" ".join(words)) == questions.held_out((" " * n).join(words))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a\n#### 12", "12"),
        ("#### 1\n#### 2\nand more", "2"),
        ("so 3 + 4 is 7.", "7"),
        ("it costs $1,200.50, all in all", "1,200.50"),
        ("it is -5", "-5"),
        ("between 3-7", "7"),
        ("in all 9-4", "4"),
        ("nothing", None),
        ("#### ", None),
    ],
)
def test_the_answer_is_behind_the_mark_or_the_last_number(text, answer):
    assert questions.final(text) == answer


# ---- gsm_symbolic, by a stand-in; tests/oracles has the real one


@pytest.fixture
def gym(monkeypatch):
    def item(seed, i):
        value = (seed + i) % 97
        cot = f"so {value}\n#### {value + (i % 5 == 0)}"  # every fifth states another number
        return {"question": f"q {seed} {i % 400}", "answer": str(value), "metadata": {"answer_cot": cot}}  # fmt: skip

    def create_dataset(name, *, seed, size):
        assert name == "gsm_symbolic"
        return [item(seed, i) for i in range(size)]

    module = types.ModuleType("reasoning_gym")
    module.create_dataset = create_dataset
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)


def test_gsm_symbolic_keeps_right_and_different_items_of_its_side(gym):
    found = questions.load(generator="gsm_symbolic", n=40, test=10, seed=3)
    assert (len(found.train), len(found.test)) == (40, 10)
    assert len(texts(found.train)) == 40 and not texts(found.train) & texts(found.test)
    for e in [*found.train, *found.test]:
        value = e["solution"].split()[1]
        assert e["solution"].endswith(f"#### {value}")
    assert found.test == questions.load(generator="gsm_symbolic", n=1, test=10, seed=4).test
    with pytest.raises(UserError, match=r"gave .* different items, 4000 were wanted"):
        questions.load(generator="gsm_symbolic", n=4000)


def test_a_missing_package_and_an_unknown_generator_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install reasoning-gym, or 'jaxrepro\[data\]'"):
        questions.load(generator="gsm_symbolic")
    with pytest.raises(UserError, match=r"data\.generator='odd' is unknown: one of chains"):
        questions.load(generator="odd")


# ---- files and the hub


def rows(n, start=0):
    return [{"question": f"what is {i}?", "answer": f"<<{i}+0={i}>>{i}\n#### {i}"} for i in range(start, start + n)]  # fmt: skip


def put(path, items):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(x) + "\n" for x in items)
    return path


def test_a_file_is_split_by_its_texts(tmp_path):
    path = put(tmp_path / "a.jsonl.gz", rows(200))
    found = questions.load(path=str(path), test=20)
    assert len(found.test) == 20 and not texts(found.train) & texts(found.test)
    assert len(found.train) == 200 - sum(questions.held_out(r["question"]) for r in rows(200))
    e = found.train[0]
    number = e["problem"].removeprefix("what is ").removesuffix("?")
    assert (
        e["solution"] == f"{number}\n#### {number}" and e["id"] == f"a.jsonl.gz:{int(number) + 1}"
    )


@pytest.mark.parametrize("names", [("train", "test"), ("gsm_train", "gsm_test")])
def test_a_folder_or_a_file_with_a_test_file_beside_it_keeps_that_split(tmp_path, names, capsys):
    put(tmp_path / f"{names[0]}.jsonl", rows(30))
    put(tmp_path / f"{names[1]}.jsonl", rows(10, start=25))
    for path in (tmp_path, tmp_path / f"{names[0]}.jsonl"):
        found = questions.load(path=str(path), test=1)
        assert len(found.test) == 10 and len(found.train) == 25
        assert not texts(found.train) & texts(found.test)
        assert "left out: 5 training items" in capsys.readouterr().out


def test_a_folder_without_a_test_file_is_split_by_its_texts(tmp_path):
    path = put(tmp_path / "train.jsonl", rows(200))
    found = questions.load(path=str(tmp_path), test=20)
    assert found == questions.load(path=str(path), test=20) and len(found.test) == 20
    put(tmp_path / "a_test.jsonl", rows(3))
    put(tmp_path / "b_test.jsonl", rows(3))
    with pytest.raises(UserError, match="several"):
        questions.load(path=str(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 200_000, "line 2: not JSON"),
        ("[]", "line 2: a list, not an object"),
        ('{"question": "a"}', r"a\.jsonl:2: needs the texts .*; it has question"),
        ('{"problem": "a", "solution": " "}', "needs the texts"),
        ('{"problem": 3, "solution": "b"}', "needs the texts"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(rows(1)[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        questions.load(path=str(path))


def test_files_that_hold_nothing_and_folders_that_are_ambiguous_are_refused(tmp_path):
    empty, broken = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    empty.write_text("\n")
    broken.write_bytes(b"no gzip")
    for path, message in ((empty, "holds no records"), (broken, "cannot be read")):
        with pytest.raises(UserError, match=message):
            questions.load(path=str(path))
    with pytest.raises(UserError, match=r"one train\.jsonl or \*_train\.jsonl .* there are none"):
        questions.load(path=str(tmp_path))
    put(tmp_path / "a_train.jsonl", rows(3))
    put(tmp_path / "b_train.jsonl", rows(3))
    with pytest.raises(UserError, match="several"):
        questions.load(path=str(tmp_path))
    with pytest.raises(UserError, match=r"data\.path=nowhere\.jsonl"):
        questions.load(path="nowhere.jsonl")


def test_a_hub_name_is_read_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load(name, subset, *, split):
        asked.append((name, subset, split))
        return rows(20) if split == "train" else rows(5, start=100)

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = questions.load(path="openai/gsm8k")
    assert (len(found.train), len(found.test)) == (20, 5)
    assert asked == [("openai/gsm8k", "main", s) for s in ("train", "test")]


def test_a_hub_that_does_not_answer_is_one_line():
    with pytest.raises(UserError, match=r"^data.path=nobody/nothing is neither [^\n]*$"):
        questions.load(path="nobody/nothing")


# ---- rows


def test_a_row_scores_the_answer_and_its_end_and_nothing_else(tokenizer):
    encoder = Encoder(tokenizer, 64, 40)
    items = [questions.chain(i, "a", held=False) for i in range(8)]
    rows = encoder.sft(items)["tokens"]
    for item, ids, response, segment, position in zip(items, *rows):
        n = int(segment.sum())
        assert (
            tokenizer.decode(ids[response], skip_special=False) == item["solution"] + "<|im_end|>"
        )
        prompt = tokenizer.decode(ids[:n][~response[:n]], skip_special=False)
        assert prompt == chat.render(item["problem"])
        assert segment[:n].all() and not segment[n:].any() and not response[n:].any()
        np.testing.assert_array_equal(position[:n], np.arange(n))


def test_prompts_are_what_rows_begin_with(tokenizer):
    encoder = Encoder(tokenizer, 64, 40)
    items = [questions.chain(i, "a", held=True) for i in range(4)]
    whole, prompts = encoder.sft(items)["tokens"], encoder.prompts(items, length=32)
    for i, n in enumerate(prompts.next_position):
        np.testing.assert_array_equal(prompts.tokens[i, :n], whole.tokens[i, :n])
        assert whole.response[i, n] and prompts.segment[i].sum() == n
    with pytest.raises(UserError, match="its prompt has"):
        encoder.prompts(items, length=8)


def test_long_items_are_left_out_or_refused_and_never_cut(tokenizer, capsys):
    items = [questions.chain(i, "a", held=False) for i in range(40)]
    encoder = Encoder(tokenizer, 40, 20)
    kept = encoder.fitting(items, "training")
    assert 0 < len(kept) < 40 and f"left out {40 - len(kept)} of 40" in capsys.readouterr().out
    assert all(encoder.fits(e) for e in kept) and encoder.sft(kept)["tokens"].tokens.shape[1] == 40
    long = next(e for e in items if not encoder.fits(e))
    with pytest.raises(UserError, match=f"example {long['id']} is longer"):
        encoder.sft([long])
    with pytest.raises(UserError, match="none of 40"):
        Encoder(tokenizer, 12, 3).fitting(items, "test")


def test_a_special_token_in_a_text_is_refused(tokenizer):
    item = {"id": "x", "problem": "1 + 1<|im_end|>", "solution": "2"}
    with pytest.raises(UserError, match="example x: its problem holds the special token"):
        Encoder(tokenizer, 64, 40).sft([item])
