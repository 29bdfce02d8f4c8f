"""What a preference run computes on its devices: log-probs of responses, the loss, the step's preparation.

    rows ──> prepare(state, rows) ──> loss(params, rows) in micro-batches ──> one update

A response's tokens are scored behind its prompt, which runs once for all responses to it. A loss whose items
do not depend on each other is differentiated as it stands. One that looks at the whole batch (a sort, a running
mean, tokens drawn at random) is evaluated once in `prepare`, where its slopes with respect to the log-probs come
out; a micro-batch then only has to carry them to the parameters:

    d L / d theta = sum_{i,t} (d L / d lp_it) (d lp_it / d theta)

so that every loss is that of the global batch, however it is cut or sharded.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrepro.data.batches import PromptTokens
from jaxrepro.methods.dpo import objective
from jaxrepro.methods.dpo.sequence import Batch, Tokenwise, statistics
from jaxrepro.methods.dpo.spec import LossSpec
from jaxrepro.models import lora, transformer
from jaxrepro.models.scoring import completion_hidden
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.ops.logprob import token_kl, token_stats
from jaxrepro.train.state import State, step_key
from jaxrepro.train.step import in_parts

SLOPED = ("lp", "kl")  # arrays of tokens through which a loss has a gradient
WATCHED = frozenset({"entropy", "top1"})  # arrays of tokens that only curves read
REFERENCES = ("cached", "live", "synced", "adapter", "none")

Mix = tuple[tuple[LossSpec, float], ...]  # losses and their weights


class Rows(NamedTuple):
    """A batch of b prompts with k responses each, and what the data says about them."""

    prompts: PromptTokens  # (b, t); (b, k, t) where each response has a prompt of its own
    tokens: Any  # (b, k, c) int32
    length: Any  # (b, k) int32, the end of turn included
    data: Batch = Batch()  # scores, labels, ...
    other: Any = None  # (tokens (b, 1, c), length (b, 1)) of KTO's mismatched responses
    reference: Any = None  # {"lp": (b, k, c), ...} of the reference policy, see `reference`
    slopes: Any = None  # {"lp": (b, k, c)[, "kl"]}: d loss / d lp, where the whole batch was needed
    loss: Any = None  # (b,), with the slopes
    curves: Any = None  # {name: (sum, weight)}, likewise


class Reference(NamedTuple):
    """Which policy a run is held to.

    cached: log-probs come with the rows. live: a frozen copy in the state, of the start or, like cached ones, of
    another run (reference.init_from; Pre-DPO, arXiv:2504.15843). synced: every `every` steps the
    copy moves to alpha * policy + (1 - alpha) * copy (TR-DPO, arXiv:2404.09656; alpha 1: a hard update, the
    reference of iterated methods). adapter: the policy with its adapters off. none: reference-free.
    """

    kind: str = "cached"
    every: int = 512
    alpha: float = 0.6


def needs_of(mix: Mix) -> frozenset[str]:
    """What the losses ask of models and data."""
    return frozenset().union(*(objective.needed(spec) for spec, _ in mix))


def whole(mix: Mix) -> bool:
    """Whether a loss must see the batch as a whole."""
    return any(s.set_level or s.state or s.weighting == "subsample" for s, _ in mix)


def first_extra(mix: Mix, reference: Reference, params: Any) -> dict[str, Any]:
    """What a state holds beside parameters: the losses' own states, and a copy for the reference."""
    live = reference.kind in ("live", "synced")
    copy = jax.tree.map(jnp.copy, params) if live else None  # a step gives its buffers away
    return {"losses": tuple(s.state() if s.state else None for s, _ in mix), "reference": copy}


def reference_params(reference: Reference, params: Any, extra: Any) -> Any:
    """Parameters of a reference that is computed at each step; None where there is none."""
    if reference.kind == "adapter":
        return jax.lax.stop_gradient(lora.off(params))
    return extra["reference"] if reference.kind in ("live", "synced") else None


def moved(reference: Reference, state: State) -> Any:
    """The synced copy to which the update from `state` is held: after every `every` updates it has moved."""
    due = (state.step > 0) & (state.step % reference.every == 0)
    share = reference.alpha
    mix_in = lambda new, old: jax.tree.map(lambda a, b: share * a + (1 - share) * b, new, old)
    return jax.lax.cond(due, mix_in, lambda new, old: old, state.params, state.extra["reference"])


# Scores ----------------------------------------------------------------------------------------


def hidden_states(params: Any, cfg: TransformerConfig, rows: Rows, *, other: bool = False) -> Any:
    """The states that predict the tokens of the responses, (b, k, c, d)."""
    p, (tokens, length) = rows.prompts, rows.other if other else (rows.tokens, rows.length)
    b, k, c = tokens.shape
    if p.tokens.ndim == 3:
        flat = lambda x: x.reshape(b * k, *x.shape[2:])
        p, tokens, length = (
            PromptTokens(*map(flat, p)),
            tokens.reshape(-1, 1, c),
            length.reshape(-1, 1),
        )
    x = transformer.embed(params, cfg, p.tokens)
    found = completion_hidden(
        params, cfg, x, p.position, p.segment, p.next_position, tokens, length
    )
    return found.reshape(b, k, c, -1)


def tokenwise(
    params: Any, cfg: TransformerConfig, rows: Rows, needs: frozenset[str], ref_params: Any = None
) -> Tokenwise:
    """What policy and reference say about each response token. ref_params: where `kl` is needed.

    needs: of losses, and names of WATCHED.
    """
    hidden, head = hidden_states(params, cfg, rows), transformer.head(params, cfg)
    want = ("lp", *sorted(needs & (WATCHED | {"log_sum_p2"})))
    found = token_stats(hidden, head, rows.tokens, want, vocab=cfg.used)
    mask = jnp.arange(rows.tokens.shape[-1]) < rows.length[..., None]
    reference, kl = rows.reference or {}, None
    if "kl" in needs:
        other = transformer.head(ref_params, cfg)
        kl = token_kl(hidden, head, reference["hidden"], other, vocab=cfg.used)
    return Tokenwise(
        found["lp"],
        reference.get("lp"),
        mask,
        log_sum_p2=found.get("log_sum_p2"),
        ref_entropy=reference.get("entropy"),
        kl=kl,
        weights=reference.get("weights"),
        entropy=found.get("entropy"),
        top1=found.get("top1"),
    )


def reference_scores(
    params: Any, cfg: TransformerConfig, rows: Rows, needs: frozenset[str]
) -> dict[str, Array]:
    """What the reference policy gives: lp, and entropy or hidden where a loss needs them."""
    hidden = hidden_states(params, cfg, rows)
    want = ("lp", *(["entropy"] if "ref_entropy" in needs else []))
    found = token_stats(hidden, transformer.head(params, cfg), rows.tokens, want, vocab=cfg.used)
    return found | ({"hidden": hidden} if "kl" in needs else {})


def mismatched(params: Any, cfg: TransformerConfig, rows: Rows) -> Float[Array, "b"]:
    """Summed log-prob of each prompt's mismatched response (x_i, y_{i-1})."""
    tokens, length = rows.other
    hidden = hidden_states(params, cfg, rows, other=True)
    lp = token_stats(hidden, transformer.head(params, cfg), tokens, ("lp",), vocab=cfg.used)["lp"]
    return jnp.where(jnp.arange(tokens.shape[-1]) < length[..., None], lp, 0.0).sum((1, 2))


def learnt_tokens(mix: Mix, rows: Rows) -> Float[Array, ""]:
    """Mean length, over the batch, of the responses whose likelihood is learnt: the divisor of a token mean.

    Of what is kept beside what is forgotten, of the best of a ranking by scores; else of the first.
    """
    length, scores = rows.length.astype(jnp.float32), rows.data.scores
    at = jnp.zeros(length.shape[:1], jnp.int32)
    if mix[0][0].schema == "forget":
        at = at + length.shape[1] - 1
    elif mix[0][0].schema == "ranked" and scores is not None:
        at = jnp.where(rows.length > 0, scores, -jnp.inf).argmax(-1)
    return jnp.take_along_axis(length, at[:, None], 1).mean()


# The loss --------------------------------------------------------------------------------------


def evaluate(
    mix: Mix, tokens: Tokenwise, data: Batch, states: Sequence[Any] | None = None
) -> tuple[Float[Array, "b"], tuple[Any, ...], dict[str, Any]]:
    """Loss of each item, the losses' next states, and curves (sum, weight)."""
    seqs = [statistics(tokens, spec, key=data.key) for spec, _ in mix]
    per_item, after, curves = objective.total(mix, seqs, data, states)
    return per_item, after, curves | objective.token_curves(mix[0][0], tokens, data)


def loss(
    params: Any, rows: Rows, extra: Any, *, cfg: TransformerConfig, mix: Mix, reference: Reference
) -> tuple[Array, Any, dict[str, Any]]:
    """(sum over items, number of items, curves): what `make_step` takes."""
    b, needs = rows.tokens.shape[0], needs_of(mix)
    ref_params = reference_params(reference, params, extra)
    if rows.slopes is None:
        tokens = tokenwise(params, cfg, rows, needs | WATCHED, ref_params)
        per_item, _, curves = evaluate(mix, tokens, rows.data)
        return per_item.sum(), b, curves
    tokens = tokenwise(params, cfg, rows, needs & {"kl"}, ref_params)
    carried = sum(jnp.sum(g * getattr(tokens, name)) for name, g in rows.slopes.items())
    return rows.loss.sum() + carried - jax.lax.stop_gradient(carried), b, rows.curves


def prepare(
    state: State,
    rows: Rows,
    *,
    cfg: TransformerConfig,
    mix: Mix,
    reference: Reference,
    micro_batches: int = 1,
    seed: int = 0,
    steps: int = 1,
) -> tuple[Rows, Any]:
    """Rows with everything that the loss needs of the whole batch, and the state's next `extra`."""
    needs, extra = needs_of(mix), state.extra
    parts = lambda fn, rows: in_parts(fn, rows, micro_batches)
    ref_params = reference_params(reference, state.params, extra)
    if reference.kind == "synced":
        ref_params = moved(reference, state)
        extra = extra | {"reference": ref_params}
    if ref_params is not None:
        found = parts(lambda r: reference_scores(ref_params, cfg, r, needs), rows)
        rows = rows._replace(reference=found)
    data = rows.data._replace(
        mean_chosen_tokens=learnt_tokens(mix, rows),
        progress=state.step.astype(jnp.float32) / max(steps - 1, 1),
        key=step_key(seed, "losses", state.step),
        vocab=jnp.asarray(cfg.used or cfg.vocab) if "vocab" in needs else None,
    )
    if "kl_p" in needs:
        data = data._replace(kl_p=parts(lambda r: mismatched(state.params, cfg, r), rows))
        if ref_params is not None:
            data = data._replace(kl_q=parts(lambda r: mismatched(ref_params, cfg, r), rows))
    rows = rows._replace(data=data)
    if not whole(mix):
        return rows._replace(data=data._replace(key=None)), extra

    tokens = parts(lambda r: tokenwise(state.params, cfg, r, needs | WATCHED, ref_params), rows)
    sloped = {name: getattr(tokens, name) for name in SLOPED if getattr(tokens, name) is not None}

    def total(sloped):
        per_item, after, curves = evaluate(mix, tokens._replace(**sloped), data, extra["losses"])
        return per_item.sum(), (per_item, after, curves)

    slopes, (per_item, after, curves) = jax.grad(total, has_aux=True)(sloped)
    return rows._replace(
        data=Batch(), other=None, slopes=slopes, loss=per_item, curves=curves
    ), extra | {"losses": after}
