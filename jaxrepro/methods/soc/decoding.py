"""Decoders of SOC: beam search of several widths, its controls, and what diagnosis needs of each answer.

    score = log pi(y | x) / length ** penalty,    as rollout/beam.py: Hugging Face's beam search

The paper compares greedy decoding and a beam of 5; its length penalty is not known (1, the library's
default, is [inferred]; 0 is the sum that the theory speaks about). Width 1 is greedy decoding. A
temperature tau < 1 sharpens the distribution that the beams are ranked by: what SOC does by training,
done after it at no cost. A vote is the most frequent answer of samples.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.methods.soc.objective import SCORES, Stats, score
from jaxrepro.models import hf, transformer
from jaxrepro.models.scoring import completion_hidden
from jaxrepro.ops.logprob import token_stats
from jaxrepro.rollout.beam import Beams, beam_search
from jaxrepro.rollout.generate import Prompts
from jaxrepro.train import policy
from jaxrepro.train.policy import Policy


class Decoder(NamedTuple):
    """One way to answer."""

    name: str
    width: int = 1
    length_penalty: float = 1.0
    temperature: float = 1.0  # of the scores; of the samples where there are votes
    votes: int = 0  # samples; 0 = beam search


class Sums(NamedTuple):
    """Sums over the tokens of responses, float32; divide by the number of tokens for means."""

    logprob: Any
    q: Any
    q_minus_mean_logit: Any
    v: Any


class Answer(NamedTuple):
    """What a decoder returns for a question, and what it is measured by."""

    text: str
    length: int  # tokens, the end of turn included
    finished: bool
    sums: Sums | None  # of floats; None for a vote


def decoders(decode: Any) -> list[Decoder]:
    """The decoders of a config's `decode` section: widths, then variations of the headline width."""
    made = [
        Decoder("greedy" if w == 1 else f"beam{w}", w, decode.length_penalty)
        for w in sorted({*decode.beams, decode.width})
    ]
    head = headline(decode)
    made += [
        head._replace(name=f"{head.name}_lp{p:g}", length_penalty=p)
        for p in decode.penalties
        if p != decode.length_penalty
    ]
    made += [
        head._replace(name=f"{head.name}_tau{t:g}", temperature=t)
        for t in decode.temperatures
        if t != 1
    ]
    if decode.votes:
        vote = Decoder(f"vote{decode.votes}", votes=decode.votes)
        made += [vote._replace(temperature=decode.vote_temperature)]
    return made


def headline(decode: Any) -> Decoder:
    """The decoder whose variations are compared: the paper's is a beam of 5."""
    name = "greedy" if decode.width == 1 else f"beam{decode.width}"
    return Decoder(name, decode.width, decode.length_penalty)


def curve(made: Sequence[Decoder]) -> list[Decoder]:
    """Of decoders, those that differ in their width alone."""
    return [d for d in made if not d.votes and d.name in ("greedy", f"beam{d.width}")]


def check(decode: Any) -> None:
    """UserError for decoders that can't be."""
    for name in ("beams", "penalties", "temperatures"):
        if len(set(decode[name])) < len(decode[name]):
            raise UserError(f"decode.{name}={tuple(decode[name])} names one twice")
    for name, values, low in (
        ("beams", decode.beams, 1),
        ("width", (decode.width,), 1),
        ("votes", (decode.votes,), 0),
    ):
        if bad := [v for v in values if v < low]:
            raise UserError(f"decode.{name}: {bad[0]} can't be; use {low} or more")
    for name, values in (
        ("temperatures", decode.temperatures),
        ("vote_temperature", (decode.vote_temperature,)),
    ):
        if bad := [v for v in values if not 0 < v < float("inf")]:
            raise UserError(f"decode.{name}: {bad[0]} can't be; use a number above 0")
    if bad := [v for v in (decode.length_penalty, *decode.penalties) if not abs(v) < float("inf")]:
        raise UserError(f"decode.length_penalty or decode.penalties: {bad[0]} must be finite")


def sharpen(params: dict, temperature: float) -> dict:
    """Parameters whose logits are divided by the temperature, tied head or not: the last norm is."""
    if temperature == 1:
        return params
    return params | {"norm": params["norm"] / temperature}


def ends(p: Policy) -> tuple[int, ...]:
    """The ids that end an answer: the end of turn that is trained, and those of the model's folder.

    A base model that was not fine-tuned ends a text, not a turn; Qwen's folders name both.
    """
    found: Any = []
    if p.source is not None and p.source.is_dir():
        found = hf.token_ids(p.source).get("eos_token_id", [])
    found = found if isinstance(found, list) else [found]
    return tuple(dict.fromkeys([p.tokenizer.eos, *(i for i in found if i < p.cfg.vocab)]))


def measure(
    params: dict,
    cfg: Any,
    rows: Any,
    tokens: Int[Array, "b n c"],
    length: Int[Array, "b n"],
    *,
    vocab: int,
) -> Sums:
    """Sums (b, n) over n responses to each prompt; columns of the logits from `vocab` on count nowhere."""
    x = transformer.embed(params, cfg, rows.tokens)
    where = (rows.position, rows.segment, rows.next_position)
    hidden = completion_hidden(params, cfg, x, *where, tokens, length)
    head = transformer.head(params, cfg)
    found = token_stats(hidden, head, tokens, ("lp", "lse", "mean_logit"), vocab=vocab)
    mask = jnp.arange(tokens.shape[-1]) < length[..., None]
    sums = [score(Stats(**found), mask, mode) for mode in SCORES]
    return Sums(*sums, jnp.sum(found["lse"], axis=-1, where=mask))


def searcher(
    p: Policy, encoder: Any, decoder: Decoder, *, batch: int, vocab: int, returned: int = 1
) -> Callable[[Any, Sequence[Any]], list[list[Answer]]]:
    """`(params, examples) -> ` the `returned` best answers of each example, the best first."""
    beams = Beams(
        encoder.max_completion,
        ends(p),
        width=decoder.width,
        length_penalty=decoder.length_penalty,
        returned=returned,
        pad=p.tokenizer.pad,
    )

    @partial(sharding.on_mesh, p.mesh)
    @jax.jit
    def search(params: Any, rows: Any) -> Any:
        params = sharpen(params, decoder.temperature)
        x = transformer.embed(params, p.cfg, rows.tokens)
        prompts = Prompts(x, rows.position, rows.segment, rows.next_position)
        found = beam_search(params, p.cfg, prompts, beams=beams)
        sums = measure(params, p.cfg, rows, found.tokens, found.length, vocab=vocab)
        return found.tokens, found.length, sums

    def call(params: Any, examples: Sequence[Any]) -> list[list[Answer]]:
        out: list[list[Answer]] = []
        for _, rows in policy.prompt_batches(p, encoder, examples, batch):
            tokens, length, sums = sharding.fetch(search(params, rows))
            out += _answers(p, tokens, length, sums)
        return out[: len(examples)]

    return call


def _answers(p: Policy, tokens: Any, length: Any, sums: Sums) -> list[list[Answer]]:
    """Answers of arrays (b, n, t) and (b, n); a hypothesis that does not exist has no tokens."""
    end = ends(p)

    def one(at: tuple[int, int]) -> Answer:
        ids = tokens[at][: length[at]]
        own = Sums(*(float(a[at]) for a in sums))
        finished = len(ids) > 0 and int(ids[-1]) in end
        return Answer(p.tokenizer.decode(ids).strip(), len(ids), finished, own)

    b, n = length.shape
    return [[one((i, j)) for j in range(n)] for i in range(b)]


def scorer(
    p: Policy, encoder: Any, *, batch: int, vocab: int, temperature: float = 1.0
) -> Callable[[Any, Sequence[Any]], list[Answer]]:
    """`(params, examples) -> ` the solutions of the examples, measured as answers are."""
    width = encoder.max_completion

    @partial(sharding.on_mesh, p.mesh)
    @jax.jit
    def read(params: Any, rows: Any, tokens: Any, length: Any) -> Any:
        return measure(sharpen(params, temperature), p.cfg, rows, tokens, length, vocab=vocab)

    def call(params: Any, examples: Sequence[Any]) -> list[Answer]:
        out: list[Answer] = []
        for at, rows in policy.prompt_batches(p, encoder, examples, batch):
            b = len(rows.tokens)
            ids = [encoder.completion(e) for e in examples[at : at + b]]
            ids += [ids[-1]] * (b - len(ids))
            tokens = np.full((b, 1, width), p.tokenizer.pad, np.int32)
            for i, row in enumerate(ids):
                tokens[i, 0, : len(row)] = row
            length = np.array([[len(row)] for row in ids], np.int32)
            there = policy.place(p, {"tokens": tokens, "length": length})
            sums = sharding.fetch(read(params, rows, there["tokens"], there["length"]))
            out += [first for (first,) in _answers(p, tokens, length, sums)]
        return out[: len(examples)]

    return call


def voter(
    p: Policy, encoder: Any, decoder: Decoder, stated: Callable[[str], str | None], *, batch: int
) -> Callable[[Any, Sequence[Any], Any], list[Answer]]:
    """`(params, examples, key) -> ` of each example the first sample that states the commonest answer."""
    draw = policy.sampler(p, encoder, batch=batch, n=decoder.votes, temperature=decoder.temperature)

    def call(params: Any, examples: Sequence[Any], key: Any) -> list[Answer]:
        texts = draw(params, examples, key)
        n = decoder.votes
        return [_elect(p, texts[i * n : (i + 1) * n], stated) for i in range(len(examples))]

    return call


def _elect(p: Policy, texts: Sequence[tuple[str, bool]], stated: Callable) -> Answer:
    at = majority([stated(text) for text, _ in texts])
    text, finished = texts[at]
    return Answer(
        text.strip(), len(p.tokenizer.encode(text, unknown="id")) + finished, finished, None
    )


def majority(answers: Sequence[str | None]) -> int:
    """Index of the first answer with the most votes; what states none has no vote, unless none does."""
    keys = [None if a is None else "".join(a.split()) for a in answers]
    counts = Counter(k for k in keys if k is not None)
    if not counts:
        return 0
    most = max(counts.values())
    return next(i for i, k in enumerate(keys) if counts.get(k, 0) == most)
