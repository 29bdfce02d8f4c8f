"""Diffusion-DPO, arXiv:2311.12908: the same loss with noise errors in the place of log-probs.

    S(-(beta/2) [(e_w - e_w^ref) - (e_l - e_l^ref)]),   e = mean over the image of (noise - prediction)^2

Both images of a pair get the same step t and the same noise.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrepro.methods.dpo.links import logistic
from jaxrepro.methods.dpo.sequence import SeqStats, sg
from jaxrepro.methods.dpo.spec import variant


def noise_statistics(
    noise: Float[Array, "b *image"],
    prediction: Float[Array, "b 2 *image"],
    ref_prediction: Float[Array, "b 2 *image"],
) -> SeqStats:
    """Statistics with p = -e and q = -e^ref, so that a = log pi/ref up to a factor; n = 1."""

    def error(x):
        axes = tuple(range(2, x.ndim))
        return jnp.square(noise[:, None] - x).mean(axes)

    p, q = -error(prediction), sg(-error(ref_prediction))
    return SeqStats(p, q, jnp.ones_like(p))


@variant(
    "2311.12908", "official", schema="image", notes=("T is inside beta, as in the official code",)
)
def diffusion_dpo(s, batch, *, beta=5000.0):
    """S(beta/2 D) of `noise_statistics`."""
    return logistic(0.5 * beta * s.d)
