"""The reference of a run: what its cache covers, and one that another run trained."""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.data import batches
from jaxrepro.methods.dpo import evaluation, reference_cache, run, setting
from jaxrepro.methods.dpo.rows import shape_of
from jaxrepro.train import policy
from jaxrepro.train.loop import Run

sys.path.insert(0, str(Path(__file__).parent))
import dpo_small

settings = partial(dpo_small.settings, steps=2, sft__steps=0, eval__n=2, eval__samples=0)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of one thin layer."""
    with dpo_small.small(tmp_path_factory.mktemp("xla")) as patch:
        yield patch


# ---- the cache


class Said(Run):
    """`Run.say` without a workdir."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.mark.parametrize(
    "names",
    [("sigmoid", "mallows"), pytest.param(("mallows", "sigmoid"), marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_losses_that_need_other_numbers_do_not_share_a_file(names, small, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = Said()
    for name in (*names, *names):
        s = setting.prepare(settings(loss__name=name))
        start = policy.initial(s.policy, s.config)
        items = run.refer(said, s, start, s.train)
        want = {"lp", "entropy"} if name == "mallows" else {"lp"}
        assert set(items[0]["reference"]) == want
        assert all(np.isfinite(v).all() for v in items[0]["reference"]["lp"])
    assert len(list(reference_cache.folder().iterdir())) == 2 and len(said.lines) == 2


def responses(lengths, c=64):
    """Values (n, 1, 1, c), 0 beyond the length."""
    lp = -np.random.default_rng(0).uniform(0.5, 2, (len(lengths), 1, 1, c)).astype(np.float32)
    return np.where(np.arange(c) < np.array(lengths)[:, None, None, None], lp, 0)


def test_a_cache_in_float32_is_right_to_a_hundredth_of_a_nat_in_any_token():
    kept = responses([3, 60])
    other = kept.copy()
    other[1, 0, 0, 7] += 0.009
    reference_cache.compare(kept, other, ["a", "b"], "float32")
    other[1, 0, 0, 7] += 0.002
    with pytest.raises(UserError, match=r"example b: .* 0\.011 nats .*limit 0\.01\); delete"):
        reference_cache.compare(kept, other, ["a", "b"], "float32")
    with pytest.raises(UserError, match=r"example a: .* nan nats"):
        reference_cache.compare(kept, kept + [[[[np.nan]]], [[[0]]]], ["a", "b"], "float32")


def test_a_cache_in_bfloat16_is_right_in_the_sum_of_a_response():
    kept = responses([1, 16, 60])
    noise = np.random.default_rng(1).normal(0, 0.05, kept.shape) * (kept != 0)
    noise[1, 0, 0, 3] = 0.12  # more than float32 allows any token
    reference_cache.compare(kept, kept + noise, ["a", "b", "c"], "bfloat16")
    shifted = kept - 0.05 * (kept != 0)  # a little less in every token: another model
    with pytest.raises(UserError, match="example c"):
        reference_cache.compare(kept, shifted, ["a", "b", "c"], "bfloat16")


# ---- another run's


def logged(folder):
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if x["stage"] == "dpo"]


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """A run whose last parameters are a reference; what a cache holds is this module's."""
    small.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    folder = tmp_path_factory.mktemp("trained") / "run"
    run.run(settings(seed=1, dpo__lr=0.1), folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "live"])
def test_a_run_is_held_to_the_reference_that_it_names(kind, trained, tmp_path):
    c = settings(reference__init_from=trained, reference__kind=kind)
    assert setting.reference(c, setting.mix(c)).kind == {"auto": "cached"}.get(kind, kind)
    run.run(c, tmp_path)
    s = setting.prepare(c)
    ids = batches.dataset(s.train, lambda found: {}, batch=4, seed=c.seed)[0].ids
    some = [next(one for one in s.train if one["id"] == i) for i in ids]
    score, shape = evaluation.Scorer(s, batch=4), shape_of(s.train)
    ours, theirs = policy.initial(s.policy, c), policy.begun(s.policy, trained)
    reward = 0.1 * (score.sums(ours, some, shape) - score.sums(theirs, some, shape))
    assert np.abs(reward).max() > 1e-3
    first = logged(tmp_path)[0]
    assert first["rewards/chosen"] == pytest.approx(reward[:, 0].mean(), abs=1e-5)
    want = np.log1p(np.exp(reward[:, 1] - reward[:, 0])).mean()
    assert first["loss"] == pytest.approx(want, abs=1e-5)


@pytest.mark.slow
def test_the_start_itself_as_reference_is_no_other_reference(trained, tmp_path):
    run.run(settings(init_from=trained, reference__init_from=trained, reference__kind="live"), tmp_path)  # fmt: skip
    first, second = logged(tmp_path)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and second["rewards/margin"] != 0


def test_drawn_pairs_and_adapters_take_a_reference_of_their_own(trained):
    for changes, kind in (
        ({"online__kind": "iterative"}, "live"),  # a fixed one
        ({"online__kind": "xpo", "loss__name": "xpo"}, "live"),
        ({"lora__rank": 2}, "cached"),
        ({"loss__name": "tdpo1"}, "live"),
    ):
        c = settings(reference__init_from=trained, **changes)
        assert setting.reference(c, setting.mix(c)).kind == kind
    c = settings(reference__init_from=trained, reference__kind="live", lora__rank=2)
    s = setting.prepare(c)
    start, own = policy.initial(s.policy, c), policy.begun(s.policy, trained)
    assert jax.tree.structure(start) == jax.tree.structure(own)
