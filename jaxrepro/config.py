"""Configurations: files, sizes, overrides, and one-line errors for what a user got wrong.

A config file `configs/x.py` defines

    SIZES = {"tiny": {"needs": ..., "minutes": ...}, ...}      what `--list` shows
    get_config(size) -> ConfigDict                             every field with its type
    resolve(config)                                            fills what the user left untouched
    PRESETS = ("paper", ...)                                   optional: values of config.preset

The command line, `reproduce`, notebooks and tests all go through `load`. Override texts are parsed
by ml_collections' config_flags; this module adds the full path of a misspelt key, "did you mean",
and tuples of words (`--config.names=a,b`), which config_flags would read as one word.
Imports nothing heavy: every flag error appears within a fraction of a second. absl and ml_collections
are imported where they are used, so that models and benchmarks, which need `UserError` alone, run
without them.
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
import hashlib
import importlib.util
import inspect
import json
import keyword
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[1]  # of a clone; holds configs/
LARGEST_SEED = 2**32 - 1  # jax.random.key drops what is above 32 bits: 2**32 would repeat 0

_OVERRIDE = re.compile(r"--?(no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)
_EXAMPLES = {
    int: "an int, such as 8 or 1_000",
    float: "a float, such as 0.5 or 1e-5",
    bool: "true or false",
    str: "a string",
    tuple: "a tuple, such as 1,2",
}


class UserError(ValueError):
    """Bad input by the user. The message is one line that says value, limit and remedy.

    The commands print it and exit with code 2; it never shows a traceback.
    """


def load(spec: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> ConfigDict:
    """Resolved, locked configuration of `configs/x.py[:size]`.

    Overrides are a mapping of dotted keys to values, or texts as on the command line
    (`rl.lr=1e-5`, `--config.rl.lr=1e-5`, `--noconfig.flag`). Raises UserError.
    """
    chosen = _load(spec, _words(overrides))
    if chosen.rest:
        raise UserError(f"not an override: {' '.join(chosen.rest)}; write key=VALUE")
    return chosen.config


class Chosen(NamedTuple):
    """What a command line says about the configuration."""

    config: ConfigDict | None  # None without --config
    size: str | None  # the file's default where none was named
    rest: list[str]  # the other words


def take_config(argv: Sequence[str]) -> Chosen:
    """Takes `--config` and its overrides out of a command line; their order does not matter.

    Raises UserError; an override without `--config` is one too.
    """
    spec, words = None, []
    argv = list(argv)
    while argv:
        word = argv.pop(0)
        if word in ("--config", "-config"):
            if not argv:
                raise UserError("--config needs a value: --config=configs/NAME.py[:size]")
            spec = argv.pop(0)
        elif word.startswith(("--config=", "-config=")):
            spec = word.partition("=")[2]
        else:
            words.append(word)
    if spec is None:
        if first := next((w for w in words if _OVERRIDE.fullmatch(w)), None):
            raise UserError(f"{first} overrides a config, so it needs --config=configs/NAME.py")
        return Chosen(None, None, words)
    return _load(spec, words)


def load_module(path: Path) -> ModuleType:
    """Executes a config file; a failure in it becomes a UserError that names file and line."""
    name = f"jaxrepro_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    _in_file(path, spec.loader.exec_module, module)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{path} has no get_config(size), so it is not a config file")
    return module


def folders() -> list[Path]:
    """The configs/ folders that are searched: of the current folder, then of the clone."""
    return list(dict.fromkeys(p for p in (Path.cwd() / "configs", ROOT / "configs") if p.is_dir()))


def files() -> list[Path]:
    """All config files of `folders()`."""
    found = {p.name: p for folder in reversed(folders()) for p in folder.glob("*.py")}
    return [found[name] for name in sorted(found) if not name.startswith("_")]


def flatten(config: ConfigDict | Mapping) -> dict[str, Any]:
    """Dotted key -> value, sorted by key."""
    return dict(sorted(_leaves(config)))


def to_json(config: ConfigDict | Mapping) -> str:
    """The configuration as JSON text; tuples become lists, which `from_json` turns back."""
    return json.dumps(_plain(config), indent=2)


def from_json(text: str) -> ConfigDict:
    """The locked configuration that `to_json` wrote. Raises ValueError when it is not one."""
    from ml_collections import ConfigDict

    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"a configuration is a JSON object, not {type(value).__name__}")
    return ConfigDict(_tuples(value)).lock()


def saved(path: Path) -> ConfigDict:
    """The configuration in a workdir's config.json. Raises UserError."""
    try:
        return from_json(json.dumps(json.loads(path.read_text())["config"]))
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError(f"{path} is not the config.json of a run of jaxrepro.launch") from None


def diff(config_a: ConfigDict | Mapping, config_b: ConfigDict | Mapping) -> list[str]:
    """Dotted keys whose values differ, or that only one of the two has; sorted."""
    a, b = ({k: _canonical(v) for k, v in _leaves(c)} for c in (config_a, config_b))
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


def fingerprint(config: ConfigDict | Mapping, ignore: Sequence[str] = ()) -> str:
    """Hash of keys and values, 16 hexadecimal digits, the same on every machine and in every order.

    `ignore` holds patterns of dotted keys that do not count (`*.every`, `init_from`). Nor does a key
    without a value: an option that is added later, and off, changes no result.
    """
    kept = {
        key: value
        for key, value in _leaves(config)
        if value is not None and not any(fnmatch.fnmatchcase(key, one) for one in ignore)
    }
    return hashlib.sha256(_canonical(kept).encode()).hexdigest()[:16]


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or the choices when nothing is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; choose from {', '.join(known)}" if known else ""


# ---- the file ----


def _load(spec: str, words: Sequence[str]) -> Chosen:
    path, size = _split(spec)
    module = load_module(path)
    config, size = _build(module, path, size)
    words, rest = list(words), []
    while words:
        word = words.pop(0)
        if not (match := _OVERRIDE.fullmatch(word)):
            rest.append(word)
            continue
        negated, key, text = match.groups()
        _check_key(config, key)
        if negated or text is None:
            text = _bare_value(config, word, key, bool(negated), text, words)
        _override(config, key, text)
    return Chosen(_resolve(module, path, config), size, rest)


def _split(spec: str) -> tuple[Path, str | None]:
    name, _, size = spec.partition(":")
    for path in (Path(name), ROOT / name):
        if name and path.is_file():
            return path, size or None
    known = [f"configs/{p.name}" for p in files()]
    same = [k for k in known if Path(k).stem == Path(name).stem]
    hint = f"; did you mean {same[0]}?" if same else did_you_mean(name, known)
    raise UserError(
        f"config file {name!r} does not exist{hint} (config files live in configs/ of a clone of "
        "the repository, not in the installed package: run from the clone's root)"
    )


def _build(module: ModuleType, path: Path, size: str | None) -> tuple[ConfigDict, str | None]:
    from ml_collections import ConfigDict

    sizes = list(getattr(module, "SIZES", ()))
    if size is None:
        default = next(iter(inspect.signature(module.get_config).parameters.values()), None)
        given = default is not None and isinstance(default.default, str)
        size = default.default if given else sizes[0] if sizes else None
    elif sizes and size not in sizes:
        raise UserError(f"{path.name} has no size {size!r}; choose from {', '.join(sizes)}")
    config = _in_file(path, module.get_config, *([] if size is None else [size]))
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {path} returns {type(config).__name__}, not a ConfigDict")
    for key, value in _leaves(config):
        if not isinstance(value, bool | int | float | str | tuple | None):
            remedy = "a tuple" if isinstance(value, list) else "a number, string, bool or tuple"
            raise UserError(f"{path}: {key} is a {type(value).__name__}; make it {remedy}")
        if any(keyword.iskeyword(part) for part in key.split(".")):
            raise UserError(f"{path}: {key} contains a Python keyword, which no flag can set")
    return config.lock(), size


def _resolve(module: ModuleType, path: Path, config: ConfigDict) -> ConfigDict:
    presets, preset = list(getattr(module, "PRESETS", ())), config.get("preset")
    if presets and preset is not None and preset not in presets:
        raise UserError(f"config.preset={preset} is unknown; choose from {', '.join(presets)}")
    if hasattr(module, "resolve"):
        result = _in_file(path, module.resolve, config)
        config = config if result is None else result
    seed = config.get("seed")
    if isinstance(seed, int) and not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"config.seed={seed} is not possible: use 0 to {LARGEST_SEED}")
    return config.lock()


def _in_file(path: Path, function: Any, *args: Any) -> Any:
    """Calls a function of a config file; whatever fails there names the file and the line."""
    try:
        return function(*args)
    except UserError:
        raise
    except Exception as e:
        text = (str(e).splitlines() or [""])[-1].strip()
        if type(e) is ValueError:  # the config file's own verdict on a value
            raise UserError(f"{path}: {text}") from e
        frames = traceback.extract_tb(e.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename) == path.resolve()]
        line = lines[-1] if lines else getattr(e, "lineno", None)
        where = f"{path}:{line}" if line else str(path)
        raise UserError(f"{where}: {type(e).__name__}: {text}") from e


# ---- overrides ----


def _words(overrides: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Programmatic overrides as words of a command line. None means "leave it alone"."""
    if isinstance(overrides, Mapping):
        values = _leaves(overrides)
        return [f"--config.{key}={_text(value)}" for key, value in values if value is not None]
    return [word if word.startswith("-") else f"--config.{word}" for word in overrides]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def _bare_value(
    config: ConfigDict, word: str, key: str, negated: bool, text: str | None, words: list[str]
) -> str:
    """The value of `--config.flag`, `--noconfig.flag` and `--config.key VALUE`."""
    is_bool = _type(config, key) is bool
    if negated:
        if not is_bool or text is not None:
            raise UserError(f"{word}: only a bool can be negated; write --config.{key}=VALUE")
        return "false"
    if is_bool:
        return "true"
    if not words:
        raise UserError(f"--config.{key} needs a value: --config.{key}=VALUE")
    return words.pop(0)


def _override(config: ConfigDict, key: str, text: str) -> None:
    from absl import flags
    from ml_collections import config_flags

    kind = _type(config, key)
    if kind is tuple:
        text = repr(_tuple(config, key, text))
    word = f"--config.{key}={text}"
    parser = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, "", parser, sys_argv=["", word])
        parser(["", word])
    except (flags.Error, TypeError, ValueError):
        raise _wrong_type(key, text, kind) from None


def _check_key(config: ConfigDict, key: str) -> None:
    leaves = flatten(config)
    if key in leaves:
        return
    inside = [k for k in leaves if k.startswith(key + ".")]
    if inside:
        raise UserError(f"config.{key} is a section; set one of its keys: {', '.join(inside[:8])}")
    raise UserError(f"unknown key config.{key}{_suggest(key, list(leaves))}")


def _suggest(key: str, known: list[str]) -> str:
    """The same name in another section, then the closest path, then the keys beside it."""
    last = key.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == last]
    close = same or difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if not close:
        names = {k.rpartition(".")[2]: k for k in reversed(known)}
        close = [names[n] for n in difflib.get_close_matches(last, names, n=1, cutoff=0.7)]
    if close:
        return f"; did you mean {' or '.join('config.' + k for k in close[:3])}?"
    section = key.rpartition(".")[0]
    beside = [k for k in known if k.rpartition(".")[0] == section] or known
    more = ", ..." if len(beside) > 12 else ""
    return f"; there are {', '.join(beside[:12])}{more}"


def _wrong_type(key: str, text: str, kind: type) -> UserError:
    remedy = ""
    if kind is int:
        try:
            number = float(text)
            remedy = f"; write {int(number)}" if number == int(number) else ""
        except (ValueError, OverflowError):
            pass
    takes = _EXAMPLES.get(kind, kind.__name__)
    return UserError(f"config.{key}={text} is not possible: it takes {takes}{remedy}")


def _tuple(config: ConfigDict, key: str, text: str) -> tuple:
    """A tuple from `1,2`, `(1, 2)`, `a,b` or `('a', 'b')`, its members typed like the default's."""
    default = _get(config, key) or ()
    kinds = {type(member) for member in default}
    kind = kinds.pop() if len(kinds) == 1 else None
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        value = None
    literal = tuple(value) if isinstance(value, tuple | list) else (value,)
    words = tuple(w.strip(" '\"") for w in text.strip("()[] ").split(",") if w.strip())
    if kind is str:
        return literal if all(isinstance(m, str) for m in literal) else words
    if kind is float and all(type(m) in (int, float) for m in literal):
        return tuple(float(m) for m in literal)
    if kind is None:
        return words if value is None else literal
    if all(type(m) is kind for m in literal):
        return literal
    raise UserError(
        f"config.{key}={text} is not possible: it takes a tuple whose members are of type "
        f"{kind.__name__}, such as {','.join(map(str, default))}"
    )


# ---- trees ----


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _type(config: ConfigDict, key: str) -> type:
    section, _, last = key.rpartition(".")
    return (_get(config, section) if section else config).get_type(last)


def _leaves(config: ConfigDict | Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if _is_section(value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_section(value: Any) -> bool:
    from ml_collections import ConfigDict

    return isinstance(value, ConfigDict | Mapping)


def _plain(value: Any) -> Any:
    from ml_collections import FieldReference

    if isinstance(value, FieldReference):
        value = value.get()
    if _is_section(value):
        return {name: _plain(member) for name, member in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(member) for member in value]
    return value


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(member) for name, member in value.items()}
    return tuple(_tuples(m) for m in value) if isinstance(value, list) else value


def _canonical(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"))
