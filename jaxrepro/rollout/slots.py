"""The engine's state on the device and the three programs that touch it: prefill, insert, decode.

A slot is a row of the cache: `room` places for a prompt, then a ring of max_new places. At every step
all rows write at the same place of the ring, one slice in place, wherever each row is in its own text:
keys are rotated by true positions, so the order of places means nothing, and a row sees those of the
ring's places that are at most as many steps old as the row itself. Nothing is padded on the left.

    place p < room:   seen where p < prompt,  age = prompt + step - p
    place room + j:   age = (cursor - j) mod max_new,  seen where age <= step

The last token of a prompt is not prefilled but fed by the slot's first step: then the first token is
drawn as all others are, and prefill needs no head.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrepro.models import transformer
from jaxrepro.models.transformer import Cache, Packed, TransformerConfig
from jaxrepro.ops.sampling import penalise
from jaxrepro.rollout import stops as automata
from jaxrepro.rollout.generate import FINISH_EOS, FINISH_LENGTH, FINISH_STOP, Sampling, choose


class Slots(NamedTuple):
    """b rows; None where no request so far needed the feature."""

    kv: Packed  # (b, k, i, room + ring), (b, k, room + ring, i)
    cursor: Any  # () int32, where the ring is written next
    x: Any  # (b, d), the embedding that is fed next
    position: Any  # (b, c) int32, its position streams
    next_position: Any  # (b,) int32, the position of the token after it
    prompt: Any  # (b,) int32, prompt tokens in the cache
    step: Any  # (b,) int32, tokens drawn
    active: Any  # (b,) bool
    key: Any  # (b, ...) uint32, data of fold_in(key, id * n + m)
    max_new: Any  # (b,) int32
    min_new: Any  # (b,) int32
    forced: Any = None  # ((b, f) int32, (b,) int32 how many)
    stops: Any = None  # automata.Stops
    bias: Any = None  # (b, v) float32
    seen: Any = None  # (b, v) bool, tokens of prompt and completion


class Fresh(NamedTuple):
    """p prompts that were prefilled, without their last token."""

    kv: Packed  # of t places
    x: Any  # (p, d), the last token
    position: Any  # (p, c)
    next_position: Any  # (p,)
    length: Any  # (p,) tokens in kv
    seen: Any = None  # (p, v)


class Rows(NamedTuple):
    """m samples that enter slots; slot = b is a row of padding."""

    slot: Any  # (m,) int32
    source: Any  # (m,) int32, row of Fresh
    id: Any  # (m,) int32, id * n + m
    key: Any  # (m, ...) uint32
    max_new: Any  # (m,)
    min_new: Any  # (m,)
    forced: Any = None
    stops: Any = None
    bias: Any = None  # (m, v)


class Round(NamedTuple):
    """What a decode round says: a row's tokens are the first `count` entries of its columns."""

    steps: Any  # () int32, how many were made
    tokens: Any  # (rounds, b) int32
    lp_sampler: Any  # (rounds, b) float32
    lp_raw: Any  # (rounds, b) float32
    count: Any  # (b,) int32
    finish: Any  # (b,) int8, 0 = not finished in this round
    stop: Any  # (b,) int32, which sequence matched, or -1


# the axes of each array, for the mesh
AXES = Slots(
    kv=Packed(("batch", "kv_heads", None, None), ("batch", "kv_heads", None, None)),
    cursor=(),
    x=("batch", None),
    position=("batch", None),
    key=("batch", None),
    forced=(("batch", None), ("batch",)),
    stops=automata.Stops(("batch", None, None), ("batch", None), ("batch", None, None)),
    bias=("batch", "vocab"),
    seen=("batch", "vocab"),
    **dict.fromkeys(
        ("next_position", "prompt", "step", "active", "max_new", "min_new"), ("batch",)
    ),
)


def empty(cfg: TransformerConfig, b: int, places: int, key_words: int) -> Slots:
    """Slots without requests or optional features."""
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
    return Slots(
        kv=transformer.new_cache(cfg, b, places).kv,
        cursor=zeros(),
        x=jnp.zeros((b, cfg.d), cfg.dtype),
        position=zeros(b, 1 if cfg.mrope_sections is None else 3),
        next_position=zeros(b),
        prompt=zeros(b),
        step=zeros(b),
        active=jnp.zeros(b, bool),
        key=jnp.zeros((b, key_words), jnp.uint32),
        max_new=zeros(b),
        min_new=zeros(b),
    )


@partial(jax.jit, static_argnames=("cfg", "track"))
def prefill(params, tokens: Int[Array, "p t"], length: Int[Array, "p"], *, cfg, track) -> Fresh:
    """Prompts of `length` >= 1 tokens in rows of t + 1, padded on the right. track: fill `seen`."""
    last = jnp.take_along_axis(tokens, length[:, None] - 1, 1)
    kv = _prompt_kv(params, cfg, transformer.embed(params, cfg, tokens[:, :-1]), None, length - 1)
    at = jnp.broadcast_to(length[:, None] - 1, (len(tokens), _streams(cfg)))
    seen = None
    if track:
        real = jnp.arange(tokens.shape[1]) < length[:, None]
        seen = jnp.zeros((len(tokens), cfg.vocab), bool)
        row = jnp.arange(len(tokens))[:, None]
        seen = seen.at[row, jnp.where(real, tokens, cfg.vocab)].set(True, mode="drop")
    return Fresh(kv, transformer.embed(params, cfg, last)[:, 0], at, length, length - 1, seen)


@partial(jax.jit, static_argnames=("cfg",))
def prefill_embedded(params, x, position, length, next_position, *, cfg) -> Fresh:
    """The same of embeddings x (p, t + 1, d) at position (p, c, t + 1)."""
    at = (length - 1)[:, None, None]
    last = jnp.take_along_axis(x, at, 1)[:, 0].astype(cfg.dtype)
    where = jnp.take_along_axis(position, at, 2)[..., 0]
    kv = _prompt_kv(params, cfg, x[:, :-1], position[..., :-1], length - 1)
    return Fresh(kv, last, where, next_position, length - 1)


def _streams(cfg):
    return 1 if cfg.mrope_sections is None else 3


def _prompt_kv(params, cfg, x, position, length):
    p, t, _ = x.shape
    if position is None:
        position = jnp.broadcast_to(jnp.arange(t), (p, t))
    elif position.shape[1] == 1:
        position = position[:, 0]
    real = (jnp.arange(t) < length[:, None]).astype(jnp.int32)
    return transformer.pack(transformer.apply(params, cfg, x, position=position, segment=real)[1])


def insert(slots: Slots, fresh: Fresh, rows: Rows, *, impl: str) -> Slots:
    """Give rows their slots; the prompt's keys and values are copied to each sample of it."""
    put = lambda old, new: old.at[rows.slot].set(new.astype(old.dtype), mode="drop")
    take = lambda a: a[rows.source]
    t = fresh.kv.v[0].shape[2]
    kv = Packed(
        tuple(
            o.at[rows.slot, :, :, :t].set(take(n), mode="drop")
            for o, n in zip(slots.kv.k, fresh.kv.k)
        ),
        tuple(
            o.at[rows.slot, :, :t].set(take(n), mode="drop") for o, n in zip(slots.kv.v, fresh.kv.v)
        ),
    )
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rows.key, impl=impl), rows.id)
    out = slots._replace(
        kv=kv,
        x=put(slots.x, take(fresh.x)),
        position=put(slots.position, take(fresh.position)),
        next_position=put(slots.next_position, take(fresh.next_position)),
        prompt=put(slots.prompt, take(fresh.length)),
        step=slots.step.at[rows.slot].set(0, mode="drop"),
        active=slots.active.at[rows.slot].set(True, mode="drop"),
        key=put(slots.key, jax.random.key_data(keys)),
        max_new=put(slots.max_new, rows.max_new),
        min_new=put(slots.min_new, rows.min_new),
    )
    for name in ("forced", "stops", "bias"):
        if getattr(slots, name) is not None:
            new = jax.tree.map(put, getattr(slots, name), getattr(rows, name))
            out = out._replace(**{name: new})
    if slots.seen is not None:
        out = out._replace(seen=put(slots.seen, take(fresh.seen)))
    return out


class _Loop(NamedTuple):
    slots: Slots
    steps: Any
    record: Any  # three of (rounds, b)
    count: Any
    finish: Any
    stop: Any


def decode(
    params: dict,
    slots: Slots,
    goal: Int[Array, ""],
    *,
    cfg: TransformerConfig,
    sampling: Sampling,
    rounds: int,
    room: int,
    impl: str,
) -> tuple[Slots, Round]:
    """Up to `rounds` steps of all rows; ends early once at most `goal` of them are active."""
    b, ring = len(slots.step), slots.kv.v[0].shape[2] - room
    eos = jnp.zeros(cfg.vocab, bool).at[jnp.asarray(sampling.eos, jnp.int32)].set(True)

    def body(loop: _Loop) -> _Loop:
        s = loop.slots
        hidden, cache = transformer.apply(
            params,
            cfg,
            s.x[:, None],
            position=s.position if s.position.shape[1] == 1 else s.position[..., None],
            cache=Cache(s.kv, room + s.cursor),
            age=_age(s, room, ring)[:, None],
        )
        raw = transformer.logits(params, cfg, hidden[:, 0])
        token, lp, lp_raw = _next_token(s, raw, eos, sampling, impl)
        step = s.step + 1
        free = True if s.forced is None else step >= s.forced[1]
        by_eos = eos[token] & free
        by_length = step >= s.max_new
        automaton, which, by_stop = s.stops, jnp.full(b, -1), jnp.zeros(b, bool)
        if s.stops is not None:
            automaton, hits = automata.advance(s.stops, token)
            by_stop = hits.any(-1) & free & (step >= s.min_new)
            which = jnp.argmax(hits, axis=-1)
        seen = s.seen
        if seen is not None:
            seen = seen.at[jnp.arange(b), token].set(True)
        why = jnp.where(by_length, FINISH_LENGTH, 0)
        why = jnp.where(by_stop, FINISH_STOP, why)
        why = jnp.where(s.active & by_eos, FINISH_EOS, jnp.where(s.active, why, 0))
        put = lambda r, a: jax.lax.dynamic_update_index_in_dim(r, a, loop.steps, 0)
        return _Loop(
            slots=s._replace(
                kv=cache.kv,
                cursor=(s.cursor + 1) % ring,
                x=transformer.embed(params, cfg, token[:, None])[:, 0],
                position=jnp.broadcast_to(s.next_position[:, None], s.position.shape),
                next_position=s.next_position + 1,
                step=s.step + s.active,
                active=s.active & (why == 0),
                stops=automaton,
                seen=seen,
            ),
            steps=loop.steps + 1,
            record=jax.tree.map(put, loop.record, (token, lp, lp_raw)),
            count=loop.count + s.active,
            finish=jnp.where(why > 0, why, loop.finish).astype(jnp.int8),
            stop=jnp.where(why == FINISH_STOP, which, loop.stop).astype(jnp.int32),
        )

    more = lambda loop: (loop.steps < rounds) & (loop.slots.active.sum() > goal)
    zeros = jnp.zeros((rounds, b))
    start = _Loop(
        slots=slots,
        steps=jnp.zeros((), jnp.int32),
        record=(zeros.astype(jnp.int32), zeros.astype(jnp.float32), zeros.astype(jnp.float32)),
        count=jnp.zeros(b, jnp.int32),
        finish=jnp.zeros(b, jnp.int8),
        stop=jnp.full(b, -1, jnp.int32),
    )
    end = jax.lax.while_loop(more, body, start)
    return end.slots, Round(end.steps, *end.record, end.count, end.finish, end.stop)


def _age(s: Slots, room: int, ring: int) -> Int[Array, "b s"]:
    """How many tokens back each place lies, negative where the row does not see it."""
    place = jnp.arange(room)
    prompt = jnp.where(place < s.prompt[:, None], (s.prompt + s.step)[:, None] - place, -1)
    back = (s.cursor - jnp.arange(ring)) % ring
    return jnp.concatenate([prompt, jnp.where(back <= s.step[:, None], back, -1)], axis=-1)


def _next_token(s: Slots, raw, eos, sampling: Sampling, impl):
    """Token and its two log-probabilities for each row."""
    z, forced = raw, None
    if s.seen is not None:
        z = penalise(z, s.seen, sampling.repetition_penalty)
    if s.bias is not None:
        z = z + s.bias
    z = jnp.where(eos & (s.step < s.min_new)[:, None], -jnp.inf, z)
    if s.forced is not None:
        table, many = s.forced
        at = jnp.clip(s.step, max=table.shape[1] - 1)[:, None]
        forced = jnp.take_along_axis(table, at, 1)[:, 0], s.step < many
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(s.key, impl=impl), s.step)
    return choose(keys, raw, z, sampling, forced)
