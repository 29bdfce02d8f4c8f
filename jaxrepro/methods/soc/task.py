"""Questions of SOC: where they come from, how they are asked, which answers are right.

    addition        three digits + three digits as a chain of carries, for the decoder of size tiny
    gsm_symbolic    grade-school problems (data/questions.py)
    a data path     data.format questions (GSM8K and its like), math_step_dpo, math

The paper trains on Math-Step-DPO-10K and on MATH's hardest level, and names neither of its filters. Ours
[inferred]: of the first, the correct prefix and what follows it, where the boxed answer is the right one;
of the second, `data.level`.

A worked answer ends in \\boxed{}, as the prompt asks. Prompts are zero-shot (the system turn asks for a
boxed answer) and few-shot (worked training items as earlier turns); results of both are reported.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from jaxrepro.config import UserError
from jaxrepro.data import chat, questions, sources
from jaxrepro.data.questions import MARK, Encoder, held_out
from jaxrepro.rewards import maths

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
ADDITION = "addition"
FORMATS = ("questions", "math_step_dpo", "math")
HELD_OUT = "test"  # the name of the test set of a source that is trained on
_SUM = re.compile(r"[\d ]*\d[\d ]*")


class Task(NamedTuple):
    """What a run trains on and is asked; an item has "answer" beside "problem" and "solution"."""

    train: list[dict[str, Any]]
    tests: dict[str, list[dict[str, Any]]]
    stated: Callable[[str], str | None]  # the answer that a text states
    left_out: int  # training items that were too long


@dataclass(frozen=True)
class FewShot(Encoder):
    """Prompts with worked examples as earlier turns; without any, it is its base class."""

    shots: tuple[Any, ...] = ()

    def prompt(self, example: Mapping[str, Any]) -> list[int]:
        """The tokens up to the assistant's turn."""
        if not self.shots:
            return super().prompt(example)
        self._refuse_special(example, "problem")
        turns = []
        for shot in self.shots:
            turns += [{"role": "user", "content": shot["problem"]}]
            turns += [{"role": "assistant", "content": shot["solution"]}]
        turns += [{"role": "user", "content": example["problem"]}]
        return self.tokenizer.encode(chat.conversation(self.tokenizer, turns, system=self.system))


def few_shot(encoder: FewShot, examples: Sequence[Mapping[str, Any]], count: int) -> FewShot:
    """The encoder with the first `count` examples in front of each question."""
    if count > len(examples):
        raise UserError(f"eval.shots={count}, but there are {len(examples)} training items")
    return replace(encoder, shots=tuple(examples[:count]))


def pieces() -> list[str]:
    """The closed vocabulary of `addition`: 13 characters, beside those of the chat template."""
    return [*"0123456789", "+", "=", ";"]


def load(config: Any, encoder: Encoder) -> Task:
    """The items of a config; training items that are too long are left out and counted.

    Test items are never left out for the length of their solution.
    """
    data, n = config.data, config.eval.n
    if not data.path and data.generator == ADDITION:
        train = additions(data.n, f"train {config.seed}", held=False, rare=data.rare)
        kept = encoder.fitting(train, "training")
        tests = {HELD_OUT: additions(n, "test", held=True, rare=0.5)}
        return Task(kept, tests, stated_sum, len(train) - len(kept))
    if data.path:
        train, test = _from_path(data, n)
    else:
        found = questions.load(generator=data.generator, n=data.n, test=n, seed=config.seed)
        train, test = ([_worked(e) for e in side] for side in found)
    tests = {name: items[:n] for name, items in map(_test_set, config.eval.sets)}
    if len(tests) < len(config.eval.sets):
        raise UserError(f"eval.sets={config.eval.sets}: two of them have the same name")
    if tests:
        train = _apart(train, tests)
    else:
        tests = {HELD_OUT: test[:n]}
    kept = encoder.fitting(train, "training")
    return Task(kept, tests, stated, len(train) - len(kept))


# Addition ----------------------------------------------------------------------------------------


def additions(n: int, stream: str, *, held: bool, rare: float) -> list[dict[str, Any]]:
    """n different sums; a share `rare` has a carry in the last digit, the rest none there.

    Which side a sum belongs to depends on its text alone (`held`), so no stream can mix them up.
    """
    rng = random.Random(f"{stream}/{n}")  # a string seeds through its hash
    count = round(n * rare)
    if not 0 <= rare <= 1 or not 1 <= n <= 40_000:
        raise UserError(f"{n} sums, {rare} of them rare: use 1 to 40000, and a share of 0 to 1")
    found: dict[str, dict[str, Any]] = {}
    wanted = {True: count, False: n - count}
    while any(wanted.values()):
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        carries = a % 10 + b % 10 > 9
        problem = f"{_spaced(a)} + {_spaced(b)}"
        if not wanted[carries] or problem in found or held_out(problem) != held:
            continue
        wanted[carries] -= 1
        solution = f"{chain(a, b)} = {_spaced(a + b)}"
        found[problem] = {
            "id": f"{stream} {len(found)}",
            "problem": problem,
            "solution": solution,
            "answer": str(a + b),
            "rare": carries,
        }
    items = list(found.values())
    rng.shuffle(items)  # else the last ones are of the kind that is found more slowly
    return items


def chain(a: int, b: int) -> str:
    """The columns of a sum from the last digit on: "6 + 7 = 1 3 ; 2 + 5 + 1 = 8 ; 1 + 4 = 5 ;"."""
    out, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b))):
        terms = f"{x} + {y}" + " + 1" * carry
        total = int(x) + int(y) + carry
        out.append(f"{terms} = {_spaced(total)} ;")
        carry = total // 10
    return " ".join(out)


def _spaced(number: int) -> str:
    return " ".join(str(number))


def stated_sum(text: str) -> str | None:
    """The digits after the last "=", if nothing else follows it."""
    found = text.rpartition("=")[2]
    return found.replace(" ", "") if "=" in text and _SUM.fullmatch(found) else None


# Maths -------------------------------------------------------------------------------------------


def stated(text: str) -> str | None:
    """The last \\boxed{}, else what follows "####" or "answer is", else the last number."""
    if (box := maths.boxed(text)) is not None:
        return box
    if MARK in text or re.search(r"answer is", text, re.IGNORECASE):
        return maths.extract(text)
    return questions.final(text)


def right(task: Task, example: Mapping[str, Any], text: str) -> float:
    """1.0 where the answer that a text states is that of the example, else 0.0."""
    return float(bool(maths.correct(task.stated(text), example["answer"])))


def boxed(solution: str) -> str:
    """A worked solution that ends in \\boxed{}: GSM8K's "#### 7" becomes a sentence."""
    if maths.boxed(solution) is not None or MARK not in solution:
        return solution
    body, _, answer = solution.rpartition(MARK)
    return f"{body.strip()}\nThe answer is \\boxed{{{answer.strip()}}}."


def _worked(example: dict[str, Any], answer: str | None = None) -> dict[str, Any]:
    """An example with its answer and a boxed solution; worked says whether there is more than the answer."""
    solution = example["solution"]
    answer = answer or maths.boxed(solution) or maths.extract(solution) or solution
    rest = solution.replace("\\boxed", "").replace(answer, "")
    worked = any(c.isalnum() for c in rest)
    return example | {"solution": boxed(solution), "answer": answer, "worked": worked}


def from_row(row: sources.Row, data: Any) -> dict[str, Any] | None:
    """An example of a record in the form `data.format`; None where the filter drops it."""
    fields = row.fields
    if data.format == "questions":
        answer = fields.get("answer") if "solution" in fields else None
        return _worked(questions.record(fields, row.id), answer and str(answer))
    wanted = {
        "math_step_dpo": ("prompt", "initial_reason_steps", "full_chosen", "answer"),
        "math": ("problem", "solution", "level"),
    }[data.format]
    for name in wanted:
        if not isinstance(fields.get(name), str | int):
            raise UserError(
                f"{row.where}: field {name!r} is missing; data.format={data.format} has "
                f"{', '.join(wanted)}"
            )
    if data.format == "math":
        if str(fields["level"]).removeprefix("Level ") != str(data.level):
            return None
        example = _worked(questions.record(fields, row.id))
        return example if maths.boxed(example["solution"]) else None
    solution = fields["initial_reason_steps"] + fields["full_chosen"]
    named = {"problem": fields["prompt"], "solution": solution}
    example = _worked(questions.record(named, row.id), str(fields["answer"]))
    box = maths.boxed(solution)
    return example if box and maths.correct(box, example["answer"]) else None


def _from_path(data: Any, n: int) -> tuple[list[Any], list[Any]]:
    subset = data.subset or questions.SUBSETS.get(data.path)
    found = {
        split: [from_row(row, data) for row in rows]
        for split, rows in sources.load(
            data.path, subset, splits={"train": (data.split,), "test": ("test",)}
        ).items()
    }
    kept = {split: [e for e in items if e is not None] for split, items in found.items()}
    if dropped := len(found["train"]) - len(kept["train"]):
        print(f"training: the filter of {data.format} dropped {dropped}", flush=True)
    if not kept["train"]:
        raise UserError(
            f"data.path={data.path}: data.format={data.format} keeps none of {len(found['train'])} items"
        )
    return questions.apart(kept["train"], kept.get("test"), n)


def _test_set(path: str) -> tuple[str, list[Any]]:
    """Name and items of a test set: a JSONL file, a folder with test.jsonl, or the hub's split test."""
    rows = sources.load(path, questions.SUBSETS.get(path), splits={"train": ("test",)})
    rows = rows.get("test", rows["train"])
    name = re.sub(r"(_test|_train)?\.jsonl(\.gz)?$", "", Path(path).name)
    items = []
    for row in rows:
        answer = row.fields.get("answer") if "solution" in row.fields else None
        items.append(_worked(questions.record(row.fields, row.id), answer and str(answer)))
    return name, items


def _apart(train: list[Any], tests: Mapping[str, list[Any]]) -> list[Any]:
    """Training items whose text is in no test set."""
    both = [e for items in tests.values() for e in items]
    return questions.apart(train, both, 0, key=itemgetter("problem"))[0]
