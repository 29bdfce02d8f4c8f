"""Engine and sampling filters equal transformers: greedy decoding, stops, min tokens, kept sets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxrepro.ops.sampling import penalise, truncate
from jaxrepro.rollout.engine import Engine, Request
from jaxrepro.rollout.generate import FINISH_EOS, FINISH_STOP, Sampling

pytestmark = pytest.mark.oracle
V, NEW, EOS = 60, 12, (3, 7, 11, 20)
PROMPTS = [[5, 9, 33, 7, 21, 8], [41], [17, 3, 50, 12], [9, 9], [2, 58, 31, 30, 4] * 4]
KEY = jax.random.key(0)


def theirs(peer, stops=None, **settings):
    """Generated ids of each prompt, cut after the eos or stop that ended it."""
    out = []
    for prompt in PROMPTS:  # one by one: no padding of theirs to trust
        criteria = transformers.StoppingCriteriaList([Ends(stops)] if stops else [])
        with torch.inference_mode():
            ids = peer.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=NEW,
                eos_token_id=list(EOS),
                pad_token_id=0,
                stopping_criteria=criteria,
                **settings,
            )
        out.append(ids[0, len(prompt) :].tolist())
    return out


class Ends(transformers.StoppingCriteria):
    """Stop where a row ends in one of the sequences of ids; prompts here end in none."""

    def __init__(self, stops):
        self.stops = stops

    def __call__(self, ids, scores, **_):
        hit = [any(row[-len(s) :].tolist() == list(s) for s in self.stops) for row in ids]
        return torch.tensor(hit)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def models(request):
    return torch_models.pair(request.param, vocab=V)


def ours(models, sampling, **fields):
    engine = Engine(*models[1:], sampling, slots=3, capacity=36, rounds=4)
    return engine.run([Request(p, j, **fields) for j, p in enumerate(PROMPTS)], KEY)


def same(completions, want):
    assert [c.tokens[0].tolist() for c in completions] == want


def test_greedy_tokens_and_stops_equal_generate(models):
    greedy = Sampling(NEW, EOS, temperature=0.0)
    want = theirs(models[0])
    found = ours(models, greedy)
    same(found, want)
    assert FINISH_EOS in [int(c.finish[0]) for c in found]
    # the second and third token of the longest answer, and a sequence that never comes
    stops = (tuple(max(want, key=len)[1:3]), (1, 1, 1, 1, 1))
    stopped = ours(models, greedy, stop=stops)
    same(stopped, theirs(models[0], stops))
    assert FINISH_STOP in [int(c.finish[0]) for c in stopped]


def test_min_tokens_and_repetition_penalty_equal_generate():
    models = torch_models.pair("llama", vocab=V, layers=1)
    sampling = Sampling(NEW, EOS, temperature=0.0, min_new=6, repetition_penalty=1.7)
    want = theirs(models[0], min_new_tokens=6, repetition_penalty=1.7)
    same(ours(models, sampling), want)
    assert want != theirs(models[0]) and min(map(len, want)) > 6


SETTINGS = list(itertools.product((0, 1, 7), (1.0, 0.9, 0.35), (0.0, 0.08)))


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), SETTINGS)
def test_kept_sets_equal_the_warpers(top_k, top_p, min_p):
    """Where no two probabilities are equal: of ties at the edge of top-p ours keep all, theirs some."""
    z = np.random.default_rng(0).normal(0, 2, (40, V)).astype(np.float32)
    scores = torch.tensor(z)
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = transformers.MinPLogitsWarper(min_p)(None, scores)
    kept = np.asarray(truncate(jnp.asarray(z), top_k=top_k, top_p=top_p, min_p=min_p)) > -np.inf
    np.testing.assert_array_equal(kept, (scores > -float("inf")).numpy())


def test_ties_of_the_last_kept_token():
    z = torch.log(torch.tensor([[0.4, 0.2, 0.2, 0.2]]))
    theirs = transformers.TopPLogitsWarper(0.5)(None, z) > -float("inf")
    ours = np.asarray(truncate(jnp.asarray(z.numpy()), top_p=0.5)) > -np.inf
    assert theirs.sum() == 2 and ours.all()
    # of top-k both keep all
    theirs = transformers.TopKLogitsWarper(2)(None, z) > -float("inf")
    ours = np.asarray(truncate(jnp.asarray(z.numpy()), top_k=2)) > -np.inf
    assert theirs.all() and ours.all()


def test_the_penalty_equals_the_processor():
    z = np.random.default_rng(1).normal(0, 2, (6, V)).astype(np.float32)
    ids = np.random.default_rng(2).integers(0, V, (6, 9))
    seen = np.zeros((6, V), bool)
    seen[np.arange(6)[:, None], ids] = True
    want = transformers.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(ids), torch.tensor(z))
    got = penalise(jnp.asarray(z), jnp.asarray(seen), 1.3)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)
