"""The registry: keys, sources, and the one-line errors for what a user or a batch got wrong."""

import re
import sys
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.methods.dpo.hyper import HYPERPARAMETERS
from jaxrepro.methods.dpo.registry import (
    EVIDENCE,
    MIXES,
    REGISTRY,
    Batch,
    SeqStats,
    check_batch,
    hyperparameters,
    loss,
    markdown,
    markdown_notes,
    mix,
    resolve,
    statistics,
    total,
)
from jaxrepro.methods.dpo.spec import SCHEMAS

sys.path.insert(0, str(Path(__file__).parent))
from dpo_golden import GOLDEN, example, first, log_ratios

KEYS = sorted(REGISTRY)
# tables 3.1 to 3.5 of the specification: every key that has a formula
TRL = """sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft
sigmoid_norm kto apo_zero_unpaired cpo simpo alphapo orpo bco tpo tpo_l online_dpo xpo nash_md"""


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", KEYS)
def test_every_loss_names_its_source(name):
    spec = REGISTRY[name]
    assert re.fullmatch(r"\d{4}\.\d{5}|MoJSnVZ59d", spec.arxiv)
    assert spec.evidence in EVIDENCE and spec.schema in SCHEMAS
    assert spec.formula.__doc__ and spec.name == name == spec.formula.__name__
    assert spec.reference_free == ("reference" not in spec.needs)
    assert all("\n" not in note for note in spec.notes)


def test_a_config_can_set_every_hyper_parameter():
    assert hyperparameters() == HYPERPARAMETERS, "hyper.py is hyperparameters() of the registry"


def test_the_readmes_table_is_the_registry():
    import jaxrepro.methods.dpo as package

    text = (Path(package.__file__).parent / "README.md").read_text()
    assert markdown() in text and markdown_notes() in text and f"{len(REGISTRY)} losses" in text
    head = (Path(__file__).parents[2] / "configs/dpo.py").read_text().splitlines()[0]
    assert f"{len(REGISTRY)} losses" in head


def test_every_loss_of_trl_is_there():
    assert set(TRL.split()) <= {n for n in KEYS if REGISTRY[n].evidence == "TRL"}


@pytest.mark.parametrize("name", KEYS)
def test_defaults_pass_their_own_checks(name):
    spec = REGISTRY[name]
    changed = {k: v for k, v in spec.defaults.items() if v is not None}
    assert dict(resolve(name, **changed).hyper) == dict(spec.defaults)


@pytest.mark.parametrize("name", KEYS)
def test_each_missing_input_is_named(name):
    spec = REGISTRY[name]
    tokens, batch = example(spec)
    seq = statistics(tokens, spec, key=batch.key)
    for need in spec.needs - {"gold", "tokens", "reference"}:
        if hasattr(batch, need):
            short, s = batch._replace(**{need: None}), seq
        else:
            short, s = batch, seq._replace(tokens=tokens._replace(**{need: None}))
        with pytest.raises(UserError, match=need) as error:
            loss(spec, s, short)
        one_line(error)
    if "reference" in spec.needs:
        with pytest.raises(UserError, match="reference"):
            loss(spec, seq._replace(q=None), batch)


BAD = [
    ("sigmod", {}, "did you mean sigmoid"),
    ("simpo", {"gama": 1.0}, "did you mean gamma"),
    ("sigmoid", {"beta": 0}, r"in \(0, inf\)"),
    ("sigmoid", {"beta": -0.1}, r"in \(0, inf\)"),
    ("sigmoid", {"beta": float("nan")}, "finite"),
    ("sigmoid", {"beta": "big"}, "finite number"),
    ("sigmoid", {"beta": True}, "finite number"),
    ("sigmoid", {"beta": None}, "finite number"),
    ("exo_pair", {"label_smoothing": 0}, r"in \(0, 0.5\]"),
    ("robust", {"label_smoothing": 0.5}, r"in \[0, 0.5\)"),
    ("robust", {"label_smoothing": -0.1}, r"in \[0, 0.5\)"),
    ("robust", {"label_smoothing": 0.7}, r"in \[0, 0.5\)"),
    ("sigmoid", {"ld_alpha": 1.5}, r"in \[0, 1\]"),
    ("sigmoid", {"ld_alpha": -0.1}, r"in \[0, 1\]"),
    ("sigmoid", {"divergence": "kl"}, "choose one of"),
    ("sigmoid", {"divergence_alpha": 2}, r"in \[0, 1\]"),
    ("apo_zero", {"divergence": "forward_kl"}, "raw log-ratios"),
    ("bco_pair", {"divergence": "alpha"}, "raw log-ratios"),
    ("aot", {"use_weighting": True}, "single pairs"),
    ("aot_unpaired", {"use_weighting": True}, "single pairs"),
    ("kto", {"ld_alpha": 0.5}, "lengths of a pair"),
    ("d2po_decay", {"ld_alpha": 0.5}, "count alike"),
    ("gpo", {"link": "cubic"}, "choose one of"),
    ("wpo", {"use_weighting": 1}, "True or False"),
    ("modpo", {"weights": ()}, "give numbers"),
    ("modpo", {"weights": (0.0, 1.0)}, "above 0"),
    ("dpo_shift", {"f": 1.2}, r"in \[0, 1\]"),
    ("beta_dpo", {"rho": -0.2}, r"in \[0, 1\)"),
    ("dpo_rk", {"nu": 1.0}, r"in \(1, inf\)"),
]


@pytest.mark.parametrize("name, hyper, want", BAD)
def test_bad_hyper_parameter_is_one_line(name, hyper, want):
    with pytest.raises(UserError, match=want) as error:
        resolve(name, **hyper)
    one_line(error)


def test_modifiers_are_defaults_where_they_are_possible():
    possible = lambda key: {n for n in KEYS if key in REGISTRY[n].defaults}
    written_in_scores = {
        "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "fdpo",
    }  # fmt: skip
    assert possible("divergence") == written_in_scores
    assert not possible("use_weighting") & {n for n in KEYS if REGISTRY[n].set_level}
    assert "kto" not in possible("ld_alpha") and "aot" in possible("ld_alpha")


# ---- several losses


@pytest.mark.parametrize(
    "names, weights, hyper, want",
    [
        (["sigmoid", "aot"], None, {"use_weighting": True}, "single pairs"),
        (["sigmoid", "apo_zero"], None, {"divergence": "forward_kl"}, "raw log-ratios"),
        (["sigmoid"], [1.0, 2.0], {}, "one weight a loss"),
        ([], None, {}, "one weight a loss"),
        (["sigmoid", "siggmoid"], None, {}, "did you mean"),
        (["sigmoid", "ipo"], None, {"gamma": 0.1}, "no hyper-parameter"),
    ],
)
def test_bad_mix_is_one_line(names, weights, hyper, want):
    with pytest.raises(UserError, match=want) as error:
        mix(names, weights, **hyper)
    one_line(error)


def test_overrides_of_a_mix_reach_the_losses_that_have_them():
    specs = mix(["sigmoid", "sft"], beta=0.3)
    assert specs[0][0].hyper["beta"] == 0.3 and "beta" not in specs[1][0].hyper
    for name in MIXES:
        assert all(s.name in REGISTRY for s, _ in mix([name]))


def test_losses_that_weigh_tokens_differently_need_their_own_statistics():
    tokens, _ = example(resolve("sigmoid"))
    specs = mix(["sigmoid", "d2po_decay"])
    seqs = [statistics(tokens, s) for s, _ in specs]
    with pytest.raises(UserError, match="its own statistics"):
        total(specs, seqs[0])
    got = total(specs, seqs)[0]
    want = sum(loss(s, x)[0] for (s, _), x in zip(specs, seqs, strict=True))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    with pytest.raises(UserError, match="give as many"):
        total(specs, seqs[:1])
    with pytest.raises(UserError, match="no loss"):
        total([], seqs)


# ---- batches


def check(name, seq=GOLDEN, batch=None, match=None, **hyper):
    with pytest.raises(UserError, match=match) as error:
        check_batch(resolve(name, **hyper), seq, batch, where="pairs.jsonl")
    one_line(error)


def test_bad_batches_are_one_line():
    n = GOLDEN.n.at[2, 1].set(0)
    check("sigmoid", GOLDEN._replace(n=n), match="item 2, response 1 has an empty response")
    q = GOLDEN.q.at[1, 0].set(jnp.nan)
    check("sigmoid", GOLDEN._replace(q=q), match="item 1, response 0 has a reference")
    check("kto", first(GOLDEN), match="kl_p, kl_q, labels")
    one = log_ratios([[1.0]])
    batch = Batch(labels=jnp.array([True]), kl_p=jnp.zeros(1), kl_q=jnp.zeros(1))
    check("kto", one, batch, match="use 2 or more")
    check("infonca", match="scores")
    check("wpo", match="log_sum_p2")
    check("todo", match="ties")
    check("sigmoid", first(GOLDEN), match="wants 2 responses")
    check("tpo", match="wants 3 responses")
    check("npo", log_ratios(np.zeros((2, 3))), match="at most one to keep")
    check("mdpo_multi", log_ratios(np.zeros((2, 3))), match="even number")
    ragged = Batch(scores=jnp.zeros((4, 2)), valid=jnp.ones((4, 2), bool))
    for name in ("mdpo_multi", "d2o"):
        check(name, batch=ragged, match="groups by their place")
    check("modpo", batch=Batch(rewards=jnp.zeros((4, 2, 2))), match="one more weight")
    scores = jnp.array([[1.0, 0], [0.5, 0.5], [1, 0], [1, 0]])
    check("odpo", batch=Batch(scores=scores), match="item 1, response 0 has a chosen score")
    check("odpo", batch=Batch(scores=-scores - 1), match="not above", offset="log")
    check("odpo", batch=Batch(scores=scores), match="not above 0", offset="ratio")
    check(
        "edpo", batch=Batch(scores=scores.at[0, 0].set(jnp.inf)), match="score that is not finite"
    )
    check("sppo_soft", batch=Batch(scores=2 * scores), match="win probability")
    check("gdpo_soft", batch=Batch(probability=jnp.full(4, 0.4)), match="outside")
    valid = jnp.ones((4, 2), bool).at[3].set(False)
    check("lire", batch=Batch(scores=scores, valid=valid), match="no valid response")
    check("alpha_dpo", SeqStats(*(x[:1] for x in GOLDEN[:3])), match="use 2 or more")


def test_good_batches_pass_and_a_missing_candidate_may_be_empty():
    check_batch(resolve("sigmoid"), GOLDEN)
    valid = jnp.ones((4, 2), bool).at[3, 1].set(False)
    batch = Batch(scores=jnp.ones((4, 2)), valid=valid)
    check_batch(resolve("lire"), GOLDEN._replace(n=GOLDEN.n.at[3, 1].set(0)), batch)


def test_identical_responses_are_warned_of():
    same = GOLDEN._replace(p=GOLDEN.p.at[1].set(-3.0), n=GOLDEN.n.at[1].set(7.0))
    with pytest.warns(UserWarning, match="1 of 4 pairs hold two identical responses"):
        check_batch(resolve("sigmoid"), same)
    spec = resolve("sigmoid")
    tokens, _ = example(spec)
    twin = tokens._replace(
        lp=tokens.lp.at[:, 1].set(tokens.lp[:, 0]), mask=tokens.mask.at[:, 1].set(tokens.mask[:, 0])
    )
    with pytest.warns(UserWarning, match="4 of 4"):
        check_batch(spec, statistics(twin, spec))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_batch(spec, statistics(tokens, spec))


# ---- curves


def read(curves):
    return {k: float(s / w) for k, (s, w) in curves.items()}


def test_rewards_are_beta_times_plain_log_ratios_whatever_the_loss():
    want = {
        "rewards/chosen": 0.1 * 0.0625,
        "rewards/rejected": 0.1 * 0.3125,
        "rewards/accuracy": 0.5,
        "rewards/margin": 0.1 * -0.25,
        "logps/chosen": -23.9375,
        "logps/rejected": -23.0625,
        "length/chosen": 20.25,
        "length/rejected": 17.5,
    }
    for name, hyper in (
        ("sigmoid", {}),
        ("sigmoid", {"divergence": "forward_kl"}),
        ("ipo", {}),
        ("dpop", {}),
    ):
        assert read(loss(resolve(name, **hyper), GOLDEN)[2]) == pytest.approx(want, rel=1e-5)


def test_a_loss_without_reference_logs_mean_log_probs():
    curves = read(loss(resolve("simpo"), GOLDEN._replace(q=None))[2])
    pb = np.asarray(GOLDEN.p / GOLDEN.n)
    assert curves["mean_lp/chosen"] == pytest.approx(pb[:, 0].mean())
    assert curves["mean_lp/margin"] == pytest.approx((pb[:, 0] - pb[:, 1]).mean())
    assert not [k for k in curves if k.startswith("rewards/")]
    assert [k for k in loss(resolve("simpo"), GOLDEN)[2] if k.startswith("rewards/")]


@pytest.mark.parametrize("cut", [2, 4])
def test_curves_of_parts_add_to_those_of_the_whole(cut):
    labels = jnp.array([True, True, False, True])
    spec = resolve("apo_zero_unpaired")
    whole = loss(spec, first(GOLDEN), Batch(labels=labels))[2]
    sums: dict = {}
    for i in range(cut):
        seq = SeqStats(*(x[i::cut] for x in first(GOLDEN)[:3]))
        part = loss(spec, seq, Batch(labels=labels[i::cut]))[2]
        sums = {
            k: tuple(a + b for a, b in zip(v, sums.get(k, (0, 0)), strict=True))
            for k, v in part.items()
        }
    assert read(sums) == pytest.approx(read(whole), rel=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(KEYS), st.text(max_size=6), st.floats(allow_nan=True))
def test_resolve_never_fails_otherwise(name, key, value):
    try:
        resolve(name, **{key: value})
        resolve(key)
    except UserError as e:
        assert "\n" not in str(e) or "\n" in key
