"""Preference records to rows of tokens: prompt in the chat template, response, end of turn, padding on the right.

A row is [bos] prompt [prefix] response [end of turn], its first max_tokens tokens: the start stays, so all
responses of a record lose at the same place. A record whose prompt alone fills a row has nothing left to score
and is left out by `fitting`. Prompt and response are encoded apart, so a prompt has the same tokens before every
response. There is one bos where the tokenizer begins a text with one, whether the template wrote it or not.

`rows` makes arrays of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.data import chat
from jaxrepro.data.text import Tokenizer
from jaxrepro.methods.dpo import schemas
from jaxrepro.methods.dpo.records import Record
from jaxrepro.methods.dpo.schemas import Schema


class Row(NamedTuple):
    """One response after its prompt, unpadded, at most max_tokens long."""

    tokens: list[int]
    start: int  # where the response begins
    cut: bool  # whether the response lost its end


@dataclass(frozen=True)
class Encoder:
    """How checked records (schemas.py) become tokens."""

    tokenizer: Tokenizer
    max_tokens: int  # of a row
    schema: Schema = field(default_factory=lambda: schemas.get("pair"))
    system: str = chat.SYSTEM  # for prompts without a system turn; "" = none
    template: bool = True  # False: a prompt is plain text, for models without a chat template
    responses: int | None = None  # k of a ranking; shorter ones are filled with invalid rows

    def __post_init__(self):
        if self.schema.k == 0:
            raise UserError("data.schema=image has no tokens; images() makes its arrays")
        if self.max_tokens < 2:
            raise UserError(
                f"data.max_tokens={self.max_tokens}; prompt and response need 2 or more"
            )
        if self.schema.k is None and (self.responses or 0) < 2:
            raise UserError(f"a ranking needs a number of responses, not {self.responses}; use 2 or more")  # fmt: skip
        if found := [s for s in self._special if s in self.system]:
            raise UserError(f"the system text contains the special token {found[0]}: remove it")

    @property
    def k(self) -> int:
        """Rows of a record. A record to forget has 2, what is kept (`records.keep`) too, or `responses` = 1."""
        if self.schema.name == "forget":
            return 1 if self.responses == 1 else 2
        return self.schema.k or self.responses

    @cached_property
    def _special(self) -> list[str]:
        return self.tokenizer.specials

    @cached_property
    def _end(self) -> list[int]:
        """What follows a whole response."""
        if not self.schema.end_of_turn:
            return []
        named = self.tokenizer.named.get("eos_token")
        plain = not self.template and named is not None
        return [self.tokenizer.id(named) if plain else self.tokenizer.eos]

    # Rows ------------------------------------------------------------------------------------

    def prompt(self, record: Mapping[str, Any]) -> list[int]:
        """The tokens before a response; UserError names the record."""
        turns, prefix = record["prompt"], record.get("prefix", "")
        self._refuse_special(record, [*(turn["content"] for turn in turns), prefix])
        if self.template:
            try:
                text = chat.conversation(self.tokenizer, turns, system=self.system)
            except UserError as e:
                raise UserError(f"example {record['id']}: {e}") from e
            prefix = prefix and self.tokenizer.lead + prefix
        else:
            if len(turns) != 1:
                raise UserError(
                    f"example {record['id']}: its prompt has {len(turns)} turns, which plain text "
                    "(data.template=false) cannot show; use the chat template"
                )
            text = turns[0]["content"]
        bos = self.tokenizer.bos
        ids = self._encode(record, text)
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids + (self._encode(record, prefix) if prefix else [])

    def response(self, record: Mapping[str, Any], i: int) -> list[int]:
        """The tokens of response i and the end of turn."""
        text = record["responses"][i]
        self._refuse_special(record, [text])
        lead = self.tokenizer.lead if self.template and not record.get("prefix") else ""
        return [*self._encode(record, lead + text), *self._end]

    def rows(self, record: Mapping[str, Any]) -> list[Row]:
        """A row for each response, and for what is kept; UserError where a prompt leaves no room."""
        return [row for one in self._parts(record) for row in self._rows(one)]

    def _parts(self, record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """What has a prompt of its own in a record."""
        if self.schema.name != "forget":
            return [record]
        if record["label"]:
            raise UserError(
                f"example {record['id']} is to be retained; pass what records.keep gives"
            )
        if self.k == 1:
            return [record]
        if "keep" not in record:
            raise UserError(
                f"example {record['id']} is to be forgotten beside none that is kept; pass what "
                "records.keep gives, or set responses=1"
            )
        return [record, record["keep"]]

    def _rows(self, record: Mapping[str, Any]) -> list[Row]:
        prompt = self.prompt(record)
        if len(prompt) >= self.max_tokens:
            raise UserError(
                f"example {record['id']}: its prompt has {len(prompt)} tokens and fills "
                f"data.max_tokens={self.max_tokens}; raise it or leave the example out"
            )
        return self._after(prompt, record)

    def _after(self, prompt: list[int], record: Mapping[str, Any]) -> list[Row]:
        whole = [prompt + self.response(record, i) for i in range(len(record["responses"]))]
        t = self.max_tokens
        return [Row(ids[:t], len(prompt), len(ids) > t) for ids in whole]

    def fitting(self, records: Sequence[Record], what: str) -> list[Record]:
        """The records with room for a response and no more than k; prints how many others there were.

        Also prints how many responses will lose their end. UserError where no record is left.
        """
        kept, cut = [], 0
        for record in records:
            parts = [(self.prompt(part), part) for part in self._parts(record)]
            room = all(len(prompt) < self.max_tokens for prompt, _ in parts)
            if len(record["responses"]) <= self.k and room:
                kept.append(record)
                cut += sum(row.cut for part in parts for row in self._after(*part))
        if len(kept) < len(records):
            print(
                f"{what}: left out {len(records) - len(kept)} of {len(records)} records, whose prompts "
                f"fill {self.max_tokens} tokens or which have more than {self.k} responses",
                flush=True,
            )
        if not kept:
            raise UserError(
                f"none of {len(records)} {what} records has room for a response in "
                f"data.max_tokens={self.max_tokens}; raise it"
            )
        if cut:
            print(f"{what}: {cut} responses lose their end at {self.max_tokens} tokens", flush=True)
        return kept

    # Texts -----------------------------------------------------------------------------------

    def _encode(self, record: Mapping[str, Any], text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text)
        except UserError as e:
            raise UserError(f"example {record['id']}: {e}") from e

    def _refuse_special(self, record: Mapping[str, Any], texts: Sequence[str]) -> None:
        for text in texts:
            if found := next((s for s in self._special if s in text), None):
                raise UserError(
                    f"example {record['id']} holds the special token {found}, which would be read as "
                    "one; remove it"
                )


def images(records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Arrays of checked image pairs: latents (b, 2, *c), chosen first, noise (b, *c), timestep (b,).

    UserError names a record of another shape.
    """
    if not records:
        raise UserError("no image pairs; give one or more")
    shape = records[0]["noise"].shape
    if odd := next((r for r in records if r["noise"].shape != shape), None):
        raise UserError(
            f"example {odd['id']} has the shape {odd['noise'].shape}, the first one has {shape}; "
            "use one shape in a batch"
        )
    return {
        "latents": np.stack([r["latents"] for r in records]),
        "noise": np.stack([r["noise"] for r in records]),
        "timestep": np.array([r["timestep"] for r in records], np.int32),
    }
