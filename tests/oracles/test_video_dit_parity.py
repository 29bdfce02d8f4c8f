"""HunyuanVideo and Wan 2.1 against diffusers in torch: velocity, files both ways, schedulers.

The models are tiny and random; every tensor is drawn wide enough that gates, norms and rotations show.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_walk import walk

from jaxrepro.models import video_dit, video_files
from jaxrepro.models.video_dit import Condition
from jaxrepro.ops import flow

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.oracle

HUNYUAN = dict(
    in_channels=3,
    out_channels=5,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    num_single_layers=3,
    num_refiner_layers=2,
    mlp_ratio=3.0,
    patch_size=2,
    patch_size_t=1,
    text_embed_dim=12,
    pooled_projection_dim=7,
    rope_axes_dim=(4, 6, 6),
)
WAN = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=3,
    attention_head_dim=16,
    in_channels=3,
    out_channels=5,
    text_dim=12,
    freq_dim=32,
    ffn_dim=40,
    num_layers=3,
)
LATENTS, TEXT, LENGTHS = (2, 3, 3, 4, 6), 6, (4, 6)
NAMES = {
    "hunyuan": ("HunyuanVideoTransformer3DModel", HUNYUAN),
    "hunyuan without guidance": (
        "HunyuanVideoTransformer3DModel",
        HUNYUAN | {"guidance_embeds": False},
    ),
    "hunyuan with patches in time": (
        "HunyuanVideoTransformer3DModel",
        HUNYUAN | {"patch_size_t": 3},
    ),
    "wan": ("WanTransformer3DModel", WAN),
    "wan with patches in time": ("WanTransformer3DModel", WAN | {"patch_size": (3, 2, 1)}),
}


def peer(name: str):
    """The torch model of a case."""
    kind, config = NAMES[name]
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**config).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.normal_(1.0 if "norm_" in key or (".norm" in key and p.ndim == 1) else 0.0, 0.3)
    return model


def inputs(name: str) -> dict[str, np.ndarray]:
    """Latents, times and conditions."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    out = {
        "latents": draw(*LATENTS),
        "t": np.array([871.5, 33.0], np.float32),
        "text": draw(2, TEXT, 12),
    }
    if "hunyuan" in name:
        out |= {"length": np.array(LENGTHS, np.int32), "pooled": draw(2, 7)}
        if "without" not in name:
            out |= {"guidance": np.array([6000.0, 1000.0], np.float32)}
    return out


def ask(model, x: dict[str, np.ndarray]) -> np.ndarray:
    """The torch model's velocity."""
    x = {key: torch.from_numpy(value) for key, value in x.items()}
    more = {}
    if "length" in x:
        more = {
            "encoder_attention_mask": torch.arange(TEXT) < x["length"][:, None],
            "pooled_projections": x["pooled"],
            "guidance": x.get("guidance"),
        }
    with torch.no_grad():
        return model(
            x["latents"], timestep=x["t"], encoder_hidden_states=x["text"], **more
        ).sample.numpy()


def condition(x: dict[str, np.ndarray]) -> Condition:
    some = {key: jnp.asarray(value) for key, value in x.items() if key not in ("latents", "t")}
    return Condition(**some)


@pytest.mark.parametrize("name", NAMES)
def test_a_written_checkpoint_gives_the_velocity_of_diffusers(name, tmp_path):
    model, x = peer(name), inputs(name)
    model.save_pretrained(tmp_path / "transformer", max_shard_size="60KB")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    cfg = video_files.read_config(tmp_path)
    params = video_files.load(tmp_path, cfg)
    assert video_dit.count(cfg) == sum(p.numel() for p in model.parameters())
    run = jax.jit(lambda p, x, t, c: video_dit.apply(p, cfg, x, t, c))
    ours = run(params, jnp.asarray(x["latents"]), jnp.asarray(x["t"]), condition(x))
    theirs = ask(model, x)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("name, preset", [("hunyuan", "hunyuan"), ("wan", "wan_14b")])
def test_what_diffusers_builds_without_arguments_is_the_released_model(name, preset):
    kind = NAMES[name][0]
    fields = inspect.signature(getattr(diffusers, kind).__init__).parameters.values()
    said = {p.name: p.default for p in fields if p.default is not inspect.Parameter.empty}
    said = {key: list(value) if isinstance(value, tuple) else value for key, value in said.items()}
    written = video_files.to_diffusers(video_dit.PRESETS[preset])
    assert written.pop("_class_name") == kind
    assert {key: said.pop(key) for key in written} == written
    assert not any(said.values())  # what we do not know is off
    assert video_files.from_diffusers({"_class_name": kind}) == video_dit.PRESETS[preset]


@pytest.mark.parametrize("name", ["hunyuan", "wan"])
def test_diffusers_reads_what_we_write(name, tmp_path):
    model = peer(name)
    model.save_pretrained(tmp_path / "theirs")
    cfg = video_files.read_config(tmp_path / "theirs")
    params = video_files.load(tmp_path / "theirs", cfg)
    video_files.save(tmp_path / "ours", params, cfg, max_shard_bytes=60_000)
    again = getattr(diffusers, NAMES[name][0]).from_pretrained(tmp_path / "ours")
    want, have = model.state_dict(), again.state_dict()
    assert set(want) == set(have)
    assert all(torch.equal(want[key], have[key]) for key in want)


@pytest.mark.parametrize("name", ["hunyuan", "wan"])
def test_the_time_embedding_is_that_of_diffusers(name, tmp_path):
    model = peer(name)
    model.save_pretrained(tmp_path)
    cfg = video_files.read_config(tmp_path)
    params = video_files.load(tmp_path, cfg)
    t = torch.tensor([999.0, 20.5])
    if name == "hunyuan":
        waves, embed = model.time_text_embed.time_proj, model.time_text_embed.timestep_embedder
    else:
        waves, embed = (
            model.condition_embedder.timesteps_proj,
            model.condition_embedder.time_embedder,
        )
    # their frequencies are computed in float32: a phase of 999 is off by some 1e-4, ours by its rounding
    half = cfg.frequencies // 2
    angle = t.double()[:, None] * 1e4 ** (-torch.arange(half).double() / half)
    exact = torch.cat([angle.cos(), angle.sin()], -1)
    np.testing.assert_allclose(waves(t), exact, atol=3e-4)
    ours = video_dit.time_embedding(params, cfg, jnp.asarray(t.numpy()))
    theirs = embed(exact.float()).detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def velocity(x, t, sin, tanh):
    """A smooth field for either library."""
    return tanh(0.7 * x - 0.4 * sin(3 * x) * (t / 1000) + 0.1)


@pytest.mark.parametrize("steps, shift", [(50, 5.0), (8, 3.0), (2, 7.0)])
def test_euler_walks_as_the_scheduler_of_diffusers(steps, shift):
    peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    plan = flow.euler(steps=steps, shift=shift)
    np.testing.assert_allclose(plan.t, peer.timesteps.numpy(), rtol=1e-6)
    compare(plan, peer)


@pytest.mark.parametrize("steps, shift", [(50, 5.0), (8, 3.0), (3, 5.0), (2, 5.0), (1, 5.0)])
def test_unipc_walks_as_the_scheduler_of_diffusers(steps, shift):
    peer = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    # the grid of 0.33.1; newer releases have another by default
    peer.set_timesteps(sigmas=np.flip(1 - np.linspace(1, 1 / 1000, steps + 1))[:-1].copy())
    plan = flow.unipc(steps=steps, shift=shift)
    np.testing.assert_array_equal(plan.t, peer.timesteps.numpy())
    np.testing.assert_allclose(plan.sigma, peer.sigmas.numpy()[:-1], atol=1e-7)
    compare(plan, peer)


def compare(plan, peer):
    """Both walk the same field from the same noise."""
    noise = np.random.default_rng(3).normal(size=(1, 3, 4)).astype(np.float32)
    theirs = torch.from_numpy(noise)
    for t in peer.timesteps:
        v = velocity(theirs, t.float(), torch.sin, torch.tanh)
        theirs = peer.step(v, t, theirs, return_dict=False)[0]
    field = lambda x, t, i: velocity(x, t[:, None, None], jnp.sin, jnp.tanh)
    ours = jax.jit(lambda x: walk(field, x, plan))(jnp.asarray(noise))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
