"""What a run starts from where another one trained adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxrepro import config, sharding
from jaxrepro.files import write_json
from jaxrepro.models import lora, transformer
from jaxrepro.train import policy
from jaxrepro.train.checkpoint import Checkpoints
from jaxrepro.train.state import State

CFG = "configs/dpo.py"
SMALL = dict(d=8, layers=2, heads=2, kv=1, head_dim=4, ffn=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir whose run trained adapters, their parameters and config."""
    folder = tmp_path_factory.mktemp("earlier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policy.SHAPES, "letters", policy.SHAPES["letters"] | SMALL)
        c = config.load(CFG, {"lora.rank": 3, "lora.alpha": 6.0, "sft.steps": 0})
        p = policy.open_policy(c, pieces=["a", "b"])
    rng = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype)
    params = jax.tree.map(draw, transformer.abstract(p.cfg))
    with Checkpoints(folder, "dpo") as checkpoints:
        checkpoints.save(4, State(jnp.asarray(4), params, {"m": jnp.ones(1)}, None))
    write_json(folder / "config.json", {"config": c.to_dict()})
    return folder, p, params


@pytest.mark.parametrize("rank", [0, 2])
def test_adapters_of_the_earlier_run_are_merged_into_the_weights(trained, rank):
    folder, p, params = trained
    now = lora.Lora(rank=rank) if rank else None
    cfg = dataclasses.replace(p.cfg, lora=now)
    places = sharding.shard_tree(transformer.axes(cfg), transformer.abstract(cfg), p.mesh)
    here = p._replace(cfg=cfg, shardings=places)
    found = policy.initial(here, ConfigDict({"seed": 0, "init_from": str(folder)}))
    want, _ = lora.merge(params, p.cfg)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), lora.off(found), want)
    assert lora.has(found) == bool(rank)
    if rank:  # fresh ones, which change nothing yet
        assert not any(np.asarray(a["b"]).any() for a in found["layers"]["lora"].values())
