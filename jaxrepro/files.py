"""Files: written whole or not at all, one line for a full disk, and the commit of the code.

Imports only the standard library.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from jaxrepro.config import ROOT, UserError

_FULL = ("no space left", "disk quota", "enospc")
_DENIED = ("permission denied", "read-only", "not permitted", "not a directory")


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns a full disk, or a place of a workdir that cannot be written, into a UserError that names it."""
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


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends, and vanishes where it fails.

    A reader sees the old file or the new one, never a part. The folder is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's own mode hides the file from everyone else
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 text, whole or not at all."""
    with whole(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Writes JSON, whole or not at all; ValueError for nan and inf, which JSON does not have."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file; UserError where it is missing or damaged."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no {path.name} in {path.parent}") from error
    except OSError as error:  # a folder of that name, no permission
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged: it is not JSON ({error}); delete it, or use another folder"
        ) from error


def commit(root: str | os.PathLike = ROOT) -> str:
    """Short git commit of the clone, with "-dirty" where tracked files differ; "unknown" without git."""
    try:
        run = lambda *args: subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
        dirty = run("status", "--porcelain", "--untracked-files=no", "--", "jaxrepro", "configs")
        return run("rev-parse", "--short=12", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
