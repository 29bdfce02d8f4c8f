"""Links of preference losses, z -> loss, in forms that neither overflow nor lose digits.

    logistic          -log sigmoid(z) = log(1 + e^-z)
    hinge             max(0, 1 - z)
    square            (z - 1)^2
    exponential       e^-z
    truncated_square  max(0, 1 - z)^2
    savage            1 / (1 + e^z)^2

The family of GPO, arXiv:2402.05749. Exponents are cut at 80, where float32
still has room; beyond it the gradient is 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrepro.config import UserError

MAX_EXPONENT = 80.0


def logistic(z: Float[Array, "*b"], smoothing=0.0) -> Float[Array, "*b"]:
    """-log sigmoid(z); with `smoothing` e the mean under labels that are wrong with probability e."""
    if isinstance(smoothing, float) and smoothing == 0.0:
        return jax.nn.softplus(-z)
    return (1 - smoothing) * jax.nn.softplus(-z) + smoothing * jax.nn.softplus(z)


def hinge(z: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return jax.nn.relu(1 - z)


def square(z: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return (z - 1) ** 2


def exp(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """e^x with the exponent cut."""
    return jnp.exp(jnp.minimum(x, MAX_EXPONENT))


def exponential(z: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return exp(-z)


def truncated_square(z: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return jax.nn.relu(1 - z) ** 2


def savage(z: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return jax.nn.sigmoid(-z) ** 2


def log1mexp(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """log(1 - e^x) for x < 0, by the form of the two that keeps its digits; x is kept below -1e-7.

    A mean log-prob of 0 (a policy that is certain of every token) would give -inf and a nan gradient.
    """
    x = jnp.minimum(x, -1e-7)
    near = x > -0.6931472
    safe = jnp.where(near, -1.0, x)  # keeps the branch that is not taken finite, also its gradient
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -0.5))), jnp.log1p(-jnp.exp(safe)))


def focal(z: Float[Array, "*b"], power) -> Float[Array, "*b"]:
    """sigmoid(z)^power * -log sigmoid(z)."""
    return jnp.exp(power * jax.nn.log_sigmoid(z)) * logistic(z)


def policy_kl(a: Float[Array, "*b"], p: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """KL(pi || ref) from a sample of pi: value a = log pi/ref, gradient a * grad p.

    The plain mean of a has the right value, but a gradient whose expectation is 0.
    """
    a = jax.lax.stop_gradient(a)
    return a + a * (p - jax.lax.stop_gradient(p))


LINKS = {
    "logistic": logistic,
    "hinge": hinge,
    "square": square,
    "exponential": exponential,
    "truncated_square": truncated_square,
    "savage": savage,
}


def link(name: str, z: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The link of that name at z. UserError for an unknown one."""
    if name not in LINKS:
        raise UserError(f"link is {name!r}; choose one of {', '.join(LINKS)}")
    return LINKS[name](z)
