"""StepRAR, StepRVR, format and arms against the truth tables of paper and official code."""

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.data import stepformat as fmt
from jaxrepro.methods.stepgrpo import presets, rewards
from jaxrepro.methods.stepgrpo.rewards import Behaviour, key_step_share, occurs, total, validity

D, R, T = (f"{h}\nx y\n\n" for h in (fmt.DESCRIPTION, fmt.RATIONALE, fmt.THINK))
S1, S2, S3 = (f"### Step {i}:\nso\n\n" for i in (1, 2, 3))
ANS, BARE = f"{fmt.ANSWER}\n5\n\n", fmt.ANSWER
FULL = D + R + T + S1 + S2 + ANS
SOLVED = fmt.solution_text("grid", "sum", ["a is 3", "b = 12/2 = 6"], "9")

part = st.text(alphabet=st.characters(blacklist_characters="#", codec="utf-8"), max_size=30)
full_part = part.filter(lambda s: s.strip())


# ---- format


@settings(max_examples=100, deadline=None)
@given(part, part, st.lists(part, min_size=1, max_size=5), full_part)
def test_parser_returns_what_the_builder_wrote(description, rationale, steps, answer):
    text = fmt.solution_text(description, rationale, steps, answer)
    want = (description.strip(), rationale.strip(), tuple(s.strip() for s in steps), answer.strip())
    assert fmt.parse(text) == want
    assert validity(text) == 1 and rewards.has_headers(text)


def test_solution_text_is_the_literal_format():
    assert fmt.solution_text("d", "r", ["s"], "a") == (
        "### Image Description:\nd\n\n### Rationales:\nr\n\n### Let's think step by step.\n\n"
        "### Step 1:\ns\n\n### The final answer is:\na"
    )


def test_builder_refuses_headers_inside_parts_and_missing_parts():
    with pytest.raises(UserError, match="Step 3"):
        fmt.solution_text("d", "r", ["see ### Step 3: x"], "a")
    for steps, answer in (([], "a"), (["s"], " ")):
        with pytest.raises(UserError, match="both are required"):
            fmt.solution_text("d", "r", steps, answer)


def test_parser_keeps_missing_and_empty_apart():
    assert fmt.parse("") == (None, None, (), None)
    assert fmt.parse(f"{fmt.DESCRIPTION}\n\n{fmt.ANSWER}") == ("", None, (), "")
    assert fmt.parse(S2 + S1 + ANS + f"{fmt.ANSWER} 7").answer == "5"


def test_final_answer_needs_the_header_exactly_once():
    assert fmt.final_answer(FULL) == "5"
    assert fmt.final_answer("So. The final answer is: 12") == "12"
    assert fmt.final_answer(FULL + ANS) is None and fmt.final_answer("12") is None


def test_instruction_lists_headers_in_order_then_the_question():
    text = fmt.instruction("What is it?", {"A": "1", "B": "2"})
    places = [
        text.index(h) for h in (fmt.DESCRIPTION, fmt.RATIONALE, fmt.THINK, "### Step 1:", BARE)
    ]
    assert places == sorted(places)
    assert text.endswith("Question: What is it?\nChoices:\nA: 1\nB: 2\n")


# ---- StepRVR: (text, official code, paper)

VALIDITY = {
    "full": (FULL, 1, 1),
    "without think line": (D + R + S1 + S2 + ANS, 1, 1),
    "without description": (R + T + S1 + S2 + ANS, 0, 0),
    "without rationale": (D + T + S1 + S2 + ANS, 0, 0),
    "without steps": (D + R + T + ANS, 0, 0),
    "without answer": (D + R + T + S1 + S2, 0, 0),
    "bare answer header at the end": (D + R + T + S1 + S2 + BARE, 1, 0),
    "answer before the steps": (D + R + ANS + S1 + S2, 0, 0),
    "answer between the steps": (D + R + S1 + ANS + S2, 0, 0),
    "two answers, first before the last step": (D + R + S1 + ANS + S2 + ANS, 0, 0),
    "two answers after the last step": (D + R + S1 + S2 + ANS + ANS, 1, 1),
    "answer first, bare header last": (D + R + ANS + S1 + S2 + BARE, 1, 0),
    "answer between, bare header last": (D + R + S1 + ANS + S2 + BARE, 1, 0),
    "answer after, bare header last": (D + R + S1 + S2 + ANS + BARE, 1, 0),
    "steps 2 1": (D + R + S2 + S1 + ANS, 0, 0),
    "steps 1 3": (D + R + S1 + S3 + ANS, 0, 0),
    "steps 1 1": (D + R + S1 + S1 + ANS, 0, 0),
    "description after the steps": (R + S1 + S2 + D + ANS, 1, 0),
    "rationale after the steps": (D + S1 + S2 + R + ANS, 1, 0),
    "second description after the steps": (D + R + S1 + D + ANS, 1, 0),
    "only step 10": (D + R + "### Step 10:\nx\n\n" + ANS, 0, 0),
    "lower case": (FULL.lower(), 0, 0),
    "empty": ("", 0, 0),
    "trailing text": (FULL + "Thanks!", 1, 1),
    "one step": (D + R + S1 + ANS, 1, 1),
}


@pytest.mark.parametrize("name", VALIDITY)
def test_validity_truth_table(name):
    text, code, paper = VALIDITY[name]
    assert validity(text, background_first=False, nonempty_answer=False) == code
    assert validity(text) == paper


def test_background_and_answer_rules_are_separate_flags():
    late, bare = VALIDITY["description after the steps"][0], D + R + S1 + BARE
    assert validity(late, background_first=True, nonempty_answer=False) == 0
    assert validity(late, background_first=False, nonempty_answer=True) == 1
    assert validity(bare, background_first=True, nonempty_answer=False) == 1


# ---- StepRAR

KEYS = [
    (["12/2 = 6", "7"], 0.5, 0.5),
    ([["x", "A IS 3"], "12/2"], 1, 1),
    ([], 0, 0),
    (["1"], 1, 0),
    (["2"], 1, 1),
    ([[]], 0, 0),
    (["a is"], 1, 1),
    (["s 3"], 1, 0),
]


@pytest.mark.parametrize("groups, substring, boundary", KEYS)
def test_key_step_truth_table(groups, substring, boundary):
    keys = {"Steps": groups, "Rationales": ["never read"]}
    assert key_step_share(SOLVED, keys, matcher="substring") == substring
    assert key_step_share(SOLVED, keys, matcher="token_boundary") == boundary


def test_auto_matcher_wants_boundaries_of_pure_numbers_only():
    assert key_step_share(SOLVED, {"Steps": ["1"]}) == 0
    assert key_step_share(SOLVED, {"Steps": ["s 3"]}) == 1


@pytest.mark.parametrize(
    "key, hay, found",
    [
        ("2", "12/2", True),
        ("1", "12", False),
        ("14", "3.14", False),
        ("3", "3.14", False),
        ("3.14", "is 3.14.", True),
        ("3", "it is 3.", True),
        ("50%", "about 50%", True),
        ("1,200", "11,200", False),
        ("x", "max", False),
    ],
)
def test_token_boundary_truth_table(key, hay, found):
    assert occurs(key, hay, matcher="token_boundary") is found


def test_empty_key_is_refused():
    for matcher in rewards.MATCHERS:
        with pytest.raises(UserError, match="match every text"):
            key_step_share(SOLVED, {"Steps": [""]}, matcher=matcher)


def test_missing_key_steps_give_zero():
    assert key_step_share(SOLVED, None) == key_step_share(SOLVED, {}) == 0
    assert key_step_share("", {"Steps": ["a is 3"]}) == 0


def test_only_steps_are_searched():
    assert key_step_share(SOLVED, {"Steps": ["grid", "9"]}) == 0


# ---- accuracy


def test_accuracy_reads_the_answer_field_only():
    wrong = SOLVED.replace("\n9", "\n8") + "\n\nor 9"
    assert rewards.accuracy(SOLVED, SOLVED) == 1
    assert rewards.accuracy(SOLVED, wrong) == 0
    assert rewards.accuracy("9", SOLVED) == 1  # a bare gold answer
    assert rewards.accuracy(SOLVED, "9") == 0 and rewards.answer("9") is None
    assert rewards.accuracy(SOLVED, fmt.ANSWER) == 0 and rewards.answer(fmt.ANSWER) == ""
    assert rewards.accuracy(f"x {fmt.ANSWER}", SOLVED) is None


def test_official_checker_compares_first_lines_or_whole_texts(monkeypatch):
    monkeypatch.setattr(rewards.maths, "math_verify", lambda *a, **k: False)
    for text, want in ((f"{fmt.ANSWER}\n\n left \nmore", 1), ("left", 1), ("right", 0)):
        assert rewards.accuracy("left", text, checker="official") == want


# ---- arms


def parts(accuracy=1.0, key_steps=0.5, validity=1.0, answered=1.0, headers=1.0):
    return dict(
        accuracy=accuracy,
        key_steps=key_steps,
        validity=validity,
        answered=answered,
        headers=headers,
    )


ARMS = {  # correct; wrong; no answer (paper gate); no answer (code gate)
    "stepgrpo": (2.05, 1.05, 1.0, 1.05),
    "no_steprar": (2.0, 1.0, 1.0, 1.0),
    "no_steprvr": (1.05, 0.05, 0.0, 0.05),
    "outcome": (1.0, 0.0, 0.0, 0.0),
    "outcome_format": (2.0, 1.0, 1.0, 1.0),
}


@pytest.mark.parametrize("arm", presets.ARMS)
def test_total_of_every_arm(arm):
    silent = parts(0.0, answered=0.0)
    got = (
        total(parts(), arm=arm),
        total(parts(0.0), arm=arm),
        total(silent, arm=arm, gate="answered"),
        total(silent, arm=arm, gate="always"),
    )
    assert got == pytest.approx(ARMS[arm])
    assert total(parts(None), arm=arm) is None and total(parts(float("nan")), arm=arm) is None


def test_outcome_format_ignores_order():
    text = ANS + S2 + S1 + R + D
    got = rewards.reward({"solution": SOLVED}, text)
    assert (got["headers"], got["validity"]) == (1, 0)


def test_reward_range_is_zero_to_two_plus_alpha():
    example = {"solution": SOLVED, "key_steps": {"Steps": ["a is 3", ["x", "12/2 = 6"]]}}
    assert total(rewards.reward(example, SOLVED)) == pytest.approx(2.1)
    assert total(rewards.reward(example, SOLVED), alpha=0.5) == pytest.approx(2.5)
    assert total(rewards.reward(example, "")) == 0


def test_presets_differ_where_paper_and_code_differ():
    example = {"solution": SOLVED, "key_steps": {"Steps": ["1"]}}
    text = f"{R}{S1}12\n\n{D}{fmt.ANSWER}"
    paper = rewards.reward(example, text, behaviour=Behaviour.preset("paper"))
    code = rewards.reward(example, text, behaviour=Behaviour.preset("code_2b", checker="rules"))
    assert (paper["key_steps"], paper["validity"]) == (0, 0)
    assert (code["key_steps"], code["validity"]) == (1, 1)
    assert total(code, gate=Behaviour.preset("code_2b").gate) == pytest.approx(1.1)
    assert Behaviour.preset("code_7b").top_k == 50


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(UserError, match="paper, code_2b, code_7b"):
        Behaviour.preset("code")
    with pytest.raises(UserError, match="no field"):
        Behaviour.preset("paper", gates="always")
    with pytest.raises(UserError, match="token_boundary"):
        Behaviour(matcher="regex")
    with pytest.raises(UserError, match="outcome_format"):
        total(parts(), arm="grpo")
    with pytest.raises(UserError, match="always"):
        total(parts(), gate="never")


def test_summary_shows_reward_hacking():
    got = rewards.summarise(
        [parts(), parts(0.0, key_steps=1.0, answered=0.0), parts(None)], gate="always"
    )
    assert got["unscorable"] == 1 and got["accuracy"] == 0.5 and got["key_steps_wrong"] == 1
    assert got["alpha_share"] == pytest.approx(0.15 / 3.15) and got["no_answer"] == pytest.approx(
        1 / 3
    )
    assert rewards.summarise([])["reward"] == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([D, R, T, S1, S2, ANS, BARE, "\n###", "### Step", "x", " ", "9"])))
def test_any_text_gets_a_reward_in_range_twice_the_same(pieces):
    text = "".join(pieces)
    example = {"solution": SOLVED, "key_steps": {"Steps": ["a is 3", "so"]}}
    for name in ("paper", "code_7b"):
        behaviour = Behaviour.preset(name, checker="rules")
        got = rewards.reward(example, text, behaviour=behaviour)
        assert all(0 <= v <= 1 for v in got.values())
        assert got == rewards.reward(example, text, behaviour=behaviour)
        assert 0 <= total(got, gate=behaviour.gate) <= 2.1
    strict = validity(text) <= validity(text, background_first=False, nonempty_answer=False)
    assert strict  # the paper's rules only take away


def test_presets_import_nothing():
    tree = ast.parse(Path(presets.__file__).read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    for preset in presets.PRESETS.values():
        Behaviour(**preset)
