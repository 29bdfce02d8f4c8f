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
# What a file's numbers may be, so that no product of two leaves float32, and no size an index of XLA.
TINY, LARGE, LONGEST = 1e-30, 1e30, 2**31 - 1


def family(config: Mapping[str, Any]) -> str:
    """The model_type of a config.json, of KNOWN; UserError for any other."""
    name = config.get("model_type")
    if name is None:  # very old files
        found = [str(a) for a in _list(config, "architectures") or ()]
        name = next(
            (k for k, v in ARCHITECTURES.items() if v in found), found[0] if found else None
        )
    name = VISION if name == f"{VISION}_text" else name
    if name not in KNOWN:
        raise UserError(
            f"config.json: architecture {name!r} is unknown; the known ones are {', '.join(KNOWN)}"
        )
    return name


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `TransformerConfig` from a config.json; UserError for what the decoder cannot run."""
    kind = family(config)
    text = {**config, **_mapping(config, "text_config")}
    if config.get("quantization_config"):
        raise UserError(
            "config.json has a quantization_config: quantised weights are not read; take the model in "
            "bfloat16, float16 or float32, or a GGUF file"
        )
    rope = _mapping(text, "rope_parameters") or _mapping(text, "rope_scaling")
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    _refuse(text, rope, scaling)
    heads = _size(text, "num_attention_heads")
    d, layers = _size(text, "hidden_size"), _size(text, "num_hidden_layers")
    bias = kind in ("llama", "qwen3") and bool(text.get("attention_bias", False))
    head_dim = 128 if kind == "qwen3" else d // heads  # where the file does not say it
    window, window_layers = _window(kind, text, layers)
    return {
        "vocab": _size(text, "vocab_size"),
        "d": d,
        "layers": layers,
        "heads": heads,
        "kv": _size(text, "num_key_value_heads", heads),
        "head_dim": _size(text, "head_dim", head_dim),
        "ffn": _size(text, "intermediate_size"),
        "rope_theta": _number(rope, "rope_theta", _number(text, "rope_theta", 1e4, 1), 1),
        "rope_scaling": _scaling(scaling, rope, text),
        "mrope_sections": _sections(rope),
        "eps": _number(text, "rms_norm_eps"),
        "qkv_bias": bias or kind in ("qwen2", VISION),
        "o_bias": bias,
        "qk_norm": kind == "qwen3",
        "window": window,
        "window_layers": window_layers,
        "tied": bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        "max_positions": _size(text, "max_position_embeddings", 32768),
        "family": None if kind == VISION else kind,
    }


def _refuse(text, rope, scaling):
    if scaling not in ("default", "mrope", "linear", "llama3"):
        raise UserError(f"rope type {scaling!r} is not supported: default, linear, llama3 or mrope")
    if text.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {text['hidden_act']!r} is not supported: silu")
    if text.get("mlp_bias"):
        raise UserError("mlp_bias is true: biases of the feed-forward layer are not supported")
    partial = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UserError(f"partial_rotary_factor {partial} is not supported: 1")


def _get(text, name, default):
    """A value of the file, else the default; where that is None, the file must have one."""
    value = default if text.get(name) is None else text[name]
    if value is None:
        raise UserError(f"config.json lacks {name!r}")
    return value


def _size(text, name, default=None, least=1):
    """An int of the file."""
    value = _get(text, name, default)
    if type(value) is not int or not least <= value <= LONGEST:
        raise _wrong(name, value, f"an integer from {least} to {LONGEST}")
    return value


def _number(text, name, default=None, least=TINY):
    """A float of the file."""
    value = _get(text, name, default)
    if type(value) not in (int, float) or not least <= value <= LARGE:
        raise _wrong(name, value, f"a number from {least:g} to {LARGE:g}")
    return float(value)


def _mapping(text, name):
    """An object of the file; {} where it has none."""
    value = text.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise _wrong(name, value, "an object or null")
    return value or {}


def _list(text, name):
    """A list of the file; None where it has none."""
    value = text.get(name)
    if value is not None and not isinstance(value, list | tuple):
        raise _wrong(name, value, "a list or null")
    return value


def _wrong(name, value, wanted):
    return UserError(f"config.json: {name} is {value!r:.60}; it must be {wanted}")


def _scaling(kind, rope, text):
    """How the file stretches frequencies, or None."""
    if kind in ("default", "mrope"):
        return None
    factor, name = _number(rope, "factor", least=1), "original_max_position_embeddings"
    if kind == "linear":
        return RopeScaling(kind, factor)
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    original = _size(rope, name, _size(text, name, text.get("max_position_embeddings")))
    return RopeScaling(kind, factor, low, high, original)


def _sections(rope):
    """The file's mrope_section, or None."""
    sections = _list(rope, "mrope_section")
    if sections and not all(type(n) is int and n > 0 for n in sections):
        raise _wrong("mrope_section", sections, "a list of integers of at least 1")
    return tuple(sections) if sections else None


def _window(kind, text, layers):
    """(window, window_layers) of a file."""
    if kind == "llama":
        return None, None
    # a file that leaves the key out means the default of the family's own class
    size = text.get("sliding_window", 4096)
    if kind == "mistral":
        return (None, None) if size is None else (_size(text, "sliding_window", 4096), None)
    kinds = _list(text, "layer_types")
    if not text.get("use_sliding_window", False) or size is None:
        if SLIDING in (kinds or ()):
            raise UserError(
                f"config.json: layer_types name {SLIDING}, but there is no window; set sliding_window "
                "and use_sliding_window, or make the layers full_attention"
            )
        return None, None
    if kinds is None:
        first = _size(text, "max_window_layers", 28, least=0)
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
    return _size(text, "sliding_window", 4096), None if len(chosen) == layers else chosen


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
