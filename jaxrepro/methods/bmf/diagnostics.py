"""What the groups of BMF, arXiv:2505.06706, are, and what a mean field is worth to a critic.

Groups that a collapsed autoencoder makes are random: `adjusted_rand` against places and health, `silhouette` and
`persistence` tell. `aggregation_noise` measures what the paper calls by that name: the error that is left when a critic
sees an average over agents instead of the ones that matter. Masked, of fixed shape, pure.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxrepro.config import UserError
from jaxrepro.methods.bmf.kmeans import kmeans
from jaxrepro.methods.bmf.layers import Dense

NOTHING = "none"  # the input of a critic that sees its own observation alone
CONSTANT = "constant"  # the error of the best that sees nothing at all
VALIDATION = 0.2  # of the rows that are not held out: they choose how long a critic learns
BETWEEN = 50  # steps between two looks at them


def group_sizes(labels: Int[Array, "a"], groups: int) -> dict[str, Array]:
    """Members of each group ("sizes"), groups without any ("empty"), share of the largest group ("largest").

    Label -1 is in none; without any member the share is 0.
    """
    sizes = jax.nn.one_hot(labels, groups).sum(0)
    largest = sizes.max() / jnp.maximum(sizes.sum(), 1)
    return {"sizes": sizes, "empty": (sizes == 0).sum(), "largest": largest}


def adjusted_rand(first: Int[Array, "a"], second: Int[Array, "a"], groups: int) -> Float[Array, ""]:
    """Adjusted Rand index of two partitions with labels 0 .. groups - 1: 1 the same, about 0 by chance.

    Agents with label -1 in either are left out. 1 where both are trivial in the same way, as scikit-learn has it.
    """
    keep = (first >= 0) & (second >= 0)
    rows = jax.nn.one_hot(jnp.where(keep, first, -1), groups)
    columns = jax.nn.one_hot(jnp.where(keep, second, -1), groups)
    table = jnp.matmul(rows.T, columns, precision="highest")
    pairs = lambda n: (n * (n - 1) / 2).sum()
    together, of_first, of_second = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    n = keep.sum().astype(jnp.float32)
    chance = of_first * of_second / jnp.maximum(n * (n - 1) / 2, 1)
    span = (of_first + of_second) / 2 - chance
    return jnp.where(span == 0, 1.0, (together - chance) / jnp.where(span == 0, 1, span))


def pairs_kept(
    before: Int[Array, "a"], after: Int[Array, "a"]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """(kept, pairs): how many pairs of survivors share a group before and after, and how many do before.

    Names of groups do not matter. -1: dead, or not yet grouped.
    """
    keep = (before >= 0) & (after >= 0)
    pair = keep[:, None] & keep & ~jnp.eye(len(keep), dtype=bool)
    was = pair & (before[:, None] == before)
    still = was & (after[:, None] == after)
    return still.sum() // 2, was.sum() // 2


def silhouette(
    points: Float[Array, "a d"], labels: Int[Array, "a"], groups: int
) -> Float[Array, ""]:
    """Mean silhouette of the labelled points, -1 to 1, Euclidean; 0 where fewer than two groups have members.

    Points with label -1 are left out; one that is alone in its group counts 0, as scikit-learn has it.
    """
    keep = labels >= 0
    points = jnp.where(keep[:, None], points, 0)
    gap = jnp.sqrt(((points[:, None] - points) ** 2).sum(-1))
    member = jax.nn.one_hot(labels, groups)
    size = member.sum(0)
    total = jnp.matmul(gap, member, precision="highest")  # (a, g)
    own = member.astype(bool)
    others = jnp.maximum((size * member).sum(1) - 1, 0)
    inside = (total * member).sum(1) / jnp.maximum(others, 1)
    foreign = ~own & (size > 0)
    outside = jnp.where(foreign, total / jnp.maximum(size, 1), jnp.inf).min(1)
    width = jnp.maximum(inside, outside)
    real = keep & (others > 0) & jnp.isfinite(outside) & (width > 0)
    each = jnp.where(real, (outside - inside) / jnp.where(real, width, 1), 0)
    return each.sum() / jnp.maximum(keep.sum(), 1)


def group_report(
    labels: Int[Array, "a"],
    z: Float[Array, "a d"],
    position: Float[Array, "a 2"],
    health: Float[Array, "a"],
    groups: int,
    key: PRNGKeyArray,
) -> dict[str, Array]:
    """Scalars about the groups of one step: empty, largest, silhouette (of z), and the adjusted Rand index against K-means of places (ari_position) and of health (ari_health)."""
    alive = labels >= 0
    by_place, by_health = jax.random.split(key)
    place = kmeans(position, alive, groups, by_place).labels
    state = kmeans(health[:, None], alive, groups, by_health).labels
    sizes = group_sizes(labels, groups)
    return {
        "empty": sizes["empty"].astype(jnp.float32),
        "largest": sizes["largest"],
        "silhouette": silhouette(z, labels, groups),
        "ari_position": adjusted_rand(labels, place, groups),
        "ari_health": adjusted_rand(labels, state, groups),
    }


class _Critic(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        h = nn.relu(Dense(self.hidden, name="first")(x))
        h = nn.relu(Dense(self.hidden, name="second")(h))
        return Dense(1, name="value")(h)[..., 0]


def aggregation_noise(
    key: PRNGKeyArray,
    observation: Float[Array, "n d"],
    mean_fields: Mapping[str, Array],
    target: Float[Array, "n"],
    *,
    held_out: int,
    hidden: int = 64,
    steps: int = 2000,
    batch: int = 256,
    lr: float = 1e-3,
) -> dict[str, Array]:
    """Held-out mean squared error of critics that see the same observations and different mean fields.

    mean_fields: by name, such as "mf", "bmf", "true_groups"; "none" (zeros) is added, and "constant", the error of the
    mean of the rows that are learnt from: a critic that does no better has learnt nothing. All critics have the same
    initial trunk, rows and order of rows; where widths differ the narrower input is padded with zeros. The last `held_out`
    rows are for the test, and those before them choose when to stop (`VALIDATION` of the rest), so rows of one episode should lie together.
    Errors: UserError where a part of the rows would be empty, a name is taken, or lengths differ.
    """
    n = len(target)
    if not 0 < held_out < n - 1:
        raise UserError(
            f"held_out={held_out} of {n} rows leaves {n - held_out} to learn from; use 1 to {max(n - 2, 1)}"
        )
    if taken := sorted({NOTHING, CONSTANT} & {*mean_fields}):
        raise UserError(f"mean_fields has {taken[0]!r}, which is added here; use another name")
    for name, x in {"observation": observation, **mean_fields}.items():
        if len(x) != n:
            raise UserError(f"{name} has {len(x)} rows and target {n}; give the same rows")
    flat = {name: x.reshape(n, -1) for name, x in mean_fields.items()}
    width = max((x.shape[1] for x in flat.values()), default=0)
    wide = [jnp.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in flat.values()]
    stacked = jnp.stack([jnp.zeros((n, width)), *wide])
    errors = _fit(
        key,
        observation,
        stacked,
        target,
        held=held_out,
        hidden=hidden,
        steps=steps,
        batch=min(batch, n - held_out),
        lr=lr,
    )
    constant = ((target[n - held_out :] - target[: n - held_out].mean()) ** 2).mean()
    return dict(zip([NOTHING, *flat], errors)) | {CONSTANT: constant}


@partial(jax.jit, static_argnames=("held", "hidden", "steps", "batch", "lr"))
def _fit(
    key: PRNGKeyArray,
    observation: Any,
    stacked: Any,
    target: Any,
    *,
    held,
    hidden,
    steps,
    batch,
    lr,
) -> Float[Array, "m"]:
    n, critic = len(target) - held, _Critic(hidden)
    learnt = n - max(int(n * VALIDATION), 1)
    draw, order = jax.random.split(key)
    rule = optax.adam(lr)

    def one(field):
        x = jnp.concatenate([observation, field], 1)
        params = critic.init(draw, x[0])
        error = lambda p, a, b: ((critic.apply(p, x[a:b]) - target[a:b]) ** 2).mean()

        def step(carry, i):
            params, opt = carry
            rows = jax.random.randint(jax.random.fold_in(order, i), (batch,), 0, learnt)
            wrong = lambda p: ((critic.apply(p, x[rows]) - target[rows]) ** 2).mean()
            change, opt = rule.update(jax.grad(wrong)(params), opt)
            return (optax.apply_updates(params, change), opt), None

        def stretch(carry, i):
            (params, opt), least, chosen = carry
            now, _ = jax.lax.scan(step, (params, opt), i * BETWEEN + jnp.arange(BETWEEN))
            found = error(now[0], learnt, n)
            chosen = jax.tree.map(lambda a, b: jnp.where(found < least, a, b), now[0], chosen)
            return (now, jnp.minimum(found, least), chosen), None

        begin = (params, rule.init(params)), error(params, learnt, n), params
        chosen = jax.lax.scan(stretch, begin, jnp.arange(-(-steps // BETWEEN)))[0][2]
        return error(chosen, n, None)

    return jax.vmap(one)(stacked)
