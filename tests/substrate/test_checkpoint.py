"""Checkpoints: what comes back, and what is refused in one line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.train.checkpoint import Checkpoints, find, load, on_device, stages_in
from jaxrepro.train.state import init_state, state_shardings


def make(width=4, value=1.0):
    params = {"a": {"w": jnp.full((8, width), value)}, "b": jnp.arange(3, dtype=jnp.bfloat16)}
    extra = {"key": jax.random.key(3), "ema": jax.tree.map(jnp.copy, params), "none": None}
    return init_state(params, optax.adamw(1e-3), extra=extra)


def target(state, shardings=None):
    return on_device(jax.eval_shape(lambda: state), shardings)


def same(a, b):
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with stage sft at steps 2 and 4, stage rl at 1."""
    workdir = tmp_path_factory.mktemp("saved")
    for stage, steps in [("sft", (1, 2, 4)), ("rl", (1,))]:
        with Checkpoints(workdir, stage, keep=2) as checkpoints:
            for step in steps:
                state = make(value=float(step)).replace(step=jnp.int32(step))
                checkpoints.save(step, state, n=4)
    return workdir


def test_a_state_comes_back_bit_for_bit_and_only_the_latest_stay(saved):
    with Checkpoints(saved, "sft", read_only=True) as checkpoints:
        assert checkpoints.latest() == 4
        state = checkpoints.restore(target(make()))
        same(state, make(value=4.0).replace(step=jnp.int32(4)))
        meta = checkpoints.meta(4)
        assert (meta["stage"], meta["step"], meta["n"], meta["done"]) == ("sft", 4, 4, False)
    assert sorted(p.name for p in (saved / "checkpoints" / "sft").iterdir()) == ["2", "4"]


def test_a_checkpoint_restores_onto_another_mesh(saved):
    mesh = sharding.make_mesh((2, 2, 1, 2))
    axes = {"a": {"w": ("embed", "mlp")}, "b": ("norm",)}
    shapes = jax.eval_shape(make)
    at = state_shardings(shapes, sharding.shard_tree(axes, shapes.params, mesh), mesh)
    with Checkpoints(saved, "sft", read_only=True) as checkpoints:
        state = checkpoints.restore(on_device(shapes, at))
    assert state.params["a"]["w"].sharding == at.params["a"]["w"]
    same(state.params, make(value=4.0).params)


def test_load_takes_a_workdir_a_stage_or_a_checkpoint(saved):
    params = jax.eval_shape(lambda: make().params)
    for path, stage, value in [
        (saved, None, 1.0),  # the stage saved last is rl
        (saved, "sft", 4.0),
        (saved / "checkpoints" / "sft", None, 4.0),
        (saved / "checkpoints" / "sft" / "2", None, 2.0),
    ]:
        assert float(load(path, params, stage=stage)["a"]["w"][0, 0]) == value
    assert stages_in(saved) == ["sft", "rl"]
    with pytest.raises(UserError, match=r"no checkpoint of stage 'dpo' \(stages there: sft, rl\)"):
        find(saved, "dpo")
    with pytest.raises(UserError, match="no checkpoint"):
        find(saved / "nowhere")


def test_a_checkpoint_of_another_model_names_the_leaf(saved):
    with Checkpoints(saved, "rl", read_only=True) as checkpoints:
        with pytest.raises(UserError, match=r"a/w is float32\[8,4\] there and float32\[8,5\] here"):
            checkpoints.restore(target(make(width=5)))
        other = make().replace(params=make().params | {"c": jnp.ones(2)})
        with pytest.raises(UserError, match="params/c is nothing there"):
            checkpoints.restore(target(other))


def test_damage_and_another_format_are_one_line(tmp_path):
    with Checkpoints(tmp_path, "rl") as checkpoints:
        checkpoints.save(1, make())
    folder = tmp_path / "checkpoints" / "rl" / "1"
    meta_file = folder / "meta" / "metadata"
    meta = meta_file.read_text()
    meta_file.write_text(json.dumps(json.loads(meta) | {"format": 99}))
    with (
        Checkpoints(tmp_path, "rl") as checkpoints,
        pytest.raises(UserError, match="format 99, this version reads 1"),
    ):
        checkpoints.restore(target(make()))
    meta_file.write_text(meta)
    for path in (folder / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Checkpoints(tmp_path, "rl") as checkpoints:
        with pytest.raises(UserError, match="is damaged") as error:
            checkpoints.restore(target(make()))
        assert "\n" not in str(error.value)
    meta_file.write_text("{")
    with (
        Checkpoints(tmp_path, "rl") as checkpoints,
        pytest.raises(UserError, match="is damaged"),
    ):
        checkpoints.restore(target(make()))


def test_done_marks_a_step_that_is_saved_already(tmp_path):
    with Checkpoints(tmp_path, "sft") as checkpoints:
        assert not checkpoints.done()
        checkpoints.save(3, make())
        assert not checkpoints.done()
        checkpoints.save(3, make(), done=True)
    with Checkpoints(tmp_path, "sft") as checkpoints:
        assert checkpoints.done()
        checkpoints.save(5, make())
        assert not checkpoints.done()  # the mark was for step 3


def test_what_orbax_cannot_hold_is_refused_before_saving(tmp_path):
    with Checkpoints(tmp_path, "rl") as checkpoints:
        checkpoints.save(1, make().replace(extra={"n": np.float32(2)}))
        state = checkpoints.restore(target(make().replace(extra={"n": np.zeros((), np.float32)})))
        assert float(state.extra["n"]) == 2
        for extra in ({"n": np.zeros((0, 2))}, {"n": "text"}):
            with pytest.raises(ValueError, match="rest/extra/n: checkpoints hold arrays"):
                checkpoints.save(2, make().replace(extra=extra))


def test_a_workdir_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Checkpoints(tmp_path / "file", "rl")
