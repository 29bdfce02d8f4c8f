"""On every mesh, generate and the engine give the tokens and log-probabilities of one device."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.models import transformer
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.rollout.engine import Engine, Request
from jaxrepro.rollout.generate import Prompts, Sampling, generate
from jaxrepro.rollout.requests import samples

CFG = TransformerConfig(vocab=16, d=8, layers=1, heads=4, kv=2, head_dim=4, ffn=8, embed_std=0.7)
SAMPLING = Sampling(max_new=5, eos=(1,), temperature=0.9)
# data, fsdp, sequence, tensor; at tensor 4 the two kv heads are replicated
SHAPES = ((2, 2, 1, 2), (8, 1, 1, 1), (1, 8, 1, 1), (2, 1, 2, 2), (1, 2, 1, 4), (1, 1, 4, 2))
FEW = (SHAPES[0], SHAPES[4])
KEY = jax.random.key(3)
MOVES = re.compile(r" = (f32|\(f32).* all-(gather|reduce)(-start)?\(")


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(rng.normal(0, 0.35, a.shape), jnp.float32)
    return jax.tree.map(draw, transformer.abstract(CFG))


@pytest.fixture(scope="module")
def requests():
    """Eight prompts of one to eight tokens, two samples each: twice the slots."""
    rng = np.random.default_rng(1)
    return [Request(rng.integers(0, 16, t).tolist(), t, 2) for t in range(1, 9)]


@pytest.fixture(scope="module")
def single(params, requests):
    engine = Engine(params, CFG, SAMPLING, slots=8, capacity=13, rounds=4)
    return samples(engine.run(requests, KEY), 5)


def check(found, want):
    np.testing.assert_array_equal(found.tokens, want.tokens)
    for a, b in zip(found, want):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "shape",
    [shape if shape in FEW else pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES],
)
def test_generate_on_a_mesh(params, requests, single, shape):
    mesh = sharding.make_mesh(shape)
    at = sharding.shard_tree(transformer.axes(CFG), params, mesh, "decode")
    tokens, real = np.zeros((8, 8), np.int32), np.zeros((8, 8), np.int32)
    for row, r in enumerate(requests):
        tokens[row, : len(r.prompt)], real[row, : len(r.prompt)] = r.prompt, 1
    batch = (tokens, real, real.sum(-1), np.asarray([r.id for r in requests], np.int32))
    rows = sharding.batch_sharding(mesh)

    def run(params, batch):
        tokens, real, after, ids = batch
        x = transformer.embed(params, CFG, tokens)
        prompts = Prompts(x, jnp.broadcast_to(jnp.arange(8), tokens.shape), real, after)
        return generate(params, CFG, prompts, request_ids=ids, key=KEY, sampling=SAMPLING, n=2)

    run = jax.jit(run, in_shardings=(at, rows), out_shardings=rows, compiler_options=meshes.QUICK)
    with jax.set_mesh(mesh):
        out = run(sharding.place(params, at), sharding.place(batch, rows))
    check(sharding.fetch(out), single)


def test_decoding_with_weights_as_training_splits_them_gathers_none_of_them_at_every_token(
    params, requests
):
    mesh = sharding.make_mesh((2, 4, 1, 1))
    at = sharding.shard_tree(transformer.axes(CFG), params, mesh, "train")
    tokens = np.stack([np.resize(r.prompt, 8) for r in requests]).astype(np.int32)
    rows = sharding.batch_sharding(mesh)

    def run(params, tokens):
        x = transformer.embed(params, CFG, tokens)
        everywhere = jnp.ones(tokens.shape, jnp.int32)
        prompts = Prompts(x, jnp.cumsum(everywhere, 1) - 1, everywhere, jnp.full(8, 8))
        ids = jnp.arange(8)
        return generate(params, CFG, prompts, request_ids=ids, key=KEY, sampling=SAMPLING, n=1)

    compiled = sharding.on_mesh(mesh, jax.jit(run).lower)
    compiled = compiled(sharding.place(params, at), sharding.place(tokens, rows)).compile()
    moved = [line for line in compiled.as_text().splitlines() if MOVES.search(line)]
    assert moved, "nothing is gathered at all: the weights were not split"
    assert not [line for line in moved if "while/body" in line]


SOME = [SHAPES[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SHAPES[1:4]), SHAPES[4]]
SOME += [pytest.param(SHAPES[5], marks=pytest.mark.slow)]


@pytest.mark.parametrize("shape", SOME)
def test_the_engine_on_a_mesh(params, requests, single, shape):
    mesh = sharding.make_mesh(shape)
    engine = Engine(params, CFG, SAMPLING, slots=8, capacity=13, rounds=4, mesh=mesh)
    check(samples(engine.run(requests, KEY), 5), single)
    spec = engine._state.kv.k[0].sharding.spec
    rows = sharding.row_parts(mesh)
    assert engine._state.kv.k[0].addressable_shards[0].data.shape[0] == 8 // rows, spec


def test_demands_keep_their_places_on_a_mesh(params, requests, single):
    mesh = sharding.make_mesh((2, 2, 1, 2))
    engine = Engine(params, CFG, SAMPLING, slots=8, capacity=13, rounds=4, mesh=mesh)
    extra = {"forced": (5, 1), "stop": ((9, 9),), "allowed": np.arange(16) > 0}
    asked = [*requests[:3], dataclasses.replace(requests[3], **extra), *requests[4:]]
    out = engine.run(asked, KEY)
    assert all(row[:2].tolist() == [5, 1] for row in out[3].tokens)
    for j in (0, 7):
        np.testing.assert_array_equal(samples([out[j]], 5).tokens[0], single.tokens[j])


def test_slots_must_divide_over_the_rows_of_the_mesh(params):
    with pytest.raises(UserError, match="slots=6 does not divide over data \\* fsdp = 4"):
        mesh = sharding.make_mesh((2, 2, 1, 2))
        Engine(params, CFG, SAMPLING, slots=6, capacity=13, mesh=mesh)
