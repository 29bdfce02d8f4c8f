"""What is said about groups, against scikit-learn; aggregation noise against its closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from jaxrepro.config import UserError
from jaxrepro.methods.bmf import diagnostics

N, GROUPS = 12, 4
rand = jax.jit(diagnostics.adjusted_rand, static_argnums=2)
width = jax.jit(diagnostics.silhouette, static_argnums=2)
labels = st.lists(st.integers(-1, GROUPS - 1), min_size=N, max_size=N).map(np.array)


def ints(x):
    return jnp.asarray(x, jnp.int32)


@settings(max_examples=40, deadline=None)
@given(labels, labels)
def test_the_adjusted_rand_index_is_scikit_learns(a, b):
    keep = (a >= 0) & (b >= 0)
    right = metrics.adjusted_rand_score(a[keep], b[keep]) if keep.sum() > 1 else 1.0
    np.testing.assert_allclose(rand(ints(a), ints(b), GROUPS), right, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(labels, st.integers(0, 999))
def test_the_silhouette_is_scikit_learns(a, seed):
    points = np.random.default_rng(seed).normal(size=(N, 3)).astype(np.float32)
    keep = a >= 0
    kinds = len(set(a[keep]))
    found = width(jnp.asarray(points), ints(a), GROUPS)
    if 2 <= kinds < keep.sum():
        right = metrics.silhouette_score(points[keep], a[keep])
        np.testing.assert_allclose(found, right, atol=1e-4)
    else:
        assert found == 0


def test_persistence_is_the_share_of_pairs_that_stay_together():
    # pairs before: (0,1) (0,2) (1,2) and (3,4); agent 5 died; after: 0,1 stay, 2 leaves, 3,4 stay under another name
    before, after = ints([0, 0, 0, 1, 1, 1]), ints([2, 2, 3, 0, 0, -1])
    assert tuple(map(int, diagnostics.pairs_kept(before, after))) == (2, 4)
    assert tuple(map(int, diagnostics.pairs_kept(ints([-1] * 6), after))) == (0, 0)


def test_sizes_count_the_living():
    found = diagnostics.group_sizes(ints([0, 0, 2, -1, 2, 2]), GROUPS)
    np.testing.assert_array_equal(found["sizes"], [2, 0, 3, 0])
    assert found["empty"] == 2
    np.testing.assert_allclose(found["largest"], 3 / 5)
    assert diagnostics.group_sizes(ints([-1] * 3), GROUPS)["largest"] == 0


def test_groups_that_are_places_or_health_are_recognised():
    rng = np.random.default_rng(0)
    kind = rng.permutation(np.arange(32) % 4)
    corners = 20.0 * np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    place = jnp.asarray(corners[kind] + rng.normal(size=(32, 2)), jnp.float32)
    health = jnp.asarray(10.0 * (rng.permutation(kind)), jnp.float32)
    z = jnp.asarray(rng.normal(size=(32, 3)), jnp.float32)
    report = jax.jit(functools.partial(diagnostics.group_report, groups=4))
    found = report(ints(kind), z, place, health, key=jax.random.key(0))
    assert found["ari_position"] == 1 and found["empty"] == 0
    assert abs(found["ari_health"]) < 0.3 and abs(found["silhouette"]) < 0.3
    assert all(x.shape == () for x in found.values())


@pytest.mark.slow
def test_aggregation_noise_is_what_the_mean_field_hides():
    """Four types with m_k ~ N(0, 1), a reward of m_k + N(0, 0.3^2): nothing known leaves 1.09 (the observation says the
    type, whose m_k has mean 0), the mean of all 1 - 1/4 + 0.09 = 0.84, the group's own mean 0.09."""
    rng = np.random.default_rng(0)
    n, k = 6_000, 4
    m = rng.normal(size=(n, k))
    kind = rng.integers(0, k, n)
    own = m[np.arange(n), kind]
    f = lambda x: jnp.asarray(x, jnp.float32)
    fields = {"mf": f(m.mean(1)[:, None]), "true_groups": f(np.stack([own, m.mean(1)], 1))}
    found = diagnostics.aggregation_noise(
        jax.random.key(0), f(np.eye(k)[kind]), fields, f(own + 0.3 * rng.normal(size=n)),
        held_out=1_500, hidden=16, steps=600, lr=3e-3,
    )  # fmt: skip
    assert list(found) == ["none", "mf", "true_groups", "constant"]
    # 1,500 held-out rows: a mean square has a relative standard error of sqrt(2 / 1500) = 0.037
    np.testing.assert_allclose(found["constant"], 1.09, rtol=0.12)
    np.testing.assert_allclose(found["none"], 1.09, rtol=0.12)
    np.testing.assert_allclose(found["mf"], 0.84, rtol=0.12)
    np.testing.assert_allclose(found["true_groups"], 0.09, rtol=0.2)


@pytest.mark.slow
def test_a_critic_that_can_learn_nothing_stops_where_it_is_no_worse_than_a_constant():
    """200 inputs of pure noise and 300 rows: who learns to the end of its steps does far worse."""
    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((400, 200), 400))
    found = diagnostics.aggregation_noise(jax.random.key(0), x, {}, y, held_out=100, lr=1e-2)
    assert found["none"] < 1.15 * found["constant"]


def test_data_that_cannot_be_split_or_named_is_refused():
    x, y = jnp.zeros((4, 2)), jnp.zeros(4)
    noise = functools.partial(diagnostics.aggregation_noise, jax.random.key(0), x)
    for held in (0, 3):
        with pytest.raises(
            UserError, match=f"held_out={held} of 4 rows leaves {4 - held} to learn"
        ):
            noise({}, y, held_out=held)
    with pytest.raises(UserError, match="mean_fields has 'none', which is added here"):
        noise({"none": x}, y, held_out=1)
    with pytest.raises(UserError, match="mf has 3 rows and target 4; give the same rows"):
        noise({"mf": x[:3]}, y, held_out=1)
