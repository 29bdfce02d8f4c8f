"""The vision tower and Qwen2-VL: sizes, independence of images and padding, position streams, checks."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.data.images import collate
from jaxrepro.models import qwen2_vl, transformer, vision_tower
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.models.vision_tower import VisionConfig, grid_positions

IMAGE, START, END = 90, 91, 92
TEXT = TransformerConfig(
    vocab=96, d=32, layers=3, heads=4, kv=2, head_dim=8, ffn=48, mrope_sections=(2, 1, 1)
)
VISION = VisionConfig(depth=2, embed=32, heads=4, mlp=64, out=32, patch=2)
CFG = qwen2_vl.Qwen2VLConfig(
    TEXT, VISION, image_pad=IMAGE, video_pad=93, vision_start=START, vision_end=END, eos=1, pad=0
)
NAN = float("nan")
SMALL, WIDE = (1, 4, 4), (1, 2, 6)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)  # numpy: compiling a sampler per tensor costs seconds

    def draw(leaf):
        return jax.numpy.asarray(rng.normal(size=leaf.shape, scale=0.2), leaf.dtype)

    return jax.tree.map(draw, qwen2_vl.abstract(CFG))


@pytest.fixture(scope="module")
def tower(params):
    run = jax.jit(lambda p, vision: vision_tower.apply(p, VISION, vision))
    return lambda vision: np.asarray(run(params["vision"], vision))


def picture(seed, grid):
    t, h, w = grid
    rng = np.random.default_rng(seed)
    return rng.normal(size=(t * h * w, VISION.columns)).astype(np.float32), grid


def batch(*rows, size=32):
    return jax.tree.map(jax.numpy.asarray, collate(rows, columns=VISION.columns, size=size))


@pytest.mark.parametrize(
    ("preset", "total", "vision"),
    [
        (qwen2_vl.qwen2_vl_2b, 2_208_985_600, 665_271_296),
        (qwen2_vl.qwen2_vl_7b, 8_291_375_616, 675_759_104),
    ],
)
def test_full_size_parameter_counts(preset, total, vision):
    cfg = preset(dtype="bfloat16", remat="full")
    tree = jax.eval_shape(lambda key: qwen2_vl.init(key, cfg), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == qwen2_vl.count(cfg) == total
    assert sum(leaf.size for leaf in jax.tree.leaves(tree["vision"])) == vision
    assert jax.tree.structure(tree) == jax.tree.structure(qwen2_vl.abstract(cfg))


def test_full_size_traces_in_bfloat16_with_remat():
    cfg = qwen2_vl.qwen2_vl_2b(dtype="bfloat16", remat="full")
    patches = jax.ShapeDtypeStruct((2, 1536, cfg.vision.columns), np.float32)
    index = [jax.ShapeDtypeStruct((2, 1536, *tail), np.int32) for tail in ((2,), ())]
    tokens = jax.ShapeDtypeStruct((2, 512), np.int32)
    x = jax.eval_shape(
        lambda p, t, *v: qwen2_vl.embed(p, cfg, t, vision_tower.Vision(*v)),
        qwen2_vl.abstract(cfg),
        tokens,
        patches,
        *index,
    )
    assert x.shape == (2, 512, 1536) and x.dtype == jax.numpy.bfloat16


def test_every_tensor_has_one_axis_name_per_dimension():
    named = qwen2_vl.axes(CFG)
    ranks = jax.tree.map(lambda leaf: leaf.ndim, qwen2_vl.abstract(CFG))
    leaves = jax.tree.leaves(named, is_leaf=lambda a: isinstance(a, tuple))
    assert [len(a) for a in leaves] == jax.tree.leaves(ranks)


def test_patch_positions_are_in_block_order():
    expected = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert grid_positions((1, 2, 4), 2).tolist() == [list(p) for p in expected]
    assert grid_positions((2, 2, 4), 2).tolist() == [list(p) for p in expected] * 2


def test_permuting_two_images_permutes_their_features(tower):
    a, b = picture(1, SMALL), picture(2, WIDE)
    ab, ba = tower(batch([a, b])), tower(batch([b, a]))
    np.testing.assert_allclose(ab[0, :4], ba[0, 3:7], atol=1e-5)
    np.testing.assert_allclose(ab[0, 4:7], ba[0, :3], atol=1e-5)


def test_an_image_does_not_see_the_other_image_of_its_row(tower):
    a, b = picture(1, SMALL), picture(2, WIDE)
    other = (b[0] + 1, b[1])
    before, after = tower(batch([a, b])), tower(batch([a, other]))
    np.testing.assert_array_equal(before[0, :4], after[0, :4])
    assert np.abs(before[0, 4:7] - after[0, 4:7]).max() > 1e-3


def test_a_frame_does_not_see_the_other_frame_of_its_image(tower):
    patches, grid = picture(3, (2, 2, 4))
    changed = patches.copy()
    changed[8:] += 1
    before, after = tower(batch([(patches, grid)])), tower(batch([(changed, grid)]))
    np.testing.assert_array_equal(before[0, :2], after[0, :2])


def test_features_do_not_depend_on_padding_or_batch_mates(tower):
    a, b = picture(1, SMALL), picture(2, WIDE)
    alone = tower(batch([a], size=16))
    together = tower(batch([b, b], [a], []))
    np.testing.assert_allclose(alone[0, :4], together[1, :4], atol=1e-5)
    assert np.isfinite(together).all()


def test_remat_changes_no_gradient(params):
    vision = batch([picture(1, SMALL)], size=16)

    @jax.jit
    def grads(p):
        def grad(cfg):
            return jax.grad(lambda p: (vision_tower.apply(p, cfg, vision)[0, :4] ** 2).sum())(p)

        return grad(VISION), grad(dataclasses.replace(VISION, remat="full"))

    plain, again = grads(params["vision"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), plain, again)


def row(*parts):
    """Tokens of a row: an int is that many text tokens, a grid is an image between its markers."""
    out = []
    for part in parts:
        if isinstance(part, int):
            out += range(10, 10 + part)
        else:
            out += [START, *[IMAGE] * (part[0] * part[1] * part[2] // 4), END]
    return np.array(out, np.int32)


def test_image_tokens_take_the_features_of_their_own_row_in_order(params, tower):
    a, b = picture(1, SMALL), picture(2, WIDE)
    vision = batch([a, b], [], [b])
    rows = [row(2, SMALL, 1, WIDE, 2), row(9), row(WIDE, 3)]
    tokens = np.zeros((3, 16), np.int32)
    for i, r in enumerate(rows):
        tokens[i, : len(r)] = r
    run = jax.jit(lambda p, tokens, vision: qwen2_vl.embed(p, CFG, tokens, vision))
    x = np.asarray(run(params, jax.numpy.asarray(tokens), vision))
    features = tower(vision)
    np.testing.assert_allclose(x[0][tokens[0] == IMAGE], features[0, :7], atol=1e-6)
    np.testing.assert_allclose(x[2][tokens[2] == IMAGE], features[2, :3], atol=1e-6)
    text = tokens != IMAGE
    np.testing.assert_array_equal(x[text], params["text"]["embed"][tokens[text]])
    plain = qwen2_vl.embed(params, CFG, jax.numpy.asarray(tokens), None)
    np.testing.assert_array_equal(plain[1], x[1])


def test_positions_of_text_count_in_all_three_streams():
    position, following = qwen2_vl.positions(row(4), [], CFG)
    assert position.tolist() == [[0, 1, 2, 3]] * 3 and following == 4


def test_positions_walk_the_merged_grid_and_text_resumes_after_the_maximum():
    # text 0 1, start 2, a 2 x 2 image at 3, end and text from 3 + 2, a 1 x 3 image at 8, end at 8 + 3
    position, following = qwen2_vl.positions(row(2, SMALL, 1, WIDE), [SMALL, WIDE], CFG)
    assert position[0].tolist() == [0, 1, 2, 3, 3, 3, 3, 5, 6, 7, 8, 8, 8, 11]
    assert position[1].tolist() == [0, 1, 2, 3, 3, 4, 4, 5, 6, 7, 8, 8, 8, 11]
    assert position[2].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert following == 12


def test_positions_of_two_images_without_text_between_them():
    tokens = np.array([IMAGE] * 7, np.int32)
    position, following = qwen2_vl.positions(tokens, [SMALL, WIDE], CFG)
    assert position.tolist() == [
        [0, 0, 0, 0, 2, 2, 2],
        [0, 0, 1, 1, 2, 2, 2],
        [0, 1, 0, 1, 2, 3, 4],
    ]
    assert following == 5


def test_equal_streams_are_ordinary_rotary_positions():
    one = np.arange(6)[None]
    plain = transformer.rope_angles(
        dataclasses.replace(TEXT, mrope_sections=None), jax.numpy.asarray(one)
    )
    three = transformer.rope_angles(
        TEXT, jax.numpy.asarray(np.broadcast_to(one[:, None], (1, 3, 6)))
    )
    jax.tree.map(np.testing.assert_array_equal, plain, three)


def test_wrong_counts_and_ids_are_errors_that_name_both_numbers():
    with pytest.raises(ValueError, match="4 image_pad tokens but its 1 images give 3 features"):
        qwen2_vl.check(row(2, SMALL), [WIDE], CFG)
    with pytest.raises(UserError, match="7 image_pad tokens but its 1 images give 4"):
        qwen2_vl.positions(row(SMALL, WIDE), [SMALL], CFG)
    with pytest.raises(UserError, match="token id 96 is outside the vocabulary"):
        qwen2_vl.check(np.array([1, 96]), [], CFG)
    with pytest.raises(UserError, match="token id -1"):
        qwen2_vl.check(np.array([-1]), [], CFG)
    with pytest.raises(UserError, match="video"):
        qwen2_vl.check(np.array([93]), [], CFG)
    with pytest.raises(UserError, match="multiples of merge"):
        qwen2_vl.check(np.array([1]), [(1, 3, 4)], CFG)
    broken = np.array([IMAGE, IMAGE, 5, IMAGE, IMAGE])
    with pytest.raises(UserError, match="interrupted at token 0"):
        qwen2_vl.positions(broken, [SMALL], CFG)


def test_sections_must_sum_to_half_of_the_head():
    with pytest.raises(UserError, match="head_dim / 2"):
        dataclasses.replace(TEXT, mrope_sections=(2, 2, 1))
    with pytest.raises(UserError, match="three numbers must sum to head_dim / 2 = 4"):
        dataclasses.replace(CFG, text=dataclasses.replace(TEXT, mrope_sections=None))
    with pytest.raises(UserError, match="divisible by 4"):
        dataclasses.replace(VISION, heads=16)
    with pytest.raises(UserError, match="text width"):
        dataclasses.replace(CFG, vision=dataclasses.replace(VISION, out=16))
    with pytest.raises(UserError, match="image_pad is 151655"):
        dataclasses.replace(CFG, image_pad=151655)


def test_trainable_marks_the_parts():
    tree = qwen2_vl.trainable(qwen2_vl.abstract(CFG), ("lm", "merger"))
    assert all(jax.tree.leaves(tree["text"])) and all(jax.tree.leaves(tree["vision"]["merger"]))
    assert not any(jax.tree.leaves([tree["vision"]["layers"], tree["vision"]["patch"]]))
    with pytest.raises(UserError, match="unknown parts"):
        qwen2_vl.trainable(qwen2_vl.abstract(CFG), ("head",))


@pytest.mark.parametrize("spelling", ["flat", "text_config", "rope_parameters"])
def test_both_spellings_of_config_json_give_the_same_config(spelling):
    flat = qwen2_vl.to_hf(CFG)
    if spelling != "flat":
        outer = ("model_type", "vision_config", "image_token_id", "video_token_id")
        outer += ("vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")
        text = {k: v for k, v in flat.items() if k not in outer} | {"model_type": "qwen2_vl_text"}
        flat = {k: v for k, v in flat.items() if k in outer} | {"text_config": text}
    if spelling == "rope_parameters":
        rope = text.pop("rope_scaling")
        rope = {"rope_type": "default", "mrope_section": rope["mrope_section"]}
        text["rope_parameters"] = rope | {"rope_theta": text.pop("rope_theta")}
    assert qwen2_vl.Qwen2VLConfig.from_hf(flat) == CFG


def test_presets_equal_the_published_config():
    published = {
        "model_type": "qwen2_vl",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
    }
    assert qwen2_vl.Qwen2VLConfig.from_hf(published) == qwen2_vl.qwen2_vl_2b()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"vision_config": 3}, "vision_config is 3; it must be an object"),
        ({"vision_config": {"num_heads": 0}}, "num_heads is 0; it must be an integer from 1"),
        ({"vision_config": {"num_heads": "3"}}, "num_heads is '3'"),
        ({"vision_config": {"num_heads": 3}}, "3 heads must give a head size divisible by 4"),
        ({"vision_config": {"embed_dim": {}}}, "embed_dim is {}"),
        ({"vision_config": {"mlp_ratio": 0}}, "mlp_ratio is 0; it must be a number"),
        ({"vision_config": {"mlp_ratio": 1e-9}}, "mlp_ratio is 1e-09; .* of embed_dim"),
        ({"vision_config": {"mlp_ratio": 1e9}}, "mlp_ratio is 1000000000.0; .* of embed_dim"),
        ({"vision_config": {"mlp_ratio": NAN}}, "mlp_ratio is nan"),
        ({"vision_config": {"patch_size": NAN}}, "patch_size is nan"),
        ({"vision_config": {"patch_size": -1}}, "patch_size is -1"),
        ({"vision_config": {"patch_size": [14, 16]}}, r"patch_size is \[14, 16\]; .* equal ones"),
        ({"vision_config": {"patch_size": []}}, "patch_size is"),
        ({"vision_config": {"patch_size": [[14]]}}, r"patch_size is \[14\]"),
        ({"vision_config": {"temporal_patch_size": 1.5}}, "temporal_patch_size is 1.5"),
        ({"vision_config": {"spatial_merge_size": True}}, "spatial_merge_size is True"),
        ({"vision_config": {"in_channels": "3"}}, "in_channels is '3'"),
        ({"vision_config": {"depth": "3"}}, "depth is '3'"),
        ({"vision_config": {"depth": -1}}, "depth is -1"),
        ({"vision_config": {"depth": 1.5}}, "depth is 1.5"),
        ({"vision_config": {"depth": NAN}}, "depth is nan"),
        ({"vision_config": {"depth": 2 * 10**9}}, "depth is 2000000000; .* to 65536"),
        ({"vision_config": {"hidden_act": ["gelu"]}}, "vision hidden_act"),
        ({"image_token_id": "3"}, "image_token_id is '3'"),
        ({"image_token_id": 1.5}, "image_token_id is 1.5"),
        ({"image_token_id": None}, "image_pad is 151655; ids must lie in"),
        ({"pad_token_id": []}, r"pad_token_id is \[\]"),
        ({"eos_token_id": ["a"]}, "eos_token_id is .*; it must be a token id"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ({"text_config": 3}, "text_config is 3"),
    ],
)
def test_configs_that_cannot_run_are_refused(change, message):
    config = qwen2_vl.to_hf(CFG)
    tower = change.get("vision_config", {})
    if isinstance(tower, dict):
        change = change | {"vision_config": config["vision_config"] | tower}
    config |= change
    with pytest.raises(UserError, match=message) as error:
        qwen2_vl.Qwen2VLConfig.from_hf(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["depth", "embed", "heads", "mlp", "out", "patch", "merge"])
def test_a_tower_without_a_size_is_refused(name):
    with pytest.raises(UserError, match=f"vision {name} is 0; it must be at least 1"):
        dataclasses.replace(CFG.vision, **{name: 0})


TOWER = (
    "depth",
    "embed_dim",
    "num_heads",
    "mlp_ratio",
    "hidden_size",
    "patch_size",
    "temporal_patch_size",
)
TOWER += ("spatial_merge_size", "in_channels", "in_chans", "hidden_act")
ROOT = ("image_token_id", "video_token_id", "vision_start_token_id", "eos_token_id", "pad_token_id")
ROOT += (
    "bos_token_id",
    "rope_scaling",
    "tie_word_embeddings",
    "use_sliding_window",
    "vision_config",
)
ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
ODD |= st.lists(ODD, max_size=3) | st.dictionaries(st.sampled_from(TOWER), ODD, max_size=2)


@given(
    tower=st.dictionaries(st.sampled_from(TOWER), ODD, max_size=2),
    root=st.dictionaries(st.sampled_from(ROOT), ODD, max_size=2),
)
@settings(deadline=None, max_examples=200)
def test_any_json_in_a_config_is_a_config_or_one_line(tower, root):
    config = qwen2_vl.to_hf(CFG)
    config["vision_config"] |= tower
    try:
        cfg = qwen2_vl.Qwen2VLConfig.from_hf(config | root)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert qwen2_vl.count(cfg) > 0
