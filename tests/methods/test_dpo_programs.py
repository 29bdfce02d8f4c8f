"""A preference step on a small decoder: the losses of the whole batch, references, and what a state keeps."""

import dataclasses
import functools
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.methods.dpo import programs, registry
from jaxrepro.methods.dpo.programs import Reference
from jaxrepro.methods.dpo.registry import REGISTRY
from jaxrepro.methods.dpo.sequence import Batch, Tokenwise, statistics
from jaxrepro.models import transformer
from jaxrepro.train.state import State, init_state
from jaxrepro.train.step import make_step

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import meshes
from dpo_golden import example
from dpo_tiny import CFG, DESCENT, B, C, T, both, items, rows_of

LIVE = Reference("live")
# Sums of losses, so that each way through a step is compiled once; the shares make their gradients alike.
MIXES = {
    "apart": (("sigmoid", "sft", "tdpo1", "tdpo2"), (1, 0.1, 1, 1)),
    "across": (
        ("aot", "aot_unpaired", "dr_dpo", "kto_pair", "beta_dpo", "alpha_dpo", "sampo", "tdpo2", "sft"),
        (10, 10, 1, 2, 1, 0.2, 1, 1, 0.1),
    ),
    "unpaired": (("kto", "bco"), (2, 1)),
}  # fmt: skip


@functools.cache
def rows_for(name):
    k = 1 if name == "unpaired" else 2
    return rows_of(items(k=k), mismatched=int(k == 1))


def mix(*names, shares=None, **settings):
    return tuple(registry.mix(list(names), shares, **settings))


# ---- an independent account: each response in a row with its prompt, and all logits


def laid(rows, tokens=None):
    """Rows (b * k, t) of prompt and response, and the places of the response's tokens, less one."""
    tokens = np.asarray(rows.tokens if tokens is None else tokens)
    b, k, c = tokens.shape
    ids, at = np.zeros((b, k, T + C), int), np.zeros((b, k, C), int)
    prompts, n = np.asarray(rows.prompts.tokens), np.asarray(rows.prompts.segment).sum(-1)
    for i, j in np.ndindex(b, k):
        place = (i, j) if prompts.ndim == 3 else (i,)
        t = int(n[place])
        ids[i, j, :t] = prompts[place][:t]
        ids[i, j, t : t + c] = tokens[i, j]
        at[i, j] = t - 1 + np.arange(C)
    flat = lambda a: jnp.asarray(a.reshape(b * k, -1))
    return flat(ids), flat(at)


def all_logits(params, ids, at):
    """Log-probs (b * k, c, v) of everything that could stand at `at` + 1."""
    position = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    x = transformer.embed(params, CFG, ids)
    hidden, _ = transformer.apply(params, CFG, x, position=position)
    lp = jax.nn.log_softmax(transformer.logits(params, CFG, hidden))
    return jnp.take_along_axis(lp, at[..., None], 1)


def by_rows(params, ref, rows):
    """Tokenwise, from `all_logits`."""
    ids, at = laid(rows)
    shape = rows.tokens.shape
    mask = jnp.arange(C) < rows.length[..., None]
    both = jax.tree.map(lambda *x: jnp.stack(x), params, jax.lax.stop_gradient(ref))
    p, q = jax.vmap(lambda x: all_logits(x, ids, at).reshape(*shape, -1))(both)  # one program
    kl = (jnp.exp(q) * (q - p)).sum(-1)
    pick = lambda lp: jnp.take_along_axis(lp, rows.tokens[..., None], -1)[..., 0]
    keep = lambda x: jnp.where(mask, x, 0.0)
    return Tokenwise(keep(pick(p)), jax.lax.stop_gradient(keep(pick(q))), mask, kl=keep(kl))


def scored(rows):
    """`by_rows` of policy and reference."""
    return jax.jit(lambda p, q: by_rows(p, q, rows), compiler_options=meshes.QUICK)(*both())


def responses_before(params, rows):
    """Summed log-prob of the response of the item before, behind each prompt."""
    ids, at = laid(rows, np.roll(np.asarray(rows.tokens), 1, 0))
    tokens, length = (jnp.roll(x, 1, 0)[:, 0] for x in (rows.tokens, rows.length))
    lp = jnp.take_along_axis(all_logits(params, ids, at), tokens[..., None], -1)[..., 0]
    return jax.lax.stop_gradient(jnp.where(jnp.arange(C) < length[:, None], lp, 0.0).sum(-1))


@functools.cache
def independent(name):
    """(losses {name: mean}, gradient of their sum, first state of each loss after the step)."""
    names, shares = MIXES[name]
    losses, rows, (policy, ref) = mix(*names, shares=shares), rows_for(name), both()
    key = programs.step_key(0, "losses", jnp.zeros((), jnp.int32))

    def total(params):
        tokens = by_rows(params, ref, rows)
        data = Batch(labels=rows.data.labels, key=key)
        if "kto" in names:
            data = data._replace(
                kl_p=responses_before(params, rows), kl_q=responses_before(ref, rows)
            )
        found = {
            s.name: registry.loss(s, statistics(tokens, s, key=key), data)[:2] for s, _ in losses
        }
        means = {n: per_item.mean() for n, (per_item, _) in found.items()}
        states = tuple(state for _, state in found.values())
        return sum(w * means[s.name] for s, w in losses), (means, states)

    compiled = jax.jit(jax.grad(total, has_aux=True), compiler_options=meshes.QUICK)
    grads, (means, states) = compiled(policy)
    return means, grads, states


# ---- steps


@functools.cache
def stepped(name, m):
    """A step and the next, in m micro-batches: ((state, metrics), (state, metrics)), and the first state."""
    names, shares = MIXES[name]
    losses = mix(*names, shares=shares)
    common = dict(cfg=CFG, mix=losses, reference=LIVE)
    prepare = partial(programs.prepare, **common, micro_batches=m, steps=4)
    step = make_step(partial(programs.loss, **common), DESCENT, micro_batches=m, prepare=prepare)
    step = jax.jit(step, compiler_options=meshes.QUICK)
    policy, ref = both()
    first = init_state(policy, DESCENT, extra=programs.first_extra(losses, LIVE, ref))
    one = step(first, rows_for(name))
    return one, step(one[0], rows_for(name)), first


def test_the_mixes_hold_every_loss_that_looks_across_a_batch():
    inside = {n for names, _ in MIXES.values() for n in names}
    across = {n for n, s in REGISTRY.items() if s.set_level or s.weighting == "subsample"}
    assert across - inside == {"rpo_rel"}  # no run gives it embeddings


CUTS = [
    pytest.param("apart", 1, marks=pytest.mark.slow),
    pytest.param("apart", 4, marks=pytest.mark.slow),
    pytest.param("across", 4, marks=pytest.mark.slow),
    pytest.param("unpaired", 4, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, m", CUTS)
def test_a_step_has_the_gradient_of_the_global_batch_however_it_is_cut(name, m):
    means, want, states = independent(name)
    (state, metrics), _, _ = stepped(name, m)
    for loss, value in means.items():
        assert float(metrics[f"loss/{loss}"]) == pytest.approx(float(value), rel=1e-4), loss
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(abs(b).max()))
    jax.tree.map(close, state.opt, want)  # another order of float32 sums
    jax.tree.map(np.testing.assert_array_equal, state.extra["reference"], both()[1])
    for got, expected in zip(state.extra["losses"], states, strict=True):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["across", "unpaired"])
def test_one_micro_batch_is_four(name):
    meshes.assert_same(stepped(name, 1)[0][0].opt, stepped(name, 4)[0][0].opt)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["across", "apart"])
def test_token_means_are_of_the_whole_batch_in_micro_batches(name):
    rows = rows_for(name)
    mean = -np.asarray(scored(rows).lp)[:, 0].sum() / np.asarray(rows.length)[:, 0].sum()
    assert float(stepped(name, 4)[0][1]["loss/sft"]) == pytest.approx(float(mean), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["across", "unpaired"])
def test_entropy_and_accuracy_of_tokens_are_those_of_all_logits(name):
    rows, metrics = rows_for(name), stepped(name, 4)[0][1]
    ids, at = laid(rows)
    lp = np.asarray(all_logits(both()[0], ids, at)).reshape(*rows.tokens.shape, -1)
    mask = np.arange(C) < np.asarray(rows.length)[..., None]
    entropy = -(np.exp(lp) * lp).sum(-1)
    assert float(metrics["entropy"]) == pytest.approx(entropy[mask].mean(), rel=1e-4)
    right = lp.argmax(-1) == np.asarray(rows.tokens)
    chosen = mask[:, :1] & (rows.data.labels[:, None, None] if name == "unpaired" else True)
    assert float(metrics["token_accuracy"]) == pytest.approx(right[:, :1][chosen].mean())


def test_kto_reads_the_completion_of_the_item_before():
    found = items(k=1)
    rows = rows_for("unpaired")
    swapped = [a | {"responses": b["responses"]} for a, b in zip(found, [found[-1], *found])]
    wrong = scored(rows_of(swapped))
    gap = lambda t: (np.asarray(t.lp) - np.asarray(t.ref_lp)).sum((1, 2))
    z0 = max(0.0, float(gap(wrong).mean()))
    a = gap(scored(rows))
    sig = lambda x: 1 / (1 + np.exp(-x))
    good = np.asarray(rows.data.labels)
    want = np.where(good, 1 - sig(0.1 * (a - z0)), 1 - sig(0.1 * (z0 - a))).mean()
    assert float(stepped("unpaired", 4)[0][1]["loss/kto"]) == pytest.approx(want, abs=1e-5)


def test_states_of_losses_go_on():
    one, two, first = stepped("unpaired", 4)
    counts = [float(s.extra["losses"][1].count) for s in (first, one[0], two[0])]
    assert counts == pytest.approx([0, B, 2 * B])
    means = [float(s.extra["losses"][1].mean) for s in (one[0], two[0])]
    assert means[0] != means[1]


def test_a_synced_reference_moves_when_it_is_due():
    losses, rows, (policy, ref) = mix("sigmoid"), rows_for("apart"), both()
    reference = Reference("synced", every=2, alpha=0.25)
    state = init_state(policy, DESCENT, extra=programs.first_extra(losses, reference, ref))

    @partial(jax.jit, compiler_options=meshes.QUICK)
    def after(at):
        now = dataclasses.replace(state, step=at)
        common = dict(cfg=CFG, mix=losses, reference=reference)
        return programs.prepare(now, rows, **common)[1]["reference"]

    want = jax.tree.map(lambda p, r: 0.25 * p + 0.75 * r, policy, ref)
    for at, expected in ((0, ref), (1, ref), (2, want), (3, ref), (4, want)):
        meshes.assert_same(after(jnp.asarray(at)), expected)


def test_a_synced_reference_that_is_not_due_reads_nothing_of_the_policy():
    state = State(jnp.asarray(1), {"w": jnp.full(2, jnp.nan)}, None, {"reference": {"w": jnp.ones(2)}})  # fmt: skip
    moved = partial(programs.moved, Reference("synced", every=2, alpha=0.5))
    np.testing.assert_array_equal(moved(state)["w"], 1.0)
    assert np.isnan(moved(state.replace(step=jnp.asarray(2)))["w"]).all()


def test_log_probs_that_come_with_the_rows_are_those_of_the_reference():
    losses, found, (policy, ref) = mix("ipo"), items(), both()
    tokens = scored(rows_of(found))
    lp = np.asarray(tokens.ref_lp)
    kept = [
        i | {"reference": {"lp": [lp[n, j, : len(r)] for j, r in enumerate(i["responses"])]}}
        for n, i in enumerate(found)
    ]
    cached = Reference("cached")
    state = init_state(policy, DESCENT, extra=programs.first_extra(losses, cached, ref))
    assert state.extra["reference"] is None
    common = dict(cfg=CFG, mix=losses, reference=cached)

    @partial(jax.jit, compiler_options=meshes.QUICK)
    def run(rows):
        rows, extra = programs.prepare(state, rows, **common)
        return programs.loss(policy, rows, extra, **common)[:2]

    total, count = run(rows_of(kept))
    want = registry.loss(losses[0][0], statistics(tokens, losses[0][0]))[0]
    assert count == B and float(total) == pytest.approx(float(want.sum()), rel=1e-4)


def test_each_response_may_have_a_prompt_of_its_own():
    found = [
        {"id": a["id"], "prompts": [a["prompt"], b["prompt"]], "responses": a["responses"]}
        for a, b in zip(items(), items(seed=1))
    ]
    rows = rows_of(found)
    assert rows.prompts.tokens.shape == (B, 2, T)
    want = scored(rows)
    run = lambda p: programs.tokenwise(p, CFG, rows, frozenset())
    got = jax.jit(run, compiler_options=meshes.QUICK)(both()[0])
    np.testing.assert_allclose(np.where(want.mask, got.lp, 0), want.lp, atol=1e-5)
    np.testing.assert_array_equal(got.mask, want.mask)


def test_a_token_mean_is_divided_by_the_lengths_of_what_is_learnt():
    rows = rows_for("apart")
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(B, 2)), jnp.float32)
    ranked = rows._replace(data=Batch(scores=scores))
    of = lambda name, rows: float(programs.learnt_tokens(mix(name), rows))
    length = np.asarray(rows.length)
    assert of("sft", rows) == length[:, 0].mean()
    assert of("npo", rows) == length[:, 1].mean()
    assert of("npo", rows_for("unpaired")) == np.asarray(rows_for("unpaired").length).mean()
    best = np.asarray(scores).argmax(1)
    assert of("rrhf", ranked) == length[np.arange(B), best].mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_a_step_gives_every_loss_what_it_asks_for(name):
    """By shapes alone: `objective.check_inputs` refuses what is missing."""
    spec = registry.resolve(name)
    if spec.schema == "image" or spec.needs & {"weights", "turn"}:  # no run has them
        return
    tokens, batch = example(spec, b=B)
    k = tokens.mask.shape[1]
    rows = rows_of(items(k=k), mismatched=int("kl_p" in spec.needs))
    computed = {"kl_p", "kl_q", "vocab", "progress", "key", "mean_chosen_tokens", "valid"}
    data = batch._replace(**dict.fromkeys(computed))
    losses = mix(name)
    common = dict(cfg=CFG, mix=losses, reference=LIVE)
    policy, ref = both()
    state = init_state(policy, DESCENT, extra=programs.first_extra(losses, LIVE, ref))

    def run(rows):
        ready, extra = programs.prepare(state, rows, **common, micro_batches=2, steps=4)
        return programs.loss(policy, ready, extra, **common)[:2]

    total, count = jax.eval_shape(run, rows._replace(data=data))
    assert total.shape == () and count.shape == ()
