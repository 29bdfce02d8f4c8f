"""What goes into the engine and what comes out of it: plain data on the host, checked before it runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.rollout.generate import Samples, Sampling


class Embedded(NamedTuple):
    """A prompt as embeddings, of an image for instance; no padding."""

    x: Any  # (t, d)
    position: Any  # (t,) or (3, t) int
    next_position: int  # of the first new token


@dataclass(frozen=True)
class Request:
    """n completions of one prompt.

    id names the request: sample m of it draws its token j with fold_in(fold_in(key, id * n + m), j),
    so requests of one key keep to one n. max_new and min_new default to those of the sampling.
    stop: sequences of token ids that end a sample, themselves included, once min_new tokens are out.
    forced: tokens that every sample begins with; nothing ends a sample before the last of them.
    allowed: (v,) bool, tokens that may be drawn; bias: (v,) float, added to the logits. Both bind the
    sampler alone: lp_raw stays that of the model.
    """

    prompt: Sequence[int] | np.ndarray | Embedded
    id: int
    n: int = 1
    max_new: int | None = None
    min_new: int | None = None
    stop: Sequence[Sequence[int]] = ()
    forced: Sequence[int] = ()
    allowed: Any = None
    bias: Any = None


@dataclass(frozen=True)
class Completion:
    """The n samples of a request; arrays have exactly a sample's length, its eos included."""

    id: int
    tokens: tuple[np.ndarray, ...]  # int32
    lp_sampler: tuple[np.ndarray, ...]  # float32, nats; 0 where greedy or forced
    lp_raw: tuple[np.ndarray, ...]  # float32, nats, temperature 1, nothing cut off
    finish: np.ndarray  # (n,) int8, FINISH_EOS, FINISH_STOP or FINISH_LENGTH
    stop: np.ndarray  # (n,) int32, which of the request's sequences ended the sample, or -1


def samples(completions: Sequence[Completion], max_new: int, *, pad: int = 0) -> Samples:
    """Completions of equal n as the arrays that `generate` returns, on the host."""
    if len({len(c.tokens) for c in completions}) != 1:
        raise UserError("completions of unequal n do not form one array; pass those of one n")
    shape = (len(completions), len(completions[0].tokens), max_new)
    tokens, lp, lp_raw = np.full(shape, pad, np.int32), np.zeros(shape, "f4"), np.zeros(shape, "f4")
    length = np.zeros(shape[:2], np.int32)
    for r, c in enumerate(completions):
        for m, row in enumerate(c.tokens):
            if len(row) > max_new:
                raise UserError(f"request {c.id}: {len(row)} tokens exceed max_new {max_new}")
            length[r, m] = len(row)
            tokens[r, m, : len(row)] = row
            lp[r, m, : len(row)] = c.lp_sampler[m]
            lp_raw[r, m, : len(row)] = c.lp_raw[m]
    return Samples(tokens, length, lp, lp_raw, np.stack([c.finish for c in completions]))


class Checked(NamedTuple):
    """A request with its defaults filled in, as the engine keeps it."""

    request: Request
    prompt: Any  # int32 array or Embedded
    length: int  # tokens of the prompt
    max_new: int
    min_new: int
    stop: tuple[tuple[int, ...], ...]
    forced: tuple[int, ...]
    bias: np.ndarray | None  # (v,) float32, -inf where not allowed


def check(request: Request, cfg: TransformerConfig, sampling: Sampling, capacity: int) -> Checked:
    """UserError for a request that cannot run; `capacity` bounds prompt and sampling.max_new."""
    who = f"request {request.id}"
    limit = capacity - sampling.max_new + 1  # the last token of a prompt is fed by the first step
    if request.n < 1:
        raise UserError(f"{who}: n {request.n} must be at least 1")
    if not 0 <= request.id * request.n <= 2**31 - 1 - request.n:
        raise UserError(f"{who}: id * n must lie in [0, 2^31); number requests from 0")
    if isinstance(request.prompt, Embedded):
        prompt, length = request.prompt, len(request.prompt.x)
        streams = np.ndim(prompt.position) == 2
        shape = (3, length) if streams else (length,)
        if np.shape(prompt.x) != (length, cfg.d) or np.shape(prompt.position) != shape:
            raise UserError(
                f"{who}: embeddings {np.shape(prompt.x)} with positions "
                f"{np.shape(prompt.position)}; need (t, {cfg.d}) with (t,) or (3, t)"
            )
        if streams and cfg.mrope_sections is None:
            raise UserError(
                f"{who}: three position streams need mrope_sections in the model config"
            )
        if sampling.repetition_penalty != 1:
            raise UserError(f"{who}: repetition_penalty needs token ids, the prompt is embeddings")
    else:
        prompt = _ids(request.prompt, cfg.vocab, f"{who}: prompt")
        length = len(prompt)
    if not length:
        raise UserError(f"{who}: the prompt is empty; give at least one token, bos for instance")
    if length > limit:
        raise UserError(
            f"{who}: prompt of {length} tokens and max_new {sampling.max_new} exceed the cache of "
            f"{capacity}; raise capacity or shorten the prompt to {limit}"
        )
    max_new = sampling.max_new if request.max_new is None else request.max_new
    min_new = sampling.min_new if request.min_new is None else request.min_new
    if not 1 <= max_new <= sampling.max_new:
        raise UserError(f"{who}: max_new {max_new} must lie in 1..{sampling.max_new} (sampling's)")
    if not 0 <= min_new <= max_new:
        raise UserError(f"{who}: min_new {min_new} must lie in 0..{max_new} (its max_new)")
    stop = tuple(tuple(map(int, _ids(s, cfg.vocab, f"{who}: stop"))) for s in request.stop)
    if any(not s for s in stop):
        raise UserError(f"{who}: a stop sequence is empty; leave it out")
    forced = tuple(map(int, _ids(request.forced, cfg.vocab, f"{who}: forced")))
    if len(forced) > max_new:
        raise UserError(f"{who}: {len(forced)} forced tokens exceed max_new {max_new}")
    bias = _bias(request, cfg, who)
    if bias is not None:
        open_ = np.isfinite(bias)
        if min_new > len(forced):
            open_[list(sampling.eos)] = False
        if len(forced) < max_new and not open_.any():
            raise UserError(f"{who}: allowed and bias leave no token that may be drawn")
    return Checked(request, prompt, length, max_new, min_new, stop, forced, bias)


def _ids(ids, vocab: int, what: str) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise UserError(f"{what} must be a list of token ids, got {array.dtype} {array.shape}")
    bad = array[(array < 0) | (array >= vocab)]
    if bad.size:
        raise UserError(f"{what} has token id {bad[0]}; the vocabulary has 0..{vocab - 1}")
    return array.astype(np.int32)


def _bias(request: Request, cfg: TransformerConfig, who: str) -> np.ndarray | None:
    """allowed and bias as one array to add."""
    if request.allowed is None and request.bias is None:
        return None
    out = np.zeros(cfg.vocab, np.float32)
    for name, value in (("bias", request.bias), ("allowed", request.allowed)):
        if value is None:
            continue
        value = np.asarray(value)
        if value.shape != (cfg.vocab,) or (name == "allowed" and value.dtype != bool):
            kind = "bool" if name == "allowed" else "float"
            raise UserError(
                f"{who}: {name} is {value.dtype} {value.shape}; need ({cfg.vocab},) {kind}"
            )
        out = np.where(value, out, -np.inf) if name == "allowed" else out + value.astype(np.float32)
    if np.isnan(out).any() or np.isposinf(out).any():
        raise UserError(f"{who}: bias holds nan or +inf; use finite numbers, or -inf to forbid")
    return out
