"""Route tables: the rule, what damaged gates and times give, controls at equal cost, files read strictly."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vorta_walks import drawn

from jaxrepro.config import UserError
from jaxrepro.methods.vorta import router, routes
from jaxrepro.methods.vorta.routes import Routes
from jaxrepro.models import video_dit
from jaxrepro.ops import flow
from jaxrepro.ops.video_grid import VideoGrid

WAN = video_dit.PRESETS["wan_tiny"]
FLOPS = (1.0, 0.25, 0.2)


def table_of(seed=0, shape=(10, 4, 6), share=0.2):
    rng = np.random.default_rng(seed)
    table = rng.choice(3, shape, p=(share, (1 - share) / 2, (1 - share) / 2)).astype(np.int8)
    return Routes(table, np.linspace(1000, 100, shape[0], dtype=np.float32), "wan_tiny")


def test_the_largest_gate_wins_and_below_tau_full():
    g = [[[0.2, 0.5, 0.3], [0.1, 0.45, 0.45], [0.34, 0.33, 0.33], [0.0, 0.1, 0.9]]]
    assert routes.choose(g).tolist() == [[1, 1, 0, 2]]
    assert routes.choose(g, tau=0.5).tolist() == [[1, 0, 0, 2]]
    assert routes.choose(g, tau=0.7).tolist() == [[0, 0, 0, 2]]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1 / 3 - 1e-3))
def test_tau_up_to_a_third_changes_nothing(seed, tau):
    logits = np.random.default_rng(seed).normal(size=(2, 3, 4, 3)) * 3
    g = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_array_equal(routes.choose(g, tau=tau), routes.choose(g, tau=0.0))


def test_gates_that_are_no_numbers_are_refused_and_named():
    g = np.full((5, 4, 3, 3), 1 / 3)
    g[2, 1, 2, 0] = np.nan
    with pytest.raises(UserError, match="block 1, head 2 are not finite"):
        routes.choose(g)
    with pytest.raises(UserError, match=r"tau=1\.5"):
        routes.choose(np.full((1, 1, 3), 1 / 3), tau=1.5)


@pytest.mark.parametrize("t", [[1000.5, 3.0], [-1.0], [np.nan], [], [[1.0]]])
def test_times_outside_0_to_1000_are_refused(t):
    with pytest.raises(UserError, match=r"0 \.\. 1000|one row"):
        routes.make({}, {}, WAN, np.array(t), model="wan_tiny")


def drawn_routers():
    """Routers whose choices change in time."""
    rng = np.random.default_rng(1)
    draw = lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32)
    return jax.tree.map(draw, router.abstract(WAN))


def test_a_table_follows_the_router_at_the_times_of_the_sampler():
    params, r = drawn(WAN), drawn_routers()
    t = flow.euler(steps=6, shift=5.0).t
    made = routes.make(r, params, WAN, t, model="wan_tiny")
    g = router.gates(r, video_dit.time_embedding(params, WAN, jnp.asarray(t)))
    np.testing.assert_array_equal(made.table, np.asarray(g).argmax(-1))
    assert made.table.dtype == np.int8 and made.table.shape == (6, 2, 2)
    assert (made.table != made.table[0]).any()
    routes.fits(made, WAN, t)
    still = routes.make(r, params, WAN, t, model="wan_tiny", static=True).table
    np.testing.assert_array_equal(still, np.broadcast_to(np.asarray(g).mean(0).argmax(-1), still.shape))  # fmt: skip
    with pytest.raises(UserError, match="6 steps from t = 1000, the sampler takes 5 from"):
        routes.fits(made, WAN, t[1:])
    with pytest.raises(UserError, match="2 blocks of 2 heads, the model has 30 of 12"):
        routes.fits(made, video_dit.PRESETS["wan_1_3b"], t)


def test_the_cost_of_a_table_is_the_mean_of_its_branches():
    grid = VideoGrid((8, 6, 12), (4, 1, 2), bucket=(2, 2, 2))
    assert grid.flops == (1.0, 0.25, 0.25)
    assert routes.fraction(np.array([[[0, 1, 2, 2]]]), FLOPS) == pytest.approx(1.65 / 4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 0.9))
def test_random_controls_keep_the_number_of_full_heads_or_the_cost(seed, share):
    given_ = table_of(seed, share=share)
    full = (given_.table == 0).sum()
    for rest in (("coreset", "sliding"), ("sliding",)):
        same = routes.random(given_, seed=seed, rest=rest)
        assert (same.table == 0).sum() == full
        assert set(np.unique(same.table)) <= {0, *(router.BRANCHES.index(n) for n in rest)}
        equal = routes.random(given_, seed=seed, rest=rest, flops=FLOPS)
        wanted = routes.fraction(given_.table, FLOPS)
        assert abs(routes.fraction(equal.table, FLOPS) - wanted) <= 0.02 * wanted


def test_a_cost_that_a_control_cannot_have_is_refused():
    cheap = routes.uniform(table_of(), "sliding")
    with pytest.raises(UserError, match=r"heads of coreset cost 0\.25 to 1 of full attention, not 0\.2"):  # fmt: skip
        routes.random(cheap, seed=0, rest=("coreset",), flops=FLOPS)
    with pytest.raises(UserError, match="branch='dense'"):
        routes.uniform(cheap, "dense")


def test_a_search_gives_full_heads_where_they_save_most():
    start = table_of(shape=(1, 1, 4))
    errors = np.array([[[[0, 0.5, 0.1], [0, 0.2, 0.3], [0, 0.9, 0.8], [0, 0.05, 0.06]]]])
    at = lambda cost: routes.searched(start, errors, flops=(1.0, 0.25, 0.25), cost=cost).table
    assert at(1.75 / 4).tolist() == [[[2, 1, 0, 1]]]
    assert at(0.25).tolist() == [[[2, 1, 2, 1]]]


def test_a_tau_cannot_move_heads_to_a_branch_that_is_left_out():
    make = lambda tau: routes.make({}, {}, WAN, [500.0], model="x", without=("full",), tau=tau)
    with pytest.raises(
        UserError, match=r"tau=0\.6 moves heads to full attention, which is left out"
    ):
        make(0.6)
    with pytest.raises(UserError, match=r"gates of shape \(4, 6, 2\)"):
        routes.choose(np.full((4, 6, 2), 0.5))


def test_a_table_on_disk_reads_back_and_can_be_read_by_eye(tmp_path):
    given_ = table_of()
    routes.save(tmp_path / "routes.json", given_)
    again = routes.load(tmp_path / "routes.json")
    np.testing.assert_array_equal(again.table, given_.table)
    np.testing.assert_array_equal(again.t, given_.t)
    assert again.table.dtype == np.int8 and again.model == "wan_tiny"
    lines = json.loads((tmp_path / "routes.json").read_text())["routes"]
    assert lines[3][2] == "".join(map(str, given_.table[3, 2]))


BROKEN = {
    "format": ("soc", "no route table"),
    "version": (2, "its version is 2, this program reads 1"),
    "branches": (["full", "sliding", "coreset"], "ours full, coreset, sliding"),
    "model": (3, "model is no text"),
    "t": ([1000, float("nan")], "t is no list of times"),
    "routes": ([["03"], ["11"]], "routes are no lines of 0 to 2"),
}


@pytest.mark.parametrize("key", BROKEN)
def test_a_damaged_table_is_refused_in_one_line(key, tmp_path):
    path = tmp_path / "routes.json"
    routes.save(path, table_of(shape=(2, 1, 2)))
    found = json.loads(path.read_text())
    value, text = BROKEN[key]
    path.write_text(json.dumps(found | {key: value}))
    with pytest.raises(UserError, match=text) as error:
        routes.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda d: d.pop("t"), "missing: t, unexpected: "),
        (lambda d: d.update(more=1), "missing: none, unexpected: more"),
        (lambda d: d.update(routes=[["00"]]), "1 steps and 2 times"),
        (lambda d: d.update(routes=[["00"], ["000"]]), "differ in blocks or heads"),
        (lambda d: d.update(routes=[["00"], "11"]), "routes are no lines"),
        (lambda d: d.update(t=[True, 5]), "t is no list"),
    ],
)
def test_a_table_with_other_parts_is_refused(change, text, tmp_path):
    path = tmp_path / "routes.json"
    routes.save(path, table_of(shape=(2, 1, 2)))
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=text):
        routes.load(path)
