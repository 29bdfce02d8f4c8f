"""What all commands share: flags, one-line errors, exit codes, the method's module, jax's set-up.

`exits` says which exit code means what. jax is imported only by `setup_jax`, so `--help` and every flag error stay quick.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from absl import flags

from jaxrepro import __version__, distributed
from jaxrepro import config as configuration
from jaxrepro.config import UserError
from jaxrepro.exits import guard

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_HELP = {"--help", "-help", "-h", "--helpfull", "--helpshort"}
RUNS = {"sft": "jaxrepro.train.sft"}  # runs of the substrate, beside the methods


def main(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command on its words (without the program's name) and exits with its code."""
    try:
        code = guard(command, argv)
    except Exception:
        if not _joined():
            raise
        traceback.print_exc()
        code = 1
    if code and _joined():  # the other processes may be waiting for this one
        distributed.leave(code)
    sys.exit(code)


def _joined() -> bool:
    """Whether this process belongs to a run of several; loads nothing."""
    return "jax" in sys.modules and distributed.several()


def wants_help(argv: Sequence[str]) -> bool:
    """Whether `--help` or one of its spellings is among the words."""
    return bool(_HELP & set(argv))


def parse_flags(
    parser: flags.FlagValues, argv: Sequence[str], usage: str, *, words: tuple[str, ...] = ()
) -> list[str]:
    """Parses a command's own flags and returns the other words; `words` names those that it needs.

    Other stray words and unknown flags are UserErrors. `--help` anywhere prints `usage` and the flags,
    and exits with 0.
    """
    if wants_help(argv):
        print(usage.strip(), "\n\nflags:", sep="")
        for name in parser:
            flag = parser[name]
            default = "" if flag.default in (None, False) else f" (default {flag.default})"
            print(f"  --{name}: {flag.help}{default}")
        sys.exit(0)
    parser.set_gnu_getopt(True)  # words and flags in any order
    try:
        rest = parser(["", *argv])[1:]
    except flags.UnrecognizedFlagError as e:
        name = e.flagname.split("=")[0]
        known = [f"--{flag}" for flag in parser]
        if "." in name:
            raise UserError(f"unknown flag --{name}; did you mean --config.{name}?") from None
        raise UserError(
            f"unknown flag --{name}{configuration.did_you_mean('--' + name, known)}"
        ) from None
    except (flags.Error, ValueError) as e:
        raise UserError(str(e)) from None
    if stray := rest[len(words) :]:
        raise UserError(f"not understood: {' '.join(stray)}; flags look like --name=value")
    if len(rest) < len(words):
        raise UserError(f"{words[len(rest)]} is missing; --help shows the usage")
    return rest


def method(config: ConfigDict) -> ModuleType:
    """The module `jaxrepro.methods.<config.method>.run`, or one of `RUNS`."""
    import jaxrepro.methods

    name = config.get("method")
    known = [m.name for m in pkgutil.iter_modules(jaxrepro.methods.__path__) if m.ispkg]
    known += RUNS
    if name not in known:
        raise UserError(
            f"config.method={name} is unknown{configuration.did_you_mean(str(name), known)}"
        )
    try:
        return importlib.import_module(RUNS.get(name, f"jaxrepro.methods.{name}.run"))
    except ModuleNotFoundError as e:
        if e.name is None or e.name.split(".")[0] == "jaxrepro":
            raise
        raise UserError(f"{name} needs the package {e.name}, which is not installed") from e


def setup_jax() -> None:
    """Points jax at the user's compile cache and absl's flags at their defaults.

    Call before the first jax operation. JAX_COMPILATION_CACHE_DIR, when set, wins.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(cache) / "jaxrepro" / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # The default of one second skips the many small functions of a start.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers ask


def distributed_flags(parser: flags.FlagValues) -> None:
    """Defines the flags of a command that may run in several processes; `join` reads them."""
    text = {"flag_values": parser}
    flags.DEFINE_enum(
        "distributed",
        "auto",
        ["auto", "off", "on"],
        "several processes: auto (when a cluster or --coordinator says so), off, on",
        **text,
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0", **text)
    flags.DEFINE_integer("process_count", None, "number of processes", lower_bound=1, **text)
    flags.DEFINE_integer(
        "process_id", None, "number of this process, from 0", lower_bound=0, **text
    )
    flags.DEFINE_float(
        "join_timeout",
        distributed.TIMEOUT,
        "seconds that processes wait for each other at the start",
        lower_bound=1.0,
        **text,
    )


def join(parser: flags.FlagValues) -> None:
    """Joins the other processes of the job, if there are any, and prints what it found."""
    names = ("distributed", "coordinator", "process_count", "process_id")
    note = distributed.join(
        *(parser[name].value for name in names), timeout=parser["join_timeout"].value
    )
    if note:
        print(note, flush=True)


def say(text: str) -> None:
    """Prints once in a run of several processes."""
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)


def fit_mesh(config: ConfigDict) -> None:
    """Changes `config.mesh` of a trained run to the devices here, which may be others."""
    import jax

    from jaxrepro import sharding

    try:
        sizes = sharding.mesh_here(config.mesh, jax.device_count())
    except UserError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        found = config.get("mesh", "missing")
        raise UserError(
            f"the mesh of the workdir's config.json is {found!r:.60}: that file is damaged"
        ) from error
    if isinstance(config.mesh, Sequence):
        config.mesh = sizes
    else:
        with config.mesh.unlocked():
            config.mesh.update(dict(zip(sharding.AXES, sizes)))


def banner() -> str:
    """One line: versions and devices."""
    import flax
    import jax
    import optax

    kinds = [d.device_kind for d in jax.devices()]
    devices = ", ".join(f"{kinds.count(k)} x {k}" for k in dict.fromkeys(kinds))
    return (
        f"jaxrepro {__version__}, jax {jax.__version__}, flax {flax.__version__}, "
        f"optax {optax.__version__}, Python {sys.version.split()[0]}, devices: {devices}"
    )


def exit_on_sigterm() -> None:
    """SIGTERM ends the process with code 143, as a shell reports it; Run saves first while it trains."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def trained(workdir: str | None) -> ConfigDict:
    """The configuration of a workdir that holds a checkpoint. Raises UserError."""
    if not workdir:
        raise UserError("--workdir=FOLDER is required: the workdir of a run of jaxrepro.launch")
    folder = Path(workdir)
    if not folder.is_dir():
        raise UserError(f"--workdir={workdir} is not a folder; train first with jaxrepro.launch")
    if not (folder / "config.json").is_file():
        raise UserError(f"--workdir={workdir} holds no config.json: no run of jaxrepro.launch")
    config = configuration.saved(folder / "config.json")
    complete = (p.name.isdigit() for p in folder.glob("checkpoints/*/*"))  # stage / step
    if not any(complete):
        raise UserError(f"--workdir={workdir} holds no checkpoint yet; train first, or wait")
    return config
