"""VORTA end to end: a video model, its routers, and routed sampling against dense sampling.

    planted    does the router find routes that are known? (planted.py; no model)
    pretrain   a small model by flow matching on moving shapes; once, kept in a cache, where no model is given
    router     `steps` updates of the routers alone (objective.py)
    evaluate   videos of test texts from the same noise: dense, routed, and tables at the same cost (evaluation.py)

One run trains one arm; `jaxrepro.reproduce` compares arms. With steps = 0 the routers of `router.path`, or the table of
`decode.table`, are evaluated; `sample` then needs no run.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.data import locate
from jaxrepro.distributed import first
from jaxrepro.methods.vorta import (
    drawing,
    evaluation,
    objective,
    planted,
    report,
    router,
    router_files,
    samples,
    setting,
    sources,
    ulysses,
)
from jaxrepro.methods.vorta.setting import Setting
from jaxrepro.models import video_dit, video_files
from jaxrepro.train import checkpoint, memory, optim
from jaxrepro.train.loop import Run
from jaxrepro.train.state import init_state, state_shardings, step_key

STAGE = "router"


def run(
    config: Any, workdir: Any, *, resume: str = "auto", profile: str | None = None
) -> dict[str, float]:
    """Train the routers of one arm in `workdir` and evaluate them; returns what summary.json holds."""
    s = opened(config)
    show = "loss", "last", "diffusion", "full"
    with Run(config, workdir, resume=resume, profile=profile, show=show) as run:
        if run.finished:
            return run.results
        results: dict[str, float] = {}
        if config.planted.seeds:
            study = partial(planted.study, config.planted.seeds)
            results |= run.once("planted", partial(study, first=config.seed * config.planted.seeds))
        params = model(run, s)
        routers = train(run, s, params)
        found = evaluation.evaluate(s, params, routers)
        kept = sharding.fetch(routers)
        first(lambda: report.write(run, s, found, kept))
        results |= found.numbers
        for line in (*report.lines(results), *found.notes):
            run.say(line)
        run.summary(results)
        return run.results


def opened(config: Any) -> Setting:
    """The setting of a config that can run: what it reads is there and fits. UserError before anything is written."""
    check(config)
    if not config.model.path and not pretrains(config):
        raise UserError(
            f"model.shape={config.model.shape} is a released model: give its folder as model.path (small and medium "
            "are trained here)"
        )
    s = setting.prepare(config)
    fits(config, s.cfg, s.grid, s.mesh)  # with its axis of -1, if it has one, filled in
    sources.ready(config, s.cfg, s.grid)
    if config.decode.vae:
        samples.installed(config)
    drawing.kernel(s)
    drawing.given(config, s.cfg)
    if config.router.path:
        router_files.load(config.router.path, s.cfg)
    return s


def check(config: Any) -> None:
    """UserError for settings that can't work, before anything is read."""
    r, decode, loss = config.router, config.decode, config.loss
    cfg, grid = setting.geometry(config), setting.grid_of(config)
    router.branches(cfg, coarse=r.coarse, shared=r.shared)
    sources.check(config, cfg)
    drawing.check(config)
    samples.check(config)
    mesh = sharding.abstract_mesh(config.mesh)
    least = (
        ("steps", config.steps, 0),
        ("router.batch", r.batch, 1),
        ("router.micro_batches", r.micro_batches, 1),
        ("router.intervals", r.intervals, 1),
        ("router.chunk", r.chunk, 0),
        ("eval.n", config.eval.n, 1),
        ("pretrain.steps", config.pretrain.steps, 0),
        ("pretrain.batch", config.pretrain.batch, 1),
        ("planted.seeds", config.planted.seeds, 0),
    )
    for name, value, low in least:
        if value < low:
            raise UserError(f"{name}={value}; use {low} or more")
    if r.batch % r.micro_batches:
        raise UserError(
            f"router.micro_batches={r.micro_batches} does not divide router.batch={r.batch}; use a divisor"
        )
    fits(config, cfg, grid, mesh)
    heads = cfg.heads // mesh.shape["sequence"]  # of a device
    if r.chunk and r.chunk < heads and heads % r.chunk:
        raise UserError(
            f"router.chunk={r.chunk} does not divide {heads} heads of a device; use a divisor"
        )
    if r.without and r.without not in router.BRANCHES:
        raise UserError(f"router.without={r.without!r} is not one of {', '.join(router.BRANCHES)}")
    if loss.target not in objective.TARGETS:
        raise UserError(f"loss.target={loss.target!r}: {' or '.join(objective.TARGETS)}")
    if loss.power not in (1, 2):
        raise UserError(f"loss.power={loss.power}: 1 or 2")
    numbers = [(f"loss.{k}", loss[k]) for k in ("diff", "reg", "last", "hidden", "rebalance")]
    numbers += [(f"router.{k}", r[k]) for k in ("lr", "weight_decay", "max_grad_norm")]
    for name, value in numbers:
        if not (0 <= value < math.inf):
            raise UserError(f"{name}={value}; use a number from 0 up")
    for tau in (decode.tau, *decode.taus):
        if not 0 <= tau <= 1:
            raise UserError(f"decode.tau={tau} must be in [0, 1]")
    if r.without == "full" and decode.tau > 0.5:
        raise UserError(
            f"decode.tau={decode.tau} moves heads to full attention, which router.without=full leaves out; use 0 to 0.5"
        )
    if unknown := sorted(set(decode.controls) - set(evaluation.CONTROLS)):
        raise UserError(
            f"decode.controls={', '.join(unknown)}: {', '.join(evaluation.CONTROLS)} are known"
        )
    if not config.steps and not r.path and not decode.table:
        raise UserError(
            "steps=0 without router.path or decode.table: there are no routes to evaluate"
        )
    if max(grid.size) > getattr(cfg, "positions", max(grid.size)):
        raise UserError(f"grid.size={grid.size} exceeds the model's {cfg.positions} positions")


def fits(config: Any, cfg: Any, grid: Any, mesh: Any) -> None:
    """UserError where heads, video tokens or the rows of a batch do not divide over the mesh."""
    if (parts := mesh.shape["tensor"]) > 1:
        raise UserError(
            f"mesh.tensor={parts} splits the heads, which routed attention deals out by branch: use the axis sequence "
            "(Ulysses) or fsdp, and tensor 1"
        )
    ulysses.check(mesh, heads=cfg.heads, tokens=grid.length)
    section, batches = config.router, {}
    if config.steps:
        rows = section.batch // section.micro_batches
        batches["router.batch / router.micro_batches"] = rows
    elif {*config.decode.controls} & {*evaluation.SEARCHED}:
        batches["router.batch"] = section.batch
    if pretrains(config):
        batches["pretrain.batch"] = config.pretrain.batch
    sharding.check_batches(mesh, **batches)


def pretrains(config: Any) -> bool:
    """Whether the video model is trained here."""
    return not config.model.path and config.model.shape not in video_dit.PRESETS


def model(run: Run, s: Setting) -> Any:
    """The video model: of model.path, of the cache, or pre-trained now and put there."""
    if s.config.model.path:
        return load(s, locate.model(s.config.model.path))
    folder = setting.kept_at(s)
    if first(folder.is_dir):
        run.say(f"pretrain: taken from {folder}")
        return load(s, folder)
    section = s.config.pretrain
    state, step = setting.dense_step(run, s)
    data = sources.dataset(s.config, s.cfg, s.grid, "train", batch=section.batch, seed=section.seed)
    for i in run.steps(state, section.steps):
        batch = data[i]
        key = step_key(section.seed, "pretrain", i)  # not the run's seed: its arms share the model
        state, metrics = step(state, (setting.rows_of(s, batch.arrays), key))
        run.log(i, metrics, ids=batch.ids)
        run.save(i, state)
    kept = sharding.fetch(state.params)

    def keep() -> None:
        if not folder.is_dir():  # another run may have been first
            video_files.save(folder, kept, s.cfg)

    first(keep)
    return load(s, folder)  # as every other run has it, in the dtype it computes in


def load(s: Setting, folder: Any) -> Any:
    """The frozen model of a folder, in the dtype it computes in."""
    return video_files.load(folder, s.cfg, dtype=s.cfg.dtype, shardings=s.model_at)


def train(run: Run, s: Setting, params: Any) -> Any:
    """Routers after `steps` updates, from random ones or from router.path; None where only a table is given."""
    config, section = s.config, s.config.router

    def begin() -> Any:
        if section.path:
            return router_files.load(section.path, s.cfg, shardings=s.router_at)
        return router.init(jax.random.key(config.seed), s.cfg)

    if not config.steps:
        return begin() if section.path else None
    state, step = setting.router_step(run, s, begin)
    data = setting.videos(s)
    for i in run.steps(state, config.steps):
        batch = data[i]
        state, metrics = step(state, (params, setting.rows_of(s, batch.arrays), run.key(i)))
        run.log(i, metrics, ids=batch.ids)
        run.save(i, state)
    return state.params


# After training, and before it -------------------------------------------------------------------


def trained(config: Any, workdir: Any) -> tuple[Setting, Any, Any]:
    """The setting, the model and the last routers of a run."""
    s = setting.prepare(config)
    drawing.kernel(s)
    folder = locate.model(config.model.path) if config.model.path else setting.kept_at(s)
    if not folder.is_dir():
        raise UserError(f"there is no pre-trained model at {folder}: run jaxrepro.launch first")
    params = load(s, folder)
    if not config.steps:
        path = config.router.path
        return s, params, router_files.load(path, s.cfg, shardings=s.router_at) if path else None
    target = router.abstract(s.cfg)
    return s, params, checkpoint.load(workdir, target, stage=STAGE, shardings=s.router_at)


def evaluate(
    config: Any, workdir: Any, *, split: str = "test", n: int | None = None
) -> dict[str, float]:
    """The numbers of a trained run, on n test videos."""
    if split != "test":
        raise UserError(f"split {split!r}: routers are evaluated on test")
    if n is not None:
        with config.unlocked():
            config.eval.n = n
    return evaluation.evaluate(*trained(config, workdir)).numbers


def ready(config: Any) -> bool:
    """Whether `sample` needs no run: routers or routes are given, not trained."""
    return not config.steps


def sample(
    config: Any,
    workdir: Any,
    *,
    prompt: str | None = None,
    image: Any = None,
    n: int = 1,
    temperature: float | None = None,
    seed: int = 0,
) -> list[str]:
    """Write videos below workdir/videos and return their paths: n of a prompt, or of the first n test texts.

    A prompt is four words of moving shapes, the name of a clip, or the id of an item of data.test.
    """
    if image is not None:
        raise UserError("--image: videos are made of text alone; leave it out")
    if temperature is not None:
        raise UserError("--temperature: video models have none; leave it out, --seed draws noise")
    check(config)
    samples.installed(config)
    s, params, routers = trained(config, workdir)
    return samples.write(s, params, routers, workdir, prompt=prompt, n=n, seed=seed)


def plan(config: Any) -> memory.Plan:
    """Shapes of the stage that needs the most memory, for --dry_run; touches no file, network or device."""
    check(config)
    trains = pretrains(config)
    stages = [_router_plan(config)] if config.steps or not trains else []
    if trains:
        stages.append(_pretrain_plan(config))
    return memory.largest(*stages)


def _router_plan(config):
    """A step of the routers beside the frozen model, kept in the dtype it computes in."""
    cfg, section = setting.geometry(config), config.router
    mesh = sharding.abstract_mesh(config.mesh)
    frozen = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(cfg.dtype)), video_dit.abstract(cfg)
    )
    at = (
        _placed(video_dit.axes(cfg), frozen, mesh),
        _placed(router.axes(cfg), router.abstract(cfg), mesh),
    )
    rule = partial(init_state, optimizer=setting.optimizer())
    state = jax.eval_shape(rule, router.abstract(cfg))
    rows = -(-section.batch // section.micro_batches)
    return memory.Plan(
        params={"model": at[0], "router": at[1]},
        opt=memory.sharded(state.opt, state_shardings(state, _shardings(at[1]), mesh).opt),
        trainable="router/.*",
        activations=activations(config, cfg, mesh, rows, section.chunk or cfg.heads),
        batch=_rows(config, cfg, mesh, section.batch),
        mesh=mesh,
        stage=STAGE,
    )


def _pretrain_plan(config):
    """A step of flow matching: float32 parameters, gradients and moments."""
    cfg, section = setting.geometry(config), config.pretrain
    mesh = sharding.abstract_mesh(config.mesh)
    params = _placed(video_dit.axes(cfg), video_dit.abstract(cfg), mesh)
    rule = partial(init_state, optimizer=optim.optimizer(section))
    state = jax.eval_shape(rule, video_dit.abstract(cfg))
    return memory.Plan(
        params=params,
        opt=memory.sharded(state.opt, state_shardings(state, _shardings(params), mesh).opt),
        activations=activations(config, cfg, mesh, section.batch),
        batch=_rows(config, cfg, mesh, section.batch),
        mesh=mesh,
        stage="pretrain",
    )


def _placed(axes, shapes, mesh):
    return memory.sharded(shapes, sharding.shard_tree(axes, shapes, mesh))


def _shardings(shapes):
    return jax.tree.map(lambda x: x.sharding, shapes)


def _rows(config, cfg, mesh, n):
    """Latents and times of n videos."""
    number = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    grid = setting.grid_of(config)
    batch = {"latents": number(n, *sources.latent_shape(cfg, grid)), "t": number(n)}
    return memory.sharded(batch, sharding.batch_sharding(mesh, batch))


def activations(config: Any, cfg: Any, mesh: Any, rows: int, heads: int = 0) -> dict[str, Any]:
    """What a step keeps of `rows` videos: inputs of blocks (remat none: all of them), one block, attention.

    heads: of the mixture, whose three branches are computed for so many heads at once; 0 = no mixture. Scores of
    attention are not counted: the kernels of accelerators keep none.
    """
    grid = setting.grid_of(config)
    parts = sharding.row_parts(mesh) * mesh.shape["sequence"]
    tokens = -(-rows * grid.length // parts)
    dtype = jnp.dtype(cfg.dtype)
    shape = lambda *s: jax.ShapeDtypeStruct(s, dtype)
    block = shape(tokens, 8 * cfg.d + 2 * cfg.ffn)
    kept = {
        "block inputs": shape(cfg.layers, tokens, cfg.d),
        "blocks": [block] * (cfg.layers if cfg.remat == "none" else 1),
    }
    if heads:
        # heads of a device see all tokens: between the exchanges these are cut by heads, not by tokens
        some = min(heads, cfg.heads // mesh.shape["sequence"])
        seen = -(-rows * grid.length // sharding.row_parts(mesh))
        branches = 3 * (cfg.layers if cfg.remat == "none" else 1)
        kept["branches"] = [shape(4, seen, some, cfg.head_dim)] * branches
    return kept
