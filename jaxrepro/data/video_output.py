"""Pictures of videos to GIF and mp4, and latents to pictures through a public VAE.

Pictures are uint8 (frames, rows, columns, rgb). A GIF needs nothing more than Pillow and shows 256 colours, an mp4
needs PyAV (`video`), and the VAEs of HunyuanVideo and Wan come from diffusers, in torch (`vae`); these two extras
are optional.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jaxrepro.config import UserError
from jaxrepro.data.latents import denormalise
from jaxrepro.data.video_clips import pyav
from jaxrepro.files import whole, writing

Pictures = UInt8[np.ndarray, "frames rows columns rgb"]
Larger = UInt8[np.ndarray, "frames height width rgb"]

VAES = {"hunyuan": "AutoencoderKLHunyuanVideo", "wan": "AutoencoderKLWan"}
NEEDED = 'pip install "jaxrepro[vae]"'
FASTEST_GIF = 50  # frames a second; viewers slow down what is faster
GAP, MARGIN, LETTERS = 4, 18, 12  # pixels
PAPER, INK = (255, 255, 255), (40, 40, 40)


def enlarge(pictures: Pictures, scale: int) -> Larger:
    """Each pixel as scale x scale pixels."""
    if scale < 1:
        raise UserError(f"scale is {scale}; it must be 1 or more")
    return pictures.repeat(scale, axis=1).repeat(scale, axis=2)


def beside(videos: Sequence[Pictures], labels: Sequence[str] = (), *, scale: int = 1) -> Larger:
    """Videos of one shape side by side, a label above each; frame by frame, so they run together."""
    shapes = {v.shape for v in videos}
    if len(shapes) != 1:
        raise UserError(f"videos of shapes {sorted(shapes)} do not fit beside each other")
    if labels and len(labels) != len(videos):
        raise UserError(f"{len(labels)} labels for {len(videos)} videos; give one for each")
    large = [enlarge(v, scale) for v in videos]
    n, height, width, _ = large[0].shape
    top = MARGIN if labels else 0
    out = np.full((n, top + height, len(videos) * (width + GAP) - GAP, 3), PAPER, np.uint8)
    for i, video in enumerate(large):
        at = i * (width + GAP)
        out[:, top:, at : at + width] = video
        if labels:
            out[:, :top, at : at + width] = _label(labels[i], width)
    return out


def _label(text, width):
    """(MARGIN, width, rgb) with as much of a text as fits."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, MARGIN), PAPER)
    font = ImageFont.load_default(LETTERS)
    while text and font.getlength(text) > width:
        text = text[:-1]
    ImageDraw.Draw(image).text((0, 1), text, INK, font)
    return np.asarray(image)


def write_gif(path: str | os.PathLike[str], pictures: Pictures, *, fps: int | float = 8) -> None:
    """Write an endless GIF with one palette; times are whole hundredths of a second."""
    from PIL import Image

    if not 0 < fps <= FASTEST_GIF:
        raise UserError(f"fps is {fps}; a GIF runs at more than 0 and at most {FASTEST_GIF}")
    if not len(pictures):
        raise UserError("a GIF needs at least one frame")
    n, height, width, _ = pictures.shape
    # a palette for each frame would make still parts flicker
    sheet = Image.fromarray(pictures.reshape(n * height, width, 3))
    sheet = sheet.quantize(256, dither=Image.Dither.NONE)
    frames = [sheet.crop((0, i * height, width, (i + 1) * height)) for i in range(n)]
    path = Path(path)
    with writing(path), whole(path) as file:
        frames[0].save(
            file,
            format="GIF",
            save_all=True,
            append_images=frames[1:],
            duration=10 * round(100 / fps),
            loop=0,
            disposal=1,
        )


def write_mp4(path: str | os.PathLike[str], pictures: Pictures, *, fps: int | float = 24) -> None:
    """Write an H.264 mp4; an odd side loses its last pixel. UserError where PyAV is missing."""
    from fractions import Fraction

    av = pyav()
    if not 0 < fps <= 240:
        raise UserError(f"fps is {fps}; it must be more than 0 and at most 240")
    n, height, width = (pictures.shape[0], *(side // 2 * 2 for side in pictures.shape[1:3]))
    if not n or not height or not width:
        raise UserError(f"pictures {pictures.shape} are too few or too small for an mp4")
    path = Path(path)
    with writing(path), whole(path) as file, av.open(file, mode="w", format="mp4") as movie:
        stream = movie.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "16"}
        for picture in pictures[:, :height, :width]:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            movie.mux(stream.encode(frame))
        movie.mux(stream.encode())


def decode(
    latents: Float[np.ndarray, "b c f h w"],
    model: str,
    folder: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    tiled: bool = True,
) -> UInt8[np.ndarray, "b frames rows columns rgb"]:
    """Pictures of the latents of a diffusion model (`hunyuan` or `wan`) through its VAE.

    folder: that of the VAE, of the pipeline above it, or the pipeline's name on the hub; safetensors only. f latent
    frames give 4 (f - 1) + 1 pictures of 8 h x 8 w pixels. tiled: in overlapping pieces, for less memory.
    """
    if model not in VAES:
        raise UserError(f"model {model!r:.60} has no VAE here: one of {', '.join(VAES)}")
    torch, kind = _diffusers(VAES[model])
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype {dtype!r:.20} is unknown: float32, bfloat16 or float16")
    path = Path(folder).expanduser()
    inner = {} if (path / "config.json").is_file() else {"subfolder": "vae"}
    try:
        vae = kind.from_pretrained(
            str(path) if path.is_dir() else str(folder),
            torch_dtype=getattr(torch, dtype),
            use_safetensors=True,
            **inner,
        )
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"no VAE of {model} was found at {folder}: {reason}") from error
    vae = vae.to(device).eval()
    if tiled:
        vae.enable_tiling()
    x = np.ascontiguousarray(denormalise(latents, model), np.float32)
    pictures = []
    with torch.inference_mode():
        for video in torch.from_numpy(x).split(1):
            y = vae.decode(video.to(vae.device, vae.dtype)).sample[0]
            pictures.append(((y.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy())
    return np.moveaxis(np.stack(pictures), 1, -1)  # from (b, rgb, frames, rows, columns)


def _diffusers(name: str) -> tuple[Any, Any]:
    """torch, and a class of diffusers."""
    try:
        import diffusers
        import torch

        return torch, getattr(diffusers, name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"decoding needs torch and a diffusers with {name}, which are not installed: {NEEDED}"
        ) from error
