"""Routers on disk: official names, strict accounting, pickles converted and never read."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrepro.config import UserError
from jaxrepro.methods.vorta import convert, router_files
from jaxrepro.models import params as declarations
from jaxrepro.models import video_dit

KINDS = {"hunyuan": "hunyuan_tiny", "wan": "wan_tiny"}


@pytest.fixture(params=KINDS)
def cfg(request):
    return video_dit.PRESETS[KINDS[request.param]]


def drawn(cfg):
    return declarations.initialise(jax.random.key(0), router_files.declare(cfg))


# blocks (d 3 heads + 3 heads) of the released models' configs: 60 (3072 72 + 72), 40 (5120 120 + 120), 30 (1536 36 + 36).
@pytest.mark.parametrize(
    "name, n", [("hunyuan", 13_275_360), ("wan_14b", 24_580_800), ("wan_1_3b", 1_659_960)]
)
def test_routers_have_the_published_number_of_parameters(name, n):
    assert declarations.count(router_files.declare(video_dit.PRESETS[name])) == n


def test_routers_are_drawn_as_torch_draws_a_linear_layer(cfg):
    for x in jax.tree.leaves(drawn(cfg)):
        assert 0.9 * cfg.d**-0.5 < jnp.abs(x).max() <= cfg.d**-0.5 * (1 + 1e-6) or x.size < 20


def test_a_row_of_the_file_is_a_branch_of_a_head(cfg, tmp_path):
    routers = drawn(cfg)
    router_files.save(tmp_path / "router.safetensors", routers, cfg)
    found = load_file(tmp_path / "router.safetensors")
    last = f"blocks.{cfg.layers - 1}"
    first = "blocks.0"
    if hasattr(cfg, "double"):
        first, last = "transformer_blocks.0", f"single_transformer_blocks.{cfg.single - 1}"
    for block, i in ((first, 0), (last, cfg.layers - 1)):
        weight = found[f"{block}.router.linear.weight"]
        assert weight.shape == (3 * cfg.heads, cfg.d)
        np.testing.assert_array_equal(weight[3 * 1 + 2], routers["kernel"][i, :, 1, 2])
        bias = found[f"{block}.router.linear.bias"]
        np.testing.assert_array_equal(bias[3 * 1 + 2], routers["bias"][i, 1, 2])
    assert len(found) == 2 * cfg.layers
    again = router_files.load(tmp_path / "router.safetensors", cfg)
    jax.tree.map(np.testing.assert_array_equal, again, routers)


def test_all_that_is_wrong_with_a_router_file_is_one_error(cfg, tmp_path):
    path = tmp_path / "router.safetensors"
    router_files.save(path, drawn(cfg), cfg)
    found = load_file(path)
    names = sorted(found)
    del found[names[0]]
    found[names[1]] = found[names[1]][:-1].copy()
    found["blocks.99.router.linear.bias"] = np.zeros(6, np.float32)
    save_file(found, path)
    with pytest.raises(UserError) as error:
        router_files.load(path, cfg)
    text = str(error.value)
    assert f"1 missing: {names[0]}" in text and f"1 wrong shape: {names[1]}" in text
    assert "1 unexpected: blocks.99.router.linear.bias" in text and "\n" not in text


def test_a_pickle_is_refused_with_the_command_that_converts_it(cfg, tmp_path):
    path = tmp_path / "router.pt"
    path.write_bytes(b"PK\x03\x04")
    command = f"python -m jaxrepro.methods.vorta.convert {path} {tmp_path}/router.safetensors"
    with pytest.raises(UserError, match=re.escape(command)):
        router_files.load(path, cfg)
    path.rename(tmp_path / "router.safetensors")  # another name makes no other file of it
    with pytest.raises(UserError, match="is a pickle"):
        router_files.load(tmp_path / "router.safetensors", cfg)


def test_what_is_no_router_file_is_refused(cfg, tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        router_files.load(tmp_path / "absent.safetensors", cfg)


def test_the_command_says_what_is_wrong_and_leaves_nothing(tmp_path, capsys):
    target = tmp_path / "new.safetensors"
    assert convert.main([str(tmp_path / "absent.pt"), str(target)]) == 2
    assert capsys.readouterr().err == f"error: there is no file {tmp_path}/absent.pt\n"
    assert convert.main([str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err
    target.write_text("mine")
    assert convert.main([str(tmp_path / "a.pt"), str(target)]) == 2
    assert "exists: choose a new name" in capsys.readouterr().err
    assert target.read_text() == "mine"


def test_the_package_reads_routers_without_torch():
    code = "import sys; from jaxrepro.methods.vorta import convert, router_files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
