"""Latents of real clips without a neural VAE: principal components of patches of pixels.

A patch is (frames, rows, columns) pixels of three colours, p numbers y in -1 .. 1. With the mean m and the
eigenvectors v_j and eigenvalues s_j^2 of the covariance of patches, largest first,

    encode    z_j = v_j . (y - m) / s_j             c components a patch: variance 1, uncorrelated
    decode    y   = m + sum_j s_j z_j v_j

The basis is fixed once it is fitted. It is linear and orthogonal, so decoding is the best that c numbers a patch
can do in squared error, and with c = p every pixel comes back.

What is lost otherwise, as PSNR in dB of 120 frames of 64 x 96 pixels of bikes, carphone_pristine and bigbuckbunny
(`video_clips`), on which the basis was fitted, too:

    patch (4, 8, 8), 16 channels     24.5  25.9  25.5      as the VAEs of HunyuanVideo and Wan shrink: blurred blocks
    patch (4, 8, 8), 32 channels     27.3  29.4  27.9
    patch (2, 4, 4), 16 channels     32.2  33.7  31.6
    patch (1, 4, 4), 48 channels     exact
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from jaxrepro.config import UserError
from jaxrepro.data.video_similarity import psnr
from jaxrepro.files import whole, writing
from jaxrepro.models import tensors

NAMES = ("mean", "basis", "scale")
LARGEST = 4096  # numbers of a patch: the covariance has their square
SMALL = 1e-4  # standard deviation, of pixels in -1 .. 1, below which a component is not enlarged further


@dataclass(frozen=True)
class PatchPCA:
    """A fitted basis; float32 arrays."""

    mean: Float[np.ndarray, "t y x rgb"]
    basis: Float[np.ndarray, "c t y x rgb"]  # orthonormal
    scale: Float[np.ndarray, "c"]  # standard deviation of each component

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a patch."""
        return self.mean.shape[:3]

    @property
    def channels(self) -> int:
        """Number of components, c."""
        return len(self.scale)

    @classmethod
    def fit(
        cls,
        clips: Sequence[UInt8[np.ndarray, "frames rows columns rgb"]],
        *,
        patch: tuple[int, int, int] = (4, 8, 8),
        channels: int = 16,
    ) -> "PatchPCA":
        """The basis of the patches of clips; what does not fill a patch is left out. Deterministic.

        UserError for more channels than a patch has numbers, or fewer patches than channels.
        """
        p = int(np.prod(patch)) * 3
        if len(patch) != 3 or min(patch) < 1 or p > LARGEST:
            raise UserError(
                f"patch {tuple(patch)} must be (frames, rows, columns) of 1 or more, at most {LARGEST // 3} pixels"
            )
        if not 1 <= channels <= p:
            raise UserError(
                f"channels is {channels}; a patch of {p} numbers has 1 to {p} components"
            )
        total, outer, n = np.zeros(p), np.zeros((p, p)), 0
        for clip in clips:
            y = _patches(_whole(clip, patch), patch).reshape(-1, p).astype(np.float64)
            total, outer, n = total + y.sum(0), outer + y.T @ y, n + len(y)
        if n <= channels:
            raise UserError(f"{n} patches cannot give {channels} components; give more frames")
        middle = total / n
        values, vectors = np.linalg.eigh(outer / n - np.outer(middle, middle))
        values, vectors = values[::-1][:channels], vectors[:, ::-1][:, :channels]
        # an eigenvector's sign is arbitrary: its largest number is positive here
        largest = np.abs(vectors).argmax(0)
        vectors = vectors * np.where(vectors[largest, np.arange(channels)] < 0, -1, 1)
        scale = np.sqrt(np.maximum(values, SMALL**2))
        shape = (*patch, 3)
        return cls(
            middle.reshape(shape).astype(np.float32),
            vectors.T.reshape(channels, *shape).astype(np.float32),
            scale.astype(np.float32),
        )

    def encode(
        self, pixels: UInt8[np.ndarray, "*b frames rows columns rgb"]
    ) -> Float[np.ndarray, "*b c f h w"]:
        """Latents of clips, (frames, rows, columns) / patch each; UserError where they do not divide."""
        for axis, n, part in zip(("frames", "rows", "columns"), pixels.shape[-4:], self.patch):
            if n % part or not n:
                raise UserError(f"{n} {axis} do not divide by a patch of {part}; cut or resize")
        y = _patches(pixels, self.patch) - self.mean
        z = np.tensordot(y, self.basis, axes=((-4, -3, -2, -1), (1, 2, 3, 4))) / self.scale
        return np.moveaxis(z, -1, -4)

    def decode(
        self, latents: Float[np.ndarray, "*b c f h w"]
    ) -> UInt8[np.ndarray, "*b frames rows columns rgb"]:
        """Pictures of latents; what lies beyond black or white is cut."""
        if latents.ndim < 4 or latents.shape[-4] != self.channels:
            raise UserError(f"latents {latents.shape} must be (..., {self.channels}, f, h, w)")
        z = np.moveaxis(latents.astype(np.float32), -4, -1) * self.scale
        y = np.tensordot(z, self.basis, axes=1) + self.mean  # (..., f, h, w, t, y, x, rgb)
        lead = y.ndim - 7
        order = [lead + i for i in (0, 3, 1, 4, 2, 5, 6)]
        f, h, w, t, r, c, rgb = y.shape[lead:]
        y = y.transpose(*range(lead), *order).reshape(*y.shape[:lead], f * t, h * r, w * c, rgb)
        return (np.clip((y + 1) / 2, 0, 1) * 255).round().astype(np.uint8)

    def psnr(self, pixels: UInt8[np.ndarray, "*b frames rows columns rgb"]) -> float:
        """Peak signal-to-noise ratio of the round trip, in dB; 100 where every pixel comes back."""
        back = self.decode(self.encode(pixels))
        return float(psnr(back[None], pixels[None])[0])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file."""
        path = Path(path)
        entry = lambda name, x: tensors.Entry(name, x.dtype, x.shape, lambda: x)
        with writing(path), whole(path) as file:
            tensors.write_to(file, [entry(name, getattr(self, name)) for name in NAMES])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PatchPCA":
        """A basis that `save` wrote; UserError where the file is something else."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        found = dict(tensors.scan(path))
        mean, basis, scale = (found.get(name) for name in NAMES)
        if (
            set(found) != set(NAMES)
            or any(t.dtype != np.float32 for t in found.values())
            or len(mean.shape) != 4
            or mean.shape[3] != 3
            or basis.shape != (*scale.shape, *mean.shape)
        ):
            raise UserError(
                f"{path} holds no patch basis: {', '.join(NAMES)} as PatchPCA.save writes"
            )
        return cls(*(np.array(found[name].map()) for name in NAMES))


def _whole(clip, patch):
    """The part of a clip that patches fill."""
    f, h, w = (n // p * p for n, p in zip(clip.shape, patch))
    return clip[:f, :h, :w]


def _patches(pixels, patch):
    """(..., f, h, w, t, y, x, rgb) float32 in -1 .. 1."""
    lead, (t, r, c) = pixels.ndim - 4, patch
    f, h, w = (n // p for n, p in zip(pixels.shape[-4:], patch))
    y = pixels.reshape(*pixels.shape[:lead], f, t, h, r, w, c, 3)
    y = y.transpose(*range(lead), *(lead + i for i in (0, 2, 4, 1, 3, 5, 6)))
    return y.astype(np.float32) * np.float32(2 / 255) - 1
