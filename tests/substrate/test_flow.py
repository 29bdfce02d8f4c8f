"""Samplers of flow matching: grids, exactness on fields whose answer is known, guidance."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flow_walk import walk

from jaxrepro.config import UserError
from jaxrepro.ops import flow


def test_the_grid_of_unipc_is_that_of_wan():
    t = flow.unipc(steps=50, shift=5.0).t
    # diffusers 0.33.1, which the official code of Wan's router pins
    assert t[:3].tolist() == [999, 995, 991] and t[-3:].tolist() == [241, 172, 92]


def test_the_grid_of_euler_is_shifted_and_ends_at_zero():
    plan = flow.euler(steps=4, shift=7.0)
    s = np.array([1.0, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(plan.sigma, 7 * s / (1 + 6 * s), rtol=1e-6)
    np.testing.assert_allclose(plan.t, 1000 * plan.sigma, rtol=1e-6)
    assert plan.sigma[-1] + plan.change[-1] == 0


def test_six_steps_of_fifty_are_the_distilled_grid():
    picks = flow.few(50, 6)
    assert picks == (0, 8, 16, 25, 33, 41)
    full, some = flow.euler(steps=50, shift=17.0), flow.euler(steps=50, shift=17.0, picks=picks)
    np.testing.assert_array_equal(some.sigma, full.sigma[list(picks)])
    np.testing.assert_allclose(some.change.sum(), -1.0, rtol=1e-6)


PLANS = {
    "euler": functools.partial(flow.euler, shift=5.0),
    "unipc": functools.partial(flow.unipc, shift=5.0),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_a_model_that_knows_the_answer_ends_at_it(name, steps):
    """v = (x - x_0) / sigma predicts x_0 always, and every solver that is linear in m then ends at x_0."""
    plan = PLANS[name](steps=steps)
    x_0 = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
    sigma = jnp.asarray(plan.sigma)
    out = walk(lambda x, t, i: (x - x_0) / sigma[i], 5 * x_0 + 1, plan)
    np.testing.assert_allclose(out, x_0, atol=2e-5)


def by_formulas(field, x, steps, shift):
    """UniPC step by step in float64, from the paper's formulas: the differences of m written out, no tables."""
    s = 1 - np.linspace(1, 0.001, steps + 1)
    sigma = np.append((shift * s / (1 + (shift - 1) * s))[::-1][:-1], 0)
    lam = lambda j: np.log1p(-sigma[j]) - np.log(sigma[j])
    past, before = [], None  # (m, lam), newest last
    for i in range(steps):
        m = x - sigma[i] * field(x, int(1000 * sigma[i]))
        if i:
            (m_0, lam_0), h = past[-1], lam(i) - past[-1][1]
            b_h, ratio, a = np.expm1(-h), sigma[i] / sigma[i - 1], 1 - sigma[i]
            x = ratio * before - a * b_h * m_0
            if len(past) == 1:
                x = x - a * b_h * 0.5 * (m - m_0)
            else:
                r = (past[-2][1] - lam_0) / h
                phi_1 = (np.exp(-h) - 1) / -h - 1
                phi_2 = phi_1 / -h - 1 / 2
                rho = np.linalg.inv([[1, 1], [r, 1]]) @ [phi_1 / b_h, 2 * phi_2 / b_h]
                x = x - a * b_h * (rho[0] * (past[-2][0] - m_0) / r + rho[1] * (m - m_0))
        before = x
        past.append((m, lam(i)))
        if i == steps - 1:
            return m  # sigma 0: what is left is the last prediction of x_0
        h = lam(i + 1) - lam(i)
        a, b_h = 1 - sigma[i + 1], np.expm1(-h)
        x = sigma[i + 1] / sigma[i] * x - a * b_h * m
        if i:
            r = (past[-2][1] - lam(i)) / h
            x = x - a * b_h * 0.5 * (past[-2][0] - m) / r


@pytest.mark.parametrize("steps", [2, 3, 7, 50])
def test_unipc_by_tables_equals_its_formulas(steps):
    field = lambda x, t, of=np: of.sin(2 * x) + 0.5 * (t / 1000) * x
    x = np.linspace(-2, 2, 7)[:, None]
    ours = walk(
        lambda x, t, i: field(x, t[:, None], jnp),
        jnp.asarray(x, jnp.float32),
        flow.unipc(steps=steps),
    )
    np.testing.assert_allclose(ours, by_formulas(field, x, steps, 5.0), atol=2e-5)


def test_guidance_goes_from_the_empty_side_to_the_given_one_and_beyond():
    c = flow.both({"a": jnp.array([[2.0]])}, {"a": jnp.array([[1.0]])})
    v = jnp.array([[3.0], [3.0]]) * c["a"]  # given first
    assert v.tolist() == [[6.0], [3.0]]
    assert flow.guide(v, 5.0).tolist() == [[3.0 + 5 * (6.0 - 3.0)]]
    assert flow.guide(v, 1.0).tolist() == [[6.0]]


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: flow.euler(steps=0), "steps=0 must be"),
        (lambda: flow.unipc(shift=-1.0), "shift is -1.0"),
        (lambda: flow.unipc(shift=float("nan")), "shift is nan"),
        (lambda: flow.few(5, 6), "6 steps out of a grid of 5"),
        (lambda: flow.euler(steps=5, picks=[0, 5]), "that ascend within 0 .. 4"),
        (lambda: flow.euler(steps=5, picks=[2, 2]), "that ascend within 0 .. 4"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_in_one_line(make, says):
    with pytest.raises(UserError, match=says) as error:
        make()
    assert "\n" not in str(error.value)
