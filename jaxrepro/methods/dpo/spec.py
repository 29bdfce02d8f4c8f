"""What a loss is: its formula, its source, and what it needs. A variant is one decorated function.

    @variant("2402.13228", "public")
    def dpop(s, batch, *, beta=0.1, lam=50.0):
        return logistic(beta * (s.d - lam * jnp.maximum(0.0, -s.a_w)))

The function's name is the key, its keyword arguments are the hyper-parameters with their defaults. A
formula takes (s: SeqStats, batch: Batch), and its state third where it has one. It returns the loss of
each item (b,), or a `Result`. Hyper-parameters may be traced arrays, to be swept with vmap, but for those
that choose a form: words, flags, tuples (weights), those that are None, and those whose 0 leaves a term out
(nll_weight, kl_alpha, alpha of alphapo).
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import Array, Float

EVIDENCE = {
    "TRL": "read in TRL 1.10",
    "official": "read in the authors' code",
    "public": "read in another group's public code",
    "inferred": "from knowledge of the paper, unverified",
}
# schema: responses on axis k; None = any number
SCHEMAS = {
    "pair": 2,  # chosen, rejected
    "step": 2,  # chosen and rejected next step of a solution; no end of turn
    "scored": 2,  # pair with reward-model scores
    "tie": 2,  # pair with a flag: neither is better
    "multi": 2,  # pair with rewards of further objectives
    "image": 2,  # pair of images
    "sampled": 3,  # chosen, rejected, a sample of the policy
    "triple": 3,  # gold, chosen, rejected
    "ranked": None,  # K candidates with scores, or in an order that the loss states
    "unpaired": 1,  # one response with a label or a score
    "forget": None,  # what to unlearn, and optionally what to keep
}
# options that many losses share
WEIGHTING = {"use_weighting": False, "clamp_weight": False}
LENGTH = {"ld_alpha": None, "ld_reference": True}
DIVERGENCE = {"divergence": "reverse_kl", "divergence_alpha": 0.5}


class Result(NamedTuple):
    """What a formula with a state or with curves of its own returns."""

    per_item: Float[Array, "b"]
    state: Any = None
    metrics: Mapping[str, Array] = MappingProxyType({})  # scalars of the batch


@dataclasses.dataclass(frozen=True, eq=False)
class LossSpec:
    """A loss as data. `hyper` holds `defaults` with what `resolve` was told."""

    name: str
    arxiv: str  # identifier, or an OpenReview one
    evidence: str  # a key of EVIDENCE
    formula: Callable
    needs: frozenset[str]
    schema: str
    weighting: str  # of tokens, see sequence.py
    state: Callable[[], Any] | None  # makes the first state, a pytree of arrays
    set_level: bool  # the loss of an item depends on the other items of the global batch
    min_batch: int
    defaults: Mapping[str, Any]
    choices: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]
    hyper: Mapping[str, Any]

    @property
    def reference_free(self) -> bool:
        return "reference" not in self.needs

    @property
    def arguments(self) -> dict[str, Any]:
        """Hyper-parameters of the formula alone, without those that all losses share."""
        return {k: v for k, v in self.hyper.items() if k in _keywords(self.formula)}


REGISTRY: dict[str, LossSpec] = {}


def variant(
    arxiv: str,
    evidence: str,
    *,
    needs: str = "reference",
    schema: str = "pair",
    weighting: str = "sum",
    state: Callable[[], Any] | None = None,
    set_level: bool = False,
    min_batch: int = 1,
    divergence: bool = False,
    choices: Mapping[str, tuple[str, ...]] | None = None,
    notes: tuple[str, ...] = (),
) -> Callable[[Callable], Callable]:
    """Enter the decorated formula into REGISTRY under its name.

    `needs`: words, "reference" and whatever fields of Tokenwise and Batch it reads. `divergence`: the
    formula is written in scores, so an f-divergence is legal. A loss of plain pairs also takes
    `ld_alpha`, and `use_weighting` where its items do not depend on each other.
    """
    assert evidence in EVIDENCE and schema in SCHEMAS

    def enter(formula: Callable) -> Callable:
        name = formula.__name__
        assert name not in REGISTRY, name
        shared = {}
        if schema != "image" and SCHEMAS[schema] == 2 and weighting == "sum":
            shared |= LENGTH | ({} if set_level else WEIGHTING)
        if divergence:
            shared |= DIVERGENCE
        defaults = MappingProxyType(shared | _keywords(formula))
        REGISTRY[name] = LossSpec(
            name, arxiv, evidence, formula, frozenset(needs.split()), schema, weighting, state,
            set_level, min_batch, defaults, MappingProxyType(dict(choices or {})), notes, defaults,
        )  # fmt: skip
        return formula

    return enter


def _keywords(formula: Callable) -> dict[str, Any]:
    parameters = inspect.signature(formula).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
