"""Rewards of R1-VL (arXiv:2503.12937, v2): StepRAR, StepRVR, and the outcome baselines.

    r^i   = r_acc + r_val                                                in [0, 2 + alpha]
    r_acc = 1 + alpha k   correct                                        StepRAR
            alpha k       an answer that is wrong                        alpha = 0.1
            0             no answer                                      gate "answered"; "always" pays alpha k
    k     = matched key steps / key steps
    r_val = 1 where the reasoning is complete and ordered, else 0        StepRVR

Paper and official code differ; each difference is a field of `Behaviour`, presets.py says what it means.
Our departures from both, in preset "paper": the answer is compared by value in its own field (the code asks
math-verify about the whole completion, so that a number of the last step earns credit), and a key that is
a pure number must match a whole number (the code finds "2" in "12"). Empty keys are refused where data is
read; they would match everything.

Parts stay apart until the advantage: `reward` returns them, `components` and `total` add up those of an arm.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from jaxrepro.config import UserError
from jaxrepro.data import stepformat as fmt
from jaxrepro.methods.stepgrpo.presets import ARMS, PRESETS
from jaxrepro.rewards import maths

GATES = ("answered", "always")
MATCHERS = ("substring", "token_boundary", "auto")
CHECKERS = ("rules", "math_verify", "official")
ALPHA = 0.1

_NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?%?|[+-]?\.\d+%?")


@dataclass(frozen=True)
class Behaviour:
    """Choices where paper and official code differ; presets.py explains each field."""

    gate: str = "answered"
    background_first: bool = True
    nonempty_answer: bool = True
    matcher: str = "auto"
    checker: str = "rules"
    loss_temperature: str = "match"
    temperature: float | None = None
    top_k: int | None = None

    def __post_init__(self):
        for name, allowed in (
            ("gate", GATES),
            ("matcher", MATCHERS),
            ("checker", CHECKERS),
            ("loss_temperature", ("match", "1.0")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}"
                )
        if self.temperature is not None and not self.temperature > 0:
            raise UserError(
                f"behaviour.temperature={self.temperature}; sampling needs a temperature above 0"
            )
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"behaviour.top_k={self.top_k}; use 0 (off) or more")

    @classmethod
    def preset(cls, name: str, **changes) -> "Behaviour":
        """The named preset, single fields replaced by `changes`."""
        if name not in PRESETS:
            raise UserError(f"preset is {name!r}; choose one of {', '.join(PRESETS)}")
        if unknown := sorted(set(changes) - {f.name for f in fields(cls)}):
            raise UserError(
                f"behaviour has no field {unknown}; choose from {', '.join(PRESETS[name])}"
            )
        return cls(**{**PRESETS[name], **changes})


PAPER = Behaviour.preset("paper")


def reward(example: Mapping, text: str, *, behaviour: Behaviour = PAPER) -> dict[str, float | None]:
    """Every part of a completion's reward, 0 to 1, ungated and unweighted. Pure and deterministic.

    `example` has "solution" (data/stepformat.py, or the bare answer) and "key_steps" ({"Steps": [...]}, optional).
    accuracy is None (unscorable) where the solution holds no answer. answered: the completion has a
    non-empty answer; headers: all required headers occur, in any order.
    """
    return {
        "accuracy": accuracy(example["solution"], text, checker=behaviour.checker),
        "key_steps": key_step_share(text, example.get("key_steps"), matcher=behaviour.matcher),
        "validity": validity(
            text,
            background_first=behaviour.background_first,
            nonempty_answer=behaviour.nonempty_answer,
        ),
        "answered": float(bool(answer(text))),
        "headers": float(has_headers(text)),
    }


# ---- parts


def answer(text: str) -> str | None:
    """First line of the first answer field; "" where nothing follows its header, None without one."""
    field = fmt.parse(text).answer
    return field.splitlines()[0].strip() if field else field


def accuracy(solution: str, text: str, *, checker: str = "rules") -> float | None:
    """1 where the completion's answer equals the solution's, else 0; None where the solution has none."""
    if checker == "official":
        return _official_accuracy(solution, text)
    gold = answer(solution)
    ok = maths.correct(answer(text), solution.strip() if gold is None else gold, checker=checker)
    return None if ok is None else float(ok)


def _official_accuracy(solution: str, text: str) -> float:
    """What the official code does: math-verify on whole texts, prediction first; then equal first lines."""
    try:
        if maths.math_verify(text, solution, limit=20_000):
            return 1.0
    except ImportError:  # optional; the original then fails, ours compares the texts
        pass
    lines = [m[1] if (m := fmt.ANSWER_LINE.search(s)) else s for s in (text, solution)]
    return float(lines[0].strip() == lines[1].strip())


def key_step_share(text: str, key_steps: Mapping | None, *, matcher: str = "auto") -> float:
    """k of StepRAR: share of the key steps of which some alternative occurs in the steps, case ignored.

    `key_steps["Steps"]` lists groups, each one string or several alternatives; 0 where there is none.
    """
    groups = (key_steps or {}).get("Steps") or []
    hay = " ".join(fmt.STEP_BLOCK.findall(text)).lower()
    hits = sum(any(occurs(key, hay, matcher=matcher) for key in alternatives(g)) for g in groups)
    return hits / len(groups) if groups else 0.0


def alternatives(group: str | Sequence[str]) -> list[str]:
    """The equivalent strings of one key step."""
    return [group] if isinstance(group, str) else list(group)


def occurs(key: str, hay: str, *, matcher: str = "auto") -> bool:
    """Whether a key step occurs in lower-case text.

    "token_boundary" wants no word character or full stop before and no word character or decimals after:
    2 is in "12/2", 1 is not in "12", 14 is not in "3.14". "auto" wants this of pure numbers only.
    Raises UserError for an empty key, which every text would match.
    """
    if not key.strip():
        raise UserError(f"key step is {key!r}; remove empty key steps, they match every text")
    key = key.lower()
    if matcher == "substring" or (matcher == "auto" and not _NUMBER.fullmatch(key.strip())):
        return key in hay
    return re.search(rf"(?<![\w.]){re.escape(key.strip())}(?!\w)(?!\.\d)", hay) is not None


def has_headers(text: str) -> bool:
    """Whether every required header occurs, in any order."""
    return all(h in text for h in fmt.REQUIRED)


def validity(text: str, *, background_first: bool = True, nonempty_answer: bool = True) -> float:
    """r_val of StepRVR: 1 where all required headers occur, steps count 1..N and the answer comes last.

    As in the official code, a text that ends in a bare answer header need not have its first answer after
    the last step. `nonempty_answer` closes this gap: each answer header must be followed by text.
    `background_first` also wants every description and rationale header before the first step.
    """
    text = text.strip()
    steps = list(fmt.STEP_HEADER.finditer(text))
    if not has_headers(text) or [int(m[1]) for m in steps] != list(range(1, len(steps) + 1)):
        return 0.0
    bare = text.endswith(fmt.ANSWER) and not nonempty_answer
    if not bare and text.index(fmt.ANSWER) < steps[-1].end():
        return 0.0
    if nonempty_answer and not all(b.text for b in fmt.blocks(text) if b.header == fmt.ANSWER):
        return 0.0
    background = max(text.rindex(fmt.DESCRIPTION), text.rindex(fmt.RATIONALE))
    return float(not background_first or background < steps[0].start())


# ---- arms


def components(
    parts: Mapping[str, float | None],
    *,
    alpha: float = ALPHA,
    gate: str = "answered",
    arm: str = "stepgrpo",
) -> tuple[float, float] | None:
    """(r_acc, r_val) of an arm, to be added, or normalised one by one (GDPO). None: unscorable.

    stepgrpo: StepRAR + StepRVR. no_steprar: alpha = 0. no_steprvr: StepRAR alone. outcome: accuracy
    alone. outcome_format: accuracy + all required headers, order unchecked.
    """
    if arm not in ARMS:
        raise UserError(f"reward arm is {arm!r}; choose one of {', '.join(ARMS)}")
    if gate not in GATES:
        raise UserError(f"gate is {gate!r}; choose one of {', '.join(GATES)}")
    used = {"outcome": ("accuracy",), "outcome_format": ("accuracy", "headers")}.get(
        arm, ("accuracy", "key_steps", "validity", "answered")
    )
    if any(parts[k] is None or not math.isfinite(parts[k]) for k in used):
        return None
    acc = parts["accuracy"]
    if arm == "outcome":
        return acc, 0.0
    if arm == "outcome_format":
        return acc, parts["headers"]
    paid = gate == "always" or parts["answered"] or acc
    r_acc = acc + (alpha * parts["key_steps"] if paid and arm != "no_steprar" else 0.0)
    return r_acc, 0.0 if arm == "no_steprvr" else parts["validity"]


def total(
    parts: Mapping[str, float | None],
    *,
    alpha: float = ALPHA,
    gate: str = "answered",
    arm: str = "stepgrpo",
) -> float | None:
    """The scalar reward of an arm; None: unscorable."""
    both = components(parts, alpha=alpha, gate=gate, arm=arm)
    return None if both is None else sum(both)


def summarise(
    parts: Sequence[Mapping[str, float | None]],
    *,
    alpha: float = ALPHA,
    gate: str = "answered",
    arm: str = "stepgrpo",
) -> dict[str, float]:
    """Curves of a batch of completions: means of the parts, and the signs of reward hacking.

    key_steps_wrong is k over wrong answers; alpha_share is what alpha k makes of all reward paid.
    """
    known = [p for p in parts if p["accuracy"] is not None]
    wrong = [p["key_steps"] for p in known if not p["accuracy"]]
    pairs = [c for p in parts if (c := components(p, alpha=alpha, gate=gate, arm=arm))]
    paid, accurate = sum(map(sum, pairs)), sum(p["accuracy"] for p in known)
    bonus = sum(c[0] for c in pairs) - accurate

    def mean(values):
        return sum(values) / len(values) if values else 0.0

    return {
        "reward": mean([sum(c) for c in pairs]),
        "accuracy": mean([p["accuracy"] for p in known]),
        "key_steps": mean([p["key_steps"] for p in parts]),
        "key_steps_wrong": mean(wrong),
        "validity": mean([p["validity"] for p in parts]),
        "headers": mean([p["headers"] for p in parts]),
        "no_answer": mean([1.0 - p["answered"] for p in parts]),
        "alpha_share": bonus / paid if paid else 0.0,
        "unscorable": float(len(parts) - len(pairs)),
    }
