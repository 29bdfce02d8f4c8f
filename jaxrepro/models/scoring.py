"""Log-probabilities of completions and of marked tokens under a decoder.

A question's prompt runs once; its keys and values are the prefix of the question's n completions,
so prompt tokens cost 1/n of what separate rows cost and gradients are the same:

    lp[b, m, j] = log pi(c_j | prompt_b, c_<j) / T,    c_0 predicted by the last real prompt position
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrepro.models import transformer
from jaxrepro.models.transformer import Prefix, TransformerConfig
from jaxrepro.ops.logprob import Tokens, shift, token_log_probs

_GATHER = 1024  # below this vocabulary the head costs less than gathering the positions it needs


def completion_log_probs(
    params: dict,
    cfg: TransformerConfig,
    x: Float[Array, "b t d"],
    position: Int[Array, "b t"] | Int[Array, "b 3 t"],
    segment: Int[Array, "b t"],
    next_position: Int[Array, "b"],
    tokens: Int[Array, "b n c"],
    length: Int[Array, "b n"],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> Any:
    """lp (b, n, c) float32 [, entropy (b, n, c)] of n completions per prompt; 0 at and after `length`.

    The prompt is described at `completion_hidden`. Gradients flow through the prompt.
    """
    hidden = completion_hidden(params, cfg, x, position, segment, next_position, tokens, length)
    head = transformer.head(params, cfg)
    how = dict(temperature=temperature, chunk=chunk, vocab=cfg.used)
    out = token_log_probs(hidden, head, tokens, entropy=entropy, **how)
    keep = jnp.arange(tokens.shape[-1]) < length[..., None]
    return tuple(jnp.where(keep, a, 0.0) for a in out) if entropy else jnp.where(keep, out, 0.0)


def completion_hidden(
    params: dict,
    cfg: TransformerConfig,
    x: Float[Array, "b t d"],
    position: Int[Array, "b t"] | Int[Array, "b 3 t"],
    segment: Int[Array, "b t"],
    next_position: Int[Array, "b"],
    tokens: Int[Array, "b n c"],
    length: Int[Array, "b n"],
) -> Float[Array, "b n c d"]:
    """The hidden state that predicts each token of n completions per prompt; the prompt runs once.

    x: prompt embeddings, segment 0 = padding on the right. Validity comes from `length` alone: a pad
    or eos id inside a completion is a token like any other. At and after `length` the state means
    nothing.
    """
    b, n, c = tokens.shape
    hidden, kv = transformer.apply(params, cfg, x, position=position, segment=segment)
    hidden = jnp.broadcast_to(last(hidden, segment)[:, None, None], (b, n, 1, cfg.d))
    if c == 1:  # the last token of a completion is predicted, never read
        return hidden
    step = jnp.arange(c - 1)
    at = jnp.broadcast_to(next_position[:, None, None] + step, (b, n, c - 1))
    real = step < length[..., None]
    rest, _ = transformer.apply(
        params,
        cfg,
        transformer.embed(params, cfg, tokens[..., :-1].reshape(b * n, c - 1)),
        position=at.reshape(b * n, c - 1),
        segment=real.reshape(b * n, c - 1).astype(jnp.int32),
        prefix=Prefix(kv, segment > 0),
    )
    return jnp.concatenate([hidden, rest.reshape(b, n, c - 1, cfg.d)], axis=2)


def last(hidden: Float[Array, "b t d"], segment: Int[Array, "b t"]) -> Float[Array, "b d"]:
    """The hidden state of the last real position of right-padded rows."""
    at = jnp.maximum((segment > 0).sum(-1) - 1, 0)
    return jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]


def nll(
    params: dict,
    cfg: TransformerConfig,
    x: Float[Array, "b t d"],
    tokens: Tokens,
    *,
    responses: int | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed negative log-probability (nats) of the response tokens, and their number.

    Columns of padding (cfg.used) stay in, as elsewhere in supervised fine-tuning: it is what pushes them down.
    responses: a bound on the response tokens of a row. Only so many positions of each row then meet
    the head, which is a large share of the work; of a row with more of them the rest is left out.
    """
    hidden, _ = transformer.apply(params, cfg, x, position=tokens.position, segment=tokens.segment)
    targets, mask = shift(tokens.tokens, tokens.response, tokens.segment)
    hidden, targets, mask = scored_positions(hidden, targets, mask, responses=responses, cfg=cfg)
    lp = token_log_probs(hidden, transformer.head(params, cfg), targets, chunk=chunk)
    return -jnp.sum(lp, where=mask), mask.sum().astype(jnp.float32)


def scored_positions(
    hidden: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    *,
    responses: int | None,
    cfg: TransformerConfig,
) -> tuple[Float[Array, "b r d"], Int[Array, "b r"], Bool[Array, "b r"]]:
    """Of each row the first `responses` positions under the mask, where that saves work; else all."""
    if responses is None or responses >= mask.shape[-1] or cfg.vocab <= _GATHER:
        return hidden, targets, mask
    first = jnp.argsort(~mask, axis=-1, stable=True)[:, :responses]
    hidden = jnp.take_along_axis(hidden, first[..., None], axis=1)
    return hidden, *(jnp.take_along_axis(a, first, axis=1) for a in (targets, mask))
