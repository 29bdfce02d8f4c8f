"""Attention of videos and a step of a video model, dense against routed: VORTA, arXiv:2505.18809 (v2).

Shape "video", the default on a GPU, has the token grids, heads and windows of HunyuanVideo and Wan 2.1 (the tiles
of Wan 1.3B and of 81 frames are inferred: the paper names none) and random inputs in bfloat16; "step" has a step of
HunyuanVideo with random weights, on which time does not depend, and takes about a minute a round. "small" is the same
code at sizes of a CPU, where it says nothing about speed. Results are kept as soon as a table exists, in this order:

    numerics    queries of each kind against numpy on the host, with text slots full, partly and not filled; a
                window of all tiles is dense attention. Nothing wrong is timed
    a layer     dense attention, sliding by window groups, coreset attention; all heads, and one, four, eight
    its parts   of coreset attention: match, pool, attend, unpool, and dense attention of that length
    a step      dense, routed with all heads full, and half coreset, half sliding; its profile; with PAB
    a video     its steps as a projection from one: dense, routed, with the steps that PAB reuses, few steps
    programs    how many jit has compiled for steps of changing routes
    kernel      sliding by the Pallas kernel, alone and in the step. Last, since it may bring the process down
    goals       what this should reach on an H200, and whether it does (_video_goals); without a GPU none is measured

The profile is a step that leaves attention modules out: what it lacks is their share of a step. Were a kept output
free, PAB would save that share in each step that reuses, so the prediction is

    1 / (1 - share of attention modules in a routed step x share of the steps that reuse)     times as fast

    effective FLOP/s = 4 pairs heads head_dim / seconds,   pairs = query and key tokens that the definition joins

so that work that is done twice or masked lowers the rate. The peer is dense attention in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from jaxrepro.bench import harness
from jaxrepro.bench._video_goals import device_state, goals, unmeasured
from jaxrepro.bench._video_numerics import (
    CHUNK,
    DENSE,
    KERNEL,
    LIMITS,
    SAME_LENGTH,
    WARMUP,
    difference,
    errors,
    grid_of,
    pairs,
    right,
    told,
)
from jaxrepro.bench._video_step import step_tables
from jaxrepro.methods.vorta.presets import PRESETS

ROUNDS = 10

SMALL = {"size": [4, 6, 4], "tile": [2, 3, 2], "window": [1, 3, 1], "heads": 2}


def released(model: str, *, heads: int, **other: Any) -> dict[str, Any]:
    """Self-attention of a released model at the size of its videos; other: what is not as presets.py has it."""
    video, text = (
        PRESETS[model],
        PRESETS[model].text if model == "hunyuan" else 0,
    )  # Wan's sees no text
    layer = {"size": list(video.size), "tile": list(video.tile), "window": [3, 3, 3]}
    return layer | {"heads": heads, "text": text, "valid": text, "shared": not text} | other


HUNYUAN = released("hunyuan", heads=24)
SHAPES = {
    "small": {
        "dtype": "float32",
        "head_dim": 16,
        "layers": {
            "trial with text": SMALL | {"text": 8, "valid": 5, "shared": False},
            "trial without text": SMALL | {"text": 0, "valid": 0, "shared": True},
        },
        "heads": [1, "all"],
        "valid": [2, 0],
        "kernels": [],
        "step": {"preset": "hunyuan_tiny", "of": "trial with text", "routes": 50},
    },
    "video": {
        "dtype": "bfloat16",
        "head_dim": 128,
        "layers": {
            "HunyuanVideo": HUNYUAN,
            "HunyuanVideo, window 5": HUNYUAN | {"window": [5, 5, 5]},
            "Wan 14B": released("wan_14b", heads=40),
            # the 81 frames of the released model: 75,600 tokens
            "Wan 14B, 81 frames": released("wan_14b", heads=40, size=[21, 45, 80], tile=[7, 9, 8]),
            "Wan 1.3B": released("wan_1_3b", heads=12),
        },
        "heads": [1, 4, 8, "all"],
        "valid": [200, 0],
        "kernels": [None, [128, 64, 2]],  # sizes of key blocks; None: what the kernel chooses
        "step": None,
    },
    "step": {
        "dtype": "bfloat16",
        "head_dim": 128,
        "layers": {"HunyuanVideo": HUNYUAN},
        "heads": [],
        "valid": [],
        "kernels": [None],
        "step": {"preset": "hunyuan", "of": "HunyuanVideo", "routes": 50},
    },
}
GPU_SHAPE = "video"
RATES = "effective TFLOP/s: 4 x pairs of query and key that the definition joins x heads x head size / seconds"


def inputs(shape: Mapping[str, Any], layer: Mapping[str, Any], heads: int) -> tuple[Any, ...]:
    """Random q, k, v (1, s, heads, i) and the valid text (1,)."""
    import jax
    import jax.numpy as jnp

    sizes = (1, grid_of(layer).length + layer["text"], heads, shape["head_dim"])
    draw = jax.jit(lambda key: jax.random.normal(key, sizes, shape["dtype"]))
    q, k, v = (draw(key) for key in jax.random.split(jax.random.key(0), 3))
    return q, k, v, jnp.full(1, layer["valid"], jnp.int32)


def branches(layer: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """f(q, k, v, text) of each branch; the sparse ones as a model runs them, a few heads at a time.

    Where there are no text slots `text` is left out, as Wan leaves it out: no length, and no mask.
    """
    import jax.numpy as jnp

    from jaxrepro.ops import routed
    from jaxrepro.ops.coreset import coreset

    grid = grid_of(layer)
    kinds = (routed.full, partial(coreset, shared=layer["shared"]), routed.sliding_groups)

    def all_heads(j, q, k, v, text):
        route = jnp.full(q.shape[2], int(j), jnp.int32)
        return routed.routed(q, k, v, route, grid, text=of(text), chunk=CHUNK, branches=kinds)

    of = lambda text: text if layer["text"] else None
    return {
        DENSE: lambda q, k, v, text: routed.full(q, k, v, grid, text=of(text)),
        "coreset": partial(all_heads, routed.Branch.coreset),
        "sliding": partial(all_heads, routed.Branch.sliding),
    }


def numerics(shape: Mapping[str, Any], name: str, notes: list[str]) -> set[str]:
    """The branches that are right on this device, with every number of valid text tokens."""
    layer = shape["layers"][name]
    heads, found = min(2, layer["heads"]), set(branches(layer))
    for valid in dict.fromkeys([layer["valid"], *(shape["valid"] if layer["text"] else [])]):
        one = layer | {"valid": valid}
        data = inputs(shape, one, heads)
        for kind, f in branches(one).items():
            what = f"{name}, {kind}{told(one)}"
            if not right(what, errors(one, kind, data, waits(f, *data)()), notes):
                found.discard(kind)
    whole = layer | {"window": [n | 1 for n in grid_of(layer).tiles]}  # odd, and all tiles
    data = inputs(shape, whole, 1)
    dense, sliding = (waits(branches(whole)[kind], *data)() for kind in (DENSE, "sliding"))
    if not right(
        f"{name}, sliding by a window of all tiles against dense", difference(sliding, dense), notes
    ):
        found.discard("sliding")
    return found


def kernel(layer: Mapping[str, Any], blocks: list[int] | None) -> Callable[..., Any]:
    """f(q, k, v, text) of the Pallas kernel."""
    from jaxrepro.ops.sliding_mosaic import Blocks, sliding_mosaic

    blocks, grid = None if blocks is None else Blocks(*blocks), grid_of(layer)
    of = lambda text: text if layer["text"] else None
    return lambda q, k, v, text: sliding_mosaic(q, k, v, grid, text=of(text), blocks=blocks)


def waits(f: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """f compiled, as a call that returns when its work is done."""
    import jax

    run = jax.jit(f)
    return lambda: jax.block_until_ready(run(*arguments))


def rates(one: Mapping[str, Any], flops: Mapping[str, float]) -> dict[str, Any]:
    """The same calls in effective TFLOP/s, each by its own work."""
    found: list[dict[str, Any]] = []
    for case in one["cases"]:
        timed = {case["case"]: harness.Timing(case["first_s"], tuple(case["seconds"]))}
        work = flops[case["case"]] / 1e12
        found += harness.group("", "", timed, work=work)["cases"]
    return {"what": one["what"], "unit": "effective TFLOP/s", "peer": "-", "cases": found}


def timed(
    what: str,
    cases: Mapping[str, Callable[..., Any]],
    data: tuple[Any, ...],
    work: Mapping[str, float],
    rounds: int,
) -> list[dict[str, Any]]:
    """Seconds beside dense attention, and effective rates. work: pairs of query and key of each case."""
    runs = {name: waits(f, *data) for name, f in cases.items()}
    one = harness.group(what, "s", harness.interleave(runs, rounds, warmup=WARMUP), peers=[DENSE])
    heads, i = data[0].shape[2:]
    return [one, rates(one, {name: 4 * work[name] * heads * i for name in cases})]


def parts(layer: Mapping[str, Any], data: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    """The parts of coreset attention of all heads, as calls, and dense attention of as many tokens."""
    import jax
    import jax.numpy as jnp

    from jaxrepro.ops import coreset as pooling
    from jaxrepro.ops.attention import attend_joint

    grid = grid_of(layer)
    n = grid.length
    q, k, v = (x[:, :n] for x in data[:3])
    text = data[3] if layer["text"] else None
    both = lambda q, k: (
        of_q := pooling.match(q, grid),
        of_q if layer["shared"] else pooling.match(k, grid),
    )
    pool = lambda q, k, v, of_q, of_k: tuple(
        pooling.pool(x, m, grid) for x, m in ((q, of_q), (k, of_k), (v, of_k))
    )
    matched = waits(both, q, k)
    of_q, of_k = matched()
    pooled = waits(pool, q, k, v, of_q, of_k)
    few = pooled()
    p = few[0].shape[1]
    joint = [jnp.concatenate([x, y[:, n:]], axis=1) for x, y in zip(few, data)]
    other = [
        jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(jax.random.split(jax.random.key(2), 3), joint)
    ]
    attend = lambda q, k, v: attend_joint(q, k, v, p, text)
    attended = waits(attend, *joint)
    o = attended()[:, :p]
    return {
        "match": matched,
        "pool": pooled,
        "attend": attended,
        "unpool": waits(lambda o, m: pooling.unpool(o, m, grid), o, of_q),
        SAME_LENGTH: waits(attend, *other),
    }


def layer_tables(
    shape: Mapping[str, Any], name: str, ok: set[str], rounds: int
) -> list[dict[str, Any]]:
    """Every table of a layer but the kernel's. ok: the branches whose numerics are right."""
    layer = shape["layers"][name]
    work = pairs(layer)
    cases = {kind: f for kind, f in branches(layer).items() if kind in ok}
    found = []
    for heads in shape["heads"]:
        heads = layer["heads"] if heads == "all" else heads
        data = inputs(shape, layer, heads)
        many = f"{heads} head{'s' * (heads > 1)}"
        what = f"{name}: attention, {data[0].shape[1]} rows, {many}"
        found += timed(what, cases, data, work, rounds)
    if found:
        split = harness.interleave(parts(layer, data), rounds, warmup=WARMUP)
        what = f"{name}: parts of coreset attention, {many}"
        found.append(harness.group(what, "s", split, peers=[SAME_LENGTH]))
    return found


def kernel_tables(
    shape: Mapping[str, Any], name: str, ok: set[str], rounds: int, notes: list[str]
) -> tuple[list[dict[str, Any]], bool]:
    """The Pallas kernel beside dense attention and window groups, variants whose numerics are right; whether the
    first of them is."""
    layer = shape["layers"][name]
    data = inputs(shape, layer, layer["heads"])
    every, work = branches(layer), pairs(layer)
    cases = {kind: every[kind] for kind in (DENSE, "sliding") if kind in ok}
    for blocks in shape["kernels"]:
        case = KERNEL + ("" if blocks is None else f", key blocks {blocks}")
        f = kernel(layer, blocks)
        good = True
        for valid in dict.fromkeys([layer["valid"], *(shape["valid"] if layer["text"] else [])]):
            one = layer | {"valid": valid}
            some = inputs(shape, one, min(2, layer["heads"]))
            what = f"{name}, {case}{told(one)}"
            good &= right(what, errors(one, "sliding", some, waits(f, *some)()), notes)
        if good:
            cases[case], work[case] = f, work["sliding"]
    what = f"{name}: the kernel, {layer['heads']} heads"
    return timed(what, cases, data, work, rounds), KERNEL in cases


def bench(
    shape: Mapping[str, Any], rounds: int, save: Callable[[harness.Report], None] | None = None
) -> harness.Report:
    """Seconds and effective rates of attention and of a step; save(report) whenever a table is done."""
    import jax

    from jaxrepro.ops.sliding import has_hopper

    report = harness.Report([])
    groups, notes = report.groups, report.notes
    memory: dict[str, float] = {}
    on_gpu = jax.default_backend() == "gpu"

    def keep(tables=()):
        groups.extend(tables)
        if save is not None:
            save(report)

    def step(kernel):
        for tables in step_tables(shape, rounds, notes, memory, kernel=kernel):
            keep(tables)
            notes.extend(device_state("a step"))

    if jax.default_backend() == "cpu":
        notes.append(
            "trials on a CPU, so small that routing costs more than it saves: nothing is claimed about speed, only that "
            "everything runs"
        )
    notes += [RATES, LIMITS]
    ok = {name: numerics(shape, name, notes) for name in shape["layers"]}
    keep()
    for name in shape["layers"]:
        if shape["heads"]:
            keep(layer_tables(shape, name, ok[name], rounds))
            notes.extend(device_state(name))
    if shape["step"]:
        step("auto")
    if not has_hopper():
        notes.append("the Pallas kernel needs a Hopper GPU: not run")
    else:
        for name in shape["layers"]:
            if shape["kernels"]:
                tables, fine = kernel_tables(shape, name, ok[name], rounds, notes)
                keep(tables)
                if fine and shape["step"] and shape["step"]["of"] == name:
                    step("mosaic")
    if on_gpu:
        notes.extend(goals(groups, memory))
        if not shape["step"]:
            notes.append(
                "a step, PAB, memory and programs: python -m jaxrepro.bench vorta --shape=step"
            )
    else:
        of = SHAPES["video"]["layers"], [SHAPES["step"]["step"]["of"]]
        notes.extend(unmeasured(*of))
    return report
