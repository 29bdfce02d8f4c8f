"""Hyper-parameters under tracing, and formulas at their ends."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.methods.dpo.batchwise import select
from jaxrepro.methods.dpo.registry import REGISTRY, Batch, loss, resolve, statistics

sys.path.insert(0, str(Path(__file__).parent))
from dpo_golden import GOLDEN, example, items, log_ratios, mean

# The exceptions that spec.py names: those whose 0 leaves a term out.
PLAIN = {"nll_weight", "kl_alpha", ("alphapo", "alpha")}
NUMBERS = [
    (name, key)
    for name, spec in sorted(REGISTRY.items())
    for key, value in spec.defaults.items()
    if isinstance(value, float) and not {key, (name, key)} & PLAIN
]


ALL = sorted({name for name, _ in NUMBERS})
FEW = ("sigmoid", "kto", "infonca", "tdpo2", "simpo", "beta_dpo")  # of each kind one


@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in ALL]
)
def test_numbers_may_be_traced(name):
    tokens, batch = example(REGISTRY[name])
    for key in (k for n, k in NUMBERS if n == name):

        def value(v, key=key):
            spec = resolve(name, **{key: v})
            return loss(spec, statistics(tokens, spec, key=batch.key), batch)[0]

        found = jax.eval_shape(jax.vmap(value), jnp.full(2, REGISTRY[name].defaults[key]))
        assert found.shape == (2, 4), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("dpo_rk", "nu", (2.0, 3.0)),
        ("dpo_d", "nu", (0.5, 3.0)),
        ("beta_dpo", "rho", (0.0, 0.25, 0.5)),
        ("dmpo", "gamma", (0.5, 0.7, 1.0)),
    ],
)
def test_a_sweep_is_one_after_another(name, key, values):
    tokens, batch = example(REGISTRY[name])

    def value(v):
        spec = resolve(name, **{key: v})
        return loss(spec, statistics(tokens, spec), batch)[0]

    swept = jax.vmap(value)(jnp.array(values))
    np.testing.assert_allclose(swept, [value(v) for v in values], rtol=1e-5)


@pytest.mark.parametrize(("rho", "b", "kept"), [(0.2, 10, 8), (0.3, 1000, 700), (0.2, 64, 51), (0.9, 4, 1)])  # fmt: skip
def test_as_many_pairs_are_kept_where_the_share_is_traced(rho, b, kept):
    seq = log_ratios(np.random.default_rng(0).normal(size=(b, 2)))
    run = lambda rho: loss(resolve("beta_dpo", rho=rho), seq, Batch(key=jax.random.key(0)))[0]
    assert (run(rho) != 0).sum() == (jax.jit(run)(rho) != 0).sum() == kept
    assert select(jax.random.key(0), jnp.zeros(b), kept).sum() == kept


@pytest.mark.parametrize("name", ["mallows", "rainbow"])
@pytest.mark.parametrize("entropy", [0.0, -1e-7])
def test_a_reference_that_is_certain_of_every_token_gives_numbers(name, entropy):
    spec = resolve(name)
    tokens, _ = example(spec)
    tokens = tokens._replace(ref_lp=tokens.lp, ref_entropy=jnp.full_like(tokens.lp, entropy))

    def value(lp):
        seq = statistics(tokens._replace(lp=lp), spec)
        return loss(spec, seq, Batch(vocab=jnp.asarray(16)))[0].sum()

    found, slope = jax.value_and_grad(value)(tokens.lp)
    assert np.isfinite(found) and np.isfinite(slope).all()
    if name == "mallows":
        assert found == pytest.approx(4 * np.log(2), rel=1e-5)  # D = 0


def test_official_targets_of_exo():
    # KL((q, 1 - q) || targets) with log-targets (0, -10): q log q + (1 - q) (log(1 - q) + 10)
    q = 1 / (1 + np.exp(-0.1 * np.array([2, -1.5, 1, -2.5])))
    want = q * np.log(q) + (1 - q) * (np.log(1 - q) + 10)
    np.testing.assert_allclose(items("exo_pair", targets="official"), want, rtol=1e-5)
    assert mean("exo_pair") == pytest.approx(2.808236, abs=2e-6)  # the others, eps 1e-3


def test_discopop_at_the_reference():
    start = GOLDEN._replace(q=GOLDEN.p)
    assert mean("discopop", start) == pytest.approx(0.846574, abs=1e-6)  # (ln 2) / 2 + 1 / 2
