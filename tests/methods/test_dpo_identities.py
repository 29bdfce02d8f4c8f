"""What must hold between the preference losses, and of each of them whatever the numbers."""

import itertools
import sys
from functools import partial
from operator import itemgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.methods.dpo import batchwise, divergences, links
from jaxrepro.methods.dpo.objective import from_slopes, linearise
from jaxrepro.methods.dpo.registry import (
    REGISTRY,
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
from dpo_golden import GOLDEN, D, example, first, items, log_ratios, mean

KEYS = sorted(REGISTRY)
quick = settings(max_examples=25, deadline=None, derandomize=True)
real = st.floats(-30, 30, width=32)
PRNG = jax.random.key(0)


def close(x, want, **kw):
    np.testing.assert_allclose(x, want, **({"rtol": 1e-5, "atol": 2e-6} | kw))


def slope(name, seq=GOLDEN, batch=None, **hyper):
    """Gradient of the summed loss by p."""
    return jax.grad(lambda p: items(name, seq._replace(p=p), batch, **hyper).sum())(seq.p)


# ---- limits in which a loss becomes another

SCORES = Batch(scores=jnp.array([[1.0, 0], [2, 0], [0.5, 0], [3, 0]]))
ZERO_KL = Tokenwise(jnp.zeros((4, 2, 1)), None, jnp.ones((4, 2, 1), bool), kl=jnp.zeros((4, 2, 1)))
LIMITS = [
    ("robust", {"label_smoothing": 0}, None),
    ("cdpo", {"label_smoothing": 0}, None),
    ("sigmoid", {"divergence": "alpha", "divergence_alpha": 1e-4}, None),
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


@pytest.mark.parametrize("name, hyper, batch", LIMITS)
def test_limit_is_dpo(name, hyper, batch):
    seq = GOLDEN
    if name == "aot":  # of one pair, sorting does nothing
        seq = jax.tree.map(lambda x: x[:1], seq)
    close(mean(name, seq, batch, **hyper), mean("sigmoid", seq), rtol=2e-4)


def test_tdpo_without_divergence_is_dpo():
    seq = GOLDEN._replace(tokens=ZERO_KL)
    for name in ("tdpo1", "tdpo2"):
        close(items(name, seq), items("sigmoid"))


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
    seq = log_ratios(np.asarray(rows, np.float32))
    flipped = log_ratios(np.asarray(rows, np.float32)[:, ::-1].copy())
    expected = (1 - e) * items("robust", seq, label_smoothing=e) + e * items(
        "robust", flipped, label_smoothing=e
    )
    close(expected, items("sigmoid", seq), rtol=1e-3, atol=1e-3 / (1 - 2 * e))


@quick
@given(st.lists(st.tuples(real, real), min_size=4, max_size=4))
def test_gradient_of_dpo_is_the_closed_form(rows):
    seq = log_ratios(np.asarray(rows, np.float32))
    want = -0.1 * jax.nn.sigmoid(-0.1 * seq.d)
    close(slope("sigmoid", seq), jnp.stack([want, -want], 1), atol=1e-6)


@quick
@given(st.lists(st.tuples(real, real), min_size=4, max_size=4))
def test_swapping_a_pair_turns_the_sign(rows):
    seq = log_ratios(np.asarray(rows, np.float32))
    swapped = SeqStats(seq.p[:, ::-1], seq.q[:, ::-1], seq.n[:, ::-1])
    close(items("sigmoid", swapped), links.logistic(-0.1 * seq.d))
    close(items("cdpo", swapped, label_smoothing=0.5), items("cdpo", seq, label_smoothing=0.5))


@quick
@given(st.floats(-20, 20, width=32), st.floats(-20, 20, width=32))
def test_a_shift_by_prompt_changes_no_loss_of_differences(shift, other):
    moved = GOLDEN._replace(p=GOLDEN.p + shift, q=GOLDEN.q + other)
    for name in ("sigmoid", "hinge", "ipo_sum", "robust", "exo_pair", "discopop", "aot"):
        close(items(name, moved), items(name), rtol=2e-4, atol=2e-4)


def test_nca_is_least_where_beta_a_is_log_two():
    a = np.log(2) / 0.1
    seq = log_ratios([[a, -1e4]])  # the rejected term vanishes
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
    for i in range(30):
        lp = -(2.0 ** jnp.arange(t)) * jnp.ones((2, 2, t))  # the sum names the tokens
        seq = statistics(tokens._replace(lp=lp, ref_lp=lp), spec, key=jax.random.key(i))
        drawn = (-np.asarray(seq.p)[..., None]).astype(int) >> np.arange(t) & 1
        assert (drawn.sum(-1) == [[2, 2], [3, 3]]).all() and not (drawn & ~np.asarray(mask)).any()
        close(seq.p, seq.q)  # the same tokens of the reference
        seen += drawn
    assert (seen[np.asarray(mask)] > 0).all()
    spec = resolve("sampo", independent=True)
    lp = -(2.0 ** jnp.arange(t)) * jnp.ones((2, 2, t))
    seq = statistics(tokens._replace(lp=lp, ref_lp=lp), spec, key=PRNG)
    assert (np.asarray(seq.p) != np.asarray(seq.q)).any()


def test_turn_weights_fall_and_are_one_at_the_first_turn():
    tokens, _ = example(resolve("dmpo"), b=1, t=6)
    mask = jnp.ones((1, 2, 6), bool)
    tokens = tokens._replace(mask=mask, lp=-jnp.eye(6)[None, :2])
    gamma, turns = 0.7, 3
    phi = [gamma**i * (1 - gamma ** (turns - i)) / (1 - gamma**turns) for i in range(turns)]
    for place in range(6):
        lp = jnp.zeros((1, 2, 6)).at[:, :, place].set(-1.0)
        seq = statistics(tokens._replace(lp=lp), resolve("dmpo"))
        close(-seq.p, phi[place // 2])


# ---- every loss


def run(name, seed=0, **kw):
    spec = resolve(name)
    tokens, batch = example(spec, seed=seed, **kw)

    def value(lp, kl, batch=batch):
        t = tokens._replace(lp=lp, kl=kl)
        seq = statistics(t, spec, key=PRNG)
        per_item, state, curves = loss(spec, seq, batch)
        return per_item.mean(), (per_item, state, curves)

    (_, out), grad = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(tokens.lp, tokens.kl)
    return spec, tokens, batch, out, grad


@pytest.fixture(scope="module")
def everything():
    return {name: run(name) for name in KEYS}


@pytest.mark.parametrize("name", KEYS)
def test_loss_and_gradient_are_finite_and_padding_has_none(everything, name):
    spec, tokens, _, (per_item, state, curves), (g, g_kl) = everything[name]
    assert per_item.shape == (4,) and np.isfinite(per_item).all()
    assert np.isfinite(g).all() and np.abs(g).max() > 0
    assert not np.asarray(g)[~np.asarray(tokens.mask)].any()
    assert not np.asarray(g_kl)[~np.asarray(tokens.mask)].any()
    assert (state is None) == (spec.state is None)
    for total_, weight in curves.values():
        assert np.isfinite(total_) and weight >= 0


def padded(x, mask, junk):
    fill = jnp.asarray(junk if jnp.issubdtype(x.dtype, jnp.floating) else 0, x.dtype)
    return jnp.pad(jnp.where(mask, x, fill), ((0, 0), (0, 0), (0, 2)), constant_values=fill)


TOKENWISE = {"log_sum_p2", "ref_entropy", "kl", "weights", "turn", "tokens"}
READS_TOKENS = ["sigmoid", "sft", "wpo", "ld_dpo"] + [
    n for n in KEYS if REGISTRY[n].needs & TOKENWISE or REGISTRY[n].weighting in ("decay", "turns")
]


@pytest.mark.parametrize("name", READS_TOKENS)  # all others see sums alone
def test_padding_changes_nothing_whatever_it_holds(everything, name):
    spec, tokens, batch, (per_item, _, _), _ = everything[name]
    t = jax.tree.map(partial(padded, mask=tokens.mask, junk=np.nan), tokens)
    close(loss(spec, statistics(t, spec), batch)[0], per_item)


BOUND = {"beta_dpo", "rpo_rel"}  # a draw by position; weights between prompts


@pytest.mark.parametrize("name", [n for n in KEYS if n not in BOUND])
def test_order_of_the_items_does_not_matter(everything, name):
    spec, tokens, batch, (per_item, _, _), _ = everything[name]
    if spec.weighting == "subsample":
        return
    order = jnp.array([2, 0, 3, 1])
    turn = lambda x: x[order] if x is not None and jnp.ndim(x) else x
    t, b = jax.tree.map(turn, tokens), Batch(*(turn(x) for x in batch))
    got = loss(spec, statistics(t, spec), b)[0]
    if name in ("aot", "aot_unpaired"):  # sorted: the items are places, not pairs
        close(jnp.sort(got), jnp.sort(per_item))
    else:
        close(got, per_item[order])
    close(got.mean(), per_item.mean())


@pytest.mark.parametrize(
    "name", ["infonca", "nca_reward", "exo_rw", "pro", "lipo", "lire", "opo", "drpo", "rrhf"]
)
def test_a_missing_candidate_changes_nothing(name):
    spec = resolve(name)
    tokens, batch = example(spec)
    seq = statistics(tokens, spec)
    want = loss(
        spec,
        jax.tree.map(lambda x: x[:, :3], seq._replace(tokens=None)),
        batch._replace(scores=batch.scores[:, :3]),
    )[0]
    valid = jnp.ones((4, 4), bool).at[:, 3].set(False)
    ragged = batch._replace(valid=valid, scores=batch.scores.at[:, 3].set(5.0))
    close(loss(spec, seq, ragged)[0], want)
    g = jax.grad(lambda p: loss(spec, seq._replace(p=p), ragged)[0].sum())(seq.p)
    assert not np.asarray(g)[:, 3].any() and np.isfinite(g).all()


# Keys that are the same numbers on the golden batch at beta = 0.1, and why.
EQUAL = [
    {"sigmoid", "spin", "online_dpo", "step_dpo"}  # procedures: what is compared, not how
    | {"ld_dpo", "sampo", "d2po_decay"},  # these differ where statistics are made from tokens
    {"ipo_sum", "ipo_md"},
]


def test_no_two_keys_are_the_same_loss_but_for_the_listed():
    def numbers(name):
        spec = REGISTRY[name]
        hyper = {"beta": 0.1} if "beta" in spec.defaults else {}
        return np.concatenate([items(name, **hyper)[:, None], slope(name, **hyper)], 1)

    plain = [n for n in KEYS if REGISTRY[n].schema in ("pair", "step") and n != "wpo"]
    plain = [n for n in plain if REGISTRY[n].needs <= {"reference"}]
    seen = {n: numbers(n) for n in plain}
    same = lambda a, b: np.allclose(seen[a], seen[b], rtol=1e-5, atol=1e-8)
    for a, b in itertools.combinations(plain, 2):
        assert same(a, b) == any({a, b} <= group for group in EQUAL), (a, b)
    assert len(plain) > 35


def test_no_two_keys_are_the_same_on_tokens_but_for_procedures(everything):
    for a, b in itertools.combinations(KEYS, 2):
        (la, ga), (lb, gb) = ((everything[n][3][0], everything[n][4][0]) for n in (a, b))
        if ga.shape == gb.shape and not {a, b} <= {"sigmoid", "spin", "online_dpo"} | {"step_dpo"}:
            same = np.allclose(la, lb, rtol=1e-5) and np.allclose(ga, gb, rtol=1e-4, atol=1e-8)
            assert not same or {a, b} == {"ipo_sum", "ipo_md"}, (a, b)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "simpo", "kto", "infonca", "nash_md"])
def test_jit_gives_the_same(everything, name):
    spec, tokens, batch, (per_item, _, _), _ = everything[name]
    close(jax.jit(lambda t, b: loss(spec, statistics(t, spec), b)[0])(tokens, batch), per_item)


def test_hyper_parameters_may_be_swept_with_vmap():
    betas = jnp.array([0.05, 0.1, 0.5])
    got = jax.vmap(lambda beta: loss(resolve("sigmoid", beta=beta), GOLDEN)[0].mean())(betas)
    close(got, [mean("sigmoid", beta=float(b)) for b in betas])


def test_extreme_log_ratios_stay_finite():
    huge = log_ratios([[300.0, -300.0], [-300.0, 300.0], [300.0, 300.0], [0.0, 0.0]])
    for name in KEYS:
        spec = REGISTRY[name]
        if spec.schema != "pair" or spec.needs - {"reference"} or spec.hyper.get("use_weighting"):
            continue
        for kind in divergences.DIVERGENCES if "divergence" in spec.defaults else ("reverse_kl",):
            hyper = {"divergence": kind} if kind != "reverse_kl" else {}
            assert np.isfinite(items(name, huge, **hyper)).all(), (name, kind)
            assert np.isfinite(slope(name, huge, **hyper)).all(), (name, kind)


def test_orpo_of_a_certain_policy_is_finite():
    seq = SeqStats(jnp.array([[0.0, -1e-9], [-1e-4, -50.0]]), None, jnp.ones((2, 2)))
    assert np.isfinite(items("orpo", seq)).all() and np.isfinite(slope("orpo", seq)).all()


# ---- states


def test_running_mean_is_the_mean_of_everything():
    rng = np.random.default_rng(0)
    state, seen = None, []
    batch = Batch(labels=jnp.arange(5) < 2)
    for _ in range(4):
        a = rng.normal(size=(5, 1)) * 3
        seen.append(0.1 * a)
        per_item, state, curves = loss(resolve("bco"), log_ratios(a), batch, state)
        close(state.mean, np.mean(seen), atol=1e-6)
        close(curves["delta"][0], np.mean(seen), atol=1e-6)
    z = 0.1 * a[:, 0] - np.mean(seen)
    close(per_item, np.where(np.arange(5) < 2, np.logaddexp(0, -z), np.logaddexp(0, z)))


def test_moving_averages_start_at_zero_and_can_be_corrected():
    x = jnp.array([1.0, 2.0, 4.0])
    state = batchwise.Ema.start().update(x, decay=0.9)
    close(state.mean, 0.1 * x.mean())
    close(state.std, 0.1 * x.std(ddof=1))
    close(state.read(decay=0.9, bias_correction=True), [x.mean(), x.std(ddof=1)])


@pytest.mark.parametrize("name", ["beta_dpo", "alpha_dpo"])
def test_first_step_at_the_reference_is_defined(name):
    seq = GOLDEN._replace(p=GOLDEN.q)
    value, state, _ = loss(resolve(name), seq, Batch(key=PRNG))
    assert np.isfinite(value).all() and all(np.isfinite(x) for x in state)


def test_selection_keeps_the_share_and_prefers_the_middle():
    counts = np.zeros(10)
    log_weight = -0.5 * (jnp.arange(10) - 4.5) ** 2
    for i in range(40):
        keep = batchwise.select(jax.random.key(i), log_weight, 4)
        assert int(keep.sum()) == 4
        counts += np.asarray(keep)
    assert counts[4:6].min() > counts[[0, 9]].max()
    far = sum(
        np.asarray(
            batchwise.select(jax.random.key(i), jnp.full(10, -1e6) - 1e5 * jnp.arange(10), 4)
        )
        for i in range(40)
    )
    assert far.min() > 5  # underflow everywhere: uniform


def test_dropped_pairs_have_no_gradient_and_the_mean_is_over_kept_ones():
    batch = Batch(key=PRNG)
    seq = log_ratios(np.random.default_rng(1).normal(size=(10, 2)))
    g = slope("beta_dpo", seq, batch)
    kept = np.asarray(g)[:, 0] != 0
    assert kept.sum() == 8
    value = items("beta_dpo", seq, batch)
    beta = float(loss(resolve("beta_dpo"), seq, batch)[2]["beta"][0])
    close(value.mean(), np.logaddexp(0, -beta * np.asarray(seq.d))[kept].mean())


# ---- micro-batches


def test_token_mean_of_a_cut_batch_is_that_of_the_whole():
    whole = mean("sft")
    n = GOLDEN.n[:, 0].mean()
    halves = [SeqStats(*(x[i::2] for x in GOLDEN[:3])) for i in range(2)]
    parts = [items("sft", half, Batch(mean_chosen_tokens=n)) for half in halves]
    close(np.concatenate(parts).mean(), whole)
    close(whole, -GOLDEN.p[:, 0].sum() / GOLDEN.n[:, 0].sum())


@pytest.mark.parametrize(
    "names",
    [
        ["aot"],
        ["dr_dpo"],
        ["beta_dpo"],
        ["kto"],
        ["bco"],
        ["tdpo1", "sft"],
        ["nash_md"],
        ["sigmoid", "aot_unpaired"],
    ],
)
def test_slopes_of_the_whole_batch_give_micro_batches_its_gradient(names):
    mixed = mix(names)
    tokens, batch = example(mixed[0][0])

    def stats(lp, kl, tokens=tokens):
        return statistics(tokens._replace(lp=lp, kl=kl), mixed[0][0])

    def whole(lp, kl):
        return total(mixed, stats(lp, kl), batch)[0].sum()

    slopes, states, _ = linearise(mixed, stats(tokens.lp, tokens.kl), batch)
    want = jax.value_and_grad(whole, argnums=(0, 1))(tokens.lp, tokens.kl)
    got = [0.0, jnp.zeros_like(tokens.lp), jnp.zeros_like(tokens.lp)]
    for i in range(2):
        rows = jax.tree.map(itemgetter(slice(i, None, 2)), (tokens, slopes))

        def part(lp, kl, rows=rows):
            return from_slopes(rows[1], stats(lp, kl, rows[0])).sum()

        v, (g, g_kl) = jax.value_and_grad(part, argnums=(0, 1))(rows[0].lp, rows[0].kl)
        got = [got[0] + v, got[1].at[i::2].set(g), got[2].at[i::2].set(g_kl)]
    close(got[0], want[0])
    close(got[1], want[1][0])
    close(got[2], want[1][1])
    after = total(mixed, stats(tokens.lp, tokens.kl), batch)[1]
    jax.tree.map(close, states, after)
