"""Router files of torch: converted, and refused where they are more than tensors."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrepro.methods.vorta import convert, router, router_files
from jaxrepro.models import video_dit

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.oracle

CFG = video_dit.PRESETS["wan_tiny"]


def states(dtype):
    """Routers as torch stores them: one linear layer from d to 3 numbers a head, for each block."""
    torch.manual_seed(0)
    found = {}
    for i in range(CFG.layers):
        layer = torch.nn.Linear(CFG.d, 3 * CFG.heads).to(dtype)
        found |= {f"blocks.{i}.router.linear.{k}": v for k, v in layer.state_dict().items()}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_of_torch_gives_the_gates_of_torch(dtype, tmp_path, capsys):
    found = states(dtype)
    torch.save(found, tmp_path / "router.pt")
    target = tmp_path / "router.safetensors"
    assert convert.main([str(tmp_path / "router.pt"), str(target)]) == 0
    assert capsys.readouterr().out == f"{target}: {2 * CFG.layers} tensors\n"
    assert set(load_file(target)) == set(found)
    routers = router_files.load(target, CFG)
    e = torch.randn(2, CFG.d)
    ours = router.gates(routers, jnp.asarray(e.numpy()))
    for i in range(CFG.layers):
        w = {k: found[f"blocks.{i}.router.linear.{k}"].float() for k in ("weight", "bias")}
        logits = torch.nn.functional.linear(torch.nn.functional.silu(e), **w)
        theirs = logits.reshape(2, CFG.heads, 3).softmax(-1)
        np.testing.assert_allclose(ours[:, i], theirs.numpy(), atol=1e-6)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Hostile(), "holds more than tensors"),
        (lambda: [torch.zeros(2)], "holds list, not tensors by name"),
        (lambda: {"model": {"a": torch.zeros(2)}}, "model is no tensor of floats"),
        (lambda: {"a": torch.zeros(2, dtype=torch.int32)}, "a is no tensor of floats"),
        (lambda: {}, "not tensors by name"),
    ],
)
def test_a_file_of_more_than_tensors_is_refused_in_one_line(
    make, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    torch.save(make(), "router.pt")
    assert convert.main(["router.pt", "router.safetensors"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert sorted(os.listdir()) == ["router.pt"]
