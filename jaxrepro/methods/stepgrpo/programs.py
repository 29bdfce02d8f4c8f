"""The compiled functions of a StepGRPO run: losses, rollouts, examination; and where its arrays lie."""

import importlib.util
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.methods.stepgrpo import evaluation, objective, rewards
from jaxrepro.methods.stepgrpo.task import Task, build
from jaxrepro.models import qwen2_vl
from jaxrepro.models.qwen2_vl import Qwen2VLConfig
from jaxrepro.models.scoring import completion_log_probs, nll
from jaxrepro.rl import masks
from jaxrepro.rollout.generate import Prompts, Samples, Sampling, generate
from jaxrepro.train import optim
from jaxrepro.train.loop import Run
from jaxrepro.train.state import State, init_state, state_shardings
from jaxrepro.train.step import compile_step, make_step

PARTS = ("lm", "merger", "vision")  # what can be frozen


class Setting(NamedTuple):
    """What every stage shares."""

    config: Any
    task: Task
    behaviour: rewards.Behaviour
    mesh: Any
    shardings: Any  # of the parameters


def behaviour(config: Any) -> rewards.Behaviour:
    """Reward behaviour of a config; UserError where its checker needs a package that is missing."""
    found = rewards.Behaviour.preset(config.preset, **config.behaviour.to_dict())
    if found.checker == "math_verify" and not importlib.util.find_spec("math_verify"):
        raise UserError(
            "behaviour.checker=math_verify needs that package; pip install math-verify, or take rules"
        )
    return found


def prepare(config: Any) -> Setting:
    """Task, reward behaviour, mesh and where the parameters lie."""
    mesh = sharding.make_mesh(config.mesh)
    task = build(config)
    abstract = qwen2_vl.abstract(task.cfg)
    return Setting(
        config,
        task,
        behaviour(config),
        mesh,
        sharding.shard_tree(qwen2_vl.axes(task.cfg), abstract, mesh),
    )


def sft_loss(params: Any, batch: Any, *, s: Setting) -> Any:
    """Summed negative log-likelihood of the assistant's tokens, their number."""
    cfg, tokens = s.task.cfg, batch["tokens"]
    x = qwen2_vl.embed(params, cfg, tokens.tokens, batch["vision"])
    longest = s.task.encoder.max_completion
    return *nll(params["text"], cfg.text, x, tokens, responses=longest), {}


def policy_log_probs(params: Any, rows: Any, *, s: Setting, entropy: bool = False) -> Any:
    """lp (b, n, t) of the sampled tokens at the temperature of the loss [, entropy]."""
    cfg, prompts = s.task.cfg, rows["prompts"]
    x = qwen2_vl.embed(params, cfg, prompts.tokens, rows["vision"])
    return completion_log_probs(
        params["text"],
        cfg.text,
        x,
        prompts.position,
        prompts.segment,
        prompts.next_position,
        rows["tokens"],
        rows["length"],
        temperature=rollout_temperature(s) if s.behaviour.loss_temperature == "match" else 1.0,
        entropy=entropy,
    )


def rl_loss(params: Any, rows: Any, *, s: Setting) -> Any:
    """objective.loss of a batch of rollouts."""
    rl = s.config.rl
    lp, entropy = policy_log_probs(params, rows, s=s, entropy=True)
    return objective.loss(
        lp,
        rows["ref_lp"],
        rows["advantage"],
        masks.from_length(rows["length"], lp.shape[-1]),
        beta=rl.beta,
        max_length=lp.shape[-1],
        lp_sampler=rows["lp_sampler"],
        entropy=entropy,
        **objective.LOSSES[rl.loss],
    )


def start(
    run: Run, s: Setting, stage: str, settings: Any, total: int, params: Any, loss: Any
) -> tuple[State, Any]:
    """The stage's state, resumed or begun with `params()`, and its compiled step."""
    optimizer, trainable = training(s.task.cfg, settings, total)
    begin = partial(init_state, optimizer=optimizer, trainable=trainable)
    abstract = jax.eval_shape(begin, qwen2_vl.abstract(s.task.cfg))
    shardings = state_shardings(abstract, s.shardings, s.mesh)
    state = run.restore(
        lambda: begin(params()), stage=stage, shardings=shardings, abstract=abstract, jit=False
    )
    step = make_step(
        partial(loss, s=s),
        optimizer,
        micro_batches=settings.get("micro_batches", 1),
        max_grad_norm=settings.get("max_grad_norm", 1.0),
        trainable=trainable,
        shardings=s.shardings if s.mesh.size > 1 else None,
    )
    return state, compile_step(step, shardings)


def training(cfg: Qwen2VLConfig, settings: Any, total: int) -> tuple[optim.Scheduled, Any]:
    """Optimiser of a stage, and the tree of bools that says what it trains."""
    frozen = settings.get("freeze", ())
    trainable = qwen2_vl.trainable(qwen2_vl.abstract(cfg), [p for p in PARTS if p not in frozen])
    return optim.optimizer(settings, steps=total), trainable


def place(s: Setting, arrays: Any) -> Any:
    """A host batch on the mesh: rows over (data, fsdp)."""
    return sharding.place(arrays, sharding.batch_sharding(s.mesh, arrays))


def rollout_temperature(s: Setting) -> float:
    """Of the rollouts: the preset's where its script ignores the config, else the config's."""
    fixed = s.behaviour.temperature
    return s.config.rl.temperature if fixed is None else fixed


def sampler(s: Setting, *, n: int, temperature: float, max_new: int | None = None) -> Any:
    """Compiled `(params, batch, request_ids, key) -> Samples`, n completions a prompt."""
    cfg = s.task.cfg
    top_k = s.behaviour.top_k if temperature else 0
    settings = Sampling(
        max_new=max_new or s.task.encoder.max_completion,
        eos=(cfg.eos,),
        pad=cfg.pad,
        temperature=temperature,
        top_k=top_k or 0,
    )

    @partial(sharding.on_mesh, s.mesh)
    @jax.jit
    def draw(params: Any, batch: Any, ids: Any, key: Any) -> Samples:
        rows = batch["prompts"]
        x = qwen2_vl.embed(params, cfg, rows.tokens, batch["vision"])
        prompts = Prompts(x, rows.position, rows.segment, rows.next_position)
        return generate(
            params["text"], cfg.text, prompts, request_ids=ids, key=key, sampling=settings, n=n
        )

    def call(params: Any, batch: Any, ids: Any, key: Any) -> Samples:
        rows = len(ids)
        short = -rows % sharding.row_parts(s.mesh)
        if short:  # devices take whole rows: the last one again, and not returned
            again = lambda x: np.concatenate([x, np.repeat(x[-1:], short, axis=0)])
            batch, ids = jax.tree.map(again, batch), again(ids)
        drawn = draw(params, place(s, batch), ids, key)
        return jax.tree.map(lambda x: x[:rows], drawn) if short else drawn

    return call


def examiner(s: Setting, held: evaluation.Held) -> Any:
    """`(params, prefix) -> {"rates", "texts", "correct"}`: greedy answers, and validity of T = 1 samples."""
    exam = partial(sampler, s, n=1, max_new=s.task.exam_encoder.max_completion)
    greedy, drawn = exam(temperature=0.0), exam(temperature=1.0)

    def examine(params: Any, prefix: str) -> dict[str, Any]:
        key = jax.random.key(0)  # the same for every arm and moment: a paired comparison
        texts = evaluation.answers(greedy, params, s.task, held, key)
        parts = evaluation.score(held.examples, texts, s.behaviour)
        for part, example, text in zip(parts, held.examples, texts):
            part["benchmark_accuracy"] = evaluation.benchmark_accuracy(
                example, text, yes_no=bool(s.config.eval.yes_no)
            )
        samples = evaluation.answers(drawn, params, s.task, held, key)
        rates = evaluation.rates(parts, prefix)
        sampled = evaluation.rates(
            evaluation.score(held.examples, samples, s.behaviour), prefix + "sampled_"
        )
        return {"rates": rates | sampled, "texts": texts, "correct": [p["accuracy"] for p in parts]}

    return examine


def validator(s: Setting) -> Any:
    """`params -> greedy accuracy` on the validation questions, which no claim is measured on."""
    held = evaluation.hold(s.task, "validation", s.config.eval.validation_n, s.config.eval.batch)
    greedy = sampler(s, n=1, temperature=0.0, max_new=s.task.exam_encoder.max_completion)

    def accuracy(params: Any) -> float:
        completions = evaluation.answers(greedy, params, s.task, held, jax.random.key(0))
        parts = evaluation.score(held.examples, completions, s.behaviour)
        return float(np.mean([p["accuracy"] or 0.0 for p in parts]))

    return accuracy
