"""A GRPO update of a vision-language model: sampling, and the gradient step, against transformers on torch.

Both sides have the same weights, images, prompts and completions, and nobody stops early: every
completion has `new` tokens. The step is that of methods/stepgrpo/objective.py: log-probs of policy and
frozen reference, k3 penalty, clip by the global norm, AdamW, vision tower included.

`--shape=2b`, the default on a GPU, has the true shapes of Qwen2-VL-2B with random weights, for one 80 GB
GPU or more: sampling, step and peak memory, without a peer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxrepro import results
from jaxrepro.bench import harness

SHAPES = {
    "tiny": {
        "text": {
            "vocab": 95,
            "d": 128,
            "layers": 3,
            "heads": 4,
            "kv": 2,
            "head_dim": 32,
            "ffn": 384,
        },
        "sections": [4, 6, 6],
        "vision": {"depth": 2, "embed": 64, "heads": 4, "mlp": 256},
        "image": [112, 112],
        "questions": 16,
        "samples": 8,
        "words": 10,  # text tokens of a prompt; two more frame the image
        "new": 52,
        "micro_batches": 1,
        "dtype": "float32",
        "remat": "none",
        "beta": 0.04,
        "lr": 3e-4,
        "max_grad_norm": 1.0,
        "peer": True,
    },
    "2b": {
        "text": {"vocab": 151936, "d": 1536, "layers": 28, "heads": 12, "kv": 2, "head_dim": 128}
        | {"ffn": 8960},
        "sections": [16, 24, 24],
        "vision": {"depth": 32, "embed": 1280, "heads": 16, "mlp": 5120},
        "image": [616, 616],  # 379,456 pixels: the largest square under R1-VL's 400,000
        "questions": 4,
        "samples": 4,
        "words": 60,
        "new": 512,
        "micro_batches": 4,
        "dtype": "bfloat16",
        "remat": "full",
        "beta": 0.04,
        "lr": 1e-6,
        "max_grad_norm": 1.0,
        "peer": False,
    },
}
GPU_SHAPE = "2b"


class Batch(NamedTuple):
    """Questions with their images and one set of completions, on the host."""

    prompt: np.ndarray  # (b, p)
    patches: np.ndarray  # (b, patches, columns)
    grid: np.ndarray  # (3,), the same for all
    position: np.ndarray  # (b, 3, p)
    next_position: np.ndarray  # (b,)
    completion: np.ndarray  # (b, n, new)
    length: np.ndarray  # (b, n)
    advantage: np.ndarray  # (b, n)


def config(shape: Mapping[str, Any]) -> Any:
    """The model of a shape; the special ids are the last of its vocabulary."""
    from jaxrepro.models.qwen2_vl import Qwen2VLConfig
    from jaxrepro.models.transformer import TransformerConfig
    from jaxrepro.models.vision_tower import VisionConfig

    numerics = {"dtype": shape["dtype"], "remat": shape["remat"]}
    text = TransformerConfig(
        **shape["text"], mrope_sections=tuple(shape["sections"]), tied=True, **numerics
    )
    names = ("image_pad", "video_pad", "vision_start", "vision_end", "eos", "pad")
    ids = {name: text.vocab - 1 - i for i, name in enumerate(names)}
    return Qwen2VLConfig(
        text=text, vision=VisionConfig(**shape["vision"], out=text.d, **numerics), **ids
    )


def make_batch(cfg: Any, shape: Mapping[str, Any], *, ragged: bool = False, seed: int = 0) -> Batch:
    """Random images, prompts and completions; `ragged` completions end at different tokens."""
    from jaxrepro.models import qwen2_vl

    rng = np.random.default_rng(seed)
    b, n, new, v = shape["questions"], shape["samples"], shape["new"], cfg.vision
    grid = np.array([1, *(side // v.patch for side in shape["image"])], np.int32)
    pads = int(grid.prod()) // v.merge**2
    words = lambda *size: rng.integers(0, cfg.text.vocab - 6, size, dtype=np.int32)
    fill = lambda token, count: np.full((b, count), token, np.int32)
    parts = [fill(cfg.vision_start, 1), fill(cfg.image_pad, pads), fill(cfg.vision_end, 1)]
    prompt = np.concatenate([*parts, words(b, shape["words"])], axis=1)
    position, following = qwen2_vl.positions(prompt[0], [tuple(map(int, grid))], cfg)
    length = rng.integers(1, new + 1, (b, n)) if ragged else np.full((b, n), new)
    advantage = rng.normal(size=(b, n))
    return Batch(
        prompt=prompt,
        patches=rng.normal(size=(b, int(grid.prod()), v.columns)).astype(np.float32),
        grid=grid,
        position=np.tile(position[None], (b, 1, 1)).astype(np.int32),
        next_position=np.full(b, following, np.int32),
        completion=words(b, n, new),
        length=length.astype(np.int32),
        advantage=(advantage - advantage.mean(1, keepdims=True)).astype(np.float32),
    )


class Ours:
    """The same calls on jax: compiled functions over a fixed batch."""

    def __init__(self, params: Any, cfg: Any, batch: Batch, shape: Mapping[str, Any]):
        import jax
        import jax.numpy as jnp

        from jaxrepro.models.vision_tower import Vision, grid_positions
        from jaxrepro.train import optim, state, step

        self.cfg, self.shape = cfg, shape
        b = len(batch.prompt)
        at = grid_positions(batch.grid.tolist(), cfg.vision.merge)
        self.batch = jax.tree.map(
            jnp.asarray,
            {
                "prompt": batch.prompt,
                "vision": Vision(
                    batch.patches,
                    np.tile(at[None], (b, 1, 1)),
                    np.ones(batch.patches.shape[:2], np.int32),
                ),
                "position": batch.position,
                "next": batch.next_position,
                "completion": batch.completion,
                "length": batch.length,
                "advantage": batch.advantage,
            },
        )
        # a copy: the state is donated, and may not hold one buffer twice
        reference = jax.tree.map(lambda x: jnp.array(x, shape["dtype"], copy=True), params)
        optimizer = optim.optimizer({"lr": shape["lr"]})
        update = step.make_step(
            self.loss,
            optimizer,
            micro_batches=shape["micro_batches"],
            max_grad_norm=shape["max_grad_norm"],
        )
        self.state = state.init_state(params, optimizer, extra=reference)
        scored = lambda s, rows: rows | {"reference": self.log_probs(s.extra, rows)}
        self._update = step.compile_step(lambda s, rows: update(s, scored(s, rows)))
        self._sample = jax.jit(self.sample)
        self.key = jax.random.key(0)

    def embed(self, params: Any, rows: Mapping[str, Any]) -> Any:
        """Prompt embeddings (b, p, d) with the image in its place."""
        from jaxrepro.models import qwen2_vl

        return qwen2_vl.embed(params, self.cfg, rows["prompt"], rows["vision"])

    def sample(self, params: Any, rows: Mapping[str, Any], key: Any) -> Any:
        """n completions of every question."""
        import jax.numpy as jnp

        from jaxrepro.rollout.generate import Prompts, Sampling, generate

        b = len(rows["prompt"])
        prompts = Prompts(
            x=self.embed(params, rows),
            position=rows["position"],
            segment=jnp.ones(rows["prompt"].shape, jnp.int32),
            next_position=rows["next"],
        )
        return generate(
            params["text"],
            self.cfg.text,
            prompts,
            request_ids=jnp.arange(b, dtype=jnp.int32),
            key=key,
            sampling=Sampling(max_new=self.shape["new"], eos=(), pad=self.cfg.pad),
            n=self.shape["samples"],
        )

    def log_probs(self, params: Any, rows: Mapping[str, Any]) -> Any:
        """(b, n, new) log-probabilities of the completions."""
        import jax.numpy as jnp

        from jaxrepro.models.scoring import completion_log_probs

        return completion_log_probs(
            params["text"],
            self.cfg.text,
            self.embed(params, rows),
            rows["position"],
            jnp.ones(rows["prompt"].shape, jnp.int32),
            rows["next"],
            rows["completion"],
            rows["length"],
        )

    def loss(self, params: Any, rows: Mapping[str, Any]) -> Any:
        """The objective of StepGRPO on these rows: (sum, weight, aux)."""
        import jax.numpy as jnp

        from jaxrepro.methods.stepgrpo import objective

        mask = jnp.arange(rows["completion"].shape[-1]) < rows["length"][..., None]
        lp = self.log_probs(params, rows)
        return objective.loss(
            lp, rows["reference"], rows["advantage"], mask, beta=self.shape["beta"]
        )

    def generate(self) -> None:
        """Samples once and waits."""
        import jax

        self.key = jax.random.fold_in(self.key, 1)
        jax.block_until_ready(self._sample(self.state.params, self.batch, self.key))

    def step(self) -> float:
        """One update; returns its loss."""
        self.state, metrics = self._update(self.state, self.batch)
        return float(metrics["loss"])


def bench(shape: Mapping[str, Any], rounds: int) -> harness.Report:
    """Tokens/s of sampling and seconds of a step."""
    import jax

    from jaxrepro.models import qwen2_vl

    cfg = config(shape)
    batch = make_batch(cfg, shape)
    params = jax.jit(partial(qwen2_vl.init, cfg=cfg))(jax.random.key(0))
    notes = [
        f"{qwen2_vl.count(cfg):,} parameters, {shape['dtype']}; {shape['questions']} questions x "
        f"{shape['samples']} samples, prompts of {batch.prompt.shape[1]} tokens of which "
        f"{int(batch.grid.prod()) // cfg.vision.merge**2} are an image, {shape['new']} new tokens each",
    ]
    rollout, train, packages = {}, {}, ()
    if harness.has_peer(shape, notes):
        from jaxrepro.bench._grpo_torch import Peer

        peer = Peer(params, cfg, batch, dict(shape), results.cores())
        rollout = {"torch, generate": peer.generate, "torch, by hand": peer.decode_by_hand}
        train = {
            "torch, an image a row": peer.step,
            "torch, an image a question": peer.step_by_hand,
        }
        packages = ("torch", "transformers")
        notes += [
            "torch: transformers' Qwen2-VL, float32, sdpa, inference mode for sampling and reference, "
            "fused AdamW, one thread a core. 'generate' and 'an image a row' are what the library offers; "
            "'by hand' embeds image and prompt once a question and repeats the cache.",
            "jaxrepro runs the prompt once a question in the gradient step too, which torch's rows repeat.",
        ]
    ours = Ours(params, cfg, batch, shape)
    del params
    rollout["jaxrepro"], train["jaxrepro"] = ours.generate, ours.step
    made = shape["questions"] * shape["samples"] * shape["new"]
    timed = harness.interleave(rollout, rounds)
    groups = [harness.group("sampling", "tokens/s", timed, work=made, peers=list(rollout)[:-1])]
    timed = harness.interleave(train, rounds)
    groups.append(harness.group("gradient step", "s", timed, peers=list(train)[:-1]))
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak:
        notes.append(f"peak device memory of jaxrepro: {peak / 2**30:.1f} GiB")
    return harness.Report(groups, notes, packages)
