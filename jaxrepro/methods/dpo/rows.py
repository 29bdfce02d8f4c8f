"""Items on the host to rows on the devices: prompts and responses of static shape, padded on the right.

An item is a record (records.py) whose texts have become token ids, or what an online round has drawn:

    {"id", "prompt": [ids], "responses": [[ids], ...]}, and where the loss needs them "scores", "rewards",
    "label", "tie", "probability", "explore", "reference": {"lp": [one array a response], ...}

Responses that were sampled stay the tokens that were sampled: text that is encoded again may differ.
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
PER_RESPONSE = {"scores": "f4"}  # (b, k)
PER_ITEM = {"label": "?", "tie": "?", "probability": "f4", "explore": "i4"}  # (b,)
FIELDS = {"label": "labels", "tie": "ties"}  # the names of `Batch` where they differ


class Shape(NamedTuple):
    """Static sizes of a batch, tokens."""

    k: int
    prompt: int
    response: int


def item(encoder: Encoder, record: Mapping[str, Any]) -> Item:
    """A checked record in tokens."""
    rows = encoder.rows(record)
    start = rows[0].start
    kept = {name: record[name] for name in (*PER_RESPONSE, *PER_ITEM, "rewards") if name in record}
    return {
        "id": record["id"],
        "prompt": rows[0].tokens[:start],
        "responses": [row.tokens[start:] for row in rows],
        **kept,
    }


def shape_of(items: Sequence[Item], *, k: int | None = None, multiple: int = 16) -> Shape:
    """The smallest shape that holds the items, lengths rounded up."""
    up = lambda n: -(-n // multiple) * multiple
    return Shape(
        k or max(len(i["responses"]) for i in items),
        up(max(len(i["prompt"]) for i in items)),
        up(max(len(r) for i in items for r in i["responses"])),
    )


def collate(items: Sequence[Item], shape: Shape, *, pad: int, mismatched: int = 0) -> Rows:
    """Rows (b, ...) of items; `mismatched`: the micro-batches within which KTO's pairs are shifted, or 0.

    UserError names an item that does not fit the shape.
    """
    b, (k, t, c) = len(items), shape
    prompts, segment = np.full((b, t), pad, np.int32), np.zeros((b, t), np.int32)
    tokens, length = np.full((b, k, c), pad, np.int32), np.zeros((b, k), np.int32)
    for i, one in enumerate(items):
        ids, responses = one["prompt"], one["responses"]
        longest = max(map(len, responses), default=0)
        if len(ids) > t or longest > c or len(responses) > k:
            raise UserError(
                f"example {one['id']}: {len(responses)} responses of up to {longest} tokens behind a "
                f"prompt of {len(ids)}; rows hold {k} of {c} behind {t}"
            )
        prompts[i, : len(ids)], segment[i, : len(ids)] = ids, 1
        for j, response in enumerate(responses):
            tokens[i, j, : len(response)], length[i, j] = response, len(response)
    position = np.arange(t, dtype=np.int32) * segment
    return Rows(
        PromptTokens(prompts, position, segment, segment.sum(1, dtype=np.int32)),
        tokens,
        length,
        data=_data(items, length > 0),
        other=_other(tokens, length, mismatched) if mismatched else None,
        reference=_reference(items, tokens.shape),
    )


def _data(items: Sequence[Item], valid: np.ndarray) -> Batch:
    found: dict[str, Any] = {}
    if not valid.all():
        found["valid"] = valid
    for name, dtype in PER_RESPONSE.items():
        if name in items[0]:
            found[name] = np.zeros(valid.shape, dtype)
            for row, one in zip(found[name], items):
                row[: len(one[name])] = one[name]
    for name, dtype in PER_ITEM.items():
        if name in items[0]:
            found[FIELDS.get(name, name)] = np.array([one[name] for one in items], dtype)
    if "rewards" in items[0]:
        found["rewards"] = np.array([one["rewards"] for one in items], np.float32)
    return Batch(**found)


def _other(tokens: np.ndarray, length: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Each prompt with the response of the item before it in its micro-batch (items j, j + parts, ...)."""
    if len(tokens) < 2 * parts:
        raise UserError(
            f"a batch of {len(tokens)} in {parts} micro-batches has no mismatched responses; use 2 or "
            "more items in each"
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
