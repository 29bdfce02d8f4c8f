"""Columns of the logits that are no tokens: neither drawn, nor searched, nor counted."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest

from jaxrepro import config
from jaxrepro.config import UserError
from jaxrepro.models import transformer
from jaxrepro.models.scoring import completion_log_probs
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.ops.logprob import token_kl
from jaxrepro.rollout.beam import Beams, beam_search
from jaxrepro.rollout.engine import Engine
from jaxrepro.rollout.generate import Blend, Prompts, Sampling, generate
from jaxrepro.rollout.requests import Request
from jaxrepro.train import policy

V, WIDE, NEW = 9, 16, 5
CFG = TransformerConfig(
    vocab=V, d=8, layers=1, heads=2, kv=1, head_dim=4, ffn=8, embed_std=0.7, tied=False
)
PADDED = dataclasses.replace(CFG, vocab=WIDE).using(V)
jit = partial(jax.jit, compiler_options=meshes.QUICK)
run = jit(generate, static_argnames=("cfg", "sampling", "n"))
search = jit(beam_search, static_argnames=("cfg", "beams"))
score = jit(completion_log_probs, static_argnames=("cfg", "entropy"))


@pytest.fixture(scope="module")
def models():
    """[(parameters, config)] of a model and of the same with padding that always has the largest logit."""
    rng = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(rng.normal(0, 0.6, a.shape), jnp.float32)
    params = jax.tree.map(draw, transformer.abstract(CFG))
    w = 1e3 * rng.normal(size=(8, 1)).astype("f4")
    more = np.concatenate([w, -w] * 4, axis=1)[:, : WIDE - V]
    wide = params | {
        "embed": jnp.concatenate([params["embed"], jnp.asarray(more.T)]),
        "head": jnp.concatenate([params["head"], jnp.asarray(more)], axis=1),
    }
    return [(params, CFG), (wide, PADDED)]


def prompts_of(params, cfg):
    tokens = jnp.asarray([[2, 3, 8, 2], [3, 5, 0, 0]])
    length = jnp.asarray([4, 2])
    at = jnp.broadcast_to(jnp.arange(4), (2, 4))
    real = (at < length[:, None]).astype(jnp.int32)
    return Prompts(transformer.embed(params, cfg, tokens), at, real, length)


def same(found):
    plain, padded = found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, padded)


@pytest.mark.parametrize(("temperature", "shares"), [(0.0, [None]), (0.9, [0.0, 0.5])])
def test_samples_are_those_of_the_model_without_padding(models, temperature, shares):
    sampling = Sampling(max_new=NEW, eos=(1,), temperature=temperature)
    ids, key = jnp.asarray([3, 4]), jax.random.key(1)
    for share in shares:
        found = []
        for params, cfg in models:
            prompts = prompts_of(params, cfg)
            other = jax.tree.map(lambda a: 0.9 * a, params)
            blend = None if share is None else Blend(other, 0.9 * prompts.x, share)
            how = dict(request_ids=ids, key=key, sampling=sampling, n=3, blend=blend)
            found.append(run(params, cfg, prompts, **how))
        same(found)


def test_beams_are_those_of_the_model_without_padding(models):
    beams = Beams(NEW, (1,), width=4, returned=2)
    same([search(p, cfg, prompts_of(p, cfg), beams=beams) for p, cfg in models])


def test_an_engine_draws_what_the_model_without_padding_does(models):
    sampling = Sampling(max_new=NEW, eos=(1,), repetition_penalty=1.2, top_k=6)
    found = []
    for params, cfg in models:
        engine = Engine(params, cfg, sampling, slots=4, capacity=16)
        done = engine.run([Request([2, 3, 8], id=0, n=3)], jax.random.key(2))[0]
        found.append((list(done.tokens), list(done.lp_raw), list(done.lp_sampler)))
    same(found)


def test_scores_are_those_of_the_model_without_padding(models):
    tokens, length = jnp.asarray([[[4, 5, 1]], [[8, 1, 0]]]), jnp.asarray([[3], [2]])
    how = dict(tokens=tokens, length=length, entropy=True)
    same([score(p, cfg, *prompts_of(p, cfg), **how) for p, cfg in models])


@pytest.mark.parametrize("chunk", [2, 99])
def test_a_divergence_leaves_padding_out_of_value_and_gradient(models, chunk):
    (plain, _), (wide, _) = models
    h, q = jax.random.normal(jax.random.key(0), (2, 1, 4, 8))

    def kl(h, head, vocab):
        return token_kl(h, head, q, 0.5 * head, chunk=chunk, vocab=vocab).sum()

    both = jit(jax.value_and_grad(kl, argnums=(0, 1)), static_argnums=2)
    want, (value, (dh, dw)) = both(h, plain["head"], None), both(h, wide["head"], V)
    same([want, (value, (dh, dw[:, :V]))])
    assert not np.asarray(dw[:, V:]).any()
    with pytest.raises(ValueError, match=r"vocab 17 must lie in 1 .. 16"):
        kl(h, wide["head"], WIDE + 1)


def test_a_policy_knows_its_padding_from_its_tokenizer(monkeypatch):
    c = config.load("configs/dpo.py", {})
    assert policy.open_policy(c, pieces=["a", "b"]).cfg.used is None
    monkeypatch.setitem(policy.SHAPES, "letters", policy.SHAPES["letters"] | {"vocab": 64})
    found = policy.open_policy(c, pieces=["a", "b"])
    assert found.cfg.vocab == 64 and found.cfg.used == found.tokenizer.vocab_size < 64
    assert found.cfg.using(64).used is None
    with pytest.raises(UserError, match=r"used 65 must lie in 1 .. 64"):
        dataclasses.replace(found.cfg, used=65)


def test_a_resized_vocabulary_has_no_padding(models):
    params, cfg = models[1]
    assert transformer.resize_vocab(params, cfg, V)[1] == CFG
