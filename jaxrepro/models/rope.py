"""Frequencies of rotary position embeddings (arXiv:2104.09864), and how models stretch them.

    f_j = theta^(-j / half),    j = 0 .. half - 1                       radians per position

    linear    f_j / s                                                   (arXiv:2306.15595)
    llama3    f_j                  wavelength 2 pi / f_j < n / high     (reference code of Llama 3.1)
              f_j / s                         "          > n / low
              between them, with m = (n f_j / 2 pi - low) / (high - low):  (1 - m) f_j / s + m f_j

s is the factor, n the number of positions that the model was first trained on.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrepro.config import UserError

KINDS = ("linear", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched; low, high and original (positions) are of kind "llama3" alone."""

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"rope type {self.kind!r} is not supported: {', '.join(KINDS)}")
        if not self.factor > 0:
            raise UserError(f"the rope factor is {self.factor}; it must be above 0")
        if self.kind == "llama3" and not (0 < self.low < self.high and self.original > 0):
            raise UserError(
                f"rope type llama3 with low {self.low}, high {self.high}, original {self.original}: "
                "needs 0 < low < high and original > 0"
            )

    def to_hf(self) -> dict[str, Any]:
        """The entry of a config.json, without theta."""
        out: dict[str, Any] = {"rope_type": self.kind, "factor": self.factor}
        if self.kind == "llama3":
            out |= {"low_freq_factor": self.low, "high_freq_factor": self.high}
            out["original_max_position_embeddings"] = self.original
        return out


def frequencies(half: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """float32 (half,): radians per position of each half-channel."""
    f = theta ** (-np.arange(half) / half)
    if scaling is not None and scaling.kind == "linear":
        f = f / scaling.factor
    elif scaling is not None:
        turns = scaling.original * f / (2 * np.pi)  # in the original context
        mix = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
        f = (1 - mix) * f / scaling.factor + mix * f
    return f.astype(np.float32)
