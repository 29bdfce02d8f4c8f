"""The optimisers of a run beside their equations."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from jaxrepro.config import UserError
from jaxrepro.train import optim


def test_rmsprop_is_its_equation():
    rng = np.random.default_rng(0)
    p = {"w": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    settings = {"optimiser": "rmsprop", "lr": 0.1, "weight_decay": 0.5, "schedule": "linear"}
    rule = optim.optimizer(ConfigDict(settings), steps=4)
    now = {k: jnp.asarray(x, jnp.float32) for k, x in p.items()}
    state = rule.init(now)
    v = {k: np.zeros_like(x) for k, x in p.items()}
    for i in range(3):
        g = {k: rng.normal(size=x.shape) for k, x in p.items()}
        lr = 0.1 * (1 - i / 4)
        for k in p:
            v[k] = 0.99 * v[k] + 0.01 * g[k] ** 2
            p[k] = p[k] - lr * (g[k] / (np.sqrt(v[k]) + 1e-8) + (0.5 * p[k] if k == "w" else 0))
        grads = {k: jnp.asarray(x, jnp.float32) for k, x in g.items()}
        updates, state = rule.update(grads, state, now)
        now = optax.apply_updates(now, updates)
        assert float(rule.schedule(i)) == pytest.approx(lr)
        for k in p:
            np.testing.assert_allclose(now[k], p[k], rtol=1e-5, atol=1e-6)


def test_an_optimiser_that_is_not_there_is_named_and_none_is_adamw():
    with pytest.raises(UserError, match="optimiser='sgd' is unknown; use one of adamw, rmsprop"):
        optim.optimizer({"lr": 1e-3, "optimiser": "sgd"})
    p = {"w": jnp.ones((2, 2))}
    moments = [
        optim.optimizer({"lr": 1e-3} | more).init(p)[0]._fields
        for more in ({}, {"optimiser": None}, {"optimiser": "adamw"}, {"optimiser": "rmsprop"})
    ]
    assert moments[0] == moments[1] == moments[2] != moments[3]
