"""Golden values of the preference losses: a batch of four pairs, computed by hand in double precision."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.methods.dpo import batchwise, diffusion, unpaired
from jaxrepro.methods.dpo.registry import REGISTRY, Batch, SeqStats, Tokenwise, resolve, statistics
from jaxrepro.methods.dpo.sequence import policy_weight
from jaxrepro.methods.dpo.tokens import dispersion, importance

sys.path.insert(0, str(Path(__file__).parent))
from dpo_golden import GOLDEN, columns, first, items, log_ratios, mean

LN2 = float(np.log(2))


def close(x, want):
    np.testing.assert_allclose(x, want, rtol=1e-5, atol=2e-6)


PAIRS = [
    ("sigmoid", {}, 0.709858),
    ("sigmoid", {"divergence": "forward_kl"}, 0.705202),
    ("sigmoid", {"divergence": "jensen_shannon"}, 0.698212),
    ("fdpo", {}, 0.698212),
    ("sigmoid", {"divergence": "alpha"}, 0.706195),
    ("hinge", {}, 1.025),
    ("cdpo", {}, 0.707358),
    ("robust", {}, 0.712983),
    ("ipo", {}, 24.530679),
    ("ipo", {"divergence": "jensen_shannon"}, 24.765676),
    ("ipo_sum", {}, 30.875),
    ("exo_pair", {}, 2.808236),
    ("nca_pair", {"beta": 0.1}, 1.394536),
    ("bco_pair", {"beta": 0.1}, 1.401020),
    ("sppo_hard", {"beta": 0.1}, 54.28125),
    ("aot_unpaired", {"beta": 0.1}, 0.705764),
    ("apo_zero", {}, 1.006234),
    ("apo_down", {}, 1.007759),
    ("discopop", {"beta": 0.1}, 0.826764),
    ("sigmoid_norm", {}, 0.690736),
    ("sigmoid_norm", {"divergence": "jensen_shannon"}, 0.691962),
    ("simpo", {}, 1.235551),
    ("cpo", {"alpha": 0}, 0.749228),
    ("orpo", {"nll_weight": 0}, 0.065691),
    ("dpop", {}, 2.304009),
    ("rdpo_len", {"alpha": 0.05}, 0.639470),
    ("simper", {}, -0.017357),
    ("cal_dpo", {"beta": 0.1}, 28.320748),
    ("dpo_shift", {}, 0.708847),
    ("dr_dpo", {}, 0.705621),
    ("chipo", {}, 0.762414),
    ("chipo", {"r_max": 0.1}, 0.698139),
    ("slic_hf", {"lam": 0}, 2.375),
    ("alphapo", {}, 0.673216),
    ("gpo", {"link": "exponential"}, 1.042357),
    ("gpo", {"link": "truncated_square"}, 1.08375),
    ("gpo", {"link": "savage"}, 0.258292),
]


@pytest.fixture(scope="module")
def means():
    """Mean losses of the golden batch, compiled together; keys as in `PAIRS`."""
    run = lambda seq: {f"{n} {h}": items(n, seq, **h).mean() for n, h, _ in PAIRS}
    return jax.device_get(jax.jit(run)(GOLDEN))


@pytest.mark.parametrize("name, hyper, want", PAIRS)
def test_mean_over_the_golden_batch(means, name, hyper, want):
    close(means[f"{name} {hyper}"], want)


def test_each_pair_of_dpo():
    close(items("sigmoid"), [0.598139, 0.770957, 0.644397, 0.825939])


def test_losses_with_annotations():
    scores = jnp.array([[1.0, 0], [2, 0], [0.5, 0], [3, 0]])
    close(mean("odpo", batch=Batch(scores=scores)), 0.937961)
    for tie, want in ((False, 0.993574), (True, 1.414748)):
        close(mean("todo", batch=Batch(ties=jnp.full(4, tie)), beta=0.1), want)
    gaps = jnp.array([[1.0, 0], [-1, 0], [0, 0], [2, 0]])
    close(mean("modpo", batch=Batch(rewards=gaps[..., None])), 1.154426)
    close(mean("rrhf", batch=Batch(scores=scores), rank_weight=1, nll_weight=0), 0.039062)


def test_kto_at_a_given_reference_point():
    shift = Batch(kl_p=jnp.full(4, -1.0), kl_q=jnp.full(4, -1.2))
    for k, label, want in ((1, True, 0.503430), (2, False, 0.502808)):
        batch = shift._replace(labels=jnp.full(4, label))
        close(mean("kto", first(GOLDEN, k), batch), want)


def test_unlearning():
    close(mean("npo", first(GOLDEN, 2)), 14.202378)
    close(mean("simnpo", first(GOLDEN, 2), forget_weight=1), 0.031765)


def test_aot_sorts_policy_and_reference_apart():
    p, q = [2.5, -2.5, 1.5, -5], [3, -1, -2, 0.5]
    zeros, n = np.zeros(4), np.ones(4)
    seq = SeqStats(columns(p, zeros), columns(q, zeros), columns(n, n))
    close(mean("aot", seq, beta=0.1), 0.747042)
    close(mean("sigmoid", seq), 0.757073)


def test_lists_of_four():
    seq = log_ratios([[1, -1, 0.75, -0.25]])
    batch = Batch(scores=jnp.array([[0.9, 0.1, 0.6, 0.3]]))
    close(mean("infonca", seq, batch, beta=0.1, alpha=1), 1.366590)
    close(mean("nca_reward", seq, batch, beta=0.1, alpha=1), 1.376541)
    close(mean("exo_rw", seq, batch), 0.026189)


def test_lipo_ranks_by_score():
    batch = Batch(scores=jnp.array([[0.9, 0.1, 0.6, 0.3]]))
    close(mean("lipo", log_ratios([[1, -0.5, 0.75, -1]]), batch), 0.909306)


def test_pro_without_likelihood():
    pb = jnp.array([[-1.2, -1.22, -1.5, -1.3]])
    batch = Batch(scores=jnp.array([[3, 2, 1.5, 0]]))
    close(mean("pro", SeqStats(pb, None, jnp.ones_like(pb)), batch, sft_weight=0), 5.635808)


def test_beta_dpo_with_all_kept_and_moving_mean_zero():
    # 0.9 m + 0.1 mean(D) = 0: the average that is used is the updated one
    state = batchwise.Ema(jnp.array(0.25 / 9), jnp.array(1.0), jnp.array(1.0))
    batch = Batch(key=jax.random.key(0))
    close(mean("beta_dpo", batch=batch, state=state, rho=0), 0.706816)


def test_alpha_dpo_at_the_statistics_of_the_batch():
    m = (GOLDEN.pb - GOLDEN.qb)[:, 0] - (GOLDEN.pb - GOLDEN.qb)[:, 1]
    state = batchwise.Ema(m.mean(), m.std(ddof=1), jnp.array(1.0))  # a fixed point of the update
    close(mean("alpha_dpo", state=state), 1.629092)


def test_diffusion_errors():
    noise = jnp.zeros((1, 1))
    root = lambda w, l: jnp.sqrt(jnp.array([[[w], [l]]]))
    seq = diffusion.noise_statistics(noise, root(0.10, 0.12), root(0.1002, 0.1199))
    np.testing.assert_allclose(mean("diffusion_dpo", seq), 0.386871, atol=2e-4)  # 1e-8 times 2500
    seq = SeqStats(-jnp.array([[0.10, 0.12]]), -jnp.array([[0.1002, 0.1199]]), jnp.ones((1, 2)))
    np.testing.assert_allclose(mean("diffusion_dpo", seq), 0.386871, atol=5e-5)


# ---- tokens

CHOSEN, CHOSEN_REF = [-1, -0.5, -0.25, -0.75], [-0.8, -0.6, -0.75, -1.25]
REJECTED, REJECTED_REF = [-0.3, -1.2], [-0.4, -1.0]


def token_pair(junk=7.0):
    pad = [junk, junk]
    rows = [[CHOSEN, REJECTED + pad]], [[CHOSEN_REF, REJECTED_REF + pad]]
    lp, ref = (jnp.asarray(x, jnp.float32) for x in rows)
    return Tokenwise(lp, ref, jnp.array([[[True] * 4, [True, True, False, False]]]))


TOKENS = [
    ("sigmoid", {}, 0.644397),
    ("sigmoid", {"ld_alpha": 0.5}, 0.668460),
    ("ld_dpo", {}, 0.668460),
    ("sigmoid", {"ld_alpha": 0.5, "ld_reference": False}, 0.620957),
    ("sigmoid", {"ld_alpha": 0}, 0.693147),
    ("d2po_decay", {"gamma": 0.9}, 0.660423),
    ("sigmoid_norm", {}, 0.679492),
    ("ipo", {}, 22.325625),
    ("simpo", {"gamma": 0.5}, 0.825939),
]


@pytest.mark.parametrize("name, hyper, want", TOKENS)
def test_token_level_pair(name, hyper, want):
    seq = statistics(token_pair(), resolve(name, **hyper))
    close(mean(name, seq, **hyper), want)


def softmax_rows(rows):
    z = np.asarray(rows, np.float64)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_policy_weight_and_dispersion_of_two_tokens():
    log_p = softmax_rows([[2, 0, -1], [0.5, 0.5, 0.5]])
    lp = np.array([log_p[0, 0], log_p[1, 2]])
    sum_p2 = np.log(np.exp(2 * log_p).sum(-1))
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    both = lambda x: jnp.asarray(np.stack([x, x])[None], jnp.float32)
    mask = jnp.ones((1, 2, 2), bool)
    tokens = Tokenwise(both(lp), both(lp), mask, both(sum_p2), both(entropy))
    seq = statistics(tokens, resolve("sigmoid"))
    close(policy_weight(seq), 1.077488**2)
    close(policy_weight(seq, clamp=True), 1.0)
    close(dispersion(seq, 3, 1.0), -np.log(0.738604))
    close(mean("sigmoid", seq, use_weighting=True), LN2 * 1.077488**2)


def test_token_divergence_of_tdpo():
    kl = np.array([[[0.4], [0.7]], [[0.2], [0.1]]], np.float32)
    seq = log_ratios([[2, 0], [-1.5, 0]], np.ones((2, 2)))
    mask = jnp.ones((2, 2, 1), bool)
    seq = seq._replace(tokens=Tokenwise(jnp.zeros((2, 2, 1)), None, mask, kl=jnp.asarray(kl)))
    close(items("tdpo1", seq), [0.611755, 0.765595])
    close(items("tdpo2", seq), [0.604919, 0.768273])


def test_token_kl_of_the_golden_rows():
    log_p, log_q = (
        softmax_rows(x) for x in ([[2, 0, -1], [0.5] * 3], [[1, 0, 0], [0, 0, 1]])
    )  # what the batch's kl must hold: KL(ref || pi)
    close((np.exp(log_q) * (log_q - log_p)).sum(-1), [0.254226, 0.123284])


def test_importance_weights_of_tokens():
    got = importance(jnp.array([[[-9.0, 0.0, 9.0], [-9.0, 0.0, 9.0]]]))
    close(got, [[[0.7, 1.0, 1.3], [1.3, 1.0, 0.7]]])


# ---- at policy = reference every loss has a known value


@pytest.mark.parametrize(
    "name, hyper, want",
    [
        *((n, {}, LN2) for n in ("sigmoid", "robust", "cdpo", "sigmoid_norm", "dr_dpo", "aot")),
        ("hinge", {}, 1),
        ("kto_pair", {}, 0.5),
        ("apo_zero", {}, 1),
        ("apo_down", {}, 1),
        ("nca_pair", {}, 2 * LN2),
        ("bco_pair", {}, 2 * LN2),
        ("discopop", {}, 0.5 * LN2 + 0.5),
        ("ipo", {}, 25),
        ("sppo_hard", {"beta": 0.1}, 50),
        ("npo", {}, 20 * LN2),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_at_the_reference(name, hyper, want, seed):
    p = -jnp.asarray(np.random.default_rng(seed).uniform(1, 50, (4, 2)), jnp.float32)
    seq = SeqStats(p, p, GOLDEN.n)
    close(mean(name, first(seq) if REGISTRY[name].schema == "forget" else seq, **hyper), want)


def test_kto_at_the_reference_is_one_half():
    zero = jnp.zeros(4)
    batch = Batch(labels=jnp.arange(4) < 2, kl_p=zero, kl_q=zero)
    close(items("kto", log_ratios(np.zeros((4, 1))), batch), 0.5)


def test_density_ratio_is_clipped():
    got = unpaired.density_ratio(jnp.array([0.1, 0.5, 0.75, 0.99]))
    close(got, [0.5, 1, 3, 10])
