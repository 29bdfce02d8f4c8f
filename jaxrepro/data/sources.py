"""Rows of a data path: JSONL on this disk (a file, a folder) or a data set of the Hugging Face hub.

    FILE       x_train.jsonl[.gz]; x_test.jsonl beside it is its test split
    FOLDER     train.jsonl and test.jsonl, or x_train.jsonl and x_test.jsonl, .gz or not
    OWNER/SET  the hub's own splits, read with `datasets`

A row knows where it stands, so that whoever reads its fields can name file and line.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrepro.config import UserError
from jaxrepro.data import locate

SPLITS = {"train": ("train",), "test": ("test",)}  # ours -> names at the hub, the first one found


class Row(NamedTuple):
    """One record as it was read."""

    id: str  # "file:line", or "owner/set split index"
    where: str  # the same for a message: "path line 17"
    fields: dict[str, Any]


def load(
    path: str, subset: str | None = None, *, splits: Mapping[str, Sequence[str]] = SPLITS
) -> dict[str, list[Row]]:
    """Rows of the splits that a path has: always "train", and "test" where there is one.

    subset and splits are for the hub alone. UserError for what cannot be read.
    """
    try:
        place = locate.data(path)
    except UserError:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            raise
        return _hub(path, subset, splits)
    return {split: read_jsonl(file) for split, file in _files(place).items()}


def read_jsonl(path: Path) -> list[Row]:
    """The objects of a JSONL file, gzipped or not; UserError names file and line."""
    out = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            half = ascii(e.object[e.start])[1:-1]
            raise UserError(f"{where}: {half} is half a character, which no text holds") from e
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: not JSON ({e})") from e
        if not isinstance(row, dict):
            raise UserError(f"{where}: a {type(row).__name__}, not an object")
        out.append(Row(f"{path.name}:{number}", where, row))
    if not out:
        raise UserError(f"{path} holds no records; it needs one JSON object a line")
    return out


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:  # some editors write a mark first
            yield from enumerate(file, 1)
    except (OSError, EOFError, UnicodeError, zlib.error) as e:
        raise UserError(f"{path} cannot be read: {e}") from e


def _files(place: Path) -> dict[str, Path]:
    """The file of each split of a file or folder."""
    if place.is_dir():
        found = {"train": _one(place, "train"), "test": _one(place, "test", optional=True)}
    else:
        sibling = re.sub(r"train(?=\.jsonl(\.gz)?$)", "test", place.name)
        other = place.with_name(sibling)
        found = {"train": place, "test": other if other != place and other.is_file() else None}
    return {split: file for split, file in found.items() if file is not None}


def _one(folder: Path, split: str, *, optional: bool = False) -> Path | None:
    """train.jsonl[.gz] of a folder, else its only *_train.jsonl[.gz]; likewise test."""
    names = sorted(p.name for p in folder.iterdir())
    exact = [n for n in names if re.fullmatch(rf"{split}\.jsonl(\.gz)?", n)]
    found = exact or [n for n in names if re.fullmatch(rf".+_{split}\.jsonl(\.gz)?", n)]
    if not found and optional:
        return None
    if len(found) != 1:
        what = f"several ({', '.join(found)})" if found else "none"
        raise UserError(
            f"data.path={folder}: one {split}.jsonl or *_{split}.jsonl (.gz or not) is needed, "
            f"there are {what}; give the file x_train.jsonl, its x_test.jsonl is found beside it"
        )
    return folder / found[0]


def _hub(
    name: str, subset: str | None, splits: Mapping[str, Sequence[str]]
) -> dict[str, list[Row]]:
    from datasets import get_dataset_split_names, load_dataset

    try:
        there = get_dataset_split_names(name, subset)
        chosen = {
            ours: next((theirs for theirs in names if theirs in there), None)
            for ours, names in splits.items()
        }
        rows = {o: load_dataset(name, subset, split=t) for o, t in chosen.items() if t is not None}
    except (OSError, ValueError, RuntimeError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"data.path={name} is neither a file or folder here nor a data set that the hub gave "
            f"(data.subset={subset}): {reason}"
        ) from e
    if "train" not in rows:
        wanted = " or ".join(splits["train"])
        raise UserError(f"data.path={name} has no split {wanted}; it has {', '.join(there)}")
    return {
        ours: [
            Row(f"{name} {chosen[ours]} {i}", f"{name} split {chosen[ours]} row {i}", row)
            for i, row in enumerate(found)
        ]
        for ours, found in rows.items()
    }
