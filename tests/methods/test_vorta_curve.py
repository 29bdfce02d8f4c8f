"""The curve of error over work: of one run, and of a study with intervals over its seeds."""

import json

import pytest
from PIL import Image

from jaxrepro.config import UserError
from jaxrepro.methods.vorta import curve


def run(seed):
    """Numbers of an evaluation: 2 taus of one table, one way in few steps, and what is no point."""
    return {
        "test/routed/error": 0.2 + 0.1 * seed,
        "test/routed/flops": 0.3,
        "test/tau0.6/routed/error": 0.1,
        "test/tau0.6/routed/flops": 0.5 + 0.1 * seed,
        "test/few/dense/error": 0.04,
        "test/few/dense/flops": 0.25,
        "test/few/routed/error_to_few": 9.0,
        "test/routed/psnr": 20.0,
    } | ({"test/static/error": 1.0, "test/static/flops": 0.4} if seed else {})


def test_points_are_means_over_seeds_with_intervals_of_the_error():
    found = curve.points(*(run(seed) for seed in range(3)))
    assert list(found) == ["routed", "few/dense"]  # static: one seed has none
    (share, error), (more, less) = found["routed"]
    # 0.2, 0.3, 0.4: standard error 0.1 / sqrt 3, and t(0.975, 2) = 4.302653 (tables)
    assert share == pytest.approx(0.3) and error.mean == pytest.approx(0.3)
    assert error.hi - error.mean == pytest.approx(4.302653 * 0.1 / 3**0.5)
    assert more == pytest.approx(0.6) and less.hi == pytest.approx(0.1)
    assert [share for share, _ in found["few/dense"]] == [0.25]


def test_the_command_tells_and_draws_a_study(tmp_path, capsys):
    study = {"arms": {"vorta": {"per_seed": {str(s): run(s) for s in range(3)}}}}
    (tmp_path / "r.json").write_text(json.dumps(study))
    words = [f"--results={tmp_path / 'r.json'}", f"--picture={tmp_path / 'c.png'}"]
    assert curve.main(words) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[2] == "| routed | 0.300 | 0.300 [0.052, 0.548] |" and len(rows) == 5
    with Image.open(tmp_path / "c.png") as picture:
        assert min(picture.size) > 300


def test_what_is_no_study_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="no results of a study"):
        curve.of_results([], "vorta")
    with pytest.raises(UserError, match="--arm='x' is not one of vorta"):
        curve.of_results({"arms": {"vorta": {"per_seed": {}}}}, "x")
    with pytest.raises(UserError, match="no seed of the arm vorta"):
        curve.of_results({"arms": {"vorta": {"per_seed": {}}}}, "vorta")
    assert curve.main([f"--results={tmp_path / 'gone.json'}"]) == 2
    assert "gone.json" in capsys.readouterr().err
