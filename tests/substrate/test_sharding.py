"""The mesh, the rules, and that no mesh changes a number."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrepro import sharding
from jaxrepro.config import UserError

sys.path.insert(0, str(Path(__file__).parents[1]))
import meshes

AXES = {
    "embed": ("vocab", "embed"),
    "wq": ("embed", "heads", "head_dim"),
    "wk": ("embed", "kv_heads", "head_dim"),
    "wo": ("heads", "head_dim", "embed"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "norm": ("norm",),
}
SIZES = {"vocab": 32, "embed": 16, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 24, "norm": 16}


def toy(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {k: tuple(SIZES[a] for a in axes) for k, axes in AXES.items()}
    params = {k: jnp.asarray(rng.normal(size=s, scale=0.2), jnp.float32) for k, s in shapes.items()}
    batch = {
        "tokens": jnp.asarray(rng.integers(0, 32, (8, 12)), jnp.int32),
        "mask": jnp.asarray(rng.random((8, 12)) < 0.7),
    }
    return params, batch


def toy_loss(params, batch):
    """One attention layer with grouped heads and a feed-forward layer; next-token cross entropy."""
    x = sharding.constrain(params["embed"][batch["tokens"]], "batch", "seq", "act_embed")
    b, t, _ = x.shape
    q = jnp.einsum("btd,dhi->bthi", x, params["wq"]).reshape(b, t, 2, 2, 8)
    k = jnp.einsum("btd,dki->btki", x, params["wk"])
    scores = jnp.einsum("btkgi,bski->bkgts", q, k)
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
    out = jnp.einsum("bkgts,bski->btkgi", jax.nn.softmax(scores), k).reshape(b, t, 4, 8)
    x = (x + jnp.einsum("bthi,hid->btd", out, params["wo"])) * params["norm"]
    x = x + jax.nn.gelu(x @ params["up"]) @ params["down"]
    lp = jax.nn.log_softmax(x @ params["embed"].T)[:, :-1]
    picked = jnp.take_along_axis(lp, batch["tokens"][:, 1:, None], -1)[..., 0]
    mask = batch["mask"][:, 1:]
    return -(picked * mask).sum(), mask.sum(), {}


def test_a_mesh_of_every_axis_gives_the_single_device_loss_and_gradients():
    params, batch = toy()  # the decoder itself: test_decoder_meshes.py
    meshes.check(toy_loss, params, AXES, batch, ((2, 2, 1, 2), (1, 2, 2, 2)))


def test_mesh_takes_the_rest_and_refuses_what_does_not_fit():
    assert dict(sharding.make_mesh({"data": -1, "tensor": 2}).shape) == {
        "data": 4,
        "fsdp": 1,
        "sequence": 1,
        "tensor": 2,
    }
    assert sharding.make_mesh((1, 1, 1, 1)).size == 1
    for shape, said in [
        ((3, 1, 1, 1), "3 devices, there are 8"),
        ((-1, 3, 1, 1), "multiple of 3 devices"),
        ((-1, -1, 1, 1), "at most once"),
        ((0, 1, 1, 1), "at least 1"),
        ((8, 1), "2 axes"),
        ({"dat": 8}, "'dat' is unknown"),
    ]:
        with pytest.raises(UserError, match=said):
            sharding.make_mesh(shape)


def test_a_trained_run_is_placed_on_the_devices_that_are_here():
    assert sharding.mesh_here((2, 2, 1, 2), 8) == (2, 2, 1, 2)
    assert sharding.mesh_here((2, 2, 1, 2), 1) == (1, 1, 1, 1)
    assert sharding.mesh_here((1, 4, 1, 2), 2) == (1, 2, 1, 1)
    assert sharding.mesh_here((1, -1, 1, 1), 3) == (1, -1, 1, 1)
    assert sharding.mesh_here((1, 1, 1, 1), 8) == (1, 1, 1, 1)


def test_abstract_mesh_shards_shapes_without_devices():
    mesh = sharding.abstract_mesh((1, 64, 1, 4))
    at = sharding.shard_tree({"w": ("embed", "mlp")}, {"w": np.zeros((128, 8))}, mesh)
    assert at["w"].shard_shape((128, 8)) == (2, 2)
    assert sharding.abstract_mesh((-1, 2, 1, 1), devices=8).shape["data"] == 4


def test_rules_place_each_logical_axis():
    mesh = sharding.make_mesh((1, 2, 1, 4))
    spec = lambda axes, shape, mode="train": sharding.spec_for(axes, shape, mesh, mode)
    assert spec(("layers", "embed", "mlp"), (3, 8, 8)) == P(None, "fsdp", "tensor")
    assert spec(("layers", "embed", "mlp"), (3, 8, 8), "decode") == P(None, None, "tensor")
    assert spec(("embed", "kv_heads", "head_dim"), (8, 2, 4)) == P("fsdp")  # 2 on 4: replicated
    assert spec(("batch", "seq"), (8, 6)) == P("fsdp")
    assert spec(("vocab", None), (30, 2)) == P()  # does not divide: replicated
    with pytest.raises(UserError, match=r"tensor=4 does not divide the attention heads \(6\)"):
        spec(("embed", "heads"), (8, 6))
    with pytest.raises(ValueError, match="clashes"):
        spec(("heads", "mlp"), (4, 4))
    with pytest.raises(ValueError, match=r"'wings' of .* has no rule"):
        spec(("wings",), (4,))
    with pytest.raises(ValueError, match="name 1 dimensions"):
        spec(("embed",), (4, 4))


def test_replication_for_want_of_a_divisor_is_logged_once(caplog):
    mesh = sharding.make_mesh((1, 1, 1, 8))
    sharding._logged.clear()
    with caplog.at_level("INFO", logger="jaxrepro.sharding"):
        for _ in range(2):
            sharding.spec_for(("vocab",), (33,), mesh)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "vocab of size 33 does not divide by ('tensor',)=8"
    ]


def test_override_by_path_wins_and_a_wrong_one_is_refused():
    mesh = sharding.make_mesh((1, 4, 1, 2))
    params, _ = toy()
    at = sharding.shard_tree(AXES, params, mesh, overrides={"w[qk]": (None, None, "tensor")})
    assert at["wq"].spec == P(None, None, "tensor")
    assert at["wo"].spec == P("tensor", None, "fsdp")
    for pattern, spec, said in [
        ("nothing", ("fsdp",), "matches no parameter"),
        ("norm", ("fsdp", "tensor"), "longer than shape"),
        ("norm", ("wings",), "no mesh axis 'wings'"),
        ("wk", (None, "fsdp"), "fsdp=4 does not divide 2"),
    ]:
        with pytest.raises(UserError, match=said):
            sharding.shard_tree(AXES, params, mesh, overrides=((pattern, spec),))


def test_batches_lie_on_data_and_fsdp_and_tokens_on_sequence():
    mesh = sharding.make_mesh((2, 2, 2, 1))
    batch = {
        "x": np.zeros((8, 3, 6)),
        "odd": np.zeros((4, 3)),
        "n": np.zeros(8),
        "one": np.ones(()),
    }
    spec = jax.tree.map(lambda s: s.spec, sharding.batch_sharding(mesh, batch))
    rows = ("data", "fsdp")
    assert spec == {
        "x": P(rows, None, "sequence"),
        "odd": P(rows, None),
        "n": P(rows),
        "one": P(),
    }
    with pytest.raises(UserError, match=r"6 rows \(x\) does not divide over data \* fsdp = 4"):
        sharding.batch_sharding(mesh, {"x": np.zeros((6, 2))})


def test_constrain_without_a_mesh_returns_its_argument():
    x = jnp.ones((4, 2))
    assert sharding.constrain(x, "batch", "act_embed") is x
