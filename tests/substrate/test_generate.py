"""Rollouts: what they record is what the model says, and a sample depends on itself alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrepro.config import UserError
from jaxrepro.models import transformer
from jaxrepro.models.scoring import completion_hidden, completion_log_probs
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.rollout.generate import (
    FINISH_EOS,
    FINISH_LENGTH,
    Blend,
    Prompts,
    Sampling,
    generate,
)

CFG = TransformerConfig(
    vocab=12, d=12, layers=2, heads=4, kv=2, head_dim=6, ffn=16, mrope_sections=(1, 1, 1),
    embed_std=0.7,
)  # fmt: skip
B, N, T, NEW = 3, 4, 5, 7
PAD, EOS = 0, 1
SAMPLING = Sampling(max_new=NEW, eos=(EOS,), temperature=0.8, pad=PAD)
IDS = jnp.asarray([11, 4, 7])
run = jax.jit(generate, static_argnames=("cfg", "sampling", "n"))
score = jax.jit(completion_log_probs, static_argnames=("cfg", "temperature"))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(rng.normal(0, 0.35, a.shape), jnp.float32)
    return jax.tree.map(draw, transformer.abstract(CFG))


@pytest.fixture(scope="module")
def prompts(params):
    """Three prompts of 5, 3 and 2 tokens with three position streams, as if they held an image."""
    length = np.array([5, 3, 2])
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, CFG.vocab)
    position = jnp.stack([jnp.arange(T) // 2, jnp.arange(T), jnp.arange(T) % 3])
    return Prompts(
        transformer.embed(params, CFG, tokens),
        jnp.broadcast_to(position, (B, 3, T)),
        jnp.asarray(np.arange(T) < length[:, None], jnp.int32),
        jnp.asarray([6, 3, 2]),
    )


@pytest.fixture(scope="module")
def samples(params, prompts):
    return run(params, CFG, prompts, request_ids=IDS, key=jax.random.key(2), sampling=SAMPLING, n=N)


def rescored(params, prompts, samples, temperature=1.0):
    return score(params, CFG, *prompts, samples.tokens, samples.length, temperature=temperature)


def test_recorded_log_probs_equal_the_training_graph(params, prompts, samples):
    np.testing.assert_allclose(samples.lp_raw, rescored(params, prompts, samples), atol=1e-5)
    np.testing.assert_allclose(
        samples.lp_sampler, rescored(params, prompts, samples, 0.8), atol=1e-5
    )


@pytest.mark.slow
def test_a_blend_draws_from_the_normalised_product_of_two_policies(params, prompts):
    other = jax.tree.map(lambda a: jnp.flip(a, -1), params)
    moved = prompts._replace(x=0.5 * prompts.x)  # what the other makes of the same tokens
    blend = Blend(other, moved.x, 0.3)
    asked = dict(request_ids=IDS, key=jax.random.key(2), sampling=SAMPLING, n=N)
    drawn = run(params, CFG, prompts, **asked, blend=blend)
    both = []
    for p, x in ((params, prompts), (other, moved)):
        hidden = completion_hidden(p, CFG, *x, drawn.tokens, drawn.length)
        both.append(transformer.logits(p, CFG, hidden))
    lp = jax.nn.log_softmax(0.7 * both[0] + 0.3 * both[1])
    want = jnp.take_along_axis(lp, drawn.tokens[..., None], -1)[..., 0]
    inside = np.arange(NEW) < np.asarray(drawn.length)[..., None]
    np.testing.assert_allclose(drawn.lp_raw, jnp.where(inside, want, 0), atol=1e-5)
    alone = jax.nn.log_softmax(both[0])
    alone = jnp.take_along_axis(alone, drawn.tokens[..., None], -1)[..., 0]
    assert np.abs(np.where(inside, alone - want, 0)).max() > 0.1


def test_length_counts_the_eos_and_finish_tells_why(samples):
    seen = set()
    for row, length, finish in zip(
        np.asarray(samples.tokens).reshape(-1, NEW),
        np.asarray(samples.length).ravel(),
        np.asarray(samples.finish).ravel(),
    ):
        assert EOS not in row[: length - 1]
        assert (row[length - 1] == EOS) == (finish == FINISH_EOS)
        assert finish == FINISH_EOS or length == NEW
        assert (row[length:] == PAD).all()
        seen.add(int(finish))
    assert seen == {FINISH_EOS, FINISH_LENGTH}
    beyond = np.arange(NEW) >= np.asarray(samples.length)[..., None]
    assert (np.asarray(samples.lp_raw)[beyond] == 0).all()


def test_a_sampled_pad_is_a_token_like_any_other(samples):
    inside = np.arange(NEW) < np.asarray(samples.length)[..., None]
    pads = inside & (np.asarray(samples.tokens) == PAD)
    assert pads.any() and (np.asarray(samples.lp_raw)[pads] < 0).all()


def test_samples_do_not_depend_on_order_batch_mates_or_padding(params, prompts, samples):
    again = run(
        params,
        CFG,
        Prompts(*(a[::-1] for a in prompts)),
        request_ids=IDS[::-1],
        key=jax.random.key(2),
        sampling=SAMPLING,
        n=N,
    )
    wide = lambda a, value: jnp.concatenate([a[1:2], jnp.full_like(a[1:2], value)], axis=-1)
    alone = Prompts(
        jnp.concatenate([prompts.x[1:2], 3 * jnp.ones((1, T, CFG.d))], axis=1),
        wide(prompts.position, 9),
        wide(prompts.segment, 0),
        prompts.next_position[1:2],
    )
    one = run(
        params, CFG, alone, request_ids=IDS[1:2], key=jax.random.key(2), sampling=SAMPLING, n=N
    )
    for a, b, c in zip(samples, again, one):
        np.testing.assert_allclose(a[::-1], b, atol=1e-5)
        np.testing.assert_allclose(a[1:2], c, atol=1e-5)


def test_samples_of_a_question_differ_and_follow_the_key(params, prompts, samples):
    assert len({tuple(row) for row in np.asarray(samples.tokens[0])}) > 1
    other = run(
        params, CFG, prompts, request_ids=IDS, key=jax.random.key(3), sampling=SAMPLING, n=N
    )
    assert not np.array_equal(other.tokens, samples.tokens)


def test_greedy_takes_the_most_probable_token(params, prompts):
    greedy = dataclasses.replace(SAMPLING, temperature=0.0, eos=())
    out = run(params, CFG, prompts, request_ids=IDS, key=jax.random.key(2), sampling=greedy, n=2)
    np.testing.assert_array_equal(out.tokens[:, 0], out.tokens[:, 1])
    assert (np.asarray(out.lp_sampler) == 0).all() and (np.asarray(out.length) == NEW).all()
    # no single other token would have scored higher, at any step
    for token in range(CFG.vocab):
        for j in (0, NEW - 1):
            other = out._replace(tokens=out.tokens.at[..., j].set(token))
            lp = rescored(params, prompts, other)[..., j]
            assert (np.asarray(lp) <= np.asarray(out.lp_raw[..., j]) + 1e-5).all()


def test_truncation_min_new_and_allowed_tokens_bind_the_sampler_only(params, prompts):
    allowed = jnp.zeros(CFG.vocab, bool).at[jnp.asarray([PAD, EOS, 5, 6])].set(True)
    sampling = dataclasses.replace(SAMPLING, top_k=3, top_p=0.95, min_new=4)
    out = run(
        params,
        CFG,
        prompts,
        request_ids=IDS,
        key=jax.random.key(2),
        sampling=sampling,
        n=N,
        allowed=allowed,
    )
    assert set(np.asarray(out.tokens).ravel()) <= {PAD, EOS, 5, 6}
    assert np.asarray(out.length).min() >= 5
    real = np.arange(NEW) < np.asarray(out.length)[..., None]
    np.testing.assert_allclose(out.lp_raw, rescored(params, prompts, out), atol=1e-5)
    tempered = np.asarray(rescored(params, prompts, out, 0.8))
    assert (np.asarray(out.lp_sampler)[real] > tempered[real]).all()


def test_first_tokens_follow_the_model(params, prompts):
    n = 3000
    out = run(
        params,
        CFG,
        Prompts(*(a[:1] for a in prompts)),
        request_ids=IDS[:1],
        key=jax.random.key(8),
        sampling=dataclasses.replace(SAMPLING, max_new=1),
        n=n,
    )
    every = jnp.arange(CFG.vocab).reshape(1, -1, 1)
    ones = jnp.ones((1, CFG.vocab), int)
    lp = score(params, CFG, *(a[:1] for a in prompts), every, ones, temperature=0.8)
    p = np.exp(np.asarray(lp, np.float64)).ravel()
    seen = np.bincount(np.asarray(out.tokens).ravel(), minlength=CFG.vocab)
    assert stats.chisquare(seen, p / p.sum() * n).pvalue > 1e-3


def test_the_loop_stops_when_every_row_is_done(params, prompts, monkeypatch):
    steps = []
    embed = transformer.embed

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return embed(*args)

    monkeypatch.setattr(transformer, "embed", counted)
    fresh = jax.jit(lambda allowed: generate(
        params, CFG, prompts, request_ids=IDS, key=jax.random.key(2),
        sampling=dataclasses.replace(SAMPLING, min_new=2), n=N, allowed=allowed,
    ))  # fmt: skip
    only = jnp.zeros(CFG.vocab, bool).at[jnp.asarray([EOS, 5])].set(True)
    out = fresh(only)
    jax.effects_barrier()
    assert len(steps) == int(out.length.max()) - 1
    steps.clear()
    fresh(jnp.zeros(CFG.vocab, bool).at[jnp.asarray([5])].set(True))
    jax.effects_barrier()
    assert len(steps) == NEW - 1


def test_settings_that_make_no_sense_are_refused():
    for fields, message in [
        ({"max_new": 0}, "max_new 0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": 1e-30}, r"temperature 1e-30 must be 0 \(greedy\) or lie in"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_k": -1}, "top_k -1"),
        ({"min_new": NEW + 1}, rf"min_new {NEW + 1} must lie in 0\.\.{NEW} \(max_new\)"),
        ({"min_new": -1}, "min_new -1"),
    ]:
        with pytest.raises(UserError, match=message):
            dataclasses.replace(SAMPLING, **fields)


def test_an_eos_outside_the_vocabulary_is_refused(params, prompts):
    sampling = dataclasses.replace(SAMPLING, eos=(EOS, CFG.vocab))
    with pytest.raises(UserError, match=r"eos 12 is no token id; the vocabulary has 0\.\.11"):
        generate(
            params, CFG, prompts, request_ids=IDS, key=jax.random.key(2), sampling=sampling, n=N
        )
