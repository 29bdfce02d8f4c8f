"""Which job a process belongs to, read from its environment, and how the processes find each other."""

import http.server
import json
import socket
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrepro import cluster, distributed
from jaxrepro.cluster import Job, detect, gpus, local_devices
from jaxrepro.config import UserError
from jaxrepro.distributed import roll_call

sys.path.insert(0, str(Path(__file__).parents[1]))
import processes

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[007-008],gpu3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
PMI = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
XPK = {"JAX_COORDINATOR_ADDRESS": "job-0-0.job", "NNODES": "2", "NODE_RANK": "1"}


def test_a_slurm_step_gives_its_processes_its_nodes_and_its_port():
    job = detect(SLURM)
    assert job == Job("Slurm job 4097", "node007:61441", 4, 3, (1, 2), False)
    other_step = detect(SLURM | {"SLURM_STEP_ID": "1"})
    assert other_step.coordinator != job.coordinator  # two steps of one job at once
    assert detect(SLURM | {"JAX_COORDINATOR_PORT": "9000"}).coordinator == "node007:9000"
    assert detect(SLURM, "10.0.0.1:7").coordinator == "10.0.0.1:7"
    for nodes, first in [
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("n[3,7-9]-ib,x", "n3-ib"),
        ("gpu-a-[01-04]", "gpu-a-01"),
    ]:
        assert detect(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator == f"{first}:61441"


def test_one_process_of_slurm_or_mpi_is_nobody_to_join():
    alone = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    for env in ({}, alone, {"SLURM_JOB_ID": "5"}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}):
        assert detect(env) is None
    assert detect({"OMPI_COMM_WORLD_SIZE": "1"}) is detect({"PMI_SIZE": "1"}) is None
    assert detect({"NNODES": "4", "NODE_RANK": "0"}) is None  # torchrun's names, without an address
    assert detect({"SLURM_NTASKS": "4"}) is None  # left over: there is no job


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4"}, "not started by srun; put srun before"),
        (SLURM | {"SLURM_PROCID": None}, "SLURM_PROCID is not set"),
        (SLURM | {"SLURM_LOCALID": None}, "SLURM_LOCALID is not set"),
        (SLURM | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4; the last is 3"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "four"}, "SLURM_STEP_NUM_TASKS=four is not a number"),
        (SLURM | {"JAX_COORDINATOR_PORT": "70000"}, "JAX_COORDINATOR_PORT=70000"),
        (MPI | {"OMPI_COMM_WORLD_RANK": None}, "OMPI_COMM_WORLD_RANK is not set"),
        (MPI | {"OMPI_MCA_orte_hnp_uri": None}, "pass --coordinator=HOST:PORT"),
        (PMI | {"PMI_RANK": "2"}, "PMI_RANK=2; the last is 1"),
        (PMI | {"MPI_LOCALNRANKS": None}, "does not say where process 0 is"),
        (XPK | {"NODE_RANK": "x"}, "NODE_RANK=x is not a number"),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"},
            "pip install kubernetes",
        ),
    ],
)
def test_half_a_job_is_refused_in_one_line_with_a_remedy(env, said, monkeypatch):
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    env = {k: v for k, v in env.items() if v is not None}
    with pytest.raises(UserError, match=said) as error:
        detect(env)
    assert "\n" not in str(error.value)


def test_open_mpi_and_other_mpis_give_number_and_place():
    assert detect(MPI) == Job("Open MPI, 4 processes", "10.96.0.1:62624", 4, 2, (0, 2))
    six = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::1,fe80::2]:5"}
    assert detect(MPI | six).coordinator == "[fe80::1]:61441"
    newer = {k: v for k, v in MPI.items() if "uri" not in k} | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert detect(newer).coordinator.startswith("127.0.0.1:")  # all on this machine
    assert detect(MPI, "h:1").coordinator == "h:1"
    assert detect(PMI).local == (1, 2) and detect(PMI).index == 1
    # mpirun inside a Slurm allocation: Slurm's numbers are those of its helpers
    assert detect(SLURM | MPI).source.startswith("Open MPI")
    assert detect(SLURM | PMI).source.startswith("MPI")
    assert detect(SLURM | PMI | {"PMI_SIZE": "4", "PMI_RANK": "3"}).source.startswith("Slurm")


def test_xpk_gives_the_pods_of_a_gpu_workload():
    assert detect(XPK | {"JAX_COORDINATOR_PORT": "6002"}) == Job(
        "NNODES=2", "job-0-0.job:6002", 2, 1, (0, 1)
    )
    assert detect(XPK | {"JAX_COORDINATOR_ADDRESS": "h:5"}).coordinator == "h:5"
    assert detect(XPK | {"NNODES": "1", "NODE_RANK": "0"}) is None


def test_a_tpu_slice_is_joined_through_jax_and_one_host_alone_is_not(monkeypatch):
    assert detect({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}) == Job("TPU slice of 4 workers")
    assert detect({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}) == Job("TPU slice of 2 workers")
    many = {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}
    assert detect(many) == Job("2 TPU slices of 1")
    assert detect({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert detect({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}) is None
    monkeypatch.setattr(cluster, "_tpu_vm", lambda: True)
    assert detect({"GCE_METADATA_IP": "127.0.0.1:1"}) is None  # no metadata server there


def test_the_workers_of_a_tpu_vm_come_from_its_metadata_server(monkeypatch):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            right = self.headers["Metadata-Flavor"] == "Google" and "endpoints" in self.path
            self.send_response(200 if right else 404)
            self.end_headers()
            self.wfile.write(b"a:0:10.0.0.1,b:1:10.0.0.2")

        def log_message(self, *_):
            pass

    monkeypatch.setattr(cluster, "_tpu_vm", lambda: True)
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        assert detect(env) == Job("TPU slice of 2 workers")
        assert detect(env | {"TPU_SKIP_MDS_QUERY": "1"}) is None
        server.shutdown()


def test_kubernetes_is_left_to_jax_where_its_package_is_there(monkeypatch):
    monkeypatch.setattr(cluster, "find_spec", lambda name: object())
    env = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    assert detect(env) == Job("Kubernetes job, pod 3")
    assert detect({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None  # any pod


def test_processes_of_a_machine_share_its_gpus():
    at = lambda local, bound=False: Job("x", "h:1", 8, 0, local, bound)
    assert local_devices(at((0, 1)), 8) is None  # one process a machine takes all
    assert local_devices(at((3, 8)), 8) == [3]
    assert local_devices(at((1, 2)), 8) == [4, 5, 6, 7]
    assert local_devices(at((3, 4)), 1) is None  # the scheduler shows each its own
    assert local_devices(at((3, 4), bound=True), 2) is None
    assert local_devices(at((0, 4)), 0) is local_devices(at(None), 8) is None
    with pytest.raises(UserError, match="8 processes on this machine see 4 GPUs"):
        local_devices(at((0, 8)), 4)
    assert detect(SLURM | {"SLURM_GPUS_PER_TASK": "1"}).bound
    assert gpus({"CUDA_VISIBLE_DEVICES": "0,3"}) == 2
    assert gpus({"CUDA_VISIBLE_DEVICES": ""}) == gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == 0
    assert gpus({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": "cpu"}) == 0


# ---- flags ----


@pytest.fixture
def no_cluster(monkeypatch):
    monkeypatch.setattr(distributed, "detect", lambda coordinator=None: None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("on",), "found no job of several processes"),
        (("off", "h:1"), "contradicts --coordinator"),
        (("auto", "h:1"), "--process_count and --process_id"),
        (("auto", None, 2, None), "--process_count also needs --coordinator"),
        (("auto", None, None, 1), "--process_id also needs --coordinator"),
        (("auto", "h:1", 2, None), "also needs --process_id"),
        (("auto", "h:1", 2, 2), "the last is 1"),
        (("auto", "host", 2, 1), "not HOST:PORT"),
        (("auto", "127.0.0.1:99999", 2, 1), "not HOST:PORT"),
        (("auto", "no.such.host.invalid:99", 2, 0), "no such host"),
        (("auto", "192.0.2.1:1234", 2, 0), "not an address of this machine"),
    ],
)
def test_a_bad_flag_is_refused_before_jax_sees_it(arguments, said, no_cluster):
    with pytest.raises(UserError, match=said):
        distributed.join(*arguments, timeout=0.1)


def test_nothing_to_join_is_nothing_said(no_cluster):
    assert distributed.join("auto") is distributed.join("off") is None
    assert distributed.join("auto", process_count=1) is None
    assert not distributed.several()


def test_a_scheduler_fills_in_what_the_coordinator_flag_leaves_open(monkeypatch):
    found = []
    monkeypatch.setattr(distributed, "_initialize", lambda job, timeout: found.append(job))
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    note = distributed.join("on", "10.0.0.1:7")
    assert found == [Job("Slurm job 4097", "10.0.0.1:7", 4, 3, (1, 2))]
    assert "(Slurm job 4097 at 10.0.0.1:7)" in note


# ---- the roll call ----


def called(*jobs, timeout=5.0):
    """What each process hears: None, or the line of its UserError."""
    heard = {}

    def one(i, job):
        try:
            heard[i] = roll_call(job, timeout)
        except UserError as e:
            heard[i] = str(e)

    threads = [threading.Thread(target=one, args=item) for item in enumerate(jobs)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)  # the first is at the port before the second
    for thread in threads:
        thread.join(timeout + 15)
    return [heard[i] for i in range(len(jobs))]


def jobs(count, indices, address=None, **counts):
    address = address or processes.free_address()
    return [Job("test", address, counts.get(f"of{i}", count), i) for i in indices]


def test_a_run_starts_when_all_have_answered_in_any_order():
    assert called(*jobs(4, (2, 0, 3, 1))) == [None] * 4


def test_a_number_given_twice_is_told_to_everybody():
    heard = called(*jobs(3, (0, 1, 1)))
    assert all("has the number 1 of another" in line for line in heard if line is not None)
    assert sum(line is not None for line in heard) >= 2  # of the two with one number, one may wait
    heard = called(*jobs(2, (0, 0)), timeout=0.5)
    assert any("another process 0 of this one" in (line or "") for line in heard)


def test_processes_that_disagree_on_their_number_are_told_so():
    heard = called(*jobs(2, (0, 1), of1=3))
    assert all("3 processes, process 0 that there are 2" in line for line in heard)


def test_an_absent_process_is_named_everywhere():
    heard = called(*jobs(4, (0, 2)), timeout=0.5)
    assert all("2 of 4 processes did not come" in line for line in heard)
    assert all("(number 1, 3)" in line and "--join_timeout" in line for line in heard)


def test_a_coordinator_that_is_absent_or_somebody_else_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match="does not answer"):
            roll_call(*jobs(2, (1,), address), 0.2)
        taken.listen()

        def other_program():
            with taken.accept()[0] as peer:
                peer.sendall(b"SSH-2.0\r\n")

        threading.Thread(target=other_program).start()
        with pytest.raises(UserError, match="answers, but not as process 0"):
            roll_call(*jobs(2, (1,), address), 0.2)


def test_strangers_at_the_port_do_not_count():
    zero, one = jobs(2, (0, 1))
    host, port = zero.coordinator.split(":")
    thread = threading.Thread(target=roll_call, args=(zero, 10))
    thread.start()
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"greeting": "hello"}\n'):
        for _ in range(100):
            try:
                peer = socket.create_connection((host, int(port)), timeout=5)
                break
            except OSError:
                time.sleep(0.02)
        with peer:
            peer.sendall(said)
            assert peer.recv(10) == b""
    assert roll_call(one, 10) is None
    thread.join()


def test_another_jax_is_told_to_everybody(monkeypatch):
    versions = iter(["0.0.1", jax.__version__, jax.__version__, jax.__version__])
    monkeypatch.setattr(distributed, "_jax_version", lambda: next(versions))
    heard = called(*jobs(2, (1, 0)))
    assert all(line is None or "has jax 0.0.1" in line for line in heard) and any(heard)


# ---- agreement ----


def test_alone_everything_agrees():
    assert distributed.gather({"a": [1, None]}) == [{"a": [1, None]}]
    assert distributed.first(lambda: 3) == distributed.together(lambda: 3) == 3
    with pytest.raises(UserError, match="no"):
        distributed.first(lambda: (_ for _ in ()).throw(UserError("no")))


def test_values_of_any_length_come_from_every_process(monkeypatch):
    """Two processes, played by this one: each row is its own, the other's says what it would say."""
    from jax.experimental import multihost_utils

    values = [{"short": 1}, "x" * 3000]
    mine = 0

    def allgather(row):
        rows = []
        for value in values:
            data = json.dumps(value).encode()
            other = np.zeros_like(row)
            other[:4] = np.frombuffer(len(data).to_bytes(4, "big"), np.uint8)
            part = np.frombuffer(data, np.uint8)[: len(row) - 4]
            other[4 : 4 + len(part)] = part
            rows.append(other)
        np.testing.assert_array_equal(rows[mine], row)
        return np.stack(rows)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: mine)
    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    for mine in (0, 1):
        assert distributed.gather(values[mine]) == values
    values, mine = [{"error": "process 0 says no"}, None], 1
    with pytest.raises(UserError, match="process 0 says no"):
        distributed.first(lambda: pytest.fail("only process 0 looks"))
    values, mine = [None, "the disk is full"], 0
    with pytest.raises(UserError, match="process 1: the disk is full"):
        distributed.together(lambda: 3)
