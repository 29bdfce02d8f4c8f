"""Prompts to an mp4 by the command of the project, against the whole pipeline of diffusers: tiny random models."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrepro import cli
from jaxrepro import sample as command
from jaxrepro.data import compare_videos, latents, video_clips, video_output
from jaxrepro.methods.vorta import router, router_files
from jaxrepro.models import video_files

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("av")

sys.path.insert(0, str(Path(__file__).parents[1]))
import compiled

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SIZE = (2, 6, 4)  # tokens
LATENTS, FILM = (16, 2, 12, 8), (5, 96, 64, 3)
STEPS, SHIFT, SEED, WIDTH = 3, 5.0, 4, 20
CONFIG = {"wan": "paper_wan1_3b", "hunyuan": "paper_hunyuan"}  # their samplers and guidance
DIT = {
    "wan": dict(text_dim=WIDTH, freq_dim=32, ffn_dim=40, num_layers=2, num_attention_heads=2),
    "hunyuan": dict(
        text_embed_dim=WIDTH,
        pooled_projection_dim=latents.POOLED,
        num_attention_heads=2,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        rope_axes_dim=(4, 6, 6),
    ),
}


def pipeline(model):
    """A pipeline without text encoders, which samples at the times of the paper's code."""
    torch.manual_seed(0)
    if model == "wan":
        vae = diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        dit = diffusers.WanTransformer3DModel(attention_head_dim=16, **DIT[model])
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        )
        # the grid of 0.33.1, which the official code pins; newer releases have another by default
        sigmas = np.flip(1 - np.linspace(1, 1 / 1000, STEPS + 1))[:-1].copy()
        original = scheduler.set_timesteps
        scheduler.set_timesteps = lambda n, device: original(sigmas=sigmas, device=device)
        parts = dict(tokenizer=None, text_encoder=None)
        made = diffusers.WanPipeline(vae=vae, transformer=dit, scheduler=scheduler, **parts)
    else:
        vae = diffusers.AutoencoderKLHunyuanVideo(
            block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        )
        dit = diffusers.HunyuanVideoTransformer3DModel(attention_head_dim=16, **DIT[model])
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        parts = dict.fromkeys(("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"))
        made = diffusers.HunyuanVideoPipeline(
            vae=vae, transformer=dit, scheduler=scheduler, **parts
        )
    for part in (made.vae, made.transformer):
        part.eval()
    made.set_progress_bar_config(disable=True)
    return made


def film_of(pipe, model, items, noise):
    """(latents, pictures in 0 .. 255) of the pipeline for the first item; Wan's guidance leads away from the last."""
    one = lambda i, field: torch.from_numpy(items[i][field])[None]
    given = dict(prompt_embeds=one(0, "text"))
    if model == "wan":
        given |= dict(negative_prompt_embeds=one(-1, "text"), guidance_scale=5.0)
    else:
        valid = torch.arange(latents.SLOTS[model])[None] < items[0]["length"]
        given |= dict(prompt_attention_mask=valid, pooled_prompt_embeds=one(0, "pooled"))
        given |= dict(guidance_scale=6.0)
    kept = []

    def keep(pipe, step, t, state):
        kept.append(state["latents"])
        return {}

    frames, rows, columns, _ = FILM
    found = pipe(
        height=rows,
        width=columns,
        num_frames=frames,
        num_inference_steps=STEPS,
        latents=torch.from_numpy(np.array(noise)),
        output_type="np",
        callback_on_step_end=keep,
        **given,
    )
    return kept[-1][0].numpy(), 255 * found.frames[0]


@pytest.mark.parametrize("model", CONFIG)
def test_films_by_the_command_are_those_of_the_pipeline(model, tmp_path, capsys):
    """From prompts alone to mp4: sampler, guidance, text and its length, the scale of latents, VAE, files."""
    pipe = pipeline(model)
    for name in ("transformer", "vae"):
        getattr(pipe, name).save_pretrained(tmp_path / "model" / name)
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    names = "a dog, running", "empty"
    prompts = [{"id": name, "text": draw(6, WIDTH), "length": 4} for name in names]
    for item in prompts if model == "hunyuan" else ():
        item["pooled"] = draw(latents.POOLED)
    latents.write(tmp_path / "prompts", prompts, model=model, normalised=True)
    cfg = video_files.read_config(tmp_path / "model")
    routers = router.init(jax.random.key(0), cfg)
    router_files.save(tmp_path / "router.safetensors", routers, cfg)
    flags = {
        "model.path": tmp_path / "model",
        "model.dtype": "float32",
        "data.test": tmp_path / "prompts",
        "router.path": tmp_path / "router.safetensors",
        "steps": 0,
        "grid.size": SIZE,
        "grid.tile": (2, 2, 2),
        "grid.window": (1, 1, 1),
        "mesh": (1, 1, 1, 1),
        "decode.steps": STEPS,
        "decode.vae": tmp_path / "model",
        "decode.videos": ("dense", "routed"),
    }
    flags |= {"decode.empty": "empty"} if model == "wan" else {}
    words = [
        f"--config=configs/vorta.py:{CONFIG[model]}",
        *(f"--config.{k}={v}" for k, v in flags.items()),
        *("--prompt=a dog, running", f"--seed={SEED}", f"--workdir={tmp_path / 'w'}"),
    ]
    with compiled.small(tmp_path / "programs"):
        assert cli.guard(command.main, words) == 0
    made = tmp_path / "w" / "videos" / "0"
    files = [Path(line) for line in capsys.readouterr().out.splitlines() if line]
    assert [str(p.relative_to(made)) for p in files] == [
        "dense/a dog, running-0.mp4",
        "routed/a dog, running-0.mp4",
        "latents",
        "routes.json",
    ]

    noise = jax.random.normal(jax.random.key(SEED), (1, *LATENTS))
    items = latents.Latents(tmp_path / "prompts")
    z, pictures = film_of(pipe, model, items, noise)
    ours = latents.Latents(made / "latents" / "dense")[0]["latents"]
    routed = latents.Latents(made / "latents" / "routed")[0]["latents"]
    error = np.abs(ours - z).max() / np.abs(z).max()
    assert error < 1e-3 and np.abs(ours - noise[0]).max() > 0.1
    assert np.abs(routed - ours).max() > 10 * np.abs(ours - z).max()
    assert pictures.shape == FILM and pictures.std() > 5
    seen = video_output.decode(ours[None], model, tmp_path / "model")[0]
    assert np.abs(seen - pictures).max() < 1.5  # rounded to whole numbers
    film = video_clips.read(files[0])
    assert film.shape == FILM
    blocks = lambda x: x.reshape(FILM[0], FILM[1] // 8, 8, FILM[2] // 8, 8, 3).mean((2, 4))
    off, size = np.abs(blocks(film) - blocks(pictures)), blocks(pictures).std()
    assert off.mean() < 0.2 * size  # H.264 halves colours
    assert compare_videos.main([str(made / "routed"), str(made / "dense")]) == 0
    assert "a dog, running-0.mp4  PSNR " in capsys.readouterr().out


def test_lpips_is_the_mean_over_frames_of_pictures_from_minus_one_to_one(monkeypatch):
    """By a stand-in for the package: what it is given, and how frames are put together."""

    class Package:
        class LPIPS(torch.nn.Module):
            def __init__(self, net, verbose):
                super().__init__()
                assert net == "alex" and not verbose

            def forward(self, x, y):
                assert x.shape[1] == 3 and x.min() >= -1 and x.max() <= 1
                return (x - y).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", Package)
    x = np.random.default_rng(0).integers(0, 256, (11, 12, 16, 3), np.uint8)
    measures, note = compare_videos.measures()
    assert note == "" and measures["LPIPS"](x, x) == 0
    want = 2 * np.abs(x[::-1].astype(float) - x).mean() / 255
    assert measures["LPIPS"](x[::-1].copy(), x) == pytest.approx(want, rel=1e-5)
