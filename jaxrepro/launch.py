"""Runs a method: python -m jaxrepro.launch --config=configs/NAME.py[:size] --config.key=value

`--list` shows the configs with their sizes, `--dry_run` what a run would need without starting it,
`--help` this text. On several machines start the same command on each (launch/README.md).
"""

import os
import socket
import time
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from jaxrepro import cli
from jaxrepro import config as configuration
from jaxrepro.config import UserError

# Set by the schedulers that jax recognises on its own; each holds a number of processes.
_CLUSTERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def _flags() -> flags.FlagValues:
    parser = flags.FlagValues()
    text = {"flag_values": parser}
    flags.DEFINE_string("workdir", None, "folder of the run; default runs/<method>-<size>", **text)
    flags.DEFINE_enum(
        "resume",
        "auto",
        ["auto", "never", "must"],
        "auto (continue what the workdir holds), never (delete it and start again), must (continue, or stop)",
        **text,
    )
    flags.DEFINE_bool("dry_run", False, "print what the run would need, and stop", **text)
    flags.DEFINE_bool("list", False, "list configs, sizes, needs, minutes, and stop", **text)
    flags.DEFINE_string("profile", None, "start:count, the steps to trace with XProf", **text)
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
    return parser


def main(argv: Sequence[str]) -> None:
    """The command; raises UserError for bad input and SystemExit for its exit codes."""
    parser = _flags()
    if cli.wants_help(argv):
        cli.parse_flags(parser, argv, __doc__)
    config, size, rest = configuration.take_config(argv)
    cli.parse_flags(parser, rest, __doc__)
    if parser["list"].value:
        return print(listing())
    if config is None:
        raise UserError("--config=configs/NAME.py[:size] is required; --list shows what there is")
    profile = check_profile(parser["profile"].value)
    workdir = parser["workdir"].value or f"runs/{config.method}-{size}"
    if parser["dry_run"].value:
        return print(dry_run(config, workdir))
    cli.exit_on_sigterm()
    method = cli.method(config)
    cli.setup_jax()
    names = ("distributed", "coordinator", "process_count", "process_id")
    if note := start_distributed(*(parser[name].value for name in names)):
        print(note, flush=True)
    print(cli.banner(), flush=True)
    method.run(config, workdir, resume=parser["resume"].value, profile=profile)


def listing() -> str:
    """Table of config files, sizes, needs and minutes."""
    rows = [("config", "needs", "minutes")]
    for path in configuration.files():
        sizes = getattr(configuration.load_module(path), "SIZES", {})
        for size, about in sizes.items():
            name = f"configs/{path.name}:{size}"
            rows.append((name, str(about.get("needs", "")), str(about.get("minutes", ""))))
    if len(rows) == 1:
        raise UserError("no config files here; run from the root of a clone of the repository")
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows)


def check_profile(text: str | None) -> str | None:
    """The text itself if it is start:count; else a UserError, before anything is loaded."""
    if text is not None:
        start, _, count = text.partition(":")
        if not (start.isdecimal() and count.isdecimal() and int(count) > 0):
            raise UserError(f"--profile={text} is not start:count, such as --profile=10:3")
    return text


def dry_run(config: ConfigDict, workdir: str) -> str:
    """What a run would need, as text: no device, network or data file is touched."""
    from jaxrepro.train import memory

    plan = cli.method(config).plan(config)
    return "\n\n".join(
        [
            configuration.to_json(config),
            f"workdir: {workdir}",
            memory.render(plan),
        ]
    )


def start_distributed(
    mode: str,
    coordinator: str | None = None,
    process_count: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 60.0,
) -> str | None:
    """Joins the other processes when there are any; a line that says what it found.

    Call before any other use of jax. A coordinator that does not answer within `timeout` seconds
    is a UserError: jax itself would abort the process (SIGABRT), which nothing can catch.
    """
    given = {"coordinator": coordinator, "process_count": process_count, "process_id": process_id}
    present = [name for name, value in given.items() if value is not None]
    if mode == "off":
        if present:
            raise UserError(f"--distributed=off contradicts --{present[0]}; drop one of the two")
        return None
    import jax

    if present:
        if missing := [f"--{name}" for name, value in given.items() if value is None]:
            raise UserError(f"--{present[0]} also needs {' and '.join(missing)}")
        if process_id >= process_count:
            raise UserError(
                f"--process_id={process_id} is too large: with --process_count={process_count} "
                f"the last is {process_count - 1}"
            )
        _check_coordinator(coordinator, process_id, timeout)
        jax.distributed.initialize(coordinator, process_count, process_id)
    elif found := cluster():
        jax.distributed.initialize()
        coordinator = found
    elif mode == "on":
        raise UserError(
            "--distributed=on found no Slurm, Open MPI or TPU job of several processes; pass "
            "--coordinator=HOST:PORT --process_count=N --process_id=I"
        )
    else:
        return None
    return (
        f"distributed: process {jax.process_index()} of {jax.process_count()} ({coordinator}), "
        f"{jax.local_device_count()} of {jax.device_count()} devices are local"
    )


def cluster() -> str | None:
    """The sign of a job of several processes that jax can join without arguments, or None."""
    for name in _CLUSTERS:
        if os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 1:
            return f"{name}={os.environ[name]}"
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return f"TPU_WORKER_HOSTNAMES={hosts}" if "," in hosts else None


def _check_coordinator(address: str, process_id: int, timeout: float) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator={address} is not HOST:PORT, such as 10.0.0.1:1234")
    if process_id == 0:
        return _check_free(address, int(port))
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=2).close()
        except (OSError, OverflowError) as e:
            if time.monotonic() > deadline or isinstance(e, OverflowError):
                raise UserError(
                    f"--coordinator={address} does not answer ({e}); start process 0 there, or "
                    "correct the address"
                ) from None
            time.sleep(0.2)


def _check_free(address: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as e:
            raise UserError(f"--coordinator={address}: cannot listen there ({e})") from None


if __name__ == "__main__":
    cli.main(main)
