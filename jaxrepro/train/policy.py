"""A decoder that a run trains: where it comes from, where its parameters lie, its state, its answers.

What fine-tuning runs share, whatever their loss. They read the same fields of their config: seed, mesh,
init_from, model.{path, shape, dtype, remat}, lora.{rank, alpha, targets, init}.

    policy = open_policy(config, pieces=...)     weights' place, config, tokenizer, mesh; reads no weights
    params = initial(policy, config)             reads or draws them
    state, step = begin(run, policy, config, config.sft, loss, steps=..., stage="sft")
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrepro import config as configuration
from jaxrepro import distributed, sharding
from jaxrepro.config import UserError
from jaxrepro.data import locate
from jaxrepro.data.text import Finetuned, Tokenizer, closed_vocabulary, load_tokenizer
from jaxrepro.models import gguf, hf, lora, transformer
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.rollout.generate import FINISH_EOS, Prompts, Sampling, generate
from jaxrepro.train import checkpoint, memory, optim
from jaxrepro.train.loop import Run
from jaxrepro.train.state import State, init_state, state_shardings
from jaxrepro.train.step import compile_step, make_step

# Shapes for --dry_run, and of models that are trained from scratch.
TINY = dict(
    d=128, heads=4, kv=2, head_dim=32, ffn=384, rope_theta=100.0, qkv_bias=False,
    embed_std=128**-0.5,  # unit-norm rows: a tied head then starts at logits of unit scale
    family="llama",  # for others, transformers' tokenizer class overrules ours in an export
)  # fmt: skip
SHAPES = {
    "tiny": TINY | {"layers": 3},
    "tiny_2": TINY | {"layers": 2},
    "letters": TINY | dict(d=64, layers=2, head_dim=16, ffn=192, embed_std=64**-0.5),
    "smollm2": dict(
        vocab=49152, d=576, layers=30, heads=9, kv=3, head_dim=64, ffn=1536, rope_theta=1e5,
        eps=1e-5, qkv_bias=False, max_positions=8192,
    ),
    "qwen2_1_5b": dict(vocab=151936, d=1536, layers=28, heads=12, kv=2, head_dim=128, ffn=8960),
    "qwen2_5_3b": dict(vocab=151936, d=2048, layers=36, heads=16, kv=2, head_dim=128, ffn=11008),
    "qwen2_5_7b": dict(
        vocab=152064, d=3584, layers=28, heads=28, kv=4, head_dim=128, ffn=18944, tied=False
    ),
    "mistral_7b": dict(
        vocab=32000, d=4096, layers=32, heads=32, kv=8, head_dim=128, ffn=14336, qkv_bias=False,
        tied=False,
    ),
    "llama3_8b": dict(
        vocab=128256, d=4096, layers=32, heads=32, kv=8, head_dim=128, ffn=14336, rope_theta=5e5,
        qkv_bias=False, tied=False,
    ),
}  # fmt: skip


class Policy(NamedTuple):
    """A decoder without its weights."""

    source: Path | None  # folder or GGUF file of the weights; None: from scratch
    cfg: TransformerConfig  # with adapters where there are any
    tokenizer: Tokenizer
    mesh: Any
    shardings: Any  # of the parameters


def check(config: Any) -> None:
    """UserError for model settings that can't work, before anything is read."""
    if config.model.shape not in SHAPES:
        raise UserError(f"model.shape={config.model.shape!r} is not one of {', '.join(SHAPES)}")
    adapters(config)


def check_rows(
    config: Any, stages: Mapping[str, int], least: Mapping[str, int] | None = None
) -> None:
    """UserError for sizes of rows, batches and updates that can't work, before anything is read.

    stages: the sections that train, and the steps of each. least: further fields and their least values.
    """
    limits = {"steps": 0, "eval.n": 1, "eval.batch": 1, "data.n": 1, "data.max_completion": 2}
    limits |= {f"{stage}.batch": 1 for stage in stages} | dict(least or {})
    for name, low in limits.items():
        value = reduce(getitem, name.split("."), config)
        if value is not None and value < low:
            raise UserError(f"{name}={value}; use {low} or more")
    for stage, steps in stages.items():
        section = config[stage]
        if section.micro_batches < 1 or section.batch % section.micro_batches:
            raise UserError(
                f"{stage}.micro_batches={section.micro_batches} does not divide "
                f"{stage}.batch={section.batch}; use a divisor"
            )
        if not section.max_grad_norm >= 0:
            raise UserError(
                f"{stage}.max_grad_norm={section.max_grad_norm}; use a number above 0, or 0 for no clipping"
            )
        optimizer(section, steps=steps)  # refuses an unknown schedule
    data = config.data
    if data.max_completion >= data.max_tokens:
        raise UserError(
            f"data.max_completion={data.max_completion} leaves no room for a prompt in "
            f"data.max_tokens={data.max_tokens}"
        )


def adapters(config: Any) -> lora.Lora | None:
    """The adapters of a config; None where all parameters are trained."""
    return lora.Lora(**config.lora.to_dict()) if config.lora.rank else None


def trainable(cfg: TransformerConfig) -> str | None:
    """What `make_step` trains: the adapters where there are any, else everything."""
    return lora.TRAINABLE if cfg.lora else None


def optimizer(section: Any, *, steps: int) -> optim.Scheduled:
    """The optimiser of a section of a config (lr, warmup, schedule, ...) for so many steps."""
    # Without a step there is nothing that the warm-up could be too long for.
    return optim.optimizer(section, steps=steps or section.warmup + 1)


def open_policy(config: Any, *, pieces: Sequence[str]) -> Policy:
    """The policy of `model.path`, or one of `model.shape` over the closed vocabulary `pieces`."""
    if config.model.path:
        numerics = dict(dtype=config.model.dtype, remat=config.model.remat)
        source = locate.model(config.model.path, gguf=True)
        file = gguf.open_file(source) if source.suffix == gguf.SUFFIX else None
        tokenizer = load_tokenizer(source)
        cfg = gguf.read_config(file, **numerics) if file else hf.read_config(source, **numerics)
        if not isinstance(cfg, TransformerConfig):
            raise UserError(f"model.path={config.model.path} is no plain decoder; see stepgrpo")
        if file is None:
            hf.token_ids(source, cfg.vocab)  # an export writes them
    else:
        source, tokenizer = None, closed_vocabulary(pieces)
        cfg = geometry(config, pieces)
    tokenizer.check_fits(cfg.vocab)
    cfg = dataclasses.replace(cfg, lora=adapters(config)).using(tokenizer.used)
    tokenizer.eos, tokenizer.pad  # noqa: B018 - a model without an end of turn is refused here
    mesh = sharding.make_mesh(config.mesh)
    places = sharding.shard_tree(transformer.axes(cfg), transformer.abstract(cfg), mesh)
    return Policy(source, cfg, tokenizer, mesh, places)


def geometry(config: Any, pieces: Sequence[str]) -> TransformerConfig:
    """The decoder of `model.shape`, for which no file is read; without adapters."""
    fields = dict(SHAPES[config.model.shape])
    if "vocab" not in fields:
        fields["vocab"] = closed_vocabulary(pieces).vocab_size
    return TransformerConfig(**fields, dtype=config.model.dtype, remat=config.model.remat)


def within(policy: Policy, tokens: int, what: str) -> None:
    """UserError where rows are longer than the model was made for."""
    if tokens > policy.cfg.max_positions:
        raise UserError(
            f"{what}: {tokens} tokens, but the model was made for {policy.cfg.max_positions}; use fewer"
        )


def initial(policy: Policy, config: Any) -> Any:
    """Parameters before the first step: of `init_from`, of `model.path`, or drawn; and fresh adapters.

    Adapters that the run of `init_from` trained are merged into its weights.
    """
    base, places = dataclasses.replace(policy.cfg, lora=None), lora.off(policy.shardings)
    key = jax.random.key(config.seed)
    if config.init_from:
        return begun(policy, config.init_from, seed=config.seed)
    if policy.source is None:
        params = jax.jit(partial(transformer.init, cfg=base), out_shardings=places)(key)
    else:
        read = gguf.load if policy.source.suffix == gguf.SUFFIX else hf.load
        params = read(policy.source, base, shardings=places)
    return _attached(policy, params, key)


def begun(policy: Policy, path: Any, *, seed: int = 0) -> Any:
    """The last parameters of another run as a policy's, with fresh adapters where it has adapters.

    Adapters that the other run trained are merged into its weights.
    """
    base = dataclasses.replace(policy.cfg, lora=None)
    return _attached(policy, _begun(path, base, policy.mesh), jax.random.key(seed))


def _attached(policy: Policy, params: Any, key: Any) -> Any:
    if policy.cfg.lora is None:
        return params
    base = dataclasses.replace(policy.cfg, lora=None)
    return sharding.place(lora.attach(key, params, base, policy.cfg.lora)[0], policy.shardings)


def _begun(path: Any, base: TransformerConfig, mesh: Any) -> Any:
    """The last parameters of another run, without adapters of their own."""
    file = checkpoint.find(path)[0] / "config.json"
    had = configuration.saved(file) if distributed.first(file.is_file) else {}
    cfg = dataclasses.replace(base, lora=adapters(had) if had.get("lora") else None)
    abstract = transformer.abstract(cfg)
    places = sharding.shard_tree(transformer.axes(cfg), abstract, mesh)
    params = checkpoint.load(path, abstract, shardings=places)
    if cfg.lora is None:
        return params
    merge = jax.jit(lambda p: lora.merge(p, cfg)[0], out_shardings=lora.off(places))
    return merge(params)


def trained(policy: Policy, workdir: Any, stage: str) -> Any:
    """The last parameters of a run's stage."""
    target = transformer.abstract(policy.cfg)
    return checkpoint.load(workdir, target, stage=stage, shardings=policy.shardings)


def exported(policy: Policy) -> Any:
    """The tokenizer that goes with trained weights: the base model's files, or its own."""
    folder = policy.source is not None and policy.source.is_dir()
    return Finetuned(policy.tokenizer, policy.source) if folder else policy.tokenizer


def begin(
    run: Run,
    policy: Policy,
    config: Any,
    section: Any,
    loss: Callable,
    *,
    steps: int,
    stage: str,
    params: Callable[[], Any] | None = None,
    extra: Callable[[Any], Any] | None = None,
    prepare: Callable | None = None,
) -> tuple[State, Any]:
    """The state of a stage, resumed or begun, and the compiled step of `loss`.

    section: of the config, with the optimiser's settings, micro_batches and max_grad_norm. params: gives
    those to start from (default `initial`). extra(params): the method's own part of the state. prepare: as
    in `make_step`.
    """
    rule = optimizer(section, steps=steps)

    def create(params: Any) -> State:
        own = extra(params) if extra else None
        return init_state(params, rule, trainable=trainable(policy.cfg), extra=own)

    abstract = jax.eval_shape(create, transformer.abstract(policy.cfg))
    shardings = state_shardings(abstract, policy.shardings, policy.mesh)
    state = run.restore(
        lambda: create(params() if params else initial(policy, config)),
        stage=stage,
        shardings=shardings,
        abstract=abstract,
        jit=False,
    )
    step = make_step(
        loss,
        rule,
        micro_batches=section.micro_batches,
        max_grad_norm=section.max_grad_norm,
        prepare=prepare,
        trainable=trainable(policy.cfg),
        shardings=policy.shardings if policy.mesh.size > 1 else None,
    )
    return state, compile_step(step, shardings)


def place(policy: Policy, arrays: Any) -> Any:
    """A host batch on the mesh: rows over (data, fsdp)."""
    return sharding.place(arrays, sharding.batch_sharding(policy.mesh, arrays))


def sampler(
    policy: Policy, encoder: Any, *, batch: int, n: int = 1, temperature: float = 0.0
) -> Any:
    """`(params, examples, key) -> [(text, finished)]`, n answers to each example, greedy at 0.

    encoder: `data.questions.Encoder`; its max_completion bounds an answer. batch: prompts at a time.
    """
    settings = Sampling(
        max_new=encoder.max_completion,
        eos=(policy.tokenizer.eos,),
        pad=policy.tokenizer.pad,
        temperature=temperature,
    )

    @partial(sharding.on_mesh, policy.mesh)
    @jax.jit
    def draw(params: Any, rows: Any, ids: Any, key: Any) -> Any:
        x = transformer.embed(params, policy.cfg, rows.tokens)
        prompts = Prompts(x, rows.position, rows.segment, rows.next_position)
        out = generate(
            params, policy.cfg, prompts, request_ids=ids, key=key, sampling=settings, n=n
        )  # fmt: skip
        return out.tokens, out.length, out.finish

    def call(params: Any, examples: Any, key: Any) -> list[tuple[str, bool]]:
        found: list[tuple[str, bool]] = []
        for at, rows in prompt_batches(policy, encoder, examples, batch):
            ids = np.arange(at, at + len(rows.tokens), dtype=np.int32)
            tokens, lengths, finish = sharding.fetch(draw(params, rows, ids, key))
            tokens = tokens.reshape(-1, tokens.shape[-1])
            texts = [policy.tokenizer.decode(t[:k]) for t, k in zip(tokens, lengths.ravel())]
            found += list(zip(texts, (finish.ravel() == FINISH_EOS).tolist()))
        return found[: n * len(examples)]

    return call


def prompt_batches(policy: Policy, encoder: Any, examples: Sequence[Any], batch: int):
    """(index of the first, prompt rows on the mesh) of equal shape; the last example fills up the last."""
    longest = max(len(encoder.prompt(e)) for e in examples)
    within(policy, longest + encoder.max_completion, "prompt and data.max_completion")
    length = -(-longest // 32) * 32
    parts = sharding.row_parts(policy.mesh)
    size = -(-min(batch, len(examples)) // parts) * parts
    for at in range(0, len(examples), size):
        rows = list(examples[at : at + size])
        rows += [rows[-1]] * (size - len(rows))  # one shape, and whole rows on every device
        yield at, place(policy, encoder.prompts(rows, length=length))


def plan(
    config: Any, cfg: TransformerConfig, section: Any, *, rows: int, stage: str, k: int = 1
) -> memory.Plan:
    """Shapes of a training step of rows (rows, k, data.max_tokens), for --dry_run; touches no device."""
    cfg = dataclasses.replace(cfg, lora=adapters(config))
    mesh = sharding.abstract_mesh(config.mesh)
    abstract = transformer.abstract(cfg)
    shardings = sharding.shard_tree(transformer.axes(cfg), abstract, mesh)
    create = partial(
        init_state, optimizer=optimizer(section, steps=config.steps), trainable=trainable(cfg)
    )
    state = jax.eval_shape(create, abstract)
    t = config.data.max_tokens
    ints, bools = (jax.ShapeDtypeStruct((rows * k, t), d) for d in (np.int32, np.bool_))
    batch = {"tokens": ints, "response": bools, "segment": ints, "position": ints}
    parts = sharding.row_parts(mesh) * mesh.shape["sequence"]
    micro = -(-rows // section.micro_batches) * k
    return memory.Plan(
        params=memory.sharded(abstract, shardings),
        opt=memory.sharded(state.opt, state_shardings(state, shardings, mesh).opt),
        trainable=trainable(cfg),
        activations={"decoder": memory.decoder_activations(cfg, micro, t, parts=parts)},
        logits=memory.logits_chunk(cfg.vocab, parts=mesh.shape["tensor"]),
        batch=memory.sharded(batch, sharding.batch_sharding(mesh, batch)),
        mesh=mesh,
        stage=stage,
    )
