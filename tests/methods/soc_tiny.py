"""Helper: SOC at its smallest, compiled fast and each program once."""

import contextlib
import functools

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxrepro import config as configuration
from jaxrepro.train import policy

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SHAPE = dict(d=32, layers=1, heads=4, kv=2, head_dim=8, ffn=48)
SETTINGS = {
    "steps": 4,
    "sft.batch": 8,
    "sft.warmup": 1,
    "data.n": 40,
    "eval.n": 6,
    "eval.batch": 4,
    "decode.beams": (1, 3),
    "decode.width": 3,
    "decode.penalties": (),
    "decode.temperatures": (),
    "checkpoint.every": 2,
    "log.tensorboard": False,
    "log.curves": False,
}


def config(**changes):
    """The config of size tiny with SETTINGS; `soc__lam=0` sets soc.lam."""
    changes = {k.replace("__", "."): v for k, v in changes.items()}
    return configuration.load("configs/soc.py:tiny", SETTINGS | changes)


@contextlib.contextmanager
def small(folder):
    """A small model under the name of its shape, quick compilation, programs cached in `folder`."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policy.SHAPES, "tiny_2", policy.SHAPES["tiny_2"] | SHAPE)
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
        for name, value in zip(names, (str(folder), 0.1)):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
