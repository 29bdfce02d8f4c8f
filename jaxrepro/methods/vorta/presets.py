"""The videos of VORTA, arXiv:2505.18809 (v2), and of its official code, by model. Imports nothing of this package.

Of Wan 2.1 1.3B the tile (5, 6, 4), sampler, guidance and number of devices are inferred.
"""

from typing import NamedTuple


class Preset(NamedTuple):
    """A model's video and how it is sampled."""

    size: tuple[int, int, int]  # tokens along frames, height, width
    tile: tuple[int, int, int]
    text: int  # tokens
    sampler: str
    guidance: float
    fps: int
    devices: int  # for training


PRESETS = {
    "hunyuan": Preset(
        (30, 45, 80), (6, 9, 8), 256, "euler", 6.0, 24, 2
    ),  # 117 frames of 720 x 1280
    "wan_14b": Preset((20, 45, 80), (5, 9, 8), 512, "unipc", 5.0, 15, 2),  # 77 of 720 x 1280
    "wan_1_3b": Preset((20, 30, 52), (5, 6, 4), 512, "unipc", 5.0, 15, 1),  # 77 of 480 x 832
}
