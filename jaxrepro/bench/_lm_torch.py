"""The peer of bench/lm.py: a decoder of transformers on torch, used as its users do."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM


class Peer:
    """A model with our weights and the timed calls."""

    def __init__(self, params: Any, cfg: Any, shape: dict[str, Any], threads: int):
        from jaxrepro.models import hf

        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as folder:
            hf.save(Path(folder) / "model", params, cfg)
            self.model = AutoModelForCausalLM.from_pretrained(
                Path(folder) / "model", dtype=torch.float32, attn_implementation="sdpa"
            )
        self.model.generation_config.eos_token_id = None  # all rows run to max_new_tokens
        self.model.generation_config.pad_token_id = 0
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=shape["lr"], weight_decay=0.0, fused=True
        )

    def _generate(self, tokens: np.ndarray, new: int, **options: Any) -> Callable[[], Any]:
        rows = torch.from_numpy(tokens).long()

        @torch.inference_mode()
        def call() -> torch.Tensor:
            self.model.eval()
            return self.model.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=new,
                do_sample=False,
                **options,
            )

        return call

    def greedy(self, tokens: np.ndarray, new: int) -> Callable[[], Any]:
        """A call that decodes `new` tokens of every row."""
        return self._generate(tokens, new)

    def beam(self, tokens: np.ndarray, beams: int, new: int) -> Callable[[], Any]:
        """A call that searches with `beams` beams."""
        return self._generate(tokens, new, num_beams=beams)

    def train(self, rows: np.ndarray) -> Callable[[], float]:
        """A call that makes one AdamW step and returns its loss."""
        tokens = torch.from_numpy(rows).long()

        def step() -> float:
            self.model.train()
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            return float(loss.detach())

        return step
