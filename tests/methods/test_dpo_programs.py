"""A preference step on a small decoder: the losses of the whole batch, references, and what a state keeps."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrepro.methods.dpo import programs, registry
from jaxrepro.methods.dpo.programs import Reference
from jaxrepro.methods.dpo.rows import Shape, collate
from jaxrepro.methods.dpo.sequence import Batch, Tokenwise, statistics
from jaxrepro.models import transformer
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.train.state import init_state
from jaxrepro.train.step import make_step

sys.path.insert(0, str(Path(__file__).parents[1]))
import meshes

CFG = TransformerConfig(vocab=13, d=16, layers=1, heads=2, kv=1, head_dim=8, ffn=24)
B, C = 8, 6


def single(found):
    """The chosen responses alone, as unpaired items."""
    keep = lambda i: i | {"responses": i["responses"][:1], "scores": i["scores"][:1]}
    return [keep(i) for i in found]


def items(seed=0, k=2, b=B):
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, CFG.vocab, n).tolist()
    return [
        {
            "id": str(i),
            "prompt": draw(rng.integers(1, 5)),
            "responses": [draw(rng.integers(1, C + 1)) for _ in range(k)],
            "scores": rng.normal(size=k).tolist(),
            "label": bool(i % 2),
        }
        for i in range(b)
    ]


def rows_of(found, **settings):
    k = len(found[0]["responses"])
    return jax.tree.map(jnp.asarray, collate(found, Shape(k, 4, C), pad=0, **settings))


@pytest.fixture(scope="module")
def both():
    policy, ref = (transformer.init(jax.random.key(i), CFG) for i in range(2))
    return jax.tree.map(lambda a, b: a + 0.3 * b, policy, ref), ref


def mix(*names, **settings):
    return tuple(registry.mix(list(names), None, **settings))


@jax.jit
def whole_rows(params, ids, at):
    """Log-probs of tokens at + 1 of each row, from all logits."""
    position = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden, _ = transformer.apply(
        params, CFG, transformer.embed(params, CFG, ids), position=position
    )
    lp = jax.nn.log_softmax(transformer.logits(params, CFG, hidden))
    lp = jnp.take_along_axis(lp[:, :-1], ids[:, 1:, None], 2)[..., 0]
    return jnp.take_along_axis(lp, at, 1)


def by_rows(params, ref, rows):
    """An independent Tokenwise: each response in a row with its prompt."""
    b, k, c = rows.tokens.shape
    ids, at = np.zeros((b, k, 4 + C), int), np.zeros((b, k, C), int)
    for i in range(b):
        t = int(rows.prompts.segment[i].sum())
        ids[i, :, :t] = rows.prompts.tokens[i, :t]
        ids[i, :, t : t + c] = rows.tokens[i]
        at[i] = t - 1 + np.arange(C)
    flat = lambda a: jnp.asarray(a.reshape(b * k, -1))
    score = lambda p: whole_rows(p, flat(ids), flat(at)).reshape(b, k, C)
    mask = jnp.arange(C) < rows.length[..., None]
    keep = lambda lp: jnp.where(mask, lp, 0.0)
    return Tokenwise(keep(score(params)), jax.lax.stop_gradient(keep(score(ref))), mask)


# Plain descent whose state is the last gradient: new - old parameters would lose its small digits.
DESCENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.negative, grads), grads),
)


def step_of(losses, reference, m, **settings):
    common = dict(cfg=CFG, mix=losses, reference=reference)
    return jax.jit(
        make_step(
            partial(programs.loss, **common),
            DESCENT,
            micro_batches=m,
            prepare=partial(programs.prepare, **common, micro_batches=m, steps=4, **settings),
        ),
        compiler_options=meshes.QUICK,
    )


def state_of(losses, reference, both):
    policy, ref = both
    extra = programs.first_extra(losses, reference, ref)
    return init_state(policy, DESCENT, extra=extra)


def moved(state, step, rows):
    new, metrics = step(state, rows)
    return new.opt, new, metrics


LIVE = Reference("live")


def test_scores_behind_a_shared_prompt_are_those_of_single_rows(both):
    rows = rows_of(items())
    want = by_rows(*both, rows)
    got = programs.tokenwise(both[0], CFG, rows, frozenset())
    keep = want.mask
    np.testing.assert_allclose(jnp.where(keep, got.lp, 0), want.lp, atol=1e-5)
    assert (np.asarray(got.mask) == np.asarray(keep)).all()


@pytest.mark.parametrize("name", ["sigmoid", "aot", "dr_dpo", "beta_dpo", "sampo"])
def test_a_step_has_the_gradient_of_the_global_batch_however_it_is_cut(name, both):
    losses, rows = mix(name), rows_of(items())
    state = state_of(losses, LIVE, both)
    key = programs.step_key(0, "losses", jnp.zeros((), jnp.int32))

    def plain(params):
        tokens = by_rows(params, both[1], rows)
        seqs = [statistics(tokens, spec, key=key) for spec, _ in losses]
        data = Batch(scores=rows.data.scores, key=key)
        return registry.total(losses, seqs, data, state.extra["losses"])[0].mean()

    want = jax.grad(plain)(state.params)
    found = []
    for m in (1, 4):
        got, new, metrics = moved(state, step_of(losses, LIVE, m), rows)
        found.append(got)
        assert float(metrics["loss"]) == pytest.approx(float(plain(state.params)), rel=1e-4)
        jax.tree.map(np.testing.assert_array_equal, new.extra["reference"], both[1])
    meshes.assert_same(*found)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(abs(b).max()))
    jax.tree.map(close, found[0], want)  # another order of float32 sums


def test_token_means_are_of_the_whole_batch_in_micro_batches(both):
    losses, rows = mix("sft"), rows_of(items())
    state = state_of(losses, Reference("none"), both)
    results = [moved(state, step_of(losses, Reference("none"), m), rows) for m in (1, 4)]
    meshes.assert_same(results[0][0], results[1][0])
    mean = -by_rows(*both, rows).lp[:, 0].sum() / rows.length[:, 0].sum()
    assert float(results[1][2]["loss"]) == pytest.approx(float(mean), rel=1e-5)


def test_kto_reads_the_completion_of_the_item_before(both):
    found = single(items())
    losses, rows = mix("kto"), rows_of(found, mismatched=1)
    swapped = [a | {"responses": b["responses"]} for a, b in zip(found, [found[-1], *found])]
    wrong = by_rows(*both, rows_of(swapped))
    gap = (wrong.lp - wrong.ref_lp).sum((1, 2))
    z0 = max(0.0, float(gap.mean()))
    _, _, metrics = moved(state_of(losses, LIVE, both), step_of(losses, LIVE, 2), rows)
    right = by_rows(*both, rows)
    a = np.asarray((right.lp - right.ref_lp).sum((1, 2)))
    sig = lambda x: 1 / (1 + np.exp(-x))
    good = np.asarray(rows.data.labels)
    want = np.where(good, 1 - sig(0.1 * (a - z0)), 1 - sig(0.1 * (z0 - a))).mean()
    assert float(metrics["loss"]) == pytest.approx(want, abs=1e-5)


def test_states_of_losses_go_on_and_evaluation_leaves_them(both):
    losses, rows = mix("bco"), rows_of(single(items()))
    state, step = state_of(losses, LIVE, both), step_of(losses, LIVE, 2)
    first, _ = step(state, rows)
    again, _ = step(first, rows)
    counts = [[float(x) for x in jax.tree.leaves(s.extra["losses"])] for s in (state, first, again)]
    assert counts[0] != counts[1] != counts[2]


def test_a_synced_reference_moves_when_it_is_due(both):
    losses, rows = mix("sigmoid"), rows_of(items())
    reference = Reference("synced", every=2, alpha=0.25)
    state, step = state_of(losses, reference, both), step_of(losses, reference, 1)
    after = [state]
    for _ in range(3):
        after.append(step(after[-1], rows)[0])
    refs = [s.extra["reference"] for s in after]
    jax.tree.map(np.testing.assert_array_equal, refs[0], refs[2])
    want = jax.tree.map(lambda p, r: 0.25 * p + 0.75 * r, after[2].params, refs[2])
    meshes.assert_same(refs[3], want)


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_token_kl_is_that_of_reference_and_policy(name, both):
    losses, rows = mix(name), rows_of(items())
    _, _, metrics = moved(state_of(losses, LIVE, both), step_of(losses, LIVE, 2), rows)
    tokens = by_rows(*both, rows)

    def everything(params):
        hidden = programs.hidden_states(params, CFG, rows)
        return jax.nn.log_softmax(transformer.logits(params, CFG, hidden))

    q, p = everything(both[1]), everything(both[0])
    tokens = tokens._replace(kl=(jnp.exp(q) * (q - p)).sum(-1))
    seq = statistics(tokens, losses[0][0])
    want = registry.loss(losses[0][0], seq, Batch())[0].mean()
    assert float(metrics["loss"]) == pytest.approx(float(want), rel=1e-4)


def test_log_probs_that_come_with_the_rows_are_those_of_a_live_reference(both):
    losses, found = mix("ipo"), items()
    rows = rows_of(found)
    lp = np.asarray(by_rows(both[1], both[1], rows).lp)
    kept = [
        i | {"reference": {"lp": [lp[n, j, : len(r)] for j, r in enumerate(i["responses"])]}}
        for n, i in enumerate(found)
    ]
    live, _, a = moved(state_of(losses, LIVE, both), step_of(losses, LIVE, 2), rows)
    cached = Reference("cached")
    given, _, b = moved(state_of(losses, cached, both), step_of(losses, cached, 2), rows_of(kept))
    meshes.assert_same(live, given)
    assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
