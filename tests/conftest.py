"""Shared set-up: eight fake CPU devices, so that every sharded path runs on a laptop."""

import os
from importlib import metadata

# Most of the fast tests' time is compilation. How kernels are made changes no result that a test may rely on;
# those of the newer emitters take twice as long to compile, and from jax 0.11 on there are no others.
QUICK = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")


def pytest_configure(config):
    """Fast tests compile quickly; slow and oracle tests run what users run."""
    if config.getoption("markexpr").startswith("not slow"):
        os.environ["XLA_FLAGS"] += QUICK
