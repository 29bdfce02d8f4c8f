"""Images to patches: the Qwen2-VL image processor in numpy and PIL, and padding to few batch shapes.

Bit-equal to `Qwen2VLImageProcessorPil` of transformers 5: RGB with transparency over white; `smart_resize`
to multiples of patch * merge (28) inside [min_pixels, max_pixels]; bicubic; /255 in float64, then float32;
CLIP mean and standard deviation; one still image repeated to `temporal` frames; patches in block order.

Departure: a file is turned upright by its EXIF tag and then treated like an image in memory, so its
transparency shows white; transformers drops the alpha channel of files and keeps that of images.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.models.vision_tower import Vision, grid_positions

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = 200
Grid = tuple[int, int, int]


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int = 28,
    min_pixels: int = 3136,
    max_pixels: int = 1_003_520,
) -> tuple[int, int]:
    """Height and width in pixels, both multiples of `factor`, area within the bounds, aspect about kept.

    UserError for an empty image and for an aspect ratio above 200. Rounding is to even, as in Python.
    """
    if height < 1 or width < 1:
        raise UserError(f"the image is {height} x {width} pixels; it must have at least one pixel")
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise UserError(
            f"the image is {height} x {width} pixels, an aspect ratio of "
            f"{max(height, width) / min(height, width):.0f}; the limit is {MAX_ASPECT}: crop or pad it"
        )
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / beta / factor) * factor)
        w = max(factor, math.floor(width / beta / factor) * factor)
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return h, w


def load(image: Any) -> Any:
    """PIL image in RGB from a path or a PIL image of any mode; UserError naming an unreadable file."""
    from PIL import Image, ImageOps

    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as file:
                image = ImageOps.exif_transpose(file)
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"cannot read the image file {str(image)!r}: {reason}") from error
    if not isinstance(image, Image.Image):
        raise UserError(f"an image must be a PIL image or a path; got {type(image).__name__}")
    if 0 in image.size:
        raise UserError(
            f"the image is {image.height} x {image.width} pixels; it must have at least one pixel"
        )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def process(
    image: Any,
    *,
    min_pixels: int = 3136,
    max_pixels: int = 1_003_520,
    patch: int = 14,
    merge: int = 2,
    temporal: int = 2,
) -> tuple[np.ndarray, Grid]:
    """Patches (h*w, 3 * temporal * patch^2) float32 in block order, and the grid (1, h, w) in patches.

    `image` is a PIL image of any mode or a path. UserError: unreadable, empty, or longer than 200 : 1.
    """
    from PIL import Image

    image = load(image)
    height, width = smart_resize(
        image.height,
        image.width,
        factor=patch * merge,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
    pixels = np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))
    # The order of roundings is that of the original: float64 product, float32, subtract, divide.
    pixels = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    pixels = (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)  # (y, x, c)
    h, w = height // patch, width // patch
    blocks = pixels.reshape(h // merge, merge, patch, w // merge, merge, patch, 3)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # (h/m, w/m, m, m, c, py, px)
    blocks = np.repeat(blocks[:, :, :, :, :, None], temporal, axis=5)
    return blocks.reshape(h * w, -1), (1, h, w)


def tokens_of(grid: Grid, merge: int = 2) -> int:
    """Number of image_pad tokens of a (t, h, w) grid: t * h * w / merge^2."""
    t, h, w = grid
    return t * h * w // merge**2


def bucket(n: int, *, minimum: int = 64) -> int:
    """Least of minimum * {1, 1.5, 2, 3, 4, 6, ...} that holds n: few shapes, at most a third of padding."""
    size = minimum
    while size < n:
        if size + size // 2 >= n:
            return size + size // 2
        size *= 2
    return size


def collate(
    rows: Sequence[Sequence[tuple[np.ndarray, Grid]]],
    *,
    merge: int = 2,
    columns: int = 1176,
    size: int | None = None,
) -> Vision:
    """Padded `Vision` batch (numpy) of rows of processed images; a row may have none (text only).

    The patch count of all rows is `size`, else the bucket of the longest row, so that jit compiles a
    bounded number of shapes. Segments count the frames of a row from 1; 0 is padding.
    """
    longest = max((sum(len(patches) for patches, _ in row) for row in rows), default=0)
    size = bucket(longest) if size is None else size
    if longest > size:
        raise UserError(
            f"a row has {longest} patches, more than the size {size}: raise it or lower max_pixels"
        )
    if size % merge**2:
        raise UserError(f"size is {size}; it must be a multiple of merge^2 = {merge**2}")
    out = Vision(
        patches=np.zeros((len(rows), size, columns), np.float32),
        position=np.zeros((len(rows), size, 2), np.int32),
        segment=np.zeros((len(rows), size), np.int32),
    )
    for b, row in enumerate(rows):
        at, frame = 0, 0
        for patches, (t, h, w) in row:
            if patches.shape != (t * h * w, columns):
                raise UserError(
                    f"patches are {patches.shape}, the grid {(t, h, w)} needs {(t * h * w, columns)}"
                )
            here = slice(at, at + len(patches))
            out.patches[b, here] = patches
            out.position[b, here] = grid_positions((t, h, w), merge)
            out.segment[b, here] = frame + 1 + np.repeat(np.arange(t), h * w)
            at, frame = at + len(patches), frame + t
    return out
