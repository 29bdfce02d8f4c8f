"""What a preference run leaves for a reader: changes, outcomes of items, samples before and after."""

from collections.abc import Mapping
from typing import Any

from jaxrepro.files import write_json, write_text
from jaxrepro.train import quiz

SHOWN = 8


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Displacement of chosen and rejected responses, growth of the samples, gain of greedy answers."""
    out = {}
    old, new = before["rates"], after["rates"]
    for name in ("chosen_lp", "rejected_lp", "length", "score", "entropy"):
        if f"after/test/{name}" in new:
            out[f"test/{name}_change"] = new[f"after/test/{name}"] - old[f"before/test/{name}"]
    if "quiz" in after:
        out |= quiz.gain(before["quiz"], after["quiz"])
    return out


def write(run: Any, s: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """items.json and samples.md."""
    items = {}
    if "pairs" in after:
        items["after/test/accuracy"] = after["pairs"]
    if "wins" in after.get("samples", {}):
        items["after/test/win_rate"] = after["samples"]["wins"]
    shown = []
    if "quiz" in after:
        items |= quiz.items(before["quiz"], after["quiz"])
        shown.append(quiz.table(s.test, before["quiz"], after["quiz"]))
    if "samples" in after:
        shown.append(table(s, before["samples"], after["samples"]))
    write_json(run.path("items.json"), items)
    if shown:
        write_text(run.path("samples.md"), "\n".join(shown))


def table(s: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Markdown of the first sample of the first prompts, with its score."""
    n = s.config.eval.samples
    out = ["# Samples of test prompts, before and after", ""]
    for i, question in enumerate(s.test[:SHOWN]):
        out += [f"**{question['problem']}**", ""]
        for when, found in (("before", before), ("after", after)):
            text, value = found["texts"][i * n], found["values"][i * n]
            fence = "`" * (3 if "```" not in text else 8)
            score = "unscorable" if value is None else f"score {value:.2f}"
            out += [f"{when} ({score}):", "", fence, text, fence, ""]
    return "\n".join(out)
