"""Helper: a sampling as a scan over any velocity, for samplers that are compared without a model."""

import jax
import jax.numpy as jnp

from jaxrepro.ops import flow


def walk(velocity, x, plan):
    """x_0 (float32) from noise x. velocity(x, t (b,), step) -> v; step is a traced integer."""
    rows = jax.tree.map(jnp.asarray, plan)

    def body(state, each):
        i, row = each
        return flow.step(row, state, velocity(state.x, jnp.full(len(x), row.t), i)), None

    return jax.lax.scan(body, flow.start(plan, x), (jnp.arange(len(plan.t)), rows))[0].x
