"""Decoder families: windows, head norms and biases against themselves, config.json both ways, vocabularies."""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.models import families, transformer
from jaxrepro.models.rope import RopeScaling, frequencies
from jaxrepro.models.transformer import Prefix, TransformerConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from meshes import QUICK

STRETCH = RopeScaling("llama3", 4.0, 1.0, 4.0, 16)
# Everything at once: the window in one of two layers, norms of heads, a bias on the output.
CFG = TransformerConfig(
    vocab=12, d=16, layers=2, heads=4, kv=2, head_dim=6, ffn=24, qk_norm=True, o_bias=True,
    rope_theta=100.0, rope_scaling=STRETCH, window=3, window_layers=(1,), tied=False,
)  # fmt: skip
T = 7
POSITION = jnp.broadcast_to(jnp.arange(T), (4, T))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(rng.normal(0, 0.4, a.shape), jnp.float32)
    return jax.tree.map(draw, transformer.abstract(CFG))


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(1).normal(size=(4, T, CFG.d)), jnp.float32)


@partial(jax.jit, static_argnums=1, compiler_options=QUICK)
def apply(params, cfg, x, position, segment=None, prefix=None, cache=None):
    return transformer.apply(
        params, cfg, x, position=position, segment=segment, prefix=prefix, cache=cache
    )


@pytest.fixture(scope="module")
def full(params, x):
    return apply(params, CFG, x, POSITION)[0]


# --- windows ---------------------------------------------------------------------------------


def test_a_token_sees_the_window_and_no_further(params, x):
    cfg = dataclasses.replace(CFG, window_layers=None)
    moved = x.at[:, 1].add(1.0)
    one, two = (apply(params, cfg, a, POSITION)[0] for a in (x, moved))
    change = np.abs(one - two).max((0, 2)) > 1e-6
    # two layers of a window of three: token 1 reaches 2 + 2 tokens further
    np.testing.assert_array_equal(change, [False, True, True, True, True, True, False])


@pytest.mark.parametrize("lockstep", [True, False])
def test_cached_decode_equals_full_forward(params, x, full, lockstep):
    cache = transformer.new_cache(CFG, 4, T + 2, lockstep=lockstep)
    for j in range(T):
        step, cache = apply(params, CFG, x[:, j : j + 1], POSITION[:, j : j + 1], None, None, cache)
        np.testing.assert_allclose(step[:, 0], full[:, j], atol=2e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_the_window_reaches_into_a_shared_prompt_of_any_length(params, x, packed):
    # prompts of 4 and 3 tokens, each shared by two rows, padded with junk
    length = np.array([4, 3])
    prompts = jnp.concatenate([x[::2, :4], 9 * jnp.ones((2, 3, CFG.d))], axis=1)
    real = jnp.asarray(np.arange(T) < length[:, None], jnp.int32)
    prompts = jnp.where(real[..., None] > 0, prompts, 9.0)
    _, kv = apply(params, CFG, prompts, POSITION[:2], real)
    prefix = Prefix(transformer.pack(kv) if packed else kv, real > 0)
    own = x[:, 4:]
    at = jnp.asarray(np.repeat(length, 2)[:, None] + np.arange(3))
    got, _ = apply(params, CFG, own, at, None, prefix)
    for row in range(4):
        n = length[row // 2]
        whole = jnp.concatenate([prompts[row // 2, :n], own[row]])[None]
        whole = jnp.pad(whole, ((0, 3), (0, T - n - 3), (0, 0)))
        want, _ = apply(params, CFG, whole, POSITION)
        np.testing.assert_allclose(got[row], want[0, n : n + 3], atol=2e-5)
    cache = transformer.new_cache(CFG, 4, 3, lockstep=True)
    for j in range(3):
        step, cache = apply(params, CFG, own[:, j : j + 1], at[:, j : j + 1], None, prefix, cache)
        np.testing.assert_allclose(step[:, 0], got[:, j], atol=2e-5)


def test_packed_segments_with_a_window_equal_separate_rows(params, x):
    segment = jnp.asarray([[1, 1, 2, 2, 2, 2, 2]] * 4)
    position = jnp.asarray([[0, 1, 0, 1, 2, 3, 4]] * 4)
    packed, _ = apply(params, CFG, x, position, segment)
    alone, _ = apply(params, CFG, jnp.roll(x, -2, axis=1), POSITION)
    np.testing.assert_allclose(packed[:, 2:], alone[:, :5], atol=2e-5)


@pytest.mark.slow
def test_scan_unrolled_layers_and_remat_give_one_gradient(params, x):
    deep = dataclasses.replace(CFG, layers=5, window_layers=(1, 4))  # deep enough for a real loop
    drawn = jax.tree.map(lambda a: jnp.concatenate([a, a, a])[:5], params["layers"])
    params = params | {"layers": drawn}

    def gradient(params, cfg):
        loss = lambda p: jnp.sum(
            jnp.sin(transformer.apply(p, cfg, x[:1], position=POSITION[:1])[0])
        )
        return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)

    value, grads = gradient(params, dataclasses.replace(deep, remat="full"))
    other, more = gradient(transformer.unstack(params), deep)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), transformer.stack(more), grads
    )


def test_a_window_of_the_whole_row_is_no_window(params, x):
    wide = dataclasses.replace(CFG, window=T, window_layers=None)
    none = dataclasses.replace(CFG, window=None, window_layers=None)
    np.testing.assert_array_equal(
        apply(params, wide, x, POSITION)[0], apply(params, none, x, POSITION)[0]
    )


# --- frequencies -----------------------------------------------------------------------------


def test_llama3_keeps_fast_channels_divides_slow_ones_and_blends_between():
    plain, got = frequencies(32, 5e5), frequencies(32, 5e5, RopeScaling("llama3", 8.0))
    turns = 8192 * plain.astype(np.float64) / (2 * np.pi)
    fast, slow = turns > 4, turns < 1
    between = ~fast & ~slow
    assert fast.sum() > 5 and slow.sum() > 5 and between.sum() > 1
    np.testing.assert_array_equal(got[fast], plain[fast])
    np.testing.assert_allclose(got[slow], plain[slow] / 8, rtol=1e-6)
    m = (turns[between] - 1) / 3
    want = plain[between] * (m + (1 - m) / 8)
    np.testing.assert_allclose(got[between], want, rtol=1e-6)
    np.testing.assert_allclose(frequencies(8, 1e4, RopeScaling("linear", 2.0)) * 2, frequencies(8, 1e4), rtol=1e-6)  # fmt: skip


# --- config.json -----------------------------------------------------------------------------

HF = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=100, rms_norm_eps=1e-5, max_position_embeddings=128,
    hidden_act="silu", rope_theta=5e5,
)  # fmt: skip
LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)  # fmt: skip


def read(kind, **changes):
    return TransformerConfig.from_hf(HF | {"model_type": kind} | changes)


def test_old_and_new_spelling_of_rope_are_one():
    old = read("llama", rope_scaling=LLAMA3 | {"rope_type": "llama3"})
    older = read("llama", rope_scaling=LLAMA3 | {"type": "llama3"})
    new = dict(rope_parameters=LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}, rope_theta=None)
    assert old == older == read("llama", **new)
    assert old.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64) and old.rope_theta == 5e5
    assert read("llama", rope_scaling=None).rope_scaling is None


def test_two_spellings_of_rope_in_one_file_must_agree():
    stretch = LLAMA3 | {"rope_type": "llama3"}
    both = dict(rope_scaling=stretch, rope_parameters=stretch | {"rope_theta": 5e5})
    assert read("llama", **both) == read("llama", rope_scaling=stretch)
    for new, theta in (
        ({"rope_type": "default", "rope_theta": 5e5}, 5e5),
        (stretch | {"factor": 4.0}, 5e5),
        (both["rope_parameters"], 1e4),  # of the old spelling, the theta at the root
    ):
        with pytest.raises(UserError, match="rope_scaling and rope_parameters do not say the same"):
            read("llama", **both | {"rope_parameters": new, "rope_theta": theta})


def test_each_family_has_its_own_biases_norms_and_head_dim():
    for kind, bias, of_o, norm, dim in (
        ("llama", False, False, False, 16),
        ("mistral", False, False, False, 16),
        ("qwen2", True, False, False, 16),
        ("qwen3", False, False, True, 128),
    ):
        cfg = read(kind)
        found = (cfg.qkv_bias, cfg.o_bias, cfg.qk_norm, cfg.head_dim, cfg.family)
        assert found == (bias, of_o, norm, dim, kind)
        layer = transformer.declare(cfg)["layers"]
        assert ("bq" in layer, "bo" in layer, "q_norm" in layer) == (bias, of_o, norm)
    for kind in ("llama", "qwen3"):
        cfg = read(kind, attention_bias=True, head_dim=24)
        assert cfg.qkv_bias and cfg.o_bias and cfg.head_dim == 24
    assert not read("mistral", attention_bias=True).qkv_bias  # the family knows no such field
    no_type = {k: v for k, v in HF.items()} | {"architectures": ["LlamaForCausalLM"]}
    assert TransformerConfig.from_hf(no_type).family == "llama"
    assert not read("llama").tied and read("llama", tie_word_embeddings=True).tied


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_windows_by_layer_are_read_as_the_family_writes_them(kind):
    on = dict(use_sliding_window=True, sliding_window=8)
    by_layer = ["full_attention", "sliding_attention"] * 2
    for changes, window, layers in (
        ({}, None, None),
        ({"sliding_window": 8, "max_window_layers": 0}, None, None),  # not switched on
        (on | {"max_window_layers": 1}, 8, (1, 2, 3)),
        (on | {"max_window_layers": 0}, 8, None),
        (on | {"max_window_layers": 28}, None, None),
        (on | {"layer_types": by_layer, "max_window_layers": 0}, 8, (1, 3)),
        (on | {"sliding_window": None}, None, None),
    ):
        cfg = read(kind, **changes)
        assert (cfg.window, cfg.window_layers) == (window, layers), changes
        assert read(kind, **families.to_hf(cfg)) == cfg
    assert read("mistral", sliding_window=8).window == 8
    assert read("mistral").window == 4096  # what the family's class assumes
    assert read("mistral", sliding_window=None).window is None
    assert read("llama", sliding_window=8).window is None  # a field that the family does not have


@given(
    kind=st.sampled_from(sorted(families.ARCHITECTURES)),
    bias=st.booleans(),
    tied=st.booleans(),
    window=st.sampled_from([None, 5]),
    layers=st.sampled_from([None, (0, 2)]),
    scaling=st.sampled_from([None, RopeScaling("linear", 2.0), STRETCH]),
)
def test_config_json_goes_round(kind, bias, tied, window, layers, scaling):
    both, window = bias and kind in ("llama", "qwen3"), None if kind == "llama" else window
    cfg = TransformerConfig(
        50, 32, 3, 4, 2, 12, 48, rope_theta=1e4, rope_scaling=scaling, tied=tied, family=kind,
        qkv_bias=both or kind == "qwen2", o_bias=both, qk_norm=kind == "qwen3", window=window,
        window_layers=layers if window and kind.startswith("qwen") else None,
    )  # fmt: skip
    assert TransformerConfig.from_hf(families.to_hf(cfg)) == cfg
    guessed = families.to_hf(dataclasses.replace(cfg, family=None))
    assert TransformerConfig.from_hf(guessed, family=kind) == cfg


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is unknown; the known ones are llama, mistral, qwen2"),
        ({"model_type": None}, "architecture None is unknown"),
        ({"model_type": None, "architectures": ["OPT"]}, "architecture 'OPT' is unknown"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks 'low_freq_factor'"),
        (
            {"rope_scaling": LLAMA3 | {"type": "llama3", "factor": 0}},
            r"factor is 0; it must be a number from 1 to 1e\+30",
        ),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"mlp_bias": "false"}, "mlp_bias is 'false'; it must be true, false or null"),
        ({"attention_bias": "false"}, "attention_bias is 'false'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0"),
        ({"model_type": "qwen2", "use_sliding_window": "no"}, "use_sliding_window is 'no'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": "\n"}, "partial_rotary_factor is"),
        ({"num_hidden_layers": 2 * 10**9}, "an integer from 1 to 65536"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
            "its own for full_attention",
        ),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers is 'four'"),
        ({"num_key_value_heads": 3}, "not a multiple of kv heads 3"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, "there is no window"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["chunked"] * 4},
            "layer_types are 4 of",
        ),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"rope_scaling": "dynamic"}, "rope_scaling is 'dynamic'; it must be an object or null"),
        ({"rope_parameters": 5}, "rope_parameters is 5"),
        ({"text_config": [["a"]]}, "text_config is"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a number from 1e-30 to"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True"),
        ({"rope_theta": [1e4]}, r"rope_theta is \[10000.0\]"),
        ({"rope_theta": -1e4}, "rope_theta is -10000.0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"rope_scaling": LLAMA3 | {"type": "llama3", "factor": None}}, "lacks 'factor'"),
        ({"rope_scaling": LLAMA3 | {"type": "llama3", "low_freq_factor": "1"}}, "low_freq_factor"),
        (
            {"rope_scaling": LLAMA3 | {"type": "llama3", "original_max_position_embeddings": 8e3}},
            "original_max_position_embeddings is 8000.0; it must be an integer",
        ),
        ({"rope_scaling": {"mrope_section": 8}}, "mrope_section is 8; it must be a list"),
        (
            {"rope_scaling": {"mrope_section": ["8"]}},
            "mrope_section is .*; it must be a list of int",
        ),
        ({"model_type": None, "architectures": 5}, "architectures is 5"),
        ({"model_type": "qwen2", "layer_types": 4}, "layer_types is 4; it must be a list"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": [{}] * 4},
            "layer_types are 4 of",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "2"},
            "max_window_layers is '2'; it must be an integer from 0 to",
        ),
    ],
)
def test_a_config_that_cannot_run_is_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        TransformerConfig.from_hf(HF | {"model_type": "llama"} | changes)
    assert "\n" not in str(error.value)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
ANY = st.recursive(
    SCALARS | st.sampled_from([families.SLIDING, 10**400]),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=4), x, max_size=3),
    max_leaves=6,
)
ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "llama3", "mrope"]) | ANY},
    optional={key: st.just(value) | ANY for key, value in LLAMA3.items()}
    | dict.fromkeys(("type", "rope_theta", "mrope_section", "partial_rotary_factor"), ANY),
)
FIELDS = (
    "layer_types", "max_window_layers", "sliding_window", "use_sliding_window", "rope_theta", "rms_norm_eps",
    "original_max_position_embeddings", "max_position_embeddings", "architectures", "hidden_act", "head_dim",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "partial_rotary_factor", "quantization_config",
)  # fmt: skip


@given(
    kind=st.sampled_from([*families.KNOWN, None]) | ANY,
    few=st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=2),
    nested=st.dictionaries(
        st.sampled_from(["rope_parameters", "rope_scaling", "text_config"]), ROPE | ANY, max_size=2
    ),
)
@settings(deadline=None, max_examples=500)
def test_any_json_in_a_config_is_a_config_or_one_line(kind, few, nested):
    try:
        cfg = TransformerConfig.from_hf(HF | {"model_type": kind} | few | nested)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        half = min(cfg.head_dim // 2, 64)
        scaled = frequencies(half, cfg.rope_theta, cfg.rope_scaling)
        assert np.isfinite(scaled).all() and 0 < cfg.eps < np.inf


def test_a_decoder_that_no_family_has_is_not_written():
    with pytest.raises(UserError, match="llama does not have its biases; mistral does not"):
        families.to_hf(dataclasses.replace(CFG, qkv_bias=False))
    with pytest.raises(UserError, match="decoder: llama does not have its window"):
        families.to_hf(dataclasses.replace(read("mistral", sliding_window=4), family="llama"))
    with pytest.raises(UserError, match="family 'gpt' is unknown"):
        families.to_hf(dataclasses.replace(CFG, family="gpt"))
    for fields, message in (
        ({"window": 0}, "window 0"),
        ({"window": None}, r"window_layers \(1,\) need a window"),
        ({"window_layers": (2,)}, "ascending layers below 2"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(CFG, **fields)


# --- vocabularies ----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("drawn", [True, False])
def test_a_grown_vocabulary_keeps_old_rows_and_their_logits(params, tied, drawn):
    cfg = dataclasses.replace(CFG, tied=tied)
    params = params if not tied else {k: v for k, v in params.items() if k != "head"}
    key = jax.random.key(0) if drawn else None
    grown, wide = transformer.resize_vocab(params, cfg, 40, key=key)
    shapes = jax.tree.map(lambda a: a.shape, transformer.abstract(wide))
    assert jax.tree.map(lambda a: a.shape, grown) == shapes and wide.vocab == 40
    np.testing.assert_array_equal(grown["embed"][:12], params["embed"])
    new, mean = grown["embed"][12:], params["embed"].mean(0)
    if drawn:
        assert np.abs(new - mean).min() > 0 and np.abs(new - mean).max() < 3
        assert len(np.unique(new[:, 0])) == 28
    else:
        np.testing.assert_allclose(new, np.broadcast_to(mean, new.shape), atol=1e-6)
    hidden = jnp.ones((1, CFG.d))
    np.testing.assert_allclose(
        transformer.logits(grown, wide, hidden)[:, :12], transformer.logits(params, cfg, hidden), atol=1e-5
    )  # fmt: skip
    back, same = transformer.resize_vocab(grown, wide, 12)
    assert same == cfg
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_resized_vocabulary_keeps_its_dtype_and_refuses_nothing_at_all(params):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    grown, _ = transformer.resize_vocab(half, CFG, 14)
    assert grown["embed"].dtype == grown["head"].dtype == jnp.bfloat16
    with pytest.raises(UserError, match="vocabulary of 0"):
        transformer.resize_vocab(params, CFG, 0)
