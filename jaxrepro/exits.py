"""Exit codes of all commands, those of methods and data included.

0; 2 for bad input by the user (one line on stderr); 130 and 143 when stopped by SIGINT and SIGTERM. Anything else is
our fault and shows its traceback.
"""

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence

from jaxrepro.config import UserError

_DISK = {errno.ENOSPC: "the disk is full", errno.EROFS: "the file system is read-only"}
_DISK |= {errno.EACCES: "permission denied", errno.EPERM: "permission denied"}
_DISK |= {getattr(errno, "EDQUOT", errno.ENOSPC): "the disk quota is used up"}


def guard(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Exit code of `command(words)`; prints `error: ...` in one line for what a user can repair.

    argv: the words, without the program's name; None: those of this process.
    """
    try:
        command(list(sys.argv[1:] if argv is None else argv))
    except UserError as e:
        return _error(str(e))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        line = repairable(e)
        if line is None:
            raise
        return _error(line)
    return 0


def _error(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def repairable(e: BaseException) -> str | None:
    """One line for a disk or a device that is full, read-only or forbidden; None for the rest."""
    if isinstance(e, OSError) and e.errno in _DISK:
        what, where = _DISK[e.errno], f" at {e.filename}" if e.filename else ""
    elif "No space left on device" in str(e):  # tensorstore wraps it in a ValueError
        what, where = _DISK[errno.ENOSPC], ""
    elif type(e).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and (
        found := re.search(r"Out of memory[^\n]*", str(e), re.IGNORECASE)
    ):
        return (
            f"the device is full: {found[0]} Use a smaller batch, more micro_batches or "
            "model.remat; --dry_run estimates the memory"
        )
    else:
        return None
    return f"cannot write or read{where}: {what}; free it or choose another --workdir"
