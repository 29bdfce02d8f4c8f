"""Heads spread over devices: many devices give what one gives, frames stay in order, loads are the least possible.

Equalities are float32, in which models run: an exchange moves numbers and adds none up, and float64 would say no more.
"""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vorta_walks import HUNYUAN, WAN, condition, drawn, noise, normal

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.methods.vorta import sampling, ulysses
from jaxrepro.models import video_dit
from jaxrepro.ops import routed
from jaxrepro.ops.video_grid import VideoGrid

# tiles of one frame whose windows are three frames: an interleaving of frames would show
FRAMES = VideoGrid((8, 1, 2), tile=(1, 1, 2), window=(3, 1, 1), bucket=(2, 1, 2))
HEADS = 8
SLOTS = 3  # an odd number of rows: how XLA splits even ones that a program returns, jax 0.7.2 has no name for


def same(have, want):
    np.testing.assert_allclose(have, want, atol=2e-5 * float(jnp.abs(want).max()))


def inputs(slots):
    return [normal(seed, 2, FRAMES.length + slots, HEADS, 4) for seed in range(3)]


ROUTE = jnp.array([0, 1, 2, 2, 1, 0, 2, 1])
ORDER = jnp.array([3, 0, 6, 1, 7, 2, 5, 4])


@pytest.mark.parametrize(
    "kind, slots", [("one route", 0), ("one route", SLOTS), ("a route a row", SLOTS)]
)
def test_hard_attention_on_eight_devices_is_that_of_one(kind, slots):
    text = jnp.array([1, 3]) if slots else None
    f = functools.partial(routed.routed, chunk=1)
    choice = ROUTE if kind == "one route" else jnp.stack([ROUTE, ROUTE[::-1]])
    shape = (1, 1, 8, 1) if kind == "one route" else (2, 1, 4, 1)
    want = jax.jit(lambda q, k, v: f(q, k, v, choice, FRAMES, text=text))(*inputs(slots))
    with jax.set_mesh(sharding.make_mesh(shape)):
        run = jax.jit(
            lambda q, k, v, order: ulysses.spread(f)(
                q, k, v, choice, FRAMES, text=text, order=order
            )
        )
        if kind == "one route":
            lowered = run.lower(*inputs(slots), ORDER).as_text()
            assert lowered.count("stablehlo.all_to_all") == 4  # q, k, v there, o back
        same(run(*inputs(slots), ORDER), want)
    if slots:
        assert not want[0, FRAMES.length + 1 :].any()


def test_the_mixture_on_eight_devices_is_that_of_one_and_so_is_its_gradient():
    gates, qkv = jax.nn.softmax(normal(4, 2, HEADS, 3)), inputs(SLOTS)

    def slopes(f):
        def total(gates, q, k, v):
            o = f(q, k, v, gates, FRAMES, text=jnp.array([1, 2]))
            return jnp.square(o).sum(), o

        return jax.jit(jax.grad(total, (0, 1), has_aux=True))

    want = slopes(routed.mix)(gates, *qkv)
    with jax.set_mesh(sharding.make_mesh((2, 1, 4, 1))):
        jax.tree.map(same, slopes(ulysses.spread(routed.mix))(gates, *qkv), want)
    assert not want[1][0, FRAMES.length + 1 :].any()


def test_frames_arrive_in_their_order_and_heads_at_their_device():
    """A device sees every token in the order of the model, and the choice of its own heads."""
    index = jnp.arange(FRAMES.length + SLOTS, dtype=jnp.float32)[None, :, None, None]
    q = jnp.broadcast_to(index + 100.0 * jnp.arange(HEADS)[:, None], (1, len(index[0]), HEADS, 1))

    def f(q, k, v, choice, grid, *, text=None):
        there = jnp.arange(q.shape[1], dtype=jnp.float32)[None, :, None, None]
        return (
            q - there - 100.0 * choice[:, None]
        )  # 0 if token j is at place j and its choice its own

    with jax.set_mesh(sharding.make_mesh((1, 1, 8, 1))):
        run = jax.jit(lambda q, o: ulysses.spread(f)(q, q, q, jnp.arange(HEADS), FRAMES, order=o))
        assert not run(q, ORDER).any()


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [HUNYUAN, WAN], ids=["hunyuan", "wan"])
def test_a_model_on_eight_devices_is_that_on_one(cfg):
    """Hard routes through HunyuanVideo, soft gates through Wan."""
    rope = {"rope": (2, 2, 2)} if cfg is HUNYUAN else {}
    cfg = replace(cfg, heads=HEADS, head_dim=6, **rope)
    grid = VideoGrid((4, 2, 2), tile=(1, 2, 2), window=(3, 1, 1), bucket=(2, 2, 1))
    params, x, c = drawn(cfg), noise(2), condition(cfg, 2)
    route = jnp.stack([ROUTE, ROUTE[::-1]])[: cfg.layers]
    gates = jax.nn.softmax(normal(4, 2, HEADS, 3))
    order = jnp.broadcast_to(ORDER, route.shape)

    def run(params, x):
        attend = sampling.hard(route, grid, order=order, chunk=1)
        if cfg.layers == 1:
            attend = lambda q, k, v, layer, aux: ulysses.spread(routed.mix)(
                q, k, v, gates, grid, text=aux.length
            )
        t = jnp.array([900.0, 300.0])
        return video_dit.apply(params, cfg, x, t, c, attend=attend, layout=grid)

    want = jax.jit(run)(params, x)
    mesh = sharding.make_mesh((2, 1, 4, 1))
    with jax.set_mesh(mesh):
        placed = sharding.place(params, sharding.shard_tree(video_dit.axes(cfg), params, mesh))
        same(jax.jit(lambda p, x: run(p, x))(placed, x), want)


def test_without_a_mesh_the_attention_is_left_as_it_is():
    f = lambda q, k, v, choice, grid, *, text=None: (q, choice)
    q = jnp.zeros((1, 16, 3, 1))  # three heads
    o, choice = ulysses.spread(f)(q, q, q, ROUTE[:3], FRAMES, order=ORDER[:3])
    assert o is q and choice.tolist() == ROUTE[:3].tolist()


@pytest.mark.parametrize(
    "shape, heads, grid, says",
    [
        (
            (1, 1, 8, 1),
            12,
            FRAMES,
            "mesh.sequence=8 does not divide the 12 attention heads; take 4",
        ),
        (
            (1, 1, 8, 1),
            8,
            VideoGrid((3, 2, 2), tile=(1, 2, 2)),
            "does not divide the 12 video tokens; take 4",
        ),
        ((1, 1, 4, 2), 8, FRAMES, "mesh.tensor=2 splits the heads .* set tensor to 1"),
    ],
)
def test_heads_and_tokens_that_do_not_divide_are_refused(shape, heads, grid, says):
    q = jnp.zeros((1, grid.length, heads, 2))
    with jax.set_mesh(sharding.make_mesh(shape)), pytest.raises(UserError, match=says):
        ulysses.spread(routed.routed)(q, q, q, jnp.zeros(heads, int), grid)


# Loads.

COSTS = (1.0, 0.25, 0.11)


def least(route, parts):
    """The smallest load of the fullest device, over all ways to deal the heads out."""
    share = len(route) // parts
    best = np.inf
    for way in set(itertools.permutations(route)):
        loads = np.asarray(COSTS)[list(way)].reshape(parts, share).sum(1)
        best = min(best, loads.max())
    return best


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=6, max_size=6), st.sampled_from([2, 3]))
def test_the_fullest_device_has_the_least_that_is_possible(route, parts):
    table = np.array(route)[None, None]
    order, load = ulysses.balance(table, parts=parts, costs=COSTS)
    assert sorted(order[0, 0]) == list(range(6))
    mean = np.asarray(COSTS)[route].sum() / parts
    np.testing.assert_allclose(load[0, 0] * mean, least(route, parts))
    as_it_is = np.arange(6)[None, None]
    assert load <= ulysses.imbalance(table, as_it_is, parts=parts, costs=COSTS) + 1e-9


def test_a_half_and_half_table_of_hunyuan_on_eight_devices():
    # 24 heads in threes: no device needs more than two coreset heads; sorted by branch some have three
    table = np.repeat([1, 2], 12)[None, None]
    order, load = ulysses.balance(table, parts=8, costs=COSTS)
    np.testing.assert_allclose(load, (2 * 0.25 + 0.11) / (1.5 * 0.25 + 1.5 * 0.11))
    before = ulysses.imbalance(table, np.arange(24)[None, None], parts=8, costs=COSTS)
    np.testing.assert_allclose(before, 0.75 / 0.54)
    hands = np.take_along_axis(table, order, -1).reshape(8, 3)
    assert max((h == 1).sum() for h in hands) == 2 and (hands == 1).sum() == 12


@pytest.mark.parametrize(
    "table, parts, costs, says",
    [
        (np.zeros((1, 2)), 2, COSTS, r"shape \(1, 2\): \(steps, blocks, heads\)"),
        (np.zeros((1, 1, 6)), 4, COSTS, "4 devices do not divide 6 heads"),
        (np.zeros((1, 1, 6)), 3, (1.0, 0.25), "three positive numbers"),
        (np.zeros((1, 1, 6)), 3, (1.0, 0.25, 0.0), "three positive numbers"),
        (
            np.full((1, 1, 6), 5),
            3,
            COSTS,
            "the table holds 5 to 5: branches are whole numbers, 0 to 2",
        ),
    ],
)
def test_a_table_that_cannot_be_dealt_is_refused(table, parts, costs, says):
    with pytest.raises(UserError, match=says):
        ulysses.balance(table.astype(int), parts=parts, costs=costs)
