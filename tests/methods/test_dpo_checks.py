"""Settings and data that cannot work: one line before anything is trained, and no workdir."""

import json

import pytest

from jaxrepro import config
from jaxrepro.config import UserError
from jaxrepro.data import questions
from jaxrepro.methods.dpo import run, setting
from jaxrepro.methods.dpo.checks import LETTERS
from jaxrepro.methods.dpo.registry import mix

SMALL = {"data.n": 16, "eval.n": 2, "eval.samples": 0, "dpo.batch": 4, "steps": 2, "dpo.warmup": 1}
ASKED = [f"{x} {y} {z}" for x in "abcd" for y in "efgh" for z in "ij"]
DRAWN = {"online__kind": "online_dpo", "loss__name": "online_dpo"}


def settings(size="tiny", small=SMALL, **changes):
    named = {k.replace("__", "."): v for k, v in changes.items()}
    return config.load(f"configs/dpo.py:{size}", small | named)


def written(folder, **fields):
    path = folder / "data.jsonl"
    lines = [json.dumps({k: v(x) if callable(v) else v for k, v in fields.items()}) for x in ASKED]
    path.write_text("\n".join(lines))
    return str(path)


# ---- which data are read


@pytest.mark.parametrize(
    "fields",
    [
        {"problem": str, "solution": "a b"},
        {"prompt": str, "chosen": "a b", "rejected": "c"},
        {"prompt": lambda x: [{"role": "user", "content": x}], "chosen": "a b", "rejected": "c"},
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_responses_are_drawn_to_the_prompts_of_the_named_data(fields, steps, tmp_path):
    s = setting.prepare(settings(data__path=written(tmp_path, **fields), sft__steps=steps, **DRAWN))
    held = set(filter(questions.held_out, ASKED))
    assert {q["problem"] for q in s.asked} == set(ASKED) - held and len(s.test) == 2
    assert {q["problem"] for q in s.test} < held and {q["solution"] for q in s.asked} == {"a b"}
    assert not s.train and not s.held


def test_data_that_are_not_there_are_missed(tmp_path):
    gone = str(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        setting.prepare(settings(data__path=gone, **DRAWN))


def test_prompts_without_room_for_a_response_are_left_out(tmp_path, capsys):
    long = lambda x: x if x < "d" else " ".join("a" * 40)
    path = written(tmp_path, prompt=long, chosen="a", rejected="b")
    s = setting.prepare(settings(data__path=path, sft__steps=0, **DRAWN))
    assert {q["problem"] for q in s.asked} <= {x for x in ASKED if x < "d"}
    assert "prompts longer than 36 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"leaves room for data\.max_completion=47"):
        setting.prepare(settings(data__path=path, sft__steps=0, data__max_completion=47, **DRAWN))


def test_items_that_are_held_out_and_not_tested_are_counted(capsys):
    texts = [{"problem": str(i)} for i in range(400)]
    train, test = questions.apart(texts, None, 10)
    held = len(list(filter(questions.held_out, map(str, range(400)))))
    assert len(test) == 10 and len(train) == 400 - held
    said = capsys.readouterr().out
    assert f"{held} items by their text, 10 of them tested; {400 - held} are trained on" in said
    questions.apart(texts, None, held)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "changes", "says"),
    [
        ("smollm2", {"data__generator": "letters"}, "model from scratch, not model.path"),
        ("paper_llama3_base", {"data__path": ""}, "model from scratch, not model.path"),
        ("paper_llama3_base", {"data__path": "", "model__path": ""}, "not study=llama3_base"),
    ],
)
def test_letters_are_learnt_from_scratch_alone(size, changes, says):
    with pytest.raises(UserError, match=says) as error:
        run.check(settings(size, {}, **changes))
    assert "data.path" in str(error.value) and "\n" not in str(error.value)


# ---- the letters' judge


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ("paper_llama3_base", {"loss__name": "sigmoid", "online__kind": "iterative"}),
        ("paper_llama3_base", {"eval__samples": 1}),
        ("smollm2", {"judge": LETTERS}),
        ("tiny", {"data__generator": "chains"} | DRAWN),
    ],
)
def test_the_letters_judge_scores_letters_alone(size, changes):
    with pytest.raises(UserError, match=r"another in config\.judge") as error:
        run.check(settings(size, {}, **changes))
    assert "\n" not in str(error.value)
    assert ("eval.samples=0" in str(error.value)) == ("eval__samples" in changes)


def test_a_judge_that_is_not_asked_is_not_refused(tmp_path):
    run.check(settings("paper_llama3_base", {}))
    spin = {"online__kind": "spin", "loss__name": "spin"}
    run.check(settings("paper_llama3_base", {}, **spin))  # demonstrations win unseen
    run.check(settings("tiny", {}, data__path=str(tmp_path)))  # of the letters, as its vocabulary
    run.check(settings("smollm2", {}))


# ---- losses, batches, shares


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss__name": "alpha_dpo", "dpo__batch": 1}, "alpha_dpo.*use 2 or more"),
        ({"loss__name": "beta_dpo", "dpo__batch": 1}, "beta_dpo.*use 2 or more"),
        ({"loss__name": "kto", "dpo__batch": 1, "data__schema": "unpaired"}, "kto.*2 or more"),
        ({"loss__name": "kto", "dpo__batch": 4, "dpo__micro_batches": 4}, "2 items or more in each"),
        ({"data__schema": "unpaired"}, "sigmoid reads pair records"),
        ({"loss__name": "kto", "data__schema": "pair"}, "kto reads unpaired records"),
        ({"loss__name": "npo", "data__schema": "unpaired"}, "npo reads forget records"),
        ({"loss__name": "sigmoid+sigmoid"}, "named twice"),
        ({"loss__name": "sigmoid+sft", "loss__shares": (1.0, -1.0)}, "numbers from 0"),
        ({"loss__name": "sigmoid+sft", "loss__shares": (1.0, float("nan"))}, "numbers from 0"),
        ({"loss__name": "sigmoid+sft", "loss__shares": (0.0, 0.0)}, "one above 0"),
        ({"online__every": 0} | DRAWN, r"online\.every=0; use 1 or more"),
        ({"online__kind": "spin", "loss__name": "spin", "online__every": 0}, r"online\.every=0;"),
        ({"online__keep": 1}, r"online\.keep=1 keeps rounds of drawn pairs"),
        ({"data__responses": 3}, r"data\.responses=3 with pair records"),
        ({"data__responses": 2} | DRAWN, r"data\.responses=2 with pair records"),
        ({"reference__init_from": "gone"}, "gone has no checkpoint"),
        ({"reference__init_from": "gone", "reference__kind": "synced", "reference__every": 1}, "only cached and live"),
        ({"reference__init_from": "gone", "loss__name": "simpo"}, "reference.kind=none"),
    ],
)  # fmt: skip
def test_settings_that_fail_later_are_refused_now(changes, says, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        run.run(settings(**changes), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "fields", "says"),
    [
        ({"loss__name": "modpo", "loss__weights": (0.5, 0.3, 0.2)},
         {"chosen": "a", "rejected": "b", "rewards_chosen": [1.0], "rewards_rejected": [0.0]},
         "1 further rewards, and modpo has 3 weights"),
        ({"loss__name": "mdpo_multi", "data__responses": 3},
         {"completions": ["a", "b", "c"], "scores": [3, 2, 1]}, "give an even number"),
        ({"loss__name": "d2o", "data__responses": 4},
         {"completions": lambda x: ["a", "b", "c"][: 2 + (x < "b")], "scores": lambda x: [3, 2, 1][: 2 + (x < "b")]},
         "d2o wants as many everywhere"),
        ({"loss__name": "rrhf", "data__responses": 1}, {"completions": ["a", "b"], "scores": [2, 1]},
         "rankings take 2 or more"),
    ],
)  # fmt: skip
def test_data_that_a_loss_cannot_read_are_refused_before_the_warm_up(
    changes, fields, says, tmp_path
):
    path = written(tmp_path, prompt=str, **fields)
    with pytest.raises(UserError, match=says) as error:
        run.run(settings(data__path=path, **changes), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_what_is_right_is_taken(tmp_path):
    path = written(tmp_path, prompt=str, completions=["a", "b", "c", "d"], scores=[4, 3, 2, 1])
    for name in ("mdpo_multi", "d2o", "rrhf"):
        c = settings(data__path=path, loss__name=name, data__responses=4)
        run.check(c)
        assert len(setting.prepare(c).train) > 4
    run.check(settings(loss__name="odpo", data__schema="scored"))
    run.check(settings(data__schema="scored"))  # a pair, and more
    run.check(settings(online__keep=1, **DRAWN))
    assert [w for _, w in mix(["sigmoid", "sft"], [0, 1])] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("name", "want"),
    [("simpo+sft", (2.5, 1.375, 1e-6)), ("sft+sigmoid", (0.01, None, 7e-7)), ("sft", (None, None, 7e-7))],
)  # fmt: skip
def test_a_paper_size_looks_at_each_part_of_a_sum(name, want):
    found = settings("paper_llama3_instruct", {}, loss__name=name)
    assert (found.loss.beta, found.loss.gamma, found.dpo.lr) == pytest.approx(want, nan_ok=True)
