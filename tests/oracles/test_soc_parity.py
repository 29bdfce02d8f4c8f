"""The losses of SOC equal torch's cross-entropy and logsumexp, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jaxrepro.methods.soc import objective
from jaxrepro.methods.soc.objective import Stats
from jaxrepro.ops.logprob import token_stats

pytestmark = pytest.mark.oracle
IGNORED = -100
B, T, V, D = 3, 7, 33, 8


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    targets = rng.integers(0, V, (B, T))
    mask = np.arange(T) < np.array([[7], [2], [5]])
    return hidden.astype(np.float32), head.astype(np.float32), targets.astype(np.int32), mask


def theirs(data, lam, variant):
    hidden, head = (torch.tensor(a, requires_grad=True) for a in data[:2])
    targets, mask = torch.tensor(data[2], dtype=torch.long), torch.tensor(data[3])
    z = hidden @ head
    labels = torch.where(mask, targets, IGNORED)
    ce = torch.nn.functional.cross_entropy(
        z.reshape(-1, V), labels.reshape(-1), ignore_index=IGNORED
    )
    kept = z[mask]
    v = torch.logsumexp(kept, -1)
    extra = {
        "soc": -v,
        "centred": -(v - kept.mean(-1)),
        "entropy": torch.distributions.Categorical(logits=kept).entropy(),
    }
    if (
        variant == "smoothing"
    ):  # torch takes no negative label_smoothing: the definition, written out
        e = -lam / (1 - lam)
        uniform = -torch.log_softmax(kept, -1).mean(-1).mean()
        loss = (1 - e) * ce + e * uniform
    else:
        loss = ce + lam * extra[variant].mean()
    loss.backward()
    return [x.detach().numpy() for x in (loss, hidden.grad, head.grad)]


@pytest.mark.parametrize("variant", ["soc", "centred", "smoothing", "entropy"])
@pytest.mark.parametrize("lam", [0.0, 0.2, 0.5])
def test_loss_and_gradient_equal_torch(data, variant, lam):
    hidden, head, targets, mask = map(jnp.asarray, data)
    want = ("lp", "lse", "mean_logit", "entropy")

    def loss(hidden, head):
        found = token_stats(hidden, head, targets, want, chunk=4)
        per_token = objective.per_token(Stats(**found), lam=lam, variant=variant)
        total, weight = objective.aggregate(per_token, mask)
        return total / weight

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
    for ours, reference in zip((value, *grads), theirs(data, lam, variant), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-5)


def test_v_is_torchs_logsumexp_of_bfloat16_logits_in_float32(data):
    z = jnp.asarray(data[0] @ data[1]).astype(jnp.bfloat16)
    found = objective.stats(z, jnp.asarray(data[2]))
    wanted = torch.logsumexp(torch.tensor(np.asarray(z, np.float32)), -1).numpy()
    np.testing.assert_allclose(found.lse, wanted, rtol=1e-6)
