"""Losses without a published number, written out a second time: numpy, double precision, one item at a time."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.methods.dpo.links import policy_kl
from jaxrepro.methods.dpo.listwise import soft_ndcg
from jaxrepro.methods.dpo.registry import Batch, loss, resolve, statistics

sys.path.insert(0, str(Path(__file__).parent))
from dpo_golden import close, example, first, items, log_ratios, mean

S = lambda z: np.logaddexp(0, -z)
sig = lambda z: 1 / (1 + np.exp(-z))


class Item:
    """One item: sums p, q, lengths n, mean log-probs, and its fields of the batch."""

    def __init__(self, tokens, batch, i):
        tokens, batch = jax.tree.map(np.asarray, (tokens, batch._replace(key=None)))
        mask = np.asarray(tokens.mask[i])
        sums = {
            k: np.where(mask, np.asarray(v[i], np.float64), 0).sum(-1)
            for k, v in tokens._asdict().items()
            if v is not None
        }
        self.p, self.q, self.n = sums["lp"], sums["ref_lp"], mask.sum(-1)
        self.pb, self.qb, self.a = self.p / self.n, self.q / self.n, self.p - self.q
        self.kl, self.entropy = sums["kl"], sums["ref_entropy"] / self.n
        self.d = self.a[0] - self.a[-1]
        for name in ("scores", "labels", "value", "reward_head", "probability", "age", "explore"):
            setattr(self, name, np.asarray(getattr(batch, name)[i], np.float64))
        self.mean_n = np.asarray(tokens.mask).sum(-1).mean(0)  # of each response, over the batch
        phi = -0.29 * np.log(self.entropy[:2].mean() / np.log(7))
        self.phi = phi


def relaxed(x):
    p_l = x.p[1] * min(1, 0.9 * np.exp(0.4 * abs(x.pb[0] - x.pb[1])) - 1)
    return S(0.1 * (x.p[0] - p_l)) - x.p[0] / x.mean_n[0]


def lipo(x):
    s, r = 0.1 * x.a, x.scores
    rank = 1 + np.array([(s > v).sum() for v in s])
    out = 0
    for i in range(4):
        for j in range(4):
            if r[i] > r[j]:
                weight = abs(2 ** r[i] - 2 ** r[j])
                weight *= abs(1 / np.log(1 + rank[i]) - 1 / np.log(1 + rank[j]))
                out += weight * S(s[i] - s[j])
    return out


def rrhf(x):
    rank = sum(
        max(0, x.pb[i] - x.pb[j]) for i in range(4) for j in range(4) if x.scores[i] < x.scores[j]
    )
    best = x.scores.argmax()
    return 100 * rank - x.p[best] / x.mean_n[best]


def pro(x):
    r, out = x.scores, 0  # already best first
    for k in range(3):
        t = max(r[k] - r[i] for i in range(k + 1, 4))
        rest = sum(np.exp((r[k] - r[i]) * x.pb[i]) for i in range(k + 1, 4))
        out += np.log(np.exp(t * x.pb[k]) + rest) - t * x.pb[k]
    return out - 0.05 * 9 * x.p[0]


def dro(x):
    return 0.5 * (x.scores[0] - x.value - 0.1 * x.a[0]) ** 2


def drdo(x):
    z = x.p[0] - x.p[1]
    gap = (x.scores[0] - x.scores[1]) - (x.reward_head[0] - x.reward_head[1])
    return gap**2 - 0.1 * (1 - sig(z)) ** 2 * np.log(sig(z))


def lire(x):
    w = np.exp(x.p / 2)
    return -(x.scores * w).sum() / w.sum()


FORMULAS = {
    "cpo": ({"relaxed": True}, relaxed),
    "edpo": ({}, lambda x: (x.scores[0] - x.scores[1] - 0.1 * x.d) ** 2),
    "gdpo_soft": ({}, lambda x: S(0.1 * (2 * x.probability - 1) * x.d)),
    "ns_dpo": ({}, lambda x: 0.95**x.age * S(0.1 * x.d)),
    "sppo_soft": ({}, lambda x: 0.5 * ((x.a - 1000 * (x.scores - 0.5)) ** 2).sum()),
    "flex": ({}, lambda x: S(0.1 * x.a[0] - 0.05 * x.a[1])),
    "focalpo": ({}, lambda x: sig(0.1 * x.d) ** 0.05 * S(0.1 * x.d)),
    "drdo": ({}, drdo),
    "dro": ({}, dro),
    "ulma": ({}, lambda x: -x.p[0] if x.labels else S(-0.1 * x.a[0])),
    "apo_zero_unpaired": ({}, lambda x: sig(-0.1 * x.a[0]) if x.labels else sig(0.1 * x.a[0])),
    "npo": ({}, lambda x: 20 * S(-0.1 * x.a[0]) - x.p[1] / x.mean_n[1]),
    "simnpo": (
        {"gamma": 0.3},
        lambda x: 0.1375 * 0.8 * S(2.5 * (-x.pb[0] - 0.3)) - x.p[1] / x.mean_n[1],
    ),
    "slic_hf": ({}, lambda x: max(0, 1 - x.p[0] + x.p[1]) - 0.1 * x.p[0]),
    "tpo": ({}, lambda x: S(0.01 * (x.p[1] - x.p[2])) - x.p[0] / x.mean_n[0]),
    "tpo_l": ({}, lambda x: S(0.01 * (x.pb[1] - x.pb[2]) - 0.5) - x.p[0] / x.mean_n[0]),
    "xpo": ({"alpha": 0.1}, lambda x: S(0.1 * x.d) + 0.1 * x.p[int(x.explore)]),
    "selm": ({"alpha": 0.1}, lambda x: S(0.01 * x.d) + 0.1 * 0.01 * x.a[int(x.explore)]),
    "hypo": ({}, lambda x: S(0.1 * (x.a[0] - x.a[1])) + 0.01 * x.a[2]),
    "spo_soft": ({}, lambda x: S(0.1 * (x.p[0] - x.p[1])) + 0.01 * x.a[2]),
    "pmpo": ({}, lambda x: -0.5 * x.p[0] + 0.5 * x.p[1] + 0.5 * x.kl.mean()),
    "mallows": ({}, lambda x: S(10 * x.phi * (x.a[0] / x.n[0] - x.a[1] / x.n[1]))),
    "rainbow": (
        {},
        lambda x: S(10 * x.phi * (x.pb[0] - x.pb[1] - 0.5 * (x.qb[0] - x.qb[1]) - 0.25)),
    ),
    "rrhf": ({}, rrhf),
    "pro": ({}, pro),
    "lipo": ({}, lipo),
    "lire": ({}, lire),
    "mdpo_multi": ({}, lambda x: S(0.1 * (x.a[:2].mean() - x.a[2:].mean()))),
    "d2o": ({}, lambda x: S(0.1 * (x.a[:3].mean() - x.a[3]))),
}


SPECS = {name: resolve(name, **hyper) for name, (hyper, _) in FORMULAS.items()}
EXAMPLES = {name: example(spec) for name, spec in SPECS.items()}


@pytest.fixture(scope="module")
def losses():
    """The loss of each item of the examples, compiled together."""

    @jax.jit
    def run(given):
        return {n: loss(SPECS[n], statistics(t, SPECS[n]), b)[0] for n, (t, b) in given.items()}

    return jax.device_get(run(EXAMPLES))


@pytest.mark.parametrize("name", FORMULAS)
def test_loss_of_each_item_is_the_formula(losses, name):
    _, formula = FORMULAS[name]
    want = [formula(Item(*EXAMPLES[name], i)) for i in range(4)]
    close(losses[name], want, rtol=2e-5, atol=2e-5)


def test_relative_preferences_weigh_pairs_by_their_prompts():
    spec = resolve("rpo_rel")
    tokens, batch = example(spec)
    x = np.asarray(batch.embedding, np.float64)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    w = np.exp((x @ x.T - 1) / 0.5)
    w /= w.sum(-1, keepdims=True)
    rows = [Item(tokens, batch, i) for i in range(4)]
    want = [
        sum(w[i, j] * S(0.1 * (rows[i].a[0] - rows[j].a[1])) for j in range(4)) for i in range(4)
    ]
    close(loss(spec, statistics(tokens, spec), batch)[0], want)


def test_kto_clamps_a_negative_estimate_and_weighs_the_classes():
    batch = Batch(labels=jnp.arange(4) < 2, kl_p=jnp.full(4, -3.0), kl_q=jnp.full(4, -1.0))
    a = np.array([1.0, -2.0, 0.5, 3.0])
    got = items("kto", log_ratios(a[:, None]), batch, lambda_d=1.5, lambda_u=0.5)
    close(got, np.where(np.arange(4) < 2, 1.5 * sig(-0.1 * a), 0.5 * sig(0.1 * a)))


def test_retaining_with_kl_or_with_nothing():
    spec = resolve("npo")
    tokens, batch = example(spec)
    rows = [Item(tokens, batch, i) for i in range(4)]
    forget = np.array([20 * S(-0.1 * x.a[0]) for x in rows])
    seq = statistics(tokens, spec)
    tokens_kept = np.asarray(tokens.mask)[:, 1].sum(-1).mean()  # a token mean, as the NLL is
    close(
        items("npo", seq, retain="kl", retain_weight=2),
        forget + 2 * np.array([x.kl[1] for x in rows]) / tokens_kept,
    )
    close(items("npo", seq, retain="none"), forget)
    close(mean("npo", first(seq)), forget.mean())


def test_soft_ndcg_is_ndcg_where_the_temperature_is_low():
    score = np.array([[0.3, 2.0, -1.0, 0.9]])
    gain = np.array([[1.0, 3.0, 0.0, 7.0]])
    valid = jnp.ones((1, 4), bool)
    discount = 1 / np.log2(2 + np.arange(4))
    want = (gain[0][np.argsort(-score[0])] * discount).sum() / (
        np.sort(gain[0])[::-1] * discount
    ).sum()
    f = lambda s, tau: soft_ndcg(
        jnp.asarray(s, jnp.float32), jnp.asarray(gain, jnp.float32), valid, tau
    )
    close(f(score, 1e-3), [want])
    close(f(np.log1p(gain), 1e-3), [1.0])


def test_kl_from_samples_has_the_value_and_the_gradient_of_the_kl():
    """Over a whole distribution, weighted by it: what samples estimate."""
    z, ref = jnp.array([0.3, -1.0, 0.8]), jnp.array([0.1, 0.5, -0.4])
    log_q = jax.nn.log_softmax(ref)

    def exact(z):
        log_p = jax.nn.log_softmax(z)
        return (jnp.exp(log_p) * (log_p - log_q)).sum()

    def sampled(z):
        log_p = jax.nn.log_softmax(z)
        share = jax.lax.stop_gradient(jnp.exp(log_p))
        return (share * policy_kl(log_p - log_q, log_p)).sum()

    close(sampled(z), exact(z))
    close(jax.grad(sampled)(z), jax.grad(exact)(z))
