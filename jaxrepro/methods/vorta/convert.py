"""python -m jaxrepro.methods.vorta.convert router.pt router.safetensors

Rewrites a published router file, a pickle of torch, as safetensors with the same names and numbers. It needs
torch, which reads it with `weights_only=True`: tensors and nothing that runs. Nothing else of this package
needs torch or reads a pickle.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.exits import guard
from jaxrepro.files import whole, writing
from jaxrepro.models import tensors
from jaxrepro.models.values import shown


def convert(source: Path, target: Path) -> int:
    """Rewrite `source` as `target`; the number of tensors. UserError for anything but tensors by name."""
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: the new file's name must end in .safetensors")
    if target.exists():
        raise UserError(f"{target} exists: choose a new name or remove it")
    found = _read(source)
    entries = [
        tensors.Entry(name, value.dtype, value.shape, lambda value=value: value)
        for name, value in found.items()
    ]
    with writing(target), whole(target) as file:
        tensors.write_to(file, entries)
    return len(entries)


def _read(source: Path) -> dict[str, np.ndarray]:
    """The tensors of a torch file by name; bfloat16 becomes float32, which holds its every number."""
    if not source.is_file():
        raise UserError(f"there is no file {source}")
    try:
        import torch
    except ImportError:
        raise UserError(
            "torch is not installed: pip install torch (this command alone needs it)"
        ) from None
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile pickle raises
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{source} holds more than tensors, or is damaged: {reason}") from None
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{source} holds {type(found).__name__}, not tensors by name")
    return {str(name): _array(source, str(name), value) for name, value in found.items()}


def _array(source: Path, name: str, value: Any) -> np.ndarray:
    import torch

    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise UserError(f"{source}: {shown(name)} is no tensor of floats")
    value = value.detach()
    return (value.float() if value.dtype == torch.bfloat16 else value).contiguous().numpy()


def command(argv: Sequence[str]) -> None:
    """Convert the file that the words name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("source", type=Path, help="router.pt")
    parser.add_argument("target", type=Path, help="router.safetensors")
    flags = parser.parse_args(argv)
    n = convert(flags.source, flags.target)
    print(f"{flags.target}: {n} tensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command."""
    return guard(command, argv)


if __name__ == "__main__":
    sys.exit(main())
