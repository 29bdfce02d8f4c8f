"""The loss of SOC against hand-computed numbers, its own identities, scipy, and gradient descent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from jaxrepro.config import UserError
from jaxrepro.methods.soc import objective
from jaxrepro.methods.soc.objective import VARIANTS, Stats, sharpened
from jaxrepro.ops.logprob import token_stats

# from the formulas in double precision (numpy and scipy), 6 digits; v = 5, lam = 0.2
Z = np.array([[2, 0.5, -1, 0, 1], [0.1, 0.2, 0.3, 0.4, 0.5], [5, -2, 0, 1, 3]], np.float32)
Y = np.array([0, 4, 4], np.int32)
LSE = [2.574438, 1.919416, 5.149541]
CE = [0.574438, 1.419416, 2.149541]
SOC = [0.059550, 1.035533, 1.119633]
MEANS = {0.0: 1.381132, 0.1: 1.059685, 0.2: 0.738239, 0.3: 0.416792}
FIRST_ROW = [-0.549583, 0.100502, 0.022425, 0.060957, 0.165699]


LAMS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.9)


def loss_of(z, y, lam, variant="soc", **options):
    found = objective.stats(z, y)._replace(lse_corrupted=jnp.zeros(y.shape))
    return objective.per_token(found, lam=lam, variant=variant, **options)


@jax.jit
def everywhere(z, y):
    """{(lam, variant): (loss, gradient)}: of one shape, all of them are compiled once."""

    def one(lam, variant):
        value, pull = jax.vjp(lambda z: loss_of(z, y, lam, variant), z)
        return value, pull(jnp.ones_like(value))[0]

    return {(str(lam), variant): one(lam, variant) for lam in LAMS for variant in VARIANTS}


def both(z, y, lam, variant):
    return everywhere(jnp.asarray(z), jnp.asarray(y))[str(lam), variant]


def losses(z, y=Y, *, lam=0.2, variant="soc"):
    return both(z, y, lam, variant)[0]


def gradient(z, y=Y, *, lam=0.2, variant="soc"):
    return both(z, y, lam, variant)[1]


logits = st.lists(
    st.lists(st.floats(-8, 8, width=32), min_size=6, max_size=6), min_size=3, max_size=3
).map(lambda rows: np.array(rows, np.float32))
lams = st.sampled_from(LAMS)


def test_golden_values_of_v_ce_and_loss():
    found = objective.stats(jnp.asarray(Z), jnp.asarray(Y))
    np.testing.assert_allclose(found.lse, LSE, atol=1e-6)
    np.testing.assert_allclose(-found.lp, CE, atol=1e-6)
    np.testing.assert_allclose(losses(Z), SOC, atol=1e-6)
    for lam, mean in MEANS.items():
        assert losses(Z, lam=lam).mean() == pytest.approx(mean, abs=1e-6)


def test_golden_gradient_and_its_rows_sum_to_minus_lam():
    g = gradient(Z)
    np.testing.assert_allclose(g[0], FIRST_ROW, atol=1e-6)
    np.testing.assert_allclose(g.sum(-1), -0.2, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(z=logits, lam=lams, seed=st.integers(0, 99))
def test_gradient_is_the_fused_formula(z, lam, seed):
    y = np.random.default_rng(seed).integers(0, 6, len(z)).astype(np.int32)
    wanted = (1 - lam) * np.exp(log_softmax(z, -1)) - np.eye(6)[y]
    np.testing.assert_allclose(gradient(z, y=y, lam=lam), wanted, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(z=logits, lam=lams, c=st.floats(-5, 5))
def test_a_shift_of_all_logits_changes_the_loss_by_minus_lam_times_it(z, lam, c):
    y = np.zeros(len(z), np.int32)
    shifted = (z + np.float32(c)).astype(np.float32)
    np.testing.assert_allclose(
        losses(shifted, y, lam=lam) - losses(z, y, lam=lam), -lam * c, atol=1e-5
    )
    for variant in ("centred", "smoothing", "entropy"):  # they have no drift
        before, after = (losses(a, y, lam=lam, variant=variant) for a in (z, shifted))
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(z=logits, lam=lams)
def test_soc_is_ce_minus_kl_to_uniform_minus_mean_logit(z, lam):
    y, v = np.zeros(len(z), np.int32), z.shape[1]
    lp = log_softmax(z.astype(np.float64), -1)
    kl = (-np.log(v) - lp).mean(-1)
    wanted = -lp[:, 0] - lam * kl - lam * z.mean(-1) - lam * np.log(v)
    np.testing.assert_allclose(losses(z, y, lam=lam), wanted, atol=2e-5)
    two_terms = -lp[:, 0] + lam * -logsumexp(z.astype(np.float64), -1)
    np.testing.assert_allclose(losses(z, y, lam=lam), two_terms, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(z=logits, lam=lams)
def test_negative_label_smoothing_is_the_centred_loss_up_to_a_factor(z, lam):
    y = np.zeros(len(z), np.int32)
    centred = gradient(z, y=y, lam=lam, variant="centred")
    smoothing = gradient(z, y=y, lam=lam, variant="smoothing")
    np.testing.assert_allclose(smoothing * (1 - lam), centred, atol=1e-5)


def test_variants_by_their_formulas():
    p = np.exp(log_softmax(Z, -1))
    ce, entropy, mean = np.array(CE), -(p * np.log(p)).sum(-1), Z.mean(-1)
    v = np.array(LSE)
    wanted = {
        "soc": ce - 0.2 * v,
        "centred": ce - 0.2 * (v - mean),
        "smoothing": (ce - 0.2 * (v - mean)) / 0.8,
        "entropy": ce + 0.2 * entropy,
        "contrastive": ce - 0.2 * (v - 0.0),  # `losses` gives V' = 0
    }
    assert set(wanted) == set(VARIANTS)
    for variant, value in wanted.items():
        np.testing.assert_allclose(losses(Z, variant=variant), value, atol=2e-6, err_msg=variant)
        np.testing.assert_array_equal(losses(Z, lam=0.0, variant=variant), losses(Z, lam=0.0))
    np.testing.assert_allclose(
        loss_of(jnp.asarray(Z), jnp.asarray(Y), 0.0, z_loss=0.1), ce + 0.1 * v**2, atol=5e-6
    )
    smoothed = loss_of(jnp.asarray(Z), jnp.asarray(Y), 0.0, label_smoothing=0.1)
    np.testing.assert_allclose(smoothed, 0.9 * ce + 0.1 * (v - mean), atol=2e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_needs_are_what_the_formula_reads(variant):
    full = objective.stats(jnp.asarray(Z), jnp.asarray(Y))._replace(lse_corrupted=jnp.ones(3))
    for lam in (0.0, 0.2):
        kept = objective.needs(variant, lam)
        some = Stats(*(a if f in kept else None for f, a in zip(Stats._fields, full)))
        got, all_of_them = (objective.per_token(s, lam=lam, variant=variant) for s in (some, full))
        np.testing.assert_array_equal(got, all_of_them)


@pytest.mark.parametrize(("variant", "chunk"), [("soc", 3), ("entropy", 99), ("smoothing", 3)])
def test_the_chunked_custom_vjp_gives_autodiff_of_whole_logits(variant, chunk):
    keys = jax.random.split(jax.random.key(chunk), 3)
    hidden, head = jax.random.normal(keys[0], (2, 4, 8)), jax.random.normal(keys[1], (8, 13))
    targets = jax.random.randint(keys[2], (2, 4), 0, 11)
    dead = jnp.where(jnp.arange(13) < 11, 0.0, -jnp.inf)
    want = tuple(sorted(objective.needs(variant, 0.2)))

    def chunked(hidden, head):
        found = token_stats(hidden, head, targets, want, chunk=chunk, vocab=11)
        return objective.per_token(Stats(**found), lam=0.2, variant=variant).sum()

    def whole(hidden, head):
        found = objective.stats(hidden @ head + dead, targets)
        return objective.per_token(found, lam=0.2, variant=variant).sum()

    ours, theirs = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, head) for f in (chunked, whole)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
    assert not np.any(ours[1][1][:, 11:]), "a padded column is trained"


def test_padded_columns_of_minus_infinity_change_nothing():
    padded = np.concatenate([Z, np.full((3, 4), -np.inf, np.float32)], 1)
    for a, b in zip(*(objective.stats(jnp.asarray(z), jnp.asarray(Y))[:4] for z in (Z, padded))):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(gradient(padded)[:, :5], gradient(Z), atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    z = jnp.asarray(np.linspace(0, 3, 4096, dtype=np.float32)[None]).astype(jnp.bfloat16)
    found = objective.stats(z, jnp.zeros(1, int))
    assert found.lse.dtype == jnp.float32
    assert found.lse[0] == pytest.approx(logsumexp(np.asarray(z, np.float64)), abs=1e-5)


def test_integer_logits_are_refused():
    from jaxtyping import TypeCheckError

    with pytest.raises(TypeCheckError):
        objective.stats(jnp.zeros((2, 3), int), jnp.zeros(2, int))


# Sums ------------------------------------------------------------------------------------------------

LOSS = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]], np.float32)
MASK = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]], bool)


@pytest.mark.parametrize(
    ("normalise", "total", "weight"), [("token", 24.0, 5.0), ("sequence", 1.5 + 7.0, 2.0)]
)
def test_sums_and_weights_count_what_the_mask_keeps(normalise, total, weight):
    junk = jnp.where(MASK, LOSS, jnp.nan)
    for loss in (jnp.asarray(LOSS), junk):
        got = objective.aggregate(loss, jnp.asarray(MASK), normalise=normalise)
        assert got == (total, weight)
    parts = [objective.aggregate(jnp.asarray(LOSS[i : i + 1]), jnp.asarray(MASK[i : i + 1]),
                                 normalise=normalise) for i in range(3)]  # fmt: skip
    assert (sum(p[0] for p in parts), sum(p[1] for p in parts)) == (total, weight)


def test_scores_are_sums_over_the_response():
    found = objective.stats(jnp.asarray(Z)[None], jnp.asarray(Y)[None])
    mask = jnp.asarray([[True, False, True]])
    picked = Z[np.arange(3), Y][[0, 2]]
    for mode, wanted in (
        ("logprob", -(CE[0] + CE[2])),
        ("q", picked.sum()),
        ("q_minus_mean_logit", picked.sum() - Z.mean(-1)[[0, 2]].sum()),
    ):
        assert objective.score(found, mask, mode)[0] == pytest.approx(wanted, abs=1e-5)


# Independent logits -----------------------------------------------------------------------------------

FIXED = [  # p, lam, pi (exact, or to 4 digits)
    ((0.5, 0.3, 0.1, 0.05, 0.05), 0.2, (0.575, 0.325, 0.075, 0.0125, 0.0125)),
    ((0.5, 0.3, 0.1, 0.05, 0.05), 0.4, (2 / 3, 1 / 3, 0, 0, 0)),
    ((0.7, 0.3), 0.2, (0.75, 0.25)),
    ((0.7, 0.3), 0.6, (1, 0)),
    ((0.6, 0.25, 0.1, 0.03, 0.02), 0.3, (0.7381, 0.2381, 0.0238, 0, 0)),
]


@pytest.mark.parametrize(("p", "lam", "pi"), FIXED)
def test_fixed_points_of_gradient_descent(p, lam, pi):
    np.testing.assert_allclose(sharpened(jnp.asarray(p), lam), pi, atol=5e-5)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("p", "lam", "pi"), [FIXED[i] for i in (0, 2, 4)])  # a clear kept set
def test_gradient_descent_on_free_logits_ends_in_the_fixed_point(p, lam, pi, centred):
    steps, lr = 20_000, 0.05
    z = objective.descend(jnp.asarray(p), lam=lam, lr=lr, steps=steps, centred=centred)
    np.testing.assert_allclose(jax.nn.softmax(z), sharpened(jnp.asarray(p), lam), atol=1e-3)
    drift = 0.0 if centred else lr * lam * steps / len(p)
    assert z.mean() == pytest.approx(drift, rel=1e-3, abs=1e-2)


def test_descent_follows_the_gradient_of_the_loss():
    p, y = jnp.asarray([0.6, 0.3, 0.1]), jnp.arange(3)
    z = jnp.zeros(3)
    for _ in range(3):
        z = z - 0.5 * p @ gradient(jnp.tile(z, (3, 1)), y, lam=0.3)  # a row for each target
    np.testing.assert_allclose(objective.descend(p, lam=0.3, lr=0.5, steps=3), z, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=2, max_size=8),
    lam=st.floats(0.0, 0.95),
)
def test_the_fixed_point_is_a_distribution_of_least_distance_and_stays_itself_at_lam_0(
    weights, lam
):
    p = np.array(weights) / np.sum(weights)
    pi = np.asarray(sharpened(jnp.asarray(p, jnp.float32), lam))
    assert pi.min() >= 0 and pi.sum() == pytest.approx(1, abs=1e-5)
    gap = (
        p / (1 - lam) - pi
    )  # optimality of a projection: one number on the support, less elsewhere
    top = gap[pi > 1e-6].max()
    np.testing.assert_allclose(gap[pi > 1e-6], top, atol=1e-4)
    assert (gap[pi <= 1e-6] <= top + 1e-4).all()
    np.testing.assert_allclose(sharpened(jnp.asarray(p, jnp.float32), 0.0), p, atol=1e-6)


# Refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        (dict(lam=-0.1), "soc.lam=-0.1 must lie in"),
        (dict(lam=1.0), "soc.lam=1.0 must lie in"),
        (dict(lam=float("nan")), "soc.lam=nan"),
        (dict(lam=float("nan"), allow_degenerate=True), "soc.lam=nan"),
        (dict(lam=1.0, variant="smoothing", allow_degenerate=True), "has no label smoothing"),
        (dict(lam=0.2, variant="socks"), "is not one of soc, centred"),
        (dict(lam=0.2, z_loss=1e-4), "works against soc.lam=0.2"),
        (dict(lam=0.2, label_smoothing=0.1), "works against soc.lam=0.2"),
        (dict(lam=0.2, logit_softcap=30.0), "caps its logits at 30.0"),
        (dict(lam=0.0, z_loss=-1.0), "soc.z_loss=-1.0 is no weight"),
        (dict(lam=0.0, label_smoothing=1.0), "soc.label_smoothing=1.0 is no weight"),
    ],
)
def test_what_contradicts_the_method_is_refused_in_one_line(settings_, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as e:
        objective.check(**settings_)
    assert "\n" not in str(e.value)


def test_what_is_harmless_or_asked_for_passes():
    objective.check(0.0, z_loss=1e-4, label_smoothing=0.1, logit_softcap=30.0)
    for lam in (-0.5, 1.0, 2.0):
        objective.check(lam, allow_degenerate=True)
    with pytest.raises(UserError):
        objective.aggregate(jnp.zeros((1, 1)), jnp.ones((1, 1), bool), normalise="rows")
    with pytest.raises(UserError):
        objective.score(Stats(jnp.zeros(1)), jnp.ones(1, bool), "sum")
    with pytest.raises(UserError):
        sharpened(jnp.ones(2) / 2, 1.0)
