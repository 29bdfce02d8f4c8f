"""The export command: a finished run becomes a folder that loads again, and refusals leave nothing."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrepro.methods
from jaxrepro import cli, config, export
from jaxrepro.models import hf, lora
from jaxrepro.models.lora import Lora
from jaxrepro.models.transformer import TransformerConfig

FAKE = str(Path(__file__).parent / "fixtures" / "fake.py")
CFG = TransformerConfig(
    vocab=12, d=8, layers=2, heads=2, kv=1, head_dim=4, ffn=12, lora=Lora(rank=2)
)
METHOD = "from test_export import parameters, CFG, Words\n\ndef export(config, workdir):\n"
METHOD += "    return parameters(), CFG, Words()\n"


class Words:
    """What a method may give as its tokenizer."""

    def __init__(self):
        self.ids = {"eos_token_id": 3}

    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def parameters():
    from jaxrepro.models import transformer

    rng = np.random.default_rng(0)
    draw = lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32)
    return jax.tree.map(draw, transformer.abstract(CFG))


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A finished run of a method `fake`, which knows how to export."""
    folder = tmp_path / "methods" / "fake"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "run.py").write_text(METHOD)
    path = [*jaxrepro.methods.__path__, str(folder.parent)]
    monkeypatch.setattr(jaxrepro.methods, "__path__", path)
    monkeypatch.setattr(cli, "setup_jax", lambda: None)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    work = tmp_path / "work"
    (work / "checkpoints" / "rl" / "4").mkdir(parents=True)
    settings = config.load(FAKE, {"data.path": str(tmp_path), "name": "Some/base"})
    record = {"config": json.loads(config.to_json(settings)), "commit": "abc", "jax": "0.10"}
    (work / "config.json").write_text(json.dumps(record))
    results = {"test/accuracy": 0.5, "test/accuracy_lo": 0.25, "test/accuracy_hi": 0.75}
    (work / "summary.json").write_text(json.dumps(results))
    yield work
    for name in [n for n in sys.modules if n.startswith("jaxrepro.methods.fake")]:
        del sys.modules[name]


def fails(capsys, *words):
    assert cli.guard(export.main, list(words)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_a_finished_run_becomes_a_folder_that_loads(workdir, tmp_path, capsys):
    out = tmp_path / "hub" / "model"
    assert cli.guard(export.main, [f"--workdir={workdir}", f"--out={out}"]) == 0
    assert "no licence" in capsys.readouterr().out
    names = {"README.md", "config.json", "generation_config.json", "tokenizer.json", hf.SINGLE}
    assert {p.name for p in out.iterdir()} == names
    merged, plain = lora.merge(parameters(), CFG)  # no file of a model holds adapters
    cfg = hf.read_config(out)
    assert (cfg.lora, cfg.family, cfg.d) == (None, "qwen2", plain.d)
    assert hf.token_ids(out) == Words().ids
    jax.tree.map(np.testing.assert_array_equal, hf.load(out, cfg), merged)


def test_the_model_card_says_what_was_trained_and_hides_this_machine(workdir, tmp_path):
    out = tmp_path / "model"
    words = [f"--workdir={workdir}", f"--out={out}", "--dtype=bfloat16"]
    assert cli.guard(export.main, words) == 0
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# model" in card
    assert "| test/accuracy | 0.5 | [0.25, 0.75] |" in card
    assert "`fake`" in card and "commit abc" in card and "Not stated" in card
    assert "license:" not in card.split("---")[1]
    assert str(tmp_path) not in card and '"Some/base"' in card and '"lr": 0.001' in card
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_base_model_is_named_by_its_hub_name_only(workdir, tmp_path):
    run = {"commit": "abc", "jax": "0.10"}
    for path, header in (("Qwen/Qwen2.5-0.5B", True), (str(tmp_path), False), (None, False)):
        card = export.card(
            config.from_json(json.dumps({"method": "fake", "model": {"path": path}})),
            run,
            {},
            name="x",
        )
        assert ('base_model: "Qwen/Qwen2.5-0.5B"' in card) == header
        assert ("trained from scratch" in card) == (path is None)
        assert str(tmp_path) not in card


def test_bad_exports_are_one_line_and_leave_nothing(workdir, tmp_path, capsys, monkeypatch):
    out = tmp_path / "model"
    there = [f"--workdir={workdir}", f"--out={out}"]
    assert "--workdir" in fails(capsys, f"--out={out}")
    assert "--out=FOLDER" in fails(capsys, f"--workdir={workdir}")
    assert "not a folder" in fails(capsys, f"--workdir={tmp_path / 'none'}", f"--out={out}")
    assert "not an empty folder" in fails(capsys, f"--workdir={workdir}", f"--out={workdir}")
    assert "int8" in fails(capsys, *there, "--dtype=int8")
    (tmp_path / "afile").write_text("")
    for bad in (tmp_path / "afile" / "sub", "/proc/nope/x", tmp_path / ("a" * 300)):
        assert "cannot be made" in fails(capsys, f"--workdir={workdir}", f"--out={bad}")
    export.check_out(str(tmp_path / "one" / "two"))
    assert not (tmp_path / "one").exists()
    summary = (workdir / "summary.json").read_text()
    (workdir / "summary.json").unlink()
    assert "not finished" in fails(capsys, *there)
    (workdir / "summary.json").write_text(summary)
    (tmp_path / "methods" / "fake" / "run.py").write_text("")
    assert "nothing that Hugging Face could load" in fails(capsys, *there)
    (workdir / "checkpoints" / "rl" / "4").rmdir()
    assert "no checkpoint" in fails(capsys, *there)
    assert not out.exists() and not list(tmp_path.glob(".model*"))


@pytest.mark.parametrize("mesh", ["missing", 3, [1, "x", 1, 1], {"data": None}])
def test_a_workdir_without_a_mesh_is_one_line(mesh, workdir, tmp_path, capsys):
    record = json.loads((workdir / "config.json").read_text())
    record["config"]["mesh"] = mesh
    if mesh == "missing":
        del record["config"]["mesh"]
    (workdir / "config.json").write_text(json.dumps(record))
    said = fails(capsys, f"--workdir={workdir}", f"--out={tmp_path / 'model'}")
    assert "the mesh of the workdir's config.json is" in said
