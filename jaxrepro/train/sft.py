"""Supervised fine-tuning of a decoder on questions with worked answers: a run, and substrate.

    loss = - sum over response tokens of log pi(y_t | x, y_<t) / their number

The loss counts the tokens of the answer and its end of turn, over the whole batch, never a mean of rows'
means. It is `models.scoring.nll` in `train.step`: the step that methods use to warm up, and what remains of a
method whose auxiliary loss has weight 0. Held-out questions are answered greedily before and after; a
pair of answers to one question is one item of the bootstrap.

No paper stands behind this run: no equation beyond the likelihood, nothing to depart from.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro import distributed, sharding
from jaxrepro.config import UserError
from jaxrepro.data import batches, locate, questions
from jaxrepro.data.questions import Encoder, Questions
from jaxrepro.data.text import Finetuned, Tokenizer, closed_vocabulary, load_tokenizer
from jaxrepro.models import gguf, hf, lora, transformer
from jaxrepro.models.scoring import nll
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.rollout.generate import FINISH_EOS, Prompts, Sampling, generate
from jaxrepro.train import checkpoint, memory, optim, quiz
from jaxrepro.train.loop import Run
from jaxrepro.train.state import State, init_state, state_shardings
from jaxrepro.train.step import compile_step, make_step

STAGE = "sft"
TRIED = 256  # generated items whose length is looked at before anything runs
# Shapes for --dry_run, and of the model that is trained from scratch.
SHAPES = {
    "tiny": dict(
        d=128, layers=3, heads=4, kv=2, head_dim=32, ffn=384, rope_theta=100.0, qkv_bias=False,
        embed_std=128**-0.5,  # unit-norm rows: a tied head then starts at logits of unit scale
        family="llama",  # for others, transformers' tokenizer class overrules ours in an export
    ),
    "smollm2": dict(
        vocab=49152, d=576, layers=30, heads=9, kv=3, head_dim=64, ffn=1536, rope_theta=1e5,
        eps=1e-5, qkv_bias=False, max_positions=8192,
    ),
    "qwen2_1_5b": dict(vocab=151936, d=1536, layers=28, heads=12, kv=2, head_dim=128, ffn=8960),
}  # fmt: skip


class Setting(NamedTuple):
    """What the parts of a run share."""

    config: Any
    source: Path | None  # folder or GGUF file of the weights; None: from scratch
    cfg: TransformerConfig  # with adapters where there are any
    tokenizer: Tokenizer
    encoder: Encoder
    questions: Questions
    mesh: Any
    shardings: Any  # of the parameters


def run(
    config: Any, workdir: Any, *, resume: str = "auto", profile: str | None = None
) -> dict[str, float]:
    """Fine-tune in `workdir`, answer held-out questions before and after; what summary.json holds."""
    check(config)
    mesh = sharding.abstract_mesh(config.mesh, devices=jax.device_count())
    sharding.check_batches(mesh, **{"sft.batch": config.sft.batch})
    s = prepare(config)  # what is refused leaves no workdir behind
    _within(s, config.data.max_tokens, "data.max_tokens")
    if isinstance(s.questions.train, batches.Generated):  # has no end that could be filtered
        s.encoder.sft([s.questions.train[i] for i in range(TRIED)])
    with Run(config, workdir, resume=resume, profile=profile) as run:
        if run.finished:
            return run.results
        examine = examiner(s, s.questions.test)
        # Measured from the start itself: after a resume the state is another one.
        before = run.once(
            "before",
            lambda: examine(initial(s), "before/test/"),
            of=[config.eval.n, config.data.path],
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
    sft, data = config.sft, config.data
    for name, value, least in (
        ("steps", config.steps, 0),
        ("sft.batch", sft.batch, 1),
        ("eval.n", config.eval.n, 1),
        ("eval.batch", config.eval.batch, 1),
        ("data.n", data.n, 1),
        ("data.max_completion", data.max_completion, 2),
    ):
        if value < least:
            raise UserError(f"{name}={value}; use {least} or more")
    if sft.micro_batches < 1 or sft.batch % sft.micro_batches:
        raise UserError(
            f"sft.micro_batches={sft.micro_batches} does not divide sft.batch={sft.batch}; "
            "use a divisor"
        )
    if data.max_completion >= data.max_tokens:
        raise UserError(
            f"data.max_completion={data.max_completion} leaves no room for a prompt in "
            f"data.max_tokens={data.max_tokens}"
        )
    if config.model.shape not in SHAPES:
        raise UserError(f"model.shape={config.model.shape!r} is not one of {', '.join(SHAPES)}")
    if not config.model.path and (config.model.shape != "tiny" or data.path or data.generator != "chains"):  # fmt: skip
        raise UserError(
            "model.path is needed (a folder, a .gguf file, a hub name, smollm2): only the shape tiny "
            "on generated chains is trained from scratch"
        )
    if not sft.max_grad_norm >= 0:
        raise UserError(
            f"sft.max_grad_norm={sft.max_grad_norm}; use a number above 0, or 0 for no clipping"
        )
    adapters(config)
    _optimizer(config)  # refuses an unknown schedule


def _within(s: Setting, tokens: int, what: str) -> None:
    if tokens > s.cfg.max_positions:
        raise UserError(
            f"{what}: {tokens} tokens, but the model was made for {s.cfg.max_positions}; use fewer"
        )


def adapters(config: Any) -> lora.Lora | None:
    """The adapters of a config; None where all parameters are trained."""
    return lora.Lora(**config.lora.to_dict()) if config.lora.rank else None


def _trainable(cfg: TransformerConfig) -> str | None:
    return lora.TRAINABLE if cfg.lora else None


def _optimizer(config: Any) -> optim.Scheduled:
    # Without a step there is nothing that the warm-up could be too long for.
    return optim.optimizer(config.sft, steps=config.steps or config.sft.warmup + 1)


def prepare(config: Any) -> Setting:
    """Weights' place, tokenizer, questions that fit, mesh and where the parameters lie."""
    numerics = dict(dtype=config.model.dtype, remat=config.model.remat)
    if config.model.path:
        source = locate.model(config.model.path, gguf=True)
        file = gguf.open_file(source) if source.suffix == gguf.SUFFIX else None
        tokenizer = load_tokenizer(source)
        cfg = gguf.read_config(file, **numerics) if file else hf.read_config(source, **numerics)
        if not isinstance(cfg, TransformerConfig):
            raise UserError(f"model.path={config.model.path} is no plain decoder; see stepgrpo")
    else:
        source, tokenizer = None, closed_vocabulary(questions.chain_pieces())
        cfg = geometry(config)
    cfg = dataclasses.replace(cfg, lora=adapters(config))
    tokenizer.check_fits(cfg.vocab)
    data = config.data
    encoder = Encoder(tokenizer, data.max_tokens, data.max_completion, system=data.system)
    tokenizer.eos, tokenizer.pad  # noqa: B018 - a model without an end of turn is refused here
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
    mesh = sharding.make_mesh(config.mesh)
    places = sharding.shard_tree(transformer.axes(cfg), transformer.abstract(cfg), mesh)
    return Setting(config, source, cfg, tokenizer, encoder, Questions(train, test), mesh, places)


def geometry(config: Any) -> TransformerConfig:
    """The decoder of `model.shape`, for which no file is read."""
    fields = dict(SHAPES[config.model.shape])
    if "vocab" not in fields:
        fields["vocab"] = closed_vocabulary(questions.chain_pieces()).vocab_size
    return TransformerConfig(**fields, dtype=config.model.dtype, remat=config.model.remat)


def initial(s: Setting) -> Any:
    """Parameters before the first step: of `init_from`, of `model.path`, or drawn; and fresh adapters."""
    base, places = dataclasses.replace(s.cfg, lora=None), lora.off(s.shardings)
    key = jax.random.key(s.config.seed)
    if s.config.init_from:
        params = checkpoint.load(s.config.init_from, transformer.abstract(base), shardings=places)
    elif s.source is None:
        params = jax.jit(partial(transformer.init, cfg=base), out_shardings=places)(key)
    else:
        read = gguf.load if s.source.suffix == gguf.SUFFIX else hf.load
        params = read(s.source, base, shardings=places)
    if s.cfg.lora is None:
        return params
    return sharding.place(lora.attach(key, params, base, s.cfg.lora)[0], s.shardings)


# Training --------------------------------------------------------------------------------------


def loss(params: Any, batch: Any, *, cfg: TransformerConfig, responses: int) -> Any:
    """Summed negative log-likelihood of the response tokens (nats), and their number."""
    tokens = batch["tokens"]
    x = transformer.embed(params, cfg, tokens.tokens)
    return *nll(params, cfg, x, tokens, responses=responses), {}


def train(run: Run, s: Setting) -> Any:
    """Parameters after `steps` updates."""
    state, step = start(run, s)
    data = batches.dataset(
        s.questions.train, s.encoder.sft, batch=s.config.sft.batch, seed=s.config.seed
    )
    for i in run.steps(state, s.config.steps):
        batch = data[i]
        state, metrics = step(state, place(s, batch.arrays))
        run.log(i, metrics, ids=batch.ids)
        run.save(i, state)
    return state.params


def start(run: Run, s: Setting) -> tuple[State, Any]:
    """The state, resumed or begun, and the compiled step."""
    sft, optimizer = s.config.sft, _optimizer(s.config)
    begin = partial(init_state, optimizer=optimizer, trainable=_trainable(s.cfg))
    abstract = jax.eval_shape(begin, transformer.abstract(s.cfg))
    shardings = state_shardings(abstract, s.shardings, s.mesh)
    state = run.restore(
        lambda: begin(initial(s)), stage=STAGE, shardings=shardings, abstract=abstract, jit=False
    )
    step = make_step(
        partial(loss, cfg=s.cfg, responses=s.config.data.max_completion),
        optimizer,
        micro_batches=sft.micro_batches,
        max_grad_norm=sft.max_grad_norm,
        trainable=_trainable(s.cfg),
        shardings=s.shardings if s.mesh.size > 1 else None,
    )
    return state, compile_step(step, shardings)


def place(s: Setting, arrays: Any) -> Any:
    """A host batch on the mesh: rows over (data, fsdp)."""
    return sharding.place(arrays, sharding.batch_sharding(s.mesh, arrays))


# Answers ---------------------------------------------------------------------------------------


def sampler(s: Setting, *, n: int = 1, temperature: float = 0.0) -> Any:
    """`(params, examples, key) -> [(text, finished)]`, n answers to each example."""
    settings = Sampling(
        max_new=s.config.data.max_completion,
        eos=(s.tokenizer.eos,),
        pad=s.tokenizer.pad,
        temperature=temperature,
    )

    @partial(sharding.on_mesh, s.mesh)
    @jax.jit
    def draw(params: Any, rows: Any, ids: Any, key: Any) -> Any:
        x = transformer.embed(params, s.cfg, rows.tokens)
        prompts = Prompts(x, rows.position, rows.segment, rows.next_position)
        out = generate(
            params, s.cfg, prompts, request_ids=ids, key=key, sampling=settings, n=n
        )  # fmt: skip
        return out.tokens, out.length, out.finish

    def call(params: Any, examples: Any, key: Any) -> list[tuple[str, bool]]:
        longest = max(len(s.encoder.prompt(e)) for e in examples)
        _within(s, longest + s.config.data.max_completion, "prompt and data.max_completion")
        length = -(-longest // 32) * 32
        parts = sharding.row_parts(s.mesh)
        size = -(-min(s.config.eval.batch, len(examples)) // parts) * parts
        found: list[tuple[str, bool]] = []
        for at in range(0, len(examples), size):
            rows = list(examples[at : at + size])
            rows += [rows[-1]] * (size - len(rows))  # one shape, and whole rows on every device
            arrays = place(s, s.encoder.prompts(rows, length=length))
            ids = np.arange(at, at + size, dtype=np.int32)
            tokens, lengths, finish = sharding.fetch(draw(params, arrays, ids, key))
            tokens = tokens.reshape(-1, tokens.shape[-1])
            texts = [s.tokenizer.decode(t[:k]) for t, k in zip(tokens, lengths.ravel())]
            found += list(zip(texts, (finish.ravel() == FINISH_EOS).tolist()))
        return found[: n * len(examples)]

    return call


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
    target = transformer.abstract(s.cfg)
    return s, checkpoint.load(workdir, target, stage=STAGE, shardings=s.shardings)


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
    """Parameters and config of a trained run, and its tokenizer: the base model's files, or its own."""
    s, params = trained(config, workdir)
    folder = s.source is not None and s.source.is_dir()
    return params, s.cfg, Finetuned(s.tokenizer, s.source) if folder else s.tokenizer


def plan(config: Any) -> memory.Plan:
    """Shapes of a training step, for --dry_run; touches no file, network or device."""
    check(config)
    cfg = dataclasses.replace(geometry(config), lora=adapters(config))
    mesh, sft = sharding.abstract_mesh(config.mesh), config.sft
    abstract = transformer.abstract(cfg)
    shardings = sharding.shard_tree(transformer.axes(cfg), abstract, mesh)
    optimizer = _optimizer(config)
    begin = partial(init_state, optimizer=optimizer, trainable=_trainable(cfg))
    state = jax.eval_shape(begin, abstract)
    opt = memory.sharded(state.opt, state_shardings(state, shardings, mesh).opt)
    b, t = sft.batch, config.data.max_tokens
    ints = jax.ShapeDtypeStruct((b, t), jnp.int32)
    batch = {"tokens": ints, "response": jax.ShapeDtypeStruct((b, t), bool)}
    batch |= {"segment": ints, "position": ints}
    parts = sharding.row_parts(mesh) * mesh.shape["sequence"]
    rows = math.ceil(b / sft.micro_batches)
    return memory.Plan(
        params=memory.sharded(abstract, shardings),
        opt=opt,
        trainable=_trainable(cfg),
        activations={"decoder": memory.decoder_activations(cfg, rows, t, parts=parts)},
        logits=memory.logits_chunk(cfg.vocab, 1024, parts=mesh.shape["tensor"]),
        batch=memory.sharded(batch, sharding.batch_sharding(mesh, batch)),
        mesh=mesh,
        stage=STAGE,
    )
