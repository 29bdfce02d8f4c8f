"""Pyramid Attention Broadcast: which steps compute, that the others leave the attention module out, sides apart."""

import functools
import inspect
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vorta_walks import GRID, HUNYUAN, WAN, condition, drawn, noise, tokens

from jaxrepro.config import UserError
from jaxrepro.methods.vorta import caching, router, sampling
from jaxrepro.models import video_dit
from jaxrepro.ops import flow


def test_the_steps_that_compute_by_hand():
    #    the first, too early, even;  then odd steps inside 100 .. 800 keep; 800 and 100 themselves do not
    t = [999.0, 937, 833, 800, 624, 500, 241, 172, 150, 100, 42, 7]
    want = [1, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1]
    assert caching.schedule(t).astype(int).tolist() == want
    assert caching.schedule(t, every=1).all()
    three = caching.schedule([700.0] * 7, every=3)
    assert three.astype(int).tolist() == [1, 0, 0, 1, 0, 0, 1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1000), min_size=1, max_size=8), st.integers(1, 4))
def test_the_schedule_is_the_rule_of_the_hook_call_by_call(t, every):
    cache, want = None, []
    for iteration, now in enumerate(t):
        inside = 100 < now < 800
        want.append(cache is None or not inside or iteration % every == 0)
        cache = "output"
    assert caching.schedule(t, every=every).tolist() == want


def test_every_second_step_of_the_middle_of_fifty_is_kept():
    t = flow.euler(steps=50, shift=5.0).t
    middle = (t > 100) & (t < 800)
    # 5 s / (1 + 4 s) lies inside for s = 1 - i / 50, i = 28 .. 48
    assert middle.sum() == 21 and (~caching.schedule(t)).sum() == 10


def test_a_cache_of_hunyuan_has_forty_gigabytes():
    cfg = video_dit.PRESETS["hunyuan"].__class__(dtype="bfloat16")
    size = functools.partial(caching.cache_bytes, cfg, rows=1, tokens=108_000 + 256)
    assert size() == 60 * 108_256 * 3072 * 2  # 60 modules of 665 MB
    made = jax.eval_shape(lambda: caching.empty(cfg, rows=1, tokens=108_256))
    assert made.size * made.dtype.itemsize == size()


@functools.cache
def one_step(cfg):
    """(velocity, cache) of rows of one route (layers, heads), jitted: every head by all branches, of which one counts."""

    @jax.jit
    def run(params, x, t, c, computes, cache, route):
        def attend(q, k, v, layer, aux):
            o = [f(q, k, v, GRID, text=aux.length) for f in router.branches(cfg)]
            which = jnp.take(route, layer, axis=0)[:, None]
            return sum(jnp.where(which == j, one, 0) for j, one in enumerate(o))

        around = caching.broadcast(computes)
        more = dict(attend=attend, layout=GRID, around=around, state=cache)
        return video_dit.apply(params, cfg, x, t, c, **more)

    return run


@pytest.mark.parametrize(
    "cfg", [pytest.param(HUNYUAN, marks=pytest.mark.slow), WAN], ids=["hunyuan", "wan"]
)
def test_a_step_that_keeps_reads_nothing_of_the_attention_module(cfg):
    params, x, c, t = drawn(cfg), noise(1), condition(cfg, 1), jnp.array([500.0])
    cache = caching.empty(cfg, rows=1, tokens=tokens(cfg))
    run = functools.partial(one_step(cfg), route=jnp.zeros((cfg.layers, cfg.heads), int))
    v, kept = run(params, x, t, c, True, cache)
    plain = jax.jit(lambda p: video_dit.apply(p, cfg, x, t, c))(params)
    np.testing.assert_allclose(v, plain, atol=2e-5 * float(jnp.abs(plain).max()))

    def poisoned(keys, w):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        inside = any(
            f"/{name}/" in f"/{path}/" for name in ("q", "k", "v", "o", "q_norm", "k_norm")
        )
        mine = path.startswith(("double", "single", "layers")) and "/cross/" not in path
        return w * jnp.nan if inside and mine else w

    bad = jax.tree_util.tree_map_with_path(poisoned, params)
    again, same = run(bad, x, t, c, False, kept)
    np.testing.assert_array_equal(again, v)
    np.testing.assert_array_equal(same, kept)
    assert jnp.isnan(run(bad, x, t, c, True, kept)[0]).all()
    other, _ = run(params, noise(1, seed=8), t, c, False, kept)
    assert jnp.abs(other - v).max() > 1e-3  # what lies outside the module is computed


def test_sides_of_the_guidance_have_a_cache_each_and_one_route():
    """Routes, guidance and kept modules together, against each side alone and step by step."""
    cfg = replace(WAN, layers=2)  # in the first block the sides are still equal
    params, x, given, none = drawn(cfg), noise(1), condition(cfg, 1), condition(cfg, 1, seed=7)
    plan = flow.unipc(steps=3, shift=1.0)
    computes = caching.schedule(plan.t)
    assert computes.tolist() == [True, False, True]
    table = np.array([[[0, 2], [1, 2]], [[1, 1], [2, 2]], [[2, 1], [0, 1]]])
    run = functools.partial(sampling.sample, params, cfg, x, given, plan=plan, grid=GRID, chunk=1)
    run = functools.partial(run, empty=none, scale=5.0)
    found = run(table, computes=computes)
    state, caches = flow.start(plan, x), [caching.empty(cfg, rows=1, tokens=tokens(cfg))] * 2
    for i, compute in enumerate(computes):
        row, route = jax.tree.map(lambda a: jnp.asarray(a[i]), (plan, table))  # noqa: B023
        sides = [
            one_step(cfg)(params, state.x, row.t[None], c, bool(compute), cache, route)
            for c, cache in zip((given, none), caches)
        ]
        caches = [cache for _, cache in sides]
        state = flow.step(row, state, flow.guide(jnp.concatenate([v for v, _ in sides]), 5.0))
    np.testing.assert_allclose(found, state.x, atol=1e-5 * float(jnp.abs(state.x).max()))
    # the same program: nothing kept; another route in the step that keeps, and in the last
    assert jnp.abs(run(table, computes=np.ones(3, bool)) - found).max() > 1e-3
    for step, same in ((1, True), (2, False)):
        other = table.copy()
        other[step] = 0
        assert (jnp.abs(run(other, computes=computes) - found).max() < 1e-6) == same


@pytest.mark.parametrize(
    "change, says",
    [
        ({"t": [1001.0]}, r"t is \[1001.0\]: the times of the steps, each in 0 .. 1000"),
        ({"t": []}, "the times of the steps"),
        ({"t": [float("nan")]}, "the times of the steps"),
        ({"every": 0}, "every=0 must be a whole number of at least 1"),
        ({"every": 1.5}, "every=1.5 must be"),
        ({"every": float("nan")}, "every=nan must be"),
        ({"low": float("nan")}, "low must not exceed high"),
        ({"low": 900.0}, "times from 900.0 to 800.0 keep nothing"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(change, says):
    schedule = inspect.unwrap(caching.schedule)  # users run without type checks
    with pytest.raises(UserError, match=says):
        schedule(**({"t": [500.0]} | change))
