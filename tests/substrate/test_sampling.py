"""Truncation equals its sorted definition, ties included; draws follow the distribution."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxrepro.ops.sampling import draw, greedy, largest, nucleus_floor, penalise, truncate
from jaxrepro.rollout.generate import COLDEST

V = 9


def by_sorting(z, top_k, top_p):
    """Kept set of one row: head of the sorted list, all ties of its last token kept."""
    keep = np.ones(len(z), bool)
    if top_k:
        keep = z >= np.sort(z)[::-1][min(top_k, len(z)) - 1]
    if top_p < 1:
        p = np.where(keep, np.exp(z - z.max(), dtype=np.float64), 0)
        p /= p.sum()
        order = np.argsort(-p, kind="stable")
        head = order[: np.searchsorted(np.cumsum(p[order]), top_p - 1e-6) + 1]
        keep &= p >= p[head].min() * (1 - 1e-9)
    return keep


# the masses of integer logits stay away from these bounds, where rounding would decide
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(4, 1.0), (V, 0.137), (0, 0.8731), (1, 0.5317), (4, 0.8731)]
)
def test_kept_set_equals_the_sorted_definition_with_ties(top_k, top_p):
    run = jax.jit(partial(truncate, top_k=top_k, top_p=top_p))

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.lists(st.integers(-3, 3), min_size=2 * V, max_size=2 * V))
    def check(numbers):
        z = np.asarray(numbers, np.float32).reshape(2, V)
        out = np.asarray(run(z))
        want = np.stack([by_sorting(r, top_k, top_p) for r in z])
        np.testing.assert_array_equal(out > -np.inf, want)
        np.testing.assert_array_equal(out[want], z[want])

    check()


def test_the_most_probable_token_is_always_kept():
    z = jnp.asarray([[0.0, 0.0, 5.0, -jnp.inf]])
    for top_k, top_p in ((1, 1.0), (0, 1e-6), (3, 1e-6)):
        kept = jax.jit(partial(truncate, top_k=top_k, top_p=top_p))(z)[0] > -np.inf
        assert kept.tolist() == [False, False, True, False]


def test_the_bisection_is_exact_to_the_last_bit():
    # the mass strictly above 0.25 is 0.5: below P for every P > 0.5, not for P = 0.5
    p = jnp.asarray([[0.5, 0.25, 0.25]])
    floor = jax.jit(nucleus_floor, static_argnums=1)
    assert floor(p, 0.5)[0, 0] == 0.5
    assert floor(p, float(np.nextafter(np.float32(0.5), np.float32(1))))[0, 0] == 0.25


@pytest.mark.parametrize("v", [7, 1500])  # one level, and blocks of 256
def test_draws_follow_the_distribution_and_avoid_what_is_cut(v):
    n = 20_000
    z = 1.5 * jax.random.normal(jax.random.key(v), (v,))
    z = z.at[jnp.arange(1, v, 3)].set(-jnp.inf)
    keys = jax.random.split(jax.random.key(5), n)
    few = jax.jit(lambda keys: jax.lax.map(lambda k: draw(k, jnp.broadcast_to(z, (1000, v))), keys))
    token = np.asarray(few(keys.reshape(-1, 1000))).ravel()
    p = np.asarray(jax.nn.softmax(z), np.float64)
    assert (p[token] > 0).all()
    cell = np.arange(v) * 50 // v if v > 50 else np.arange(v)
    seen = np.bincount(cell[token], minlength=cell.max() + 1)
    want = np.bincount(cell, weights=p) * n
    assert stats.chisquare(seen[want > 0], want[want > 0] / want.sum() * n).pvalue > 1e-3


def test_a_draw_depends_on_its_own_key_and_logits_only():
    z = jax.random.normal(jax.random.key(0), (6, 20))
    keys = jax.random.split(jax.random.key(1), 6)
    one = jax.jit(draw)
    np.testing.assert_array_equal(one(keys, z)[::-1], one(keys[::-1], z[::-1]))
    np.testing.assert_array_equal(one(keys, z)[:2], one(keys[:2], z[:2]))


def test_a_draw_at_the_coldest_temperature_is_greedy():
    z = 1e4 * jax.random.normal(jax.random.key(0), (6, 20))
    cold = draw(jax.random.split(jax.random.key(1), 6), z / COLDEST)
    np.testing.assert_array_equal(cold, greedy(z))


def test_min_p_keeps_what_is_near_the_most_probable():
    z = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01]]))
    keep = lambda **how: np.asarray(truncate(z, **how) > -np.inf).tolist()
    assert keep(min_p=0.25) == [[True, True, True, False], [True, False, False, False]]
    assert keep(min_p=1.0) == [[True, False, False, False]] * 2
    # of what top-p left: renormalising changes no ratio
    assert keep(top_p=0.7, min_p=0.25)[0] == [True, True, False, False]


def test_a_repetition_penalty_pulls_seen_tokens_towards_less():
    z = jnp.asarray([[2.0, -2.0, 3.0, 0.0]])
    seen = jnp.asarray([[True, True, False, True]])
    assert penalise(z, seen, 2.0).tolist() == [[1.0, -4.0, 3.0, 0.0]]


@pytest.mark.parametrize("v", [5, 1000, 1003])  # plain, and in groups of 64
def test_the_largest_entries_equal_top_k_with_ties(v):
    run = jax.jit(largest, static_argnums=1)

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(st.integers(0, 2**31 - 1), st.integers(1, 30))
    def check(seed, kinds):
        z = np.random.default_rng(seed).integers(0, kinds, (2, v)).astype(np.float32)
        for a, b in zip(run(z, 3), jax.lax.top_k(z, 3)):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(greedy(jnp.asarray(z)), z.argmax(-1))

    check()
