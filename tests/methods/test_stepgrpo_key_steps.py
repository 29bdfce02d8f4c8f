"""Key-step pipeline: rules, replies, validation, command line."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.data import stepformat as fmt
from jaxrepro.data.stepwise import check_key_steps
from jaxrepro.methods.stepgrpo import key_steps, rewards
from jaxrepro.methods.stepgrpo.key_steps import clean, extract, parse_reply, surface_forms


def solution(*steps):
    return fmt.solution_text("a picture", "geometry", list(steps), "9")


@pytest.mark.parametrize(
    "element, wanted",
    [
        (r"\frac{6}{3}=2", ["6/3 = 2", "6 divided by 3 equals 2", r"\frac{6}{3} = 2"]),
        ("6/3 = 2", [r"\frac{6}{3}=2", "6/3=2", "6 / 3 = 2", "6 divided by 3 equals 2"]),
        ("2 * 5 = 10", ["2*5=10", "2 × 5 = 10", r"2 \times 5 = 10", "2 times 5 equals 10"]),
        ("AD is a median", ["median is AD"]),
        ("AE is half of AD", ["AE=1/2AD", r"AE = \frac{1}{2}AD"]),
        ("AE=1/2AD", ["AE is half of AD", r"AE=\frac{1}{2}AD"]),
        ("x = 5", ["x=5", "x is 5", "x equals 5"]),
        ("top-left is 3", ["top-left = 3", "top-left=3"]),
        ("17", []),
    ],
)
def test_surface_forms_are_equivalent_writings(element, wanted):
    got = surface_forms(element)
    assert got[0] == element and set(wanted) <= set(got)
    assert len({g.lower() for g in got}) == len(got)


def test_half_of_a_segment_is_not_one_over_twice_it():
    assert not [f for f in surface_forms("AE=1/2AD") if "{2AD}" in f or "divided" in f]


def first_forms(*steps, question="", **options):
    return [g[0] for g in extract(solution(*steps), question, **options)["Steps"]]


def test_extractor_finds_equations_relations_and_numbers():
    got = first_forms(
        "The top-left is 3, and AD is a median of the triangle.",
        r"So 2 * 5 = 10. We get \frac{6}{3}=2 apples",
        "Therefore the area = 3.5 square cm; AE is half of AD",
        "add 17 and 1,200 to get 50%",
    )
    assert got == [
        "top-left is 3",
        "2 * 5 = 10",
        r"\frac{6}{3}=2",
        "area = 3.5",
        "AE is half of AD",
        "17",
        "1,200",
        "50%",
    ]


def test_extractor_leaves_out_the_question_repetitions_and_single_characters():
    assert first_forms("x = 5", "x=5", "7 + 8 = 15", question="If x = 5, what is x + 8?") == [
        "7 + 8 = 15"
    ]
    assert first_forms("we see 7") == [] and first_forms("we see 7", min_chars=1) == ["7"]


def test_extractor_needs_steps():
    with pytest.raises(UserError, match="Step n"):
        extract("just 5")


WORDS = "a is 3 = 12/2 6 \\frac{6}{3}=2 AD the median so ( ) , . half of it 50% x*y -"
words = st.sampled_from(WORDS.split())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(words, min_size=1, max_size=10), min_size=1, max_size=4))
def test_a_solution_holds_its_own_key_steps_and_cleaning_is_idempotent(steps):
    text = solution(*(" ".join(s) for s in steps))
    keys = extract(text)
    share = rewards.key_step_share(text, keys, matcher="substring")
    assert share == (1 if keys["Steps"] else 0)
    assert clean(keys) == keys and check_key_steps(keys) == keys


# ---- replies

REPLY = """Key Elements:
Image Description: [cube, 5 balls]; Rationales: [area]; Step 1: [x = 3, f(1, 2) = 4], Step 2: ["AD's length", 'b, c', []];"""


def test_reply_of_the_published_shape_is_read():
    got = parse_reply(REPLY)
    assert got["Image Description"] == ["cube", "5 balls"] and got["Rationales"] == ["area"]
    assert got["Steps"] == ["x = 3", "f(1, 2) = 4", "AD's length", "b, c", []]


def test_augmented_reply_keeps_the_forms_of_an_element_together():
    got = parse_reply("Step 1: [[6/3 = 2, 6 divided by 3 equals 2], 17]\nStep 2: []")
    assert got["Steps"] == [["6/3 = 2", "6 divided by 3 equals 2"], "17"]


@pytest.mark.parametrize(
    "reply, message",
    [
        ("", "no 'Step n"),
        ("I cannot help", "no 'Step n"),
        ("Step 1: [a, b", "never closes"),
        ("Step 1: " + "[" * 3000 + "]" * 3000, "too deep"),
    ],
)
def test_bad_replies_are_refused(reply, message):
    with pytest.raises(UserError, match=message):
        parse_reply(reply)


# ---- cleaning


@pytest.mark.parametrize("bad", ["a = 3", None, ["a"], {"Steps": "a = 3"}, {"Steps": [["a", 3]]}])
def test_clean_repairs_no_broken_structure(bad):
    with pytest.raises(UserError, match=r"key.step"):
        clean(bad)


def test_what_clean_leaves_is_what_training_accepts():
    for raw in ({}, {"Steps": [[]]}, {"Steps": ["", ["ab", " "]], "Rationales": 3}):
        assert check_key_steps(clean(raw)) == clean(raw)
    assert clean({}) == {"Steps": []} and clean({"Steps": [[]]}) == {"Steps": []}


def test_clean_drops_empty_short_repeated_and_asked():
    assert clean({"Steps": ["ab", ["A B", "cd"], "7", ""]}) == {"Steps": [["ab"]]}
    assert clean({"Steps": ["7"]}, min_chars=1) == {"Steps": [["7"]]}
    assert clean({"Steps": ["12", "1"]}, "Is 112 odd?", min_chars=1) == {"Steps": [["12"], ["1"]]}
    assert clean({"Steps": [["x = 5", "x is 5"]]}, "Let X = 5.") == {"Steps": []}


# ---- command line


@pytest.fixture
def run(tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def call(text, *flags):
        source.write_bytes(text if isinstance(text, bytes) else text.encode())
        code = key_steps.main([str(source), str(target), *flags])
        streams = capsys.readouterr()
        records = (
            [json.loads(x) for x in target.read_text().splitlines()] if target.exists() else None
        )
        return code, records, streams.out + streams.err

    return call


def test_command_adds_key_steps_from_solution_reply_or_what_is_there(run):
    lines = [
        {"id": "a", "problem": "?", "solution": solution("x = 3 + 4 = 7")},
        {"id": "b", "problem": "?", "reply": REPLY},
        {"id": "c", "problem": "?", "solution": "-", "key_steps": {"Steps": ["", "ab"]}},
    ]
    code, records, out = run("\n\n".join(map(json.dumps, lines)), "--no_forms")
    assert code == 0 and "3 records, 0 without" in out
    assert [r["key_steps"]["Steps"][0] for r in records] == [["x = 3 + 4 = 7"], ["x = 3"], ["ab"]]
    assert [r["id"] for r in records] == ["a", "b", "c"]


@pytest.mark.parametrize("empty", [{}, {"Steps": []}, {"Steps": ["", [" "]]}, None])
def test_empty_key_steps_are_extracted_like_missing_ones(run, empty):
    record = {"problem": "?", "solution": solution("x = 3 + 4 = 7")}
    _, (wanted,), _ = run(json.dumps(record))
    code, (got,), _ = run(json.dumps({**record, "key_steps": empty}))
    assert code == 0 and got == wanted and got["key_steps"]["Steps"]
    reply = {"problem": "?", "reply": REPLY, "key_steps": empty}
    assert run(json.dumps(reply))[1][0]["key_steps"]["Steps"][0][0] == "x = 3"


def test_command_writes_filled_prompts(run):
    record = {"id": 4, "problem": "What is {solution}?", "solution": "the proof"}
    code, records, _ = run(json.dumps(record), "--prompts")
    assert code == 0 and records[0]["id"] == 4
    assert "What is {solution}?" in records[0]["extract"] and "the proof" in records[0]["extract"]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"problem": "?"}', "in.jsonl:1: record has none"),
        ("{", "in.jsonl:1: not one JSON object"),
        ("[1]", "in.jsonl:1: a record is a JSON object, not list"),
        ('{"key_steps": [1]}', "in.jsonl:1: 'key_steps' must be an object"),
        ('{"key_steps": {"Steps": [3]}}', "in.jsonl:1: key step 0 must be"),
        ('{"key_steps": {"Steps": 3}}', "needs a list 'Steps'"),
        ('{"solution": "5"}', "in.jsonl:1: solution has no"),
        ('{"solution": 5}', "solution is a int"),
        ('{"reply": "sorry"}', "in.jsonl:1: reply has no"),
        (b"\xff\xfe", "in.jsonl:1: not one JSON object in UTF-8"),
    ],
)
def test_bad_input_is_one_line_and_code_two_and_writes_nothing(run, text, message):
    code, records, out = run(text)
    assert code == 2 and records is None
    assert message in out and out.startswith("error: ") and out.count("\n") == 1


def test_a_broken_line_is_named_and_costs_no_other_record(run, tmp_path, capsys):
    good = {"id": "a", "problem": "?", "solution": solution("x = 3 + 4 = 7")}
    text = "\n".join([json.dumps(good), "{", json.dumps({"problem": "?"}), json.dumps(good)])
    code, records, out = run(text)
    assert code == 0 and len(records) == 2 and "2 records" in out
    assert "left out: " in out and "in.jsonl:2: not one JSON object" in out
    assert "in.jsonl:3: record has none" in out
    source = tmp_path / "in.jsonl"  # in place, the broken records would be gone
    assert key_steps.main([str(source), str(source)]) == 2
    assert "in.jsonl:2" in capsys.readouterr().err and source.read_text() == text


def test_a_missing_file_and_a_place_that_cannot_be_written_are_one_line(tmp_path, capsys):
    assert key_steps.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "no data file at" in capsys.readouterr().err
    (tmp_path / "in").write_text("")
    assert key_steps.main([str(tmp_path / "in"), str(tmp_path / "in" / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_archives_are_read_and_written(run, tmp_path):
    record = {"problem": "?", "solution": solution("x = 3 + 4 = 7")}
    _, wanted, _ = run(json.dumps(record))
    source, target = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"
    source.write_bytes(gzip.compress(json.dumps(record).encode()))
    assert key_steps.main([str(source), str(target)]) == 0
    assert [json.loads(x) for x in gzip.decompress(target.read_bytes()).splitlines()] == wanted
