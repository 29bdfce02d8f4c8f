"""Writing into a workdir: atomically, and with one line where the disk or the rights do not allow."""

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

from jaxrepro.config import UserError

_FULL = ("no space left", "disk quota", "enospc")
_DENIED = ("permission denied", "read-only", "not permitted", "not a directory")


@contextlib.contextmanager
def writing(path):
    """Turn a full disk or a place that cannot be written into a UserError that names `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text, number = str(error).lower(), getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or any(word in text for word in _FULL):
            raise UserError(
                f"{path}: the disk is full; free some space, lower --config.checkpoint.keep, "
                "or choose another --workdir; the run resumes from its last checkpoint"
            ) from error
        if isinstance(error, OSError) or any(word in text for word in _DENIED):
            reason = getattr(error, "strerror", None) or "permission denied"
            raise UserError(
                f"{path} cannot be written ({reason}); choose another --workdir"
            ) from error
        raise


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with part.open("w") as f:
            json.dump(data, f, indent=1, allow_nan=False)
            f.write("\n")
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)


def read_json(path: Path) -> Any:
    """Parse a JSON file; UserError where it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it or use another --workdir"
        ) from error
