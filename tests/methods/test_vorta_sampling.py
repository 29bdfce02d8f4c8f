"""Sampling with hard routes: one program, data decide; dense sampling, guidance, rows of their own, few steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_walk import walk
from vorta_walks import GRID, HUNYUAN, WAN, condition, drawn, noise

from jaxrepro.config import UserError
from jaxrepro.methods.vorta import objective, sampling
from jaxrepro.models import video_dit
from jaxrepro.models.video_dit import Condition
from jaxrepro.ops import flow, routed


def test_one_program_serves_all_tables_and_is_the_dense_model_and_the_mixture_of_one_gate():
    traced = []

    def counted(f):
        @functools.wraps(f)
        def call(*a, **k):
            traced.append(f.__name__)
            return f(*a, **k)

        return call

    branches = tuple(counted(f) for f in routed.BRANCHES)
    params, x, given, empty = drawn(WAN), noise(1), condition(WAN, 1), condition(WAN, 1, seed=7)
    run = functools.partial(
        sampling.sample, params, WAN, x, given, grid=GRID, empty=empty, branches=branches, chunk=1
    )
    zeros = np.zeros((3, WAN.layers, WAN.heads), int)
    plan = flow.unipc(steps=3, shift=5.0)
    dense = run(zeros, plan, scale=5.0)
    before = len(traced)
    assert before > 0
    late = zeros.copy()
    late[2, 0, 1] = 2  # one head of one block of the last step
    others = [
        run(late, plan, scale=5.0),
        run(zeros + 1, plan, scale=5.0),
        run(zeros, flow.unipc(steps=3, shift=3.0), scale=5.0),
        run(zeros, plan, scale=2.0),
    ]
    assert len(traced) == before  # no new trace, so no new compilation
    for other in others:
        assert jnp.abs(other - dense).max() > 1e-4

    def walked(attend_of):
        def field(x, t, i):
            x, t = (jnp.concatenate([a, a]) for a in (x, t))
            both, attend = flow.both(given, empty), attend_of(i)
            more = dict(attend=attend, layout=None if attend is video_dit.full else GRID)
            return flow.guide(video_dit.apply(params, WAN, x, t, both, **more), 5.0)

        return walk(field, x, plan)

    close = lambda a, b, to: np.testing.assert_allclose(a, b, atol=to * float(jnp.abs(b).max()))
    close(dense, jax.jit(lambda: walked(lambda i: video_dit.full))(), 3e-5)

    @jax.jit
    def soft(table):
        """The same by mixtures of all branches, whose gates are 0 and 1."""
        g = jax.nn.one_hot(jnp.stack([table, table], 1), 3)
        return walked(lambda i: objective.soft(g[i], GRID))

    # float32: a model's residual stream and its conditions have no more
    close(soft(jnp.asarray(late)), others[0], 2e-6)
    close(soft(jnp.asarray(zeros + 1)), others[1], 2e-6)


def test_each_row_has_its_own_route_and_text_length():
    params, plan = drawn(HUNYUAN), flow.euler(steps=4, shift=5.0, picks=flow.few(4, 2))
    x, c = noise(2), condition(HUNYUAN, 2)
    assert c.length.tolist() == [2, 3]
    table = np.random.default_rng(0).integers(0, 3, (2, 2, HUNYUAN.layers, HUNYUAN.heads))
    run = functools.partial(sampling.sample, params, HUNYUAN, plan=plan, grid=GRID, chunk=1)
    whole = run(x, c, table=table)
    for j in range(2):
        rows = jnp.array([j, j])
        twice = run(x[rows], jax.tree.map(lambda a: a[rows], c), table=table[:, rows])  # noqa: B023
        np.testing.assert_allclose(twice[0], whole[j], atol=3e-5 * float(jnp.abs(whole).max()))
    # the text beyond a row's length is never read
    padded = c._replace(text=c.text.at[0, 2:].set(jnp.nan))
    np.testing.assert_array_equal(run(x, padded, table=table), whole)


@pytest.mark.parametrize(
    "change, says",
    [
        (
            {"table": np.zeros((2, 1, 2), int)},
            r"the table has shape \(2, 1, 2\): 3 steps, 1 blocks",
        ),
        (
            {"table": np.full((3, 1, 2), 3)},
            "the table holds 3 to 3: branches are whole numbers, 0 to 2",
        ),
        ({"table": np.ones((3, 1, 2))}, "the table holds 1.0 to 1.0: branches are whole"),
        ({"grid": None}, "needs `grid`"),
        ({"scale": 5.0}, "needs both `empty`"),
        ({"empty": Condition(jnp.zeros((1, 3, 12)))}, "needs both `empty`"),
        ({"computes": np.ones(2, bool)}, r"computes has shape \(2,\): this sampling needs \(3,\)"),
        ({"order": np.zeros((3, 2), int)}, r"order has shape \(3, 2\)"),
        ({"order": np.zeros((3, 1, 2), int)}, "order must hold each of 2 heads once"),
        (
            {"computes": np.array([False, True, True])},
            r"computes is \[False, True, True\]: .* first True",
        ),
        ({"empty": Condition(jnp.zeros((1, 3, 12))), "scale": np.nan}, "the guidance is nan"),
        (
            {"empty": Condition(jnp.zeros((1, 2, 12))), "scale": 5.0},
            r"`empty` \(1, 2, 12\): pad both",
        ),
        ({"empty": Condition(jnp.zeros((2, 3, 12))), "scale": 5.0}, r"text has shape \(2, 3, 12\)"),
        (
            {"condition": condition(WAN, 2)},
            r"\(2, 3, 12\): 1 videos of this model need \(1, 3, 12\)",
        ),
        ({"condition": Condition(jnp.zeros((1, 3, 11)))}, r"shape \(1, 3, 11\)"),
        ({"noise": jnp.zeros((1, 5, 4, 4, 4))}, "latents of 5 channels: this model takes 4"),
        ({"chunk": 0}, "chunk=0 must be"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, says):
    arguments = {"table": np.zeros((3, 1, 2), int), "plan": flow.unipc(steps=3), "grid": GRID}
    arguments |= {"noise": noise(1), "condition": condition(WAN, 1)}
    with pytest.raises(UserError, match=says) as error:
        sampling.sample({}, WAN, **(arguments | change))
    assert "\n" not in str(error.value)


def test_text_longer_than_its_slots_is_refused_before_it_is_data():
    c = condition(HUNYUAN, 2)._replace(length=jnp.array([3, 4]))
    with pytest.raises(UserError, match=r"length is \[3, 4\]: the text has 3 tokens"):
        sampling.sample({}, HUNYUAN, noise(2), c, None, flow.euler(steps=2))


def test_a_grid_of_other_latents_is_refused():
    attend = sampling.hard(jnp.zeros((1, 2), int), GRID)
    q = jnp.zeros((1, 6, 2, 4))
    with pytest.raises(UserError, match=r"grid is \(4, 2, 2\), the latents have \(1, 2, 3\)"):
        attend(q, q, q, 0, video_dit.Aux((1, 2, 3), 0))
