"""The output format of R1-VL (arXiv:2503.12937) and of the Mulberry data it is warmed up on (2412.18319).

The contract of data, rewards and evaluation. The headers are literal and appear in this file only:

    ### Image Description: / ### Rationales: / ### Let's think step by step. / ### Step n: / ### The final answer is:

Blocks are separated by one blank line and each header is followed by a newline.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxrepro.config import UserError

DESCRIPTION = "### Image Description:"
RATIONALE = "### Rationales:"
THINK = "### Let's think step by step."
STEP = "### Step {}:"
ANSWER = "### The final answer is:"
REQUIRED = (DESCRIPTION, RATIONALE, STEP.format(1), ANSWER)  # THINK is not required

STEP_HEADER = re.compile(r"### Step (\d{1,9}):")  # int() refuses thousands of digits
STEP_BLOCK = re.compile(r"### Step \d{1,9}:\s*(.*?)(?=\n###|\Z)", re.DOTALL)
ANSWER_LINE = re.compile(re.escape(ANSWER) + r"\s*\n?(.*)")
_HEADER = re.compile(
    "|".join(
        [re.escape(h) for h in (DESCRIPTION, RATIONALE, THINK, ANSWER)] + [STEP_HEADER.pattern]
    )
)


class Parts(NamedTuple):
    """What a completion says. None: the header is missing; "": nothing follows it."""

    description: str | None
    rationale: str | None
    steps: tuple[str, ...]
    answer: str | None


class Block(NamedTuple):
    header: str
    number: int | None  # of a step
    start: int  # of the header
    end: int  # of the header
    text: str  # up to the next header, stripped


def blocks(text: str) -> list[Block]:
    """Every header with what follows it, in textual order."""
    found = list(_HEADER.finditer(text))
    stops = [m.start() for m in found[1:]] + [len(text)]
    return [
        Block(m[0], int(m[1]) if m[1] else None, m.start(), m.end(), text[m.end() : stop].strip())
        for m, stop in zip(found, stops)
    ]


def parse(text: str) -> Parts:
    """Fields of a completion; of a repeated header the first counts, steps come in textual order."""
    found = blocks(text)
    first = {b.header: b.text for b in reversed(found)}
    return Parts(
        first.get(DESCRIPTION),
        first.get(RATIONALE),
        tuple(b.text for b in found if b.number is not None),
        first.get(ANSWER),
    )


def solution_text(description: str, rationale: str, steps: Sequence[str], answer: str) -> str:
    """The completion that states these parts; `parse` gives them back, stripped.

    Raises UserError where a part holds a header, or where steps or answer are missing.
    """
    if not steps or not answer.strip():
        raise UserError(f"solution has {len(steps)} steps and answer {answer!r}; both are required")
    for part in (description, rationale, *steps, answer):
        if hit := _HEADER.search(part):
            raise UserError(
                f"solution part holds the header {hit[0]!r}; remove it from {part[:60]!r}"
            )
    named = [(DESCRIPTION, description), (RATIONALE, rationale), (THINK, "")]
    named += [(STEP.format(i), step) for i, step in enumerate(steps, start=1)]
    return join((header, text.strip()) for header, text in [*named, (ANSWER, answer)])


def join(parts: Iterable[tuple[str, str]]) -> str:
    """Inverse of `blocks`: one blank line between blocks, a line break between header and text."""
    return "\n\n".join("\n".join(filter(None, part)) for part in parts)


def instruction(question: str, choices: Mapping[str, str] | None = None) -> str:
    """Prompt that asks for the format; used at evaluation, not in warm-up data."""
    layout = "\n\n".join(
        [DESCRIPTION, RATIONALE, THINK, STEP.format(1), STEP.format(2), "...", ANSWER]
    )
    options = "".join(f"{k}: {v}\n" for k, v in choices.items()) if choices else ""
    return (
        "Answer the question about the image in four parts. First describe what the image shows. Then give "
        "the rationale: which knowledge the question needs. Then reason in numbered steps, each short and "
        f"concrete. Last, state the final answer. Use exactly these headers:\n\n{layout}\n\n"
        f"Question: {question}" + (f"\nChoices:\n{options}" if options else "")
    )


def final_answer(text: str) -> str | None:
    """Answer for evaluation: what follows the answer header if it occurs exactly once, else None."""
    header = ANSWER.removeprefix("### ")
    _, *tail = text.split(header)
    return tail[0].strip() if len(tail) == 1 else None
