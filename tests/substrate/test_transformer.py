"""The decoder: one mechanism for prefill, decode and shared prompts, checked against itself."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.models import transformer
from jaxrepro.models.transformer import Prefix, TransformerConfig

CFG = TransformerConfig(
    vocab=19, d=16, layers=2, heads=4, kv=2, head_dim=6, ffn=24, mrope_sections=(1, 1, 1)
)
ROPE = dataclasses.replace(CFG, mrope_sections=None)
T = 6


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), jnp.float32)
    return jax.tree.map(draw, transformer.abstract(CFG))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (4, T, CFG.d))


POSITION = jnp.broadcast_to(jnp.arange(T), (4, T))


@partial(jax.jit, static_argnums=1)
def apply(params, cfg, x, position, segment=None, prefix=None, cache=None):
    return transformer.apply(
        params, cfg, x, position=position, segment=segment, prefix=prefix, cache=cache
    )


@pytest.fixture(scope="module")
def full(params, x):
    return apply(params, CFG, x, POSITION)[0]


@pytest.mark.parametrize("lockstep", [True, False])
def test_cached_decode_equals_full_forward(params, x, full, lockstep):
    cache = transformer.new_cache(CFG, 4, T + 2, lockstep=lockstep)
    for j in range(T):
        step, cache = apply(params, CFG, x[:, j : j + 1], POSITION[:, j : j + 1], None, None, cache)
        np.testing.assert_allclose(step[:, 0], full[:, j], atol=2e-5)
    assert (np.asarray(cache.length) == T).all()


def test_rows_of_a_cache_advance_by_their_own_number_of_tokens(params, x, full):
    # three columns at once; rows 1 and 3 hold only one real token in the first block
    real = np.array([3, 1, 3, 1])
    cache = transformer.new_cache(CFG, 4, T + 3)
    segment = jnp.asarray(np.arange(3) < real[:, None], jnp.int32)
    _, cache = apply(params, CFG, x[:, :3], POSITION[:, :3], segment, None, cache)
    np.testing.assert_array_equal(cache.length, real)
    at = real[:, None] + np.arange(3)
    block = jnp.take_along_axis(x, jnp.asarray(at)[..., None], 1)
    hidden, _ = apply(params, CFG, block, jnp.asarray(at), jnp.ones((4, 3), int), None, cache)
    want = np.take_along_axis(np.asarray(full), at[..., None], 1)
    np.testing.assert_allclose(hidden, want, atol=2e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_shared_prompt_equals_separate_rows(params, x, full, packed):
    prompts = x[::2, :4]  # rows 0, 1 share the first prompt, rows 2, 3 the second
    rows = jnp.concatenate([jnp.repeat(prompts, 2, axis=0), x[:, 4:]], axis=1)
    want = apply(params, CFG, rows, POSITION)[0]
    # two columns of padding, filled with junk
    padded = jnp.concatenate([prompts, 9 * jnp.ones((2, 2, CFG.d))], axis=1)
    segment = jnp.asarray([[1, 1, 1, 1, 0, 0]] * 2)
    _, kv = apply(params, CFG, padded, POSITION[:2], segment)
    prefix = Prefix(transformer.pack(kv) if packed else kv, segment > 0)
    got, _ = apply(params, CFG, x[:, 4:], POSITION[:, 4:], None, prefix)
    np.testing.assert_allclose(got, want[:, 4:], atol=2e-5)


def test_an_empty_prefix_changes_nothing(params, x, full):
    _, kv = apply(params, CFG, x[:2], POSITION[:2])
    got, _ = apply(params, CFG, x, POSITION, None, Prefix(kv, jnp.zeros((2, T), bool)))
    np.testing.assert_allclose(got, full, atol=2e-5)


def test_packed_segments_equal_separate_rows_and_padding_is_finite(params, x):
    segment = jnp.asarray([[1, 1, 1, 2, 2, 0]] * 4)
    position = jnp.asarray([[0, 1, 2, 0, 1, 0]] * 4)
    packed, _ = apply(params, CFG, x, position, segment)
    moved = jnp.roll(x, -3, axis=1)
    alone, _ = apply(params, CFG, moved, POSITION)
    np.testing.assert_allclose(packed[:, 3:5], alone[:, :2], atol=2e-5)
    assert np.isfinite(packed).all()


def test_equal_position_streams_are_ordinary_rope(params, x, full):
    three = jnp.broadcast_to(POSITION[:, None], (4, 3, T))
    np.testing.assert_array_equal(apply(params, CFG, x, three)[0], full)
    np.testing.assert_array_equal(apply(params, ROPE, x, POSITION)[0], full)


def test_mrope_sections_take_streams_0_1_2_twice():
    cfg = dataclasses.replace(CFG, head_dim=16, mrope_sections=(2, 3, 3), rope_theta=50.0)
    position = jax.random.randint(jax.random.key(0), (2, 3, 5), 0, 40)
    x = jax.random.normal(jax.random.key(1), (2, 5, 4, 16))
    got = transformer.rotate(x, *transformer.rope_angles(cfg, position))
    # as published: angles over all 16 channels, sections doubled, rotate_half
    inverse = 50.0 ** (-np.arange(8) / 8)
    angle = np.asarray(position)[..., None] * np.concatenate([inverse, inverse])  # (b, 3, t, 16)
    stream = np.repeat([0, 1, 2, 0, 1, 2], [2, 3, 3, 2, 3, 3])
    angle = np.stack([angle[:, s, :, c] for c, s in enumerate(stream)], axis=-1)[:, :, None]
    turned = np.concatenate([-x[..., 8:], x[..., :8]], axis=-1)
    np.testing.assert_allclose(got, x * np.cos(angle) + turned * np.sin(angle), atol=1e-5)


@pytest.fixture(scope="module")
def gradient(x):
    @partial(jax.jit, static_argnums=1)
    def run(params, cfg):
        def loss(p):
            return jnp.sum(jnp.sin(transformer.apply(p, cfg, x, position=POSITION)[0]))

        return jax.value_and_grad(loss)(params)

    return run


def test_scan_equals_unrolled_layers_and_remat_changes_no_gradient(params, gradient):
    value, grads = gradient(params, CFG)
    for cfg, p in (
        (dataclasses.replace(CFG, remat="full"), params),
        (dataclasses.replace(CFG, remat="dots"), transformer.unstack(params)),
    ):
        other, more = gradient(p, cfg)
        np.testing.assert_allclose(other, value, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
            transformer.stack(more),
            grads,
        )


def test_stack_inverts_unstack(params):
    again = transformer.stack(transformer.unstack(params))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_compute_dtype_leaves_parameters_and_logits_in_float32(params, x):
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    hidden, kv = jax.eval_shape(lambda p: transformer.apply(p, cfg, x, position=POSITION), params)
    assert hidden.dtype == kv.k.dtype == jnp.bfloat16
    out = jax.eval_shape(lambda p, h: transformer.logits(p, cfg, h), params, hidden)
    assert out.dtype == jnp.float32 and out.shape == (4, T, CFG.vocab)


def test_declaration_gives_the_same_tree_to_init_axes_and_abstract():
    cfg = dataclasses.replace(CFG, tied=False, qkv_bias=False)
    declared, abstract = transformer.declare(cfg), transformer.abstract(cfg)
    assert "head" in declared and "bq" not in declared["layers"]
    made = jax.eval_shape(lambda k: transformer.init(k, cfg), jax.random.key(0))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract
    )
    jax.tree.map(lambda p: pytest.fail(str(p)) if len(p.axes) != len(p.shape) else 0, declared)
    assert transformer.axes(cfg)["layers"]["wo"] == ("layers", "heads", "head_dim", "embed")
    assert transformer.count(cfg) == sum(a.size for a in jax.tree.leaves(abstract))


def test_initial_scales_and_independence_of_other_tensors():
    cfg = dataclasses.replace(CFG, d=64, ffn=96, vocab=200, embed_std=0.5)
    declared = transformer.declare(cfg)
    some = {
        "embed": declared["embed"],
        "layers": {name: declared["layers"][name] for name in ("wo", "down", "bq", "mlp_norm")},
    }
    p = jax.jit(lambda key: transformer.initialise(key, some))(jax.random.key(0))
    assert np.std(np.asarray(p["embed"])) == pytest.approx(0.5, rel=0.05)
    for name, std in (("wo", 24**-0.5), ("down", 96**-0.5)):
        assert np.std(np.asarray(p["layers"][name])) == pytest.approx(std, rel=0.05)
    assert (p["layers"]["bq"] == 0).all() and (p["layers"]["mlp_norm"] == 1).all()
    alone = transformer.initialise(jax.random.key(0), {"embed": declared["embed"]})
    np.testing.assert_array_equal(alone["embed"], p["embed"])


HF = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
}
SECTIONS = {"mrope_section": [16, 24, 24]}


@pytest.mark.parametrize(
    "config",
    [
        HF
        | {
            "model_type": "qwen2_vl",
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "rope_scaling": SECTIONS | {"type": "mrope"},
        },
        {
            "model_type": "qwen2_vl",
            "tie_word_embeddings": True,
            "text_config": HF
            | {
                "model_type": "qwen2_vl_text",
                "rope_parameters": SECTIONS | {"rope_type": "default", "rope_theta": 1e6},
            },
        },
    ],
)
def test_both_spellings_of_a_hub_config_give_qwen2_vl_2b(config):
    cfg = TransformerConfig.from_hf(config)
    assert transformer.count(cfg) == 2_208_985_600 - 665_271_296
    assert (cfg.mrope_sections, cfg.rope_theta, cfg.tied) == ((16, 24, 24), 1e6, True)


def test_a_7b_decoder_has_the_published_number_of_parameters():
    cfg = TransformerConfig(152064, 3584, 28, 28, 4, 128, 18944, tied=False)
    assert transformer.count(cfg) == 8_291_375_616 - 675_759_104


def test_what_does_not_fit_is_refused(params, x):
    bad = [
        ({"mrope_sections": (1, 1, 2)}, r"\(1, 1, 2\) sum to 4, head_dim / 2 is 3"),
        ({"kv": 3}, "heads 4 is not a multiple of kv heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"remat": "some"}, "remat 'some' is unknown"),
    ]
    for fields, message in bad:
        with pytest.raises(UserError, match=message):
            dataclasses.replace(CFG, **fields)
    with pytest.raises(UserError, match="need mrope_sections"):
        transformer.apply(params, ROPE, x, position=jnp.zeros((4, 3, T), int))
    with pytest.raises(UserError, match="do not fit a cache of 2"):
        cache = transformer.new_cache(CFG, 4, 2)
        transformer.apply(params, CFG, x, position=POSITION, cache=cache)
    with pytest.raises(UserError, match="rope type 'yarn'"):
        TransformerConfig.from_hf(
            HF | {"model_type": "llama", "rope_scaling": {"rope_type": "yarn"}}
        )
