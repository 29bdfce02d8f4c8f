"""A DPO step beside TRL's DPOTrainer on the same weights and pairs, and the memory of a chunked loss.

Shape "smollm2" is SmolLM2-135M on a CPU: pairs with a shared prompt, float32, AdamW, clipping at 1. TRL runs both
rows of a pair with their prompts; here the prompt runs once. Two references: a live copy that is run at every step
(TRL's default), and log-probs that are known beforehand. Memory is what XLA asks for beyond arguments and results, for
the log-probs of `positions` tokens and their gradient at the vocabulary of Qwen2.5, in chunks and from all logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxrepro import results
from jaxrepro.bench import harness, lm

SHAPES = {
    "smollm2": {
        "text": lm.SHAPES["smollm2"]["text"],
        "dtype": "float32",
        "remat": "none",
        "pairs": 4,
        "prompt": 96,
        "response": 64,
        "beta": 0.1,
        "lr": 1e-6,
        "memory": {"rows": 2, "positions": 2048, "d": 64, "vocab": 151936, "chunks": [256, 1024]},
        "peer": True,
    },
    "qwen2_1_5b": {
        "text": lm.SHAPES["qwen2_1_5b"]["text"],
        "dtype": "bfloat16",
        "remat": "full",
        "pairs": 8,
        "prompt": 512,
        "response": 512,
        "beta": 0.1,
        "lr": 1e-6,
        "memory": {"rows": 8, "positions": 8192, "d": 1536, "vocab": 151936, "chunks": [256, 1024]},
        "peer": False,
    },
}
GPU_SHAPE = "qwen2_1_5b"


def pairs(shape: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random prompts (b, t), responses (b, 2, c) and log-probs of a reference (b, 2, c)."""
    rng = np.random.default_rng(seed)
    b, t, c = shape["pairs"], shape["prompt"], shape["response"]
    draw = lambda *size: rng.integers(3, shape["text"]["vocab"], size, dtype=np.int32)
    lp = rng.normal(-10, 1, (b, 2, c)).astype(np.float32)
    return {"prompt": draw(b, t), "responses": draw(b, 2, c), "ref_lp": lp}


def ours(params: Any, cfg: Any, shape: Mapping[str, Any], kind: str) -> Callable[[], float]:
    """A call that makes one step with a reference of this kind and returns its loss."""
    import jax
    import jax.numpy as jnp

    from jaxrepro.data.batches import PromptTokens
    from jaxrepro.methods.dpo import programs, registry
    from jaxrepro.train import optim, state, step

    data = pairs(shape)
    b, t = data["prompt"].shape
    c = data["responses"].shape[-1]
    at = np.broadcast_to(np.arange(t, dtype=np.int32), (b, t))
    prompts = PromptTokens(data["prompt"], at, np.ones((b, t), np.int32), np.full(b, t, np.int32))
    rows = programs.Rows(prompts, data["responses"], np.full((b, 2), c, np.int32))
    if kind == "cached":
        rows = rows._replace(reference={"lp": data["ref_lp"]})
    losses = tuple(registry.mix(["sigmoid"], beta=shape["beta"]))
    reference = programs.Reference(kind)
    settings = dict(cfg=cfg, mix=losses, reference=reference)
    rule = optim.optimizer({"lr": shape["lr"]})
    run = step.compile_step(
        step.make_step(
            partial(programs.loss, **settings),
            rule,
            max_grad_norm=1.0,
            prepare=partial(programs.prepare, **settings),
        )
    )
    rows = jax.tree.map(jnp.asarray, rows)
    held: dict[str, Any] = {}

    def call() -> float:
        if not held:
            copy = jax.tree.map(jnp.copy, params)
            extra = programs.first_extra(losses, reference, params)
            held["state"] = state.init_state(copy, rule, extra=extra)
        held["state"], metrics = run(held["state"], rows)
        return float(metrics["loss"])

    return call


def temporary(shape: Mapping[str, Any]) -> tuple[dict[int, float], float]:
    """Bytes that XLA needs for log-probs and gradient: by size of a chunk, and from all logits."""
    import jax
    import jax.numpy as jnp

    from jaxrepro.ops.logprob import token_log_probs

    m = shape["memory"]
    length = m["positions"] // m["rows"]
    spec = jax.ShapeDtypeStruct
    hidden = spec((m["rows"], length, m["d"]), jnp.dtype(shape["dtype"]))
    head, targets = spec((m["d"], m["vocab"]), jnp.float32), spec((m["rows"], length), jnp.int32)

    def plain(hidden, head, targets):
        z = jnp.einsum("btd,dv->btv", hidden, head.astype(hidden.dtype))
        lp = jax.nn.log_softmax(z.astype(jnp.float32))
        return jnp.take_along_axis(lp, targets[..., None], -1).sum()

    def chunked(hidden, head, targets, chunk):
        return token_log_probs(hidden, head, targets, chunk=chunk).sum()

    def needs(fn):
        program = jax.jit(jax.grad(fn, argnums=(0, 1))).lower(hidden, head, targets).compile()
        return float(program.memory_analysis().temp_size_in_bytes)

    return {chunk: needs(partial(chunked, chunk=chunk)) for chunk in m["chunks"]}, needs(plain)


def bench(shape: Mapping[str, Any], rounds: int) -> harness.Report:
    """Seconds of a DPO step with either reference; a note on memory."""
    import jax

    from jaxrepro.models import transformer
    from jaxrepro.ops.logprob import chunk_of

    cfg = lm.config(shape)
    params = jax.jit(partial(transformer.init, cfg=cfg))(jax.random.key(0))
    b, t, c = shape["pairs"], shape["prompt"], shape["response"]
    notes = [
        f"{transformer.count(cfg):,} parameters, {shape['dtype']}; {b} pairs of {c} tokens behind prompts of {t}"
    ]
    peer, packages = _peer(params, cfg, shape, notes)
    groups = []
    for kind, what in (("live", "a live reference"), ("cached", "known reference log-probs")):
        cases = {"TRL": peer.step(pairs(shape), kind)} if peer else {}
        cases["jaxrepro"] = ours(params, cfg, shape, kind)
        timed = harness.interleave(cases, rounds)
        groups.append(harness.group(f"DPO step, {what}", "s", timed, peers=list(cases)[:-1]))
    by_chunk, plain = temporary(shape)
    m = shape["memory"]
    some = ", ".join(
        f"{size / 2**20:.0f} MiB in chunks of {chunk} ({size / plain:.2f} of it)"
        for chunk, size in by_chunk.items()
    )
    notes.append(
        f"temporary memory of {m['positions']} log-probs and their gradient at vocabulary {m['vocab']:,}: "
        f"{plain / 2**20:.0f} MiB from all logits, {some}; a run takes {chunk_of(m['vocab'])}"
    )
    return harness.Report(groups, notes, packages)


def _peer(params: Any, cfg: Any, shape: Mapping[str, Any], notes: list[str]) -> tuple[Any, tuple]:
    """TRL's trainer with our weights, or None; and the packages it is made of."""
    if not harness.has_peer(shape, notes):
        return None, ()
    try:
        from jaxrepro.bench._dpo_trl import Peer
    except ImportError as e:
        notes.append(f"trl is not installed ({e}): jaxrepro alone. `pip install trl==1.10.0`")
        return None, ()
    notes.append(
        "TRL: DPOTrainer's own loss on transformers' LlamaForCausalLM, float32, sdpa, fused AdamW, one thread a "
        "core; without what its Trainer adds (logging, data loading)"
    )
    return Peer(params, cfg, dict(shape), results.cores()), ("torch", "transformers", "trl")
