"""Steps of the routers against torch: Linear, softmax, the loss, clipping, AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.methods.vorta import planted, setting
from jaxrepro.models.video_parts import sinusoid
from jaxrepro.train.state import init_state
from jaxrepro.train.step import make_step

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.oracle

HEADS, WIDTH = planted.HEADS, planted.WIDTH
REG, STEPS, ROWS = 0.3, 5, 4


def batches():
    """Times and Gram matrices of the branches' errors, as planted heads have them."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        e = rng.normal(size=(ROWS, HEADS, 3, 6))
        e[:, :, 0] = 0  # full attention has no error
        gram = np.einsum("bhnx,bhmx->bhnm", e, e) * 3  # so large that the norm is clipped
        yield {"t": rng.uniform(1, 1000, ROWS), "gram": gram}


def test_steps_of_the_routers_are_those_of_torch():
    torch.manual_seed(0)
    linear = torch.nn.Linear(WIDTH, 3 * HEADS)
    kernel = linear.weight.detach().numpy().copy().reshape(HEADS, 3, WIDTH).transpose(2, 0, 1)
    params = {
        "kernel": jnp.asarray(kernel[None]),
        "bias": jnp.asarray(linear.bias.detach().numpy().reshape(1, HEADS, 3).copy()),
    }
    rule = setting.optimizer(lr=1e-2, weight_decay=0.01)
    state = init_state(params, rule)
    loss = lambda *given: planted.gram_loss(*given, reg=REG)
    step = jax.jit(make_step(loss, rule, max_grad_norm=1.0))
    theirs = torch.optim.AdamW(linear.parameters(), lr=1e-2, weight_decay=0.01)
    norms = []
    for batch in batches():
        given = {name: jnp.asarray(x, jnp.float32) for name, x in batch.items()}
        state, _ = step(state, given)
        e = torch.from_numpy(np.array(sinusoid(given["t"], WIDTH)[:, 0]))
        gram = torch.from_numpy(batch["gram"]).float()
        g = linear(torch.nn.functional.silu(e)).reshape(ROWS, HEADS, 3).softmax(-1)
        last = torch.einsum("bhn,bhnm,bhm->bh", g, gram, g).mean(1)
        total = (20 * last + REG * g[..., 0].square().mean(1)).mean()
        theirs.zero_grad()
        total.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(linear.parameters(), 1.0)))
        theirs.step()
    assert max(norms) > 1
    ours = np.asarray(state.params["kernel"])[0].transpose(1, 2, 0).reshape(3 * HEADS, WIDTH)
    np.testing.assert_allclose(ours, linear.weight.detach().numpy(), atol=2e-6)
    assert np.abs(ours - kernel.transpose(1, 2, 0).reshape(ours.shape)).max() > 0.02
