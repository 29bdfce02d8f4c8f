"""Every loss of the registry trains a small decoder for 200 steps: finite at each, and the margin rises."""

import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrepro.methods.dpo import checks, programs, setting
from jaxrepro.methods.dpo.programs import Reference
from jaxrepro.methods.dpo.registry import REGISTRY, resolve
from jaxrepro.train.state import init_state
from jaxrepro.train.step import make_step

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import meshes
from dpo_golden import example
from dpo_tiny import CFG, B, both, items, rows_of, shared

pytestmark = pytest.mark.slow
STEPS, LIVE, ADAM = 200, Reference("live"), optax.adam(3e-3)
COMPUTED = ("kl_p", "kl_q", "vocab", "progress", "key", "mean_chosen_tokens", "valid")  # by a step


def carried(spec):
    """Whether a step can give the loss what it reads; more than a run's data can."""
    return spec.schema != "image" and not spec.needs & {"weights", "turn"}


def group(name):
    """Losses that share rows and a way through a step, and so a program."""
    spec = resolve(name)
    return "pair" if spec.schema in checks.PAIRS else spec.schema, programs.whole(((spec, 1.0),))


NAMES = [n for n, s in sorted(REGISTRY.items()) if carried(s)]


@cache
def trained(schema, whole):
    """{name: (loss of each step, log-probs (b, k) before, after)} of a group, one decoder a loss.

    The decoders train side by side in one program: each has the sum of all losses of which it counts one.
    """
    names = [n for n in NAMES if group(n) == (schema, whole)]
    tokens, batch = example(resolve(names[0]), b=B)
    rows = rows_of(items(k=tokens.mask.shape[1]), mismatched=int(schema == "unpaired"))
    rows = rows._replace(data=batch._replace(**dict.fromkeys(COMPUTED)))

    def train(shares, start, rows):
        mix = shared(names, shares)
        common = dict(cfg=CFG, mix=mix, reference=LIVE)
        step = make_step(
            partial(programs.loss, **common),
            ADAM,
            prepare=partial(programs.prepare, **common, steps=STEPS),
        )
        state = init_state(start, ADAM, extra=programs.first_extra(mix, LIVE, start))

        def one(state, _):
            state, metrics = step(state, rows)
            return state, metrics["loss"]

        state, losses = jax.lax.scan(one, state, None, length=STEPS)
        return losses, log_probs(start, rows), log_probs(state.params, rows)

    def log_probs(params, rows):
        found = programs.tokenwise(params, CFG, rows, frozenset())
        return jnp.where(found.mask, found.lp, 0.0).sum(-1)

    side_by_side = jax.vmap(train, in_axes=(0, None, None))
    run = jax.jit(side_by_side, compiler_options=meshes.QUICK)
    found = jax.device_get(run(jnp.eye(len(names)), both()[1], rows))
    return {name: tuple(x[i] for x in found) for i, name in enumerate(names)}


def test_what_is_not_trained_here_is_not_trained_by_a_run():
    for name in REGISTRY.keys() - set(NAMES):
        spec = REGISTRY[name]
        assert spec.needs & setting.UNTRAINED.keys() or spec.schema in setting.UNREAD, name


@pytest.mark.parametrize("name", NAMES)
def test_200_steps_have_a_finite_loss(name):
    losses, *_ = trained(*group(name))[name]
    assert losses.shape == (STEPS,) and np.isfinite(losses).all()
    assert losses[-1] != losses[0]


# What promises no wider margin between the better and the worse response, and why.
NO_MARGIN = {
    "discopop": "with its tau of .05 the slope at the reference has the other sign",
    "dro": "fits rewards; reads no preference",
    "nash_md": "one response an item, weighed by its win rate",
    "sft": "learns the chosen response and does not read the rejected one",
    "opo": "the relaxed sort has no Sinkhorn step, so that a wrong order can reach an NDCG above 1",
    "safedpo": "the safe response becomes the chosen one",
}


def margin(name, lp):
    """Mean log-prob by which the better response of an item stands above the worse one."""
    schema = REGISTRY[name].schema
    if schema == "unpaired":
        good = np.arange(B) % 2 == 0
        return lp[good].mean() - lp[~good].mean()
    better, worse = {"triple": (1, 2), "forget": (1, 0), "ranked": (0, -1)}.get(schema, (0, 1))
    return (lp[:, better] - lp[:, worse]).mean()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NO_MARGIN])
def test_200_steps_widen_the_margin(name):
    _, before, after = trained(*group(name))[name]
    assert margin(name, after) > margin(name, before) + 0.5
