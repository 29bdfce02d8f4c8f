"""The golden batch of the tests of preference losses, and a batch for any schema."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro.methods.dpo.registry import Batch, SeqStats, Tokenwise, loss, resolve
from jaxrepro.methods.dpo.spec import SCHEMAS


def columns(*rows):
    return jnp.stack([jnp.asarray(r, jnp.float32) for r in rows], 1)


GOLDEN = SeqStats(
    p=columns([-12, -30.5, -8.25, -45], [-14.5, -28, -9.75, -40]),
    q=columns([-13, -30, -9, -44], [-13.5, -29, -9.5, -41.5]),
    n=columns([10, 25, 6, 40], [12, 20, 8, 30]),
)
D = np.array([2, -1.5, 1, -2.5])  # differences of log-ratios of the golden batch


def first(seq, k=1):
    """Response k - 1 of the golden batch alone, as (b, 1)."""
    return SeqStats(seq.p[:, k - 1 : k], seq.q[:, k - 1 : k], seq.n[:, k - 1 : k])


def log_ratios(a, n=None):
    """Statistics with these log-ratios (b, k) and q = -20."""
    a = jnp.asarray(a, jnp.float32)
    n = jnp.full_like(a, 10.0) if n is None else jnp.asarray(n, jnp.float32)
    return SeqStats(a - 20, jnp.full_like(a, -20.0), n)


def mean(name, seq=GOLDEN, batch=None, state=None, **hyper):
    return float(items(name, seq, batch, state, **hyper).mean())


def items(name, seq=GOLDEN, batch=None, state=None, **hyper):
    return loss(resolve(name, **hyper), seq, batch, state)[0]


def example(spec, *, b=4, t=5, seed=0):
    """Tokens and a batch with everything that any loss of this schema may ask for."""
    k = SCHEMAS[spec.schema] or {"ranked": 4, "forget": 2}[spec.schema]
    rng = np.random.default_rng(seed)
    f = lambda *shape: rng.uniform(0.1, 1.0, shape).astype(np.float32)
    length = rng.integers(1, t + 1, (b, k))
    length[0, :2] = [t, t - 2][: min(k, 2)]
    mask = np.arange(t) < length[..., None]
    tokens = Tokenwise(
        -2 * f(b, k, t), -2 * f(b, k, t), mask, log_sum_p2=-f(b, k, t), ref_entropy=f(b, k, t),
        kl=f(b, k, t), weights=f(b, k, t), turn=np.arange(t) // 2 + np.zeros((b, k, 1), int),
    )  # fmt: skip
    scores = np.sort(rng.uniform(0.05, 0.95, (b, k)), -1)[:, ::-1].astype(np.float32)
    batch = Batch(
        scores=scores, labels=np.arange(b) % 2 == 0, ties=np.arange(b) % 3 == 0, prompt_weight=f(b),
        rewards=f(b, k, 1), kl_p=-f(b), kl_q=-2 * f(b), probability=0.5 + f(b) / 2, explore=np.arange(b) % 2,
        age=5 * f(b), unsafe=rng.random((b, k)) < 0.4, embedding=f(b, 3), value=f(b),
        reward_head=f(b, k), vocab=np.int32(7), progress=np.float32(0.5), key=jax.random.key(seed),
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, (tokens, batch))


def close(x, want, **kw):
    np.testing.assert_allclose(x, want, **({"rtol": 1e-5, "atol": 2e-6} | kw))


def slope(name, seq=GOLDEN, batch=None, **hyper):
    """Gradient of the summed loss by p."""
    return jax.grad(lambda p: items(name, seq._replace(p=p), batch, **hyper).sum())(seq.p)
