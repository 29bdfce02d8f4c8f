"""Decoder families against transformers in torch: logits, cached greedy text, gradients, files both ways.

The models are tiny random ones; all their tensors are drawn with a large enough scale that attention is
far from uniform, so that a window, a norm or a rotation that is wrong shows.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro import sharding
from jaxrepro.models import families, hf, lora, names, transformer
from jaxrepro.models.lora import Lora
from jaxrepro.models.scoring import nll
from jaxrepro.ops.logprob import Tokens
from jaxrepro.rollout.generate import FINISH_LENGTH, Prompts, Sampling, generate

sys.path.insert(0, str(Path(__file__).parents[1]))
from meshes import QUICK

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

T, NEW = 14, 10
SIZES = dict(
    vocab_size=70,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    bos_token_id=0,
    eos_token_id=1,
    attn_implementation="eager",
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
BY_LAYER = dict(
    use_sliding_window=True,
    sliding_window=4,
    layer_types=["sliding_attention", "full_attention"],
)
CASES = {
    "llama": ("Llama", dict(head_dim=12)),
    "llama3": (
        "Llama",
        dict(rope_parameters=LLAMA3, tie_word_embeddings=True, attention_bias=True),
    ),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=12, attention_bias=True, **BY_LAYER)),
    "mistral": ("Mistral", dict(sliding_window=5, head_dim=12)),
}


def torch_model(case):
    family, changes = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.25)
    return model


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
    """(torch model, its folder, our config, our parameters)."""
    model = torch_model(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(folder)
    cfg = hf.read_config(folder)
    return model, folder, cfg, hf.load(folder, cfg)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(2, 70, (3, T))


@functools.partial(jax.jit, static_argnums=1)
def logits(params, cfg, tokens):
    x = transformer.embed(params, cfg, tokens)
    at = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    hidden, _ = transformer.apply(params, cfg, x, position=at)
    return transformer.logits(params, cfg, hidden)


def test_logits_equal(both, tokens):
    model, _, cfg, params = both
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(params, cfg, tokens), theirs, atol=1e-4, rtol=0)
    assert np.abs(theirs).max() > 0.5  # not a comparison of zeros


def test_a_window_that_is_shorter_than_the_row_matters(both, tokens):
    _, _, cfg, params = both
    if cfg.window is None:
        return
    wide = dataclasses.replace(cfg, window=None, window_layers=None)
    assert cfg.window < T
    assert np.abs(logits(params, cfg, tokens) - logits(params, wide, tokens)).max() > 0.1


def test_ten_greedy_tokens_equal(both, tokens):
    model, _, cfg, params = both
    # rows of different lengths: torch pads on the left, we on the right
    length = np.array([T, T - 5, T - 1])
    left, mask = np.zeros((3, T), np.int64), np.zeros((3, T), np.int64)
    for i, n in enumerate(length):
        left[i, T - n :], mask[i, T - n :] = tokens[i, :n], 1
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor(left),
            attention_mask=torch.tensor(mask),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )[:, T:].numpy()
    real = jnp.asarray(np.arange(T) < length[:, None], jnp.int32)
    prompts = Prompts(
        transformer.embed(params, cfg, jnp.asarray(tokens)),
        jnp.broadcast_to(jnp.arange(T), (3, T)),
        real,
        jnp.asarray(length),
    )
    ours = jax.jit(generate, static_argnames=("cfg", "sampling", "n"), compiler_options=QUICK)(
        params,
        cfg,
        prompts,
        request_ids=jnp.arange(3),
        key=jax.random.key(0),
        sampling=Sampling(max_new=NEW, min_new=NEW, eos=(1,), temperature=0.0),
        n=2,
    )
    np.testing.assert_array_equal(ours.tokens[:, 0], theirs)
    np.testing.assert_array_equal(ours.tokens[:, 1], theirs)
    assert (ours.finish == FINISH_LENGTH).all() and len(np.unique(theirs)) > 5


def test_gradients_of_the_nll_equal(both, tokens):
    model, _, cfg, params = both
    model.zero_grad()
    theirs = model(torch.tensor(tokens), labels=torch.tensor(tokens)).loss
    theirs.backward()

    def loss(params):
        ones = jnp.ones(tokens.shape, jnp.int32)
        at = jnp.broadcast_to(jnp.arange(T), tokens.shape)
        rows = Tokens(jnp.asarray(tokens, jnp.int32), ones.astype(bool), ones, at)
        total, weight = nll(params, cfg, transformer.embed(params, cfg, rows.tokens), rows)
        return total / weight

    ours, grads = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    torch_grads = {n: p.grad.numpy() for n, p in model.named_parameters()}
    for line in names.table(cfg):
        for i, name in enumerate(line.names):
            mine = np.asarray(names.pick(grads, line.path, i if line.stacked else None))
            their = line.to_ours(torch_grads.pop(name))
            assert np.abs(mine - their).max() < 1e-3 * np.abs(their).max() + 1e-7, name
    assert not torch_grads


def test_files_go_round_bitwise(both, tokens, tmp_path):
    model, _, cfg, params = both
    hf.save(tmp_path / "ours", params, cfg, max_shard_bytes=30_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again, info = type(model).from_pretrained(
        tmp_path / "ours",
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(info.values()), info
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items()):
        assert name == other and torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(again(torch.tensor(tokens)).logits, model(torch.tensor(tokens)).logits)
    again.save_pretrained(tmp_path / "theirs")
    assert hf.read_config(tmp_path / "ours") == hf.read_config(tmp_path / "theirs") == cfg
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "theirs", cfg), params)


def test_sharded_equals_unsharded_load(both):
    _, folder, cfg, params = both
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    want = sharding.shard_tree(transformer.axes(cfg), transformer.abstract(cfg), mesh)
    placed = hf.load(folder, cfg, shardings=want)
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, placed, want))
    assert placed["layers"]["gate"].addressable_shards[0].data.shape == (2, 8, 24)


def test_configs_of_transformers_and_ours_say_the_same(both):
    model, folder, cfg, _ = both
    ours = type(model.config)(**families.to_hf(cfg)).to_dict()
    theirs = json.loads((folder / "config.json").read_text())
    written = families.to_hf(cfg).keys() | {"rope_parameters"}
    skip = {"bos_token_id", "eos_token_id", "torch_dtype", "rope_theta", "rope_scaling", "head_dim"}
    for name in written - skip:
        if name in theirs and name != "max_window_layers":
            assert ours[name] == theirs[name], name


def test_merged_adapters_give_torch_the_logits_of_the_adapted_model(tokens, tmp_path):
    torch_model("qwen2").save_pretrained(tmp_path / "base")
    cfg = hf.read_config(tmp_path / "base")
    params, cfg = lora.attach(
        jax.random.key(0), hf.load(tmp_path / "base", cfg), cfg, Lora(rank=2, alpha=4)
    )
    rng = np.random.default_rng(0)
    for adapter in params["layers"]["lora"].values():
        adapter["b"] = jnp.asarray(rng.normal(0, 0.3, adapter["b"].shape), jnp.float32)
    adapted = logits(params, cfg, tokens)
    base = logits(lora.off(params), cfg, tokens)
    assert np.abs(adapted - base).max() > 0.1
    hf.save(tmp_path / "merged", *lora.merge(params, cfg))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(theirs, adapted, atol=1e-4, rtol=0)
