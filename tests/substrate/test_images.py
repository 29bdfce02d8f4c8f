"""The image processor: sizes, layout of patches, every mode and file of image, buckets."""

import numpy as np
import pytest
from PIL import Image

from jaxrepro.config import UserError
from jaxrepro.data import images
from jaxrepro.data.images import bucket, collate, process, smart_resize, tokens_of


@pytest.mark.parametrize(
    ("size", "resized", "tokens"),
    [
        ((480, 640), (476, 644), 391),
        ((1000, 1000), (616, 616), 484),
        ((300, 400), (308, 392), 154),
        ((2000, 300), (1624, 224), 464),
        ((20, 20), (56, 56), 4),
    ],
)
def test_smart_resize_table(size, resized, tokens):
    assert smart_resize(*size, min_pixels=3136, max_pixels=400_000) == resized
    assert tokens_of((1, resized[0] // 14, resized[1] // 14)) == tokens


def test_smart_resize_rounds_to_even():
    # 70 / 28 = 2.5 and 98 / 28 = 3.5
    assert smart_resize(70, 98) == (56, 112)


def test_smart_resize_stays_inside_its_bounds():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(30, 3000, size=(200, 2)).tolist():
        h, w = smart_resize(height, width, min_pixels=3136, max_pixels=400_000)
        assert h % 28 == w % 28 == 0 and 3136 <= h * w <= 400_000


def test_bad_sizes_are_refused():
    with pytest.raises(UserError, match="aspect ratio of 201; the limit is 200"):
        smart_resize(1, 201)
    assert smart_resize(1, 200)[0] == 28
    with pytest.raises(UserError, match="0 x 10"):
        smart_resize(0, 10)
    with pytest.raises(UserError, match="at least one pixel"):
        process(Image.new("RGB", (0, 10)))
    with pytest.raises(UserError, match="crop or pad"):
        process(Image.new("L", (4020, 20)))


def test_patches_are_blocks_with_columns_channel_frame_y_x():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (56, 84, 3), dtype=np.uint8)
    patches, grid = process(Image.fromarray(pixels))  # a size that needs no resize
    assert grid == (1, 4, 6) and patches.shape == (24, 1176) and patches.dtype == np.float32
    normal = (pixels / 255 - images.MEAN) / images.STD
    # Row 6 is the third patch of the second block: block row 0, block column 1, lower left.
    expected = normal[14:28, 28:42].transpose(2, 0, 1)  # (c, y, x)
    got = patches[6].reshape(3, 2, 14, 14)
    np.testing.assert_allclose(got[:, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(got[:, 0], got[:, 1])


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "I;16", "I", "F", "YCbCr"]
)
def test_every_mode_of_image_is_read(mode):
    patches, grid = process(Image.new(mode, (60, 60)))
    assert grid == (1, 4, 4) and patches.shape == (16, 1176) and np.isfinite(patches).all()


def test_transparency_shows_white():
    white, _ = process(Image.new("RGB", (56, 56), "white"))
    np.testing.assert_array_equal(process(Image.new("RGBA", (56, 56), (9, 9, 9, 0)))[0], white)
    palette = Image.new("P", (56, 56), 0)
    palette.putpalette([9, 9, 9])
    palette.info["transparency"] = 0
    np.testing.assert_array_equal(process(palette)[0], white)


def test_a_file_gives_what_its_image_gives(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(process(tmp_path / "a.png")[0], process(image)[0])
    np.testing.assert_array_equal(process(str(tmp_path / "a.png"))[0], process(image)[0])


def test_a_file_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate a quarter turn
    Image.new("RGB", (112, 56)).save(tmp_path / "a.jpg", exif=exif)
    assert process(tmp_path / "a.jpg")[1] == (1, 8, 4)


def test_unreadable_files_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        whole
    )
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    for name in ("text.png", "empty.png", "cut.png", "absent.png"):
        with pytest.raises(UserError, match=name):
            process(tmp_path / name)
    with pytest.raises(UserError, match="directory"):
        process(tmp_path)
    with pytest.raises(UserError, match="got int"):
        process(3)


def test_buckets_are_few_and_waste_at_most_a_third():
    sizes = {bucket(n) for n in range(1, 5000)}
    assert len(sizes) == 14 and all(size % 4 == 0 for size in sizes)
    assert all(n <= bucket(n) <= max(64, 1.5 * n) for n in range(1, 5000))


def test_collate_pads_with_segment_zero():
    one, two = process(Image.new("L", (84, 56))), process(Image.new("L", (56, 56)))
    vision = collate([[one, two], [], [two]])
    assert vision.patches.shape == (3, 64, 1176)
    assert vision.segment[0].tolist() == [1] * 24 + [2] * 16 + [0] * 24
    assert vision.segment[1].tolist() == [0] * 64
    np.testing.assert_array_equal(vision.patches[0, 24:40], vision.patches[2, :16])
    np.testing.assert_array_equal(vision.position[0, 24:40], vision.position[2, :16])
    assert vision.position[0, :8].tolist() == [
        [0, 0],
        [0, 1],
        [1, 0],
        [1, 1],
        [0, 2],
        [0, 3],
        [1, 2],
        [1, 3],
    ]


def test_collate_counts_the_frames_of_a_clip_as_segments():
    patches = np.zeros((32, 1176), np.float32)
    assert collate([[(patches, (2, 4, 4))]]).segment[0].tolist() == [1] * 16 + [2] * 16 + [0] * 32


def test_collate_refuses_what_does_not_fit():
    one = process(Image.new("L", (84, 56)))
    with pytest.raises(UserError, match="24 patches, more than the size 16"):
        collate([[one]], size=16)
    with pytest.raises(UserError, match="multiple of merge"):
        collate([[one]], size=30)
    with pytest.raises(UserError, match="the grid"):
        collate([[(one[0], (1, 4, 4))]])
