"""Several processes as one run: who they are, how they meet, and how they agree.

`join` looks for a job of several processes in this order and says what it found:

    --coordinator --process_count --process_id   said on the command line
    Open MPI     OMPI_COMM_WORLD_SIZE, ...       Slurm   SLURM_STEP_NUM_TASKS or SLURM_NTASKS, ...
    another MPI  PMI_SIZE, PMI_RANK              xpk     JAX_COORDINATOR_ADDRESS, NNODES, NODE_RANK
    TPU slice    TPU_WORKER_HOSTNAMES, or a TPU VM's metadata server
    Kubernetes   JOB_COMPLETION_INDEX of an indexed Job or JobSet (jax asks the cluster's API)

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
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxrepro.config import UserError

TIMEOUT = 300.0  # seconds that processes wait for each other at the start
GOODBYE = 5.0  # seconds that a failing process waits for the others to fail as well
_PORTS = 61440, 4096  # first, count: of ports that are made from a job's number
_GREETING = "jaxrepro roll call 1"
_LINE = 4096  # bytes of the longest line of a roll call
_SHORT = 1020  # bytes that `gather` sends at the first go
_METADATA = "computeMetadata/v1/instance/attributes/worker-network-endpoints"


@dataclass(frozen=True)
class Job:
    """This process among those of its job.

    coordinator is HOST:PORT of process 0; None where jax asks the platform (TPU, Kubernetes), and
    then count and index may be None too. local: (rank, number) among the job's processes on this
    machine, None = unknown. bound: each process already sees its own devices only.
    """

    source: str
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    local: tuple[int, int] | None = None
    bound: bool = False


# --- who we are ------------------------------------------------------------------------------------


def detect(env: Mapping[str, str] | None = None, coordinator: str | None = None) -> Job | None:
    """The job of several processes that the environment describes, or None.

    env: default os.environ. coordinator: HOST:PORT that wins over the scheduler's. UserError where the variables of a
    scheduler contradict each other or some are missing: running alone would be N runs in one folder.
    """
    env = os.environ if env is None else env
    for found in (_open_mpi, _slurm, _pmi, _xpk, _tpu, _kubernetes):
        job = found(env, coordinator)
        if job is not None:
            return job
    return None


def _number(env: Mapping[str, str], name: str, *, of: str) -> int:
    text = env.get(name, "")
    if not text.isdecimal():
        said = f"{name}={text} is not a number" if name in env else f"{name} is not set"
        raise UserError(
            f"{of}, but {said}; start every process with the scheduler's own launcher, or pass "
            "--distributed=off to run alone"
        )
    return int(text)


def _place(env: Mapping[str, str], of: str, index: str, count: int) -> int:
    found = _number(env, index, of=of)
    if found >= count:
        raise UserError(f"{of}, but {index}={found}; the last is {count - 1}")
    return found


def _several(env: Mapping[str, str], name: str) -> int:
    """The number of processes under this name; 0 where it is absent."""
    return _number(env, name, of=f"{name} says how many processes there are") if name in env else 0


def _port(number: int, env: Mapping[str, str]) -> int:
    given = env.get("JAX_COORDINATOR_PORT")
    if given is None:
        return _PORTS[0] + number % _PORTS[1]
    if not given.isdecimal() or not 0 < int(given) < 65536:
        raise UserError(f"JAX_COORDINATOR_PORT={given} is not a port; use 1024 to 65535")
    return int(given)


def _open_mpi(env: Mapping[str, str], coordinator: str | None) -> Job | None:
    count = _several(env, "OMPI_COMM_WORLD_SIZE")
    if count < 2:
        return None
    of = f"Open MPI has OMPI_COMM_WORLD_SIZE={count}"
    index = _place(env, of, "OMPI_COMM_WORLD_RANK", count)
    beside = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", of=of)
    local = _place(env, of, "OMPI_COMM_WORLD_LOCAL_RANK", beside), beside
    if coordinator is None:
        uri = env.get("OMPI_MCA_orte_hnp_uri", "")  # "JOB.0;tcp://A,B:PORT" or "tcp6://[A,B]:PORT"
        if found := re.match(r"(\d+)\.\d+;(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri):
            host = found[2] or f"[{found[3]}]"
            coordinator = f"{host}:{_port(int(found[1]) // 4096, env)}"
    coordinator = coordinator or _here(count, beside, of, env)
    return Job(f"Open MPI, {count} processes", coordinator, count, index, local)


def _here(count: int, beside: int | None, of: str, env: Mapping[str, str]) -> str:
    """An address where all processes are on one machine; else the user must say one."""
    if beside != count:
        raise UserError(
            f"{of}, but this MPI does not say where process 0 is; pass --coordinator=HOST:PORT, the "
            "address of the machine of process 0"
        )
    return f"127.0.0.1:{_port(os.getppid(), env)}"


def _slurm(env: Mapping[str, str], coordinator: str | None) -> Job | None:
    if "SLURM_JOB_ID" not in env:
        return None
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    count = _several(env, name)
    if count < 2 or ("PMI_RANK" in env and _several(env, "PMI_SIZE") not in (0, 1, count)):
        return None  # alone, or started by an MPI that used Slurm for one helper a machine
    of = f"Slurm job {env['SLURM_JOB_ID']} has {name}={count}"
    nodes = env.get("SLURM_STEP_NODELIST")
    if nodes is None:
        raise UserError(
            f"{of}, but this process was not started by srun; put srun before the command, or pass "
            "--distributed=off to run alone"
        )
    index = _place(env, of, "SLURM_PROCID", count)
    rank = _number(env, "SLURM_LOCALID", of=of)
    beside = _tasks_here(env, count)
    if coordinator is None:
        # Steps of one job may run at once, so the step's number counts too.
        job, step = _number(env, "SLURM_JOB_ID", of=of), env.get("SLURM_STEP_ID", "0")
        number = job + 577 * int(step if step.isdecimal() else 0)
        coordinator = f"{_first_node(nodes)}:{_port(number, env)}"
    bound = any("gpu" in env.get(n, "") for n in ("SLURM_TRES_PER_TASK", "SLURM_GPU_BIND"))
    bound = bound or "SLURM_GPUS_PER_TASK" in env or "SLURM_NTASKS_PER_GPU" in env
    local = (rank, beside) if beside else None
    return Job(f"Slurm job {env['SLURM_JOB_ID']}", coordinator, count, index, local, bound)


def _first_node(nodes: str) -> str:
    """node007 of "node[007-009,12],other3"."""
    head = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?([^,\[\]]*)", nodes)
    if head is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes} names no machine; pass --coordinator")
    return head[1] + (head[2] or "") + head[3]


def _tasks_here(env: Mapping[str, str], count: int) -> int | None:
    """Processes of the step on this machine, from "4(x2),3" and the machine's number."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE", "")
    each = []
    for part in text.split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            each += [int(found[1])] * int(found[2] or 1)
    node = env.get("SLURM_NODEID", "")
    if sum(each) == count and node.isdecimal() and int(node) < len(each):
        return each[int(node)]
    machines = env.get("SLURM_STEP_NUM_NODES", "")
    if machines.isdecimal() and int(machines) and count % int(machines) == 0:
        return count // int(machines)
    return None


def _pmi(env: Mapping[str, str], coordinator: str | None) -> Job | None:
    count = _several(env, "PMI_SIZE")
    if count < 2:
        return None
    of = f"MPI has PMI_SIZE={count}"
    index, local = _place(env, of, "PMI_RANK", count), None
    beside = _several(env, "MPI_LOCALNRANKS")
    if beside:
        local = _place(env, of, "MPI_LOCALRANKID", beside), beside
    coordinator = coordinator or _here(count, beside or None, of, env)
    return Job(f"MPI, {count} processes", coordinator, count, index, local)


def _xpk(env: Mapping[str, str], coordinator: str | None) -> Job | None:
    address = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    if not address or "NNODES" not in env or "NODE_RANK" not in env:
        return None
    count = _several(env, "NNODES")
    if count < 2:
        return None
    index = _place(env, f"NNODES={count}", "NODE_RANK", count)
    if not re.search(r":\d+$", address):
        address = f"{address}:{_port(0, env)}"
    return Job(f"NNODES={count}", address, count, index, (0, 1))


def _tpu(env: Mapping[str, str], coordinator: str | None) -> Job | None:
    if "tpu" not in (env.get("JAX_PLATFORMS") or "tpu"):
        return None
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if hosts is None and _tpu_vm() and "TPU_SKIP_MDS_QUERY" not in env:
        hosts = _endpoints(env)
    if not hosts:
        return None
    slices = max(_several(env, "MEGASCALE_NUM_SLICES"), 1)
    workers = len(hosts.split(","))
    if workers * slices < 2:
        return None
    many = f"{slices} TPU slices of {workers}" if slices > 1 else f"TPU slice of {workers} workers"
    return Job(many, coordinator)


def _tpu_vm() -> bool:
    """Whether this machine has TPU chips and their library."""
    chips = any(Path(name).exists() for name in ("/dev/accel0", "/dev/vfio/0"))
    return chips and find_spec("libtpu") is not None


def _endpoints(env: Mapping[str, str]) -> str | None:
    """The workers of this TPU VM's slice, as the metadata server of the machine names them."""
    import urllib.request

    server = env.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{server}/{_METADATA}")
    request.add_header("Metadata-Flavor", "Google")
    try:
        with urllib.request.urlopen(request, timeout=3) as answer:
            return answer.read(65536).decode()
    except (OSError, ValueError):
        return None


def _kubernetes(env: Mapping[str, str], coordinator: str | None) -> Job | None:
    if "KUBERNETES_SERVICE_HOST" not in env or "JOB_COMPLETION_INDEX" not in env:
        return None
    index = env["JOB_COMPLETION_INDEX"]
    if find_spec("kubernetes") is None:
        raise UserError(
            f"JOB_COMPLETION_INDEX={index} is a pod of an indexed Kubernetes job; pip install "
            "kubernetes to join the others, or pass --distributed=off to run each pod alone"
        )
    return Job(f"Kubernetes job, pod {index}")


# --- devices of each process -------------------------------------------------------------------------


def gpus(env: Mapping[str, str] | None = None) -> int:
    """GPUs that this process sees, before jax does; 0 where there are none."""
    env = os.environ if env is None else env
    if env.get("JAX_PLATFORMS", "").split(",")[0] in ("cpu", "tpu"):
        return 0
    if (visible := env.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([x for x in visible.split(",") if x.strip() not in ("", "-1", "NoDevFiles")])
    return len([p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)])


def local_devices(job: Job, count: int) -> list[int] | None:
    """Which of the `count` GPUs that it sees this process takes; None = all that it sees.

    Alone on its machine, or bound by the scheduler: all. Else the processes of a machine share its
    GPUs evenly. (jax itself would take one, whatever there is.)
    """
    if job.local is None or not count or job.bound or count == 1:
        return None
    rank, beside = job.local
    if count % beside:
        raise UserError(
            f"{beside} processes on this machine see {count} GPUs; use a divisor of {count}, or give "
            "each its own, such as srun --gpus-per-task=1"
        )
    each = count // beside
    return None if beside == 1 else list(range(rank * each, (rank + 1) * each))


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
