"""SmolLM2-135M as a real model: tokens, logits against torch, memory of the import, real questions.

The weights are fetched from the Python index on first use; without them the tests are skipped, and fail in CI.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro import export
from jaxrepro.config import ROOT, UserError
from jaxrepro.data import chat, locate, questions
from jaxrepro.data.questions import Encoder
from jaxrepro.data.text import Tokenizer, load_tokenizer
from jaxrepro.models import gguf, lora, transformer

sys.path.insert(0, str(Path(__file__).parents[1]))
from fetched import without
from gguf_files import LLAMA, QWEN2, drawn, write

pytestmark = pytest.mark.oracle
FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def path():
    try:
        return locate.packaged("smollm2")
    except UserError as e:
        without(e)


@pytest.fixture(scope="module")
def ours(path):
    file = gguf.open_file(path)
    cfg = gguf.read_config(file)
    return gguf.load(file, cfg), cfg


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(path)


def logits(params, cfg, ids):
    @jax.jit
    def run(params, ids):
        x = transformer.embed(params, cfg, ids)
        hidden, _ = transformer.apply(params, cfg, x, position=jnp.arange(ids.shape[1])[None])
        return transformer.logits(params, cfg, hidden)

    return np.asarray(run(params, jnp.asarray(ids)))


def theirs(path, ids):
    """Logits of the model that transformers itself makes of the file."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    with torch.inference_mode():
        return model(torch.tensor(ids)).logits.numpy()


@pytest.mark.parametrize(("cfg", "architecture"), [(LLAMA, "llama"), (QWEN2, "qwen2")])
def test_a_tiny_file_is_the_same_model_in_transformers(cfg, architecture, tmp_path):
    params = jax.tree.map(lambda x: 0.3 * x, drawn(cfg))
    path = write(
        tmp_path / "a.gguf", params, cfg, architecture, fields=[("add_vocab_size", cfg.vocab)]
    )
    ids = np.random.default_rng(0).integers(0, cfg.vocab, (1, 12))
    found, wanted = logits(gguf.load(path), gguf.read_config(path), ids), theirs(path, ids)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_france_has_its_capital_and_torchs_logits(path, ours, tokenizer):
    params, cfg = ours
    ids = tokenizer.encode(FRANCE)
    assert ids == [504, 3575, 282, 4649, 314]
    found = logits(params, cfg, [ids])
    assert tokenizer.decode([int(found[0, -1].argmax())]) == " Paris"
    assert np.abs(found - theirs(path, [ids])).max() < 1e-3


def test_the_tokenizer_is_that_of_transformers_and_its_template_ours(path, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    converted = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "Twelve ducks, 12345 eggs;\n\nisn't   that ünïcode 日本? <|im_end|>\n"
    assert saved(text)["input_ids"] == tokenizer.encode(text)
    assert converted(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    asked = saved.apply_chat_template(
        [{"role": "user", "content": text[:9]}], add_generation_prompt=True, tokenize=False
    )
    assert asked == chat.render(text[:9], system=system)


def test_trained_adapters_leave_as_a_model_that_transformers_reads_with_equal_logits(
    ours, tokenizer, tmp_path
):
    params, cfg = ours
    params, cfg = lora.attach(jax.random.key(0), params, cfg, lora.Lora(rank=4))
    trained = lambda path, w: 0.02 * np.random.default_rng(0).normal(size=w.shape).astype("f4")
    moved = jax.tree_util.tree_map_with_path(trained, params["layers"]["lora"])
    params = params | {"layers": params["layers"] | {"lora": moved}}
    out = tmp_path / "model"
    export.write(out, params, cfg, tokenizer, "# A model card")
    ids = transformers.AutoTokenizer.from_pretrained(out)(FRANCE)["input_ids"]
    assert ids == tokenizer.encode(FRANCE)
    found = logits(params, cfg, [ids])
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits.numpy()
    assert np.abs(found - wanted).max() < 1e-3
    assert np.abs(wanted - logits(*ours, [ids])).max() > 0.1  # the adapters are in it


def test_the_template_of_a_tokenizer_without_one_writes_our_chat(tokenizer, tmp_path):
    Tokenizer(tokenizer.backend).save(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12 + 3?"}]
    asked = saved.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert asked == chat.render("12 + 3?", system="Be brief.")


def test_the_import_peaks_near_the_size_of_the_parameters(path):
    code = """if True:
        import json, re, sys
        import jax, gguf as _
        from jaxrepro.models import gguf
        def status(name):  # of this program; getrusage's peak begins with the parent's
            return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
        jax.numpy.zeros(3).block_until_ready()
        start = status("VmRSS")
        params = gguf.load(sys.argv[1])
        jax.block_until_ready(params)
        sizes = [x.nbytes for x in jax.tree.leaves(params)]
        print(json.dumps([status("VmHWM") - start, sum(sizes), max(sizes)]))
    """
    words = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    peak, total, largest = json.loads(done.stdout)
    assert peak <= total + largest + 200e6, f"{peak / 1e6:.0f} MB"


def test_real_questions_are_apart_and_their_rows_are_whole(tokenizer):
    pytest.importorskip("reasoning_gym")
    found = questions.load(generator="gsm_symbolic", n=300, test=100, seed=0)
    again = questions.load(generator="gsm_symbolic", n=300, test=100, seed=1)
    texts = lambda items: {" ".join(e["problem"].split()) for e in items}
    assert len(texts(found.train)) == 300 and len(texts(found.test)) == 100
    assert not texts(found.train) & texts(found.test) and again.test == found.test
    encoder = Encoder(tokenizer, 256, 160)
    kept = encoder.fitting(found.train, "training")
    assert len(kept) > 200
    tokens = encoder.sft(kept[:8])["tokens"]
    for e, row, response in zip(kept, tokens.tokens, tokens.response):
        assert tokenizer.decode(row[response]) == e["solution"]
        assert questions.final(e["solution"]) is not None
