"""Items on the host to rows on the devices: prompts and responses of static shape, padded on the right.

An item is a record (records.py) whose texts have become token ids, or what an online round has drawn:

    {"id", "prompt": [ids], "responses": [[ids], ...]}, and where the loss needs them "scores", "rewards",
    "label", "tie", "probability", "age", "unsafe", "explore", "reference": {"lp": [one array a response], ...}

A prompt runs once for all its responses. What is kept beside what is forgotten has a prompt of its own, so such an
item has "prompts", one for each response, in place of "prompt". Responses that were sampled stay the tokens that were
sampled: text that is encoded again may differ.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.data.batches import PromptTokens
from jaxrepro.methods.dpo.encoding import Encoder
from jaxrepro.methods.dpo.programs import Rows
from jaxrepro.methods.dpo.sequence import Batch

Item = dict[str, Any]
# Fields of `Batch` that an item carries: dtype, and its own name for them where it is another.
PER_RESPONSE = {"scores": "f4", "unsafe": "?"}  # (b, k)
PER_ITEM = {"labels": "?", "ties": "?", "probability": "f4", "age": "f4", "explore": "i4"}  # (b,)
NAMES = {"labels": "label", "ties": "tie"}
GIVEN = frozenset((*PER_RESPONSE, *PER_ITEM, "rewards"))


class Shape(NamedTuple):
    """Static sizes of a batch, tokens."""

    k: int
    prompt: int
    response: int
    ragged: bool = False  # whether some items have fewer than k responses


def item(encoder: Encoder, record: Mapping[str, Any], needs: frozenset[str] = frozenset()) -> Item:
    """A checked record in tokens, with all that its schema has, and optional fields where `needs` names them.

    needs: as `programs.needs_of` gives them. UserError for a record without a field that is needed.
    """
    rows = encoder.rows(record)
    prompts = [row.tokens[: row.start] for row in rows]
    out = {"id": record["id"], "responses": [row.tokens[row.start :] for row in rows]}
    apart = encoder.schema.name == "forget" and len(rows) > 1
    out |= {"prompts": prompts} if apart else {"prompt": prompts[0]}
    optional = encoder.schema.optional_names
    for field in sorted(GIVEN):
        name = NAMES.get(field, field)
        if field in needs and name not in record:
            raise UserError(f"example {record['id']} has no {name}, which the loss needs")
        if name in record and (field in needs or name not in optional):
            out[name] = record[name]
    return out


def prompts_of(one: Item) -> list[list[int]]:
    """The prompt of an item's responses, or the prompt of each."""
    return one.get("prompts") or [one["prompt"]]


def shape_of(items: Sequence[Item], *, k: int | None = None, multiple: int = 16) -> Shape:
    """The smallest shape that holds the items, lengths rounded up."""
    up = lambda n: -(-n // multiple) * multiple
    counts = [len(i["responses"]) for i in items]
    k = k or max(counts)
    return Shape(
        k,
        up(max(len(p) for i in items for p in prompts_of(i))),
        up(max(len(r) for i in items for r in i["responses"])),
        min(counts) < k,
    )


def collate(items: Sequence[Item], shape: Shape, *, pad: int, mismatched: int = 0) -> Rows:
    """Rows (b, ...) of items; `mismatched`: the micro-batches within which KTO's pairs are shifted, or 0.

    UserError names an item that does not fit the shape.
    """
    b, k, c = len(items), shape.k, shape.response
    tokens, length = np.full((b, k, c), pad, np.int32), np.zeros((b, k), np.int32)
    for i, one in enumerate(items):
        responses, start = one["responses"], max(map(len, prompts_of(one)))
        longest = max(map(len, responses), default=0)
        if start > shape.prompt or longest > c or len(responses) > k:
            raise UserError(
                f"example {one['id']}: {len(responses)} responses of up to {longest} tokens behind a "
                f"prompt of {start}; rows hold {k} of {c} behind {shape.prompt}"
            )
        for j, response in enumerate(responses):
            tokens[i, j, : len(response)], length[i, j] = response, len(response)
    return Rows(
        _prompts(items, shape, pad),
        tokens,
        length,
        data=_data(items, length > 0, shape.ragged),
        other=_other(tokens, length, mismatched) if mismatched else None,
        reference=_reference(items, tokens.shape),
    )


def _prompts(items: Sequence[Item], shape: Shape, pad: int) -> PromptTokens:
    """(b, t), or (b, k, t) where items have a prompt for each response."""
    lead = (len(items), *([shape.k] if "prompts" in items[0] else []))
    tokens = np.full((*lead, shape.prompt), pad, np.int32)
    segment = np.zeros(tokens.shape, np.int32)
    for i, one in enumerate(items):
        for at, ids in zip(np.ndindex(lead[1:]), prompts_of(one)):
            tokens[(i, *at)][: len(ids)], segment[(i, *at)][: len(ids)] = ids, 1
    position = np.arange(shape.prompt, dtype=np.int32) * segment
    return PromptTokens(tokens, position, segment, segment.sum(-1, dtype=np.int32))


def _data(items: Sequence[Item], valid: np.ndarray, ragged: bool) -> Batch:
    found: dict[str, Any] = {}
    if ragged or not valid.all():
        found["valid"] = valid
    for field, dtype in PER_RESPONSE.items():
        if field in items[0]:
            found[field] = np.zeros(valid.shape, dtype)
            for row, one in zip(found[field], items):
                row[: len(one[field])] = one[field]
    for field, dtype in PER_ITEM.items():
        if (name := NAMES.get(field, field)) in items[0]:
            found[field] = np.array([one[name] for one in items], dtype)
    if "rewards" in items[0]:
        found["rewards"] = _rewards(items)
    return Batch(**found)


def _rewards(items: Sequence[Item]) -> np.ndarray:
    counts = {len(one["rewards"][0]): one["id"] for one in items}
    if len(counts) > 1:
        (a, first), (b, other), *_ = counts.items()
        raise UserError(f"example {first} has {a} rewards, example {other} has {b}; use one number")
    return np.array([one["rewards"] for one in items], np.float32)


def _other(tokens: np.ndarray, length: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Each prompt with the response of the item before it in its micro-batch (items j, j + parts, ...)."""
    if len(tokens) < 2 * parts or len(tokens) % parts:
        raise UserError(
            f"a batch of {len(tokens)} in {parts} micro-batches has no mismatched responses; use 2 or "
            "more items in each, the same number"
        )
    return np.roll(tokens, parts, axis=0)[:, :1], np.roll(length, parts, axis=0)[:, :1]


def _reference(items: Sequence[Item], shape: tuple[int, ...]) -> dict[str, np.ndarray] | None:
    if "reference" not in items[0]:
        return None
    out = {}
    for name in items[0]["reference"]:
        out[name] = np.zeros(shape, np.float32)
        for rows, one in zip(out[name], items):
            for row, values in zip(rows, one["reference"][name]):
                row[: len(values)] = values
    return out
