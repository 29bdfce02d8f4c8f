"""What a VORTA run trains on and samples for: moving shapes, real clips, or latents that were encoded beforehand.

data.kind   videos                                          text
shapes      data/video.py, made while they are read         four words, such as "red disc right slow"
clips       data/clip_latents.py                            which clip it is: one row, one-hot
folder      data/latents.py                                 as it was encoded
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrepro.config import UserError
from jaxrepro.data import batches, clip_latents, latents, locate, video, video_output
from jaxrepro.data.clip_latents import Clips, clips
from jaxrepro.data.video_pca import PatchPCA
from jaxrepro.models.hunyuan_video import HunyuanVideoConfig
from jaxrepro.models.video_dit import Condition, Config
from jaxrepro.models.wan import WanConfig
from jaxrepro.ops.video_grid import VideoGrid

KINDS = ("shapes", "clips", "folder")
FOLDERS = {"train": "path", "test": "test"}  # split -> the folder's name in config.data


def latent_shape(cfg: Config, grid: VideoGrid) -> tuple[int, int, int, int]:
    """(c, f, h, w) of the latents of a grid."""
    return cfg.channels, *(n * p for n, p in zip(grid.size, cfg.patch))


def check(config: Any, cfg: Config) -> None:
    """UserError for a kind of data that the model can't read; opens nothing."""
    data = config.data
    if data.kind not in KINDS:
        raise UserError(f"data.kind={data.kind!r} is not one of {', '.join(KINDS)}")
    for name in ("path", "test"):
        if data[name] and data.kind != "folder":
            raise UserError(f"data.{name} is read with data.kind=folder, not with {data.kind}")
    if data.kind == "folder":
        return
    if not isinstance(cfg, WanConfig):
        raise UserError(f"data.kind={data.kind} has no pooled text for HunyuanVideo; use folder")
    if data.kind == "shapes" and (cfg.channels, cfg.text) != (
        video.CHANNELS,
        len(video.VOCABULARY),
    ):
        raise UserError(
            f"moving shapes have {video.CHANNELS} channels and texts {len(video.VOCABULARY)} wide, the model takes "
            f"{cfg.channels} and {cfg.text}; use data.kind=folder"
        )
    if data.kind == "clips":
        if not 1 <= len(data.clips) <= cfg.text:
            raise UserError(
                f"data.clips names {len(data.clips)} clips; use 1 to {cfg.text}, the width of the model's text"
            )
        if len(data.patch) != 3 or min(data.patch) < 1:
            raise UserError(
                f"data.patch={tuple(data.patch)}; use frames, rows and columns of 1 or more"
            )


def ready(config: Any, cfg: Config, grid: VideoGrid) -> None:
    """Read what a run begins with and samples for; UserError where something is missing or does not fit."""
    trains = config.steps or (config.pretrain.steps and not config.model.path)
    if config.data.kind == "folder" and trains:
        folder(config, cfg, grid, "train")
    test_prompts(config, cfg, grid, config.eval.n)


# One folder ---------------------------------------------------------------------------------------


def folder(config: Any, cfg: Config, grid: VideoGrid, split: str) -> latents.Latents:
    """Latents of data.path, or of data.test, which may hold prompts alone; UserError where the model wants others.

    A model reads the padding of its text too, so training and tests have as many text slots: those of the released
    model, elsewhere the longest text of both folders.
    """
    name = FOLDERS[split]
    if not config.data[name]:
        raise UserError(f"data.{name} is needed with data.kind=folder: latents to {split} on")
    size = latent_shape(cfg, grid)
    path = locate.data(config.data[name])
    source = latents.Latents(path, frames=size[1])
    if family(cfg) not in ("other", source.model):
        raise UserError(
            f"{path}: encoded for {source.model}, this model reads latents and texts of {family(cfg)}: encode them for "
            'it; "model" of index.json says what they are'
        )
    if source.shape is None and split == "train":
        raise UserError(f"{path} holds prompts alone: data.path needs latents to train on")
    if source.shape not in (None, size):
        raise UserError(
            f"{path}: latents of {source.shape}, the model and grid want {size}; set grid.size"
        )
    if source.width != cfg.text:
        raise UserError(f"{path}: texts are {source.width} wide, the model reads {cfg.text}")
    if isinstance(cfg, HunyuanVideoConfig) and source.pooled != cfg.pooled:
        raise UserError(
            f"{path}: pooled texts of {source.pooled} numbers (0: not in every item), HunyuanVideo reads {cfg.pooled}"
        )
    if config.decode.vae and source.model == "other":
        raise UserError(f"{path}: decode.vae decodes no latents of {source.model}; leave it out")
    if family(cfg) == "other":
        paths = {config.data[key] for key in FOLDERS.values()} - {config.data[name], None}
        others = [latents.Latents(locate.data(p), frames=size[1]) for p in paths]
        source.slots = max(x.slots for x in (source, *others))
    return source


# Clips --------------------------------------------------------------------------------------------


def clips_of(config: Any, cfg: Config, grid: VideoGrid) -> Clips:
    """The examples of data.clips; decoded once."""
    data = config.data
    return clips(tuple(data.clips), tuple(data.patch), latent_shape(cfg, grid))


# Batches ------------------------------------------------------------------------------------------


def dataset(config: Any, cfg: Config, grid: VideoGrid, split: str, *, batch: int, seed: int) -> Any:
    """dataset[step] of `batches.Batch`; arrays: latents, text, and where there are any ids, length and pooled.

    Test data of clips and folders come in their own order, whatever the seed.
    """
    shuffled = seed if split == "train" else None
    if config.data.kind == "folder":
        return latents.dataset(folder(config, cfg, grid, split), batch=batch, seed=shuffled)
    if config.data.kind == "clips":
        found = clips_of(config, cfg, grid)
        read = lambda examples: found.arrays(examples, cfg.text)
        return batches.dataset(found.rows[split], read, batch=batch, seed=shuffled)
    size = latent_shape(cfg, grid)[1:]
    example = lambda i: video.example(split, i, seed, size=size)
    return batches.dataset(batches.Generated(example), video.arrays, batch=batch)


def condition(cfg: Config, arrays: dict[str, Any], guidance: float) -> Condition:
    """What a model reads of text; guidance (times 1000) only where it is embedded."""
    if isinstance(cfg, WanConfig):
        return Condition(arrays["text"])
    missing = [name for name in ("length", "pooled") if name not in arrays]
    if missing:
        raise UserError(f"HunyuanVideo reads {', '.join(missing)}, which this data has not")
    scale = jnp.full(len(arrays["text"]), guidance) if cfg.guidance else None
    return Condition(arrays["text"], arrays["length"], arrays["pooled"], scale)


# What is sampled for ------------------------------------------------------------------------------


class Prompts(NamedTuple):
    """What videos are sampled for."""

    names: list[str]
    noise: Float[Array, "b c f h w"]
    given: Condition
    empty: Condition | None  # the other side of Wan's guidance
    words: np.ndarray | None  # (b, 4) of moving shapes


def test_prompts(config: Any, cfg: Config, grid: VideoGrid, n: int) -> Prompts:
    """n test texts and their noise, drawn by the run's seed: the same for all arms of a seed."""
    return prompted(config, cfg, grid, None, n=n, seed=config.seed)


def prompted(
    config: Any, cfg: Config, grid: VideoGrid, prompt: str | None, *, n: int, seed: int
) -> Prompts:
    """n videos of one prompt, each its own noise; without a prompt one of each of the first n test texts of the seed.

    A prompt is four words of moving shapes, the name of a clip, or the id of an item of data.test. UserError where a
    folder or clips have fewer than n texts; decode.empty is none of them.
    """
    if prompt is None:
        return _prompts(config, cfg, grid, *_tests(config, cfg, grid, n, seed), seed)
    arrays = {k: np.repeat(v, n, 0) for k, v in _prompt(config, cfg, grid, prompt).items()}
    return _prompts(config, cfg, grid, [prompt] * n, arrays, seed)


def _tests(config, cfg, grid, n, seed):
    """Names and arrays of the first n test texts."""
    if config.data.kind == "shapes":
        batch = dataset(config, cfg, grid, "test", batch=n, seed=seed)[0]
        return batch.ids, batch.arrays
    if config.data.kind == "folder":
        source = folder(config, cfg, grid, "test")
        rows = [i for i, name in enumerate(source.ids) if name != config.decode.empty]
        read = lambda rows: ([source.ids[i] for i in rows], source.arrays(rows))
    else:
        found = clips_of(config, cfg, grid)
        rows = found.rows["test"]
        read = lambda rows: ([row["id"] for row in rows], found.arrays(rows, cfg.text))
    if n > len(rows):
        raise UserError(
            f"{n} videos of {len(rows)} test texts: eval.n (of jaxrepro.sample --n) may be {len(rows)} at most"
        )
    return read(rows[:n])


def _prompt(config, cfg, grid, prompt):
    """The arrays of one row, latents left out."""
    if config.data.kind == "folder":
        source = folder(config, cfg, grid, "test")
        return _item(source, prompt, "--prompt")
    if config.data.kind == "clips":
        if prompt not in config.data.clips:
            raise UserError(
                f"--prompt={prompt!r:.60} is not one of data.clips: {', '.join(config.data.clips)}"
            )
        one_hot = np.eye(cfg.text, dtype=np.float32)[list(config.data.clips).index(prompt)]
        return {"text": one_hot[None, None]}
    words = prompt.split()
    if sorted(words) != sorted({*words}) or len(words) != len(video.FIELDS):
        words = []
    ids = [[video.VOCABULARY.index(w) for w in words if w in field] for field in video.FIELDS]
    if [len(found) for found in ids] != [1] * len(video.FIELDS):
        fields = "; ".join(", ".join(field) for field in video.FIELDS)
        raise UserError(f"--prompt={prompt!r:.60}: one word of each of {fields}")
    ids = np.array(ids).T
    return {"ids": ids.astype(np.int32), "text": video.states(ids)}


def _item(source, name, key):
    if name not in source.ids:
        raise UserError(
            f"{key}={name!r:.60} is no item of {source.folder}; its first is {source.ids[0]!r:.60}"
        )
    return {k: v for k, v in source.arrays([source.ids.index(name)]).items() if k != "latents"}


def _prompts(config, cfg, grid, names, arrays, seed):
    n = len(names)
    noise = jax.random.normal(jax.random.key(seed), (n, *latent_shape(cfg, grid)))
    words = arrays.get("ids")
    given = {k: jnp.asarray(x) for k, x in arrays.items() if k not in ("ids", "latents")}
    embedded = isinstance(cfg, HunyuanVideoConfig)
    scale = 1000.0 * config.decode.guidance if embedded else 0.0
    if words is not None:
        names = [video.caption(w) for w in words]
    return Prompts(
        list(names), noise, condition(cfg, given, scale), empty(config, cfg, grid, n, given), words
    )


def guided(config: Any, cfg: Config) -> bool:
    """Whether a step runs the model with and without text."""
    return config.decode.guidance != 1 and isinstance(cfg, WanConfig)


def empty(
    config: Any, cfg: Config, grid: VideoGrid, n: int, given: dict[str, Any] | None = None
) -> Condition | None:
    """The text of n rows that guidance leads away from; None = no guidance.

    Of a folder it is the item decode.empty of data.test, the embedding of an empty or a negative prompt, and UserError
    without one; the small models read zeros.
    """
    name = config.decode.empty
    if not guided(config, cfg):
        if name:
            raise UserError(
                f"decode.empty={name!r:.60} serves Wan's guidance: set decode.guidance above 1, or leave it out"
            )
        return None
    if config.data.kind != "folder":
        if name:
            raise UserError(
                f"decode.empty={name!r:.60} is an item of a folder: set data.kind=folder"
            )
        return None if given is None else Condition(jnp.zeros_like(given["text"]))
    if not name:
        raise UserError(
            f"decode.guidance={config.decode.guidance} leads away from the embedding of an empty or a negative prompt: "
            "name its item of data.test as decode.empty, or set decode.guidance=1"
        )
    text = _item(folder(config, cfg, grid, "test"), name, "decode.empty")["text"]
    return Condition(jnp.repeat(jnp.asarray(text), n, axis=0))


# To look at ---------------------------------------------------------------------------------------


def pictures(
    config: Any, cfg: Config, grid: VideoGrid, x: Float[np.ndarray, "b c f h w"]
) -> np.ndarray | None:
    """uint8 (b, frames, rows, columns, rgb) of latents; None for a folder's that nothing decodes.

    Latents of a folder are decoded by the VAE of decode.vae, or by the components beside data.test.
    """
    if config.data.kind == "shapes":
        return video.to_pictures(x)
    if config.data.kind == "clips":
        return clips_of(config, cfg, grid).pca.decode(x)
    if not config.decode.vae:
        basis = locate.data(config.data.test).parent / clip_latents.BASIS
        return PatchPCA.load(basis).decode(x) if basis.is_file() else None
    made = folder(config, cfg, grid, "test").model
    return video_output.decode(x, made, config.decode.vae)


def family(cfg: Config) -> str:
    """The model whose latents and texts it reads, in the words of data/latents.py; other = nobody's but its own.

    A model is taken for HunyuanVideo or Wan 2.1 by the width of its text and its channels, which also a model of
    other depth shares.
    """
    name = "hunyuan" if isinstance(cfg, HunyuanVideoConfig) else "wan"
    own = cfg.channels, cfg.text
    return name if own == (latents.CHANNELS[name], latents.TEXT) else "other"
