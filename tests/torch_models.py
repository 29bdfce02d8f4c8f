"""Helper: a tiny random decoder of Hugging Face, and the same weights as our parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro.models import transformer
from jaxrepro.models.transformer import TransformerConfig


def pair(kind: str, *, vocab: int, layers: int = 2, seed: int = 0):
    """(torch model in eval mode, params, cfg) of kind "llama" or "qwen2"; sharp enough to have no ties."""
    import torch
    import transformers

    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    config, model = kinds[kind]
    cfg = config(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    peer = model(cfg).eval()
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if "norm" not in name:
                p.normal_(0, 0.25)
    ours = TransformerConfig.from_hf(cfg.to_dict())
    return peer, convert(peer, ours), ours


def convert(peer, cfg: TransformerConfig) -> dict:
    """Our parameters from the state dict, written out by hand."""
    w = {k: v.detach().float().numpy() for k, v in peer.state_dict().items()}
    d, i = cfg.d, cfg.head_dim
    names = {
        "attn_norm": ("input_layernorm.weight", lambda a: a),
        "mlp_norm": ("post_attention_layernorm.weight", lambda a: a),
        "wq": ("self_attn.q_proj.weight", lambda a: a.T.reshape(d, -1, i)),
        "wk": ("self_attn.k_proj.weight", lambda a: a.T.reshape(d, -1, i)),
        "wv": ("self_attn.v_proj.weight", lambda a: a.T.reshape(d, -1, i)),
        "wo": ("self_attn.o_proj.weight", lambda a: a.T.reshape(-1, i, d)),
        "gate": ("mlp.gate_proj.weight", lambda a: a.T),
        "up": ("mlp.up_proj.weight", lambda a: a.T),
        "down": ("mlp.down_proj.weight", lambda a: a.T),
    }
    if cfg.qkv_bias:
        for x in "qkv":
            names[f"b{x}"] = (f"self_attn.{x}_proj.bias", lambda a: a.reshape(-1, i))
    layer = lambda j: {n: f(w[f"model.layers.{j}.{key}"]) for n, (key, f) in names.items()}
    layers = [layer(j) for j in range(cfg.layers)]
    params = {
        "embed": w["model.embed_tokens.weight"],
        "layers": jax.tree.map(lambda *a: np.stack(a), *layers),
        "norm": w["model.norm.weight"],
        "head": w["lm_head.weight"].T,
    }
    out = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(out), jax.tree.leaves(transformer.abstract(cfg))
    ):
        assert a.shape == b.shape, path
    return out


def right_padded(prompts):
    """tokens, position, segment, next_position of lists of ids."""
    t = max(map(len, prompts))
    tokens, segment = np.zeros((len(prompts), t), np.int32), np.zeros((len(prompts), t), np.int32)
    for row, p in enumerate(prompts):
        tokens[row, : len(p)], segment[row, : len(p)] = p, 1
    position = np.broadcast_to(np.arange(t, dtype=np.int32), tokens.shape)
    return tuple(map(jnp.asarray, (tokens, position, segment, segment.sum(-1))))


def left_padded(prompts):
    """input_ids and attention_mask for the peer's generate."""
    import torch

    t = max(map(len, prompts))
    ids = torch.tensor([[0] * (t - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (t - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}
