"""A step of a video model, dense and routed, and a whole video as a projection from it.

A table of routes is data, so that one program runs every route: the programs that jit holds are counted, not assumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxrepro.bench import harness
from jaxrepro.bench._video_numerics import (
    ALL_FULL,
    CHUNK,
    DENSE,
    KEPT,
    MIXED,
    OTHERS,
    PREDICTED,
    REUSED,
    WARMUP,
    WITH_PAB,
    grid_of,
)

STEPS, FEW = 50, 6  # of HunyuanVideo's sampler, and of a distilled model


class Model(NamedTuple):
    """A model with random weights, and what a step of it reads."""

    cfg: Any
    grid: Any
    text: int
    params: Any
    latents: Any
    step: Callable[..., Any]  # step(params, latents, **more of apply) -> velocity


def make(shape: Mapping[str, Any]) -> Model:
    """The model of a shape's step, in its dtype."""
    import jax
    import jax.numpy as jnp

    from jaxrepro.models import video_dit

    one = shape["step"]
    layer = shape["layers"][one["of"]]
    grid = grid_of(layer)
    cfg = dataclasses.replace(video_dit.PRESETS[one["preset"]], dtype=shape["dtype"])
    half = lambda tree: jax.tree.map(lambda x: x.astype(shape["dtype"]), tree)
    params = jax.jit(lambda key: half(video_dit.init(key, cfg)))(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 3)
    condition = video_dit.Condition(
        jax.random.normal(keys[1], (1, layer["text"], cfg.text)),
        jnp.full(1, layer["valid"]),
        jax.random.normal(keys[2], (1, cfg.pooled)),
        jnp.full(1, 6000.0) if cfg.guidance else None,
    )

    def step(params, latents, **more):
        return video_dit.apply(params, cfg, latents, jnp.full(1, 500.0), condition, **more)

    sides = (n * p for n, p in zip(grid.size, cfg.patch))
    latents = jax.random.normal(keys[0], (1, cfg.channels, *sides))
    return Model(cfg, grid, layer["text"], params, latents, step)


def by_route(model: Model, kernel: str) -> Callable[..., Any]:
    """step(params, latents, route (l, h), **more of apply) -> velocity, by the branch of each head."""
    from jaxrepro.methods.vorta import router, sampling

    branches = router.branches(model.cfg, kernel=kernel)

    def step(params, latents, route, **more):
        attend = sampling.hard(route, model.grid, chunk=CHUNK, branches=branches)
        return model.step(params, latents, attend=attend, layout=model.grid, **more)

    return step


def tables_of(model: Model, n: int) -> list[Any]:
    """n different tables (l, h), half of whose heads take coreset and half sliding attention."""
    import jax.numpy as jnp

    from jaxrepro.ops.routed import Branch

    kinds = np.asarray((Branch.coreset, Branch.sliding), np.int32)
    half = np.resize(kinds, (model.cfg.layers, model.cfg.heads))
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.permuted(half, axis=1)) for _ in range(n)]


def step_tables(
    shape: Mapping[str, Any],
    rounds: int,
    notes: list[str],
    memory: dict[str, float],
    *,
    kernel: str = "auto",
) -> Iterator[list[dict[str, Any]]]:
    """The tables of a step and of a video, then none once programs are counted.

    memory: gets the bytes of each program, by XLA's account. kernel: of sliding attention; with another than "auto"
    only dense and routed steps are timed.
    """
    import jax
    import jax.numpy as jnp

    model = make(shape)
    params, latents = model.params, model.latents
    routes = tables_of(model, shape["step"]["routes"])
    label = "" if kernel == "auto" else f", kernel {kernel}"
    programs: dict[str, Any] = {}

    def program(name, f, *arguments, donate=()):
        run = programs[name] = jax.jit(f, donate_argnums=donate)
        _account(f"{name}{label}", run.lower(*arguments).compile(), notes, memory)
        return run

    dense = program("dense", lambda p, x: model.step(p, x), params, latents)
    routed = program("routed", by_route(model, kernel), params, latents, routes[0])
    calls = iter(range(10**9))
    wait = jax.block_until_ready

    def mixture():
        wait(routed(params, latents, routes[next(calls) % len(routes)]))

    full = jnp.zeros_like(routes[0])
    cases = {DENSE: lambda: wait(dense(params, latents)), MIXED: mixture}
    if kernel == "auto":
        cases[ALL_FULL] = lambda: wait(routed(params, latents, full))
        cases[OTHERS] = _without_attention(model)
        cases |= _with_pab(model, routes[0], program)
    timings = harness.interleave(cases, rounds, warmup=WARMUP)
    name = shape["step"]["of"]
    found = [harness.group(f"{name}: a step of the model{label}", "s", timings, peers=[DENSE])]
    if kernel == "auto":
        found.append(projection(name, timings))
        notes.append(profile(timings))
    yield found
    while (done := next(calls)) < len(routes):  # what the timing has not called
        wait(routed(params, latents, routes[done]))
    counts = {name: run._cache_size() for name, run in programs.items()}
    memory["programs"] = max(memory.get("programs", 0), *counts.values())
    notes.append(
        f"programs compiled for steps of {len(routes)} different routes{label}: "
        + ", ".join(f"{name} {n}" for name, n in counts.items())
    )
    yield []


def _account(name, compiled, notes, memory):
    """Notes what a program holds, by XLA's account."""
    if (m := compiled.memory_analysis()) is None:
        return
    sizes = m.argument_size_in_bytes, m.output_size_in_bytes, m.temp_size_in_bytes
    memory[name] = float(sum(sizes) - m.alias_size_in_bytes)
    arguments, temporary = (
        f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"
        for n in (sizes[0], sizes[2])
    )
    notes.append(
        f"a step, {name}: {arguments} of arguments, {temporary} temporary, by XLA's account"
    )


def _with_pab(model, route, program) -> dict[str, Callable[[], Any]]:
    """Steps that compute and that reuse the outputs of attention (PAB)."""
    import jax
    import jax.numpy as jnp

    from jaxrepro.methods.vorta import caching

    routed = by_route(model, "auto")

    def step(params, latents, route, computes, cache):
        around = caching.broadcast(computes)
        return routed(params, latents, route, around=around, state=cache)

    tokens = model.grid.length + model.text
    held = {"cache": caching.empty(model.cfg, rows=1, tokens=tokens)}  # donated: it is large
    first = model.params, model.latents, route, jnp.asarray(True), held["cache"]
    run = program("with PAB", step, *first, donate=4)

    def call(computes):
        arguments = model.params, model.latents, route, jnp.asarray(computes)
        o, held["cache"] = run(*arguments, held["cache"])
        jax.block_until_ready((o, held["cache"]))

    return {KEPT: lambda: call(True), REUSED: lambda: call(False)}


def _without_attention(model: Model) -> Callable[[], Any]:
    """A step whose attention modules do not run: their outputs lie there, the same for every block."""
    import jax
    import jax.numpy as jnp

    sizes = 1, model.grid.length + model.text, model.cfg.d
    outputs = jax.random.normal(jax.random.key(2), sizes, model.cfg.dtype)

    def around(module, layer, outputs):
        cuts = np.cumsum([x.shape[1] for x in jax.eval_shape(module)])[:-1].tolist()
        return tuple(jnp.split(outputs, cuts, axis=1)), outputs

    run = jax.jit(lambda p, x, o: model.step(p, x, layout=model.grid, around=around, state=o)[0])
    return lambda: jax.block_until_ready(run(model.params, model.latents, outputs))


def reuse() -> int:
    """How many steps of a video reuse attention by the rule of PAB."""
    from jaxrepro.methods.vorta import caching
    from jaxrepro.ops import flow

    return int((~caching.schedule(flow.euler(steps=STEPS).t)).sum())


def profile(timings: Mapping[str, harness.Timing]) -> str:
    """A line: the share of attention modules in a step, by a step that leaves them out, and what PAB then saves.

    share = 1 - seconds without / seconds with;   speed-up = 1 / (1 - share x reused steps / steps)
    """
    median = lambda case: float(np.median(timings[case].seconds))
    dense, routed = (1 - median(OTHERS) / median(case) for case in (DENSE, MIXED))
    faster = 1 / (1 - routed * reuse() / STEPS)
    return (
        f"profile of a step: attention modules take {dense:.0%} of a dense one and {routed:.0%} of a routed one, by a "
        f"step that leaves them out; PAB reuses them in {reuse()} of {STEPS} steps, so that routed sampling should be "
        f"{faster:.2f} times as fast with it"
    )


def projection(name: str, timings: Mapping[str, harness.Timing]) -> dict[str, Any]:
    """Seconds of a whole video, by the seconds of its steps: dense, routed, with PAB, and in few steps.

    With PAB twice: by the steps that fill and read its cache, and as `profile` predicts it, where a step that reuses
    is one without attention modules and the others are as without a cache.
    """
    reused = reuse()
    many = lambda *parts: harness.Timing(
        0.0, tuple(np.sum([n * np.asarray(timings[case].seconds) for n, case in parts], axis=0))
    )
    cases = {
        DENSE: many((STEPS, DENSE)),
        "routed": many((STEPS, MIXED)),
        f"{WITH_PAB}, {reused} steps reused": many((STEPS - reused, KEPT), (reused, REUSED)),
        f"{PREDICTED}, {reused} steps reused": many((STEPS - reused, MIXED), (reused, OTHERS)),
        f"dense, {FEW} steps": many((FEW, DENSE)),
        f"routed, {FEW} steps": many((FEW, MIXED)),
    }
    what = f"{name}: a video of {STEPS} steps, or {FEW}, a projection from the table of one step"
    return harness.group(what, "s", cases, peers=[DENSE])
