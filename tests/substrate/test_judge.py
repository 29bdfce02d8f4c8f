"""Judges: built-ins, names that stay inside the package, Bradley-Terry probabilities, and checked verdicts."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.rewards import judge
from jaxrepro.rewards.judge import ask, pairwise, resolve

SCORES = st.lists(st.none() | st.floats(-1e6, 1e6), max_size=5)


def fixed(values):
    return lambda prompt, completions, example: values


def test_the_answer_is_judged_against_the_solution():
    example = {"id": "a", "solution": "1 + 1 = 2\n#### 2"}
    verdict = ask(resolve("answer"), "1 + 1", ["#### 2", "it is 3", "the answer is 2.0"], example)
    assert verdict.scores.tolist() == [1.0, 0.0, 1.0]
    assert verdict.beats is None and verdict.unscorable == 0
    verdict = ask(resolve("answer"), "1 + 1", ["2", "3"], {"solution": "#### "})
    assert np.isnan(verdict.scores).all() and verdict.unscorable == 2
    with pytest.raises(UserError, match="example b: the judge 'answer' needs its solution"):
        ask(resolve("answer"), "1 + 1", ["2"], {"id": "b"})


def test_length_counts_characters():
    assert ask(resolve("length"), "x", ["", "abc"], {}).scores.tolist() == [0.0, 3.0]


# sigmoid(1) = 0.731058578630 and sigmoid(2) = 0.880797077978, by hand from 1 / (1 + e^-x)
def test_scores_become_bradley_terry_probabilities():
    verdict = ask(pairwise(resolve("length")), "", ["a", "ab", "abc"], {})
    one, two = 0.731058578630, 0.880797077978
    expected = [[0.5, 1 - one, 1 - two], [one, 0.5, 1 - one], [two, one, 0.5]]
    np.testing.assert_allclose(verdict.beats, expected, atol=1e-12)
    np.testing.assert_allclose(verdict.scores, [1 - (one + two) / 2, 0.5, (one + two) / 2], atol=1e-12)  # fmt: skip
    cold = ask(pairwise(resolve("length"), temperature=0.0), "", ["a", "bb", "c"], {})
    assert cold.beats.tolist() == [[0.5, 0.0, 0.5], [1.0, 0.5, 1.0], [0.5, 0.0, 0.5]]
    warm = ask(pairwise(resolve("length"), temperature=2.0), "", ["a", "abc"], {})
    np.testing.assert_allclose(warm.beats[1, 0], one, atol=1e-12)


@given(SCORES, st.sampled_from([0.0, 1e-3, 1.0, 100.0]))
@settings(deadline=None, max_examples=80)
def test_probabilities_of_both_orders_add_up_to_one(scores, temperature):
    verdict = ask(pairwise(fixed(scores), temperature=temperature), "", ["x"] * len(scores), {})
    if not scores:
        assert verdict.scores.shape == (0,)
        return
    known = np.array([s is not None for s in scores])
    both = np.outer(known, known)
    np.fill_diagonal(both, True)
    np.testing.assert_array_equal(~np.isnan(verdict.beats), both)
    np.testing.assert_allclose((verdict.beats + verdict.beats.T)[both], 1.0, atol=1e-12)
    ranked = [i for i in np.argsort([s or 0.0 for s in scores]) if known[i]]
    for i, j in itertools.pairwise(ranked):
        assert verdict.beats[j, i] >= 0.5
    scorable = known if known.sum() > 1 else np.zeros_like(known)
    assert verdict.unscorable == (~scorable).sum() == np.isnan(verdict.scores).sum()


def test_an_unscorable_completion_is_counted_and_not_zero():
    verdict = ask(fixed([1.0, None, 2]), "", ["a", "b", "c"], {})
    assert verdict.unscorable == 1 and math.isnan(verdict.scores[1])
    verdict = ask(pairwise(fixed([1.0, None, 1.0])), "", ["a", "b", "c"], {})
    assert verdict.unscorable == 1 and verdict.scores[[0, 2]].tolist() == [0.5, 0.5]
    half = ask(fixed([[None, 0.9], [None, None]]), "", ["a", "b"], {})
    assert half.unscorable == 2 and math.isnan(half.beats[0, 1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "gave 1 values for 2 completions"),
        ([[0.5, 0.5]], "gave 1 rows of 2 for 2 completions"),
        ([[0.5, 0.5], [0.5]], "rows of 2 for 2 completions"),
        ([1.0, math.nan], "gave nan, which is no finite number"),
        ([1.0, math.inf], "gave inf"),
        ([1.0, "good"], "gave 'good'"),
        ([[0.5, 1.2], [-0.2, 0.5]], r"outside \[0, 1\]"),
        ([[0.5, 0.7], [0.7, 0.5]], "average both orders"),
    ],
)
def test_a_verdict_that_is_none_is_refused(values, message):
    with pytest.raises(UserError, match=f"^judge <lambda> .*{message}"):
        ask(fixed(values), "", ["a", "b"], {})


def test_a_judge_is_named_by_a_module_of_the_package_or_given_as_a_function():
    assert resolve("jaxrepro.rewards.judge:length") is judge.length
    assert resolve(judge.answer) is judge.answer
    own = fixed([1.0])
    assert resolve(own) is own


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lenght", "no judge 'lenght'; did you mean length"),
        ("command", "no judge 'command'; choose from answer, length"),
        ("os:system", "the module must be in jaxrepro.rewards or jaxrepro.methods"),
        ("jaxrepro.rewardsx:length", "the module must be in"),
        ("jaxrepro.cli:main", "the module must be in"),
        ("jaxrepro.rewards.nothing:f", "cannot be imported"),
        ("jaxrepro.rewards..judge:length", "cannot be imported"),
        ("jaxrepro.rewards.judge:nothing", "defines no function nothing"),
        ("jaxrepro.rewards.judge:_beats", "defines no function _beats"),
        ("jaxrepro.rewards.judge:pairwise", "defines no function pairwise"),
        ("jaxrepro.rewards.judge:importlib", "defines no function importlib"),
        ("jaxrepro.rewards.judge:did_you_mean", "defines no function did_you_mean"),
        ("jaxrepro.rewards.judge:", "defines no function"),
    ],
)
def test_other_names_are_one_line(name, message):
    with pytest.raises(UserError, match=message) as e:
        resolve(name)
    assert "\n" not in str(e.value)


def test_the_temperature_of_a_pairwise_judge_is_checked():
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="temperature is"):
            pairwise(judge.length, temperature=bad)
