"""Batches: what is scored, what is padding, static shapes, random access, nothing cut."""

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer as Backend

from jaxrepro.config import UserError
from jaxrepro.data import batches, digits, images
from jaxrepro.data.batches import Encoder, Generated, dataset, drop_long
from jaxrepro.data.synthetic import GENERATORS
from jaxrepro.data.text import Tokenizer, closed_vocabulary
from jaxrepro.models.qwen2_vl import Qwen2VLConfig
from jaxrepro.models.transformer import TransformerConfig
from jaxrepro.models.vision_tower import VisionConfig

TOKENIZER = closed_vocabulary(digits.PIECES)
CFG = Qwen2VLConfig(
    TransformerConfig(
        vocab=TOKENIZER.vocab_size,
        d=32,
        layers=1,
        heads=2,
        kv=1,
        head_dim=16,
        ffn=32,
        mrope_sections=(2, 3, 3),
    ),
    VisionConfig(depth=1, embed=32, heads=2, mlp=32, out=32),
    image_pad=TOKENIZER.image_pad,
    video_pad=TOKENIZER.id("<|unk|>"),
    vision_start=TOKENIZER.id("<|vision_start|>"),
    vision_end=TOKENIZER.id("<|vision_end|>"),
    eos=TOKENIZER.eos,
    pad=TOKENIZER.pad,
)
ENCODER = Encoder(TOKENIZER, CFG, max_prompt=34, max_completion=43, patches=64)
EXAMPLES = [digits.example("train", i) for i in range(12)]


def test_an_sft_row_scores_the_solution_and_its_end_and_nothing_else():
    tokens, vision = ENCODER.sft(EXAMPLES).values()
    assert tokens.tokens.shape == (12, 77) and vision.patches.shape == (12, 64, 1176)
    for i, e in enumerate(EXAMPLES):
        scored = tokens.tokens[i][tokens.response[i]]
        assert (
            scored[-1] == TOKENIZER.eos
            and TOKENIZER.decode(scored[:-1], skip_special=False) == e["solution"]
        )
        real = tokens.segment[i] > 0
        n = real.sum()
        assert real[:n].all() and (tokens.tokens[i][n:] == TOKENIZER.pad).all()
        assert tokens.response[i].nonzero()[0].max() == n - 1
        assert np.diff(tokens.response[i].nonzero()[0]).max() == 1
        assert (tokens.tokens[i] == TOKENIZER.image_pad).sum() == 16
        patches, _ = images.process(e["image"])
        assert np.array_equal(vision.patches[i], patches)


def test_prompts_are_the_rows_without_their_completion():
    tokens, _ = ENCODER.sft(EXAMPLES).values()
    prompts, _ = ENCODER.prompts(EXAMPLES).values()
    for i in range(len(EXAMPLES)):
        n = int((prompts.segment[i] > 0).sum())
        assert n in (32, 34) and not tokens.response[i, :n].any() and tokens.response[i, n]
        assert np.array_equal(prompts.tokens[i, :n], tokens.tokens[i, :n])
        assert np.array_equal(prompts.position[i, :, :n], tokens.position[i, :, :n])
        assert (tokens.position[i, :, n] == prompts.next_position[i]).all()
        assert TOKENIZER.decode(prompts.tokens[i, :n], skip_special=False).endswith("assistant\n")


def test_text_only_rows_ride_along_with_images():
    e = [digits.equation(0), EXAMPLES[0]]
    _, vision = ENCODER.sft(e).values()
    assert not vision.segment[0].any() and vision.segment[1].all()
    bucketed = Encoder(TOKENIZER, CFG, max_prompt=34, max_completion=43)
    assert bucketed.sft(e[:1])["vision"] is None
    assert bucketed.sft(e)["vision"].patches.shape == (2, 64, 1176)


def test_a_long_example_is_refused_by_name_or_dropped_never_cut():
    long = {
        **EXAMPLES[0],
        "id": "long",
        "solution": EXAMPLES[0]["solution"] + "\n3 3 3 3 3 3 3 3 3",
    }
    with pytest.raises(
        UserError, match=r"example long: its completion has \d+ tokens, the limit is 43"
    ):
        ENCODER.sft([long])
    wide = {**EXAMPLES[0], "id": "wide", "image": Image.new("RGB", (280, 280))}
    with pytest.raises(
        UserError, match=r"example wide: its prompt has \d+ tokens, the limit is 34"
    ):
        ENCODER.prompts([wide])
    thin = {**EXAMPLES[0], "id": "thin", "image": Image.new("RGB", (3000, 10))}
    special = {**EXAMPLES[0], "id": "special", "problem": "<|im_end|>"}
    kept, dropped, errors = drop_long(ENCODER, [thin, *EXAMPLES, long, special, wide])
    assert kept == EXAMPLES and dropped == 2
    assert "example thin: " in errors[0] and "aspect ratio" in errors[0]
    assert "example special: its problem holds the special token" in errors[1] and len(errors) == 2


def test_lengths_of_an_image_file_equal_those_of_the_encoded_row(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.new("RGB", (56, 140)).save(tmp_path / "a.jpg", exif=exif)
    e = {**EXAMPLES[0], "image": str(tmp_path / "a.jpg")}
    row = ENCODER.prompt(e)
    assert row.images[0][1] == (1, 4, 10)
    assert ENCODER.lengths(e) == (len(row.tokens), len(ENCODER.completion(e)))


@pytest.mark.parametrize("field", ["problem", "solution"])
def test_special_tokens_in_data_are_refused(field):
    bad = {**EXAMPLES[0], "id": "bad", field: EXAMPLES[0][field] + "<|image_pad|>"}
    with pytest.raises(UserError, match=f"example bad: its {field}"):
        ENCODER.sft([bad])


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(UserError, match="not a pair"):
        Encoder(closed_vocabulary([*digits.PIECES, "extra"]), CFG, max_prompt=9, max_completion=9)
    far = TOKENIZER.backend.to_str().replace('"<|endoftext|>":0', '"<|endoftext|>":5000')
    far = Tokenizer(Backend.from_str(far.replace('"id":0', '"id":5000')))
    assert far.vocab_size == TOKENIZER.vocab_size
    with pytest.raises(UserError, match="largest id is 5000"):
        Encoder(far, CFG, max_prompt=9, max_completion=9)


def test_a_step_of_a_dataset_is_a_function_of_the_step():
    draw = lambda: dataset(Generated(lambda i: digits.example("train", i)), ENCODER.sft, batch=4)
    first, second = draw(), draw()
    b = first[1000]
    assert b.ids == [f"digits/train/0/{i}" for i in range(4000, 4004)]
    second[3]  # what was read before has no influence
    again = second[1000]
    for x, y in zip(b.arrays["tokens"], again.arrays["tokens"]):
        assert np.array_equal(x, y)
    assert [e["id"] for e in b.examples] == b.ids


def test_a_finite_source_is_shuffled_anew_each_epoch_and_never_ends():
    data = dataset(EXAMPLES, ENCODER.prompts, batch=4, seed=0)
    epochs = [[i for step in range(3 * k, 3 * k + 3) for i in data[step].ids] for k in range(3)]
    ids = sorted(e["id"] for e in EXAMPLES)
    assert [sorted(e) for e in epochs] == [ids] * 3 and len({*map(tuple, epochs)}) == 3
    plain = dataset(EXAMPLES, ENCODER.prompts, batch=5)
    assert plain[2].ids == [EXAMPLES[i % 12]["id"] for i in range(10, 15)]
    with pytest.raises(UserError):
        dataset([], ENCODER.prompts, batch=4)


@pytest.mark.parametrize("name", ["grid_count", "toy_chart"])
def test_other_generators_fit_their_declared_lengths(name):
    g = GENERATORS[name]
    tokenizer = closed_vocabulary(g.pieces)
    text = TransformerConfig(
        vocab=tokenizer.vocab_size,
        d=32,
        layers=1,
        heads=2,
        kv=1,
        head_dim=16,
        ffn=32,
        mrope_sections=(2, 3, 3),
    )
    special = dict(image_pad=tokenizer.image_pad, eos=tokenizer.eos, pad=tokenizer.pad)
    special |= dict(video_pad=6, vision_start=3, vision_end=4)
    cfg = Qwen2VLConfig(text, VisionConfig(depth=1, embed=32, heads=2, mlp=32, out=32), **special)
    encoder = Encoder(
        tokenizer,
        cfg,
        max_prompt=batches.PROMPT_OVERHEAD + g.visual + g.max_problem,
        max_completion=g.max_solution,
        patches=4 * g.visual,
    )
    examples = [g.example("test", i) for i in range(8)]
    assert encoder.sft(examples)["vision"].segment.all()
