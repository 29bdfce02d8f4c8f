"""Cached log-probabilities of the reference: what a fingerprint covers, and files that cannot be used."""

import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.methods.dpo import reference_cache
from jaxrepro.methods.dpo.rows import Shape, item

sys.path.insert(0, str(Path(__file__).parent))
from dpo_records import PAIR, WRITES_BOS, check, closed, encoder, with_bos


@pytest.fixture(scope="module")
def tokenizer():
    return closed()


@pytest.fixture(scope="module")
def rows():
    return [check("pair", PAIR, prompt=f"{i} + 1", id=i) for i in range(3)]


def test_a_fingerprint_changes_with_all_that_the_reference_reads(tokenizer, rows):
    e = encoder(tokenizer, 32)
    shape = Shape(2, 32, 32)
    of = lambda model="m", e=e, rows=rows, shape=shape: reference_cache.fingerprint(
        model, [item(e, r) for r in rows], shape
    )
    other = [rows[0], rows[1], check("pair", PAIR, prompt="2 + 2", id=2)]
    swapped = [{**r, "responses": r["responses"][::-1]} for r in rows]
    template = WRITES_BOS.replace("assistant\n", "assistant\n\n")
    keys = [
        of(),
        of("other"),
        of(rows=other),
        of(rows=rows[::-1]),
        of(rows=swapped),
        of(rows=rows[:2]),
        of(e=dataclasses.replace(e, max_tokens=len(e.prompt(rows[0])) + 1)),  # cuts the end of turn
        of(shape=shape._replace(response=33)),
        of(shape=shape._replace(prompt=33)),
        of(e=dataclasses.replace(e, system="1")),
        of(e=dataclasses.replace(e, template=False)),
        of(e=dataclasses.replace(e, tokenizer=with_bos(tokenizer))),
        of(e=dataclasses.replace(e, tokenizer=with_bos(tokenizer, template))),
    ]
    assert len(set(keys)) == len(keys) and of() == keys[0]
    assert all(len(key) == 32 for key in keys)
    plain = dataclasses.replace(e, template=False)  # the same tokens, another response
    pair = lambda *texts: check("pair", dict(zip(("prompt", "chosen", "rejected"), texts)))
    assert of(e=plain, rows=[pair("1 2", "3", "4")]) != of(e=plain, rows=[pair("1", "2 3", "2 4")])
    renamed = [{**r, "id": "x", "scores": [1.0, 2.0]} for r in rows]
    assert of(rows=renamed) == keys[0]
    apart = {"id": "x", "prompts": [[1], [2]], "responses": [[3], [4]]}
    of_items = lambda *items: reference_cache.fingerprint("m", items, shape)
    assert of_items(apart) != of_items(apart | {"prompts": [[2], [1]]})


def test_the_identity_of_a_model_is_its_numbers_and_its_config():
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones((), jnp.bfloat16)}}
    of = reference_cache.weights
    assert of(params, "cfg") == of({k: v for k, v in reversed(params.items())}, "cfg")
    changed = [
        of(params | {"a": params["a"].at[0, 0].set(1e-7)}, "cfg"),
        of(params | {"a": params["a"].reshape(3, 2)}, "cfg"),
        of(params | {"b": {"c": jnp.ones(())}}, "cfg"),
        of({"a": params["a"], "d": params["b"]}, "cfg"),
        of(params, "other"),
        of(params, "cfg"),
    ]
    assert len(set(changed)) == 6


def test_cached_log_probabilities_come_back_bit_for_bit(tmp_path):
    lp = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    folder = tmp_path / "cache"
    assert reference_cache.load(folder, "k", (5, 2)) is None
    path = reference_cache.save(folder, "k", jnp.asarray(lp))
    np.testing.assert_array_equal(reference_cache.load(folder, "k", (5, 2)), lp)
    assert reference_cache.load(folder, "other", (5, 2)) is None
    with pytest.raises(UserError, match=r"holds float32 \(5, 2\), float32 \(4, 2\) is needed"):
        reference_cache.load(folder, "k", (4, 2))
    for damage in (path.read_bytes()[:60], path.read_bytes()[:-3], b"", b"PK\x03\x04"):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="is damaged"):
            reference_cache.load(folder, "k", (5, 2))
    assert [p.name for p in folder.iterdir()] == ["reference-k.npy"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_neither_kept_nor_used(tmp_path, bad):
    lp = np.zeros((3, 2), np.float32)
    lp[1, 1] = bad
    with pytest.raises(UserError, match=r"^example b \(1 of 3\): the reference gives it"):
        reference_cache.save(tmp_path, "k", lp, ids=["a", "b", "c"])
    assert not list(tmp_path.iterdir())
    np.save(reference_cache.place(tmp_path, "k"), lp)
    with pytest.raises(UserError, match=r"example number 1 .*delete it"):
        reference_cache.load(tmp_path, "k", (3, 2))
