"""Tokenizers: a closed vocabulary for generated tasks, and Hugging Face tokenizers behind one face.

The closed vocabulary has one token a piece (a word, a number, a header line), so a tiny model learns
the task and not its spelling. Text is split into pieces, longest first; one space between two words
is implied and comes back when decoding; pieces that begin or end with a line break, and special
tokens, take no space on that side. What does not survive the round trip is refused, so
decode(encode(text)) == text holds for every text that encodes.

The special tokens are those of Qwen2-VL. A byte-pair tokenizer also comes out of a GGUF file: its
vocabulary, merges and special tokens are metadata there, its way to cut text into words is a name.

Turns are written by the tokenizer's own chat template, which transformers renders in its sandbox, or
in ChatML where it has none. The end of a turn is the special token that the template puts there.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.files import read_json, write_json, write_text
from jaxrepro.models import gguf, hf

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
SPECIAL = (ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD)
UNKNOWN = "<|unk|>"
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# What `Tokenizer.chat` writes without a template, for those who load a saved one with `transformers`.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# How byte-pair vocabularies cut text into words, by the name in a GGUF file: a pattern, None for GPT-2's
# own, "digits" for single digits and then GPT-2's. The patterns are part of the vocabularies.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {
    "smollm": "digits",
    "gpt-2": None,
    "default": None,
    "qwen2": _CONTRACTION + r"\p{N}" + _REST,
    "llama-bpe": _CONTRACTION + r"\p{N}{1,3}" + _REST,
}
CHAT_PIECES = ("system\n", "user\n", "assistant\n", "You are a helpful assistant.", "\n", "\n\n")


class Tokenizer:
    """Text to ids and back, for a closed vocabulary or a Hugging Face tokenizer.

    Nothing is added around a text; the chat template writes the special tokens.
    """

    def __init__(
        self, backend: Any, *, template: str | None = None, named: Mapping[str, str] | None = None
    ):
        from tokenizers import models

        self.backend = backend  # a tokenizers.Tokenizer
        self.template = template  # jinja
        self.named = dict(named or {})  # bos_token, eos_token, ...: templates write them
        self.closed = isinstance(backend.model, models.WordLevel)
        self._unknown = backend.token_to_id(UNKNOWN) if self.closed else None

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def used(self) -> int:
        """One more than the largest id: a model's logits from there on are padding (Qwen2.5-1.5B: 271)."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def check_fits(self, vocab: int) -> None:
        """UserError where an id is outside the vocabulary of a model, which jax would clip in silence."""
        if self.used > vocab:
            raise UserError(
                f"the tokenizer's largest id is {self.used - 1}, the model's vocabulary has {vocab} "
                "tokens: not a pair; take both from the same folder"
            )

    def id(self, token: str) -> int:
        """The id of one token; UserError when the vocabulary has none."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise UserError(f"token {token!r} is not in the vocabulary of {self.vocab_size} tokens")
        return found

    @property
    def specials(self) -> list[str]:
        """The special tokens: a text that holds one would not be read as text."""
        added = self.backend.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    @cached_property
    def eos(self) -> int:
        """The id that ends an assistant turn: what the template writes there, else the configured one."""
        after = self._around[1]
        configured = self.named.get("eos_token")
        ends = [
            token for token in (*self.specials, configured) if token and after.startswith(token)
        ]
        if not ends and configured is None:
            raise UserError(
                f"the chat template ends a turn with {after[:20]!r}, no special token: name the "
                "eos_token in tokenizer_config.json"
            )
        return self.id(max(ends, key=len) if ends else configured)

    @cached_property
    def pad(self) -> int:
        """The id that fills a row on the right; masked everywhere."""
        found = self.backend.token_to_id(ENDOFTEXT)  # of Qwen and SmolLM: it ends no turn
        if found is not None:
            return found
        return self.id(self.named["pad_token"]) if "pad_token" in self.named else self.eos

    @property
    def ids(self) -> dict[str, int]:
        """What a model's config says of them."""
        return {"eos_token_id": self.eos, "pad_token_id": self.pad}

    @cached_property
    def bos(self) -> int | None:
        """The id that the tokenizer puts before a text of its own accord; None where it puts none.

        Its post-processor decides, not the name: many vocabularies have a bos_token that begins nothing.
        """
        ids = self.backend.encode("", add_special_tokens=True).ids
        named = self.backend.token_to_id(self.named.get("bos_token", ""))
        return named if named is not None and ids[:1] == [named] else None

    @cached_property
    def lead(self) -> str:
        """The space that the template writes between prompt and answer, as Mistral's does."""
        return self._around[0]

    @cached_property
    def _around(self) -> tuple[str, str]:
        """The space before an assistant's text, and all that follows the text."""
        asked, text = {"role": "user", "content": "a question"}, "an answer"
        whole = self.chat([asked, {"role": "assistant", "content": text}])
        before, found, after = whole.rpartition(text)
        if not found:
            raise UserError(
                "the chat template leaves out what the assistant says: take another model"
            )
        lead = before.removeprefix(self.chat([asked], answer=True))
        return lead if lead.isspace() else "", after

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer: bool = False) -> str:
        """The text of some turns, with answer=True up to where the assistant begins.

        A template that asks for today's date gets it, as in transformers.
        UserError where the template fails, or where there is none and the vocabulary has no ChatML.
        """
        if self.template is None:
            if None in map(self.backend.token_to_id, (IM_START, IM_END)):
                raise UserError(
                    f"the tokenizer has no chat template, and {IM_START} or {IM_END} is not in its "
                    f"vocabulary of {self.vocab_size} tokens: put the chat_template.jinja of its "
                    "instruct model beside tokenizer.json, or take that model"
                )
            turns = [f"{IM_START}{m['role']}\n{m['content']}{IM_END}\n" for m in messages]
            return "".join(turns) + f"{IM_START}assistant\n" * answer
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            found, _ = render_jinja_template(
                [[dict(m) for m in messages]],
                chat_template=self.template,
                add_generation_prompt=answer,
                **self.named,
            )
        except Exception as e:  # a template is foreign code: it may raise anything
            first = (str(e).splitlines() or [""])[0]
            raise UserError(f"the chat template fails ({type(e).__name__}: {first})") from e
        return found[0]

    @property
    def image_pad(self) -> int:
        """The id that stands for one visual token."""
        return self.id(IMAGE_PAD)

    def encode(self, text: str, *, unknown: str = "error") -> list[int]:
        """The ids of a text, special tokens in it included.

        A closed vocabulary refuses what it can't give back (UserError); unknown="id" writes the
        id of `<|unk|>` instead and drops the spaces that it can't keep.
        """
        if unknown not in ("error", "id"):
            raise UserError(f"unknown={unknown!r} is not one of 'error', 'id'")
        try:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        except TypeError as e:  # a lone surrogate, or not a string
            raise UserError(f"{text!r:.60} is not valid Unicode text; remove the character") from e
        if self.closed and unknown == "error":
            back = self.decode(ids, skip_special=False)
            if self._unknown in ids or back != text:
                at = next((i for i, (a, b) in enumerate(zip(text, back)) if a != b), len(back))
                raise UserError(
                    f"the closed vocabulary ({self.vocab_size} tokens) does not cover the text at "
                    f"character {at}: {text[at : at + 20]!r}; use its words, or unknown='id'"
                )
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """The text of some ids; special tokens are left out unless skip_special is False."""
        ids = [int(i) for i in ids]
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json and a tokenizer_config.json, chat template included, for `transformers`."""
        folder = Path(folder)
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        known = self.backend.get_vocab(with_added_tokens=True)
        config = self.named | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.backend.id_to_token(self.eos),
            "pad_token": self.backend.id_to_token(self.pad),
            "additional_special_tokens": [t for t in SPECIAL if t in known],
            "clean_up_tokenization_spaces": False,
            "chat_template": self.template or CHATML,
        }
        write_json(folder / "tokenizer_config.json", config)


def closed_vocabulary(pieces: Iterable[str]) -> Tokenizer:
    """A tokenizer whose vocabulary is the special tokens, the chat template's words and `pieces`.

    The ids depend only on the order of the pieces; repeated ones count once. A piece may hold
    spaces and line breaks inside, but may not begin or end with a space.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    pieces = list(dict.fromkeys([*CHAT_PIECES, *pieces]))
    for piece in pieces:
        if not piece or piece != piece.strip(" ") or "<|" in piece or "|>" in piece:
            raise UserError(
                f"piece {piece!r} is empty, begins or ends with a space, or looks special"
            )
    vocab = {p: i for i, p in enumerate([*SPECIAL, UNKNOWN, *pieces])}
    backend = Backend(models.WordLevel(vocab, unk_token=UNKNOWN))
    longest_first = "|".join(re.escape(p) for p in sorted(pieces, key=len, reverse=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(longest_first), "isolated"),
            pre_tokenizers.Split(Regex("^ $"), "removed"),
        ]
    )
    # WordPiece is the decoder that joins by spaces; its prefix is a character that no piece holds.
    joined = [decoders.WordPiece(prefix="\0", cleanup=False), decoders.Fuse()]
    unspaced = [(" \n", "\n"), ("\n ", "\n"), (" <|", "<|"), ("|> ", "|>")]
    backend.decoder = decoders.Sequence(joined + [decoders.Replace(a, b) for a, b in unspaced])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return Tokenizer(backend)


def gguf_tokenizer(source: str | os.PathLike | gguf.File) -> Tokenizer:
    """The byte-pair tokenizer in a GGUF file; UserError where it is of another kind or damaged."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    file = source if isinstance(source, gguf.File) else gguf.open_file(source)
    get = lambda key, default=None: file.metadata.get(f"tokenizer.ggml.{key}", default)
    model, name = get("model"), get("pre", "default")
    if model != "gpt2":
        raise UserError(f"{file.path}: its tokenizer is {model!r}; only byte-pair (gpt2) is read")
    if name not in WORDS:
        raise UserError(
            f"{file.path}: pre-tokenizer {name!r} is unknown: one of {', '.join(WORDS)}"
        )
    tokens, merges = get("tokens"), get("merges")
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise UserError(f"{file.path} has no tokenizer: tokens or merges are missing")
    kinds = get("token_type")
    kinds = [1] * len(tokens) if kinds is None else [int(k) for k in kinds]
    ids = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    # The library does not raise on such a pair, it panics.
    odd = next((p for p in pairs if len(p) != 2 or not {*p, "".join(p)} <= ids.keys()), None)
    if odd is not None or len(ids) != len(tokens) or len(kinds) != len(tokens):
        what = f"the merge {' '.join(odd)!r:.60}" if odd else "the number of its token types"
        raise UserError(f"{file.path}: {what} does not fit its {len(ids)} different tokens")
    backend = Backend(models.BPE(ids, pairs))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = WORDS[name]
    if words == "digits":
        whole = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    elif words is not None:
        cut = pre_tokenizers.Split(Regex(words), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        whole = pre_tokenizers.Sequence([cut, bytes_])
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = whole, decoders.ByteLevel()
    control, added = 3, 4  # token types; the rest are words and bytes
    backend.add_tokens(
        [
            AddedToken(t, special=kind == control, normalized=False)
            for t, kind in zip(tokens, kinds)
            if kind in (control, added)
        ]
    )
    ids_of = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    found = {f"{name}_token": get(f"{key}_token_id") for name, key in ids_of.items()}
    return Tokenizer(
        backend,
        template=file.metadata.get("tokenizer.chat_template"),
        named={n: tokens[i] for n, i in found.items() if i is not None and i < len(tokens)},
    )


class Finetuned:
    """The tokenizer files of a base model, with the end of turn and the chat template that were trained."""

    def __init__(self, tokenizer: Tokenizer, folder: str | os.PathLike):
        self.tokenizer, self.folder = tokenizer, Path(folder)

    @property
    def ids(self) -> dict[str, Any]:
        """The token ids of the folder; its eos and the one that was trained."""
        ids = hf.token_ids(self.folder)
        base, eos = ids.get("eos_token_id", []), self.tokenizer.eos
        base = base if isinstance(base, list) else [base]
        if eos not in base:
            ids["eos_token_id"] = [eos, *base] if base else eos
        return {"pad_token_id": self.tokenizer.pad} | ids

    def save(self, folder: str | os.PathLike) -> None:
        """Copy the files; write the chat template where they have none."""
        for path in hf.tokenizer_files(self.folder):
            shutil.copyfile(path, Path(folder) / path.name)
        if self.tokenizer.template is None:
            write_text(Path(folder) / "chat_template.jinja", CHATML)


def _kept(folder: Path) -> dict[str, Any]:
    """The chat template and the named special tokens of a folder."""
    jinja = folder / "chat_template.jinja"
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        said |= read_json(folder / name) if (folder / name).is_file() else {}
    template = said.get("chat_template")
    return {
        "template": jinja.read_text(encoding="utf-8") if jinja.is_file() else _default(template),
        "named": _strings(said),
    }


def _default(template: Any) -> str | None:
    """The template itself, or of several the one named "default"."""
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}
    return template.get("default") if isinstance(template, dict) else template


def _strings(said: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as strings; files also write a token as an object."""
    named = {n: said.get(n) for n in NAMED}
    named = {n: t.get("content") if isinstance(t, dict) else t for n, t in named.items()}
    return {n: t for n, t in named.items() if isinstance(t, str)}


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a folder, a tokenizer.json, a GGUF file, or a hub name already on this disk."""
    from tokenizers import Tokenizer as Backend

    file = Path(path)
    if file.suffix == gguf.SUFFIX:
        return gguf_tokenizer(file)
    file = file / "tokenizer.json" if file.is_dir() else file
    if file.is_file():
        try:
            return Tokenizer(Backend.from_file(str(file)), **_kept(file.parent))
        except Exception as e:  # the library raises bare Exception
            raise UserError(f"{file} is not a tokenizer.json that can be read: {e}") from e
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(path), use_fast=True)
        return Tokenizer(
            found.backend_tokenizer,
            template=_default(found.chat_template),
            named=_strings(found.special_tokens_map),
        )
    except Exception as e:  # the library says what is wrong with a folder in any way
        first = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"no tokenizer at {path} (folder, tokenizer.json or hub name): {first}"
        ) from e
