"""Latents and prompts that were encoded beforehand, in a folder of safetensors with an index.

    index.json           {"format": "latents", "version": 1, "model", "normalised", "packed",
                          "items": [{"id", "file", "length"}, ...]}
    <file>.safetensors   <id>.latents (c, f, h, w), <id>.text (t, d), and for HunyuanVideo <id>.pooled (768,)

To sample for, prompts are enough: a folder none of whose items has latents.

`length` counts the valid rows of text, which come first; what follows them is read as zeros. `packed` is the
convention of HunyuanVideo's public sets of latents: row 0 of the text holds the pooled CLIP vector in its first
768 numbers, the LLaMA states are rows 1 on, and `length` counts these alone (that no row 0 is counted is inferred,
unverified). Numbers are F32, F16, BF16 or F64 in the files and float32 here.

`normalised` says whether latents already have the scale that the model is trained on. Those that a VAE gave do not:

    HunyuanVideo   z = 0.476986 x                    Wan 2.1   z = (x - mean_c) / std_c

(the config.json of the public VAEs). A model for F frames reads the last F of longer latents, as VORTA
(arXiv:2505.18809) trains its routers. What is wrong in a folder is one line that names the file and the item.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxrepro.config import UserError
from jaxrepro.files import read_json, write_json
from jaxrepro.models import hf, tensors
from jaxrepro.models.values import shown

INDEX, FORMAT, VERSION = "index.json", "latents", 1
MODELS = ("hunyuan", "wan", "other")  # other: latents as they are
CHANNELS = {"hunyuan": 16, "wan": 16}
SLOTS = {"hunyuan": 256, "wan": 512}  # text tokens that the model takes
TEXT, POOLED = 4096, 768  # width of the texts of both models; of HunyuanVideo's pooled text
HUNYUAN_SCALE = 0.476986
WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
WAN_MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
WAN_STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

Latent = Float[Any, "*b c f h w"]


def normalise(latents: Latent, model: str) -> Latent:
    """Latents of a VAE at the scale of the diffusion model."""
    mean, std = _constants(model, latents.shape)
    return (latents - mean) / std


def denormalise(latents: Latent, model: str) -> Latent:
    """Latents of a diffusion model as the VAE decodes them."""
    mean, std = _constants(model, latents.shape)
    return latents * std + mean


def _constants(model, shape):
    if model not in MODELS:
        raise UserError(f"model {model!r:.60} is unknown: one of {', '.join(MODELS)}")
    wanted = CHANNELS.get(model, shape[-4])
    if shape[-4] != wanted:
        raise UserError(f"latents have {shape[-4]} channels, those of {model} have {wanted}")
    if model == "wan":
        return tuple(np.reshape(x, (-1, 1, 1, 1)).astype(np.float32) for x in (WAN_MEAN, WAN_STD))
    return np.float32(0), np.float32(1 / HUNYUAN_SCALE if model == "hunyuan" else 1)


# Reading -----------------------------------------------------------------------------------------------


class Latents:
    """A folder as a sequence of items; item i is read when it is asked for, `latents[i]`.

    frames: latent frames of each item, its last ones (None: all, which must then be equally many).
    slots: text tokens of each item, filled up with zeros (None: what the model takes, of `other` the longest text).
    shape: (c, f, h, w) of each item; None where the folder holds prompts alone. width: of the texts. pooled: numbers of
    the pooled text, 0 where not every item has one.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, frames: int | None = None, slots: int | None = None
    ):
        self.folder = Path(folder)
        self._where = self.folder / INDEX
        index = read_json(self._where)
        self.model, self.normalised, self.packed, self._items = _read_index(self._where, index)
        self.slots = SLOTS.get(self.model) if slots is None else slots
        if frames is not None and frames < 1:
            raise UserError(f"frames is {frames}; it must be 1 or more")
        self._stored = self._scan()
        self.shape = self._shape(frames)
        self.width = self._width("text", -1)
        self.pooled = POOLED if self.packed else self._width("pooled", 0)
        if self.slots is None:
            self.slots = max(i["length"] for i in self._items)
        for item in self._items:
            if item["length"] > self.slots:
                raise self._wrong(item, f"{item['length']} text tokens, the limit is {self.slots}")

    def __len__(self) -> int:
        return len(self._items)

    @property
    def ids(self) -> list[str]:
        """The items' names, in order."""
        return [item["id"] for item in self._items]

    def __getitem__(self, i: int) -> dict[str, Any]:
        """id, text (slots, d), length; latents (c, f, h, w) and pooled (768,) where the folder has them. float32."""
        item = self._items[i]
        text = self._read(item, "text")
        length, pooled = item["length"], None
        if self.packed:
            pooled, text = unpack(text)
        elif self.pooled:
            pooled = self._read(item, "pooled")
        states = np.zeros((self.slots, text.shape[1]), np.float32)
        states[:length] = text[:length]
        found = {"id": item["id"], "text": states, "length": length}
        if self.shape is not None:
            x = self._read(item, "latents")[:, -self.shape[1] :]
            found["latents"] = x if self.normalised else normalise(x, self.model)
        return found if pooled is None else found | {"pooled": pooled}

    def arrays(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Items as a batch: text (b, slots, d), length (b,) int32, and latents (b, c, f, h, w), pooled (b, 768)."""
        items = [self[i] for i in rows]
        batch = {name: np.stack([x[name] for x in items]) for name in items[0] if name != "id"}
        return batch | {"length": batch["length"].astype(np.int32)}

    def _scan(self):
        """Name -> place, of every tensor that the index needs; shapes are checked, nothing is read."""
        stored: dict[str, tensors.Stored] = {}
        for file in sorted({item["file"] for item in self._items}):
            if not (self.folder / file).is_file():
                raise UserError(f"{self._where} names {shown(file)}, which is not in the folder")
            for name, place in tensors.scan(self.folder / file):
                if name in stored:
                    raise UserError(f"{self.folder}: the tensor {shown(name)} is stored twice")
                stored[name] = place
        self._prompts = not any(f"{item['id']}.latents" in stored for item in self._items)
        for item in self._items:
            self._check(item, stored)
        return stored

    def _check(self, item, stored):
        wanted = {"text": 2} if self._prompts else {"latents": 4, "text": 2}
        needed = self.model == "hunyuan" and not self.packed
        if needed or f"{item['id']}.pooled" in stored:
            wanted["pooled"] = 1
        for field, rank in wanted.items():
            place = stored.get(f"{item['id']}.{field}")
            if place is None:
                raise self._wrong(item, f"it has no {field}")
            if place.path.name != item["file"]:
                raise self._wrong(item, f"its {field} lies in {place.path.name}")
            if len(place.shape) != rank or not math.prod(place.shape):
                raise self._wrong(item, f"{field} of shape {place.shape}, {rank} axes are needed")
        rows, width = stored[f"{item['id']}.text"].shape
        if item["length"] > rows - self.packed:
            raise self._wrong(
                item, f"length {item['length']}, but {rows - self.packed} text states"
            )
        if self.packed and width < POOLED:
            raise self._wrong(
                item, f"text {width} wide, too narrow for {POOLED} of the pooled text"
            )
        if needed and stored[f"{item['id']}.pooled"].shape != (POOLED,):
            raise self._wrong(item, f"pooled must be of shape ({POOLED},)")

    def _shape(self, frames):
        """(c, f, h, w) of every item; None without latents."""
        if self._prompts:
            return None
        shapes = {i["id"]: self._stored[f"{i['id']}.latents"].shape for i in self._items}
        first = shapes[self._items[0]["id"]]
        f = first[1] if frames is None else frames
        for item in self._items:
            c, have, h, w = shapes[item["id"]]
            same = frames is not None or have == f
            if (c, h, w) != (first[0], *first[2:]) or not same:
                raise self._wrong(item, f"latents {shapes[item['id']]}, the first item has {first}")
            if have < f:
                raise self._wrong(item, f"{have} latent frames, {f} are asked for; lower frames")
        _constants(self.model, first)
        return (first[0], f, *first[2:])

    def _width(self, field, axis):
        """Size of a field's axis, equal in all items; 0 where an item has no such field."""
        places = [self._stored.get(f"{item['id']}.{field}") for item in self._items]
        widths = {place.shape[axis] if place else 0 for place in places}
        if len(widths - {0}) > 1:
            raise UserError(f"{self.folder}: {field} is {sorted(widths)} wide; it must be equal")
        return min(widths)

    def _read(self, item, field):
        x = np.array(self._stored[f"{item['id']}.{field}"].map()).astype(np.float32)
        if not np.isfinite(x).all():
            raise self._wrong(item, f"{field} holds numbers that are not finite")
        return x

    def _wrong(self, item, what):
        return UserError(f"{self.folder / item['file']}, item {shown(item['id'])}: {what}")


def _read_index(path, index):
    """model, normalised, packed and items of an index.json."""
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f'{path}: no index of latents, its "format" is not "{FORMAT}"')
    if index.get("version") != VERSION:
        raise UserError(f"{path}: version {index.get('version')!r:.20} is not {VERSION}")
    if index.get("model") not in MODELS:
        raise UserError(f'{path}: "model" must be one of {", ".join(MODELS)}')
    for name in ("normalised", "packed"):
        if not isinstance(index.get(name), bool):
            raise UserError(f'{path}: "{name}" must be true or false')
    items = index.get("items")
    if not isinstance(items, list) or not items:
        raise UserError(f'{path}: "items" must be a list of at least one item')
    for n, item in enumerate(items):
        if not isinstance(item, dict) or set(item) != {"id", "file", "length"}:
            raise UserError(f"{path}: item {n} must have exactly id, file and length")
        if not all(isinstance(item[k], str) and item[k] for k in ("id", "file")):
            raise UserError(f"{path}: id and file of item {n} must be texts")
        if Path(item["file"]).name != item["file"]:
            raise UserError(
                f"{path}: item {n} names a file outside the folder, {shown(item['file'])}"
            )
        if type(item["length"]) is not int or item["length"] < 0:
            raise UserError(f"{path}: length of item {n} must be a whole number, 0 or more")
    ids = [item["id"] for item in items]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise UserError(f"{path}: the id {shown(twice)} is there twice")
    return index["model"], index["normalised"], index["packed"], items


def dataset(
    source: Latents, *, batch: int, seed: int | None = None, part: tuple[int, int] = (0, 1)
) -> Any:
    """grain MapDataset of `batches.Batch`: dataset[step] for any step, with `Latents.arrays` of its rows.

    part: (process, processes). A process reads its own rows of the batch, one block of batch / processes, and
    gets the ids of the whole batch; the parts joined are the batch of one process. With a seed each epoch is
    shuffled anew.
    """
    from jaxrepro.data import batches

    process, processes = part
    if processes < 1 or not 0 <= process < processes or batch % processes:
        raise UserError(
            f"a batch of {batch} does not divide over {processes} processes, of which this is {process}; "
            "take a multiple"
        )
    mine = slice(process * (batch // processes), (process + 1) * (batch // processes))
    rows = [{"id": name, "row": i} for i, name in enumerate(source.ids)]
    read = lambda examples: source.arrays([e["row"] for e in examples[mine]])
    return batches.dataset(rows, read, batch=batch, seed=seed)


# Text of HunyuanVideo ----------------------------------------------------------------------------------


def unpack(
    text: Float[np.ndarray, "rows d"],
) -> tuple[Float[np.ndarray, "p"], Float[np.ndarray, "t d"]]:
    """Pooled CLIP vector (768,) and LLaMA states (rows - 1, d) of a packed text."""
    return text[0, :POOLED], text[1:]


def pack(
    pooled: Float[np.ndarray, "p"], text: Float[np.ndarray, "t d"]
) -> Float[np.ndarray, "rows d"]:
    """The inverse of `unpack`; the rest of row 0 is zeros."""
    if pooled.shape != (POOLED,) or text.shape[1] < POOLED:
        raise UserError(
            f"pooled {pooled.shape} and text {text.shape}: ({POOLED},) and a width of at least {POOLED} are needed"
        )
    return np.concatenate([np.pad(pooled, (0, text.shape[1] - POOLED))[None], text])


# Writing -----------------------------------------------------------------------------------------------


def write(
    folder: str | os.PathLike[str],
    examples: Iterable[Mapping[str, Any]],
    *,
    model: str,
    normalised: bool,
    packed: bool = False,
    max_shard_bytes: int = 1_000_000_000,
) -> int:
    """Write a new folder that `Latents` reads, a shard at a time; the number of items.

    An example has id, text (t, d), latents (c, f, h, w) unless all are prompts alone, and pooled (768,) for
    HunyuanVideo unless its text is packed; numpy arrays of floats, kept as they are. Of `length` or `mask` (t,) it has
    one: how much text is valid (neither: all). The models read a prefix, so a mask with a hole is refused. Where it
    fails nothing is left.
    """
    if model not in MODELS:
        raise UserError(f"model {model!r:.60} is unknown: one of {', '.join(MODELS)}")
    folder, items, shard = Path(folder), [], []
    with hf.new_folder(folder) as temporary:

        def close():
            tensors.write(temporary / items[-1]["file"], shard)
            shard.clear()

        files, prompts = 0, False
        for n, example in enumerate(examples):
            prompts = "latents" not in example if n == 0 else prompts
            entries = _entries(example, n, model, packed, prompts)
            if shard and sum(e.nbytes for e in shard + entries) > max_shard_bytes:
                close()
                files += 1
            shard += entries
            name = f"{FORMAT}-{files:05d}.safetensors"
            items.append({"id": example["id"], "file": name, "length": _length(example, n, packed)})
        if not items:
            raise UserError(f"there are no examples to write to {folder}")
        close()
        head = {"format": FORMAT, "version": VERSION, "model": model}
        head |= {"normalised": normalised, "packed": packed}
        write_json(temporary / INDEX, head | {"items": items})
        Latents(
            temporary, frames=1, slots=max(i["length"] for i in items)
        )  # refuses what it could not read
    return len(items)


def _entries(example, n, model, packed, prompts):
    """The tensors of one example."""
    if prompts and "latents" in example:
        raise UserError(f"example {n} has latents, the first has none; give them to all or to none")
    fields = ("text",) if prompts else ("latents", "text")
    fields += ("pooled",) if model == "hunyuan" and not packed else ()
    missing = [name for name in ("id", *fields) if name not in example]
    if missing:
        raise UserError(f"example {n} has no {missing[0]}; it needs id, {', '.join(fields)}")
    entries = []
    for field in fields:
        x = np.asarray(example[field])
        if x.dtype not in tensors.DTYPES.values():
            raise UserError(
                f"example {n}: {field} is {x.dtype}, not of {', '.join(tensors.DTYPES)}"
            )
        entries.append(tensors.Entry(f"{example['id']}.{field}", x.dtype, x.shape, lambda x=x: x))
    return entries


def _length(example, n, packed):
    """How many text states of an example are valid."""
    rows = len(example["text"]) - packed
    if "mask" not in example:
        return int(example.get("length", rows))
    mask = np.asarray(example["mask"])
    length = int(mask.astype(bool).sum())
    if mask.shape != (rows,) or not mask[:length].all():
        raise UserError(
            f"example {n}: its mask must be ({rows},), true at the start and false after that"
        )
    return length
