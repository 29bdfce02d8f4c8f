"""What a preference run measures before and after: held-out pairs, and samples that a judge scores.

All of it is in terms of log-probs and of the policy at the start, so it compares losses of any kind:

    accuracy      share of held-out pairs with log pi/start (chosen) > log pi/start (rejected); 1/2 for equal ones
    ranked        the same of mean log-probs of a token, without the start
    chosen_lp     mean summed log-prob of chosen responses; displacement is its change (likewise rejected_lp)
    score         mean judge's score of samples at temperature 1
    win_rate      share of samples whose score beats the start's sample for the same prompt; a tie is half
    kl            KL(pi || start) in nats a response, the mean of log pi - log start over samples
    length, entropy, unended    tokens a sample; nats a token (mean of -log pi); share without an end of turn
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxrepro import sharding, stats
from jaxrepro.methods.dpo import online, programs
from jaxrepro.methods.dpo.rollouts import Writer, prompt
from jaxrepro.methods.dpo.rows import Item, Shape, collate, shape_of
from jaxrepro.methods.dpo.sequence import Batch
from jaxrepro.methods.dpo.setting import Setting
from jaxrepro.models import lora
from jaxrepro.train import policy, quiz

FIRST_SAMPLE = 1 << 20  # request ids of evaluation; its key is its own too


class Scorer:
    """Log-probs of items under any parameters of the policy's shape, adapters on or off."""

    def __init__(self, s: Setting, *, batch: int, needs: frozenset[str] = frozenset()):
        """needs: of losses; "ref_entropy" adds the entropy."""
        self._s, self._batch = s, batch
        self.names = ("lp", *(["entropy"] if "ref_entropy" in needs else []))
        cfg = dataclasses.replace(s.policy.cfg, lora=None)

        @partial(sharding.on_mesh, s.policy.mesh)
        @jax.jit
        def run(params, rows):
            own = s.policy.cfg if lora.has(params) else cfg
            found = programs.reference_scores(params, own, rows, needs & {"ref_entropy"})
            return tuple(found[name] for name in self.names)

        self._run = run

    def __call__(self, params: Any, items: Sequence[Item], shape: Shape) -> np.ndarray:
        """Of tokens: (n, names, k, c), 0 beyond a response."""
        parts = sharding.row_parts(self._s.policy.mesh)
        size = -(-min(self._batch, len(items)) // parts) * parts
        out = []
        for at in range(0, len(items), size):
            some = list(items[at : at + size])
            some += [some[-1]] * (size - len(some))
            rows = collate(some, shape, pad=self._s.policy.tokenizer.pad)
            rows = rows._replace(data=Batch(), reference=None)
            found = sharding.fetch(self._run(params, policy.place(self._s.policy, rows)))
            keep = np.arange(shape.response) < rows.length[..., None]
            out.append(np.stack([np.where(keep, x, 0.0) for x in found], axis=1))
        return np.concatenate(out)[: len(items)]

    def sums(self, params: Any, items: Sequence[Item], shape: Shape) -> np.ndarray:
        """Summed log-probs (n, k)."""
        return self(params, items, shape)[:, 0].sum(-1)


def pairs(
    lp: np.ndarray, start: np.ndarray, items: Sequence[Item], prefix: str
) -> tuple[dict[str, float], list[float]]:
    """Metrics of held-out pairs from summed log-probs (n, 2) now and at the start; and each pair's outcome."""
    gain = lp - start
    right = np.where(gain[:, 0] == gain[:, 1], 0.5, gain[:, 0] > gain[:, 1])
    length = np.array([[len(r) for r in i["responses"][:2]] for i in items])
    mean = lp[:, :2] / length
    found = stats.bootstrap(right)
    return {
        f"{prefix}accuracy": found.mean,
        f"{prefix}accuracy_lo": found.lo,
        f"{prefix}accuracy_hi": found.hi,
        f"{prefix}ranked": float((mean[:, 0] > mean[:, 1]).mean()),
        f"{prefix}chosen_lp": float(lp[:, 0].mean()),
        f"{prefix}rejected_lp": float(lp[:, 1].mean()),
        f"{prefix}pairs": float(len(items)),
    }, right.tolist()


class Sampled:
    """Samples of held-out questions at temperature 1, scored by the judge."""

    def __init__(self, s: Setting, judge: Any, writer: Writer, scorer: Scorer):
        self._s, self._judge, self._writer, self._scorer = s, judge, writer, scorer

    def __call__(
        self, params: Any, start: Any, prefix: str, baseline: Any = None
    ) -> dict[str, Any]:
        """{"rates", "values" (scores in order; None = unscorable), "texts"}; baseline: values of the start."""
        s, n = self._s, self._s.config.eval.samples
        key = jax.random.fold_in(jax.random.key(s.config.seed), FIRST_SAMPLE)
        found = self._writer(params, s.test, n=n, key=key)
        values, texts, lengths, lps, ended, items = [], [], [], [], [], []
        for q, (drawn, lp_raw) in zip(s.test, found):
            values += online.scores(self._judge, q, drawn).scores.tolist()
            texts += [d.text for d in drawn]
            lengths += [len(d.tokens) for d in drawn]
            ended += [d.ended for d in drawn]
            lps += [float(lp.sum()) for lp in lp_raw]
            base = {"id": q["id"], "prompt": prompt(s, q)}
            items += [base | {"responses": [d.tokens]} for d in drawn]
        ref = self._scorer.sums(start(), items, shape_of(items, multiple=32))[:, 0]
        known = [v for v in values if v == v]
        values = [v if v == v else None for v in values]
        kl = np.array(lps) - ref
        rates = {
            f"{prefix}score": float(np.mean(known)) if known else 0.0,
            f"{prefix}unscorable": float(len(values) - len(known)),
            f"{prefix}kl": float(kl.mean()),
            f"{prefix}length": float(np.mean(lengths)),
            f"{prefix}entropy": float(-np.sum(lps) / np.sum(lengths)),
            f"{prefix}unended": float(1 - np.mean(ended)),
            f"{prefix}samples": float(len(values)),
        }
        out = {"rates": rates, "values": values, "texts": texts}
        if baseline is not None:
            wins = win(values, baseline)
            # samples of one prompt are no independent items: the interval is over prompts
            found_wins = stats.bootstrap(np.reshape(wins, (-1, n)).mean(1))
            rates |= {
                f"{prefix}win_rate": found_wins.mean,
                f"{prefix}win_rate_lo": found_wins.lo,
                f"{prefix}win_rate_hi": found_wins.hi,
            }
            out["wins"] = wins
        return out


def win(values: Sequence[float | None], baseline: Sequence[float | None]) -> list[float]:
    """1, 1/2 or 0 for each sample against the baseline's of the same place; unscorable loses to any score."""
    low = lambda v: -np.inf if v is None else v
    return [
        0.5 if low(a) == low(b) else float(low(a) > low(b))
        for a, b in zip(values, baseline, strict=True)
    ]


def line(results: Mapping[str, float], prefix: str) -> str:
    """What the terminal shows of an evaluation."""
    get = lambda name: results.get(f"{prefix}{name}")
    parts = []
    if get("accuracy") is not None:
        parts.append(f"held-out pairs {100 * get('accuracy'):.1f} %")
    if get("score") is not None:
        parts.append(f"score {get('score'):+.3f}")
    if get("win_rate") is not None:
        parts.append(f"win rate {100 * get('win_rate'):.1f} %")
    if get("kl") is not None:
        parts.append(f"KL {get('kl'):.2f} nats, length {get('length'):.1f}")
    if get("exact_match") is not None:
        parts.append(quiz.line(results, prefix))
    return ", ".join(parts)
