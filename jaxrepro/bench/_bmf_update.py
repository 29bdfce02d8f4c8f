"""Seconds of a whole update of BMF: games against an older self, and a step of the policy; one seed, and five at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxrepro.bench import harness

SEEDS = 5
ONE, MANY = "one seed", f"{SEEDS} seeds at once"
SHAPES = {
    "cpu": {"map_size": 20, "steps": 150, "envs": 8, "hidden": 64, "vae_hidden": 128, "groups": 4},
    "gpu": {
        "map_size": 40,
        "steps": 400,
        "envs": 32,
        "hidden": 256,
        "vae_hidden": 512,
        "groups": 4,
    },
    "trial": {"map_size": 12, "steps": 3, "envs": 2, "hidden": 4, "vae_hidden": 4, "groups": 2},
}
GOAL = 1 / 3  # time of five seeds at once over five times that of one, on a GPU


def update(shape: Mapping[str, Any], seeds: int) -> Callable[[], Any]:
    """A call that makes one update of so many seeds."""
    import jax

    from jaxrepro.envs.battle import OFFICIAL, Battle
    from jaxrepro.methods.bmf import learning
    from jaxrepro.methods.bmf.rollout import Game
    from jaxrepro.methods.bmf.setting import of_preset

    setting = of_preset(
        "fixed", hidden=shape["hidden"], vae_hidden=shape["vae_hidden"], groups=shape["groups"]
    )
    game = Game(Battle(shape["map_size"], side="alternate"), OFFICIAL, (setting, setting))
    plan = learning.Plan(game, setting, shape["steps"], shape["envs"], 1, 0, 0)
    keys = jax.random.split(jax.random.key(0), seeds)

    @jax.jit
    def begin(keys):
        one = lambda key: learning.begin_policy(plan, key, learning.init_vae(plan, key))
        return jax.vmap(one)(keys)

    @jax.jit
    def step(state, keys):
        one = lambda state, key: learning.update(plan, learning.POLICY, 0, state, key)
        return jax.vmap(one)(state, keys)

    state = begin(keys)
    return lambda: jax.block_until_ready(step(state, keys))


def measure(shape: Mapping[str, Any], rounds: int, device: str) -> tuple[dict[str, Any], list[str]]:
    """The group of the table, and a line on the goal. device: cpu or gpu."""
    timings = harness.interleave({ONE: update(shape, 1), MANY: update(shape, SEEDS)}, rounds)
    per_seed = {
        ONE: timings[ONE],
        MANY: harness.Timing(
            timings[MANY].first_s, tuple(s / SEEDS for s in timings[MANY].seconds)
        ),
    }
    what = (
        f"update of BMF-AC, {shape['envs']} games of {shape['steps']} steps on a map of {shape['map_size']}, "
        f"hidden {shape['hidden']}; a seed's share"
    )
    group = harness.group(what, "updates/s", per_seed, work=1, peers=[ONE])
    share = 1 / next(c["ratio"]["median"] for c in group["cases"] if c["case"] == MANY)
    says = f"goal: on a GPU {SEEDS} seeds at once take at most {GOAL:.2f} of {SEEDS} times one seed"
    met = (
        f"{share:.2f}, {'met' if share <= GOAL else 'NOT met'}"
        if device == "gpu"
        else f"not measured ({share:.2f} on this {device})"
    )
    return group, [f"{says}: {met}"]
