"""How alike the videos of two folders are, pair by pair: PSNR, SSIM, and LPIPS where it is installed.

    python -m jaxrepro.data.compare_videos videos/0/routed videos/0/dense [--json]

Videos are mp4 files of the same name in both folders, as `jaxrepro.sample` writes them with decode.format=mp4. PSNR and
SSIM are those of video_similarity.py. LPIPS (arXiv:1801.03924, lower is more alike) is the mean over frames by AlexNet,
of the package lpips; which network the LPIPS of VORTA is by is unknown (AlexNet is inferred). Films are
compressed; what pixels give before that stands in the summary.json of a run.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.data import video_clips, video_similarity
from jaxrepro.data.video_clips import Pixels
from jaxrepro.exits import guard

AT_ONCE = 8  # frames in LPIPS's network
Measure = Callable[[Pixels, Pixels], float]


def compare(
    folder: Path, reference: Path, measures: dict[str, Measure]
) -> dict[str, dict[str, float]]:
    """Measures of each video that is in both folders, by name. UserError where a pair differs in shape."""
    found = {}
    for name in pairs(folder, reference):
        x, y = (video_clips.read(side / name) for side in (folder, reference))
        if x.shape != y.shape:
            raise UserError(
                f"{name} has {_shape(x)} in {folder} and {_shape(y)} in {reference}: write both by the same settings"
            )
        found[name] = {measure: f(x, y) for measure, f in measures.items()}
    return found


def pairs(folder: Path, reference: Path) -> list[str]:
    """Names of the videos that both folders have; UserError where there is none."""
    one, other = ({p.name for p in side.glob("*.mp4")} for side in (folder, reference))
    if not one & other:
        raise UserError(
            f"{folder} and {reference} have no mp4 of the same name: sample both with decode.format=mp4"
        )
    return sorted(one & other)


def _shape(x):
    n, rows, columns, _ = x.shape
    return f"{n} frames of {columns} x {rows}"


def measures() -> tuple[dict[str, Measure], str]:
    """The measures that can be taken here by name, and a line about what is left out ("": nothing)."""
    one = lambda f: lambda x, y: float(f(x[None], y[None])[0])
    found = {"PSNR": one(video_similarity.psnr), "SSIM": one(video_similarity.ssim)}
    try:
        return found | {"LPIPS": lpips()}, ""
    except ImportError:
        return found, "LPIPS is left out: pip install lpips adds it"
    except OSError as error:  # the weights are fetched the first time
        return found, f"LPIPS is left out: its weights could not be fetched ({error})"


def lpips() -> Measure:
    """The mean LPIPS of frames. ImportError without the package, OSError without its weights."""
    import lpips
    import torch

    network = lpips.LPIPS(net="alex", verbose=False).eval()

    def tensor(x):
        return (
            torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1
        )  # from 0 .. 255 to -1 .. 1

    def measure(x: Pixels, y: Pixels) -> float:
        starts = range(0, len(x), AT_ONCE)
        with torch.inference_mode():
            parts = [
                network(*(tensor(z[i : i + AT_ONCE]) for z in (x, y))).flatten() for i in starts
            ]
            return float(torch.cat(parts).mean())

    return measure


def command(argv: Sequence[str]) -> None:
    """Compare the folders that the words name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="of mp4 files")
    parser.add_argument("reference", type=Path, help="of mp4 files of the same names")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    flags = parser.parse_args(argv)
    names = pairs(flags.folder, flags.reference)
    known, note = measures()
    found = compare(flags.folder, flags.reference, known)
    mean = {m: float(np.mean([row[m] for row in found.values()])) for m in known}
    found[f"mean of {len(names)}"] = mean
    if note:
        print(note, file=sys.stderr)
    if flags.json:
        print(json.dumps(found, indent=1))
        return
    for name, row in found.items():
        shown = {m: f"{x:.1f} dB" if m == "PSNR" else f"{x:.4f}" for m, x in row.items()}
        print("  ".join([name, *(f"{m} {x}" for m, x in shown.items())]))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command."""
    return guard(command, argv)


if __name__ == "__main__":
    sys.exit(main())
