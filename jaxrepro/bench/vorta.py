"""Attention of videos and a step of a video model, dense against routed: VORTA, arXiv:2505.18809 (v2).

Shape "video", the default on a GPU, has the token grids, heads and windows of HunyuanVideo and Wan 2.1 (the tiles
of Wan 1.3B and of 81 frames are inferred: the paper names none), random inputs in bfloat16, and a step of
HunyuanVideo with random weights, on which time does not depend. Shape "small" is the same code at sizes of a CPU,
where it says nothing about speed. Results are kept as soon as a table exists, in this order:

    numerics    rows of three windows against float32, on this device; nothing wrong is timed
    a layer     dense attention, sliding by window groups, coreset attention; all heads, and one, four, eight
    its parts   of coreset attention: match, pool, attend, unpool
    a step      dense, routed with all heads full, and half coreset, half sliding, and with PAB
    a video     its 50 steps as a projection from one: dense, routed, with the steps that PAB reuses, six steps
    kernel      sliding by the Pallas kernel: numerics, then time. Last, since it may bring the process down

    effective FLOP/s = 4 pairs heads head_dim / seconds,   pairs = query and key tokens that the definition joins

so that work that is done twice or masked lowers the rate. The peer is dense attention in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxrepro.bench import harness
from jaxrepro.bench._video_numerics import DENSE, errors, grid_of, pairs, right

SMALL = {"size": [4, 6, 4], "tile": [2, 3, 2], "window": [1, 3, 1], "heads": 2}
SHAPES = {
    "small": {
        "dtype": "float32",
        "head_dim": 16,
        "layers": {
            "joint": SMALL | {"text": 8, "valid": 5, "shared": False},
            "alone": SMALL | {"text": 0, "valid": 0, "shared": True},
        },
        "heads": [1],
        "kernels": [],
        "step": {"preset": "hunyuan_tiny", "latents": [4, 4, 12, 8], "of": "joint", "routes": 50},
    },
    "video": {
        "dtype": "bfloat16",
        "head_dim": 128,
        "layers": {
            "HunyuanVideo": {
                "size": [30, 45, 80],
                "tile": [6, 9, 8],
                "window": [3, 3, 3],
                "heads": 24,
                "text": 256,
                "valid": 256,
                "shared": False,
            },
            "HunyuanVideo, window 5": {
                "size": [30, 45, 80],
                "tile": [6, 9, 8],
                "window": [5, 5, 5],
                "heads": 24,
                "text": 256,
                "valid": 256,
                "shared": False,
            },
            "Wan 14B": {
                "size": [20, 45, 80],
                "tile": [5, 9, 8],
                "window": [3, 3, 3],
                "heads": 40,
                "text": 0,
                "valid": 0,
                "shared": True,
            },
            "Wan 14B, 81 frames": {
                "size": [21, 45, 80],
                "tile": [7, 9, 8],
                "window": [3, 3, 3],
                "heads": 40,
                "text": 0,
                "valid": 0,
                "shared": True,
            },
            "Wan 1.3B": {
                "size": [20, 30, 52],
                "tile": [5, 6, 4],
                "window": [3, 3, 3],
                "heads": 12,
                "text": 0,
                "valid": 0,
                "shared": True,
            },
        },
        "heads": [1, 4, 8],
        "kernels": [None, [128, 64, 2]],  # sizes of key blocks; None: what the kernel chooses
        "step": {
            "preset": "hunyuan",
            "latents": [16, 30, 90, 160],
            "of": "HunyuanVideo",
            "routes": 10,
        },
    },
}
GPU_SHAPE = "video"
CHUNK = 4  # heads that a branch computes at once
MIXED = "routed, coreset and sliding"
KEPT, REUSED = "routed, with PAB, computing", "routed, with PAB, reusing"
STEPS, FEW = 50, 6  # of HunyuanVideo's sampler, and of a distilled model


def inputs(shape: Mapping[str, Any], layer: Mapping[str, Any], heads: int) -> tuple[Any, ...]:
    """Random q, k, v (1, s, heads, i) and the valid text (1,)."""
    import jax
    import jax.numpy as jnp

    sizes = (1, grid_of(layer).length + layer["text"], heads, shape["head_dim"])
    draw = jax.jit(lambda key: jax.random.normal(key, sizes, shape["dtype"]))
    q, k, v = (draw(key) for key in jax.random.split(jax.random.key(0), 3))
    return q, k, v, jnp.full(1, layer["valid"], jnp.int32)


def branches(layer: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """f(q, k, v, text) of each branch; the sparse ones as a model runs them, a few heads at a time."""
    import jax.numpy as jnp

    from jaxrepro.ops import routed
    from jaxrepro.ops.coreset import coreset

    grid = grid_of(layer)
    kinds = (routed.full, partial(coreset, shared=layer["shared"]), routed.sliding_groups)

    def all_heads(j, q, k, v, text):
        route = jnp.full(q.shape[2], int(j), jnp.int32)
        return routed.routed(q, k, v, route, grid, text=text, chunk=CHUNK, branches=kinds)

    return {
        DENSE: lambda q, k, v, text: routed.full(q, k, v, grid, text=text),
        "coreset": partial(all_heads, routed.Branch.coreset),
        "sliding": partial(all_heads, routed.Branch.sliding),
    }


def kernel(layer: Mapping[str, Any], blocks: list[int] | None) -> Callable[..., Any]:
    """f(q, k, v, text) of the Pallas kernel."""
    from jaxrepro.ops.sliding_mosaic import Blocks, sliding_mosaic

    blocks = None if blocks is None else Blocks(*blocks)
    return lambda q, k, v, text: sliding_mosaic(q, k, v, grid_of(layer), text=text, blocks=blocks)


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
    one = harness.group(what, "s", harness.interleave(runs, rounds, warmup=2), peers=[DENSE])
    heads, i = data[0].shape[2:]
    return [one, rates(one, {name: 4 * work[name] * heads * i for name in cases})]


def parts(layer: Mapping[str, Any], data: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    """The parts of coreset attention of all heads, as calls."""
    from jaxrepro.ops import coreset as pooling
    from jaxrepro.ops.attention import attend_joint

    grid = grid_of(layer)
    n = grid.length
    q, k, v = (x[:, :n] for x in data[:3])
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
    attend = waits(lambda q, k, v: attend_joint(q, k, v, few[0].shape[1]), *few)
    return {
        "match": matched,
        "pool": pooled,
        "attend": attend,
        "unpool": waits(lambda o, m: pooling.unpool(o, m, grid), attend(), of_q),
    }


def layer_tables(
    shape: Mapping[str, Any], name: str, ok: set[str], rounds: int
) -> list[dict[str, Any]]:
    """Every table of a layer but the kernel's. ok: the branches whose numerics are right."""
    layer = shape["layers"][name]
    work = pairs(layer)
    cases = {kind: f for kind, f in branches(layer).items() if kind in ok}
    found = []
    for heads in (*shape["heads"], layer["heads"]):
        data = inputs(shape, layer, heads)
        what = f"{name}: attention, {data[0].shape[1]} rows, {heads} heads"
        found += timed(what, cases, data, work, rounds)
    split = harness.interleave(parts(layer, data), rounds, warmup=2)
    found.append(harness.group(f"{name}: parts of coreset attention, {heads} heads", "s", split))
    return found


def step_table(shape: Mapping[str, Any], rounds: int, notes: list[str]) -> list[dict[str, Any]]:
    """One step of the model: dense, and routed by a table that is data, so that one program runs every route."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from jaxrepro.models import video_dit
    from jaxrepro.ops.routed import Branch, routed

    one = shape["step"]
    layer = shape["layers"][one["of"]]
    cfg = dataclasses.replace(video_dit.PRESETS[one["preset"]], dtype=shape["dtype"])
    half = lambda tree: jax.tree.map(lambda x: x.astype(shape["dtype"]), tree)
    params = jax.jit(lambda key: half(video_dit.init(key, cfg)))(jax.random.key(0))
    grid = grid_of(layer)
    keys = jax.random.split(jax.random.key(1), 3)
    latents = jax.random.normal(keys[0], (1, *one["latents"]))
    condition = video_dit.Condition(
        jax.random.normal(keys[1], (1, layer["text"], cfg.text)),
        jnp.full(1, layer["valid"]),
        jax.random.normal(keys[2], (1, cfg.pooled)),
        jnp.full(1, 6000.0) if cfg.guidance else None,
    )
    t = jnp.full(1, 500.0)

    def dense(params, latents, route):
        return video_dit.apply(params, cfg, latents, t, condition)

    def by_route(params, latents, route, **more):
        def attend(q, k, v, layer, aux):
            return routed(q, k, v, route[layer], grid, text=aux.length, chunk=CHUNK)

        return video_dit.apply(
            params, cfg, latents, t, condition, attend=attend, layout=grid, **more
        )

    table = lambda *kinds: np.resize(np.asarray(kinds, np.int32), (cfg.layers, cfg.heads))
    mixed = table(Branch.coreset, Branch.sliding)
    rng = np.random.default_rng(0)
    shuffled = [jnp.asarray(rng.permuted(mixed, axis=1)) for _ in range(one["routes"])]

    programs = []

    def compiled(name, f, *arguments, donate=()):
        run = jax.jit(f, donate_argnums=donate).lower(*arguments).compile()
        programs.append(name)
        if (memory := run.memory_analysis()) is not None:
            notes.append(
                f"a step, {name}: {memory.argument_size_in_bytes / 2**30:.2f} GiB of arguments, "
                f"{memory.temp_size_in_bytes / 2**30:.2f} GiB temporary, by XLA's account"
            )
        return run

    first = params, latents, shuffled[0]
    runs = {
        "dense": compiled("dense", dense, *first),
        "routed": compiled("routed", by_route, *first),
    }
    state = {"n": 0}

    def mixture():
        state["n"] += 1
        return runs["routed"](params, latents, shuffled[state["n"] % len(shuffled)])

    full = jnp.asarray(table(Branch.full))
    cases = {
        DENSE: lambda: jax.block_until_ready(runs["dense"](*first)),
        "routed, all heads full": lambda: jax.block_until_ready(
            runs["routed"](params, latents, full)
        ),
        MIXED: lambda: jax.block_until_ready(mixture()),
    }
    for route in shuffled:
        jax.block_until_ready(runs["routed"](params, latents, route))
    cases |= _kept(cfg, params, latents, shuffled[0], layer["text"], by_route, compiled)
    notes.append(
        f"compiled for a step: {len(programs)} programs ({', '.join(programs)}); the routed one ran "
        f"{len(shuffled)} different routes, and a program compiled beforehand cannot recompile"
    )
    timings = harness.interleave(cases, rounds)
    return [
        harness.group(f"{one['of']}: a step of the model", "s", timings, peers=[DENSE]),
        projection(one["of"], timings),
    ]


def projection(name: str, timings: Mapping[str, harness.Timing]) -> dict[str, Any]:
    """Seconds of a whole video, by the seconds of its steps: dense, routed, with PAB, and in few steps."""
    from jaxrepro.methods.vorta import caching
    from jaxrepro.ops import flow

    computes = caching.schedule(flow.euler(steps=STEPS).t)
    reused = int((~computes).sum())
    many = lambda *parts: harness.Timing(
        0.0, tuple(np.sum([n * np.asarray(timings[case].seconds) for n, case in parts], axis=0))
    )
    cases = {
        DENSE: many((STEPS, DENSE)),
        "routed": many((STEPS, MIXED)),
        f"routed, with PAB, {reused} steps reused": many((STEPS - reused, KEPT), (reused, REUSED)),
        f"dense, {FEW} steps": many((FEW, DENSE)),
        f"routed, {FEW} steps": many((FEW, MIXED)),
    }
    what = f"{name}: {STEPS} steps, a projection from the table of one step"
    return harness.group(what, "s", cases, peers=[DENSE])


def _kept(cfg, params, latents, route, text, by_route, compiled) -> dict[str, Callable[[], Any]]:
    """Steps that compute and that reuse the outputs of attention (PAB)."""
    import jax
    import jax.numpy as jnp

    from jaxrepro.methods.vorta import caching

    def step(params, latents, route, computes, cache):
        around = caching.broadcast(computes)
        return by_route(params, latents, route, around=around, state=cache)

    video = int(np.prod(latents.shape[2:])) // int(np.prod(cfg.patch))
    held = {"cache": caching.empty(cfg, rows=1, tokens=video + text)}  # donated: it is large
    first = params, latents, route, jnp.asarray(True), held["cache"]
    run = compiled("with PAB", step, *first, donate=4)

    def call(computes):
        o, held["cache"] = run(params, latents, route, jnp.asarray(computes), held["cache"])
        jax.block_until_ready((o, held["cache"]))

    return {
        KEPT: lambda: call(True),
        REUSED: lambda: call(False),
    }


def kernel_tables(
    shape: Mapping[str, Any], name: str, rounds: int, notes: list[str]
) -> list[dict[str, Any]]:
    """The Pallas kernel beside dense attention and window groups; only variants whose numerics are right."""
    layer = shape["layers"][name]
    data = inputs(shape, layer, layer["heads"])
    every, work = branches(layer), pairs(layer)
    cases = {kind: every[kind] for kind in (DENSE, "sliding")}
    for blocks in shape["kernels"]:
        case = "sliding, kernel" + ("" if blocks is None else f", key blocks {blocks}")
        f = kernel(layer, blocks)
        o = waits(f, *data)()
        if right(f"{name}, {case}", errors(layer, "sliding", data, o), notes):
            cases[case], work[case] = f, work["sliding"]
    return timed(f"{name}: the kernel, {layer['heads']} heads", cases, data, work, rounds)


def has_hopper() -> bool:
    """Whether the kernel's device is here."""
    import jax

    device = jax.local_devices()[0]
    return device.platform == "gpu" and str(getattr(device, "compute_capability", "")).startswith(
        "9."
    )


def bench(
    shape: Mapping[str, Any], rounds: int, save: Callable[[harness.Report], None] | None = None
) -> harness.Report:
    """Seconds and effective rates of attention and of a step; save(report) whenever a table is done."""
    import jax

    report = harness.Report([])
    groups, notes = report.groups, report.notes

    def keep(tables=()):
        groups.extend(tables)
        if save is not None:
            save(report)

    if jax.default_backend() == "cpu":
        notes.append("sizes of a CPU: nothing is claimed about speed, only that everything runs")
    ok: dict[str, set[str]] = {}
    for name, layer in shape["layers"].items():
        data = inputs(shape, layer, min(2, layer["heads"]))
        ok[name] = {
            kind
            for kind, f in branches(layer).items()
            if right(f"{name}, {kind}", errors(layer, kind, data, waits(f, *data)()), notes)
        }
    keep()
    for name in shape["layers"]:
        keep(layer_tables(shape, name, ok[name], rounds))
    if shape["step"]:
        keep(step_table(shape, rounds, notes))
    if not has_hopper():
        notes.append("the Pallas kernel needs a Hopper GPU: not run")
        return report
    for name in shape["layers"]:
        if shape["kernels"]:
            keep(kernel_tables(shape, name, rounds, notes))
    return report
