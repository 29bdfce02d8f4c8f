"""What the stages of a VORTA run share: the model and its grid, compiled steps, the pre-trained model's place."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.data import locate, video
from jaxrepro.methods.vorta import objective, router, sources
from jaxrepro.methods.vorta.objective import Batch
from jaxrepro.models import video_dit, video_files
from jaxrepro.models.video_dit import Config
from jaxrepro.models.wan import WanConfig
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
TRAINING_GUIDANCE = 1000.0  # the scale 1 of HunyuanVideo's guidance, in which routers are trained
APART = (
    1000  # added to a run's seed: its routers see other shapes than the model was pre-trained on
)
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
    cfg = dataclasses.replace(SHAPES[model.shape], **numerics)
    if config.data.kind != "shapes" and model.shape not in video_dit.PRESETS:
        n = config.data.channels
        if n < 1:
            raise UserError(f"data.channels={n}; use 1 or more")
        cfg = dataclasses.replace(cfg, channels=n, out_channels=n)
    return cfg


def grid_of(config: Any) -> VideoGrid:
    """The token grid of a config."""
    return VideoGrid(**config.grid.to_dict())


def prepare(config: Any) -> Setting:
    """Model, grid, mesh; reads no weights and no data."""
    cfg, grid = geometry(config), grid_of(config)
    mesh = sharding.make_mesh(config.mesh)
    return Setting(
        config,
        cfg,
        grid,
        router.branches(cfg, coarse=config.router.coarse, shared=config.router.shared),
        mesh,
        sharding.shard_tree(video_dit.axes(cfg), video_dit.abstract(cfg), mesh),
        sharding.shard_tree(router.axes(cfg), router.abstract(cfg), mesh),
    )


def gate_options(config: Any) -> dict[str, Any]:
    """The keyword arguments of `router.gates`."""
    without = config.router.without
    return dict(without=(without,) if without else (), timeless=config.router.timeless)


# --- training -----------------------------------------------------------------------------------


def videos(s: Setting) -> Any:
    """dataset[step]: batches of training videos for the routers of a run."""
    seed = s.config.seed + APART
    return sources.dataset(s.config, s.cfg, s.grid, "train", batch=s.config.router.batch, seed=seed)


def rows_of(s: Setting, arrays: dict[str, Any]) -> dict[str, Any]:
    """{"latents", "condition"} of a host batch, on the mesh: what a step of the router reads."""
    given = {name: jnp.asarray(x) for name, x in arrays.items() if name != "ids"}
    rows = {
        "latents": given["latents"],
        "condition": sources.condition(s.cfg, given, TRAINING_GUIDANCE),
    }
    return sharding.place(rows, sharding.batch_sharding(s.mesh, rows))


def noised(key: Any, rows: dict[str, Any], *, intervals: int) -> Batch:
    """Rows at times of one interval, with noise."""
    times, noise = jax.random.split(key)
    x = rows["latents"]
    t = objective.timesteps(times, len(x), intervals=intervals)
    return Batch(x, jax.random.normal(noise, x.shape, x.dtype), t, rows["condition"])


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
        return inner(state, noised(key, rows, intervals=1))

    return state, compile_step(step, at)


def optimizer(*, lr: float = 1e-2, weight_decay: float = 0.01) -> optim.Scheduled:
    """AdamW at a constant rate, weight decay on biases too, as the official code trains routers."""
    rule = optim.Scheduled(*optax.adamw(lr, weight_decay=weight_decay))
    rule.schedule = lambda step: jnp.float32(lr)
    return rule


def router_step(run: Run, s: Setting, begin: Callable[[], Any]) -> tuple[State, Callable[..., Any]]:
    """The state of the routers, resumed or begun, and `step(state, (model, rows, key))`."""
    section = s.config.router
    rule = optimizer(lr=section.lr, weight_decay=section.weight_decay)
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
        return inner(state, noised(key, rows, intervals=section.intervals))

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
