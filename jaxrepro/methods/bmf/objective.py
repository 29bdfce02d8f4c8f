"""Bi-level Mean Field: Dynamic Grouping for Large-Scale MARL, arXiv:2505.06706: returns and actor-critic loss.

    R_t = r_t + gamma R_{t+1},   at an agent's last step  R = r + gamma b                       `returns`
    A = sg(R - V)
    L = -mean A log(pi(a) + 1e-6) + c_v mean (R - V)^2 + c_e mean sum_a pi log(pi + 1e-6)       `loss`

means over the (agent, step) pairs in which the agent was alive at the start of the step, of whole episodes: no
minibatches, no normalised advantages, one optimiser step (training.py). pi and V read the mean field of the step
before (groups.py), which is computed again here, so that attention between groups learns.

An agent's steps end when it dies, when its episode ends, or at the horizon. "official": b = V of the last observation
that it acted on, also for the dead. "fixed": b = 0 for the dead, V of the observation after the last step for
survivors, whatever ended the episode.

The equations are those of the official code; the paper's own were not available.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrepro.config import UserError
from jaxrepro.methods.bmf import groups, networks
from jaxrepro.methods.bmf.groups import GroupState
from jaxrepro.methods.bmf.setting import Setting

INSIDE_LOG = 1e-6

Params = Mapping[str, Any]


class Trajectories(NamedTuple):
    """Episodes of one team: t steps of e environments with a agents.

    Rows after the end of an episode are masked, except that the first of them holds what followed its last step:
    observation and groups there are read for the bootstrap. The `final_` leaves hold what followed step t - 1.
    """

    view: Any  # (t, e, a, y, x, c)
    features: Any  # (t, e, a, f)
    action: Any  # (t, e, a) int32
    reward: Any  # (t, e, a)
    mask: Any  # (t, e, a) alive at the start of the step, in an episode that goes on
    alive_after: Any  # (t, e, a) alive at its end
    groups: GroupState  # leaves (t, e, ...): the state whose mean field the step saw
    final_view: Any  # (e, a, y, x, c)
    final_features: Any  # (e, a, f)
    final_groups: GroupState  # leaves (e, ...)


def returns(
    reward: Float[Array, "t *b"],
    value: Float[Array, "t *b"],
    final_value: Float[Array, "*b"],
    mask: Bool[Array, "t *b"],
    alive_after: Bool[Array, "t *b"],
    *,
    gamma: float | int,
    bootstrap: str,
) -> Float[Array, "t *b"]:
    """Discounted returns of each agent; 0 outside the mask.

    value: V(s_t). final_value: V of the observation after step t - 1. bootstrap: "official" or "fixed".
    """
    after = jnp.concatenate([mask[1:], jnp.zeros_like(mask[:1])])
    last = mask & ~(alive_after & after)
    if bootstrap == "official":
        beyond = value
    elif bootstrap == "fixed":
        beyond = jnp.where(alive_after, _next(value, final_value), 0)
    else:
        raise UserError(f"bootstrap={bootstrap!r} is not one of official, fixed")

    def back(following, row):
        r, end, b, keep = row
        here = jnp.where(keep, r + gamma * jnp.where(end, b, following), 0)
        return here, here

    rows = reward, last, beyond, mask
    return jax.lax.scan(back, jnp.zeros_like(final_value), rows, reverse=True)[1]


def _next(value, final_value):
    return jnp.concatenate([value[1:], final_value[None]])


def _final_value(params, setting, batch):
    vectors = groups.mean_field_input(params, setting, batch.final_groups)
    return networks.value(params, setting, batch.final_view, batch.final_features, vectors)


def next_values(params: Params, setting: Setting, batch: Trajectories) -> Float[Array, "t e a"]:
    """V(s_{t+1}) without gradient, 0 where the agent died: the target of the VAE's value term."""
    vectors = groups.mean_field_input(params, setting, batch.groups)
    value = networks.value(params, setting, batch.view, batch.features, vectors)
    after = _next(value, _final_value(params, setting, batch))
    return jax.lax.stop_gradient(jnp.where(batch.mask & batch.alive_after, after, 0))


def loss(
    params: Params, setting: Setting, batch: Trajectories
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Array]]:
    """L summed over the masked (agent, step) pairs, their number, and curves as sums. Pure: jit, grad, vmap it at will.

    aux: policy_loss, value_loss (before its coefficient), entropy (of pi, in nats), value, return, advantage_square.
    """
    vectors = groups.mean_field_input(params, setting, batch.groups)
    logits, value = networks.policy_and_value(params, setting, batch.view, batch.features, vectors)
    target = returns(
        batch.reward.astype(jnp.float32),
        value,
        _final_value(params, setting, batch),
        batch.mask,
        batch.alive_after,
        gamma=setting.gamma,
        bootstrap=setting.bootstrap,
    )
    target = jax.lax.stop_gradient(target)
    advantage = jax.lax.stop_gradient(target - value)
    pi = networks.probabilities(setting, logits)
    lp = jnp.log(pi + INSIDE_LOG)
    taken = jnp.take_along_axis(lp, batch.action[..., None], -1)[..., 0]
    terms = {
        "policy_loss": -advantage * taken,
        "value_loss": (target - value) ** 2,
        "entropy": -(pi * lp).sum(-1),
        "value": value,
        "return": target,
        "advantage_square": advantage**2,
    }
    # a masked row may hold anything: `where`, because 0 times infinity is no 0
    aux = {k: jnp.where(batch.mask, v, 0).sum() for k, v in terms.items()}
    total = (
        aux["policy_loss"]
        + setting.value_coef * aux["value_loss"]
        - setting.entropy_coef * aux["entropy"]
    )
    return total, batch.mask.sum().astype(jnp.float32), aux


def self_play(
    learner: Params,
    opponent: Params,
    learner_reward: Float[Array, ""],
    opponent_reward: Float[Array, ""],
    *,
    tau: float | int,
) -> Params:
    """The next opponent: (1 - tau) learner + tau opponent where the learner's total reward is the larger one.

    Otherwise the opponent as it was, bit for bit.
    """
    better = learner_reward > opponent_reward
    mix = lambda new, old: jnp.where(better, (1 - tau) * new + tau * old, old)
    return jax.tree.map(mix, learner, opponent)
