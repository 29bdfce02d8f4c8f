"""What video attention should reach on an H200, and whether it did; and in which state the device was.

The rate of dense attention at 75,600 tokens and 40 heads is that of NVIDIA's table of cuDNN on an H200 (cudnn-frontend,
benchmark of scaled dot-product attention): 572 TFLOP/s. A rate above it would be as suspicious as one below. All other
goals are ours, set before anything was measured.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrepro.bench._video_numerics import (
    ALL_FULL,
    DENSE,
    KERNEL,
    MIXED,
    PREDICTED,
    SAME_LENGTH,
    WITH_PAB,
)

RATE, SECONDS = "effective TFLOP/s", "s"
CUDNN = 572.0


class Goal(NamedTuple):
    """A figure (None: not measured) and the limits between which it should lie."""

    says: str
    figure: float | None
    least: float = 0.0
    most: float = float("inf")

    @property
    def verdict(self) -> str:
        """One line."""
        if self.figure is None:
            return f"goal: {self.says}: not measured"
        met = "met" if self.least <= self.figure <= self.most else "NOT met"
        return f"goal: {self.says}: {self.figure:.3g}, {met}"


def goals(groups: Sequence[Mapping[str, Any]], memory: Mapping[str, float]) -> list[str]:
    """A line for each goal of whose layer or step there is a table.

    memory: bytes of the programs of a step, and under "programs" how many the routed step took.
    """
    names = list(dict.fromkeys(_layer(g) for g in groups))
    layers = [n for n in names if _last(groups, f"{n}: attention", RATE, DENSE) is not None]
    steps = [n for n in names if _last(groups, _step(n), SECONDS, DENSE, exact=True) is not None]
    return [goal.verdict for goal in _all(layers, steps, groups, memory)]


def unmeasured(layers: Iterable[str], steps: Iterable[str]) -> list[str]:
    """The goals of these layers and steps, a line each, where there is no GPU to measure them on."""
    return [f"{goal.verdict} without a GPU" for goal in _all(layers, steps, [], {})]


def _all(layers, steps, groups, memory) -> Iterator[Goal]:
    for name in layers:
        yield from _of_layer(name, groups)
    for name in steps:
        yield from _of_step(name, groups, memory)


def _of_layer(name, groups):
    rate = lambda case, table="attention": _last(groups, f"{name}: {table}", RATE, case)
    if name == "Wan 14B, 81 frames":
        says = f"{name}: dense attention within 5 % of {CUDNN:g} TFLOP/s"
        yield Goal(says, rate(DENSE), 0.95 * CUDNN, 1.05 * CUDNN)
    if name in ("HunyuanVideo", "Wan 14B"):
        yield Goal(f"{name}: window groups, at least 450 TFLOP/s", rate("sliding"), 450)
        yield Goal(f"{name}: the kernel, at least 520 TFLOP/s", rate(KERNEL, "the kernel"), 520)
    if "window" in name:  # pooling knows of none
        return
    seconds = lambda case: _last(groups, f"{name}: parts of", SECONDS, case)
    pooling = [seconds(case) for case in ("match", "pool", "unpool")]
    around = None if None in pooling else sum(pooling)
    whole = _last(groups, f"{name}: attention", SECONDS, "coreset")  # as a model runs it, all heads
    rest = None if None in (whole, around) or whole <= around else whole - around
    says = f"{name}: coreset attention without match, pool and unpool, at least 0.95 of the rate of dense attention of its length"
    yield Goal(says, _ratio(seconds(SAME_LENGTH), rest), 0.95)
    says = f"{name}: match, pool and unpool, at most 0.05 of attention between pooled tokens"
    yield Goal(says, _ratio(around, seconds("attend")), most=0.05)


def _of_step(name, groups, memory):
    step = lambda case: _last(groups, _step(name), SECONDS, case, exact=True)
    says = f"{name}: a routed step, at least 2.4 times as fast as a dense one"
    yield Goal(says, _ratio(step(DENSE), step(MIXED)), 2.4)
    says = f"{name}: the routed program with all heads full, at least 0.95 of the speed of the dense one"
    yield Goal(says, _ratio(step(DENSE), step(ALL_FULL)), 0.95)
    says = f"{name}: programs for steps of changing routes, at most 1"
    yield Goal(says, memory.get("programs"), most=1)
    video = lambda case: _last(groups, f"{name}: a video", SECONDS, case)
    says = f"{name}: PAB, at least 0.9 of the speed-up that the profile of a step predicts"
    yield Goal(says, _ratio(video(PREDICTED), video(WITH_PAB)), 0.9)
    says = f"{name}: memory of a routed step, at most 1.1 of a dense one, by XLA's account"
    yield Goal(says, _ratio(memory.get("routed"), memory.get("dense")), most=1.1)


def _step(name):
    return f"{name}: a step of the model"  # not the one by a kernel, whose name is longer


def _layer(group):
    return group["what"].partition(": ")[0]


def _ratio(a, b):
    return a / b if a and b else None


def _last(groups, what, unit, case, exact=False):
    """The median of the case whose name begins so, in the last such table; None where there is none."""
    found = None
    for g in groups:
        fits = g["what"] == what if exact else g["what"].startswith(what)
        if fits and g["unit"] == unit:
            same = [c["median"] for c in g["cases"] if c["case"] == case]
            close = [c["median"] for c in g["cases"] if c["case"].startswith(case + ",")]
            found = (same or close or [found])[0]
    return found


# --- the device -------------------------------------------------------------------------------

QUERY = "power.draw,clocks.sm,clocks.mem,temperature.gpu"


def device_state(after: str) -> list[str]:
    """A line with power, clocks and temperature of the first GPU, where nvidia-smi tells; else nothing."""
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    power, core, memory, heat = (told.stdout.strip().split(", ") + ["?"] * 4)[:4]
    return [f"{after}: right behind it {power}, SM {core}, memory {memory}, {heat} C"]
