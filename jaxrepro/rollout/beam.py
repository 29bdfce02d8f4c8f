"""Beam search with the semantics of Hugging Face's `generate(num_beams=w)`, token for token.

Score of a hypothesis: the sum of log pi(token) over what was generated; of a finished one, its eos
included, divided by length ** length_penalty. Each step takes the best max(2, 1 + number of eos ids) w
(hypothesis, token) candidates: those that end in an eos and rank among the first w may enter the pool
of the best w finished; the best w others go on. A question is done when its pool is full and

    early_stopping False    best running sum / (length now) ** penalty <= the worst of the pool
    early_stopping "never"  the same with max_new as length where penalty > 0: no better one can come
    early_stopping True     at once

The first rule is a bound only where penalty <= 0; it is what the library does. One beam is greedy
decoding and stops at its first eos, whatever early_stopping says. At max_new the first w
candidates are finished, eos or not. min_new forbids an eos without renormalising, as the library does.

Nothing of the cache ever moves. The prompt is a prefix that the beams of a question share. Their own
tokens are the nodes of a tree: step t writes w places, one a beam, and a table says in which of them
each ancestor of a beam lies; attention of a question's w queries over its w t places is masked by it.
Reordering hypotheses permutes the rows of that table, integers instead of keys and values.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrepro.config import UserError
from jaxrepro.models import transformer
from jaxrepro.models.scoring import last
from jaxrepro.models.transformer import Cache, Prefix, TransformerConfig
from jaxrepro.ops.sampling import largest
from jaxrepro.rollout.generate import Prompts, check_eos, for_decode

DEAD = (
    -1e9
)  # the score of a hypothesis that does not exist; finite, as the library's arithmetic has it


@dataclass(frozen=True)
class Beams:
    """width hypotheses a question, of which the best `returned` are given back (default: one)."""

    max_new: int
    eos: tuple[int, ...]
    width: int = 5
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    returned: int = 1
    pad: int = 0
    min_new: int = 0

    def __post_init__(self):
        if self.max_new < 1:
            raise UserError(f"max_new {self.max_new} must be at least 1")
        if self.width < 1:
            raise UserError(f"width {self.width} must be at least 1 beam")
        if not 1 <= self.returned <= self.width:
            raise UserError(f"returned {self.returned} must lie in 1..{self.width} (width)")
        if self.early_stopping not in (True, False, "never"):
            raise UserError(f"early_stopping {self.early_stopping!r}: True, False or 'never'")
        if not np.isfinite(self.length_penalty):
            raise UserError(f"length_penalty {self.length_penalty} must be finite")
        if not 0 <= self.min_new <= self.max_new:
            raise UserError(f"min_new {self.min_new} must lie in 0..{self.max_new} (max_new)")

    @property
    def when_full(self) -> bool:
        """Whether a full pool ends a question. With one beam it does: that is greedy decoding."""
        return self.early_stopping is True or self.width == 1


class Found(NamedTuple):
    """The best hypotheses of each question, best first; entries at and after `length` are pad."""

    tokens: Any  # (b, r, t) int32
    length: Any  # (b, r) int32, counts the eos
    score: Any  # (b, r) float32, nats / length ** length_penalty


class _Pool(NamedTuple):
    tokens: Any  # (b, w, t)
    length: Any  # (b, w)
    score: Any  # (b, w)
    finished: Any  # (b, w) bool


class _Loop(NamedTuple):
    step: Any  # tokens generated so far
    cache: Any  # of w (max_new - 1) places a question
    path: Any  # (b, w, t): in which of the w places of step j lies the ancestor of a beam
    tokens: Any  # (b, w, t)
    score: Any  # (b, w), sums
    pool: _Pool
    open: Any  # (b,) bool, a better hypothesis may come
    stuck: Any  # () bool, every candidate ended


def beam_search(params: dict, cfg: TransformerConfig, prompts: Prompts, *, beams: Beams) -> Found:
    """The best hypotheses of every prompt; pure, for callers to jit with cfg and beams static."""
    check_eos(beams.eos, cfg)
    w, b = beams.width, prompts.x.shape[0]
    keep = max(2, 1 + len(beams.eos)) * w
    if keep > w * cfg.vocab:
        raise UserError(
            f"{len(beams.eos)} eos ids need a vocabulary of {keep // w}, it has {cfg.vocab}"
        )
    params = for_decode(params, cfg)
    # as the library rounds it: a double power, then float32
    lengths = np.arange(1, beams.max_new + 1, dtype=np.float64)
    norm = jnp.asarray(lengths**beams.length_penalty, jnp.float32)
    eos = jnp.zeros(cfg.vocab, bool).at[jnp.asarray(beams.eos, jnp.int32)].set(True)

    def select(loop: _Loop, hidden: Float[Array, "b w d"]) -> _Loop:
        """Candidates, pool and beams after token `step`."""
        t = loop.step
        score, parent, token = _candidates(
            transformer.logits(params, cfg, hidden), loop.score, keep, eos & (t < beams.min_new)
        )
        put = lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new, t, 2)
        tokens = put(_rows(loop.tokens, parent), token)
        ended = eos[token] | (t + 1 == beams.max_new)
        pool = _merge(loop, tokens, score, ended, norm[t], beams)
        score, best = jax.lax.top_k(score + DEAD * ended, w)
        parent = _rows(parent, best)
        own = jnp.broadcast_to(jnp.arange(w, dtype=jnp.int32), (b, w))
        reach = beams.max_new - 1 if _to_the_end(beams) else t
        hope = score[:, :1] / norm[reach]
        worst = jnp.where(pool.finished, pool.score.min(-1, keepdims=True), DEAD)
        return loop._replace(
            step=t + 1,
            path=put(_rows(loop.path, parent), own),
            tokens=_rows(tokens, best),
            score=score,
            pool=pool,
            open=loop.open & (hope > worst).any(-1),
            stuck=ended.all(),
        )

    def body(loop: _Loop) -> _Loop:
        t = loop.step
        token = jax.lax.dynamic_index_in_dim(loop.tokens, t - 1, 2, keepdims=False)
        position = prompts.next_position[:, None] + t - 1
        hidden, cache = transformer.apply(
            params,
            cfg,
            transformer.embed(params, cfg, token),
            position=jnp.broadcast_to(position, (b, w)),
            prefix=prefix,
            cache=Cache(loop.cache, (t - 1) * w),
            age=_age(loop.path, t - 1),
        )
        return select(loop._replace(cache=cache.kv), hidden)

    hidden, kv = transformer.apply(
        params, cfg, prompts.x, position=prompts.position, segment=prompts.segment
    )
    prefix = Prefix(transformer.pack(kv), prompts.segment > 0)
    blank = jnp.full((b, w, beams.max_new), beams.pad, jnp.int32)
    start = _Loop(
        step=jnp.zeros((), jnp.int32),
        cache=transformer.new_cache(cfg, b, w * max(1, beams.max_new - 1)).kv,
        path=jnp.zeros((b, w, beams.max_new), jnp.int32),
        tokens=blank,
        # one beam, until there are more: w equal ones would propose the same tokens
        score=jnp.broadcast_to(jnp.where(jnp.arange(w) == 0, 0.0, DEAD), (b, w)),
        pool=_Pool(
            blank, jnp.zeros((b, w), jnp.int32), jnp.full((b, w), DEAD), jnp.zeros((b, w), bool)
        ),
        open=jnp.ones(b, bool),
        stuck=jnp.zeros((), bool),
    )
    hidden = jnp.broadcast_to(last(hidden, prompts.segment)[:, None], (b, w, cfg.d))
    loop = jax.lax.while_loop(lambda s: _more(s, beams), body, select(start, hidden))
    pool = loop.pool
    beyond = jnp.arange(beams.max_new) >= pool.length[..., None]
    tokens = jnp.where(beyond, beams.pad, pool.tokens)
    return Found(*(a[:, : beams.returned] for a in (tokens, pool.length, pool.score)))


def _more(loop: _Loop, beams: Beams):
    more = loop.open.any() & ~loop.stuck
    return more & ~loop.pool.finished.all() if beams.when_full else more


def _to_the_end(beams: Beams) -> bool:
    return beams.early_stopping == "never" and beams.length_penalty > 0


def _rows(a, index):
    """Row index[b, j] of a (b, n, ...) for every j."""
    return jnp.take_along_axis(a, index.reshape(*index.shape, *[1] * (a.ndim - 2)), axis=1)


def _candidates(logits, running, keep, banned):
    """Score, parent and token (b, keep) of the best continuations, from logits (b, w, v)."""
    v = logits.shape[-1]
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # each beam's best first: then no array of w v scores is written
    best, token = largest(jnp.where(banned, -jnp.inf, logits), min(keep, v))
    score = (best - lse + running[..., None]).reshape(len(running), -1)
    score, at = jax.lax.top_k(score, keep)
    token = jnp.take_along_axis(token.reshape(score.shape[0], -1), at, 1)
    return score, at // min(keep, v), token


def _merge(loop: _Loop, tokens, score, ended, norm, beams: Beams) -> _Pool:
    """The pool after candidates that ended among the first w were offered to it."""
    w, old = beams.width, loop.pool
    offered = ended & (jnp.arange(score.shape[1]) < w)
    full = old.finished.all(-1) if beams.when_full else jnp.zeros_like(loop.open)
    shut = DEAD * full.astype(jnp.float32) + DEAD * (~loop.open)
    score = score / norm + shut[:, None] + DEAD * ~offered
    both = lambda a, b: jnp.concatenate([a, b], axis=1)
    best, at = jax.lax.top_k(both(old.score, score), w)
    length = jnp.broadcast_to(loop.step + 1, score.shape)
    return _Pool(
        _rows(both(old.tokens, tokens), at),
        _rows(both(old.length, length), at),
        best,
        _rows(both(old.finished, offered), at),
    )


def _age(path: Int[Array, "b w t"], now: Int[Array, ""]) -> Int[Array, "b w s"]:
    """How many tokens back place (j, r) of the tree lies for each beam, negative off its path."""
    b, w, t = path.shape
    steps = jnp.arange(t - 1)
    mine = path[:, :, :-1, None] == jnp.arange(w)  # (b, w, t - 1, w)
    age = jnp.where(mine, (now - steps)[:, None], -1)
    return age.reshape(b, w, -1)
