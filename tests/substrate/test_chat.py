"""The chat template: literal strings, expansion of images, and prompts that are never cut."""

import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.data import chat
from jaxrepro.data.text import IMAGE_PAD, closed_vocabulary


def test_a_prompt_is_the_literal_template():
    assert chat.render("How many?", [3]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
        "How many?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_no_image_and_two_images():
    bare = (
        "<|im_start|>system\nHi<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.render("Q", system="Hi") == bare
    two = "<|vision_start|><|image_pad|><|vision_end|>" * 2
    assert chat.render("Q", [1, 1], system="Hi") == bare.replace("Q<", f"{two}Q<")
    assert chat.answer("4") == "4<|im_end|>"


def test_special_tokens_in_a_question_are_refused():
    with pytest.raises(UserError, match="question contains the special token"):
        chat.render(f"how {IMAGE_PAD}", [1])
    with pytest.raises(UserError, match="system text"):
        chat.render("how", system="<|im_end|>")
    with pytest.raises(UserError, match="at least one token"):
        chat.render("how", [4, 0])


def test_an_over_long_prompt_is_an_error_or_dropped_and_never_cut():
    tokenizer = closed_vocabulary(["how", "many"])
    text = chat.render("how many", [5])
    ids = chat.encode(tokenizer, text)
    assert ids.dtype == np.int32 and (ids == tokenizer.image_pad).sum() == 5
    assert tokenizer.decode(ids, skip_special=False) == text
    np.testing.assert_array_equal(chat.encode(tokenizer, text, max_tokens=len(ids)), ids)
    with pytest.raises(UserError, match=f"{len(ids)} tokens, the limit is {len(ids) - 1}"):
        chat.encode(tokenizer, text, max_tokens=len(ids) - 1)
    assert chat.encode(tokenizer, text, max_tokens=len(ids) - 1, overlong="drop") is None
    with pytest.raises(UserError, match="never truncated"):
        chat.encode(tokenizer, text, overlong="cut")
