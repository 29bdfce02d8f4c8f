"""Matrix products of tokens: whatever the layout of the weight, the numbers are numpy's."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.ops.dense import dense, flip


@pytest.mark.parametrize("tokens", [(1, 1), (3, 2)])
@pytest.mark.parametrize(("inputs", "shape"), [(1, (8, 2, 3)), (1, (8, 5)), (2, (2, 4, 5))])
def test_a_weight_and_its_flipped_self_give_the_product_that_numpy_gives(inputs, shape, tokens):
    rng = np.random.default_rng(0)
    w = rng.integers(-9, 9, shape).astype(np.float32)  # whole numbers: exact in any order
    x = rng.integers(-9, 9, (*tokens, *shape[:inputs])).astype(np.float32)
    want = np.tensordot(x, w, axes=inputs)
    x, w = jnp.asarray(x), jnp.asarray(w)
    np.testing.assert_array_equal(dense(x, w, inputs=inputs), want)
    np.testing.assert_array_equal(dense(x, flip(w, inputs), inputs=inputs), want)
