"""Checkpoints of the video transformers: written, read, and every tensor accounted for."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.models import video_dit, video_files

KINDS = {
    "hunyuan": replace(video_dit.PRESETS["hunyuan_tiny"], frequencies=256),
    "wan": video_dit.PRESETS["wan_tiny"],
}
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    """Config, parameters and a folder that holds them."""
    cfg = KINDS[request.param]
    rng = np.random.default_rng(0)
    draw = lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32)
    params = jax.tree.map(draw, video_dit.abstract(cfg))
    folder = tmp_path_factory.mktemp(request.param) / "model"
    video_files.save(folder, params, cfg)
    return cfg, params, folder


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def copy(folder, tmp_path, change):
    """A copy of a model whose tensors `change` edits."""
    found = load_file(folder / FILE)
    change(found)
    save_file(found, tmp_path / FILE)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


def test_a_saved_model_is_read_back(model):
    cfg, params, folder = model
    assert video_files.read_config(folder) == cfg
    same(video_files.load(folder, cfg), params)
    assert sum(x.size for x in load_file(folder / FILE).values()) == video_dit.count(cfg)


def test_shards_and_the_pipelines_folder_are_read(model, tmp_path):
    cfg, params, _ = model
    video_files.save(tmp_path / "transformer", params, cfg, max_shard_bytes=50_000)
    assert len(list((tmp_path / "transformer").glob("diffusion_pytorch_model-*"))) > 1
    assert video_files.read_config(tmp_path, dtype="bfloat16").dtype == "bfloat16"
    half = video_files.load(tmp_path, cfg, dtype="bfloat16")
    same(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_each_device_reads_its_part(model):
    cfg, params, folder = model
    mesh = sharding.make_mesh((1, 4, 1, 2))
    shardings = sharding.shard_tree(video_dit.axes(cfg), params, mesh)
    placed = video_files.load(folder, cfg, shardings=shardings)
    same(placed, params)
    assert placed["out"]["kernel"].sharding == shardings["out"]["kernel"]
    assert placed["out"]["kernel"].addressable_shards[0].data.shape[0] == cfg.d // 4


def test_all_that_is_wrong_with_a_file_is_one_error(model, tmp_path):
    cfg, _, folder = model

    def change(found):
        del found["proj_out.bias"]
        found["proj_out.weight"] = found["proj_out.weight"][:, :-1].copy()
        found["image_embedder.weight"] = np.zeros(2, np.float32)

    with pytest.raises(UserError) as error:
        video_files.load(copy(folder, tmp_path, change), cfg)
    text = str(error.value)
    assert "1 missing: proj_out.bias" in text
    assert "1 unexpected: image_embedder.weight" in text
    assert "1 wrong shape: proj_out.weight is (16, 31), expected (16, 32)" in text
    assert "\n" not in text


def test_a_model_of_another_depth_is_refused(model):
    cfg, _, folder = model
    deeper = {"single": 3} if "hunyuan" in str(type(cfg)).lower() else {"layers": 3}
    with pytest.raises(UserError, match="missing: "):
        video_files.load(folder, replace(cfg, **deeper))
    deepest = {key: 50_000 for key in deeper}
    with pytest.raises(UserError, match="blocks, but there are"):
        video_files.load(folder, replace(cfg, **deepest))


def test_a_pickle_and_an_empty_folder_are_refused(model, tmp_path):
    cfg = model[0]
    with pytest.raises(UserError, match=r"has neither diffusion_pytorch_model\.safetensors nor"):
        video_files.load(tmp_path, cfg)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(UserError, match="is a pickle"):
        video_files.load(tmp_path, cfg)


def test_a_folder_with_content_is_not_overwritten(model, tmp_path):
    cfg, params, _ = model
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="exists: choose a new folder"):
        video_files.save(tmp_path, params, cfg)
    with pytest.raises(UserError, match="1 missing from the tree: patch/bias"):
        short = params | {"patch": {"kernel": params["patch"]["kernel"]}}
        video_files.save(tmp_path / "new", short, cfg)
    assert not (tmp_path / "new").exists()


# The fields of the released transformers. Wan 2.1: get_transformer_config of diffusers'
# scripts/convert_wan_to_diffusers.py, with which those folders were made. HunyuanVideo: arXiv:2412.03603, and
# HYVideo-T/2-cfgdistill in hyvideo/modules/models.py of its own repository, by the names of diffusers.
WAN_14B = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 40,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
HUNYUAN = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 16,
    "mlp_ratio": 4.0,
    "num_attention_heads": 24,
    "num_layers": 20,
    "num_refiner_layers": 2,
    "num_single_layers": 40,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 1,
    "pooled_projection_dim": 768,
    "qk_norm": "rms_norm",
    "rope_axes_dim": [16, 56, 56],
    "rope_theta": 256.0,
    "text_embed_dim": 4096,
}
RELEASED = {  # and their numbers of parameters
    "wan_14b": (WAN_14B, 14_288_491_584),
    "wan_1_3b": (
        WAN_14B | {"ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30},
        1_418_996_800,
    ),
    "hunyuan": (HUNYUAN, 12_821_012_544),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_configs_are_the_presets(name):
    said, parameters = RELEASED[name]
    cfg = video_files.from_diffusers(said)
    assert cfg == video_dit.PRESETS[name] and video_dit.count(cfg) == parameters
    written = video_files.to_diffusers(cfg)
    assert {key: written[key] for key in said} == said
    numbers = [key for key, value in said.items() if type(value) in (int, float)]
    for key in set(numbers) - {"attention_head_dim"}:  # whose parts RoPE's are
        assert video_files.from_diffusers(said | {key: 2 * said[key]}) != cfg, key


@pytest.mark.parametrize(
    "kind, change, says",
    [
        ("Wan", {"_class_name": "CogVideoXTransformer3DModel"}, "'CogVideoX.*' is unknown"),
        ("Wan", {"_class_name": ["a"]}, "is unknown"),
        ("Wan", {"image_dim": 1280}, "image_dim is 1280; it must be None"),
        ("Wan", {"cross_attn_norm": False}, "cross_attn_norm is False"),
        ("Wan", {"num_layers": "3"}, "num_layers is '3'"),
        ("Wan", {"num_layers": 10**9}, "num_layers is 1000000000"),
        ("Wan", {"patch_size": [1, 2]}, "patch_size is .* three positive integers"),
        ("Wan", {"window_kind": "odd"}, "window_kind is not known of WanTransformer3DModel"),
        (
            "HunyuanVideo",
            {"image_condition_type": "latent_concat"},
            "image_condition_type is 'latent",
        ),
        ("HunyuanVideo", {"rope_axes_dim": [16, 56, 58]}, "whose sum is head_dim, 128"),
        ("HunyuanVideo", {"guidance_embeds": "yes"}, "guidance_embeds is 'yes'"),
    ],
)
def test_a_config_of_another_model_is_refused_in_one_line(kind, change, says):
    said = {"_class_name": f"{kind}Transformer3DModel"} | change
    with pytest.raises(UserError, match=says) as error:
        video_files.from_diffusers(said)
    assert "\n" not in str(error.value)


def test_what_diffusers_cannot_say_is_not_written():
    with pytest.raises(UserError, match="it cannot be written for diffusers"):
        video_files.to_diffusers(video_dit.PRESETS["hunyuan_tiny"])
    with pytest.raises(UserError, match="rope_theta 10000, this model 500"):
        video_files.to_diffusers(replace(KINDS["wan"], rope_theta=500.0))
