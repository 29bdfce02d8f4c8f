"""The job of several processes that this one belongs to, read from its environment.

    Open MPI     OMPI_COMM_WORLD_SIZE, ...       Slurm   SLURM_STEP_NUM_TASKS or SLURM_NTASKS, ...
    another MPI  PMI_SIZE, PMI_RANK              xpk     JAX_COORDINATOR_ADDRESS, NNODES, NODE_RANK
    TPU slice    TPU_WORKER_HOSTNAMES, or a TPU VM's metadata server
    Kubernetes   JOB_COMPLETION_INDEX of an indexed Job or JobSet (jax asks the cluster's API)

The first that fits wins. Also here: which GPUs of its machine a process takes. jax would take the one
of the process's local number, also where a process has a machine to itself, or sees only its own.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from jaxrepro.config import UserError

_PORTS = 61440, 4096  # first, count: of ports that are made from a job's number
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
