"""The engine gives what `generate` gives, whatever the slots, the order and the batch mates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.models import transformer
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.rollout import engine as engines
from jaxrepro.rollout import stops
from jaxrepro.rollout.engine import Embedded, Engine, Request, measure_gap
from jaxrepro.rollout.generate import (
    FINISH_EOS,
    FINISH_LENGTH,
    FINISH_STOP,
    Prompts,
    Sampling,
    generate,
)
from jaxrepro.rollout.requests import samples

CFG = TransformerConfig(
    vocab=24, d=12, layers=1, heads=4, kv=2, head_dim=6, ffn=16, mrope_sections=(1, 1, 1),
    embed_std=0.7,
)  # fmt: skip
NEW, N = 8, 3
SAMPLING = Sampling(max_new=NEW, eos=(1, 2), temperature=0.9, pad=0)
KEY = jax.random.key(3)
IDS = (10, 4, 7, 0)
advance = jax.jit(stops.advance)
run_generate = jax.jit(generate, static_argnames=("cfg", "sampling", "n"))


def make_params(seed):
    rng = np.random.default_rng(seed)
    draw = lambda a: jnp.asarray(rng.normal(0, 0.35, a.shape), jnp.float32)
    return jax.tree.map(draw, transformer.abstract(CFG))


def make(params, **how):
    return Engine(params, CFG, SAMPLING, **{"slots": 4, "capacity": 28, "rounds": 5} | how)


def assert_equal(a, b):
    assert a.id == b.id and len(a.tokens) == len(b.tokens)
    for x, y in zip(a.tokens, b.tokens):
        np.testing.assert_array_equal(x, y)
    for name in ("lp_raw", "lp_sampler"):
        for x, y in zip(getattr(a, name), getattr(b, name)):
            np.testing.assert_allclose(x, y, atol=1e-5)
    np.testing.assert_array_equal(a.finish, b.finish)
    np.testing.assert_array_equal(a.stop, b.stop)


@pytest.fixture(scope="module")
def params():
    return make_params(0)


@pytest.fixture(scope="module")
def requests():
    """Prompts of 1, 3, 19 and 6 tokens, three samples each."""
    rng = np.random.default_rng(1)
    return [Request(rng.integers(0, 24, t).tolist(), i, N) for i, t in zip(IDS, (1, 3, 19, 6))]


@pytest.fixture(scope="module")
def plain(params, requests):
    """Completions of the requests and the engine that made them: twelve samples through four slots."""
    engine = make(params)
    return engine.run(requests, KEY), engine


def by_generate(params, requests):
    t = max(len(r.prompt) for r in requests)
    tokens, real = np.zeros((len(requests), t), np.int32), np.zeros((len(requests), t), np.int32)
    for row, r in enumerate(requests):
        tokens[row, : len(r.prompt)], real[row, : len(r.prompt)] = r.prompt, 1
    at = jnp.broadcast_to(jnp.arange(t), tokens.shape)
    x = transformer.embed(params, CFG, jnp.asarray(tokens))
    prompts = Prompts(x, at, jnp.asarray(real), jnp.asarray(real.sum(-1)))
    ids = jnp.asarray([r.id for r in requests])
    return run_generate(params, CFG, prompts, request_ids=ids, key=KEY, sampling=SAMPLING, n=N)


def test_the_engine_equals_generate(params, requests, plain):
    found, want = samples(plain[0], NEW), by_generate(params, requests)
    assert {FINISH_EOS, FINISH_LENGTH} == set(found.finish.ravel().tolist())
    np.testing.assert_array_equal(found.tokens, want.tokens)
    for a, b in zip(found, want):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_shuffled_requests_and_other_slots_give_the_same(params, requests, plain):
    order = [2, 0, 3, 1]
    again = make(params, slots=7, capacity=32, rounds=3).run([requests[j] for j in order], KEY)
    for j, completion in zip(order, again):
        assert_equal(plain[0][j], completion)


def test_refill_equals_one_by_one_and_a_second_run_compiles_nothing(requests, plain):
    completions, engine = plain
    for request, want in zip(requests, completions):
        assert_equal(want, engine.run([request], KEY)[0])
    decode = engines._decode_program(
        CFG, SAMPLING, engine.rounds, engine.room, engine._impl, None, None
    )
    programs = decode, engines._insert_program(engine._impl, None), engines.device.prefill
    before = [p._cache_size() for p in programs]
    for a, b in zip(completions, engine.run(requests, KEY)):
        assert_equal(a, b)
    assert [p._cache_size() for p in programs] == before and before[0] == 1


def test_a_stream_of_requests_gives_the_same(params, requests, plain):
    engine, seen = make(params), {}
    for request in requests[:3]:
        engine.submit(request, KEY)
    seen |= {c.id: c for c in engine.step()}
    for request in requests[3:]:
        engine.submit(request, KEY)
    assert engine.pending
    while engine.pending:
        seen |= {c.id: c for c in engine.step()}
    assert engine.step() == [] and sorted(seen) == sorted(IDS)
    for want in plain[0]:
        assert_equal(want, seen[want.id])


def test_another_key_gives_other_samples(requests, plain):
    other = plain[1].run(requests, jax.random.key(4))
    assert any(
        len(x) != len(y) or (x != y).any()
        for a, b in zip(plain[0], other)
        for x, y in zip(a.tokens, b.tokens)
    )


def test_occupancy_counts_the_tokens_of_samples(params, requests):
    engine = make(params)
    tokens = sum(len(row) for c in engine.run(requests, KEY) for row in c.tokens)
    stats = engine.stats
    assert stats["useful"] == tokens and stats["prompts"] == 4 and stats["prompt_tokens"] == 29
    assert stats["occupancy"] == tokens / (stats["steps"] * 4)
    assert stats["occupancy"] > 0.6  # refilled; waiting for the longest of four gives less


def test_recorded_log_probs_equal_the_training_graph_and_a_gap_shows(params, requests, plain):
    gap = measure_gap(params, CFG, requests, plain[0])
    assert gap["sampler_gap_max"] < 1e-5
    stale = measure_gap(make_params(5), CFG, requests, plain[0])
    assert stale["sampler_gap_max"] > stale["sampler_gap"] > 0.05
    first = lambda lp: lp + 2.0 * (np.arange(len(lp)) == 0)  # 2 nats at one token of each sample
    moved = [dataclasses.replace(c, lp_raw=tuple(map(first, c.lp_raw))) for c in plain[0]]
    gap = measure_gap(params, CFG, requests, moved)
    samples = sum(len(c.tokens) for c in moved)
    tokens = sum(len(row) for c in moved for row in c.tokens)
    assert gap["sampler_gap_max"] == pytest.approx(2.0, abs=1e-5)
    assert gap["sampler_gap"] == pytest.approx(2.0 * samples / tokens, abs=1e-5)


def test_new_weights_take_effect_and_the_given_ones_survive(params, requests):
    engine, other = make(params), make_params(5)
    engine.update(other)
    engine.update(other)  # in place of its own copy
    found, want = samples(engine.run(requests, KEY), NEW), by_generate(other, requests)
    np.testing.assert_array_equal(found.tokens, want.tokens)


def test_embeddings_as_prompts_equal_their_tokens(params, requests, plain):
    engine, mixed = make(params), []
    for j, r in enumerate(requests):
        x = transformer.embed(params, CFG, jnp.asarray([r.prompt]))[0]
        at = np.arange(len(r.prompt))
        at = np.stack([at] * 3) if j % 2 else at
        mixed.append(dataclasses.replace(r, prompt=Embedded(x, at, len(r.prompt))))
    mixed[0] = requests[0]
    for want, got in zip(plain[0], engine.run(mixed, KEY)):
        assert_equal(want, got)


def test_a_prompt_with_three_position_streams_equals_generate(params):
    x = jax.random.normal(jax.random.key(9), (5, CFG.d))
    at = np.asarray([[0, 1, 1, 1, 2], [0, 1, 1, 2, 3], [0, 1, 2, 1, 3]])
    prompts = Prompts(x[None], jnp.asarray(at)[None], jnp.ones((1, 5), jnp.int32), jnp.asarray([4]))
    want = run_generate(
        params, CFG, prompts, request_ids=jnp.asarray([6]), key=KEY, sampling=SAMPLING, n=N
    )
    found = samples(make(params).run([Request(Embedded(x, at, 4), 6, N)], KEY), NEW)
    np.testing.assert_array_equal(found.tokens, want.tokens)
    np.testing.assert_allclose(found.lp_raw, want.lp_raw, atol=1e-5)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 2), min_size=12, max_size=12),
)
def test_automata_find_every_suffix_however_self_similar(sequences, text):
    state = stops.pack([sequences], 3, 4)
    for j, token in enumerate(text):
        state, hits = advance(state, jnp.asarray([token]))
        want = [text[: j + 1][-len(s) :] == s for s in sequences]
        assert np.asarray(hits)[0].tolist() == want + [False] * (3 - len(want))


@pytest.fixture(scope="module")
def demanding(params, requests, plain):
    """One run of requests with a stop, forced tokens, a mask, a bias and limits beside a plain one."""
    prompt, long = requests[1].prompt, max(plain[0][1].tokens, key=len)
    several = {
        "stop": {"stop": ((23, 23, 23, 23, 22), tuple(long[3:5].tolist()), (22, 21))},
        "late": {"stop": (tuple(long[3:5].tolist()),), "min_new": 6},
        "forced": {"forced": (5, 1, 9)},
        "allowed": {"allowed": np.isin(np.arange(24), (1, 6, 7)), "min_new": 3},
        "bias": {"bias": np.where(np.arange(24) == 8, 50.0, 0.0)},
        "short": {"max_new": 2},
        "plain": {},
    }
    asked = {name: Request(prompt, IDS[1], N, **extra) for name, extra in several.items()}
    return asked, dict(zip(asked, make(params).run(list(asked.values()), KEY)))


def test_batch_mates_with_demands_change_nothing(plain, demanding):
    assert_equal(plain[0][1], demanding[1]["plain"])


def test_a_stop_sequence_ends_a_sample_with_its_last_token(plain, demanding):
    asked, got = demanding
    pair = asked["stop"].stop[1]
    for free, stopped, why, which in zip(
        plain[0][1].tokens, got["stop"].tokens, got["stop"].finish, got["stop"].stop
    ):
        ends = [j + 2 for j in range(len(free) - 1) if tuple(free[j : j + 2]) == pair]
        np.testing.assert_array_equal(stopped, free[: ends[0]] if ends else free)
        assert (why == FINISH_STOP) == bool(ends) == (which == 1)
    assert FINISH_STOP in got["stop"].finish
    assert min(map(len, got["late"].tokens)) >= min(6, min(map(len, plain[0][1].tokens)))


def test_forced_tokens_come_first_and_end_nothing(demanding):
    _, got = demanding
    for tokens, lp in zip(got["forced"].tokens, got["forced"].lp_sampler):
        np.testing.assert_array_equal(tokens[:3], [5, 1, 9])  # 1 is an eos
        assert len(tokens) > 3 and (lp[:3] == 0).all() and (lp[3:] < 0).all()


def test_masks_biases_and_limits_bind_the_sampler_only(params, demanding):
    asked, got = demanding
    for tokens in got["allowed"].tokens:
        assert set(tokens.tolist()) <= {1, 6, 7} and 1 not in tokens[:3]
    for tokens in got["bias"].tokens:
        assert (tokens == 8).all() and len(tokens) == NEW
    assert all(len(t) <= 2 for t in got["short"].tokens)
    names = ("allowed", "bias", "forced", "stop")
    gap = measure_gap(params, CFG, [asked[k] for k in names], [got[k] for k in names])
    assert gap["sampler_gap_max"] < 1e-5


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [3, 24]}, "token id 24; the vocabulary has 0..23"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": np.array([0.5])}, "must be a list of token ids"),
        ({"prompt": [1] * 22}, "exceed the cache of 28.*shorten the prompt to 21"),
        ({"prompt": Embedded(np.ones((3, 5)), np.arange(3), 3)}, r"need \(t, 12\)"),
        ({"n": 0}, "n 0"),
        ({"id": -1}, "id"),
        ({"max_new": 9}, "max_new 9 must lie in 1..8"),
        ({"max_new": 4, "min_new": 5}, "min_new 5 must lie in 0..4"),
        ({"stop": [[]]}, "a stop sequence is empty"),
        ({"stop": [[99]]}, "stop has token id 99"),
        ({"forced": [1] * 9}, "9 forced tokens exceed max_new 8"),
        ({"forced": [24]}, "forced has token id 24"),
        ({"allowed": np.ones(23, bool)}, r"need \(24,\) bool"),
        ({"allowed": np.zeros(24, bool)}, "leave no token"),
        ({"allowed": np.arange(24) == 1, "min_new": 1}, "leave no token"),
        ({"bias": np.full(24, np.nan)}, "nan"),
    ],
)
def test_a_request_that_cannot_run_is_one_line_before_anything_runs(plain, requests, fields, says):
    engine = plain[1]
    before = dict(engine.stats)
    bad = Request(**{"prompt": [3], "id": 0} | fields)
    with pytest.raises(UserError, match=says) as error:
        engine.run([requests[0], bad], KEY)
    assert "\n" not in str(error.value) and not engine.pending and engine.stats == before


def test_an_engine_that_cannot_run_is_refused(params):
    for how, says in [
        ({"slots": 0}, "slots 0"),
        ({"capacity": 8}, "capacity 8 leaves no room"),
    ]:
        with pytest.raises(UserError, match=says):
            make(params, **how)
    for change, says in [({"eos": (24,)}, "eos 24"), ({"top_k": 25}, "top_k 25")]:
        with pytest.raises(UserError, match=says):
            Engine(params, CFG, dataclasses.replace(SAMPLING, **change))
