"""The taxonomy of "A Survey of Direct Preference Optimization" (arXiv:2503.11701, v1), and where our losses stand in it.

    python -m jaxrepro.methods.dpo.taxonomy [--category=NAME] [--losses]

taxonomy.json holds the tree (category, subcategory, labels) and the methods by label. A label is the survey's
name; several papers share a name (three SPO, three CPO, ...), and what tells them apart stands in brackets.
A method has the losses of this package with the evidence that their formula rests on: "TRL", "official" or
"public" code, or "inferred", which no code has confirmed. Most methods change data, sampling or the reference
and not the loss.

The category "Outside the figure" is ours, for losses that the survey's figure does not place. Entries of source
"list" stand in the survey's reading list beside a subcategory and not in the figure (unverified). That the
categories belong to the four branches of the abstract in this order is unverified too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jaxrepro.config import UserError, did_you_mean
from jaxrepro.exits import guard
from jaxrepro.files import read_json

BRANCHES = {
    "data strategy": ("Data quality", "Feedback", "Granularity"),
    "learning framework": ("Paradigm", "Objective"),
    "constraint mechanism": ("Reference", "Divergence", "Safety"),
    "model property": ("Generation", "Optimization"),
}
EVIDENCE = ("TRL", "official", "public", "inferred")
SOURCES = ("figure", "list", "package")


class Method(NamedTuple):
    """One entry of the taxonomy."""

    label: str  # unique: the survey's name, with a word in brackets where several papers share it
    arxiv: str | None  # None: the survey's list as we know it gives none, or it is not on arXiv
    losses: Mapping[str, str]  # key of the registry -> evidence
    note: str
    source: str  # one of SOURCES

    @property
    def name(self) -> str:
        """The survey's name, which other methods may have too."""
        return self.label.partition(" (")[0]


Tree = dict[str, dict[str, tuple[Method, ...]]]


@cache
def load() -> Tree:
    """category -> subcategory -> methods, in the survey's order."""
    data = read_json(Path(__file__).with_name("taxonomy.json"))
    methods = {
        label: Method(
            label,
            m.get("arxiv"),
            m.get("losses", {}),
            m.get("note") or "",
            m.get("source", "figure"),
        )
        for label, m in data["methods"].items()
    }
    return {
        category: {sub: tuple(methods[label] for label in labels) for sub, labels in subs.items()}
        for category, subs in data["tree"].items()
    }


def methods() -> dict[str, Method]:
    """Every method once, by label."""
    return {m.label: m for subs in load().values() for found in subs.values() for m in found}


def branch(category: str) -> str:
    """The survey's branch of a category; "" for the two that belong to none."""
    return next((name for name, inside in BRANCHES.items() if category in inside), "")


def select(category: str | None = None, *, losses: bool = False) -> Tree:
    """The tree, or one category of it (case ignored), or only methods that have a loss here.

    UserError for an unknown category.
    """
    tree = load()
    if category is not None:
        found = [name for name in tree if name.casefold() == category.strip().casefold()]
        if not found:
            raise UserError(f"no category {category!r}{did_you_mean(category, list(tree))}")
        tree = {found[0]: tree[found[0]]}
    if losses:
        tree = {
            c: {
                s: kept
                for s, found in subs.items()
                if (kept := tuple(m for m in found if m.losses))
            }
            for c, subs in tree.items()
        }
    return {c: subs for c, subs in tree.items() if subs}


def lines(tree: Tree) -> Iterator[str]:
    """A tree as text: a method a line with its id and its losses, and the counts at the end."""
    for category, subs in tree.items():
        inside = f" ({branch(category)})" if branch(category) else ""
        yield f"{category}{inside}"
        for sub, found in subs.items():
            yield f"  {sub}: {_counted(found)}"
            for m in found:
                keys = ", ".join(f"{key} [{evidence}]" for key, evidence in m.losses.items())
                text = "; ".join(part for part in (keys, m.note) if part)
                yield f"    {m.label:<34} {m.arxiv or '-':<11} {text}".rstrip()
        yield ""
    every = {m.label: m for subs in tree.values() for found in subs.values() for m in found}
    yield f"in all, each once: {_counted(list(every.values()))}"


def _counted(found: Sequence[Method]) -> str:
    keys = {key for m in found for key in m.losses}
    of = sum(bool(m.losses) for m in found)
    return f"{len(found)} entries, {of} with a loss ({len(keys)} keys)"


def command(argv: Sequence[str]) -> None:
    """Print the part of the taxonomy that the flags ask for."""
    p = argparse.ArgumentParser(
        prog="taxonomy", description="Print the survey's taxonomy of preference optimisation."
    )
    p.add_argument("--category", help="only this one, for instance Feedback")
    p.add_argument("--losses", action="store_true", help="only methods with a loss in this package")
    a = p.parse_args(argv)
    print(*lines(select(a.category, losses=a.losses)), sep="\n", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command."""
    return guard(command, argv)


if __name__ == "__main__":
    sys.exit(main())
