"""Every loss by its key, and what is checked before a step runs.

    spec = resolve("dpop", lam=25.0)
    seq = statistics(tokens, spec)
    per_item, state, curves = loss(spec, seq, batch, state)

Keys are unique; papers share short names (GPO, TPO, D2PO, ...), so each key carries its arXiv id.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxrepro.config import UserError, did_you_mean
from jaxrepro.methods.dpo import (  # noqa: F401  each enters its losses
    annotated,
    batchwise,
    diffusion,
    divergences,
    free,
    generation,
    listwise,
    pairwise,
    tokens,
    unpaired,
)
from jaxrepro.methods.dpo.objective import check_inputs, loss, total
from jaxrepro.methods.dpo.sequence import Batch, SeqStats, Tokenwise, statistics
from jaxrepro.methods.dpo.spec import (
    DIVERGENCE,
    EVIDENCE,
    LENGTH,
    REGISTRY,
    WEIGHTING,
    LossSpec,
)

__all__ = [
    "EVIDENCE", "MIXES", "REGISTRY", "Batch", "LossSpec", "SeqStats", "Tokenwise", "check_batch",
    "loss", "mix", "resolve", "statistics", "total",
]  # fmt: skip

# Published sums of losses: arXiv id, ((key, weight), ...), and one beta for all, as TRL has it
MIXES: Mapping[str, tuple[str, tuple[tuple[str, float], ...], dict[str, Any]]] = MappingProxyType(
    {
        "mpo_vlm": ("2411.10442", (("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0)), {"beta": 0.1}),
        "rpo_sft": ("2405.16436", (("sigmoid", 1.0), ("sft", 0.005)), {"beta": 0.01}),
        "iterative_rpo": ("2404.19733", (("sigmoid", 1.0), ("sft", 1.0)), {"beta": 0.1}),
    }
)  # fmt: skip

# Where hyper-parameters must lie, as intervals; all others need only be finite.
LIMITS = {
    **dict.fromkeys(("beta", "beta_w", "beta_l", "beta_r", "beta_prime"), "(0, inf)"),
    **dict.fromkeys(("tau", "temperature", "r_max", "nu", "c", "eps", "floor"), "(0, inf)"),
    **dict.fromkeys(("lam", "lambda_d", "lambda_u", "length_power"), "[0, inf)"),
    **dict.fromkeys(("rank_weight", "nll_weight", "sft_weight"), "[0, inf)"),
    **dict.fromkeys(("retain_weight", "forget_weight"), "[0, inf)"),
    **dict.fromkeys(("ld_alpha", "divergence_alpha", "f", "final", "mix"), "[0, 1]"),
    "label_smoothing": "[0, 0.5]",
}
OWN_LIMITS = {  # of one loss
    ("exo_pair", "label_smoothing"): "(0, 0.5]",
    ("robust", "label_smoothing"): "[0, 0.5)",
    ("dpo_rk", "nu"): "(1, inf)",
    ("todo", "alpha"): "(0, inf)",
    ("infonca", "alpha"): "(0, inf)",
    ("nca_reward", "alpha"): "(0, inf)",
    ("pmpo", "alpha"): "[0, 1]",
    ("d2po_decay", "gamma"): "(0, 1]",
    ("dmpo", "gamma"): "(0, 1]",
    ("ns_dpo", "gamma"): "(0, 1]",
    ("alpha_dpo", "decay"): "[0, 1)",
    ("beta_dpo", "decay"): "[0, 1)",
    ("beta_dpo", "rho"): "[0, 1)",
}
_UNPAIRED = "it weighs single pairs, and this loss has none"
_UNEQUAL = "it compares the lengths of a pair whose tokens count alike"
_RAW = "the loss is written in raw log-ratios, where the divergence's constant does not cancel"
WHY_NOT = {
    **dict.fromkeys(WEIGHTING, _UNPAIRED),
    **dict.fromkeys(LENGTH, _UNEQUAL),
    **dict.fromkeys(DIVERGENCE, _RAW),
}


def resolve(name: str, **overrides: Any) -> LossSpec:
    """The loss of that key with hyper-parameters replaced. UserError for an unknown key or a bad value.

    Arrays are taken as they are, so that hyper-parameters can be swept with vmap.
    """
    if name not in REGISTRY:
        raise UserError(f"loss is {name!r}{did_you_mean(name, sorted(REGISTRY))}")
    spec = REGISTRY[name]
    for key, value in overrides.items():
        _check(spec, key, value)
    hyper = {k: _like(v, overrides.get(k, v)) for k, v in spec.defaults.items()}
    needs = spec.needs
    if hyper.get("divergence", "reverse_kl") != "reverse_kl" and name != "sft":
        needs |= {"reference"}
    return dataclasses.replace(spec, hyper=MappingProxyType(hyper), needs=needs)


def mix(names: Sequence[str], shares: Sequence[float | int] | None = None, /, **overrides: Any):
    """[(spec, share), ...] for `total`. An override goes to every loss that has it; one must.

    A single name of MIXES stands for the published sum.
    """
    if len(names) == 1 and names[0] in MIXES:
        _, parts, published = MIXES[names[0]]
        names = [n for n, _ in parts]
        shares = [w for _, w in parts] if shares is None else shares
        overrides = published | overrides
    shares = [1.0] * len(names) if shares is None else list(shares)
    if not names or len(shares) != len(names):
        raise UserError(f"{len(names)} losses with {len(shares)} weights; give one weight a loss")
    if not all(_real(w) and w >= 0 for w in shares) or not any(shares):
        raise UserError(f"shares of losses are {shares}; give numbers from 0, and one above 0")
    if len(set(names)) < len(names):
        raise UserError(f"losses {'+'.join(names)}: one is named twice; give it a larger share")
    for name in set(names) - set(REGISTRY):
        resolve(name)  # raises
    for key in overrides:
        if not any(key in REGISTRY[n].defaults for n in names):
            resolve(names[0], **{key: overrides[key]})
    for key in ("use_weighting", "divergence"):  # meant for every loss, so none may lack it
        value = overrides.get(key)
        if value and value != "reverse_kl":
            for name in names:
                _check(REGISTRY[name], key, value)
    return [
        (resolve(n, **{k: v for k, v in overrides.items() if k in REGISTRY[n].defaults}), float(w))
        for n, w in zip(names, shares, strict=True)
    ]


def _like(default, value):
    """A whole number where the default is a float becomes one."""
    whole = isinstance(value, int) and isinstance(default, float)
    return float(value) if whole else value


def _check(spec: LossSpec, key: str, value: Any) -> None:
    if key not in spec.defaults:
        if key in WHY_NOT:
            raise UserError(f"{key} is not possible with loss {spec.name!r}: {WHY_NOT[key]}")
        raise UserError(
            f"loss {spec.name!r} has no hyper-parameter {key!r}{did_you_mean(key, sorted(spec.defaults))}"
        )
    default = spec.defaults[key]
    if isinstance(value, jax.Array):
        return
    choices = divergences.DIVERGENCES if key == "divergence" else spec.choices.get(key)
    if choices is not None:
        if value not in choices:
            raise UserError(
                f"{key} of {spec.name!r} is {value!r}; choose one of {', '.join(choices)}"
            )
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{key} of {spec.name!r} is {value!r}; give True or False")
    elif isinstance(default, tuple):
        if not isinstance(value, Sequence) or len(value) < 1 or not all(_real(x) for x in value):
            raise UserError(f"{key} of {spec.name!r} is {value!r}; give numbers, such as {default}")
        if value[0] <= 0:
            raise UserError(f"{key} of {spec.name!r} begins with {value[0]}; it must be above 0")
    elif value is not None or default is not None:
        if not _real(value):
            raise UserError(f"{key} of {spec.name!r} is {value!r}; give a finite number")
        _within(spec, key, float(value))


def _real(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _within(spec: LossSpec, key: str, value: float) -> None:
    interval = OWN_LIMITS.get((spec.name, key)) or LIMITS.get(key, "(-inf, inf)")
    low, high = (float(x) for x in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise UserError(f"{key} of {spec.name!r} is {value:g}; take a value in {interval}")


# ---- batches, on the host


def check_batch(
    spec: LossSpec, seq: SeqStats, batch: Batch | None = None, *, where: str = "batch"
) -> None:
    """UserError of one line for a batch whose numbers make the loss meaningless; on the host, before a step.

    Finds missing inputs, empty responses, nan in the reference's log-probs, scores in the wrong order,
    a batch of one where items are compared. Warns about pairs of two identical responses, whose
    gradient is 0 in every loss of log-ratio differences.
    """
    batch = Batch() if batch is None else batch
    check_inputs(spec, seq, batch)
    n = np.asarray(seq.n)
    valid = np.ones(n.shape, bool) if batch.valid is None else np.asarray(batch.valid)
    _refuse(where, (n < 1) & valid, "has an empty response", "drop the row")
    if seq.q is not None:
        bad = ~np.isfinite(np.asarray(seq.q)) & valid
        _refuse(
            where,
            bad,
            "has a reference log-prob that is not finite",
            "make the cache of reference log-probs again",
        )
    if batch.scores is not None and "scores" in spec.needs:
        r = np.asarray(batch.scores)
        _refuse(
            where,
            ~np.isfinite(r) & valid,
            "has a score that is not finite",
            "score it again, or drop the row",
        )
        if spec.name == "odpo" and spec.hyper["offset"] == "log":
            worse = r[:, :1] <= r[:, 1:]
            _refuse(
                where,
                worse,
                "has a chosen score that is not above the rejected one",
                "swap, or drop the row",
            )
        if spec.name == "odpo" and spec.hyper["offset"] == "ratio":
            _refuse(where, r <= 0, "has a score that is not above 0", "take offset=identity")
        if spec.name == "sppo_soft":
            _refuse(
                where,
                (r < 0) | (r > 1),
                "has a win probability outside [0, 1]",
                "give probabilities",
            )
    if batch.probability is not None and "probability" in spec.needs:
        p = np.asarray(batch.probability)[:, None]
        _refuse(
            where,
            ~((p >= 0.5) & (p <= 1)),
            "has P(chosen beats rejected) outside [0.5, 1]",
            "swap the pair",
        )
    if not valid.any(-1).all():
        _refuse(where, ~valid.any(-1, keepdims=True), "has no valid response", "drop the row")
    if (
        n.shape[1] == 2
        and spec.schema not in ("forget", "image")
        and (same := _identical(seq)).any()
    ):
        warnings.warn(
            f"{where}: {same.sum()} of {len(same)} pairs hold two identical responses, which teach a paired loss nothing",
            stacklevel=2,
        )  # fmt: skip


def _refuse(where: str, bad: np.ndarray, what: str, remedy: str) -> None:
    if bad.any():
        item, response = np.argwhere(bad)[0]
        raise UserError(f"{where}: item {item}, response {response} {what}; {remedy}")


def _identical(seq: SeqStats) -> np.ndarray:
    if seq.tokens is not None:
        t = seq.tokens
        mask = np.asarray(t.mask)
        rows = [mask, np.where(mask, np.asarray(t.lp), 0)]
    else:
        rows = [np.asarray(x)[..., None] for x in (seq.p, seq.n)]
    return np.all([np.all(x[:, 0] == x[:, 1], axis=-1) for x in rows], axis=0)


def hyperparameters() -> dict[str, type]:
    """Every hyper-parameter that some loss has, and its type: what a config can set."""
    found: dict[str, type] = {}
    for spec in REGISTRY.values():
        for name, value in spec.defaults.items():
            if value is not None or name not in found:
                found[name] = float if value is None else type(value)
    return dict(sorted(found.items()))


def markdown() -> str:
    """The table of all losses, as it stands in README.md."""
    shared = {*WEIGHTING, *LENGTH, *DIVERGENCE}
    out = ["| key | arXiv | evidence | data | defaults |", "|---|---|---|---|---|"]
    for name, spec in sorted(REGISTRY.items()):
        usual = WEIGHTING | LENGTH | DIVERGENCE
        given = {k: v for k, v in spec.defaults.items() if k not in shared or v != usual[k]}
        hyper = ", ".join(
            f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in given.items()
        )
        evidence = f"**{spec.evidence}**" if spec.evidence == "inferred" else spec.evidence
        out.append(f"| `{name}` | {spec.arxiv} | {evidence} | {spec.schema} | {hyper} |")
    return "\n".join(out)


def markdown_notes() -> str:
    """The table of what is worth knowing about a loss, as it stands in README.md."""
    rows = [f"| `{n}` | {'; '.join(s.notes)} |" for n, s in sorted(REGISTRY.items()) if s.notes]
    return "\n".join(["| key | note |", "|---|---|", *rows])
