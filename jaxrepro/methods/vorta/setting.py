"""What the stages of a VORTA run share: the model and its grid, data as batches, compiled steps, samplers."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.data import batches, latents, locate, video
from jaxrepro.methods.vorta import objective, router
from jaxrepro.methods.vorta.objective import Batch
from jaxrepro.models import video_dit, video_files
from jaxrepro.models.hunyuan_video import HunyuanVideoConfig
from jaxrepro.models.video_dit import Condition, Config
from jaxrepro.models.wan import WanConfig
from jaxrepro.ops import flow, routed
from jaxrepro.ops.video_grid import VideoGrid
from jaxrepro.train import optim
from jaxrepro.train.loop import Run
from jaxrepro.train.state import State, init_state, state_shardings
from jaxrepro.train.step import compile_step, make_step

SHAPES: dict[str, Config] = {
    "small": WanConfig(
        heads=4,
        head_dim=24,
        layers=4,
        ffn=384,
        channels=video.CHANNELS,
        out_channels=video.CHANNELS,
        text=len(video.VOCABULARY),
    ),
    "medium": WanConfig(
        heads=10,
        head_dim=64,
        layers=12,
        ffn=2560,
        channels=video.CHANNELS,
        out_channels=video.CHANNELS,
        text=len(video.VOCABULARY),
    ),
} | video_dit.PRESETS
SAMPLERS = {"euler": flow.euler, "unipc": flow.unipc}
TRAINING_GUIDANCE = 1000.0  # the scale 1 of HunyuanVideo's guidance, in which routers are trained
CACHE = 1  # of pre-trained models; another number for other code


class Setting(NamedTuple):
    """What the parts of a run share."""

    config: Any
    cfg: Config
    grid: VideoGrid
    branches: tuple[Callable[..., Any], ...]
    mesh: Any
    model_at: Any  # shardings of the model
    router_at: Any  # and of the routers


def geometry(config: Any) -> Config:
    """The model of a config; reads config.json where there is a folder."""
    model = config.model
    numerics = dict(dtype=model.dtype, remat=model.remat)
    if model.path and Path(model.path).is_dir():
        return video_files.read_config(model.path, **numerics)
    if model.shape not in SHAPES:
        raise UserError(f"model.shape={model.shape!r} is not one of {', '.join(SHAPES)}")
    return dataclasses.replace(SHAPES[model.shape], **numerics)


def grid_of(config: Any) -> VideoGrid:
    """The token grid of a config."""
    return VideoGrid(**config.grid.to_dict())


def branches_of(config: Any, cfg: Config, coarse: str | None = None) -> tuple[Any, ...]:
    """The branches of a config, or with another way to coarsen."""
    return router.branches(cfg, coarse=coarse or config.router.coarse, shared=config.router.shared)


def prepare(config: Any) -> Setting:
    """Model, grid, mesh; reads no weights and no data."""
    cfg = geometry(config)
    mesh = sharding.make_mesh(config.mesh)
    return Setting(
        config,
        cfg,
        grid_of(config),
        branches_of(config, cfg),
        mesh,
        sharding.shard_tree(video_dit.axes(cfg), video_dit.abstract(cfg), mesh),
        sharding.shard_tree(router.axes(cfg), router.abstract(cfg), mesh),
    )


def gate_options(config: Any) -> dict[str, Any]:
    """The keyword arguments of `router.gates`."""
    without = config.router.without
    return dict(without=(without,) if without else (), timeless=config.router.timeless)


# --- data ---------------------------------------------------------------------------------------


def latent_shape(cfg: Config, grid: VideoGrid) -> tuple[int, int, int, int]:
    """(c, f, h, w) of the latents of a grid."""
    return cfg.channels, *(n * p for n, p in zip(grid.size, cfg.patch))


def data(config: Any, cfg: Config, split: str, *, batch: int, seed: int) -> Any:
    """dataset[step] of `batches.Batch`; arrays: latents, text, and where the source has them length and pooled."""
    size = latent_shape(cfg, grid_of(config))
    if config.data.path:
        if split == "test" and not config.data.test:
            raise UserError("data.test is needed beside data.path: a folder of latents to test on")
        path = config.data.path if split == "train" else config.data.test
        source = latents.Latents(path, frames=size[1])
        if source.shape != size:
            raise UserError(
                f"{path}: latents of {source.shape}, the model and grid want {size}; set grid.size"
            )
        return latents.dataset(source, batch=batch, seed=seed if split == "train" else None)
    example = lambda i: video.example(split, i, seed, size=size[1:])
    return batches.dataset(batches.Generated(example), video.arrays, batch=batch)


def rows_of(s: Setting, arrays: dict[str, Any]) -> dict[str, Any]:
    """{"latents", "condition"} of a host batch, on the mesh: what a step of the router reads."""
    given = {name: jnp.asarray(x) for name, x in arrays.items() if name != "ids"}
    rows = {"latents": given["latents"], "condition": condition(s.cfg, given, TRAINING_GUIDANCE)}
    return sharding.place(rows, sharding.batch_sharding(s.mesh, rows))


def condition(cfg: Config, arrays: dict[str, Any], guidance: float) -> Condition:
    """What a model reads of text; guidance (times 1000) only where it is embedded."""
    if isinstance(cfg, WanConfig):
        return Condition(arrays["text"])
    missing = [name for name in ("length", "pooled") if name not in arrays]
    if missing:
        raise UserError(f"HunyuanVideo reads {', '.join(missing)}, which this data has not")
    scale = jnp.full(len(arrays["text"]), guidance) if cfg.guidance else None
    return Condition(arrays["text"], arrays["length"], arrays["pooled"], scale)


def draw(key: Any, rows: dict[str, Any], *, intervals: int) -> Batch:
    """Rows at times of one interval, with noise."""
    times, noise = jax.random.split(key)
    x = rows["latents"]
    t = objective.timesteps(times, len(x), intervals=intervals)
    return Batch(x, jax.random.normal(noise, x.shape, x.dtype), t, rows["condition"])


# --- training -----------------------------------------------------------------------------------


def dense_loss(params: Any, batch: Batch, *, cfg: Config) -> Any:
    """(loss_sum, weight_sum, aux) of flow matching: the pre-training of small models."""
    x = objective.noisy(batch)
    velocity = video_dit.apply(params, cfg, x, batch.t, batch.condition)
    return objective.diffusion_error(velocity, batch).sum(), jnp.float32(len(batch.t)), {}


def dense_step(run: Run, s: Setting) -> tuple[State, Callable[..., Any]]:
    """The state of pre-training, resumed or begun, and `step(state, (rows, key))`."""
    section = s.config.pretrain
    rule = optim.optimizer(section)
    begin = lambda: init_state(video_dit.init(jax.random.key(section.seed), s.cfg), rule)
    at = state_shardings(jax.eval_shape(begin), s.model_at, s.mesh)
    state = run.restore(begin, stage="pretrain", shardings=at)
    inner = make_step(partial(dense_loss, cfg=s.cfg), rule, max_grad_norm=section.max_grad_norm)

    def step(state: State, given: Any) -> Any:
        rows, key = given
        return inner(state, draw(key, rows, intervals=1))

    return state, compile_step(step, at)


def optimizer(section: Any) -> optim.Scheduled:
    """AdamW at a constant rate, weight decay on biases too, as the official code trains routers."""
    rule = optim.Scheduled(*optax.adamw(section.lr, weight_decay=section.weight_decay))
    rule.schedule = lambda step: jnp.float32(section.lr)
    return rule


def router_step(run: Run, s: Setting, begin: Callable[[], Any]) -> tuple[State, Callable[..., Any]]:
    """The state of the routers, resumed or begun, and `step(state, (model, rows, key))`."""
    section = s.config.router
    rule = optimizer(section)
    abstract = jax.eval_shape(partial(init_state, optimizer=rule), router.abstract(s.cfg))
    at = state_shardings(abstract, s.router_at, s.mesh)
    state = run.restore(
        lambda: init_state(begin(), rule),
        stage="router",
        shardings=at,
        abstract=abstract,
        jit=False,
    )
    fixed = dict(
        cfg=s.cfg,
        grid=s.grid,
        branches=s.branches,
        chunk=section.chunk or None,
        **gate_options(s.config),
        **s.config.loss.to_dict(),
    )

    def step(state: State, given: Any) -> Any:
        params, rows, key = given
        loss = partial(objective.loss, params=params, **fixed)
        inner = make_step(
            loss,
            rule,
            micro_batches=section.micro_batches,
            max_grad_norm=section.max_grad_norm,
            shardings=s.router_at if s.mesh.size > 1 else None,
        )
        return inner(state, draw(key, rows, intervals=section.intervals))

    return state, compile_step(step, at)


# --- the pre-trained model ------------------------------------------------------------------------


def kept_at(s: Setting) -> Path:
    """The folder of the pre-trained model, named after all that it depends on."""
    section = s.config.pretrain.to_dict()
    where = section.pop("cache")
    numerics = ("remat",)
    shape = {k: v for k, v in dataclasses.asdict(s.cfg).items() if k not in numerics}
    of = [CACHE, type(s.cfg).__name__, shape, section, s.grid.size, s.config.data.to_dict()]
    name = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]
    return (Path(where) if where else locate.cache() / "models") / f"vorta-{name}"


# --- sampling -----------------------------------------------------------------------------------


def plan_of(config: Any) -> flow.Plan:
    """The times and the solver of a config."""
    decode = config.decode
    if decode.sampler not in SAMPLERS:
        raise UserError(f"decode.sampler={decode.sampler!r} is not one of {', '.join(SAMPLERS)}")
    return SAMPLERS[decode.sampler](steps=decode.steps, shift=decode.shift)


def sampler(s: Setting, branches: Sequence[Callable[..., Any]] | None = None) -> Callable[..., Any]:
    """Compiled `(params, noise, condition, table (steps, l, h)) -> latents`; one program for all tables.

    With decode.guidance above 1, Wan 2.1 is guided against a text of zeros, both sides by the same route.
    """
    plan, scale = plan_of(s.config), s.config.decode.guidance
    chosen = tuple(branches or s.branches)
    guided = scale != 1 and isinstance(s.cfg, WanConfig)

    def sample(params: Any, noise: Any, given: Condition, table: Any) -> Any:
        if guided:
            given = flow.both(given, jax.tree.map(jnp.zeros_like, given))

        def velocity(x: Any, t: Any, i: Any) -> Any:
            def attend(q: Any, k: Any, v: Any, layer: Any, aux: Any) -> Any:
                route = table[i, layer].astype(jnp.int32)
                return routed.routed(q, k, v, route, s.grid, text=aux.length, branches=chosen)

            return video_dit.apply(params, s.cfg, x, t, given, attend=attend, layout=s.grid)

        return flow.sample(flow.guided(velocity, scale) if guided else velocity, noise, plan)

    return sharding.on_mesh(s.mesh, jax.jit(sample))


def asked(s: Setting, n: int) -> tuple[Any, Any, Condition]:
    """Host arrays, noise (n, c, f, h, w) and condition of n test videos, the same for every arm and seed."""
    arrays = data(s.config, s.cfg, "test", batch=n, seed=0)[0].arrays
    noise = jax.random.normal(jax.random.key(0), (n, *latent_shape(s.cfg, s.grid)))
    given = {name: jnp.asarray(x) for name, x in arrays.items() if name != "ids"}
    embedded = isinstance(s.cfg, HunyuanVideoConfig)
    scale = 1000.0 * s.config.decode.guidance if embedded else 0.0
    return arrays, noise, condition(s.cfg, given, scale)


def host(x: Any) -> np.ndarray:
    """A float32 host array."""
    return np.asarray(sharding.fetch(x), np.float32)
