"""The SOC run: plain SFT at lam 0, the same sums however rows are cut, padded or sharded, what it writes."""

import dataclasses
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro import cli, evaluate, export, sample
from jaxrepro.config import UserError
from jaxrepro.data import batches
from jaxrepro.methods.soc import decoding, objective, run
from jaxrepro.models import transformer
from jaxrepro.ops.logprob import Tokens
from jaxrepro.train import policy, sft
from jaxrepro.train.loop import Run
from jaxrepro.train.state import init_state
from jaxrepro.train.step import accumulate, make_step

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import meshes
import soc_tiny as tiny

NORMALISE = ["token", pytest.param("sequence", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    with tiny.small(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def setting():
    s = run.prepare(tiny.config())
    return s, policy.initial(s.policy, s.config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps without interruption."""
    folder = tmp_path_factory.mktemp("soc") / "whole"
    return folder, run.run(tiny.config(), folder)


def rows(s, count=8):
    arrays = batches.dataset(s.task.train, s.encoder.sft, batch=count, seed=0)[0].arrays
    return jax.tree.map(jnp.asarray, arrays)


def logits_of(s, params, tokens):
    """Whole logits (b, t - 1, v) of what predicts tokens[:, 1:]."""
    x = transformer.embed(params, s.policy.cfg, tokens.tokens)
    where = dict(position=tokens.position, segment=tokens.segment)
    hidden, _ = transformer.apply(params, s.policy.cfg, x, **where)
    return transformer.logits(params, s.policy.cfg, hidden)[:, :-1]


def loss_of(s, *, lam=0.2, **options):
    how = dict(vocab=s.vocab, responses=s.config.data.max_completion, cfg=s.policy.cfg)
    return partial(run.loss, lam=lam, **how | options)


value_and_grad = lambda loss: jax.jit(
    jax.value_and_grad(lambda p, b: loss(p, b)[0] / loss(p, b)[1])
)


# The loss of a batch ---------------------------------------------------------------------------------


# Bits of two programs: the kernels that compile fastest round by what stands beside them.
FUSED = meshes.QUICK | {name: True for name in meshes.QUICK if name.endswith("fusion_emitters")}


def test_lam_0_is_plain_sft_to_the_bit(setting):
    s, params = setting
    rule = policy.optimizer(s.config.sft, steps=4)
    plain = partial(sft.loss, cfg=s.policy.cfg, responses=s.config.data.max_completion)
    ends, batch = [], rows(s)
    for loss in (plain, loss_of(s, lam=0.0, variant="entropy")):
        step = jax.jit(make_step(loss, rule, max_grad_norm=1.0), compiler_options=FUSED)
        state = init_state(params, rule)
        for _ in range(3):
            state, metrics = step(state, batch)
        ends.append(state.params)
        assert metrics["loss"] > 0
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_the_loss_is_that_of_whole_logits(setting):
    s, params = setting
    batch = rows(s)
    tokens = batch["tokens"]
    cases = (0.2, "soc"), (0.3, "smoothing")

    @jax.jit
    def compute(params, batch):
        both = [loss_of(s, lam=lam, variant=variant)(params, batch) for lam, variant in cases]
        return logits_of(s, params, batch["tokens"]), both

    logits, both = compute(params, batch)
    found = objective.stats(logits, tokens.tokens[:, 1:])
    mask = np.asarray(tokens.response)[:, 1:]
    mean = lambda a: float(np.asarray(a)[mask].mean())
    for (lam, variant), (total, weight, aux) in zip(cases, both, strict=True):
        assert weight == mask.sum()
        want = mean(objective.per_token(found, lam=lam, variant=variant))
        assert total / weight == pytest.approx(want, rel=1e-5)
        means = {k: float(a[0] / a[1]) for k, a in aux.items()}
        p = np.asarray(jax.nn.softmax(logits))
        assert means == pytest.approx(
            {
                "ce": -mean(found.lp),
                "v": mean(found.lse),
                "mean_logit": mean(found.mean_logit),
                "entropy": mean(found.entropy),
                "max_prob": mean(p.max(-1)),
                "token_accuracy": mean(logits.argmax(-1) == tokens.tokens[:, 1:]),
                "logit_absmax": mean(np.abs(logits).max(-1)),
            },
            rel=1e-4,
        )


@pytest.mark.slow
def test_soc_is_the_gradient_of_its_two_terms(setting):
    s, params = setting
    batch = rows(s)
    _, ours = value_and_grad(loss_of(s))(params, batch)

    def two_terms(params, batch):
        total, count, aux = loss_of(s, lam=0.0)(params, batch)
        tokens = batch["tokens"]
        v = jax.nn.logsumexp(logits_of(s, params, tokens), axis=-1)
        return total - 0.2 * jnp.sum(v, where=tokens.response[:, 1:]), count, aux

    _, wanted = value_and_grad(two_terms)(params, batch)
    meshes.assert_same(ours, wanted, tolerance=2e-5)


@pytest.mark.parametrize("normalise", NORMALISE)
def test_padding_prompts_and_unused_columns_change_nothing(setting, normalise):
    s, params = setting
    batch = rows(s, 3)
    loss = loss_of(s, normalise=normalise)
    of = lambda p, b, fn=loss: [float(a) for a in jax.jit(fn)(p, b)[:2]]
    want = of(params, batch)
    tokens = batch["tokens"]
    wide = lambda a: jnp.pad(a, ((0, 0), (0, 9)))
    longer = {"tokens": Tokens(wide(tokens.tokens) + 3 * (wide(tokens.segment) == 0), *map(wide, tokens[1:]))}  # fmt: skip
    assert of(params, longer) == pytest.approx(want, rel=1e-5)
    # the first token of a prompt is not predicted: only what follows it could notice
    masked = tokens._replace(response=tokens.response.at[0].set(False))
    part = of(params, {"tokens": masked})
    assert part[1] < want[1]
    other = masked._replace(tokens=masked.tokens.at[0].set(7))
    assert of(params, {"tokens": other}) == part, "a row without supervised tokens counts"
    cfg = s.policy.cfg
    more = jax.random.normal(jax.random.key(0), (6, cfg.d)) * 3
    grown = params | {"embed": jnp.concatenate([params["embed"], more])}
    padded = loss_of(s, normalise=normalise, cfg=dataclasses.replace(cfg, vocab=cfg.vocab + 6))
    total, g = jax.jit(jax.value_and_grad(lambda p, b: padded(p, b)[0]))(grown, batch)
    assert total == pytest.approx(want[0], rel=1e-5)
    assert not np.any(g["embed"][-6:]), "a padded column is trained"


def test_prompts_are_learnt_only_where_asked(setting):
    s, params = setting
    batch = rows(s, 3)
    tokens = batch["tokens"]
    count = lambda **o: float(jax.jit(lambda p, b: loss_of(s, **o)(p, b)[1])(params, batch))
    assert count() == np.asarray(tokens.response).sum()
    real = np.asarray(tokens.segment > 0)
    assert count(loss_on_prompt=True) == real.sum() - len(real)  # nothing predicts a first token


def test_a_row_without_supervised_tokens_is_an_error_that_names_it(setting):
    s, _ = setting
    tokens = rows(s, 3)["tokens"]
    run.supervised(tokens, ["a", "b", "c"])
    with pytest.raises(UserError, match="no supervised tokens in example b"):
        run.supervised(tokens._replace(response=tokens.response.at[1].set(False)), ["a", "b", "c"])


def test_corrupted_rows_differ_in_their_response_alone_and_by_step(setting):
    s, params = setting
    tokens = rows(s)["tokens"]
    found = [run.corrupt(s, jax.tree.map(np.asarray, tokens), i) for i in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()
    changed = found[0] != np.asarray(tokens.tokens)
    assert changed.any() and not (changed & ~np.asarray(tokens.response)).any()
    loss = loss_of(s, variant="contrastive")
    same = {"tokens": tokens, "corrupted": tokens.tokens}
    total, count, aux = jax.jit(loss)(params, same)
    assert total / count == pytest.approx(float(aux["ce"][0] / aux["ce"][1]), rel=1e-5)
    total_, *_ = jax.jit(loss)(params, same | {"corrupted": jnp.asarray(found[0])})
    assert abs(float(total_ - total)) > 1e-3


@pytest.mark.parametrize("normalise", NORMALISE)
def test_one_batch_of_eight_is_four_of_two(setting, normalise):
    s, params = setting
    sums = jax.jit(accumulate, static_argnums=(0, 3))
    loss = loss_of(s, normalise=normalise)
    whole = sums(loss, params, rows(s), 1)
    meshes.assert_same(sums(loss, params, rows(s), 4), whole, name="4 x 2")


@pytest.mark.parametrize(
    ("variant", "shape"),
    [
        ("soc", (8, 1, 1, 1)),
        pytest.param("soc", (1, 4, 1, 2), marks=pytest.mark.slow),
        pytest.param("contrastive", (2, 2, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_eight_devices_give_the_loss_and_gradient_of_one(setting, variant, shape):
    s, params = setting
    batch = rows(s)
    lengths = np.asarray(batch["tokens"].response.sum(1))
    assert len(set(lengths)) > 2, "the devices hold unequal numbers of tokens"
    if variant == "contrastive":
        tokens = jax.tree.map(np.asarray, batch["tokens"])
        batch["corrupted"] = jnp.asarray(run.corrupt(s, tokens, 0))
    axes = transformer.axes(s.policy.cfg)
    meshes.check(loss_of(s, variant=variant), params, axes, batch, [shape])


# A run -----------------------------------------------------------------------------------------------


def test_a_run_leaves_rates_intervals_items_and_answers(finished):
    folder, results = finished
    names = ["greedy", "beam3"]
    for name in names:
        lo, mean, hi = (results[f"test/{name}/accuracy{end}"] for end in ("_lo", "", "_hi"))
        assert lo - 1e-12 <= mean <= hi + 1e-12 and results[f"test/{name}/n"] == 6
        assert {f"test/{name}/{k}" for k in ("length", "empty", "truncated")} <= set(results)
    for name in names:
        shares = [results[f"test/{name}/{k}"] for k in ("over_opt_rate", "search_error_rate")]
        assert all(0 <= x <= 1 for x in shares)
        assert results[f"test/{name}/v_gap"] == pytest.approx(
            results[f"test/{name}/v_gold"] - results[f"test/{name}/v_wrong"]
        )
    assert {f"test/beam3/rerank_{mode}" for mode in objective.SCORES} <= set(results)
    assert {"test/slope", "test/beam3_minus_greedy", "test/beam3_minus_greedy_lo"} <= set(results)
    assert results["train/left_out"] == 0
    items = json.loads((folder / "items.json").read_text())
    for key in ("test/beam3", "test/beam3/over_opt_rate", "test/beam3_minus_greedy"):
        metric = key if key in results else f"{key}/accuracy"
        assert np.mean(items[key]) == pytest.approx(results[metric])
    assert json.loads((folder / "summary.json").read_text()) == results
    said = [json.loads(x) for x in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(said) == 6 and set(said[0]["said"]) == set(names)
    assert "right by beam3 alone" in (folder / "samples.md").read_text()
    logged = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in logged] == [1, 2, 3, 4]
    for x in logged:
        assert x["loss"] == pytest.approx(x["ce"] - 0.2 * x["v"], abs=1e-5)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(finished, tmp_path, monkeypatch):
    folder, results = finished
    save = Run.save

    def stop(self, i, state, **kwargs):
        save(self, i, state, **kwargs)
        if i == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run.run(tiny.config(), tmp_path)
    assert run.run(tiny.config(), tmp_path) == results
    both = [run.trained(tiny.config(), f)[1] for f in (folder, tmp_path)]
    jax.tree.map(np.testing.assert_array_equal, *both)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 2, 1, 2), (1, 8, 1, 1)])
def test_a_run_on_a_mesh_is_that_of_one_device(finished, tmp_path, mesh):
    folder, results = finished
    found = run.run(tiny.config(mesh=mesh), tmp_path)
    losses = lambda at: [
        json.loads(line)["loss"] for line in (at / "metrics.jsonl").read_text().splitlines()
    ]
    # float32: devices add in another order, over four updates
    np.testing.assert_allclose(losses(tmp_path), losses(folder), rtol=1e-4, atol=1e-5)
    assert found == pytest.approx(results, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_other_decoders_on_a_finished_run_train_nothing(finished, tmp_path, monkeypatch):
    folder, results = finished
    shutil.copytree(folder, tmp_path / "w")
    monkeypatch.setattr(policy, "initial", None)  # nothing begins anew
    more = dict(
        decode__votes=3, decode__penalties=(0.0,), decode__temperatures=(0.7,), decode__rerank=False
    )
    again = run.run(tiny.config(**more), tmp_path / "w")
    assert again["test/greedy/accuracy"] == results["test/greedy/accuracy"]
    assert {"test/beam3_lp0/accuracy", "test/beam3_tau0.7/over_opt_rate"} <= set(again)
    assert again["test/vote3/n"] == 6 and "test/vote3/over_opt_rate" not in again
    assert not [k for k in again if "rerank" in k]


def test_greedy_is_the_sampler_at_temperature_0_and_scores_are_the_models(finished):
    folder, _ = finished
    s, params = run.trained(tiny.config(), folder)
    asked = s.task.tests["test"][:4]
    how = dict(batch=4, vocab=s.vocab)
    best = decoding.searcher(s.policy, s.encoder, decoding.Decoder("greedy"), **how)
    draw = policy.sampler(s.policy, s.encoder, batch=4)
    answers = [a[0] for a in best(params, asked)]
    greedy = draw(params, asked, jax.random.key(0))
    assert [(a.text, a.finished) for a in answers] == [(t.strip(), f) for t, f in greedy]
    # a worked solution scores as the loss says
    gold = decoding.scorer(s.policy, s.encoder, **how)(params, asked)
    batch = jax.tree.map(jnp.asarray, s.encoder.sft(asked))
    _, count, aux = jax.jit(loss_of(s))(params, batch)
    assert sum(a.length for a in gold) == count
    assert sum(a.sums.logprob for a in gold) == pytest.approx(-float(aux["ce"][0]), rel=1e-5)
    assert sum(a.sums.v for a in gold) == pytest.approx(float(aux["v"][0]), rel=1e-5)


@pytest.mark.slow
def test_evaluate_sample_and_export_use_the_trained_model(finished, tmp_path, capsys, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr(cli, "setup_jax", lambda: None)
    assert cli.guard(evaluate.main, [f"--workdir={folder}"]) == 0
    assert "test/beam3/accuracy" in capsys.readouterr().out
    assert cli.guard(evaluate.main, [f"--workdir={folder}", "--split=dev"]) == 2
    assert "is not one of test, train" in capsys.readouterr().err
    found = run.evaluate(tiny.config(decode__beams=(1,), decode__width=1), folder, split="train", n=3)  # fmt: skip
    assert found["train/greedy/n"] == 3
    assert cli.guard(sample.main, [f"--workdir={folder}", "--prompt=1 2 3 + 4 5 6", "--n=2"]) == 0
    capsys.readouterr()
    several = run.sample(tiny.config(), folder, prompt="1 2 3 + 4 5 6", n=3)
    assert len(several) == 3 == len(set(several)), "the best of a beam are different"
    drawn = run.sample(tiny.config(), folder, prompt="1 2 3 + 4 5 6", n=2, temperature=1.0)
    assert len(drawn) == 2
    assert [x.startswith("question: ") for x in run.sample(tiny.config(), folder, n=2)] == [
        True
    ] * 2
    params, cfg, tokenizer = run.export(tiny.config(), folder)
    export.write(tmp_path / "hub", params, cfg, tokenizer, "card")
    assert (tmp_path / "hub" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_without_steps_the_untrained_model_is_evaluated(finished, tmp_path):
    folder, results = finished
    c = tiny.config(steps=0, init_from=str(folder))
    assert run.run(c, tmp_path / "w") == results


def test_a_number_that_is_not_finite_ends_the_run_at_its_step(tmp_path, monkeypatch):
    first = policy.initial

    def broken(p, config):
        return first(p, config) | {"norm": jnp.full(p.cfg.d, jnp.nan)}

    monkeypatch.setattr(policy, "initial", broken)
    with pytest.raises(UserError, match=r"step 1\b"):
        run.run(tiny.config(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["entropy", "contrastive"])
def test_controls_train_too(variant, tmp_path):
    c = tiny.config(steps=2, soc__variant=variant, decode__beams=(1,), decode__width=1,
                    decode__penalties=(), decode__temperatures=(), eval__n=2)  # fmt: skip
    assert "test/greedy/accuracy" in run.run(c, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"soc__lam": -0.1}, r"soc\.lam=-0\.1 must lie in"),
        ({"soc__lam": 1.0}, r"soc\.lam=1\.0 must lie in"),
        ({"soc__z_loss": 1e-4}, r"soc\.z_loss=0\.0001 works against"),
        ({"soc__variant": "sok"}, "is not one of soc"),
        ({"soc__normalise": "row"}, r"soc\.normalise='row'"),
        ({"soc__corrupt": 0.0}, r"soc\.corrupt=0\.0 is no share"),
        ({"decode__beams": (0,)}, r"decode\.beams: 0 can't be"),
        ({"data__max_completion": 0}, r"data\.max_completion=0; use 2 or more"),
        ({"data__max_completion": 48}, "leaves no room for a prompt"),
        ({"data__generator": "chains"}, r"data\.generator='chains' is not one of"),
        ({"data__generator": "gsm_symbolic"}, r"model\.path is needed"),
        ({"data__format": "odd"}, r"data\.format='odd'"),
        ({"model__path": "smollm2"}, "sums are learnt from scratch"),
        ({"model__shape": "smollm2"}, "sums are learnt by tiny_2 or tiny"),
        ({"eval__shots": (4,)}, "sums are asked without examples"),
        ({"eval__shots": ()}, r"eval\.shots=\(\)"),
        ({"sft__micro_batches": 3}, "does not divide"),
        ({"sft__schedule": "odd"}, "schedule='odd' is unknown"),
        ({"sft__max_grad_norm": float("nan")}, "use a number above 0"),
        ({"eval__n": 0}, r"eval\.n=0"),
        ({"data__rare": 2.0}, "a share of 0 to 1"),
        ({"mesh": (3, 1, 1, 1)}, "takes 3 devices"),
    ],
)
def test_settings_that_cannot_work_are_one_line(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as e:
        run.run(tiny.config(**changes), tmp_path / "w")
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir()), "a corrected command would find a run of another config"


def test_the_tiny_model_covers_its_task():
    assert run.prepare(tiny.config()).policy.tokenizer.used == 26
