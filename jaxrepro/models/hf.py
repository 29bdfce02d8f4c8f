"""Qwen2-VL weights from and to the safetensors files of Hugging Face, by one rename table.

A line of the table gives a path in our tree, the tensor name in the file, and the two shapes side by side,
as in "(h i) d -> d h i": the file's axes, then ours. A tensor of a layer is a slice of our stacked leaf.
Reading maps the files into memory and copies the slice that each device holds, one leaf at a time, so the
host never has the model and, with `shardings`, no device has more than its part. Writing goes tensor by
tensor into a temporary folder that takes its name when it is complete.

Both key spellings are read: the hub's (`visual.*`, `model.*`) and that of transformers >= 4.52 in memory
(`model.visual.*`, `model.language_model.*`); the hub's is written. The format is small enough to live here
(eight bytes of length, a JSON header, little-endian tensors): bfloat16 and lazy slices with any version of
numpy and safetensors.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxrepro.config import UserError
from jaxrepro.files import read_json, write_json
from jaxrepro.models import qwen2_vl
from jaxrepro.models.qwen2_vl import Qwen2VLConfig

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

TEXT = {
    "embed": ("model.embed_tokens.weight", "v d -> v d"),
    "layers/attn_norm": ("model.layers.{}.input_layernorm.weight", "d -> d"),
    "layers/wq": ("model.layers.{}.self_attn.q_proj.weight", "(h i) d -> d h i"),
    "layers/wk": ("model.layers.{}.self_attn.k_proj.weight", "(h i) d -> d h i"),
    "layers/wv": ("model.layers.{}.self_attn.v_proj.weight", "(h i) d -> d h i"),
    "layers/bq": ("model.layers.{}.self_attn.q_proj.bias", "(h i) -> h i"),
    "layers/bk": ("model.layers.{}.self_attn.k_proj.bias", "(h i) -> h i"),
    "layers/bv": ("model.layers.{}.self_attn.v_proj.bias", "(h i) -> h i"),
    "layers/wo": ("model.layers.{}.self_attn.o_proj.weight", "d (h i) -> h i d"),
    "layers/mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", "d -> d"),
    "layers/gate": ("model.layers.{}.mlp.gate_proj.weight", "f d -> d f"),
    "layers/up": ("model.layers.{}.mlp.up_proj.weight", "f d -> d f"),
    "layers/down": ("model.layers.{}.mlp.down_proj.weight", "d f -> f d"),
    "norm": ("model.norm.weight", "d -> d"),
    "head": ("lm_head.weight", "v d -> d v"),
}
VISION = {
    "patch": ("visual.patch_embed.proj.weight", "d c t y x -> (c t y x) d"),
    "layers/norm1/scale": ("visual.blocks.{}.norm1.weight", "d -> d"),
    "layers/norm1/bias": ("visual.blocks.{}.norm1.bias", "d -> d"),
    "layers/qkv/kernel": ("visual.blocks.{}.attn.qkv.weight", "(n h i) d -> d n h i"),
    "layers/qkv/bias": ("visual.blocks.{}.attn.qkv.bias", "(n h i) -> n h i"),
    "layers/proj/kernel": ("visual.blocks.{}.attn.proj.weight", "d (h i) -> h i d"),
    "layers/proj/bias": ("visual.blocks.{}.attn.proj.bias", "d -> d"),
    "layers/norm2/scale": ("visual.blocks.{}.norm2.weight", "d -> d"),
    "layers/norm2/bias": ("visual.blocks.{}.norm2.bias", "d -> d"),
    "layers/fc1/kernel": ("visual.blocks.{}.mlp.fc1.weight", "f d -> d f"),
    "layers/fc1/bias": ("visual.blocks.{}.mlp.fc1.bias", "f -> f"),
    "layers/fc2/kernel": ("visual.blocks.{}.mlp.fc2.weight", "d f -> f d"),
    "layers/fc2/bias": ("visual.blocks.{}.mlp.fc2.bias", "d -> d"),
    "merger/norm/scale": ("visual.merger.ln_q.weight", "d -> d"),
    "merger/norm/bias": ("visual.merger.ln_q.bias", "d -> d"),
    "merger/fc1/kernel": ("visual.merger.mlp.0.weight", "f d -> d f"),
    "merger/fc1/bias": ("visual.merger.mlp.0.bias", "f -> f"),
    "merger/fc2/kernel": ("visual.merger.mlp.2.weight", "d f -> f d"),
    "merger/fc2/bias": ("visual.merger.mlp.2.bias", "d -> d"),
}


@dataclass(frozen=True)
class Line:
    """One leaf of our tree and its tensors in the file."""

    path: str  # "text/embed", "vision/layers/fc1/bias"
    names: tuple[str, ...]  # one file tensor, or one per layer
    stacked: bool
    shape: tuple[int, ...]  # ours, without the layer axis
    split: tuple[int, ...]  # the file's axes, groups taken apart
    order: tuple[int, ...]  # ours[k] = split[order[k]], before our own groups are merged
    file_shape: tuple[int, ...]

    def to_ours(self, file: np.ndarray) -> np.ndarray:
        """A view in our axes of a tensor as it lies in the file."""
        return file.reshape(self.split).transpose(self.order).reshape(self.shape)

    def to_file(self, ours: np.ndarray) -> np.ndarray:
        """The file's axes of one of our tensors (a layer's slice of a stacked leaf)."""
        apart = ours.reshape([self.split[k] for k in self.order])
        return apart.transpose(np.argsort(self.order)).reshape(self.file_shape)


def _axes(side: str) -> list[list[str]]:
    """Axis groups of one side of a formula: "(h i) d" -> [[h, i], [d]]."""
    groups, inside = [], False
    for token in side.replace("(", " ( ").replace(")", " ) ").split():
        if token in "()":
            inside = token == "("
            if inside:
                groups.append([])
        elif inside:
            groups[-1].append(token)
        else:
            groups.append([token])
    return groups


def table(cfg: Qwen2VLConfig) -> list[Line]:
    """The rename table of a model of these sizes: a `Line` per leaf of `qwen2_vl.abstract(cfg)`."""
    rules = {f"text/{k}": v for k, v in TEXT.items()} | {
        f"vision/{k}": v for k, v in VISION.items()
    }
    v, lines = cfg.vision, []
    for path, leaf in _leaves(qwen2_vl.abstract(cfg)):
        name, formula = rules[path]
        theirs, ours = (_axes(side) for side in formula.split("->"))
        stacked = "{}" in name
        shape = leaf.shape[1:] if stacked else leaf.shape
        size = {g[0]: n for g, n in zip(ours, shape) if len(g) == 1}
        size |= {"c": v.channels, "t": v.temporal, "y": v.patch, "x": v.patch}
        letters = [a for g in theirs for a in g]
        lines.append(
            Line(
                path=path,
                names=tuple(name.format(i) for i in range(leaf.shape[0])) if stacked else (name,),
                stacked=stacked,
                shape=tuple(shape),
                split=tuple(size[a] for a in letters),
                order=tuple(letters.index(a) for g in ours for a in g),
                file_shape=tuple(math.prod(size[a] for a in g) for g in theirs),
            )
        )
    return lines


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs (path, leaf); listed layers count as one leaf each, like stacked ones."""
    if isinstance(tree, dict):
        for key in tree:
            yield from _leaves(tree[key], f"{path}/{key}" if path else key)
    elif isinstance(tree, (tuple, list)):
        yield from _leaves(tree[0], path)
    else:
        yield path, tree


# Reading ---------------------------------------------------------------------------------------------


def read_config(folder: str | os.PathLike[str], **overrides: Any) -> Qwen2VLConfig:
    """Configuration in a folder's config.json; `overrides` as in `Qwen2VLConfig.from_hf`."""
    path = Path(folder) / "config.json"
    return Qwen2VLConfig.from_hf(read_json(path), **overrides)


def load(
    folder: str | os.PathLike[str],
    cfg: Qwen2VLConfig,
    *,
    dtype: str = "float32",
    shardings: Any = None,
) -> dict[str, Any]:
    """Parameters of a folder of safetensors, stacked layers, in `dtype`.

    `shardings`: a tree like the parameters; each device then reads its slice. UserError lists missing
    and unexpected keys and wrong shapes; a tied head stored beside its embedding must equal it.
    """
    tensors = _open(Path(folder))
    lines = table(cfg)
    wanted = {name: line for line in lines for name in line.names}
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if cfg.text.tied and head is not None and embedding is not None:
        if head.shape != embedding.shape or not np.array_equal(head, embedding):
            raise UserError(
                f"{folder}: tied is True, but lm_head.weight differs from the embedding"
            )
        del tensors["lm_head.weight"]
    problems = _listed("missing", [n for n in wanted if n not in tensors])
    problems += _listed("unexpected", [n for n in tensors if n not in wanted])
    problems += _listed(
        "wrong shape",
        [
            f"{n} is {tensors[n].shape}, expected {line.file_shape}"
            for n, line in wanted.items()
            if n in tensors and tensors[n].shape != line.file_shape
        ],
    )
    if problems:
        raise UserError(f"{folder}: " + "; ".join(problems))

    flat = dict(_leaves(shardings)) if shardings is not None else {}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params: dict[str, Any] = {}
    for line in lines:
        leaf = _place(line, tensors, np.dtype(dtype), flat.get(line.path, here))
        *parents, last = line.path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return params


def _place(line: Line, tensors: dict[str, np.ndarray], dtype: np.dtype, sharding: Any) -> jax.Array:
    """One leaf, each device's slice copied from the file."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        # np.array copies: an array must not outlive the file that it was mapped from.
        if not line.stacked:
            return np.array(line.to_ours(tensors[line.names[0]])[index], dtype, order="C")
        picked = line.names[index[0]]
        first = line.to_ours(tensors[picked[0]])[index[1:]]
        out = np.empty((len(picked), *first.shape), dtype)
        for i, name in enumerate(picked):
            out[i] = line.to_ours(tensors[name])[index[1:]]
        return out

    shape = (len(line.names), *line.shape) if line.stacked else line.shape
    return jax.make_array_from_callback(shape, sharding, part)


def _listed(what: str, names: list[str], most: int = 20) -> list[str]:
    """[] or one phrase that names the first `most` and counts the rest."""
    if not names:
        return []
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{len(names)} {what}: {', '.join(names[:most])}{rest}"]


def _canonical(name: str) -> str:
    """The hub's spelling of a key."""
    for prefix, hub in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(prefix):
            return hub + name[len(prefix) :]
    return name


def _open(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder by their hub names, mapped, not read."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map", {})
        files = sorted(set(index.values()))
    elif (folder / SINGLE).is_file():
        index, files = None, [SINGLE]
    else:
        raise UserError(
            f"{folder} has neither {SINGLE} nor {INDEX}: download the model or fix the path"
        )
    out: dict[str, np.ndarray] = {}
    stored: set[str] = set()
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{folder}: the index names the shard {file!r}, which is not there")
        for name, tensor in _map(folder / file):
            stored.add(name)
            hub = _canonical(name)
            if hub.endswith("rotary_emb.inv_freq"):  # a constant that old writers stored
                continue
            if hub in out:
                raise UserError(f"{folder}: the tensor {hub} is stored twice")
            out[hub] = tensor
    if index is not None and set(index) - stored:
        lost = _listed("tensors of the index in no shard", sorted(set(index) - stored))
        raise UserError(f"{folder}: {lost[0]}")
    return out


def _map(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, memory-mapped tensor) of one safetensors file."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        base = 8 + length
        for name, spec in header.items():
            start, stop = spec["data_offsets"]
            dtype, shape = DTYPES[spec["dtype"]], tuple(spec["shape"])
            if stop - start != math.prod(shape) * dtype.itemsize or base + stop > size:
                raise ValueError(f"tensor {name} does not fit the file: is the download complete?")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a readable safetensors file of floats: {error}") from error
    for name, spec in header.items():
        dtype, shape = DTYPES[spec["dtype"]], tuple(spec["shape"])
        offset = base + spec["data_offsets"][0]
        if math.prod(shape) == 0:
            yield name, np.zeros(shape, dtype)
            continue
        raw = np.memmap(path, np.uint8, "r", offset, (math.prod(shape) * dtype.itemsize,))
        yield name, raw.view(np.ndarray).view(dtype).reshape(shape)


# Writing ---------------------------------------------------------------------------------------------


def save(
    folder: str | os.PathLike[str],
    params: dict[str, Any],
    cfg: Qwen2VLConfig,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that `Qwen2VLForConditionalGeneration.from_pretrained` loads: weights and config.json.

    `dtype` None keeps that of the parameters. Layers may be stacked or listed. UserError if the folder
    has content, or if the tree is not that of `cfg`.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists: choose a new folder or remove it")
    lines = table(cfg)
    have, want = {p for p, _ in _leaves(params)}, {line.path for line in lines}
    problems = _listed("missing from the tree", sorted(want - have))
    problems += _listed("unknown to the format", sorted(have - want))
    if problems:
        raise UserError(f"cannot export: {'; '.join(problems)}")

    shards: list[list[tuple[str, Line, int | None, np.dtype]]] = [[]]
    room = max_shard_bytes
    for line in lines:
        for i, name in enumerate(line.names):
            leaf = _pick(params, line.path, i if line.stacked else None)
            if leaf.shape != line.shape:
                raise UserError(
                    f"cannot export {line.path}: shape {leaf.shape}, cfg says {line.shape}"
                )
            kind = np.dtype(leaf.dtype if dtype is None else dtype)
            if kind not in DTYPES.values():
                raise UserError(
                    f"cannot export {line.path} as {kind}; choose float32, bfloat16 or float16"
                )
            nbytes = math.prod(line.shape) * kind.itemsize
            if nbytes > room and shards[-1]:
                shards.append([])
                room = max_shard_bytes
            room -= nbytes
            shards[-1].append((name, line, i if line.stacked else None, kind))

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        weight_map, total = {}, 0
        for n, shard in enumerate(shards):
            file = (
                SINGLE
                if len(shards) == 1
                else f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors"
            )
            total += _write(temporary / file, shard, params)
            weight_map |= {name: file for name, *_ in shard}
        if len(shards) > 1:
            write_json(
                temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
        first = shards[0][0][3].name
        write_json(temporary / "config.json", qwen2_vl.to_hf(cfg, dtype=first))
        write_json(
            temporary / "generation_config.json",
            {"eos_token_id": [cfg.eos, cfg.pad], "pad_token_id": cfg.pad, "bos_token_id": cfg.pad},
        )
        temporary.chmod(0o755)  # mkdtemp makes a private folder
        os.replace(temporary, folder)  # takes the place of an empty folder
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _pick(tree: Any, path: str, layer: int | None) -> Any:
    """The tensor of a path, the slice of one layer; from stacked or from listed layers."""
    for key in path.split("/"):
        if isinstance(tree, (tuple, list)):
            tree, layer = tree[layer], None
        tree = tree[key]
    return tree if layer is None else tree[layer]


def _write(path: Path, shard: list[tuple[str, Line, int | None, np.dtype]], params: Any) -> int:
    """One safetensors file, tensor by tensor; returns the bytes of its tensors."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, line, _, kind in shard:
        stop = at + math.prod(line.file_shape) * kind.itemsize
        header[name] = {
            "dtype": codes[kind],
            "shape": list(line.file_shape),
            "data_offsets": [at, stop],
        }
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, line, layer, kind in shard:
            tensor = line.to_file(np.asarray(_pick(params, line.path, layer)))
            file.write(np.ascontiguousarray(tensor, dtype=kind).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    return at
