"""Closed-vocabulary tokenizer: what encodes comes back, the rest is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.data import text
from jaxrepro.data.text import IM_END, SPECIAL, closed_vocabulary, load_tokenizer

WORDS = ["cat", "cats", "3", "-3", "13", "-", "+", "two words"]
LINES = ["# Head:\n", "\n", "\n\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return closed_vocabulary([*WORDS, *LINES])


@given(st.lists(st.sampled_from([*WORDS, *LINES, *SPECIAL]), max_size=12))
@settings(deadline=None, max_examples=100)
def test_text_of_pieces_comes_back(tokenizer, pieces):
    decoded = tokenizer.decode([tokenizer.id(p) for p in pieces], skip_special=False)
    try:
        ids = tokenizer.encode(decoded)
    except UserError:
        # Only a pair that reads as one longer piece ("-" "3" has a space, so lines alone can do it).
        assert "\n\n" in decoded
    else:
        assert tokenizer.decode(ids, skip_special=False) == decoded


@given(st.text(alphabet="cats 3-+\n1|<>#", max_size=12) | st.text(max_size=6))
@settings(deadline=None, max_examples=200)
def test_any_text_comes_back_or_is_refused(tokenizer, string):
    try:
        ids = tokenizer.encode(string)
    except UserError:
        return
    assert tokenizer.decode(ids, skip_special=False) == string


def test_longest_piece_wins_and_spaces_cost_nothing(tokenizer):
    assert tokenizer.encode("cats 13 -3 - 3") == [
        tokenizer.id(p) for p in ("cats", "13", "-3", "-", "3")
    ]


@pytest.mark.parametrize(
    "bad", ["dog", "cat  3", " cat", "cat ", "133", "cat\n 3", "\ud800", "<|unk|>"]
)
def test_text_outside_the_vocabulary_is_refused_in_one_line(tokenizer, bad):
    with pytest.raises(UserError) as error:
        tokenizer.encode(bad)
    assert "\n" not in str(error.value)


def test_unknown_text_can_become_the_unknown_id(tokenizer):
    assert tokenizer.encode("dog cat", unknown="id") == [
        tokenizer.id(text.UNKNOWN),
        tokenizer.id("cat"),
    ]


def test_skip_special_leaves_out_special_tokens(tokenizer):
    ids = tokenizer.encode("cat 3" + IM_END)
    assert ids[-1] == tokenizer.eos and tokenizer.decode(ids) == "cat 3"


def test_saved_tokenizer_is_the_same_here_and_in_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    string = f"# Head:\ncat + 3\n\ntwo words{IM_END}\n"
    ids = tokenizer.encode(string)
    assert load_tokenizer(tmp_path).encode(string) == ids
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(string)["input_ids"] == ids and theirs.decode(ids) == string
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos, tokenizer.pad)


def test_a_byte_level_tokenizer_of_a_folder_is_wrapped(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bytes_ = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(bytes_, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(tmp_path / "tokenizer.json"))
    wrapped = load_tokenizer(tmp_path)
    string = "any  text, ünïcode 日本" + IM_END
    assert wrapped.decode(wrapped.encode(string), skip_special=False) == string
    assert wrapped.encode(string)[-1] == wrapped.eos and not wrapped.closed


@pytest.mark.parametrize("piece", ["", " a", "a ", "<|x|>"])
def test_a_piece_that_could_not_come_back_is_refused(piece):
    with pytest.raises(UserError):
        closed_vocabulary([piece])


def test_a_broken_tokenizer_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
