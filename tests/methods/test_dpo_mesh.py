"""Losses that look across the batch are those of the global batch, however eight devices cut it."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro import sharding
from jaxrepro.methods.dpo.registry import REGISTRY, SeqStats, loss, resolve

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import meshes
from dpo_golden import example

B = 16
ACROSS = [n for n in sorted(REGISTRY) if REGISTRY[n].set_level]


def test_the_losses_that_look_across_are_known():
    assert ACROSS == [
        "alpha_dpo", "aot", "aot_unpaired", "bco", "beta_dpo", "dr_dpo", "kto", "kto_pair", "rpo_rel",
    ]  # fmt: skip


NAMES = ["aot", "kto", "dr_dpo", "beta_dpo", "bco", "rpo_rel", "sft"]


def given(name):
    """Statistics (B, k), what else the loss reads, and a state that is not the first."""
    spec = resolve(name)
    _, batch = example(spec, b=B)
    rng = np.random.default_rng(0)
    k = 1 if spec.schema == "unpaired" else 2
    f = lambda low, high: jnp.asarray(rng.uniform(low, high, (B, k)), jnp.float32)
    seq = SeqStats(-f(1, 40), -f(1, 40), jnp.round(f(3, 30)))
    batch = batch._replace(
        scores=None,
        rewards=None,
        unsafe=None,
        reward_head=None,
        vocab=None,
        progress=None,
        key=None,
    )
    return seq.p, (seq, batch)


def run(name, p, rows, key):
    spec, (seq, batch) = resolve(name), rows
    state = None if spec.state is None else jax.tree.map(lambda x: x + 0.5, spec.state())

    def value(p):
        per_item, after, curves = loss(spec, seq._replace(p=p), batch._replace(key=key), state)
        return per_item.mean(), (after, curves)

    return jax.value_and_grad(value, has_aux=True)(p)


@pytest.fixture(scope="module")
def one_and_eight():
    """Loss, gradient, state and curves of each loss: on one device, and on eight that share the rows."""
    rows, key = {name: given(name) for name in NAMES}, jax.random.key(0)
    compiled = jax.jit(
        lambda rows, key: {name: run(name, *x, key) for name, x in rows.items()},
        compiler_options=meshes.QUICK,
    )
    want = compiled(rows, key)
    mesh = sharding.make_mesh((8, 1, 1, 1))
    with jax.set_mesh(mesh):
        placed = sharding.place(rows, sharding.batch_sharding(mesh, rows))
        for p, _ in placed.values():
            assert len(p.sharding.device_set) == 8 and not p.sharding.is_fully_replicated
        return want, compiled(placed, key)


@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_give_the_loss_of_the_global_batch(name, one_and_eight):
    want, got = one_and_eight
    meshes.assert_same(got[name], want[name], name=name)
