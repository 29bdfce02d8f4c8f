"""LoRA (arXiv:2106.09685): a frozen projection W learns a product of two thin matrices.

    y = x W + (alpha / r) (x A) B,    A (in, r) random,  B (r, out) zero                  (eq. 3)

Adapters are leaves of the parameters, `layers/lora/<projection>/{a, b}`, declared by the model's config:
what draws, shards, stacks, trains, saves and restores parameters does so with adapters too.

    params, cfg = lora.attach(key, params, cfg, Lora(rank=8, alpha=16))
    make_step(loss, optimizer, trainable=lora.TRAINABLE);  init_state(..., trainable=lora.TRAINABLE)
    lora.off(params)                  the reference: the same base, bit for bit, without a copy
    lora.merge(params, cfg)           W + (alpha / r) A B and a config without adapters, for export

Differs from the paper: no dropout on x. The paper draws A from a normal of unstated variance; "normal"
has std 1 / r, "kaiming" is the authors' code, uniform within 1 / sqrt(in).
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxrepro.config import UserError
from jaxrepro.models.params import Param, initialise
from jaxrepro.ops.dense import dense

# Projection -> its leading axes that are summed over.
PROJECTIONS = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "gate": 1, "up": 1, "down": 1}
TRAINABLE = r"(.*/)?layers/lora/.*"  # for make_step and init_state
INITS = ("kaiming", "normal")
RANK = "norm"  # the name of an unsplit axis


@dataclass(frozen=True)
class Lora:
    """Adapters of a decoder; `targets` is a regular expression that matches all of "layers/wq", ...

    The projections are wq, wk, wv, wo, gate, up and down; the default takes all of them.
    """

    rank: int = 8
    alpha: float | int = 16
    targets: str = r"layers/.*"
    init: str = "kaiming"

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora rank {self.rank} must be at least 1")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise UserError(f"lora alpha {self.alpha} must be a number above 0")
        if self.init not in INITS:
            raise UserError(f"lora init {self.init!r} is unknown: one of {', '.join(INITS)}")
        if not self.names():
            raise UserError(
                f"lora targets {self.targets!r} match none of layers/{{{','.join(PROJECTIONS)}}}"
            )

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def names(self) -> tuple[str, ...]:
        """The projections with an adapter."""
        try:
            pattern = re.compile(self.targets)
        except re.error as error:
            raise UserError(
                f"lora targets {self.targets!r} are no regular expression: {error}"
            ) from error
        return tuple(name for name in PROJECTIONS if pattern.fullmatch(f"layers/{name}"))


def declare(cfg: Lora, layer: dict[str, Param]) -> dict[str, dict[str, Param]]:
    """Adapters of one layer, from the declarations of its projections."""

    def pair(name):
        w, inputs = layer[name], PROJECTIONS[name]
        size = math.prod(w.shape[:inputs])
        uniform = cfg.init == "kaiming"
        std = 1 / math.sqrt(3 * size) if uniform else 1 / cfg.rank
        shape_a, axes_a = (*w.shape[:inputs], cfg.rank), (*w.axes[:inputs], RANK)
        shape_b, axes_b = (cfg.rank, *w.shape[inputs:]), (RANK, *w.axes[inputs:])
        return {"a": Param(shape_a, axes_a, std, uniform), "b": Param(shape_b, axes_b, "zeros")}

    return {name: pair(name) for name in cfg.names()}


def delta(
    x: Float[Array, "b t ..."], adapter: dict, cfg: Lora | None, *, inputs: int = 1
) -> Float[Array, "b t ..."]:
    """(alpha / r) (x A) B, in the dtype of x."""
    if cfg is None:
        raise ValueError("these parameters hold adapters, and cfg.lora is None")
    thin = dense(x, adapter["a"], inputs=inputs)
    return dense(thin * cfg.scale, adapter["b"])


def attach(key: PRNGKeyArray, params: dict, cfg: Any, lora: Lora) -> tuple[dict, Any]:
    """Decoder parameters with fresh float32 adapters, and their config; layers stacked or listed.

    B is zero, so the model computes what it did. UserError where there are adapters already.
    """
    from jaxrepro.models import transformer  # it imports this module

    if cfg.lora is not None or has(params):
        raise UserError("these parameters have adapters already: merge them, or take them off")
    cfg = replace(cfg, lora=lora)
    # drawn stacked, whatever the layout, by path: the numbers of transformer.init(key, cfg)
    declared = {"layers": {"lora": transformer.declare(cfg)["layers"]["lora"]}}
    drawn = initialise(key, declared)
    listed = isinstance(params["layers"], tuple)
    if listed:
        drawn = transformer.unstack(drawn)
        layers = tuple(a | b for a, b in zip(params["layers"], drawn["layers"]))
    else:
        layers = params["layers"] | drawn["layers"]
    return params | {"layers": layers}, cfg


def has(params: dict) -> bool:
    """Whether a decoder's parameters hold adapters."""
    layers = params["layers"]
    return "lora" in (layers[0] if isinstance(layers, tuple) else layers)


def off(params: dict) -> dict:
    """The same base parameters without adapters (the same arrays), for a reference policy."""
    drop = lambda layer: {k: v for k, v in layer.items() if k != "lora"}
    layers = params["layers"]
    return params | {
        "layers": tuple(map(drop, layers)) if isinstance(layers, tuple) else drop(layers)
    }


def merge(params: dict, cfg: Any) -> tuple[dict, Any]:
    """W + (alpha / r) A B, summed in float32 and kept in W's dtype, and the config without adapters.

    Nothing to do where there are none. Layers stacked or listed.
    """
    if cfg.lora is None:
        return params, cfg

    def fold(layer):
        out = {k: v for k, v in layer.items() if k != "lora"}
        for name, adapter in layer.get("lora", {}).items():
            a, b = (adapter[n].astype(jnp.float32) for n in "ab")
            w = layer[name]
            stacked = a.ndim + b.ndim - 2 - w.ndim  # 1 where layers lie on a leading axis, of both
            wide = jnp.einsum(
                "l...r,lro->l...o" if stacked else "...r,ro->...o",
                a,
                b.reshape(*b.shape[: stacked + 1], -1),
            )
            out[name] = (w + cfg.lora.scale * wide.reshape(w.shape)).astype(w.dtype)
        return out

    layers = params["layers"]
    layers = tuple(map(fold, layers)) if isinstance(layers, tuple) else fold(layers)
    return params | {"layers": layers}, replace(cfg, lora=None)
