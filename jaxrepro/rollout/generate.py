"""Completions of prompts: prefill once per question, then one token per step for all its n samples.

The prompt's keys and values are a prefix that the n samples of a question read together; a sample's
own tokens lie in a cache that is updated in place, one per layer. All rows are at the same step, the
loop stops when every row is done, and shapes are static: one compilation per (b, t, n, max_new).

Sample m of request r draws its token j with key fold_in(fold_in(key, r * n + m), j): it depends on
neither its batch mates nor the padding. Rows that are done keep computing and are not recorded.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.models import lora, transformer
from jaxrepro.models.scoring import last
from jaxrepro.models.transformer import Prefix, TransformerConfig
from jaxrepro.ops.dense import Flipped, flip
from jaxrepro.ops.sampling import draw, greedy, truncate

FINISH_EOS = 1
FINISH_LENGTH = 2
FINISH_STOP = 3  # a stop sequence (rollout/engine.py)
# Temperatures for which no logit of a model, divided, leaves float32.
COLDEST, HOTTEST = 1e-6, 1e6


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature (0 = greedy), then top_k (0 = off), top_p (1 = off), min_p.

    max_new bounds the tokens of a sample, its eos included; before min_new tokens no eos is drawn.
    `pad` fills what lies beyond a sample's length; it is never used to find that length.
    repetition_penalty (1 = off) makes tokens of prompt and completion rarer, before the temperature.
    """

    max_new: int
    eos: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    pad: int = 0
    min_new: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if self.max_new < 1:
            raise UserError(f"max_new {self.max_new} must be at least 1")
        if self.temperature != 0 and not COLDEST <= self.temperature <= HOTTEST:
            raise UserError(
                f"temperature {self.temperature} must be 0 (greedy) or lie in [{COLDEST}, {HOTTEST}]"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must lie in (0, 1] (1 = off)")
        if not 0 <= self.min_new <= self.max_new:
            raise UserError(f"min_new {self.min_new} must lie in 0..{self.max_new} (max_new)")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} must be >= 0 (0 = off)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p {self.min_p} must lie in [0, 1] (0 = off)")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty {self.repetition_penalty} must be > 0 (1 = off)")


class Prompts(NamedTuple):
    """A batch of prompts as embeddings, padded on the right (segment 0)."""

    x: Any  # (b, t, d)
    position: Any  # (b, t) or (b, 3, t) int32
    segment: Any  # (b, t) int32
    next_position: Any  # (b,) int32, the position of the first new token


class Blend(NamedTuple):
    """A second policy of the same shape: logits are (1 - share) * the first's + share * these.

    That is the geometric mixture of the two distributions, normalised.
    """

    params: Any
    x: Any  # (b, t, d), its own embeddings of the prompts
    share: Any


class Samples(NamedTuple):
    """n completions per prompt; entries at and after `length` are pad and 0."""

    tokens: Any  # (b, n, t) int32
    length: Any  # (b, n) int32, counts the eos
    lp_sampler: Any  # (b, n, t) float32, nats, under the distribution that was sampled
    lp_raw: Any  # (b, n, t) float32, nats, temperature 1, nothing cut off
    finish: Any  # (b, n) int8, FINISH_EOS or FINISH_LENGTH


class _Loop(NamedTuple):
    step: Any  # tokens drawn so far
    token: Any  # (rows,) the newest
    cache: Any  # of each model
    done: Any  # (rows,) bool
    length: Any  # (rows,)
    record: Any  # (tokens, lp_sampler, lp_raw), each (max_new, rows): a step writes one row


def generate(
    params: dict,
    cfg: TransformerConfig,
    prompts: Prompts,
    *,
    request_ids: Int[Array, "b"],
    key: PRNGKeyArray,
    sampling: Sampling,
    n: int,
    allowed: Bool[Array, "v"] | None = None,
    blend: Blend | None = None,
) -> Samples:
    """Draw n completions of every prompt; pure, for callers to jit with cfg, sampling and n static.

    request_ids name the questions: the same id, key and prompt give the same samples in any batch.
    allowed: tokens that may be drawn at all (lp_raw stays that of the whole vocabulary). Greedy
    decoding returns lp_sampler = 0, the log-probability of a certain choice. blend: draw from a mixture;
    lp_raw is then the mixture's.
    """
    check_eos(sampling.eos, cfg)
    if sampling.top_k > cfg.vocab:
        raise UserError(f"top_k {sampling.top_k} is above the vocabulary {cfg.vocab}: lower it")
    if sampling.repetition_penalty != 1:
        raise UserError("repetition_penalty needs the prompts' token ids: use the engine, or 1")
    b, rows = prompts.x.shape[0], prompts.x.shape[0] * n
    models = [for_decode(params, cfg), *([for_decode(blend.params, cfg)] if blend else [])]
    ids = (request_ids[:, None] * n + jnp.arange(n)).reshape(rows)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
    eos = jnp.zeros(cfg.vocab, bool).at[jnp.asarray(sampling.eos, jnp.int32)].set(True)
    first = jnp.repeat(prompts.next_position, n)  # (rows,)

    def record(state, hidden):
        """Draw token `step` of every row from the hidden (rows, d) of each model and note it."""
        each = [transformer.logits(p, cfg, h) for p, h in zip(models, hidden)]
        raw = (1 - blend.share) * each[0] + blend.share * each[1] if blend else each[0]
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
        z = raw if allowed is None else jnp.where(allowed, raw, -jnp.inf)
        if sampling.min_new:
            z = jnp.where(eos & (state.step < sampling.min_new), -jnp.inf, z)
        token, lp, lp_raw = choose(step_keys, raw, z, sampling)
        note = (sampling.pad, 0.0, 0.0)
        new = [jnp.where(state.done, e, a) for e, a in zip(note, (token, lp, lp_raw))]
        put = jax.lax.dynamic_update_index_in_dim
        return state._replace(
            step=state.step + 1,
            token=token,
            done=state.done | eos[token],
            length=state.length + ~state.done,
            record=tuple(put(r, a, state.step, 0) for r, a in zip(state.record, new)),
        )

    starts, prefixes = [], []
    for p, x in zip(models, (prompts.x, blend and blend.x)):
        hidden, kv = transformer.apply(
            p, cfg, x, position=prompts.position, segment=prompts.segment
        )
        prefixes.append(Prefix(transformer.pack(kv), prompts.segment > 0))
        starts.append(jnp.repeat(last(hidden, prompts.segment), n, axis=0))
    shape = (sampling.max_new, rows)
    state = _Loop(
        step=jnp.zeros((), jnp.int32),
        token=jnp.zeros(rows, jnp.int32),
        cache=tuple(
            transformer.new_cache(cfg, rows, max(1, sampling.max_new - 1), lockstep=True)
            for _ in models
        ),
        done=jnp.zeros(rows, bool),
        length=jnp.zeros(rows, jnp.int32),
        record=(
            jnp.full(shape, sampling.pad, jnp.int32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros(shape, jnp.float32),
        ),
    )
    state = record(state, starts)

    def body(state):
        hidden, caches = [], []
        for p, prefix, cache in zip(models, prefixes, state.cache):
            h, cache = transformer.apply(
                p,
                cfg,
                transformer.embed(p, cfg, state.token[:, None]),
                position=(first + state.step - 1)[:, None],
                prefix=prefix,
                cache=cache,
            )
            hidden.append(h[:, 0])
            caches.append(cache)
        return record(state._replace(cache=tuple(caches)), hidden)

    more = lambda s: (s.step < sampling.max_new) & ~s.done.all()
    state = jax.lax.while_loop(more, body, state)
    tokens, lp, lp_raw = (a.T.reshape(b, n, -1) for a in state.record)
    finish = jnp.where(state.done, FINISH_EOS, FINISH_LENGTH).astype(jnp.int8)
    return Samples(tokens, state.length.reshape(b, n), lp, lp_raw, finish.reshape(b, n))


def check_eos(eos: Iterable[int], cfg: TransformerConfig) -> None:
    """UserError for an end that no sample could reach: jax drops an index outside the array."""
    bad = [e for e in eos if not 0 <= e < cfg.vocab]
    if bad:
        raise UserError(f"eos {bad[0]} is no token id; the vocabulary has 0..{cfg.vocab - 1}")


def for_decode(params: dict, cfg: TransformerConfig, *, split: bool | None = None) -> dict:
    """Unstacked layers in the compute dtype, laid out once and not at every step.

    split: whether a mesh splits the weights (default: the one in force, whose decode rules then pin
    them: a layer gathered at every token would cost more than the token). On one CPU they are flipped
    (ops/dense.py).
    """
    params = jax.tree.map(lambda w: w.astype(cfg.dtype), params)
    if split is None:
        split = jax.sharding.get_abstract_mesh().size > 1
        if split and not isinstance(params["layers"], tuple):
            axes = transformer.axes(cfg)
            axes = axes if lora.has(params) else lora.off(axes)
            pin = lambda w, names: sharding.constrain(w, *names, mode="decode")
            params = jax.tree.map(pin, params, axes)
    params = transformer.unstack(params)
    if split or jax.default_backend() != "cpu" or isinstance(params["layers"][0]["wq"], Flipped):
        return params
    flipped = lambda layer: {n: flip(layer[n], size) for n, size in lora.PROJECTIONS.items()}
    return params | {"layers": tuple(layer | flipped(layer) for layer in params["layers"])}


def choose(keys, raw, z, sampling, forced=None):
    """Token, its log-probability under the sampler, and under softmax(raw), each (rows,).

    z: raw logits with whatever bias or mask. forced: (token, where) replaces draws that are made
    already; such a choice is certain, as a greedy one is, so its lp_sampler is 0.
    """
    pick = lambda a, token: jnp.take_along_axis(a, token[:, None], 1)[:, 0]
    score = lambda a, token: pick(a, token) - jax.nn.logsumexp(a, axis=-1)
    swap = lambda token: token if forced is None else jnp.where(forced[1], forced[0], token)
    if sampling.temperature == 0:
        token = swap(greedy(z))
        lp_raw = score(raw, token)
        return token, jnp.zeros_like(lp_raw), lp_raw
    cut = truncate(
        z / sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
    )
    token = swap(draw(keys, cut))
    lp = score(cut, token)
    return token, lp if forced is None else jnp.where(forced[1], 0.0, lp), score(raw, token)
