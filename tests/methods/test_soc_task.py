"""Questions of SOC: sums as chains of carries, maths data and its filters, prompts, right answers."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro import config
from jaxrepro.config import UserError
from jaxrepro.data.questions import held_out
from jaxrepro.data.text import closed_vocabulary
from jaxrepro.methods.soc import task

TOKENIZER = closed_vocabulary(task.pieces())
ENCODER = task.FewShot(TOKENIZER, 48, 32, system="")


def settings_of(size="gpu", **changes):
    changes = {k.replace("__", "."): v for k, v in changes.items()}
    return config.load(f"configs/soc.py:{size}", changes)


# Sums ------------------------------------------------------------------------------------------------


def test_a_sum_is_a_chain_of_carries():
    assert task.chain(156, 427) == "6 + 7 = 1 3 ; 5 + 2 + 1 = 8 ; 1 + 4 = 5 ;"
    assert task.chain(999, 1 + 99) == "9 + 0 = 9 ; 9 + 0 = 9 ; 9 + 1 = 1 0 ;"


@settings(max_examples=60, deadline=None)
@given(a=st.integers(100, 999), b=st.integers(100, 999))
def test_every_step_of_a_chain_is_true_and_its_digits_are_the_answer(a, b):
    digits, carry = [], 0
    for step in task.chain(a, b).split(" ;")[:-1]:
        left, right = step.split("=")
        total = int(right.replace(" ", ""))
        terms = [int(x) for x in left.split("+")]
        assert sum(terms) == total and (len(terms) == 3) == bool(carry)
        digits.append(str(total % 10))
        carry = total // 10
    assert int(str(carry) * bool(carry) + "".join(reversed(digits))) == a + b


@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 120), rare=st.sampled_from([0.0, 0.05, 0.5, 1.0]), held=st.booleans())
def test_sums_are_different_on_their_side_and_as_rare_as_asked(n, rare, held):
    items = task.additions(n, "x", held=held, rare=rare)
    assert len({e["problem"] for e in items}) == n == len({e["id"] for e in items})
    assert sum(e["rare"] for e in items) == round(n * rare)
    assert all(held_out(e["problem"]) == held for e in items)
    for e in items:
        a, b = (int(x.replace(" ", "")) for x in e["problem"].split("+"))
        assert e["rare"] == (a % 10 + b % 10 > 9) and int(e["answer"]) == a + b
        assert task.stated_sum(e["solution"]) == e["answer"] and ENCODER.fits(e)
    assert items == task.additions(n, "x", held=held, rare=rare)


@pytest.mark.parametrize(("n", "rare"), [(0, 0.5), (50_000, 0.5), (10, -0.1), (10, 1.5)])
def test_impossible_numbers_of_sums_are_refused(n, rare):
    with pytest.raises(UserError, match="use 1 to 40000, and a share of 0 to 1"):
        task.additions(n, "x", held=False, rare=rare)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6 + 7 = 1 3 ; = 4 0 3", "403"),
        ("= 4 0 3 ;", None),
        ("6 + 7 =", None),
        ("4 0 3", None),
        ("", None),
        ("= 4 + 3", None),
    ],
)
def test_a_sum_states_the_digits_after_its_last_equals_sign(text, answer):
    assert task.stated_sum(text) == answer


def test_sums_that_are_too_long_are_left_out_and_counted(capsys):
    c = settings_of("tiny", data__max_completion=28, data__n=60, eval__n=4)
    short = task.FewShot(TOKENIZER, 48, 28, system="")
    found = task.load(c, short)
    assert len(found.train) + found.left_out == 60 and found.left_out > 0
    assert all(map(short.fits, found.train))
    assert f"left out {found.left_out} of 60" in capsys.readouterr().out
    assert len(found.tests["test"]) == 4


# Maths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{3 and the answer is 4", "4"),
        ("2 + 3 = 5\n#### 5", "5"),
        ("The answer is 7.", "7."),
        ("it costs 3 dollars and 40 cents", "40"),
        ("no number", None),
        ("", None),
    ],
)
def test_a_text_states_box_mark_phrase_or_last_number(text, answer):
    assert task.stated(text) == answer


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        (r"\boxed{\dfrac12}", r"\frac{1}{2}", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"the answer is 1,000", "1000", 1.0),
        (r"\boxed{2}", "3", 0.0),
        ("", "3", 0.0),
        (r"\boxed{" * 3000, "3", 0.0),
    ],
)
def test_right_answers_are_equal_as_maths(text, answer, value):
    asked = task.Task([], {}, task.stated, 0)
    assert task.right(asked, {"answer": answer}, text) == value


def test_a_solution_ends_in_a_box():
    assert task.boxed("2 + 3 = 5\n#### 5") == "2 + 3 = 5\nThe answer is \\boxed{5}."
    for text in (r"so \boxed{5}", "no mark"):
        assert task.boxed(text) == text


def rows(path, fields):
    path.write_text("".join(json.dumps(row) + "\n" for row in fields))
    return str(path)


STEP = {"prompt": "p {}", "initial_reason_steps": "Step 1: a\nStep 2:", "chosen": "b"}
STEP |= {"full_chosen": r" b. The answer is \boxed{4}", "rejected": "c", "answer": "4"}


@pytest.fixture
def encoder():
    class Anything(task.FewShot):
        def fits(self, example):
            return len(example["problem"]) < 100

    return Anything(TOKENIZER, 48, 32)


def test_step_preferences_become_whole_solutions_whose_box_is_right(tmp_path, encoder, capsys):
    found = [STEP | {"prompt": f"p {i}", "answer": "4" if i % 3 else "5"} for i in range(30)]
    path = rows(tmp_path / "x_train.jsonl", found)
    loaded = task.load(settings_of(data__path=path, data__format="math_step_dpo", eval__sets=()), encoder)  # fmt: skip
    assert "the filter of math_step_dpo dropped 10" in capsys.readouterr().out
    (test,) = loaded.tests.values()
    assert len(loaded.train) + len(test) == 20
    assert loaded.train[0]["solution"] == STEP["initial_reason_steps"] + STEP["full_chosen"]
    assert loaded.train[0]["answer"] == "4" and loaded.train[0]["worked"]


def test_maths_of_one_level_alone_and_nothing_of_a_test_set(tmp_path, encoder, capsys):
    make = lambda i, level: {
        "problem": f"q {i}", "solution": rf"so \boxed{{{i}}}", "level": f"Level {level}", "answer": "?"
    }  # fmt: skip
    path = rows(tmp_path / "m_train.jsonl", [make(i, 1 + i % 5) for i in range(25)])
    rows(tmp_path / "m_test.jsonl", [make(100, 5)])
    other = rows(tmp_path / "MATH_test.jsonl", [make(4, 5), make(900, 5)])
    c = settings_of(data__path=path, data__format="math", eval__sets=(other,))
    loaded = task.load(c, encoder)
    assert [e["problem"] for e in loaded.train] == ["q 9", "q 14", "q 19", "q 24"]
    assert list(loaded.tests) == ["MATH"] and loaded.tests["MATH"][0]["answer"] == "?"
    assert loaded.train[0]["answer"] == "9"
    assert "1 training items that are test items" in capsys.readouterr().out


def test_test_sets_in_the_forms_of_gsm8k_math_and_bare_answers(tmp_path, encoder):
    train = rows(tmp_path / "a_train.jsonl", [{"question": f"q {i}", "answer": f"x\n#### {i}"} for i in range(40)])  # fmt: skip
    gsm = {"question": "g", "answer": "1 <<1=1>>+ 1\n#### 2"}
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    rows(folder / "train.jsonl", [gsm])
    rows(folder / "test.jsonl", [gsm, gsm | {"question": "long " * 100}])
    bare = tmp_path / "gaokao_test.jsonl.gz"
    with gzip.open(bare, "wt") as file:
        file.write(json.dumps({"question": "k", "answer": "$\\{1\\}$"}) + "\n")
    c = settings_of(data__path=train, eval__sets=(str(folder), str(bare)))
    loaded = task.load(c, encoder)
    assert {k: len(v) for k, v in loaded.tests.items()} == {"gsm8k": 2, "gaokao": 1}
    first = loaded.tests["gsm8k"][0]
    assert first["solution"] == "1 + 1\nThe answer is \\boxed{2}." and first["answer"] == "2"
    assert first["worked"] and not loaded.tests["gaokao"][0]["worked"]


@pytest.mark.parametrize(
    ("row", "format", "message"),
    [
        (
            {"problem": "a", "solution": "b"},
            "math",
            "x_train.jsonl line 1: field 'level' is missing",
        ),
        ({"prompt": "a"}, "math_step_dpo", "line 1: field 'initial_reason_steps' is missing"),
        (STEP | {"answer": "5"}, "math_step_dpo", "keeps none of 1 items"),
        ({"problem": "a", "solution": " "}, "questions", "needs the texts problem and solution"),
        ({"problem": "a", "solution": "b", "level": "Level 4"}, "math", "keeps none of 1 items"),
    ],
)
def test_data_that_does_not_fit_is_one_line(row, format, message, tmp_path, encoder):
    path = rows(tmp_path / "x_train.jsonl", [row])
    c = settings_of(data__path=path, data__format=format, eval__sets=())
    with pytest.raises(UserError, match=message):
        task.load(c, encoder)


def test_two_test_sets_of_one_name_are_refused(tmp_path, encoder):
    path = rows(tmp_path / "a_test.jsonl", [{"question": "q", "answer": "1"}])
    train = rows(tmp_path / "a_train.jsonl", [{"question": "r", "answer": "1"}])
    with pytest.raises(UserError, match="two of them have the same name"):
        task.load(settings_of(data__path=train, eval__sets=(path, path)), encoder)


# Prompts ---------------------------------------------------------------------------------------------


def test_worked_examples_come_before_the_question_as_turns():
    items = task.additions(3, "x", held=False, rare=0.0)
    shot, asked = items[:2], items[2]
    encoder = task.few_shot(ENCODER, shot, 2)
    text = TOKENIZER.decode(encoder.prompt(asked), skip_special=False)
    turns = text.split("<|im_start|>")[1:]
    assert [t.split("\n")[0] for t in turns] == ["user", "assistant"] * 3
    assert turns[1] == f"assistant\n{shot[0]['solution']}<|im_end|>\n"
    assert turns[4] == f"user\n{asked['problem']}<|im_end|>\n" and turns[5] == "assistant\n"
    assert task.few_shot(ENCODER, shot, 0).prompt(asked) == ENCODER.prompt(asked)
    assert ENCODER.prompt(asked) == super(task.FewShot, ENCODER).prompt(asked)
    with pytest.raises(UserError, match=r"eval\.shots=3, but there are 2 training items"):
        task.few_shot(ENCODER, shot, 3)


def test_the_zero_shot_prompt_of_maths_asks_for_a_box():
    assert r"\boxed{}" in settings_of().data.system
    assert settings_of().data.system == task.BOXED


def test_tokens_used_is_one_more_than_the_largest_id():
    assert TOKENIZER.used == TOKENIZER.vocab_size == 26
