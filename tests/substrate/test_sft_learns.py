"""The tiny size of fine-tuning as it is, in a file without the small shapes of test_sft.py."""

import pytest

from jaxrepro import config
from jaxrepro.train import sft


@pytest.mark.slow
def test_the_tiny_size_learns(tmp_path):
    chosen = config.load("configs/sft.py", {"log.tensorboard": False, "eval.n": 128})
    results = sft.run(chosen, tmp_path)
    assert results["before/test/exact_match"] < 0.1 and results["after/test/exact_match"] > 0.9
    assert results["test/gain_lo"] > 0.8
