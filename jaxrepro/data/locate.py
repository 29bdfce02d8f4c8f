"""Where `data.path` and `model.path` lie: on this disk, under $JAXREPRO_DATA, or on the Hugging Face hub."""

import os
from pathlib import Path

from jaxrepro.config import UserError

VARIABLE = "JAXREPRO_DATA"
# What a model needs; no pickled weights, no code.
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")


def data(path: str | os.PathLike) -> Path:
    """A file or folder as given, or below $JAXREPRO_DATA; UserError names the places that were searched."""
    found = Path(path).expanduser()
    root = os.environ.get(VARIABLE)
    places = [found] + ([Path(root).expanduser() / path] if root else [])
    for place in places:
        if place.exists():
            return place
    hint = "" if root else f", and ${VARIABLE} is not set"
    raise UserError(f"data.path={path}: no {' nor '.join(map(str, places))}{hint}; give a folder")


def model(path: str | os.PathLike) -> Path:
    """A folder with a model, or the copy on this disk of the hub's model of that name, fetched if need be."""
    found = Path(path).expanduser()
    if found.is_dir():
        return found
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(MODEL_FILES)))
    except (OSError, ValueError, HFValidationError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"model.path={path} is neither a folder nor a model that the hub gave: {reason}"
        ) from e
