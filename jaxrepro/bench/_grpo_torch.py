"""The peer of bench/grpo.py: Qwen2-VL of transformers on torch, used as its users do and at its best.

Two ways each. As the libraries offer it: `generate(num_return_sequences=n)`, and a step that hands
every row its own copy of the image. By hand, with what a careful user could do: the image embedded
and the prompt prefilled once a question, positions precomputed, a bare decode loop. The benchmark
compares with the faster.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, Qwen2VLForConditionalGeneration


class Peer:
    """A model with our weights, the batch as tensors, and the timed calls."""

    def __init__(self, params: Any, cfg: Any, batch: Any, shape: dict[str, Any], threads: int):
        from jaxrepro.models import hf

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            hf.save(Path(folder) / "model", params, cfg)
            load = lambda: Qwen2VLForConditionalGeneration.from_pretrained(
                Path(folder) / "model", dtype=torch.float32, attn_implementation="sdpa"
            )
            self.policy, self.reference = load().train(), load().eval().requires_grad_(False)
        self.policy.generation_config.eos_token_id = None  # all rows run to max_new_tokens
        self.policy.generation_config.pad_token_id = cfg.pad
        tensor = lambda x: torch.from_numpy(np.array(x))
        self.n, self.new, self.beta = shape["samples"], shape["new"], shape["beta"]
        self.image_pad = cfg.image_pad
        self.prompt = tensor(batch.prompt).long()  # (b, p)
        self.pixels = tensor(batch.patches).flatten(0, 1)  # (b * patches, columns)
        self.grid = tensor(batch.grid).long().expand(len(self.prompt), 3)
        self.position = tensor(batch.position).long().movedim(1, 0)  # (3, b, p)
        self.next = tensor(batch.next_position).long()
        self.completion = tensor(batch.completion).long().flatten(0, 1)  # (b n, new)
        self.length = tensor(batch.length).long().flatten()
        self.advantage = tensor(batch.advantage).flatten()
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=shape["lr"], weight_decay=0.0, fused=True
        )
        self.max_grad_norm = shape["max_grad_norm"]
        self.image_types = (self.prompt == self.image_pad).int()

    # ---- rollout ----

    @torch.inference_mode()
    def generate(self) -> torch.Tensor:
        """What the library offers: (b n, new) sampled tokens."""
        self.policy.eval()
        out = self.policy.generate(
            input_ids=self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            mm_token_type_ids=self.image_types,
            pixel_values=self.pixels,
            image_grid_thw=self.grid,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=self.n,
            max_new_tokens=self.new,
        )
        return out[:, self.prompt.shape[1] :]

    @torch.inference_mode()
    def decode_by_hand(self) -> torch.Tensor:
        """Image and prompt once a question, the cache repeated n-fold, a bare sampling loop."""
        model = self.policy.eval()
        decoder, head = model.model.language_model, model.lm_head
        cache = DynamicCache(config=decoder.config)
        x = self._prompt_embeddings(model)
        hidden = decoder(
            inputs_embeds=x, position_ids=self.position, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1:]
        cache.batch_repeat_interleave(self.n)
        hidden = hidden.repeat_interleave(self.n, 0)
        at = self.next.repeat_interleave(self.n)[None, :, None].expand(3, -1, 1)
        out = []
        for j in range(self.new):
            tokens = torch.multinomial(head(hidden)[:, 0].softmax(-1), 1)
            out.append(tokens)
            if j + 1 < self.new:
                hidden = decoder(
                    inputs_embeds=decoder.embed_tokens(tokens),
                    position_ids=at + j,
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
        return torch.cat(out, 1)

    def _prompt_embeddings(self, model: Any) -> torch.Tensor:
        features = model.model.visual(self.pixels, grid_thw=self.grid).pooler_output
        x = model.model.language_model.embed_tokens(self.prompt)
        return x.masked_scatter((self.prompt == self.image_pad)[..., None], features.to(x.dtype))

    # ---- training ----

    def step(self) -> float:
        """A GRPO update as the library offers it: every row carries its own image."""
        return self._step(self._log_probs)

    def step_by_hand(self) -> float:
        """The same update with the image embedded once a question and positions precomputed."""
        return self._step(self._log_probs_by_hand)

    def loss(self, log_probs: Callable | None = None) -> torch.Tensor:
        """mean_i mean_t -(rho A - beta k3) over the tokens of each completion, with its graph."""
        log_probs = log_probs or self._log_probs_by_hand
        with torch.inference_mode():
            reference = log_probs(self.reference)
        lp = log_probs(self.policy)
        reference = reference.clone()
        mask = (torch.arange(self.new) < self.length[:, None]).to(lp.dtype)
        ratio = torch.exp(lp - lp.detach())
        k3 = torch.exp(reference - lp) - (reference - lp) - 1
        per_token = -(ratio * self.advantage[:, None] - self.beta * k3)
        return ((per_token * mask).sum(1) / self.length).mean()

    def _step(self, log_probs: Callable) -> float:
        self.policy.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(log_probs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm, foreach=True)
        self.optimizer.step()
        return float(loss.detach())

    def _chosen(self, logits: torch.Tensor) -> torch.Tensor:
        lp = logits.float().log_softmax(-1)
        return lp.gather(-1, self.completion[..., None])[..., 0]

    def _log_probs(self, model: Any) -> torch.Tensor:
        n = self.n
        ids = torch.cat([self.prompt.repeat_interleave(n, 0), self.completion], 1)
        patches = self.pixels.view(len(self.prompt), -1, self.pixels.shape[-1])
        types = self.image_types.repeat_interleave(n, 0)
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=torch.cat([types, torch.zeros_like(self.completion).int()], 1),
            pixel_values=patches.repeat_interleave(n, 0).flatten(0, 1),
            image_grid_thw=self.grid.repeat_interleave(n, 0),
            logits_to_keep=self.new + 1,
            use_cache=False,
        ).logits
        return self._chosen(logits[:, :-1])

    def _log_probs_by_hand(self, model: Any) -> torch.Tensor:
        n, decoder = self.n, model.model.language_model
        prompt = self._prompt_embeddings(model).repeat_interleave(n, 0)
        own = decoder.embed_tokens(self.completion[:, :-1])
        steps = torch.arange(self.new - 1)
        at = self.next.repeat_interleave(n)[:, None] + steps
        position = torch.cat([self.position.repeat_interleave(n, 1), at.expand(3, *at.shape)], 2)
        hidden = decoder(
            inputs_embeds=torch.cat([prompt, own], 1), position_ids=position, use_cache=False
        ).last_hidden_state
        return self._chosen(model.lm_head(hidden[:, prompt.shape[1] - 1 :]))
