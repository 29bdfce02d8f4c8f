"""Groups and mean fields of a team during an episode of BMF, arXiv:2505.06706.

    abar_k = mean of e_a over group k,   zbar_k = mean of z over group k           (0 where the group is empty)
    intra_i = abar_{g_i},   inter_i = sum_l w_{g_i l} abar_l                        bilevel: both;  mixed: inter alone
    w_kl = cos(zbar_k, zbar_l) / sum_l cos(zbar_k, zbar_l)                          "cosine", the official code
    w_kl = (1 + cos(zbar_k, zbar_l)) / sum over groups with members                 "cosine_positive"
    w_kl = softmax_l over groups with members (`networks.attention_weights`)        "attention"

What agents do at step t is what they see at t + 1; at t = 0 the mean field is all zeros. Groups are made by K-means
every `group_interval` steps, survivors keep their label in between. Where no more agents live than there are groups,
each is a group of its own. "mf_ac" and "mf_ac_plus" have one group, the team, "bmf_random" random labels.

A `GroupState` is all that a step needs of the one before: store it with the step, and `mean_field_input` gives
the same vectors while playing and inside the loss, where attention learns through them.

Differs from the official code: weights with nothing to divide by are 0 (there NaN, in rows that nobody reads); what
"cosine_positive", `exclude_self` and the single `levels` mean is ours.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrepro.config import UserError
from jaxrepro.methods.bmf import networks, vae
from jaxrepro.methods.bmf.kmeans import kmeans
from jaxrepro.methods.bmf.setting import Setting

Params = Mapping[str, Any]


class GroupState(NamedTuple):
    """The groups of a team's last step, and what they did there; float32."""

    labels: Any  # (a,) int32; -1: dead, or before the first step
    actions: Any  # (g, n) mean action of each group
    keys: Any  # (g, k) mean latent, or mean observation, of each group
    count: Any  # (g,) members
    own: Any  # (a, n) the agents' actions; None unless the mean leaves out the agent itself


def init_groups(
    setting: Setting, agents: int, num_actions: int, observation_size: int = 0
) -> GroupState:
    """The state before the first step: no groups, mean fields of zeros.

    observation_size: entries of x, where attention compares observations. Errors: UserError where there are more groups
    than agents.
    """
    g = setting.group_count
    if g > agents:
        raise UserError(f"groups={g} of a team of {agents} agents; use 1 to {agents}")
    if setting.compares_observations and observation_size < 1:
        raise UserError(
            f"observation_size={observation_size} with attention_key='state'; give the entries of x"
        )
    width = observation_size if setting.compares_observations else setting.latent
    return GroupState(
        labels=jnp.full(agents, -1, jnp.int32),
        actions=jnp.zeros((g, num_actions)),
        keys=jnp.zeros((g, width if setting.grouped else 0)),
        count=jnp.zeros(g),
        own=jnp.zeros((agents, num_actions)) if setting.exclude_self else None,
    )


def update_groups(
    vae_params: Params | None,
    setting: Setting,
    state: GroupState,
    t: Int[Array, ""] | int,
    x: Float[Array, "a d"],
    actions: Int[Array, "a"] | Float[Array, "a n"],
    alive: Bool[Array, "a"],
    key: PRNGKeyArray,
) -> GroupState:
    """The state after step t, for the mean fields of step t + 1.

    x: `networks.observation` at t. actions: taken at t. alive: at the start of t, also those killed during t. vae_params
    may be None without groups. A caller that maps over environments gives all the same t: K-means then runs in the
    steps that regroup, and not in every one.
    """
    if setting.algorithm == "ac":
        return state
    done = vae.action_vectors(actions, state.actions.shape[-1])
    done = jnp.where(alive[:, None], done, 0)
    if setting.grouped:
        z_key, group_key = jax.random.split(key)
        z = latents(vae_params, setting, x, actions, z_key)
        labels = _labels(setting, state.labels, t, x, z, alive, group_key)
        compared = x if setting.compares_observations else z
        keys = group_means(compared, labels, setting.groups)[0]
    else:
        labels = jnp.where(alive, 0, -1).astype(jnp.int32)
        keys = state.keys
    means, count = group_means(done, labels, setting.group_count)
    return GroupState(labels, means, keys, count, done if setting.exclude_self else None)


def latents(
    vae_params: Params | None,
    setting: Setting,
    x: Float[Array, "a d"],
    actions: Int[Array, "a"] | Float[Array, "a n"],
    key: PRNGKeyArray,
) -> Float[Array, "a z"]:
    """z of each agent, without gradient: samples where they are clustered, else posterior means."""
    if vae_params is None:
        raise UserError(f"algorithm={setting.algorithm!r} groups by latents; give it a VAE")
    mean, log_variance = vae.encode(jax.lax.stop_gradient(vae_params), setting, x, actions)
    if setting.cluster_on == "sample":
        return vae.sample(mean, log_variance, jax.random.normal(key, mean.shape))
    return mean


def _labels(setting, before, t, x, z, alive, key):
    g = setting.groups

    def regroup():
        if setting.algorithm == "bmf_random":
            return jax.random.randint(key, before.shape, 0, g, jnp.int32)
        return kmeans(x if setting.cluster_on == "observation" else z, alive, g, key).labels

    # The condition depends on t alone: on the agents it would differ between environments, and under `vmap`
    # every step would pay for K-means.
    due = jnp.equal(t % setting.group_interval, 0)
    labels = jax.lax.cond(due, regroup, lambda: before)
    alone = jnp.cumsum(alive.astype(jnp.int32)) - 1
    labels = jnp.where(alive.sum() > g, labels, alone)
    return jnp.where(alive, labels, -1).astype(jnp.int32)


def group_means(
    values: Float[Array, "a n"], labels: Int[Array, "a"], groups: int
) -> tuple[Float[Array, "g n"], Float[Array, "g"]]:
    """Mean of each group's values and its size; label -1 is in none, an empty group has mean 0."""
    member = jax.nn.one_hot(labels, groups)  # -1: a row of zeros
    count = member.sum(0)
    values = jnp.where(labels[:, None] >= 0, values, 0)  # 0 times NaN would be NaN
    total = jnp.matmul(member.T, values, precision="highest")
    return total / jnp.maximum(count, 1)[:, None], count


def cosine(keys: Float[Array, "*b g k"]) -> Float[Array, "*b g g"]:
    """cos of each pair of rows; 0 with a row of zeros, whose gradient is 0 too."""
    squared = (keys**2).sum(-1)
    norm = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 1)
    unit = keys / norm[..., None]
    return jnp.einsum("...gk,...lk->...gl", unit, unit, precision="highest")


def group_weights(params: Params, setting: Setting, state: GroupState) -> Float[Array, "*b g g"]:
    """w: rows that add up to 1, or are 0 where a row of cosines adds up to 0; nothing for empty groups."""
    occupied = state.count > 0
    if setting.inter == "attention":
        return networks.attention_weights(params, setting, state.keys, occupied)
    w = cosine(state.keys)
    if setting.inter == "cosine_positive":
        w = (1 + w) / 2
    w = jnp.where(occupied[..., None, :] & occupied[..., :, None], w, 0)
    total = w.sum(-1, keepdims=True)
    return jnp.where(total == 0, 0, w / jnp.where(total == 0, 1, total))


def mean_field_input(
    params: Params, setting: Setting, state: GroupState
) -> tuple[Float[Array, "*b a n"], ...]:
    """The mean-field vectors of each agent, as `networks` reads them; zeros for the dead and at step 0.

    With `exclude_self` an agent that is alone in its group has nothing of that group: 0 stands in its place.
    """
    if setting.algorithm == "ac":
        return ()
    intra = _of_group(state.actions, state.labels)
    if state.own is not None:
        others = _of_group(state.count[..., None], state.labels) - 1
        rest = (intra * (others + 1) - state.own) / jnp.maximum(others, 1)
        intra = jnp.where(others > 0, rest, 0)
    zero = jnp.zeros_like(intra)
    if not setting.grouped:
        if len(setting.towers) < 2:
            return (intra,)
        return tuple(intra if setting.levels in ("both", name) else zero for name in setting.towers)
    if setting.levels == "intra":
        return intra, zero
    inter = _inter(params, setting, state, intra)
    if setting.mf_form == "mixed":
        return (inter,)
    return (zero if setting.levels == "inter" else intra), inter


def _inter(params, setting, state, intra):
    w = group_weights(params, setting, state)
    if state.own is None:
        mixed = jnp.einsum("...gl,...ln->...gn", w, state.actions, precision="highest")
        return _of_group(mixed, state.labels)
    own = jnp.diagonal(w, axis1=-2, axis2=-1)[..., None]
    away = w * (1 - jnp.eye(w.shape[-1]))
    mixed = jnp.einsum("...gl,...ln->...gn", away, state.actions, precision="highest")
    return _of_group(mixed, state.labels) + _of_group(own, state.labels) * intra


def _of_group(values, labels):
    """values[label] of each agent; 0 for label -1."""
    found = jnp.take_along_axis(values, jnp.maximum(labels, 0)[..., None], axis=-2)
    return jnp.where(labels[..., None] >= 0, found, 0)
