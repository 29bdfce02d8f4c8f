"""Whole games of two teams: the one loop behind training, evaluation, tournaments and films.

    for t: mean field of step t - 1, observation -> actions -> world -> groups and mean actions of step t

No agent is removed: the dead stay in their rows, under a mask. A world whose game is over stands still, so that its last
observation stays the one that followed the last step. `Game` is static; what teams have learnt is passed beside it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PRNGKeyArray

from jaxrepro.config import UserError
from jaxrepro.envs import battle_policies
from jaxrepro.envs.battle import Battle, BattleParams
from jaxrepro.envs.battle_rules import FIRST_ATTACK
from jaxrepro.methods.bmf import groups, networks
from jaxrepro.methods.bmf.objective import Trajectories
from jaxrepro.methods.bmf.setting import Setting

SCRIPTS = {"random": battle_policies.random, "rush": battle_policies.rush}  # nothing is learnt


class Learnt(NamedTuple):
    """What a team plays with: networks (networks.py) and the VAE that groups it, None without groups."""

    policy: Any
    vae: Any = None


@dataclasses.dataclass(frozen=True)
class Game:
    """Two teams on a map. players: for red and blue, a Setting (it plays by what it has learnt) or a name in SCRIPTS."""

    env: Battle
    params: BattleParams
    players: tuple[Setting | str, Setting | str]

    def __post_init__(self) -> None:
        for player in self.players:
            if isinstance(player, str) and player not in SCRIPTS:
                raise UserError(f"player {player!r} is not one of {', '.join(SCRIPTS)}")

    def swapped(self) -> "Game":
        """The same with the players on each other's side."""
        return dataclasses.replace(self, players=self.players[::-1])


class World(NamedTuple):
    """One game between two steps."""

    state: Any  # of the environment
    obs: Any  # team -> BattleObservation
    groups: Any  # for red and blue: GroupState, () of scripted players
    over: Any  # () bool


class Record(NamedTuple):
    """What a team did in a step; rows of agents."""

    view: Any
    features: Any
    action: Any
    reward: Any
    mask: Any  # alive at the start of the step, in a game that goes on
    alive_after: Any
    groups: Any  # the state whose mean field the step saw


class Score(NamedTuple):
    """Sums of a game, for red and blue: (2,) each, but for `steps`."""

    kills: Any
    reward: Any
    attacks: Any  # actions that were attacks
    acted: Any  # agents alive, summed over steps
    steps: Any  # () of the game


def begin(game: Game, key: PRNGKeyArray, episode: Int[Array, ""] | int = 0) -> World:
    """A new game; `episode` counts games where sides alternate."""
    env = game.env
    _, state = env.reset(key, game.params)
    obs, state = env.restart(key, state.replace(episode=jnp.int32(episode) - 1), game.params)
    memory = tuple(
        ()
        if isinstance(player, str)
        else groups.init_groups(
            player,
            env.sizes[team],
            env.num_actions(team),
            obs[team].view[0].size + obs[team].features.shape[-1],
        )
        for team, player in zip(env.teams, game.players)
    )
    return World(state, obs, memory, jnp.bool_(False))


def advance(
    game: Game,
    learnt: tuple[Learnt | None, Learnt | None],
    world: World,
    t: Int[Array, ""] | int,
    key: PRNGKeyArray,
) -> tuple[World, tuple[Record, Record], Score]:
    """One step of one game: the world after it, what red and blue did, and what the step adds to the score.

    Games that are mapped over share t, so that all regroup in the same steps (`groups.update_groups`).
    """
    env, keys = game.env, jax.random.split(key, 5)
    actions = {}
    for team, player, own, memory, k in zip(
        env.teams, game.players, learnt, world.groups, keys[:2]
    ):
        if isinstance(player, str):
            actions[team] = SCRIPTS[player](env, team)(k, world.obs, world.state)
        else:
            vectors = groups.mean_field_input(own.policy, player, memory)
            logits = networks.policy(own.policy, player, *world.obs[team], vectors)
            actions[team] = networks.draw(player, logits, k)
    obs, state, reward, _, info = env.step_env(keys[2], world.state, actions, game.params)
    over = world.over | info["episode_over"] | env.is_truncated(state, game.params)
    memories, records = [], []
    for team, player, own, memory, k in zip(
        env.teams, game.players, learnt, world.groups, keys[3:]
    ):
        seen, alive = world.obs[team], info["alive_before"][team]
        record = Record(
            *seen,
            action=actions[team],
            reward=reward[team],
            mask=alive & ~world.over,
            alive_after=info["alive_after"][team],
            groups=memory,
        )
        records.append(record)
        if not isinstance(player, str):
            x = networks.observation(player, *seen)
            memory = groups.update_groups(own.vae, player, memory, t, x, actions[team], alive, k)
        memories.append(memory)
    new = World(state, obs, tuple(memories), over)
    kept = jax.tree.map(lambda old, x: jnp.where(world.over, old, x), world, new)
    goes_on = ~world.over
    total = lambda leaf: jnp.stack([leaf(record) for record in records])
    score = Score(
        kills=goes_on * jnp.stack([info["kills"][team] for team in env.teams]),
        reward=total(lambda r: jnp.where(r.mask, r.reward, 0).sum()),
        attacks=total(lambda r: (r.mask & (r.action >= FIRST_ATTACK)).sum()),
        acted=total(lambda r: r.mask.sum()),
        steps=goes_on.astype(jnp.int32),
    )
    return kept, tuple(records), score


def _nothing() -> Score:
    ints, floats = jnp.zeros(2, jnp.int32), jnp.zeros(2)
    return Score(ints, floats, ints, ints, jnp.int32(0))


def episodes(
    game: Game,
    learnt: tuple[Learnt | None, Learnt | None],
    steps: int,
    keys: Key[Array, "e"],
    first: Int[Array, ""] | int = 0,
) -> tuple[Trajectories, Score]:
    """A game for each key, of at most `steps` steps: what red did, and the scores (leaves (e, ...)).

    first: number of the first game, where sides alternate. Every game takes all `steps`, those after its end masked.
    """
    e = keys.shape[0]
    starts, plays = jnp.swapaxes(jax.vmap(jax.random.split)(keys), 0, 1)
    worlds = jax.vmap(lambda k, i: begin(game, k, i))(starts, first + jnp.arange(e))

    def step(carry, t):
        worlds, score = carry
        worlds, (red, _), more = _advance_all(game, learnt, worlds, t, plays)
        return (worlds, jax.tree.map(jnp.add, score, more)), red

    zero = jax.tree.map(lambda x: jnp.broadcast_to(x, (e, *x.shape)), _nothing())
    (worlds, score), red = jax.lax.scan(step, (worlds, zero), jnp.arange(steps))
    last = worlds.obs[game.env.teams[0]]
    return Trajectories(*red, *last, worlds.groups[0]), score


def _advance_all(game, learnt, worlds, t, keys):
    one = lambda world, key: advance(game, learnt, world, t, jax.random.fold_in(key, t))
    return jax.vmap(one)(worlds, keys)


def scores(
    game: Game,
    learnt: tuple[Learnt | None, Learnt | None],
    steps: int,
    keys: Key[Array, "e"],
    first: Int[Array, ""] | int = 0,
) -> Score:
    """The scores of a game for each key; keeps nothing else, and ends when all games have."""
    e = keys.shape[0]
    starts, plays = jnp.swapaxes(jax.vmap(jax.random.split)(keys), 0, 1)
    worlds = jax.vmap(lambda k, i: begin(game, k, i))(starts, first + jnp.arange(e))
    zero = jax.tree.map(lambda x: jnp.broadcast_to(x, (e, *x.shape)), _nothing())

    def goes_on(carry):
        t, worlds, _ = carry
        return (t < steps) & ~worlds.over.all()

    def step(carry):
        t, worlds, score = carry
        worlds, _, more = _advance_all(game, learnt, worlds, t, plays)
        return t + 1, worlds, jax.tree.map(jnp.add, score, more)

    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), worlds, zero))[2]


def film(
    game: Game,
    learnt: tuple[Learnt | None, Learnt | None],
    steps: int,
    key: PRNGKeyArray,
    episode: int = 0,
) -> tuple[Any, Any, Any]:
    """One game: states (steps + 1, ...), actions team -> (steps, A), and how many steps it took."""
    start, play = jax.random.split(key)
    world = begin(game, start, episode)

    def step(world, t):
        after, records, _ = advance(game, learnt, world, t, jax.random.fold_in(play, t))
        action = {team: record.action for team, record in zip(game.env.teams, records)}
        return after, (after.state, action, after.over)

    _, (states, actions, over) = jax.lax.scan(step, world, jnp.arange(steps))
    states = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), world.state, states)
    return states, actions, jnp.minimum((~over).sum() + 1, steps)
