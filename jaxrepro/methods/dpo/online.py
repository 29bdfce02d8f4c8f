"""Rounds that draw their own pairs: online and iterated preference learning.

    round r:  policy (and reference) answer prompts ─> judge ─> pairs ─> `every` updates ─> round r + 1

| kind       | responses                            | pair                                    | reference |
|------------|--------------------------------------|-----------------------------------------|-----------|
| online_dpo | K of the policy                      | best and worst by the judge             | fixed     |
| iterative  | K of the policy                      | best and worst by the judge             | the policy of the round |
| spin       | one of the policy                    | the demonstration against it            | the policy of the round |
| sppo       | K of the policy                      | best and worst by mean win probability  | the policy of the round |
| xpo        | one of the policy, one of the reference | in the judge's order                 | fixed     |
| selm       | K of the policy                      | best and worst by the judge             | the policy of the round |
| nash_md    | one of the policy, one of the mixture | P(the policy's beats the mixture's)    | fixed     |
| ipo_md     | two of the mixture                   | in the judge's order                    | fixed     |

online_dpo: arXiv:2402.04792; iterative: 2312.11456, 2401.10020; spin: 2401.01335; sppo: 2405.00675; xpo:
2405.21046; selm: 2405.19332; nash_md: 2312.00886; ipo_md: 2403.08635. Inferred: that SELM's explored response is
the chosen one, and all of ipo_md. SPIN's rounds accumulate: `online.keep` earlier rounds are learnt from too; that
it is one, the last, is inferred.

A round is kept in the workdir (once/round-*.json): its random key, prompts, completions, scores, choices, the ids
of prompts that gave no pair, and the steps of policy and reference. A resumed run reads it there and draws nothing
twice.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.rewards.judge import Judge, Verdict, ask, of_probabilities


class Kind(NamedTuple):
    """How a round makes its pairs."""

    samples: int | None  # of the policy; None: online.samples
    other: str = ""  # whose responses follow: "demonstration", "reference", "mixture"
    others: int = 1  # how many those are
    iterated: bool = False  # the reference of a round is the policy that drew it
    single: bool = False  # one response an item, with the probability that it wins
    gives: frozenset[str] = frozenset({"probability"})  # what an item says about its responses
    keep: int = 0  # earlier rounds that are learnt from too, where online.keep says nothing


KINDS = {
    "online_dpo": Kind(None),
    "iterative": Kind(None, iterated=True),
    "spin": Kind(1, other="demonstration", iterated=True, gives=frozenset(), keep=1),
    "sppo": Kind(None, iterated=True, gives=frozenset({"probability", "scores"})),
    "xpo": Kind(1, other="reference", gives=frozenset({"probability", "explore"})),
    "selm": Kind(None, iterated=True, gives=frozenset({"probability", "explore"})),
    "nash_md": Kind(1, other="mixture", single=True, gives=frozenset({"scores"})),
    "ipo_md": Kind(0, other="mixture", others=2),
}


REFERENCES = ("reference", "mixture")  # of `Kind.other`: what is drawn from the reference


class Drawn(NamedTuple):
    """One response as it was drawn."""

    tokens: list[int]
    text: str
    ended: bool


def check(kind: str, samples: int) -> None:
    """UserError for an unknown kind or too few samples."""
    if kind and kind not in KINDS:
        raise UserError(f"online.kind={kind!r} is not one of {', '.join(KINDS)}")
    if kind and KINDS[kind].samples is None and samples < 2:
        raise UserError(f"online.samples={samples}; {kind} compares at least 2")


def scores(
    judge: Judge, example: Mapping[str, Any], drawn: Sequence[Drawn], *, penalty: float = 0.0
) -> Verdict:
    """The judge's verdict on responses; a response without an end has `penalty` less.

    Of a judge that gives probabilities it comes off P(it beats a response with an end), which stay in [0, 1].
    """
    found = ask(judge, example["problem"], [d.text for d in drawn], example)
    less = penalty * np.array([float(not d.ended) for d in drawn])
    if found.beats is None:
        return found._replace(scores=found.scores - less)
    return of_probabilities(np.clip(found.beats - less[:, None] + less[None], 0.0, 1.0))


def win_probabilities(values: np.ndarray, scale: float) -> np.ndarray:
    """P(i beats j) (k, k) under Bradley-Terry with the scores times `scale`; 1/2 on the diagonal."""
    s = np.asarray(values, float) * scale
    return 0.5 + 0.5 * np.tanh((s[:, None] - s[None]) / 2)


def item(
    kind: str,
    example: Mapping[str, Any],
    prompt: Sequence[int],
    drawn: Sequence[Drawn],
    verdict: Verdict | None,
    *,
    scale: float = 1.0,
) -> dict[str, Any] | None:
    """The item that a loss reads, from the responses to one prompt; None where nothing is to be learnt.

    drawn: the policy's samples, then what `Kind.other` adds. verdict: None where none is asked for (spin).
    The item also records texts, scores and which responses were chosen.
    """
    base = {"id": example["id"], "prompt": list(prompt), "texts": [d.text for d in drawn]}
    if verdict is None:  # the demonstration came second, and wins unseen
        own, human = drawn
        if own.tokens == human.tokens:
            return None
        return base | {"responses": [human.tokens, own.tokens], "picked": [1, 0]}
    values = verdict.scores
    beats = win_probabilities(values, scale) if verdict.beats is None else verdict.beats
    base["values"] = [None if np.isnan(v) else float(v) for v in values]
    known = np.flatnonzero(~np.isnan(values))
    if len(known) < 2:
        return None
    if KINDS[kind].single:
        return base | {
            "responses": [drawn[0].tokens], "scores": [float(beats[0, 1])], "picked": [0]
        }  # fmt: skip
    wins = beats[np.ix_(known, known)].mean(1)
    order = wins if kind == "sppo" else values[known]
    best, worst = int(known[order.argmax()]), int(known[order.argmin()])
    if order.max() == order.min() or drawn[best].tokens == drawn[worst].tokens:
        return None
    out = base | {
        "responses": [drawn[best].tokens, drawn[worst].tokens],
        "picked": [best, worst],
        "probability": float(beats[best, worst]),
    }
    if kind == "sppo":
        out["scores"] = [float(wins.max()), float(wins.min())]
    if kind == "xpo":
        out["explore"] = [best, worst].index(1)  # which of the two the reference wrote
    if kind == "selm":
        out["explore"] = 0
    return out
