"""Step-wise reasoning data: JSONL records, format noise, captions, reflective-sample filter.

Solutions follow the literal format of data/stepformat.py. Record, one JSON object a line:
{"image_path", "problem", "solution", "key_steps": {"Steps": [g_1, ...]}}, where g_j is a string or a
list of alternative strings. An optional "id" names the record.

A text without key steps has the share 0 in StepRAR, also where "Steps" is missing. Data for
reinforcement therefore must say `"Steps": []` where it means that; only data for supervised
training (need_key_steps=False) may leave "key_steps" or "Steps" out.

Departure: empty alternatives are refused here. As substrings they would match every text, so a
record with one would pay its reward for nothing.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.data.stepformat import ANSWER, DESCRIPTION, RATIONALE, STEP, THINK, blocks, join
from jaxrepro.files import whole

REFLECTION = "I think I have made a mistake. Let me rethink it."


def corrupt(solution: str, rng: np.random.Generator) -> str:
    """A copy whose format is broken in one way: a missing block, shifted or swapped step numbers.

    Every result is invalid: a required block is missing or the steps do not count 1..N. Needs a
    valid solution of one step or more; with one step the numbers are shifted instead of swapped.
    """
    found = blocks(solution)
    parts = [(block.header, block.text) for block in found]
    at = [i for i, block in enumerate(found) if block.number is not None]
    if not at:
        raise UserError("corrupt() got a solution without '### Step N:'; give it a complete one")
    kind = rng.integers(3)
    if kind == 0:
        missing = rng.choice([DESCRIPTION, RATIONALE, STEP.format(1), ANSWER])
        return join(p for p in parts if p[0] != missing)
    numbers = list(range(1, len(at) + 1))
    if kind == 1 or len(at) == 1:
        numbers = [n + 1 for n in numbers]
    else:
        j = rng.integers(len(at) - 1)
        numbers[j], numbers[j + 1] = numbers[j + 1], numbers[j]
    for i, n in zip(at, numbers):
        parts[i] = (STEP.format(n), parts[i][1])
    return join(parts)


def with_format_noise(example: Mapping[str, Any], share: float, seed: int = 0) -> dict[str, Any]:
    """The example, its solution corrupted with probability `share`; a function of its id and the seed."""
    example = dict(example)
    rng = np.random.default_rng([zlib.crc32(example["id"].encode()), seed])
    if rng.random() < share:
        example["solution"] = corrupt(example["solution"], rng)
    return example


def caption_of(example: Mapping[str, Any]) -> dict[str, Any]:
    """The same image and question, answered by the description alone: a model sees before it reasons.

    The question stays, so that what the model learns of the image holds where the question is.
    """
    rest = {k: v for k, v in example.items() if k != "answer"}
    described = [b.text for b in blocks(example["solution"]) if b.header == DESCRIPTION]
    if not described:
        raise UserError(f"example {example['id']} has no '{DESCRIPTION}' to caption its image with")
    return {
        **rest,
        "id": example["id"] + "/caption",
        "solution": join([(DESCRIPTION, described[0])]),
        "key_steps": {"Steps": []},
    }


def format_pieces(max_steps: int) -> tuple[str, ...]:
    """Vocabulary pieces of the format, one token a header, for solutions of up to max_steps.

    One step header more than that, because shifted step numbers need it.
    """
    steps = [STEP.format(i) + "\n" for i in range(1, max_steps + 2)]
    return (DESCRIPTION + "\n", RATIONALE + "\n", THINK, *steps, ANSWER + "\n")


class Loaded(NamedTuple):
    """Records that are whole, and one line of text for each that is not."""

    examples: list[dict[str, Any]]
    errors: list[str]


def read_jsonl(
    path: str | os.PathLike,
    *,
    strict: bool = True,
    need_key_steps: bool = True,
    images: str = "open",
) -> Loaded:
    """Records of a `.jsonl` or `.jsonl.gz` file as examples; `image` is then an absolute path or None.

    A record without an id is named `<file name>:<line>`. images: "open" reads each picture's file
    completely, "exists" only looks for it, "skip" does neither. strict raises one UserError that
    lists the broken records; otherwise they are left out and `errors` says which and why.
    """
    if images not in ("open", "exists", "skip"):
        raise UserError(f"images={images!r} is not one of 'open', 'exists', 'skip'")
    path = Path(path)
    examples, errors, seen = [], [], {}
    for number, record, failure in _objects(path):
        where = f"{path}:{number}"
        if failure:
            errors.append(f"{where}: {failure}")
            continue
        try:
            example = _example(record, path, number, need_key_steps, images)
            if example["id"] in seen:
                raise UserError(
                    f"id {example['id']!r} was used in line {seen[example['id']]}; rename one"
                )
        except UserError as e:
            errors.append(f"{where}: {e}")
            continue
        seen[example["id"]] = number
        examples.append(example)
    if strict and errors:
        shown = "; ".join(errors[:5]) + f"; and {len(errors) - 5} more" * (len(errors) > 5)
        raise UserError(f"{len(errors)} broken records (strict=False leaves them out): {shown}")
    if not examples and strict:
        raise UserError(f"{path} holds no record; each line must be one JSON object")
    return Loaded(examples, errors)


def _lines(path: Path) -> Iterable[tuple[int, bytes, str]]:
    """(line number, line, what went wrong with the file itself), blank lines left out."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line, ""
    except FileNotFoundError as e:
        raise UserError(f"no data file at {path}") from e
    except (OSError, EOFError, zlib.error) as e:  # a cut or damaged archive: keep what came before
        if number == 0:
            raise UserError(f"{path} can't be read: {e}") from e
        yield number + 1, b"", f"the file can't be read on from here ({e})"


def _objects(path: Path) -> Iterable[tuple[int, dict[str, Any], str]]:
    """(line number, JSON object, what is wrong with the line)."""
    for number, line, failure in _lines(path):
        try:
            yield number, {} if failure else _parse(line, first=number == 1), failure
        except UserError as e:
            yield number, {}, str(e)


def _parse(line: bytes, *, first: bool) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
        record = json.loads(text)
        if "\\u" in text:
            json.dumps(record, ensure_ascii=False).encode()  # refuses lone surrogates
    except (ValueError, RecursionError) as e:
        raise UserError(f"not one JSON object in UTF-8 ({e})") from e
    if not isinstance(record, dict):
        raise UserError(f"a record is a JSON object, not {type(record).__name__}")
    return record


def read_objects(path: str | os.PathLike) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """("file:line", object) of a `.jsonl` or `.jsonl.gz` file, and what is wrong with its broken lines."""
    found, errors = [], []
    for number, record, failure in _objects(Path(path)):
        if failure:
            errors.append(f"{path}:{number}: {failure}")
        else:
            found.append((f"{path}:{number}", record))
    return found, errors


def _example(
    record: dict[str, Any], path: Path, number: int, need_key_steps: bool, images: str
) -> dict[str, Any]:
    for name in ("problem", "solution"):
        value = record.get(name)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{name!r} must be a text that isn't empty; it is {value!r:.40}")
    name = record.get("id", f"{path.name}:{number}")
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise UserError(f"'id' must be a text or a whole number; it is {name!r:.40}")
    key_steps = record.get("key_steps")
    if key_steps is None and not need_key_steps:
        key_steps = {}
    rest = {k: v for k, v in record.items() if k not in ("image_path", "image")}
    return {
        **rest,
        "id": str(name),
        "image": _image(record.get("image_path"), path, images),
        "key_steps": check_key_steps(key_steps, needed=need_key_steps),
    }


def _image(name: Any, path: Path, images: str) -> str | None:
    if name is None:
        return None
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError(f"'image_path' must name one file, or be null; it is {name!r:.40}")
    file = (path.parent / name).resolve()
    try:
        if images != "skip" and not file.exists():
            raise UserError(f"image {file} does not exist (image_path {name!r})")
    except OSError as e:
        raise UserError(f"image_path {name!r:.60} can't be looked up: {e.strerror}") from e
    if images == "open":
        from jaxrepro.data.images import load

        load(str(file))
    return str(file)


def check_key_steps(key_steps: Any, *, needed: bool = True, empty: bool = False) -> dict[str, Any]:
    """A copy of the key steps, or a UserError: no dict, no list "Steps", an empty group or text.

    needed=False makes a missing "Steps" an empty list. `empty` lets empty groups and texts pass, for a
    cleaner to drop.
    """
    if not isinstance(key_steps, Mapping):
        raise UserError(f"'key_steps' must be an object {{'Steps': [..]}}; it is {key_steps!r:.40}")
    steps = key_steps.get("Steps", None if needed else [])
    if not isinstance(steps, list | tuple):
        raise UserError(f"'key_steps' needs a list 'Steps'; it has {steps!r:.40}")
    for j, group in enumerate(steps):
        texts = [group] if isinstance(group, str) else group
        if not isinstance(texts, list | tuple) or not (texts or empty):
            raise UserError(f"key step {j} must be a text or a list of texts; it is {group!r:.40}")
        for text in texts:
            if not isinstance(text, str) or not (text.strip() or empty):
                raise UserError(
                    f"key step {j} holds {text!r:.40}; it must be a text, and an empty one would "
                    "match everything"
                )
    return {**key_steps, "Steps": steps}


def write_objects(path: str | os.PathLike, objects: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line, to a `.jsonl` or `.jsonl.gz` file, and return how many.

    The file appears whole or not at all.
    """
    count = 0
    with whole(path) as raw, contextlib.ExitStack() as stack:
        file = raw
        if Path(path).suffix == ".gz":  # without name and time, so that equal data is an equal file
            file = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
        for record in objects:
            count += 1
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    return count


def write_jsonl(path: str | os.PathLike, examples: Iterable[Mapping[str, Any]]) -> int:
    """Write examples as records, one line each, and return how many.

    Pictures in memory go to a folder `<name>_images` beside the file; paths are written relative to
    it. The file appears whole or not at all.
    """
    path = Path(path)
    folder = path.parent / (path.name.removesuffix(".gz").removesuffix(".jsonl") + "_images")
    return write_objects(path, (_to_record(e, i, path, folder) for i, e in enumerate(examples, 1)))


def _to_record(example: Mapping[str, Any], number: int, path: Path, folder: Path) -> dict[str, Any]:
    check_key_steps(example["key_steps"])
    image, record = example.get("image"), {k: v for k, v in example.items() if k != "image"}
    if image is not None and not isinstance(image, (str, os.PathLike)):
        folder.mkdir(parents=True, exist_ok=True)
        picture = folder / f"{number:06d}.png"
        image.save(picture)
        image = picture
    return record | {"image_path": None if image is None else os.path.relpath(image, path.parent)}


def _turns(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of a conversation in either spelling: messages or conversations."""
    turns = record.get("messages") or record.get("conversations") or []
    names = {"gpt": "assistant", "human": "user"}
    found = [
        (t.get("role", t.get("from", "")), t.get("content", t.get("value", ""))) for t in turns
    ]
    return [(names.get(role, role), text) for role, text in found]


def is_reflective(record: Mapping[str, Any]) -> bool:
    """Whether an assistant turn of a Mulberry conversation takes a step back (says REFLECTION)."""
    return any(role == "assistant" and REFLECTION in text for role, text in _turns(record))


def drop_reflective(records: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int]:
    """The records without reflective ones, as the warm-up of R1-VL takes them, and how many left."""
    records = list(records)
    kept = [r for r in records if not is_reflective(r)]
    return kept, len(records) - len(kept)


def from_conversation(
    record: Mapping[str, Any], *, name: str, folder: str | os.PathLike = "."
) -> dict:
    """A Mulberry conversation (one user turn, one assistant turn, at most one image) as an example."""
    turns = [t for t in _turns(record) if t[0] != "system"]
    images = record.get("images") or ([record["image"]] if record.get("image") else [])
    roles = Counter(role for role, _ in turns)
    if roles != {"user": 1, "assistant": 1} or turns[0][0] != "user" or len(images) > 1:
        raise UserError(
            f"conversation {name} has turns {dict(roles)} and {len(images)} images; "
            "the reader takes one user turn, one assistant turn and at most one image"
        )
    return {
        "id": name,
        "image": str(Path(folder) / images[0]) if images else None,
        "problem": turns[0][1].replace("<image>", "").strip(),
        "solution": turns[1][1],
        "key_steps": {"Steps": []},
    }
