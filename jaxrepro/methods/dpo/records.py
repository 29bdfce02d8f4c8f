"""Preference records of a data path: read, checked, split, and what is worth a warning about them.

    balance of KTO: lambda_D n_D / (lambda_U n_U) within about [1, 1.5]          (inferred from arXiv:2402.01306)

Records come from a JSONL file, a folder or the hub, as questions do (data/sources.py). An empty response is an
error; a chosen response that equals the rejected one is kept, counted and said once.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrepro.config import UserError
from jaxrepro.data import questions, sources
from jaxrepro.methods.dpo import schemas

# ultrafeedback_binarized has a split for each kind of training; the preferences are these.
SPLITS = {"train": ("train", "train_prefs"), "test": ("test", "test_prefs")}
BALANCED = (1.0, 1.5)
Record = dict[str, Any]


class Preferences(NamedTuple):
    """Checked records; no prompt is on both sides."""

    train: list[Record]
    test: list[Record]


def load(
    *, path: str, schema: str = "pair", subset: str | None = None, test: int = 1
) -> Preferences:
    """Records of a file, a folder or a data set of the hub.

    A source without a test split of its own gives `test` records whose prompts are held out (fewer, where
    it has fewer). Prints a line for what `notes` finds. UserError names file, line and field.
    """
    _text(schema)
    return checked(sources.load(path, subset, splits=SPLITS), path, schema, test)


def checked(
    rows: Mapping[str, Sequence[sources.Row]], path: str, schema: str, test: int
) -> Preferences:
    """`load` of rows that are read already."""
    wanted = _text(schema)
    found = {
        split: [wanted.validate(row.fields, row.where, id=row.id) for row in some]
        for split, some in rows.items()
    }
    for split, some in found.items():
        for note in notes(some):
            print(f"{path} {split}: {note}", flush=True)
    return Preferences(*questions.apart(found["train"], found.get("test"), test, key=asked))


def _text(schema: str) -> schemas.Schema:
    found = schemas.get(schema)
    if found.k == 0:
        raise UserError(
            "data.schema=image is no text: give arrays to images() instead of data.path"
        )
    return found


def asked(record: Mapping[str, Any]) -> str:
    """All that a record's prompt says."""
    return "\n".join(turn["content"] for turn in record["prompt"])


def notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each thing that is legal but seldom meant."""
    out = []
    equal = sum(len(set(r["responses"])) < len(r["responses"]) for r in records)
    if equal:
        out.append(
            f"{equal} of {len(records)} records have two equal responses; kept, a loss of their "
            "difference learns nothing from them"
        )
    return out


def balance(
    records: Iterable[Mapping[str, Any]], *, desirable: float = 1.0, undesirable: float = 1.0
) -> str | None:
    """A warning where KTO's weights lambda_D and lambda_U do not balance the labels of unpaired records.

    It names the weight that would: the rarer label's goes up. None where they balance. UserError for a weight that
    is not above 0.
    """
    if not (desirable > 0 and undesirable > 0):
        raise UserError(
            f"the weights of desirable ({desirable}) and undesirable ({undesirable}) responses must "
            "be above 0"
        )
    labels = [r["label"] for r in records]
    good = sum(labels)
    bad = len(labels) - good
    if not good or not bad:
        return f"{good} desirable and {bad} undesirable records; KTO needs both"
    low, high = BALANCED
    ratio = desirable * good / (undesirable * bad)
    if low <= ratio <= high:
        return None
    if ratio < low:
        name, weight = "desirable", undesirable * bad / good
        ends = weight * low, weight * high
    else:
        name, weight = "undesirable", desirable * good / bad
        ends = weight / high, weight / low
    return (
        f"{good} desirable and {bad} undesirable records weigh {ratio:.3g} to 1, about {low:g} to "
        f"{high:g} is balanced; set the weight of {name} ones to {ends[0]:.3g} .. {ends[1]:.3g}"
    )


def keep(records: Sequence[Record], *, seed: int = 0) -> list[Record]:
    """The records to be forgotten, each with one to be kept as "keep": drawn anew once all were drawn.

    UserError where one of the two kinds is missing.
    """
    forget = [r for r in records if not r["label"]]
    retain = [r for r in records if r["label"]]
    if not forget or not retain:
        raise UserError(
            f"{len(forget)} records to forget and {len(retain)} to retain; unlearning that keeps the "
            "rest needs both"
        )
    rng, order = random.Random(seed), []
    while len(order) < len(forget):
        order += rng.sample(retain, len(retain))
    return [record | {"keep": kept} for record, kept in zip(forget, order)]
