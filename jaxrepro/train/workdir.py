"""The folder of a run: whose it is, what an earlier start left there, and when it becomes this one's.

A command may be refused after it has looked at its workdir: weights that do not fit, a start that is not
there. Until `Workdir.begin`, which the loop calls once a state stands, nothing that lies there changes, and a
first start that is refused takes its lock and its empty folder away again.
"""

import contextlib
import datetime
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax

from jaxrepro.config import UserError
from jaxrepro.files import commit, read_json, write_json, write_text, writing
from jaxrepro.train import curves
from jaxrepro.train import metrics as report
from jaxrepro.train.checkpoint import FOLDER, stages_in, steps_in

FORMAT = 1
SHARED = 10.0  # seconds until a network disk shows what another machine wrote
RESUME = ("auto", "never", "must")
SUMMARY, LOCK, SEAL = "summary.json", "lock", "seal"
OURS = (FOLDER, "once", report.FILE, report.EVENTS, curves.FILE, SUMMARY)
OURS += ("samples.md", "samples", "items.json", "answers.jsonl")


def may_differ(key: str) -> bool:
    """Whether a resumed run may have another value of this dotted key; of `*.path` see `moved`."""
    head, last = key.split(".")[0], key.split(".")[-1]
    free = last in ("steps", "every") or head in ("eval", "decode", "mesh", "log")
    return free or key == "checkpoint.keep"


def moved(there: str | None, here: Any) -> bool:
    """Whether a path of the config names what lay at `there` when the run began: a file or folder that moved.

    It is the same file or folder, or the old place is empty and the last part of the name is the same. A name
    that was no file or folder (of a hub, of `locate.KNOWN`) never moves.
    """
    new = _place(here)
    if there is None or new is None:
        return False
    old = Path(there)
    return old.samefile(new) if old.exists() else old.name == new.name


def _place(value: Any) -> Path | None:
    """The file or folder that a value of the config names, if it does."""
    if not isinstance(value, str) or not value:
        return None
    path = Path(os.path.abspath(Path(value).expanduser()))
    return path if path.exists() else None


def _again(key: str) -> bool:
    """Whether another value of this key means that a finished run is not finished."""
    return key.split(".")[-1] == "steps" or key.split(".")[0] in ("eval", "decode")


def _is_path(key: str) -> bool:
    return key.split(".")[-1] == "path"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for name in tree for k, v in _flat(tree[name], f"{prefix}.{name}".strip(".")).items()
    }


class Workdir:
    """One run's folder. Process 0 alone calls its methods, `sees` and `unseal` apart.

    config: a ConfigDict or a dict. resume: auto (go on where there is a checkpoint), never (delete what the
    run left, start again), must (refuse to start without a checkpoint).
    """

    def __init__(self, path: Any, config: Any, resume: str):
        if resume not in RESUME:
            raise UserError(f"resume={resume!r} is unknown; use one of {', '.join(RESUME)}")
        self.path, self._resume = Path(path).expanduser().absolute(), resume
        plain = getattr(config, "to_dict", lambda: config)()
        self._plain = json.loads(json.dumps(plain, default=str))
        self._lock: Any = None
        self.begun = False  # whether the folder is of this run by now
        self._made: list[Path] = []  # folders that this start made, the deepest first
        self._later: dict[str, Any] = {}  # JSON to be written when the run begins

    # --- taking it -----------------------------------------------------------------------------

    def claim(self) -> dict[str, Any]:
        """{"results": of a finished run, or None; "seal": what `sees` looks for}. Takes the lock.

        UserError where another process holds it, where it is of another config, and where resume=must
        finds nothing.
        """
        self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        path, summary = self.path / "config.json", self.path / SUMMARY
        changed = self._compare(path) if path.exists() else []
        if self._resume == "must" and not summary.exists() and not stages_in(self.path):
            raise UserError(
                f"resume=must, but {self.path} has no checkpoint; use --resume=auto to start"
            )
        over = summary.exists() and self._resume != "never" and not any(map(_again, changed))
        results = read_json(summary) if over else None
        self.begun = over
        seal = f"{os.uname().nodename} {os.getpid()} {time.time_ns()}"
        if jax.process_count() > 1:
            with writing(self.path):
                write_text(self.path / SEAL, seal)
        return {"results": results, "seal": seal}

    def _take_lock(self) -> None:
        import fcntl

        path = self.path / LOCK
        while True:
            with writing(path):
                lock = open(path, "a+")  # noqa: SIM115 - held for the whole run
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                lock.close()
                raise UserError(
                    f"{self.path} is in use by {holder}; wait for it, or choose another --workdir"
                ) from None
            except OSError:  # a file system without locks
                self._lock = lock
                return
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    break
            lock.close()  # of a start that was refused, and took it away in between
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        lock.flush()

    def sees(self, seal: str) -> None:
        """Whether the folder of this process is that of process 0."""
        path, deadline = self.path / SEAL, time.monotonic() + SHARED
        while True:
            with contextlib.suppress(OSError):
                if path.read_bytes() == seal.encode():
                    return
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.path} on {os.uname().nodename} is not the folder that process 0 "
                    "writes; give a --workdir on a disk that all machines share"
                )
            time.sleep(0.2)

    def unseal(self) -> None:
        """After every process has looked."""
        (self.path / SEAL).unlink(missing_ok=True)

    def release(self) -> None:
        """Let go of the lock. A first start that never began leaves nothing."""
        if self._lock is None:
            return
        if not (self.path / "config.json").exists():
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink()
                for folder in self._made:
                    folder.rmdir()  # fails, and ends this, where it holds something
        self._lock.close()  # the kernel lets go of the lock, also after kill -9
        self._lock = None

    def _compare(self, path: Path) -> list[str]:
        """Keys that differ from the workdir's config; UserError where one of them must not."""
        old = read_json(path)
        if old.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {old.get('format')}, this version reads {FORMAT}; "
                "use the version that wrote it, or another --workdir"
            )
        a, b, places = _flat(old["config"]), _flat(self._plain), old.get("places", {})
        missing = object()
        differ = [k for k in sorted(set(a) | set(b)) if a.get(k, missing) != b.get(k, missing)]
        same = lambda k: may_differ(k) or (_is_path(k) and moved(places.get(k), b.get(k)))
        foreign = [k for k in differ if not same(k)]
        if foreign:
            shown = [
                f"{k} ({a.get(k, 'absent')} there, {b.get(k, 'absent')} here)" for k in foreign[:5]
            ]
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise UserError(
                f"{self.path} holds a run of another config: {', '.join(shown)}{more}; "
                "choose another --workdir"
            )
        return differ

    # --- what it holds -------------------------------------------------------------------------

    def has(self, stage: str) -> bool:
        """Whether a stage has a checkpoint to go on from."""
        return not self._fresh and bool(steps_in(self.path / FOLDER / stage))

    def kept(self, name: str) -> Any:
        """The content of the JSON file `name` of this run; None without it."""
        if name in self._later:
            return self._later[name]
        path = self.path / name
        return read_json(path) if path.exists() and not self._fresh else None

    def keep(self, name: str, data: Any) -> None:
        """Write the JSON file `name`: now, or as soon as the run begins."""
        self._later[name] = data
        if self.begun:
            self._write_later()

    @property
    def _fresh(self) -> bool:
        """Whether what lies here is of a run that is to be deleted."""
        return self._resume == "never" and not self.begun

    # --- the run begins ------------------------------------------------------------------------

    def begin(self) -> None:
        """The folder is of this run from here on: its config, no older results."""
        if self.begun:
            return
        path, summary = self.path / "config.json", self.path / SUMMARY
        plain = _flat(self._plain)
        record = {"format": FORMAT, "config": self._plain, "command": sys.argv, "commit": commit()}
        record["places"] = {k: str(p) for k, v in plain.items() if _is_path(k) and (p := _place(v))}
        record["jax"] = jax.__version__
        record["started"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        with writing(self.path):
            summary.unlink(missing_ok=True)  # first: a kill from here on leaves an unfinished run
            if self._resume == "never":
                self._wipe()
            write_json(path, record)
        self.begun = True
        self._write_later()

    def _write_later(self) -> None:
        with writing(self.path):
            while self._later:
                name, data = next(iter(self._later.items()))
                write_json(self.path / name, data)
                del self._later[name]

    def _wipe(self) -> None:
        for name in OURS:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
