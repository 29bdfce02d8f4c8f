"""Several processes as one run: how they meet, and how they agree.

`join` takes the job of the flags, else the one that `cluster.detect` finds, and says which it was.

jax itself aborts (SIGABRT, which nothing can catch) where a process is absent, has the number of
another, or waits at a port that is not jax's. So the processes first call the roll at the
coordinator's address, over plain TCP: what is wrong becomes one line in every process.

After that, `first` and `gather` carry small JSON values between processes. Both are collective:
every process calls them, in the same order.
"""

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxrepro.cluster import Job, detect, gpus, local_devices
from jaxrepro.config import UserError

TIMEOUT = 300.0  # seconds that processes wait for each other at the start
GOODBYE = 5.0  # seconds that a failing process waits for the others to fail as well
_GREETING = "jaxrepro roll call 1"
_LINE = 4096  # bytes of the longest line of a roll call
_SHORT = 1020  # bytes that `gather` sends at the first go


# --- how we meet ---------------------------------------------------------------------------------


def join(
    mode: str,
    coordinator: str | None = None,
    process_count: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float | int = TIMEOUT,
) -> str | None:
    """Joins the other processes where there are any; a line that says what was found, or None.

    mode: auto, on (UserError where there is nobody to join) or off. `coordinator` alone is enough
    where a scheduler says the rest. Call it before any other use of jax. Everything that keeps the
    processes apart for `timeout` seconds is a UserError in each of them.
    """
    given = {"coordinator": coordinator, "process_count": process_count, "process_id": process_id}
    present = [name for name, value in given.items() if value is not None]
    if mode == "off":
        if present:
            raise UserError(f"--distributed=off contradicts --{present[0]}; drop one of the two")
        return None
    if process_count == 1 and process_id in (None, 0) and mode == "auto":
        return None
    job = _said(coordinator, process_count, process_id) if present else detect()
    if job is None:
        if mode == "auto":
            return None
        raise UserError(
            "--distributed=on found no job of several processes (Slurm, MPI, TPU, Kubernetes); pass "
            "--coordinator=HOST:PORT --process_count=N --process_id=I"
        )
    import jax

    if not jax.distributed.is_initialized():  # a notebook may have joined already
        _initialize(job, timeout)
    return (
        f"distributed: process {jax.process_index()} of {jax.process_count()} ({job.source}"
        f"{f' at {job.coordinator}' if job.coordinator else ''}), "
        f"{jax.local_device_count()} of {jax.device_count()} devices are local"
    )


def _said(coordinator: str | None, count: int | None, index: int | None) -> Job:
    """The job of the flags; a scheduler fills in what only `coordinator` leaves open."""
    if coordinator is None:
        name = "process_count" if count is not None else "process_id"
        raise UserError(f"--{name} also needs --coordinator=HOST:PORT")
    _split(coordinator)
    if count is None and index is None:
        if (job := detect(coordinator=coordinator)) is not None:
            return job
        raise UserError("--coordinator also needs --process_count and --process_id")
    if count is None or index is None:
        missing = "process_count" if count is None else "process_id"
        raise UserError(f"--coordinator also needs --{missing}")
    if not 0 <= index < count:
        raise UserError(
            f"--process_id={index} is too large: with --process_count={count} the last is {count - 1}"
        )
    return Job("flags", coordinator, count, index)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={address} is not HOST:PORT, such as 10.0.0.1:1234")
    return host.strip("[]"), int(port)


def _initialize(job: Job, timeout: float | int) -> None:
    import jax

    more: dict[str, Any] = {"initialization_timeout": max(int(timeout), 1)}
    if job.coordinator is not None and job.index is not None:
        roll_call(job, timeout)
        if "JAX_LOCAL_DEVICE_IDS" not in os.environ:
            more["local_device_ids"] = local_devices(job, gpus())
        more["cluster_detection_method"] = "deactivate"  # what it would add is said already
    try:
        jax.distributed.initialize(job.coordinator, job.count, job.index, **more)
    except (RuntimeError, ValueError, OSError, KeyError) as e:
        text = (str(e).splitlines() or [type(e).__name__])[0][:300]
        raise UserError(
            f"{job.source}: the processes did not come together ({text}); start all of them, or pass "
            "--distributed=off to run alone"
        ) from e


def roll_call(job: Job, timeout: float | int = TIMEOUT) -> None:
    """Returns when all processes of the job are there, each once; else a UserError in each of them."""
    host, port = _split(job.coordinator)
    deadline = time.monotonic() + timeout
    if job.index == 0:
        _call(host, port, job, deadline)
    else:
        _answer(host, port, job, deadline)


def _call(host: str, port: int, job: Job, deadline: float) -> None:
    """Process 0: hear everybody, then tell everybody whether the run can start."""
    peers: dict[int, socket.socket] = {}
    problem = None
    with _listener(host, port, job.coordinator) as server:
        try:
            while problem is None and len(peers) < job.count - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    peer, address = server.accept()
                except TimeoutError:
                    problem = _absent(job, peers)
                    break
                index, problem = _hear(peer, address[0], job, peers)
                if index is None:
                    peer.close()  # a stranger, such as a port scanner
                else:
                    peers[index if problem is None else -1] = peer
        finally:
            for peer in peers.values():
                with peer:
                    _say(peer, {"problem": problem})
    if problem is not None:
        raise UserError(problem)


def _listener(host: str, port: int, address: str) -> socket.socket:
    """A socket at the port jax will use; UserError where it is taken or the address is elsewhere."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as e:
        raise UserError(f"--coordinator={address}: no such host ({e})") from None
    family, kind, protocol, _, where = found[0]
    if "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:  # else the machine is behind that address
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((where[0], 0, *where[2:]))
            except OSError as e:
                raise UserError(
                    f"--coordinator={address} is not an address of this machine, where process 0 "
                    f"runs ({e.strerror}); give its own, or set JAX_COORDINATOR_BIND_ADDRESS"
                ) from None
    server = socket.socket(family, kind, protocol)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port, *where[2:]))
        server.listen(128)
    except OSError as e:
        server.close()
        raise UserError(
            f"--coordinator={address}: cannot listen there ({e.strerror}); another run, or another "
            "process 0 of this one, has the port: choose another"
        ) from None
    return server


def _absent(job: Job, peers: Mapping[int, Any]) -> str:
    missing = [i for i in range(1, job.count) if i not in peers]
    named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return (
        f"{len(missing)} of {job.count} processes did not come to {job.coordinator} in time (number "
        f"{named}); start them all, or raise --join_timeout"
    )


def _hear(
    peer: socket.socket, address: str, job: Job, peers: Mapping[int, Any]
) -> tuple[int | None, str | None]:
    """(number of a process, what is wrong with it); the number is None for a stranger."""
    peer.settimeout(5)
    said = _listen(peer)
    if not isinstance(said, dict) or said.get("greeting") != _GREETING:
        return None, None
    index, count = said.get("index"), said.get("count")
    if not isinstance(index, int) or not isinstance(count, int):
        return None, None
    if count != job.count:
        problem = f"says there are {count} processes, process 0 that there are {job.count}"
    elif index in peers or not 0 < index < job.count:
        problem = f"has the number {index} of another; give each its own, from 0 to {job.count - 1}"
    elif said.get("jax") != _jax_version():
        problem = f"has jax {said.get('jax')}, process 0 has {_jax_version()}; install one version"
    else:
        return index, None
    return index, f"a process on {said.get('host') or address} {problem}"


def _answer(host: str, port: int, job: Job, deadline: float) -> None:
    """Another process: find process 0, say who we are, wait for the verdict."""
    while True:
        try:
            peer = socket.create_connection((host, port), timeout=2)
            break
        except (OSError, OverflowError) as e:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator={job.coordinator} does not answer ({e}); start process 0 there, "
                    "or correct the address"
                ) from None
            time.sleep(0.1)
    with peer:
        peer.settimeout(max(deadline - time.monotonic(), 1) + 10)  # process 0 gives up first
        about = {"index": job.index, "count": job.count, "jax": _jax_version()}
        _say(peer, {"greeting": _GREETING, "host": socket.gethostname()} | about)
        said = _listen(peer)
    if not isinstance(said, dict) or "problem" not in said:
        raise UserError(
            f"--coordinator={job.coordinator} answers, but not as process 0 of a starting run; is "
            "the port another program's, or has the run started already?"
        )
    if said["problem"] is not None:
        raise UserError(str(said["problem"]))


def _say(peer: socket.socket, value: dict) -> None:
    with contextlib.suppress(OSError):  # it has left; whoever waits for it says so
        peer.sendall(json.dumps(value).encode() + b"\n")


def _listen(peer: socket.socket) -> Any:
    """One line of JSON, or None."""
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _LINE:
            part = peer.recv(_LINE)
            if not part:
                break
            data += part
        return json.loads(data)
    except (OSError, ValueError):
        return None


def _jax_version() -> str:
    import jax

    return jax.__version__


# --- how we agree ------------------------------------------------------------------------------------


def several() -> bool:
    """Whether this run has several processes. Never starts a device."""
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order."""
    import jax
    import numpy as np

    value = json.loads(json.dumps(value))
    if jax.process_count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    data = json.dumps(value).encode()
    size, rows = _SHORT, []
    while not rows:  # one program for what is short, and few for the rest
        row = np.zeros(size + 4, np.uint8)
        row[:4] = np.frombuffer(len(data).to_bytes(4, "big"), np.uint8)
        row[4 : 4 + min(len(data), size)] = np.frombuffer(data, np.uint8)[:size]
        found = [bytes(r) for r in process_allgather(row)]
        lengths = [int.from_bytes(r[:4], "big") for r in found]
        if max(lengths) <= size:
            rows = [json.loads(r[4 : 4 + n]) for r, n in zip(found, lengths)]
        size = 2 ** math.ceil(math.log2(max(*lengths, 2)))
    return rows


def first(function: Callable[[], Any]) -> Any:
    """The JSON value that `function` returns on process 0, on every process; its UserError, too.

    What depends on files is asked once, so that no two processes see a different moment.
    """
    import jax

    if jax.process_count() == 1:
        return function()
    said = None
    if jax.process_index() == 0:
        try:
            said = {"value": function()}
        except UserError as e:
            said = {"error": str(e)}
    said = gather(said)[0]
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]


def together(function: Callable[[], Any]) -> Any:
    """`function()` of each process, or, where it is a UserError in one of them, that error in all."""
    import jax

    if jax.process_count() == 1:
        return function()
    value, error = None, None
    try:
        value = function()
    except UserError as e:
        error = str(e)
    for i, other in enumerate(gather(error)):
        if other is not None:
            raise UserError(other if error is not None else f"process {i}: {other}")
    return value


def leave(code: int) -> None:
    """Ends a process that has failed and said why.

    An ordinary exit would wait for the others at jax's barrier, while they wait for this one in a
    collective. Where all fail alike, all are there within seconds and none is cut off.
    """
    import sys

    import jax

    farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    farewell.start()
    farewell.join(GOODBYE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
