"""One training step: sums over micro-batches, one division, clip, update.

    g = (sum_m d loss_sum_m / d params) / (sum_m weight_sum_m)

A loss returns `(loss_sum, weight_sum, aux)`, sums over the rows it was given, so that the step is
the same number for every split of the batch. A mean of means would weigh a short row as much as a
long one. Sums are float32 and keep the parameters' sharding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrepro.config import UserError
from jaxrepro.train.state import State, merge, select, trainable_mask

NONFINITE = "nonfinite"  # metric: 1 where the step met a non-finite number and left the state alone


def split(batch, micro_batches: int):
    """Cut a batch into micro-batches on a new leading axis; scalars are repeated.

    Leaves may have a multiple of the smallest row count (n samples of a question): samples stay
    with their question. Micro-batch j takes questions j, j + m, ...: each device cuts its own rows.
    """
    leaves = [x for x in jax.tree.leaves(batch) if jnp.ndim(x)]
    rows = min((x.shape[0] for x in leaves), default=0)
    if micro_batches < 1 or not rows or rows % micro_batches:
        raise UserError(
            f"micro_batches={micro_batches} does not divide a batch of {rows} rows; "
            f"use a divisor of {rows}"
        )
    if any(x.shape[0] % rows for x in leaves):
        raise ValueError(f"leading axes {sorted({x.shape[0] for x in leaves})} do not fit together")

    def one(x):
        if jnp.ndim(x) == 0:
            return jnp.broadcast_to(x, (micro_batches,))
        n, rest = x.shape[0] // rows, x.shape[1:]
        x = x.reshape(rows // micro_batches, micro_batches, n, *rest)
        return jnp.swapaxes(x, 0, 1).reshape(micro_batches, rows * n // micro_batches, *rest)

    return jax.tree.map(one, batch)


def in_parts(fn, batch, micro_batches: int):
    """fn(batch), computed by micro-batches; what fn returns leads with the rows it was given."""
    if micro_batches == 1:
        return fn(batch)
    join = lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
    return jax.tree.map(join, jax.lax.map(fn, split(batch, micro_batches)))


def _ratio(total, weight):
    """total / weight; 0 where nothing was weighed."""
    return jnp.where(weight == 0, 0.0, total / jnp.where(weight == 0, 1.0, weight))


def global_norm(tree):
    """Euclidean norm of all leaves together, float32 scalar."""
    squares = (jnp.sum(jnp.square(jnp.abs(x).astype(jnp.float32))) for x in jax.tree.leaves(tree))
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def accumulate(loss: Callable, part, batch, micro_batches: int = 1, shardings=None):
    """(loss_sum, weight_sum, aux, gradients of loss_sum), all float32 sums over the batch.

    `loss(part, batch) -> (loss_sum, weight_sum, aux)`; an aux value is a sum (its weight is
    weight_sum) or a pair (sum, weight); it comes back as a pair. `shardings`, a tree like `part`,
    pins the gradients: without it XLA may keep the accumulator whole on every device.
    """

    def sums(part, rows):
        total, weight, aux = loss(part, rows)
        weight = jnp.asarray(weight, jnp.float32)
        pairs = {k: v if isinstance(v, tuple) else (v, weight) for k, v in aux.items()}
        pairs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), pairs)
        return jnp.asarray(total, jnp.float32), (weight, jax.lax.stop_gradient(pairs))

    def one(rows):
        (total, (weight, aux)), grads = jax.value_and_grad(sums, has_aux=True)(part, rows)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings)
        return total, weight, aux, grads

    if micro_batches == 1:
        return one(batch)
    rows = split(batch, micro_batches)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], rows))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    if shardings is not None:
        zeros = (*zeros[:3], jax.lax.with_sharding_constraint(zeros[3], shardings))
    add = lambda carry, rows: (jax.tree.map(jnp.add, carry, one(rows)), None)
    return jax.lax.scan(add, zeros, rows)[0]


def make_step(
    loss: Callable,
    optimizer,
    *,
    micro_batches: int = 1,
    max_grad_norm: float | int | None = None,
    prepare: Callable | None = None,
    trainable: Any = None,
    shardings: Any = None,
) -> Callable[[State, Any], tuple[State, dict]]:
    """Build `step(state, batch) -> (state, metrics)`, pure; `compile_step` jits it.

    loss(params, batch) -> (loss_sum, weight_sum, aux).
    prepare(state, batch) -> (batch, extra) runs first, once, without gradient, over the whole batch: what
    an item owes to the other items or to the state it puts into the batch, as leaves with rows or as
    scalars, and it gives the state's next `extra`. The loss is then called as loss(params, batch, extra).
    trainable: see `state.trainable_mask`; frozen leaves have neither gradient nor moments.
    max_grad_norm clips the gradient of the mean loss by its global norm (None or 0: no clipping).
    shardings: of the parameters; pins the gradients there (give it wherever fsdp or tensor > 1).

    metrics (float32 scalars): loss, weight, every aux (sum / weight, 0 where the weight is 0),
    grad_norm before clipping, param_norm, lr where the optimiser tells it, `nonfinite`. If the loss
    or the gradient is not finite the whole state comes back unchanged.
    """

    if max_grad_norm is not None and not max_grad_norm >= 0:
        raise UserError(
            f"max_grad_norm={max_grad_norm}; use a number above 0, or 0 for no clipping"
        )

    def step(state: State, batch):
        params = state.params
        mask = trainable_mask(trainable, params)
        part = select(params, mask)
        extra, shared = state.extra, ()
        if prepare is not None:
            batch, extra = jax.lax.stop_gradient(prepare(state, batch))
            shared = (extra,)
        objective = lambda part, rows: loss(merge(part, params, mask), rows, *shared)
        at = None if shardings is None else select(shardings, mask)
        total, weight, aux, grads = accumulate(objective, part, batch, micro_batches, at)

        grads = jax.tree.map(lambda g: _ratio(g, weight), grads)
        norm = global_norm(grads)
        metrics = {k: _ratio(*pair) for k, pair in aux.items()}
        metrics |= {"loss": _ratio(total, weight), "weight": weight, "grad_norm": norm}
        if max_grad_norm:
            scale = jnp.minimum(1.0, max_grad_norm / jnp.maximum(norm, 1e-30))
            grads = jax.tree.map(lambda g: g * scale, grads)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, part)
        updates, opt = optimizer.update(grads, state.opt, part)
        new = State(
            step=state.step + 1,
            params=merge(optax.apply_updates(part, updates), params, mask),
            opt=opt,
            extra=extra,
        )
        finite = jnp.isfinite(total) & jnp.isfinite(weight) & jnp.isfinite(norm)
        new = jax.tree.map(
            lambda a, b: a if a is b else jnp.where(finite, a, b), new, state
        )  # fuses into the update: no second copy of the state
        metrics["param_norm"] = global_norm(new.params)
        metrics[NONFINITE] = 1.0 - finite
        schedule = getattr(optimizer, "schedule", None)
        if schedule is not None:
            metrics["lr"] = jnp.asarray(schedule(state.step), jnp.float32)
        return new, metrics

    return step


def compile_step(step: Callable, state_shardings=None, batch_sharding=None) -> Callable:
    """Jit `step(state, batch)` with its shardings; the state's buffers are donated.

    `batch_sharding` is a tree, one sharding for all leaves, or None (as the batch comes). The mesh
    of the shardings is set while tracing, so `sharding.constrain` works inside. Batches may be
    numpy arrays. `.lower` is there for inspection.
    """
    if state_shardings is None:
        return jax.jit(step, donate_argnums=0)
    compiled = jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding),
        out_shardings=(state_shardings, None),
        donate_argnums=0,
    )
    meshes = {s.mesh for s in jax.tree.leaves(state_shardings) if hasattr(s, "mesh")}
    if len(meshes) != 1:
        return compiled
    mesh = meshes.pop()

    def call(state, batch):
        with jax.set_mesh(mesh):
            return compiled(state, batch)

    def lower(state, batch):
        with jax.set_mesh(mesh):
            return compiled.lower(state, batch)

    call.lower = lower
    return call
