"""Files of safetensors: what a folder stores, one tensor at a time, and how to write them.

The format is small enough to live here (eight bytes of length, a JSON header, little-endian tensors), and
so bfloat16 and lazy slices work with any version of numpy and safetensors. A `Stored` is a place in a
file; mapping it reads only what is touched, and the memory goes when the array goes. Pickled checkpoints
are refused: unpickling runs whatever code the file holds.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxrepro.config import UserError
from jaxrepro.files import read_json
from jaxrepro.models.values import shown

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
STEM = "model"  # of the files' names; other libraries have others
SINGLE = f"{STEM}.safetensors"
INDEX = f"{SINGLE}.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library
_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")  # torch's zip and plain pickles


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    offset: int  # bytes
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """The tensor, mapped and not read; lives as long as someone holds it."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        raw = np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,))
        return raw.view(np.ndarray).view(self.dtype).reshape(self.shape)


class Entry(NamedTuple):
    """A tensor to write; `make` is called when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def listed(what: str, names: Sequence[str], most: int = 20) -> list[str]:
    """[] or one phrase that names the first `most` and counts the rest."""
    if not names:
        return []
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{len(names)} {what}: {', '.join(names[:most])}{rest}"]


# Reading ---------------------------------------------------------------------------------------------


def index_file(stem: str) -> str:
    """The name of an index."""
    return f"{stem}.safetensors.index.json"


def stored(folder: str | os.PathLike[str], stem: str = STEM) -> dict[str, Stored]:
    """Every tensor of a folder of safetensors by its name in the file, nothing read but headers.

    UserError for a folder without them, a pickle, a shard or tensor of the index that is missing, and
    a name that is stored twice.
    """
    folder = Path(folder)
    if folder.is_file():
        if folder.suffix in PICKLES:
            raise _pickled(folder)
        raise UserError(f"{folder} is a file: give the folder of the model, with its config.json")
    files, index = _files(folder, stem)
    out: dict[str, Stored] = {}
    for file in files:
        for name, tensor in scan(folder / file):
            if name in out:
                raise UserError(f"{folder}: the tensor {shown(name)} is stored twice")
            out[name] = tensor
    lost = [shown(name) for name in sorted(set(index) - set(out))]
    if lost:
        raise UserError(f"{folder}: {listed('tensors of the index in no shard', lost)[0]}")
    return out


def _files(folder: Path, stem: str) -> tuple[list[str], dict[str, str]]:
    """The safetensors files of a folder, and its index (name of a tensor -> file)."""
    single, path = f"{stem}.safetensors", folder / index_file(stem)
    if path.is_file():
        index = read_json(path)
        index = index.get("weight_map") if isinstance(index, dict) else None
        if not (
            isinstance(index, dict) and index and all(isinstance(f, str) for f in index.values())
        ):
            raise UserError(f"{path} has no weight_map of tensor names to files")
        for file in sorted(set(index.values())):
            if Path(file).suffix in PICKLES:
                raise _pickled(folder / file)
            if Path(file).name != file:
                raise UserError(
                    f"{folder}: the index names {file!r:.80}, which is not in the folder"
                )
            if not os.path.isfile(folder / file):  # False too for a name that no file can have
                raise UserError(
                    f"{folder}: the index names the shard {file!r:.80}, which is not there; "
                    "download it, or the whole model again"
                )
        return sorted(set(index.values())), index
    if (folder / single).is_file():
        return [single], {}
    if folder.is_dir():
        for other in sorted(folder.iterdir()):
            if other.suffix in PICKLES:
                raise _pickled(other)
    raise UserError(
        f"{folder} has neither {single} nor {path.name}: download the model or fix the path"
    )


def _pickled(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which can run any code and is never read; take the model's safetensors, "
        "or write them where you trust the file: "
        "from_pretrained(OLD).save_pretrained(NEW) of the model's class"
    )


def scan(path: Path) -> Iterator[tuple[str, Stored]]:
    """(name, place) of every tensor of one safetensors file; UserError where it is not one."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if not 0 < length <= size - 8:
                if start.startswith(_MAGIC):
                    raise _pickled(path)
                raise ValueError(f"header of {length} bytes in a file of {size}")
            if length > MAX_HEADER:
                raise ValueError(f"header of {length} bytes, the format allows {MAX_HEADER}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = [
            (name, _place(path, 8 + length, name, spec, size)) for name, spec in header.items()
        ]
        _check_apart(found)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a readable safetensors file of floats: {error}") from error
    yield from found


def _place(path: Path, base: int, name: str, spec: Any, size: int) -> Stored:
    """One entry of a header."""
    name, kind = shown(name), spec["dtype"]
    start, stop = spec["data_offsets"]
    shape = tuple(spec["shape"])
    if kind not in DTYPES:
        raise ValueError(f"tensor {name} is of dtype {kind!r:.60}, not of {', '.join(DTYPES)}")
    dtype = DTYPES[kind]
    if not all(isinstance(n, int) and n >= 0 for n in (start, stop, *shape)):
        raise ValueError(f"tensor {name} has an impossible shape or place")
    if stop - start != math.prod(shape) * dtype.itemsize or base + stop > size:
        raise ValueError(f"tensor {name} does not fit the file: is the download complete?")
    return Stored(path, base + start, dtype, shape)


def _check_apart(found: Sequence[tuple[str, Stored]]) -> None:
    """ValueError where two tensors share bytes."""
    places = sorted((t.offset, t.offset + t.nbytes, name) for name, t in found if t.nbytes)
    for (_, end, one), (start, _, other) in itertools.pairwise(places):
        if start < end:
            raise ValueError(f"the tensors {shown(one)} and {shown(other)} overlap")


# Writing ---------------------------------------------------------------------------------------------


def shards(entries: Sequence[Entry], most: int, stem: str = STEM) -> dict[str, list[Entry]]:
    """Entries by file, each file at most `most` bytes where a tensor is not larger itself."""
    groups: list[list[Entry]] = [[]]
    room = most
    for entry in entries:
        if entry.nbytes > room and groups[-1]:
            groups.append([])
            room = most
        room -= entry.nbytes
        groups[-1].append(entry)
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    total = len(groups)
    return {f"{stem}-{n + 1:05d}-of-{total:05d}.safetensors": g for n, g in enumerate(groups)}


def index_of(files: dict[str, list[Entry]]) -> dict[str, Any]:
    """The content of INDEX."""
    total = sum(entry.nbytes for group in files.values() for entry in group)
    where = {entry.name: file for file, group in files.items() for entry in group}
    return {"metadata": {"total_size": total}, "weight_map": where}


def write(path: Path, entries: Sequence[Entry]) -> None:
    """One safetensors file, tensor by tensor."""
    with open(path, "wb") as file:
        write_to(file, entries)
        file.flush()
        os.fsync(file.fileno())


def write_to(file: IO[bytes], entries: Sequence[Entry]) -> None:
    """`write` into a file that is open."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for e in entries:
        place = [at, at + e.nbytes]
        header[e.name] = {"dtype": codes[e.dtype], "shape": list(e.shape), "data_offsets": place}
        at = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    file.write(len(text).to_bytes(8, "little") + text)
    for e in entries:
        tensor = np.ascontiguousarray(e.make(), dtype=e.dtype)
        file.write(tensor.reshape(-1).view(np.uint8).data)
