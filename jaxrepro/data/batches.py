"""Examples to numpy batches of static shape: rows for SFT, prompts for sampling, random access.

A row is [system, user with its image, assistant] in the chat template of Qwen2-VL. The response is
the assistant's text and the <|im_end|> after it. Rows are padded on the right (segment 0). Nothing is
ever cut: a prompt that loses image tokens, or an answer that loses its end, is not the same example.

A data set is a grain MapDataset: batch = dataset[step], so a resumed run needs no cursor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.data import chat, images
from jaxrepro.data.text import SPECIAL, Tokenizer
from jaxrepro.models import qwen2_vl
from jaxrepro.models.qwen2_vl import Qwen2VLConfig
from jaxrepro.models.vision_tower import Vision
from jaxrepro.ops.logprob import Tokens

PROMPT_OVERHEAD = 13  # tokens of the template around one image and a question, closed vocabulary


class PromptTokens(NamedTuple):
    """Prompts without completions, padded on the right."""

    tokens: Any  # (b, t) int32
    position: Any  # (b, 3, t) int32
    segment: Any  # (b, t) int32, 0 = padding
    next_position: Any  # (b,) int32, the position of the first new token


class Batch(NamedTuple):
    """What dataset[step] gives: arrays for the device, and the examples that they came from."""

    arrays: dict[str, Any]
    ids: list[str]
    examples: list[dict[str, Any]]


class Row(NamedTuple):
    """One encoded prompt, unpadded."""

    tokens: list[int]
    images: list[tuple[np.ndarray, tuple[int, int, int]]]  # (patches, grid)


@dataclass(frozen=True)
class Encoder:
    """How examples become rows: tokenizer, model geometry, static lengths in tokens.

    `patches` is the patch count of every row; None takes the bucket of the longest row. `ask` makes
    the user's text of an example, for instance by an instruction that describes the format.
    """

    tokenizer: Tokenizer
    cfg: Qwen2VLConfig
    max_prompt: int  # visual tokens included
    max_completion: int  # the end of turn included
    patches: int | None = None
    min_pixels: int = 3136
    max_pixels: int = 1_003_520
    ask: Callable[[Mapping[str, Any]], str] | None = None

    def __post_init__(self):
        text, cfg = self.tokenizer, self.cfg
        text.check_fits(cfg.text.vocab)
        for name in ("image_pad", "eos"):
            if getattr(text, name) != getattr(cfg, name):
                raise UserError(
                    f"{name} is {getattr(text, name)} in the tokenizer but {getattr(cfg, name)} in the "
                    "model: take both from the same folder"
                )

    def prompt(self, example: Mapping[str, Any]) -> Row:
        """The tokens up to the assistant's turn, and the processed image."""
        vision = self.cfg.vision
        found = []
        if example.get("image") is not None:
            found.append(
                images.process(
                    example["image"],
                    min_pixels=self.min_pixels,
                    max_pixels=self.max_pixels,
                    patch=vision.patch,
                    merge=vision.merge,
                    temporal=vision.temporal,
                )
            )
        return Row(self._prompt_tokens(example, [grid for _, grid in found]), found)

    def _prompt_tokens(self, example, grids) -> list[int]:
        problem = self.ask(example) if self.ask else example["problem"]
        _refuse_special(example["id"], "problem", problem)
        counts = [images.tokens_of(grid, self.cfg.vision.merge) for grid in grids]
        return self.tokenizer.encode(chat.render(problem, counts))

    def completion(self, example: Mapping[str, Any]) -> list[int]:
        """The tokens of the solution and the end of turn."""
        _refuse_special(example["id"], "solution", example["solution"])
        return [*self.tokenizer.encode(example["solution"]), self.tokenizer.eos]

    def lengths(self, example: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens of the prompt and of the completion; only the size of an image file is read."""
        grids = []
        if example.get("image") is not None:
            vision, image = self.cfg.vision, example["image"]
            width, height = image.size if hasattr(image, "size") else _size(image)
            h, w = images.smart_resize(
                height,
                width,
                factor=vision.patch * vision.merge,
                min_pixels=self.min_pixels,
                max_pixels=self.max_pixels,
            )
            grids = [(1, h // vision.patch, w // vision.patch)]
        return len(self._prompt_tokens(example, grids)), len(self.completion(example))

    def sft(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """{"tokens": Tokens (b, max_prompt + max_completion), "vision": Vision or None}.

        UserError names the example that is too long; `drop_long` removes such ones beforehand.
        """
        b, t = len(examples), self.max_prompt + self.max_completion
        out = _blank(b, t, self.tokenizer.pad)
        response = np.zeros((b, t), bool)
        rows = [self.prompt(e) for e in examples]
        for i, (example, row) in enumerate(zip(examples, rows)):
            completion = self.completion(example)
            self._check(example["id"], len(row.tokens), len(completion))
            self._fill(out, i, row.tokens + completion, row)
            response[i, len(row.tokens) : len(row.tokens) + len(completion)] = True
        tokens = Tokens(out.tokens, response, out.segment, out.position)
        return {"tokens": tokens, "vision": self._vision(rows)}

    def prompts(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """{"prompts": PromptTokens (b, max_prompt), "vision": Vision or None}."""
        out = _blank(len(examples), self.max_prompt, self.tokenizer.pad)
        rows = [self.prompt(e) for e in examples]
        for i, (example, row) in enumerate(zip(examples, rows)):
            self._check(example["id"], len(row.tokens), 0)
            self._fill(out, i, row.tokens, row)
        return {"prompts": out, "vision": self._vision(rows)}

    def _fill(self, out: PromptTokens, i: int, ids: list[int], row: Row) -> None:
        n = len(ids)
        position, after = qwen2_vl.positions(np.array(ids), [g for _, g in row.images], self.cfg)
        out.tokens[i, :n], out.position[i, :, :n], out.segment[i, :n] = ids, position, 1
        out.next_position[i] = after

    def _vision(self, rows: Sequence[Row]) -> Vision | None:
        if self.patches is None and not any(row.images for row in rows):
            return None
        vision = self.cfg.vision
        columns = vision.channels * vision.temporal * vision.patch**2
        return images.collate(
            [row.images for row in rows], merge=vision.merge, columns=columns, size=self.patches
        )

    def _check(self, name: str, prompt: int, completion: int) -> None:
        for what, n, limit in (
            ("prompt", prompt, self.max_prompt),
            ("completion", completion, self.max_completion),
        ):
            if n > limit:
                raise UserError(
                    f"example {name}: its {what} has {n} tokens, the limit is {limit}; raise "
                    f"data.max_{what}, lower data.max_pixels, or drop long examples"
                )


def drop_long(
    encoder: Encoder, examples: Iterable[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], int, list[str]]:
    """The examples that fit the encoder's lengths, the number of those that are too long, and what is
    wrong with those that cannot be encoded at all."""
    kept, long, errors = [], 0, []
    limits = encoder.max_prompt, encoder.max_completion
    for example in examples:
        try:
            fits = all(n <= most for n, most in zip(encoder.lengths(example), limits))
        except UserError as e:
            name = f"example {example['id']}"
            errors.append(str(e) if name in str(e) else f"{name}: {e}")
            continue
        kept += [example] if fits else []
        long += not fits
    return kept, long, errors


class Generated:
    """A random-access source over `example(index)`, as long as an index can be."""

    def __init__(self, example: Callable[[int], dict[str, Any]], length: int = 2**31 - 1):
        self._example, self._length = example, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._example(int(index))


def dataset(
    source: Any,
    arrays: Callable[[list[dict[str, Any]]], dict[str, Any]],
    *,
    batch: int,
    seed: int | None = None,
) -> Any:
    """grain MapDataset of `Batch`: dataset[step] has `batch` examples, for any step >= 0.

    source: list of examples or `Generated`. arrays: `encoder.sft` or `encoder.prompts`. With a seed a
    finite source is shuffled anew in each epoch; without one it is read in order, again and again. A
    batch may hold the end of an epoch and the start of the next.
    """
    import grain

    if batch < 1 or not len(source):
        raise UserError(
            f"batch is {batch} and the data has {len(source)} examples; both must be 1 or more"
        )

    def collate(examples: Sequence[dict[str, Any]]) -> Batch:
        examples = list(examples)
        return Batch(arrays(examples), [e["id"] for e in examples], examples)

    data = grain.MapDataset.source(source)
    if not isinstance(source, Generated):
        if seed is not None:
            data = data.seed(seed).shuffle()
        data = data.repeat()
    return data.batch(batch, batch_fn=collate)


def _blank(b: int, t: int, pad: int) -> PromptTokens:
    return PromptTokens(
        tokens=np.full((b, t), pad, np.int32),
        position=np.zeros((b, 3, t), np.int32),
        segment=np.zeros((b, t), np.int32),
        next_position=np.zeros(b, np.int32),
    )


def _refuse_special(name: str, field: str, text: str) -> None:
    found = next((s for s in SPECIAL if s in text), None)
    if found:
        raise UserError(f"example {name}: its {field} holds the special token {found}; remove it")


def _size(path: Any) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as file:
            turned = file.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return file.size[::-1] if turned else file.size
    except (OSError, SyntaxError, ValueError) as e:
        raise UserError(f"cannot read the image file {str(path)!r}: {e}") from e
