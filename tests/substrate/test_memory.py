"""The memory estimate is the bytes of the shapes that it is given."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrepro import sharding
from jaxrepro.models import transformer
from jaxrepro.models.vision_tower import VisionConfig
from jaxrepro.train import memory
from jaxrepro.train.state import init_state, state_shardings


@dataclass
class Config:
    layers, d, heads, kv, head_dim, ffn, dtype = 2, 8, 4, 2, 4, 16, "bfloat16"
    remat: str = "full"


AXES = {"w": ("embed", "mlp"), "norm": ("norm",)}


def init():
    params = {"w": jnp.zeros((16, 32)), "norm": jnp.zeros(16)}
    return init_state(params, optax.adam(1e-3))


def test_estimate_equals_the_bytes_of_the_real_shards():
    mesh = sharding.make_mesh((1, 4, 1, 2))
    shapes = jax.eval_shape(init)
    at = state_shardings(shapes, sharding.shard_tree(AXES, shapes.params, mesh), mesh)
    real = jax.jit(init, out_shardings=at)()
    held = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    plan = memory.Plan(
        params=memory.sharded(shapes.params, at.params), opt=memory.sharded(shapes.opt, at.opt)
    )
    table = memory.estimate(plan)
    assert table["parameters"] == held(real.params) == table["gradients"]
    assert table["optimiser moments"] == held(real.opt)
    assert table["total"] == held(real.params) * 2 + held(real.opt)


def test_frozen_parameters_have_no_gradients_and_256_devices_need_no_hardware():
    mesh = sharding.abstract_mesh((1, 64, 1, 4))
    shapes = {"w": jax.ShapeDtypeStruct((1024, 4096), jnp.float32), "norm": np.zeros(64)}
    at = sharding.shard_tree(AXES, shapes, mesh)
    params = memory.sharded(shapes, at)
    cache = memory.kv_cache(Config(), rows=3, length=5)
    plan = memory.Plan(
        params=params, opt={}, trainable="norm", cache=cache, mesh=mesh,
        logits=memory.logits_chunk(1 << 20, parts=4), reference=params,
        batch={"tokens": memory.sharded(np.zeros((64, 7), np.int32), sharding.batch_sharding(mesh))},
    )  # fmt: skip
    table = memory.estimate(plan)
    assert table["parameters"] == 1024 * 4096 * 4 // 256 + 64 * 8 == table["reference copy"]
    assert table["gradients"] == 64 * 4
    assert table["KV cache"] == 2 * 2 * 3 * 5 * 2 * 4 * 2
    assert table["logits chunk"] == 2 * 64 * (1 << 18) * 4
    assert table["batch"] == 7 * 4
    text = memory.render(plan)
    assert "(estimate)" in text and "parameters: 4,194,368" in text and "fsdp=64" in text
    assert "batch tokens: int32[64, 7]" in text


# numbers that a layer keeps for a token; q, k, v have 16 + 8 + 8, what attention makes of them 16
KEPT = {"none": 160, "dots": 96, "names": 56, "full": 0}


@pytest.mark.parametrize("remat", transformer.REMAT)
def test_every_remat_policy_has_an_estimate(remat):
    found = memory.decoder_activations(Config(remat=remat), 4, 32)
    assert found["kept"].shape == (2, 4 * 32, KEPT[remat])
    tower = VisionConfig(depth=2, embed=16, heads=2, mlp=32, remat=remat)
    least, most = (
        memory.bytes_per_device(memory.vision_activations(replace(tower, remat=r), 4, 16))
        for r in ("full", "none")
    )
    assert least <= memory.bytes_per_device(memory.vision_activations(tower, 4, 16)) <= most
