"""What a StepGRPO config means: model geometry, tokenizer, and where the examples of each stage come from.

A task is either a generator (real handwritten digits, coloured grids, charts: nothing to download) or a
folder of JSONL files in R1-VL's schema, with the tokenizer of a Hugging Face model.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrepro.config import UserError
from jaxrepro.data import batches, locate, stepwise
from jaxrepro.data import stepformat as fmt
from jaxrepro.data.batches import Encoder, Generated
from jaxrepro.data.synthetic import generator
from jaxrepro.data.text import UNKNOWN, VISION_END, VISION_START, Tokenizer, closed_vocabulary
from jaxrepro.models.qwen2_vl import Qwen2VLConfig, qwen2_vl_2b, qwen2_vl_7b
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.models.vision_tower import VisionConfig

# Training stages draw disjoint indices of the training split; evaluation splits have their own scans.
STAGES = {"base": 0, "sft": 1, "rl": 2, "more": 3}  # more: SFT that goes on, the control
STRIDE = 10_000_000
SHOWN = 20  # broken records that are printed one by one
FILES = {"base": "sft.jsonl", "sft": "sft.jsonl", "more": "sft.jsonl", "rl": "rl.jsonl"}

# Geometry of the models without a checkpoint: decoder, tower.
SHAPES = {
    "tiny": (
        dict(d=128, layers=3, heads=4, kv=2, head_dim=32, ffn=384, mrope_sections=(4, 6, 6)),
        dict(depth=2, embed=64, heads=4, mlp=256, out=128),
    ),
    "small": (
        dict(d=512, layers=12, heads=8, kv=2, head_dim=64, ffn=1536, mrope_sections=(8, 12, 12)),
        dict(depth=8, embed=384, heads=6, mlp=1536, out=512),
    ),
}
RELEASED = {"2b": qwen2_vl_2b, "7b": qwen2_vl_7b}
# At theta 1e6 the sections leave the column stream frequencies too low to tell four columns apart.
SMALL_THETA = 100.0


def geometry(config: Any, tokenizer: Tokenizer | None = None) -> Qwen2VLConfig:
    """The model of a config; `tokenizer` gives the vocabulary of the shapes that have no checkpoint."""
    model = config.model
    numerics = dict(dtype=model.dtype, remat=model.remat)
    if model.shape in RELEASED:
        return RELEASED[model.shape](**numerics)
    if model.shape not in SHAPES:
        raise UserError(f"model.shape={model.shape!r} is not one of {', '.join(SHAPES)}, 2b, 7b")
    text, vision = SHAPES[model.shape]
    tokenizer = tokenizer or closed_vocabulary(generator(config.data.generator).pieces)
    embed_std = text["d"] ** -0.5  # unit-norm rows: a tied head then starts at logits of unit scale
    decoder = TransformerConfig(
        vocab=tokenizer.vocab_size, rope_theta=SMALL_THETA, embed_std=embed_std, **text, **numerics
    )
    return Qwen2VLConfig(
        text=decoder,
        vision=VisionConfig(**vision, **numerics),
        image_pad=tokenizer.image_pad,
        video_pad=tokenizer.id(UNKNOWN),  # no video here: an id that no prompt holds
        vision_start=tokenizer.id(VISION_START),
        vision_end=tokenizer.id(VISION_END),
        eos=tokenizer.eos,
        pad=tokenizer.pad,
    )


def lengths(config: Any) -> tuple[int, int]:
    """Tokens of the longest prompt and completion: the config's, else what the generator needs.

    Samples get a few tokens more than any solution, so that a longer one can be seen to be wrong.
    """
    prompt, completion = config.data.max_prompt, config.data.max_completion
    if config.data.path:
        if prompt is None or completion is None:
            raise UserError("data.path needs data.max_prompt and data.max_completion, in tokens")
        return prompt, completion
    chosen = generator(config.data.generator)
    longest = batches.PROMPT_OVERHEAD + chosen.visual + chosen.max_problem
    return prompt or longest, completion or chosen.max_solution + 5


def patch_count(config: Any) -> int:
    """Patches of the largest image: the generator's, else what data.max_pixels allows."""
    if config.data.path is None and config.model.shape in SHAPES:
        return 4 * generator(config.data.generator).visual
    return config.data.max_pixels // VisionConfig().patch ** 2


@dataclasses.dataclass(frozen=True)
class Task:
    """Tokenizer, model, and the examples of every stage and split."""

    tokenizer: Tokenizer
    cfg: Qwen2VLConfig
    encoder: Encoder
    caption_encoder: Encoder  # shorter rows: the base stage has no reasoning
    exam_encoder: Encoder  # as `eval.instruction` and `eval.max_completion` say
    examples: Callable[[str], Any]  # stage or split -> a sequence of examples

    def batches(self, stage: str, size: int, *, seed: int, solutions: bool) -> Any:
        """dataset[step] of a stage: `batches.Batch` with whole rows, or prompts alone."""
        encoder = self.caption_encoder if stage == "base" else self.encoder
        arrays = encoder.sft if solutions else encoder.prompts
        order = seed + STRIDE * STAGES[stage]  # of a finite source, another one in each stage
        return batches.dataset(self.examples(stage), arrays, batch=size, seed=order)

    def split(self, name: str, n: int) -> list[dict[str, Any]]:
        """The first n examples of an evaluation split (all, where there are fewer)."""
        source = self.examples(name)
        return [source[i] for i in range(min(n, len(source)))]


def build(config: Any) -> Task:
    """The task of a config; reads files only where `model.path` and `data.path` name them."""
    if config.data.path:
        return _from_files(config)
    chosen = generator(config.data.generator)
    tokenizer = closed_vocabulary(chosen.pieces)

    def examples(name: str) -> Generated:
        if name not in STAGES:
            return Generated(lambda i: chosen.example(name, i))
        start, make = STAGES[name] * STRIDE, lambda i: chosen.example("train", i, config.seed)
        if name == "base":
            make = lambda i: chosen.base("train", i, config.seed, captions=config.base.captions)
        if name in ("sft", "more") and config.data.corrupt:
            clean = make
            make = lambda i: stepwise.with_format_noise(clean(i), config.data.corrupt, config.seed)
        return Generated(lambda i: make(start + i), STRIDE)

    cfg = geometry(config, tokenizer)
    encoder = _encoder(config, tokenizer, cfg, patches=4 * chosen.visual)
    captions = dataclasses.replace(encoder, max_completion=config.base.max_completion)
    return Task(tokenizer, cfg, encoder, captions, exam(config, encoder), examples)


def _from_files(config: Any) -> Task:
    from jaxrepro.data.text import load_tokenizer
    from jaxrepro.models import hf

    if not config.model.path:
        raise UserError(
            "data.path is set without model.path: its texts need that model's tokenizer"
        )
    model = locate.model(config.model.path)
    tokenizer = load_tokenizer(model)
    cfg = hf.read_config(model, dtype=config.model.dtype, remat=config.model.remat)
    if not isinstance(cfg, Qwen2VLConfig):
        raise UserError(
            f"model.path={config.model.path} is a decoder ({cfg.family}); give a Qwen2-VL"
        )
    hf.token_ids(model, cfg.text.vocab)  # an export writes them
    if config.model.shape in RELEASED and cfg != geometry(config):
        raise UserError(
            f"model.path={config.model.path} is not of model.shape={config.model.shape}, whose learning "
            "rates and mesh this size has; choose the size of that model, or set model.shape=tiny"
        )
    cfg = dataclasses.replace(cfg, text=cfg.text.using(tokenizer.used))
    encoder = _encoder(config, tokenizer, cfg, patches=None)
    folder = locate.data(config.data.path)
    loaded: dict[str, list[dict[str, Any]]] = {}

    def examples(name: str) -> list[dict[str, Any]]:
        file = FILES.get(name, f"{name}.jsonl")
        if file not in loaded:
            # Training files may hold hundreds of thousands of images: each is read when its turn comes.
            found, errors = stepwise.read_jsonl(
                folder / file, strict=False, images="exists", need_key_steps=file == FILES["rl"]
            )
            loaded[file], dropped, unfit = batches.drop_long(encoder, found)
            errors += [f"{folder / file}: {error}" for error in unfit]
            for error in errors[:SHOWN]:
                print(f"left out: {error}", file=sys.stderr, flush=True)
            if len(errors) > SHOWN:
                print(f"left out: {len(errors)} records in all", file=sys.stderr, flush=True)
            if dropped:
                print(f"{file}: dropped {dropped} of {len(found)} examples as too long", flush=True)
            if not loaded[file]:
                raise UserError(
                    f"{folder / file} holds no example that fits data.max_prompt and data.max_completion"
                )
        return loaded[file]

    return Task(tokenizer, cfg, encoder, encoder, exam(config, encoder), examples)


def _encoder(config: Any, tokenizer: Tokenizer, cfg: Qwen2VLConfig, patches: int | None) -> Encoder:
    max_prompt, max_completion = lengths(config)
    return Encoder(
        tokenizer,
        cfg,
        max_prompt=max_prompt,
        max_completion=max_completion,
        patches=patches,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        ask=_instructed if config.data.instruction else None,
    )


def _instructed(example: Mapping[str, Any]) -> str:
    return fmt.instruction(example["problem"], example.get("choices"))


def exam(config: Any, encoder: Encoder) -> Encoder:
    """The encoder of evaluation: the paper shows the instruction there, and not in training."""
    changes: dict[str, Any] = {}
    if config.eval.instruction is not None:
        changes["ask"] = _instructed if config.eval.instruction else None
    if config.eval.max_completion is not None:
        changes["max_completion"] = config.eval.max_completion
    return dataclasses.replace(encoder, **changes)


def texts(tokenizer: Tokenizer, tokens: Any, lengths: Any) -> list[str]:
    """The text of each completion, flat; special tokens, the eos among them, left out."""
    rows: Sequence[Any] = tokens.reshape(-1, tokens.shape[-1])
    return [tokenizer.decode(row[:n]) for row, n in zip(rows, lengths.reshape(-1))]
