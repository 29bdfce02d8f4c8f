"""Supervised fine-tuning of a decoder on questions with worked answers: a run, and substrate.

    loss = - sum over response tokens of log pi(y_t | x, y_<t) / their number

The loss counts the tokens of the answer and its end of turn, over the whole batch, never a mean of rows'
means. It is `models.scoring.nll` in `train.step`: the step that methods use to warm up, and what remains of a
method whose auxiliary loss has weight 0. Held-out questions are answered greedily before and after; a
pair of answers to one question is one item of the bootstrap.

No paper stands behind this run: no equation beyond the likelihood, nothing to depart from.
"""

from functools import partial
from typing import Any, NamedTuple

import jax

from jaxrepro import distributed, sharding
from jaxrepro.config import UserError
from jaxrepro.data import batches, questions
from jaxrepro.data.questions import Encoder, Questions
from jaxrepro.models import transformer
from jaxrepro.models.scoring import nll
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.train import memory, policy, quiz
from jaxrepro.train.loop import Run
from jaxrepro.train.policy import Policy

STAGE = "sft"
TRIED = 256  # generated items whose length is looked at before anything runs


class Setting(NamedTuple):
    """What the parts of a run share."""

    config: Any
    policy: Policy
    encoder: Encoder
    questions: Questions


def run(
    config: Any, workdir: Any, *, resume: str = "auto", profile: str | None = None
) -> dict[str, float]:
    """Fine-tune in `workdir`, answer held-out questions before and after; what summary.json holds."""
    check(config)
    mesh = sharding.abstract_mesh(config.mesh, devices=jax.device_count())
    sharding.check_batches(mesh, **{"sft.batch": config.sft.batch})
    s = prepare(config)  # what is refused leaves no workdir behind
    policy.within(s.policy, config.data.max_tokens, "data.max_tokens")
    if isinstance(s.questions.train, batches.Generated):  # has no end that could be filtered
        s.encoder.sft([s.questions.train[i] for i in range(TRIED)])
    with Run(config, workdir, resume=resume, profile=profile) as run:
        if run.finished:
            return run.results
        examine = examiner(s, s.questions.test)
        # Measured from the start itself: after a resume the state is another one.
        before = run.once(
            "before",
            lambda: examine(policy.initial(s.policy, config), "before/test/"),
            of=config.eval.n,
        )
        run.say(f"before: {quiz.line(before['rates'], 'before/test/')}")
        if not config.steps:
            return run.summary(before["rates"])
        params = train(run, s)
        after = examine(params, "after/test/")
        results = before["rates"] | after["rates"] | quiz.gain(before, after)
        distributed.first(lambda: quiz.write(run, s.questions.test, before, after))
        run.summary(results)
        run.say(f"after: {quiz.line(results, 'after/test/')}")
        run.say(quiz.verdict(results))
        return run.results


def check(config: Any) -> None:
    """UserError for settings that can't work, before anything is read."""
    data = config.data
    policy.check(config)
    policy.check_rows(config, {"sft": config.steps})
    if not config.model.path and (config.model.shape != "tiny" or data.path or data.generator != "chains"):  # fmt: skip
        raise UserError(
            "model.path is needed (a folder, a .gguf file, a hub name, smollm2): only the shape tiny "
            "on generated chains is trained from scratch"
        )


def prepare(config: Any) -> Setting:
    """The policy, and questions that fit; reads no weights."""
    model = policy.open_policy(config, pieces=questions.chain_pieces())
    data = config.data
    encoder = Encoder(model.tokenizer, data.max_tokens, data.max_completion, system=data.system)
    found = questions.load(
        path=data.path,
        subset=data.subset,
        generator=data.generator,
        n=data.n,
        test=2 * config.eval.n,  # some are too long
        seed=config.seed,
    )
    train = found.train
    if not isinstance(train, batches.Generated):
        train = encoder.fitting(train, "training")
    test = encoder.fitting(found.test, "test")[: config.eval.n]
    return Setting(config, model, encoder, Questions(train, test))


# Training --------------------------------------------------------------------------------------


def loss(params: Any, batch: Any, *, cfg: TransformerConfig, responses: int) -> Any:
    """Summed negative log-likelihood of the response tokens (nats), and their number."""
    tokens = batch["tokens"]
    x = transformer.embed(params, cfg, tokens.tokens)
    return *nll(params, cfg, x, tokens, responses=responses), {}


def train(run: Run, s: Setting) -> Any:
    """Parameters after `steps` updates."""
    config, sft = s.config, s.config.sft
    objective = partial(loss, cfg=s.policy.cfg, responses=config.data.max_completion)
    state, step = policy.begin(
        run, s.policy, config, sft, objective, steps=config.steps, stage=STAGE
    )
    data = batches.dataset(s.questions.train, s.encoder.sft, batch=sft.batch, seed=config.seed)
    for i in run.steps(state, config.steps):
        batch = data[i]
        state, metrics = step(state, policy.place(s.policy, batch.arrays))
        run.log(i, metrics, ids=batch.ids)
        run.save(i, state)
    return state.params


# Answers ---------------------------------------------------------------------------------------


def sampler(s: Setting, **settings: Any) -> Any:
    """`policy.sampler` of a run."""
    return policy.sampler(s.policy, s.encoder, batch=s.config.eval.batch, **settings)


def examiner(s: Setting, examples: list[Any]) -> Any:
    """`(params, prefix) -> {"rates", "texts", "correct"}` of greedy answers."""
    greedy = sampler(s)

    def examine(params: Any, prefix: str) -> dict[str, Any]:
        return quiz.score(examples, greedy(params, examples, jax.random.key(0)), prefix)

    return examine


# After training, and before it -------------------------------------------------------------------


def trained(config: Any, workdir: Any) -> tuple[Setting, Any]:
    """The setting and the last parameters of a run."""
    s = prepare(config)
    return s, policy.trained(s.policy, workdir, STAGE)


def evaluate(
    config: Any, workdir: Any, *, split: str = "test", n: int | None = None
) -> dict[str, float]:
    """Rates of a trained run on the split "test" or "train"."""
    if split not in ("test", "train"):
        raise UserError(f"split {split!r} is not one of test, train")
    if n is not None:
        with config.unlocked():
            config.eval.n = n
    s, params = trained(config, workdir)
    source = getattr(s.questions, split)
    examples = [source[i] for i in range(min(len(source), config.eval.n))]
    return examiner(s, examples)(params, f"{split}/")["rates"]


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
    """Answers of a trained run to `prompt`; without one, to n test questions."""
    if image is not None:
        raise UserError("--image: this run trained a text model; leave it out")
    s, params = trained(config, workdir)
    if temperature is None:  # several answers to one question must be able to differ
        temperature = 1.0 if n > 1 and prompt is not None else 0.0
    key = jax.random.key(seed)
    if prompt is not None:
        asked = [{"id": "prompt", "problem": prompt}]
        return [text for text, _ in sampler(s, n=n, temperature=temperature)(params, asked, key)]
    asked = s.questions.test[:n]
    found = sampler(s, temperature=temperature)(params, asked, key)
    return [f"question: {e['problem']}\n\n{text}" for e, (text, _) in zip(asked, found)]


def export(config: Any, workdir: Any) -> tuple[Any, TransformerConfig, Any]:
    """Parameters and config of a trained run, and its tokenizer."""
    s, params = trained(config, workdir)
    return params, s.policy.cfg, policy.exported(s.policy)


def plan(config: Any) -> memory.Plan:
    """Shapes of a training step, for --dry_run; touches no file, network or device."""
    check(config)
    cfg = policy.geometry(config, questions.chain_pieces())
    return policy.plan(config, cfg, config.sft, rows=config.sft.batch, stage=STAGE)
