"""Two folders of films: pairs by name, measures of each pair, and what cannot be compared."""

import builtins
import json

import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.data import compare_videos, video_clips, video_output, video_similarity


@pytest.fixture
def films(tmp_path, monkeypatch):
    """Two films in each of two folders, read without a codec; the first differs by 10 of 255 everywhere."""
    kept = {}
    rng = np.random.default_rng(0)
    for folder in ("routed", "dense"):
        (tmp_path / folder).mkdir()
    for name in ("a dog-0.mp4", "a dog-1.mp4"):
        film = rng.integers(20, 230, (2, 12, 16, 3), np.uint8)
        for folder, shift in (("routed", 10 * name.endswith("0.mp4")), ("dense", 0)):
            path = tmp_path / folder / name
            path.touch()
            kept[path] = film + np.uint8(shift)
    monkeypatch.setattr(video_clips, "read", kept.__getitem__)
    return tmp_path, kept


def without(monkeypatch, package, error=ImportError):
    original = builtins.__import__

    def guarded(name, *args, **kwargs):
        if name == package:
            raise error(f"no {package}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)


def test_pairs_are_measured_by_name_and_averaged(films, monkeypatch, capsys):
    folder, kept = films
    without(monkeypatch, "lpips")
    (folder / "dense" / "only here-0.mp4").touch()
    words = [str(folder / "routed"), str(folder / "dense")]
    assert compare_videos.main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert list(found) == ["a dog-0.mp4", "a dog-1.mp4", "mean of 2"]
    # 10 log10 (255^2 / 10^2) = 28.13 dB; 100 dB is the most
    assert found["a dog-0.mp4"]["PSNR"] == pytest.approx(28.1308, abs=1e-3)
    assert found["a dog-1.mp4"] == {"PSNR": 100.0, "SSIM": pytest.approx(1.0)}
    one, other = (kept[folder / side / "a dog-0.mp4"][None] for side in ("routed", "dense"))
    ssim = video_similarity.ssim(one, other)[0]
    assert found["a dog-0.mp4"]["SSIM"] == pytest.approx(ssim) != 1
    assert found["mean of 2"]["SSIM"] == pytest.approx((ssim + 1) / 2)
    assert printed.err == "LPIPS is left out: pip install lpips adds it\n"
    assert compare_videos.main(words) == 0
    assert "a dog-0.mp4  PSNR 28.1 dB  SSIM 0." in capsys.readouterr().out


def test_weights_that_cannot_be_fetched_leave_one_measure_out(monkeypatch):
    without(monkeypatch, "lpips", OSError)
    known, note = compare_videos.measures()
    assert set(known) == {"PSNR", "SSIM"} and "could not be fetched (no lpips)" in note


def test_what_cannot_be_compared_is_one_line(films, capsys):
    folder, kept = films
    names = [folder / "routed", folder / "dense"]
    kept[names[0] / "a dog-1.mp4"] = kept[names[0] / "a dog-1.mp4"][:1]
    with pytest.raises(UserError, match=r"1 frames of 16 x 12 in .* and 2 frames of 16 x 12 in"):
        compare_videos.compare(*names, {})
    assert compare_videos.main([str(names[0]), str(folder / "none")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "no mp4 of the same name" in said
    assert said.count("\n") == 1


def test_a_film_is_read_as_it_was_written(tmp_path):
    pytest.importorskip("av")
    at = np.indices((5, 32, 48)).sum(0)
    film = np.stack([at, 200 - at, np.full_like(at, 99)], -1).astype(np.uint8)  # smooth
    video_output.write_mp4(tmp_path / "a.mp4", film, fps=8)
    found = video_clips.read(tmp_path / "a.mp4")
    assert found.shape == film.shape
    assert np.abs(found.astype(int) - film).mean() < 4
