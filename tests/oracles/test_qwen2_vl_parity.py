"""Qwen2-VL against transformers in torch: processor, positions, tower, logits, greedy text, gradients, files.

The model is a tiny random one; all its tensors, norms and biases included, are drawn with a large enough
scale that attention is far from uniform. torch pads on the left, we pad on the right, and attended
positions are compared.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxrepro.data import images
from jaxrepro.models import hf, names, qwen2_vl, transformer, vision_tower
from jaxrepro.ops.logprob import shift, token_log_probs
from jaxrepro.rollout.generate import FINISH_LENGTH, Prompts, Sampling, generate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

VOCAB, IMAGE, VIDEO, START, END, EOS, PAD = 120, 110, 111, 112, 113, 1, 0
PIXELS = dict(min_pixels=3136, max_pixels=20_000)


def tiny_config(tied):
    return transformers.Qwen2VLConfig(
        text_config=dict(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
            bos_token_id=PAD,
            eos_token_id=EOS,
        ),
        vision_config=dict(
            depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=14
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )


def torch_model(tied=True):
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(tiny_config(tied)).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            plain = "norm" in name or "ln_q" in name
            p.normal_(1.0 if plain and name.endswith("weight") else 0.0, 0.25)
    return model


@pytest.fixture(scope="module")
def model():
    return torch_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cfg(folder):
    return hf.read_config(folder)


@pytest.fixture(scope="module")
def params(folder, cfg):
    return hf.load(folder, cfg)


def random_image(seed, height, width, mode="RGB"):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA").resize((width, height))
    return image.convert(mode)


def oracle_processor(**pixels):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**(pixels or PIXELS))


@pytest.fixture(scope="module")
def rows():
    """Rows of a mixed batch: (tokens, processed images). Text only, one image, two of different size."""
    small, wide, tall = (
        images.process(random_image(i, *size), **PIXELS)
        for i, size in enumerate([(56, 84), (60, 200), (150, 70)])
    )
    rng = np.random.default_rng(0)

    def text(n):
        return rng.integers(2, 100, n).tolist()

    def image(one):
        return [START, *[IMAGE] * images.tokens_of(one[1]), END]

    return [
        (text(9), []),
        (text(3) + image(small) + text(4), [small]),
        (text(2) + image(wide) + text(1) + image(tall) + text(3), [wide, tall]),
    ]


@pytest.fixture(scope="module")
def left(rows):
    """The batch as torch wants it: padded on the left, patches of all rows in one list."""
    t = max(len(tokens) for tokens, _ in rows)
    ids = np.full((len(rows), t), PAD)
    mask = np.zeros((len(rows), t), np.int64)
    for i, (tokens, _) in enumerate(rows):
        ids[i, t - len(tokens) :], mask[i, t - len(tokens) :] = tokens, 1
    found = [one for _, row in rows for one in row]
    return dict(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        mm_token_type_ids=torch.tensor((ids == IMAGE).astype(np.int64)),
        pixel_values=torch.tensor(np.concatenate([patches for patches, _ in found])),
        image_grid_thw=torch.tensor([grid for _, grid in found]),
    )


@pytest.fixture(scope="module")
def right(rows, cfg):
    """The same batch as we want it: padded on the right, one row of patches per row of tokens."""
    t = max(len(tokens) for tokens, _ in rows) + 3
    tokens = np.zeros((len(rows), t), np.int32)
    segment, position = np.zeros_like(tokens), np.zeros((len(rows), 3, t), np.int32)
    following = np.zeros(len(rows), np.int32)
    for i, (ids, row) in enumerate(rows):
        n = len(ids)
        tokens[i, :n], segment[i, :n] = ids, 1
        position[i, :, :n], following[i] = qwen2_vl.positions(
            np.array(ids), [g for _, g in row], cfg
        )
    vision = images.collate([row for _, row in rows])
    batch = dict(
        tokens=tokens, segment=segment, position=position, next_position=following, vision=vision
    )
    return jax.tree.map(jnp.asarray, batch)


def forward(params, cfg, batch):
    x = qwen2_vl.embed(params, cfg, batch["tokens"], batch["vision"])
    hidden, _ = transformer.apply(
        params["text"], cfg.text, x, position=batch["position"], segment=batch["segment"]
    )
    return hidden


@functools.partial(jax.jit, static_argnums=1)
def logits(params, cfg, batch):
    return transformer.logits(params["text"], cfg.text, forward(params, cfg, batch))


def compare(ours, theirs, rows):
    """Attended positions of ours (right-padded) and theirs (left-padded) to 1e-4."""
    theirs = theirs.detach().numpy()
    for i, (ids, _) in enumerate(rows):
        n = len(ids)
        np.testing.assert_allclose(ours[i, :n], theirs[i, -n:], atol=1e-4, rtol=0)
    assert np.abs(theirs).max() > 0.5  # not a comparison of zeros


def relative(a, b):
    return float(np.abs(a - b).max() / (np.abs(b).max() + 1e-12))


# The image processor --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_image_processor_is_bit_equal_for_every_mode(mode):
    image = random_image(1, 83, 131, mode)
    theirs = oracle_processor()([image], return_tensors="np")
    patches, grid = images.process(image, **PIXELS)
    np.testing.assert_array_equal(patches, theirs["pixel_values"])
    assert [list(grid)] == theirs["image_grid_thw"].tolist()


@pytest.mark.parametrize(
    "size", [(56, 56), (480, 640), (300, 400), (2000, 30), (7, 9), (1, 190), (70, 98), (1000, 1000)]
)
def test_image_processor_is_bit_equal_for_every_size(size):
    image = random_image(2, *size)
    bounds = dict(min_pixels=3136, max_pixels=400_000)
    theirs = oracle_processor(**bounds)([image], return_tensors="np")
    patches, grid = images.process(image, **bounds)
    np.testing.assert_array_equal(patches, theirs["pixel_values"])
    assert [list(grid)] == theirs["image_grid_thw"].tolist()


# Positions ------------------------------------------------------------------------------------------


def test_positions_equal_get_rope_index_at_attended_tokens(model, left, rows, cfg):
    theirs, deltas = model.model.get_rope_index(
        left["input_ids"],
        left["mm_token_type_ids"],
        image_grid_thw=left["image_grid_thw"],
        attention_mask=left["attention_mask"],
    )
    for i, (ids, row) in enumerate(rows):
        ours, following = qwen2_vl.positions(np.array(ids), [g for _, g in row], cfg)
        np.testing.assert_array_equal(ours, theirs[:, i, -len(ids) :])
        assert following == deltas[i, 0] + len(ids)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_positions_of_single_unpadded_rows(model, rows, cfg, row):
    ids, row = rows[row]
    tokens = torch.tensor([ids])
    theirs, _ = model.model.get_rope_index(
        tokens,
        (tokens == IMAGE).int(),
        image_grid_thw=torch.tensor([g for _, g in row]) if row else None,
    )
    ours, _ = qwen2_vl.positions(np.array(ids), [g for _, g in row], cfg)
    np.testing.assert_array_equal(ours, theirs[:, 0])


# Forward, text, gradients ----------------------------------------------------------------------------


def test_vision_features_equal(model, params, cfg, left, right, rows):
    with torch.no_grad():
        theirs = model.model.visual(left["pixel_values"], grid_thw=left["image_grid_thw"])
    theirs = theirs.pooler_output.numpy()
    ours = jax.jit(lambda p, v: vision_tower.apply(p, cfg.vision, v))(
        params["vision"], right["vision"]
    )
    counts = [sum(images.tokens_of(g) for _, g in row) for _, row in rows]
    ours = np.concatenate([np.asarray(ours[i, :n]) for i, n in enumerate(counts)])
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    assert np.abs(theirs).max() > 0.5


def test_logits_equal_on_a_mixed_batch(model, params, cfg, left, right, rows):
    with torch.no_grad():
        theirs = model(**left).logits
    compare(np.asarray(logits(params, cfg, right)), theirs, rows)


def test_twenty_greedy_tokens_equal(model, params, cfg, left, right):
    with torch.no_grad():
        theirs = model.generate(
            **left, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=PAD
        )
    theirs = theirs[:, left["input_ids"].shape[1] :].numpy()
    x = qwen2_vl.embed(params, cfg, right["tokens"], right["vision"])
    prompts = Prompts(x, right["position"], right["segment"], right["next_position"])
    sampling = Sampling(max_new=20, min_new=20, eos=(EOS,), temperature=0.0)
    ours = jax.jit(generate, static_argnames=("cfg", "sampling", "n"))(
        params["text"],
        cfg.text,
        prompts,
        request_ids=jnp.arange(len(x)),
        key=jax.random.key(0),
        sampling=sampling,
        n=1,
    )
    np.testing.assert_array_equal(ours.tokens[:, 0], theirs)
    assert (ours.finish == FINISH_LENGTH).all() and len(np.unique(theirs)) > 5


def test_gradients_of_the_nll_equal(model, params, cfg, left, right):
    # Every text token after the first token of its row is a target; torch gets them by labels.
    labels = left["input_ids"].clone()
    labels[(labels == IMAGE) | (left["attention_mask"] == 0)] = -100
    first = left["attention_mask"].argmax(1)
    labels[torch.arange(len(labels)), first] = -100
    model.zero_grad()
    theirs = model(**left, labels=labels).loss
    theirs.backward()

    def nll(p):
        hidden = forward(p, cfg, right)
        response = (right["tokens"] != IMAGE) & (right["segment"] > 0)
        targets, mask = shift(right["tokens"], response, right["segment"])
        lp = token_log_probs(hidden, transformer.head(p["text"], cfg.text), targets)
        return -jnp.where(mask, lp, 0).sum() / mask.sum()

    ours, grads = jax.jit(jax.value_and_grad(nll))(params)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    torch_grads = {names.canonical(n): p.grad.numpy() for n, p in model.named_parameters()}
    for line in hf.table(cfg):
        for i, name in enumerate(line.names):
            mine = np.asarray(names.pick(grads, line.path, i if line.stacked else None))
            their = line.to_ours(torch_grads.pop(name))
            assert relative(mine, their) < 1e-3, name
    assert not torch_grads


# Files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_export_loads_in_transformers_with_the_same_logits(tied, left, right, rows, tmp_path):
    model = torch_model(tied)
    model.save_pretrained(tmp_path / "torch")
    cfg = hf.read_config(tmp_path / "torch")
    assert cfg.text.tied == tied
    params = hf.load(tmp_path / "torch", cfg)
    hf.save(tmp_path / "ours", params, cfg, max_shard_bytes=50_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again, info = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        tmp_path / "ours",
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(info.values()), info
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name
    with torch.no_grad():
        theirs, before = again(**left).logits, model(**left).logits
    assert torch.equal(theirs, before)
    compare(np.asarray(logits(params, cfg, right)), theirs, rows)


def test_bfloat16_export_loads_in_transformers(params, cfg, tmp_path):
    hf.save(tmp_path / "half", params, cfg, dtype="bfloat16")
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16
    back = hf.load(tmp_path / "half", cfg)
    theirs = model.model.language_model.norm.weight.detach().float().numpy()
    np.testing.assert_array_equal(back["text"]["norm"], theirs)


@pytest.mark.parametrize("spelling", ["hub", "memory"])
def test_both_key_spellings_load(model, params, cfg, spelling, tmp_path):
    from safetensors.torch import save_file

    state = {n: p.contiguous() for n, p in model.state_dict().items() if n != "lm_head.weight"}
    assert (
        "model.visual.merger.ln_q.weight" in state and "model.language_model.norm.weight" in state
    )
    if spelling == "hub":
        state = {
            n.replace("model.visual.", "visual.").replace("model.language_model.", "model."): p
            for n, p in state.items()
        }
    save_file(state, tmp_path / hf.SINGLE)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path, cfg), params)


def test_configs_of_transformers_are_read(folder, cfg):
    written = json.loads((folder / "config.json").read_text())
    assert "text_config" in written
    again = transformers.Qwen2VLConfig(**qwen2_vl.to_hf(cfg)).to_dict()
    assert qwen2_vl.Qwen2VLConfig.from_hf(again) == cfg
    again, written = again["text_config"], written["text_config"]
    for name in ("hidden_size", "num_key_value_heads", "vocab_size", "rms_norm_eps"):
        assert again[name] == written[name]
    for name in ("mrope_section", "rope_theta", "rope_type"):
        assert again["rope_parameters"][name] == written["rope_parameters"][name]
