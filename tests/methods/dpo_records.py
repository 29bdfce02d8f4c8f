"""Helper: a record of each schema, checked and encoded."""

import functools

from jaxrepro.data import questions
from jaxrepro.data.text import ENDOFTEXT, Tokenizer, closed_vocabulary
from jaxrepro.methods.dpo import schemas
from jaxrepro.methods.dpo.encoding import Encoder
from jaxrepro.methods.dpo.rows import collate, item, shape_of

USER, SAID = {"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}
ASKED = [USER]
PAIR = {"prompt": "1 + 1", "chosen": "2", "rejected": "3"}
VALID = {
    "pair": PAIR,
    "scored": PAIR | {"score_chosen": 8.5, "score_rejected": 3},
    "tie": PAIR | {"tie": False},
    "multi": PAIR | {"rewards_chosen": [1, 0.5], "rewards_rejected": [0, 2.0]},
    "step": PAIR | {"prefix": "1 + 1 ="},
    "triple": PAIR | {"gold": "4"},
    "unpaired": {"prompt": "1 + 1", "completion": "2", "label": True},
    "forget": {"prompt": "1 + 1", "completion": "2", "retain": False},
    "ranked": {"prompt": "1 + 1", "completions": ["2", "3", "4"], "scores": [3, 2, 1]},
    "image": {"chosen": [[1.0]], "rejected": [[2.0]], "noise": [[0.5]], "timestep": 3},
}


@functools.cache
def closed():
    """The tokenizer of chains of sums."""
    return closed_vocabulary(questions.chain_pieces())


def says(role, content):
    return {"role": role, "content": content}


def check(name, record, **changes):
    return schemas.get(name).validate(record | changes, "x.jsonl line 3", id="x:3")


def encoder(tokenizer, t=24, name="pair", **more):
    return Encoder(tokenizer, t, schemas.get(name), **more)


def rows_of(e, found, shape=None, needs=frozenset(), **more):
    """Rows of checked records."""
    items = [item(e, r, frozenset(needs)) for r in found]
    return collate(items, shape or shape_of(items, k=e.k), pad=e.tokenizer.pad, **more)


def with_bos(tokenizer, template=None):
    """The closed vocabulary with a post-processor that begins a text with a bos, as Llama's does."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_str(tokenizer.backend.to_str())
    bos = (ENDOFTEXT, backend.token_to_id(ENDOFTEXT))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{ENDOFTEXT} $A", special_tokens=[bos]
    )
    return Tokenizer(backend, template=template, named={"bos_token": ENDOFTEXT})


WRITES_BOS = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
