"""A world whose reward is known: strings of 16 letters, preferred by their value to the prompt.

    r(x, y) = 4 mean_i (v[y_i] + [y_i in x])          y: 2 to 10 letters, x: three letters
    P(y_1 beats y_2 | x) = sigmoid(r_1 - r_2)           Bradley-Terry; other annotators are below

A mean over the letters, so length is worth nothing by itself. Answers are drawn from a fixed Markov chain, the
world's reference: what supervised fine-tuning on `demonstration` learns. Everything is a function of an index and
the name of a stream, so data has no end and needs no file. Of the 3,360 prompts an eighth, chosen by hash, is held
out: only records with held=True ask them. The reward knows no order, so a held-out prompt is a new order of letters
that training asked for in others.
"""

import math
import random
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from jaxrepro.config import UserError

LETTERS = "abcdefghijklmnop"
SHORTEST, LONGEST = 2, 10
ASKED = 3  # letters of a prompt
HELD = 8  # one prompt in so many is held out
STOP = 0.2  # probability of an end after each letter from SHORTEST on
SCALE = 4.0
ANNOTATORS = ("bradley_terry", "best", "length", "edit")


class Annotator(NamedTuple):
    """Who labels the pairs.

    bradley_terry: draws the preference. best: always the higher reward. length: Bradley-Terry on
    r + bias * length. edit: the rejected answer is the chosen one with one letter made worse.
    flips: share of labels that are then turned round.
    """

    kind: str = "bradley_terry"
    flips: float = 0.0
    bias: float = 0.5  # nats a letter

    def check(self) -> None:
        """UserError for what can't be."""
        if self.kind not in ANNOTATORS:
            raise UserError(f"data.annotator={self.kind!r} is not one of {', '.join(ANNOTATORS)}")
        if not 0 <= self.flips < 1:
            raise UserError(f"data.flips={self.flips} must lie in [0, 1)")


FAIR = Annotator()


@lru_cache
def _tables() -> tuple[dict[str, float], dict[str, list[float]]]:
    """The value of each letter in [-1, 1], and the weights of the next letter after each."""
    rng = random.Random("letters")
    order = rng.sample(LETTERS, len(LETTERS))
    values = {c: 2 * i / (len(LETTERS) - 1) - 1 for i, c in enumerate(order)}
    chain = {c: [math.exp(rng.gauss(0, 1)) for _ in LETTERS] for c in LETTERS}
    return values, chain


def letters(text: str) -> list[str]:
    """The letters of a text in which spaces stand between them; anything else is dropped."""
    return [c for c in text.split() if c in LETTERS and len(c) == 1]


def reward(prompt: str, answer: str) -> float:
    """r(x, y); an empty answer has the value of the worst letter."""
    values, _ = _tables()
    asked, said = letters(prompt), letters(answer)
    if not said:
        return -SCALE
    return SCALE * sum(values[c] + (c in asked) for c in said) / len(said)


def judge(prompt: str, completions: list[str], example: Mapping[str, Any]) -> list[float]:
    """The reward as a judge of `jaxrepro.rewards.judge`."""
    return [reward(prompt, text) for text in completions]


def is_held(prompt: str) -> bool:
    """Whether a prompt is held out; the same on every machine."""
    return zlib.crc32(prompt.encode()) % HELD == 0


def ask(rng: random.Random, held: bool) -> str:
    """A prompt: different letters."""
    while True:
        found = " ".join(rng.sample(LETTERS, ASKED))
        if is_held(found) == held:
            return found


def answer(rng: random.Random) -> str:
    """An answer of the reference chain."""
    _, chain = _tables()
    said = [rng.choice(LETTERS)]
    while len(said) < LONGEST and (len(said) < SHORTEST or rng.random() >= STOP):
        said += rng.choices(LETTERS, chain[said[-1]])
    return " ".join(said)


def demonstration(index: int, stream: str, *, held: bool = False) -> dict[str, Any]:
    """A prompt, held out or not, with an answer of the reference."""
    rng = random.Random(f"demonstration/{stream}/{index}")
    return {"id": f"{stream} {index}", "problem": ask(rng, held), "solution": answer(rng)}


def pair(
    index: int, stream: str, annotator: Annotator = FAIR, *, held: bool = False
) -> dict[str, Any]:
    """Pair `index` of a stream: id, prompt, chosen, rejected, and the true rewards score_{chosen, rejected}."""
    rng = random.Random(f"pair/{annotator.kind}/{stream}/{index}")
    prompt = ask(rng, held)
    if annotator.kind == "edit":
        chosen, rejected = _edited(rng, prompt)
    else:
        first, second = answer(rng), answer(rng)
        while first == second:
            second = answer(rng)
        margin = reward(prompt, first) - reward(prompt, second)
        if annotator.kind == "length":
            margin += annotator.bias * (len(letters(first)) - len(letters(second)))
        if annotator.kind == "best":
            wins = margin > 0 or (margin == 0 and rng.random() < 0.5)
        else:
            wins = rng.random() < 1 / (1 + math.exp(-margin))
        chosen, rejected = (first, second) if wins else (second, first)
    if rng.random() < annotator.flips:
        chosen, rejected = rejected, chosen
    return {
        "id": f"{stream} {index}",
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "score_chosen": reward(prompt, chosen),
        "score_rejected": reward(prompt, rejected),
    }


def _edited(rng: random.Random, prompt: str) -> tuple[str, str]:
    """An answer, and the same with one letter that is worth less."""
    values, _ = _tables()
    worth = lambda c: values[c] + (c in letters(prompt))
    while True:
        said = letters(answer(rng))
        at = rng.randrange(len(said))
        worse = [c for c in LETTERS if worth(c) < worth(said[at])]
        if worse:
            return " ".join(said), " ".join([*said[:at], rng.choice(worse), *said[at + 1 :]])
