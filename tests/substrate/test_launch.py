"""The command line: one-line errors, exit codes, and what reaches a method's run."""

import errno
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import jaxrepro.methods
from jaxrepro import cli, config, evaluate, exits, launch, sample, study
from jaxrepro.config import UserError

FAKE = str(Path(__file__).parent / "fixtures" / "fake.py")
METHOD = """
import errno
import json
from jaxrepro.config import UserError

def run(config, workdir, *, resume="auto", profile=None):
    if config.name == "user":
        raise UserError("two\\nlines")
    if config.name == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "x/metrics.jsonl")
    if config.name == "tensorstore":
        raise ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device")
    if config.name == "bug":
        raise ValueError("our fault")
    if config.name == "stopped":
        raise SystemExit(143)
    print(json.dumps([workdir, resume, profile, config.rl.lr]))
    return {}

def plan(config):
    import jax
    from jax.sharding import NamedSharding, PartitionSpec
    from jaxrepro.sharding import abstract_mesh, batch_sharding
    from jaxrepro.train.memory import Plan, sharded

    mesh = abstract_mesh(config.mesh)
    params = {"w": jax.ShapeDtypeStruct((512, 1000), "float32")}
    params = sharded(params, NamedSharding(mesh, PartitionSpec("data")))
    batch = {"tokens": jax.ShapeDtypeStruct((256, 64), "int32")}
    return Plan(params=params, batch=sharded(batch, batch_sharding(mesh)), mesh=mesh)

def evaluate(config, workdir, *, split, n):
    return {f"{split}/accuracy": 0.5, f"{split}/accuracy_lo": 0.25, f"{split}/accuracy_hi": 0.75, f"{split}/n": n}

def sample(config, workdir, *, prompt, image, n, temperature, seed):
    return [f"{prompt} {image} {temperature} {seed}"] * n
"""


@pytest.fixture
def method(tmp_path, monkeypatch):
    """A method `fake`, beside the real ones."""
    folder = tmp_path / "methods" / "fake"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "run.py").write_text(METHOD)
    path = [*jaxrepro.methods.__path__, str(folder.parent)]
    monkeypatch.setattr(jaxrepro.methods, "__path__", path)
    monkeypatch.setattr(cli, "setup_jax", lambda: None)
    monkeypatch.setattr(cli, "exit_on_sigterm", lambda: None)
    yield folder
    for name in [n for n in sys.modules if n.startswith("jaxrepro.methods.fake")]:
        del sys.modules[name]


@pytest.fixture
def trained(tmp_path):
    """A workdir with a configuration and a checkpoint."""
    folder = tmp_path / "work"
    (folder / "checkpoints" / "rl" / "4").mkdir(parents=True)
    text = json.dumps({"config": json.loads(config.to_json(config.load(FAKE)))})
    (folder / "config.json").write_text(text)
    return folder


def fails(capsys, *words: str, main=launch.main) -> str:
    """The line on stderr of a command that must exit with 2 and say nothing else."""
    assert cli.guard(main, list(words)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["--config=configs/NAME.py", "--list"]),
        (["--config=configs/nope.py"], ["configs/nope.py", "clone"]),
        ([f"--config={FAKE}:huge"], ["huge", "tiny, large"]),
        ([f"--config={FAKE}", "--config.rl.lrr=1"], ["did you mean config.rl.lr?"]),
        ([f"--config={FAKE}", "--config.seed=1e3"], ["write 1000"]),
        ([f"--config={FAKE}", "--config.shuffle=yes"], ["true or false"]),
        ([f"--config={FAKE}", "stray", "words"], ["not understood: stray words"]),
        ([f"--config={FAKE}", "--", "stray"], ["not understood"]),
        ([f"--config={FAKE}", "--rl.lr=1"], ["--config.rl.lr"]),
        ([f"--config={FAKE}", "--wrkdir=a"], ["--wrkdir", "did you mean --workdir?"]),
        ([f"--config={FAKE}", "--dry-run"], ["did you mean --dry_run?"]),
        ([f"--config={FAKE}", "--resume=yes"], ["resume=yes", "auto|never|must"]),
        ([f"--config={FAKE}", "--profile=3"], ["--profile=3", "start:count"]),
        ([f"--config={FAKE}", "--profile=3:0"], ["start:count"]),
        ([f"--config={FAKE}", "--process_id=x"], ["process_id=x"]),
        ([f"--config={FAKE}", "--workdir"], ["workdir"]),
        ([f"--config={FAKE}", "--nolist=3"], ["nolist"]),
        (["--config"], ["--config"]),
        (["--config.seed=3"], ["--config="]),
        ([f"--config={FAKE}", "--config.method=fke"], ["config.method=fke", "did you mean fake?"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, parts, capsys, method):
    line = fails(capsys, *words)
    assert all(part in line for part in parts), line


def test_run_receives_config_workdir_and_flags(capsys, method):
    words = [
        f"--config={FAKE}",
        "--workdir=w",
        "--resume=must",
        "--profile=3:2",
        "--config.rl.lr=2",
    ]
    assert cli.guard(launch.main, words) == 0
    banner, line = capsys.readouterr().out.splitlines()
    assert json.loads(line) == ["w", "must", "3:2", 2.0]
    assert "jax " in banner and "8 x " in banner


def test_workdir_defaults_to_method_and_size(capsys, method):
    assert cli.guard(launch.main, [f"--config={FAKE}:large"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[0] == "runs/fake-large"


@pytest.mark.parametrize(
    ("name", "part"),
    [("user", "error: two lines"), ("full", "x/metrics.jsonl"), ("tensorstore", "disk is full")],
)
def test_what_a_user_can_repair_is_one_line(name, part, capsys, method):
    assert part in fails(capsys, f"--config={FAKE}", f"--config.name={name}")


def test_our_own_faults_keep_their_traceback(method):
    with pytest.raises(ValueError, match="our fault"):
        cli.guard(launch.main, [f"--config={FAKE}", "--config.name=bug"])


def test_a_stopped_run_exits_with_143(method):
    with pytest.raises(SystemExit) as stopped:
        cli.guard(launch.main, [f"--config={FAKE}", "--config.name=stopped"])
    assert stopped.value.code == 143


def test_a_missing_package_of_a_method_is_named(capsys, method):
    (method / "run.py").write_text("import no_such_package\n")
    assert "no_such_package" in fails(capsys, f"--config={FAKE}")


def test_out_of_device_memory_is_one_line():
    error = type("JaxRuntimeError", (RuntimeError,), {})
    line = exits.repairable(
        error("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")
    )
    assert "17179869184" in line and "--dry_run" in line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM])
def test_disk_errors_name_the_file(number):
    assert "some/file" in exits.repairable(OSError(number, "text", "some/file"))
    assert exits.repairable(OSError(errno.ENOENT, "text", "some/file")) is None


def test_help_and_errors_of_the_real_process():
    def run(*words):
        command = [sys.executable, "-m", "jaxrepro.launch", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=config.ROOT)

    shown = run("--config=configs/nope.py", "--help")
    assert shown.returncode == 0 and "--workdir" in shown.stdout and not shown.stderr
    wrong = run(f"--config={FAKE}", "--config.sede=3")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == "error: unknown key config.sede; did you mean config.seed?\n"


def test_list_shows_sizes_needs_and_minutes(capsys, monkeypatch):
    monkeypatch.setattr(config, "folders", lambda: [Path(FAKE).parent])
    assert cli.guard(launch.main, ["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["config", "needs", "minutes"]
    assert lines[2].split() == ["configs/fake.py:large", "256", "devices", "unmeasured"]
    monkeypatch.setattr(config, "folders", lambda: [])
    assert "clone" in fails(capsys, "--list")


# ---- evaluate and sample ----


def test_evaluate_prints_metrics_with_their_interval(capsys, method, trained):
    assert cli.guard(evaluate.main, [f"--workdir={trained}", "--split=val", "--n=8"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["val/accuracy", "0.5", "[0.25,", "0.75]"]
    assert second.split() == ["val/n", "8"]


def test_sample_prints_the_answers(capsys, method, trained, tmp_path):
    from PIL import Image

    image = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(image)
    words = [f"--workdir={trained}", "--prompt=why", f"--image={image}", "--n=2", "--seed=3"]
    assert cli.guard(sample.main, words) == 0
    assert capsys.readouterr().out == f"why {image} None 3\n\nwhy {image} None 3\n"


@pytest.mark.parametrize("seed", [-1, 2**32, 99999999999999999999])
def test_a_seed_that_no_key_holds_is_one_line(seed, capsys, method, trained):
    assert f"--seed={seed}" in fails(
        capsys, f"--workdir={trained}", f"--seed={seed}", main=sample.main
    )


@pytest.mark.parametrize("main", [evaluate.main, sample.main])
def test_a_foreign_workdir_is_one_line(main, capsys, tmp_path, trained):
    assert "--workdir" in fails(capsys, main=main)
    assert "not a folder" in fails(capsys, f"--workdir={tmp_path / 'none'}", main=main)
    assert "config.json" in fails(capsys, f"--workdir={tmp_path}", main=main)
    (trained / "checkpoints" / "rl" / "4").rename(trained / "checkpoints" / "rl" / "4.orbax-tmp")
    assert "no checkpoint" in fails(capsys, f"--workdir={trained}", main=main)
    assert "not understood" in fails(capsys, "stray", main=main)
    (trained / "config.json").write_text("{}")
    assert "config.json" in fails(capsys, f"--workdir={trained}", main=main)


def test_an_unreadable_image_is_one_line(capsys, method, trained, tmp_path):
    image = tmp_path / "a.png"
    words = (f"--workdir={trained}", f"--image={image}")
    assert "does not exist" in fails(capsys, *words, main=sample.main)
    image.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert "cannot be read" in fails(capsys, *words, main=sample.main)


# ---- dry runs ----


@pytest.mark.parametrize(("size", "memory"), [("tiny", "2.05 MB"), ("large", "8.00 kB")])
def test_a_dry_run_shows_parameters_memory_mesh_and_batch(size, memory, capsys, method, tmp_path):
    words = [f"--config={FAKE}:{size}", "--dry_run", f"--workdir={tmp_path / 'w'}"]
    assert cli.guard(launch.main, words) == 0
    shown = capsys.readouterr().out
    assert "parameters: 512,000" in shown and memory in shown and "int32[256, 64]" in shown
    assert "mesh: data=" in shown and '"lr": 0.001' in shown and "estimate" in shown
    assert not (tmp_path / "w").exists()


def sizes():
    """(spec, marks) of every size of every config file of the repository."""
    found = []
    for path in config.files():
        try:
            known = getattr(config.load_module(path), "SIZES", {"": {}})
        except UserError:
            known = {"": {}}  # fails inside its test, not at collection
        found += [f"configs/{path.name}:{size}".rstrip(":") for size in known]
    skip = pytest.mark.skip(reason="configs/ holds no config file yet")
    return found or [pytest.param("none", marks=skip)]


@pytest.mark.parametrize("spec", sizes())
def test_every_size_of_every_config_passes_dry_run(spec, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("a dry run opens no connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert cli.guard(launch.main, [f"--config={spec}", "--dry_run"]) == 0
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("spec", sizes())
def test_the_claims_of_every_size_are_read_and_their_arms_resolve(spec):
    module = config.load_module(config.ROOT / spec.partition(":")[0])
    if callable(getattr(module, "get_claims", None)):
        assert study.config_hash(study.load(spec))
