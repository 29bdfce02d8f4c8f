"""Direct preference optimisation and its variants: the survey arXiv:2503.11701, one registry of losses.

    r(x, y) = beta log(pi(y|x)/ref(y|x)) + beta log Z(x)        the optimum of KL-regularised reward
    DPO     = -log sigmoid(beta (a_w - a_l)),  a = log pi/ref   Z cancels in Bradley-Terry (arXiv:2305.18290)

A variant changes one of three stages, so all share code: tokens -> statistics of responses (sequence.py),
statistics -> score (divergences.py), score -> loss (links.py). The formulas stand in pairwise, annotated,
free, tokens, batchwise, unpaired, listwise, generation and diffusion; `registry.resolve` names them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrepro.config import UserError
from jaxrepro.methods.dpo import divergences
from jaxrepro.methods.dpo.sequence import Batch, SeqStats, Tokenwise, policy_weight, sg
from jaxrepro.methods.dpo.spec import SCHEMAS, LossSpec, Result

Curves = dict[str, tuple[Array, Array]]
_TOKENS = ("log_sum_p2", "ref_entropy", "kl", "weights", "turn")


def loss(
    spec: LossSpec, seq: SeqStats, batch: Batch | None = None, state: Any = None
) -> tuple[Float[Array, "b"], Any, Curves]:
    """Loss of each item, the new state, and curves as (sum, weight). Pure: jit and grad it.

    The mean over the items of the global batch is the loss. Losses with `set_level` want that whole
    batch, as plain (possibly sharded) arrays. `state` None is the first one; evaluation throws the
    new state away. UserError where an input that the loss needs is missing, or for a wrong shape.
    """
    batch = Batch() if batch is None else batch
    check_inputs(spec, seq, batch)
    if seq.q is not None:
        seq = seq._replace(q=sg(seq.q))
    kind = spec.hyper.get("divergence", "reverse_kl")
    if kind != "reverse_kl" and seq.q is not None:
        alpha = spec.hyper["divergence_alpha"]
        seq = seq._replace(score=divergences.score(seq.a, kind, alpha))
    if spec.state is None:
        out = spec.formula(seq, batch, **spec.arguments)
    else:
        state = spec.state() if state is None else state
        out = spec.formula(seq, batch, state, **spec.arguments)
    out = out if isinstance(out, Result) else Result(out)
    per_item = out.per_item
    if spec.hyper.get("use_weighting"):
        per_item = per_item * policy_weight(seq, clamp=spec.hyper["clamp_weight"])
    one = jnp.ones((), per_item.dtype)
    own = {k: (sg(v), one) for k, v in out.metrics.items()}
    return per_item, out.state, curves(spec, seq, batch) | own


def total(
    mix: Sequence[tuple[LossSpec, float | int]],
    seq: SeqStats | Sequence[SeqStats],
    batch: Batch | None = None,
    states: Sequence[Any] | None = None,
) -> tuple[Float[Array, "b"], tuple[Any, ...], Curves]:
    """Weighted sum of several losses, as `loss`. `seq` may be one for each, where token weights differ.

    Curves of losses are `loss/<name>`; the others are those of the first loss that has them.
    """
    if not mix:
        raise UserError("no loss is named; give one or more")
    many = [seq] * len(mix) if isinstance(seq, SeqStats) else list(seq)
    kinds = {(s.weighting, s.hyper.get("ld_alpha")) for s, _ in mix if s.name != "sft"}
    if isinstance(seq, SeqStats) and len(kinds) > 1:
        names = ", ".join(s.name for s, _ in mix)
        raise UserError(f"losses {names} weigh tokens differently; give each its own statistics")
    states = [None] * len(mix) if states is None else states
    if not len(mix) == len(many) == len(states):
        raise UserError(
            f"{len(mix)} losses, {len(many)} statistics, {len(states)} states; give as many of each"
        )
    per_item, new, metrics = 0.0, [], {}
    for (spec, weight), s, state in zip(mix, many, states, strict=True):
        one, after, extra = loss(spec, s, batch, state)
        per_item = per_item + weight * one
        new.append(after)
        count = jnp.asarray(one.shape[0], one.dtype)
        metrics = extra | metrics | {f"loss/{spec.name}": (sg(one).sum(), count)}
    return per_item, tuple(new), metrics


# ---- inputs


def needed(spec: LossSpec, k: int | None = None) -> frozenset[str]:
    """Names of the inputs of a loss as it is configured, for k responses an item."""
    needs, k = set(spec.needs), SCHEMAS[spec.schema] or k or 2
    if spec.hyper.get("use_weighting"):
        needs.add("log_sum_p2")
    if spec.hyper.get("final") is not None:
        needs.add("progress")
    if spec.hyper.get("kl_alpha") or (spec.hyper.get("retain") == "kl" and k > 1):
        needs.add("kl")
    if spec.hyper.get("prompt_nll"):
        needs |= {"prompt_p", "prompt_n"}
    return frozenset(needs)


def missing(spec: LossSpec, seq: SeqStats, batch: Batch) -> list[str]:
    """Names of inputs that the loss needs and did not get."""
    needs = needed(spec, seq.p.shape[1])

    def there(name: str) -> bool:
        if name == "reference":
            return seq.q is not None
        if name == "gold":
            return seq.p.shape[1] == 3
        if name == "tokens":
            return seq.tokens is not None and seq.tokens.ref_lp is not None
        if name in _TOKENS:
            return seq.tokens is not None and getattr(seq.tokens, name) is not None
        return getattr(batch, name) is not None

    return sorted(name for name in needs if not there(name))


def check_inputs(spec: LossSpec, seq: SeqStats, batch: Batch) -> None:
    """UserError where an input is missing, or the number of responses or items is wrong. Shapes only."""
    b, k = seq.p.shape
    want = SCHEMAS[spec.schema]
    if want is not None and k != want:
        raise UserError(
            f"loss {spec.name!r} wants {want} responses an item ({spec.schema}), not {k}; change the data"
        )
    if spec.schema == "ranked" and (k < 2 or (spec.name == "mdpo_multi" and k % 2)):
        raise UserError(
            f"loss {spec.name!r} compares groups of responses and got {k}; give an even number of 2 or more"
        )
    if spec.name in ("mdpo_multi", "d2o") and batch.valid is not None:
        raise UserError(
            f"loss {spec.name!r} knows its groups by their place, and some items have fewer than {k} responses; "
            "give all the same number"
        )
    if spec.schema == "forget" and k > 2:
        raise UserError(
            f"loss {spec.name!r} wants one response to forget and at most one to keep, not {k}"
        )
    if absent := missing(spec, seq, batch):
        raise UserError(
            f"loss {spec.name!r} needs {', '.join(absent)}, which the batch does not have; add it, or choose another loss"
        )
    if b < spec.min_batch:
        raise UserError(
            f"loss {spec.name!r} compares the items of a batch and got {b}; use {spec.min_batch} or more"
        )
    w = spec.hyper.get("weights")
    if spec.name == "modpo" and batch.rewards.shape[-1] != len(w) - 1:
        raise UserError(
            f"modpo has {len(w)} weights for {batch.rewards.shape[-1]} further rewards; give one more weight than rewards"
        )


# ---- curves


def curves(spec: LossSpec, seq: SeqStats, batch: Batch) -> Curves:
    """Rewards, accuracy and margin of the responses as (sum, weight), whatever the loss made of them.

    rewards/* = beta a (beta 1 where a loss has none), of plain log-ratios also with a divergence or with weighted
    tokens: comparable between losses of one beta, and rewards/accuracy between all. A loss without reference has
    mean_lp/*, mean log-probs, in their place (and rewards/* too where a reference was given). Ranked: chosen is the best score, rejected the worst.
    """
    seq = jax.tree.map(sg, seq._replace(tokens=None))
    raw_p = seq.plain
    raw_q = seq.q if seq.raw_q is None else seq.raw_q
    beta = spec.hyper.get("beta", 1.0)
    spaces = {}
    if raw_q is not None:
        spaces["rewards"] = beta * (raw_p - raw_q)
    if spec.reference_free:
        spaces["mean_lp"] = raw_p / seq.length
    out = {}
    for name, r in spaces.items():
        out |= _order(name, r, spec, batch)
    values = {"logps": raw_p, "length": seq.n}
    for name, x in values.items() if spec.schema != "image" else ():
        w, l = _split(x, spec, batch)
        out |= {f"{name}/chosen": w, f"{name}/rejected": l}
    return {k: v for k, v in out.items() if v is not None}


def token_curves(spec: LossSpec, tokens: Tokenwise, batch: Batch) -> Curves:
    """`entropy` (nats a token) of chosen and rejected responses, `token_accuracy` (likeliest token) of chosen ones."""
    if tokens.entropy is None:
        return {}
    total = lambda x: sg(jnp.where(tokens.mask, x, 0.0).sum(-1))
    n, entropy, right = (_split(total(x), spec, batch) for x in (1.0, tokens.entropy, tokens.top1))
    both = lambda sides: sum(side[0] for side in sides if side is not None)
    out = {"entropy": (both(entropy), both(n))}
    return out | ({"token_accuracy": (right[0][0], n[0][0])} if n[0] is not None else {})


def _split(x, spec, batch):
    """(sum, weight) of x over chosen and over rejected responses; None where there are none."""
    one = jnp.ones_like(x[:, 0])
    if spec.schema == "forget":
        return None, (x[:, 0].sum(), one.sum())
    if spec.schema == "unpaired":
        if batch.labels is None:
            return (x[:, 0].sum(), one.sum()), None
        w = batch.labels.astype(x.dtype)
        return ((x[:, 0] * w).sum(), w.sum()), ((x[:, 0] * (1 - w)).sum(), (1 - w).sum())
    w, l = _ends(x, spec, batch)
    return (w.sum(), one.sum()), (l.sum(), one.sum())


def _ends(x, spec, batch):
    """Chosen and rejected (b,) of x."""
    if spec.schema == "triple":
        return x[:, 1], x[:, 2]
    if spec.schema == "ranked" and batch.scores is not None:
        valid = jnp.ones_like(x, bool) if batch.valid is None else batch.valid
        best = jnp.where(valid, batch.scores, -jnp.inf).argmax(-1)
        worst = jnp.where(valid, batch.scores, jnp.inf).argmin(-1)
        return tuple(jnp.take_along_axis(x, i[:, None], 1)[:, 0] for i in (best, worst))
    return x[:, 0], x[:, -1] if spec.schema == "ranked" else x[:, 1]


def _order(name, r, spec, batch):
    w, l = _split(r, spec, batch)
    out = {f"{name}/chosen": w, f"{name}/rejected": l}
    if spec.schema not in ("unpaired", "forget"):
        w, l = _ends(r, spec, batch)
        n = jnp.asarray(w.shape[0], w.dtype)
        out |= {
            f"{name}/accuracy": ((w > l).sum().astype(w.dtype), n),
            f"{name}/margin": ((w - l).sum(), n),
        }
    return out
