"""Questions with worked answers: generated, from the hub, or from JSONL files; and rows of tokens from them.

    chains          7 + 5 - 3  ->  7 + 5 = 12 / 12 - 3 = 9 / #### 9       for a closed vocabulary
    gsm_symbolic    grade-school problems from templates, answers step by step (package reasoning-gym)
    openai/gsm8k    any data set of the hub with question and answer, or problem and solution
    FILE, FOLDER    JSONL of such records, .gz or not: train.jsonl and test.jsonl, or x_train and x_test

A solution ends with "#### answer". Where a source has no test split of its own, the split is a function of
the problem's text (`held_out`), so that no text is on both sides, whatever the order or the seed; a source
that has one loses the training items whose text is also a test item.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.data import chat, sources
from jaxrepro.data.batches import Generated, PromptTokens
from jaxrepro.data.text import Tokenizer
from jaxrepro.ops.logprob import Tokens

GENERATORS = ("chains", "gsm_symbolic")
MARK = "####"  # what a solution puts before its answer
HELD = 8  # one problem text in so many is held out
FIELDS = (("problem", "solution"), ("question", "answer"))
SUBSETS = {"openai/gsm8k": "main"}  # where the hub wants one named and there is an obvious one
LARGEST = 30  # of the partial results of a chain
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's notes to a calculator
_NUMBER = re.compile(r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?")


class Questions(NamedTuple):
    """Training items (a list, or generated without end), and test items whose texts are others."""

    train: Any
    test: list[dict[str, Any]]


def held_out(problem: str) -> bool:
    """Whether a problem belongs to the test side: a function of its text, spaces apart."""
    return zlib.crc32(" ".join(problem.split()).encode()) % HELD == 0


def final(text: str) -> str | None:
    """The answer of a solution: what follows the last "####", else its last number; None without one."""
    if MARK in text:
        lines = text.rsplit(MARK, 1)[1].strip().splitlines()
        return lines[0].strip() if lines else None
    found = _NUMBER.findall(text)
    return found[-1].rstrip(",") if found else None


# Sources ---------------------------------------------------------------------------------------


def load(
    *,
    path: str | None = None,
    subset: str | None = None,
    generator: str = "chains",
    n: int = 1,
    test: int = 1,
    seed: int = 0,
) -> Questions:
    """Questions of a path (file, folder, hub name) or else of a generator.

    n: items that `gsm_symbolic` draws for training; test: items that are held out, where the source
    has no test split of its own (fewer, where it has fewer). `seed` draws the training items; the
    test items are the same for every seed. UserError for what cannot be read.
    """
    if path is not None:
        return _from_path(path, subset, test)
    if generator == "chains":
        train = Generated(lambda i: chain(i, f"train {seed}", held=False))
        return Questions(train, [chain(i, "test", held=True) for i in range(test)])
    if generator == "gsm_symbolic":
        train = _gsm_symbolic(n, seed + 1, held=False)
        return Questions(train, _gsm_symbolic(test, 0, held=True))
    raise UserError(
        f"data.generator={generator!r} is unknown: one of {', '.join(GENERATORS)}, or data.path"
    )


def chain_pieces() -> list[str]:
    """The closed vocabulary of `chain`."""
    return [*(str(i) for i in range(LARGEST + 1)), "+", "-", "=", MARK]


def chain(index: int, stream: str, *, held: bool) -> dict[str, Any]:
    """Chain `index` of a stream: 3 to 5 numbers below 10, partial results in [0, 30]."""
    attempt = 0
    while True:
        rng = random.Random(f"{stream}/{index}/{attempt}")  # a string seeds through its hash
        total = rng.randint(1, 9)
        problem, lines = str(total), []
        for _ in range(rng.randint(2, 4)):
            by = rng.randint(1, 9)
            signs = [s for s, x in (("+", total + by), ("-", total - by)) if 0 <= x <= LARGEST]
            sign = rng.choice(signs)
            after = total + by if sign == "+" else total - by
            problem += f" {sign} {by}"
            lines.append(f"{total} {sign} {by} = {after}")
            total = after
        if held_out(problem) == held:
            solution = "\n".join([*lines, f"{MARK} {total}"])
            return _example(f"{stream} {index}", problem, solution)
        attempt += 1


def _example(name: str, problem: str, solution: str) -> dict[str, Any]:
    return {"id": name, "image": None, "problem": problem, "solution": solution}


def _gsm_symbolic(n: int, seed: int, *, held: bool) -> list[dict[str, Any]]:
    """n items of one side with different texts, whose worked answer ends in the answer."""
    try:
        import reasoning_gym
    except ImportError as e:
        raise UserError(
            f"data.generator=gsm_symbolic needs the package reasoning-gym ({e}): pip install "
            "reasoning-gym, or 'jaxrepro[data]'; data.path takes other questions"
        ) from e
    size = 1000 + 2 * n * (HELD if held else 1)
    source = reasoning_gym.create_dataset("gsm_symbolic", seed=seed * 10**9, size=size)
    found: dict[str, dict[str, Any]] = {}
    for i in range(size):
        if len(found) == n:
            break
        item = source[i]
        problem, solution = item["question"], item["metadata"]["answer_cot"].strip()
        stated = final(solution)
        # A few templates write 8.0 for 8; one that states another number would teach an error.
        if MARK not in solution or not _same(stated, item["answer"]):
            continue
        if held_out(problem) == held and problem not in found:
            found[problem] = _example(f"gsm_symbolic {seed}/{i}", problem, solution)
    if len(found) < n:
        raise UserError(f"gsm_symbolic gave {len(found)} different items, {n} were wanted")
    return list(found.values())


def _same(a: str | None, b: str) -> bool:
    try:
        return float((a or "").replace(",", "")) == float(b)
    except ValueError:
        return a == b


def _from_path(path: str, subset: str | None, test: int) -> Questions:
    return read(sources.load(path, subset or SUBSETS.get(path)), test)


def are(rows: Sequence[sources.Row]) -> bool:
    """Whether rows of a path are questions: the first one has the fields."""
    return any(rows[0].fields.keys() >= set(fields) for fields in FIELDS)


def read(rows: Mapping[str, Sequence[sources.Row]], test: int) -> Questions:
    """Questions of the rows of a path, by split; test: as in `load`."""
    made = {split: [record(r.fields, r.id) for r in some] for split, some in rows.items()}
    return Questions(*apart(made["train"], made.get("test"), test))


def apart(
    train: list[Any],
    test: list[Any] | None,
    count: int,
    *,
    key: Callable[[Any], str] = itemgetter("problem"),
) -> tuple[list[Any], list[Any]]:
    """Training and test items without a text in common; without a test split, `count` by `held_out`.

    key: the text of an item. UserError where a side would be empty.
    """
    text = lambda item: " ".join(key(item).split())
    if test is None:
        held = [e for e in train if held_out(key(e))]
        train, test = [e for e in train if not held_out(key(e))], held[:count]
        if len(held) > count:  # not trained on either: another count would test them
            print(
                f"held out: {len(held)} items by their text, {count} of them tested; {len(train)} are "
                "trained on",
                flush=True,
            )
    texts = {text(e) for e in test}
    kept = [e for e in train if text(e) not in texts]
    if len(kept) < len(train):
        print(f"left out: {len(train) - len(kept)} training items that are test items", flush=True)
    if not kept or not test:
        raise UserError(
            f"{len(kept)} training and {len(test)} test items; both sides need at least 1"
        )
    return kept, test


def record(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An example from a record with problem and solution, or question and answer, all texts."""
    for fields in FIELDS:
        if all(isinstance(row.get(f), str) and row[f].strip() for f in fields):
            problem, solution = (row[f].strip() for f in fields)
            return _example(str(row.get("id", name)), problem, _CALCULATOR.sub("", solution))
    raise UserError(
        f"{name}: needs the texts problem and solution, or question and answer; it has "
        f"{', '.join(map(str, row)) or 'nothing'}"
    )


# Rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """Questions to rows of tokens: system and user turn, then the response, padded on the right."""

    tokenizer: Tokenizer
    max_tokens: int  # of a row
    max_completion: int  # of a response, its end of turn included
    system: str = chat.SYSTEM  # "" = no system turn

    def prompt(self, example: Mapping[str, Any]) -> list[int]:
        """The tokens up to the assistant's turn."""
        self._refuse_special(example, "problem")
        return self.tokenizer.encode(
            chat.prompt(self.tokenizer, example["problem"], system=self.system)
        )

    def completion(self, example: Mapping[str, Any]) -> list[int]:
        """The tokens of the solution and the end of turn."""
        self._refuse_special(example, "solution")
        solution = self.tokenizer.lead + example["solution"]
        return [*self.tokenizer.encode(solution), self.tokenizer.eos]

    def fits(self, example: Mapping[str, Any]) -> bool:
        """Whether a row holds prompt and response, and the response is not too long."""
        n = len(self.completion(example))
        return n <= self.max_completion and len(self.prompt(example)) + n <= self.max_tokens

    def fitting(self, examples: Sequence[Any], what: str) -> list[Any]:
        """The examples that fit, their number printed where some don't; UserError where none does."""
        kept = [e for e in examples if self.fits(e)]
        if len(kept) < len(examples):
            print(
                f"{what}: left out {len(examples) - len(kept)} of {len(examples)} as longer than "
                f"{self.max_tokens} tokens, or {self.max_completion} in the response",
                flush=True,
            )
        if not kept:
            raise UserError(
                f"none of {len(examples)} {what} items fits data.max_tokens={self.max_tokens} and "
                f"data.max_completion={self.max_completion}; raise them"
            )
        return kept

    def sft(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """{"tokens": Tokens (b, max_tokens)}; UserError names an example that does not fit."""
        b, t = len(examples), self.max_tokens
        tokens = np.full((b, t), self.tokenizer.pad, np.int32)
        response, segment = np.zeros((b, t), bool), np.zeros((b, t), np.int32)
        for i, example in enumerate(examples):
            if not self.fits(example):
                raise UserError(
                    f"example {example['id']} is longer than data.max_tokens={t} or "
                    f"data.max_completion={self.max_completion}; raise them or leave it out"
                )
            prompt, completion = self.prompt(example), self.completion(example)
            n = len(prompt) + len(completion)
            tokens[i, :n], segment[i, :n] = prompt + completion, 1
            response[i, len(prompt) : n] = True
        position = np.broadcast_to(np.arange(t, dtype=np.int32), (b, t)) * segment
        return {"tokens": Tokens(tokens, response, segment, position)}

    def prompts(self, examples: Sequence[Mapping[str, Any]], *, length: int) -> PromptTokens:
        """Prompts (b, length), positions (b, length); UserError where one is longer."""
        b = len(examples)
        tokens = np.full((b, length), self.tokenizer.pad, np.int32)
        segment = np.zeros((b, length), np.int32)
        for i, example in enumerate(examples):
            ids = self.prompt(example)
            if len(ids) > length:
                raise UserError(
                    f"example {example['id']}: its prompt has {len(ids)} tokens, the limit is {length}"
                )
            tokens[i, : len(ids)], segment[i, : len(ids)] = ids, 1
        position = np.broadcast_to(np.arange(length, dtype=np.int32), (b, length)) * segment
        return PromptTokens(tokens, position, segment, segment.sum(1, dtype=np.int32))

    def _refuse_special(self, example: Mapping[str, Any], field: str) -> None:
        found = next((s for s in self.tokenizer.specials if s in example[field]), None)
        if found:
            raise UserError(
                f"example {example['id']}: its {field} holds the special token {found}; remove it"
            )
