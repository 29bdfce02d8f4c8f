"""Qwen2-VL (arXiv:2409.12191): a vision tower whose features take the place of image tokens of a decoder.

    embed      the j-th image_pad token of a row is replaced by the j-th merged feature of that row
    positions  three streams (time, row, column): text counts in all three; an image block stays at one
               time and walks rows and columns of the merged grid; text resumes at the maximum + 1

Parameters are {"text": models/transformer.py, "vision": models/vision_tower.py}. A decoder call is

    x = embed(params, cfg, tokens, vision)
    hidden, _ = transformer.apply(params["text"], cfg.text, x, position=position)

Departure: images only. The clock of video frames, and windows of attention, are refused, not ignored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxrepro.config import UserError
from jaxrepro.models import families, transformer, values, vision_tower
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.models.vision_tower import Vision, VisionConfig


@dataclass(frozen=True)
class Qwen2VLConfig:
    """Decoder, tower and special ids; the ids default to those of the released vocabulary."""

    text: TransformerConfig
    vision: VisionConfig = field(default_factory=VisionConfig)
    image_pad: int = 151655
    video_pad: int = 151656
    vision_start: int = 151652
    vision_end: int = 151653
    eos: int = 151645
    pad: int = 151643

    def __post_init__(self):
        t = self.text
        sections = t.mrope_sections
        if sections is None or len(sections) != 3 or sum(sections) != t.head_dim // 2:
            raise UserError(
                f"mrope_sections are {sections}; three numbers must sum to head_dim / 2 = {t.head_dim // 2}"
            )
        if self.vision.out != t.d:
            raise UserError(
                f"vision out is {self.vision.out}; it must equal the text width d = {t.d}"
            )
        for name in ("image_pad", "video_pad", "vision_start", "vision_end", "eos", "pad"):
            if not 0 <= getattr(self, name) < t.vocab:
                raise UserError(
                    f"{name} is {getattr(self, name)}; ids must lie in [0, vocab = {t.vocab})"
                )

    @staticmethod
    def from_hf(config: dict[str, Any], **overrides: Any) -> "Qwen2VLConfig":
        """Configuration from a config.json of either spelling: flat (hub) or with a `text_config`.

        `overrides` (dtype, remat) go to both parts. UserError for what this model cannot run.
        """
        return _from_hf(config, overrides)


def declare(cfg: Qwen2VLConfig) -> dict[str, Any]:
    """Tree of `Param` of the decoder and the tower."""
    return {"text": transformer.declare(cfg.text), "vision": vision_tower.declare(cfg.vision)}


def init(key: PRNGKeyArray, cfg: Qwen2VLConfig) -> dict[str, Any]:
    """Random float32 parameters with stacked layers."""
    return transformer.initialise(key, declare(cfg))


def abstract(cfg: Qwen2VLConfig) -> dict[str, Any]:
    """The tree of ShapeDtypeStruct that `init` returns; allocates nothing."""
    return transformer.shapes(declare(cfg))


def axes(cfg: Qwen2VLConfig) -> dict[str, Any]:
    """The tree of tuples of logical axis names, one name per dimension."""
    return jax.tree.map(lambda p: p.axes, declare(cfg))


def count(cfg: Qwen2VLConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(declare(cfg)))


def trainable(params: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """Tree of bool, True where a tensor belongs to one of `parts`: "lm", "merger", "vision" (the blocks)."""
    unknown = set(parts) - {"lm", "merger", "vision"}
    if unknown:
        raise UserError(f"unknown parts {sorted(unknown)}; choose from lm, merger, vision")

    def fill(tree, part):
        return jax.tree.map(lambda _: part in parts, tree)

    vision = {
        k: fill(v, "merger" if k == "merger" else "vision") for k, v in params["vision"].items()
    }
    return {"text": fill(params["text"], "lm"), "vision": vision}


def embed(
    params: dict[str, Any], cfg: Qwen2VLConfig, tokens: Int[Array, "b t"], vision: Vision | None
) -> Float[Array, "b t d"]:
    """Token embeddings with the image features in their places; `check` the counts on the host first."""
    x = transformer.embed(params["text"], cfg.text, tokens)
    if vision is None:
        return x
    features = vision_tower.apply(params["vision"], cfg.vision, vision)  # (b, q, d)
    image = tokens == cfg.image_pad
    j = jnp.clip(jnp.cumsum(image, axis=1) - 1, min=0, max=features.shape[1] - 1)
    picked = jnp.take_along_axis(features, j[:, :, None], axis=1)
    return jnp.where(image[:, :, None], picked.astype(x.dtype), x)


def check(tokens: np.ndarray, grids: Sequence[Sequence[int]], cfg: Qwen2VLConfig) -> None:
    """UserError unless all ids of a row are in the vocabulary and its image_pad count fits its grids."""
    tokens = np.asarray(tokens)
    bad = tokens[(tokens < 0) | (tokens >= cfg.text.vocab)]
    if bad.size:
        raise UserError(f"token id {bad[0]} is outside the vocabulary [0, {cfg.text.vocab})")
    if (tokens == cfg.video_pad).any():
        raise UserError(
            f"token id {cfg.video_pad} stands for video, which this model does not read"
        )
    merge = cfg.vision.merge
    for grid in grids:
        if len(grid) != 3 or min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            raise UserError(
                f"grid {tuple(grid)} must be (t, h, w) in patches, h and w multiples of merge = {merge}"
            )
    pads = int((tokens == cfg.image_pad).sum())
    features = sum(t * h * w for t, h, w in grids) // merge**2
    if pads != features:
        raise UserError(
            f"the row has {pads} image_pad tokens but its {len(grids)} images give {features} features; "
            "expand each image to t * h * w / merge^2 tokens and do not truncate"
        )


def positions(
    tokens: np.ndarray, grids: Sequence[Sequence[int]], cfg: Qwen2VLConfig
) -> tuple[np.ndarray, int]:
    """The three position streams (3, t) int32 of one unpadded row, and the position of its next token.

    Host only; calls `check`. Two images may follow each other without text between them.
    """
    check(tokens, grids, cfg)
    tokens, merge = np.asarray(tokens), cfg.vision.merge
    out = np.zeros((3, len(tokens)), np.int32)
    at, here, queue = 0, 0, iter(grids)
    while at < len(tokens):
        if tokens[at] != cfg.image_pad:
            out[:, at] = here
            at, here = at + 1, here + 1
            continue
        t, h, w = next(queue)
        block = np.indices((t, h // merge, w // merge)).reshape(3, -1)
        size = block.shape[1]
        if not (tokens[at : at + size] == cfg.image_pad).all():
            raise UserError(
                f"an image of {size} tokens is interrupted at token {at}: its image_pad tokens must be "
                "consecutive, in the order of the grids"
            )
        out[:, at : at + size] = here + block
        at, here = at + size, here + int(block.max()) + 1
    return out, here


def qwen2_vl_2b(**overrides: Any) -> Qwen2VLConfig:
    """Qwen2-VL-2B: 2,208,985,600 parameters, tied head. `overrides`: dtype, remat of both parts."""
    return _preset(dict(d=1536, ffn=8960, heads=12, kv=2, vocab=151_936, tied=True), overrides)


def qwen2_vl_7b(**overrides: Any) -> Qwen2VLConfig:
    """Qwen2-VL-7B: 8,291,375,616 parameters. `overrides`: dtype, remat of both parts."""
    return _preset(dict(d=3584, ffn=18_944, heads=28, kv=4, vocab=152_064, tied=False), overrides)


def _preset(sizes: dict[str, Any], overrides: dict[str, Any]) -> Qwen2VLConfig:
    text = TransformerConfig(
        layers=28, head_dim=128, mrope_sections=(16, 24, 24), **sizes, **overrides
    )
    return Qwen2VLConfig(text=text, vision=VisionConfig(out=text.d, **overrides))


def _from_hf(config: dict[str, Any], overrides: dict[str, Any]) -> Qwen2VLConfig:
    if config.get("model_type") != families.VISION:
        found = config.get("model_type")
        raise UserError(f"model_type is {found!r:.60}; this reader knows {families.VISION!r}")
    text, vision = families.text_of(config), values.mapping(config, "vision_config")
    if values.flag(text, "use_sliding_window"):
        raise UserError("config.json: use_sliding_window is true; only full attention is supported")
    if (act := vision.get("hidden_act", "quick_gelu")) != "quick_gelu":
        raise UserError(f"vision hidden_act {act!r:.60} is not supported: quick_gelu")
    decoder = TransformerConfig.from_hf(config, **overrides)
    width, ratio = values.size(vision, "embed_dim", 1280), values.number(vision, "mlp_ratio", 4)
    mlp = int(width * ratio)
    if not 1 <= mlp <= values.LONGEST:
        limits = f"a number that makes 1 to {values.LONGEST} of embed_dim {width}"
        raise values.wrong("mlp_ratio", ratio, limits)
    eos = (values.tokens(text, "eos_token_id") or [151645])[0]
    pad = values.size(text, "bos_token_id", eos, least=0)
    return Qwen2VLConfig(
        text=decoder,
        vision=VisionConfig(
            depth=values.size(vision, "depth", 32, most=values.DEEPEST),
            embed=width,
            heads=values.size(vision, "num_heads", 16),
            mlp=mlp,
            out=values.size(vision, "hidden_size", decoder.d),
            patch=_square(vision, "patch_size", 14),
            temporal=_square(vision, "temporal_patch_size", 2),
            merge=values.size(vision, "spatial_merge_size", 2),
            channels=values.size(vision, "in_channels", values.size(vision, "in_chans", 3)),
            **overrides,
        ),
        image_pad=values.size(config, "image_token_id", 151655, least=0),
        video_pad=values.size(config, "video_token_id", 151656, least=0),
        vision_start=values.size(config, "vision_start_token_id", 151652, least=0),
        vision_end=values.size(config, "vision_end_token_id", 151653, least=0),
        eos=eos,
        pad=values.size(text, "pad_token_id", pad, least=0),
    )


def _square(vision: Mapping[str, Any], name: str, default: int) -> int:
    """A size that may be spelled as one number or as a list of equal ones."""
    if not isinstance(vision.get(name), list | tuple):
        return values.size(vision, name, default)
    sizes = [values.size({name: one}, name, 0) for one in vision[name]]
    if len(set(sizes)) != 1:
        raise values.wrong(name, sizes, "an integer, or a list of equal ones")
    return sizes[0]


def to_hf(cfg: Qwen2VLConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of the hub (flat spelling), which every version of transformers reads."""
    t, v = cfg.text, cfg.vision
    if t.head_dim * t.heads != t.d:
        raise UserError(
            f"head_dim {t.head_dim} * heads {t.heads} must equal d = {t.d} in this family"
        )
    if not t.qkv_bias:
        raise UserError("qkv_bias is False; this family has biases on q, k and v")
    if v.mlp % v.embed:
        raise UserError(f"vision mlp {v.mlp} must be a multiple of embed {v.embed} in this family")
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "torch_dtype": dtype,
        "vocab_size": t.vocab,
        "hidden_size": t.d,
        "intermediate_size": t.ffn,
        "num_hidden_layers": t.layers,
        "num_attention_heads": t.heads,
        "num_key_value_heads": t.kv,
        "hidden_act": "silu",
        "max_position_embeddings": t.max_positions,
        "rms_norm_eps": t.eps,
        "rope_theta": t.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(t.mrope_sections)},
        "tie_word_embeddings": t.tied,
        "use_sliding_window": False,
        "bos_token_id": cfg.pad,  # as on the hub; a pad_token_id here would freeze its row in torch
        "eos_token_id": cfg.eos,
        "image_token_id": cfg.image_pad,
        "video_token_id": cfg.video_pad,
        "vision_start_token_id": cfg.vision_start,
        "vision_end_token_id": cfg.vision_end,
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": v.depth,
            "embed_dim": v.embed,
            "num_heads": v.heads,
            "mlp_ratio": v.mlp // v.embed,
            "hidden_size": v.out,
            "in_channels": v.channels,
            "in_chans": v.channels,
            "patch_size": v.patch,
            "spatial_patch_size": v.patch,
            "temporal_patch_size": v.temporal,
            "spatial_merge_size": v.merge,
        },
    }
