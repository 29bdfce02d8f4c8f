"""Losses that look across the batch are those of the global batch, however eight devices cut it."""

import sys
from functools import partial
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


@pytest.mark.parametrize("name", ["aot", "kto", "dr_dpo", "beta_dpo", "bco", "rpo_rel", "sft"])
def test_eight_devices_give_the_loss_of_the_global_batch(name):
    spec = resolve(name)
    _, batch = example(spec, b=B)
    rng = np.random.default_rng(0)
    k = 1 if spec.schema == "unpaired" else 2
    f = lambda low, high: jnp.asarray(rng.uniform(low, high, (B, k)), jnp.float32)
    seq = SeqStats(-f(1, 40), -f(1, 40), jnp.round(f(3, 30)))
    batch = batch._replace(
        scores=None, rewards=None, unsafe=None, reward_head=None, vocab=None, progress=None
    )
    state = None
    if spec.state is not None:
        state = jax.tree.map(lambda x: x + 0.5, spec.state())

    def run(p, rows):
        seq, batch = rows
        per_item, after, curves = loss(spec, seq._replace(p=p), batch, state)
        return per_item.mean(), (after, curves)

    both = jax.value_and_grad(run, has_aux=True)
    want = jax.jit(both)(seq.p, (seq, batch))
    mesh = sharding.make_mesh((8, 1, 1, 1))
    key, batch = batch.key, batch._replace(key=None)

    def keyed(p, rows, key):
        return both(p, (rows[0], rows[1]._replace(key=key)))

    at = partial(sharding.batch_sharding, mesh)
    with jax.set_mesh(mesh):
        p, rows = sharding.place((seq.p, (seq, batch)), at((seq.p, (seq, batch))))
        assert len(p.sharding.device_set) == 8 and not p.sharding.is_fully_replicated
        got = jax.jit(keyed, compiler_options=meshes.QUICK)(p, rows, key)
    meshes.assert_same(got, want, name=name)
