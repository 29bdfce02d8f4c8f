"""Helper: a decoder of one thin layer, rows of pairs for it, and descent that shows the gradient."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrepro.methods.dpo.registry import resolve
from jaxrepro.methods.dpo.rows import collate, shape_of
from jaxrepro.methods.dpo.spec import Result
from jaxrepro.models import transformer
from jaxrepro.models.transformer import TransformerConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
import meshes

CFG = TransformerConfig(vocab=13, d=16, layers=1, heads=2, kv=1, head_dim=8, ffn=24)
B, C, T = 8, 6, 4  # items; tokens of a response; of a prompt

# Plain descent whose state is the last gradient: new - old parameters would lose its small digits.
DESCENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.negative, grads), grads),
)


def items(seed=0, k=2, b=B):
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, CFG.vocab, n).tolist()
    return [
        {
            "id": str(i),
            "prompt": draw(rng.integers(1, 5)),
            "responses": [draw(rng.integers(1, C + 1)) for _ in range(k)],
            "label": bool(i % 2),
        }
        for i in range(b)
    ]


def rows_of(found, **settings):
    shape = shape_of(found, multiple=1)._replace(prompt=T, response=C)
    return jax.tree.map(jnp.asarray, collate(found, shape, pad=0, **settings))


@functools.cache
def both():
    """The policy, and a reference that differs from it."""
    init = jax.jit(lambda key: transformer.init(key, CFG), compiler_options=meshes.QUICK)
    policy, ref = (init(jax.random.key(i)) for i in range(2))
    return jax.tree.map(lambda a, b: a + 0.3 * b, policy, ref), ref


def shared(names, shares):
    """A mix with traced shares: one program then gives each of its losses alone."""

    def one(spec, share):
        @functools.wraps(spec.formula)
        def scaled(*args, **hyper):
            found = spec.formula(*args, **hyper)
            found = found if isinstance(found, Result) else Result(found)
            return found._replace(per_item=share * found.per_item)

        return dataclasses.replace(spec, formula=scaled)

    return tuple((one(resolve(n), x), 1.0) for n, x in zip(names, shares, strict=True))
