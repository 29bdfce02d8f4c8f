"""The router: sizes, gates by hand, what may be left out, agreement with files and with torch's layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.methods.vorta import router, router_files
from jaxrepro.models import video_dit
from jaxrepro.ops.sliding import sliding_groups, sliding_reference

WAN = video_dit.PRESETS["wan_tiny"]


# blocks (d 3 heads + 3 heads) of the released models' configs: 60 (3072 72 + 72), 40 (5120 120 + 120), 30 (1536 36 + 36).
@pytest.mark.parametrize(
    "name, n", [("hunyuan", 13_275_360), ("wan_14b", 24_580_800), ("wan_1_3b", 1_659_960)]
)
def test_routers_of_the_released_models_have_the_published_size(name, n):
    cfg = video_dit.PRESETS[name]
    shapes = jax.eval_shape(lambda key: router.init(key, cfg), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == n == router.count(cfg)
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(
        lambda x: x.shape, router.abstract(cfg)
    )


def test_gates_are_the_softmax_of_a_linear_layer_on_silu():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(2, 5, 4, 3)), rng.normal(size=(2, 4, 3))
    e = rng.normal(size=(6, 5))
    hidden = e / (1 + np.exp(-e))
    logits = np.array([[[hidden[i] @ kernel[l, :, h] + bias[l, h] for h in range(4)] for l in range(2)] for i in range(6)])  # fmt: skip
    right = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    given = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    found = router.gates(given, jnp.asarray(e, jnp.float32))
    np.testing.assert_allclose(found, right, atol=1e-6)
    still = np.exp(bias) / np.exp(bias).sum(-1, keepdims=True)
    found = router.gates(given, jnp.asarray(e, jnp.float32), timeless=True)
    np.testing.assert_allclose(found, np.broadcast_to(still, found.shape), atol=1e-6)


def test_zero_weights_give_a_third_each_also_in_bfloat16():
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.bfloat16), router.abstract(WAN))
    found = router.gates(zero, jnp.ones((2, WAN.d), jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1 / 3, rtol=1e-6)


def test_a_branch_that_is_left_out_has_no_gate_and_no_gradient():
    given = router.init(jax.random.key(0), WAN)
    e = jax.random.normal(jax.random.key(1), (2, WAN.d))
    g = router.gates(given, e)
    less = router.gates(given, e, without=("full",))
    np.testing.assert_allclose(less[..., 1:], g[..., 1:] / (1 - g[..., :1]), rtol=1e-5)
    assert (less[..., 0] == 0).all()
    slope = jax.jit(jax.grad(lambda r: router.gates(r, e, without=("full",))[..., 1].sum()))(given)
    assert not np.any(slope["bias"][..., 0])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))


@pytest.mark.parametrize(
    "without, text", [(("dense",), "branches are full, coreset, sliding"), (router.BRANCHES, "leaves no branch")]
)  # fmt: skip
def test_what_cannot_be_left_out_is_refused(without, text):
    with pytest.raises(UserError, match=text):
        router.gates(router.init(jax.random.key(0), WAN), jnp.ones((1, WAN.d)), without=without)


def test_routers_that_are_saved_give_the_same_gates(tmp_path):
    given = router.init(jax.random.key(0), WAN)
    router_files.save(tmp_path / "router.safetensors", given, WAN)
    again = router_files.load(tmp_path / "router.safetensors", WAN)
    e = jax.random.normal(jax.random.key(1), (2, WAN.d))
    np.testing.assert_array_equal(router.gates(again, e), router.gates(given, e))


def test_wan_matches_queries_for_keys_and_hunyuan_does_not():
    hunyuan = video_dit.PRESETS["hunyuan_tiny"]
    assert router.branches(WAN)[1].keywords == {"shared": True}
    assert router.branches(hunyuan)[1].keywords == {"shared": False}
    # the same objects every time: a new partial would be a new program
    assert router.branches(WAN) is router.branches(dataclasses.replace(WAN))
    assert router.branches(hunyuan, shared=True)[1].keywords == {"shared": True}
    assert router.branches(WAN, coarse="average_height")[1].keywords == {"cell": (1, 2, 1)}
    assert router.branches(WAN)[2] is router.branches(WAN, kernel="groups")[2] is sliding_groups
    assert router.branches(WAN, kernel="reference")[2] is sliding_reference
    with pytest.raises(
        UserError, match=r"kernel='mosaic' needs a GPU of compute capability 9\.x, not cpu"
    ):
        router.branches(WAN, kernel="mosaic")
    with pytest.raises(UserError, match="kernel='fast' must be one of"):
        router.branches(WAN, kernel="fast")
    with pytest.raises(UserError, match="coarse='mean' is not one of"):
        router.branches(WAN, coarse="mean")
