"""Names of tensors: one table from the paths of our trees to the files of Hugging Face, both ways.

A line gives a path in our tree, the tensor's name in the file, and the two shapes side by side, as in
"(h i) d -> d h i": the file's axes, then ours. A tensor of a layer is a slice of our stacked leaf. The
four decoder families share their names; Qwen2-VL adds its tower. Both key spellings are read: the hub's
(`visual.*`, `model.*`) and that of transformers >= 4.52 in memory (`model.visual.*`,
`model.language_model.*`); the hub's is written.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxrepro.config import UserError
from jaxrepro.models import qwen2_vl, tensors, transformer
from jaxrepro.models.qwen2_vl import Qwen2VLConfig
from jaxrepro.models.tensors import listed
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.models.values import shown

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
ALIGN = 64  # bytes; an array that begins there is taken by jax on a CPU without another copy

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
    "layers/bo": ("model.layers.{}.self_attn.o_proj.bias", "d -> d"),
    "layers/q_norm": ("model.layers.{}.self_attn.q_norm.weight", "i -> i"),
    "layers/k_norm": ("model.layers.{}.self_attn.k_norm.weight", "i -> i"),
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


def base(cfg: Qwen2VLConfig | TransformerConfig) -> Qwen2VLConfig | TransformerConfig:
    """The config without adapters, which no file of a model holds."""
    if isinstance(cfg, Qwen2VLConfig):
        return replace(cfg, text=replace(cfg.text, lora=None))
    return replace(cfg, lora=None)


def table(cfg: Qwen2VLConfig | TransformerConfig) -> list[Line]:
    """The rename table of a model of these sizes: a `Line` per leaf of its abstract tree, adapters left out."""
    cfg = base(cfg)
    if isinstance(cfg, Qwen2VLConfig):
        tree, v = qwen2_vl.abstract(cfg), cfg.vision
        rules = {f"text/{k}": r for k, r in TEXT.items()} | {
            f"vision/{k}": r for k, r in VISION.items()
        }
        known = {"c": v.channels, "t": v.temporal, "y": v.patch, "x": v.patch}
    else:
        tree, rules, known = transformer.abstract(cfg), TEXT, {}
    return lines_of(tree, rules, known)


def lines_of(
    tree: Any, rules: Mapping[str, tuple[str, str]], known: Mapping[str, int]
) -> list[Line]:
    """A `Line` per leaf of an abstract tree; rules: path -> (name in the file, formula).

    A name with {} is of a stacked leaf, one tensor a layer. known: sizes of axes that no axis of ours has alone.
    """
    lines = []
    for path, leaf in leaves(tree):
        name, formula = rules[path]
        stacked = "{}" in name
        some = tuple(name.format(i) for i in range(leaf.shape[0])) if stacked else (name,)
        lines.append(line_of(path, some, stacked, leaf.shape[stacked:], formula, known))
    return lines


def line_of(
    path: str,
    names: tuple[str, ...],
    stacked: bool,
    shape: tuple[int, ...],
    formula: str,
    known: Mapping[str, int],
) -> Line:
    """One line; shape without the layer axis."""
    theirs, ours = (_axes(side) for side in formula.split("->"))
    size = {g[0]: n for g, n in zip(ours, shape) if len(g) == 1} | dict(known)
    letters = [a for g in theirs for a in g]
    return Line(
        path=path,
        names=names,
        stacked=stacked,
        shape=tuple(shape),
        split=tuple(size[a] for a in letters),
        order=tuple(letters.index(a) for g in ours for a in g),
        file_shape=tuple(math.prod(size[a] for a in g) for g in theirs),
    )


def account(where: Any, lines: list[Line], found: Mapping[str, tensors.Stored]) -> None:
    """UserError that lists what of a file is missing, unexpected, or of another shape than the lines want."""
    wanted = {name: line for line in lines for name in line.names}
    problems = listed("missing", [n for n in wanted if n not in found])
    problems += listed("unexpected", [shown(n) for n in found if n not in wanted])
    problems += listed(
        "wrong shape",
        [
            f"{n} is {found[n].shape}, expected {line.file_shape}"
            for n, line in wanted.items()
            if n in found and found[n].shape != line.file_shape
        ],
    )
    if problems:
        raise UserError(f"{where}: " + "; ".join(problems))


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs (path, leaf); listed layers count as one leaf each, like stacked ones."""
    if isinstance(tree, dict):
        for key in tree:
            yield from leaves(tree[key], f"{path}/{key}" if path else key)
    elif isinstance(tree, (tuple, list)):
        yield from leaves(tree[0], path)
    else:
        yield path, tree


def pick(tree: Any, path: str, layer: int | None) -> Any:
    """The tensor of a path, the slice of one layer; from stacked or from listed layers."""
    for key in path.split("/"):
        if isinstance(tree, (tuple, list)):
            tree, layer = tree[layer], None
        tree = tree[key]
    return tree if layer is None else tree[layer]


def canonical(name: str) -> str:
    """The hub's spelling of a key."""
    for prefix, hub in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(prefix):
            return hub + name[len(prefix) :]
    return name


def assemble(
    lines: list[Line],
    read: Callable[[str], np.ndarray],
    *,
    dtype: str = "float32",
    shardings: Any = None,
) -> dict[str, Any]:
    """Parameters from tensors that `read(name)` gives in the file's axes, one at a time.

    Each device's slice is copied out of what `read` returned, so that may be a mapped file; no more than
    one leaf is on the host. `shardings`: a tree like the parameters (default: the first device).
    """
    flat = dict(leaves(shardings)) if shardings is not None else {}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params: dict[str, Any] = {}
    for line in lines:
        leaf = _leaf(line, read, np.dtype(dtype), flat.get(line.path, here))
        *parents, last = line.path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return params


def _leaf(line: Line, read: Any, dtype: np.dtype, sharding: Any) -> jax.Array:
    """One leaf; devices that hold the same slice share one copy of it on the host."""
    shape = (len(line.names), *line.shape) if line.stacked else line.shape
    made: dict[tuple, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        ranges = tuple(s.indices(n) for s, n in zip(index, shape))
        if ranges in made:
            return made[ranges]
        # A copy, because an array must not outlive the file that it was mapped from.
        out = made[ranges] = _aligned([len(range(*r)) for r in ranges], dtype)
        if not line.stacked:
            out[...] = line.to_ours(read(line.names[0]))[index]
            return out
        for i, name in enumerate(line.names[index[0]]):
            out[i] = line.to_ours(read(name))[index[1:]]
        return out

    return jax.make_array_from_callback(shape, sharding, part)


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that begins at a multiple of ALIGN."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGN, np.uint8)
    start = -raw.ctypes.data % ALIGN
    return raw[start : start + size].view(dtype).reshape(shape)
