"""Evaluation of a run on one test set: every decoder, its rates, and the files that a reader opens."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxrepro.files import write_json, write_text
from jaxrepro.methods.soc import decoding, diagnostics, task
from jaxrepro.methods.soc.decoding import Answer
from jaxrepro.methods.soc.objective import SCORES
from jaxrepro.methods.soc.task import Task
from jaxrepro.train.policy import Policy

SHOWN = 4  # questions of each kind in samples.md


class Found(NamedTuple):
    """What an examination found."""

    rates: dict[str, float]
    items: dict[str, Any]  # prefix -> what `write` files


def examine(
    p: Policy,
    encoder: Any,
    asked: Task,
    examples: Sequence[Any],
    decode: Any,
    params: Any,
    prefix: str,
    *,
    batch: int,
    vocab: int,
    seed: int,
    say: Callable[[str], None] = lambda text: None,
) -> Found:
    """Every decoder of `decode` on the examples; metrics are named prefix/decoder/metric.

    Besides, for the headline beam: prefix/<beam>_minus_greedy with a paired interval, prefix/slope over the
    widths, and prefix/<beam>/rerank_<score>, the accuracy if another score picked among its hypotheses. `say` hears a
    line of each decoder.
    """
    rare = [bool(e.get("rare")) for e in examples]
    size = dict(batch=batch, vocab=vocab)
    head = decoding.headline(decode)
    rates: dict[str, float] = {}
    correct: dict[str, list[float]] = {}
    items: dict[str, Any] = {"examples": examples, "answers": {}, "outcomes": {}}
    gold: dict[float, list[Answer | None]] = {}
    chosen = decoding.decoders(decode)
    for decoder in chosen:
        key = f"{prefix}/{decoder.name}"
        if decoder.votes:
            vote = decoding.voter(p, encoder, decoder, asked.stated, batch=batch)
            answers = vote(params, examples, jax.random.key(seed))
        else:
            several = decoder.width if decode.rerank and decoder == head else 1
            search = decoding.searcher(p, encoder, decoder, returned=several, **size)
            found = search(params, examples)
            answers = [a[0] for a in found]
            if several > 1:
                rates |= reranked(asked, examples, found, key)
        at = 1.0 if decoder.votes else decoder.temperature
        if at not in gold:
            gold[at] = worked(p, encoder, examples, params, temperature=at, **size)
        right = [task.right(asked, e, a.text) for e, a in zip(examples, answers)]
        outcomes = diagnostics.of(answers, gold[at], right, rare, decoder.length_penalty)
        rates |= diagnostics.rates(outcomes, key)
        correct[decoder.name] = right
        items["answers"][key] = [a.text for a in answers]
        items["outcomes"][key] = right
        over = diagnostics.over_optimistic(outcomes)
        if over.size and not (over != over).any():  # every item has a worked solution
            items["outcomes"][f"{key}/over_opt_rate"] = over.tolist()
        say(line(rates, key))
    curve = decoding.curve(chosen)
    items["shown"] = [f"{prefix}/{name}" for name in (curve[0].name, head.name)]
    widths = {d.width: rates[f"{prefix}/{d.name}/accuracy"] for d in curve}
    if len(widths) > 1:
        rates[f"{prefix}/slope"] = diagnostics.slope(widths)
    if "greedy" in correct and head.width > 1:
        name = f"{prefix}/{head.name}_minus_greedy"
        rates |= diagnostics.beyond_greedy(correct[head.name], correct["greedy"], name)
        pairs = zip(correct[head.name], correct["greedy"])
        items["outcomes"][name] = [a - b for a, b in pairs]
    return Found(rates, {prefix: items})


def worked(
    p: Policy, encoder: Any, examples: Sequence[Any], params: Any, *, batch: int, **how: Any
) -> list[Answer | None]:
    """The worked solutions, measured; None where an item has only an answer, or one that is too long."""
    has = [
        i
        for i, e in enumerate(examples)
        if e.get("worked", True) and len(encoder.completion(e)) <= encoder.max_completion
    ]
    out: list[Answer | None] = [None] * len(examples)
    if has:
        read = decoding.scorer(p, encoder, batch=batch, **how)
        for i, a in zip(has, read(params, [examples[i] for i in has])):
            out[i] = a
    return out


def reranked(
    asked: Task, examples: Sequence[Any], found: Sequence[Sequence[Answer]], key: str
) -> dict[str, float]:
    """Accuracy of the hypothesis that each score of objective.SCORES puts first, without a length penalty."""
    out = {}
    for mode in SCORES:
        best = [
            max((a for a in answers if a.length), key=lambda a: getattr(a.sums, mode))
            for answers in found
        ]
        right = [task.right(asked, e, a.text) for e, a in zip(examples, best)]
        out[f"{key}/rerank_{mode}"] = sum(right) / len(right)
    return out


def line(rates: dict[str, float], key: str) -> str:
    """One decoder on one test set, for the terminal."""
    get = lambda name: 100 * rates[f"{key}/{name}"]
    text = (
        f"{key}: accuracy {get('accuracy'):.1f} % [{get('accuracy_lo'):.1f}, "
        f"{get('accuracy_hi'):.1f}], {rates[f'{key}/length']:.1f} tokens, empty {get('empty'):.1f} %, "
        f"truncated {get('truncated'):.1f} %"
    )
    if f"{key}/over_opt_rate" in rates:
        text += f", over-optimistic {get('over_opt_rate'):.1f} %"
    return text


def write(run: Any, asked: Task, sets: Sequence[dict[str, Any]]) -> None:
    """items.json: per-item outcomes for paired statistics; answers.jsonl: every answer; samples.md."""
    outcomes: dict[str, list[float]] = {}
    rows: list[str] = []
    out = ["# Test questions"]
    for prefix, items in ((k, v) for found in sets for k, v in found.items()):
        outcomes |= items["outcomes"]
        for i, e in enumerate(items["examples"]):
            said = {key.removeprefix(f"{prefix}/"): a[i] for key, a in items["answers"].items()}
            row = {"set": prefix, "id": e["id"], "problem": e["problem"], "answer": e["answer"]}
            rows.append(json.dumps(row | {"said": said}, ensure_ascii=False) + "\n")
        out += ["", f"## {prefix}", ""] + _samples(items)
    write_json(run.path("items.json"), outcomes)
    write_text(run.path("answers.jsonl"), "".join(rows))
    write_text(run.path("samples.md"), "\n".join(out) + "\n")


def _samples(items: dict[str, Any]) -> list[str]:
    """Questions that the narrowest search and the headline beam answer differently, then the others."""
    first, last = items["shown"]
    pairs = list(enumerate(zip(items["outcomes"][first], items["outcomes"][last])))
    a, b = (k.rpartition("/")[2] for k in (first, last))
    kinds = {
        f"right by {b} alone": [i for i, (x, y) in pairs if y > x],
        f"right by {a} alone": [i for i, (x, y) in pairs if x > y],
        "wrong by both": [i for i, (x, y) in pairs if not x and not y],
        "right by both": [i for i, (x, y) in pairs if x and y],
    }
    out = [", ".join(f"{len(found)} {kind}" for kind, found in kinds.items()) + "."]
    for kind, found in kinds.items():
        out += ["", f"### {kind[0].upper()}{kind[1:]}"] if found else []
        for i in found[:SHOWN]:
            e = items["examples"][i]
            out += ["", f"**{e['problem']}** (answer: {e['answer']})"]
            for name in (first, last):
                text = items["answers"][name][i]
                fence = "`" * (3 if "```" not in text else 8)
                out += ["", f"{name}:", "", fence, text, fence]
    return out
