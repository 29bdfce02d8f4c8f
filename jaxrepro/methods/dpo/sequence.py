"""Stage 1 of a preference loss: log-probs of tokens become statistics of responses.

    p_k = sum_t w_t log pi(y_k,t | x, y_k,<t)      q_k the same under the frozen reference      n_k tokens

w is 1 except for these, which change which tokens count, and how much:

    ld_alpha    1 up to min(n_w, n_l), then alpha                  LD-DPO, arXiv:2409.06411
    decay       gamma^t, t from 1                                  D2PO, arXiv:2502.14340
    subsample   min(n_w, n_l) random tokens of each response       SamPO, arXiv:2406.10957
    weights     given                                              TIS-DPO, arXiv:2410.04350
    turns       gamma^i (1 - gamma^(T-i)) / (1 - gamma^T), turn i  DMPO, arXiv:2406.14868 (unverified)

Responses lie on one axis k: (chosen, rejected); (gold, chosen, rejected); K candidates; or one alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrepro.config import UserError
from jaxrepro.methods.dpo.spec import LossSpec

sg = jax.lax.stop_gradient


class Tokenwise(NamedTuple):
    """What models say about each response token. Where `mask` is False anything may stand."""

    lp: Float[Array, "b k t"]  # log pi of the token
    ref_lp: Float[Array, "b k t"] | None
    mask: Bool[Array, "b k t"]
    log_sum_p2: Float[Array, "b k t"] | None = None  # log sum_v pi(v)^2
    ref_entropy: Float[Array, "b k t"] | None = None  # nats
    kl: Float[Array, "b k t"] | None = None  # KL(ref || pi) at the position
    weights: Float[Array, "b k t"] | None = None  # of TIS-DPO
    turn: Int[Array, "b k t"] | None = None  # number of the turn, from 0, of DMPO
    entropy: Float[Array, "b k t"] | None = None  # of the policy, nats; for curves, as is top1
    top1: Float[Array, "b k t"] | None = None  # 1 where the token is the policy's likeliest


class SeqStats(NamedTuple):
    """Statistics of responses. Gradients flow through p, raw_p and the arrays of tokens, never q."""

    p: Float[Array, "b k"]  # weighted sum of log pi
    q: Float[Array, "b k"] | None  # of the reference
    n: Float[Array, "b k"]  # response tokens, the end of the turn among them
    raw_p: Float[Array, "b k"] | None = None  # plain sums, where p is weighted
    raw_q: Float[Array, "b k"] | None = None
    tokens: Tokenwise | None = None
    score: Float[Array, "b k"] | None = None  # of an f-divergence; `objective.loss` fills it in

    @property
    def a(self) -> Float[Array, "b k"]:
        """Log-ratio of policy to reference."""
        return self.p - self.q

    @property
    def a_w(self) -> Float[Array, "b"]:
        return self.a[:, 0]

    @property
    def a_l(self) -> Float[Array, "b"]:
        return self.a[:, 1]

    @property
    def d(self) -> Float[Array, "b"]:
        """Difference of log-ratios, chosen minus rejected."""
        return self.a_w - self.a_l

    @property
    def s(self) -> Float[Array, "b k"]:
        """Score: the log-ratio, unless an f-divergence is chosen."""
        return self.a if self.score is None else self.score

    @property
    def delta(self) -> Float[Array, "b"]:
        return self.s[:, 0] - self.s[:, 1]

    @property
    def length(self) -> Float[Array, "b k"]:
        return jnp.maximum(self.n, 1.0)

    @property
    def pb(self) -> Float[Array, "b k"]:
        """Mean log-prob of a token."""
        return self.p / self.length

    @property
    def qb(self) -> Float[Array, "b k"]:
        return self.q / self.length

    @property
    def plain(self) -> Float[Array, "b k"]:
        """Plain sum of log pi, also where p is weighted."""
        return self.p if self.raw_p is None else self.raw_p

    def response_sum(self, name: str) -> Float[Array, "b k"]:
        """Sum over response tokens of one of the arrays of tokens."""
        return jnp.where(self.tokens.mask, getattr(self.tokens, name), 0.0).sum(-1)


class Batch(NamedTuple):
    """Everything else that a loss may ask for; `LossSpec.needs` names what it does ask for."""

    scores: Float[Array, "b k"] | None = None  # reward, label or win probability of each response
    labels: Bool[Array, "b"] | None = None  # unpaired: True = desirable
    ties: Bool[Array, "b"] | None = None
    valid: Bool[Array, "b k"] | None = None  # ranked: which candidates exist
    prompt_weight: Float[Array, "b"] | None = None  # rho of BCO's underlying-distribution matching
    rewards: Float[Array, "b k m"] | None = None  # the other objectives of MODPO
    kl_p: Float[Array, "b"] | None = None  # log pi of KTO's mismatched response (x_i, y_{i-1})
    kl_q: Float[Array, "b"] | None = None
    probability: Float[Array, "b"] | None = None  # P(chosen beats rejected), from a judge
    explore: Int[Array, "b"] | None = None  # XPO, SELM: which response the bonus is about
    age: Float[Array, "b"] | None = None  # NS-DPO: time steps since the pair was labelled
    unsafe: Bool[Array, "b k"] | None = None
    embedding: Float[Array, "b d"] | None = None  # of the prompt
    value: Float[Array, "b"] | None = None  # DRO's value head, trained by the loss
    reward_head: Float[Array, "b k"] | None = None  # DRDO's student reward, trained by the loss
    prompt_p: Float[Array, "b"] | None = None  # log pi of the prompt's tokens, for NLL with prompt
    prompt_n: Float[Array, "b"] | None = None
    mean_chosen_tokens: Float[Array, ""] | None = None  # of the global batch; None: of this one
    vocab: Int[Array, ""] | int | None = None
    progress: Float[Array, ""] | float | None = None  # share of training done, in [0, 1]
    key: Key[Array, ""] | None = None


def statistics(tokens: Tokenwise, spec: LossSpec, *, key: Key[Array, ""] | None = None) -> SeqStats:
    """Statistics of responses as the token weighting of `spec` wants them. Pure.

    `key` draws the tokens of SamPO; UserError without it, and where given weights are missing.
    """
    mask = tokens.mask
    lp = jnp.where(mask, tokens.lp, 0.0)  # padding may hold nan, which must not reach a gradient
    ref = None if tokens.ref_lp is None else sg(jnp.where(mask, tokens.ref_lp, 0.0))
    n = mask.sum(-1).astype(lp.dtype)
    raw_p, raw_q = lp.sum(-1), None if ref is None else ref.sum(-1)
    weights = _token_weights(tokens, spec, n, key)
    if weights is None:
        return SeqStats(raw_p, raw_q, n, tokens=tokens)
    w, w_ref = (sg(x) for x in weights)
    q = None if ref is None else (ref * w_ref).sum(-1)
    return SeqStats((lp * w).sum(-1), q, n, raw_p, raw_q, tokens)


def _token_weights(tokens: Tokenwise, spec: LossSpec, n: Float[Array, "b k"], key):
    """Weights (b, k, t) of the policy's and of the reference's tokens; None = 1."""
    hyper, mask = spec.hyper, tokens.mask
    place = jnp.cumsum(mask, -1)  # 1 at the first response token
    shared = n.min(-1)[:, None, None]
    if hyper.get("ld_alpha") is not None:
        w = jnp.where(place <= shared, 1.0, hyper["ld_alpha"]).astype(n.dtype)
        return w, w if hyper["ld_reference"] else jnp.ones_like(w)
    match spec.weighting:
        case "sum":
            return None
        case "decay":
            w = jnp.power(jnp.asarray(hyper["gamma"], n.dtype), place)
        case "weights":
            if tokens.weights is None:
                raise UserError(f"loss {spec.name!r} needs the weights of the tokens; none given")
            w = jnp.where(mask, tokens.weights, 0.0)
        case "turns":
            if tokens.turn is None:
                raise UserError(f"loss {spec.name!r} needs the turn of each token; none given")
            w = _turn_weights(tokens.turn, mask, hyper["gamma"])
        case "subsample":
            if key is None:
                raise UserError(
                    f"loss {spec.name!r} draws tokens and needs a random key; none given"
                )
            keys = jax.random.split(key) if hyper["independent"] else (key, key)
            return tuple(_subsample(k, mask, shared).astype(n.dtype) for k in keys)
    return w, w


def _subsample(key, mask: Bool[Array, "b k t"], shared: Float[Array, "b 1 1"]):
    """True at `shared` response tokens of each response, drawn without replacement."""
    draw = jnp.where(mask, jax.random.uniform(key, mask.shape), jnp.inf)
    rank = jnp.argsort(jnp.argsort(draw, -1), -1)
    return mask & (rank < shared)


def _turn_weights(turn: Int[Array, "b k t"], mask: Bool[Array, "b k t"], gamma):
    turns = jnp.where(mask, turn + 1, 0).max(-1, keepdims=True)
    gamma = jnp.asarray(gamma, float)
    plain = (turns - turn) / jnp.maximum(turns, 1)  # the limit of the quotient
    g = jnp.where(gamma == 1, 0.5, gamma)
    found = g**turn * (1 - g ** (turns - turn)) / (1 - g ** jnp.maximum(turns, 1))
    return jnp.where(gamma == 1, plain, found)


def policy_weight(s: SeqStats, *, clamp: bool = False) -> Float[Array, "b"]:
    """Weight w_w w_l of a pair, w = exp(mean_t [log pi(y_t) - log sum_v pi(v)^2]), without gradient.

    "WPO: Enhancing RLHF with Weighted Preference Optimization" (arXiv:2406.11827), eq. 2. The
    official code clamps the product at 1 (`clamp`); TRL does not. Without the clamp it can exceed 1.
    """
    aligned = jnp.where(s.tokens.mask, s.tokens.lp - s.tokens.log_sum_p2, 0.0).sum(-1) / s.length
    w = sg(jnp.exp(aligned[:, :2].sum(-1)))
    return jnp.minimum(w, 1.0) if clamp else w


def nll(
    s: SeqStats, batch: Batch, k: int | Int[Array, "b"] = 0, *, per: str = "token"
) -> Float[Array, "b"]:
    """Negative log-likelihood of response k of each item.

    per "token": divided by the mean length of the batch, so that the mean over items is the mean over
    all tokens, also when the batch is cut. "sequence": by its own length. "sum": not divided.
    """
    k = jnp.broadcast_to(jnp.asarray(k), s.p.shape[:1])[:, None]
    lp, n = (jnp.take_along_axis(x, k, 1)[:, 0] for x in (s.plain, s.length))
    if per == "sum":
        return -lp
    if per == "sequence":
        return -lp / n
    return -lp / mean_tokens(n, batch)


def mean_tokens(n: Float[Array, "b"], batch: Batch) -> Float[Array, ""]:
    """The divisor of a mean over tokens: the global batch's mean length of what is learnt, else that of n."""
    return n.mean() if batch.mean_chosen_tokens is None else batch.mean_chosen_tokens
