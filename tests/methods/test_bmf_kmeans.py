"""K-means against scikit-learn, and where masks, empty clusters and equal points would break it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from jaxrepro.config import UserError
from jaxrepro.methods.bmf import kmeans as module
from jaxrepro.methods.bmf.kmeans import kmeans

POINTS, GROUPS = 24, 4
four = jax.jit(functools.partial(kmeans, groups=GROUPS))
KEY = jax.random.key(0)


def blobs(seed, spread=0.3):
    rng = np.random.default_rng(seed)
    centre = 10 * np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0], [-1, -1, 0]])
    kind = rng.permutation(np.arange(POINTS) % 4)
    return (centre[kind] + spread * rng.normal(size=(POINTS, 3))).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_separated_blobs_are_the_partition_and_inertia_of_scikit_learn(seed):
    points = blobs(seed)
    mask = np.random.default_rng(seed).random(POINTS) < 0.8
    right = KMeans(GROUPS, n_init=10, random_state=0).fit(points[mask])
    found = four(jnp.asarray(points), jnp.asarray(mask), key=jax.random.key(seed))
    labels = np.asarray(found.labels)
    assert (labels[~mask] == -1).all()
    assert adjusted_rand_score(right.labels_, labels[mask]) == 1.0
    np.testing.assert_allclose(found.inertia, right.inertia_, rtol=1e-4)
    for k, centroid in enumerate(np.asarray(found.centroids)):
        np.testing.assert_allclose(centroid, points[labels == k].mean(0), atol=1e-5)


def test_restarts_find_an_inertia_near_scikit_learns_where_nothing_is_separated():
    points = np.random.default_rng(3).normal(size=(POINTS, 3)).astype(np.float32)
    right = KMeans(GROUPS, n_init=50, random_state=0).fit(points).inertia_
    many = functools.partial(kmeans, groups=GROUPS, restarts=50)
    found = jax.jit(many)(jnp.asarray(points), jnp.ones(POINTS, bool), key=KEY).inertia
    np.testing.assert_allclose(found, right, rtol=0.02)


def test_what_masked_points_hold_changes_nothing():
    mask = jnp.arange(POINTS) % 3 > 0
    points = blobs(1)
    plain = four(jnp.asarray(points), mask, key=KEY)
    for junk in (1e6, np.nan, np.inf):
        other = np.where(np.asarray(mask)[:, None], points, junk).astype(np.float32)
        found = four(jnp.asarray(other), mask, key=KEY)
        for a, b in zip(plain, found):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", [0.0, 1 / 3, 1e4])
def test_equal_points_terminate_with_valid_labels(value):
    found = four(jnp.full((POINTS, 3), value), jnp.ones(POINTS, bool), key=KEY)
    assert ((found.labels >= 0) & (found.labels < GROUPS)).all()
    assert np.isfinite(found.centroids).all() and found.inertia <= 1e-6 * max(value, 1) ** 2


@pytest.mark.parametrize("n", [0, 1, 3])
def test_fewer_points_than_groups_are_clusters_of_one(n):
    mask = jnp.arange(POINTS) < n
    found = four(jnp.asarray(np.random.default_rng(0).normal(size=(POINTS, 3)), jnp.float32), mask, key=KEY)  # fmt: skip
    assert len(set(np.asarray(found.labels[:n]).tolist())) == n
    assert (found.labels[n:] == -1).all()
    assert np.isfinite(found.centroids).all()
    np.testing.assert_allclose(found.inertia, 0, atol=1e-10)


def test_empty_clusters_move_to_distinct_farthest_points():
    points = jnp.asarray([[0.0], [0.1], [5.0], [9.0], [100.0]])
    mask = jnp.array([True, True, True, True, False])
    # three centroids at the same place: two are empty, and take 9 and 5, never the masked 100
    start = jnp.zeros((3, 1))
    found = module._lloyd(points, mask, start, 1, 0.0)
    np.testing.assert_allclose(found[:, 0], [(0 + 0.1 + 5 + 9) / 4, 9, 5], rtol=1e-6)
    found = module._lloyd(points, mask, start, 20, 0.0)
    np.testing.assert_allclose(np.sort(found[:, 0]), [0.05, 5, 9], rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0.1, 1.0))
def test_each_point_is_with_its_nearest_centroid_and_inertia_adds_up(seed, share):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(POINTS, 3)).astype(np.float32) * rng.choice([1e-2, 1, 1e2])
    mask = rng.random(POINTS) < share
    found = four(jnp.asarray(points), jnp.asarray(mask), key=jax.random.key(seed))
    gap = ((points[:, None] - np.asarray(found.centroids)) ** 2).sum(-1)
    labels = np.asarray(found.labels)
    np.testing.assert_array_equal(labels == -1, ~mask)
    own = gap[np.arange(POINTS), labels][mask]
    np.testing.assert_allclose(own, gap.min(1)[mask], rtol=1e-3, atol=1e-6 * (points**2).max())
    np.testing.assert_allclose(found.inertia, own.sum(), rtol=1e-4, atol=1e-6)


def test_mapped_problems_equal_single_ones():
    points = jnp.stack([jnp.asarray(blobs(s, spread)) for s, spread in ((0, 0.1), (1, 5.0))])
    mask = jnp.stack([jnp.ones(POINTS, bool), jnp.arange(POINTS) < 20])
    keys = jax.random.split(KEY, 2)
    both = jax.jit(jax.vmap(lambda p, m, k: kmeans(p, m, GROUPS, k)))(points, mask, keys)
    for i in range(2):
        one = four(points[i], mask[i], key=keys[i])
        np.testing.assert_array_equal(both.labels[i], one.labels)
        np.testing.assert_allclose(both.inertia[i], one.inertia, rtol=1e-5)


@pytest.mark.parametrize("name", ["groups", "restarts", "iterations"])
def test_a_count_below_one_is_refused(name):
    options = {"groups": 2, name: 0}
    with pytest.raises(UserError, match=f"{name}=0; use 1 or more"):
        kmeans(jnp.zeros((4, 2)), jnp.ones(4, bool), key=KEY, **options)
