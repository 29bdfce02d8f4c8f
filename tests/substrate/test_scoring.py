"""Scoring completions on a shared prompt equals scoring every sequence on its own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.models import scoring, transformer
from jaxrepro.models.scoring import completion_log_probs, nll
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.ops.logprob import Tokens

CFG = TransformerConfig(vocab=13, d=12, layers=2, heads=2, kv=1, head_dim=6, ffn=16, embed_std=0.5)
B, N, T, C = 2, 3, 5, 4
PROMPT = np.array([5, 3])
LENGTH = np.array([[4, 2, 1], [3, 4, 4]])


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(rng.normal(0, 0.35, a.shape), jnp.float32)
    return jax.tree.map(draw, transformer.abstract(CFG))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CFG.vocab, (B, T)).astype(np.int32)
    return tokens, rng.integers(0, CFG.vocab, (B, N, C)).astype(np.int32)


@pytest.fixture(scope="module")
def shared():
    @partial(jax.jit, static_argnames=("entropy",))
    def run(params, prompt, completion, length, entropy=False):
        x = transformer.embed(params, CFG, prompt)
        position = jnp.broadcast_to(jnp.arange(prompt.shape[1]), prompt.shape)
        real = (position < PROMPT[:, None]).astype(jnp.int32)
        return completion_log_probs(
            params,
            CFG,
            x,
            position,
            real,
            jnp.asarray(PROMPT),
            completion,
            length,
            temperature=1.3,
            entropy=entropy,
        )

    return run


def separate(params, prompt, completion, length):
    """Each sequence on its own: no prefix, no padding between prompt and completion."""
    rows = np.zeros((B, N, T + C), np.int32)
    for b in range(B):
        rows[b, :, : PROMPT[b]] = prompt[b, : PROMPT[b]]
        rows[b, :, PROMPT[b] : PROMPT[b] + C] = completion[b]
    rows = jnp.asarray(rows.reshape(B * N, -1))
    position = jnp.broadcast_to(jnp.arange(T + C), rows.shape)
    hidden, _ = transformer.apply(
        params, CFG, transformer.embed(params, CFG, rows), position=position
    )
    lp = jax.nn.log_softmax(transformer.logits(params, CFG, hidden) / 1.3)
    at = jnp.asarray(np.repeat(PROMPT - 1, N)[:, None] + np.arange(C))
    lp = jnp.take_along_axis(lp, at[..., None], 1)
    lp = jnp.take_along_axis(lp, completion.reshape(B * N, C, 1), 2)[..., 0].reshape(B, N, C)
    return jnp.where(jnp.arange(C) < length[..., None], lp, 0.0)


def test_shared_prompt_equals_separate_sequences_with_gradients(params, batch, shared):
    w = jax.random.normal(jax.random.key(3), (B, N, C))

    def both(fn):
        loss = lambda p: (lambda lp: (jnp.sum(w * lp), lp))(fn(p, *batch, jnp.asarray(LENGTH)))
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    got, want = both(shared), both(separate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), got, want)
    assert (np.asarray(got[0][1])[np.arange(C) >= LENGTH[..., None]] == 0).all()


def test_what_lies_beyond_a_length_and_a_prompt_is_never_read(params, batch, shared):
    prompt, completion = (a.copy() for a in batch)
    want = shared(params, prompt, completion, LENGTH)
    completion[np.arange(C) >= LENGTH[..., None]] = 7
    prompt[1, 3:] = 7
    np.testing.assert_array_equal(shared(params, prompt, completion, LENGTH), want)


def test_entropy_comes_with_the_log_probs(params, batch, shared):
    lp, ent = shared(params, *batch, LENGTH, entropy=True)
    np.testing.assert_allclose(lp, shared(params, *batch, LENGTH), atol=1e-6)
    real = np.arange(C) < LENGTH[..., None]
    assert (np.asarray(ent)[real] > 0).all() and (np.asarray(ent)[~real] == 0).all()
    assert np.asarray(ent).max() <= np.log(CFG.vocab) + 1e-5


def test_nll_sums_over_response_tokens_of_packed_rows(params):
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, CFG.vocab, (1, 7)), jnp.int32)
    segment = jnp.asarray([[1, 1, 1, 2, 2, 2, 0]])
    response = jnp.asarray([[0, 0, 1, 1, 1, 1, 1]]) > 0  # the first token of segment 2 has no past
    position = jnp.asarray([[0, 1, 2, 0, 1, 2, 0]])

    @jax.jit
    def run(params):
        x = transformer.embed(params, CFG, tokens)
        total = nll(params, CFG, x, Tokens(tokens, response, segment, position))
        hidden = transformer.apply(params, CFG, x, position=position, segment=segment)[0]
        return total, jax.nn.log_softmax(transformer.logits(params, CFG, hidden))[0]

    (total, weight), lp = run(params)
    assert weight == 3
    want = -sum(lp[j, tokens[0, j + 1]] for j in (1, 3, 4))
    np.testing.assert_allclose(total, want, rtol=1e-5)


def test_nll_at_the_responses_alone_equals_nll_at_every_position(params, monkeypatch):
    monkeypatch.setattr(scoring, "_GATHER", 1)
    rng = np.random.default_rng(2)
    tokens = jnp.asarray(rng.integers(0, CFG.vocab, (3, 9)), jnp.int32)
    position = jnp.broadcast_to(jnp.arange(9), (3, 9))
    begin, end = np.array([[5], [2], [7]]), np.array([[9], [6], [8]])  # 4, 4 and 1 responses
    response = jnp.asarray((np.arange(9) >= begin) & (np.arange(9) < end))
    rows = Tokens(tokens, response, jnp.asarray(np.arange(9) < end, jnp.int32), position)

    def run(params, responses):
        x = transformer.embed(params, CFG, tokens)
        return nll(params, CFG, x, rows, responses=responses, chunk=6)

    got = jax.jit(jax.value_and_grad(lambda p: run(p, 4), has_aux=True))(params)
    want = jax.jit(jax.value_and_grad(lambda p: run(p, None), has_aux=True))(params)
    assert got[0][1] == 9
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
