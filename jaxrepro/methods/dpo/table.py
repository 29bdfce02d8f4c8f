"""A run without a network: the loss on a table of answers, where the optimum is known (tabular.py).

`--config.model.shape=table`: 16 answers with a reference and rewards drawn from the seed, infinitely many
Bradley-Terry pairs. Measures the distance of the policy from ref exp(r / beta), its entropy and its KL.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrepro.config import UserError
from jaxrepro.methods.dpo import objective, setting, tabular
from jaxrepro.methods.dpo.sequence import SeqStats
from jaxrepro.train.loop import Run

SHAPE = "table"
ANSWERS = 16


def run(config: Any, workdir: Any, *, resume: str = "auto") -> dict[str, float]:
    """Fit the table; what summary.json holds."""
    losses = setting.mix(config)
    for spec, _ in losses:
        if spec.needs - {"reference"} or spec.state or spec.set_level or spec.schema != "pair":
            raise UserError(
                f"loss {spec.name!r} is not a function of one pair's log-probs; a table takes others"
            )
    with Run(config, workdir, resume=resume) as run:
        if run.finished:
            return run.results
        return run.summary(measure(config, losses))


def measure(config: Any, losses: Any) -> dict[str, float]:
    """after/table/{tv, entropy, kl, reward} of the fitted policy."""
    keys = jax.random.split(jax.random.key(config.seed))
    table = tabular.Table(
        jax.nn.log_softmax(jax.random.normal(keys[0], (ANSWERS,))),
        jax.random.normal(keys[1], (ANSWERS,)),
    )
    beta = next((s.hyper["beta"] for s, _ in losses if "beta" in s.hyper), 1.0)
    preference = tabular.bradley_terry(table)
    if config.data.annotator == "best":
        preference = (table.reward[:, None] > table.reward).astype(jnp.float32)

    def loss(p: Any, q: Any) -> Any:
        seq = SeqStats(p, q, jnp.ones_like(p))
        return objective.total(losses, seq)[0]

    found = tabular.fit(loss, table, preference, steps=config.steps)
    best = tabular.optimum(table, beta)
    ref = jax.nn.softmax(table.ref)
    return {
        "after/table/tv": float(tabular.total_variation(found, best)),
        "after/table/entropy": float(tabular.entropy(found)),
        "after/table/kl": float(tabular.kl(found, ref)),
        "after/table/reward": float(found @ table.reward),
        "after/table/best_reward": float(best @ table.reward),
    }
