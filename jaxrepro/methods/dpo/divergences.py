"""Scores of f-divergences, "Beyond Reverse KL" (f-DPO, arXiv:2309.16240): f'(u) at u = pi/ref = e^a.

    reverse_kl      a                            DPO
    forward_kl      1 - e^-a
    jensen_shannon  log 2 + log sigmoid(a)       bounded above
    alpha           (1 - e^(-alpha a)) / alpha   alpha -> 0 reverse KL, alpha = 1 forward KL

alpha is the official code's; TRL's coefficient is c = 1 - alpha. The constants make s(0) = 0. They cancel
in s_w - s_l, but not where scores are first divided by lengths (ipo, sigmoid_norm).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrepro.config import UserError
from jaxrepro.methods.dpo.links import exp

MAX_EXPONENT = 40.0  # half of what float32 holds, since `ipo` squares scores
DIVERGENCES = ("reverse_kl", "forward_kl", "jensen_shannon", "alpha")


def score(a: Float[Array, "*b"], kind: str, alpha=0.5) -> Float[Array, "*b"]:
    """f'(e^a) of divergence `kind`. Exponents are cut at 40."""
    if kind == "alpha" and isinstance(alpha, float) and abs(alpha) < 1e-6:
        kind = "reverse_kl"
    match kind:
        case "reverse_kl":
            return a
        case "forward_kl":
            return -jnp.expm1(jnp.minimum(-a, MAX_EXPONENT))
        case "jensen_shannon":
            return jnp.log(2.0) + jax.nn.log_sigmoid(a)
        case "alpha":
            return -jnp.expm1(jnp.minimum(-alpha * a, MAX_EXPONENT)) / alpha
    raise UserError(f"divergence is {kind!r}; choose one of {', '.join(DIVERGENCES)}")


def chi_squared(a: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """phi(u) = u + log u at u = e^a: chi^2 mixed with KL, of chiPO (arXiv:2407.13399; unverified)."""
    return exp(a) + a
