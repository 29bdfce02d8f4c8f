"""Columns of the logits that are no tokens count in no statistic that a preference loss reads."""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro.methods.dpo import programs, registry
from jaxrepro.methods.dpo.programs import Reference
from jaxrepro.methods.dpo.rows import collate, shape_of
from jaxrepro.models import transformer
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.train.state import State

sys.path.insert(0, str(Path(__file__).parents[1]))
import meshes

V, WIDE = 7, 12
CFG = TransformerConfig(
    vocab=V, d=8, layers=1, heads=2, kv=1, head_dim=4, ffn=8, embed_std=0.5, tied=False
)
PADDED = dataclasses.replace(CFG, vocab=WIDE).using(V)
MIX = ("mallows", "wpo", "tdpo1")  # entropies over log V, sums of p^2, divergences


def rows():
    rng = np.random.default_rng(1)
    draw = lambda n: rng.integers(0, V, n).tolist()
    found = [
        {"id": str(i), "prompt": draw(2), "responses": [draw(3), draw(1 + i)]} for i in range(2)
    ]
    return jax.tree.map(jnp.asarray, collate(found, shape_of(found, multiple=1), pad=0))


def wide(params, scale):
    """The same with columns that would take all of the probability."""
    rng = np.random.default_rng(2)
    w = scale * rng.normal(size=(8, 1)).astype("f4")
    more = np.concatenate([w, -w] * 3, axis=1)[:, : WIDE - V]
    return params | {
        "embed": jnp.concatenate([params["embed"], jnp.asarray(more.T)]),
        "head": jnp.concatenate([params["head"], jnp.asarray(more)], axis=1),
    }


def test_padding_changes_no_loss():
    losses, live = tuple(registry.mix(list(MIX))), Reference("live")

    @partial(jax.jit, static_argnames="cfg", compiler_options=meshes.QUICK)
    def run(params, ref, found, *, cfg):
        common = dict(cfg=cfg, mix=losses, reference=live)
        state = State(jnp.asarray(1), params, None, programs.first_extra(losses, live, ref))
        ready, extra = programs.prepare(state, found, **common)
        return programs.loss(params, ready, extra, **common)[0], ready.data.vocab

    policy, ref = (transformer.init(jax.random.key(i), CFG) for i in range(2))
    want, v = run(policy, ref, rows(), cfg=CFG)
    got, same = run(wide(policy, 1e3), wide(ref, 2e3), rows(), cfg=PADDED)
    assert int(v) == int(same) == V
    np.testing.assert_allclose(got, want, rtol=1e-5)
