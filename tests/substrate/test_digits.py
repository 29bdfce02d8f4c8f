"""The digits task: disjoint scans, right answers, determinism, lengths."""

import hashlib
import re
from collections import Counter

import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.data import digits, images
from jaxrepro.data.text import IM_END, closed_vocabulary

EXAMPLES = [digits.example("train", i) for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    return closed_vocabulary(digits.PIECES)


def recompute(problem: str, labels: list[int]) -> int:
    a, sign, factor, b = re.fullmatch(r"(\S+) ([+-]) (?:(\d) \* )?(\S+)", problem).groups()
    value = lambda place: labels[
        ["top-left", "top-right", "bottom-left", "bottom-right"].index(place)
    ]
    return value(a) + (1 if sign == "+" else -1) * int(factor or 1) * value(b)


def test_splits_are_disjoint_scans_that_cover_all():
    parts = [digits.split_ids(s) for s in digits.SPLITS]
    assert [len(p) for p in parts] == [1077, 360, 360]
    assert sorted(np.concatenate(parts).tolist()) == list(range(1797))


def test_an_example_draws_its_scans_from_its_split_with_their_labels():
    _, labels = digits.scans()
    for split in digits.SPLITS:
        for i in range(50):
            e = digits.example(split, i)
            assert set(e["scans"]) <= set(digits.split_ids(split).tolist())
            assert labels[e["scans"]].tolist() == e["digits"] and len(set(e["scans"])) == 4


@pytest.mark.parametrize("subtract", [False, True])
def test_every_answer_and_every_equation_is_right(subtract):
    for e in [digits.example("test", i, 3, subtract=subtract) for i in range(200)]:
        assert int(e["answer"]) == recompute(e["problem"], e["digits"])
        assert e["solution"].endswith(f"### The final answer is:\n{e['answer']}")
        for group in e["key_steps"]["Steps"]:
            assert group[0] in e["solution"] and len(set(group)) == len(group)
            for left, right in (g.split(" = ") for g in group if re.match(r"\d", g)):
                assert eval(left) == int(right)


def test_an_image_shows_each_scan_in_its_quadrant():
    pictures, _ = digits.scans()
    for e in EXAMPLES[:20]:
        canvas = np.asarray(e["image"])
        assert canvas.shape == (112, 112) and canvas.dtype == np.uint8
        for place, scan in enumerate(e["scans"]):
            y, x = 56 * (place // 2), 56 * (place % 2)
            quadrant = canvas[y : y + 56, x : x + 56]
            windows = np.lib.stride_tricks.sliding_window_view(quadrant, (48, 48))
            assert (windows == pictures[scan]).all(axis=(2, 3)).any()


def test_an_example_is_a_pure_function_of_split_index_and_seed():
    key = lambda e: (e["problem"], e["solution"], e["image"].tobytes())
    assert key(digits.example("test", 7, 1)) == key(digits.example("test", 7, 1))
    variants = [("test", 7, 1), ("test", 8, 1), ("test", 7, 2), ("validation", 7, 1)]
    assert len({key(digits.example(*v)) for v in variants}) == 4


def test_the_text_of_the_task_has_not_drifted():
    texts = "".join(e["problem"] + e["solution"] for e in EXAMPLES[:100])
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "6edb9cea78582cb1"


def test_no_answer_is_frequent_enough_to_guess():
    counts = Counter(e["answer"] for e in EXAMPLES)
    assert len(counts) > 20 and counts.most_common(1)[0][1] < 0.15 * len(EXAMPLES)


def test_token_lengths_are_bounded(tokenizer):
    assert tokenizer.vocab_size == 95
    for e in EXAMPLES:
        assert len(tokenizer.encode(e["problem"])) in (3, 5)
        assert len(tokenizer.encode(e["solution"] + IM_END)) in (36, 43)
        for group in e["key_steps"]["Steps"]:
            for alternative in group:
                tokenizer.encode(alternative)


def test_base_stage_examples_encode_and_are_right(tokenizer):
    for i in range(100):
        e = digits.equation(i, subtract=True)
        left, right = e["solution"].split(" = ")
        assert e["image"] is None and e["problem"] == left and eval(left) == int(right)
        assert len(tokenizer.encode(e["solution"])) == 5
    e = digits.caption("test", 3)
    assert e["solution"].endswith(" ".join(map(str, e["digits"])))
    tokenizer.encode(e["problem"] + "\n" + e["solution"])


def test_the_image_processor_keeps_the_pixels_as_they_are():
    patches, grid = images.process(EXAMPLES[0]["image"])
    assert patches.shape == (64, 1176) and grid == (1, 8, 8)
    grey = np.asarray(EXAMPLES[0]["image"]).astype(np.float64)
    first = ((grey[:14, :14] / 255 - images.MEAN[0]) / images.STD[0]).ravel()
    np.testing.assert_allclose(patches[0, :196], first, atol=1e-6)


def test_unknown_split_and_negative_index_are_refused():
    for bad in (("dev", 0), ("train", -1), ("train", 0, -1)):
        with pytest.raises(UserError):
            digits.example(*bad)
