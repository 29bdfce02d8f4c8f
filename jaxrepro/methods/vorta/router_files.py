"""Routers on disk: one safetensors file under the names of the official checkpoints.

    {transformer_blocks | single_transformer_blocks | blocks}.i.router.linear.{weight (3 h, d), bias (3 h)}

Row 3 j + b belongs to head j and branch b, in the order full, coreset, sliding. Ours: {"kernel": (l, d, h, 3),
"bias": (l, h, 3)}, the dual blocks of HunyuanVideo before the single ones. The published files are pickles
(`router.pt`), which are never read here: `python -m jaxrepro.methods.vorta.convert` rewrites one.
"""

import os
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxrepro.config import UserError
from jaxrepro.files import whole
from jaxrepro.methods.vorta.router import declare
from jaxrepro.models import hf, tensors
from jaxrepro.models.hunyuan_video import HunyuanVideoConfig
from jaxrepro.models.names import Line, account, assemble, line_of
from jaxrepro.models.video_dit import Config

CONVERT = "python -m jaxrepro.methods.vorta.convert"


def table(cfg: Config) -> list[Line]:
    """The rename table of the routers of a model."""
    if isinstance(cfg, HunyuanVideoConfig):
        blocks = [f"transformer_blocks.{i}" for i in range(cfg.double)]
        blocks += [f"single_transformer_blocks.{i}" for i in range(cfg.single)]
    else:
        blocks = [f"blocks.{i}" for i in range(cfg.layers)]
    formulas = {"kernel": ("weight", "(h b) d -> d h b"), "bias": ("bias", "(h b) -> h b")}
    lines = []
    for path, param in declare(cfg).items():
        name, formula = formulas[path]
        names = tuple(f"{block}.router.linear.{name}" for block in blocks)
        lines.append(line_of(path, names, True, param.shape[1:], formula, {}))
    return lines


def load(
    path: str | os.PathLike[str], cfg: Config, *, dtype: str = "float32", shardings: Any = None
) -> dict[str, Float[Array, "..."]]:
    """The routers of a file for the model `cfg`; float32, because bfloat16 would lose small updates.

    UserError that lists missing, unexpected and mis-shaped tensors, and for a pickle one that names the command.
    """
    path = Path(path)
    if path.suffix in tensors.PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run any code and is never read here; if you trust it, run: "
            f"{CONVERT} {path} {path.with_suffix('.safetensors')}"
        )
    if not path.is_file():
        raise UserError(f"there is no file {path}: give the routers' safetensors file")
    found = dict(tensors.scan(path))
    lines = table(cfg)
    account(path, lines, found)
    return assemble(lines, lambda name: found[name].map(), dtype=dtype, shardings=shardings)


def save(
    path: str | os.PathLike[str], routers: dict[str, Any], cfg: Config, *, dtype: str | None = None
) -> None:
    """Write routers under the official names; UserError where the tree is not that of `cfg`."""
    entries = hf.entries_of(jax.device_get(routers), table(cfg), dtype)
    with whole(path) as file:
        tensors.write_to(file, entries)
