"""A rollout engine: requests of any length flow through a fixed number of slots, without retracing.

    engine = Engine(params, cfg, sampling, slots=16, capacity=512)
    completions = engine.run([Request(prompt, id=0, n=4), ...], key)
    engine.submit(request, key); done = engine.step()        # the same as a stream

The host keeps the books in numpy; the device runs decode rounds of up to `rounds` steps, and a round
ends early when enough rows are done and others wait. One transfer a round. A prompt is prefilled once
and copied to the slots of its n samples. Shapes are drawn from powers of two, so the number of
compilations is bounded and a second run compiles nothing.

What a sample is depends on its request and key alone: not on slots, order, batch mates or refill, up
to the rounding of matrix products of other shapes.
"""

from collections import deque
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.models import transformer
from jaxrepro.models.scoring import completion_log_probs
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.rollout import requests as plain
from jaxrepro.rollout import slots as device
from jaxrepro.rollout import stops as automata
from jaxrepro.rollout.generate import Prompts, Sampling, check_eos, for_decode
from jaxrepro.rollout.requests import Checked, Completion, Embedded, Request

SMALLEST = 16  # the smallest bucket of prompt lengths
TOGETHER = 8  # prompts of one prefill


def bucket(n: int, least: int = 1, most: int | None = None, factor: int = 2) -> int:
    """The smallest least * factor^j that is at least n, or `most` where that is smaller."""
    size = least
    while size < n:
        size *= factor
    return size if most is None else min(size, most)


class Engine:
    """Slots and queue of one model; see the module."""

    def __init__(
        self,
        params: dict,
        cfg: TransformerConfig,
        sampling: Sampling,
        *,
        slots: int = 16,
        capacity: int = 512,
        rounds: int = 32,
        refill: int | None = None,
        mesh: Any = None,
    ):
        """capacity: tokens of prompt and completion (of sampling.max_new) that a slot holds.

        rounds: steps of a decode round. refill: how many rows must be done before a round ends early
        for those that wait (default an eighth of the slots). mesh: from sharding.make_mesh; parameters
        and slots are then placed by its decode rules.
        """
        if slots < 1 or rounds < 1:
            raise UserError(f"slots {slots} and rounds {rounds} must be at least 1")
        if capacity <= sampling.max_new:
            raise UserError(
                f"capacity {capacity} leaves no room for a prompt beside max_new {sampling.max_new}; "
                "raise it"
            )
        if sampling.top_k > cfg.vocab:
            raise UserError(f"top_k {sampling.top_k} is above the vocabulary {cfg.vocab}: lower it")
        check_eos(sampling.eos, cfg)
        if mesh is not None:
            sharding.check_batches(mesh, slots=slots)
        self.cfg, self.sampling, self.mesh, self.capacity = cfg, sampling, mesh, capacity
        self.rounds, self.refill = rounds, refill or max(1, slots // 8)
        self.size, self.room = slots, capacity - sampling.max_new
        self._params = None
        self._state: device.Slots | None = None
        self._impl = ""
        self._queue: deque[tuple[_Group, int]] = deque()
        self._held: list[tuple[_Group, int] | None] = [None] * slots
        self._totals = dict.fromkeys(("steps", "useful", "rounds", "prompts", "prompt_tokens"), 0)
        self.update(params)

    # --- weights -----------------------------------------------------------------------------

    def update(self, params: dict) -> None:
        """Decode with these parameters from now on: cast and unstacked in one program, in place.

        The parameters that are given stay as they are. Completions under way go on with the new ones.
        """
        self._params = _prepare_program(self.cfg, self.mesh)(self._params, params)

    # --- requests ----------------------------------------------------------------------------

    def run(self, requests: Sequence[Request], key: Any) -> list[Completion]:
        """The completions of requests, in their order; everything is checked before anything runs."""
        if self.pending:
            raise UserError(f"{self.pending} samples are still under way; run needs an idle engine")
        groups = self._groups(requests, key)
        self._enqueue(groups)
        while self.pending:
            self.step()
        return [group.completion() for group in groups]

    def submit(self, request: Request, key: Any) -> None:
        """Add a request to the queue; `step` returns its completion when all its samples are done."""
        self._enqueue(self._groups([request], key))

    @property
    def pending(self) -> int:
        """Samples that wait or run."""
        return len(self._queue) + sum(held is not None for held in self._held)

    def step(self) -> list[Completion]:
        """Fill free slots, run one decode round, and return the requests that it completed."""
        if not self.pending:
            return []
        self._fill()
        busy = sum(held is not None for held in self._held)
        goal = max(0, busy - self.refill) if self._queue else 0
        self._state, out = self._decode()(self._params, self._state, np.int32(goal))
        return self._harvest(sharding.fetch(out))

    @property
    def stats(self) -> dict[str, int | float]:
        """Since the start: steps, rounds, prompts and their tokens, and `occupancy`, the share of
        slot-steps that made a token of a sample."""
        slot_steps = self._totals["steps"] * self.size
        return self._totals | {"occupancy": self._totals["useful"] / max(1, slot_steps)}

    def _groups(self, requests, key) -> list["_Group"]:
        impl = str(jax.random.key_impl(key))
        words = np.asarray(jax.random.key_data(key))
        if self._state is not None and impl != self._impl:
            raise UserError(f"keys of kind {impl} in an engine that began with {self._impl}")
        checked = [plain.check(r, self.cfg, self.sampling, self.capacity) for r in requests]
        if self._state is None:
            self._impl = impl
            state = device.empty(self.cfg, self.size, self.capacity, words.size)
            if self.sampling.repetition_penalty != 1:
                state = state._replace(seen=jnp.zeros((self.size, self.cfg.vocab), bool))
            self._state = self._placed(state)
        return [_Group(c, words) for c in checked]

    def _enqueue(self, groups) -> None:
        for group in groups:
            self._grow(group.checked)
            self._queue.extend((group, m) for m in range(group.checked.request.n))

    # --- shapes ------------------------------------------------------------------------------

    def _grow(self, c: Checked) -> None:
        """Add what a request is the first to need to the state; sizes are powers of two."""
        s, b = self._state, self.size
        old = s
        if c.forced and (s.forced is None or s.forced[0].shape[1] < len(c.forced)):
            wide = np.zeros((b, bucket(len(c.forced), 4)), np.int32)
            many = np.zeros(b, np.int32)
            if s.forced is not None:
                wide[:, : s.forced[0].shape[1]], many = sharding.fetch(s.forced)
            s = s._replace(forced=(wide, many))
        if c.stop:
            q, l = len(c.stop), max(map(len, c.stop))
            had = (0, 0) if s.stops is None else s.stops.tokens.shape[1:]
            if q > had[0] or l > had[1]:
                new = automata.pack([()] * b, bucket(max(q, had[0])), bucket(max(l, had[1]), 4))
                if s.stops is not None:
                    for wide, a in zip(new, sharding.fetch(s.stops)):
                        wide[tuple(slice(n) for n in a.shape)] = a
                s = s._replace(stops=new)
        if c.bias is not None and s.bias is None:
            s = s._replace(bias=jnp.zeros((b, self.cfg.vocab), jnp.float32))
        if s is not old:
            self._state = self._placed(s)

    def _placed(self, state: device.Slots) -> device.Slots:
        """The state on its devices, of which `_at` is the place."""
        at = None
        if self.mesh is not None:
            present = device.Slots(
                *(None if a is None else axes for a, axes in zip(state, device.AXES))
            )
            each = tuple([axes] * self.cfg.layers for axes in present.kv)
            present = present._replace(kv=type(state.kv)(*map(tuple, each)))
            flat, tree = jax.tree.flatten(state)
            names = jax.tree.leaves(present, is_leaf=_names)
            spec = lambda a, axes: sharding.spec_for(axes, a.shape, self.mesh, "decode")
            at = [NamedSharding(self.mesh, spec(a, axes)) for a, axes in zip(flat, names)]
            at = jax.tree.unflatten(tree, at)
        self._at = at
        return jax.device_put(state, at) if at is not None else jax.tree.map(jnp.asarray, state)

    def _decode(self):
        return _decode_program(
            self.cfg, self.sampling, self.rounds, self.room, self._impl, self._at, self.mesh
        )

    # --- filling and emptying slots ----------------------------------------------------------

    def _fill(self) -> None:
        """Move samples from the queue into free slots: prefill their prompts, copy, mark active."""
        free = [j for j, held in enumerate(self._held) if held is None]
        taken = []
        while free and self._queue:
            slot, (group, m) = free.pop(0), self._queue.popleft()
            self._held[slot] = (group, m)
            taken.append((slot, group, m))
        self._prefill(list(dict.fromkeys(g for _, g, _ in taken if g.fresh is None)))
        batches: dict[int, list] = {}
        for slot, group, m in taken:
            batches.setdefault(id(group.fresh[0]), []).append((slot, group, m))
        for some in batches.values():
            fresh = some[0][1].fresh[0]
            insert = _insert_program(self._impl, self._at)
            self._state = insert(self._state, fresh, self._rows(some))
        for _, group, m in taken:
            if m == group.checked.request.n - 1:
                group.fresh = None  # the last sample has its copy

    def _prefill(self, groups: list["_Group"]) -> None:
        kinds: dict[tuple, list[_Group]] = {}
        for group in groups:
            c = group.checked
            t = bucket(c.length - 1, SMALLEST, self.room)
            kinds.setdefault((isinstance(c.prompt, Embedded), t), []).append(group)
            self._totals["prompts"] += 1
            self._totals["prompt_tokens"] += c.length
        for (embedded, t), same in kinds.items():
            for start in range(0, len(same), TOGETHER):
                some = same[start : start + TOGETHER]
                p = bucket(len(some))
                run = self._prefill_embedded if embedded else self._prefill_tokens
                fresh = run([g.checked for g in some], p, t)
                for row, group in enumerate(some):
                    group.fresh = (fresh, row)

    def _prefill_tokens(self, some: list[Checked], p: int, t: int) -> device.Fresh:
        tokens, length = np.zeros((p, t + 1), np.int32), np.ones(p, np.int32)
        for row, c in enumerate(some):
            tokens[row, : c.length], length[row] = c.prompt, c.length
        track = self.sampling.repetition_penalty != 1
        return device.prefill(self._params, tokens, length, cfg=self.cfg, track=track)

    def _prefill_embedded(self, some: list[Checked], p: int, t: int) -> device.Fresh:
        streams = 1 if self.cfg.mrope_sections is None else 3
        position, length = np.zeros((p, streams, t + 1), np.int32), np.ones(p, np.int32)
        after, x = np.zeros(p, np.int32), []
        for row, c in enumerate(some):
            position[row, :, : c.length] = np.asarray(c.prompt.position)
            length[row], after[row] = c.length, int(c.prompt.next_position)
            x.append(jnp.pad(jnp.asarray(c.prompt.x), ((0, t + 1 - c.length), (0, 0))))
        x = jnp.pad(jnp.stack(x), ((0, p - len(some)), (0, 0), (0, 0)))
        return device.prefill_embedded(self._params, x, position, length, after, cfg=self.cfg)

    def _rows(self, some: list) -> device.Rows:
        """Host arrays of the samples that enter, padded to a power of four: each is a compilation."""
        m = bucket(len(some), 1, self.size, factor=4)
        checked = [group.checked for _, group, _ in some]
        fill = lambda values, empty=0: np.asarray([*values, *[empty] * (m - len(some))], np.int32)
        words = some[0][1].words
        key = np.zeros((m, words.size), np.uint32)
        key[: len(some)] = [group.words for _, group, _ in some]
        forced = stops = bias = None
        state = self._state
        if state.forced is not None:
            table = np.zeros((m, state.forced[0].shape[1]), np.int32)
            for row, c in enumerate(checked):
                table[row, : len(c.forced)] = c.forced
            forced = (table, fill(len(c.forced) for c in checked))
        if state.stops is not None:
            several = [c.stop for c in checked] + [()] * (m - len(some))
            stops = automata.pack(several, *state.stops.tokens.shape[1:])
        if state.bias is not None:
            bias = np.zeros((m, self.cfg.vocab), np.float32)
            for row, c in enumerate(checked):
                if c.bias is not None:
                    bias[row] = c.bias
        return device.Rows(
            slot=fill((slot for slot, _, _ in some), self.size),
            source=fill(group.fresh[1] for _, group, _ in some),
            id=fill(g.checked.request.id * g.checked.request.n + j for _, g, j in some),
            key=key,
            max_new=fill(c.max_new for c in checked),
            min_new=fill(c.min_new for c in checked),
            forced=forced,
            stops=stops,
            bias=bias,
        )

    def _harvest(self, out: device.Round) -> list[Completion]:
        self._totals["steps"] += int(out.steps)
        self._totals["useful"] += int(out.count.sum())
        self._totals["rounds"] += 1
        done = []
        for slot, held in enumerate(self._held):
            if held is None:
                continue
            group, m = held
            count = out.count[slot]
            group.parts[m].append(
                tuple(a[:count, slot].copy() for a in (out.tokens, out.lp_sampler, out.lp_raw))
            )
            if out.finish[slot]:
                self._held[slot] = None
                group.finish[m], group.stop[m] = out.finish[slot], out.stop[slot]
                group.left -= 1
                if not group.left:
                    done.append(group.completion())
        return done


class _Group:
    """A request under way: its prefilled prompt while samples wait, and what its samples said."""

    def __init__(self, checked: Checked, words: np.ndarray):
        n = checked.request.n
        self.checked, self.words, self.left = checked, words, n
        self.fresh: tuple[device.Fresh, int] | None = None
        self.parts: list[list] = [[] for _ in range(n)]
        self.finish, self.stop = np.zeros(n, np.int8), np.full(n, -1, np.int32)

    def completion(self) -> Completion:
        columns = [tuple(map(np.concatenate, zip(*parts))) for parts in self.parts]
        return Completion(self.checked.request.id, *zip(*columns), self.finish, self.stop)


# Programs outlive engines: one for the next evaluation, or of other slots, finds them compiled.


@lru_cache(maxsize=32)
def _prepare_program(cfg, mesh):
    at = None
    if mesh is not None:
        at = sharding.shard_tree(transformer.axes(cfg), transformer.abstract(cfg), mesh, "decode")
        one = jax.tree.map(_behind, at["layers"])
        at = at | {"layers": (one,) * cfg.layers}
    prepare = lambda old, new: for_decode(new, cfg, split=mesh is not None)
    return jax.jit(prepare, donate_argnums=0, keep_unused=True, out_shardings=at)


@lru_cache(maxsize=32)
def _insert_program(impl, at):
    return jax.jit(partial(device.insert, impl=impl), donate_argnums=0, out_shardings=at)


@lru_cache(maxsize=32)
def _decode_program(cfg, sampling, rounds, room, impl, at, mesh):
    run = partial(device.decode, cfg=cfg, sampling=sampling, rounds=rounds, room=room, impl=impl)
    out = None if at is None else (at, sharding.replicated(mesh))
    return jax.jit(run, donate_argnums=1, out_shardings=out)


def _names(x) -> bool:
    return type(x) is tuple and all(name is None or isinstance(name, str) for name in x)


def _behind(s: NamedSharding) -> NamedSharding:
    """The sharding of one layer of a stacked array."""
    return NamedSharding(s.mesh, jax.sharding.PartitionSpec(*s.spec[1:]))


# --- agreement of sampler and trainer --------------------------------------------------------


def measure_gap(
    params: dict,
    cfg: TransformerConfig,
    requests: Sequence[Request],
    completions: Sequence[Completion],
) -> dict[str, float]:
    """Mean and largest gap over the tokens of completions, scored anew as training does.

    A gap is |log-prob of the training graph - lp_raw| in nats: what separates the policy that sampled
    from the one that is trained, be it precision, kernels or stale weights. Token prompts, all of one n.
    """
    if any(isinstance(r.prompt, Embedded) for r in requests):
        raise UserError(
            "measure_gap takes token prompts; score embeddings and call rl.surrogates.sampler_gap"
        )
    many = [len(row) for c in completions for row in c.tokens]
    out = plain.samples(completions, bucket(max(many)))
    t = bucket(max(len(r.prompt) for r in requests), SMALLEST)
    tokens, real = np.zeros((len(requests), t), np.int32), np.zeros((len(requests), t), np.int32)
    for row, r in enumerate(requests):
        tokens[row, : len(r.prompt)], real[row, : len(r.prompt)] = r.prompt, 1
    prompts = Prompts(tokens, np.broadcast_to(np.arange(t), tokens.shape), real, real.sum(-1))
    lp = _score(params, cfg, prompts, out.tokens, out.length)
    real = np.arange(lp.shape[-1]) < out.length[..., None]
    gap = np.abs(out.lp_raw - np.asarray(lp))[real]
    return {"sampler_gap": float(gap.mean()), "sampler_gap_max": float(gap.max())}


@partial(jax.jit, static_argnames="cfg")
def _score(params, cfg, prompts, tokens, length):
    x = transformer.embed(params, cfg, prompts.x)
    return completion_log_probs(params, cfg, x, *prompts[1:], tokens, length)
