"""What benchmarks read and how their scores are averaged, against the rows of the paper's table."""

import pytest

from jaxrepro.config import UserError
from jaxrepro.data.stepformat import solution_text
from jaxrepro.methods.stepgrpo.evaluation import (
    benchmark_accuracy,
    benchmark_answer,
    benchmark_average,
)

NAMES = ("MathVista", "MMStar", "MathVision", "ChartQA", "DynaMath")
NAMES += ("HallusionBench", "MathVerse", "MME")


@pytest.mark.parametrize(
    ("row", "average"),
    [  # arXiv:2503.12937v1: the rows of Qwen2-VL-2B, -GRPO, R1-VL-2B, and the same of 7B
        ((43.0, 48.0, 12.4, 73.5, 24.9, 41.7, 19.7, 1872.0), 41.26),
        ((41.4, 46.2, 16.0, 72.5, 24.2, 42.2, 19.9, 1930.0), 41.42),
        ((52.1, 49.8, 17.1, 75.2, 29.4, 44.0, 26.2, 2048.0), 45.87),
        ((58.2, 60.7, 16.3, 83.0, 42.1, 50.6, 32.5, 2327.0), 53.31),
        ((55.1, 59.8, 19.1, 81.3, 33.9, 48.5, 30.9, 2335.0), 51.50),
        ((63.5, 60.0, 24.7, 83.9, 45.2, 54.7, 40.0, 2376.0), 57.11),
    ],
)
def test_the_average_of_a_row_counts_mme_by_28(row, average):
    assert benchmark_average(dict(zip(NAMES, row))) == pytest.approx(average, abs=0.006)


def test_an_average_needs_scores_and_takes_any_subset():
    assert benchmark_average({"MME": 2800.0}) == 100
    assert benchmark_average({"MathVista": 50.0, "MME": 1400.0}) == 50
    with pytest.raises(UserError, match="no scores"):
        benchmark_average({})


def test_a_benchmark_reads_the_answer_only_where_its_header_occurs_once():
    text = solution_text("a", "b", ["c"], " 42 ")
    assert benchmark_answer(text) == "42"
    assert benchmark_answer("42") is None
    assert benchmark_answer(text + "\n\n" + text) is None


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [("a", "Yes"), ("(B).", "No"), ("A. ", "Yes"), ("Yes", "Yes"), ("c", "c")],
)
def test_hallusionbench_reads_choices_as_yes_and_no(answer, wanted):
    text = solution_text("a", "b", ["c"], answer)
    assert benchmark_answer(text, yes_no=True) == wanted
    assert benchmark_answer(text) == answer.strip()


def test_benchmark_accuracy_compares_the_one_answer_by_value():
    example = {"solution": solution_text("a", "b", ["c"], "42")}
    right = solution_text("x", "y", ["z"], "42.0")
    assert benchmark_accuracy(example, right) == 1
    assert benchmark_accuracy(example, right + "\n\n" + right) == 0
    assert benchmark_accuracy(example, "42") == 0
    assert benchmark_accuracy({"solution": "42"}, right) == 1
    assert benchmark_accuracy({"solution": ""}, right) is None
