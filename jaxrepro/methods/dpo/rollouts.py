"""Responses of a policy to questions, on the rollout engine; and rounds of pairs made of them."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.methods.dpo import online, rows
from jaxrepro.methods.dpo.online import Drawn
from jaxrepro.methods.dpo.setting import Setting
from jaxrepro.models import lora, transformer
from jaxrepro.rollout.engine import Engine
from jaxrepro.rollout.generate import FINISH_EOS, Blend, Prompts, Sampling, generate
from jaxrepro.rollout.requests import Request
from jaxrepro.train import policy


class Writer:
    """Draws responses at one temperature; the engine is built at the first call and kept."""

    def __init__(self, s: Setting, *, temperature: float, slots: int):
        self._s, self._slots = s, slots
        self._sampling = Sampling(
            max_new=s.config.data.max_completion,
            eos=(s.policy.tokenizer.eos,),
            pad=s.policy.tokenizer.pad,
            temperature=temperature,
        )
        self._engine: Engine | None = None

    def __call__(
        self, params: Any, questions: Sequence[Any], *, n: int, key: Any, first: int = 0
    ) -> list[tuple[list[Drawn], list[np.ndarray]]]:
        """For each question n responses and their log-probs (temperature 1). first: id of the first one."""
        s = self._s
        prompts = [prompt(s, q) for q in questions]
        new = self._sampling.max_new
        capacity = -(-(max(map(len, prompts)) + new) // 32) * 32
        policy.within(s.policy, capacity, "prompt and data.max_completion")
        if self._engine is None or self._engine.capacity < capacity:
            mesh = s.policy.mesh if s.policy.mesh.size > 1 else None
            self._engine = Engine(
                params,
                s.policy.cfg,
                self._sampling,
                slots=self._slots,
                capacity=capacity,
                mesh=mesh,
            )
        else:
            self._engine.update(params)
        requests = [Request(ids, id=first + i, n=n) for i, ids in enumerate(prompts)]
        out = []
        for done in self._engine.run(requests, key):
            ended = done.finish == FINISH_EOS
            drawn = [
                Drawn(tokens.tolist(), text(s, tokens), bool(e))
                for tokens, e in zip(done.tokens, ended)
            ]
            out.append((drawn, list(done.lp_raw)))
        return out


class Mixture:
    """Draws from the geometric mixture of policy and reference, of Nash-MD (arXiv:2312.00886)."""

    def __init__(self, s: Setting, *, temperature: float, share: float, batch: int, n: int = 1):
        """share: of the reference. batch: responses at a time; n: to each question."""
        self._s, self._batch = s, max(1, batch // n)
        sampling = Sampling(
            max_new=s.config.data.max_completion,
            eos=(s.policy.tokenizer.eos,),
            pad=s.policy.tokenizer.pad,
            temperature=temperature,
        )
        cfg = dataclasses.replace(s.policy.cfg, lora=None)  # `off` and `merge` leave no adapters

        @partial(sharding.on_mesh, s.policy.mesh)
        @jax.jit
        def draw(params, ref, asked, ids, key):
            params, ref = (lora.merge(p, s.policy.cfg)[0] for p in (params, ref))
            x, other = (transformer.embed(p, cfg, asked.tokens) for p in (params, ref))
            prompts = Prompts(x, asked.position, asked.segment, asked.next_position)
            blend = Blend(ref, other, share)
            out = generate(
                params, cfg, prompts, request_ids=ids, key=key, sampling=sampling, n=n, blend=blend
            )
            return out.tokens, out.length, out.finish

        self._draw = draw

    def __call__(
        self, params: Any, ref_params: Any, questions: Sequence[Any], *, key: Any, first: int = 0
    ) -> list[list[Drawn]]:
        """n responses to each question. first: id of the first one."""
        s, out = self._s, []
        shape = rows.shape_of([{"prompt": prompt(s, q), "responses": [[]]} for q in questions])
        parts = sharding.row_parts(s.policy.mesh)
        size = -(-min(self._batch, len(questions)) // parts) * parts
        for at in range(0, len(questions), size):
            some = list(questions[at : at + size])
            some += [some[-1]] * (size - len(some))
            items = [{"id": q["id"], "prompt": prompt(s, q), "responses": [[]]} for q in some]
            prompts = rows.collate(items, shape, pad=s.policy.tokenizer.pad).prompts
            ids = np.arange(first + at, first + at + size, dtype=np.int32)
            found = self._draw(params, ref_params, policy.place(s.policy, prompts), ids, key)
            for each in zip(*sharding.fetch(found)):
                cut = [(t[:length], bool(finish == FINISH_EOS)) for t, length, finish in zip(*each)]
                out.append([Drawn(t.tolist(), text(s, t), ended) for t, ended in cut])
        return out[: len(questions)]


def prompt(s: Setting, question: Any) -> list[int]:
    """The tokens before a response."""
    turns = question.get("prompt") or [{"role": "user", "content": question["problem"]}]
    return s.encoder.prompt({"id": question["id"], "prompt": turns})


def text(s: Setting, tokens: Any) -> str:
    """A response without its end of turn."""
    return s.policy.tokenizer.decode(tokens)


def demonstration(s: Setting, question: Any) -> Drawn:
    """The solution of a question as a response."""
    ids = s.encoder.response({"id": question["id"], "responses": [question["solution"]]}, 0)
    return Drawn(ids[: s.config.data.max_completion], question["solution"], True)


def draw_round(
    s: Setting,
    writers: dict[str, Any],
    params: Any,
    ref_params: Any,
    r: int,
    judge: Any,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The items of round r: as many as its updates take where prompts give them, and what they cost.

    Beside them the data of the key that drew them, and the ids of prompts that gave no pair.

    Prompts are taken in order, another stretch for each round, and again from the first after the last.
    Up to online.tries times as many prompts as pairs are asked; UserError where none gives a pair. `say` hears
    how far the round is after each stretch.
    """
    config = s.config.online
    kind = online.KINDS[config.kind]
    n = config.samples if kind.samples is None else kind.samples
    want = s.config.dpo.batch * config.every
    key = jax.random.fold_in(jax.random.key(s.config.seed), r)
    keys = jax.random.split(key)
    items: list[dict[str, Any]] = []
    discarded: list[str] = []
    asked = 0
    start = r * want * config.tries
    while len(items) < want and asked < want * config.tries:
        count = want - len(items)
        at = [(start + asked + i) % len(s.asked) for i in range(count)]
        questions = [s.asked[i] for i in at]
        own: list[list[Drawn]] = [[] for _ in questions]
        other = own
        if n:
            found = writers["policy"](params, questions, n=n, key=keys[0], first=asked)
            own = [drawn for drawn, _ in found]
        if kind.other == "demonstration":
            other = [[demonstration(s, q)] for q in questions]
        elif kind.other == "mixture":
            other = writers["mixture"](params, ref_params, questions, key=keys[1], first=asked)
        elif kind.other == "reference":
            found = writers["reference"](ref_params, questions, n=1, key=keys[1], first=asked)
            other = [drawn for drawn, _ in found]
        for q, drawn, more in zip(questions, own, other):
            responses = [*drawn, *more]
            verdict = None
            if kind.other != "demonstration":
                verdict = online.scores(judge, q, responses, penalty=config.missing_end)
            made = online.item(config.kind, q, prompt(s, q), responses, verdict, scale=config.scale)
            items += [made] if made else []
            discarded += [] if made else [q["id"]]
        asked += count
        say(f"round {r}: {min(len(items), want)} of {want} pairs from {asked} prompts")
    if not items:
        raise UserError(
            f"round {r}: none of {asked} prompts gave two responses that the judge tells apart; raise "
            "online.temperature or online.samples, or choose easier prompts"
        )
    key_data = np.asarray(jax.random.key_data(key)).tolist()
    return {
        "round": r, "key": key_data, "asked": asked, "discarded": discarded, "items": items[:want]
    }  # fmt: skip
