"""Prompts: the chat template of Qwen2-VL with its images, and a question in a tokenizer's own template.

One user turn, up to where the assistant begins; for Qwen2-VL:

    <|im_start|>system\\n{system}<|im_end|>\\n
    <|im_start|>user\\n<|vision_start|><|image_pad|> * n<|vision_end|>{question}<|im_end|>\\n
    <|im_start|>assistant\\n

An image is expanded to its n = t * h * w / merge^2 tokens here, before tokenization, so that lengths
are known and positions can be computed on the host. A prompt is never cut: one that loses image tokens
no longer fits its features. In the template above a line breaks only where \\n is written.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.data.text import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    SPECIAL,
    VISION_END,
    VISION_START,
    Tokenizer,
)

SYSTEM = "You are a helpful assistant."


def render(question: str, image_tokens: Sequence[int] = (), *, system: str = SYSTEM) -> str:
    """The prompt of a question; `image_tokens` has the number of tokens of each image, in order.

    UserError for an image without tokens, and where a text holds a special token: it would end the turn
    or claim an image feature.
    """
    _refuse_special(question, system, SPECIAL)
    if any(n < 1 for n in image_tokens):
        raise UserError(f"image_tokens is {list(image_tokens)}; each image has at least one token")
    images = "".join(f"{VISION_START}{IMAGE_PAD * n}{VISION_END}" for n in image_tokens)
    return (
        f"{IM_START}system\n{system}{IM_END}\n"
        f"{IM_START}user\n{images}{question}{IM_END}\n"
        f"{IM_START}assistant\n"
    )


def prompt(tokenizer: Tokenizer, question: str, *, system: str = SYSTEM) -> str:
    """The prompt of a question in the tokenizer's own chat template; an empty system text has no turn.

    UserError where the template knows no system role, and for special tokens as in `render`.
    """
    _refuse_special(question, system, (*SPECIAL, *tokenizer.specials))
    return conversation(tokenizer, [{"role": "user", "content": question}], system=system)


def conversation(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, system: str = SYSTEM
) -> str:
    """The prompt of several turns, up to where the assistant answers; a system turn of theirs stays.

    messages: {"role", "content"}, the last one not the assistant's. Their texts are not searched for
    special tokens. UserError where the template fails, for instance at the system role.
    """
    if not system or messages[0]["role"] == "system":
        return tokenizer.chat(messages, answer=True)
    try:
        return tokenizer.chat([{"role": "system", "content": system}, *messages], answer=True)
    except UserError as e:
        tokenizer.chat(messages, answer=True)  # whatever it fails at is then not the system role
        raise UserError(f"{e}; it takes no system role: set data.system=''") from e


def _refuse_special(question: str, system: str, special: Sequence[str]) -> None:
    for name, text in (("question", question), ("system text", system)):
        found = [token for token in special if token in text]
        if found:
            raise UserError(f"the {name} contains the special token {found[0]}: remove it")


def answer(text: str) -> str:
    """What the assistant writes after the prompt: the text and the end of its turn, which is the eos."""
    return f"{text}{IM_END}"


def encode(
    tokenizer: Any, text: str, *, max_tokens: int | None = None, overlong: str = "error"
) -> np.ndarray | None:
    """Token ids (t,) int32 of a rendered prompt; None for an over-long one with overlong="drop".

    `tokenizer` needs `encode(text) -> ids` that reads special tokens and adds none. UserError for an
    over-long prompt otherwise; it is never truncated.
    """
    if overlong not in ("error", "drop"):
        raise UserError(f"overlong is {overlong!r}; choose 'error' or 'drop' (never truncated)")
    ids = np.asarray(tokenizer.encode(text), np.int32)
    if max_tokens is None or len(ids) <= max_tokens:
        return ids
    if overlong == "drop":
        return None
    raise UserError(
        f"the prompt has {len(ids)} tokens, the limit is {max_tokens}: raise the limit, lower "
        "max_pixels, or drop long prompts"
    )
