"""Importing a model needs the memory of its parameters, and little more."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from jaxrepro.config import ROOT
from jaxrepro.models import names, tensors
from jaxrepro.models.transformer import TransformerConfig

MB = 1_000_000
CFG = TransformerConfig(
    vocab=32_000, d=1024, layers=12, heads=8, kv=4, head_dim=128, ffn=3072, family="llama",
    qkv_bias=False, tied=False,
)  # fmt: skip
CODE = """
import json, resource, sys, threading, time
import jax, numpy as np
from jaxrepro.models import hf

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

cfg = hf.read_config(sys.argv[1])
jax.block_until_ready(jax.device_put(np.zeros(8)))
before, peak, over = resident(), [0], threading.Event()

def watch():
    while not over.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
params = jax.block_until_ready(hf.load(sys.argv[1], cfg, dtype=sys.argv[2]))
over.set()
thread.join()
held = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps([peak[0] - before, held]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """About 400 MB of bfloat16 in two shards."""
    from jaxrepro.models import families

    folder = tmp_path_factory.mktemp("large") / "model"
    folder.mkdir()
    half = np.dtype(ml_dtypes.bfloat16)
    block = np.random.default_rng(0).normal(size=1_000_003).astype(half)
    fill = lambda shape: lambda: np.resize(block, shape)
    entries = [
        tensors.Entry(name, half, line.file_shape, fill(line.file_shape))
        for line in names.table(CFG)
        for name in line.names
    ]
    shards = tensors.shards(entries, 250 * MB)
    for file, group in shards.items():
        tensors.write(folder / file, group)
    (folder / tensors.INDEX).write_text(json.dumps(tensors.index_of(shards)))
    (folder / "config.json").write_text(json.dumps(families.to_hf(CFG, dtype="bfloat16")))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_import_peaks_at_the_parameters_and_the_largest_tensor(folder, dtype):
    stored = tensors.stored(folder)
    size = lambda t: int(np.prod(t.shape)) * t.dtype.itemsize
    assert 380 * MB < sum(map(size, stored.values())) < 480 * MB
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), dtype], cwd=ROOT, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    peak, held = json.loads(done.stdout)
    largest = max(map(size, stored.values()))
    print(f"{dtype}: peak {peak / MB:.0f} MB, parameters {held / MB:.0f} MB")
    assert held <= peak + 64 * MB  # the parameters themselves were seen
    assert peak <= held + largest + 200 * MB
