"""Helper: GGUF files of tiny random decoders, written by the library's own writer."""

import gguf as library
import jax
import numpy as np

from jaxrepro.models import gguf, names, transformer
from jaxrepro.models.transformer import TransformerConfig

SHAPE = dict(vocab=96, d=64, layers=2, heads=4, kv=2, head_dim=16, ffn=96)
LLAMA = TransformerConfig(**SHAPE, rope_theta=1e5, eps=1e-5, qkv_bias=False, max_positions=512)
QWEN2 = TransformerConfig(**SHAPE, rope_theta=1e6, eps=1e-6, tied=False, max_positions=512)
QWEN3 = TransformerConfig(
    **SHAPE | {"head_dim": 24}, qkv_bias=False, qk_norm=True, max_positions=512
)
KIND = library.GGMLQuantizationType


def rows(leaf, path, cfg, architecture):
    """A layer's tensor as a GGUF file has it, by the formula of the converters."""
    name = path.split("/")[-1]
    w = np.asarray(leaf)
    if name in ("wq", "wk", "wv"):
        w = w.transpose(1, 2, 0).reshape(-1, cfg.d)  # Hugging Face's (heads * head_dim, d)
    elif name in ("bq", "bk", "bv"):
        w = w.reshape(-1)
    elif name == "wo":
        w = w.transpose(2, 0, 1).reshape(cfg.d, -1)
    elif name in ("gate", "up", "down", "head"):
        w = w.T
    if architecture == "llama" and name in ("wq", "wk", "bq", "bk"):
        heads = cfg.heads if name.endswith("q") else cfg.kv
        w = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2)
        w = w.reshape(-1, *w.shape[3:])
    return np.ascontiguousarray(w)


def write(path, params, cfg, architecture="llama", kind=KIND.F32, extra=(), skip=(), fields=()):
    """A GGUF file of these parameters, by the library's writer; matrices in `kind`."""
    writer = library.GGUFWriter(str(path), architecture)
    writer.add_block_count(cfg.layers)
    writer.add_context_length(cfg.max_positions)
    writer.add_embedding_length(cfg.d)
    writer.add_feed_forward_length(cfg.ffn)
    writer.add_head_count(cfg.heads)
    writer.add_head_count_kv(cfg.kv)
    if cfg.head_dim * cfg.heads != cfg.d:
        writer.add_key_length(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_layer_norm_rms_eps(cfg.eps)
    for method, value in fields:
        getattr(writer, method)(value)
    stored = {}
    for name, leaf in names.leaves(params):
        parts = leaf if name.startswith("layers/") else [leaf]
        for i, part in enumerate(parts):
            stored[gguf.NAMES[name].format(i)] = rows(part, name, cfg, architecture)
    stored |= dict(extra)
    for name, w in stored.items():
        if name in skip:
            continue
        if kind == KIND.F32 or w.ndim == 1:
            writer.add_tensor(name, w.astype(np.float32))
        else:
            writer.add_tensor(name, library.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def drawn(cfg):
    """Random parameters: norms and biases too, so that none could be mistaken for another."""
    rng = np.random.default_rng(cfg.d)
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
    return jax.tree.map(draw, transformer.abstract(cfg))
