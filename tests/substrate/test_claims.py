"""Claims as data: what is accepted, and the verdict that each interval gives."""

import pytest

from jaxrepro import claims
from jaxrepro.claims import Claim, Outcome, decide, judge, parse_claims
from jaxrepro.config import UserError
from jaxrepro.stats import Interval

RAW = {
    "seeds": 3,
    "common": {"steps": 60},
    "prelude": {"arm": "warm"},
    "arms": {"ours": {}, "plain": {"rl.alpha": 0.0}},
    "claims": (
        {
            "name": "better",
            "kind": "paired_difference",
            "arm": "ours",
            "baseline": "plain",
            "metric": "after/test/accuracy",
        },
    ),
}
METRIC = "after/test/accuracy"


def claim(**fields) -> Claim:
    default = {"name": "x", "kind": "threshold", "arm": "ours", "metric": METRIC}
    return Claim(**(default | fields))


def runs(**arms):
    """runs(ours=[0.5, 0.6]) -> outcomes by arm and seed, without items."""
    return {
        arm: {seed: Outcome({METRIC: v}) for seed, v in enumerate(values)}
        for arm, values in arms.items()
    }


@pytest.mark.parametrize(
    ("fields", "lo", "hi", "verdict"),
    [
        ({"kind": "paired_difference", "baseline": "plain"}, 0.01, 0.1, "holds"),
        ({"kind": "paired_difference", "baseline": "plain"}, -0.01, 0.1, "not resolved"),
        ({"kind": "paired_difference", "baseline": "plain"}, -0.2, -0.01, "contradicted"),
        ({"kind": "paired_difference", "baseline": "plain"}, 0.0, 0.1, "not resolved"),
        (
            {"kind": "paired_difference", "baseline": "plain", "bound": 0.05},
            0.01,
            0.04,
            "contradicted",
        ),
        (
            {"kind": "paired_difference", "baseline": "plain", "direction": "<"},
            -0.2,
            -0.01,
            "holds",
        ),
        (
            {"kind": "paired_difference", "baseline": "plain", "direction": "<"},
            0.01,
            0.1,
            "contradicted",
        ),
        ({"bound": 0.95}, 0.96, 0.99, "holds"),
        ({"bound": 0.95}, 0.94, 0.99, "not resolved"),
        ({"bound": 0.95}, 0.90, 0.94, "contradicted"),
        ({"bound": 0.1, "direction": "<"}, 0.0, 0.05, "holds"),
        ({"kind": "target", "bound": 0.52, "margin": 0.02}, 0.51, 0.54, "holds"),
        ({"kind": "target", "bound": 0.52, "margin": 0.02}, 0.49, 0.53, "not resolved"),
        ({"kind": "target", "bound": 0.52, "margin": 0.02}, 0.55, 0.6, "contradicted"),
        ({"kind": "target", "bound": 0.52, "margin": 0.02}, 0.4, 0.49, "contradicted"),
        ({"kind": "equivalence", "baseline": "plain", "margin": 0.05}, -0.05, 0.04, "holds"),
        ({"kind": "equivalence", "baseline": "plain", "margin": 0.05}, -0.06, 0.04, "not resolved"),
        ({"kind": "equivalence", "baseline": "plain", "margin": 0.05}, 0.06, 0.09, "contradicted"),
        ({"kind": "equivalence", "baseline": "plain", "margin": 0.05}, 0.04, 0.09, "not resolved"),
    ],
)
def test_the_verdict_follows_from_where_the_interval_lies(fields, lo, hi, verdict):
    assert decide(claim(**fields), Interval((lo + hi) / 2, lo, hi, 5)) == verdict


def test_without_an_interval_nothing_is_resolved():
    nan = float("nan")
    for kind in claims.KINDS:
        assert decide(claim(kind=kind, margin=0.1), Interval(0.9, nan, nan, 1)) == "not resolved"


def test_a_paired_difference_uses_the_pairs():
    # differences 0.10 +- 0.01 although the seeds themselves differ by 0.4
    found = runs(ours=[0.31, 0.50, 0.72], plain=[0.20, 0.40, 0.63])
    got = judge(claim(kind="paired_difference", baseline="plain"), found, (0, 1, 2))
    assert got.verdict == "holds" and got.over == "seeds"
    # mean 0.1, s 0.01, t_2 = 4.3027: half 0.02484
    assert got.interval.mean == pytest.approx(0.1)
    assert got.interval.lo == pytest.approx(0.1 - 0.0248414, abs=1e-6)
    assert got.values == (0.31, 0.50, 0.72) and got.baseline_values == (0.20, 0.40, 0.63)


def test_a_gain_within_a_run_is_a_paired_difference_of_two_metrics():
    found = {
        "ours": {s: Outcome({METRIC: 0.7 + s / 100, "before/test/accuracy": 0.5}) for s in range(3)}
    }
    one = claim(
        kind="paired_difference", baseline="ours", baseline_metric="before/test/accuracy", bound=0.1
    )
    got = judge(one, found, (0, 1, 2))
    assert got.verdict == "holds" and got.interval.mean == pytest.approx(0.21)


def test_a_failed_seed_is_never_dropped():
    found = runs(ours=[0.9, 0.9, 0.9])
    found["ours"][1] = Outcome(None, error="exit code 1")
    got = judge(claim(bound=0.5), found, (0, 1, 2))
    assert got.verdict == "not resolved" and got.interval.n == 2
    assert got.values == (0.9, None, 0.9) and got.note == "ours seed 1: exit code 1"


def test_a_missing_or_infinite_metric_resolves_nothing_and_is_named():
    found = runs(ours=[0.9, float("nan")])
    got = judge(claim(bound=0.5), found, (0, 1))
    assert got.verdict == "not resolved" and "after/test/accuracy is nan" in got.note
    got = judge(claim(metric="test/f1"), found, (0, 1))
    assert got.verdict == "not resolved" and "no metric test/f1" in got.note


def items(accuracy: float, shift: int = 0) -> list[float]:
    """200 zeros and ones, the first ones at `shift`."""
    ones = round(200 * accuracy)
    return [1.0 if shift <= i < shift + ones else 0.0 for i in range(200)]


def test_one_seed_resolves_over_items_where_a_run_left_them():
    found = {
        "ours": {0: Outcome({METRIC: 0.9}, {"after/test": items(0.9)})},
        "plain": {0: Outcome({METRIC: 0.7}, {"after/test": items(0.7)})},
    }
    got = judge(claim(kind="paired_difference", baseline="plain"), found, (0,))
    assert got.verdict == "holds" and got.over == "items" and got.interval.n == 200
    got = judge(claim(bound=0.84), found, (0,))  # Wilson of 180 / 200 = [0.8506, 0.9344]
    assert got.verdict == "holds" and got.interval.lo == pytest.approx(0.8506, abs=1e-4)


def test_one_seed_without_items_is_not_resolved():
    got = judge(
        claim(kind="paired_difference", baseline="plain"), runs(ours=[0.9], plain=[0.1]), (0,)
    )
    assert got.verdict == "not resolved" and "no per-item outcomes" in got.note
    assert got.interval.mean == pytest.approx(0.8)


def test_items_that_do_not_average_to_the_metric_are_not_used():
    found = {"ours": {0: Outcome({METRIC: 0.9}, {"after/test": items(0.5)})}}
    got = judge(claim(bound=0.5), found, (0,))
    assert got.verdict == "not resolved" and got.over == "seeds"


def test_the_hash_ignores_prose_and_sees_numbers():
    first = parse_claims(RAW)
    prose = parse_claims(RAW | {"claims": [RAW["claims"][0] | {"says": "a sentence"}]})
    other = parse_claims(RAW | {"claims": [RAW["claims"][0] | {"bound": 0.1}]})
    arms = parse_claims(RAW | {"arms": {"ours": {}, "plain": {"rl.alpha": 0.1}}})
    assert first.fingerprint() == prose.fingerprint()
    assert len({first.fingerprint(), other.fingerprint(), arms.fingerprint()}) == 3


def test_claims_read_as_sentences():
    one = parse_claims(RAW).claims[0]
    assert one.sentence == "after/test/accuracy: ours - plain > 0"
    assert claim(bound=0.95).sentence == "ours: after/test/accuracy > 0.95"
    equal = claim(kind="equivalence", baseline="plain", margin=0.05)
    assert equal.sentence == "after/test/accuracy: ours - plain within +-0.05"


def better(**fields):
    return {"claims": [RAW["claims"][0] | fields]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arms": {}}, "name at least one"),
        ({"arms": {"a/b": {}}}, "use letters, digits"),
        ({"arms": {"ours": {"rl": {"lr": 1}}, "plain": {}}}, "write its keys as 'rl.name'"),
        ({"arms": {"ours": {"seed": 1}, "plain": {}}}, "'seed' is set by reproduce"),
        ({"seeds": 0}, "seeds=0"),
        ({"seeds": 2.5}, "seeds=2.5"),
        ({"sedes": 3}, "unknown keys ['sedes']"),
        (better(kind="paired"), "kind='paired' is not one of paired_difference"),
        (better(arm="our"), "arm 'our' is not one of ours, plain, prelude"),
        (better(direction="up"), "direction='up'"),
        (better(baseline=None), "needs a baseline"),
        (better(baseline="ours"), "compared with itself; give baseline_metric"),
        (better(margin=0.1), "takes bound, not margin"),
        (better(bound="0"), "bound='0' is not a number"),
        (better(kind="equivalence"), "needs margin > 0"),
        (better(kind="threshold"), "takes no baseline"),
        (better(metrics="x"), "unknown keys ['metrics']"),
        ({"claims": RAW["claims"] * 2}, "appears twice"),
    ],
)
def test_a_mistake_in_get_claims_is_one_line(change, says):
    with pytest.raises(UserError) as e:
        parse_claims(RAW | change)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_the_prelude_can_be_a_baseline_only_where_there_is_one():
    parse_claims(RAW | better(baseline="prelude"))
    raw = {k: v for k, v in RAW.items() if k != "prelude"}
    with pytest.raises(UserError, match="is not one of ours, plain"):
        parse_claims(raw | better(baseline="prelude"))


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [([0.5, 0.7], "holds"), ([0.6, 0.7], "holds"), ([0.9, 0.69], "contradicted")],
)
def test_every_seed_is_judged_by_its_worst_seed(ours, verdict):
    found = judge(
        claim(kind="every_seed", baseline="plain"), runs(ours=ours, plain=[0.5, 0.7]), range(2)
    )
    assert found.verdict == verdict
    gone = judge(claim(kind="every_seed"), runs(ours=[0.5]), range(2))
    assert gone.verdict == "not resolved"
