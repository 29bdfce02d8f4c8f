"""TRL's reading of preference data: the prompt that conversations share, and the rows of a batch."""

import numpy as np
import pytest

from jaxrepro.data import chat, questions
from jaxrepro.data.text import closed_vocabulary
from jaxrepro.methods.dpo import schemas
from jaxrepro.methods.dpo.encoding import Encoder
from jaxrepro.methods.dpo.rows import collate, item, shape_of

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore"),  # the oracle's dependencies, not ours
]
PAIR = schemas.get("pair")


def numbers(rng):
    return " ".join(map(str, rng.integers(0, 30, rng.integers(1, 8))))


def talk(rng, turns, answer):
    shared = [{"role": ("user", "assistant")[i % 2], "content": numbers(rng)} for i in range(turns)]
    return [[*shared, {"role": "assistant", "content": text}] for text in answer]


def test_the_prompt_of_two_conversations_is_trls():
    from trl.data_utils import maybe_extract_prompt

    rng = np.random.default_rng(0)
    for i in range(60):
        chosen, rejected = talk(rng, 1 + 2 * (i % 3), ("4", "4" if i % 5 == 0 else "5"))
        record = {"chosen": chosen, "rejected": rejected}
        record |= {"prompt": chosen[0]["content"]} if i % 2 else {}
        theirs = maybe_extract_prompt(record)
        ours = PAIR.validate(record, "here")
        assert ours["prompt"] == theirs["prompt"]
        assert ours["responses"] == [theirs[n][0]["content"] for n in ("chosen", "rejected")]


@pytest.mark.parametrize("max_tokens", [18, 24, 60])
def test_rows_are_those_of_trls_collator(max_tokens):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rng = np.random.default_rng(1)
    tokenizer = closed_vocabulary(questions.chain_pieces())
    encoder = Encoder(tokenizer, max_tokens)
    rows = [
        PAIR.validate({n: numbers(rng) for n in ("prompt", "chosen", "rejected")}, f"row {i}")
        for i in range(30)
    ]
    fitting = encoder.fitting(rows, "training")
    examples = []
    for record in fitting:
        prompt = tokenizer.encode(chat.render(record["prompt"][0]["content"]))
        ends = [[*tokenizer.encode(text), tokenizer.eos] for text in record["responses"]]
        examples.append({"prompt_ids": prompt, "chosen_ids": ends[0], "rejected_ids": ends[1]})
    collator = DataCollatorForPreference(tokenizer.pad, max_length=max_tokens)
    theirs = collator(examples)
    items = [item(encoder, record) for record in fitting]
    ours = collate(items, shape_of(items), pad=tokenizer.pad)
    t = theirs["input_ids"].shape[1]
    names = ("input_ids", "attention_mask", "completion_mask")
    ids, attended, scored = (
        theirs[name].numpy().reshape(2, len(fitting), t).swapaxes(0, 1) for name in names
    )  # chosen first
    for i, j in np.ndindex(len(fitting), 2):
        n, length = ours.prompts.next_position[i], ours.length[i, j]
        row = [*ours.prompts.tokens[i, :n], *ours.tokens[i, j, :length]]
        assert row == ids[i, j, : n + length].tolist()
        assert attended[i, j].sum() == n + length <= max_tokens
        assert np.flatnonzero(scored[i, j]).tolist() == list(range(n, n + length))
