"""A preference run: what it writes, how it goes on, what it draws, what it refuses."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrepro import config
from jaxrepro.config import UserError
from jaxrepro.methods.dpo import evaluation, online, report, run, setting, world
from jaxrepro.methods.dpo.online import Drawn
from jaxrepro.methods.dpo.registry import REGISTRY, hyperparameters
from jaxrepro.rewards.judge import Verdict
from jaxrepro.train import quiz
from jaxrepro.train.loop import Run

sys.path.insert(0, str(Path(__file__).parent))
import dpo_small
from dpo_small import settings


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """A model of one thin layer; caches of this test's own."""
    with dpo_small.small(tmp_path_factory.mktemp("xla")) as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo") / "whole"
    return folder, run.run(settings(), folder)


def interrupt(config, folder, *, after):
    """Begin the run and break it off after that many updates."""
    save = Run.save

    def stop(self, i, state, **kwargs):
        save(self, i, state, **kwargs)
        if self.stage == "dpo" and i == after - 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run.run(config, folder)


def parameters(folder):
    return run.trained(settings(), folder)[1]


def logged(folder, stage):
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if x["stage"] == stage]


@pytest.mark.slow
def test_a_run_leaves_pairs_samples_and_their_change(finished):
    folder, results = finished
    assert results["before/test/accuracy"] == 0.5 and results["before/test/kl"] == pytest.approx(0, abs=1e-4)  # fmt: skip
    assert 0 <= results["after/test/win_rate_lo"] <= results["after/test/win_rate_hi"] <= 1
    change = results["after/test/chosen_lp"] - results["before/test/chosen_lp"]
    assert results["test/chosen_lp_change"] == pytest.approx(change) and change != 0
    items = json.loads((folder / "items.json").read_text())
    assert np.mean(items["after/test/accuracy"]) == pytest.approx(results["after/test/accuracy"])
    assert np.mean(items["after/test/win_rate"]) == pytest.approx(results["after/test/win_rate"])
    assert json.loads((folder / "summary.json").read_text()) == results
    assert "before and after" in (folder / "samples.md").read_text()
    steps = logged(folder, "dpo")
    assert [x["step"] for x in steps] == [1, 2, 3, 4]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # policy = reference
    assert {"rewards/accuracy", "rewards/margin", "logps/chosen"} <= set(steps[0])


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(finished, tmp_path):
    folder, results = finished
    interrupt(settings(), tmp_path, after=2)
    assert run.run(settings(), tmp_path) == results
    jax.tree.map(np.testing.assert_array_equal, parameters(folder), parameters(tmp_path))


# What depends on earlier batches or on the number of the step; one run for each kind of data.
REMEMBERING = [n for n, s in sorted(REGISTRY.items()) if s.state or s.weighting == "subsample"]


@pytest.mark.slow
@pytest.mark.parametrize("schema", sorted({REGISTRY[n].schema for n in REMEMBERING}))
def test_what_losses_and_references_remember_survives_an_interruption(schema, tmp_path):
    names = [n for n in REMEMBERING if REGISTRY[n].schema == schema]
    changes = {"loss__name": "+".join(names), "reference__kind": "synced", "reference__every": 1}
    if schema != "pair":
        path = written(tmp_path / "data.jsonl", list(records_of(schema)))
        changes |= {"data__path": path}
    c = settings(**changes, eval__samples=0)
    whole = run.run(c, tmp_path / "whole")
    interrupt(c, tmp_path / "cut", after=2)
    assert run.run(c, tmp_path / "cut") == whole
    steps = logged(tmp_path / "whole", "dpo")
    assert logged(tmp_path / "cut", "dpo") == steps
    assert all(f"loss/{name}" in steps[-1] for name in names)


@pytest.mark.slow
def test_an_arm_starts_from_the_warm_up_of_another_run(finished, tmp_path):
    folder, results = finished
    again = run.run(settings(init_from=str(folder), steps=0), tmp_path / "a")
    assert again["before/test/chosen_lp"] != results["before/test/chosen_lp"]  # the last stage's
    warm = tmp_path / "warm"
    first = run.run(settings(steps=0), warm)
    arm = run.run(settings(init_from=str(warm)), tmp_path / "b")
    assert arm["before/test/chosen_lp"] == pytest.approx(first["before/test/chosen_lp"])
    assert arm["after/test/chosen_lp"] == pytest.approx(results["after/test/chosen_lp"], abs=1e-4)


def test_evaluate_gives_what_needs_no_start(finished):
    folder, results = finished
    found = run.evaluate(settings(), folder)
    assert found["test/chosen_lp"] == pytest.approx(results["after/test/chosen_lp"], abs=1e-4)
    assert not {"test/accuracy", "test/kl"} & set(found)


def test_the_reference_of_a_round_is_its_policy_with_adapters_too():
    for changes, kind in (
        ({"online__kind": "spin", "loss__name": "spin"}, "synced"),
        ({"online__kind": "xpo", "loss__name": "xpo"}, "adapter"),
        ({"online__kind": "xpo", "loss__name": "simpo"}, "adapter"),
        ({}, "adapter"),
    ):
        c = settings(lora__rank=2, sft__steps=0, **changes)
        assert setting.reference(c, setting.mix(c)).kind == kind
    c = settings(online__kind="xpo", loss__name="simpo")
    assert setting.reference(c, setting.mix(c)).kind == "live"


def test_a_table_ends_at_the_known_optimum(tmp_path):
    found = run.run(settings(model__shape="table", steps=500, loss__beta=0.5), tmp_path)
    assert found["after/table/tv"] < 0.02 and found["after/table/entropy"] > 0.5


# ---- pairs that are drawn

ASKED = {"id": "q", "problem": "a b", "solution": "a"}


def drawn(*texts):
    return [Drawn([ord(c) for c in text], text, True) for text in texts]


def verdict(*scores):
    return Verdict(np.array(scores, float), None, 0)


def test_best_and_worst_of_the_samples_are_the_pair():
    made = online.item("online_dpo", ASKED, [1], drawn("x", "y", "z"), verdict(1, 3, 2))
    assert made["picked"] == [1, 0] and made["responses"] == [[ord("y")], [ord("x")]]
    assert made["probability"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert online.item("online_dpo", ASKED, [1], drawn("x", "y"), verdict(1, 1)) is None
    unknown = verdict(np.nan, 3, 2)
    made = online.item("iterative", ASKED, [1], drawn("x", "y", "z"), unknown)
    assert made["picked"] == [1, 2] and made["values"] == [None, 3, 2]
    assert online.item("iterative", ASKED, [1], drawn("x", "y"), verdict(np.nan, 3)) is None


def test_spin_prefers_the_demonstration_and_xpo_explores_what_the_reference_wrote():
    made = online.item("spin", ASKED, [1], drawn("own", "human"), None)
    assert made["responses"][0] == [ord(c) for c in "human"]
    assert online.item("spin", ASKED, [1], drawn("a", "a"), None) is None
    assert online.item("xpo", ASKED, [1], drawn("p", "r"), verdict(2, 1))["explore"] == 1
    assert online.item("xpo", ASKED, [1], drawn("p", "r"), verdict(1, 2))["explore"] == 0


def test_sppo_scores_are_mean_win_probabilities_and_nash_md_keeps_one_response():
    made = online.item("sppo", ASKED, [1], drawn("x", "y", "z"), verdict(0, 1, 0), scale=2.0)
    p = 1 / (1 + np.exp(-2.0))
    assert made["scores"][0] == pytest.approx((0.5 + p + p) / 3)
    made = online.item("nash_md", ASKED, [1], drawn("x", "y"), verdict(1, 0))
    assert len(made["responses"]) == 1 and made["scores"] == [pytest.approx(1 / (1 + np.exp(-1)))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(online.KINDS))
def test_a_round_is_drawn_once_and_a_resumed_run_has_the_same_bits(kind, tmp_path):
    name = {"iterative": "sigmoid", "sppo": "sppo_soft"}.get(kind, kind)
    changed = dict(online__kind=kind, online__every=2, loss__name=name, eval__samples=0)
    whole = run.run(settings(**changed), tmp_path / "whole")
    rounds = sorted(p.name for p in (tmp_path / "whole" / "once").glob("round-*"))
    assert rounds == ["round-000000.json", "round-000001.json"]
    kept = json.loads((tmp_path / "whole" / "once" / rounds[1]).read_text())["value"]
    iterated = online.KINDS[kind].iterated
    assert kept["policy_step"] == 2 and kept["reference_step"] == (2 if iterated else 0)
    assert len(kept["items"]) == 8
    interrupt(settings(**changed), tmp_path / "cut", after=3)  # amid a round, after the checkpoint
    assert run.run(settings(**changed), tmp_path / "cut") == whole


# ---- what a reader finds


def test_greedy_answers_are_told_listed_and_compared(tmp_path):
    questions = [
        {"id": str(i), "problem": f"{i} + 1 = ?", "solution": f"#### {i + 1}"} for i in range(3)
    ]
    answer = lambda *texts: quiz.score(questions, [(t, True) for t in texts], "")
    before, after = (
        {"quiz": answer("#### 1", "2", "4")},
        {"quiz": answer("#### 9", "#### 2", "#### 3")},
    )
    for found, prefix in ((before, "before/test/"), (after, "after/test/")):
        found["rates"] = {f"{prefix}{k}": v for k, v in found["quiz"].pop("rates").items()}
    assert evaluation.line(before["rates"], "before/test/").startswith("exact match 66.7 %")
    assert report.changes(before, after)["test/gain"] == 0.0
    shown = SimpleNamespace(test=questions, config=SimpleNamespace(eval=SimpleNamespace(samples=0)))
    report.write(SimpleNamespace(path=tmp_path.joinpath), shown, before, after)
    items = json.loads((tmp_path / "items.json").read_text())
    assert items == {"before/test": [1.0, 1.0, 0.0], "after/test": [0.0, 1.0, 1.0]}
    text = (tmp_path / "samples.md").read_text()
    assert "1 became right, 1 became wrong, 1 stayed right." in text and "2 + 1 = ?" in text


# ---- data of one's own


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.slow
def test_unpaired_records_of_a_file_train_kto_against_a_live_reference(tmp_path, capsys):
    rows = [
        {"prompt": f"{x} {y}", "completion": "c d" if good else "e", "label": good}
        for x in "abcd"
        for y in "efg"
        for good in (True, False)
    ]
    path = written(tmp_path / "data.jsonl", rows)
    found = run.run(settings(loss__name="kto", data__path=path), tmp_path / "run")
    assert found["after/test/samples"] > 0
    steps = logged(tmp_path / "run", "dpo")
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-5)  # policy = reference, z0 = 0
    assert all(np.isfinite(x["loss"]) for x in steps)


def records_of(schema):
    for x in "abcdefgh":
        for y in "ijkl":
            asked = {"prompt": f"{x} {y}"}
            pair = asked | {"chosen": f"{x} d", "rejected": "e f g"}
            yield {
                "pair": pair | {"probability": 0.8, "age": 3, "unsafe_chosen": x < "c", "unsafe_rejected": False},
                "scored": pair | {"score_chosen": 0.9, "score_rejected": 0.2},
                "tie": pair | {"tie": y == "i"},
                "multi": pair | {"rewards_chosen": [1.0], "rewards_rejected": [0.5]},
                "step": pair | {"prefix": "h"},
                "triple": pair | {"gold": "a b"},
                "ranked": asked | {"completions": ["a", "b c", "d"][: 2 + (y == "i")], "scores": [1, 0.5, 0][: 2 + (y == "i")]},
                "unpaired": asked | {"completion": "c d", "label": y < "k", "score": 0.5},
                "forget": asked | {"completion": "c d", "retain": y < "k"},
            }[schema]  # fmt: skip


OF_SCHEMA = {
    "pair": {"loss__name": "safedpo"},
    "scored": {"loss__name": "odpo"},
    "tie": {"loss__name": "todo"},
    "multi": {"loss__name": "modpo"},
    "step": {"loss__name": "step_dpo"},
    "triple": {"loss__name": "tpo"},
    "ranked": {"loss__name": "rrhf", "data__responses": 4},
    "unpaired": {"loss__name": "ulma"},
    "forget": {"loss__name": "npo", "loss__retain": "kl"},
}


@pytest.mark.slow
@pytest.mark.parametrize("schema", OF_SCHEMA)
def test_records_of_every_schema_train(schema, tmp_path):
    path = written(tmp_path / "data.jsonl", list(records_of(schema)))
    found = run.run(
        settings(data__path=path, eval__samples=0, **OF_SCHEMA[schema]), tmp_path / "run"
    )
    steps = logged(tmp_path / "run", "dpo")
    assert len(steps) == 4 and all(np.isfinite(x["loss"]) for x in steps)
    assert ("after/test/accuracy" in found) == (schema != "unpaired")


def test_a_missing_field_names_file_line_and_field(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}]
    path = written(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(UserError, match=r"pairs\.jsonl.*2.*'rejected'"):
        run.run(settings(data__path=path), tmp_path / "run")


def test_a_config_has_every_hyper_parameter_of_the_registry_with_its_type():
    section = config.load("configs/dpo.py", {}).loss
    found = {name: section.get_type(name) for name in section if name not in ("name", "shares")}
    assert found == hyperparameters()


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss__name": "sigmod"}, "did you mean"),
        ({"loss__name": "exo_pair", "loss__label_smoothing": 0.0}, "label_smoothing"),
        ({"loss__beta": 0.0}, "beta"),
        ({"loss__name": "sigmoid", "loss__gamma": 1.0}, "gamma"),
        ({"loss__name": "aot", "loss__use_weighting": True}, "use_weighting"),
        ({"loss__name": "sigmoid+kto"}, "different data"),
        ({"loss__name": "dro"}, "value head"),
        ({"loss__name": "diffusion_dpo"}, "images"),
        ({"loss__name": "xpo"}, "online.kind"),
        ({"loss__name": "orpo", "loss__prompt_nll": True}, "prompt_nll"),
        ({"loss__name": "odpo", "online__kind": "iterative"}, "does not give"),
        ({"reference__kind": "none"}, "needs a reference"),
        ({"reference__kind": "adapter"}, "lora.rank"),
        ({"reference__kind": "cached", "online__kind": "online_dpo"}, "before the run"),
        ({"reference__kind": "synced", "reference__alpha": 0.0}, r"\(0, 1\]"),
        ({"online__kind": "online"}, "is not one of"),
        ({"lora__rank": 2}, "warm-up would train the adapters"),
        ({"loss__name": "odpo"}, "chosen score above the rejected one"),
        ({"loss__name": "sppo_soft"}, "win probabilities"),
        (
            {"online__kind": "nash_md", "loss__name": "nash_md", "reference__kind": "none"},
            "reference",
        ),
        ({"online__kind": "sppo", "online__samples": 1}, "at least 2"),
        ({"data__annotator": "me"}, "is not one of"),
        ({"data__flips": 1.0}, r"\[0, 1\)"),
        ({"data__generator": "chains"}, "no pairs"),
        ({"data__generator": "gsm_symbolic", "online__kind": "xpo"}, "model.path is needed"),
        ({"judge": "os:system"}, "judge"),
        ({"dpo__micro_batches": 3}, "divisor"),
    ],
)
def test_settings_that_cannot_work_are_one_line_and_leave_no_workdir(changes, says, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        run.run(settings(**changes), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("size", "changes", "want"),
    [  # beta, gamma, lr: the table of the SimPO study (arXiv:2405.14734)
        ("mistral_base", {}, (2.0, 1.6, 3e-7)),
        ("llama3_instruct", {}, (2.5, 1.375, 1e-6)),
        ("llama3_instruct", {"loss.name": "sigmoid"}, (0.01, None, 7e-7)),
        ("llama3_base", {"loss.name": "sigmoid", "loss.beta": 0.1, "dpo.lr": 1e-6}, (0.1, None, 1e-6)),
        ("llama3_base", {"loss.name": "kto"}, (None, None, 5e-7)),
        ("mistral_instruct", {"loss.beta": 10.0}, (10.0, 1.0, 5e-7)),
    ],
)  # fmt: skip
def test_a_paper_size_takes_the_studys_settings_of_its_loss(size, changes, want):
    found = config.load(f"configs/dpo.py:paper_{size}", changes)
    got = (found.loss.beta, found.loss.gamma, found.dpo.lr)
    assert got == tuple(w if w is None else pytest.approx(w) for w in want)
    assert config.load("configs/dpo.py", {}).dpo.lr == 3e-4


def test_the_worlds_pairs_follow_their_annotator():
    def pairs(n=400, **who):
        return [world.pair(i, "t", world.Annotator(**who)) for i in range(n)]

    better = lambda found: np.mean([p["score_chosen"] > p["score_rejected"] for p in found])
    drawn_by = lambda p: 1 / (1 + np.exp(p["score_rejected"] - p["score_chosen"]))
    fair = pairs()
    assert better(pairs(kind="best")) > 0.99
    expected = np.mean([max(drawn_by(p), 1 - drawn_by(p)) for p in fair])
    assert abs(better(fair) - expected) < 0.06
    assert better(pairs(kind="best", flips=0.3)) == pytest.approx(0.7, abs=0.06)
    length = lambda p: len(p["chosen"].split()) - len(p["rejected"].split())
    assert np.mean([length(p) for p in pairs(kind="length")]) > 0.5
    for p in pairs(50, kind="edit"):
        a, b = p["chosen"].split(), p["rejected"].split()
        assert len(a) == len(b) and sum(x != y for x, y in zip(a, b)) == 1
        assert p["score_chosen"] > p["score_rejected"]
    assert fair == pairs() and world.reward("a b", "") == -world.SCALE


def test_held_out_prompts_of_the_world_are_never_trained_on():
    asked = lambda held: {
        *(world.pair(i, "t", held=held)["prompt"] for i in range(300)),
        *(world.demonstration(i, "t", held=held)["problem"] for i in range(300)),
    }
    assert asked(False).isdisjoint(asked(True)) and len(asked(True)) > 200
    assert all(map(world.is_held, asked(True)))
