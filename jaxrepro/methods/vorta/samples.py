"""Videos of finished or given routers as files, `run.sample`: prompts to latents, GIF or mp4, nothing half-written.

    WORKDIR/videos/N/WAY/PROMPT-I.mp4     a film, or .gif; none for a folder of latents without decode.vae
                     latents/WAY/         a folder that data/latents.py reads, texts included
                     routes.json          the table

N is the next free number, WAY a name of decode.videos ("few/routed" is few-routed), I counts the videos of a prompt,
from 0. PROMPT is its words, or the name of its clip or item, which may be its words: so VBench finds the prompt of a
video, and two folders of films are compared by name (data/compare_videos.py).
"""

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.data import latents, video_clips, video_output
from jaxrepro.distributed import first
from jaxrepro.methods.vorta import drawing, evaluation, routes, sources
from jaxrepro.methods.vorta.routes import Routes
from jaxrepro.methods.vorta.setting import Setting
from jaxrepro.models.hf import new_folder

FORMATS = {"gif": video_output.FASTEST_GIF, "mp4": 240}  # most frames a second
LONGEST = 60  # letters of a name
LONGEST_FILE = 200  # bytes: file systems take 255, with the index, the suffix and what a file is called while written


def check(config: Any) -> None:
    """UserError for settings of the files that can't work."""
    decode = config.decode
    if decode.format not in FORMATS:
        raise UserError(f"decode.format={decode.format!r} is not one of {', '.join(FORMATS)}")
    if not 0 < decode.fps <= FORMATS[decode.format]:
        raise UserError(
            f"decode.fps={decode.fps}; use more than 0 and up to {FORMATS[decode.format]} for {decode.format}"
        )
    if decode.vae and config.data.kind != "folder":
        raise UserError(
            f"decode.vae={decode.vae!r:.60} reads latents of a released model: use data.kind=folder, or leave it out"
        )


def installed(config: Any) -> None:
    """UserError where a package is missing that the files need: before anything is sampled."""
    if config.decode.format == "mp4":
        video_clips.pyav()
    if config.decode.vae:
        missing = [n for n in ("torch", "diffusers") if importlib.util.find_spec(n) is None]
        if missing:
            raise UserError(
                f"decode.vae needs {' and '.join(missing)}: {video_output.NEEDED}, or leave it out"
            )


def write(
    s: Setting,
    params: Any,
    routers: Any,
    workdir: Any,
    *,
    prompt: str | None,
    n: int,
    seed: int,
) -> list[str]:
    """Sample n videos by each way of decode.videos and write them; a line for each file or folder."""
    config = s.config
    prompts = sources.prompted(config, s.cfg, s.grid, prompt, n=n, seed=seed)
    table = drawing.given(config, s.cfg)
    if table is None:
        table = evaluation.table_of(s, params, routers, config.decode.tau)
    videos = {
        name: drawing.sample(s, params, prompts, drawing.way(config, name, table))
        for name in config.decode.videos
    }
    return first(lambda: _write(s, Path(workdir), prompts, table, videos))


def _write(s, workdir, prompts, table, videos):
    folder = next_folder(workdir / "videos")
    seen = {name: sources.pictures(s.config, s.cfg, s.grid, x) for name, x in videos.items()}
    made = save(s, folder, prompts, videos, seen, table)
    return [str(folder / name) for name in made]


def save(
    s: Setting,
    folder: Path,
    prompts: sources.Prompts,
    videos: dict[str, np.ndarray],
    pictures: dict[str, np.ndarray | None],
    table: Routes | None = None,
) -> list[str]:
    """Latents of each way below a new folder, films where there are pictures, and a table; their names."""
    made, model = [], "other"
    if s.config.data.kind == "folder":  # whose latents and texts they are
        model = sources.folder(s.config, s.cfg, s.grid, "test").model
    with new_folder(folder) as temporary:
        if table is not None:
            routes.save(temporary / "routes.json", table)
        for name, x in videos.items():
            way = name.replace("/", "-")
            latents.write(
                temporary / "latents" / way,
                examples(prompts, x),
                model=model,
                normalised=True,
            )
            if (seen := pictures.get(name)) is not None:
                made += films(temporary / way, s.config.decode, prompts.names, seen)
    return [*made, "latents", *(["routes.json"] if table is not None else [])]


def films(folder: Path, decode: Any, names: list[str], pictures: np.ndarray) -> list[str]:
    """A film of each video in a new folder, small ones enlarged to about 96 rows; their names below its parent."""
    folder.mkdir()
    made, write = [], dict(gif=video_output.write_gif, mp4=video_output.write_mp4)[decode.format]
    for name, film in zip(film_names(names), pictures):
        path = folder / f"{name}.{decode.format}"
        write(path, video_output.enlarge(film, max(96 // film.shape[1], 1)), fps=decode.fps)
        made.append(f"{folder.name}/{path.name}")
    return made


def film_names(prompts: list[str]) -> list[str]:
    """`PROMPT-I` of each video. What the name of a file cannot hold is replaced (slashes) or cut (LONGEST_FILE)."""
    seen, found = Counter(), []
    for prompt in prompts:
        name = re.sub(r"[\x00-\x1f\x7f/\\]+", "-", prompt).strip().lstrip(".-")
        name = name.encode(errors="ignore")[:LONGEST_FILE].decode(errors="ignore") or "video"
        found.append(f"{name}-{seen[name]}")
        seen[name] += 1
    return found


def examples(prompts: sources.Prompts, x: np.ndarray) -> list[dict[str, Any]]:
    """Latents and their texts as `latents.write` takes them."""
    found = []
    for i, name in enumerate(prompts.names):
        row = {"id": f"{i}/{name}", "latents": x[i], "text": np.asarray(prompts.given.text[i])}
        if prompts.given.length is not None:
            row["length"] = int(prompts.given.length[i])
        if prompts.given.pooled is not None:
            row["pooled"] = np.asarray(prompts.given.pooled[i])
        found.append(row)
    return found


def next_folder(parent: Path) -> Path:
    """The folder of the next free number."""
    taken = [int(p.name) for p in parent.glob("*") if p.name.isdecimal()]
    return parent / str(max(taken, default=-1) + 1)


def plain(name: str) -> str:
    """A name as a few letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:LONGEST] or "video"
