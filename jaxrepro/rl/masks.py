"""Which sampled tokens are scored.

Masks come from lengths, never from `token != pad`: a model may sample the pad id, or have one id for
pad and eos, and a mask made from ids would then punch holes into its own samples.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


def from_length(length: Int[Array, "*b"], t: int) -> Bool[Array, "*b t"]:
    """True at the first `length` of t tokens. A sampler's length counts the eos, so the eos is scored."""
    return jnp.arange(t) < length[..., None]


def length_to_eos(tokens: Int[Array, "*b t"], eos: tuple[int, ...]) -> Int[Array, "*b"]:
    """Tokens up to and including the first eos; t where there is none. For samples that came without lengths."""
    hit = jnp.isin(tokens, jnp.asarray(eos))
    return jnp.where(hit.any(-1), hit.argmax(-1) + 1, tokens.shape[-1]).astype(jnp.int32)


def mask_truncated(mask: Bool[Array, "*b t"], ended: Bool[Array, "*b"]) -> Bool[Array, "*b t"]:
    """Drop every token of a completion that did not end by itself ("overlong filtering").

    See "DAPO: An Open-Source LLM Reinforcement Learning System at Scale" by Yu et al. (arXiv:2503.14476).
    """
    return mask & ended[..., None]


def mask_forced(mask: Bool[Array, "*b t"], forced: Bool[Array, "*b t"]) -> Bool[Array, "*b t"]:
    """Drop tokens that the policy did not choose: inserted by a template, a tool or a search."""
    return mask & ~forced


def last(mask: Bool[Array, "*b t"]) -> Bool[Array, "*b t"]:
    """True at the last True of each row only; all False where a row has none."""
    return mask & (jnp.cumsum(mask[..., ::-1], -1)[..., ::-1] == 1)


def masked_mean(x: Shaped[Array, "*b"], mask: Bool[Array, "*b"]) -> tuple[Array, Array]:
    """(sum, weight) of the kept values, in float32."""
    return jnp.where(mask, x, 0).astype(jnp.float32).sum(), mask.sum().astype(jnp.float32)
