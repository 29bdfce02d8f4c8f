"""Models from and to folders of Hugging Face: config.json, safetensors, generation defaults, tokenizer.

Reading maps the files and copies the slice that each device holds, one leaf at a time (names.py), so the
host never has the model and, with `shardings`, no device has more than its part. Writing goes tensor by
tensor into a temporary folder that takes its name when it is complete.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.files import read_json, write_json, write_text
from jaxrepro.models import families, qwen2_vl, tensors, values
from jaxrepro.models.names import (
    EMBED,
    HEAD,
    Line,
    account,
    assemble,
    canonical,
    leaves,
    pick,
    table,
)
from jaxrepro.models.qwen2_vl import Qwen2VLConfig
from jaxrepro.models.tensors import DTYPES, Entry, listed
from jaxrepro.models.tensors import INDEX as INDEX
from jaxrepro.models.tensors import SINGLE as SINGLE
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.models.values import shown

Config = Qwen2VLConfig | TransformerConfig
GENERATION = "generation_config.json"
# What a tokenizer or an image processor is made of; no weights, no code.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


# Reading ---------------------------------------------------------------------------------------------


def read_config(folder: str | os.PathLike[str], **overrides: Any) -> Config:
    """The model in a folder's config.json: a `Qwen2VLConfig`, or the `TransformerConfig` of a decoder.

    `overrides` (dtype, remat, ...) as in their `from_hf`. UserError names the architectures that are
    known where the file's is not one of them.
    """
    config = _read_object(Path(folder) / "config.json")
    kind = Qwen2VLConfig if families.family(config) == families.VISION else TransformerConfig
    return kind.from_hf(config, **overrides)


def token_ids(folder: str | os.PathLike[str], vocab: int | None = None) -> dict[str, Any]:
    """bos_token_id, eos_token_id (a number or a list) and pad_token_id of a folder, where it says them.

    generation_config.json wins over config.json; without either: {}. UserError for what is no id of a
    vocabulary of `vocab` tokens.
    """
    found: dict[str, Any] = {}
    for path in (Path(folder) / name for name in ("config.json", GENERATION)):
        if path.is_file():
            said = _read_object(path)
            for key in IDS:
                ids = values.tokens(said, key, vocab, file=str(path))
                if len(ids) > 1 and key != "eos_token_id":
                    raise UserError(f"{path}: {key} is a list of {len(ids)}; it must be one id")
                if ids:
                    found[key] = ids if key == "eos_token_id" and len(ids) > 1 else ids[0]
    return found


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return found


@runtime_checkable
class TokenizerLike(Protocol):
    """A tokenizer that goes with written weights."""

    @property
    def ids(self) -> Mapping[str, Any]:
        """bos_token_id, eos_token_id, pad_token_id, as far as it has them."""

    def save(self, folder: Path) -> None:
        """Write its files."""


def load(
    folder: str | os.PathLike[str],
    cfg: Config,
    *,
    dtype: str = "float32",
    shardings: Any = None,
) -> dict[str, Any]:
    """Parameters of a folder of safetensors, stacked layers, in `dtype`; adapters of cfg are left out.

    `shardings`: a tree like the parameters; each device then reads its slice. UserError lists missing
    and unexpected keys and wrong shapes; a tied head stored beside its embedding must equal it.
    """
    found: dict[str, tensors.Stored] = {}
    for name, tensor in tensors.stored(folder).items():
        hub = canonical(name)
        if hub.endswith("rotary_emb.inv_freq"):  # a constant that old writers stored
            continue
        if hub in found:
            raise UserError(f"{folder}: the tensor {shown(hub)} is stored twice")
        found[hub] = tensor
    for what, depth in _depths(cfg):
        if depth > len(found):  # also bounds the table
            raise UserError(
                f"{folder}: {what} is {depth}, but there are {len(found)} tensors: config.json and "
                "weights are not of one model"
            )
    lines = table(cfg)
    wanted = {name for line in lines for name in line.names}
    if HEAD in found and EMBED in found and HEAD not in wanted:
        if not _same(found[HEAD], found[EMBED]):
            raise UserError(f"{folder}: tied is True, but {HEAD} differs from the embedding")
        del found[HEAD]
    account(folder, lines, found)
    return assemble(lines, lambda name: found[name].map(), dtype=dtype, shardings=shardings)


def _depths(cfg: Config) -> list[tuple[str, int]]:
    """Fields of a config.json that count layers."""
    if isinstance(cfg, Qwen2VLConfig):
        return [("num_hidden_layers", cfg.text.layers), ("depth of the tower", cfg.vision.depth)]
    return [("num_hidden_layers", cfg.layers)]


def _same(a: tensors.Stored, b: tensors.Stored, rows: int = 4096) -> bool:
    """Whether two stored matrices are equal, some rows at a time."""
    if a.shape != b.shape:
        return False
    starts = range(0, a.shape[0], rows)
    return all(np.array_equal(a.map()[i : i + rows], b.map()[i : i + rows]) for i in starts)


# Writing ---------------------------------------------------------------------------------------------


def save(
    folder: str | os.PathLike[str],
    params: dict[str, Any],
    cfg: Config,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    ids: Mapping[str, Any] | None = None,
    tokenizer: str | os.PathLike[str] | TokenizerLike | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that transformers loads: weights, config.json, generation_config.json.

    dtype: None keeps that of the parameters. Layers may be stacked or listed. ids: bos_token_id,
    eos_token_id, pad_token_id (default: those of `tokenizer`; a Qwen2-VL's come from cfg unless that is a
    folder). tokenizer: a folder whose tokenizer files are copied, or a `TokenizerLike`. files: texts by name, such as
    README.md. UserError if the folder has content, or if the tree is not that of `cfg`; then, and
    where writing fails, nothing is left.
    """
    folder = Path(folder)
    check_new(folder)
    copied = tokenizer_files(tokenizer)
    if ids is None and copied is not None:
        ids = token_ids(tokenizer)
    elif ids is None:
        ids = {} if tokenizer is None or isinstance(cfg, Qwen2VLConfig) else tokenizer.ids
    entries = entries_of(params, table(cfg), dtype)
    config, generation = _configs(cfg, entries[0].dtype.name, ids)

    with new_folder(folder) as temporary:
        write_weights(temporary, entries, max_shard_bytes)
        write_json(temporary / "config.json", config)
        write_json(temporary / GENERATION, generation)
        if copied is not None:
            for path in copied:
                shutil.copyfile(path, temporary / path.name)
        elif tokenizer is not None:
            tokenizer.save(temporary)
        for name, text in (files or {}).items():
            write_text(temporary / name, text)


def check_new(folder: Path) -> None:
    """UserError where a folder has content."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists: choose a new folder or remove it")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends, and vanishes where it fails."""
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes a private folder
        os.replace(temporary, folder)  # takes the place of an empty folder
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_weights(folder: Path, entries: list[Entry], most: int, stem: str = tensors.STEM) -> None:
    """Safetensors of at most `most` bytes each, with an index where there are several."""
    shards = tensors.shards(entries, most, stem)
    for file, group in shards.items():
        tensors.write(folder / file, group)
    if len(shards) > 1:
        write_json(folder / tensors.index_file(stem), tensors.index_of(shards))


def entries_of(params: dict[str, Any], lines: list[Line], dtype: str | None) -> list[Entry]:
    """What to write, in order, in `dtype` (None: as it is); UserError where the tree is not that of the lines."""
    have, want = {p for p, _ in leaves(params)}, {line.path for line in lines}
    problems = listed("missing from the tree", sorted(want - have))
    problems += listed("unknown to the format", sorted(have - want))
    if any("/lora/" in f"/{path}" for path in have):
        problems.append("merge the adapters first (models.lora.merge)")
    if problems:
        raise UserError(f"cannot export: {'; '.join(problems)}")
    entries = []
    for line in lines:
        for i, name in enumerate(line.names):
            layer = i if line.stacked else None
            leaf = pick(params, line.path, layer)
            if leaf.shape != line.shape:
                raise UserError(
                    f"cannot export {line.path}: shape {leaf.shape}, cfg says {line.shape}"
                )
            kind = np.dtype(leaf.dtype if dtype is None else dtype)
            if kind not in DTYPES.values():
                raise UserError(
                    f"cannot export {line.path} as {kind}; choose float32, bfloat16 or float16"
                )
            make = lambda line=line, layer=layer: line.to_file(
                np.asarray(pick(params, line.path, layer))
            )
            entries.append(Entry(name, kind, line.file_shape, make))
    return entries


def _configs(cfg: Config, dtype: str, ids: Mapping[str, Any]) -> tuple[dict, dict]:
    """config.json and generation_config.json."""
    if isinstance(cfg, Qwen2VLConfig):
        own = {"eos_token_id": [cfg.eos, cfg.pad], "pad_token_id": cfg.pad, "bos_token_id": cfg.pad}
        return qwen2_vl.to_hf(cfg, dtype=dtype), own | dict(ids)
    config = families.to_hf(cfg, dtype=dtype)
    # a pad_token_id in config.json would freeze its row of the embedding in torch
    config |= {key: ids[key] for key in ("bos_token_id", "eos_token_id") if key in ids}
    return config, {key: ids[key] for key in IDS if key in ids}


def tokenizer_files(tokenizer: Any) -> list[Path] | None:
    """The files of a tokenizer's folder; None for anything else."""
    if not isinstance(tokenizer, (str, os.PathLike)):
        return None
    found = [Path(tokenizer) / name for name in TOKENIZER_FILES]
    found = [path for path in found if path.is_file()]
    if not found:
        raise UserError(f"{tokenizer} holds no tokenizer: no tokenizer.json, vocab.json, ...")
    return found
