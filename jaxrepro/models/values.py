"""Values of a model's JSON files, each checked where it is read.

A key that is missing or null means the default; where that is None too, the file must have it. What is
of another type or out of its range is a UserError of one line that names the key, however odd the value.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrepro.config import UserError

# What a file's numbers may be, so that no product of two leaves float32, and no size an index of XLA.
TINY, LARGE, LONGEST = 1e-30, 1e30, 2**31 - 1
DEEPEST = 2**16  # layers; the lists of them stay short


def shown(text: str) -> str:
    """A text from a file for an error: short, and without characters that a terminal obeys."""
    return text[:64] if text.isprintable() else repr(text[:64])


def wrong(name: str, value: Any, wanted: str, *, file: str = "config.json") -> UserError:
    """The error of a value that is not `wanted`."""
    return UserError(f"{file}: {name} is {value!r:.60}; it must be {wanted}")


def get(of: Mapping[str, Any], name: str, default: Any) -> Any:
    """Any value but null."""
    value = default if of.get(name) is None else of[name]
    if value is None:
        raise UserError(f"config.json lacks {name!r}")
    return value


def size(
    of: Mapping[str, Any],
    name: str,
    default: int | None = None,
    *,
    least: int = 1,
    most: int = LONGEST,
) -> int:
    """An integer from `least` to `most`."""
    value = get(of, name, default)
    if type(value) is not int or not least <= value <= most:
        raise wrong(name, value, f"an integer from {least} to {most}")
    return value


def number(
    of: Mapping[str, Any],
    name: str,
    default: int | float | None = None,
    *,
    least: int | float = TINY,
) -> float:
    """A number from `least` to LARGE."""
    value = get(of, name, default)
    if type(value) not in (int, float) or not least <= value <= LARGE:
        raise wrong(name, value, f"a number from {least:g} to {LARGE:g}")
    return float(value)


def flag(of: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """true or false; the text "false" is neither."""
    value = get(of, name, default)
    if type(value) is not bool:
        raise wrong(name, value, "true, false or null")
    return value


def mapping(of: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object; {} where there is none."""
    value = get(of, name, {})
    if not isinstance(value, Mapping):
        raise wrong(name, value, "an object or null")
    return value


def listing(of: Mapping[str, Any], name: str) -> Sequence[Any] | None:
    """A list, of anything; None where there is none."""
    value = of.get(name)
    if value is not None and not isinstance(value, list | tuple):
        raise wrong(name, value, "a list or null")
    return value


def tokens(
    of: Mapping[str, Any], name: str, vocab: int | None = None, *, file: str = "config.json"
) -> list[int]:
    """Token ids below `vocab`, written as one number or as a list; [] where there are none."""
    value = get(of, name, [])
    found = list(value) if isinstance(value, list | tuple) else [value]
    most = LONGEST if vocab is None else vocab - 1
    if not all(type(t) is int and 0 <= t <= most for t in found):
        raise wrong(name, value, f"a token id from 0 to {most}, or a list of them", file=file)
    return found
