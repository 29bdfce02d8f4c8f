"""Rows of preferences: prompt and responses, what a loss reads beside them, KTO's mismatch, encoders."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.data import batches, chat
from jaxrepro.data.text import ENDOFTEXT
from jaxrepro.methods.dpo import online, records, schemas, setting
from jaxrepro.methods.dpo.encoding import images
from jaxrepro.methods.dpo.objective import needed
from jaxrepro.methods.dpo.registry import REGISTRY, resolve
from jaxrepro.methods.dpo.rows import GIVEN, Shape, collate, item, shape_of
from jaxrepro.rewards.judge import Verdict

sys.path.insert(0, str(Path(__file__).parent))
from dpo_records import (
    ASKED,
    PAIR,
    SAID,
    USER,
    VALID,
    WRITES_BOS,
    check,
    closed,
    encoder,
    rows_of,
    says,
    with_bos,
)

QUICK = settings(deadline=None, max_examples=40)


@pytest.fixture(scope="module")
def tokenizer():
    return closed()


NUMBERS = st.lists(st.integers(0, 30).map(str), min_size=1, max_size=8).map(" ".join)
PAIRS = st.lists(
    st.fixed_dictionaries({"prompt": NUMBERS, "chosen": NUMBERS, "rejected": NUMBERS}),
    min_size=1,
    max_size=3,
)


@given(PAIRS, st.integers(14, 34))
@QUICK
def test_prompt_and_responses_are_the_start_of_a_row_and_then_padding(tokenizer, rows, t):
    rows = [check("pair", r, id=f"e{i}") for i, r in enumerate(rows)]
    long = encoder(tokenizer, 99)
    kept = [r for r in rows if len(long.prompt(r)) < t]
    short = encoder(tokenizer, t)
    if not kept:
        with pytest.raises(UserError, match="has room for a response"):
            short.fitting(rows, "training")
        return
    assert short.fitting(rows, "training") == kept
    shape = Shape(2, t, t)
    cut, whole = rows_of(short, kept, shape), rows_of(long, kept, Shape(2, 99, 99))
    assert cut.tokens.shape == (len(kept), 2, t) and cut.prompts.tokens.shape == (len(kept), t)
    for i, record in enumerate(kept):
        prompt = tokenizer.encode(chat.render(record["prompt"][0]["content"]))
        n = len(prompt)
        assert cut.prompts.tokens[i].tolist() == prompt + [tokenizer.pad] * (t - n)
        assert cut.prompts.segment[i].tolist() == [1] * n + [0] * (t - n)
        assert cut.prompts.position[i].tolist() == list(range(n)) + [0] * (t - n)
        assert cut.prompts.next_position[i] == n
        for j, text in enumerate(record["responses"]):
            ids = (tokenizer.encode(text) + [tokenizer.eos])[: t - n]
            assert cut.tokens[i, j].tolist() == ids + [tokenizer.pad] * (t - len(ids))
            assert cut.length[i, j] == len(ids) > 0
            assert whole.tokens[i, j, : len(ids)].tolist() == ids  # a longer row only adds
        one = rows_of(short, [record], shape)
        for a, b in zip((*cut.prompts, *cut[1:3]), (*one.prompts, *one[1:3])):
            np.testing.assert_array_equal(a[i], b[0])  # batch mates do not matter


LISTS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=20), min_size=1, max_size=3)


@given(st.lists(st.tuples(LISTS, LISTS), min_size=1, max_size=4), st.integers(1, 32))
@QUICK
def test_the_shape_of_items_holds_them_and_no_more(found, multiple):
    items = [{"id": str(i), "prompt": p[0], "responses": r} for i, (p, r) in enumerate(found)]
    shape = shape_of(items, multiple=multiple)
    counts = [len(i["responses"]) for i in items]
    assert shape.k == max(counts) and shape.ragged == (min(counts) < max(counts))
    rows = collate(items, shape, pad=0)
    for size, longest in (
        (shape.prompt, max(len(i["prompt"]) for i in items)),
        (shape.response, max(len(r) for i in items for r in i["responses"])),
    ):
        assert size % multiple == 0 and 0 <= size - longest < multiple
    assert (rows.length.sum(1) == [sum(map(len, i["responses"])) for i in items]).all()
    assert (rows.data.valid is not None) == shape.ragged
    for small in (shape._replace(prompt=0), shape._replace(response=0), shape._replace(k=0)):
        with pytest.raises(UserError, match=r"example 0: .* rows hold"):
            collate(items, small, pad=0)


def test_prompts_that_fill_a_row_are_left_out_and_cut_responses_are_counted(tokenizer, capsys):
    rows = [check("pair", PAIR, prompt="1 + " * n + "1", id=n) for n in range(12)]
    lengths = [len(encoder(tokenizer).prompt(r)) for r in rows]
    t = lengths[5] + 1
    e = encoder(tokenizer, t)
    kept = e.fitting(rows, "training")
    out = capsys.readouterr().out.splitlines()
    assert kept == rows[:6]
    assert "training: left out 6 of 12" in out[0]
    assert f"training: 2 responses lose their end at {t} tokens" in out[1] and len(out) == 2
    with pytest.raises(UserError, match=r"example 6: its prompt has \d+ tokens and fills"):
        rows_of(e, rows)
    with pytest.raises(UserError, match="none of 1 test records has room"):
        e.fitting(rows[-1:], "test")


def test_steps_follow_their_prefix_and_do_not_end_the_turn(tokenizer):
    e = encoder(tokenizer, 40, "step")
    show = lambda ids: tokenizer.decode(ids, skip_special=False)
    step = item(e, check("step", VALID["step"]))
    assert show(step["prompt"]) == chat.render("1 + 1") + "1 + 1 ="
    assert [show(ids).strip() for ids in step["responses"]] == ["2", "3"]
    first = item(e, check("step", PAIR))
    assert not any(tokenizer.eos in ids for ids in first["responses"])


def test_a_batch_holds_what_the_schema_has(tokenizer):
    more = {"scored": {"scores"}, "ranked": {"scores", "valid"}, "multi": {"rewards"}}
    more |= {"tie": {"ties"}, "unpaired": {"labels"}, "forget": {"labels"}}
    for name in sorted(set(VALID) - {"image"}):
        e = encoder(tokenizer, 32, name, responses={"ranked": 4, "forget": 1}.get(name))
        rows = rows_of(e, [check(name, VALID[name])] * 2)
        k = 4 if name == "ranked" else schemas.get(name).k
        assert e.k == k == rows.tokens.shape[1]
        there = {field for field, value in rows.data._asdict().items() if value is not None}
        assert there == more.get(name, set())
        assert (rows.length > 0).sum() == 2 * min(k, len(check(name, VALID[name])["responses"]))
    multi = rows_of(encoder(tokenizer, 32, "multi"), [check("multi", VALID["multi"])])
    np.testing.assert_array_equal(multi.data.rewards, np.float32([[[1, 0.5], [0, 2]]]))


def test_optional_fields_become_arrays_where_a_loss_wants_them(tokenizer):
    more = {"probability": 0.75, "age": 2, "unsafe_chosen": False, "unsafe_rejected": True}
    for name in ("pair", "scored", "tie", "multi", "step"):
        record = check(name, VALID[name], **more)
        assert record["unsafe"] == [False, True]
        e = encoder(tokenizer, 40, name)
        data = rows_of(e, [record], needs={"unsafe", "age", "probability", "reference"}).data
        assert data.probability.tolist() == [0.75] and data.age.tolist() == [2.0]
        assert data.unsafe.tolist() == [[False, True]] and data.unsafe.dtype == bool
        plain = rows_of(e, [record]).data
        assert plain.probability is plain.age is plain.unsafe is None
    record = check("unpaired", VALID["unpaired"], score=1.5)
    e = encoder(tokenizer, 40, "unpaired")
    assert rows_of(e, [record], needs={"scores"}).data.scores.tolist() == [[1.5]]
    with pytest.raises(UserError, match="example x:3 has no scores, which the loss needs"):
        rows_of(e, [check("unpaired", VALID["unpaired"])], needs={"scores"})
    assert rows_of(e, [record]).data.scores is None
    for changes, message in (
        ({"probability": 0.4}, "field 'probability' is 0.4; chosen beats rejected with 0.5 to 1"),
        ({"age": -1}, "field 'age' is -1"),
        ({"unsafe_chosen": True}, "unsafe_chosen and unsafe_rejected come together"),
    ):
        with pytest.raises(UserError, match=rf"x\.jsonl line 3: .*{message}"):
            check("pair", PAIR, **changes)


# What a run computes itself (programs.py, tests/methods/test_dpo_programs.py); gold is response 0 of a triple.
COMPUTED = {
    "reference", "tokens", "kl", "log_sum_p2", "ref_entropy", "kl_p", "kl_q", "mean_chosen_tokens", "progress",
    "key", "vocab", "gold",
}  # fmt: skip
REFUSED = {  # and what no run has
    "dro": "value head", "drdo": "reward head", "diffusion_dpo": "images", "rpo_rel": "embeddings",
    "tis_dpo": "two further models", "dmpo": "turns", "hypo": "fresh sample", "spo_soft": "fresh sample",
    "xpo": "online.kind", "selm": "online.kind",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_a_record_brings_all_that_a_loss_asks_for_or_the_loss_is_refused(tokenizer, name):
    spec = resolve(name)
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]) as error:
            setting.refuse(spec, "")
        assert "\n" not in str(error.value)
        return
    setting.refuse(spec, "")
    optional = {"probability": 0.75, "age": 2, "unsafe_chosen": False, "unsafe_rejected": True, "score": 0.5}  # fmt: skip
    record = check(spec.schema, VALID[spec.schema], **optional)
    if spec.schema == "forget":
        record |= {"keep": check("forget", VALID["forget"], prompt="2 + 2", retain=True)}
    needs = needed(spec)
    e = encoder(tokenizer, 32, spec.schema, responses=3 if spec.schema == "ranked" else None)
    rows = rows_of(e, [record] * 2, needs=needs, mismatched="kl_p" in needs)
    there = {field for field, value in rows.data._asdict().items() if value is not None}
    assert needs <= there | COMPUTED
    assert ("kl_p" in needs) == (rows.other is not None)


def test_pairs_that_are_drawn_bring_what_their_losses_need():
    own = {"iterative": "sigmoid", "sppo": "sppo_soft"}
    for kind, made in online.KINDS.items():
        setting.refuse(resolve(own.get(kind, kind)), kind)
        if kind == "spin":
            continue
        drawn = [online.Drawn([i], str(i), True) for i in range(2)]
        found = online.item(kind, {"id": "q"}, [1], drawn, Verdict(np.array([2.0, 1.0]), None, 0))
        assert set(found) & GIVEN == made.gives
    for name, kind, match in (
        ("kto", "online_dpo", "labels"),
        ("odpo", "online_dpo", "scores"),
        ("xpo", "online_dpo", "explore"),
        ("ns_dpo", "sppo", "age"),
        ("gdpo_soft", "spin", "probability"),
        ("tpo", "iterative", "3 responses an item and gets 2"),
        ("sigmoid", "nash_md", "2 responses an item and gets 1"),
    ):
        with pytest.raises(UserError, match=match) as error:
            setting.refuse(resolve(name), kind)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="prompt_nll"):
        setting.refuse(resolve("orpo", prompt_nll=True), "")


def test_what_is_forgotten_stands_beside_what_is_kept(tokenizer):
    make = lambda i, retain: check("forget", VALID["forget"], prompt=f"{i}", retain=retain, id=i)
    forget, retain = [make(i, False) for i in range(7)], [make(i, True) for i in range(20, 23)]
    rows = records.keep([*retain, *forget], seed=1)
    assert [r["id"] for r in rows] == [r["id"] for r in forget]
    drawn = [r["keep"]["id"] for r in rows]
    assert set(drawn[:3]) == set(drawn[3:6]) == {"20", "21", "22"}
    assert rows == records.keep([*retain, *forget], seed=1)
    e = encoder(tokenizer, 32, "forget")
    shape = Shape(2, 32, 32)
    out = rows_of(e, e.fitting(rows, "training"), shape)
    assert out.tokens.shape == (7, 2, 32) and out.prompts.tokens.shape == (7, 2, 32)
    alone = encoder(tokenizer, 32, "forget", responses=1)
    for i, record in enumerate(rows):
        for row, one in enumerate((record, record["keep"])):
            same = rows_of(alone, [one | {"label": False}], shape._replace(k=1))
            for a, b in zip(out.prompts, same.prompts):
                np.testing.assert_array_equal(a[i, row], b[0])
            np.testing.assert_array_equal(out.tokens[i, row], same.tokens[0, 0])
            assert out.length[i, row] == same.length[0, 0]
    with pytest.raises(UserError, match="example 20 is to be retained"):
        rows_of(alone, retain)
    with pytest.raises(UserError, match="example 0 is to be forgotten beside none that is kept"):
        rows_of(e, forget)
    with pytest.raises(UserError, match="7 records to forget and 0 to retain"):
        records.keep(forget)


def test_rankings_of_different_lengths_are_filled_with_invalid_rows(tokenizer):
    e = encoder(tokenizer, 32, "ranked", responses=4)
    two = check("ranked", VALID["ranked"], completions=["5", "6"], scores=[0.5, 2])
    out = rows_of(e, [check("ranked", VALID["ranked"]), two])
    valid = [[True] * 3 + [False], [True] * 2 + [False] * 2]
    assert out.data.valid.tolist() == (out.length > 0).tolist() == valid
    np.testing.assert_array_equal(out.data.scores, np.float32([[3, 2, 1, 0], [0.5, 2, 0, 0]]))
    assert (out.tokens[~out.data.valid] == tokenizer.pad).all()
    whole = [item(e, check("ranked", VALID["ranked"]))] * 2
    ragged = shape_of([*whole, item(e, two)])
    assert collate(
        whole, ragged, pad=0
    ).data.valid.all()  # the arrays of a batch are always the same ones
    five = check("ranked", VALID["ranked"], completions=["1"] * 5, scores=[1] * 5, id="five")
    assert e.fitting([five, two], "training") == [two]
    with pytest.raises(
        UserError, match=r"example five: 5 responses of up to 2 tokens .* hold 4 of"
    ):
        rows_of(e, [five])


def test_batches_are_read_at_random_and_know_their_records(tokenizer):
    e = encoder(tokenizer, 32, "scored")
    items = [item(e, check("scored", VALID["scored"], id=i, score_chosen=i)) for i in range(5)]
    arrays = partial(collate, shape=shape_of(items), pad=tokenizer.pad)
    data = batches.dataset(items, arrays, batch=2, seed=0)
    for step in (3, 0):
        batch = data[step]
        assert batch.arrays.data.scores[:, 0].tolist() == [float(i) for i in batch.ids]
        assert batch.arrays.tokens.shape == (2, 2, 16)


def test_held_out_items_are_a_better_and_a_worse_response():
    one = lambda k, **more: {"responses": [[i] for i in range(k)], **more}
    ends = lambda item, schema: setting.as_pair(item, schema)["responses"]
    assert ends(one(2, prompt=[]), "pair") == [[0], [1]]
    assert ends(one(3, prompt=[]), "triple") == [[1], [2]]
    ranked = setting.as_pair(one(3, prompt=[], scores=[1, 0, 4]), "ranked")
    assert ranked["responses"] == [[2], [1]] and ranked["scores"] == [4, 0]
    kept_first = setting.as_pair(one(2, prompts=[[8], [9]]), "forget")
    assert kept_first["responses"] == [[1], [0]] and kept_first["prompts"] == [[9], [8]]


def test_a_row_has_exactly_one_bos(tokenizer):
    record = check("pair", PAIR)
    bare = encoder(tokenizer, 32).rows(record)
    assert tokenizer.bos is None and tokenizer.id(ENDOFTEXT) not in bare[0].tokens
    rows = []
    for template in (None, WRITES_BOS, WRITES_BOS.removeprefix("{{ bos_token }}")):
        own = with_bos(tokenizer, template)
        assert own.bos == tokenizer.id(ENDOFTEXT)
        rows.append(encoder(own, 32).rows(record))
    assert rows[0] == rows[1] == rows[2]
    assert rows[0][0].tokens == [own.bos, *bare[0].tokens] and rows[0][0].start == bare[0].start + 1


def test_without_a_template_a_prompt_is_plain_text(tokenizer):
    own = with_bos(tokenizer)
    e = encoder(own, 32, template=False)
    row = e.rows(check("pair", PAIR))[0]
    assert row.tokens == [own.bos, *own.encode("1 + 1"), *own.encode("2"), own.eos]
    with pytest.raises(UserError, match=r"example x:3: its prompt has 3 turns, which plain text"):
        e.rows(check("pair", PAIR, prompt=[USER, SAID, USER]))


def test_a_record_that_cannot_be_encoded_is_named(tokenizer):
    e = encoder(tokenizer, 32)
    for changes, message in (
        ({"chosen": "2<|im_end|>"}, "example x:3 holds the special token <|im_end|>"),
        ({"prompt": "<|im_start|>1"}, "example x:3 holds the special token <|im_start|>"),
        ({"chosen": "words"}, "example x:3: the closed vocabulary"),
    ):
        with pytest.raises(UserError, match=message.replace("|", r"\|")):
            rows_of(e, [check("pair", PAIR, **changes)])
    two = [check("multi", VALID["multi"], id="a"), check("multi", VALID["multi"], id="b", rewards_chosen=[1], rewards_rejected=[2])]  # fmt: skip
    with pytest.raises(UserError, match="example a has 2 rewards, example b has 1"):
        rows_of(encoder(tokenizer, 32, "multi"), two)


def test_impossible_encoders_are_refused(tokenizer):
    for changes, message in (
        ({"t": 1}, r"data\.max_tokens=1"),
        ({"name": "ranked"}, "needs a number of responses, not None"),
        ({"name": "image"}, r"data\.schema=image has no tokens"),
        ({"system": "<|im_end|>"}, r"the system text contains the special token <\|im_end\|>"),
    ):
        with pytest.raises(UserError, match=message):
            encoder(tokenizer, **changes)


def test_a_system_turn_of_the_record_stays_and_others_get_the_encoders(tokenizer):
    e = encoder(tokenizer, 40, system="1 2")
    shown = lambda r: tokenizer.decode(e.prompt(check("pair", PAIR, prompt=r)), skip_special=False)
    assert shown(ASKED) == chat.render("1 + 1", system="1 2")
    assert shown([says("system", "3"), USER]) == chat.render("1 + 1", system="3")


def test_image_pairs_are_arrays_with_one_noise_for_both():
    rng = np.random.default_rng(0)
    rows = [
        schemas.get("image").validate(
            {n: rng.normal(size=(4, 2, 2)) for n in ("chosen", "rejected", "noise")} | {"timestep": i},
            f"r{i}",
        )
        for i in range(3)
    ]  # fmt: skip
    out = images(rows)
    assert out["latents"].shape == (3, 2, 4, 2, 2) and out["noise"].shape == (3, 4, 2, 2)
    assert out["timestep"].tolist() == [0, 1, 2] and out["latents"].dtype == np.float32
    np.testing.assert_array_equal(out["latents"][1], rows[1]["latents"])
    odd = check("image", VALID["image"], id="odd")
    with pytest.raises(UserError, match="example odd has the shape"):
        images([*rows, odd])


# ---- KTO's mismatched responses


def alone(i):
    """An item of one response, both of them the number i."""
    return {"id": str(i), "prompt": [i], "responses": [[i]], "label": True}


@given(st.integers(1, 4), st.integers(2, 5))
@QUICK
def test_a_mismatched_response_is_the_one_before_in_the_micro_batch(m, size):
    rows = collate([alone(i) for i in range(m * size)], Shape(1, 1, 1), pad=0, mismatched=m)
    tokens, length = rows.other
    assert (length == 1).all()
    for j in range(m):
        prompts = rows.prompts.tokens[j::m, 0].tolist()
        assert prompts == list(range(j, m * size, m))
        assert tokens[j::m, 0, 0].tolist() == prompts[-1:] + prompts[:-1]


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 2), (5, 2)])
def test_a_micro_batch_of_one_has_no_mismatch(n, m):
    with pytest.raises(UserError, match="use 2 or more items in each"):
        collate([alone(0)] * n, Shape(1, 1, 1), pad=0, mismatched=m)
