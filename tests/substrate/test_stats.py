"""Intervals against published examples, hand arithmetic and scipy."""

import numpy as np
import pytest
import scipy.stats

from jaxrepro import stats

# Student (1908), after Cushny and Peebles: extra hours of sleep, the data set `sleep` of R.
SLEEP_A = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_B = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_paired_t_equals_the_published_interval_of_students_sleep_data():
    got = stats.paired_t(SLEEP_A, SLEEP_B)  # R: t.test(extra ~ group, paired = TRUE)
    assert got.n == 10
    np.testing.assert_allclose(got[:3], [-1.58, -2.4598858, -0.7001142], atol=1e-7)


def test_student_t_equals_hand_arithmetic():
    got = stats.student_t(
        [1.0, 2.0, 3.0]
    )  # s = 1, t_2 = 4.302653 (tables), half = 4.302653 / sqrt 3
    np.testing.assert_allclose(got[:3], [2.0, 2 - 2.484138, 2 + 2.484138], atol=1e-5)


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_student_t_equals_scipy(n, level):
    x = np.random.default_rng(n).normal(size=n)
    got = stats.student_t(x, level=level)
    want = scipy.stats.t.interval(level, n - 1, loc=x.mean(), scale=scipy.stats.sem(x))
    np.testing.assert_allclose(got[1:3], want, rtol=1e-10)


def test_one_seed_has_a_mean_and_no_interval():
    got = stats.student_t([0.5])
    assert got.mean == 0.5 and np.isnan(got.lo) and not got.resolved


def test_a_diverged_seed_is_never_dropped():
    got = stats.student_t([0.5, float("nan"), 0.6])
    assert np.isnan(got.mean) and not got.resolved and got.n == 3


def test_equal_seeds_give_an_interval_of_width_zero():
    assert stats.student_t([1.0, 1.0, 1.0]) == stats.Interval(1.0, 1.0, 1.0, 3)


def test_wilson_equals_published_values():
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3 (score): 81/263, 15/148, 0/20, 1/29
    for successes, n, lo, hi in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        got = stats.wilson(successes, n)
        np.testing.assert_allclose(got[1:3], [lo, hi], atol=5e-5)


@pytest.mark.parametrize("successes", [0, 1, 7, 50])
def test_wilson_equals_scipy(successes):
    want = scipy.stats.binomtest(successes, 50).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(stats.wilson(successes, 50)[1:3], [want.low, want.high], atol=1e-12)


def test_bootstrap_equals_the_binomial_quantiles_for_zeros_and_ones():
    # the mean of a resample of 30 ones and 70 zeros is Binomial(100, 0.3) / 100 exactly
    got = stats.bootstrap([1.0] * 30 + [0.0] * 70)
    want = scipy.stats.binom(100, 0.3).ppf([0.025, 0.975]) / 100
    np.testing.assert_allclose(got[1:3], want, atol=0.0101)
    assert got.mean == pytest.approx(0.3)


def test_bootstrap_is_the_same_every_time_and_in_any_chunking():
    x = np.random.default_rng(0).normal(size=50)
    assert stats.bootstrap(x) == stats.bootstrap(x)
    assert stats.bootstrap(x, seed=1) != stats.bootstrap(x)


def test_paired_bootstrap_resamples_pairs():
    a = np.random.default_rng(0).normal(size=40)
    got = stats.paired_bootstrap(a + 0.25, a)  # every pair differs by exactly 0.25
    np.testing.assert_allclose(got[:3], 0.25, atol=1e-12)


def test_wrong_arguments_say_what_is_needed():
    with pytest.raises(ValueError, match="as many of each"):
        stats.paired_t([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="non-empty"):
        stats.student_t([])
    with pytest.raises(ValueError, match="means 95 %"):
        stats.student_t([1.0, 2.0], level=95.0)
    with pytest.raises(ValueError, match="successes"):
        stats.wilson(3, 2)
