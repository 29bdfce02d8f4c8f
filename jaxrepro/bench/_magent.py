"""The peers of bench/battle.py: MAgent2 0.3.4 by its C++ engine and by its PettingZoo interface.

The engine is used as at its best: its arrays as they are, nothing copied by agent. Rewards, who lives, who is where
and the observation of all agents are fetched in every step, as a learner needs them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from magent2 import GridWorld
from magent2.environments import battle_v4
from magent2.environments.battle.battle import get_config

from jaxrepro.envs.battle import OFFICIAL, Battle

REWARDS = {
    name: value
    for name, value in dataclasses.asdict(OFFICIAL).items()
    if name not in ("kill_reward", "horizon")
}


def actions(steps: int, n: int) -> np.ndarray:
    """(steps, n) int32 random actions, drawn beforehand."""
    return np.random.default_rng(0).integers(0, 21, (steps, n), dtype=np.int32)


class Engine:
    """One world of the engine."""

    def __init__(self, map_size: int, steps: int):
        env = Battle(map_size)
        self.world = GridWorld(get_config(map_size, True, 0, **REWARDS), map_size=map_size)
        self.handles = self.world.get_handles()
        self.cells = [
            np.concatenate([cells, np.zeros_like(cells[:, :1])], 1).tolist()
            for cells in (env.left, env.right)
        ]
        self.actions = actions(steps, env.num_agents)

    def reset(self) -> None:
        """A new episode, and what its agents see."""
        self.world.reset()
        for handle, cells in zip(self.handles, self.cells):
            self.world.add_agents(handle, method="custom", pos=cells)
        self.t = 0
        self.observe()

    def observe(self) -> list[Any]:
        """(view, features) of each team."""
        return [self.world.get_observation(handle) for handle in self.handles]

    def run(self) -> int:
        """All steps, from a fresh start; how many agents live then."""
        world = self.world
        self.reset()
        for chosen in self.actions:
            at = 0
            for handle in self.handles:
                n = world.get_num(handle)
                world.set_action(handle, chosen[at : at + n])
                at += n
            over = world.step()
            for handle in self.handles:
                world.get_reward(handle)
                world.get_alive(handle)
            world.clear_dead()
            self.t += 1
            if over or self.t >= OFFICIAL.horizon:
                self.reset()
            else:
                self.observe()
        return sum(world.get_num(handle) for handle in self.handles)


class PettingZoo:
    """One world of the PettingZoo interface, with all that it can show."""

    def __init__(self, map_size: int, steps: int):
        self.world = battle_v4.parallel_env(
            map_size=map_size,
            minimap_mode=True,
            extra_features=True,
            max_cycles=OFFICIAL.horizon,
            **REWARDS,
        )
        self.actions = actions(steps, len(self.world.possible_agents)).tolist()

    def run(self) -> int:
        """All steps, from a fresh start; how many agents live then."""
        world = self.world
        world.reset(seed=0)
        for chosen in self.actions:
            world.step(dict(zip(world.agents, chosen)))
            if not world.agents:
                world.reset()
        return len(world.agents)
