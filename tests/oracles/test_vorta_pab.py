"""Cached attention modules against the hook of diffusers, step by step through a tiny random Wan model and HunyuanVideo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.methods.vorta import caching
from jaxrepro.models import video_dit, video_files
from jaxrepro.models.video_dit import Condition

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.oracle

# in the range 100 .. 800 of the hook from step 2 to 7; 800 and 100 themselves are outside
TIMES = [999.0, 800.0, 799.0, 650.0, 500.0, 350.0, 200.0, 101.0, 100.0, 40.0]
SIZES = {
    "WanTransformer3DModel": dict(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=3,
        out_channels=3,
        text_dim=12,
        freq_dim=32,
        ffn_dim=40,
        num_layers=2,
    ),
    "HunyuanVideoTransformer3DModel": dict(
        in_channels=3,
        out_channels=3,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=3.0,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=12,
        pooled_projection_dim=7,
        rope_axes_dim=(4, 6, 6),
    ),
}


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("kind", SIZES)
def test_velocities_with_kept_modules_are_those_of_the_hook(kind, every, tmp_path):
    torch.manual_seed(0)
    peer = getattr(diffusers, kind)(**SIZES[kind]).eval()
    with torch.no_grad():
        for name, p in peer.named_parameters():
            p.normal_(1.0 if "norm" in name and p.ndim == 1 else 0.0, 0.3)
    peer.save_pretrained(tmp_path)
    cfg = video_files.read_config(tmp_path)
    params = video_files.load(tmp_path, cfg)

    now = [TIMES[0]]
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=every,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: now[0],
    )
    diffusers.apply_pyramid_attention_broadcast(peer, config)

    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    text, more, condition = draw(1, 5, 12), {}, {}
    tokens = 2 * 2 * 3
    if "Hunyuan" in kind:
        pooled, tokens = draw(1, 7), tokens + 5
        condition = dict(
            length=jnp.array([4]), pooled=jnp.asarray(pooled), guidance=jnp.array([6000.0])
        )
        more = dict(
            encoder_attention_mask=torch.arange(5)[None] < 4,
            pooled_projections=torch.from_numpy(pooled),
            guidance=torch.tensor([6000.0]),
        )

    @jax.jit
    def run(x, t, computes, cache):
        c = Condition(jnp.asarray(text), **condition)
        around = caching.broadcast(computes)
        return video_dit.apply(params, cfg, x, t, c, around=around, state=cache)

    computes = caching.schedule(TIMES, every=every)
    assert 0 < (~computes).sum() < 6
    cache = caching.empty(cfg, rows=1, tokens=tokens)
    gap = 0.0
    for t, compute in zip(TIMES, computes):
        x, now[0] = draw(1, 3, 2, 4, 6), t  # new latents in every step: an old output shows
        with torch.no_grad():
            theirs = peer(
                torch.from_numpy(x),
                timestep=torch.tensor([t]),
                encoder_hidden_states=torch.from_numpy(text),
                **more,
            ).sample.numpy()
        arguments = jnp.asarray(x), jnp.array([t])
        plain, _ = run(*arguments, True, cache)  # nothing kept: the difference must show
        ours, cache = run(*arguments, bool(compute), cache)
        bound = 2e-4 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=bound, rtol=0)
        if not compute:
            gap = max(gap, np.abs(plain - ours).max() / np.abs(theirs).max())
    assert gap > 0.01
