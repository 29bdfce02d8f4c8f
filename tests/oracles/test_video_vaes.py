"""Latents to pictures through the VAEs of diffusers: their constants, their shapes, their pictures."""

import numpy as np
import pytest

from jaxrepro.config import UserError
from jaxrepro.data import latents, video_output

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.oracle


def vae(model):
    """A tiny random VAE; all that is public of its config is as published."""
    torch.manual_seed(0)
    if model == "wan":
        return diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )


def test_constants_are_those_of_diffusers():
    x = np.random.default_rng(0).normal(size=(16, 1, 1, 1)).astype(np.float32)
    config = vae("wan").config
    mean, std = (np.reshape(config[f"latents_{n}"], (16, 1, 1, 1)) for n in ("mean", "std"))
    np.testing.assert_allclose(latents.normalise(x, "wan"), (x - mean) / std, rtol=1e-5)
    scaled = x * vae("hunyuan").config.scaling_factor
    np.testing.assert_allclose(latents.normalise(x, "hunyuan"), scaled, rtol=1e-6)


@pytest.mark.parametrize("model", ["hunyuan", "wan"])
@pytest.mark.filterwarnings("ignore")  # of diffusers
def test_pictures_are_those_of_the_vae(model, tmp_path):
    wanted = vae(model).eval()
    wanted.save_pretrained(tmp_path / "vae")
    z = np.random.default_rng(1).normal(size=(2, 16, 2, 3, 4)).astype(np.float32)
    with torch.inference_mode():
        y = wanted.decode(torch.from_numpy(latents.denormalise(z, model))).sample
    y = (y.clamp(-1, 1).permute(0, 2, 3, 4, 1).numpy() + 1) * 127.5
    for folder in (tmp_path, tmp_path / "vae"):  # of the pipeline, of the VAE
        found = video_output.decode(z, model, folder, tiled=False)
        assert found.shape == (2, 5, 24, 32, 3) and found.std() > 0
        assert abs(found - y).max() <= 0.51
    assert video_output.decode(z, model, folder).shape == found.shape
    with pytest.raises(UserError, match="no VAE"):
        video_output.decode(z, model, tmp_path / "nothing")
