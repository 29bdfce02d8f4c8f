"""Chunked log-probabilities against log_softmax and take, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.ops.logprob import (
    CURVES,
    GRADED,
    chunk_of,
    shift,
    token_kl,
    token_log_probs,
    token_stats,
)

D, V = 5, 11


def plain(hidden, head, targets, temperature):
    lp = jax.nn.log_softmax(hidden @ head / temperature)
    picked = jnp.take_along_axis(lp, targets[..., None], -1)[..., 0]
    return picked, -jnp.sum(jnp.exp(lp) * lp, -1)


@pytest.mark.parametrize(
    ("shape", "chunk", "temperature"),
    [
        ((7,), 3, 1.0),  # chunk does not divide the tokens
        ((2, 5), 6, 0.7),  # 3 positions of each of 2 rows, then 2
        ((3, 2, 4), 2, 1.3),  # chunk below the number of rows: one position each
        ((2, 3), 1024, 1.0),  # one chunk
    ],
)
def test_equals_log_softmax_and_take_with_gradients(shape, chunk, temperature):
    keys = jax.random.split(jax.random.key(sum(shape)), 5)
    hidden, head = jax.random.normal(keys[0], (*shape, D)), jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], shape, 0, V)
    w = jax.random.normal(keys[3], (2, *shape))

    @jax.jit
    def compare(hidden, head):
        def grads(fn, w):
            def loss(hidden, head):
                out = fn(hidden, head)
                return sum(jnp.sum(a * b) for a, b in zip(w, out)), out

            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)

        run = partial(token_log_probs, targets=targets, temperature=temperature, chunk=chunk)
        want = lambda h, o: plain(h, o, targets, temperature)
        return (
            (grads(lambda h, o: run(h, o, entropy=True), w), grads(want, w)),
            (grads(lambda h, o: (run(h, o),), w[:1]), grads(lambda h, o: want(h, o)[:1], w[:1])),
        )

    for got, want in compare(hidden, head):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def plain_stats(hidden, head, targets, temperature):
    """The same statistics, from all logits at once, by formulas of their own."""
    z = hidden @ head / temperature
    p = jax.nn.softmax(z)
    return {
        "lp": jnp.log(jnp.take_along_axis(p, targets[..., None], -1)[..., 0]),
        "lse": jnp.log(jnp.exp(z).sum(-1)),
        "entropy": -(p * jnp.log(p)).sum(-1),
        "mean_logit": z.mean(-1),
        "max_prob": p.max(-1),
        "top1": (z.argmax(-1) == targets).astype(jnp.float32),
        "absmax": jnp.abs(z).max(-1),
        "log_sum_p2": jnp.log((p**2).sum(-1)),
    }


@pytest.mark.parametrize(
    ("chunk", "temperature", "padding"), [(6, 0.7, 0), (6, 1.0, 3), (99, 1.0, 2)]
)
def test_statistics_equal_those_of_all_logits_and_padded_columns_count_nowhere(
    chunk, temperature, padding
):
    keys = jax.random.split(jax.random.key(chunk + padding), 5)
    hidden, head = jax.random.normal(keys[0], (2, 5, D)), jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (2, 5), 0, V)
    w = dict(zip(GRADED, jax.random.normal(keys[3], (len(GRADED), 2, 5))))
    dead = jnp.concatenate([head, 9 * jax.random.normal(keys[4], (D, padding))], axis=1)

    @partial(jax.jit, static_argnums=2)
    def value_and_grads(hidden, head, fn):
        def loss(hidden, head):
            out = fn(hidden, head)
            return sum(jnp.sum(w[k] * out[k]) for k in GRADED), out

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)

    ours = lambda h, o: token_stats(
        h, o, targets, GRADED + CURVES, temperature=temperature, chunk=chunk, vocab=V
    )
    (_, got), (dh, dw) = value_and_grads(hidden, dead, ours)
    want = value_and_grads(hidden, head, lambda h, o: plain_stats(h, o, targets, temperature))
    (_, reference), (ref_dh, ref_dw) = want
    assert set(got) == {*GRADED, *CURVES}
    for name in reference:
        np.testing.assert_allclose(got[name], reference[name], atol=2e-5, err_msg=name)
    np.testing.assert_allclose(dh, ref_dh, atol=5e-5)
    np.testing.assert_allclose(dw[:, :V], ref_dw, atol=5e-5)
    assert (np.asarray(dw[:, V:]) == 0).all()


def test_no_gradient_flows_through_curves():
    hidden, head = jnp.ones((2, 3, D)), jax.random.normal(jax.random.key(0), (D, V))
    fn = lambda h: sum(
        a.sum() for a in token_stats(h, head, jnp.zeros((2, 3), int), CURVES, chunk=2).values()
    )
    assert (np.asarray(jax.jit(jax.grad(fn))(hidden)) == 0).all()


@pytest.mark.parametrize("chunk", [4, 99])
def test_kl_from_the_reference_equals_the_sum_over_the_vocabulary_with_gradients(chunk):
    keys = jax.random.split(jax.random.key(chunk), 5)
    h, q = jax.random.normal(keys[0], (2, 2, 5, D))
    head, other = jax.random.normal(keys[1], (2, D, V))
    w = jax.random.normal(keys[2], (2, 5))

    def want(h, head, q, other):
        lq = jax.lax.stop_gradient(jax.nn.log_softmax(q @ other))
        return (w * (jnp.exp(lq) * (lq - jax.nn.log_softmax(h @ head))).sum(-1)).sum()

    got = lambda *a: (w * token_kl(*a, chunk=chunk)).sum()
    both = lambda fn: jax.jit(jax.value_and_grad(fn, argnums=(0, 1, 2, 3)))(h, head, q, other)
    (value, grads), (ref, expected) = both(got), both(want)
    np.testing.assert_allclose(value, ref, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grads, expected)
    assert abs(token_kl(h, head, h, head)).max() < 1e-5


def test_rows_without_weight_have_zero_gradient():
    hidden = 50 * jax.random.normal(jax.random.key(0), (3, 4, D))
    head = jax.random.normal(jax.random.key(1), (D, V))
    keep = jnp.asarray([[0], [1], [0]]) > 0
    lp = lambda h: token_log_probs(h, head, jnp.zeros((3, 4), int), chunk=5)
    g = jax.jit(jax.grad(lambda h: jnp.sum(jnp.where(keep, lp(h), 0.0))))(hidden)
    assert (np.asarray(g)[[0, 2]] == 0).all() and np.isfinite(g).all() and np.abs(g[1]).max() > 0


def test_bfloat16_products_accumulate_in_float32():
    hidden = jax.random.normal(jax.random.key(0), (2, 8, D)).astype(jnp.bfloat16)
    head = jax.random.normal(jax.random.key(1), (D, V))
    fn = lambda h, o: token_log_probs(h, o, jnp.ones((2, 8), int), chunk=4).sum()
    lp = jax.eval_shape(lambda h, o: token_log_probs(h, o, jnp.ones((2, 8), int)), hidden, head)
    dh, dw = jax.jit(jax.grad(fn, argnums=(0, 1)))(hidden, head)
    assert (lp.dtype, dh.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    exact = jax.grad(lambda o: plain(hidden.astype(jnp.float32), o, jnp.ones((2, 8), int), 1.0)[0].sum())(head)  # fmt: skip
    np.testing.assert_allclose(dw, exact, atol=0.1)


def test_the_vocabulary_is_never_held_for_all_tokens():
    h, w = jax.ShapeDtypeStruct((4, 512, 8), jnp.float32), jax.ShapeDtypeStruct((8, 999), jnp.float32)  # fmt: skip
    fn = lambda h, w: token_log_probs(h, w, jnp.zeros((4, 512), int), chunk=64).sum()
    text = str(jax.make_jaxpr(jax.grad(fn, argnums=(0, 1)))(h, w))
    assert "[4,16,999]" in text and "512,999]" not in text and "2048,999]" not in text


def test_the_default_chunk_holds_at_most_256_mib_of_logits_and_1024_positions():
    assert [chunk_of(v) for v in (18, 49_152, 151_936, 1 << 26, 1 << 30)] == [1024, 1024, 256, 1, 1]
    h, w = jax.ShapeDtypeStruct((1, 2048, 8), jnp.float32), jax.ShapeDtypeStruct((8, 151_936), jnp.float32)  # fmt: skip
    text = str(jax.make_jaxpr(lambda h, w: token_log_probs(h, w, jnp.zeros((1, 2048), int)))(h, w))
    assert "[1,256,151936]" in text and "[1,2048,151936]" not in text


def test_greedy_temperature_is_refused():
    with pytest.raises(ValueError, match=r"temperature 0\.0"):
        token_log_probs(jnp.zeros((1, D)), jnp.zeros((D, V)), jnp.zeros(1, int), temperature=0.0)


@pytest.mark.parametrize(
    ("want", "vocab", "says"), [(("lq",), None, "'lq'"), (("lp",), V + 1, f"1 .. {V}")]
)
def test_an_unknown_statistic_or_vocabulary_is_an_error(want, vocab, says):
    with pytest.raises(ValueError, match=says):
        token_stats(jnp.zeros((1, D)), jnp.zeros((D, V)), jnp.zeros(1, int), want, vocab=vocab)


row = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=6, max_size=6)


@settings(max_examples=25, deadline=None)
@given(st.lists(row, min_size=2, max_size=2))
def test_shift_scores_a_response_token_where_it_is_predicted(rows):
    segment = np.array([[s for s, _ in r] for r in rows], np.int32)
    response = np.array([[r for _, r in r] for r in rows])
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    targets, mask = shift(jnp.asarray(tokens), jnp.asarray(response), jnp.asarray(segment))
    for b in range(2):
        for j in range(6):
            inside = j < 5 and segment[b, j] == segment[b, j + 1] > 0
            assert bool(mask[b, j]) == bool(inside and response[b, j + 1])
            assert not mask[b, j] or targets[b, j] == tokens[b, j + 1]
