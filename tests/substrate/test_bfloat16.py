"""A model in bfloat16 runs on the CPU too, near the numbers of float32."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.models import qwen2_vl
from jaxrepro.models.qwen2_vl import Qwen2VLConfig
from jaxrepro.models.scoring import completion_log_probs
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.models.vision_tower import Vision, VisionConfig, grid_positions
from jaxrepro.ops.dense import einsum32
from jaxrepro.rollout.generate import Prompts, Sampling, generate

TEXT = TransformerConfig(
    vocab=23, d=16, layers=1, heads=2, kv=1, head_dim=8, ffn=24, mrope_sections=(2, 1, 1)
)
TOWER = VisionConfig(depth=1, embed=16, heads=2, mlp=24, out=16, patch=2, temporal=1, channels=1)
IDS = dict(image_pad=17, video_pad=18, vision_start=19, vision_end=20, eos=21, pad=22)
GRID, NEW = (1, 4, 4), 3


def model(dtype):
    return Qwen2VLConfig(replace(TEXT, dtype=dtype), replace(TOWER, dtype=dtype), **IDS)


def rows(cfg):
    row = np.array([[19, 17, 17, 17, 17, 20, 3, 5]], np.int32)
    position, following = qwen2_vl.positions(row[0], [GRID], cfg)
    at = jnp.asarray(grid_positions(GRID, TOWER.merge))[None]
    patches = jax.random.normal(jax.random.key(1), (1, 16, TOWER.columns))
    vision = Vision(patches, at, jnp.ones((1, 16), jnp.int32))
    where = jnp.asarray(position)[None], jnp.ones(row.shape, jnp.int32), jnp.array([following])
    return jnp.asarray(row), vision, where


@pytest.fixture(scope="module")
def params():
    return jax.jit(partial(qwen2_vl.init, cfg=model("float32")))(jax.random.key(0))


def log_probs(params, cfg):
    tokens, vision, (position, segment, following) = rows(cfg)
    x = qwen2_vl.embed(params, cfg, tokens, vision)
    completion, length = (
        jnp.arange(2 * NEW, dtype=jnp.int32).reshape(1, 2, NEW),
        jnp.array([[3, 2]]),
    )
    lp = completion_log_probs(
        params["text"], cfg.text, x, position, segment, following, completion, length
    )
    return lp.sum(), lp


@pytest.mark.slow
def test_log_probs_and_their_gradient_are_near_those_of_float32(params):
    both = {}
    for dtype in ("float32", "bfloat16"):
        value = jax.jit(jax.grad(partial(log_probs, cfg=model(dtype)), has_aux=True))
        both[dtype] = value(params)
    (g, lp), (g_low, lp_low) = both["float32"], both["bfloat16"]
    assert lp_low.dtype == jnp.float32
    np.testing.assert_allclose(lp_low, lp, atol=0.1)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    g, g_low = flat(g), flat(g_low)
    assert np.isfinite(g_low).all()
    assert g @ g_low / np.linalg.norm(g) / np.linalg.norm(g_low) > 0.99


def test_sampling_runs(params):
    cfg = model("bfloat16")

    @jax.jit
    def draw(params):
        tokens, vision, where = rows(cfg)
        prompts = Prompts(qwen2_vl.embed(params, cfg, tokens, vision), *where)
        settings = Sampling(max_new=NEW, eos=(cfg.eos,), pad=cfg.pad)
        ids = jnp.zeros(1, jnp.int32)
        return generate(
            params["text"],
            cfg.text,
            prompts,
            request_ids=ids,
            key=jax.random.key(2),
            sampling=settings,
            n=2,
        )

    samples = draw(params)
    assert samples.tokens.shape == (1, 2, NEW) and np.isfinite(samples.lp_raw).all()


def test_products_of_bfloat16_are_exact_in_float32():
    x, y = (jax.random.normal(jax.random.key(i), (5, 7), jnp.bfloat16) for i in range(2))
    got = jax.jit(partial(einsum32, "ti,si->ts"))(x, y)
    wanted = np.asarray(x, np.float64) @ np.asarray(y, np.float64).T
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
