"""Supervised Optimism Correction end to end: fine-tune with or without L_V, then answer with several decoders.

    sft        `steps` updates of the loss of `soc.variant` with weight `soc.lam`; lam = 0 is plain SFT
    evaluate   every decoder of `decode` on every test set, zero-shot and few-shot

One run trains one arm; `jaxrepro.reproduce` compares arms. With steps = 0 the base model is evaluated.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.data import batches
from jaxrepro.data.questions import GENERATORS
from jaxrepro.distributed import first
from jaxrepro.methods.soc import decoding, evaluation, objective, task
from jaxrepro.methods.soc.objective import Stats
from jaxrepro.methods.soc.task import FewShot, Task
from jaxrepro.models import transformer
from jaxrepro.models.scoring import scored_positions
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.ops.logprob import shift, token_stats
from jaxrepro.train import memory, policy
from jaxrepro.train.loop import Run
from jaxrepro.train.policy import Policy

STAGE = "sft"
CURVES = ("lp", "lse", "mean_logit", "entropy", "max_prob", "top1", "absmax")
NAMES = {"lse": "v", "top1": "token_accuracy", "absmax": "logit_absmax"}  # of curves


class Setting(NamedTuple):
    """What the parts of a run share."""

    config: Any
    policy: Policy
    encoder: FewShot  # without shots
    task: Task
    vocab: int  # columns of the logits that are tokens


def run(
    config: Any, workdir: Any, *, resume: str = "auto", profile: str | None = None
) -> dict[str, float]:
    """Train one arm in `workdir` and evaluate it; returns what summary.json holds."""
    check(config)
    mesh = sharding.abstract_mesh(config.mesh, devices=jax.device_count())
    sharding.check_batches(mesh, **{"sft.batch": config.sft.batch})
    s = prepare(config)  # what is refused leaves no workdir behind
    policy.within(s.policy, config.data.max_tokens, "data.max_tokens")
    with Run(config, workdir, resume=resume, profile=profile, show=("loss", "ce", "v")) as run:
        if run.finished:
            return run.results
        params = train(run, s) if config.steps else policy.initial(s.policy, config)
        found = [examine(run, s, params, name) for name in s.task.tests]
        results = {k: v for rates, _ in found for k, v in rates.items()}
        results["train/left_out"] = float(s.task.left_out)
        first(lambda: evaluation.write(run, s.task, [items for _, items in found]))
        run.summary(results)
        return run.results


def check(config: Any) -> None:
    """UserError for settings that can't work, before anything is read."""
    data, soc = config.data, config.soc
    policy.check(config)
    policy.check_rows(config, {"sft": config.steps})
    objective.check(**hyper(soc), allow_degenerate=soc.allow_degenerate)
    decoding.check(config.decode)
    if soc.normalise not in objective.NORMALISE:
        raise UserError(
            f"soc.normalise={soc.normalise!r} is not one of {', '.join(objective.NORMALISE)}"
        )
    if not 0 < soc.corrupt <= 1:
        raise UserError(f"soc.corrupt={soc.corrupt} is no share of tokens; use one in (0, 1]")
    known = (task.ADDITION, *(g for g in GENERATORS if g != "chains"))
    if data.generator not in known:
        raise UserError(f"data.generator={data.generator!r} is not one of {', '.join(known)}")
    if data.format not in task.FORMATS:
        raise UserError(f"data.format={data.format!r} is not one of {', '.join(task.FORMATS)}")
    adds = not data.path and data.generator == task.ADDITION
    if adds and config.model.path:
        raise UserError(
            f"model.path={config.model.path}: sums are learnt from scratch, in a vocabulary of their own; "
            "set data.generator=gsm_symbolic or data.path, or no model.path"
        )
    if adds and not config.model.shape.startswith("tiny"):
        raise UserError(f"model.shape={config.model.shape!r}: sums are learnt by tiny_2 or tiny")
    if not adds and not config.model.path:
        raise UserError(
            "model.path is needed (a folder, a .gguf file, a hub name, smollm2): only sums are learnt "
            "from scratch"
        )
    if adds and any(config.eval.shots):
        raise UserError(f"eval.shots={config.eval.shots}: sums are asked without examples; use 0")
    if not config.eval.shots or min(config.eval.shots) < 0:
        raise UserError(f"eval.shots={config.eval.shots}; numbers of worked examples, such as 0,4")


def hyper(soc: Any) -> dict[str, Any]:
    """The keyword arguments of `objective.per_token`."""
    return {k: soc[k] for k in ("lam", "variant", "z_loss", "label_smoothing")}


def prepare(config: Any) -> Setting:
    """The policy and the task; reads no weights."""
    model = policy.open_policy(config, pieces=task.pieces())
    data = config.data
    encoder = FewShot(model.tokenizer, data.max_tokens, data.max_completion, system=data.system)
    found = task.load(config, encoder)
    return Setting(config, model, encoder, found, model.tokenizer.used)


# Training --------------------------------------------------------------------------------------


def loss(
    params: Any,
    batch: Any,
    *,
    cfg: TransformerConfig,
    vocab: int,
    responses: int,
    lam: float,
    variant: str = "soc",
    normalise: str = "token",
    loss_on_prompt: bool = False,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Any:
    """(loss_sum, weight_sum, aux) of rows of tokens; with lam = 0 exactly `train.sft`'s.

    batch: {"tokens": Tokens} and, for the contrastive variant, "corrupted" (b, t). responses: a bound on
    the response tokens of a row.
    """
    tokens = batch["tokens"]
    if loss_on_prompt:
        tokens = tokens._replace(response=tokens.segment > 0)
        responses = tokens.tokens.shape[1]
    targets, mask = shift(tokens.tokens, tokens.response, tokens.segment)
    head = transformer.head(params, cfg)

    def states(ids: Any) -> Any:
        x = transformer.embed(params, cfg, ids)
        where = dict(position=tokens.position, segment=tokens.segment)
        hidden, _ = transformer.apply(params, cfg, x, **where)
        return scored_positions(hidden, targets, mask, responses=responses, cfg=cfg)

    hidden, y, m = states(tokens.tokens)
    read = partial(token_stats, vocab=vocab)
    needed = objective.needs(variant, lam, z_loss, label_smoothing)
    if needed == {"lp"}:
        # The likelihood alone pushes a padded column down by itself, and plain SFT leaves it in.
        graded = token_stats(hidden, head, y, ("lp",))
        seen = read(*jax.lax.stop_gradient((hidden, head)), y, CURVES)
    else:
        graded = seen = read(hidden, head, y, CURVES)
    s = Stats(**{k: graded[k] for k in Stats._fields if k in graded})
    if "lse_corrupted" in needed:
        s = s._replace(lse_corrupted=read(states(batch["corrupted"])[0], head, y, ("lse",))["lse"])
    per_token = objective.per_token(
        s, lam=lam, variant=variant, z_loss=z_loss, label_smoothing=label_smoothing
    )
    total, weight = objective.aggregate(per_token, m, normalise=normalise)
    count = m.sum().astype(jnp.float32)
    aux = {NAMES.get(k, k): (jnp.sum(a, where=m), count) for k, a in seen.items()}
    added, _ = aux.pop("lp")
    return total, weight, aux | {"ce": (-added, count)}


def train(run: Run, s: Setting) -> Any:
    """Parameters after `steps` updates."""
    config, soc = s.config, s.config.soc
    fn = partial(
        loss,
        cfg=s.policy.cfg,
        vocab=s.vocab,
        responses=config.data.max_completion,
        normalise=soc.normalise,
        loss_on_prompt=soc.loss_on_prompt,
        **hyper(soc),
    )
    state, step = policy.begin(
        run, s.policy, config, config.sft, fn, steps=config.steps, stage=STAGE
    )
    data = batches.dataset(s.task.train, s.encoder.sft, batch=config.sft.batch, seed=config.seed)
    for i in run.steps(state, config.steps):
        batch = data[i]
        arrays = batch.arrays
        supervised(arrays["tokens"], batch.ids)
        if "lse_corrupted" in objective.needs(soc.variant, soc.lam):
            arrays = arrays | {"corrupted": corrupt(s, arrays["tokens"], i)}
        state, metrics = step(state, policy.place(s.policy, arrays))
        run.log(i, metrics, ids=batch.ids)
        run.save(i, state)
    return state.params


def supervised(tokens: Any, ids: Any) -> None:
    """UserError where a row has no token that is learnt."""
    empty = ~(np.asarray(tokens.response) & (np.asarray(tokens.segment) > 0)).any(axis=1)
    if empty.any():
        raise UserError(
            f"no supervised tokens in example {ids[int(empty.argmax())]}: its response is empty or "
            "was cut off; leave it out"
        )


def corrupt(s: Setting, tokens: Any, i: int) -> np.ndarray:
    """The rows of step i with a share `soc.corrupt` of their response tokens drawn at random.

    States before the first such token stay as they are: there V - V' is 0, so that one mask serves both.
    """
    rng = np.random.default_rng([s.config.seed, i])
    shape = tokens.tokens.shape
    noise = rng.integers(0, s.vocab, shape, dtype=np.int32)
    chosen = rng.random(shape) < s.config.soc.corrupt
    return np.where(tokens.response & chosen, noise, tokens.tokens)


# Answers ---------------------------------------------------------------------------------------


def examine(run: Run, s: Setting, params: Any, name: str) -> tuple[dict[str, float], dict]:
    """Metrics of a test set, and per item what evaluation.write files; each line is printed."""
    rates: dict[str, float] = {}
    items: dict[str, Any] = {}
    for shots in s.config.eval.shots:
        prefix = f"{name}_{shots}shot" if shots else name
        found = exam(s, name, shots)(params, prefix, say=run.say)
        rates |= found.rates
        items |= found.items
    return rates, items


def exam(s: Setting, name: str, shots: int = 0, examples: list[Any] | None = None) -> Any:
    """`(params, prefix) -> evaluation.Found` of a test set (or of other examples)."""
    encoder = task.few_shot(s.encoder, s.task.train, shots)
    asked = s.task.tests[name] if examples is None else examples
    return partial(
        evaluation.examine,
        s.policy,
        encoder,
        s.task,
        asked,
        s.config.decode,
        batch=s.config.eval.batch,
        vocab=s.vocab,
        seed=s.config.seed,
    )


# After training, and before it -------------------------------------------------------------------


def trained(config: Any, workdir: Any) -> tuple[Setting, Any]:
    """The setting and the last parameters of a run; of a run without steps, those it began with."""
    s = prepare(config)
    if not config.steps:
        return s, policy.initial(s.policy, config)
    return s, policy.trained(s.policy, workdir, STAGE)


def evaluate(
    config: Any, workdir: Any, *, split: str = task.HELD_OUT, n: int | None = None
) -> dict[str, float]:
    """Metrics of a trained run on one of its test sets, or on its training items ("train")."""
    if n is not None:
        with config.unlocked():
            config.eval.n = n
    s, params = trained(config, workdir)
    examples = None
    if split == "train":
        examples = s.task.train[: config.eval.n]
    elif split not in s.task.tests:
        raise UserError(f"split {split!r} is not one of {', '.join(s.task.tests)}, train")
    rates: dict[str, float] = {}
    for shots in config.eval.shots:
        prefix = f"{split}_{shots}shot" if shots else split
        rates |= exam(s, split, shots, examples)(params, prefix).rates
    return rates


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
    """Answers of a trained run: the n best of the headline beam, or samples where a temperature is given.

    Without a prompt the best answer to each of n test questions.
    """
    if image is not None:
        raise UserError("--image: this run trained a text model; leave it out")
    s, params = trained(config, workdir)
    asked = [{"id": "prompt", "problem": prompt}]
    each = n
    if prompt is None:
        asked, each = next(iter(s.task.tests.values()))[:n], 1
    if temperature is None:
        head = decoding.headline(config.decode)
        head = head._replace(width=max(head.width, each))
        best = decoding.searcher(
            s.policy, s.encoder, head, batch=config.eval.batch, vocab=s.vocab, returned=each
        )
        texts = [a.text for answers in best(params, asked) for a in answers]
    else:
        draw = policy.sampler(
            s.policy, s.encoder, batch=config.eval.batch, n=each, temperature=temperature
        )
        texts = [text for text, _ in draw(params, asked, jax.random.key(seed))]
    if prompt is not None:
        return texts
    return [f"question: {e['problem']}\n\n{text}" for e, text in zip(asked, texts)]


def export(config: Any, workdir: Any) -> tuple[Any, TransformerConfig, Any]:
    """Parameters and config of a trained run, and its tokenizer."""
    s, params = trained(config, workdir)
    return params, s.policy.cfg, policy.exported(s.policy)


def plan(config: Any) -> memory.Plan:
    """Shapes of a training step, for --dry_run; touches no file, network or device."""
    check(config)
    cfg = policy.geometry(config, task.pieces())
    k = 1 + ("lse_corrupted" in objective.needs(config.soc.variant, config.soc.lam))
    return policy.plan(config, cfg, config.sft, rows=config.sft.batch, stage=STAGE, k=k)
