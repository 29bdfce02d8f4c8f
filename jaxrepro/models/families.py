"""config.json of the decoder families, read into and written from `TransformerConfig`.

    family    biases                           norms of q, k    window
    llama     q, k, v, o if attention_bias     -                -
    mistral   -                                -                sliding_window: all layers
    qwen2     q, k, v                          -                by layer, if use_sliding_window
    qwen3     q, k, v, o if attention_bias     yes              by layer, if use_sliding_window

Qwen2.5 says qwen2, SmolLM2 and Llama 2 and 3 say llama. Old files have rope_theta and rope_scaling at the
root, new ones (transformers 5) rope_parameters; both are read and the old spelling is written, which
every version reads. What a file asks for and this decoder does not do is refused, never ignored.
"""

from collections.abc import Mapping
from typing import Any

from jaxrepro.config import UserError
from jaxrepro.models import values
from jaxrepro.models.rope import RopeScaling
from jaxrepro.models.transformer import TransformerConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
VISION = "qwen2_vl"  # models/qwen2_vl.py; its decoder is read here
KNOWN = (*ARCHITECTURES, VISION)
SLIDING, FULL = "sliding_attention", "full_attention"
# Where a file does not say them.
THETA = {VISION: 1e6}
SECTIONS = {VISION: (16, 24, 24)}


def family(config: Mapping[str, Any]) -> str:
    """The model_type of a config.json, of KNOWN; UserError for any other."""
    name = config.get("model_type")
    if name is None:  # very old files
        found = [str(a) for a in values.listing(config, "architectures") or ()]
        name = next(
            (k for k, v in ARCHITECTURES.items() if v in found), found[0] if found else None
        )
    name = VISION if name == f"{VISION}_text" else name
    if name not in KNOWN:
        raise UserError(
            f"config.json: architecture {name!r:.60} is unknown; the known ones are {', '.join(KNOWN)}"
        )
    return name


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `TransformerConfig` from a config.json; UserError for what the decoder cannot run."""
    kind = family(config)
    text = text_of(config)
    if config.get("quantization_config"):
        raise UserError(
            "config.json has a quantization_config: quantised weights are not read; take the model in "
            "bfloat16, float16 or float32, or a GGUF file"
        )
    if text.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {text['hidden_act']!r:.60} is not supported: silu")
    if values.flag(text, "mlp_bias"):
        raise UserError("mlp_bias is true: biases of the feed-forward layer are not supported")
    heads = values.size(text, "num_attention_heads")
    d = values.size(text, "hidden_size")
    layers = values.size(text, "num_hidden_layers", most=values.DEEPEST)
    bias = kind in ("llama", "qwen3") and values.flag(text, "attention_bias")
    head_dim = 128 if kind == "qwen3" else d // heads  # where the file does not say it
    window, window_layers = _window(kind, text, layers)
    return {
        "vocab": values.size(text, "vocab_size"),
        "d": d,
        "layers": layers,
        "heads": heads,
        "kv": values.size(text, "num_key_value_heads", heads),
        "head_dim": values.size(text, "head_dim", head_dim),
        "ffn": values.size(text, "intermediate_size"),
        **_rope(kind, text),
        "eps": values.number(text, "rms_norm_eps"),
        "qkv_bias": bias or kind in ("qwen2", VISION),
        "o_bias": bias,
        "qk_norm": kind == "qwen3",
        "window": window,
        "window_layers": window_layers,
        # of a model with a text_config, transformers 5 writes the flag at the root, 4 in either place
        "tied": any([values.flag(part, "tie_word_embeddings") for part in (config, text)]),
        "max_positions": values.size(text, "max_position_embeddings", 32768),
        "family": None if kind == VISION else kind,
    }


def text_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's own fields: those of the text_config where there is one, else of the root."""
    return {**config, **values.mapping(config, "text_config")}


def _rope(kind, text):
    """The fields that say how positions turn; UserError where the two spellings do not agree."""
    names = ("rope_scaling", "rope_parameters")
    said = {name: rope for name in names if (rope := values.mapping(text, name))}
    found = {name: _turning(kind, rope, text) for name, rope in said.items()}
    if len(found) == 2 and found["rope_scaling"] != found["rope_parameters"]:
        raise UserError(
            "config.json: rope_scaling and rope_parameters do not say the same; transformers takes "
            "rope_scaling: remove the one that the model was not trained with"
        )
    return next(iter(found.values()), None) or _turning(kind, {}, text)


def _turning(kind, rope, text):
    """rope_theta, rope_scaling and mrope_sections of one rope object of a file."""
    if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise UserError(
            f"config.json: rope of its own for {values.shown(nested[0])} is not supported: one for all"
        )
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if scaling not in ("default", "mrope", "linear", "llama3"):
        raise UserError(
            f"rope type {scaling!r:.60} is not supported: default, linear, llama3 or mrope"
        )
    part = "partial_rotary_factor"
    if (share := values.number(rope, part, values.number(text, part, 1.0))) != 1:
        raise UserError(f"{part} {share} is not supported: 1")
    theta = values.number(text, "rope_theta", THETA.get(kind, 1e4), least=1)
    return {
        "rope_theta": values.number(rope, "rope_theta", theta, least=1),
        "rope_scaling": _scaling(scaling, rope, text),
        "mrope_sections": _sections(rope) or SECTIONS.get(kind),
    }


def _scaling(kind, rope, text):
    """How the file stretches frequencies, or None."""
    if kind in ("default", "mrope"):
        return None
    factor, name = values.number(rope, "factor", least=1), "original_max_position_embeddings"
    if kind == "linear":
        return RopeScaling(kind, factor)
    low, high = (values.number(rope, f"{end}_freq_factor") for end in ("low", "high"))
    original = values.size(rope, name, values.size(text, name, text.get("max_position_embeddings")))
    return RopeScaling(kind, factor, low, high, original)


def _sections(rope):
    """The file's mrope_section, or None."""
    sections = values.listing(rope, "mrope_section")
    if sections and not all(type(n) is int and n > 0 for n in sections):
        raise values.wrong("mrope_section", sections, "a list of integers of at least 1")
    return tuple(sections) if sections else None


def _window(kind, text, layers):
    """(window, window_layers) of a file."""
    if kind == "llama":
        return None, None
    # a file that leaves the key out means the default of the family's own class
    size = text.get("sliding_window", 4096)
    if kind == "mistral":
        return (None, None) if size is None else (values.size(text, "sliding_window", 4096), None)
    kinds = values.listing(text, "layer_types")
    if not values.flag(text, "use_sliding_window") or size is None:
        if SLIDING in (kinds or ()):
            raise UserError(
                f"config.json: layer_types name {SLIDING}, but there is no window; set sliding_window "
                "and use_sliding_window, or make the layers full_attention"
            )
        return None, None
    if kinds is None:
        first = values.size(text, "max_window_layers", 28, least=0)
        kinds = [SLIDING if j >= first else FULL for j in range(layers)]
    names = sorted(set(map(str, kinds)))  # of what may be anything
    if len(kinds) != layers or not {SLIDING, FULL}.issuperset(names):
        raise UserError(
            f"config.json: layer_types are {len(kinds)} of {names!r:.60}; they must be "
            f"{layers} of {FULL} and {SLIDING}"
        )
    chosen = tuple(j for j, k in enumerate(kinds) if k == SLIDING)
    if not chosen:
        return None, None
    return values.size(text, "sliding_window", 4096), None if len(chosen) == layers else chosen


def objection(cfg: TransformerConfig, kind: str) -> str | None:
    """Why a family's files cannot hold a model, or None."""
    biases = (cfg.qkv_bias, cfg.o_bias)
    allowed = {"mistral": ((False, False),), "qwen2": ((True, False),)}
    checks = (
        (biases not in allowed.get(kind, ((False, False), (True, True))), "its biases"),
        (cfg.qk_norm != (kind == "qwen3"), "its norms of queries and keys"),
        (kind == "llama" and cfg.window is not None, "its window"),
        (kind == "mistral" and cfg.window_layers is not None, "its window in some layers only"),
        (kind == "llama" and cfg.d % cfg.heads, "its width, no multiple of its heads"),
        (cfg.mrope_sections is not None, "its three position streams"),
    )
    return next((text for wrong, text in checks if wrong), None)


def to_hf(cfg: TransformerConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a decoder, in the spelling that every version of transformers reads.

    The family is `cfg.family`, else the first that can hold the model; UserError where none can.
    """
    kinds = [cfg.family] if cfg.family else list(ARCHITECTURES)
    if set(kinds) - set(ARCHITECTURES):
        raise UserError(f"family {cfg.family!r} is unknown: one of {', '.join(ARCHITECTURES)}")
    found = {kind: objection(cfg, kind) for kind in kinds}
    kind = next((k for k, wrong in found.items() if wrong is None), None)
    if kind is None:
        why = "; ".join(f"{k} does not have {wrong}" for k, wrong in found.items())
        raise UserError(f"no config.json can describe this decoder: {why}")
    out = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "torch_dtype": dtype,
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.d,
        "intermediate_size": cfg.ffn,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None if cfg.rope_scaling is None else cfg.rope_scaling.to_hf(),
        "tie_word_embeddings": cfg.tied,
        # stated, because the defaults of the families' classes name tokens of their own vocabularies
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind in ("llama", "qwen3"):
        out["attention_bias"] = cfg.qkv_bias
    if kind == "llama":
        out["mlp_bias"] = False
    if kind == "mistral":
        out["sliding_window"] = cfg.window
    if kind in ("qwen2", "qwen3"):
        slides = [cfg.slides(j) for j in range(cfg.layers)]
        out["use_sliding_window"] = cfg.window is not None
        out["sliding_window"] = cfg.window
        out["max_window_layers"] = slides.index(True) if any(slides) else cfg.layers
        out["layer_types"] = [SLIDING if s else FULL for s in slides]
    return out
