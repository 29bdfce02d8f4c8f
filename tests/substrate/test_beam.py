"""Beam search: exhaustive width finds the optimum, one beam is greedy, batch mates change nothing."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.models import transformer
from jaxrepro.models.scoring import completion_log_probs
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.rollout.beam import Beams, beam_search
from jaxrepro.rollout.generate import Prompts, Sampling, generate

CFG = TransformerConfig(vocab=4, d=8, layers=1, heads=2, kv=1, head_dim=4, ffn=8, embed_std=0.7)
EOS, PAD, NEW = 1, 0, 4
BEAMS = Beams(NEW, (EOS,), width=4**3, length_penalty=0.0, pad=PAD, returned=3)
search = jax.jit(beam_search, static_argnames=("cfg", "beams"), compiler_options=meshes.QUICK)
run_generate = jax.jit(
    generate, static_argnames=("cfg", "sampling", "n"), compiler_options=meshes.QUICK
)
score = jax.jit(completion_log_probs, static_argnames="cfg", compiler_options=meshes.QUICK)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(2)
    draw = lambda a: jnp.asarray(rng.normal(0, 0.6, a.shape), jnp.float32)
    return jax.tree.map(draw, transformer.abstract(CFG))


@pytest.fixture(scope="module")
def prompts(params):
    tokens = jnp.asarray([[2, 3, 0, 2, 3], [3, 3, 0, 0, 0], [0, 2, 2, 0, 0]])
    real = jnp.arange(5) < jnp.asarray([[5], [1], [3]])
    at = jnp.broadcast_to(jnp.arange(5), (3, 5))
    return Prompts(
        transformer.embed(params, CFG, tokens), at, real.astype(jnp.int32), jnp.asarray([5, 1, 3])
    )


def scores(params, prompts, tokens, length):
    """Sums of log-probabilities (b, n) by the training graph."""
    return score(params, CFG, *prompts, tokens, length).sum(-1)


def test_exhaustive_width_finds_the_best_of_all_sequences(params, prompts):
    everything = [s for s in itertools.product(range(4), repeat=NEW) if EOS not in s[:-1]]
    everything += [
        (*s, EOS, *[PAD] * (NEW - 1 - t))
        for t in range(NEW - 1)
        for s in itertools.product((0, 2, 3), repeat=t)
    ]
    tokens = jnp.broadcast_to(jnp.asarray(everything), (3, len(everything), NEW))
    length = jnp.where((tokens == EOS).any(-1), jnp.argmax(tokens == EOS, -1) + 1, NEW)
    every = np.asarray(scores(params, prompts, tokens, length))
    found = search(params, CFG, prompts, beams=BEAMS)
    np.testing.assert_allclose(found.score, -np.sort(-every, axis=1)[:, :3], atol=1e-5)
    for row, best in enumerate(every.argmax(1)):
        np.testing.assert_array_equal(found.tokens[row, 0], everything[best])
        assert found.length[row, 0] == length[row, best]


def test_one_beam_is_greedy(params, prompts):
    beams = Beams(NEW, (EOS,), 1, early_stopping="never", pad=PAD)
    found = search(params, CFG, prompts, beams=beams)
    want = run_generate(
        params, CFG, prompts, request_ids=jnp.arange(3), key=jax.random.key(0),
        sampling=Sampling(NEW, (EOS,), temperature=0.0, pad=PAD), n=1,
    )  # fmt: skip
    np.testing.assert_array_equal(found.tokens, want.tokens)
    np.testing.assert_array_equal(found.length, want.length)
    np.testing.assert_allclose(found.score, want.lp_raw.sum(-1) / want.length, atol=1e-5)


def test_scores_are_those_of_the_model_and_batch_mates_change_nothing(params, prompts):
    beams = Beams(NEW, (EOS,), 3, pad=PAD, returned=3)
    found = search(params, CFG, prompts, beams=beams)
    lp = scores(params, prompts, found.tokens, found.length)
    np.testing.assert_allclose(found.score, lp / found.length, atol=1e-5)
    assert (np.diff(found.score, axis=1) <= 0).all()
    cut = lambda a: a[2:] if a.ndim == 1 else a[2:, :3]  # without the padding too
    alone = search(params, CFG, Prompts(*map(cut, prompts)), beams=beams)
    np.testing.assert_array_equal(found.tokens[2:], alone.tokens)
    np.testing.assert_allclose(found.score[2:], alone.score, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_new": 0}, "max_new 0"),
        ({"width": 0, "returned": 1}, "width 0"),
        ({"returned": 65}, "returned 65 must lie in 1..64"),
        ({"early_stopping": "always"}, "early_stopping 'always'"),
        ({"length_penalty": float("nan")}, "length_penalty nan"),
        ({"min_new": 5}, "min_new 5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(BEAMS, **fields)


def test_eos_ids_must_fit_the_vocabulary(params, prompts):
    for eos, says in [((4,), "eos 4"), ((0, 1, 2, 3), "4 eos ids need a vocabulary of 5")]:
        with pytest.raises(UserError, match=says):
            beam_search(params, CFG, prompts, beams=dataclasses.replace(BEAMS, eos=eos))
