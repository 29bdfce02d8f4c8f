"""Battles to look at: pictures, a file of an episode, and a GIF.

A replay file is an npz without objects: version, map_size, red (agents of red; the others are blue), pos (t + 1, n, 2),
alive (t + 1, n), hp (t + 1, n), actions (t, n), and the names and values of the parameters.
"""

import dataclasses
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxrepro.config import UserError
from jaxrepro.envs import battle_rules as rules
from jaxrepro.files import whole, writing

VERSION = 1
SHADES = 8  # of each team's colour, by hp
FASTEST_GIF = 50  # frames a second; viewers slow down what is faster
_FIELD, _WALL, _BLOW = 0, 1, 2  # colours before the teams' shades


def _palette():
    fade = np.linspace(0.35, 0.0, SHADES)[:, None]  # the weak are pale
    shades = [np.array(c) + fade * (255 - np.array(c)) for c in ((200, 30, 30), (30, 70, 200))]
    return np.concatenate([[(245, 245, 240), (90, 90, 90), (250, 190, 0)], *shades]).astype(
        np.uint8
    )


PALETTE = _palette()


class Replay(NamedTuple):
    """An episode; numpy arrays."""

    pos: np.ndarray  # (t + 1, n, 2) int32: x, y
    alive: np.ndarray  # (t + 1, n) bool
    hp: np.ndarray  # (t + 1, n) float32
    actions: np.ndarray  # (t, n) int32
    map_size: int
    red: int  # so many agents are red, the others blue
    params: Mapping[str, float]


def record(env: Any, states: Any, actions: Any, params: Any) -> Replay:
    """The replay of one episode of a `Battle`.

    states: as a scan stacks them, (t + 1, ...), the first that of reset; actions: team -> (t, A).
    """
    pos, alive, hp = (np.asarray(x) for x in (states.pos, states.alive, states.hp))
    chosen = np.concatenate([np.asarray(actions[team], np.int32) for team in env.teams], 1)
    values = {k: float(v) for k, v in dataclasses.asdict(params).items()}
    made = Replay(pos, alive, hp, chosen, env.map_size, env.sizes["red"], values)
    _check(made, "the replay")
    return made


def save_replay(path: str | os.PathLike[str], replay: Replay) -> None:
    """Writes a replay file, whole or not at all."""
    _check(replay, "the replay")
    arrays = {name: getattr(replay, name) for name in ("pos", "alive", "hp", "actions")}
    names = np.array(list(replay.params), "U")
    values = np.array(list(replay.params.values()), np.float64)
    numbers = {"version": VERSION, "map_size": replay.map_size, "red": replay.red}
    memory = io.BytesIO()
    np.savez_compressed(memory, **arrays, **numbers, names=names, values=values)
    with writing(path), whole(path) as file:
        file.write(memory.getvalue())


def load_replay(path: str | os.PathLike[str]) -> Replay:
    """Reads a replay file; UserError of one line where it is missing, damaged, or of another version."""
    path = Path(path)
    try:
        # from memory: numpy leaves a file open that it cannot read
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it is one array")
            found = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise UserError(f"there is no replay {path}") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; name a replay file in it") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no replay file, or damaged; record it again") from error
    version = found.get("version")
    if version is None or version.shape != () or version != VERSION:
        raise UserError(
            f"{path} has replay version {version}; this program reads version {VERSION}; record it again"
        )
    lacks = {"pos", "alive", "hp", "actions", "map_size", "red", "names", "values"} - set(found)
    if lacks:
        raise UserError(f"{path} lacks {', '.join(sorted(lacks))}; record it again")
    try:
        params = dict(zip(found["names"].tolist(), found["values"].tolist(), strict=True))
        arrays = (found[name] for name in ("pos", "alive", "hp", "actions"))
        made = Replay(*arrays, int(found["map_size"]), int(found["red"]), params)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path} has sizes or parameters that are no numbers; record it again"
        ) from error
    _check(made, str(path))
    return made


def _check(replay, name):
    t, n = replay.alive.shape if replay.alive.ndim == 2 else (0, 0)
    shapes = {"pos": (t, n, 2), "alive": (t, n), "hp": (t, n), "actions": (t - 1, n)}
    kinds = {"pos": "iu", "alive": "b", "hp": "f", "actions": "iu"}
    for field, shape in shapes.items():
        x = getattr(replay, field)
        if t < 1 or x.shape != shape or x.dtype.kind not in kinds[field]:
            raise UserError(
                f"{name}: {field} is {x.dtype} of shape {x.shape}, which does not fit {t} moments of {n} agents; "
                "record it again"
            )
    size = replay.map_size
    if size < rules.LEAST_MAP or not 0 <= replay.red <= n:
        raise UserError(
            f"{name}: map_size={size}, red={replay.red} of {n} agents is not possible; record it again"
        )
    inside = (replay.pos >= 0) & (replay.pos < size)
    if not inside.all() or not np.isfinite(replay.hp).all():
        raise UserError(
            f"{name}: a position is off the map of {size}, or an hp is no number; record it again"
        )


def render(state: Any, *, scale: int = 8) -> UInt8[np.ndarray, "y x rgb"]:
    """A picture of a `BattleState`: walls, red and blue by hp, and the cells that were struck at, scale pixels each."""
    pos, alive, hp, action = (
        np.asarray(x) for x in (state.pos, state.alive, state.hp, state.action)
    )
    action = np.where(state.fought, action, rules.STAY)
    size = state.occupied.shape[-1]
    return PALETTE[_indices(size, pos, alive, hp, len(pos) // 2, action, pos, scale)]


def frames(replay: Replay, *, scale: int = 8) -> UInt8[np.ndarray, "t y x rgb"]:
    """The pictures of a replay; blows are shown where they were struck from."""
    return PALETTE[_frames(replay, scale)]


def write_gif(
    path: str | os.PathLike[str], replay: Replay, *, fps: int | float = 8, scale: int = 8
) -> None:
    """Writes an endless GIF of a replay."""
    from PIL import Image

    if not 0 < fps <= FASTEST_GIF:
        raise UserError(f"fps is {fps}; a GIF runs at more than 0 and at most {FASTEST_GIF}")
    pictures = [Image.fromarray(picture) for picture in _frames(replay, scale)]
    for picture in pictures:
        picture.putpalette(PALETTE.tobytes())
    with writing(path), whole(path) as file:
        pictures[0].save(
            file, format="GIF", save_all=True, append_images=pictures[1:], duration=10 * round(100 / fps), loop=0
        )  # fmt: skip


def _frames(replay, scale):
    pictures = []
    for t in range(len(replay.pos)):
        # the blows that led here, struck from where their agents stood
        action = replay.actions[t - 1] if t else np.full(replay.pos.shape[1], rules.STAY)
        struck = replay.alive[max(t - 1, 0)]
        action = np.where(struck, action, rules.STAY)
        pictures.append(
            _indices(
                replay.map_size, replay.pos[t], replay.alive[t], replay.hp[t], replay.red, action, replay.pos[max(t - 1, 0)], scale
            )
        )  # fmt: skip
    return np.stack(pictures)


def _indices(size, pos, alive, hp, red, action, struck_from, scale):
    """(y, x) uint8 rows of the palette."""
    if scale < 1:
        raise UserError(f"scale is {scale}; it must be 1 or more")
    picture = np.where(rules.walls(size) == rules.WALL, _WALL, _FIELD).astype(np.uint8)
    shade = np.clip(np.ceil(hp / rules.FULL_HP * (SHADES - 1)), 0, SHADES - 1).astype(np.uint8)
    colour = 3 + SHADES * (np.arange(len(pos)) >= red) + shade
    x, y = pos[alive].T
    picture[y, x] = colour[alive]
    picture = picture.repeat(scale, 0).repeat(scale, 1)
    quarter = scale // 4  # a blow is a mark amid its cell, so that who stands there is seen
    for i in np.flatnonzero((action >= rules.FIRST_ATTACK) & (action < rules.NUM_ACTIONS)):
        u, v = struck_from[i] + rules.OFFSETS[action[i]]
        rows = slice(v * scale + quarter, (v + 1) * scale - quarter)
        picture[rows, u * scale + quarter : (u + 1) * scale - quarter] = _BLOW
    return picture
