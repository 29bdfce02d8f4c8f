"""One step: exact sums, clipping, freezing, and what a non-finite number does."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.train import optim
from jaxrepro.train.state import init_state, state_shardings, step_key, trainable_mask
from jaxrepro.train.step import NONFINITE, accumulate, compile_step, in_parts, make_step, split

sys.path.insert(0, str(Path(__file__).parents[1]))
import meshes


def problem(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "first": {"kernel": rng.normal(size=(4, 6)), "bias": rng.normal(size=6)},
        "second": {"kernel": rng.normal(size=(6, 1)), "norm": np.ones((2, 6))},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    batch = {
        "x": rng.normal(size=(8, 4)).astype(np.float32),
        "y": rng.normal(size=(8,)).astype(np.float32),
        "weight": rng.integers(0, 5, 8).astype(np.float32),
        "scale": np.float32(1.5),
    }
    return params, batch


def loss(params, batch):
    h = jnp.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"])
    h = h * params["second"]["norm"].sum(0)
    error = batch["scale"] * (h @ params["second"]["kernel"])[:, 0] - batch["y"]
    weight = batch["weight"]
    hit = (jnp.abs(error) < 1) & (weight > 0)
    aux = {"error": (error * weight).sum(), "hits": (hit.sum(), (weight > 0).sum())}
    return (weight * error**2).sum(), weight.sum(), aux


def jitted(*args, **kwargs):
    return jax.jit(make_step(*args, **kwargs), compiler_options=meshes.QUICK)


def test_every_split_gives_the_gradient_of_the_whole_batch():
    params, batch = problem()
    run = jax.jit(accumulate, static_argnums=(0, 3), compiler_options=meshes.QUICK)
    whole = run(loss, params, batch, 1)
    for m in (2, 4, 8):
        meshes.assert_same(run(loss, params, batch, m), whole, tolerance=1e-6, name=f"split {m}")


def test_division_is_by_the_global_weight_once_and_not_a_mean_of_means():
    params = {"w": jnp.float32(3.0)}
    batch = {"x": np.float32([1, 10, 100, 1000]), "weight": np.float32([1, 2, 0, 5])}
    f = lambda p, b: ((p["w"] * b["x"] * b["weight"]).sum(), b["weight"].sum(), {})
    for m in (1, 2, 4):
        step = jitted(f, optax.sgd(1.0), micro_batches=m)
        state, metrics = step(init_state(params, optax.sgd(1.0)), batch)
        assert float(metrics["loss"]) == 3 * (1 + 20 + 5000) / 8
        assert float(state.params["w"]) == 3 - (1 + 20 + 5000) / 8


def test_samples_stay_with_their_question_when_leading_axes_differ():
    batch = {"question": np.arange(4.0), "sample": np.arange(12.0)}  # 3 samples a question

    def f(params, rows):
        apart = jnp.repeat(rows["question"], 3) - rows["sample"] // 3
        return params["w"] * jnp.abs(apart).sum(), 4.0, {}

    total = accumulate(f, {"w": jnp.float32(1)}, batch, 2)[0]
    assert float(total) == 0


def test_a_split_that_does_not_divide_is_refused():
    _, batch = problem()
    for m in (3, 16, 0):
        with pytest.raises(UserError, match=f"micro_batches={m} does not divide a batch of 8"):
            split(batch, m)


def test_step_on_a_mesh_equals_step_on_one_device():
    params, batch = problem()
    config = ConfigDict({"lr": 0.01, "steps": 4, "schedule": "cosine", "weight_decay": 0.1})
    adam = optim.optimizer(config)
    step = make_step(loss, adam, micro_batches=2, max_grad_norm=1.0)
    init = lambda: init_state(params, adam)
    expected, expected_metrics = jax.jit(step, compiler_options=meshes.QUICK)(init(), batch)
    mesh = sharding.make_mesh((2, 2, 1, 2))
    axes = {
        "first": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
        "second": {"kernel": ("vocab", None), "norm": ("layers", "norm")},
    }
    at = state_shardings(jax.eval_shape(init), sharding.shard_tree(axes, params, mesh), mesh)
    step = make_step(loss, adam, micro_batches=2, max_grad_norm=1.0, shardings=at.params)
    run = compile_step(step, at, sharding.batch_sharding(mesh, batch))
    state, metrics = run(jax.jit(init, out_shardings=at)(), batch)
    meshes.assert_same(state.params, expected.params)
    meshes.assert_same(metrics, expected_metrics)
    moment = state.opt[0].mu["first"]["kernel"]
    assert moment.sharding.spec == at.params["first"]["kernel"].spec == P("fsdp", "tensor")


def test_clipping_scales_the_gradient_to_the_bound():
    params, batch = problem()
    plain, m = jitted(loss, optax.sgd(1.0))(init_state(params, optax.sgd(1.0)), batch)
    clipped, _ = jitted(loss, optax.sgd(1.0), max_grad_norm=0.5)(
        init_state(params, optax.sgd(1.0)), batch
    )
    delta = lambda s: jax.tree.map(lambda a, b: b - a, s.params, params)
    assert float(m["grad_norm"]) > 0.5
    assert float(optax.tree.norm(delta(clipped))) == pytest.approx(0.5, rel=1e-5)
    meshes.assert_same(
        jax.tree.map(lambda x: x * (0.5 / m["grad_norm"]), delta(plain)), delta(clipped)
    )


def test_frozen_leaves_stay_bit_equal_and_have_no_moments():
    params, batch = problem()
    adam = optax.adamw(0.1, weight_decay=0.1)
    state = init_state(params, adam, trainable="second/.*")
    assert len(jax.tree.leaves(state.opt)) == 2 * 2 + 1  # two moments of two leaves, one count
    new, metrics = jitted(loss, adam, trainable="second/.*")(state, batch)
    jax.tree.map(np.testing.assert_array_equal, new.params["first"], params["first"])
    assert not np.array_equal(new.params["second"]["kernel"], params["second"]["kernel"])
    total = lambda p: loss(p, batch)[0] / loss(p, batch)[1]
    grads = jax.jit(jax.grad(total), compiler_options=meshes.QUICK)(params)["second"]
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)


def test_an_expression_a_predicate_and_a_tree_say_what_is_trained():
    params, _ = problem()
    mask = {"first": {"kernel": False, "bias": 0}, "second": {"kernel": 1, "norm": True}}
    expected = jax.tree.map(bool, mask)
    for trainable in ("second/.*", lambda path, leaf: path.startswith("second"), mask):
        assert trainable_mask(trainable, params) == expected


def test_what_prepare_adds_reaches_every_micro_batch_without_gradient():
    params, batch = problem()

    def prepare(state, batch):
        total, weight, _ = loss(state.params, batch)
        rows = jnp.arange(len(batch["x"]), dtype=jnp.float32)
        return batch | {"mean": total / weight, "row": rows}, {"seen": state.extra["seen"] + 1}

    def centred(p, rows, extra):
        total, weight, aux = loss(p, rows)
        total = jnp.where(extra["seen"] == 1, total, jnp.nan)  # the state's next one
        return (
            total - rows["mean"] * weight,
            weight,
            aux | {"row": (rows["row"].sum(), len(rows["row"]))},
        )

    results = []
    for m in (1, 4):
        step = jitted(centred, optax.sgd(0.1), micro_batches=m, prepare=prepare)
        state = init_state(params, optax.sgd(0.1), extra={"seen": jnp.zeros((), jnp.int32)})
        state, metrics = step(state, batch)
        assert abs(float(metrics["loss"])) < 1e-4 and int(state.extra["seen"]) == 1
        assert float(metrics["row"]) == (len(batch["x"]) - 1) / 2
        results.append(state.params)
    plain, _ = jitted(loss, optax.sgd(0.1))(init_state(params, optax.sgd(0.1)), batch)
    meshes.assert_same(results[0], plain.params)  # what was prepared is a constant to the gradient
    meshes.assert_same(results[1], plain.params)


def test_a_non_finite_step_takes_back_the_extra_state_too():
    params, batch = problem()
    batch["y"][3], batch["weight"][3] = np.nan, 1
    fn = lambda p, rows, extra: loss(p, rows)
    step = jitted(fn, optax.sgd(0.1), prepare=lambda s, b: (b, s.extra + 1))
    state, _ = step(init_state(params, optax.sgd(0.1), extra=jnp.zeros(())), batch)
    assert float(state.extra) == 0


def test_a_non_finite_step_leaves_the_state_alone_and_says_so():
    params, batch = problem()
    adam = optax.adam(0.1)
    step = jitted(loss, adam, micro_batches=2)
    state, metrics = step(init_state(params, adam), batch)
    assert float(metrics[NONFINITE]) == 0
    batch["x"][3, 0] = np.inf
    batch["weight"][3] = 1
    batch["y"][3] = np.nan
    same, metrics = step(state, batch)
    assert float(metrics[NONFINITE]) == 1
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_metrics_are_weighted_means_and_zero_weight_gives_zero():
    params, batch = problem()
    _, metrics = jitted(loss, optax.sgd(0.0), micro_batches=4)(
        init_state(params, optax.sgd(0.0)), batch
    )
    _, weight, aux = loss(params, batch)
    assert float(metrics["error"]) == pytest.approx(float(aux["error"] / weight), rel=1e-5)
    assert float(metrics["hits"]) == pytest.approx(float(aux["hits"][0] / aux["hits"][1]))
    batch["weight"] = np.zeros_like(batch["weight"])
    _, metrics = jitted(loss, optax.sgd(1.0))(init_state(params, optax.sgd(1.0)), batch)
    assert float(metrics["loss"]) == float(metrics["hits"]) == float(metrics["grad_norm"]) == 0


def test_decay_spares_norms_and_biases_also_when_layers_are_stacked():
    names = ["embed", "wq", "bq", "attn_norm", "norm", "kernel", "bias", "scale", "ln_1", "blocks"]
    params = {name: jnp.ones((2, 3)) for name in names} | {"vector": jnp.ones(3)}
    decayed = {k for k, v in optim.decays(params).items() if v}
    assert decayed == {"embed", "wq", "kernel", "blocks"}


def test_both_matrices_of_an_adapter_decay():
    adapter = {"a": jnp.ones((2, 8, 4)), "b": jnp.ones((2, 4, 8))}
    params = {"layers": {"bq": jnp.ones((2, 8)), "lora": {"wq": adapter}}}
    found = optim.decays(params)["layers"]
    assert found == {"bq": False, "lora": {"wq": {"a": True, "b": True}}}


def test_schedules_warm_up_and_end_where_they_say():
    for name, middle in [("constant", 1.0), ("linear", 0.55), ("cosine", 0.55)]:
        f = optim.schedule(name, 1.0, 10, warmup=2, end=0.1)
        assert float(f(0)) == 0.5
        assert float(f(1)) == float(f(2)) == 1.0
        assert float(f(6)) == pytest.approx(middle)
        assert float(f(10)) == pytest.approx(1.0 if name == "constant" else 0.1)
    adam = optim.optimizer(ConfigDict({"lr": 1.0, "steps": 10, "schedule": "linear"}))
    params, batch = problem()
    _, metrics = jitted(loss, adam)(init_state(params, adam), batch)
    assert float(metrics["lr"]) == 1.0
    for bad, said in [
        ({"schedule": "cubic"}, "'cubic' is unknown"),
        ({"warmup": 10, "schedule": "linear"}, "warmup=10"),
    ]:
        with pytest.raises(UserError, match=said):
            optim.optimizer({"lr": 1.0, "steps": 10} | bad)


def test_key_of_a_step_depends_on_seed_stage_and_step_only():
    bits = lambda *a: jax.random.key_data(step_key(*a)).tolist()
    assert bits(0, "rl", 3) == bits(0, "rl", 3)
    assert (
        len({str(bits(*a)) for a in [(0, "rl", 3), (1, "rl", 3), (0, "sft", 3), (0, "rl", 4)]}) == 4
    )


@pytest.mark.parametrize("m", [1, 3])
def test_in_parts_gives_rows_in_their_order(m):
    rows = {"x": jnp.arange(6.0), "y": jnp.arange(24.0).reshape(12, 2), "z": jnp.asarray(2.0)}
    fn = lambda r: {"x": r["x"] * r["z"], "y": r["y"][::2] - r["x"][:, None]}
    found = jax.jit(lambda r: in_parts(fn, r, m))(rows)
    jax.tree.map(np.testing.assert_array_equal, found, fn(rows))
