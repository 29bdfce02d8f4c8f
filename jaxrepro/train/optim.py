"""The optimiser of a run: AdamW or RMSprop with a schedule, and weight decay on matrices only.

RMSprop: v = b2 v + (1 - b2) g^2,  p -= lr g / (sqrt(v) + eps), no momentum (b2 .99, as torch has it)
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxrepro.config import UserError
from jaxrepro.sharding import path_of

SCHEDULES = ("constant", "linear", "cosine")
OPTIMISERS = ("adamw", "rmsprop")
_NO_DECAY = re.compile(r"(norm|bias|scale|ln|b|b[qkvo])\d*|.*_(norm|bias|scale|b)\d*|(norm|ln)_.*")


class Scheduled(optax.GradientTransformation):
    """An optax optimiser that also tells its learning rate: `schedule(step) -> lr`."""

    schedule: Callable


def decays(params):
    """Tree of bools: True where weight decay applies, i.e. not on biases, norms and vectors.

    By name as well as by rank: a stacked norm is a matrix of (layers, d). Under `lora/` everything is a
    matrix: there `b` is no bias.
    """

    def one(keys, x):
        names = [path_of((key,)).lower() for key in keys]
        spared = "lora" not in names and any(map(_NO_DECAY.fullmatch, names))
        return len(x.shape) >= 2 and not spared

    return jax.tree_util.tree_map_with_path(one, params)


def schedule(name: str, lr, steps: int, warmup: int = 0, end=0.0) -> Callable:
    """`f(step) -> lr`: a linear warm-up over `warmup` steps, then constant, linear or cosine to
    `end * lr` at `steps`. The first step already has lr / warmup."""
    if name not in SCHEDULES:
        raise UserError(f"schedule={name!r} is unknown; use one of {', '.join(SCHEDULES)}")
    if warmup < 0:
        raise UserError(f"warmup={warmup} is negative; use a number of steps from 0 up")
    if name != "constant" and warmup and warmup >= steps:
        raise UserError(f"warmup={warmup} leaves nothing of steps={steps}; use fewer")

    def f(step):
        step = jnp.asarray(step, jnp.float32)
        x = jnp.clip((step - warmup) / max(steps - warmup, 1), min=0.0, max=1.0)
        shape = {"constant": 0.0 * x, "linear": x, "cosine": 0.5 * (1 - jnp.cos(jnp.pi * x))}[name]
        ramp = jnp.minimum(1.0, (step + 1) / warmup) if warmup else 1.0
        return lr * ramp * (1 - (1 - end) * shape)

    return f


def optimizer(config, steps: int | None = None) -> Scheduled:
    """The optimiser of a config that has `lr`, and optionally `optimiser` (of OPTIMISERS; none: adamw), `steps`,
    `schedule`, `warmup` (steps), `end_lr` (share of lr), `weight_decay`, `b1` (of adamw), `b2`, `eps`. `steps` wins
    over `config.steps`.

    Clipping is the step's (`max_grad_norm`); freezing too (`trainable`). Weight decay is decoupled in both.
    """
    get = config.get
    kind = get("optimiser") or "adamw"
    if kind not in OPTIMISERS:
        raise UserError(f"optimiser={kind!r} is unknown; use one of {', '.join(OPTIMISERS)}")
    steps = int(get("steps", 1) if steps is None else steps)
    lr = float(config["lr"])
    for name, value, high in (
        ("lr", lr, math.inf),
        ("weight_decay", get("weight_decay", 0.0), math.inf),
        ("b1", get("b1", 0.9), 1.0),
        ("b2", get("b2", 0.999), 1.0),
    ):
        if not 0 <= value < high:
            limit = "" if high == math.inf else f", below {high:g}"
            raise UserError(f"{name}={value} can't be; use a number from 0 up{limit}")
    rate = schedule(
        get("schedule", "constant"), lr, steps, int(get("warmup", 0)), float(get("end_lr", 0.0))
    )
    eps, decay = get("eps", 1e-8), get("weight_decay", 0.0)
    if kind == "adamw":
        b1, b2 = get("b1", 0.9), get("b2", 0.999)
        rule = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay, mask=decays)
    else:
        rule = optax.chain(
            optax.scale_by_rms(get("b2", 0.99), eps, eps_in_sqrt=False),
            optax.add_decayed_weights(decay, decays),
            optax.scale_by_learning_rate(rate),
        )
    result = Scheduled(*rule)
    result.schedule = rate
    return result
