"""Estimators of KL(pi || ref) from samples of pi, one value a token.

    d = log pi - log ref
    k1 = d                     unbiased, high variance, may be negative
    k2 = d^2 / 2               biased, low variance; as a loss its gradient is that of the KL on-policy
    k3 = exp(-d) + d - 1       unbiased, >= 0; the estimator of "DeepSeekMath" (arXiv:2402.03300), eq. 4

k1 belongs in the reward (REINFORCE++). Used as a loss on fresh samples its expected gradient is
E[grad log pi] = 0, so it would do nothing but add noise: `kl(..., in_loss=True)` refuses it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrepro.config import UserError

KINDS = ("k1", "k2", "k3")


def kl(
    lp: Float[Array, "*b"],
    ref_lp: Float[Array, "*b"],
    *,
    kind: str = "k3",
    clamp: float | None = None,
    in_loss: bool = False,
) -> Float[Array, "*b"]:
    """KL estimate of each token, in nats. `clamp` bounds |log pi - log ref|; no gradient flows beyond it.

    Raises UserError for an unknown kind, and for kind "k1" with `in_loss`.
    """
    if kind not in KINDS:
        raise UserError(f"kl kind is {kind!r}; choose one of {', '.join(KINDS)}")
    if in_loss and kind == "k1":
        raise UserError(
            "kl kind 'k1' has zero expected gradient as a loss; use k2 or k3, or put k1 in the reward"
        )
    d = lp - ref_lp
    if clamp is not None:
        d = jnp.clip(d, min=-clamp, max=clamp)
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d * d
    return jnp.expm1(-d) + d
