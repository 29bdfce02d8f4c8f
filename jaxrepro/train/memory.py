"""Bytes on each device, from shapes alone: an ESTIMATE for `--dry_run`, not a measurement.

It adds what lives at once in one training step: parameters, gradients, moments, reference copy, KV
cache, one micro-batch's activations, one chunk of logits, the batch. Everything is a tree of shapes
(`jax.eval_shape`, ShapeDtypeStruct) with shardings, which may lie on an abstract mesh. What XLA adds
(temporaries, fragmentation, collectives' buffers) is not in it: leave a tenth free.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxrepro.ops.logprob import chunk_of
from jaxrepro.train.state import select, trainable_mask


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes of one step; every field is a tree of shapes (None = there is none).

    params: with shardings, as `checkpoint.on_device` or `sharded` make them. opt: the optimiser's
    state. trainable: as in `make_step`. reference: frozen copies. cache: KV of the rollout.
    activations, logits: of one micro-batch. batch: of one step. mesh, stage: for the report only.
    """

    params: Any
    opt: Any = None
    trainable: Any = None
    reference: Any = None
    cache: Any = None
    activations: Any = None
    logits: Any = None
    batch: Any = None
    mesh: Any = None
    stage: str = ""


def largest(*plans: Plan) -> Plan:
    """The plan that needs the most memory: what a run of several stages needs."""
    return max(plans, key=lambda plan: estimate(plan)["total"])


def sharded(tree, shardings):
    """Shapes of `tree` with `shardings`: a tree like it, or one sharding for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def bytes_per_device(tree) -> int:
    """Bytes of a tree's shards on one device; leaves without a sharding count whole."""
    total = 0
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        total += math.prod(shape) * jnp.dtype(x.dtype).itemsize
    return total


def gradients(params, trainable=None):
    """Shapes of the float32 gradient sums: the trained parameters, where they lie."""
    part = select(params, trainable_mask(trainable, params))
    one = lambda x: jax.ShapeDtypeStruct(
        x.shape, jnp.float32, sharding=getattr(x, "sharding", None)
    )
    return jax.tree.map(one, part)


def kv_cache(cfg, rows: int, length: int, sharding=None):
    """Keys and values of `rows` x `length` tokens of a decoder, one array (2, l, b, s, k, i)."""
    shape = (2, cfg.layers, rows, length, cfg.kv, cfg.head_dim)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(cfg.dtype), sharding=sharding)


def decoder_activations(cfg, rows: int, length: int, *, parts: int = 1) -> dict[str, Any]:
    """What the backward pass of a decoder keeps for `rows` x `length` tokens.

    With remat "full" a layer keeps its input, and one layer at a time keeps everything; "names" keeps
    queries, keys, values, what attention makes of them and the input of the feed-forward layer; "dots"
    the results of matrix products; "none" everything, attention weights (float32) too. `parts`: the
    number of devices that share the rows (data * fsdp * sequence).
    """
    tokens = -(-rows * length // parts)
    width = (cfg.heads + 2 * cfg.kv) * cfg.head_dim
    names = width + cfg.heads * cfg.head_dim + cfg.d
    dots = names + cfg.d + 2 * cfg.ffn
    everything = dots + 4 * cfg.d + 2 * cfg.ffn
    kept = {"none": everything, "dots": dots, "names": names, "full": 0}[cfg.remat]
    weights = cfg.layers if cfg.remat == "none" else 1
    dtype = jnp.dtype(cfg.dtype)
    shape = lambda *s, dtype=dtype: jax.ShapeDtypeStruct(s, dtype)
    return {
        "layer inputs": shape(cfg.layers, tokens, cfg.d),
        "kept": shape(cfg.layers, tokens, kept),
        "one layer": shape(tokens, everything),
        "attention": shape(weights, tokens, cfg.heads, length, dtype=jnp.dtype("float32")),
    }


def vision_activations(cfg, rows: int, patches: int, *, parts: int = 1) -> dict[str, Any]:
    """What the backward pass of a vision tower keeps for `rows` images of `patches` patches; `remat`
    and `parts` as in `decoder_activations`, but the tower has none of the names: "names" keeps inputs."""
    rows = -(-rows // parts)
    dots = 5 * cfg.embed + cfg.mlp
    everything = dots + 4 * cfg.embed + cfg.mlp
    kept = {"none": everything, "dots": dots, "names": 0, "full": 0}[cfg.remat]
    weights = cfg.depth if cfg.remat == "none" else 1
    dtype = jnp.dtype(cfg.dtype)
    shape = lambda *s, dtype=dtype: jax.ShapeDtypeStruct(s, dtype)
    return {
        "layer inputs": shape(cfg.depth, rows * patches, cfg.embed),
        "kept": shape(cfg.depth, rows * patches, kept),
        "one layer": shape(rows * patches, everything),
        "attention": shape(weights, rows, cfg.heads, patches, patches, dtype=jnp.dtype("float32")),
    }


def logits_chunk(vocab: int, *, parts: int = 1):
    """Logits of one chunk of tokens and their gradient, float32; `parts`: devices on the vocabulary."""
    return jax.ShapeDtypeStruct((2, chunk_of(vocab), -(-vocab // parts)), jnp.float32)


def estimate(plan: Plan) -> dict[str, int]:
    """Bytes per device by purpose, and their "total"."""
    rows = {
        "parameters": plan.params,
        "gradients": None if plan.opt is None else gradients(plan.params, plan.trainable),
        "optimiser moments": plan.opt,
        "reference copy": plan.reference,
        "KV cache": plan.cache,
        "activations of one micro-batch": plan.activations,
        "logits chunk": plan.logits,
        "batch": plan.batch,
    }
    table = {name: bytes_per_device(tree) for name, tree in rows.items()}
    return table | {"total": sum(table.values())}


def _size(n: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n} B"


def render(plan: Plan) -> str:
    """The estimate as lines of text, with parameter count, mesh and batch shapes."""
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(plan.params))
    lines = [f"parameters: {count:,}"]
    if plan.stage:
        lines.append(f"stage that needs the most memory: {plan.stage}")
    if plan.mesh is not None:
        lines.append("mesh: " + ", ".join(f"{k}={v}" for k, v in plan.mesh.shape.items()))
    for keys, x in jax.tree_util.tree_leaves_with_path(plan.batch):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        lines.append(f"batch {name}: {x.dtype}{list(x.shape)}")
    table = estimate(plan)
    width = max(map(len, table))
    lines.append("memory per device (estimate):")
    lines += [f"  {name:<{width}}  {_size(n):>10}" for name, n in table.items() if n]
    return "\n".join(lines)
