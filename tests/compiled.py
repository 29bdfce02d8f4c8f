"""Helper: runs of small models, compiled quickly and each program once."""

import contextlib
import functools

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__ < (0, 11):  # later ones have no older emitters; see conftest.py
    QUICK["xla_cpu_use_fusion_emitters"] = False
NAMES = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


@contextlib.contextmanager
def small(folder, *shapes):
    """Quick compilation, programs cached in `folder`, and (table, name, shape) in the place of real shapes."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    with pytest.MonkeyPatch.context() as patch:
        for entry in shapes:
            patch.setitem(*entry)
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
        for name, value in zip(NAMES, (str(folder), 0.1)):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield patch
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
