"""Log-probabilities of the frozen reference, computed once and kept in a folder.

A file's name is a fingerprint of the weights, of every token that they read and of what was computed, so one made
with another model, tokenizer, chat template (also one that writes today's date), truncation or data is never found.
Scores and labels do not count: the reference does not see them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro.config import UserError
from jaxrepro.data import locate
from jaxrepro.files import whole, writing
from jaxrepro.methods.dpo.rows import Item, Shape, prompts_of

_VERSION = "2"  # of what a fingerprint covers
CLOSE = 1e-2  # nats a token, in float32
COARSE = 16  # roundings of a computation in bfloat16 that a token's log-prob may be off


def weights(params: Any, cfg: Any) -> str:
    """Identity of a model: its parameters, leaf by leaf, and its config, computation dtype included.

    Reads every parameter once on the host (seconds a gigabyte); each leaf must be whole on this process.
    """
    found = hashlib.blake2b(repr(cfg).encode(), digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
        found.update(value.reshape(-1).view(np.uint8))
    return found.hexdigest()


def fingerprint(
    model: str, items: Sequence[Item], shape: Shape, names: Sequence[str] = ("lp",)
) -> str:
    """32 hexadecimal digits of a model (`weights`) and the tokens of these items, in this order.

    names: what is computed of each token, in the order in which it is kept.
    """
    what = f"{_VERSION} {model} {tuple(shape)} {tuple(names)}"
    found = hashlib.blake2b(what.encode(), digest_size=16)
    for one in items:
        for ids in (*prompts_of(one), *one["responses"]):
            found.update(np.array([len(ids), *ids], np.int64))
        found.update(b"next")
    return found.hexdigest()


def folder() -> Path:
    """Where log-probs of references are kept: beside fetched models."""
    return locate.cache() / "reference"


def compare(kept: np.ndarray, live: np.ndarray, ids: Sequence[str], dtype: Any) -> None:
    """UserError where values (n, names, k, c) from the cache are not those that the reference gives now.

    dtype: in which the model computes.
    """
    apart, close = np.abs(kept - live), np.full(kept.shape, CLOSE)
    if jnp.finfo(dtype).bits < 32:
        # A bfloat16 logit of 20 is rounded by 1/16, and another program rounds otherwise: a single token may
        # well be 0.1 off. Such errors are independent, so those of a response add up like the root of its
        # length; another template or model shifts its sum by far more.
        apart = np.abs(kept.sum(-1) - live.sum(-1))
        length = np.maximum((kept != 0).sum(-1), 1)
        close = COARSE * float(jnp.finfo(dtype).eps) * np.sqrt(length)
    worst = np.unravel_index(int((apart / close).argmax()), apart.shape)
    if not apart[worst] <= close[worst]:
        raise UserError(
            f"example {ids[worst[0]]}: the cached reference is {apart[worst]:.3g} nats from the live one "
            f"(limit {close[worst]:.3g}); delete {folder()}"
        )


def save(folder: str | os.PathLike, key: str, lp: Any, *, ids: Sequence[str] = ()) -> Path:
    """Write log-probabilities (n, ...) float32 whole or not at all; the file.

    UserError where a number is not finite; ids name the records in that message.
    """
    lp = np.asarray(lp, np.float32)
    _refuse(lp, ids, "the reference gives it a log-probability that is not finite; check the model")
    path = place(folder, key)
    with writing(path), whole(path) as file:
        np.save(file, lp, allow_pickle=False)
    return path


def load(folder: str | os.PathLike, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """What `save` wrote under this key, or None. UserError for a damaged file or another shape."""
    path = place(folder, key)
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            lp = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{path} is damaged ({e}); delete it, it is computed again") from e
    if lp.shape != shape or lp.dtype != np.float32:
        raise UserError(
            f"{path} holds {lp.dtype} {lp.shape}, float32 {shape} is needed; delete it, it is "
            "computed again"
        )
    _refuse(lp, (), f"{path} holds numbers that are not finite; delete it, it is computed again")
    return lp


def place(folder: str | os.PathLike, key: str) -> Path:
    """The file of a key."""
    return Path(folder) / f"reference-{key}.npy"


def _refuse(lp: np.ndarray, ids: Sequence[str], message: str) -> None:
    bad = np.flatnonzero(~np.isfinite(lp).reshape(len(lp), -1).all(1))
    if len(bad):
        name = ids[bad[0]] if len(ids) else f"number {bad[0]}"
        raise UserError(f"example {name} ({len(bad)} of {len(lp)}): {message}")
