"""Decoder weights from GGUF files: Llama (also Mistral, SmolLM2), Qwen2 and Qwen3, quantised or not.

A GGUF file is one header (magic, counts, metadata, a table of tensors) and the tensors' bytes. The header
is read here with every length checked against the file, so that a damaged count is an error and not an
endless loop; the package `gguf` knows the quantised formats and turns their blocks into float32. Tensors
are read one by one, each device gets its slice: the host holds one leaf beside what is already placed.

Rows of q and k of a Llama file are interleaved for RoPE on adjacent channels, ours rotates halves:

    ours[h, p * I/2 + c] = file[h, 2 c + p],    p in {0, 1}, c < I/2        (Qwen files keep halves)

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrepro.config import UserError
from jaxrepro.models import names, transformer
from jaxrepro.models.tensors import listed
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.models.values import LARGE, LONGEST, TINY, shown

SUFFIX = ".gguf"
VERSIONS = (2, 3)
# Whether the rows of q and k are interleaved.
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}
SCALED = "rope_freqs.weight"  # Llama 3's scaled RoPE, which the header does not describe
NAMES = {
    "embed": "token_embd.weight",
    "layers/attn_norm": "blk.{}.attn_norm.weight",
    "layers/wq": "blk.{}.attn_q.weight",
    "layers/wk": "blk.{}.attn_k.weight",
    "layers/wv": "blk.{}.attn_v.weight",
    "layers/bq": "blk.{}.attn_q.bias",
    "layers/bk": "blk.{}.attn_k.bias",
    "layers/bv": "blk.{}.attn_v.bias",
    "layers/wo": "blk.{}.attn_output.weight",
    "layers/q_norm": "blk.{}.attn_q_norm.weight",
    "layers/k_norm": "blk.{}.attn_k_norm.weight",
    "layers/mlp_norm": "blk.{}.ffn_norm.weight",
    "layers/gate": "blk.{}.ffn_gate.weight",
    "layers/up": "blk.{}.ffn_up.weight",
    "layers/down": "blk.{}.ffn_down.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
}


class Stored(NamedTuple):
    """Where a tensor lies in the file."""

    kind: int  # a GGMLQuantizationType
    shape: tuple[int, ...]  # slowest axis first, as numpy counts
    offset: int  # bytes from the start of the file
    size: int  # bytes


@dataclass(frozen=True)
class File:
    """The header of a GGUF file."""

    path: Path
    metadata: dict[str, Any]  # numbers, strings, bools, lists of strings, arrays of numbers
    tensors: dict[str, Stored]

    @property
    def architecture(self) -> str:
        """What the file calls its model: "llama", "qwen2", ..."""
        return str(self.metadata.get("general.architecture"))


# The header ------------------------------------------------------------------------------------

_SCALARS = dict(
    enumerate(["B", "b", "H", "h", "I", "i", "f", "?", "-", "-", "Q", "q", "d"])
)  # struct codes by value type
_STRING, _ARRAY = 8, 9


class _Cursor:
    """Bounded reads from a buffer; ValueError where it ends too early."""

    def __init__(self, data: Any):
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise ValueError(f"it ends within its header: {n} bytes wanted at byte {self.at}")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        # A token may hold a part of a character; such bytes survive as surrogates.
        return self.take(self.number("Q")).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, n = self.number("I"), self.number("Q")
            if inner == _STRING:
                return [self.string() for _ in range(n)]
            code = self._code(inner)
            return np.frombuffer(self.take(n * struct.calcsize("<" + code)), "<" + code)
        return self.number(self._code(kind))

    def _code(self, kind: int) -> str:
        code = _SCALARS.get(kind, "-")
        if code == "-":
            raise ValueError(f"metadata of type {kind} is unknown")
        return code


def open_file(path: str | os.PathLike[str]) -> File:
    """The header of a GGUF file; UserError where it is not one, or is not whole."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ValueError("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(path, data)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} is not a readable GGUF file: {error}") from error


def _header(path: Path, data: Any) -> File:
    cursor = _Cursor(data)
    if cursor.take(min(4, len(data))) != b"GGUF":
        raise ValueError("its first four bytes are not GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(f"version {version}; this reads {VERSIONS} in little-endian order")
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    found = {}
    for _ in range(tensors):
        name, axes = cursor.string(), cursor.number("I")
        if axes > 8:
            raise ValueError(f"tensor {name[:64]!r} has {axes} axes")
        shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
        kind, offset = cursor.number("I"), cursor.number("Q")
        if name in found:
            raise ValueError(f"the tensor {name[:64]!r} is stored twice")
        found[name] = Stored(kind, shape, offset, _bytes(name, kind, shape))
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1:
        raise ValueError(f"general.alignment is {align!r:.40}")
    base = -(-cursor.at // align) * align
    for name, stored in found.items():
        end = base + stored.offset + stored.size
        if end > len(data):
            raise ValueError(
                f"tensor {name[:64]!r} ends at byte {end} of {len(data)}: is the download complete?"
            )
        found[name] = stored._replace(offset=base + stored.offset)
    return File(path, metadata, found)


def _bytes(name: str, kind: int, shape: tuple[int, ...]) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise ValueError(
            f"tensor {name[:64]!r} has the unknown type {kind}; a newer gguf may know it"
        ) from None
    if shape and shape[-1] % block:
        raise ValueError(f"tensor {name[:64]!r}: rows of {shape[-1]} are no multiple of {block}")
    return math.prod(shape) // block * size


# The model -------------------------------------------------------------------------------------


def read_config(source: str | os.PathLike[str] | File, **overrides: Any) -> TransformerConfig:
    """Shape of the decoder in a GGUF file; `overrides` are fields of TransformerConfig."""
    file = source if isinstance(source, File) else open_file(source)
    kind, known = file.architecture, file.metadata
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{file.path}: architecture {kind!r} is not supported: one of {', '.join(ARCHITECTURES)}"
        )

    def number(key: str, default: Any = None, *, least: int | float = TINY) -> int | float:
        return get(key, default, (int, float), least, LARGE)

    def size(key: str, default: Any = None, *, least: int = 1) -> int:
        return get(key, default, (int,), least, LONGEST)

    def get(key: str, default: Any, types: tuple, least: int | float, most: int | float) -> Any:
        value = known.get(f"{kind}.{key}", default)
        if value is None:
            raise UserError(f"{file.path} has no {kind}.{key}: it is not a whole model")
        if type(value) not in types or not least <= value <= most:
            raise UserError(
                f"{file.path}: {kind}.{key} is {shown(repr(value))}; it must be one "
                f"{types[-1].__name__} from {least} to {most}, the same for all layers"
            )
        return value

    scaling = str(known.get(f"{kind}.rope.scaling.type", "none"))
    if scaling != "none" or SCALED in file.tensors:
        what = shown(scaling) if scaling != "none" else SCALED
        raise UserError(
            f"{file.path}: scaled RoPE ({what}) is not read from GGUF; take the safetensors"
        )
    for key in ("rope.scale_linear", "rope.scaling.factor"):
        if number(key, 1, least=0) not in (0, 1):  # 0 is 1
            raise UserError(
                f"{file.path}: {kind}.{key} stretches RoPE, which is not read from GGUF"
            )
    if str(known.get(f"{kind}.expert_count", 0)) != "0":
        raise UserError(f"{file.path}: a mixture of experts is not supported")
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        if name not in file.tensors:
            raise UserError(f"{file.path} has no tensor {name}: it is not a whole model")
    table = file.tensors["token_embd.weight"].shape
    if len(table) != 2 or 0 in table:
        raise UserError(
            f"{file.path}: token_embd.weight is {table}; it must be (vocabulary, width)"
        )
    d, heads, layers = size("embedding_length"), size("attention.head_count"), size("block_count")
    if layers > len(file.tensors):
        raise UserError(
            f"{file.path}: {kind}.block_count is {layers}, but there are {len(file.tensors)} tensors: "
            "it is not a whole model"
        )
    head_dim = size("attention.key_length", d // heads)
    if (turned := size("rope.dimension_count", head_dim)) != head_dim:
        raise UserError(
            f"{file.path}: {kind}.rope.dimension_count is {turned}; RoPE of a part of the head's "
            f"{head_dim} channels is not supported"
        )
    window = size("attention.sliding_window", 0, least=0)
    if window and kind != "llama":
        raise UserError(
            f"{file.path}: {kind}.attention.sliding_window is {window}, but which layers have it is not "
            "in the file; take the safetensors"
        )
    fields = {
        "vocab": table[0],
        "d": d,
        "layers": layers,
        "heads": heads,
        "kv": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "ffn": size("feed_forward_length"),
        "rope_theta": float(number("rope.freq_base", 1e4, least=1)),
        "eps": float(np.float32(number("attention.layer_norm_rms_epsilon")).astype(str)),
        "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
        "window": window or None,  # a Mistral's, in all layers
        "tied": "output.weight" not in file.tensors,
        "max_positions": size("context_length", 32768),
    }
    return TransformerConfig(**(fields | overrides))


def load(
    source: str | os.PathLike[str] | File,
    cfg: TransformerConfig | None = None,
    *,
    dtype: str = "float32",
    shardings: Any = None,
) -> dict[str, Any]:
    """Parameters of a GGUF file, stacked layers, in `dtype`.

    `cfg` None takes that of the file. `shardings`: a tree like the parameters; each device gets its
    slice. UserError lists missing and unexpected tensors and wrong shapes.
    """
    file = source if isinstance(source, File) else open_file(source)
    cfg = read_config(file) if cfg is None else cfg
    leaves = dict(names.leaves(transformer.abstract(cfg)))
    if foreign := [path for path in leaves if path not in NAMES]:
        raise UserError(f"{file.path}: GGUF has no tensor for {', '.join(foreign)}")
    shape_of = {path: _file_shape(path, cfg) for path in leaves}
    wanted = {name: shape_of[path] for path in leaves for name in _names(path, cfg)}
    problems = listed("missing", [n for n in wanted if n not in file.tensors])
    problems += listed("unexpected", [shown(n) for n in file.tensors if n not in wanted])
    problems += listed(
        "wrong shape",
        [
            f"{n} is {file.tensors[n].shape}, expected {shape}"
            for n, shape in wanted.items()
            if n in file.tensors and file.tensors[n].shape != shape
        ],
    )
    if problems:
        raise UserError(f"{file.path}: " + "; ".join(problems))

    places = dict(names.leaves(shardings)) if shardings is not None else {}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params: dict[str, Any] = {}
    # The largest first: while it is on its way there is nothing else yet.
    with open(file.path, "rb") as raw:
        for path in sorted(leaves, key=lambda p: -math.prod(leaves[p].shape)):
            turn = _turn(path, cfg, ARCHITECTURES[file.architecture])
            read = lambda name, turn=turn: turn(_read(raw, name, file.tensors[name]))
            leaf = _place(
                leaves[path].shape,
                [lambda name=name, read=read: read(name) for name in _names(path, cfg)],
                stacked=path.startswith("layers/"),
                dtype=np.dtype(dtype),
                sharding=places.get(path, here),
            )
            *parents, last = path.split("/")
            node = params
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = leaf
    return params


def _read(raw: Any, name: str, stored: Stored) -> np.ndarray:
    """One tensor as float32, in the file's axes."""
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(stored.kind)
    raw.seek(stored.offset)
    data = np.fromfile(raw, np.uint8, stored.size)
    if data.size != stored.size:
        raise UserError(f"{raw.name}: {name} could not be read whole; the file has changed")
    try:
        values = dequantize(data.reshape(*stored.shape[:-1], -1), kind)
    except NotImplementedError:
        raise UserError(f"{raw.name}: {name} is stored as {kind.name}, which is no float") from None
    return values.reshape(stored.shape)


def _place(
    shape: tuple[int, ...],
    read: list[Callable[[], np.ndarray]],
    *,
    stacked: bool,
    dtype: np.dtype,
    sharding: Any,
) -> jax.Array:
    """One leaf from its tensors (one a layer where stacked), each read once for all devices."""
    span = lambda index: tuple(s.indices(n)[:2] for s, n in zip(index, shape))
    wanted = {span(index) for index in sharding.addressable_devices_indices_map(shape).values()}
    parts: dict[Any, np.ndarray] = {}  # an index and its slice
    if stacked:
        parts = {w: np.empty([b - a for a, b in w], dtype) for w in wanted}
        for layer, one in enumerate(read):
            holders = [w for w in wanted if w[0][0] <= layer < w[0][1]]
            values = one() if holders else None
            for w in holders:
                parts[w][layer - w[0][0]] = values[tuple(slice(*s) for s in w[1:])]
    else:
        values = read[0]()
        for w in wanted:
            part = values[tuple(slice(*s) for s in w)]
            parts[w] = np.ascontiguousarray(part, dtype)
        del values
    return jax.make_array_from_callback(shape, sharding, lambda index: parts[span(index)])


def _names(path: str, cfg: TransformerConfig) -> list[str]:
    """The tensors of one of our leaves: one, or one a layer."""
    name = NAMES[path]
    return [name.format(i) for i in range(cfg.layers)] if "{}" in name else [name]


def _file_shape(path: str, cfg: TransformerConfig) -> tuple[int, ...]:
    """Shape of a tensor in the file: (outputs, inputs), heads not taken apart."""
    q, k = cfg.heads * cfg.head_dim, cfg.kv * cfg.head_dim
    return {
        "embed": (cfg.vocab, cfg.d),
        "head": (cfg.vocab, cfg.d),
        "wq": (q, cfg.d),
        "wk": (k, cfg.d),
        "wv": (k, cfg.d),
        "bq": (q,),
        "bk": (k,),
        "bv": (k,),
        "q_norm": (cfg.head_dim,),
        "k_norm": (cfg.head_dim,),
        "wo": (cfg.d, q),
        "gate": (cfg.ffn, cfg.d),
        "up": (cfg.ffn, cfg.d),
        "down": (cfg.d, cfg.ffn),
    }.get(path.split("/")[-1], (cfg.d,))


def _turn(
    path: str, cfg: TransformerConfig, interleaved: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """From the file's axes of a tensor to ours."""
    last, i = path.split("/")[-1], cfg.head_dim

    def heads(w: np.ndarray) -> np.ndarray:
        """(h i) ... -> h i ..., halves of a head together."""
        rest = w.shape[1:]
        if interleaved and last in ("wq", "wk", "bq", "bk"):
            w = np.swapaxes(w.reshape(-1, i // 2, 2, *rest), 1, 2)
        return w.reshape(-1, i, *rest)

    if last in ("wq", "wk", "wv"):
        return lambda w: np.moveaxis(heads(w), 2, 0)
    if last in ("bq", "bk", "bv"):
        return heads
    if last == "wo":
        return lambda w: np.moveaxis(w.reshape(cfg.d, -1, i), 0, 2)
    if last in ("gate", "up", "down", "head"):
        return np.transpose
    return lambda w: w
