"""StepGRPO end to end: base stage, warm-up SFT, group-relative RL with step-wise rewards, evaluation.

    base       captions and text-only equations; stands in for pretraining where there is no checkpoint
    sft        warm-up on solutions in the literal format; ends at a validation accuracy, or at a step
    rl         per update: sample M completions a question, reward, normalise in the group, one AdamW step
               (arm "sft" instead goes on with SFT for as many updates: the control)
    evaluate   greedy answers of held-out questions, and the validity of samples, before and after

One run trains one arm; `jaxrepro.reproduce` compares arms from one warm-up (`init_from`).
"""

import importlib.util
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.distributed import first
from jaxrepro.methods.stepgrpo import evaluation, objective, report, rewards
from jaxrepro.methods.stepgrpo.presets import ARMS
from jaxrepro.methods.stepgrpo.programs import (
    PARTS,
    Setting,
    behaviour,
    examiner,
    place,
    policy_log_probs,
    prepare,
    rl_loss,
    rollout_temperature,
    sampler,
    sft_loss,
    start,
    training,
    validator,
)
from jaxrepro.methods.stepgrpo.task import geometry, lengths, patch_count, texts
from jaxrepro.models import qwen2_vl
from jaxrepro.rl.advantages import MODES, group_advantage, scored
from jaxrepro.rollout.generate import COLDEST, FINISH_LENGTH, HOTTEST
from jaxrepro.train import checkpoint, memory, optim
from jaxrepro.train.loop import Run
from jaxrepro.train.state import init_state, state_shardings

CONTROL = "sft"  # the arm that goes on with supervised training
advantages = jax.jit(group_advantage, static_argnames="mode")
FIRST = 10  # updates over which the share of zero-gradient groups is claimed


def run(
    config: Any, workdir: Any, *, resume: str = "auto", profile: str | None = None
) -> dict[str, float]:
    """Train one arm in `workdir`; returns what summary.json holds."""
    check(config)
    s = prepare(config)
    sharding.check_batches(s.mesh, **{f"{n}.batch": config[n].batch for n in ("base", "sft", "rl")})
    if s.behaviour.checker == "official" and not importlib.util.find_spec("math_verify"):
        print("math-verify is not installed: the official checker compares texts alone", flush=True)
    with Run(
        config,
        workdir,
        resume=resume,
        profile=profile,
        show=("loss", "validation_accuracy", "accuracy", "validity"),
    ) as run:
        if run.finished:
            return run.results
        for name in sources(config):
            s.task.examples(name)  # a broken file is found now, not after the warm-up
        held = evaluation.hold(s.task, "test", config.eval.n, config.eval.batch)
        params = warm_up(run, s)
        examine = examiner(s, held)
        before = run.once("before", lambda: examine(params, "before/test/"), of=config.eval.n)
        run.say(f"after warm-up: {report.line(before['rates'], 'before/test/')}")
        if not config.steps:
            return run.summary(before["rates"])
        params = (continue_sft if config.arm == CONTROL else reinforce)(run, s, params)
        after = examine(params, "after/test/")
        first(lambda: report.write(run, held.examples, before, after))
        results = before["rates"] | after["rates"]
        results |= first(lambda: report.first_updates(run.workdir, FIRST))
        results |= report.gains(before, after)
        run.summary(results)
        run.say(
            f"after {config.arm}: {report.line(results, 'after/test/')}; gain {report.gain(results)}"
        )
        return run.results


def check(config: Any) -> None:
    """UserError for settings that can't work, before anything is built."""
    for name, value, allowed in (
        ("arm", config.arm, (*ARMS, CONTROL)),
        ("rl.loss", config.rl.loss, objective.LOSSES),
        ("rl.advantage", config.rl.advantage, MODES),
    ):
        if value not in allowed:
            raise UserError(f"{name}={value!r} is not one of {', '.join(allowed)}")
    if config.data.path and (config.base.steps or config.data.corrupt):
        raise UserError(
            "base.steps and data.corrupt are for generated questions; with data.path add "
            "--config.base.steps=0 --config.data.corrupt=0"
        )
    if config.model.path and not config.data.path:
        raise UserError(
            "model.path is set without data.path: generated questions have their own vocabulary"
        )
    for stage in ("sft", "rl"):
        settings = config[stage]
        if unknown := sorted(set(settings.freeze) - set(PARTS)):
            raise UserError(f"{stage}.freeze={unknown} is not among {', '.join(PARTS)}")
        if len(set(settings.freeze)) == len(PARTS):
            raise UserError(f"{stage}.freeze={settings.freeze} leaves nothing to train; drop one")
        if settings.micro_batches < 1 or settings.batch % settings.micro_batches:
            raise UserError(
                f"{stage}.micro_batches={settings.micro_batches} does not divide "
                f"{stage}.batch={settings.batch}; use a divisor"
            )
    for group, names, least in (
        ("eval", ("n", "batch"), 1),
        ("base", ("batch",), 1),
        ("sft", ("batch",), 1),
        ("base", ("steps",), 0),
        ("sft", ("steps", "check_every"), 0),
        ("eval", ("every", "validation_n"), 0),
        ("data", ("min_pixels",), 1),
        ("data", ("max_pixels",), config.data.min_pixels),
    ):
        for name in names:
            if config[group][name] < least:
                raise UserError(f"{group}.{name}={config[group][name]}; use {least} or more")
    if "sft" in sources(config) and config.sft.stop_accuracy > 0 and not config.sft.check_every:
        raise UserError(
            f"sft.stop_accuracy={config.sft.stop_accuracy} with sft.check_every=0: nothing would be "
            "measured; set check_every, or stop_accuracy=0"
        )
    behaviour(config)
    if "validation" in sources(config) and config.eval.validation_n < 1:
        raise UserError(
            f"eval.validation_n={config.eval.validation_n}, but sft.stop_accuracy or eval.every wants "
            "a validation accuracy; use 1 or more, or set both to 0"
        )
    if not config.rl.max_grad_norm >= 0:
        raise UserError(f"rl.max_grad_norm={config.rl.max_grad_norm}; use 0 for no clipping")
    for stage in ("base", "sft", "rl"):
        total = config.steps if stage == "rl" else config[stage].steps
        optim.optimizer(config[stage], steps=max(total, 1))  # refuses an unknown schedule
    for name, value, low, high in (
        ("rl.alpha", config.rl.alpha, 0.0, math.inf),
        ("rl.beta", config.rl.beta, 0.0, math.inf),
        ("data.corrupt", config.data.corrupt, 0.0, 1.0),
        ("base.captions", config.base.captions, 0.0, 1.0),
        ("sft.stop_accuracy", config.sft.stop_accuracy, 0.0, 1.0),
    ):
        if not (low <= value <= high and math.isfinite(value)):
            raise UserError(f"{name}={value} is outside [{low:g}, {high:g}]")
    if config.rl.loss == "bnpo" and config.rl.micro_batches > 1:
        raise UserError(
            f"rl.loss=bnpo with rl.micro_batches={config.rl.micro_batches}: its mean is over a local "
            "batch and depends on the split; use 1"
        )
    if config.rl.samples < 2:
        raise UserError(f"rl.samples={config.rl.samples}; a group needs at least 2 to compare")
    if config.steps < 0 or config.rl.batch < 1:
        raise UserError(
            f"steps={config.steps} and rl.batch={config.rl.batch}; steps >= 0 and batch >= 1"
        )
    if not COLDEST <= config.rl.temperature <= HOTTEST:
        raise UserError(
            f"rl.temperature={config.rl.temperature}; sampling needs one from {COLDEST} to {HOTTEST}"
        )


def sources(config: Any) -> list[str]:
    """The stages and splits whose examples a run needs."""
    warm = [] if config.init_from else [n for n in ("base", "sft") if config[n].steps]
    last = ["more" if config.arm == CONTROL else "rl"] if config.steps else []
    measured = "sft" in warm and config.sft.stop_accuracy > 0 and config.sft.check_every
    measured = measured or ("rl" in last and config.eval.every)
    return [*warm, *last, *["validation"] * bool(measured), "test"]


# --- supervised stages -------------------------------------------------------------------------


def warm_up(run: Run, s: Setting) -> Any:
    """Parameters after base stage and warm-up SFT, or those of `init_from`."""
    config = s.config
    if config.init_from:
        return checkpoint.load(
            config.init_from, qwen2_vl.abstract(s.task.cfg), stage="sft", shardings=s.shardings
        )
    fresh = lambda: initial(s)
    if config.base.steps:
        params = supervise(run, s, "base", config.base, config.base.steps, fresh)
        fresh = lambda: params
    if not config.sft.steps:  # the model that is given needs no warm-up
        return fresh()
    return supervise(
        run, s, "sft", config.sft, config.sft.steps, fresh, stop_at=config.sft.stop_accuracy
    )


def continue_sft(run: Run, s: Setting, params: Any) -> Any:
    """The control: as many SFT updates on fresh examples, with a fresh optimiser as RL has."""
    return supervise(run, s, "more", s.config.sft, s.config.steps, lambda: params)


def initial(s: Setting) -> Any:
    """Random parameters, or those of `model.path`."""
    if s.config.model.path:
        from jaxrepro.data import locate
        from jaxrepro.models import hf

        return hf.load(locate.model(s.config.model.path), s.task.cfg, shardings=s.shardings)
    draw = jax.jit(partial(qwen2_vl.init, cfg=s.task.cfg), out_shardings=s.shardings)
    return draw(jax.random.key(s.config.seed))


def supervise(
    run: Run,
    s: Setting,
    stage: str,
    settings: Any,
    total: int,
    params: Any,
    *,
    stop_at: float = 0.0,
) -> Any:
    """SFT of one stage; `params()` gives its start. Ends at the first validation accuracy >= stop_at > 0."""
    state, step = start(run, s, stage, settings, total, params, sft_loss)
    data = s.task.batches(stage, settings.batch, seed=s.config.seed, solutions=True)
    every = settings.get("check_every", 0) if stop_at else 0
    validate = validator(s) if every else None
    for i in run.steps(state, total):
        batch = data[i]
        state, metrics = step(state, place(s, batch.arrays))
        if validate and (i + 1) % every == 0:
            metrics["validation_accuracy"] = validate(state.params)
        ready = stop_at > 0 and metrics.get("validation_accuracy", 0.0) >= stop_at
        run.log(i, metrics, ids=batch.ids)
        run.save(i, state, final=ready)
        if ready:
            break
    else:
        if stop_at > 0 and int(state.step) == total:
            run.say(f"{stage}: {total} steps without a validation accuracy of {stop_at}")
    return state.params


# --- reinforcement -----------------------------------------------------------------------------


def reinforce(run: Run, s: Setting, params: Any) -> Any:
    """StepGRPO, or one of its reward arms: one AdamW step per batch of rollouts, frozen reference."""
    config, rl = s.config, s.config.rl
    reference = jax.tree.map(jnp.copy, params)  # the stage's state gives its buffers away
    state, step = start(run, s, "rl", rl, config.steps, lambda: params, rl_loss)
    sample = sampler(s, n=rl.samples, temperature=rollout_temperature(s))
    log_probs = sharding.on_mesh(s.mesh, jax.jit(partial(policy_log_probs, s=s)))
    pay = dict(alpha=rl.alpha, gate=s.behaviour.gate, arm=config.arm)
    data = s.task.batches("rl", rl.batch, seed=config.seed, solutions=False)
    validate = validator(s) if config.eval.every else None
    for i in run.steps(state, config.steps):
        batch = data[i]
        ids = np.arange(i * rl.batch, (i + 1) * rl.batch, dtype=np.int32)
        drawn = sample(state.params, batch.arrays, ids, run.key(i))
        tokens, length, finish = sharding.fetch((drawn.tokens, drawn.length, drawn.finish))
        examples = [e for e in batch.examples for _ in range(rl.samples)]
        parts = evaluation.score(examples, texts(s.task.tokenizer, tokens, length), s.behaviour)
        paid = [rewards.components(p, **pay) for p in parts]
        advantage, metrics = compare(paid, rl)
        rows = place(s, batch.arrays) | {"tokens": drawn.tokens, "length": drawn.length}
        rows["lp_sampler"] = (
            drawn.lp_sampler if s.behaviour.loss_temperature == "match" else drawn.lp_raw
        )
        rows["advantage"] = advantage
        rows["ref_lp"] = log_probs(reference, rows)
        state, measured = step(state, rows)
        metrics |= rewards.summarise(parts, **pay) | measured
        metrics["truncated"] = float(np.mean(finish == FINISH_LENGTH))
        if validate and (i + 1) % config.eval.every == 0:
            metrics["validation_accuracy"] = validate(state.params)
        run.log(i, metrics, ids=batch.ids)
        run.save(i, state)
    return state.params


def compare(paid: list[Any], rl: Any) -> tuple[jax.Array, dict[str, Any]]:
    """Advantages (b, n) of flat (r_acc, r_val) pairs, and the share of groups without a gradient."""
    n = rl.samples
    flat = [None if p is None else sum(p) for p in paid]
    reward, known = scored([flat[j : j + n] for j in range(0, len(flat), n)])
    if rl.advantage == "gdpo":
        both = np.array([p or (0.0, 0.0) for p in paid], np.float32)
        reward = both.reshape(*reward.shape, 2)
    found = advantages(reward, known, mode=rl.advantage)
    return found.value, {"zero_std": found.frac_zero_std}


# --- after training, and before it ---------------------------------------------------------------


def trained(config: Any, workdir: Any) -> tuple[Setting, Any]:
    """The setting and the last parameters of a run."""
    s = prepare(config)
    saved = checkpoint.stages_in(Path(workdir))
    stage = next((name for name in ("rl", "more", "sft", "base") if name in saved), None)
    target = qwen2_vl.abstract(s.task.cfg)
    return s, checkpoint.load(workdir, target, stage=stage, shardings=s.shardings)


def evaluate(
    config: Any, workdir: Any, *, split: str = "test", n: int | None = None
) -> dict[str, float]:
    """Rates of a trained run on a split."""
    s, params = trained(config, workdir)
    held = evaluation.hold(s.task, split, n or config.eval.n, config.eval.batch)
    return examiner(s, held)(params, f"{split}/")["rates"]


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
    """Answers of a trained run to a question about an image; without a prompt, to n test questions."""
    s, params = trained(config, workdir)
    if temperature is None:  # several answers to one question must be able to differ
        temperature = rollout_temperature(s) if n > 1 and prompt is not None else 0.0
    if prompt is None:
        if image is not None:
            raise UserError("--image needs --prompt: the question about it")
        examples, count = s.task.split("test", n), 1
    else:
        examples, count = [{"id": "prompt", "image": image, "problem": prompt}], n
    draw = sampler(s, n=count, temperature=temperature)
    out = draw(
        params, s.task.encoder.prompts(examples), np.arange(len(examples)), jax.random.key(seed)
    )
    found = texts(s.task.tokenizer, *sharding.fetch((out.tokens, out.length)))
    if prompt is None:
        right = [rewards.answer(e["solution"]) or e["solution"] for e in examples]
        return [
            f"question: {e['problem']} (answer: {a})\n\n{text}"
            for e, a, text in zip(examples, right, found)
        ]
    return found


def export(config: Any, workdir: Any) -> tuple[Any, Any, Any]:
    """Parameters and config of a trained run, and its tokenizer: the base model's folder, or its own."""
    s, params = trained(config, workdir)
    if not config.model.path:
        return params, s.task.cfg, s.task.tokenizer
    from jaxrepro.data import locate

    return params, s.task.cfg, locate.model(config.model.path)


def plan(config: Any) -> memory.Plan:
    """Shapes of the stage that needs the most memory, for --dry_run; touches no file, network or device."""
    check(config)
    cfg, mesh = geometry(config), sharding.abstract_mesh(config.mesh)
    needed = [
        n for n in ("sft", "rl") if n in sources(config)
    ]  # the base stage is smaller than sft
    return memory.largest(*(_plan(config, cfg, mesh, stage) for stage in needed or ["sft"]))


def _plan(config: Any, cfg: Any, mesh: Any, stage: str) -> memory.Plan:
    settings = config[stage]
    abstract = qwen2_vl.abstract(cfg)
    shardings = sharding.shard_tree(qwen2_vl.axes(cfg), abstract, mesh)
    params = memory.sharded(abstract, shardings)
    total = config.steps if stage == "rl" else settings.steps
    optimizer, trainable = training(cfg, settings, max(total, 1))
    state = jax.eval_shape(partial(init_state, optimizer=optimizer, trainable=trainable), abstract)
    opt = memory.sharded(state.opt, state_shardings(state, shardings, mesh).opt)
    prompt, completion = lengths(config)
    patches, parts = patch_count(config), sharding.row_parts(mesh)
    batch = _batch_shapes(config, cfg, stage)
    samples = config.rl.samples if stage == "rl" else 1
    questions = -(-settings.batch // settings.micro_batches)
    rows, tokens = questions * samples, prompt + completion
    cache = None
    if stage == "rl":
        cache = {
            "prompts": memory.kv_cache(cfg.text, -(-settings.batch // parts), prompt),
            "samples": memory.kv_cache(cfg.text, -(-settings.batch * samples // parts), completion),
        }
    return memory.Plan(
        params=params,
        opt=opt,
        trainable=trainable,
        reference=params if stage == "rl" else None,
        cache=cache,
        activations={
            "decoder": memory.decoder_activations(cfg.text, rows, tokens, parts=parts),
            "vision": memory.vision_activations(cfg.vision, questions, patches, parts=parts),
        },
        logits=memory.logits_chunk(cfg.text.vocab, parts=mesh.shape["tensor"]),
        batch=memory.sharded(batch, sharding.batch_sharding(mesh, batch)),
        mesh=mesh,
        stage=stage,
    )


def _batch_shapes(config: Any, cfg: Any, stage: str) -> dict[str, jax.ShapeDtypeStruct]:
    """What the encoder and the rollouts put on the devices for one update."""
    shape = lambda *dims, dtype=jnp.int32: jax.ShapeDtypeStruct(dims, dtype)
    prompt, completion = lengths(config)
    b, n = config[stage].batch, config.rl.samples
    patches = shape(b, patch_count(config), cfg.vision.columns, dtype=jnp.float32)
    if stage == "sft":
        length = prompt + completion
        rows = {"tokens": shape(b, length), "position": shape(b, 3, length)}
        return rows | {"vision/patches": patches}
    return {
        "prompts/tokens": shape(b, prompt),
        "prompts/position": shape(b, 3, prompt),
        "vision/patches": patches,
        "tokens": shape(b, n, completion),
        "advantage": shape(b, n, dtype=jnp.float32),
    }
