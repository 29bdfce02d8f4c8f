"""StepGRPO end to end: what a run writes, arms and presets, resume, files of a user, bad settings."""

import json
import re
import shutil
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxrepro import cli, export
from jaxrepro.config import UserError
from jaxrepro.data import stepwise
from jaxrepro.data.text import load_tokenizer
from jaxrepro.methods.stepgrpo import objective, rewards, run
from jaxrepro.models import hf, qwen2_vl
from jaxrepro.rl.advantages import MODES
from jaxrepro.train import checkpoint, metrics

sys.path.insert(0, str(Path(__file__).parent))
import stepgrpo_tiny as tiny

config = tiny.config
PARTS = ("reward", "accuracy", "key_steps", "validity", "headers", "no_answer", "alpha_share")
CURVES = ("zero_std", "kl", "completion_length", "truncated", "entropy", "sampler_gap", "grad_norm")


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    with tiny.small(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Workdir and results of a whole run: base stage, warm-up, two updates."""
    workdir = tmp_path_factory.mktemp("stepgrpo") / "run"
    return workdir, run.run(config(log__tensorboard=True, log__curves=True), workdir)


def read(workdir, name):
    return json.loads((workdir / name).read_text())


def parameters(workdir, stage):
    cfg = run.prepare(config()).task.cfg
    return jax.device_get(checkpoint.load(workdir, qwen2_vl.abstract(cfg), stage=stage))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def paid(examples, completions, behaviour):
    """Parts that differ between samples, whatever an untrained model says."""
    bits = [zlib.crc32(text.encode()) for text in completions]
    names = ("accuracy", "key_steps", "validity", "answered", "headers")
    return [{n: float(b >> j & 1) for j, n in enumerate(names)} for b in bits]


@pytest.fixture
def unexamined(monkeypatch):
    """Runs that neither answer test questions before and after, nor score samples by what they say."""
    rates = {
        "accuracy": 0.5,
        "accuracy_lo": 0.4,
        "accuracy_hi": 0.6,
        "n": 8,
        "sampled_validity": 0.5,
    }

    def examiner(s, held):
        fixed = {"texts": [""] * 8, "correct": [1.0, 0.0] * 4}
        return lambda params, prefix: {"rates": {prefix + k: v for k, v in rates.items()}, **fixed}

    monkeypatch.setattr(run, "examiner", examiner)
    monkeypatch.setattr(run.evaluation, "score", paid)


# --- what a run leaves ------------------------------------------------------------------------------


def test_a_run_writes_the_metrics_of_every_stage(trained):
    workdir, _ = trained
    lines = metrics.read(workdir / "metrics.jsonl")
    steps = [(x["stage"], x["step"]) for x in lines]
    assert steps == [("base", 1), ("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2)]
    for line in lines:
        assert {"loss", "weight", "grad_norm", "param_norm", "lr"} <= line.keys()
    for line in lines[3:]:
        assert line.keys() >= {*PARTS, *CURVES}
        assert line["weight"] == 8  # completions of four questions
        assert line["sampler_gap_max"] < 1e-4  # sampler and trainer compute one distribution
        assert 0 < line["completion_length"] <= tiny.LONGEST and line["entropy"] > 0


def test_a_run_writes_config_summary_items_samples_and_curves(trained):
    workdir, results = trained
    assert read(workdir, "summary.json") == results
    for when in ("before", "after"):
        for rate in ("accuracy", "validity", "sampled_validity"):
            low, mean, high = (results[f"{when}/test/{rate}{end}"] for end in ("_lo", "", "_hi"))
            assert 0 <= low <= mean <= high <= 1
        assert results[f"{when}/test/n"] == 8 and f"{when}/test/key_steps" in results
    assert {"rl/zero_std_first", "rl/zero_std_last", "test/gain", "test/gain_lo"} <= results.keys()
    assert read(workdir, "config.json")["config"]["behaviour"]["matcher"] == "auto"
    items = read(workdir, "items.json")
    assert {k: len(v) for k, v in items.items()} == {"before/test": 8, "after/test": 8}
    assert np.mean(items["after/test"]) == results["after/test/accuracy"]
    answers = [json.loads(x) for x in (workdir / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 8 and all(a.keys() >= {"problem", "before", "after"} for a in answers)
    text = (workdir / "samples.md").read_text()
    example = run.prepare(config()).task.split("test", 1)[0]
    assert example["problem"] in text and "samples/0.png" in text
    assert "8 stayed wrong." in text and "became" not in text  # two steps teach nothing
    with Image.open(workdir / "samples" / "0.png") as picture:
        assert picture.size == (112, 112)
    assert (workdir / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_finished_workdir_shows_its_summary_and_computes_nothing(trained, capsys, monkeypatch):
    workdir, results = trained
    before = (workdir / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(run, "warm_up", None)
    assert run.run(config(), workdir) == results
    out = capsys.readouterr().out
    assert "is finished" in out and "after/test/accuracy = " in out
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_evaluation_of_a_workdir_repeats_the_results_of_its_run(trained):
    workdir, results = trained
    found = run.evaluate(config(), workdir)
    assert found == {k.removeprefix("after/"): results[f"after/{k}"] for k in found}
    validation = run.evaluate(config(), workdir, split="validation", n=8)
    assert validation["validation/n"] == 8
    with pytest.raises(UserError, match="split 'rl' is what a stage trains on"):
        run.evaluate(config(), workdir, split="rl")


def test_samples_answer_a_file_and_test_questions(trained, tmp_path):
    workdir, _ = trained
    example = run.prepare(config()).task.split("test", 1)[0]
    example["image"].save(tmp_path / "a.png")
    ask = lambda **kw: run.sample(config(), workdir, **kw)
    asked = {"prompt": example["problem"], "image": str(tmp_path / "a.png")}
    (own,) = ask()
    gold = rewards.answer(example["solution"])
    assert own.startswith(f"question: {example['problem']} (answer: {gold})\n\n")
    assert ask(**asked) == [own.split("\n\n", 1)[1]]  # the same question from a file
    with pytest.raises(UserError, match="--image needs --prompt"):
        ask(image=asked["image"])
    with pytest.raises(UserError, match=r"closed vocabulary .* does not cover"):
        ask(prompt="how many sheep are there", image=asked["image"])
    Image.new("RGB", (640, 480)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match=r"prompt has \d+ tokens, the limit is"):
        ask(**asked | {"image": str(tmp_path / "large.png")})


# --- from one warm-up ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_from_a_warm_up_has_its_parameters_as_start_and_reference(
    trained, tmp_path, unexamined, monkeypatch
):
    begun = []
    reinforce = run.reinforce

    def spy(r, s, params):
        begun.append(jax.device_get(params))
        return reinforce(r, s, params)

    monkeypatch.setattr(run, "reinforce", spy)
    run.run(config(init_from=str(trained[0])), tmp_path / "run")
    equal(begun[0], parameters(trained[0], "sft"))
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [x["stage"] for x in lines] == ["rl", "rl"]
    assert abs(lines[0]["kl"]) < 1e-6 < lines[1]["kl"]  # the reference stays, the policy moves


@pytest.mark.slow
def test_an_update_that_crashes_is_repeated_with_the_same_bits(
    trained, tmp_path, unexamined, monkeypatch
):
    class Crash(Exception):
        pass

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    from_warm_up = config(init_from=str(trained[0]))
    results = run.run(from_warm_up, whole)
    compare = run.compare

    def crash(*args):
        if metrics.read(cut / "metrics.jsonl"):
            raise Crash
        return compare(*args)

    monkeypatch.setattr(run, "compare", crash)
    with pytest.raises(Crash):
        run.run(from_warm_up, cut)
    monkeypatch.setattr(run, "compare", compare)
    assert run.run(from_warm_up, cut) == results
    equal(parameters(cut, "rl"), parameters(whole, "rl"))
    assert metrics.read(cut / "metrics.jsonl") == metrics.read(whole / "metrics.jsonl")


@pytest.mark.slow
def test_the_control_arm_goes_on_with_supervised_training(trained, tmp_path, unexamined):
    results = run.run(config(init_from=str(trained[0]), arm="sft", steps=1), tmp_path / "run")
    (line,) = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert line["stage"] == "more" and line["loss"] > 0
    assert "after/test/accuracy" in results and not any(k.startswith("rl/") for k in results)
    task = run.prepare(config()).task
    ids = lambda stage: task.batches(stage, 4, seed=0, solutions=True)[0].ids
    assert not set(ids("more")) & {*ids("sft"), *ids("rl"), *ids("base")}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "code_2b", "code_7b"])
def test_the_loss_sees_the_distribution_that_its_preset_names(
    trained, tmp_path, unexamined, preset
):
    """At a temperature other than 1 the sampler's log-probs tell loss_temperature "match" from "1.0"."""
    c = config(init_from=str(trained[0]), preset=preset, steps=1, rl__temperature=1.2)
    run.run(c, tmp_path / "run")
    (line,) = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert line["grad_norm"] > 0 and line["sampler_gap_max"] < 1e-4


def test_no_updates_leave_the_rates_of_the_warm_up(trained, tmp_path):
    results = run.run(config(init_from=str(trained[0]), steps=0), tmp_path / "run")
    assert results == {k: v for k, v in trained[1].items() if k.startswith("before/")}


# --- modes ----------------------------------------------------------------------------------------------


def rollouts(s):
    """Shapes of a batch of the RL loss."""
    b, n, t = s.config.rl.batch, s.config.rl.samples, s.task.encoder.max_completion
    arrays = s.task.batches("rl", b, seed=0, solutions=False)[0].arrays
    lp = np.zeros((b, n, t), np.float32)
    more = {"ref_lp": lp, "lp_sampler": lp, "advantage": lp[..., 0]}
    return arrays | more | {"tokens": lp.astype(np.int32), "length": np.full((b, n), t, np.int32)}


@pytest.mark.parametrize("name", objective.LOSSES)
def test_every_loss_mode_takes_a_batch_of_rollouts(name):
    s = run.prepare(config(rl__loss=name))
    params = qwen2_vl.abstract(s.task.cfg)
    total, weight, aux = jax.eval_shape(lambda p, r: run.rl_loss(p, r, s=s), params, rollouts(s))
    assert total.shape == weight.shape == ()
    clipped = {"clip_low", "clip_high"} if name in ("dapo", "gspo") else set()
    assert aux.keys() == {"kl", "completion_length", "entropy", "sampler_gap"} | clipped | {
        "sampler_gap_max"
    }


@pytest.mark.parametrize("mode", MODES)
def test_every_advantage_mode_compares_within_its_group(mode):
    rewards = [(1.1, 1.0), (0.0, 1.0), (0.0, 0.0), (0.0, 0.0)]  # the second group has no signal
    value, found = run.compare(rewards, config(rl__advantage=mode).rl)
    value = np.asarray(value)
    assert value[0, 0] > 0 > value[0, 1] and value[0].sum() == pytest.approx(0, abs=1e-4)
    assert not value[1].any() and float(found["zero_std"]) == 0.5
    value, _ = run.compare(
        [None, (1.0, 0.0), (1.0, 0.0), (0.0, 0.0)], config(rl__advantage=mode).rl
    )
    assert np.isfinite(value).all() and not np.asarray(value)[0].any()  # unscorable: left out


def test_a_finished_run_exports_its_parameters_and_tokenizer(trained, tmp_path, monkeypatch):
    out = tmp_path / "model"
    monkeypatch.setattr(cli, "setup_jax", lambda: None)  # keeps this file's compile cache
    assert cli.guard(export.main, [f"--workdir={trained[0]}", f"--out={out}"]) == 0
    task = run.prepare(config()).task
    equal(hf.load(out, hf.read_config(out)), parameters(trained[0], "rl"))
    assert load_tokenizer(out).encode("\n") == task.tokenizer.encode("\n")
    assert "| after/test/accuracy |" in (out / "README.md").read_text()


# --- files of a user -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    """A model folder in the format of the hub, and a folder of JSONL files with PNG images."""
    folder = tmp_path_factory.mktemp("files")
    task = run.prepare(config()).task
    hf.save(folder / "model", parameters(trained[0], "sft"), task.cfg)
    task.tokenizer.save(folder / "model")
    for name, split in (("sft", "sft"), ("rl", "rl"), ("test", "test")):
        keep = ("id", "image", "problem", "solution", "key_steps")
        source = task.examples(split)
        examples = [{k: source[i][k] for k in keep} for i in range(8)]
        stepwise.write_jsonl(folder / "data" / f"{name}.jsonl", examples)
    return folder


def on_files(folder, **changes):
    paths = {"data__path": str(folder / "data"), "model__path": str(folder / "model")}
    limits = {"data__max_prompt": run.prepare(config()).task.encoder.max_prompt}
    limits["data__max_completion"] = tiny.LONGEST
    steps = {"base__steps": 0, "data__corrupt": 0.0, "sft__steps": 1, "steps": 1}
    return config(**paths | limits | steps | changes)


def copied(files, tmp_path):
    return Path(shutil.copytree(files, tmp_path / "files"))


@pytest.mark.slow
def test_jsonl_files_and_a_model_folder_train_both_stages(files, tmp_path):
    c = on_files(files)
    s = run.prepare(c)
    start = jax.device_get(run.initial(s))
    equal(start, hf.load(files / "model", s.task.cfg))
    results = run.run(c, tmp_path / "run")
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [x["stage"] for x in lines] == ["sft", "rl"] and lines[0]["grad_norm"] > 0
    assert results["after/test/n"] == 8
    assert (tmp_path / "run" / "samples" / "0.png").exists()


def test_a_broken_line_is_named_and_costs_no_other_record(files, tmp_path, capsys):
    folder = copied(files, tmp_path)
    path = folder / "data" / "rl.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], lines[3][:40] + b"\n", *lines[4:]]))
    everything = run.prepare(on_files(files)).task.examples("rl")
    capsys.readouterr()  # what whole files say
    kept = run.prepare(on_files(folder)).task.examples("rl")
    assert [e["id"] for e in kept] == [e["id"] for i, e in enumerate(everything) if i != 3]
    (said,) = capsys.readouterr().err.splitlines()
    assert re.match(r"left out: .*rl\.jsonl:4: not one JSON object", said)


def test_an_unreadable_image_and_a_missing_file_are_named(files, tmp_path, capsys):
    folder = copied(files, tmp_path)
    (folder / "data" / "rl.jsonl").rename(tmp_path / "rl.jsonl")
    with pytest.raises(UserError, match=r"no data file at .*rl\.jsonl"):
        run.run(on_files(folder), tmp_path / "run")
    (tmp_path / "rl.jsonl").rename(folder / "data" / "rl.jsonl")
    picture = folder / "data" / "test_images" / "000002.png"
    picture.write_bytes(picture.read_bytes()[:200])
    assert not list(tmp_path.glob("run/checkpoints/*/*"))  # before anything is trained
    assert len(run.prepare(on_files(folder)).task.examples("test")) == 7
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(r"left out: .*test\.jsonl: .*cannot read the image file .*000002\.png", said)


def test_a_tokenizer_of_another_model_and_too_short_limits_are_refused(files, tmp_path):
    folder = copied(files, tmp_path)
    with pytest.raises(UserError, match=r"sft\.jsonl holds no example that fits data\.max_prompt"):
        run.run(on_files(folder, data__max_prompt=5), tmp_path / "run")
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(read(folder / "model", "config.json") | {"image_token_id": 3}))
    with pytest.raises(UserError, match="image_pad is 5 in the tokenizer but 3 in the model"):
        run.prepare(on_files(folder))
    ids = folder / "model" / "generation_config.json"
    whole = ids.read_text()
    ids.write_text("[3]")
    with pytest.raises(UserError, match=r"generation_config\.json is damaged"):
        run.prepare(on_files(folder))
    ids.write_text(whole)
    with pytest.raises(UserError, match=r"data\.path needs data\.max_prompt"):
        run.prepare(config(data__path=str(folder / "data"), model__path=str(folder / "model")))
    with pytest.raises(UserError, match=r"is not of model\.shape=2b, whose learning rates"):
        run.prepare(on_files(folder, model__shape="2b"))


# --- bad settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"arm": "stepgpro"}, "arm='stepgpro' is not one of stepgrpo, outcome"),
        ({"rl__samples": 1}, "rl.samples=1; a group needs at least 2"),
        ({"rl__temperature": 0.0}, "rl.temperature=0.0; sampling needs one from 1e-06 to 1"),
        ({"behaviour__temperature": 0.0}, "behaviour.temperature=0.0; sampling needs"),
        ({"behaviour__top_k": -1}, "behaviour.top_k=-1; use 0"),
        ({"behaviour__gate": "never"}, "gate is 'never'; choose one of answered, always"),
        ({"model__path": "hub/name"}, "model.path is set without data.path"),
        (
            {"data__path": "folder", "base__steps": 0, "data__corrupt": 0.0},
            "data.path is set without model.path",
        ),
        ({"data__path": "folder"}, "base.steps and data.corrupt are for generated questions"),
        ({"sft__batch": 0}, "sft.batch=0; use 1 or more"),
        ({"base__steps": -1}, "base.steps=-1; use 0 or more"),
        ({"data__max_pixels": 5}, "data.max_pixels=5; use 3136 or more"),
        ({"rl__max_grad_norm": -1.0}, "rl.max_grad_norm=-1.0; use 0 for no clipping"),
        ({"sft__warmup": -3}, "warmup=-3 is negative"),
        ({"rl__b2": 2.0}, "b2=2.0 can't be; use a number from 0 up, below 1"),
        ({"rl__weight_decay": -1.0}, "weight_decay=-1.0 can't be"),
        ({"sft__stop_accuracy": 0.5, "sft__check_every": 0}, "sft.check_every=0: nothing would be"),
        ({"model__shape": "huge"}, "model.shape='huge' is not one of tiny, small, 2b, 7b"),
        ({"data__generator": "digit"}, "no generator 'digit'; choose from"),
        ({"steps": -1}, "steps=-1 and rl.batch=4; steps >= 0"),
        ({"rl__batch": 0}, "rl.batch=0"),
        ({"rl__loss": "ppo"}, "rl.loss='ppo' is not one of grpo, bnpo"),
        ({"rl__advantage": "gae"}, "rl.advantage='gae' is not one of grpo, dr_grpo"),
        ({"rl__micro_batches": 3}, "rl.micro_batches=3 does not divide rl.batch=4"),
        ({"sft__freeze": ("vison",)}, r"sft.freeze=\['vison'\] is not among lm, merger, vision"),
        ({"rl__freeze": ("lm", "merger", "vision")}, "leaves nothing to train"),
        ({"eval__n": 0}, "eval.n=0; use 1 or more"),
        ({"eval__batch": 0}, "eval.batch=0; use 1 or more"),
        ({"sft__stop_accuracy": 0.5, "eval__validation_n": 0}, "eval.validation_n=0, but sft"),
        ({"eval__every": 5, "eval__validation_n": 0}, "eval.validation_n=0, but sft"),
        ({"mesh": (8, 1, 1, 1)}, "base.batch=4 does not divide over data . fsdp = 8"),
        ({"mesh": (3, 1, 1, 1)}, "mesh 3 x 1 x 1 x 1 .* takes 3 devices, there are 8"),
        ({"init_from": "/nowhere"}, "/nowhere has no checkpoint of stage 'sft'"),
        ({"data__max_prompt": 5, "base__steps": 0}, r"its prompt has \d+ tokens, the limit is 5"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line(changes, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "initial", lambda s: qwen2_vl_zeros(s))
    c = config(**changes)
    code = cli.guard(lambda argv: run.run(c, tmp_path / "run"), [])
    found = capsys.readouterr().err
    assert code == 2 and found.count("\n") == 1
    assert re.search(said, found)
    assert not list(tmp_path.glob("run/checkpoints/*/*"))


def qwen2_vl_zeros(s):
    shapes = qwen2_vl.abstract(s.task.cfg)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="preset=official is unknown; choose from paper, code_2b"):
        config(preset="official")


def test_a_workdir_of_another_config_names_the_keys(trained):
    with pytest.raises(UserError, match=r"another config: rl.beta \(0.04 there, 0.1 here\), seed"):
        run.run(config(rl__beta=0.1, seed=1), trained[0])


def test_the_plan_counts_the_parameters_of_the_model():
    plan = run.plan(config())
    cfg = run.prepare(config()).task.cfg
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(plan.params))
    assert count == qwen2_vl.count(cfg)
