"""Checkpoints of the video transformers as diffusers writes them: config.json and safetensors, both ways.

    cfg = read_config(folder);  params = load(folder, cfg, dtype="bfloat16");  save(folder, params, cfg)

A folder is that of the transformer, or the one of the whole pipeline above it. Every tensor of the file is
accounted for: one that is missing, one too many and a wrong shape are an error that lists them all. What a
config.json asks for and these models do not do (image conditions) is refused, never ignored.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrepro.config import UserError
from jaxrepro.files import read_json, write_json
from jaxrepro.models import hf, tensors, values
from jaxrepro.models.hunyuan_video import HunyuanVideoConfig
from jaxrepro.models.names import Line, account, assemble, lines_of
from jaxrepro.models.values import shown, wrong
from jaxrepro.models.video_dit import Config, abstract
from jaxrepro.models.wan import WanConfig

STEM = "diffusion_pytorch_model"
HUNYUAN, WAN = "HunyuanVideoTransformer3DModel", "WanTransformer3DModel"

# Names ------------------------------------------------------------------------------------------------

PLAIN = ("f d -> d f", "f -> f")
OUTER = ("d (h i) -> h i d", "d -> d")
HEADS = ("(h i) d -> d h i", "(h i) -> h i")
PARTS = ("(n e) d -> d n e", "(n e) -> n e")  # a modulation: n vectors of the width
PATCH = ("d c t y x -> (c t y x) d", "d -> d")
TABLE = "o n d -> (o n) d"

Rules = dict[str, tuple[str, str]]


def _linear(path: str, name: str, formulas: tuple[str, str]) -> Rules:
    """Weight and bias of a linear layer."""
    kernel, bias = formulas
    return {f"{path}/kernel": (f"{name}.weight", kernel), f"{path}/bias": (f"{name}.bias", bias)}


def _pair(path: str, first: str, second: str) -> Rules:
    """The two layers of an MLP."""
    return _linear(f"{path}/fc1", first, PLAIN) | _linear(f"{path}/fc2", second, PLAIN)


def _mlp(path: str, name: str) -> Rules:
    return _pair(path, f"{name}.linear_1", f"{name}.linear_2")


def _attention(path: str, name: str, norm: str | None, text: bool = False) -> Rules:
    """Projections and norms of an attention; norm: the formula of its norms' weights."""
    add, plus, out = ("add_{}_proj", "added_", "to_add_out") if text else ("to_{}", "", "to_out.0")
    rules: Rules = {}
    for letter in "qkv":
        rules |= _linear(f"{path}/{letter}", f"{name}.{add.format(letter)}", HEADS)
    for letter in "qk" if norm else "":
        rules[f"{path}/{letter}_norm"] = (f"{name}.norm_{plus}{letter}.weight", norm)
    return rules | _linear(f"{path}/o", f"{name}.{out}", OUTER)


def _layer_norm(path: str, name: str) -> Rules:
    return {
        f"{path}/scale": (f"{name}.weight", "d -> d"),
        f"{path}/bias": (f"{name}.bias", "d -> d"),
    }


def hunyuan_rules() -> Rules:
    """Path in our tree -> (name in the file, file's axes -> ours)."""
    time, text = "time_text_embed", "context_embedder"
    block, refiner = "transformer_blocks.{}", f"{text}.token_refiner.refiner_blocks.{{}}"
    single = "single_transformer_blocks.{}"
    attention = _attention("single", f"{single}.attn", "i -> i")
    return {
        **_linear("patch", "x_embedder.proj", PATCH),
        **_mlp("time", f"{time}.timestep_embedder"),
        **_mlp("pooled", f"{time}.text_embedder"),
        **_mlp("guidance", f"{time}.guidance_embedder"),
        **_mlp("text/time", f"{text}.{time}.timestep_embedder"),
        **_mlp("text/mean", f"{text}.{time}.text_embedder"),
        **_linear("text/proj", f"{text}.proj_in", PLAIN),
        **_layer_norm("text/layers/norm1", f"{refiner}.norm1"),
        **_attention("text/layers", f"{refiner}.attn", None),
        **_layer_norm("text/layers/norm2", f"{refiner}.norm2"),
        **_pair("text/layers", f"{refiner}.ff.net.0.proj", f"{refiner}.ff.net.2"),
        **_linear("text/layers/mod", f"{refiner}.norm_out.linear", PARTS),
        **_linear("double/video/mod", f"{block}.norm1.linear", PARTS),
        **_attention("double/video", f"{block}.attn", "i -> i"),
        **_pair("double/video", f"{block}.ff.net.0.proj", f"{block}.ff.net.2"),
        **_linear("double/text/mod", f"{block}.norm1_context.linear", PARTS),
        **_attention("double/text", f"{block}.attn", "i -> i", text=True),
        **_pair("double/text", f"{block}.ff_context.net.0.proj", f"{block}.ff_context.net.2"),
        **_linear("single/mod", f"{single}.norm.linear", PARTS),
        **{path: rule for path, rule in attention.items() if not path.startswith("single/o/")},
        **_linear("single/fc1", f"{single}.proj_mlp", PLAIN),
        **_linear("single/out", f"{single}.proj_out", PLAIN),
        **_linear("mod", "norm_out.linear", PARTS),
        **_linear("out", "proj_out", PLAIN),
    }


def wan_rules() -> Rules:
    """Path in our tree -> (name in the file, file's axes -> ours)."""
    embedder, block = "condition_embedder", "blocks.{}"
    return {
        **_linear("patch", "patch_embedding", PATCH),
        **_mlp("time", f"{embedder}.time_embedder"),
        **_linear("mod", f"{embedder}.time_proj", PARTS),
        **_mlp("text", f"{embedder}.text_embedder"),
        "layers/table": (f"{block}.scale_shift_table", TABLE),
        **_attention("layers/attn", f"{block}.attn1", "(h i) -> h i"),
        **_layer_norm("layers/cross_norm", f"{block}.norm2"),
        **_attention("layers/cross", f"{block}.attn2", "(h i) -> h i"),
        **_pair("layers", f"{block}.ffn.net.0.proj", f"{block}.ffn.net.2"),
        "table": ("scale_shift_table", TABLE.replace("n", "m")),
        **_linear("out", "proj_out", PLAIN),
    }


def table(cfg: Config) -> list[Line]:
    """The rename table of a model: a `Line` per leaf of its abstract tree."""
    rules = hunyuan_rules() if isinstance(cfg, HunyuanVideoConfig) else wan_rules()
    known = dict(zip("tyx", cfg.patch), c=cfg.channels)
    if isinstance(cfg, WanConfig):
        known |= {"o": 1, "n": 6, "m": 2}  # parts of the modulation tables
    return lines_of(abstract(cfg), rules, known)


# config.json ------------------------------------------------------------------------------------------

# Ours -> theirs, where the value is one count.
SHARED = {
    "channels": "in_channels",
    "out_channels": "out_channels",
    "heads": "num_attention_heads",
    "head_dim": "attention_head_dim",
}
HUNYUAN_COUNTS = SHARED | {
    "double": "num_layers",
    "single": "num_single_layers",
    "refiner": "num_refiner_layers",
    "text": "text_embed_dim",
    "pooled": "pooled_projection_dim",
}
WAN_COUNTS = SHARED | {
    "layers": "num_layers",
    "ffn": "ffn_dim",
    "text": "text_dim",
    "frequencies": "freq_dim",
    "positions": "rope_max_seq_len",
}
DEPTHS = ("num_layers", "num_single_layers", "num_refiner_layers")
# What these models always do; any other value is refused.
HUNYUAN_FIXED = {"qk_norm": "rms_norm", "image_condition_type": None}
WAN_FIXED = {
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}


def _at(folder: str | os.PathLike[str]) -> Path:
    """The folder of the transformer in that of its pipeline."""
    folder = Path(folder)
    inner = folder / "transformer"
    return inner if inner.is_dir() and not (folder / "config.json").is_file() else folder


def read_config(
    folder: str | os.PathLike[str], *, dtype: str = "float32", remat: str = "none"
) -> Config:
    """The model in a folder's config.json; dtype and remat are ours to choose. UserError for another model."""
    path = _at(folder) / "config.json"
    said = read_json(path)
    if not isinstance(said, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return from_diffusers(said, dtype=dtype, remat=remat)


def from_diffusers(
    said: Mapping[str, Any], *, dtype: str = "float32", remat: str = "none"
) -> Config:
    """The config of a config.json; UserError for another model and for what this one cannot do."""
    kind = said.get("_class_name")
    if kind not in (HUNYUAN, WAN):
        raise UserError(f"config.json: _class_name {kind!r:.60} is unknown: {HUNYUAN} or {WAN}")
    base = HunyuanVideoConfig() if kind == HUNYUAN else WanConfig()
    counts, fixed = (HUNYUAN_COUNTS, HUNYUAN_FIXED) if kind == HUNYUAN else (WAN_COUNTS, WAN_FIXED)
    most = lambda name: values.DEEPEST if name in DEPTHS else values.LONGEST
    fields: dict[str, Any] = {
        ours: values.size(said, name, getattr(base, ours), most=most(name))
        for ours, name in counts.items()
    }
    for name, value in fixed.items():
        if said.get(name, value) != value:
            raise wrong(name, said[name], f"{value!r}: the model of text to video")
    more = _hunyuan(said, fields) if kind == HUNYUAN else _wan(said)
    read = {*counts.values(), *fixed, *more}
    strange = [n for n in said if n not in read and n[:1] != "_" and said[n] is not None]
    if strange:
        raise UserError(
            f"config.json: {shown(strange[0])} is not known of {kind}; take it out if the model works without it"
        )
    for extra in more.values():
        fields |= extra
    return type(base)(**fields, dtype=dtype, remat=remat)


def _hunyuan(said: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Their name -> our fields, of what is no plain count."""
    rope = values.listing(said, "rope_axes_dim") or list(HunyuanVideoConfig.rope)
    ratio = values.number(said, "mlp_ratio", 4.0)
    side, frames = values.size(said, "patch_size", 2), values.size(said, "patch_size_t", 1)
    return {
        "rope_axes_dim": {"rope": _three(rope, "rope_axes_dim")},
        "rope_theta": {"rope_theta": values.number(said, "rope_theta", 256.0)},
        "mlp_ratio": {"ffn": int(fields["heads"] * fields["head_dim"] * ratio)},
        "patch_size": {"patch": (frames, side, side)},
        "patch_size_t": {},
        "guidance_embeds": {"guidance": values.flag(said, "guidance_embeds", True)},
    }


def _wan(said: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Their name -> our fields, of what is no plain count."""
    patch = values.listing(said, "patch_size") or list(WanConfig.patch)
    return {
        "patch_size": {"patch": _three(patch, "patch_size")},
        "eps": {"eps": values.number(said, "eps", 1e-6)},
    }


def _three(value: Any, name: str) -> tuple[int, int, int]:
    if len(value) != 3 or not all(type(n) is int and 0 < n <= values.DEEPEST for n in value):
        raise wrong(name, value, "three positive integers")
    return tuple(value)


def to_diffusers(cfg: Config) -> dict[str, Any]:
    """The config.json of a model; UserError for sizes that it cannot say."""
    if isinstance(cfg, HunyuanVideoConfig):
        if cfg.patch[1] != cfg.patch[2] or cfg.frequencies != 256 or cfg.eps != 1e-6:
            raise UserError(
                f"{HUNYUAN} has square patches, 256 frequencies and eps 1e-06; this model has patch {cfg.patch}, "
                f"{cfg.frequencies} and {cfg.eps:g}: it cannot be written for diffusers"
            )
        ratio = cfg.ffn / cfg.d
        if int(cfg.d * ratio) != cfg.ffn:
            raise UserError(
                f"ffn {cfg.ffn} is no exact multiple of the width {cfg.d}: it cannot be written"
            )
        own = {name: getattr(cfg, ours) for ours, name in HUNYUAN_COUNTS.items()} | HUNYUAN_FIXED
        own |= {
            "mlp_ratio": ratio,
            "patch_size": cfg.patch[1],
            "patch_size_t": cfg.patch[0],
            "guidance_embeds": cfg.guidance,
            "rope_theta": cfg.rope_theta,
            "rope_axes_dim": list(cfg.rope),
        }
        return {"_class_name": HUNYUAN} | own
    if cfg.rope_theta != WanConfig.rope_theta:
        raise UserError(
            f"{WAN} has rope_theta 10000, this model {cfg.rope_theta:g}: it cannot be written for diffusers"
        )
    own = {name: getattr(cfg, ours) for ours, name in WAN_COUNTS.items()} | WAN_FIXED
    return {"_class_name": WAN} | own | {"patch_size": list(cfg.patch), "eps": cfg.eps}


# Weights ----------------------------------------------------------------------------------------------


def load(
    folder: str | os.PathLike[str], cfg: Config, *, dtype: str = "float32", shardings: Any = None
) -> dict[str, Any]:
    """Parameters in `dtype`, blocks stacked; with `shardings`, a tree like them, each device reads its part."""
    folder = _at(folder)
    found = tensors.stored(folder, STEM)
    if cfg.layers > len(found):  # also bounds the table
        raise UserError(
            f"{folder}: {cfg.layers} blocks, but there are {len(found)} tensors: config.json and weights are not "
            "of one model"
        )
    lines = table(cfg)
    account(folder, lines, found)
    return assemble(lines, lambda name: found[name].map(), dtype=dtype, shardings=shardings)


def save(
    folder: str | os.PathLike[str],
    params: dict[str, Any],
    cfg: Config,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 10_000_000_000,
) -> None:
    """Write a new folder that diffusers and `load` read; dtype None keeps that of the parameters.

    UserError if the folder has content, or if the tree is not that of `cfg`; then, and where writing fails,
    nothing is left.
    """
    config = to_diffusers(cfg)
    entries = hf.entries_of(params, table(cfg), dtype)
    with hf.new_folder(Path(folder)) as temporary:
        hf.write_weights(temporary, entries, max_shard_bytes, STEM)
        write_json(temporary / "config.json", config)
