"""Preference data: every schema and form, errors that name file, line and field, rows, KTO's pairs, the cache."""

import dataclasses
import gzip
import json
import re
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.data import batches, chat, questions
from jaxrepro.data.text import ENDOFTEXT, Tokenizer, closed_vocabulary
from jaxrepro.methods.dpo import online, records, reference_cache, schemas, setting
from jaxrepro.methods.dpo.encoding import Encoder, images
from jaxrepro.methods.dpo.objective import needed
from jaxrepro.methods.dpo.registry import REGISTRY, resolve
from jaxrepro.methods.dpo.rows import GIVEN, Shape, collate, item, shape_of
from jaxrepro.rewards.judge import Verdict

QUICK = settings(deadline=None, max_examples=40)
USER, SAID = {"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}
ASKED = [USER]
PAIR = {"prompt": "1 + 1", "chosen": "2", "rejected": "3"}
VALID = {
    "pair": PAIR,
    "scored": PAIR | {"score_chosen": 8.5, "score_rejected": 3},
    "tie": PAIR | {"tie": False},
    "multi": PAIR | {"rewards_chosen": [1, 0.5], "rewards_rejected": [0, 2.0]},
    "step": PAIR | {"prefix": "1 + 1 ="},
    "triple": PAIR | {"gold": "4"},
    "unpaired": {"prompt": "1 + 1", "completion": "2", "label": True},
    "forget": {"prompt": "1 + 1", "completion": "2", "retain": False},
    "ranked": {"prompt": "1 + 1", "completions": ["2", "3", "4"], "scores": [3, 2, 1]},
    "image": {"chosen": [[1.0]], "rejected": [[2.0]], "noise": [[0.5]], "timestep": 3},
}


@pytest.fixture(scope="module")
def tokenizer():
    return closed_vocabulary(questions.chain_pieces())


def says(role, content):
    return {"role": role, "content": content}


def check(name, record, **changes):
    return schemas.get(name).validate(record | changes, "x.jsonl line 3", id="x:3")


def encoder(tokenizer, t=24, name="pair", **more):
    return Encoder(tokenizer, t, schemas.get(name), **more)


def rows_of(e, found, shape=None, needs=frozenset(), **more):
    """Rows of checked records."""
    items = [item(e, r, frozenset(needs)) for r in found]
    return collate(items, shape or shape_of(items, k=e.k), pad=e.tokenizer.pad, **more)


# ---- what a record may look like


def test_every_schema_has_an_example_here():
    assert VALID.keys() == schemas.SCHEMAS.keys()


@pytest.mark.parametrize("name", sorted(set(VALID) - {"image"}))
def test_a_valid_record_becomes_prompt_and_responses(name):
    found = check(name, VALID[name])
    assert found["prompt"] == ASKED and found["id"] == "x:3"
    assert found["responses"][0] == ("4" if name == "triple" else "2")
    assert len(found["responses"]) == (schemas.get(name).k or 3)
    more = {"scored": ("scores", [8.5, 3.0]), "tie": ("tie", False), "forget": ("label", False)}
    more |= {"multi": ("rewards", [[1.0, 0.5], [0.0, 2.0]]), "unpaired": ("label", True)}
    more |= {"step": ("prefix", "1 + 1 ="), "ranked": ("scores", [3.0, 2.0, 1.0])}
    if name in more:
        key, value = more[name]
        assert found[key] == value
    assert set(found) <= {"id", "prompt", "responses", more.get(name, ("id",))[0]}


@pytest.mark.parametrize(
    "form",
    [
        {"prompt": ASKED},
        {"chosen": [SAID], "rejected": [says("assistant", "3")]},
        # a whole conversation beside the prompt's text: ultrafeedback_binarized
        {"chosen": [USER, SAID], "rejected": [USER, says("assistant", "3")], "messages": [USER]},
        {"prompt": ASKED, "chosen": [USER, SAID], "rejected": [USER, says("assistant", "3")]},
        {"prompt": None, "chosen": [USER, SAID], "rejected": [USER, says("assistant", "3")]},
        {"prompt": None, "chosen": "\n\nHuman: 1 + 1\n\nAssistant: 2", "rejected": "\n\nHuman: 1 + 1\n\nAssistant: 3"},
    ],
)  # fmt: skip
def test_every_form_of_a_pair_reads_the_same(form):
    assert check("pair", PAIR | form) == check("pair", PAIR)


def test_a_prompt_of_several_turns_is_all_that_the_conversations_share():
    before = [says("system", "be brief"), USER, SAID, says("user", "and 2 + 2")]
    chosen, rejected = [*before, says("assistant", "4")], [*before, says("assistant", "5")]
    found = schemas.get("pair").validate({"chosen": chosen, "rejected": rejected}, "here")
    assert found["prompt"] == before and found["responses"] == ["4", "5"]
    assert found["id"] == "here"
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    found = schemas.get("pair").validate({"chosen": text + "d", "rejected": text + "e"}, "here")
    assert [t["content"] for t in found["prompt"]] == ["a", "b", "c"]
    same = schemas.get("pair").validate({"chosen": chosen, "rejected": chosen}, "here")
    assert same["prompt"] == before and same["responses"] == ["4", "4"]


def test_one_conversation_is_a_prompt_and_its_last_turn():
    found = check("unpaired", {"completion": [USER, SAID], "label": False})
    assert found["prompt"] == ASKED and found["responses"] == ["2"] and found["label"] is False


def test_other_data_sets_names_are_read():
    row = {"prompt": "1 + 1", "initial_reason_steps": "1 + 1 =", "chosen": "2", "rejected": "3"}
    assert check("step", row | {"dataset": "x", "answer": "2"}) == check("step", VALID["step"])
    assert check("step", PAIR)["prefix"] == ""
    assert check("triple", PAIR | {"reference": "4"}) == check("triple", VALID["triple"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("pair", {"rejected": None}, "field 'rejected' is missing; a pair has prompt, chosen, rejected"),
        ("pair", {"prompt": None}, "field 'prompt' is missing; a pair has"),
        ("pair", {"prompt": " "}, "field 'prompt' is empty"),
        ("pair", {"prompt": 3}, "field 'prompt' is 3; it must be text or a list of messages"),
        ("pair", {"prompt": [USER, SAID]}, "field 'prompt' ends with the assistant's turn"),
        ("pair", {"prompt": [{"role": "user"}]}, "field 'prompt' message 1 is .* it must be"),
        ("pair", {"prompt": [says("bot", "a")]}, "message 1 has the role 'bot'; use one of system, user"),
        ("pair", {"prompt": [says("user", "")]}, "ends with an empty turn"),
        ("pair", {"chosen": "\n"}, "field 'chosen' is empty"),
        ("pair", {"chosen": [says("assistant", "")], "rejected": [SAID]}, "field 'chosen' is empty"),
        ("pair", {"chosen": [SAID]}, "some responses are text and some are messages"),
        ("pair", {"chosen": [SAID, USER], "rejected": [SAID]}, "share no first turn"),
        ("pair", {"chosen": [USER, USER], "rejected": [USER, SAID]}, "field 'chosen' has user after the prompt"),
        ("pair", {"prompt": [says("user", "x")], "chosen": [USER, SAID], "rejected": [USER, SAID]}, "do not begin with the prompt"),
        ("pair", {"id": 1.5}, "field 'id' is 1.5"),
        ("scored", {"score_chosen": "9"}, "field 'score_chosen' is '9'; it must be a finite number"),
        ("scored", {"score_chosen": float("nan")}, "field 'score_chosen' is nan"),
        ("scored", {"score_rejected": 10**400}, "field 'score_rejected' is 1000"),
        ("scored", {"score_rejected": True}, "field 'score_rejected' is True"),
        ("tie", {"tie": 1}, "field 'tie' is 1; it must be true or false"),
        ("multi", {"rewards_chosen": [1]}, "'rewards_chosen' has 1 numbers, 'rewards_rejected' has 2"),
        ("multi", {"rewards_chosen": []}, "field 'rewards_chosen' is ..; it must be a list of numbers"),
        ("multi", {"rewards_chosen": [1, None]}, "'rewards_chosen' number 2 is None"),
        ("step", {"prefix": 3}, "field 'prefix' is 3; it must be text"),
        ("triple", {"gold": None}, "field 'gold' is missing; a triple has prompt, gold, chosen, rejected"),
        ("unpaired", {"label": "good"}, "field 'label' is 'good'; it must be true or false"),
        ("forget", {"retain": None}, "field 'retain' is missing"),
        ("ranked", {"completions": ["2"]}, "must be a list of two or more responses"),
        ("ranked", {"completions": ["2", ""]}, "field 'completions' number 2 is empty"),
        ("ranked", {"scores": [1]}, "'scores' has 1 numbers for 3 completions"),
        ("image", {"noise": None}, "field 'noise' is missing"),
        ("image", {"noise": [[1.0, 2.0]]}, "use one shape"),
        ("image", {"noise": [[1.0], [1.0, 2.0]]}, "field 'noise' has rows of different lengths"),
        ("image", {"chosen": [["a"]]}, "field 'chosen' has the type"),
        ("image", {"chosen": [[float("inf")]]}, "not finite"),
        ("image", {"timestep": 1.0}, "field 'timestep' is 1.0; it must be a whole number"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named_with_its_place(name, changes, message):
    with pytest.raises(UserError, match=rf"^x\.jsonl line 3: .*{message}") as e:
        check(name, VALID[name] | changes)
    assert "\n" not in str(e.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: (
        st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=4), inside, max_size=3)
    ),
    max_leaves=6,
)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "odd"]), "content": st.text(max_size=4)})  # fmt: skip
VALUE = JSON | st.lists(TURN, max_size=4)


@given(st.data(), st.sampled_from(sorted(VALID)))
@settings(deadline=None, max_examples=150)
def test_any_json_is_a_record_or_one_line_that_names_its_place(data, name):
    schema = schemas.get(name)
    changed = data.draw(st.sets(st.sampled_from([*VALID[name], "id", "prompt"]), max_size=3))
    record = VALID[name] | {key: data.draw(VALUE) for key in changed}
    try:
        found = schema.validate(record, "x.jsonl line 3")
    except UserError as e:
        assert str(e).startswith("x.jsonl line 3: ") and "\n" not in str(e)
        return
    if name == "image":
        assert found["latents"].shape == (2, *found["noise"].shape)
        return
    assert found["prompt"][-1]["role"] != "assistant"
    assert all(text.strip() for text in found["responses"])
    again = {"prompt": found["prompt"]} | dict(zip(schema.responses, found["responses"]))
    if name == "pair":
        assert schema.validate(again, "there", id=found["id"]) == found


def test_an_unknown_schema_has_a_suggestion():
    with pytest.raises(UserError, match="no data schema 'pairs'; did you mean pair"):
        schemas.get("pairs")
    with pytest.raises(UserError, match="here: a list, not an object"):
        schemas.get("pair").validate([], "here")


# ---- files and the hub


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


def alone(i):
    """An item of one response, both of them the number i."""
    return {"id": str(i), "prompt": [i], "responses": [[i]], "label": True}


@given(st.integers(1, 4), st.integers(2, 5))
@QUICK
def test_a_mismatched_response_is_the_one_before_in_the_micro_batch(m, size):
    rows = collate([alone(i) for i in range(m * size)], Shape(1, 1, 1), pad=0, mismatched=m)
    tokens, length = rows.other
    assert (length == 1).all()
    for j in range(m):
        prompts = rows.prompts.tokens[j::m, 0].tolist()
        assert prompts == list(range(j, m * size, m))
        assert tokens[j::m, 0, 0].tolist() == prompts[-1:] + prompts[:-1]


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 2), (5, 2)])
def test_a_micro_batch_of_one_has_no_mismatch(n, m):
    with pytest.raises(UserError, match="use 2 or more items in each"):
        collate([alone(0)] * n, Shape(1, 1, 1), pad=0, mismatched=m)


# ---- rows

NUMBERS = st.lists(st.integers(0, 30).map(str), min_size=1, max_size=8).map(" ".join)
PAIRS = st.lists(
    st.fixed_dictionaries({"prompt": NUMBERS, "chosen": NUMBERS, "rejected": NUMBERS}),
    min_size=1,
    max_size=3,
)


@given(PAIRS, st.integers(14, 34))
@QUICK
def test_prompt_and_responses_are_the_start_of_a_row_and_then_padding(tokenizer, rows, t):
    rows = [check("pair", r, id=f"e{i}") for i, r in enumerate(rows)]
    long = encoder(tokenizer, 99)
    kept = [r for r in rows if len(long.prompt(r)) < t]
    short = encoder(tokenizer, t)
    if not kept:
        with pytest.raises(UserError, match="has room for a response"):
            short.fitting(rows, "training")
        return
    assert short.fitting(rows, "training") == kept
    shape = Shape(2, t, t)
    cut, whole = rows_of(short, kept, shape), rows_of(long, kept, Shape(2, 99, 99))
    assert cut.tokens.shape == (len(kept), 2, t) and cut.prompts.tokens.shape == (len(kept), t)
    for i, record in enumerate(kept):
        prompt = tokenizer.encode(chat.render(record["prompt"][0]["content"]))
        n = len(prompt)
        assert cut.prompts.tokens[i].tolist() == prompt + [tokenizer.pad] * (t - n)
        assert cut.prompts.segment[i].tolist() == [1] * n + [0] * (t - n)
        assert cut.prompts.position[i].tolist() == list(range(n)) + [0] * (t - n)
        assert cut.prompts.next_position[i] == n
        for j, text in enumerate(record["responses"]):
            ids = (tokenizer.encode(text) + [tokenizer.eos])[: t - n]
            assert cut.tokens[i, j].tolist() == ids + [tokenizer.pad] * (t - len(ids))
            assert cut.length[i, j] == len(ids) > 0
            assert whole.tokens[i, j, : len(ids)].tolist() == ids  # a longer row only adds
        one = rows_of(short, [record], shape)
        for a, b in zip((*cut.prompts, *cut[1:3]), (*one.prompts, *one[1:3])):
            np.testing.assert_array_equal(a[i], b[0])  # batch mates do not matter


LISTS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=20), min_size=1, max_size=3)


@given(st.lists(st.tuples(LISTS, LISTS), min_size=1, max_size=4), st.integers(1, 32))
@QUICK
def test_the_shape_of_items_holds_them_and_no_more(found, multiple):
    items = [{"id": str(i), "prompt": p[0], "responses": r} for i, (p, r) in enumerate(found)]
    shape = shape_of(items, multiple=multiple)
    counts = [len(i["responses"]) for i in items]
    assert shape.k == max(counts) and shape.ragged == (min(counts) < max(counts))
    rows = collate(items, shape, pad=0)
    for size, longest in (
        (shape.prompt, max(len(i["prompt"]) for i in items)),
        (shape.response, max(len(r) for i in items for r in i["responses"])),
    ):
        assert size % multiple == 0 and 0 <= size - longest < multiple
    assert (rows.length.sum(1) == [sum(map(len, i["responses"])) for i in items]).all()
    assert (rows.data.valid is not None) == shape.ragged
    for small in (shape._replace(prompt=0), shape._replace(response=0), shape._replace(k=0)):
        with pytest.raises(UserError, match=r"example 0: .* rows hold"):
            collate(items, small, pad=0)


def test_prompts_that_fill_a_row_are_left_out_and_cut_responses_are_counted(tokenizer, capsys):
    rows = [check("pair", PAIR, prompt="1 + " * n + "1", id=n) for n in range(12)]
    lengths = [len(encoder(tokenizer).prompt(r)) for r in rows]
    t = lengths[5] + 1
    e = encoder(tokenizer, t)
    kept = e.fitting(rows, "training")
    out = capsys.readouterr().out.splitlines()
    assert kept == rows[:6]
    assert "training: left out 6 of 12" in out[0]
    assert f"training: 2 responses lose their end at {t} tokens" in out[1] and len(out) == 2
    with pytest.raises(UserError, match=r"example 6: its prompt has \d+ tokens and fills"):
        rows_of(e, rows)
    with pytest.raises(UserError, match="none of 1 test records has room"):
        e.fitting(rows[-1:], "test")


def test_steps_follow_their_prefix_and_do_not_end_the_turn(tokenizer):
    e = encoder(tokenizer, 40, "step")
    show = lambda ids: tokenizer.decode(ids, skip_special=False)
    step = item(e, check("step", VALID["step"]))
    assert show(step["prompt"]) == chat.render("1 + 1") + "1 + 1 ="
    assert [show(ids).strip() for ids in step["responses"]] == ["2", "3"]
    first = item(e, check("step", PAIR))
    assert not any(tokenizer.eos in ids for ids in first["responses"])


def test_a_batch_holds_what_the_schema_has(tokenizer):
    more = {"scored": {"scores"}, "ranked": {"scores", "valid"}, "multi": {"rewards"}}
    more |= {"tie": {"ties"}, "unpaired": {"labels"}, "forget": {"labels"}}
    for name in sorted(set(VALID) - {"image"}):
        e = encoder(tokenizer, 32, name, responses={"ranked": 4, "forget": 1}.get(name))
        rows = rows_of(e, [check(name, VALID[name])] * 2)
        k = 4 if name == "ranked" else schemas.get(name).k
        assert e.k == k == rows.tokens.shape[1]
        there = {field for field, value in rows.data._asdict().items() if value is not None}
        assert there == more.get(name, set())
        assert (rows.length > 0).sum() == 2 * min(k, len(check(name, VALID[name])["responses"]))
    multi = rows_of(encoder(tokenizer, 32, "multi"), [check("multi", VALID["multi"])])
    np.testing.assert_array_equal(multi.data.rewards, np.float32([[[1, 0.5], [0, 2]]]))


def test_optional_fields_become_arrays_where_a_loss_wants_them(tokenizer):
    more = {"probability": 0.75, "age": 2, "unsafe_chosen": False, "unsafe_rejected": True}
    for name in ("pair", "scored", "tie", "multi", "step"):
        record = check(name, VALID[name], **more)
        assert record["unsafe"] == [False, True]
        e = encoder(tokenizer, 40, name)
        data = rows_of(e, [record], needs={"unsafe", "age", "probability", "reference"}).data
        assert data.probability.tolist() == [0.75] and data.age.tolist() == [2.0]
        assert data.unsafe.tolist() == [[False, True]] and data.unsafe.dtype == bool
        plain = rows_of(e, [record]).data
        assert plain.probability is plain.age is plain.unsafe is None
    record = check("unpaired", VALID["unpaired"], score=1.5)
    e = encoder(tokenizer, 40, "unpaired")
    assert rows_of(e, [record], needs={"scores"}).data.scores.tolist() == [[1.5]]
    with pytest.raises(UserError, match="example x:3 has no scores, which the loss needs"):
        rows_of(e, [check("unpaired", VALID["unpaired"])], needs={"scores"})
    assert rows_of(e, [record]).data.scores is None
    for changes, message in (
        ({"probability": 0.4}, "field 'probability' is 0.4; chosen beats rejected with 0.5 to 1"),
        ({"age": -1}, "field 'age' is -1"),
        ({"unsafe_chosen": True}, "unsafe_chosen and unsafe_rejected come together"),
    ):
        with pytest.raises(UserError, match=rf"x\.jsonl line 3: .*{message}"):
            check("pair", PAIR, **changes)


# What a run computes itself (programs.py, tests/methods/test_dpo_programs.py); gold is response 0 of a triple.
COMPUTED = {
    "reference", "tokens", "kl", "log_sum_p2", "ref_entropy", "kl_p", "kl_q", "mean_chosen_tokens", "progress",
    "key", "vocab", "gold",
}  # fmt: skip
REFUSED = {  # and what no run has
    "dro": "value head", "drdo": "reward head", "diffusion_dpo": "images", "rpo_rel": "embeddings",
    "tis_dpo": "two further models", "dmpo": "turns", "hypo": "fresh sample", "spo_soft": "fresh sample",
    "xpo": "online.kind", "selm": "online.kind",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_a_record_brings_all_that_a_loss_asks_for_or_the_loss_is_refused(tokenizer, name):
    spec = resolve(name)
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]) as error:
            setting.refuse(spec, "")
        assert "\n" not in str(error.value)
        return
    setting.refuse(spec, "")
    optional = {"probability": 0.75, "age": 2, "unsafe_chosen": False, "unsafe_rejected": True, "score": 0.5}  # fmt: skip
    record = check(spec.schema, VALID[spec.schema], **optional)
    if spec.schema == "forget":
        record |= {"keep": check("forget", VALID["forget"], prompt="2 + 2", retain=True)}
    needs = needed(spec)
    e = encoder(tokenizer, 32, spec.schema, responses=3 if spec.schema == "ranked" else None)
    rows = rows_of(e, [record] * 2, needs=needs, mismatched="kl_p" in needs)
    there = {field for field, value in rows.data._asdict().items() if value is not None}
    assert needs <= there | COMPUTED
    assert ("kl_p" in needs) == (rows.other is not None)


def test_pairs_that_are_drawn_bring_what_their_losses_need():
    own = {"iterative": "sigmoid", "sppo": "sppo_soft"}
    for kind, made in online.KINDS.items():
        setting.refuse(resolve(own.get(kind, kind)), kind)
        if kind == "spin":
            continue
        drawn = [online.Drawn([i], str(i), True) for i in range(2)]
        found = online.item(kind, {"id": "q"}, [1], drawn, Verdict(np.array([2.0, 1.0]), None, 0))
        assert set(found) & GIVEN == made.gives
    for name, kind, match in (
        ("kto", "online_dpo", "labels"),
        ("odpo", "online_dpo", "scores"),
        ("xpo", "online_dpo", "explore"),
        ("ns_dpo", "sppo", "age"),
        ("gdpo_soft", "spin", "probability"),
        ("tpo", "iterative", "3 responses an item and gets 2"),
        ("sigmoid", "nash_md", "2 responses an item and gets 1"),
    ):
        with pytest.raises(UserError, match=match) as error:
            setting.refuse(resolve(name), kind)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="prompt_nll"):
        setting.refuse(resolve("orpo", prompt_nll=True), "")


def test_what_is_forgotten_stands_beside_what_is_kept(tokenizer):
    make = lambda i, retain: check("forget", VALID["forget"], prompt=f"{i}", retain=retain, id=i)
    forget, retain = [make(i, False) for i in range(7)], [make(i, True) for i in range(20, 23)]
    rows = records.keep([*retain, *forget], seed=1)
    assert [r["id"] for r in rows] == [r["id"] for r in forget]
    drawn = [r["keep"]["id"] for r in rows]
    assert set(drawn[:3]) == set(drawn[3:6]) == {"20", "21", "22"}
    assert rows == records.keep([*retain, *forget], seed=1)
    e = encoder(tokenizer, 32, "forget")
    shape = Shape(2, 32, 32)
    out = rows_of(e, e.fitting(rows, "training"), shape)
    assert out.tokens.shape == (7, 2, 32) and out.prompts.tokens.shape == (7, 2, 32)
    alone = encoder(tokenizer, 32, "forget", responses=1)
    for i, record in enumerate(rows):
        for row, one in enumerate((record, record["keep"])):
            same = rows_of(alone, [one | {"label": False}], shape._replace(k=1))
            for a, b in zip(out.prompts, same.prompts):
                np.testing.assert_array_equal(a[i, row], b[0])
            np.testing.assert_array_equal(out.tokens[i, row], same.tokens[0, 0])
            assert out.length[i, row] == same.length[0, 0]
    with pytest.raises(UserError, match="example 20 is to be retained"):
        rows_of(alone, retain)
    with pytest.raises(UserError, match="example 0 is to be forgotten beside none that is kept"):
        rows_of(e, forget)
    with pytest.raises(UserError, match="7 records to forget and 0 to retain"):
        records.keep(forget)


def test_rankings_of_different_lengths_are_filled_with_invalid_rows(tokenizer):
    e = encoder(tokenizer, 32, "ranked", responses=4)
    two = check("ranked", VALID["ranked"], completions=["5", "6"], scores=[0.5, 2])
    out = rows_of(e, [check("ranked", VALID["ranked"]), two])
    valid = [[True] * 3 + [False], [True] * 2 + [False] * 2]
    assert out.data.valid.tolist() == (out.length > 0).tolist() == valid
    np.testing.assert_array_equal(out.data.scores, np.float32([[3, 2, 1, 0], [0.5, 2, 0, 0]]))
    assert (out.tokens[~out.data.valid] == tokenizer.pad).all()
    whole = [item(e, check("ranked", VALID["ranked"]))] * 2
    ragged = shape_of([*whole, item(e, two)])
    assert collate(
        whole, ragged, pad=0
    ).data.valid.all()  # the arrays of a batch are always the same ones
    five = check("ranked", VALID["ranked"], completions=["1"] * 5, scores=[1] * 5, id="five")
    assert e.fitting([five, two], "training") == [two]
    with pytest.raises(
        UserError, match=r"example five: 5 responses of up to 2 tokens .* hold 4 of"
    ):
        rows_of(e, [five])


def test_batches_are_read_at_random_and_know_their_records(tokenizer):
    e = encoder(tokenizer, 32, "scored")
    items = [item(e, check("scored", VALID["scored"], id=i, score_chosen=i)) for i in range(5)]
    arrays = partial(collate, shape=shape_of(items), pad=tokenizer.pad)
    data = batches.dataset(items, arrays, batch=2, seed=0)
    for step in (3, 0):
        batch = data[step]
        assert batch.arrays.data.scores[:, 0].tolist() == [float(i) for i in batch.ids]
        assert batch.arrays.tokens.shape == (2, 2, 16)


def test_held_out_items_are_a_better_and_a_worse_response():
    one = lambda k, **more: {"responses": [[i] for i in range(k)], **more}
    ends = lambda item, schema: setting.as_pair(item, schema)["responses"]
    assert ends(one(2, prompt=[]), "pair") == [[0], [1]]
    assert ends(one(3, prompt=[]), "triple") == [[1], [2]]
    ranked = setting.as_pair(one(3, prompt=[], scores=[1, 0, 4]), "ranked")
    assert ranked["responses"] == [[2], [1]] and ranked["scores"] == [4, 0]
    kept_first = setting.as_pair(one(2, prompts=[[8], [9]]), "forget")
    assert kept_first["responses"] == [[1], [0]] and kept_first["prompts"] == [[9], [8]]


def with_bos(tokenizer, template=None):
    """The closed vocabulary with a post-processor that begins a text with a bos, as Llama's does."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_str(tokenizer.backend.to_str())
    bos = (ENDOFTEXT, backend.token_to_id(ENDOFTEXT))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{ENDOFTEXT} $A", special_tokens=[bos]
    )
    return Tokenizer(backend, template=template, named={"bos_token": ENDOFTEXT})


WRITES_BOS = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_a_row_has_exactly_one_bos(tokenizer):
    record = check("pair", PAIR)
    bare = encoder(tokenizer, 32).rows(record)
    assert tokenizer.bos is None and tokenizer.id(ENDOFTEXT) not in bare[0].tokens
    rows = []
    for template in (None, WRITES_BOS, WRITES_BOS.removeprefix("{{ bos_token }}")):
        own = with_bos(tokenizer, template)
        assert own.bos == tokenizer.id(ENDOFTEXT)
        rows.append(encoder(own, 32).rows(record))
    assert rows[0] == rows[1] == rows[2]
    assert rows[0][0].tokens == [own.bos, *bare[0].tokens] and rows[0][0].start == bare[0].start + 1


def test_without_a_template_a_prompt_is_plain_text(tokenizer):
    own = with_bos(tokenizer)
    e = encoder(own, 32, template=False)
    row = e.rows(check("pair", PAIR))[0]
    assert row.tokens == [own.bos, *own.encode("1 + 1"), *own.encode("2"), own.eos]
    with pytest.raises(UserError, match=r"example x:3: its prompt has 3 turns, which plain text"):
        e.rows(check("pair", PAIR, prompt=[USER, SAID, USER]))


def test_a_record_that_cannot_be_encoded_is_named(tokenizer):
    e = encoder(tokenizer, 32)
    for changes, message in (
        ({"chosen": "2<|im_end|>"}, "example x:3 holds the special token <|im_end|>"),
        ({"prompt": "<|im_start|>1"}, "example x:3 holds the special token <|im_start|>"),
        ({"chosen": "words"}, "example x:3: the closed vocabulary"),
    ):
        with pytest.raises(UserError, match=message.replace("|", r"\|")):
            rows_of(e, [check("pair", PAIR, **changes)])
    two = [check("multi", VALID["multi"], id="a"), check("multi", VALID["multi"], id="b", rewards_chosen=[1], rewards_rejected=[2])]  # fmt: skip
    with pytest.raises(UserError, match="example a has 2 rewards, example b has 1"):
        rows_of(encoder(tokenizer, 32, "multi"), two)


def test_impossible_encoders_are_refused(tokenizer):
    for changes, message in (
        ({"t": 1}, r"data\.max_tokens=1"),
        ({"name": "ranked"}, "needs a number of responses, not None"),
        ({"name": "image"}, r"data\.schema=image has no tokens"),
        ({"system": "<|im_end|>"}, r"the system text contains the special token <\|im_end\|>"),
    ):
        with pytest.raises(UserError, match=message):
            encoder(tokenizer, **changes)


def test_a_system_turn_of_the_record_stays_and_others_get_the_encoders(tokenizer):
    e = encoder(tokenizer, 40, system="1 2")
    shown = lambda r: tokenizer.decode(e.prompt(check("pair", PAIR, prompt=r)), skip_special=False)
    assert shown(ASKED) == chat.render("1 + 1", system="1 2")
    assert shown([says("system", "3"), USER]) == chat.render("1 + 1", system="3")


def test_image_pairs_are_arrays_with_one_noise_for_both():
    rng = np.random.default_rng(0)
    rows = [
        schemas.get("image").validate(
            {n: rng.normal(size=(4, 2, 2)) for n in ("chosen", "rejected", "noise")} | {"timestep": i},
            f"r{i}",
        )
        for i in range(3)
    ]  # fmt: skip
    out = images(rows)
    assert out["latents"].shape == (3, 2, 4, 2, 2) and out["noise"].shape == (3, 4, 2, 2)
    assert out["timestep"].tolist() == [0, 1, 2] and out["latents"].dtype == np.float32
    np.testing.assert_array_equal(out["latents"][1], rows[1]["latents"])
    odd = check("image", VALID["image"], id="odd")
    with pytest.raises(UserError, match="example odd has the shape"):
        images([*rows, odd])


# ---- cached log-probabilities of the reference


@pytest.fixture(scope="module")
def rows():
    return [check("pair", PAIR, prompt=f"{i} + 1", id=i) for i in range(3)]


def test_a_fingerprint_changes_with_all_that_the_reference_reads(tokenizer, rows):
    e = encoder(tokenizer, 32)
    shape = Shape(2, 32, 32)
    of = lambda model="m", e=e, rows=rows, shape=shape: reference_cache.fingerprint(
        model, [item(e, r) for r in rows], shape
    )
    other = [rows[0], rows[1], check("pair", PAIR, prompt="2 + 2", id=2)]
    swapped = [{**r, "responses": r["responses"][::-1]} for r in rows]
    template = WRITES_BOS.replace("assistant\n", "assistant\n\n")
    keys = [
        of(),
        of("other"),
        of(rows=other),
        of(rows=rows[::-1]),
        of(rows=swapped),
        of(rows=rows[:2]),
        of(e=dataclasses.replace(e, max_tokens=len(e.prompt(rows[0])) + 1)),  # cuts the end of turn
        of(shape=shape._replace(response=33)),
        of(shape=shape._replace(prompt=33)),
        of(e=dataclasses.replace(e, system="1")),
        of(e=dataclasses.replace(e, template=False)),
        of(e=dataclasses.replace(e, tokenizer=with_bos(tokenizer))),
        of(e=dataclasses.replace(e, tokenizer=with_bos(tokenizer, template))),
    ]
    assert len(set(keys)) == len(keys) and of() == keys[0]
    assert all(len(key) == 32 for key in keys)
    plain = dataclasses.replace(e, template=False)  # the same tokens, another response
    pair = lambda *texts: check("pair", dict(zip(("prompt", "chosen", "rejected"), texts)))
    assert of(e=plain, rows=[pair("1 2", "3", "4")]) != of(e=plain, rows=[pair("1", "2 3", "2 4")])
    renamed = [{**r, "id": "x", "scores": [1.0, 2.0]} for r in rows]
    assert of(rows=renamed) == keys[0]
    apart = {"id": "x", "prompts": [[1], [2]], "responses": [[3], [4]]}
    of_items = lambda *items: reference_cache.fingerprint("m", items, shape)
    assert of_items(apart) != of_items(apart | {"prompts": [[2], [1]]})


def test_the_identity_of_a_model_is_its_numbers_and_its_config():
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones((), jnp.bfloat16)}}
    of = reference_cache.weights
    assert of(params, "cfg") == of({k: v for k, v in reversed(params.items())}, "cfg")
    changed = [
        of(params | {"a": params["a"].at[0, 0].set(1e-7)}, "cfg"),
        of(params | {"a": params["a"].reshape(3, 2)}, "cfg"),
        of(params | {"b": {"c": jnp.ones(())}}, "cfg"),
        of({"a": params["a"], "d": params["b"]}, "cfg"),
        of(params, "other"),
        of(params, "cfg"),
    ]
    assert len(set(changed)) == 6


def test_cached_log_probabilities_come_back_bit_for_bit(tmp_path):
    lp = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    folder = tmp_path / "cache"
    assert reference_cache.load(folder, "k", (5, 2)) is None
    path = reference_cache.save(folder, "k", jnp.asarray(lp))
    np.testing.assert_array_equal(reference_cache.load(folder, "k", (5, 2)), lp)
    assert reference_cache.load(folder, "other", (5, 2)) is None
    with pytest.raises(UserError, match=r"holds float32 \(5, 2\), float32 \(4, 2\) is needed"):
        reference_cache.load(folder, "k", (4, 2))
    for damage in (path.read_bytes()[:60], path.read_bytes()[:-3], b"", b"PK\x03\x04"):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="is damaged"):
            reference_cache.load(folder, "k", (5, 2))
    assert [p.name for p in folder.iterdir()] == ["reference-k.npy"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_neither_kept_nor_used(tmp_path, bad):
    lp = np.zeros((3, 2), np.float32)
    lp[1, 1] = bad
    with pytest.raises(UserError, match=r"^example b \(1 of 3\): the reference gives it"):
        reference_cache.save(tmp_path, "k", lp, ids=["a", "b", "c"])
    assert not list(tmp_path.iterdir())
    np.save(reference_cache.place(tmp_path, "k"), lp)
    with pytest.raises(UserError, match=r"example number 1 .*delete it"):
        reference_cache.load(tmp_path, "k", (3, 2))
