"""The fine-tuning run: what it counts, what it writes, how it goes on, what it refuses."""

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro import cli, config, evaluate, export, sample
from jaxrepro.config import UserError
from jaxrepro.data import batches, locate, questions
from jaxrepro.data.text import closed_vocabulary
from jaxrepro.models import hf, lora, transformer
from jaxrepro.train import policy, quiz, sft
from jaxrepro.train.loop import Run

sys.path.insert(0, str(Path(__file__).parents[1]))
import compiled
import meshes

SMALL = {
    "steps": 4,
    "sft.batch": 4,
    "sft.warmup": 1,
    "eval.n": 6,
    "eval.batch": 4,
    "checkpoint.every": 2,
    "log.tensorboard": False,
    "log.curves": False,
}


def settings(**changes):
    return config.load(
        "configs/sft.py", SMALL | {k.replace("__", "."): v for k, v in changes.items()}
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The tiny shape, made smaller."""
    shape = policy.SHAPES["tiny"] | dict(d=32, layers=1, heads=4, kv=2, head_dim=8, ffn=48)
    with compiled.small(tmp_path_factory.mktemp("xla"), (policy.SHAPES, "tiny", shape)):
        yield


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A run of four steps without interruption."""
    folder = tmp_path_factory.mktemp("sft") / "whole"
    return folder, sft.run(settings(), folder)


def parameters(folder):
    return sft.trained(settings(), folder)[1]


def test_a_run_leaves_rates_intervals_items_and_samples(finished):
    folder, results = finished
    for when in ("before", "after"):
        rate, n = results[f"{when}/test/exact_match"], results[f"{when}/test/n"]
        lo, hi = (results[f"{when}/test/exact_match_{end}"] for end in ("lo", "hi"))
        assert lo - 1e-12 <= rate <= hi + 1e-12
        assert n == 6 and {f"{when}/test/stated", f"{when}/test/finished"} <= set(results)
    items = json.loads((folder / "items.json").read_text())
    gained = np.mean(items["after/test"]) - np.mean(items["before/test"])
    assert results["test/gain"] == pytest.approx(gained)
    assert json.loads((folder / "summary.json").read_text()) == results
    assert "Test questions, answered before and after" in (folder / "samples.md").read_text()
    logged = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in logged] == [1, 2, 3, 4] and logged[0]["stage"] == "sft"


def test_a_resumed_run_has_the_same_bits_and_the_same_before(
    finished, small, tmp_path, monkeypatch
):
    folder, results = finished
    save = Run.save

    def stop(self, i, state, **kwargs):
        save(self, i, state, **kwargs)
        if i == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            sft.run(settings(), tmp_path)
    assert sft.run(settings(), tmp_path) == results
    jax.tree.map(np.testing.assert_array_equal, parameters(folder), parameters(tmp_path))


def test_the_loss_is_the_mean_over_answer_tokens_of_the_whole_batch(small):
    s = sft.prepare(settings())
    params = policy.initial(s.policy, s.config)
    rows = batches.dataset(s.questions.train, s.encoder.sft, batch=4)[0].arrays
    rows = jax.tree.map(jnp.asarray, rows)
    tokens = rows["tokens"]

    @jax.jit
    def both(params, rows):
        tokens = rows["tokens"]
        x = transformer.embed(params, s.policy.cfg, tokens.tokens)
        hidden, _ = transformer.apply(
            params, s.policy.cfg, x, position=tokens.position, segment=tokens.segment
        )
        logits = transformer.logits(params, s.policy.cfg, hidden)
        return sft.loss(params, rows, cfg=s.policy.cfg, responses=32)[:2], jax.nn.log_softmax(
            logits
        )

    (total, count), lp = both(params, rows)
    wanted = [
        -np.asarray(lp)[i, j - 1, tokens.tokens[i, j]] for i, j in zip(*np.nonzero(tokens.response))
    ]
    assert count == len(wanted) == tokens.response.sum()
    assert total == pytest.approx(np.sum(wanted), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 2, 1, 2), (1, 2, 2, 2), (1, 4, 1, 2)])
def test_a_run_on_a_mesh_is_that_of_one_device(finished, small, tmp_path, mesh):
    losses = lambda folder: [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    results = sft.run(settings(mesh=mesh), tmp_path)
    # float32: devices add in another order, over four updates
    np.testing.assert_allclose(losses(tmp_path), losses(finished[0]), rtol=1e-5)
    assert results["after/test/exact_match"] == finished[1]["after/test/exact_match"]
    assert (tmp_path / "samples.md").read_text() == (finished[0] / "samples.md").read_text()


@pytest.mark.slow
def test_every_mesh_gives_the_loss_and_gradient_of_one_device():
    s = sft.prepare(settings())
    rows = batches.dataset(s.questions.train, s.encoder.sft, batch=8)[0].arrays
    loss = lambda params, batch: sft.loss(params, batch, cfg=s.policy.cfg, responses=32)
    meshes.check(loss, policy.initial(s.policy, s.config), transformer.axes(s.policy.cfg), rows)


def test_init_from_starts_where_another_run_ended(finished, small, tmp_path):
    folder, results = finished
    again = sft.run(settings(init_from=str(folder), steps=0), tmp_path)
    assert again["before/test/exact_match"] == results["after/test/exact_match"]
    assert "after/test/exact_match" not in again


@pytest.mark.slow
def test_adapters_alone_are_trained(finished, small, tmp_path):
    c = settings(lora__rank=2, init_from=str(finished[0]))
    results = sft.run(c, tmp_path / "run")
    base = parameters(finished[0])
    _, params = sft.trained(c, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, lora.off(params), base)
    assert all(np.any(a["b"]) for a in params["layers"]["lora"].values())
    before = {k: v for k, v in results.items() if k.startswith("before/")}
    assert before == {f"before/{k[6:]}": v for k, v in finished[1].items() if k[:6] == "after/"}
    plan = sft.plan(c)
    assert plan.trainable == lora.TRAINABLE


def test_evaluate_and_sample_use_the_trained_model(finished, capsys, monkeypatch):
    folder, results = finished
    monkeypatch.setattr(cli, "setup_jax", lambda: None)
    assert cli.guard(evaluate.main, [f"--workdir={folder}"]) == 0
    shown = capsys.readouterr().out
    assert "test/exact_match" in shown and "[" in shown
    assert sft.evaluate(settings(), folder)["test/exact_match"] == results["after/test/exact_match"]
    assert cli.guard(sample.main, [f"--workdir={folder}", "--n=2"]) == 0
    assert capsys.readouterr().out.count("question: ") == 2
    words = [f"--workdir={folder}", "--prompt=3 + 4 - 2", "--n=2"]
    assert cli.guard(sample.main, words) == 0
    assert cli.guard(sample.main, [f"--workdir={folder}", "--prompt=cats"]) == 2
    assert cli.guard(evaluate.main, [f"--workdir={folder}", "--split=dev"]) == 2
    assert "one of test, train" in capsys.readouterr().err


def test_answers_depend_on_neither_batch_size_nor_padding_rows(small):
    s = sft.prepare(settings())
    params, key = policy.initial(s.policy, s.config), jax.random.key(0)
    asked = s.questions.test[:5]
    whole = sft.sampler(s, temperature=1.0)(params, asked, key)
    one = s._replace(config=settings(eval__batch=2))
    assert sft.sampler(one, temperature=1.0)(params, asked, key) == whole and len(whole) == 5


def test_export_gives_the_parameters_the_config_and_the_tokenizer(finished, tmp_path):
    folder, _ = finished
    params, cfg, tokenizer = sft.export(settings(), folder)
    assert transformer.count(cfg) == sum(x.size for x in jax.tree.leaves(params))
    export.write(tmp_path / "hub", params, cfg, tokenizer, "card")
    assert (tmp_path / "hub" / "tokenizer.json").is_file()
    ids = json.loads((tmp_path / "hub" / "generation_config.json").read_text())
    assert (ids["eos_token_id"], ids["pad_token_id"]) == (tokenizer.eos, tokenizer.pad)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model's folder: it ends texts, not turns, and has no chat template."""
    tokenizer = closed_vocabulary(questions.chain_pieces())
    # no qwen2: AutoTokenizer ignores the tokenizer.json of its folders where it is not byte-level
    shape = dict(d=32, layers=1, heads=4, kv=2, head_dim=8, ffn=48, qkv_bias=False, family="llama")
    cfg = transformer.TransformerConfig(vocab=tokenizer.vocab_size, **shape)
    params = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), transformer.abstract(cfg))
    folder = tmp_path_factory.mktemp("base") / "model"
    ids = {"bos_token_id": tokenizer.pad, "eos_token_id": tokenizer.pad}
    hf.save(folder, params, cfg, ids=ids, tokenizer=tokenizer)
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def test_an_exported_base_model_stops_at_the_end_of_turn_that_was_trained(
    base, tmp_path, monkeypatch
):
    from transformers import AutoTokenizer, GenerationConfig

    def exported(path, out):
        chosen = settings(model__path=str(path))
        s = sft.prepare(chosen)
        monkeypatch.setattr(sft, "trained", lambda *_: (s, policy.initial(s.policy, s.config)))
        export.write(out, *sft.export(chosen, tmp_path), "card")
        return s

    out = tmp_path / "hub"
    s = exported(base, out)
    theirs, generation = AutoTokenizer.from_pretrained(out), GenerationConfig.from_pretrained(out)
    end = theirs.convert_tokens_to_ids("<|im_end|>")
    assert (
        generation.eos_token_id == [end, s.policy.tokenizer.pad] and end == s.policy.tokenizer.eos
    )
    assert (generation.bos_token_id, generation.pad_token_id) == (s.policy.tokenizer.pad,) * 2
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [
        end,
        s.policy.tokenizer.pad,
    ]
    asked = [{"role": "system", "content": s.encoder.system}, {"role": "user", "content": "3 + 4"}]
    prompt = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert prompt == s.encoder.prompt({"id": "x", "problem": "3 + 4"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    exported(out, tmp_path / "again")  # from a folder that knows its end of turn and has a template
    assert hf.token_ids(tmp_path / "again") == hf.token_ids(out)
    template = "chat_template.jinja"
    assert (tmp_path / "again" / template).read_bytes() == (out / template).read_bytes()


def test_a_token_beyond_the_vocabulary_of_the_model_is_refused_before_training(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<|im_end|>"] = 5000
    for token in tokenizer["added_tokens"]:
        token["id"] = 5000 if token["content"] == "<|im_end|>" else token["id"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="the tokenizer's largest id is 5000, the model's"):
        sft.prepare(settings(model__path=str(folder)))


def test_ids_that_an_export_could_not_write_are_refused_before_training(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "generation_config.json").write_text('["eos_token_id", 3]')
    with pytest.raises(
        UserError, match=r"generation_config\.json is damaged: it holds no JSON obj"
    ):
        sft.prepare(settings(model__path=str(folder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft__micro_batches": 3}, "sft.micro_batches=3 does not divide sft.batch=4"),
        ({"eval__n": 0}, "eval.n=0; use 1 or more"),
        ({"data__max_completion": 48}, "leaves no room for a prompt"),
        ({"model__shape": "odd"}, "model.shape='odd' is not one of tiny"),
        ({"data__generator": "gsm_symbolic"}, "model.path is needed"),
        ({"lora__rank": -1}, "lora rank -1 must be at least 1"),
        ({"lora__rank": 2, "lora__targets": "layers/wx"}, "match none of layers/"),
        ({"sft__schedule": "odd"}, "schedule='odd' is unknown"),
        ({"model__path": "/nowhere/at all"}, "model.path=/nowhere/at all"),
        ({"sft__max_grad_norm": float("nan")}, "sft.max_grad_norm=nan; use a number above 0"),
        ({"data__max_completion": 24}, "longer than data.max_tokens=48 or data.max_completion=24"),
        ({"data__max_tokens": 40_000}, "40000 tokens, but the model was made for 32768"),
        ({"mesh": (3, 1, 1, 1)}, "takes 3 devices"),
        ({"mesh": (8, 1, 1, 1)}, "sft.batch=4 does not divide over data"),
    ],
)
def test_settings_that_cannot_work_are_one_line(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        sft.run(settings(**changes), tmp_path / "w")
    assert not list(tmp_path.iterdir()), "a corrected command would find a run of another config"


def shortened(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def with_another_tensor(folder):
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.odd.weight": np.zeros((2, 2), np.float32)}, path)


def without_a_shard(folder):
    from safetensors.numpy import load_file

    path = folder / "model.safetensors"
    index = {"weight_map": {name: "model-00001-of-00001.safetensors" for name in load_file(path)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shortened, "model.safetensors"),
        (with_another_tensor, "unexpected"),
        (without_a_shard, "the index names the shard"),
    ],
)
def test_damaged_weights_leave_no_workdir_behind(base, damage, message, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    damage(folder)
    with pytest.raises(UserError, match=message):
        sft.run(settings(model__path=str(folder)), tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_start_that_does_not_fit_leaves_no_workdir_behind(
    finished, small, tmp_path, monkeypatch, resume
):
    refused = [(str(tmp_path / "nothing"), "has no checkpoint")]
    monkeypatch.setitem(policy.SHAPES, "tiny", policy.SHAPES["tiny"] | {"ffn": 64})
    refused += [(str(finished[0]), "does not fit: params/layers")]
    for init_from, message in refused:
        with pytest.raises(UserError, match=message):
            sft.run(settings(init_from=init_from), tmp_path / "w", resume=resume)
        assert not list(tmp_path.iterdir())


def test_a_finished_run_survives_a_command_that_is_refused(finished, small, tmp_path, monkeypatch):
    """Same config, more to do, another shape: what a moved model folder of another model looks like."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    names = ("config.json", "summary.json", "metrics.jsonl", "once/before.json")
    held = [(folder / name).read_bytes() for name in names]
    with monkeypatch.context() as patch:
        patch.setitem(policy.SHAPES, "tiny", policy.SHAPES["tiny"] | {"ffn": 64})
        with pytest.raises(UserError, match="does not fit"):
            sft.run(settings(steps=6, eval__n=5), folder)
    assert [(folder / name).read_bytes() for name in names] == held
    assert sft.run(settings(), folder) == finished[1]


@pytest.mark.parametrize(
    ("tokens", "merges", "message"),
    [
        (["a", "b", "ab"], ["a b"], "the tokenizer has no chat template"),
        (["a", "b"], ["a b"], "the merge 'a b' does not fit its 2 different tokens"),
        (["a", "a", "aa"], ["a a"], "does not fit its 2 different tokens"),
    ],
)
def test_a_model_with_a_broken_or_no_chat_tokenizer_is_refused(tokens, merges, message, tmp_path):
    from gguf_files import LLAMA, drawn, write

    fields = [("add_tokenizer_model", "gpt2"), ("add_tokenizer_pre", "smollm")]
    fields += [("add_token_list", tokens), ("add_token_merges", merges)]
    path = write(tmp_path / "a.gguf", drawn(LLAMA), LLAMA, fields=fields)
    with pytest.raises(UserError, match=re.escape(message)):
        sft.run(settings(model__path=str(path)), tmp_path / "w")


def test_the_known_model_is_the_default_of_its_size():
    assert config.load("configs/sft.py:smollm2").model.path in locate.KNOWN


# ---- scores


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 + 4 = 7\n#### 7", 1.0),
        ("#### 7.0", 1.0),
        ("so it is 7", 1.0),
        ("7 dollars and 3 cents", 0.0),
        ("#### 8", 0.0),
        ("", 0.0),
    ],
)
def test_an_answer_is_right_by_its_final_number(text, value):
    assert quiz.right({"solution": "3 + 4 = 7\n#### 7"}, text) == value


def test_gain_and_verdict_are_of_pairs():
    before, after = {"correct": [0.0] * 20}, {"correct": [1.0] * 15 + [0.0] * 5}
    found = quiz.gain(before, after)
    assert found["test/gain"] == 0.75 and 0 < found["test/gain_lo"] < 0.75 < found["test/gain_hi"]
    assert quiz.verdict(found).endswith("better")
    assert quiz.verdict(quiz.gain(after, before)).endswith("worse")
    assert quiz.verdict(quiz.gain(after, after)).endswith("not resolved")
