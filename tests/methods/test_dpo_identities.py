"""What must hold between the preference losses: limits in which one becomes another, laws, weights of tokens."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.methods.dpo import divergences, links
from jaxrepro.methods.dpo.registry import (
    Batch,
    SeqStats,
    Tokenwise,
    loss,
    mix,
    resolve,
    statistics,
    total,
)

sys.path.insert(0, str(Path(__file__).parent))
from dpo_golden import GOLDEN, D, close, example, first, items, log_ratios, mean, slope

quick = settings(max_examples=25, deadline=None, derandomize=True)
real = st.floats(-30, 30, width=32)
PRNG = jax.random.key(0)


# ---- limits in which a loss becomes another

SCORES = Batch(scores=jnp.array([[1.0, 0], [2, 0], [0.5, 0], [3, 0]]))
ZERO_KL = Tokenwise(jnp.zeros((4, 2, 1)), None, jnp.ones((4, 2, 1), bool), kl=jnp.zeros((4, 2, 1)))
LIMITS = [
    ("robust", {"label_smoothing": 0}, None),
    ("cdpo", {"label_smoothing": 0}, None),
    ("sigmoid", {"divergence": "alpha", "divergence_alpha": 1e-6}, None),
    ("sigmoid", {"divergence": "alpha", "divergence_alpha": 0}, None),
    ("dpop", {"lam": 0}, None),
    ("dpo_shift", {"f": 1}, None),
    ("odpo", {"alpha": 0}, SCORES),
    ("rdpo_len", {"alpha": 0}, None),
    ("focalpo", {"gamma": 0}, None),
    ("flex", {"beta_l": 0.1}, None),
    ("modpo", {"weights": (1, 0)}, Batch(rewards=jnp.ones((4, 2, 1)))),
    ("beta_dpo", {"alpha": 0, "rho": 0}, Batch(key=PRNG)),
    ("dr_dpo", {"beta_prime": 1e4}, None),
    ("aot", {"beta": 0.1}, None),
    ("gdpo_soft", {}, Batch(probability=jnp.ones(4))),
    ("ns_dpo", {}, Batch(age=jnp.zeros(4))),
    ("safedpo", {}, Batch(unsafe=jnp.zeros((4, 2), bool))),
]


@pytest.fixture(scope="module")
def limits():
    """(mean loss, mean of DPO) of each of LIMITS, compiled together."""

    def both(name, hyper, batch, seq):
        if name == "aot":  # of one pair, sorting does nothing
            seq = jax.tree.map(lambda x: x[:1], seq)
        return items(name, seq, batch, **hyper).mean(), items("sigmoid", seq).mean()

    return jax.jit(lambda seq: [both(*limit, seq) for limit in LIMITS])(GOLDEN)


@pytest.mark.parametrize("i", range(len(LIMITS)), ids=lambda i: f"{LIMITS[i][0]} {LIMITS[i][1]}")
def test_limit_is_dpo(limits, i):
    close(*limits[i])


def test_tdpo_without_divergence_is_dpo():
    seq = GOLDEN._replace(tokens=ZERO_KL)
    for name in ("tdpo1", "tdpo2"):
        close(items(name, seq), items("sigmoid"))


def test_tdpo2_holds_the_chosen_divergence_fixed():
    def value(kl, name):
        seq = GOLDEN._replace(tokens=ZERO_KL._replace(kl=kl))
        return items(name, seq).sum()

    one, two = (jax.grad(value)(ZERO_KL.kl, name)[..., 0] for name in ("tdpo1", "tdpo2"))
    close(two[:, 0], 0.0)
    close(two[:, 1], 0.5 * one[:, 1])
    assert (np.abs(one) > 0).all()


def test_the_reference_has_no_gradient():
    for name in ("sigmoid", "ipo", "aot", "cal_dpo"):
        g = jax.grad(lambda q, name=name: items(name, GOLDEN._replace(q=q)).sum())(GOLDEN.q)
        assert not np.asarray(g).any()


def test_alpha_divergence_of_one_is_forward_kl():
    a = jnp.linspace(-5, 5, 11)
    close(divergences.score(a, "alpha", 1.0), divergences.score(a, "forward_kl"))
    for kind in divergences.DIVERGENCES:
        assert abs(float(divergences.score(jnp.zeros(()), kind))) < 1e-6


def test_ipo_sum_is_the_square_link():
    tau = 0.3
    close(items("ipo_sum", beta=tau), items("gpo", link="square", beta=2 * tau) / (4 * tau**2))


def test_npo_is_dpo_without_the_chosen_response():
    alone = first(GOLDEN, 2)
    one_sided = GOLDEN._replace(p=GOLDEN.p.at[:, 0].set(GOLDEN.q[:, 0]))
    close(items("npo", alone), 2 / 0.1 * items("sigmoid", one_sided))


def test_simpo_without_margin_is_cpo_of_means():
    means = SeqStats(GOLDEN.pb, None, GOLDEN.n)
    close(items("simpo", gamma=0), items("cpo", means, beta=2.0, alpha=0))


def test_alphapo_of_zero_is_simpo():
    close(items("alphapo", alpha=0), items("simpo", beta=2.5, gamma=0.1))
    close(items("alphapo", alpha=1e-4), items("simpo", beta=2.5, gamma=0.1), rtol=1e-3)


def test_lists_of_two_are_pairs():
    r = SCORES.scores
    gap = r[:, 0] - r[:, 1]
    close(
        items("pro", batch=SCORES, sft_weight=0),
        links.logistic(gap * (GOLDEN.pb[:, 0] - GOLDEN.pb[:, 1])),
    )
    e = jax.nn.softmax(r, -1)[:, 1]
    close(
        items("infonca", batch=SCORES, beta=0.1, alpha=1), links.logistic(0.1 * jnp.asarray(D), e)
    )
    close(items("mdpo_multi"), items("sigmoid"))
    close(items("d2o"), items("sigmoid"))


def test_kto_without_mismatch_is_apo_zero_unpaired():
    zero = jnp.zeros(4)
    batch = Batch(labels=jnp.array([True, False, True, False]), kl_p=zero, kl_q=zero)
    close(items("kto", first(GOLDEN), batch), items("apo_zero_unpaired", first(GOLDEN), batch))


def test_published_mixes_are_sums():
    seq = GOLDEN
    got = total(mix(["mpo_vlm"]), seq)[0].mean()
    parts = [mean(n, beta=0.1) for n in ("sigmoid", "bco_pair")]
    close(got, 0.8 * parts[0] + 0.2 * parts[1] + mean("sft"))
    close(
        total(mix(["sigmoid", "sft"], [1, 0.005], beta=0.01), seq)[0],
        total(mix(["rpo_sft"]), seq)[0],
    )


# ---- laws


@quick
@given(st.lists(st.tuples(real, real), min_size=4, max_size=4), st.floats(0, 0.49))
def test_robust_is_unbiased_over_flips(rows, e):
    expected, clean = over_flips(jnp.asarray(rows, jnp.float32), e)
    close(expected, clean, rtol=1e-5, atol=1e-5 / (1 - 2 * e))


@jax.jit
def over_flips(rows, e):
    """rDPO averaged over labels that are flipped at rate e, and DPO of the labels that are not."""
    kept, flipped = (
        items("robust", log_ratios(x), label_smoothing=e) for x in (rows, rows[:, ::-1])
    )
    return (1 - e) * kept + e * flipped, items("sigmoid", log_ratios(rows))


@quick
@given(st.lists(st.tuples(real, real), min_size=4, max_size=4))
def test_gradient_of_dpo_is_the_closed_form(rows):
    seq = log_ratios(np.asarray(rows, np.float32))
    want = -0.1 / (1 + np.exp(0.1 * np.asarray(seq.d)))
    close(slope_of_dpo(seq), np.stack([want, -want], 1), atol=1e-6)


slope_of_dpo = jax.jit(lambda seq: slope("sigmoid", seq))


@quick
@given(st.lists(st.tuples(real, real), min_size=4, max_size=4))
def test_swapping_a_pair_turns_the_sign(rows):
    found = swapped_and_not(log_ratios(np.asarray(rows, np.float32)))
    close(found["swapped"], found["turned"])
    close(found["smoothed and swapped"], found["smoothed"])


@jax.jit
def swapped_and_not(seq):
    swapped = SeqStats(seq.p[:, ::-1], seq.q[:, ::-1], seq.n[:, ::-1])
    return {
        "swapped": items("sigmoid", swapped),
        "turned": links.logistic(-0.1 * seq.d),
        "smoothed and swapped": items("cdpo", swapped, label_smoothing=0.5),
        "smoothed": items("cdpo", seq, label_smoothing=0.5),
    }


@quick
@given(st.floats(-20, 20, width=32), st.floats(-20, 20, width=32))
def test_a_shift_by_prompt_changes_no_loss_of_differences(shift, other):
    want = of_differences(0.0, 0.0)  # p + shift is rounded to 4e-6
    for name, value in of_differences(shift, other).items():
        close(value, want[name], rtol=1e-5, atol=1e-5)


@jax.jit
def of_differences(shift, other):
    moved = GOLDEN._replace(p=GOLDEN.p + shift, q=GOLDEN.q + other)
    names = ("sigmoid", "hinge", "ipo_sum", "robust", "exo_pair", "discopop", "aot")
    return {name: items(name, moved) for name in names}


def test_nca_is_least_where_beta_a_is_log_two():
    a = np.log(2) / 0.1
    seq = log_ratios([[a, -1e4]] * 4)  # the rejected term vanishes
    close(mean("nca_pair", seq, beta=0.1), 0.954771)
    close(slope("nca_pair", seq, beta=0.1)[0, 0], 0, atol=1e-7)


@pytest.mark.parametrize("name, hyper", [("todo", {"alpha": 0.7}), ("dpo_rk", {}), ("dpo_d", {})])
def test_probabilities_of_win_loss_and_tie_add_to_one(name, hyper):
    swapped = SeqStats(GOLDEN.p[:, ::-1], GOLDEN.q[:, ::-1], GOLDEN.n[:, ::-1])
    tie, no = Batch(ties=jnp.ones(4, bool)), Batch(ties=jnp.zeros(4, bool))
    p = [
        jnp.exp(-items(name, s, b, **hyper))
        for s, b in ((GOLDEN, no), (swapped, no), (GOLDEN, tie))
    ]
    close(sum(p), 1.0)


def test_an_identical_pair_teaches_a_loss_of_differences_nothing():
    same = SeqStats(*(x[:, :1].repeat(2, 1) for x in GOLDEN[:3]))
    names = ["sigmoid", "hinge", "ipo", "ipo_sum", "robust", "exo_pair", "discopop", "simpo", "aot"]
    for g in jax.jit(lambda seq: [slope(name, seq) for name in names])(same):
        close(g.sum(-1), 0.0, atol=1e-7)


@pytest.mark.parametrize("kind", ["one-hot", "uniform"])
def test_policy_weight_is_one(kind):
    log_p = 0.0 if kind == "one-hot" else -np.log(5)
    lp = jnp.full((4, 2, 1), log_p)
    tokens = Tokenwise(lp, lp, jnp.ones((4, 2, 1), bool), log_sum_p2=lp)
    seq = GOLDEN._replace(tokens=tokens, n=jnp.ones((4, 2)))
    close(items("wpo", seq), items("sigmoid", seq))


def test_the_safe_response_becomes_the_chosen_one():
    unsafe = jnp.array([[True, False], [False, True], [True, True], [False, False]])
    got = items("safedpo", batch=Batch(unsafe=unsafe), delta=0)
    close(got, links.logistic(0.1 * jnp.asarray(D) * jnp.array([-1, 1, 1, 1])))
    got = items("safedpo", batch=Batch(unsafe=unsafe), delta=10)
    close(got[1], links.logistic(0.1 * jnp.asarray(D[1]) - 10))


def test_a_linear_schedule_ends_at_its_end():
    for x in (0.0, 0.5, 1.0):
        got = items("dpo_shift", batch=Batch(progress=jnp.asarray(x)), f=0.95, final=1.0)
        close(got, items("dpo_shift", f=0.95 + 0.05 * x))


# ---- weights of tokens


def test_neutral_token_weights_are_dpo():
    tokens, _ = example(resolve("sigmoid"))
    plain = statistics(tokens, resolve("sigmoid"))
    ones = tokens._replace(weights=jnp.ones_like(tokens.lp))
    for name, hyper, given_ in (
        ("sigmoid", {"ld_alpha": 1.0}, tokens),
        ("d2po_decay", {"gamma": 1.0}, tokens),
        ("tis_dpo", {}, ones),
        ("dmpo", {}, tokens._replace(turn=jnp.zeros_like(tokens.turn))),
    ):
        seq = statistics(given_, resolve(name, **hyper))
        close(items(name, seq, **hyper), items("sigmoid", plain))
        close(seq.plain, plain.p)


def test_equal_lengths_leave_length_corrections_nothing_to_do():
    tokens, _ = example(resolve("sigmoid"))
    mask = tokens.mask.at[:, 1].set(tokens.mask[:, 0])
    tokens = tokens._replace(mask=mask)
    want = items("sigmoid", statistics(tokens, resolve("sigmoid")))
    for name, hyper in (("ld_dpo", {}), ("sampo", {}), ("sampo", {"independent": True})):
        spec = resolve(name, **hyper)
        close(loss(spec, statistics(tokens, spec, key=PRNG))[0], want)


def test_sampo_draws_as_many_tokens_as_the_shorter_response_has():
    spec, t = resolve("sampo"), 6
    mask = jnp.asarray(np.arange(t) < np.array([[[6], [2]], [[3], [5]]]))
    tokens = Tokenwise(jnp.full((2, 2, t), -1.0), jnp.full((2, 2, t), -1.0), mask)
    seen = np.zeros((2, 2, t))
    lp = -(2.0 ** jnp.arange(t)) * jnp.ones((2, 2, t))  # the sum names the tokens
    named = tokens._replace(lp=lp, ref_lp=lp)
    draw = jax.jit(jax.vmap(lambda key: statistics(named, spec, key=key)[:2]))
    for p, q in zip(*draw(jax.random.split(PRNG, 30))):
        drawn = (-np.asarray(p)[..., None]).astype(int) >> np.arange(t) & 1
        assert (drawn.sum(-1) == [[2, 2], [3, 3]]).all() and not (drawn & ~np.asarray(mask)).any()
        close(p, q)  # the same tokens of the reference
        seen += drawn
    assert (seen[np.asarray(mask)] > 0).all()
    seq = statistics(named, resolve("sampo", independent=True), key=PRNG)
    assert (np.asarray(seq.p) != np.asarray(seq.q)).any()


def test_turn_weights_fall_and_are_one_at_the_first_turn():
    tokens, _ = example(resolve("dmpo"), b=1, t=6)
    mask = jnp.ones((1, 2, 6), bool)
    tokens = tokens._replace(mask=mask, lp=-jnp.eye(6)[None, :2])
    gamma, turns = 0.7, 3
    phi = [gamma**i * (1 - gamma ** (turns - i)) / (1 - gamma**turns) for i in range(turns)]
    at = -jnp.eye(6)[:, None, None].repeat(2, 2)  # one place at a time
    weights = jax.vmap(lambda lp: statistics(tokens._replace(lp=lp), resolve("dmpo")).p)(at)
    close(-weights, np.repeat(phi, 2)[:, None, None] * np.ones((1, 1, 2)))
