"""A language model used as post-training uses it: greedy decoding, beam search, a training step.

Shape "smollm2" is SmolLM2-135M on a CPU beside transformers on torch: the same weights (random: time
does not depend on them) and prompts, and nobody stops early. Shape "qwen2_1_5b", the default on a GPU,
has the sizes of Qwen2.5-1.5B for one of them, without a peer: decoding as a share of what the memory's
bandwidth allows, and training as a share of what matrix products reach. Both limits are measured in the
same run; model FLOPs utilisation (MFU, arXiv:2204.02311) takes the data sheet's peak instead.

    floor of a decode step = (bytes of the weights + rows * context * bytes of a token's keys and values)
                             / bandwidth of a copy
    FLOPs of a training step = 6 * parameters * tokens + 6 * layers * heads * head_dim * tokens * length
                             (the second term: causal attention, half of the square)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxrepro import results
from jaxrepro.bench import harness

SHAPES = {
    "smollm2": {
        "text": {
            "vocab": 49152,
            "d": 576,
            "layers": 30,
            "heads": 9,
            "kv": 3,
            "head_dim": 64,
            "ffn": 1536,
            "rope_theta": 1e5,
            "eps": 1e-5,
            "qkv_bias": False,
        },
        "dtype": "float32",
        "remat": "none",
        "prompt": 64,
        "greedy": [[1, 64], [16, 64]],  # rows, new tokens
        "beam": [16, 5, 32],  # rows, beams, new tokens
        "train": [8, 128],  # rows, tokens
        "lr": 1e-4,
        "peer": True,
        "limits": False,
    },
    "qwen2_1_5b": {
        "text": {
            "vocab": 151936,
            "d": 1536,
            "layers": 28,
            "heads": 12,
            "kv": 2,
            "head_dim": 128,
            "ffn": 8960,
            "rope_theta": 1e6,
            "eps": 1e-6,
            "qkv_bias": True,
        },
        "dtype": "bfloat16",
        "remat": "full",
        "prompt": 512,
        "greedy": [[1, 256], [16, 256], [64, 256], [256, 256]],
        "beam": [16, 5, 128],
        "train": [8, 2048],
        "lr": 1e-5,
        "peer": False,
        "limits": True,
    },
}
GPU_SHAPE = "qwen2_1_5b"
# FLOP/s by device kind. NVIDIA data sheets, dense bfloat16 (theirs with sparsity is twice as much). The
# PCIe and NVL cards of Hopper clock lower and are left out.
PEAKS = {r"H[12]00(?!.*(PCIe|NVL))": 989e12, "A100": 312e12}
LIMIT = "share of the limit"


def config(shape: Mapping[str, Any]) -> Any:
    """The decoder of a shape."""
    from jaxrepro.models.transformer import TransformerConfig

    return TransformerConfig(**shape["text"], tied=True, dtype=shape["dtype"], remat=shape["remat"])


def prompts(cfg: Any, rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Random tokens (rows, length) int32."""
    return np.random.default_rng(seed).integers(3, cfg.vocab, (rows, length), dtype=np.int32)


class Ours:
    """The timed calls on jax."""

    def __init__(self, params: Any, cfg: Any, shape: Mapping[str, Any]):
        import jax

        from jaxrepro.rollout.generate import for_decode
        from jaxrepro.train import optim, state, step

        self.cfg, self.shape = cfg, shape
        # Laid out once, as the engine does it for all its requests.
        self.served = jax.jit(partial(for_decode, cfg=cfg))(params)
        self.optimizer = optim.optimizer({"lr": shape["lr"]})
        self.params, self.state = params, None
        self._step = step.compile_step(step.make_step(self.loss, self.optimizer, max_grad_norm=1.0))
        self._start = lambda: state.init_state(self.params, self.optimizer)

    def loss(self, params: Any, rows: Any) -> Any:
        """Summed negative log-likelihood of every token but the first of a row."""
        import jax.numpy as jnp

        from jaxrepro.models import transformer
        from jaxrepro.models.scoring import nll
        from jaxrepro.ops.logprob import Tokens

        everywhere = jnp.ones(rows.shape, jnp.int32)
        at = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
        x = transformer.embed(params, self.cfg, rows)
        return *nll(params, self.cfg, x, Tokens(rows, everywhere > 0, everywhere, at)), {}

    def prompts(self, params: Any, tokens: Any) -> Any:
        """Equally long prompts as `Prompts`."""
        import jax.numpy as jnp

        from jaxrepro.models import transformer
        from jaxrepro.rollout.generate import Prompts

        b, t = tokens.shape
        at = jnp.broadcast_to(jnp.arange(t), (b, t))
        x = transformer.embed(params, self.cfg, tokens)
        return Prompts(x, at, jnp.ones((b, t), jnp.int32), jnp.full(b, t))

    def greedy(self, tokens: np.ndarray, new: int) -> Callable[[], Any]:
        """A call that decodes `new` tokens of every row, and waits."""
        import jax
        import jax.numpy as jnp

        from jaxrepro.rollout.generate import Sampling, generate

        settings = Sampling(max_new=new, eos=(), temperature=0.0)
        ids = jnp.arange(len(tokens), dtype=jnp.int32)

        @jax.jit
        def decode(params, tokens):
            rows, key = self.prompts(params, tokens), jax.random.key(0)
            return generate(
                params, self.cfg, rows, request_ids=ids, key=key, sampling=settings, n=1
            ).tokens

        return lambda: np.asarray(decode(self.served, tokens))

    def beam(self, tokens: np.ndarray, beams: int, new: int) -> Callable[[], Any]:
        """A call that searches with `beams` beams, and waits."""
        import jax

        from jaxrepro.rollout.beam import Beams, beam_search

        settings = Beams(max_new=new, eos=(), width=beams)
        search = jax.jit(
            lambda params, tokens: (
                beam_search(params, self.cfg, self.prompts(params, tokens), beams=settings).tokens
            )
        )
        return lambda: np.asarray(search(self.served, tokens))

    def train(self, rows: np.ndarray) -> Callable[[], float]:
        """A call that makes one AdamW step and returns its loss."""

        def step() -> float:
            self.state = self._start() if self.state is None else self.state
            self.state, metrics = self._step(self.state, rows)
            return float(metrics["loss"])

        return step


def limits() -> dict[str, float]:
    """Bytes/s of a copy (read and write counted) and FLOP/s of a bfloat16 matrix product, measured here."""
    import jax
    import jax.numpy as jnp

    big = jnp.ones((1 << 30,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    square = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    cases = {
        "copy": lambda: jax.block_until_ready(copy(big)),
        "product": lambda: jax.block_until_ready(product(square)),
    }
    timed = harness.interleave(cases, 10)
    median = {name: float(np.median(t.seconds)) for name, t in timed.items()}
    return {"bytes": 2 * big.nbytes / median["copy"], "flops": 2 * 8192**3 / median["product"]}


def floor_seconds(cfg: Any, rows: int, context: float, bandwidth: float) -> float:
    """Seconds that a decode step cannot go below: weights and caches read once."""
    import jax.numpy as jnp

    from jaxrepro.models import transformer

    size = jnp.dtype(cfg.dtype).itemsize
    cache = 2 * cfg.layers * cfg.kv * cfg.head_dim * size
    return (transformer.count(cfg) * size + rows * context * cache) / bandwidth


def step_flops(cfg: Any, rows: int, length: int) -> int:
    """Floating-point operations of a training step, recomputation not counted."""
    from jaxrepro.models import transformer

    tokens = rows * length
    attention = 6 * cfg.layers * cfg.heads * cfg.head_dim * tokens * length
    return 6 * transformer.count(cfg) * tokens + attention


def peak_flops(kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its data sheet; None for one that is not known here."""
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, kind)), None)


def bench(shape: Mapping[str, Any], rounds: int) -> harness.Report:
    """Tokens/s of decoding and beam search, seconds of a training step."""
    import jax

    from jaxrepro.models import transformer

    cfg = config(shape)
    params = jax.jit(partial(transformer.init, cfg=cfg))(jax.random.key(0))
    ours = Ours(params, cfg, shape)
    notes = [
        f"{transformer.count(cfg):,} parameters, {shape['dtype']}; prompts of {shape['prompt']} tokens; "
        "every row decodes all its tokens; the rate counts the tokens that are returned"
    ]
    peer, packages = _peer(ours.params, cfg, shape, notes)
    found = limits() if shape["limits"] else None
    groups = []
    for rows, new in shape["greedy"]:
        tokens = prompts(cfg, rows, shape["prompt"])
        cases = {"torch, generate": peer.greedy(tokens, new)} if peer else {}
        cases["jaxrepro"] = ours.greedy(tokens, new)
        groups.append(_decoded(f"greedy, {rows} rows", cases, rounds, rows * new))
        if found:
            context = shape["prompt"] + new / 2
            floor = new * floor_seconds(cfg, rows, context, found["bytes"])
            groups.append(_share(groups[-1], floor, LIMIT))
    rows, beams, new = shape["beam"]
    tokens = prompts(cfg, rows, shape["prompt"])
    cases = {"torch, generate": peer.beam(tokens, beams, new)} if peer else {}
    cases["jaxrepro"] = ours.beam(tokens, beams, new)
    groups.append(_decoded(f"beam search, {rows} rows x {beams} beams", cases, rounds, rows * new))
    rows, length = shape["train"]
    batch = prompts(cfg, rows, length, seed=1)
    cases = {"torch": peer.train(batch)} if peer else {}
    cases["jaxrepro"] = ours.train(batch)
    timed = harness.interleave(cases, rounds)
    what = f"training step, {rows} x {length} tokens"
    groups.append(harness.group(what, "s", timed, peers=list(cases)[:-1]))
    if found:
        step, flops = groups[-1], step_flops(cfg, rows, length)
        groups.append(_share(step, flops / found["flops"], LIMIT))
        notes += [
            f"measured limits: copy {found['bytes'] / 1e12:.2f} TB/s, bfloat16 matrix product "
            f"{found['flops'] / 1e12:.0f} TFLOP/s",
            "decoding's time includes the prompts, its floor does not",
        ]
        if sheet := peak_flops(jax.devices()[0].device_kind):
            groups.append(_share(step, flops / sheet, "MFU"))
            notes.append(
                f"MFU is against {sheet / 1e12:.0f} TFLOP/s, the data sheet's dense bfloat16"
            )
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak:
        notes.append(f"peak device memory of jaxrepro: {peak / 2**30:.1f} GiB")
    return harness.Report(groups, notes, packages)


def _decoded(what: str, cases: Mapping[str, Any], rounds: int, made: int) -> dict[str, Any]:
    timed = harness.interleave(cases, rounds)
    return harness.group(what, "tokens/s", timed, work=made, peers=list(cases)[:-1])


def _share(group: Mapping[str, Any], least: float, unit: str) -> dict[str, Any]:
    """Another table of the same calls: the least seconds that they could take, over those they took."""
    timed = {
        case["case"]: harness.Timing(case["first_s"], tuple(case["seconds"]))
        for case in group["cases"]
    }
    return harness.group(group["what"], unit, timed, work=least)


def _peer(params: Any, cfg: Any, shape: Mapping[str, Any], notes: list[str]) -> tuple[Any, tuple]:
    """The torch model with our weights, or None; and the packages it is made of."""
    if not harness.has_peer(shape, notes):
        return None, ()
    from jaxrepro.bench._lm_torch import Peer

    notes.append(
        "torch: transformers' LlamaForCausalLM, float32, sdpa, inference mode for decoding, fused AdamW, "
        "one thread a core."
    )
    return Peer(params, cfg, dict(shape), results.cores()), ("torch", "transformers")
