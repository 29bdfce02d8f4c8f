"""Errors of branches, measured in a model; the table that they give."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vorta_walks import drawn, normal

from jaxrepro.config import UserError
from jaxrepro.methods.vorta import objective, router, routes, search
from jaxrepro.methods.vorta.objective import Batch
from jaxrepro.methods.vorta.routes import Routes
from jaxrepro.models import video_dit
from jaxrepro.models.video_dit import Condition
from jaxrepro.ops import routed, sliding
from jaxrepro.ops.video_grid import VideoGrid

WAN = replace(video_dit.PRESETS["wan_tiny"], layers=5, ffn=8)  # five: one program, run five times
GRID = VideoGrid((2, 4, 4), (2, 2, 2), window=(1, 1, 1), bucket=(2, 2, 2))
TIMES = np.array([900.0, 200.0], np.float32)


def test_errors_are_those_of_each_head_in_the_dense_model():
    params, branches = drawn(WAN), router.branches(WAN)
    x, noise, given_ = normal(1, 2, 4, 2, 8, 8), normal(2, 2, 4, 2, 8, 8), normal(3, 2, 5, 12)
    given_ = Condition(given_)
    found = search.errors(
        params, WAN, x, noise, given_, jnp.asarray(TIMES), grid=GRID, branches=branches
    )
    assert found.shape == (2, 5, 2, 3) and not found[..., 0].any()
    kept = {}

    @jax.jit
    def dense(t):
        """The dense model, whose blocks tell the outputs of all branches."""

        def attend(q, k, v, layer, aux):
            outputs = [f(q, k, v, GRID) for f in branches]
            jax.debug.callback(lambda i, o: kept.update({int(i): np.asarray(o)}), layer, outputs)
            return outputs[0]

        noisy = objective.noisy(Batch(x, noise, t, given_))
        return video_dit.apply(params, WAN, noisy, t, given_, attend=attend, layout=GRID)

    for step, t in enumerate(TIMES):
        jax.block_until_ready(dense(jnp.full(2, t)))
        jax.effects_barrier()
        assert len(kept) == 5
        for layer, o in kept.items():
            want = np.square(o - o[0]).mean((1, 2, 4))  # (branch, heads)
            np.testing.assert_allclose(found[step, layer], want.T, rtol=1e-4, atol=1e-9)
        kept.clear()


def test_the_branches_of_windows_are_full_attention_and_two_windows():
    grid = VideoGrid((1, 10, 10), (1, 2, 2), window=(1, 1, 1), bucket=(1, 2, 2))
    q, k, v = (normal(i, 1, 100, 1, 8) for i in range(3))
    full, large, small = search.windows(grid)
    assert full is routed.full and search.windows(grid)[1] is large  # one program for equal grids
    wide = VideoGrid((1, 10, 10), (1, 2, 2), window=(3, 3, 3), bucket=(1, 2, 2))
    assert search.wide(grid) == wide and wide.flops[2] == pytest.approx(9 / 25)
    np.testing.assert_array_equal(wide.order, grid.order)
    cases = (large, grid), (sliding.sliding_reference, wide)
    cases += (small, grid), (sliding.sliding_reference, grid)
    one, other, third, last = jax.jit(lambda: [f(q, k, v, on) for f, on in cases])()
    np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_allclose(third, last, atol=1e-5)
    assert np.abs(one - third).max() > 0.01


def table(shape):
    return Routes(np.zeros(shape, np.int8), np.linspace(1000, 100, shape[0], dtype=np.float32), "x")


@given(st.integers(0, 999), st.sampled_from([0.25, 0.4, 0.55, 0.7, 1.0]))
@settings(max_examples=30, deadline=None)
def test_no_table_of_that_cost_has_less_error(seed, share):
    errors = np.random.default_rng(seed).uniform(size=(1, 1, 5, 3))
    errors[..., 0] = 0
    flops = (1.0, 0.25, 0.25)
    # costs of whole heads, as a router's table has
    wanted = 0.25 + 0.75 * round(5 * (share - 0.25) / 0.75) / 5
    found = routes.searched(table((1, 1, 5)), errors, flops=flops, cost=wanted)
    assert routes.fraction(found.table, flops) == pytest.approx(wanted)
    total = lambda rows: sum(errors[0, 0, h, j] for h, j in enumerate(rows))
    allowed = [
        total(rows)
        for rows in itertools.product(range(3), repeat=5)
        if np.take(flops, rows).mean() <= wanted + 1e-9
    ]
    assert total(found.table[0, 0]) == pytest.approx(min(allowed))


def test_a_cost_that_no_search_can_have_is_refused():
    errors = np.zeros((2, 1, 3, 3))
    errors[..., 1:] = 1
    with pytest.raises(UserError, match=r"the best branches cost 0\.2 to 1 of full attention, not 0\.1"):  # fmt: skip
        routes.searched(table((2, 1, 3)), errors, flops=(1.0, 0.25, 0.2), cost=0.1)
    with pytest.raises(UserError, match="errors of shape"):
        routes.searched(table((2, 1, 3)), errors[..., :2], flops=(1.0, 0.25, 0.2))
