"""The battle as MAgent2 plays it: one agent after another, in numpy. Written from the rules, shares nothing with the package."""

import math

import numpy as np

F = np.float32
MOVE = [(0, -2), (-1, -1), (0, -1), (1, -1), (-2, 0), (-1, 0), (0, 0), (1, 0), (2, 0), (-1, 1), (0, 1), (1, 1), (0, 2)]  # fmt: skip
STRIKE = [(-1, -1), (0, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (0, 1), (1, 1)]


def minstd_shuffle(items, seed):
    """The engine's shuffle, C++'s minstd_rand0: (shuffled, next seed)."""
    items, x = list(items), seed % (2**31 - 1) or 1
    for i in range(len(items)):
        x = 16807 * x % (2**31 - 1)
        j = x % (i + 1)
        items[i], items[j] = items[j], items[i]
    return items, x


def rushing(world, rng, share):
    """Actions of which a share goes at the nearest enemy, so that there is a fight; the others are random.

    world: has `pos`, a list of cells, `alive` and `team(i)`.
    """
    out = rng.integers(0, 21, len(world.pos))
    for i, (x, y) in enumerate(world.pos):
        foes = [p for j, p in enumerate(world.pos) if world.alive[j] and world.team(j) != world.team(i)]  # fmt: skip
        if foes and rng.random() < share:
            u, v = min(foes, key=lambda p: (p[0] - x) ** 2 + (p[1] - y) ** 2)
            dx, dy = u - x, v - y
            far = [(dx - a) ** 2 + (dy - b) ** 2 for a, b in MOVE]
            out[i] = 13 + STRIKE.index((dx, dy)) if (dx, dy) in STRIKE else np.argmin(far)
    return out


class Serial:
    """A battle whose agents 0 .. A-1 are red, the others blue."""

    def __init__(self, n, rewards, swapped=False):
        self.n, self.rewards, self.t = n, rewards, 0
        side, cells = 2 * int(math.sqrt(0.04 * n * n)), []
        for x0 in (n // 2 - 3 - side, n // 2 + 3):
            y0 = (n - side) // 2
            spots = ((x, y) for x in range(x0, x0 + side, 2) for y in range(y0, y0 + side, 2))
            cells.append([(x, y) for x, y in spots if 0 < x < n - 1 and 0 < y < n - 1])
        self.A = a = len(cells[0])
        armies = [cells[0], cells[1][:a]]
        self.pos = armies[1] + armies[0] if swapped else armies[0] + armies[1]
        self.ids = [*range(a, 2 * a), *range(a)] if swapped else list(range(2 * a))
        self.hp = [F(10)] * (2 * a)
        self.alive, self.fought = [True] * (2 * a), [True] * (2 * a)
        self.action = [-1] * (2 * a)
        self.reward, self.lagged = [F(0)] * (2 * a), [F(0)] * (2 * a)
        self.at = {p: i for i, p in enumerate(self.pos)}

    def team(self, i):
        return int(i >= self.A)

    def step(self, actions, order):
        """order: agents, in which attackers strike; those who do not attack may be missing or there."""
        step, dead, attack, hit, kill = (F(self.rewards[k]) for k in ("step_reward", "dead_penalty", "attack_penalty", "attack_opponent_reward", "kill_reward"))  # fmt: skip
        self.fought, self.lagged = list(self.alive), self.reward
        self.reward = [step if x else F(0) for x in self.fought]
        struck = [False] * len(self.pos)
        for i in order:
            if not self.alive[i] or not 13 <= actions[i] <= 20:
                continue
            (x, y), (dx, dy) = self.pos[i], STRIKE[actions[i] - 13]
            j = self.at.get((x + dx, y + dy))
            struck[i] = False
            if j is None or self.team(j) == self.team(i):
                self.reward[i] += attack
                continue
            self.hp[j] = F(self.hp[j] - F(2))
            if self.hp[j] < 0:
                self.alive[j] = False
                self.reward[j] = dead
                del self.at[self.pos[j]]
                self.reward[i] += kill + attack
            else:
                struck[i] = True
                self.reward[i] += attack
        for i in range(len(self.pos)):
            if self.alive[i]:
                self.hp[i] = min(F(10), F(self.hp[i] + F(0.1)))
        for i, (x, y) in enumerate(self.pos):
            if self.alive[i] and 0 <= actions[i] < 13:
                to = (x + MOVE[actions[i]][0], y + MOVE[actions[i]][1])
                inside = 0 < to[0] < self.n - 1 and 0 < to[1] < self.n - 1
                if inside and to not in self.at:
                    del self.at[x, y]
                    self.at[to], self.pos[i] = i, to
        for i in range(len(self.pos)):
            self.reward[i] += hit * struck[i]
            if self.fought[i]:
                self.action[i] = actions[i]
        self.t += 1
        return not (any(self.alive[: self.A]) and any(self.alive[self.A :]))

    def look(self, before_clearing=False):
        """(views (2A, 13, 13, 7), features (2A, 34)); 0 for who does not look."""
        n, a = self.n, self.A
        sees = self.fought if before_clearing else self.alive
        reward = self.lagged if before_clearing else self.reward
        width = math.ceil(n / 13)
        minimap = np.zeros((2, 13, 13), F)
        for i, (x, y) in enumerate(self.pos):
            if sees[i]:
                minimap[self.team(i), y // width, x // width] += 1
        minimap /= np.maximum(minimap.sum((1, 2), keepdims=True), 1)
        views, numbers = np.zeros((2 * a, 13, 13, 7), F), np.zeros((2 * a, 34), F)
        for i, (x, y) in enumerate(self.pos):
            if not sees[i]:
                continue
            mine = self.team(i)
            views[i, ..., 3], views[i, ..., 6] = minimap[mine], minimap[1 - mine]
            views[i, y // width, x // width, [3, 6]] += 1
            for dy in range(-6, 7):
                for dx in range(-6, 7):
                    u, v, cell = x + dx, y + dy, views[i, dy + 6, dx + 6]
                    if dx * dx + dy * dy > 36 or not (0 <= u < n and 0 <= v < n):
                        continue
                    if u in (0, n - 1) or v in (0, n - 1):
                        cell[0] = 1
                    elif (j := self.at.get((u, v))) is not None:
                        first = 1 if self.team(j) == mine else 4
                        cell[first], cell[first + 1] = 1, F(self.hp[j]) / F(10)
            numbers[i, :10] = [self.ids[i] >> b & 1 for b in range(10)]
            if self.action[i] >= 0:
                numbers[i, 10 + self.action[i]] = 1
            numbers[i, 31:] = reward[i], F(x) / F(n), F(y) / F(n)
        return views, numbers
