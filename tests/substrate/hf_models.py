"""Helper: two small models for the tests of files, with random parameters."""

import dataclasses

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxrepro.models import hf, qwen2_vl, transformer
from jaxrepro.models.qwen2_vl import Qwen2VLConfig
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.models.vision_tower import VisionConfig

CFG = Qwen2VLConfig(
    TransformerConfig(
        vocab=40, d=16, layers=2, heads=2, kv=1, head_dim=8, ffn=24, mrope_sections=(2, 1, 1)
    ),
    VisionConfig(depth=2, embed=16, heads=2, mlp=32, out=16, patch=2),
    image_pad=30,
    video_pad=31,
    vision_start=32,
    vision_end=33,
    eos=1,
    pad=0,
)
UNTIED = dataclasses.replace(CFG, text=dataclasses.replace(CFG.text, tied=False))


def random_params(cfg, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), qwen2_vl.abstract(cfg))


DECODER = TransformerConfig(
    vocab=40, d=16, layers=2, heads=2, kv=1, head_dim=6, ffn=24, qk_norm=True, o_bias=True,
    tied=False, family="qwen3",
)  # fmt: skip


def random_decoder():
    rng = np.random.default_rng(1)
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
    return jax.tree.map(draw, transformer.abstract(DECODER))


def edit(folder, tmp_path, change):
    """A copy of a one-file model after `change(tensors)`."""
    tensors = load_file(folder / hf.SINGLE)
    change(tensors)
    out = tmp_path / "edited"
    out.mkdir()
    save_file(tensors, out / hf.SINGLE)
    return out
