"""What a finished run leaves for a reader: lines, samples.md with pictures, items for paired statistics."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrepro import stats
from jaxrepro.files import write_json, write_text
from jaxrepro.methods.stepgrpo import rewards
from jaxrepro.train.loop import Run

SHOWN = 3  # questions of each kind


def line(results: Mapping[str, float], prefix: str) -> str:
    """Accuracy with its interval, and validity, for the terminal."""
    if f"{prefix}accuracy" not in results:
        return f"accuracy unknown: none of {results[f'{prefix}n']:.0f} solutions holds an answer"
    get = lambda name: 100 * results[f"{prefix}{name}"]
    return (
        f"accuracy {get('accuracy'):.1f} % [{get('accuracy_lo'):.1f}, {get('accuracy_hi'):.1f}] "
        f"(n = {results[f'{prefix}n']:.0f}), validity of samples {get('sampled_validity'):.1f} %"
    )


def gains(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy after minus before on the same questions, with a paired bootstrap interval."""
    pairs = [(b, a) for b, a in zip(before["correct"], after["correct"]) if None not in (a, b)]
    if not pairs:
        return {}
    found = stats.paired_bootstrap([a for _, a in pairs], [b for b, _ in pairs])
    return {"test/gain": found.mean, "test/gain_lo": found.lo, "test/gain_hi": found.hi}


def gain(results: Mapping[str, float]) -> str:
    """The gain in points, for the terminal."""
    if "test/gain" not in results:
        return "unknown"
    points = [100 * results[f"test/gain{end}"] for end in ("", "_lo", "_hi")]
    return "{:+.1f} points [{:+.1f}, {:+.1f}]".format(*points)


def first_updates(workdir: Path, count: int) -> dict[str, float]:
    """Share of groups without a gradient over the first updates, and of the last ones, read from the log."""
    rows = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == "rl"]
    mean = lambda part, name: sum(row[name] for row in part) / len(part)
    if not rows:
        return {}
    first = [row for row in rows if row["step"] <= count]
    last = [row for row in rows if row["step"] > rows[-1]["step"] - count]
    if len(first) < min(count, rows[-1]["step"]):  # log.every left some out
        return {}
    return {
        "rl/zero_std_first": mean(first, "zero_std"),
        "rl/zero_std_last": mean(last, "zero_std"),
        "rl/sampled_accuracy_first": mean(first, "accuracy"),
        "rl/sampled_accuracy_last": mean(last, "accuracy"),
        "rl/sampler_gap_max": max(row["sampler_gap_max"] for row in rows),
    }


def write(
    run: Run,
    examples: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> None:
    """samples.md with its pictures; of every test question the outcome (items.json) and the answers
    before and after (answers.jsonl)."""
    items = {"before/test": before["correct"], "after/test": after["correct"]}
    write_json(run.path("items.json"), items)
    rows = [
        {"id": e["id"], "problem": e["problem"], "solution": e["solution"], "before": b, "after": a}
        for e, b, a in zip(examples, before["texts"], after["texts"])
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(run.path("answers.jsonl"), text)
    pairs = list(enumerate(zip(before["correct"], after["correct"])))
    unscorable = [i for i, pair in pairs if None in pair]  # the solution holds no answer
    pairs = [(i, pair) for i, pair in pairs if None not in pair]
    changes = {
        "became right": [i for i, (b, a) in pairs if a and not b],
        "became wrong": [i for i, (b, a) in pairs if b and not a],
        "stayed right": [i for i, (b, a) in pairs if a and b],
        "stayed wrong": [i for i, (b, a) in pairs if not a and not b],
        "could not be scored": unscorable,
    }
    out = ["# Test questions, answered before and after", ""]
    counts = [f"{len(found)} {name}" for name, found in changes.items() if found]
    out += [f"{', '.join(counts)}.", ""]
    for name, found in changes.items():
        out += [f"## {name.capitalize()}", ""] if found else []
        for i in found[:SHOWN]:
            out += _shown(run, i, examples[i], before["texts"][i], after["texts"][i])
    run.path("samples.md").write_text("\n".join(out))


def _shown(run: Run, i: int, example: Mapping[str, Any], before: str, after: str) -> list[str]:
    gold = rewards.answer(example["solution"]) or example["solution"]
    lines = [f"**{example['problem']}** (solution: {gold})", ""]
    if example.get("image") is not None:
        lines = [f"![question {i}](samples/{picture(run, i, example['image'])})", "", *lines]
    if before == after:
        return [*lines, "before and after:", "", "```", after, "```", ""]
    return [*lines, "before:", "", "```", before, "```", "", "after:", "", "```", after, "```", ""]


def picture(run: Run, i: int, image: Any) -> str:
    """Save an example's picture for the report; its file name."""
    from PIL import Image

    name = f"{i}.png"
    found = image if isinstance(image, Image.Image) else Image.open(image)
    found.convert("RGB").save(run.path(f"samples/{name}"))
    return name
