"""Files appear whole or not at all, and a full disk is one line."""

import errno
import json
import subprocess

import pytest

from jaxrepro import files
from jaxrepro.config import UserError


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    for bad, error in (({"a": object()}, TypeError), ({"a": float("nan")}, ValueError)):
        with pytest.raises(error):
            files.write_json(path, bad)
    with pytest.raises(KeyError), files.whole(path) as file:
        file.write(b"half")
        raise KeyError("a crash while writing")
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_was_written_reads_back_and_folders_are_made(tmp_path):
    data = {"text": "\u00e9 \u2028", "n": [1, 2.5, None], "deep": {"x": True}}
    files.write_json(tmp_path / "new" / "folder" / "x.json", data)
    assert files.read_json(tmp_path / "new" / "folder" / "x.json") == data
    files.write_text(tmp_path / "a.md", "\u00e9\n")
    assert (tmp_path / "a.md").read_bytes() == "\u00e9\n".encode()


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no x\.json in"):
        files.read_json(tmp_path / "x.json")
    for content in (b"{", b"", b"\xff", b"[" * 200_000):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.json is damaged: it is not JSON"):
            files.read_json(tmp_path / "x.json")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read: Is a directory$"):
        files.read_json(tmp_path)


def test_full_disk_and_forbidden_places_are_one_line():
    for error, said in [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (ValueError("INTERNAL: write failed: No space left on device [OS error 28]"), "is full"),
        (OSError(errno.EROFS, "Read-only file system"), r"cannot be written \(Read-only file"),
    ]:
        with pytest.raises(UserError, match=said), files.writing("out"):
            raise error
    with pytest.raises(KeyError), files.writing("out"):
        raise KeyError("a bug stays a bug")


def test_the_commit_says_when_tracked_code_differs(tmp_path):
    assert files.commit(tmp_path) == "unknown"
    git = lambda *args: subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *args], check=True
    )
    (tmp_path / "jaxrepro").mkdir()
    code = tmp_path / "jaxrepro" / "a.py"
    code.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    clean = files.commit(tmp_path)
    assert len(clean) == 12 and clean.isalnum()
    (tmp_path / "jaxrepro" / "new.py").write_text("")  # not tracked
    assert files.commit(tmp_path) == clean
    code.write_text("2")
    assert files.commit(tmp_path) == clean + "-dirty"
