"""The peer of bench/dpo.py: the loss of TRL's DPOTrainer on a decoder of transformers, and a step with it."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from jaxrepro.bench import _lm_torch

if importlib.util.find_spec("requests") is None:  # which this module needs without declaring it
    client = types.ModuleType("trl.generation.vllm_client")
    client.VLLMClient = object
    sys.modules[client.__name__] = client
from trl.trainer.dpo_trainer import DPOTrainer


class _Alone:
    """An accelerator of one process."""

    device = torch.device("cpu")

    def gather_for_metrics(self, x):
        return x

    gather = gather_for_metrics


class Peer(_lm_torch.Peer):
    """A model with our weights and TRL's loss; the trainer's data loading and logging stay out."""

    def __init__(self, params: Any, cfg: Any, shape: dict[str, Any], threads: int):
        super().__init__(params, cfg, shape, threads)
        self.beta = shape["beta"]
        self.reference = copy.deepcopy(self.model).eval().requires_grad_(False)

    def _trainer(self, precomputed: bool) -> Any:
        fields = {
            "accelerator": _Alone(), "aux_loss_enabled": False, "_total_train_tokens": 0,
            "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)}, "beta": self.beta,
            "loss_types": ["sigmoid"], "loss_weights": [1.0], "ld_alpha": None, "label_smoothing": 0.0,
            "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "use_weighting": False,
            "precompute_ref_logps": precomputed, "use_liger_kernel": False, "model": self.model,
            "ref_model": self.reference, "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        }  # fmt: skip
        given = type("Trainer", (DPOTrainer,), fields)  # some are properties of the class
        return given.__new__(given)

    def step(self, data: dict[str, np.ndarray], kind: str) -> Callable[[], float]:
        """A call that makes one step on the pairs and returns its loss."""
        b, t = data["prompt"].shape
        rows = [np.concatenate([data["prompt"], data["responses"][:, k]], 1) for k in (0, 1)]
        ids = torch.from_numpy(np.concatenate(rows)).long()  # chosen rows, then rejected ones
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "completion_mask": (torch.arange(ids.shape[1]) >= t).long().expand(2 * b, -1),
        }
        if kind == "cached":
            sums = torch.from_numpy(data["ref_lp"].sum(-1))
            inputs |= {"ref_chosen_logps": sums[:, 0], "ref_rejected_logps": sums[:, 1]}
        trainer = self._trainer(kind == "cached")

        def call() -> float:
            self.model.train()
            self.optimizer.zero_grad(set_to_none=True)
            loss = trainer._compute_loss(self.model, dict(inputs), False)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            trainer._metrics["train"].clear()
            return float(loss.detach())

        return call
