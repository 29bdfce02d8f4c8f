"""Helper: any loss gives the same numbers on every mesh of eight fake devices as on one device."""

import jax
import numpy as np
from compiled import QUICK

from jaxrepro import sharding

SHAPES = ((1, 1, 1, 1), (2, 2, 1, 2), (8, 1, 1, 1), (1, 4, 1, 2))


def assert_same(actual, expected, *, tolerance=1e-5, name="gradient"):
    """Each leaf agrees to `tolerance` of the leaf's largest entry."""

    def one(keys, a, e):
        a, e = np.asarray(a), np.asarray(e)
        worst = np.abs(a - e).max() / max(np.abs(e).max(), 1e-30)
        assert worst <= tolerance, f"{name} {sharding.path_of(keys)}: {worst:.1e} > {tolerance:.0e}"

    jax.tree_util.tree_map_with_path(one, actual, expected)


def single_device(loss, params, batch):
    """(loss_sum, gradients) on one device."""
    return jax.jit(jax.value_and_grad(lambda p, b: loss(p, b)[0]))(params, batch)


def on_mesh(loss, params, axes, batch, shape):
    """(loss_sum, gradients) of `loss(params, batch) -> (loss_sum, weight_sum, aux)` on a mesh.

    `axes` declares the parameters as in `sharding.shard_tree`.
    """
    mesh = sharding.make_mesh(shape)
    params_at = sharding.shard_tree(axes, params, mesh)
    batch_at = sharding.batch_sharding(mesh, batch)
    run = jax.jit(
        jax.value_and_grad(lambda p, b: loss(p, b)[0]),
        in_shardings=(params_at, batch_at),
        out_shardings=(sharding.replicated(mesh), params_at),
        compiler_options=QUICK,
    )
    with jax.set_mesh(mesh):
        return run(sharding.place(params, params_at), sharding.place(batch, batch_at))


def check(loss, params, axes, batch, shapes=SHAPES, *, tolerance=1e-5):
    """Assert that loss and gradients on each mesh of `shapes` equal the single-device ones."""
    expected = single_device(loss, params, batch)
    for shape in shapes:
        total, grads = on_mesh(loss, params, axes, batch, shape)
        assert_same(total, expected[0], tolerance=tolerance, name=f"loss on {shape}")
        assert_same(grads, expected[1], tolerance=tolerance, name=f"gradient on {shape}")
