"""Losses that look across the batch are those of the global batch, however eight devices and micro-batches cut it."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro import sharding
from jaxrepro.methods.dpo import programs
from jaxrepro.methods.dpo.programs import Reference
from jaxrepro.methods.dpo.registry import REGISTRY, SeqStats, loss, resolve
from jaxrepro.models import transformer
from jaxrepro.train.state import init_state
from jaxrepro.train.step import make_step

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import meshes
from dpo_golden import example
from dpo_tiny import CFG, DESCENT, both, items, rows_of, shared

B = 16
ACROSS = [n for n, s in sorted(REGISTRY.items()) if s.set_level or s.state]
CUT = [n for n, s in sorted(REGISTRY.items()) if s.weighting == "subsample"]  # draws by position
LIVE = Reference("live")


def test_the_losses_that_look_across_are_known():
    assert ACROSS == [
        "alpha_dpo", "aot", "aot_unpaired", "bco", "beta_dpo", "dr_dpo", "kto", "kto_pair", "rpo_rel",
    ]  # fmt: skip


# ---- the loss on statistics


def given(name):
    """Statistics (B, k), and what else the loss reads with a row for each item."""
    spec = resolve(name)
    _, batch = example(spec, b=B)
    rng = np.random.default_rng(0)
    k = 1 if spec.schema == "unpaired" else 2
    f = lambda low, high: jnp.asarray(rng.uniform(low, high, (B, k)), jnp.float32)
    reads = {name: getattr(batch, name) for name in spec.needs if name in batch._fields}
    return SeqStats(-f(1, 40), -f(1, 40), jnp.round(f(3, 30))), reads | {"key": None}


def second(spec):
    """A state that is not the first."""
    return None if spec.state is None else jax.tree.map(lambda x: x + 0.5, spec.state())


def run(name, seq, reads, key):
    spec = resolve(name)

    def value(p):
        batch = programs.Batch(**reads | {"key": key})
        per_item, after, curves = loss(spec, seq._replace(p=p), batch, second(spec))
        return per_item.mean(), (after, curves)

    return jax.value_and_grad(value, has_aux=True)(seq.p)


@pytest.fixture(scope="module")
def one_and_eight():
    """Loss, gradient, state and curves of each loss: on one device, and on eight that share the rows."""
    rows, key = {name: given(name) for name in [*ACROSS, "sft"]}, jax.random.key(0)
    compiled = jax.jit(
        lambda rows, key: {name: run(name, *x, key) for name, x in rows.items()},
        compiler_options=meshes.QUICK,
    )
    want = compiled(rows, key)
    mesh = sharding.make_mesh((8, 1, 1, 1))
    with jax.set_mesh(mesh):
        placed = sharding.place(rows, sharding.batch_sharding(mesh, rows))
        for seq, _ in placed.values():
            assert len(seq.p.sharding.device_set) == 8 and not seq.p.sharding.is_fully_replicated
        return want, compiled(placed, key)


@pytest.mark.parametrize("name", [*ACROSS, "sft"])
def test_eight_devices_give_the_loss_of_the_global_batch(name, one_and_eight):
    want, got = one_and_eight
    meshes.assert_same(got[name], want[name], name=name)


# ---- the loss in a step

STEPS = {
    "pairs": [n for n in [*ACROSS, *CUT] if REGISTRY[n].schema == "pair"],
    "unpaired": [n for n in ACROSS if REGISTRY[n].schema == "unpaired"],
}


def rows(kind):
    """Rows for a decoder, KTO's mismatched responses and the embeddings of prompts among them."""
    single = kind == "unpaired"
    found = rows_of(items(k=2 - single, b=B), mismatched=int(single))
    embedding = jnp.asarray(np.random.default_rng(0).normal(size=(B, 3)), jnp.float32)
    return found._replace(data=found.data._replace(embedding=embedding))


def step(kind, m, shardings, params, ref, rows, shares):
    """(gradient, {name: loss}, states after) of the losses with these shares, in m micro-batches."""
    mix = shared(STEPS[kind], shares)
    common = dict(cfg=CFG, mix=mix, reference=LIVE)
    prepare = partial(programs.prepare, **common, micro_batches=m, steps=4)
    update = make_step(
        partial(programs.loss, **common), DESCENT, micro_batches=m, prepare=prepare, shardings=shardings
    )  # fmt: skip
    extra = programs.first_extra(mix, LIVE, ref) | {"losses": tuple(second(s) for s, _ in mix)}
    state, metrics = update(init_state(params, DESCENT, extra=extra), rows)
    return state.opt, {n: metrics[f"loss/{n}"] for n in STEPS[kind]}, state.extra["losses"]


def steps(m, shape):
    """{name: `step` of that loss alone}, in one program."""
    mesh = sharding.make_mesh(shape)
    policies, found = both(), {kind: rows(kind) for kind in STEPS}
    at = sharding.shard_tree(transformer.axes(CFG), policies[0], mesh)
    policies = tuple(sharding.place(p, at) for p in policies)
    found = sharding.place(found, sharding.batch_sharding(mesh, found))

    @partial(jax.jit, compiler_options=meshes.QUICK)
    def compiled(policies, found, shares):
        return {k: step(k, m, at, *policies, found[k], shares[k]) for k in STEPS}

    out, names = {}, STEPS.values()
    with jax.set_mesh(mesh):
        for i in range(max(map(len, names))):
            one = {k: [float(i % len(v) == j) for j in range(len(v))] for k, v in STEPS.items()}
            results = jax.device_get(compiled(policies, found, one))
            out |= {v[i]: results[k] for k, v in STEPS.items() if i < len(v)}
    return out


def compare(shape):
    want, got = steps(1, (1, 1, 1, 1)), steps(2, shape)
    assert got.keys() == want.keys() == {*ACROSS, *CUT}
    for name in got:
        assert max(abs(g).max() for g in jax.tree.leaves(got[name][0])) > 0
        for of, a, b in zip(("gradient", "loss", "state"), got[name], want[name], strict=True):
            meshes.assert_same(a, b, name=f"{of} of {name}")


@pytest.mark.slow
def test_a_step_on_eight_devices_in_micro_batches_is_that_of_the_global_batch(monkeypatch):
    """With a decoder that is its embedding: it is what a step prepares for the losses that is cut here."""

    def hidden(params, cfg, rows, *, other=False):
        tokens = rows.other[0] if other else rows.tokens
        asked = params["embed"][rows.prompts.tokens].sum(1)
        return params["embed"][jnp.roll(tokens, 1, -1)] + asked[:, None, None]

    monkeypatch.setattr(programs, "hidden_states", hidden)
    compare((8, 1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (2, 2, 1, 2)])
def test_a_step_of_a_decoder_on_a_mesh_in_micro_batches_is_that_of_the_global_batch(shape):
    compare(shape)
