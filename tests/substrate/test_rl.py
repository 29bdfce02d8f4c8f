"""The RL core: closed forms of advantages, KL estimators, surrogates, masks, returns, DAPO's rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.rl import advantages, dapo, masks, ppo, surrogates
from jaxrepro.rl.advantages import group_advantage
from jaxrepro.rl.kl import kl

PAPER = [[1.1, 0.1, 0.0, 1.0], [2.1, 1.05, 0.0, 2.0]]
A = jnp.asarray
whiten = jax.jit(ppo.whiten)
reinforce = jax.jit(ppo.reinforce_pp_advantage, static_argnames="beta")
returns = jax.jit(ppo.return_to_go, static_argnames="gamma")
advantage = jax.jit(group_advantage, static_argnames=("mode", "weights", "eps"))


def uniform(*shape):
    return np.random.default_rng(0).random(shape, np.float32)


rewards = st.lists(
    st.lists(st.sampled_from([0.0, 0.05, 0.1, 1.0, 1.1, 2.1]), min_size=4, max_size=4),
    min_size=3,
    max_size=3,
)


def test_grpo_advantage_equals_hand_computed_numbers():
    got = advantage(A(PAPER))
    np.testing.assert_allclose(
        got.value,
        [[0.94774, -0.77542, -0.94774, 0.77542], [0.82890, -0.24229, -1.31349, 0.72688]],
        atol=2e-5,
    )
    assert not got.zero_std.any() and got.frac_zero_std == 0


@pytest.mark.parametrize(
    "mode, m", [(mode, 5) for mode in advantages.MODES] + [("grpo", m) for m in (2, 3, 6)]
)
def test_constant_group_is_exactly_zero(mode, m):
    reward = np.repeat(np.float32([[0.1], [1.05], [2.1], [0.7]]), m, 1)
    reward[3, 0] = 0.2
    got = advantage(A(reward), mode=mode)
    assert (got.value[:3] == 0).all() and (got.value[3] != 0).any()
    assert got.zero_std.tolist() == [True, True, True, False] and got.frac_zero_std == 0.75


@settings(max_examples=25, deadline=None)
@given(rewards, st.sampled_from(advantages.MODES), st.floats(-3, 3))
def test_advantages_sum_to_zero_and_ignore_a_constant(r, mode, shift):
    r = np.float32(r)
    got = np.asarray(advantage(A(r), mode=mode).value)
    np.testing.assert_allclose(got.sum(1), 0, atol=2e-4)
    np.testing.assert_allclose(advantage(A(r + np.float32(shift)), mode=mode).value, got, atol=1e-3)


@pytest.mark.parametrize("mode", advantages.MODES)
def test_shuffling_groups_and_samples_permutes_advantages(mode):
    r = uniform(4, 5)
    rows, cols = [2, 0, 3, 1], [4, 1, 0, 3, 2]
    want = np.asarray(advantage(A(r), mode=mode).value)[rows][:, cols]
    np.testing.assert_allclose(advantage(A(r[rows][:, cols]), mode=mode).value, want, atol=1e-5)


def test_each_mode_equals_its_definition():
    r = np.asarray(PAPER)
    centred = r - r.mean(1, keepdims=True)
    np.testing.assert_allclose(advantage(A(PAPER), mode="dr_grpo").value, centred, atol=1e-6)
    np.testing.assert_allclose(
        advantage(A(PAPER), mode="batch_std").value, centred / (r.std(ddof=1) + 1e-4), atol=1e-5
    )
    others = (r.sum(1, keepdims=True) - r) / 3
    np.testing.assert_allclose(advantage(A(PAPER), mode="rloo").value, r - others, atol=1e-6)


def test_gdpo_normalises_each_part_before_the_weighted_sum():
    r = uniform(3, 4, 2).astype(np.float64)
    z = (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-4)
    x = z @ [1.0, 0.5]
    want = (x - x.mean()) / (x.std(ddof=1) + 1e-4)
    got = advantage(A(r, jnp.float32), mode="gdpo", weights=(1.0, 0.5)).value
    np.testing.assert_allclose(got, want, atol=1e-4)
    same = advantage(A(r, jnp.float32), weights=(1.0, 0.5)).value
    x = r @ [1.0, 0.5]
    x = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(same, x, atol=1e-4)


@pytest.mark.parametrize("mode", advantages.MODES)
@pytest.mark.parametrize("hole", [np.nan, np.inf, 99.0])
def test_unscorable_samples_are_left_out_of_the_baseline(mode, hole):
    r = A([[1.0, 0.0, hole, 0.3], [0.2, 0.9, 0.4, 0.0]])
    keep = np.ones((2, 4), bool)
    keep[0, 2] = hole != 99.0
    got = np.asarray(advantage(r, A(keep), mode=mode).value)
    assert got[0, 2] == 0 and np.isfinite(got).all()
    kept = np.array([1.0, 0.0, 0.3])
    want = kept - kept.mean()
    want = {"grpo": want / (kept.std(ddof=1) + 1e-4), "dr_grpo": want, "rloo": 1.5 * want}.get(mode)
    if want is not None:
        np.testing.assert_allclose(got[0, [0, 1, 3]], want, atol=1e-6)


def test_group_with_one_scorable_sample_has_no_gradient():
    keep = A([[True, False, False], [False, False, False], [True, True, True]])
    got = advantage(A([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), keep)
    assert (got.value[:2] == 0).all() and got.zero_std.tolist() == [True, True, False]


def test_scored_marks_none_nan_and_infinity():
    value, mask = advantages.scored([[1.0, None], [float("nan"), float("inf")], [0.5, 0.0]])
    assert value.tolist() == [[1.0, 0.0], [0.0, 0.0], [0.5, 0.0]]
    assert mask.tolist() == [[True, False], [False, False], [True, True]]
    with pytest.raises(UserError, match="same number"):
        advantages.scored([[1.0], [1.0, 0.0]])


def test_advantage_refuses_single_samples_and_unknown_modes():
    with pytest.raises(ValueError, match="group size is 1"):
        group_advantage(jnp.ones((3, 1)))
    with pytest.raises(UserError, match="dr_grpo"):
        group_advantage(jnp.ones((3, 2)), mode="drgrpo")
    with pytest.raises(UserError, match="3 reward weights for 2"):
        group_advantage(jnp.ones((3, 2, 2)), weights=(1.0, 1.0, 1.0))


# ---- KL


def test_kl_estimators_equal_their_formulas():
    lp, ref = A([-1.0, -2.0, -0.5]), A([-1.5, -1.0, -0.5])
    d = np.asarray(lp - ref)
    np.testing.assert_allclose(kl(lp, ref, kind="k1"), d)
    np.testing.assert_allclose(kl(lp, ref, kind="k2"), d**2 / 2)
    np.testing.assert_allclose(kl(lp, ref, kind="k3"), np.exp(-d) + d - 1, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(kl(lp, ref, kind="k1", clamp=0.7), np.clip(d, -0.7, 0.7))


@settings(max_examples=100, deadline=None)
@given(st.floats(-30, 0, width=32), st.floats(-30, 0, width=32))
def test_k3_is_never_negative(lp, ref):
    assert float(kl(A([lp]), A([ref]))[0]) >= -1e-12


def test_k1_and_k3_estimate_the_exact_kl_and_k3_has_less_variance():
    lp = jax.nn.log_softmax(A([0.3, -0.2, 0.9, 0.0, -1.0]))
    ref = jax.nn.log_softmax(A([0.2, -0.1, 0.8, 0.1, -0.8]))
    each = [np.asarray(kl(lp, ref, kind=k), np.float64) for k in ("k1", "k3")]
    lp, ref = np.asarray(lp, np.float64), np.asarray(ref, np.float64)
    p = np.exp(lp)
    exact = (p * (lp - ref)).sum()
    for k in each:  # expectations are exact sums over five symbols
        np.testing.assert_allclose((p * k).sum(), exact, atol=1e-6)
    draws = np.random.default_rng(0).choice(5, 200_000, p=p / p.sum())
    k1, k3 = (k[draws] for k in each)
    for k in (k1, k3):
        assert abs(k.mean() - exact) < 5 * k.std() / np.sqrt(len(k))
    assert k3.var() < 0.05 * k1.var()


def test_k3_gradient_is_one_minus_the_inverse_ratio():
    lp, ref = A([-1.0, -2.0, -0.5]), A([-1.5, -1.0, -0.5])
    grad = jax.grad(lambda x: kl(x, ref).sum())(lp)
    np.testing.assert_allclose(grad, 1 - np.exp(np.asarray(ref - lp)), atol=1e-6)
    assert grad[2] == 0


def test_k1_is_refused_as_a_loss_because_its_expected_gradient_is_zero():
    logits = A([0.3, -0.2, 0.9])
    ref = jax.nn.log_softmax(A([1.0, 0.0, -1.0]))
    p = jax.nn.softmax(logits)

    def expected(x):  # E_{c ~ fixed p} k1: what a gradient of sampled k1 estimates
        return (p * kl(jax.nn.log_softmax(x), ref, kind="k1")).sum()

    np.testing.assert_allclose(jax.grad(expected)(logits), 0, atol=1e-7)
    with pytest.raises(UserError, match="zero expected gradient"):
        kl(ref, ref, kind="k1", in_loss=True)
    with pytest.raises(UserError, match="k1, k2, k3"):
        kl(ref, ref, kind="k4")


# ---- surrogates


def test_sequence_ratio_is_the_exponential_of_the_mean_log_ratio():
    lp, old = A([[-1.0, -2.0, 9.0]]), A([[-1.2, -1.5, jnp.nan]])
    mask = A([[True, True, False]])
    np.testing.assert_allclose(
        surrogates.ratio(lp, old, mask), np.exp([[0.2, -0.5, 0.0]]), rtol=1e-6
    )
    got = surrogates.ratio(lp, old, mask, level="sequence")
    np.testing.assert_allclose(got, np.exp([[-0.15]]), rtol=1e-6)
    with pytest.raises(UserError, match="token, sequence"):
        surrogates.ratio(lp, old, mask, level="row")


@pytest.mark.parametrize(
    "rho, adv, kwargs, want",
    [
        (1.5, 1.0, {}, -1.5),
        (1.5, 1.0, {"clip": (0.2, 0.2)}, -1.2),
        (1.5, 1.0, {"clip": (0.2, 0.28)}, -1.28),
        (0.5, 1.0, {"clip": (0.2, 0.2)}, -0.5),
        (0.5, -1.0, {"clip": (0.2, 0.2)}, 0.8),
        (1.5, -1.0, {"clip": (0.2, 0.2)}, 1.5),
        (9.0, -1.0, {"clip": (0.2, 0.2), "dual": 3.0}, 3.0),
        (9.0, 1.0, {"clip": (0.2, 0.2), "dual": 3.0}, -1.2),
        (9.0, -1.0, {"clip": (0.2, 0.2), "delta": 4.0}, 4.0),
    ],
)
def test_surrogate_truth_table(rho, adv, kwargs, want):
    got = surrogates.surrogate(A([[rho]]), A([[adv]]), **kwargs)
    np.testing.assert_allclose(got, [[want]], rtol=1e-6)


def test_clipped_tokens_have_no_gradient():
    g = jax.grad(lambda r: surrogates.surrogate(r, A([[1.0]]), clip=(0.2, 0.2)).sum())(
        A([[1.5, 1.1]])
    )
    assert g.tolist() == [[0.0, -1.0]]
    low, high = surrogates.clipped(A([[1.5, 1.1, 0.5]]), A([[1.0]]), (0.2, 0.2))
    assert high.tolist() == [[True, False, False]] and not low.any()


@pytest.mark.parametrize("bad", [{"clip": (0.0, 0.2)}, {"dual": 1.0}, {"delta": 1.0}])
def test_surrogate_refuses_bounds_that_make_no_sense(bad):
    with pytest.raises(UserError):
        surrogates.surrogate(jnp.ones((1, 1)), jnp.ones((1, 1)), **bad)


def test_aggregates_equal_their_definitions():
    x = A([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    mask = masks.from_length(A([1, 3, 0]), 3)
    want = {
        "grpo": (1 + 5, 2),
        "bnpo": (16 / 4, 1),
        "dapo": (16, 4),
        "dr_grpo": (16, 20),
        "sequence_sum": (16, 2),
    }
    for mode, pair in want.items():
        got = surrogates.aggregate(x, mask, mode=mode, max_length=10)
        np.testing.assert_allclose(got, pair, rtol=1e-6, err_msg=mode)
    with pytest.raises(UserError, match="max_length"):
        surrogates.aggregate(x, mask, mode="dr_grpo")
    with pytest.raises(UserError, match="dapo"):
        surrogates.aggregate(x, mask, mode="mean")


def test_sums_and_weights_of_parts_add_to_the_whole():
    x = A(uniform(8, 5))
    mask = masks.from_length(A([5, 1, 3, 0, 2, 5, 4, 1]), 5)

    @jax.jit
    def all_modes(mask):
        modes = ("grpo", "dapo", "dr_grpo", "sequence_sum")
        return A([surrogates.aggregate(x, mask, mode=m, max_length=5) for m in modes])

    whole = all_modes(mask)
    for k in (2, 4, 8):
        rows = np.arange(8)[:, None] % k
        parts = sum(np.asarray(all_modes(A(np.asarray(mask) & (rows == i)))) for i in range(k))
        np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)


def test_importance_weight_is_truncated_and_detached():
    lp, sampler = A([[-1.0, -1.0, -5.0]]), A([[-1.5, -3.0, jnp.nan]])
    mask = A([[True, True, False]])
    got = surrogates.importance_weight(lp, sampler, mask, cap=2.0)
    np.testing.assert_allclose(got, [[np.exp(0.5), 2.0, 1.0]], rtol=1e-6)
    total, worst = surrogates.sampler_gap(lp, sampler, mask)
    assert total.tolist() == [2.5] and worst.tolist() == [2.0]
    grad = jax.grad(lambda x: surrogates.importance_weight(x, lp, mask).sum())(lp)
    assert not grad.any()


# ---- masks


def test_mask_counts_the_eos_and_never_looks_at_ids():
    assert masks.from_length(A([0, 2, 3]), 3).astype(int).tolist() == [
        [0, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
    ]
    tokens = A([[5, 2, 2, 0], [0, 0, 5, 0], [2, 1, 1, 1]])  # 0 = pad is sampled in row 1
    assert masks.length_to_eos(tokens, (2,)).tolist() == [2, 4, 1]
    assert masks.length_to_eos(tokens, (2, 5)).tolist() == [1, 3, 1]


def test_truncated_and_forced_tokens_are_dropped():
    mask = masks.from_length(A([2, 3]), 3)
    assert masks.mask_truncated(mask, A([True, False])).sum(1).tolist() == [2, 0]
    forced = A([[True, False, False]] * 2)
    assert masks.mask_forced(mask, forced).sum(1).tolist() == [1, 2]
    holes = A([[True, False, True, False], [False] * 4])
    assert masks.last(holes).astype(int).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]


# ---- REINFORCE++


def test_token_rewards_and_returns_equal_hand_computed_numbers():
    lp, ref = A([[0.1, -0.2, 0.3, 7.0]]), jnp.zeros((1, 4))
    mask = masks.from_length(A([3]), 4)
    reward = ppo.token_reward(A([0.8]), lp, ref, mask, beta=0.01)
    np.testing.assert_allclose(reward, [[-0.001, 0.002, 0.797, 0.0]], atol=1e-7)
    np.testing.assert_allclose(returns(reward, mask), [[0.798, 0.799, 0.797, 0.0]], atol=1e-6)
    plain = returns(ppo.token_reward(A([0.8]), lp, ref, mask, beta=0.0), mask)
    np.testing.assert_allclose(plain, [[0.8, 0.8, 0.8, 0.0]], atol=1e-7)


def test_discount_counts_action_tokens_only():
    mask = A([[True, False, True, True]])
    got = returns(A([[1.0, 99.0, 0.0, 4.0]]), mask, gamma=0.5)
    assert got.tolist() == [[2.0, 0.0, 2.0, 4.0]]


def test_whitening_has_mean_zero_and_variance_one_over_action_tokens():
    x = uniform(6, 7) * 3 + 5
    mask = np.arange(7) < np.array([7, 1, 0, 3, 5, 2])[:, None]
    got = np.asarray(whiten(A(x), A(mask)))
    assert (got[~mask] == 0).all()
    np.testing.assert_allclose([got[mask].mean(), got[mask].var()], [0, 1], atol=1e-5)
    perm = [3, 0, 5, 1, 4, 2]
    np.testing.assert_allclose(whiten(A(x[perm]), A(mask[perm])), got[perm], atol=1e-5)


@pytest.mark.parametrize("n", [1, 7])
def test_whitening_constant_returns_gives_exactly_zero(n):
    for keep in (True, False):
        assert not np.any(whiten(A(np.full(n, 0.7, np.float32)), A(np.full(n, keep))))


@pytest.mark.parametrize("lengths, shared", [((5, 5), 0.0), ((5, 8), 0.474342)])
def test_opposite_outcomes_cancel_on_shared_tokens_only_at_equal_length(lengths, shared):
    mask = A(np.arange(8) < np.array(lengths)[:, None])
    zero = A(np.zeros((2, 8), np.float32))
    got = np.asarray(reinforce(A([1.0, -1.0]), zero, zero, mask, beta=0.0))
    np.testing.assert_allclose(abs(got[0, 0] + got[1, 0]), shared, atol=1e-5)


# ---- DAPO


def test_dynamic_sampling_keeps_groups_whose_rewards_differ():
    r = A([[1.0, 1.0], [0.0, 1.0], [jnp.nan, 1.0], [0.2, 0.1]])
    keep = dapo.informative(r)
    assert keep.tolist() == [False, True, False, True]
    got = dapo.select(np.asarray(keep), 3)
    assert got.index.tolist() == [1, 3] and got.missing == 1
    assert dapo.select(np.asarray(keep), 1).index.tolist() == [1]


def test_overlong_penalty_is_linear_in_tokens():
    length = A([0, 16384, 18432, 20480, 30000])
    got = dapo.overlong_penalty(length, max_length=20480)
    assert got.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(UserError, match="buffer"):
        dapo.overlong_penalty(length, max_length=1024)


def test_advantages_vmap_over_seeds():
    r = uniform(3, 4, 5)
    got = jax.jit(jax.vmap(lambda x: group_advantage(x).value))(A(r))
    np.testing.assert_allclose(got[1], advantage(A(r[1])).value, atol=1e-6)
