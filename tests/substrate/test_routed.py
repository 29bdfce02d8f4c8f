"""Routed attention: each head gets its branch, one program serves all routes, and errors are one line."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import video_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxrepro
from jaxrepro.config import UserError
from jaxrepro.ops import sliding
from jaxrepro.ops.coreset import coreset
from jaxrepro.ops.routed import BRANCHES, Branch, attention, full, mix, routed
from jaxrepro.ops.sliding import sliding_groups
from jaxrepro.ops.video_grid import VideoGrid

GRID = VideoGrid((5, 4, 3), (2, 2, 2), bucket=(2, 2, 2))
HEADS = 6
TEXT = jnp.asarray([1, 2])
EXACT = 1e-12


@pytest.fixture(scope="module", autouse=True)
def float64():
    """Equal means equal to 1e-12 of numbers of size 1."""
    with oracle.float64():
        yield


@pytest.fixture(scope="module")
def qkv():
    return tuple(map(jnp.asarray, oracle.draw(0, GRID.size, b=2, h=HEADS, text=2)))


@pytest.fixture(scope="module")
def direct(qkv):
    """(branch, b, s, h, i): every branch for all heads."""
    return np.stack([jax.jit(partial(f, grid=GRID, text=TEXT))(*qkv) for f in BRANCHES])


def chosen(direct, route):
    return np.stack([direct[j, :, :, h] for h, j in enumerate(route)], axis=2)


def test_every_branch_is_its_definition_in_raster_order(qkv):
    rows = [np.asarray(x[0], np.float64) for x in qkv]
    everything = oracle.joint(np.ones((GRID.length,) * 2, bool), 2, 1)
    want = {
        "full": oracle.softmax_attention(*rows, everything),
        "sliding": oracle.sliding(*rows, GRID.size, GRID.tile, GRID.window, 1),
        "coreset": oracle.coreset(*rows, GRID.size, GRID.bucket, GRID.kept, 1),
    }
    assert list(Branch.__members__) == ["full", "coreset", "sliding"]
    assert [b.value for b in Branch] == [0, 1, 2]
    for name, branch in (("full", "full"), ("coreset", 1), ("sliding", Branch.sliding)):
        got = jax.jit(partial(attention, grid=GRID, branch=branch, text=TEXT))(*qkv)
        np.testing.assert_allclose(got[0], want[name], rtol=0, atol=EXACT)


def dense_reference(branch, q, k, v, valid, data):
    """A row in raster order: softmax over all pairs under a mask; of coreset attention, between the picks of data."""
    n = GRID.length
    if branch != "coreset":
        pairs = oracle.window_pairs(GRID.size, GRID.tile, GRID.window)
        see = oracle.joint(pairs if branch == "sliding" else np.ones((n, n), bool), 2, valid)
        return masked(q, k, v, see)
    heads = []
    for h in range(q.shape[1]):
        of_q, of_k = (
            oracle.picks(x[0, :n, h], GRID.size, GRID.bucket, GRID.kept) for x in data[:2]
        )
        words = [*range(n, n + valid)]
        rows, keys = ([t for c, m, _ in p for t in (c, *m)] + words for p in (of_q, of_k))
        source = np.zeros(n + 2, int)  # the row whose output each token takes
        source[rows] = np.arange(len(rows))
        for c, _, dropped in of_q:
            source[dropped] = source[c]
        one = slice(h, h + 1)
        see = np.ones((len(rows), len(keys)), bool)
        o = masked(q[np.array(rows), one], k[np.array(keys), one], v[np.array(keys), one], see)[
            source
        ]
        heads.append(jnp.where((np.arange(n + 2) < n + valid)[:, None, None], o, 0))
    return jnp.concatenate(heads, axis=1)


def masked(q, k, v, see):
    logits = jnp.where(see, jnp.einsum("thi,shi->hts", q, k) / np.sqrt(q.shape[-1]), -1e30)
    weights = jax.nn.softmax(logits) * see.any(1)[:, None]
    return jnp.einsum("hts,shi->thi", weights, v)


@pytest.mark.parametrize("branch", list(Branch.__members__))
def test_the_gradient_of_a_branch_is_that_of_its_dense_reference(branch):
    valid = 1
    data = oracle.draw(3, GRID.size, h=2, text=2)
    weight = oracle.draw(4, GRID.size, h=2, text=2)[0]
    qkv = tuple(map(jnp.asarray, data))
    ours = partial(attention, grid=GRID, branch=branch, text=jnp.asarray([valid]))
    loss = lambda f, *qkv: jnp.vdot(weight, f(*qkv).reshape(weight.shape))
    got = jax.jit(jax.grad(partial(loss, ours), argnums=(0, 1, 2)))(*qkv)
    dense = lambda *qkv: dense_reference(branch, *(x[0] for x in qkv), valid, data)
    want = jax.jit(jax.grad(partial(loss, dense), argnums=(0, 1, 2)))(*qkv)
    for a, b in zip(got, want):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=0, atol=EXACT)


def test_any_route_is_the_direct_computation_by_one_program(qkv, direct):
    traces = []

    def counted(f):
        def branch(q, k, v, grid, *, text):
            traces.append((f, q.shape[2]))
            return f(q, k, v, grid, text=text)

        return branch

    run = jax.jit(
        lambda route: routed(*qkv, route, GRID, text=TEXT, branches=tuple(map(counted, BRANCHES)))
    )

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, 2), min_size=HEADS, max_size=HEADS))
    def check(route):
        got = run(jnp.asarray(route))
        np.testing.assert_allclose(got, chosen(direct, route), rtol=0, atol=EXACT)

    for route in ([0] * 6, [1] * 6, [2] * 6, [0, 0, 1, 1, 2, 2], [2, 1, 1, 1, 1, 1]):
        got = run(jnp.asarray(route))
        np.testing.assert_allclose(got, chosen(direct, route), rtol=0, atol=EXACT)
    check()
    # a chunk of four heads and a single one for each branch, each traced once
    assert sorted(n for _, n in traces) == [1, 1, 1, 4, 4, 4]
    assert run._cache_size() == 1


@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_the_chunk_changes_nothing(qkv, direct, chunk):
    route = [2, 0, 2, 1, 2, 1]
    run = jax.jit(lambda route: routed(*qkv, route, GRID, text=TEXT, chunk=chunk))
    got = run(jnp.asarray(route))
    np.testing.assert_allclose(got, chosen(direct, route), rtol=0, atol=EXACT)


def test_rows_may_have_routes_of_their_own(qkv, direct):
    routes = [[2, 0, 2, 1, 2, 1], [1, 1, 0, 0, 2, 2]]
    got = jax.jit(lambda route: routed(*qkv, route, GRID, text=TEXT))(jnp.asarray(routes))
    for row, route in enumerate(routes):
        np.testing.assert_allclose(got[row], chosen(direct, route)[row], rtol=0, atol=EXACT)


def test_a_route_is_taken_by_the_library_call(qkv, direct):
    route = [2, 0, 2, 1, 2, 1]
    call = partial(attention, grid=GRID, branch=jnp.asarray(route), text=TEXT, order="layout")
    np.testing.assert_allclose(jax.jit(call)(*qkv), chosen(direct, route), rtol=0, atol=EXACT)


def test_the_kernel_of_sliding_heads_is_the_callers_choice(qkv, direct, monkeypatch):
    seen = []

    def counted(*arguments, **more):
        seen.append(more)
        return original(*arguments, **more)

    original = sliding.sliding_reference
    monkeypatch.setattr(sliding, "sliding_reference", counted)
    sliding.by_kernel.cache_clear()
    route = [2, 0, 2, 1, 2, 1]
    call = partial(attention, grid=GRID, text=TEXT, order="layout", kernel="reference")
    got = jax.jit(partial(call, branch=jnp.asarray(route)))(*qkv)
    sliding.by_kernel.cache_clear()
    assert seen
    np.testing.assert_allclose(got, chosen(direct, route), rtol=0, atol=EXACT)


def test_heads_that_change_places_change_places_in_the_output(qkv):
    route, turn = jnp.asarray([2, 0, 2, 1, 2, 1]), jnp.asarray([3, 5, 0, 1, 4, 2])
    run = jax.jit(lambda q, k, v, route: routed(q, k, v, route, GRID, text=TEXT))
    turned = run(*(x[:, :, turn] for x in qkv), route[turn])
    np.testing.assert_allclose(turned, run(*qkv, route)[:, :, turn], rtol=0, atol=EXACT)


def test_one_hot_gates_are_the_route(qkv, direct):
    route = [2, 0, 2, 1, 2, 1]
    gates = jnp.broadcast_to(jax.nn.one_hot(jnp.asarray(route), 3), (2, HEADS, 3))
    got = jax.jit(partial(mix, grid=GRID, text=TEXT))(*qkv, gates)
    np.testing.assert_allclose(got, chosen(direct, route), rtol=0, atol=EXACT)


def test_gates_weigh_the_branches_and_chunks_change_neither_value_nor_gradient(qkv, direct):
    gates = jax.nn.softmax(jax.random.normal(jax.random.key(1), (2, HEADS, 3)))
    want = np.einsum("bhj,jbshi->bshi", gates, direct)
    weight = jnp.asarray(oracle.draw(2, GRID.size, b=2, h=HEADS, text=2)[0])
    found = []
    for chunk in (None, 2):

        def loss(q, gates, chunk=chunk):
            o = mix(q, *qkv[1:], gates, GRID, text=TEXT, chunk=chunk)
            return jnp.vdot(weight, o), o

        step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        slopes, o = step(qkv[0], gates)
        np.testing.assert_allclose(o, want, rtol=0, atol=EXACT)
        found.append(slopes)
    for a, b in zip(*found):
        np.testing.assert_allclose(a, b, rtol=0, atol=EXACT)
    of_gates = np.einsum("bshi,jbshi->bhj", weight, direct)
    np.testing.assert_allclose(found[0][1], of_gates, rtol=0, atol=EXACT)


def test_a_branch_of_its_own_may_take_the_place_of_another(qkv, direct):
    shared = partial(coreset, shared=True)
    call = partial(
        attention, grid=GRID, branch="coreset", branches=(full, shared, sliding_groups), text=TEXT
    )
    got = jax.jit(partial(call, order="layout"))(*qkv)
    want = jax.jit(partial(shared, grid=GRID, text=TEXT))(*qkv)
    np.testing.assert_allclose(got, want, rtol=0, atol=EXACT)
    assert np.abs(got - direct[1]).max() > 0.01


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"branch": "dense"},
            r"branch='dense' must be one of full \(0\), coreset \(1\), sliding \(2\)",
        ),
        ({"branch": 3}, r"branch=3 must be one of"),
        (
            {"branch": jnp.asarray([0, 1, 2, 3, 0, 0])},
            r"route=\[0, 1, 2, 3, 0, 0\] must hold branches 0 to 2",
        ),
        ({"text": jnp.asarray([1, 3])}, r"text=\[1, 3\]: valid text must be 0 to 2"),
        ({"text": jnp.asarray([-1, 1])}, r"text=\[-1, 1\]: valid text must be 0 to 2"),
        ({"order": "tiles"}, r"order='tiles' must be"),
    ],
)
def test_bad_input_is_one_line(qkv, more, says):
    with pytest.raises(UserError, match=says) as error:
        attention(*qkv, GRID, **more)
    assert "\n" not in str(error.value)


def test_too_few_rows_and_a_chunk_that_does_not_divide_are_refused(qkv):
    with pytest.raises(UserError, match="59 rows are fewer than the 60 tokens of the grid"):
        attention(*(x[:, :59] for x in qkv), GRID)
    with pytest.raises(UserError, match="chunk=4 does not divide 6 heads"):
        mix(*qkv, jnp.ones((2, HEADS, 3)), GRID, text=TEXT, chunk=4)


def test_the_example_of_the_readme_runs():
    readme = Path(jaxrepro.__file__).parent / "methods/vorta/README.md"
    code, *_ = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    small = code.replace("frames=77, height=480, width=832", "frames=13, height=64, width=96")
    assert small != code

    def example():
        found = {}
        exec(small, found)
        return {name: found[name] for name in "qo"} | {"slope": found["slope"]}

    found = jax.jit(example)()  # one program instead of one for each operation
    for x in found.values():
        assert x.shape == (1, 4 * 4 * 6, 1, 64) and x.dtype == jnp.bfloat16
        assert np.isfinite(np.asarray(x, np.float32)).all()
    assert np.abs(np.asarray(found["slope"], np.float32)).max() > 1e-3
