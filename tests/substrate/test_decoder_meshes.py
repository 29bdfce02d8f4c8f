"""A decoder's training is the same on every mesh, and fsdp splits what it promises to split."""

import functools
import itertools
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.models import transformer
from jaxrepro.models.scoring import nll
from jaxrepro.ops.logprob import Tokens
from jaxrepro.train import optim
from jaxrepro.train.state import init_state, state_shardings
from jaxrepro.train.step import accumulate, compile_step, make_step

sys.path.insert(0, str(Path(__file__).parents[1]))
import meshes

SHAPE = dict(vocab=64, d=32, layers=2, heads=4, kv=2, head_dim=8, ffn=64)
ALL = [s for s in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(s) == 8]
FEW = ((1, 2, 2, 2), (2, 1, 1, 4))


def model(**changes):
    return transformer.TransformerConfig(**(SHAPE | changes))


@functools.cache
def problem(rows=16, length=24):
    params = transformer.init(jax.random.key(0), model())
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SHAPE["vocab"], (rows, length)).astype(np.int32)
    used = np.arange(length) < rng.integers(length // 2, length + 1, rows)[:, None]
    position = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy()
    response = used & (position >= rng.integers(1, 8, rows)[:, None])
    return params, Tokens(tokens, response, used.astype(np.int32), position)


def loss(params, tokens, cfg):
    x = transformer.embed(params, cfg, tokens.tokens)
    return *nll(params, cfg, x, tokens, chunk=16), {}


def sums(shape, *, micro_batches=1, **changes):
    """(loss_sum, weight_sum, gradients) on a mesh."""
    cfg, (params, tokens) = model(**changes), problem()
    mesh = sharding.make_mesh(shape)
    at = sharding.shard_tree(transformer.axes(cfg), params, mesh)
    f = lambda p, b: accumulate(functools.partial(loss, cfg=cfg), p, b, micro_batches, at)
    run = jax.jit(
        f,
        in_shardings=(at, sharding.batch_sharding(mesh, tokens)),
        out_shardings=(None, None, None, at),
        compiler_options=meshes.QUICK,
    )
    with jax.set_mesh(mesh):
        total, weight, _, grads = run(params, tokens)
    return total, weight, grads


@functools.cache
def expected():
    """On one device, without a mesh, all rows at once."""
    params, tokens = problem()
    whole = functools.partial(accumulate, functools.partial(loss, cfg=model()))
    run = jax.jit(whole, compiler_options=meshes.QUICK)
    total, weight, _, grads = run(params, tokens)
    return total, weight, grads


@pytest.mark.parametrize("shape", FEW)
def test_a_mesh_gives_the_single_device_sums(shape):
    meshes.assert_same(sums(shape), expected())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [s for s in ALL if s[3] <= 4])
def test_every_mesh_gives_the_single_device_sums(shape):
    """Micro-batches where the rows allow, full remat: the worst case of sums and their order."""
    parts = shape[0] * shape[1]
    meshes.assert_same(sums(shape, micro_batches=2 if parts < 16 else 1, remat="full"), expected())


def test_heads_that_do_not_divide_by_tensor_are_refused():
    assert (1, 1, 1, 8) in ALL and len(ALL) == 20
    with pytest.raises(UserError, match=r"mesh.tensor=8 does not divide the attention heads \(4\)"):
        sums((1, 1, 1, 8))


# ---- what lies where ----


def lowered(shape, cfg, *, rows=16, length=64, micro_batches=1):
    """(state's shardings, abstract state, the compiled step's text) of a step on a mesh."""
    mesh = sharding.make_mesh(shape)
    at = sharding.shard_tree(transformer.axes(cfg), transformer.abstract(cfg), mesh)
    adam = optim.optimizer({"lr": 1e-3}, steps=10)
    begin = functools.partial(init_state, optimizer=adam)
    abstract = jax.eval_shape(begin, transformer.abstract(cfg))
    places = state_shardings(abstract, at, mesh)
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    shape_of = lambda dtype: jax.ShapeDtypeStruct((rows, length), dtype)
    batch = Tokens(*map(shape_of, (np.int32, np.bool_, np.int32, np.int32)))
    batch = jax.tree.map(put, batch, sharding.batch_sharding(mesh, batch))
    step = make_step(
        functools.partial(loss, cfg=cfg), adam, micro_batches=micro_batches, shardings=at
    )
    compiled = compile_step(step, places).lower(jax.tree.map(put, abstract, places), batch)
    text = compiled.compile(compiler_options=meshes.QUICK).as_text()
    return places, abstract, text


def collectives(text):
    """[(operation, its results as (type, dimensions))] of a compiled program."""
    found = []
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for line in text.splitlines():
        if match := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
            sizes = [
                (t, tuple(int(n) for n in dims.split(",") if n))
                for t, dims in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", match[1])
            ]
            found.append((match[2], sizes))
    return found


def test_fsdp_splits_parameters_and_moments_evenly():
    cfg = model(d=64, ffn=128)
    mesh = sharding.make_mesh((1, 8, 1, 1))
    at = sharding.shard_tree(transformer.axes(cfg), transformer.abstract(cfg), mesh)
    begin = functools.partial(init_state, optimizer=optim.optimizer({"lr": 1e-3}, steps=10))
    abstract = jax.eval_shape(begin, transformer.abstract(cfg))
    places = state_shardings(abstract, at, mesh)
    zeros = lambda: jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), abstract)
    state = jax.jit(zeros, out_shardings=places, compiler_options=meshes.QUICK)()
    here = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    whole = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    small = sum(x.nbytes for x in jax.tree.leaves(state.params) if x.sharding.is_fully_replicated)
    for tree in (state.params, state.opt[0].mu, state.opt[0].nu):
        assert here(tree) == (whole(tree) - small) / 8 + small
    assert small < 0.02 * whole(state.params)  # norms and biases alone


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 2, 1, 2)])
def test_fsdp_gathers_weights_and_leaves_activations_where_they_are(shape):
    """Without pinned activations XLA splits d instead of the rows: each device then has all rows."""
    rows, length, cfg = 16, 96, model(d=64, ffn=128, layers=8, remat="full")
    _, abstract, text = lowered(shape, cfg, rows=rows, length=length)
    found = [
        (name, size)
        for name, sizes in collectives(text)
        for kind, size in sizes
        if kind in ("f32", "bf16") and len(size) > 1
    ]
    tensors = {tuple(x.shape) for x in jax.tree.leaves(abstract.params)}
    tensors |= {x.shape[1:] for x in jax.tree.leaves(abstract.params["layers"])}
    weights = {int(np.prod(s)) // n for s in tensors for n in (1, shape[3])}
    parts = shape[0] * shape[1]
    device = rows * length * cfg.d // parts  # numbers of the activations of one device
    assert device not in weights and parts * device not in weights
    for name, size in found:
        numbers = int(np.prod(size))
        summed = shape[3] > 1 and name == "all-reduce" and numbers == device  # a product over heads
        assert numbers < device or numbers in weights or summed, (name, size)
    assert f"[{rows},{length}," not in text  # nobody has all rows
    large = {name for name, size in found if int(np.prod(size)) in weights}
    assert "all-gather" in large and large & {"all-reduce", "reduce-scatter"}
    # the head's gradient is added up over devices once, and not at every chunk of log-probabilities
    head = re.compile(r" (all-reduce|reduce-scatter)(-start)?\(.*while/body.*->p?dv")
    assert not [line for line in text.splitlines() if head.search(line)]


def test_every_remat_policy_gives_the_same_gradient_and_keeps_less():
    params, tokens = problem()
    tokens = jax.tree.map(jax.numpy.asarray, tokens)
    kept = {}
    for remat in ("none", "dots", "names", "full"):
        cfg = model(remat=remat, layers=6)
        shapes = transformer.abstract(cfg)
        total = lambda p, cfg=cfg: loss(p, tokens, cfg)[0]
        _, back = jax.eval_shape(lambda p, f=total: jax.vjp(f, p), shapes)
        kept[remat] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(back))
    cfg = model(remat="names")
    run = jax.jit(jax.grad(lambda p: loss(p, tokens, cfg)[0]), compiler_options=meshes.QUICK)
    meshes.assert_same(run(params), expected()[2])
    assert kept["none"] > kept["dots"] > kept["full"]
    assert kept["none"] > kept["names"] > kept["full"]
