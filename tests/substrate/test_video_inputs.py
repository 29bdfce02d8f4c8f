"""What callers of the ops of videos may get wrong, as they meet it: without type checks, and one line each."""

from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.ops import checks, coreset, flow, routed
from jaxrepro.ops.sliding import sliding, sliding_reference
from jaxrepro.ops.video_grid import VideoGrid, tokens

GRID = VideoGrid((2, 2, 2), (1, 2, 2), (1, 1, 1), (2, 2, 1))
B, H, SLOTS = 2, 3, 2
Q = jnp.zeros((B, GRID.length + SLOTS, H, 4))
OPS = {
    "attention": routed.attention,
    "a route": partial(routed.attention, branch=jnp.zeros(H, int)),
    "routed": lambda q, k, v, grid, **more: routed.routed(q, k, v, jnp.zeros(H, int), grid, **more),
    "mix": lambda q, k, v, grid, **more: routed.mix(q, k, v, jnp.ones((B, H, 3)), grid, **more),
    "full": routed.full,
    "sliding": sliding,
    "reference": sliding_reference,
    "coreset": coreset.coreset,
    "merge": coreset.merge,
    "average": coreset.average,
}


@pytest.fixture(autouse=True)
def as_users_call():
    """Type checks would refuse much of this first, but users run without them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def refused(says, f, *arguments, **more):
    with pytest.raises(UserError, match=says) as error:
        f(*arguments, **more)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("traced", [False, True], ids=["known", "traced"])
def test_arrays_that_do_not_fit_together_are_refused_by_every_op(op, traced):
    def f(q, k, v, **more):
        call = lambda q, k, v: OPS[op](q, k, v, GRID, **more)
        return jax.eval_shape(call, q, k, v) if traced else call(q, k, v)

    refused("q, k and v have shapes", f, Q, Q[:, :-1], Q[:, :-1])  # a row short
    refused("q, k and v have shapes", f, Q, Q, Q[:, :-1])
    refused("q, k and v have shapes", f, Q, Q[:, :, :1], Q[:, :, :1])  # other heads
    refused("q, k and v have shapes", f, Q[0], Q[0], Q[0])
    refused("7 rows are fewer than the 8 tokens", f, *[Q[:, :7]] * 3)
    for text in (0, 1.0, [1, 1], jnp.ones(3, int), jnp.ones((2, 1), int), jnp.ones(B)):
        refused("valid text of each row must be an array of 2 whole", f, Q, Q, Q, text=text)
    refused("valid text must be 0 to 2", f, Q, Q, Q, text=jnp.array([1, 3]))
    refused("valid text must be 0 to 2", f, Q, Q, Q, text=np.array([-1, 0]))


@pytest.mark.parametrize(
    "route",
    [
        np.zeros(H - 1, int),
        np.zeros(H + 1, int),
        np.zeros(H),
        np.zeros((B + 1, H), int),
        np.zeros((B, H, 1), int),
        np.int32(1),
        np.ones(H, bool),
        [0, 1],
        [0.0, 1.0, 2.0],
    ],
    ids=str,
)
def test_a_route_that_is_no_branch_for_each_head_is_refused(route):
    says = "the route has shape .* whole numbers, one for each of 3 heads"
    refused(says, routed.attention, Q, Q, Q, GRID, branch=route)
    refused(says, routed.routed, Q, Q, Q, route, GRID)


def test_a_route_may_be_a_list():
    q = jax.random.normal(jax.random.key(0), Q.shape)
    got = routed.attention(q, q, q, GRID, branch=[0, 2, 1])
    np.testing.assert_array_equal(got, routed.attention(q, q, q, GRID, branch=jnp.array([0, 2, 1])))


@pytest.mark.parametrize("chunk", [0, -1, 1.5, True])
def test_a_chunk_that_is_no_number_of_heads_is_refused(chunk):
    for op in ("routed", "mix"):
        refused(
            "chunk=.* must be a whole number of at least 1", OPS[op], Q, Q, Q, GRID, chunk=chunk
        )


def test_gates_of_other_branches_are_refused():
    for gates in (jnp.ones((B, H, 2)), jnp.ones((B, H + 1, 3)), jnp.ones((1, H, 3))):
        refused(r"need \(2, 3, 3\)", routed.mix, Q, Q, Q, gates, GRID)


@pytest.mark.parametrize("cell", [(0, 1, 1), (2, 1), (1.0, 1, 1), None, 2])
def test_a_cell_that_is_no_box_is_refused(cell):
    refused("cell=.* must be three whole numbers", coreset.average, Q, Q, Q, GRID, cell=cell)


def test_a_kernel_is_a_name_and_stands_alone():
    refused("kernel='fast' must be one of auto", routed.attention, Q, Q, Q, GRID, kernel="fast")
    refused("kernel='fast' must be one of auto", sliding, Q, Q, Q, GRID, kernel="fast")
    alone = {"kernel": "groups", "branches": routed.BRANCHES}
    refused("beside `branches`", routed.attention, Q, Q, Q, GRID, **alone)


@pytest.mark.parametrize(
    "change",
    [{"rate": r} for r in ("0.5", None, float("nan"), 1, -0.1)]
    + [{name: x} for name in ("size", "tile", "window", "bucket") for x in (None, 5, (1, 1), (1, 0, 1), (1, 1, 2.0))],
    ids=str,
)  # fmt: skip
def test_a_grid_that_cannot_be_is_refused(change):
    arguments = {"size": (2, 2, 2), "tile": (1, 1, 1)} | change
    refused(f"{next(iter(change))}=.* must be", VideoGrid, **arguments)


def test_a_size_that_is_none_is_refused():
    refused("size=", VideoGrid.propose, None)
    refused("rate='0.5' must be", VideoGrid.propose, (2, 2, 2), rate="0.5")
    refused("frames=None must be", tokens, None, 720, 1280)


@pytest.mark.parametrize(
    ("says", "f", "more"),
    [
        ("steps=2.5 must be", flow.euler, {"steps": 2.5}),
        ("steps=0 must be", flow.unipc, {"steps": 0}),
        ("shift is nan", flow.euler, {"shift": float("nan")}),
        ("shift is '5'", flow.unipc, {"shift": "5"}),
        ("must be whole numbers that ascend", flow.euler, {"steps": 4, "picks": [0.5, 2]}),
        ("must be whole numbers that ascend", flow.euler, {"steps": 4, "picks": [2, 2]}),
        ("must be whole numbers that ascend", flow.euler, {"steps": 4, "picks": []}),
        ("n=2.5 must be", flow.few, {"steps": 4, "n": 2.5}),
        ("5 steps out of a grid of 4", flow.few, {"steps": 4, "n": 5}),
        ("the scale of the guidance is nan", flow.guide, {"v": Q, "scale": float("nan")}),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(says, f, more):
    refused(says, f, **more)


def test_what_is_traced_is_not_known():
    assert checks.known(None) is None
    assert checks.known(jnp.arange(2)).tolist() == [0, 1]
    seen = []
    jax.eval_shape(lambda x: seen.append(checks.known(x)), Q)
    assert seen == [None]
