"""Beam search equals Hugging Face's `generate(num_beams=w)` on the same random weights, token for token."""

import itertools
import warnings

import jax
import meshes
import numpy as np
import pytest
import torch_models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxrepro.models import transformer
from jaxrepro.rollout.beam import Beams, beam_search
from jaxrepro.rollout.generate import Prompts

pytestmark = pytest.mark.oracle
# a pad of 0 counts as none there: the library then fills with the first eos
V, PAD, MAX_NEW = 60, 1, 9
PROMPTS = [[5, 9, 33, 7, 21, 8], [41], [17, 3, 50, 12], [9, 9], [2, 58, 31, 30, 4]]
search = jax.jit(beam_search, static_argnames=("cfg", "beams"), compiler_options=meshes.QUICK)
EOS = (3, 7, 11, 20, 44)  # five of sixty: about half of the hypotheses end inside


@pytest.fixture(scope="module")
def llama():
    return torch_models.pair("llama", vocab=V, layers=1)


def ours(models, beams):
    _, params, cfg = models
    tokens, *rest = torch_models.right_padded(PROMPTS)
    return search(params, cfg, Prompts(transformer.embed(params, cfg, tokens), *rest), beams=beams)


def theirs(models, beams):
    """Tokens (b, r, max_new) and scores (b, r)."""
    batch = torch_models.left_padded(PROMPTS)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of early_stopping with one beam
        out = models[0].generate(
            **batch,
            num_beams=beams.width,
            do_sample=False,
            max_new_tokens=beams.max_new,
            min_new_tokens=beams.min_new or None,
            length_penalty=beams.length_penalty,
            early_stopping=beams.early_stopping,
            num_return_sequences=beams.returned,
            eos_token_id=list(beams.eos) or None,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_scores=True,
        )
    tokens = out.sequences[:, batch["input_ids"].shape[1] :].numpy()
    tokens = np.pad(tokens, ((0, 0), (0, beams.max_new - tokens.shape[1])), constant_values=PAD)
    scores = out.sequences_scores.numpy() if beams.width > 1 else None
    shape = (len(PROMPTS), beams.returned)
    return tokens.reshape(*shape, -1), None if scores is None else scores.reshape(shape)


def agree(models, beams):
    found, (tokens, scores) = ours(models, beams), theirs(models, beams)
    np.testing.assert_array_equal(found.tokens, tokens)
    if scores is not None:
        np.testing.assert_allclose(found.score, scores, atol=2e-5)
    return found


GRID = [(1, 0.0, False), (1, 1.0, "never"), (1, 1.0, True)]
GRID += itertools.product((2, 5), (0.0, 1.0), (False, True, "never"))


@pytest.mark.parametrize(("width", "penalty", "early"), GRID)
def test_tokens_and_scores_equal_generate(llama, width, penalty, early):
    found = agree(llama, Beams(MAX_NEW, EOS, width, penalty, early, pad=PAD, returned=width))
    assert np.asarray(found.length).min() < MAX_NEW


@pytest.mark.parametrize("eos", [(), (7,)])
def test_few_or_no_eos(llama, eos):
    agree(llama, Beams(MAX_NEW, eos, 4, 0.6, pad=PAD, returned=2))


def test_a_negative_penalty_and_min_new(llama):
    beams = Beams(MAX_NEW, EOS, 3, -0.5, pad=PAD, min_new=4, returned=3)
    assert np.asarray(agree(llama, beams).length).min() >= 5


def test_biases_of_qwen2():
    models = torch_models.pair("qwen2", vocab=V)
    agree(models, Beams(MAX_NEW, EOS, 5, pad=PAD, returned=5))
