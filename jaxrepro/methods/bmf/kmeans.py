"""K-means of fixed shape: masked points, k-means++ starts, restarts, repair of empty clusters.

    c_1 ~ uniform over points,  c_k ~ P(i) prop. to min_l |z_i - c_l|^2                    k-means++
    label_i = argmin_k |z_i - c_k|^2,  c_k = mean of the points with label k               Lloyd

until sum_k |c'_k - c_k|^2 <= tolerance * (mean variance of a feature), or `iterations`. The start with the lowest
inertia wins. The rules are those of scikit-learn's `KMeans`, except that it draws several candidates for each start
("greedy" k-means++).

Under `vmap` all problems iterate until the slowest has converged; a finished one no longer changes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrepro.config import UserError


class Clusters(NamedTuple):
    """labels: -1 where masked; inertia: sum of squared distances to the own centroid."""

    labels: Int[Array, "a"]
    centroids: Float[Array, "g d"]
    inertia: Float[Array, ""]


def kmeans(
    points: Float[Array, "a d"],
    mask: Bool[Array, "a"],
    groups: int,
    key: PRNGKeyArray,
    *,
    restarts: int = 10,
    iterations: int = 100,
    tolerance: float = 1e-4,
) -> Clusters:
    """Clusters of the points under the mask; what the others hold has no influence.

    With fewer distinct points than groups some clusters stay empty. Errors: UserError where groups, restarts or
    iterations are below 1.
    """
    for name, n in (("groups", groups), ("restarts", restarts), ("iterations", iterations)):
        if n < 1:
            raise UserError(f"{name}={n}; use 1 or more")
    n = jnp.maximum(mask.sum(), 1)
    points = jnp.where(mask[:, None], points, 0)
    centre = points.sum(0) / n
    # products of centred points lose less than those of points that lie far from 0
    centred = jnp.where(mask[:, None], points - centre, 0)
    limit = tolerance * (centred**2).sum() / (n * points.shape[1])

    def start(noise):
        centroids = _lloyd(centred, mask, _seeds(centred, mask, noise), iterations, limit)
        gap = _distances(centred, centroids)
        labels = gap.argmin(1)
        apart = ((centred - centroids[labels]) ** 2).sum(1)
        return labels, centroids, jnp.where(mask, apart, 0).sum()

    noise = jax.random.gumbel(key, (restarts, groups, len(points)))
    labels, centroids, inertia = jax.vmap(start)(noise)
    best = inertia.argmin()
    labels = jnp.where(mask, labels[best], -1).astype(jnp.int32)
    return Clusters(labels, centroids[best] + centre, inertia[best])


def _distances(points, centroids):
    """Squared distances (a, g)."""
    cross = jnp.matmul(points, centroids.T, precision="highest")
    squares = (points**2).sum(1)[:, None] + (centroids**2).sum(1)
    return jnp.maximum(squares - 2 * cross, 0)


def _seeds(points, mask, noise):
    """k-means++ by Gumbel noise (g, a); where all points are taken already, uniform over them."""
    uniform = mask.astype(points.dtype)

    def next_one(k, carry):
        centroids, nearest = carry
        weight = jnp.where(mask, nearest, 0)
        weight = jnp.where((k > 0) & (weight.sum() > 0), weight, uniform)
        new = points[jnp.argmax(jnp.log(weight) + noise[k])]
        gap = ((points - new) ** 2).sum(1)
        return centroids.at[k].set(new), jnp.minimum(nearest, gap)

    groups = noise.shape[0]
    start = jnp.zeros((groups, points.shape[1]), points.dtype), jnp.full(len(points), jnp.inf)
    return jax.lax.fori_loop(0, groups, next_one, start)[0]


def _lloyd(points, mask, centroids, iterations, limit):
    groups = len(centroids)

    def step(carry):
        old, _, i = carry
        gap = _distances(points, old)
        member = jax.nn.one_hot(gap.argmin(1), groups, dtype=points.dtype) * mask[:, None]
        size = member.sum(0)
        total = jnp.matmul(member.T, points, precision="highest")
        mean = total / jnp.maximum(size, 1)[:, None]
        # the j-th empty cluster moves to the j-th farthest point, so that two never take the same
        empty = size == 0
        farthest = jnp.argsort(jnp.where(mask, -gap.min(1), jnp.inf))
        place = jnp.clip(jnp.cumsum(empty) - 1, 0, len(points) - 1)
        spare = farthest[place]
        repaired = jnp.where(mask[spare][:, None], points[spare], old)
        new = jnp.where(empty[:, None], repaired, mean)
        return new, ((new - old) ** 2).sum(), i + 1

    going = lambda carry: (carry[1] > limit) & (carry[2] < iterations)
    return jax.lax.while_loop(going, step, (centroids, jnp.float32(jnp.inf), 0))[0]
