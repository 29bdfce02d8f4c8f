"""PSNR and SSIM against their definitions, written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.data import video_similarity as similarity


def pictures(seed=0, b=1, frames=1, rows=11, columns=11):
    return np.random.default_rng(seed).integers(0, 256, (b, frames, rows, columns, 3), np.uint8)


def by_definition(x, y):
    """SSIM of two grey pictures of 11 x 11: one place of the Gaussian."""
    x, y = x.astype(float), y.astype(float)
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    w = np.outer(line, line) / np.outer(line, line).sum()
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, both = (
        (w * (x - mx) ** 2).sum(),
        (w * (y - my) ** 2).sum(),
        (w * (x - mx) * (y - my)).sum(),
    )
    c1, c2 = 6.5025, 58.5225  # (0.01 255)^2, (0.03 255)^2
    return (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))


def test_ssim_of_one_window_is_its_definition():
    x = pictures(0)
    y = np.clip(x.astype(int) + pictures(1) // 4, 0, 255).astype(np.uint8)
    want = np.mean([by_definition(x[0, 0, ..., c], y[0, 0, ..., c]) for c in range(3)])
    assert 0.3 < want < 0.99
    np.testing.assert_allclose(similarity.ssim(x, y), [want], rtol=1e-9)


def test_psnr_is_that_of_the_mean_squared_difference_of_a_whole_video():
    x = np.full((2, 3, 4, 4, 3), 100, np.uint8)
    y = x.copy()
    y[0, 0] += 10  # a third of the pixels by 10
    y[1] -= 5
    want = 10 * np.log10(255**2 / np.array([100 / 3, 25]))
    np.testing.assert_allclose(similarity.psnr(x, y), want)


@given(st.integers(0, 99), st.integers(1, 3), st.integers(11, 16), st.integers(11, 16))
@settings(max_examples=15, deadline=None)
def test_equal_videos_are_most_alike_and_order_does_not_matter(seed, frames, rows, columns):
    x, y = (pictures(seed + i, 2, frames, rows, columns) for i in (0, 1000))
    np.testing.assert_allclose(similarity.ssim(x, x), 1)
    np.testing.assert_array_equal(similarity.psnr(x, x), 100)
    for measure in (similarity.ssim, similarity.psnr):
        np.testing.assert_allclose(measure(x, y), measure(y, x))
        assert (measure(x, y) < measure(x, x)).all()
        np.testing.assert_allclose(measure(x[1:], y[1:]), measure(x, y)[1:])


def test_what_cannot_be_compared_is_one_line():
    with pytest.raises(UserError, match=r"10 x 11 pixels are too small for SSIM"):
        similarity.ssim(pictures(rows=10), pictures(rows=10))
    with pytest.raises(UserError, match="cannot be compared"):
        similarity.psnr(pictures(), pictures(rows=12))
