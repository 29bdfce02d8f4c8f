"""The StepGRPO loss against its closed forms, and its independence of padding and micro-batches."""

import functools

import jax
import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.methods.stepgrpo.objective import LOSSES, loss

B, N, T, BETA = 8, 4, 6, 0.04
STATIC = ("beta", "clip", "mode", "level", "dual", "delta", "max_length", "sampler_cap", "kl_kind")


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    lp, ref, old = (-rng.uniform(0.1, 2.0, (B, N, T)).astype(np.float32) for _ in range(3))
    r = rng.random((B, N))
    adv = (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-4)
    mask = np.arange(T) < rng.integers(1, T + 1, (B, N, 1))
    return lp, ref, old, np.float32(adv), mask


def _summed(*args, **kwargs):
    total, weight, aux = loss(*args, **kwargs)
    return total, (weight, aux)


_both = jax.jit(jax.value_and_grad(_summed, has_aux=True), static_argnames=STATIC)


def both(*args, **kwargs):
    """((sum, (weight, aux)), gradient), as numpy."""
    return jax.tree.map(np.asarray, _both(*args, **kwargs))


def jitted(*args, **kwargs):
    (total, (weight, aux)), _ = both(*args, **kwargs)
    return total, weight, aux


def gradient(*args, **kwargs):
    return both(*args, **kwargs)[1]


def mean(*args, **kwargs):
    total, weight, _ = jitted(*args, **kwargs)
    return total / weight


def test_loss_equals_the_papers_formula():
    lp, ref, _, adv, mask = (np.asarray(x, np.float64) for x in batch())
    k3 = np.exp(ref - lp) - (ref - lp) - 1
    token = -(adv[..., None] - BETA * k3)
    want = ((token * mask).sum(-1) / mask.sum(-1)).mean()
    lp, ref, _, adv, mask = batch()
    np.testing.assert_allclose(mean(lp, ref, adv, mask, beta=BETA), want, atol=1e-6)


def test_gradient_equals_the_closed_form():
    lp, ref, _, adv, mask = batch()
    got = gradient(lp, ref, adv, mask, beta=BETA)
    closed = -adv[..., None] + BETA * (1 - np.exp(ref - lp))
    np.testing.assert_allclose(got, closed * mask / mask.sum(-1, keepdims=True), atol=1e-6)


def test_value_and_kl_gradient_are_zero_at_the_reference():
    lp, _, _, adv, mask = batch()
    np.testing.assert_allclose(mean(lp, lp, adv, mask, beta=BETA), 0, atol=1e-6)
    np.testing.assert_array_equal(
        gradient(lp, lp, adv, mask, beta=BETA), gradient(lp, None, adv, mask, beta=0.0)
    )
    assert jitted(lp, lp, adv, mask, beta=BETA)[2]["kl"][0] == 0


@pytest.mark.parametrize(
    "mode, split", [("grpo", 2), ("grpo", 4), ("grpo", 8), ("dapo", 4), ("dr_grpo", 4)]
)
def test_micro_batches_add_to_the_same_gradient(mode, split):
    def one(lp, ref, adv, mask):
        kw = {"beta": BETA, "mode": mode, "max_length": T}
        (_, (weight, _)), grad = both(lp, ref, adv, mask, **kw)
        return grad, weight

    lp, ref, _, adv, mask = batch()
    mask = (
        mask & (np.arange(B) > 0)[:, None, None]
    )  # a filtered question: micro-batches of unequal weight
    args = lp, ref, adv, mask
    whole, weight = one(*args)
    cut = [one(*(x[i::split] for x in args)) for i in range(split)]
    got = np.zeros_like(lp)
    for i, (g, _) in enumerate(cut):
        got[i::split] = g
    np.testing.assert_allclose(got / sum(w for _, w in cut), whole / weight, atol=1e-7)


def test_tokens_after_the_eos_have_no_gradient_whatever_they_hold():
    lp, ref, old, adv, mask = batch()
    want = gradient(lp, ref, adv, mask, beta=BETA)
    assert not want[~mask].any() and want[mask].all()
    for junk in (np.nan, -np.inf, 1e9):
        a, b, c = (np.where(mask, x, np.float32(junk)) for x in (lp, ref, old))
        np.testing.assert_array_equal(gradient(a, b, adv, mask, beta=BETA), want)
        got = gradient(a, b, adv, mask, beta=BETA, old_lp=c, clip=(0.2, 0.2), level="sequence")
        assert np.isfinite(got).all()


def test_old_log_probs_equal_to_the_current_change_nothing():
    lp, ref, _, adv, mask = batch()
    want = gradient(lp, ref, adv, mask, beta=BETA), mean(lp, ref, adv, mask, beta=BETA)
    for kw in (
        {"old_lp": lp},
        {"old_lp": lp, "clip": (0.2, 0.28)},
        {"clip": (0.2, 0.2), "dual": 3.0},
    ):
        np.testing.assert_allclose(
            gradient(lp, ref, adv, mask, beta=BETA, **kw), want[0], atol=1e-7
        )
        np.testing.assert_allclose(mean(lp, ref, adv, mask, beta=BETA, **kw), want[1], atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_every_named_loss_is_finite_and_falls_along_its_gradient(name):
    lp, ref, old, adv, mask = batch()
    kw = {**LOSSES[name], "max_length": T, "beta": BETA}
    start = lp + 1e-4 * (old - lp)
    g = gradient(start, ref, adv, mask, old_lp=lp, **kw)
    before = mean(start, ref, adv, mask, old_lp=lp, **kw)
    after = mean(start - 1e-2 * g, ref, adv, mask, old_lp=lp, **kw)
    assert np.isfinite(before) and after < before


def test_sequence_level_gradient_is_shared_by_the_tokens():
    lp, _, _, adv, mask = batch()
    g = gradient(lp, None, adv, mask, beta=0.0, level="sequence")
    np.testing.assert_allclose(g, -adv[..., None] * mask / mask.sum(-1, keepdims=True), atol=1e-6)


def test_zero_advantage_without_kl_is_zero():
    lp, _, _, adv, mask = batch()
    assert not gradient(lp, None, np.zeros_like(adv), mask, beta=0.0).any()


def test_curves_are_sums_with_weights():
    lp, ref, old, adv, mask = batch()
    _, _, aux = jitted(
        lp,
        ref,
        adv,
        mask,
        beta=BETA,
        old_lp=old,
        clip=(0.2, 0.2),
        entropy=-lp,
        lp_sampler=old,
        sampler_cap=2.0,
    )
    lp, ref, old, adv, m = (np.asarray(x, np.float64) for x in batch())
    m = m.astype(bool)
    got = {k: float(s) / float(w) for k, (s, w) in aux.items()}
    gap, rho = np.abs(lp - old), np.exp(lp - old)
    a = np.broadcast_to(adv[..., None], lp.shape)
    want = {
        "kl": (np.exp(ref - lp) - (ref - lp) - 1)[m].mean(),
        "entropy": -lp[m].mean(),
        "completion_length": m.sum(-1).mean(),
        "sampler_gap": gap[m].mean(),
        "sampler_gap_max": np.where(m, gap, 0).max(-1).mean(),
        "clip_low": ((rho < 0.8) & (a < 0))[m].mean(),
        "clip_high": ((rho > 1.2) & (a > 0))[m].mean(),
    }
    assert got == pytest.approx(want, abs=1e-5)


def test_sampler_correction_weighs_the_policy_term_only():
    lp, ref, old, adv, mask = batch()
    w = np.minimum(np.exp(lp - old), 1.5)
    got = gradient(lp, ref, adv, mask, beta=BETA, lp_sampler=old, sampler_cap=1.5)
    closed = -adv[..., None] * w + BETA * (1 - np.exp(ref - lp))
    np.testing.assert_allclose(got, closed * mask / mask.sum(-1, keepdims=True), atol=1e-6)


def test_inconsistent_arguments_are_refused():
    lp, ref, _, adv, mask = batch()
    with pytest.raises(UserError, match="without reference"):
        _both(lp, None, adv, mask, beta=BETA)
    with pytest.raises(UserError, match="without lp_sampler"):
        _both(lp, ref, adv, mask, beta=BETA, sampler_cap=2.0)
    with pytest.raises(UserError, match="zero expected gradient"):
        _both(lp, ref, adv, mask, beta=BETA, kl_kind="k1")
