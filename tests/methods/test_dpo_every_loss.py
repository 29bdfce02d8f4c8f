"""What must hold of every preference loss, whatever it is."""

import itertools
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.methods.dpo import divergences
from jaxrepro.methods.dpo.registry import REGISTRY, Batch, SeqStats, loss, resolve, statistics

sys.path.insert(0, str(Path(__file__).parent))
from dpo_golden import GOLDEN, close, example, items, log_ratios, mean, slope

KEYS = sorted(REGISTRY)
PRNG = jax.random.key(0)


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


LISTS = ["infonca", "nca_reward", "exo_rw", "pro", "lipo", "lire", "opo", "drpo", "rrhf"]


@pytest.mark.parametrize("name", LISTS)
def test_a_missing_candidate_changes_nothing_whatever_it_holds(everything, name):
    spec, tokens, batch, *_ = everything[name]
    seq = statistics(tokens, spec)._replace(tokens=None)
    batch = batch._replace(valid=jnp.ones((4, 4), bool).at[:, 3].set(False))
    want = loss(spec, seq, batch)[0]
    junk = seq._replace(p=seq.p.at[:, 3].set(-300.0), n=seq.n.at[:, 3].set(1.0))
    close(loss(spec, junk, batch._replace(scores=batch.scores.at[:, 3].set(5.0)))[0], want)
    g = jax.grad(lambda p: loss(spec, seq._replace(p=p), batch)[0].sum())(seq.p)
    assert not np.asarray(g)[:, 3].any() and np.isfinite(g).all()
    if name in ("infonca", "pro", "lipo"):  # it is as if it had never been there
        three = SeqStats(*(x[:, :3] for x in seq[:3]))
        close(loss(spec, three, Batch(scores=batch.scores[:, :3]))[0], want)


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
    p = jnp.array([[0.0, -1e-9], [-1e-4, -50.0], [-1.0, -1e-7], [0.0, 0.0]])
    seq = SeqStats(p, None, jnp.ones((4, 2)))
    assert np.isfinite(items("orpo", seq)).all() and np.isfinite(slope("orpo", seq)).all()
