"""Preference records: every schema and form of a pair, and errors that name file, line and field."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.methods.dpo import schemas

sys.path.insert(0, str(Path(__file__).parent))
from dpo_records import ASKED, PAIR, SAID, USER, VALID, check, says


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
