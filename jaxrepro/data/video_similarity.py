"""How alike the pictures of two videos are: PSNR and SSIM.

    PSNR = 10 log10 (255^2 / mean (x - y)^2)                                        dB, over a whole video
    SSIM = mean of  (2 m_x m_y + c_1) (2 s_xy + c_2) / ((m_x^2 + m_y^2 + c_1) (s_x^2 + s_y^2 + c_2))

SSIM is that of Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", 2004: means m, variances s^2 and
covariance s_xy under a Gaussian of 11 x 11 pixels and standard deviation 1.5, c_1 = (0.01 255)^2, c_2 = (0.03 255)^2;
of each frame and colour, averaged over the places where the Gaussian lies inside the picture.

Differs from the paper: it reads grey pictures; here each colour counts by itself, as image libraries do.
"""

import numpy as np
from jaxtyping import Float, UInt8

from jaxrepro.config import UserError

MOST = 100.0  # dB where no pixel differs, so that a mean is a number
LEAST = 11  # rows and columns that SSIM needs
SIGMA = 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

Videos = UInt8[np.ndarray, "b frames rows columns rgb"]


def psnr(x: UInt8[np.ndarray, "b ..."], y: UInt8[np.ndarray, "b ..."]) -> Float[np.ndarray, "b"]:
    """Peak signal-to-noise ratio of each video in dB, at most 100."""
    _check(x, y)
    error = [np.square(a.astype(np.float32) - b).mean(dtype=np.float64) for a, b in zip(x, y)]
    least = 255**2 / 10 ** (MOST / 10)
    return 10 * np.log10(255**2 / np.maximum(error, least))


def ssim(x: Videos, y: Videos) -> Float[np.ndarray, "b"]:
    """Structural similarity of each video, 1 where they are equal. UserError below 11 rows or columns."""
    _check(x, y)
    if min(x.shape[2:4]) < LEAST:
        raise UserError(
            f"pictures of {x.shape[2]} x {x.shape[3]} pixels are too small for SSIM; it needs {LEAST} x {LEAST}"
        )
    return np.array([np.mean([_ssim(a, b) for a, b in zip(*pair)]) for pair in zip(x, y)])


def _check(x, y):
    if x.shape != y.shape or not x.size:
        raise UserError(f"videos of shapes {x.shape} and {y.shape} cannot be compared")


def _ssim(x, y):
    """Of one picture (rows, columns, rgb)."""
    from scipy.ndimage import gaussian_filter

    half = LEAST // 2

    def mean(z):
        blurred = gaussian_filter(z, (SIGMA, SIGMA, 0), radius=(half, half, 0))
        return blurred[half:-half, half:-half]

    x, y = x.astype(np.float64), y.astype(np.float64)
    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    found = (2 * mx * my + C1) * (2 * both + C2) / ((mx**2 + my**2 + C1) * (vx + vy + C2))
    return found.mean()
