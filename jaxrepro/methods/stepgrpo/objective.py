"""R1-VL: Learning to Reason with Multimodal Large Language Models via Step-wise Group Relative
Policy Optimization, arXiv:2503.12937 (v2): the loss.

M completions c^i of a question get one scalar reward each, r^i = r_acc^i + r_val^i (rewards.py), and

    A^i   = (r^i - mean_M r) / (std_M r + 1e-4)                               rl/advantages.py, mode "grpo"
    rho_t = exp(lp_t - sg(lp_t)) = 1,   its gradient is that of lp_t
    k3_t  = exp(lr_t - lp_t) - (lr_t - lp_t) - 1                              rl/kl.py
    L     = mean_i [ 1/|c^i| sum_t -(rho_t A^i - beta k3_t) ]                 `loss`, mode "grpo"

with lp = log pi_theta, lr = log pi_ref of the sampled tokens up to and including the first eos, and
pi_ref the frozen warm-up checkpoint. "Step-wise" says how the reward is made; the advantage is one scalar.

Differs from the paper and its code: nothing by default. The optional arguments are the neighbours that it
is compared with (GRPO with clip and old log-probs, DAPO, Dr. GRPO, GSPO), and a correction for a sampler
whose log-probs differ from the trainer's. The loss is a sum with a weight, divided once for the whole
batch, so that micro-batches and devices change nothing. A completion without a scored token (filtered)
counts in no mean.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrepro.config import UserError
from jaxrepro.rl import surrogates
from jaxrepro.rl.kl import kl
from jaxrepro.rl.masks import masked_mean

# The loss modes compared in the ablation: keyword arguments of `loss` (dr_grpo also needs max_length).
LOSSES = {
    "grpo": {},
    "bnpo": {"mode": "bnpo"},
    "dapo": {"mode": "dapo", "clip": (0.2, 0.28)},
    "dr_grpo": {"mode": "dr_grpo"},
    "gspo": {"level": "sequence", "clip": (3e-4, 4e-4)},
}


def loss(
    lp: Float[Array, "b n t"],
    ref_lp: Float[Array, "b n t"] | None,
    advantage: Float[Array, "b n"],
    mask: Bool[Array, "b n t"],
    *,
    beta: float,
    old_lp: Float[Array, "b n t"] | None = None,
    clip: tuple[float, float] | None = None,
    mode: str = "grpo",
    level: str = "token",
    dual: float | None = None,
    delta: float | None = None,
    kl_kind: str = "k3",
    kl_clamp: float | None = None,
    max_length: int | None = None,
    lp_sampler: Float[Array, "b n t"] | None = None,
    sampler_cap: float | None = None,
    entropy: Float[Array, "b n t"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, tuple[Array, Array]]]:
    """Summed loss, its weight, and curves as (sum, weight). Pure: jit, grad, vmap it at will.

    lp, ref_lp, old_lp: log-probs of the sampled tokens under policy, reference (None only with beta = 0)
    and the policy that sampled (None: this one, so the ratio is 1). `lp_sampler`, with `sampler_cap`, also
    weighs each token by min(pi / pi_sampler, cap). `entropy` is only logged. aux: kl, completion_length,
    and where the inputs exist entropy, clip_low, clip_high, sampler_gap (mean over tokens),
    sampler_gap_max (mean over completions of the largest gap).
    """
    if beta != 0 and ref_lp is None:
        raise UserError(f"beta is {beta} without reference log-probs; pass ref_lp or set beta to 0")
    if sampler_cap is not None and lp_sampler is None:
        raise UserError(
            f"sampler_cap is {sampler_cap} without lp_sampler; pass the sampler's log-probs"
        )
    sg = jax.lax.stop_gradient
    lp = jnp.where(
        mask, lp, 0.0
    )  # padding may hold anything, nan included, and must not reach a gradient
    adv = sg(advantage)[..., None]  # (b, n, 1)
    rho = surrogates.ratio(lp, sg(lp if old_lp is None else old_lp), mask, level=level)
    per_token = surrogates.surrogate(rho, adv, clip=clip, dual=dual, delta=delta)
    aux = {"completion_length": masked_mean(mask.sum(-1), mask.any(-1))}
    if lp_sampler is not None:
        if sampler_cap is not None:
            per_token = per_token * surrogates.importance_weight(
                lp, lp_sampler, mask, cap=sampler_cap
            )
        gap, gap_max = surrogates.sampler_gap(lp, jnp.where(mask, lp_sampler, 0.0), mask)
        aux["sampler_gap"] = gap.sum(), mask.sum().astype(jnp.float32)
        aux["sampler_gap_max"] = masked_mean(gap_max, mask.any(-1))
    if ref_lp is not None:
        ref_lp = sg(jnp.where(mask, ref_lp, 0.0))
        penalty = kl(lp, ref_lp, kind=kl_kind, clamp=kl_clamp, in_loss=True)
        per_token = per_token + beta * penalty
        aux["kl"] = masked_mean(sg(penalty), mask)
    if clip is not None:
        low, high = (
            jnp.broadcast_to(x, mask.shape) for x in surrogates.clipped(sg(rho), adv, clip)
        )
        aux["clip_low"], aux["clip_high"] = masked_mean(low, mask), masked_mean(high, mask)
    if entropy is not None:
        aux["entropy"] = masked_mean(sg(entropy), mask)
    per_token = jnp.broadcast_to(
        per_token, mask.shape
    )  # a sequence-level ratio has one value a row
    total, weight = surrogates.aggregate(per_token, mask, mode=mode, max_length=max_length)
    return total, weight, aux
