"""What one update of a BMF run does: play, learn from what was played, and hand the opponent what has won.

    vae      games -> VAE, policy -> self-play      `vae.steps` updates
    policy   games -> policy -> self-play           `steps` updates, the VAE frozen

All seeds of a run learn at once: every array of the state but `step` leads with the seed. Each update plays whole games
from their start, so that nothing of a world, of groups or of random numbers has to be kept between updates.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxrepro.methods.bmf import diagnostics, networks, objective, training, vae
from jaxrepro.methods.bmf.objective import Trajectories
from jaxrepro.methods.bmf.rollout import Game, Learnt, Score, episodes
from jaxrepro.methods.bmf.setting import Setting
from jaxrepro.methods.bmf.vae import VAEBatch
from jaxrepro.train.state import State
from jaxrepro.train.step import NONFINITE

VAE, POLICY = "vae", "policy"  # stages


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of an update."""

    game: Game  # both players are the same Setting
    setting: Setting
    steps: int  # of a game, at most
    envs: int  # games of an update
    updates: int  # of the VAE in an update of stage "vae"
    batch: int  # rows of such an update; 0: all that was played, and nothing is kept
    replay: int  # rows that are kept
    warmup: int = 0  # steps of stage "vae" in which beta rises to its value
    micro_batches: int = 1  # of the policy's update, a divisor of envs


class Replay(NamedTuple):
    """The last rows that were played, in a ring."""

    rows: VAEBatch  # leaves (replay, ...)
    cursor: Any  # () int32: where the next row goes


# --- states of one seed; `vmap` them over keys ----------------------------------------------------


def sizes(plan: Plan) -> tuple[tuple[int, ...], int, int]:
    """Shape of a view, number of features, number of actions."""
    obs, _ = jax.eval_shape(lambda: plan.game.env.reset(jax.random.key(0), plan.game.params))
    team = plan.game.env.teams[0]
    view, features = obs[team]
    return view.shape[1:], features.shape[-1], plan.game.env.num_actions(team)


def init_policy(plan: Plan, key: PRNGKeyArray) -> Any:
    """A policy that has learnt nothing."""
    return networks.init_policy(key, plan.setting, *sizes(plan))


def init_vae(plan: Plan, key: PRNGKeyArray) -> Any:
    """An untrained VAE."""
    view, features, actions = sizes(plan)
    return vae.init_vae(key, plan.setting, _size(view) + features, actions)


def _size(shape):
    size = 1
    for n in shape:
        size *= n
    return size


def init_replay(plan: Plan) -> Replay | None:
    """An empty buffer, or None where nothing is kept."""
    if not plan.batch:
        return None
    view, features, _ = sizes(plan)
    n = plan.replay
    row = VAEBatch(
        jnp.zeros((n, _size(view) + features)),
        jnp.zeros(n, jnp.int32),
        jnp.zeros(n),
        jnp.zeros(n),
        jnp.zeros(n, bool),
    )
    return Replay(row, jnp.int32(0))


def begin_vae(plan: Plan, key: PRNGKeyArray) -> dict[str, Any]:
    """Parameters, optimiser state and extra of stage "vae", of one seed."""
    keys = jax.random.split(key, 3)
    params = init_vae(plan, keys[0])
    policy = init_policy(plan, keys[1])
    extra = {
        "policy": policy,
        "policy_opt": training.make_optimizer(plan.setting).init(policy),
        "opponent": policy,
        "replay": init_replay(plan),
        "opponent_vae": None if plan.setting.shared_vae else init_vae(plan, keys[2]),
    }
    opt = training.make_vae_optimizer(plan.setting).init(params)
    return {"params": params, "opt": opt, "extra": extra}


def begin_policy(
    plan: Plan,
    key: PRNGKeyArray,
    vae_params: Any = None,
    learnt: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The same of stage "policy", from a VAE and, after stage "vae", from that stage's `extra`."""
    keys = jax.random.split(key, 2)
    if learnt is None:
        policy = init_policy(plan, keys[0])
        separate = plan.setting.grouped and not plan.setting.shared_vae
        learnt = {
            "policy": policy,
            "policy_opt": training.make_optimizer(plan.setting).init(policy),
            "opponent": jax.tree.map(jnp.copy, policy),  # no buffer may be donated twice
            "opponent_vae": init_vae(plan, keys[1]) if separate else None,
        }
    extra = {name: learnt[name] for name in ("opponent", "opponent_vae")}
    params = {"policy": learnt["policy"], "vae": vae_params}
    return {"params": params, "opt": learnt["policy_opt"], "extra": extra}


# --- updates of one seed --------------------------------------------------------------------------


def update(
    plan: Plan,
    stage: str,
    step: Int[Array, ""] | int,
    state: dict[str, Any],
    key: PRNGKeyArray,
    games: Any = None,
) -> tuple[dict[str, Any], dict[str, Array]]:
    """One update of one seed; state: {"params", "opt", "extra"} as `begin_vae` and `begin_policy` make them.

    games: sharding of the games, where they are spread over devices.
    """
    setting, extra = plan.setting, state["extra"]
    keys = jax.random.split(key)
    if stage == VAE:
        policy, opt, own_vae = extra["policy"], extra["policy_opt"], state["params"]
    else:
        policy, opt, own_vae = state["params"]["policy"], state["opt"], state["params"]["vae"]
    other_vae = own_vae if extra["opponent_vae"] is None else extra["opponent_vae"]
    learnt = Learnt(policy, own_vae), Learnt(extra["opponent"], other_vae)
    worlds = jax.random.split(keys[0], plan.envs)
    if games is not None:
        worlds = jax.lax.with_sharding_constraint(worlds, games)
    batch, score = episodes(plan.game, learnt, plan.steps, worlds, first=step * plan.envs)
    before = State(step, policy, opt)
    after, metrics = training.update_policy(
        before, setting, batch, micro_batches=plan.micro_batches
    )
    red, blue = score.reward.sum(0)
    opponent = objective.self_play(
        after.params, extra["opponent"], red, blue, tau=setting.self_play_tau
    )
    metrics |= of_games(plan, score) | {"copied": (red > blue).astype(jnp.float32)}
    if setting.grouped:
        metrics |= of_groups(plan, batch)
    extra = extra | {"opponent": opponent}
    if stage == POLICY:
        params = {"policy": after.params, "vae": own_vae}
        return {"params": params, "opt": after.opt, "extra": extra}, metrics
    rows = training.vae_batch(policy, setting, batch)
    before = State(step, own_vae, state["opt"])
    learnt, replay, more = update_vae(plan, before, extra, rows, keys[1])
    metrics |= {f"vae_{k}": v for k, v in more.items() if k != NONFINITE}
    metrics[NONFINITE] = jnp.maximum(metrics[NONFINITE], more[NONFINITE])
    extra = extra | {"policy": after.params, "policy_opt": after.opt, "replay": replay}
    return {"params": learnt.params, "opt": learnt.opt, "extra": extra}, metrics


def update_vae(
    plan: Plan, state: State, extra: dict[str, Any], rows: VAEBatch, key: PRNGKeyArray
) -> tuple[State, Replay | None, dict[str, Array]]:
    """`plan.updates` steps of the VAE on what was played, or on the buffer that it went into."""
    replay = extra["replay"]
    drawn, learning = jax.random.split(key)
    if replay is not None:
        replay = remember(replay, rows, drawn)
    warmth = jnp.minimum((state.step + 1) / max(plan.warmup, 1), 1.0)

    def one(state, key):
        given, noise = rows, key
        if replay is not None:
            pick, noise = jax.random.split(key)
            at = jax.random.randint(pick, (plan.batch,), 0, plan.replay)
            given = jax.tree.map(lambda x: x[at], replay.rows)
        return training.update_vae(state, plan.setting, given, noise, warmth=warmth)

    state, metrics = jax.lax.scan(one, state, jax.random.split(learning, plan.updates))
    last = {k: v[-1] for k, v in metrics.items()}
    return state, replay, last | {NONFINITE: metrics[NONFINITE].max()}


def remember(replay: Replay, rows: VAEBatch, key: PRNGKeyArray) -> Replay:
    """The buffer after a random eighth of it is overwritten with agents that were alive."""
    n = replay.rows.mask.shape[0]
    m = min(max(n // 8, 1), rows.mask.shape[0])
    # those alive first, in random order
    chance = jax.random.uniform(key, rows.mask.shape) + jnp.where(rows.mask, 0.0, 1.0)
    chosen = jnp.argsort(chance)[:m]
    at = (replay.cursor + jnp.arange(m)) % n
    kept = jax.tree.map(lambda old, new: old.at[at].set(new[chosen]), replay.rows, rows)
    return Replay(kept, (replay.cursor + m) % n)


# --- numbers --------------------------------------------------------------------------------------


def of_games(plan: Plan, score: Score) -> dict[str, Float[Array, ""]]:
    """Means over the games of an update, of the learner (red) unless the name says otherwise."""
    agents = plan.game.env.sizes[plan.game.env.teams[0]]
    mean = lambda x: x.astype(jnp.float32).mean()
    return {
        "kills": mean(score.kills[:, 0]),
        "losses": mean(score.kills[:, 1]),
        "episode_return": mean(score.reward[:, 0]) / agents,
        "opponent_return": mean(score.reward[:, 1]) / agents,
        "attack_rate": score.attacks[:, 0].sum() / jnp.maximum(score.acted[:, 0].sum(), 1),
        "episode_length": mean(score.steps),
    }


def second_grouping(plan: Plan) -> int | None:
    """The first step that sees the groups of the second grouping, as step 1 sees those of the first; None: there is none."""
    t = plan.setting.group_interval + 1
    return t if t < plan.steps else None


def pairs(plan: Plan, batch: Trajectories) -> dict[str, Float[Array, ""]]:
    """What the second grouping keeps of the first, as means over games; nothing, where there is no second.

    pairs: those that shared a group in the first and live when the second is made. pairs_kept: those of them that share
    one again. Games that are over by then have none, nor have those in which no more live than there are groups: there
    each is a group of its own.
    """
    t = second_grouping(plan)
    if t is None:
        return {}
    first, second = batch.groups.labels[1], batch.groups.labels[t]
    # in a game that is over labels stand still; what made the second grouping is step t - 1
    second = jnp.where(batch.mask[t - 1], second, -1)
    kept, there = jax.vmap(diagnostics.pairs_kept)(first, second)
    enough = (second >= 0).sum(-1) > plan.setting.groups
    mean = lambda x: jnp.where(enough, x, 0).mean()
    return {"pairs": mean(there), "pairs_kept": mean(kept)}


def of_groups(plan: Plan, batch: Trajectories) -> dict[str, Float[Array, ""]]:
    """Of the first grouping: empty groups, the largest one's share; and what the second keeps of it."""
    labels = batch.groups.labels
    sizes = jax.vmap(lambda x: diagnostics.group_sizes(x, plan.setting.groups))(labels[1])
    kept = {f"group_{name}": value for name, value in pairs(plan, batch).items()}
    return kept | {
        "group_empty": sizes["empty"].astype(jnp.float32).mean(),
        "group_largest": sizes["largest"].mean(),
    }
