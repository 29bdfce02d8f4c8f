"""Agent-steps a second of the battle at 64 v 64, beside MAgent2's engine and its PettingZoo interface.

A step is the whole of it: attacks, moves, rewards, the observation and the features of every agent, and a new episode
where one ends. All take random actions of the same distribution, drawn beforehand, from a fresh start, so that nearly all agents live;
the peers would have less to do as agents die. Ours steps many worlds at once, the peers one after another, as they are
made; their time is scaled to our number of steps. MAgent2 runs on CPUs alone, with the threads that OpenMP gives it.
Beside that a whole training update of BMF, one seed and five at once.

Goals are ours, set before anything was measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from jaxrepro.bench import _bmf_update, harness

ENGINE, PETTINGZOO = "magent2, C++ engine", "magent2, PettingZoo"
OURS = "jaxrepro"
SHAPES = {
    "cpu": {"map_size": 40, "worlds": 32, "steps": 16, "peer": {ENGINE: 300, PETTINGZOO: 60}},
    "gpu": {"map_size": 40, "worlds": 4096, "steps": 50, "peer": {ENGINE: 300, PETTINGZOO: 60}},
    "trial": {"map_size": 12, "worlds": 2, "steps": 3, "peer": {ENGINE: 4, PETTINGZOO: 3}},
}
for _name, _update in _bmf_update.SHAPES.items():
    SHAPES[_name]["update"] = _update
GPU_SHAPE = "gpu"
ROUNDS = 10
# at least so many times as fast, on a device
GOALS = {"cpu": {PETTINGZOO: 30.0, ENGINE: 1.2}, "gpu": {ENGINE: 100.0}}
MISSING = "magent2 is not installed: jaxrepro alone. `pip install magent2==0.3.4` adds the peers."


def ours(shape: Mapping[str, Any]) -> tuple[Callable[[], Any], int]:
    """A call that makes shape's steps of shape's worlds, and the number of agents in a world."""
    import jax

    from jaxrepro.envs.battle import OFFICIAL, Battle
    from jaxrepro.envs.wrappers import AutoReset

    env = Battle(shape["map_size"])
    world = AutoReset(env, OFFICIAL)
    n, worlds = env.num_agents, shape["worlds"]
    key = jax.random.key(0)
    actions = jax.random.randint(key, (shape["steps"], worlds, n), 0, env.num_actions("red"))

    @jax.jit
    def run(key, actions):
        start = jax.vmap(world.reset)(jax.random.split(key, worlds))

        def step(carry, now):
            (_, state), (key, chosen) = carry, now
            keys = jax.random.split(key, worlds)
            one = lambda k, s, a: world.step(k, s, env.split(a))
            obs, state, reward, *_ = jax.vmap(one)(keys, state, chosen)
            # the observation is carried, so that it is written in every step
            return (obs, state), sum(r.sum() for r in reward.values())

        return jax.lax.scan(step, start, (jax.random.split(key, len(actions)), actions))

    return lambda: jax.block_until_ready(run(key, actions)), n


def verdicts(ratios: Mapping[str, float | None], device: str) -> list[str]:
    """A line for each goal. ratios: peer -> how many times as fast as it; None = not measured. device: cpu or gpu."""
    lines = []
    for where, goals in GOALS.items():
        for peer, least in goals.items():
            says = f"goal: on a {where.upper()} at least {least:g} times as fast as {peer}"
            ratio = ratios.get(peer) if where == device else None
            met = (
                "not measured"
                if ratio is None
                else f"{ratio:.3g}, {'met' if ratio >= least else 'NOT met'}"
            )
            lines.append(f"{says}: {met}")
    return lines


def bench(shape: Mapping[str, Any], rounds: int) -> harness.Report:
    """Agent-steps a second of whole steps."""
    import jax

    run, n = ours(shape)
    steps = shape["worlds"] * shape["steps"]
    cases, scale, notes = {OURS: run}, {OURS: 1.0}, []
    if importlib.util.find_spec("magent2") and importlib.util.find_spec("pettingzoo"):
        from jaxrepro.bench import _magent

        makers = {ENGINE: _magent.Engine, PETTINGZOO: _magent.PettingZoo}
        for name, few in shape["peer"].items():
            cases[name] = makers[name](shape["map_size"], few).run
            scale[name] = steps / few
        notes.append(
            f"peers step one world {', '.join(f'{few} times ({name})' for name, few in shape['peer'].items())}; "
            f"their seconds are scaled to the {steps} steps of ours"
        )
    else:
        notes.append(MISSING)
    raw = harness.interleave(cases, rounds)
    timings = {
        name: harness.Timing(t.first_s, tuple(s * scale[name] for s in t.seconds))
        for name, t in raw.items()
    }
    agents = f"{n // 2} v {n // 2}"
    what = f"battle, {agents}, {shape['worlds']} worlds: step, observation, features, new episodes"
    groups, ratios = [], {}
    for peer in [p for p in (ENGINE, PETTINGZOO) if p in timings] or [None]:
        of = {k: t for k, t in timings.items() if k in (OURS, peer)}
        name = f"{what}; beside {peer}" if peer else what
        group = harness.group(
            name, "agent-steps/s", of, work=steps * n, peers=[peer] if peer else []
        )
        groups.append(group)
        if peer:
            ratios[peer] = next(c["ratio"]["median"] for c in group["cases"] if c["case"] == OURS)
    notes += verdicts(ratios, jax.default_backend())
    update, lines = _bmf_update.measure(shape["update"], max(rounds // 3, 1), jax.default_backend())
    groups.append(update)
    notes += lines
    return harness.Report(groups, notes, ("magent2", "pettingzoo") if ratios else ())
