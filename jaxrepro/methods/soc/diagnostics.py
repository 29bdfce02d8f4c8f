"""What answers say about over-optimism: rates of a decoder on a test set, pure numpy.

    over_opt_rate      share of items whose answer is wrong and scores above the worked solution: model error
    search_error_rate  share of items whose worked solution scores above what the search found
    v_gold, v_wrong    mean V = logsumexp of the logits over the states of worked solutions, and over those of
                       the model's own wrong answers; v_gap is their difference

A score is that of the decoder: log-probability / length ** penalty, at its temperature. Length, and the
shares of empty and of truncated answers, stand beside every accuracy: beams that end early or never are a
failure of their own, and curing it is not the same as being right more often.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrepro import stats

MARGIN = 1e-4  # relative: the same tokens score alike in two programs, but for rounding


class Outcomes(NamedTuple):
    """Of each item: what a decoder answered; gold fields are nan where there is no worked solution."""

    correct: np.ndarray  # 0 or 1
    rare: np.ndarray  # bool
    length: np.ndarray  # tokens, the end of turn included
    finished: np.ndarray  # bool
    empty: np.ndarray  # bool
    score: np.ndarray  # nan for a vote
    gold_score: np.ndarray
    v: np.ndarray  # sum over the answer's states
    gold_v: np.ndarray
    gold_length: np.ndarray


def over_optimistic(o: Outcomes) -> np.ndarray:
    """Whether the answer is wrong and scores above the worked solution; nan without one."""
    return _among(o, (o.correct == 0) & (o.score > o.gold_score + _margin(o)))


def search_error(o: Outcomes) -> np.ndarray:
    """Whether the worked solution scores above the answer; nan without one."""
    return _among(o, o.gold_score > o.score + _margin(o))


def _margin(o: Outcomes) -> np.ndarray:
    return MARGIN * (1 + np.abs(o.gold_score))


def _among(o: Outcomes, found: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(o.gold_score) & np.isfinite(o.score), found, np.nan)


def rates(o: Outcomes, prefix: str) -> dict[str, float]:
    """Metrics of one decoder; accuracy and the two error rates with their Wilson 95 % interval."""
    out: dict[str, float] = {f"{prefix}/n": float(len(o.correct))}

    def add(name: str, values: np.ndarray) -> None:
        values = values[np.isfinite(values)]
        if len(values):
            mean, lo, hi, _ = stats.wilson(float(values.sum()), len(values))
            out.update({f"{prefix}/{name}{end}": x
                        for end, x in (("", mean), ("_lo", lo), ("_hi", hi))})  # fmt: skip

    add("accuracy", o.correct)
    if o.rare.any() and not o.rare.all():
        add("accuracy_rare", o.correct[o.rare])
        add("accuracy_common", o.correct[~o.rare])
    add("over_opt_rate", over_optimistic(o))
    add("search_error_rate", search_error(o))
    out[f"{prefix}/length"] = float(o.length.mean())
    out[f"{prefix}/empty"] = float(o.empty.mean())
    out[f"{prefix}/truncated"] = float(1 - o.finished.mean())
    gold, wrong = np.isfinite(o.gold_v), (o.correct == 0) & np.isfinite(o.v)
    if gold.any():
        out[f"{prefix}/v_gold"] = float(o.gold_v[gold].sum() / o.gold_length[gold].sum())
    if wrong.any():
        out[f"{prefix}/v_wrong"] = float(o.v[wrong].sum() / o.length[wrong].sum())
        if gold.any():
            out[f"{prefix}/v_gap"] = out[f"{prefix}/v_gold"] - out[f"{prefix}/v_wrong"]
    return out


def slope(accuracy: Mapping[int, float]) -> float:
    """Least-squares slope of accuracy over log2 of the beam width: change per doubling."""
    x, y = np.log2(list(accuracy)), np.array(list(accuracy.values()), float)
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def beyond_greedy(beam: Sequence[float], greedy: Sequence[float], prefix: str) -> dict[str, float]:
    """Accuracy of a beam minus that of greedy decoding on the same items, with a paired bootstrap interval."""
    found = stats.paired_bootstrap(beam, greedy)
    lo, hi = (x if x == x else found.mean for x in (found.lo, found.hi))  # one item: no interval
    return {f"{prefix}": found.mean, f"{prefix}_lo": lo, f"{prefix}_hi": hi}


def of(
    answers: Sequence[Any],
    gold: Sequence[Any],
    correct: Sequence[float],
    rare: Sequence[bool],
    length_penalty: float,
) -> Outcomes:
    """Outcomes of decoding.Answer objects; of gold, None where there is no worked solution."""

    def scored(a: Any) -> tuple[float, float, float]:
        if a is None or a.sums is None:
            return np.nan, np.nan, np.nan
        return a.sums.logprob / a.length**length_penalty, a.sums.v, float(a.length)

    score, v, _ = np.array([scored(a) for a in answers]).T
    gold_score, gold_v, gold_length = np.array([scored(a) for a in gold]).T
    return Outcomes(
        correct=np.array(correct, float),
        rare=np.array(rare, bool),
        length=np.array([a.length for a in answers], float),
        finished=np.array([a.finished for a in answers], bool),
        empty=np.array([not a.text for a in answers], bool),
        score=score,
        gold_score=gold_score,
        v=v,
        gold_v=gold_v,
        gold_length=gold_length,
    )
