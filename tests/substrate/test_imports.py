"""Models, rollouts and benchmarks run where few packages are installed."""

import subprocess
import sys

import pytest

from jaxrepro.config import ROOT

RARE = "jraph gymnax grain datasets ml_collections gguf sklearn transformers torch"
CODE = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split():
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Absent())
for name in sys.argv[2].split():
    importlib.import_module(name)
"""


@pytest.mark.parametrize(
    ("absent", "modules"),
    [
        (
            f"{RARE} absl flax optax orbax",
            "jaxrepro.models.qwen2_vl jaxrepro.models.hf jaxrepro.models.gguf jaxrepro.rollout.generate "
            "jaxrepro.bench.grpo jaxrepro.methods.stepgrpo.objective jaxrepro.config "
            "jaxrepro.bench.vorta jaxrepro.models.video_dit jaxrepro.ops.routed "
            # what it imports in its functions
            "jaxrepro.bench._video_numerics jaxrepro.methods.vorta.caching jaxrepro.ops.flow jaxrepro.ops.sliding",
        ),
        # optax itself imports absl
        (
            f"{RARE} orbax",
            "jaxrepro.train.step jaxrepro.train.optim jaxrepro.train.state jaxrepro.cli "
            "jaxrepro.bench.__main__",
        ),
    ],
)
def test_modules_import_without_packages_that_they_do_not_use(absent, modules):
    done = subprocess.run(
        [sys.executable, "-c", CODE, absent, modules], cwd=ROOT, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
