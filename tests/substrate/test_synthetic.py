"""grid_count and toy_chart: right answers from the labels and from the pixels, lengths, determinism."""

import re
from collections import Counter

import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.data import synthetic
from jaxrepro.data.stepformat import blocks
from jaxrepro.data.synthetic import GENERATORS, generator
from jaxrepro.data.text import IM_END, closed_vocabulary

DRAWN = {name: [g.example("train", i) for i in range(150)] for name, g in GENERATORS.items()}
NAMES = sorted(GENERATORS)


def recompute(name, e):
    problem = e["problem"]
    if name == "grid_count":
        count = Counter(e["cells"])
        if found := re.match(r"how many more (\w+) than (\w+)", problem):
            return count[found[1]] - count[found[2]]
        return sum(count[colour] for colour in re.findall(r"red|green|blue|yellow", problem))
    values = e["values"]
    if found := re.search(r"sum of (\w+) and (\w+)|more (\w+) than (\w+)", problem):
        a, b, c, d = found.groups()
        return values[a] + values[b] if a else values[c] - values[d]
    order = sorted(values, key=values.get)
    return order[-1] if "tallest" in problem else order[0]


@pytest.mark.parametrize("name", ["grid_count", "toy_chart"])
def test_every_answer_is_right_by_the_labels(name):
    for e in DRAWN[name]:
        answer = str(recompute(name, e))
        assert e["answer"] == answer and blocks(e["solution"])[-1].text == answer


@pytest.mark.parametrize("name", NAMES)
def test_key_steps_stand_in_the_solution_and_their_equations_hold(name):
    for e in DRAWN[name]:
        for group in e["key_steps"]["Steps"]:
            assert group[0] in e["solution"]
            for text in group:
                if re.fullmatch(r"[\d +*-]+ = \d+", text):
                    left, right = text.split(" = ")
                    assert eval(left) == int(right)


@pytest.mark.parametrize("name", NAMES)
def test_token_lengths_are_the_declared_bounds(name):
    g, tokenizer = GENERATORS[name], closed_vocabulary(GENERATORS[name].pieces)
    lengths = []
    for e in DRAWN[name]:
        lengths.append(
            (len(tokenizer.encode(e["problem"])), len(tokenizer.encode(e["solution"] + IM_END)))
        )
        assert sum(b.number is not None for b in blocks(e["solution"])) <= g.max_steps
        for group in e["key_steps"]["Steps"]:
            for text in group:
                tokenizer.encode(text)
    assert tuple(np.max(lengths, axis=0)) == (g.max_problem, g.max_solution)


@pytest.mark.parametrize("name", NAMES)
def test_base_examples_encode_and_equations_hold(name):
    g, tokenizer = GENERATORS[name], closed_vocabulary(GENERATORS[name].pieces)
    kinds = Counter()
    for i in range(80):
        e = g.base("train", i, captions=0.5)
        kinds[e["image"] is None] += 1
        tokenizer.encode(e["problem"] + "\n" + e["solution"])
        if e["image"] is None:
            left, right = e["solution"].split(" = ")
            assert eval(left) == int(right)
    assert min(kinds.values()) > 20


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_a_pure_function_of_split_index_and_seed(name):
    draw = lambda *a: (lambda e: (e["solution"], e["image"].tobytes()))(
        GENERATORS[name].example(*a)
    )
    assert draw("test", 5, 1) == draw("test", 5, 1)
    assert (
        len({draw("test", 5, 1), draw("test", 6, 1), draw("test", 5, 2), draw("train", 5, 1)}) == 4
    )


def test_the_pixels_of_grid_count_show_the_cells():
    for e in DRAWN["grid_count"][:30]:
        middle = np.asarray(e["image"])[14::28, 14::28].reshape(16, 1, 3).astype(int)
        palette = np.array([*synthetic.COLOURS.values()])
        nearest = np.abs(middle - palette).sum(-1).argmin(-1)
        assert [[*synthetic.COLOURS][i] for i in nearest] == e["cells"]


def test_the_bars_of_toy_chart_have_the_heights_of_their_values():
    for e in DRAWN["toy_chart"][:30]:
        pixels = np.asarray(e["image"]).astype(int)
        assert pixels.shape == (280, 280, 3)
        coloured = np.ptp(pixels, axis=-1) > 30
        runs = [column.sum() for column in coloured[:, 35:].T]
        starts = [i for i in range(1, len(runs)) if runs[i] > 5 and runs[i - 1] <= 5]
        heights = [runs[i + 5] * synthetic.TOP / 194 for i in starts]
        assert np.rint(heights).tolist() == [*e["values"].values()]


@pytest.mark.parametrize("name", ["grid_count", "toy_chart"])
def test_no_answer_is_frequent_enough_to_guess(name):
    counts = Counter(e["answer"] for e in DRAWN[name])
    assert counts.most_common(1)[0][1] < 0.2 * len(DRAWN[name])


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="digits, grid_count, toy_chart"):
        generator("mnist")
    with pytest.raises(UserError, match="validation"):
        synthetic.toy_chart("dev", 0)
