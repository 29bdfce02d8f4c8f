"""A GRPO update of Qwen2-VL equals torch's: same weights, images, completions; loss, gradient, update."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import warnings

import jax
import numpy as np
import torch

from jaxrepro.bench import grpo
from jaxrepro.models import hf, qwen2_vl, transformer
from jaxrepro.train import step

pytestmark = pytest.mark.oracle

SHAPE = grpo.SHAPES["tiny"] | {
    "questions": 3,
    "samples": 4,
    "words": 5,
    "new": 12,
    "image": [56, 84],
}
SHAPE |= {"lr": 1e-3, "max_grad_norm": 0.05, "beta": 0.5}


def in_file_order(tree, cfg):
    """Our tree as {name in the checkpoint: array}."""
    tree = {"text": transformer.stack(tree["text"]), "vision": tree["vision"]}
    found = {}
    for line in hf.table(cfg):
        leaf = tree
        for key in line.path.split("/"):
            leaf = leaf[key]
        for i, name in enumerate(line.names):
            found[name] = line.to_file(np.asarray(leaf[i] if line.stacked else leaf))
    return found


def hub_name(name: str) -> str:
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


@pytest.fixture(scope="module")
def sides():
    """Both sides after the reference was fixed and the policy moved away from it, so that k3 counts."""
    from jaxrepro.bench._grpo_torch import Peer

    cfg = grpo.config(SHAPE)
    batch = grpo.make_batch(cfg, SHAPE, ragged=True)
    init = jax.jit(lambda key: qwen2_vl.init(key, cfg))
    reference, other = init(jax.random.key(0)), init(jax.random.key(1))
    policy = jax.tree.map(lambda a, b: a + 0.1 * b, reference, other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and transformers' own
        peer = Peer(policy, cfg, batch, SHAPE, threads=1)
        frozen = Peer(reference, cfg, batch, SHAPE, threads=1)
        peer.reference = frozen.reference
    ours = grpo.Ours(policy, cfg, batch, SHAPE)
    ours.state = ours.state.replace(extra=reference)
    return cfg, ours, peer


@pytest.fixture(scope="module")
def gradients(sides):
    cfg, ours, peer = sides
    rows = ours.batch | {"reference": jax.jit(ours.log_probs)(ours.state.extra, ours.batch)}
    total, weight, aux, grads = jax.jit(
        lambda params: step.accumulate(ours.loss, params, rows, SHAPE["micro_batches"])
    )(ours.state.params)
    grads = jax.tree.map(lambda g: g / weight, grads)
    peer.policy.zero_grad()
    loss = peer.loss()
    loss.backward()
    theirs = {hub_name(n): p.grad.numpy().copy() for n, p in peer.policy.named_parameters()}
    return float(total / weight), float(loss.detach()), in_file_order(grads, cfg), theirs, aux


def test_the_loss_equals_torchs(gradients):
    ours, theirs, _, _, aux = gradients
    assert abs(theirs) > 1e-4  # the policy has left the reference
    kl, tokens = aux["kl"]
    assert float(kl / tokens) > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_every_tensor_equals_torchs(gradients):
    _, _, ours, theirs, _ = gradients
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        scale = np.abs(want).max()
        assert scale > 0, name
        np.testing.assert_allclose(ours[name], want, rtol=1e-3, atol=2e-4 * scale, err_msg=name)


def test_torchs_own_two_ways_agree(sides):
    _, _, peer = sides
    with torch.no_grad():
        a, b = peer._log_probs(peer.policy), peer._log_probs_by_hand(peer.policy)
    np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-4)


def test_the_update_equals_torchs(sides, gradients):
    """Clip by the global norm, then AdamW. Its first update is lr times the gradient's sign, so tensors
    are compared where the gradient is well above AdamW's eps and float32's noise."""
    cfg, ours, peer = sides
    _, _, _, theirs, _ = gradients
    before = {hub_name(n): p.detach().numpy().copy() for n, p in peer.policy.named_parameters()}
    peer.step_by_hand()
    after = {hub_name(n): p.detach().numpy() for n, p in peer.policy.named_parameters()}
    ours.step()
    got = in_file_order(ours.state.params, cfg)
    norm = np.sqrt(sum(float((g**2).sum()) for g in theirs.values()))
    assert norm > SHAPE["max_grad_norm"]  # the clip is at work
    for name, new in after.items():
        g = np.abs(theirs[name])
        sure = g > np.maximum(1e-5, 1e-3 * g.max())
        assert sure.mean() > 0.02, name
        moved, ours_moved = new - before[name], got[name] - before[name]
        np.testing.assert_allclose(
            ours_moved[sure], moved[sure], atol=0.05 * SHAPE["lr"], err_msg=name
        )
