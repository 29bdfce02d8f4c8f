"""Rounds that draw their own pairs: penalties, which reference draws, mixtures, rounds that are kept."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.methods.dpo import online, programs, rollouts, run, setting
from jaxrepro.methods.dpo.online import Drawn
from jaxrepro.methods.dpo.programs import Reference
from jaxrepro.rewards import judge as judges
from jaxrepro.train import policy
from jaxrepro.train.loop import Run
from jaxrepro.train.state import State

sys.path.insert(0, str(Path(__file__).parent))
import dpo_small

settings = partial(dpo_small.settings, sft__steps=0)
ASKED = {"id": "q", "problem": "a b", "solution": "a"}


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """A model of one thin layer."""
    with dpo_small.small(tmp_path_factory.mktemp("xla")):
        yield


def drawn(*texts, ended):
    return [Drawn([ord(c) for c in text], text, e) for text, e in zip(texts, ended)]


# ---- responses without an end


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["online_dpo", "sppo", "nash_md"])
def test_a_response_without_an_end_loses_also_where_the_judge_gives_probabilities(
    kind, temperature
):
    longer = judges.pairwise(judges.length, temperature=temperature)
    both = drawn("xyz", "x", ended=(False, True))
    plain, taken = (online.scores(longer, ASKED, both, penalty=p) for p in (0.0, 1.0))
    assert plain.beats[0, 1] > 0.5 and taken.beats[0, 1] == 0.0 and taken.beats[1, 0] == 1.0
    for verdict, best in ((plain, 0), (taken, 1)):
        made = online.item(kind, ASKED, [1], both, verdict)
        if kind == "nash_md":
            assert (made["scores"][0] > 0.5) == (best == 0)
        else:
            assert made["picked"] == [best, 1 - best] and made["probability"] > 0.5


def test_a_penalty_moves_nothing_between_responses_of_one_kind():
    longer = judges.pairwise(judges.length)
    for ended in ((True, True), (False, False)):
        found = [
            online.scores(longer, ASKED, drawn("xyz", "x", ended=ended), penalty=p).beats
            for p in (0.0, 0.4)
        ]
        np.testing.assert_allclose(*found)
    some = online.scores(longer, ASKED, drawn("a", "b", ended=(True, False)), penalty=0.2).beats
    np.testing.assert_allclose(some, [[0.5, 0.7], [0.3, 0.5]])
    np.testing.assert_allclose(some + some.T, 1)


# ---- the reference of a round


@pytest.mark.parametrize(
    ("kind", "i", "value", "step"),
    [
        ("xpo", 1, 0.0, 0),
        (
            "xpo",
            2,
            0.75,
            2,
        ),  # due before update 2: the round is drawn from what that update is held to
        ("xpo", 3, 0.0, 2),  # what the state holds has moved at 2 already
        ("nash_md", 2, 0.75, 2),
        ("spin", 2, None, 2),
    ],
)
def test_a_round_is_drawn_from_the_reference_that_its_record_names(kind, i, value, step):
    c = settings(online__kind=kind, loss__name=kind, reference__kind="synced")
    s = SimpleNamespace(config=c, reference=Reference("synced", every=2, alpha=0.75))
    rounds = run.Rounds.__new__(run.Rounds)
    rounds._s, rounds._moved = s, jax.jit(lambda state: programs.moved(s.reference, state))
    state = State(jnp.asarray(i), {"w": jnp.ones(2)}, None, {"reference": {"w": jnp.zeros(2)}})
    found = rounds._reference(i, state)
    assert rounds._reference_step(i) == step
    assert (found is None) == (value is None)
    if found is not None:
        np.testing.assert_allclose(found["w"], value)


def test_an_offline_reference_that_would_never_move_is_refused():
    for every, steps in ((512, 300), (4, 4)):
        c = settings(reference__kind="synced", reference__every=every, steps=steps)
        with pytest.raises(UserError, match=rf"reference.every={every}.*steps={steps}"):
            run.check(c)
    run.check(settings(reference__kind="synced", reference__every=3, steps=4))
    run.check(settings(reference__kind="synced", steps=0))  # what others start from
    run.check(settings(online__kind="spin", loss__name="spin", online__every=9, steps=4))


# ---- two samples of the mixture


@pytest.fixture(scope="module")
def prepared():
    c = settings(online__kind="ipo_md", loss__name="ipo_md", data__max_completion=4)
    return setting.prepare(c)


@pytest.mark.slow
def test_ipo_md_draws_both_responses_from_the_mixture(prepared):
    s = prepared
    first, second = (policy.initial(s.policy, settings(seed=seed)) for seed in (0, 1))
    mixture = rollouts.Mixture(s, temperature=1.0, share=1.0, batch=8, n=2)  # all the reference's
    key = jax.random.key(0)
    own = mixture(first, second, s.asked[:4], key=key)
    assert [len(found) for found in own] == [2] * 4 and any(a != b for a, b in own)
    assert mixture(second, second, s.asked[:4], key=key) == own
    assert mixture(first, first, s.asked[:4], key=key) != own
    # no writer of the policy alone is asked
    found = rollouts.draw_round(s, {"mixture": mixture}, first, second, 0, judges.length)
    assert found["items"] and {len(i["responses"]) for i in found["items"]} == {2}
    assert all(len(i["texts"]) == 2 for i in found["items"])


def test_a_round_records_its_key_and_the_prompts_that_gave_no_pair(prepared):
    s = prepared
    again = iter("ab" * 99)  # every second prompt gets two equal responses

    def mixture(params, ref, questions, *, key, first):
        both = lambda: drawn("x", "xyz" if next(again) == "a" else "x", ended=(True, True))
        return [both() for _ in questions]

    said = []
    found = rollouts.draw_round(s, {"mixture": mixture}, None, None, 3, judges.length, said.append)
    assert said[-1] == f"round 3: {len(found['items'])} of 4 pairs from {found['asked']} prompts"
    kept = [i["id"] for i in found["items"]]
    assert len(found["discarded"]) == found["asked"] - len(kept) > 0
    assert not {*kept} & {*found["discarded"]}
    other = rollouts.draw_round(s, {"mixture": mixture}, None, None, 4, judges.length)
    key = jax.random.fold_in(jax.random.key(s.config.seed), 3)
    assert found["key"] == jax.random.key_data(key).tolist() != other["key"]


def test_ipo_md_takes_losses_of_pairs_and_a_reference_of_its_own():
    for name in ("ipo_md", "ipo", "simpo"):
        c = settings(online__kind="ipo_md", loss__name=name)
        assert setting.reference(c, setting.mix(c)).kind == "live"
    with pytest.raises(UserError, match="needs scores"):
        setting.mix(settings(online__kind="ipo_md", loss__name="nash_md"))


# ---- rounds that are kept


class Kept(Run):
    """`Run.once` without a workdir."""

    def __init__(self):
        self.found = {}

    def once(self, name, function, *, of=None):
        if name not in self.found:
            self.found[name] = function()
        return self.found[name]


def rounds_of(s, monkeypatch, r, **changes):
    """Ids of what round r learns from, where round j draws j0, j1, ...; the rounds that were drawn."""
    c = settings(online__every=2, **changes)
    s = s._replace(config=c, reference=Reference("live"))
    asked = []

    def draw(s, writers, params, ref, j, judge, say):
        asked.append(j)
        return {"items": [{"id": f"{j}{n}"} for n in range(8)]}

    monkeypatch.setattr(rollouts, "draw_round", draw)
    rounds = run.Rounds(Kept(), s, judges.length)
    state = State(jnp.asarray(0), {}, None, {"reference": None})
    ids = []
    for i in range(2 * r + 2):
        batch = rounds.batch(i, state, lambda items: {"n": np.zeros(len(items))})
        ids = batch.ids if i % 2 == 0 else ids + batch.ids
    return ids, asked, rounds


def test_a_round_is_learnt_alone_and_spin_with_the_one_before(prepared, monkeypatch):
    pair = dict(online__kind="online_dpo", loss__name="online_dpo")
    ids, asked, _ = rounds_of(prepared, monkeypatch, 2, **pair)
    assert ids == [f"2{n}" for n in range(8)] and asked == [0, 1, 2]
    ids, asked, _ = rounds_of(prepared, monkeypatch, 2, **pair, online__keep=2)
    assert {i[0] for i in ids} == {"0", "1", "2"} and len(set(ids)) == 8 and asked == [0, 1, 2]
    spin = dict(online__kind="spin", loss__name="spin")
    ids, _, _ = rounds_of(prepared, monkeypatch, 2, **spin)
    assert {i[0] for i in ids} == {"1", "2"}
    ids, _, _ = rounds_of(prepared, monkeypatch, 0, **spin)
    assert ids == [f"0{n}" for n in range(8)]
    ids, _, _ = rounds_of(prepared, monkeypatch, 2, **spin, online__keep=0)
    assert ids == [f"2{n}" for n in range(8)]


def test_a_kept_round_that_is_lost_is_named(prepared, monkeypatch):
    _, _, rounds = rounds_of(prepared, monkeypatch, 1, online__kind="spin", loss__name="spin")
    del rounds._run.found["round-000001"]
    state = State(jnp.asarray(4), {}, None, {"reference": None})
    with pytest.raises(UserError, match="round 1 is not in the workdir"):
        rounds.batch(4, state, lambda items: {})
    with pytest.raises(UserError, match=r"online.keep=-1; use 0 or more"):
        run.check(settings(online__kind="spin", loss__name="spin", online__keep=-1))
