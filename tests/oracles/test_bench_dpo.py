"""The two sides of the DPO benchmark do the same work."""

from functools import partial

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")

import jax

from jaxrepro.bench import dpo, lm
from jaxrepro.models import transformer

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
SMALL = dpo.SHAPES["smollm2"] | {
    "text": lm.SHAPES["smollm2"]["text"]
    | dict(vocab=300, d=32, layers=2, heads=4, kv=2, head_dim=8, ffn=64),
    "prompt": 7,
    "response": 5,
    "lr": 1e-3,
}


@pytest.mark.parametrize("kind", ["live", "cached"])
def test_three_steps_of_both_have_the_same_losses(kind):
    cfg = lm.config(SMALL)
    params = jax.jit(partial(transformer.init, cfg=cfg))(jax.random.key(0))
    peer, packages = dpo._peer(params, cfg, SMALL, [])
    theirs, ours = peer.step(dpo.pairs(SMALL), kind), dpo.ours(params, cfg, SMALL, kind)
    want, got = ([call() for _ in range(3)] for call in (theirs, ours))
    assert got == pytest.approx(want, abs=1e-4) and len(set(want)) == 3
    assert "trl" in packages


def test_small_chunks_need_less_than_a_fifth_of_the_memory_of_all_logits():
    by_chunk, plain = dpo.temporary(dpo.SHAPES["smollm2"])
    assert by_chunk[256] < plain / 5 and by_chunk[256] < by_chunk[1024] < plain / 3
