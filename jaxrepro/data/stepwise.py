"""Step-wise reasoning data: the literal output format, JSONL records, reflective-sample filter.

Format (R1-VL, arXiv:2503.12937, and the Mulberry data that it is warmed up on, arXiv:2412.18319):
blocks separated by one blank line, each a header line and its text.

    ### Image Description:  /  ### Rationales:  /  ### Let's think step by step.
    ### Step 1:  ...  ### Step N:  /  ### The final answer is:

Record, one JSON object a line: {"image_path", "problem", "solution", "key_steps": {"Steps": [g_1, ...]}},
where g_j is a string or a list of alternative strings. An optional "id" names the record.

Departure: empty alternatives are refused here. As substrings they would match every text, so a
record with one would pay its reward for nothing.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrepro.config import UserError

DESCRIPTION = "### Image Description:"
RATIONALES = "### Rationales:"
THINK = "### Let's think step by step."
ANSWER = "### The final answer is:"
REFLECTION = "I think I have made a mistake. Let me rethink it."

_STEP = re.compile(r"### Step \d+:")
_HEADER = re.compile(
    "|".join([*(re.escape(h) for h in (DESCRIPTION, RATIONALES, THINK, ANSWER)), _STEP.pattern])
)


def step_header(number: int) -> str:
    """The header line of one step; steps count from 1."""
    return f"### Step {number}:"


def solution_text(description: str, rationale: str, steps: Sequence[str], answer: str) -> str:
    """The whole completion in the literal format."""
    named = [(DESCRIPTION, description), (RATIONALES, rationale), (THINK, "")]
    named += [(step_header(i), step) for i, step in enumerate(steps, start=1)]
    return join_blocks([*named, (ANSWER, answer)])


def blocks(text: str) -> list[tuple[str, str]]:
    """(header, text) of every block in order; what precedes the first header has header ""."""
    marks = [*_HEADER.finditer(text)]
    starts = [m.start() for m in marks] + [len(text)]
    lead = text[: starts[0]].strip()
    found = [(m.group(), text[m.end() : end].strip()) for m, end in zip(marks, starts[1:])]
    return [("", lead)] * bool(lead) + found


def join_blocks(parts: Iterable[tuple[str, str]]) -> str:
    """Inverse of `blocks`: one blank line between blocks, a line break between header and text."""
    return "\n\n".join("\n".join(filter(None, part)) for part in parts)


def corrupt(solution: str, rng: np.random.Generator) -> str:
    """A copy whose format is broken in one way: a missing block, shifted or swapped step numbers.

    Every result is invalid: a required block is missing or the steps do not count 1..N. Needs a
    valid solution of one step or more; with one step the numbers are shifted instead of swapped.
    """
    parts = blocks(solution)
    at = [i for i, (header, _) in enumerate(parts) if _STEP.fullmatch(header)]
    if not at:
        raise UserError("corrupt() got a solution without '### Step N:'; give it a complete one")
    kind = rng.integers(3)
    if kind == 0:
        missing = rng.choice([DESCRIPTION, RATIONALES, step_header(1), ANSWER])
        return join_blocks(p for p in parts if p[0] != missing)
    numbers = list(range(1, len(at) + 1))
    if kind == 1 or len(at) == 1:
        numbers = [n + 1 for n in numbers]
    else:
        j = rng.integers(len(at) - 1)
        numbers[j], numbers[j + 1] = numbers[j + 1], numbers[j]
    for i, n in zip(at, numbers):
        parts[i] = (step_header(n), parts[i][1])
    return join_blocks(parts)


def format_pieces(max_steps: int) -> tuple[str, ...]:
    """Vocabulary pieces of the format, one token a header, for solutions of up to max_steps.

    One header more than that, because shifted step numbers need it.
    """
    steps = [step_header(i) + "\n" for i in range(1, max_steps + 2)]
    return (DESCRIPTION + "\n", RATIONALES + "\n", THINK, *steps, ANSWER + "\n")
