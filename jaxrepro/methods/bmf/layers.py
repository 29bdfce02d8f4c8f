"""The linear layer that BMF's networks share, drawn as torch draws one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Dense(nn.Module):
    """x W + b; both drawn uniformly within 1 / sqrt(inputs), as torch's Linear is. Float32."""

    outputs: int
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        n = x.shape[-1]
        y = x @ self.param("kernel", _uniform(n), (n, self.outputs))
        return y + self.param("bias", _uniform(n), (self.outputs,)) if self.bias else y


def _uniform(inputs):
    bound = inputs**-0.5
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)
