"""Held-out evaluation: near-greedy answers, rates with Wilson intervals, answers for the report.

The official evaluation samples at temperature 0.01 with top-k 1, which is greedy decoding; here it is
greedy. Rules score the answers; benchmarks that need a language model as judge are not scored here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrepro import stats
from jaxrepro.config import UserError
from jaxrepro.data.stepformat import final_answer
from jaxrepro.methods.stepgrpo import rewards
from jaxrepro.methods.stepgrpo.task import STAGES, Task, texts
from jaxrepro.rewards import maths
from jaxrepro.rollout.generate import Samples
from jaxrepro.sharding import fetch

RATES = ("accuracy", "benchmark_accuracy", "validity", "answered")


class Held(NamedTuple):
    """Examples of a split as prompt batches of one size; rows beyond the last example repeat it."""

    examples: list[dict[str, Any]]
    batches: list[dict[str, Any]]
    size: int


def hold(task: Task, split: str, n: int, size: int) -> Held:
    """The first n examples of a split, encoded once and used at every evaluation."""
    if split in STAGES:
        raise UserError(f"split {split!r} is what a stage trains on; use validation or test")
    examples = task.split(split, n)
    if not examples:
        raise UserError(f"split {split!r} has no examples; eval.n is {n}")
    size = min(size, len(examples))
    rows = [examples[i : i + size] for i in range(0, len(examples), size)]
    rows[-1] = rows[-1] + [rows[-1][-1]] * (size - len(rows[-1]))
    return Held(examples, [task.exam_encoder.prompts(r) for r in rows], size)


def answers(
    sample: Callable[..., Samples], params: Any, task: Task, held: Held, key: Any
) -> list[str]:
    """One completion of every example, in order."""
    out: list[str] = []
    for i, batch in enumerate(held.batches):
        ids = np.arange(i * held.size, (i + 1) * held.size, dtype=np.int32)
        drawn = sample(params, batch, ids, key)
        tokens, length = fetch((drawn.tokens, drawn.length))
        out += texts(task.tokenizer, tokens, length)
    return out[: len(held.examples)]


def score(
    examples: Sequence[Mapping[str, Any]], completions: Sequence[str], behaviour: rewards.Behaviour
) -> list[dict[str, float | None]]:
    """The reward parts of each completion."""
    return [rewards.reward(e, text, behaviour=behaviour) for e, text in zip(examples, completions)]


def rates(parts: Sequence[Mapping[str, float | None]], prefix: str) -> dict[str, float]:
    """Means under `prefix`, the rates with their Wilson 95 % interval; unscorable answers are counted."""
    out: dict[str, float] = {f"{prefix}n": float(len(parts))}
    for name in RATES:
        known = [p[name] for p in parts if p.get(name) is not None]
        if known:
            mean, lo, hi, _ = stats.wilson(sum(known), len(known))
            out |= {f"{prefix}{name}": mean, f"{prefix}{name}_lo": lo, f"{prefix}{name}_hi": hi}
    out[f"{prefix}key_steps"] = float(np.mean([p["key_steps"] for p in parts]))
    out[f"{prefix}unscorable"] = float(sum(p["accuracy"] is None for p in parts))
    return out


def benchmark_accuracy(
    example: Mapping[str, Any], text: str, *, yes_no: bool = False
) -> float | None:
    """Whether the answer that a benchmark reads is right; None where the solution holds no answer."""
    gold = rewards.answer(example["solution"])
    gold = example["solution"].strip() if gold is None else gold
    ok = maths.correct(benchmark_answer(text, yes_no=yes_no), gold)
    return None if ok is None else float(ok)


def benchmark_answer(text: str, *, yes_no: bool = False) -> str | None:
    """The answer that a benchmark reads: what follows the answer header if it occurs exactly once.

    yes_no: HallusionBench's convention, choice a is Yes and b is No.
    """
    found = final_answer(text)
    if found is None or not yes_no:
        return found
    return {"a": "Yes", "b": "No"}.get(found.strip(" .()").lower(), found)


def benchmark_average(scores: Mapping[str, float]) -> float:
    """Mean over benchmarks in percent; MME, a sum of up to 2800, counts as MME / 28.

    This is the rule that the first version's table follows; the second version's averages follow
    neither it nor a mean without MME, so they are no target.
    """
    if not scores:
        raise UserError("benchmark_average got no scores")
    return float(np.mean([v / 28 if k == "MME" else v for k, v in scores.items()]))
