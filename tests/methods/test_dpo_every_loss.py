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
sys.path.insert(0, str(Path(__file__).parents[1]))
import meshes
from dpo_golden import GOLDEN, close, example, log_ratios, mean

KEYS = sorted(REGISTRY)
PRNG = jax.random.key(0)
ORDER = np.array([2, 0, 3, 1])


SPECS = {name: resolve(name) for name in KEYS}


def valued(f, p):
    """f(p), and the gradient of its sum."""

    def total(p):
        value = f(p)
        return value.sum(), value

    g, value = jax.grad(total, has_aux=True)(p)
    return value, g


def run(name, tokens, batch):
    """((loss of each item, state, curves), gradients by log-probs and by KL) of one loss."""
    spec = SPECS[name]

    def value(lp, kl):
        seq = statistics(tokens._replace(lp=lp, kl=kl), spec, key=PRNG)
        per_item, state, curves = loss(spec, seq, batch)
        return per_item.mean(), (per_item, state, curves)

    (_, out), grad = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(tokens.lp, tokens.kl)
    return out, grad


EXAMPLES = {name: example(spec) for name, spec in SPECS.items()}
WIDTH = {name: tokens.mask.shape[1] for name, (tokens, _) in EXAMPLES.items()}  # responses an item
BY_WIDTH = {WIDTH[name]: one for name, one in EXAMPLES.items()}  # equal for losses of one width


@partial(jax.jit, compiler_options=meshes.QUICK)
def run_all(by_width):
    """`run` of every loss, compiled once; they read the same arrays, so that what they share is too."""
    return {name: run(name, *by_width[WIDTH[name]]) for name in KEYS}


@pytest.fixture(scope="module")
def everything():
    found = jax.device_get(run_all(BY_WIDTH))
    return {name: (SPECS[name], *EXAMPLES[name], *found[name]) for name in KEYS}


@pytest.fixture(scope="module")
def reordered():
    """The same with the items in another order."""
    turn = lambda x: np.asarray(x)[ORDER] if x is not None and jnp.ndim(x) else x
    both = lambda t, b: (jax.tree.map(turn, t), Batch(*map(turn, b)))
    return jax.device_get(run_all({k: both(*one) for k, one in BY_WIDTH.items()}))


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


@pytest.fixture(scope="module")
def widened():
    """Losses of the examples with two more places and nan in all the padding."""

    @partial(jax.jit, compiler_options=meshes.QUICK)
    def losses(by_width):
        wide = lambda t: jax.tree.map(partial(padded, mask=t.mask, junk=np.nan), t)
        wider = {k: (wide(t), b) for k, (t, b) in by_width.items()}
        value = lambda spec, t, b: loss(spec, statistics(t, spec), b)[0]
        return {n: value(SPECS[n], *wider[WIDTH[n]]) for n in READS_TOKENS}

    return jax.device_get(losses(BY_WIDTH))


@pytest.mark.parametrize("name", READS_TOKENS)  # all others see sums alone
def test_padding_changes_nothing_whatever_it_holds(everything, widened, name):
    close(widened[name], everything[name][3][0])


BOUND = {"beta_dpo", "rpo_rel"}  # a draw by position; weights between prompts


@pytest.mark.parametrize("name", [n for n in KEYS if n not in BOUND])
def test_order_of_the_items_does_not_matter(everything, reordered, name):
    spec, _, _, (per_item, _, _), _ = everything[name]
    if spec.weighting == "subsample":
        return
    got = reordered[name][0][0]
    if name in ("aot", "aot_unpaired"):  # sorted: the items are places, not pairs
        close(np.sort(got), np.sort(per_item))
    else:
        close(got, per_item[ORDER])
    close(got.mean(), per_item.mean())


LISTS = ["infonca", "nca_reward", "exo_rw", "pro", "lipo", "lire", "opo", "drpo", "rrhf"]


@pytest.fixture(scope="module")
def shortened():
    """Of each list without its last candidate: losses, the same with junk in its place, gradient, of three alone."""

    def shorten(name, tokens, batch):
        spec = SPECS[name]
        seq = statistics(tokens, spec)._replace(tokens=None)
        batch = batch._replace(valid=jnp.ones((4, 4), bool).at[:, 3].set(False))
        junk = seq._replace(p=seq.p.at[:, 3].set(-300.0), n=seq.n.at[:, 3].set(1.0))
        odd = batch._replace(scores=batch.scores.at[:, 3].set(5.0))
        three = SeqStats(*(x[:, :3] for x in seq[:3]))
        value, g = valued(lambda p: loss(spec, seq._replace(p=p), batch)[0], seq.p)
        alone = loss(spec, three, Batch(scores=batch.scores[:, :3]))[0]
        return value, loss(spec, junk, odd)[0], g, alone

    @partial(jax.jit, compiler_options=meshes.QUICK)
    def found(four):
        return {name: shorten(name, *four) for name in LISTS}

    return jax.device_get(found(BY_WIDTH[4]))


@pytest.mark.parametrize("name", LISTS)
def test_a_missing_candidate_changes_nothing_whatever_it_holds(shortened, name):
    want, junk, g, three = shortened[name]
    close(junk, want)
    assert not g[:, 3].any() and np.isfinite(g).all()
    if name in ("infonca", "pro", "lipo"):  # it is as if it had never been there
        close(three, want)


# Keys that are the same numbers on the golden batch at beta = 0.1, and why.
EQUAL = [
    {"sigmoid", "spin", "online_dpo", "step_dpo"}  # procedures: what is compared, not how
    | {"ld_dpo", "sampo", "d2po_decay"},  # these differ where statistics are made from tokens
    {"ipo_sum", "ipo_md"},
]


def test_no_two_keys_are_the_same_loss_but_for_the_listed():
    def numbers(p, name):
        spec = resolve(name, **({"beta": 0.1} if "beta" in REGISTRY[name].defaults else {}))
        value, g = valued(lambda p: loss(spec, GOLDEN._replace(p=p))[0], p)
        return jnp.concatenate([value[:, None], g], 1)

    plain = [n for n in KEYS if REGISTRY[n].schema in ("pair", "step") and n != "wpo"]
    plain = [n for n in plain if REGISTRY[n].needs <= {"reference"}]
    compiled = jax.jit(lambda p: {n: numbers(p, n) for n in plain}, compiler_options=meshes.QUICK)
    seen = jax.device_get(compiled(GOLDEN.p))
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


UNCOMPILED = ["sigmoid", "kto", *(pytest.param(n, marks=pytest.mark.slow) for n in KEYS)]


@pytest.mark.parametrize("name", UNCOMPILED)
def test_jit_gives_the_same(everything, name):
    spec, tokens, batch, (per_item, _, _), _ = everything[name]
    close(
        loss(spec, statistics(tokens, spec, key=batch.key), batch)[0], per_item
    )  # not compiled as a whole


def test_hyper_parameters_may_be_swept_with_vmap():
    betas = jnp.array([0.05, 0.1, 0.5])
    got = jax.vmap(lambda beta: loss(resolve("sigmoid", beta=beta), GOLDEN)[0].mean())(betas)
    close(got, [mean("sigmoid", beta=float(b)) for b in betas])


def test_extreme_log_ratios_stay_finite():
    huge = log_ratios([[300.0, -300.0], [-300.0, 300.0], [300.0, 300.0], [0.0, 0.0]])
    specs = {}
    for name in KEYS:
        spec = REGISTRY[name]
        if spec.schema != "pair" or spec.needs - {"reference"} or spec.hyper.get("use_weighting"):
            continue
        kinds = divergences.DIVERGENCES if "divergence" in spec.defaults else ("reverse_kl",)
        for kind in kinds:
            hyper = {"divergence": kind} if kind != "reverse_kl" else {}
            specs[f"{name} {kind}"] = resolve(name, **hyper)

    @partial(jax.jit, compiler_options=meshes.QUICK)
    def run(p):
        value = lambda spec: valued(lambda p: loss(spec, huge._replace(p=p))[0], p)
        return {key: value(spec) for key, spec in specs.items()}

    for key, found in run(huge.p).items():
        assert all(np.isfinite(x).all() for x in found), key


def test_orpo_of_a_certain_policy_is_finite():
    p = jnp.array([[0.0, -1e-9], [-1e-4, -50.0], [-1.0, -1e-7], [0.0, 0.0]])
    value = lambda p: loss(SPECS["orpo"], SeqStats(p, None, jnp.ones((4, 2))))[0]
    assert all(np.isfinite(x).all() for x in jax.jit(partial(valued, value))(p))
