"""LoRA: the same model at first, the merged one later, gradients in adapters alone, every mesh."""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.models import hf, lora, transformer
from jaxrepro.models.lora import PROJECTIONS, TRAINABLE, Lora
from jaxrepro.models.scoring import nll
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.ops.logprob import Tokens
from jaxrepro.rollout.generate import Prompts, Sampling, generate
from jaxrepro.train import checkpoint
from jaxrepro.train.state import init_state, trainable_mask
from jaxrepro.train.step import make_step

sys.path.insert(0, str(Path(__file__).parents[1]))
import meshes

BASE = TransformerConfig(
    vocab=24, d=16, layers=2, heads=4, kv=2, head_dim=6, ffn=24, qkv_bias=False, embed_std=0.5
)
CFG = dataclasses.replace(BASE, lora=Lora(rank=3, alpha=6))
SMALL = dataclasses.replace(CFG, layers=1)
B, T = 8, 6
SIX = ((2, 2, 1, 2), (8, 1, 1, 1), (1, 8, 1, 1), (1, 4, 1, 2), (2, 1, 2, 2), (1, 2, 1, 4))


def random(cfg, learned=True):
    """Parameters whose adapters have learned something, or are new (B = 0)."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), jnp.float32), transformer.abstract(cfg)
    )
    if not learned:
        for adapter in params["layers"]["lora"].values():
            adapter["b"] = jnp.zeros_like(adapter["b"])
    return params


@pytest.fixture(scope="module")
def fresh():
    return random(CFG, learned=False)


@pytest.fixture(scope="module")
def params():
    return random(CFG)


@pytest.fixture(scope="module")
def small():
    return random(SMALL)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(0, 24, (B, T)), jnp.int32)


@partial(jax.jit, static_argnums=1, compiler_options=meshes.QUICK)
def hidden(params, cfg, tokens):
    x = transformer.embed(params, cfg, tokens)
    at = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    return transformer.apply(params, cfg, x, position=at)[0]


def loss(params, tokens, cfg=SMALL):
    at = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    ones = jnp.ones_like(tokens)
    rows = Tokens(tokens, ones.astype(bool), ones, at)
    return *nll(params, cfg, transformer.embed(params, cfg, tokens), rows), {}


def test_new_adapters_change_no_bit(fresh, tokens):
    base = lora.off(fresh)
    assert lora.has(fresh) and not lora.has(base)
    np.testing.assert_array_equal(hidden(fresh, CFG, tokens), hidden(base, BASE, tokens))


def test_attached_adapters_are_those_of_a_fresh_model_in_either_layout(fresh):
    one = dataclasses.replace(CFG, lora=Lora(rank=3, targets="layers/wq"))
    declared = {"layers": {"lora": transformer.declare(one)["layers"]["lora"]}}
    want = transformer.initialise(jax.random.key(0), declared)["layers"]["lora"]
    base = lora.off(fresh)
    for layout in (base, transformer.unstack(base)):
        again, cfg = lora.attach(jax.random.key(0), layout, BASE, one.lora)
        again = transformer.stack(again)
        assert cfg == one
        jax.tree.map(np.testing.assert_array_equal, again["layers"]["lora"], want)
        jax.tree.map(np.testing.assert_array_equal, lora.off(again), base)


def test_switched_off_is_the_base_bit_for_bit_and_shares_its_arrays(params, tokens):
    base = lora.off(params)
    assert base["layers"]["wq"] is params["layers"]["wq"]
    # the config may keep its adapters: without their leaves there are none
    np.testing.assert_array_equal(hidden(base, CFG, tokens), hidden(base, BASE, tokens))
    assert np.abs(hidden(params, CFG, tokens) - hidden(base, CFG, tokens)).max() > 0.1


@pytest.mark.parametrize("listed", [False, True])
def test_merged_equals_unmerged(params, tokens, listed):
    own = transformer.unstack(params) if listed else params
    merged, cfg = lora.merge(own, CFG)
    assert cfg == BASE and not lora.has(merged)
    want = hidden(params, CFG, tokens)
    np.testing.assert_allclose(
        hidden(transformer.stack(merged), cfg, tokens), want, atol=2e-5, rtol=2e-5
    )
    assert lora.merge(merged, cfg)[0] is merged


@settings(deadline=None, max_examples=10)
@given(
    name=st.sampled_from(sorted(PROJECTIONS)),
    rank=st.integers(1, 5),
    alpha=st.sampled_from([0.5, 1, 16]),
    seed=st.integers(0, 9),
)
def test_merging_adds_alpha_over_r_times_a_b(name, rank, alpha, seed):
    cfg = dataclasses.replace(BASE, lora=Lora(rank, alpha, targets=f"layers/{name}"))
    rng = np.random.default_rng(seed)
    draw = lambda a: rng.normal(size=a.shape).astype(np.float32)
    layers = jax.tree.map(draw, transformer.abstract(cfg)["layers"])
    assert set(layers["lora"]) == {name}
    merged, _ = lora.merge({"layers": layers}, cfg)
    w, adapter = layers[name], layers["lora"][name]
    size = int(np.prod(w.shape[1 : 1 + PROJECTIONS[name]]))
    a, b = adapter["a"].reshape(2, size, rank), adapter["b"].reshape(2, rank, -1)
    want = w.reshape(2, size, -1) + alpha / rank * (a @ b)
    np.testing.assert_allclose(
        merged["layers"][name].reshape(want.shape), want, rtol=1e-4, atol=1e-4
    )


def test_cached_decode_draws_what_the_merged_model_draws(small, tokens):
    def draw(params, cfg):
        prompts = Prompts(
            transformer.embed(params, cfg, tokens[:2]),
            jnp.broadcast_to(jnp.arange(T), (2, T)),
            jnp.ones((2, T), jnp.int32),
            jnp.full(2, T),
        )
        run = jax.jit(
            generate, static_argnames=("cfg", "sampling", "n"), compiler_options=meshes.QUICK
        )
        sampling = Sampling(max_new=4, eos=(0,))
        ids, key = jnp.arange(2), jax.random.key(2)
        return run(params, cfg, prompts, request_ids=ids, key=key, sampling=sampling, n=2)

    ours, theirs = draw(small, SMALL), draw(*lora.merge(small, SMALL))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.lp_raw, theirs.lp_raw, atol=1e-4)


def test_a_step_trains_adapters_alone_and_resumes(tokens, tmp_path):
    fresh = random(SMALL, learned=False)
    optimizer = optax.adam(0.1)
    state = init_state(fresh, optimizer, trainable=TRAINABLE)
    moments = {
        sharding.path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(state.opt[0].mu)
    }
    assert moments == {f"layers/lora/{n}/{m}" for n in PROJECTIONS for m in "ab"}
    step = jax.jit(make_step(loss, optimizer, trainable=TRAINABLE), compiler_options=meshes.QUICK)
    one, first = step(state, tokens)
    # B = 0, so A has no gradient yet
    jax.tree.map(np.testing.assert_array_equal, lora.off(one.params), lora.off(fresh))
    for name, adapter in one.params["layers"]["lora"].items():
        np.testing.assert_array_equal(adapter["a"], fresh["layers"]["lora"][name]["a"])
        assert np.abs(adapter["b"]).min() > 0
    with checkpoint.Checkpoints(tmp_path, "sft") as saves:
        saves.save(1, one)
        again = saves.restore(checkpoint.on_device(jax.eval_shape(lambda: one)))
    two, second = step(one, tokens)
    assert second["loss"] < first["loss"]
    assert np.abs(
        two.params["layers"]["lora"]["wq"]["a"] - fresh["layers"]["lora"]["wq"]["a"]
    ).any()
    jax.tree.map(np.testing.assert_array_equal, step(again, tokens)[0], two)


def test_trainable_matches_adapters_of_a_decoder_inside_a_larger_model(fresh):
    for tree in (fresh, {"text": fresh, "vision": {"layers": {"qkv": 0}}}):
        mask = trainable_mask(TRAINABLE, tree)
        for keys, chosen in jax.tree_util.tree_leaves_with_path(mask):
            assert chosen == ("/lora/" in sharding.path_of(keys))


@pytest.mark.parametrize("shapes", [SIX[::5], pytest.param(SIX, marks=pytest.mark.slow)])
def test_meshes_give_the_single_device_loss_and_gradients(small, tokens, shapes):
    def trained(params, tokens):
        adapters = params["layers"]["lora"]
        frozen = jax.lax.stop_gradient(params)
        frozen = frozen | {"layers": frozen["layers"] | {"lora": adapters}}
        x = transformer.embed(frozen, SMALL, tokens)
        at = jnp.broadcast_to(jnp.arange(T), tokens.shape)
        out, _ = transformer.apply(frozen, SMALL, x, position=at)
        return jnp.sum(jnp.sin(out)), B, {}

    meshes.check(trained, small, transformer.axes(SMALL), tokens, shapes)


def test_both_initialisers_have_their_standard_deviation():
    wide = dataclasses.replace(BASE, d=512)
    for init, std in (("kaiming", 1 / np.sqrt(3 * 512)), ("normal", 1 / 16)):
        cfg = dataclasses.replace(wide, lora=Lora(16, init=init, targets="layers/gate"))
        declared = transformer.declare(cfg)["layers"]["lora"]
        drawn = transformer.initialise(jax.random.key(0), {"layers": {"lora": declared}})
        a, b = (np.asarray(drawn["layers"]["lora"]["gate"][n]) for n in "ab")
        assert a.std() == pytest.approx(std, rel=0.03) and not b.any()
        assert (np.abs(a).max() <= 1 / np.sqrt(512) + 1e-6) == (init == "kaiming")


def test_targets_choose_projections_and_axes_follow_the_base():
    some = Lora(targets=r"layers/(wo|wq)")
    assert some.names() == ("wq", "wo")
    declared = transformer.declare(dataclasses.replace(BASE, lora=some))["layers"]["lora"]
    shapes = {n: (declared[n]["a"].shape, declared[n]["b"].shape) for n in declared}
    assert shapes == {"wq": ((2, 16, 8), (2, 8, 4, 6)), "wo": ((2, 4, 6, 8), (2, 8, 16))}
    assert declared["wo"]["a"].axes[:3] == ("layers", "heads", "head_dim")
    assert declared["wq"]["b"].axes[2:] == ("heads", "head_dim")


def test_what_does_not_fit_is_refused(fresh, tmp_path):
    for fields, message in (
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"alpha": 0.0}, r"alpha 0\.0 must be"),
        ({"init": "orthogonal"}, "'orthogonal' is unknown"),
        ({"targets": "wq"}, r"'wq' match none of layers/\{wq,"),
        ({"targets": "("}, "no regular expression"),
    ):
        with pytest.raises(UserError, match=message):
            Lora(**fields)
    with pytest.raises(UserError, match="adapters already"):
        lora.attach(jax.random.key(0), fresh, CFG, Lora())
    with pytest.raises(UserError, match=r"unknown to the format: .*merge the adapters first"):
        hf.save(tmp_path / "out", fresh, CFG)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"cfg\.lora is None"):
        jax.eval_shape(lambda p: hidden(p, BASE, jnp.zeros((1, T), int)), fresh)
