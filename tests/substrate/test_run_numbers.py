"""What a run shows of its numbers: pictures, TensorBoard, W&B, the progress line, the profile."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.train import curves
from jaxrepro.train import metrics as report
from jaxrepro.train.loop import Run
from jaxrepro.train.profile import Profile

sys.path.insert(0, str(Path(__file__).parent))
from toy_run import config, init, train


def test_numbers_reach_tensorboard_and_a_picture(tmp_path, capsys):
    with Run(config(**{"log.tensorboard": True, "log.curves": True}), tmp_path) as run:
        run.log(-1, {"accuracy": 0.1})
        train(run, until=3)
        text = json.loads((tmp_path / "config.json").read_text())
        assert text["config"]["lr"] == 0.05 and text["format"] == 1
    assert list((tmp_path / "tensorboard" / "rl").glob("events*"))
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert report.read(tmp_path / "metrics.jsonl")[-1].keys() >= {"loss", "grad_norm", "param_norm"}


def test_wandb_is_looked_for_at_once_and_begins_with_the_first_number(tmp_path, monkeypatch):
    named = config(**{"log.wandb": "project"})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb=project needs the package"):
        Run(named, tmp_path / "a").__enter__()
    assert not (tmp_path / "a").exists()
    calls = []
    module = type(sys)("wandb")
    module.init = lambda **settings: calls.append(settings["project"]) or module
    module.log, module.finish = calls.append, lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "wandb", module)
    with Run(named, tmp_path / "a") as run:
        run.restore(init, stage="rl")
        assert not calls
        for i in range(2):
            run.log(i, {"loss": 0.5})
    assert calls == ["project", *({"rl/loss": 0.5, "rl/step": i + 1} for i in range(2)), "finish"]


def test_curves_show_every_metric_that_changed_and_name_the_rest(tmp_path, monkeypatch):
    lines = [
        {"stage": "rl", "step": i, "lr": 0.1 * i, "weight": 8, "kl": i, "loss": -i}
        for i in range(30)
    ]
    lines += [{"stage": "sft", "step": i, "loss": i, "accuracy": 0.1 * i} for i in range(2)]
    found = curves.series(lines)
    assert {k: list(v) for k, v in found.items()} == {
        "rl": ["loss", "kl", "lr", "weight"],
        "sft": ["loss", "accuracy"],
    }
    (tmp_path / report.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = []
    monkeypatch.setattr(curves, "_panel", lambda axis, name, *_: drawn.append(name))
    assert curves.draw(tmp_path) == tmp_path / "curves.png"
    assert drawn == ["loss", "kl", "lr", "loss", "accuracy"]


def test_a_moving_average_keeps_straight_lines_and_the_first_value():
    np.testing.assert_allclose(curves.smooth(np.arange(9.0), 4)[:7], np.arange(7.0))
    np.testing.assert_allclose(curves.smooth(np.ones(5), 3), np.ones(5))
    assert curves.smooth(np.array([4.0]), 3) == [4.0]


def test_nothing_measured_twice_is_no_picture(tmp_path):
    assert curves.draw(tmp_path) is None
    (tmp_path / report.FILE).write_text('{"stage": "rl", "step": 0, "loss": 1.0}\n')
    assert curves.draw(tmp_path) is None


def test_progress_says_numbers_and_time_left(capsys):
    progress = report.Progress("rl", 0, 4, show=("loss",), every=0)
    progress.numbers({"loss": 0.5, "other": 1})
    progress.step(2)
    out = capsys.readouterr().out
    assert out.startswith("rl 2/4  loss 0.5  ") and "eta 0:00:0" in out


def test_profile_wants_start_and_count(tmp_path):
    for text in ("5", "a:2", "1:0"):
        with pytest.raises(UserError, match="is not start:count"):
            Profile(text, tmp_path)
