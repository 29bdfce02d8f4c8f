"""Answers to held-out questions: scores, rates with intervals, gain, and files for a reader.

An answer is right where its final number (after the last "####", else the last one) equals the
solution's. So a model that does not know the mark yet is not wrong for that alone; `stated` counts the
answers that have it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrepro import stats
from jaxrepro.data.questions import MARK, final
from jaxrepro.files import write_json, write_text
from jaxrepro.rewards import maths

SHOWN = 3  # questions of each kind
RATES = ("exact_match", "stated", "finished")


def right(example: Mapping[str, Any], text: str) -> float:
    """1.0 where the answer equals the solution's, else 0.0."""
    gold = final(example["solution"]) or maths.extract(example["solution"]) or ""
    return float(bool(maths.correct(final(text), gold)))


def score(
    examples: Sequence[Mapping[str, Any]], answers: Sequence[tuple[str, bool]], prefix: str
) -> dict[str, Any]:
    """{"rates", "texts", "correct"} of (text, finished) pairs; rates with their Wilson 95 % interval.

    exact_match: right; stated: with the mark; finished: ended before the limit of tokens.
    """
    correct = [right(e, text) for e, (text, _) in zip(examples, answers)]
    stated = [float(MARK in text) for text, _ in answers]
    finished = [float(done) for _, done in answers]
    rates: dict[str, float] = {f"{prefix}n": float(len(correct))}
    for name, values in zip(RATES, (correct, stated, finished)):
        mean, lo, hi, _ = stats.wilson(sum(values), len(values))
        rates |= {f"{prefix}{name}": mean, f"{prefix}{name}_lo": lo, f"{prefix}{name}_hi": hi}
    return {"rates": rates, "texts": [text for text, _ in answers], "correct": correct}


def gain(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """exact_match after minus before on the same questions, with a paired bootstrap interval."""
    found = stats.paired_bootstrap(after["correct"], before["correct"])
    lo, hi = (x if x == x else found.mean for x in (found.lo, found.hi))  # one item: no interval
    return {"test/gain": found.mean, "test/gain_lo": lo, "test/gain_hi": hi}


def line(results: Mapping[str, float], prefix: str) -> str:
    """The rates of one examination, for the terminal."""
    get = lambda name: 100 * results[f"{prefix}{name}"]
    return (
        f"exact match {get('exact_match'):.1f} % [{get('exact_match_lo'):.1f}, "
        f"{get('exact_match_hi'):.1f}] (n = {results[f'{prefix}n']:.0f}), with '{MARK}' "
        f"{get('stated'):.0f} %, finished {get('finished'):.0f} %"
    )


def verdict(results: Mapping[str, float]) -> str:
    """The gain in points and what its interval says."""
    mean, lo, hi = (100 * results[f"test/gain{end}"] for end in ("", "_lo", "_hi"))
    says = "better" if lo > 0 else "worse" if hi < 0 else "not resolved"
    return f"gain {mean:+.1f} points [{lo:+.1f}, {hi:+.1f}], paired bootstrap: {says}"


def write(
    run: Any,
    examples: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> None:
    """samples.md, and items.json with the outcome of every test question."""
    write_json(run.path("items.json"), items(before, after))
    write_text(run.path("samples.md"), table(examples, before, after))


def items(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The outcome of every test question."""
    return {"before/test": before["correct"], "after/test": after["correct"]}


def table(
    examples: Sequence[Mapping[str, Any]], before: Mapping[str, Any], after: Mapping[str, Any]
) -> str:
    """Markdown of the first questions of each change, with both answers."""
    pairs = list(enumerate(zip(before["correct"], after["correct"])))
    changes = {
        "became right": [i for i, (b, a) in pairs if a and not b],
        "became wrong": [i for i, (b, a) in pairs if b and not a],
        "stayed right": [i for i, (b, a) in pairs if a and b],
        "stayed wrong": [i for i, (b, a) in pairs if not a and not b],
    }
    counts = [f"{len(found)} {name}" for name, found in changes.items() if found]
    out = ["# Test questions, answered before and after", "", f"{', '.join(counts)}.", ""]
    for name, found in changes.items():
        out += [f"## {name.capitalize()}", ""] if found else []
        for i in found[:SHOWN]:
            out += [f"**{examples[i]['problem']}** (answer: {final(examples[i]['solution'])})", ""]
            for when, said in (("before", before), ("after", after)):
                fence = "`" * (3 if "```" not in said["texts"][i] else 8)
                out += [f"{when}:", "", fence, said["texts"][i], fence, ""]
    return "\n".join(out)
