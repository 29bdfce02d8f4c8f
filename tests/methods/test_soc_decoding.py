"""Decoders and diagnosis: which there are, sharpening, exhaustive beams, votes, rates by hand."""

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxrepro import config
from jaxrepro.config import UserError
from jaxrepro.data.batches import PromptTokens
from jaxrepro.data.text import closed_vocabulary
from jaxrepro.methods.soc import decoding, diagnostics
from jaxrepro.methods.soc.decoding import Answer, Decoder, Sums
from jaxrepro.models import transformer
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.rollout.beam import Beams, beam_search
from jaxrepro.rollout.generate import Prompts
from jaxrepro.train.policy import Policy

sys.path.insert(0, str(Path(__file__).parents[1]))
from compiled import QUICK

CFG = TransformerConfig(vocab=6, d=8, layers=1, heads=2, kv=1, head_dim=4, ffn=8, embed_std=0.7)
REAL, EOS, PAD, NEW = 4, 1, 0, 4  # two columns of the vocabulary are padding
ROWS = PromptTokens(
    jnp.asarray([[2, 3, 2], [3, 0, 0]]),
    jnp.asarray([[0, 1, 2], [0, 0, 0]]),
    jnp.asarray([[1, 1, 1], [1, 0, 0]]),
    jnp.asarray([3, 1]),
)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(2)
    drawn = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(0, 0.6, a.shape), jnp.float32), transformer.abstract(CFG)
    )
    drawn["norm"] = jnp.ones_like(drawn["norm"])
    return drawn


def decode(**changes):
    return ConfigDict(config.load("configs/soc.py").decode.to_dict() | changes)


def everything():
    """All sequences of at most NEW tokens over REAL tokens, and their lengths."""
    whole = [s for s in itertools.product(range(REAL), repeat=NEW) if EOS not in s[:-1]]
    short = [
        (*s, EOS, *[PAD] * (NEW - 1 - t))
        for t in range(NEW - 1)
        for s in itertools.product((0, 2, 3), repeat=t)
    ]
    tokens = np.array(whole + short)
    ends = (tokens == EOS).any(1)
    return tokens, np.where(ends, (tokens == EOS).argmax(1) + 1, NEW)


@pytest.fixture(scope="module")
def measured(params):
    """Sums of every sequence after both prompts, and the padded columns' share taken away."""
    tokens, length = everything()
    two = lambda a: jnp.broadcast_to(jnp.asarray(a), (2, *a.shape))
    run = jax.jit(
        lambda p, n, c: decoding.measure(p, CFG, ROWS, n, c, vocab=REAL), compiler_options=QUICK
    )
    return tokens, length, run(params, two(tokens), two(length))


def test_a_beam_wider_than_the_vocabulary_finds_the_best_of_all_sequences(params, measured):
    tokens, length, sums = measured
    # four tokens: the same model without its padding
    cfg = TransformerConfig(vocab=REAL, d=8, layers=1, heads=2, kv=1, head_dim=4, ffn=8)
    cut = params | {"embed": params["embed"][:REAL]}
    beams = Beams(NEW, (EOS,), width=REAL ** (NEW - 1), length_penalty=0.0, pad=PAD)

    @jax.jit
    def search(p):
        x = transformer.embed(p, cfg, ROWS.tokens)
        return beam_search(
            p, cfg, Prompts(x, ROWS.position, ROWS.segment, ROWS.next_position), beams=beams
        )

    found = search(cut)
    for row in range(2):
        best = int(np.argmax(sums.logprob[row]))
        np.testing.assert_array_equal(found.tokens[row, 0], tokens[best])
        assert found.length[row, 0] == length[best]
        assert found.score[row, 0] == pytest.approx(float(sums.logprob[row, best]), abs=1e-5)


def test_padded_columns_count_nowhere_and_probabilities_sum_to_one(measured):
    _, _, sums = measured
    np.testing.assert_allclose(np.exp(sums.logprob).sum(1), 1.0, atol=1e-5)


def test_sums_are_consistent(measured):
    _, _, sums = measured
    np.testing.assert_allclose(sums.q, sums.logprob + sums.v, atol=1e-5)
    assert np.abs(sums.q - sums.q_minus_mean_logit).max() > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_sharpened_parameters_divide_all_logits(params, tied):
    cfg = dataclasses.replace(CFG, tied=tied)
    if not tied:
        params = params | {"head": params["embed"].T[:, ::-1]}
    x = transformer.embed(params, cfg, ROWS.tokens)

    def logits(p):
        hidden, _ = transformer.apply(p, cfg, x, position=ROWS.position, segment=ROWS.segment)
        return transformer.logits(p, cfg, hidden)

    np.testing.assert_allclose(
        logits(decoding.sharpen(params, 0.5)), 2 * logits(params), rtol=1e-5, atol=1e-5
    )
    assert decoding.sharpen(params, 1.0) is params


# Which there are -------------------------------------------------------------------------------------


def test_decoders_are_widths_and_variations_of_the_headline_beam():
    made = decoding.decoders(decode(votes=3))
    assert [d.name for d in made] == [
        "greedy", "beam2", "beam5", "beam10", "beam5_lp0", "beam5_lp0.6", "beam5_tau0.5",
        "beam5_tau0.7", "vote3",
    ]  # fmt: skip
    assert [d.width for d in decoding.curve(made)] == [1, 2, 5, 10]
    assert decoding.headline(decode()) in made
    names = [d.name for d in decoding.decoders(decode(beams=(10,), width=2, penalties=(1.0,), temperatures=(1.0,)))]  # fmt: skip
    assert names == ["beam2", "beam10"], "the headline itself is no variation"
    assert decoding.headline(decode(width=1)) == Decoder("greedy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beams": (5, 0)}, "decode.beams: 0 can't be; use 1 or more"),
        ({"beams": (5, 5)}, "names one twice"),
        ({"width": 0}, "decode.width: 0 can't be"),
        ({"votes": -1}, "decode.votes: -1"),
        ({"temperatures": (0.0,)}, "decode.temperatures: 0.0"),
        ({"vote_temperature": math.nan}, "decode.vote_temperature: nan"),
        ({"penalties": (math.inf,)}, "inf must be finite"),
        ({"length_penalty": math.nan}, "nan must be finite"),
    ],
)
def test_decoders_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        decoding.check(decode(**changes))


@pytest.mark.parametrize(
    ("answers", "index"),
    [
        (["1", "2", "2"], 1),
        (["1", "2"], 0),
        ([None, "3"], 1),
        ([None, None, None, "3"], 3),
        ([None, None], 0),
        (["1 2", "12", "3"], 0),
    ],
)
def test_the_commonest_answer_wins_and_none_has_no_vote(answers, index):
    assert decoding.majority(answers) == index


def test_an_answer_ends_at_the_trained_turn_and_where_the_models_folder_says(tmp_path):
    tokenizer = closed_vocabulary(["a"])
    eos, cfg = tokenizer.eos, dataclasses.replace(CFG, vocab=tokenizer.vocab_size)
    p = Policy(None, cfg, tokenizer, None, None)
    assert decoding.ends(p) == (eos,)
    for said, wanted in ((3, (eos, 3)), ([eos, 3], (eos, 3)), ([3, 99], (eos, 3)), (None, (eos,))):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": said}))
        assert decoding.ends(p._replace(source=tmp_path)) == wanted


# Diagnosis -------------------------------------------------------------------------------------------


def answer(logprob, *, length=2, v=4.0, text="x", finished=True):
    return Answer(text, length, finished, Sums(logprob, 0.0, 0.0, v))


ANSWERS = [
    answer(-1.0, v=6.0),  # wrong, above gold: over-optimistic
    answer(-4.0, text="", length=1, v=1.0),  # wrong, below gold: a search error
    answer(-2.0),  # right, and gold itself
    answer(-2.0, length=4, finished=False),  # right, per token above gold
]
GOLD = [answer(-2.0), answer(-2.0), answer(-2.000001), answer(-2.0, length=2, v=8.0)]
CORRECT, RARE = [0.0, 0.0, 1.0, 1.0], [True, False, True, False]


def test_rates_by_hand():
    found = diagnostics.rates(diagnostics.of(ANSWERS, GOLD, CORRECT, RARE, 1.0), "t")
    wanted = {
        "n": 4, "accuracy": 0.5, "accuracy_rare": 0.5, "accuracy_common": 0.5, "over_opt_rate": 0.25,
        "search_error_rate": 0.25, "length": 2.25, "empty": 0.25, "truncated": 0.25,
        "v_gold": 20 / 8, "v_wrong": 7 / 3, "v_gap": 20 / 8 - 7 / 3,
    }  # fmt: skip
    assert {k: found[f"t/{k}"] for k in wanted} == pytest.approx(wanted)
    bounds = {f"t/{k}_{end}" for k in ("accuracy", "over_opt_rate") for end in ("lo", "hi")}
    assert bounds <= set(found)
    # without a length penalty the second answer is level with gold, and the fourth too
    raw = diagnostics.of(ANSWERS, GOLD, CORRECT, RARE, 0.0)
    assert diagnostics.over_optimistic(raw).tolist() == [1, 0, 0, 0]
    assert diagnostics.search_error(raw).tolist() == [0, 1, 0, 0]


def test_items_without_a_worked_solution_and_votes_count_in_accuracy_alone():
    gold = [None, *GOLD[1:]]
    found = diagnostics.rates(diagnostics.of(ANSWERS, gold, CORRECT, [False] * 4, 1.0), "t")
    assert found["t/over_opt_rate"] == 0 and found["t/search_error_rate"] == pytest.approx(1 / 3)
    assert "t/accuracy_rare" not in found
    votes = [a._replace(sums=None) for a in ANSWERS]
    found = diagnostics.rates(diagnostics.of(votes, [None] * 4, CORRECT, RARE, 1.0), "t")
    assert found["t/accuracy"] == 0.5
    assert not [k for k in found if "opt" in k or "v_" in k or "search" in k]


def test_the_slope_is_accuracy_per_doubling():
    assert diagnostics.slope({1: 0.5, 2: 0.4, 4: 0.3}) == pytest.approx(-0.1)
    assert diagnostics.slope({1: 0.7, 8: 0.7}) == 0


def test_beyond_greedy_is_a_paired_difference_with_an_interval():
    found = diagnostics.beyond_greedy([1.0] * 15 + [0.0] * 5, [0.0] * 20, "d")
    assert found["d"] == 0.75 and 0 < found["d_lo"] < 0.75 < found["d_hi"] <= 1
    assert diagnostics.beyond_greedy([1.0], [0.0], "d") == {"d": 1, "d_lo": 1, "d_hi": 1}
