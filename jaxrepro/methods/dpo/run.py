"""Preference optimisation end to end: warm-up, reference, updates on pairs that exist or are drawn, evaluation.

    warm up    supervised fine-tuning, where there is no trained model to start from
    refer      log-probs of the start, computed once (cached), or a reference that lives in the state
    prefer     `steps` updates of the configured losses; online kinds draw a round of pairs every online.every
    evaluate   held-out pairs, samples with a judge's scores, greedy answers; before and after

One run trains one arm; `jaxrepro.reproduce` compares losses on the same data, seeds and warm-up.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxrepro import distributed, sharding
from jaxrepro.config import UserError
from jaxrepro.data import batches
from jaxrepro.data.questions import Encoder
from jaxrepro.methods.dpo import (
    checks,
    evaluation,
    online,
    programs,
    reference_cache,
    report,
    rollouts,
    setting,
    table,
)
from jaxrepro.methods.dpo.rows import Item, Shape, collate, shape_of
from jaxrepro.methods.dpo.setting import Setting
from jaxrepro.methods.dpo.spec import SCHEMAS
from jaxrepro.models import lora
from jaxrepro.rewards import judge as judges
from jaxrepro.rollout.generate import COLDEST, HOTTEST
from jaxrepro.train import memory, policy, quiz, sft
from jaxrepro.train.loop import Run

STAGE, WARM = "dpo", "sft"


def run(
    config: Any, workdir: Any, *, resume: str = "auto", profile: str | None = None
) -> dict[str, float]:
    """Train one arm in `workdir`; returns what summary.json holds."""
    check(config)
    if config.model.shape == table.SHAPE:
        return table.run(config, workdir, resume=resume)
    mesh = sharding.abstract_mesh(config.mesh, devices=jax.device_count())
    sharding.check_batches(mesh, **{"dpo.batch": config.dpo.batch, "sft.batch": config.sft.batch})
    s = setting.prepare(config)
    judge = judges.resolve(config.judge)
    with Run(
        config,
        workdir,
        resume=resume,
        profile=profile,
        show=("loss", "rewards/accuracy", "rewards/margin"),
    ) as run:
        if run.finished:
            return run.results
        start = partial(begin, run, s)
        examine = Examiner(s, judge, start)
        warm_up(run, s)
        before = run.once("before", lambda: examine(start(), "before/test/"), of=asked(config))
        run.say(f"start: {evaluation.line(before['rates'], 'before/test/')}")
        if not config.steps:
            return run.summary(before["rates"])
        params = prefer(run, s, start, judge)
        after = examine(params, "after/test/", before)
        results = before["rates"] | after["rates"] | report.changes(before, after)
        distributed.first(lambda: report.write(run, s, before, after))
        run.summary(results)
        run.say(f"{config.loss.name}: {evaluation.line(results, 'after/test/')}")
        if "quiz" in after:
            run.say(quiz.verdict(results))
        return run.results


def asked(config: Any) -> list[Any]:
    """What a measurement depends on and a resumed run may change."""
    return [config.eval.n, config.eval.samples, config.eval.greedy]


def check(config: Any) -> None:
    """UserError for settings that can't work, before anything is read."""
    online.check(config.online.kind, config.online.samples)
    losses = setting.mix(config)
    setting.annotator(config)
    if config.model.shape != table.SHAPE:
        policy.check(config)
    least = dict.fromkeys(("online.every", "online.tries"), 1)
    least |= dict.fromkeys(("sft.steps", "eval.samples", "online.keep"), 0)
    policy.check_rows(config, {"sft": config.sft.steps, "dpo": config.steps}, least)
    setting.reference(config, losses)
    if config.lora.rank and config.sft.steps and not config.init_from:
        raise UserError(
            f"lora.rank={config.lora.rank} with sft.steps={config.sft.steps}: the warm-up would train the "
            "adapters, and the reference is without them; use sft.steps=0, or init_from of a warm-up without"
        )
    if config.online.kind and not COLDEST <= config.online.temperature <= HOTTEST:
        raise UserError(
            f"online.temperature={config.online.temperature}; drawn pairs need one from {COLDEST} to "
            f"{HOTTEST}"
        )
    generated = config.data.generator == "letters" and not config.data.path
    if not generated and not config.online.kind and not config.data.path:
        raise UserError(
            f"data.generator={config.data.generator} has questions and no pairs: set online.kind, or "
            "data.path"
        )
    if not config.model.path and config.data.generator == "gsm_symbolic":
        raise UserError(
            "model.path is needed (a folder, a .gguf file, a hub name, smollm2): a model from scratch "
            "knows the letters and the chains alone"
        )
    checks.settings(config, losses)


# Warm-up ---------------------------------------------------------------------------------------


def warm_up(run: Run, s: Setting) -> None:
    """Supervised fine-tuning, where there is neither `init_from` nor a model that should not have it."""
    config = s.config
    if not warmed(config):
        return
    encoder = questions_encoder(s)
    responses = config.data.max_completion
    loss = partial(sft.loss, cfg=s.policy.cfg, responses=responses)
    state, step = policy.begin(
        run, s.policy, config, config.sft, loss, steps=config.sft.steps, stage=WARM
    )
    data = batches.dataset(s.asked, encoder.sft, batch=config.sft.batch, seed=config.seed)
    for i in run.steps(state, config.sft.steps):
        batch = data[i]
        state, metrics = step(state, policy.place(s.policy, batch.arrays))
        run.log(i, metrics, ids=batch.ids)
        run.save(i, state)


def warmed(config: Any) -> bool:
    return bool(config.sft.steps and not config.init_from)


def begin(run: Run, s: Setting) -> Any:
    """The parameters that preference learning starts from; read again each time, as a step eats its own."""
    if warmed(s.config):
        run.wait()
        return policy.trained(s.policy, run.workdir, WARM)
    return policy.initial(s.policy, s.config)


def questions_encoder(s: Setting) -> Encoder:
    """Rows of questions with their solutions."""
    data = s.config.data
    return Encoder(s.policy.tokenizer, data.max_tokens, data.max_completion, system=data.system)


# Updates ---------------------------------------------------------------------------------------


def prefer(run: Run, s: Setting, start: Callable[[], Any], judge: Any) -> Any:
    """Parameters after `steps` updates of the losses."""
    config, section = s.config, s.config.dpo
    items: Sequence[Item] = s.train
    own = config.reference.get("init_from")
    if s.reference.kind == "cached":
        items = refer(run, s, policy.begun(s.policy, own) if own else start(), items)
    shape = shape_of(items) if items else drawn_shape(s)
    settings = dict(cfg=s.policy.cfg, mix=s.mix, reference=s.reference)
    extra = partial(programs.first_extra, s.mix, s.reference)
    state, step = policy.begin(
        run,
        s.policy,
        config,
        section,
        partial(programs.loss, **settings),
        steps=config.steps,
        stage=STAGE,
        params=start,
        extra=extra,
        prepare=partial(
            programs.prepare,
            **settings,
            micro_batches=section.micro_batches,
            seed=config.seed,
            steps=config.steps,
        ),
    )
    if own and s.reference.kind == "live" and int(state.step) == 0:
        state = state.replace(extra=state.extra | {"reference": None})  # before another is read
        state = state.replace(extra=state.extra | {"reference": policy.begun(s.policy, own)})
    other = int("kl_p" in programs.needs_of(s.mix))
    arrays = partial(collate, shape=shape, pad=s.policy.tokenizer.pad, mismatched=other)
    offline = items and batches.dataset(items, arrays, batch=section.batch, seed=config.seed)
    rounds = None if items else Rounds(run, s, judge)
    for i in run.steps(state, config.steps):
        batch = offline[i] if rounds is None else rounds.batch(i, state, arrays)
        state, metrics = step(state, policy.place(s.policy, batch.arrays))
        run.log(i, metrics, ids=batch.ids)
        run.save(i, state)
    return state.params


def drawn_shape(s: Setting) -> Shape:
    """Shape of rows whose responses are drawn."""
    longest = max(len(rollouts.prompt(s, q)) for q in s.asked)
    k = 1 if online.KINDS[s.config.online.kind].single else 2
    up = lambda n: -(-n // 16) * 16
    return Shape(k, up(longest), up(s.config.data.max_completion))


class Rounds:
    """Pairs that the policy draws; each round once in the life of a run."""

    def __init__(self, run: Run, s: Setting, judge: Any):
        self._run, self._s, self._judge = run, s, judge
        config = s.config.online
        self._every, self._round, self._data = config.every, -1, None
        self._moved = jax.jit(partial(programs.moved, s.reference))
        self._keep = online.KINDS[config.kind].keep if config.keep is None else config.keep
        writer = partial(rollouts.Writer, s, temperature=config.temperature, slots=config.slots)
        self._writers = {"policy": writer(), "reference": writer()}
        if online.KINDS[config.kind].other == "mixture":
            self._writers["mixture"] = rollouts.Mixture(
                s,
                temperature=config.temperature,
                share=config.mixture,
                batch=config.slots,
                n=online.KINDS[config.kind].others,
            )

    def batch(self, i: int, state: Any, arrays: Any) -> batches.Batch:
        """The batch of step i."""
        s, r = self._s, i // self._every
        if r != self._round:
            draw = lambda: {
                "policy_step": i,
                "reference_step": self._reference_step(i),
                **rollouts.draw_round(
                    s,
                    self._writers,
                    state.params,
                    self._reference(i, state),
                    r,
                    self._judge,
                    say=self._run.say,
                ),
            }
            found = self._earlier(r) + self._run.once(f"round-{r:06d}", draw)["items"]
            # A round alone is read as it was drawn; earlier ones are mixed in.
            seed = (s.config.seed + r) % 2**32 if self._keep and r else None
            self._data = batches.dataset(found, arrays, batch=s.config.dpo.batch, seed=seed)
            self._round = r
        return self._data[i - r * self._every]

    def _earlier(self, r: int) -> list[Item]:
        """The items of the rounds before round r that are kept; this run has drawn them."""
        items = []
        for j in range(max(0, r - self._keep), r):

            def lost(j: int = j) -> Any:
                raise UserError(
                    f"online.keep: round {j} is not in the workdir any more; start again"
                )

            items += self._run.once(f"round-{j:06d}", lost)["items"]
        return items

    def _reference(self, i: int, state: Any) -> Any:
        """The reference that update i is held to, where a round is drawn from it too."""
        kind = self._s.reference.kind
        if online.KINDS[self._s.config.online.kind].other not in online.REFERENCES:
            return None
        if kind == "adapter":
            return lora.off(state.params)
        moves = kind == "synced" and self._reference_step(i) == i > 0
        return self._moved(state) if moves else state.extra["reference"]

    def _reference_step(self, i: int) -> int:
        reference = self._s.reference
        return i // reference.every * reference.every if reference.kind == "synced" else 0


def refer(run: Run, s: Setting, start: Any, items: Sequence[Item]) -> list[Item]:
    """The items with the log-probs of the start, from the cache where it has them."""
    shape = shape_of(items)
    scorer = evaluation.Scorer(s, batch=s.config.eval.batch, needs=programs.needs_of(s.mix))
    ref = lora.off(start)
    names = scorer.names
    weights = reference_cache.weights(ref, s.policy.cfg)
    key = reference_cache.fingerprint(weights, items, shape, names)
    full = (len(items), len(names), *shape_array(shape))
    folder = reference_cache.folder()
    found = distributed.first(lambda: reference_cache.load(folder, key, full) is not None)
    if found:
        values = reference_cache.load(folder, key, full)
        some = items[: s.config.eval.batch]  # the first batch, by the same program
        live = scorer(ref, some, shape)
        reference_cache.compare(
            values[: len(some)], live, [one["id"] for one in some], s.policy.cfg.dtype
        )
        run.say(f"reference: {len(items)} items from {folder.name}/{key[:8]}")
    else:
        values = scorer(ref, items, shape)
        save = lambda: str(reference_cache.save(folder, key, values, ids=[i["id"] for i in items]))
        distributed.first(save)
    cut = lambda i, j: [v[: len(r)] for v, r in zip(values[i, j], items[i]["responses"])]
    return [
        one | {"reference": {name: cut(i, j) for j, name in enumerate(names)}}
        for i, one in enumerate(items)
    ]


def shape_array(shape: Shape) -> tuple[int, int]:
    return shape.k, shape.response


# Evaluation ------------------------------------------------------------------------------------


class Examiner:
    """`(params, prefix, before=None)` -> {"rates", ...} on held-out data; start() gives the start."""

    def __init__(self, s: Setting, judge: Any, start: Any):
        self._s, self._start = s, start
        self._scorer = evaluation.Scorer(s, batch=s.config.eval.batch)
        writer = partial(rollouts.Writer, s, slots=s.config.online.slots)
        self._sampled = evaluation.Sampled(s, judge, writer(temperature=1.0), self._scorer)
        self._greedy = writer(temperature=0.0)

    def __call__(self, params: Any, prefix: str, before: Any = None) -> dict[str, Any]:
        s, out = self._s, {"rates": {}}
        held = [i for i in s.held if len(i["responses"]) == 2]
        if held:
            lp = self._scorer.sums(params, held, shape_of(held))
            ref = np.array(before["lp"]) if before else lp
            rates, out["pairs"] = evaluation.pairs(lp, ref, held, prefix)
            out["rates"] |= rates
            out["lp"] = lp.tolist()
        if s.config.eval.samples and s.test:
            baseline = before["samples"]["values"] if before else None
            out["samples"] = self._sampled(
                params, self._start if before else lambda: params, prefix, baseline
            )
            out["rates"] |= out["samples"].pop("rates")
        if s.config.eval.greedy and s.test:
            found = self._greedy(params, s.test, n=1, key=jax.random.key(0))
            answers = [(drawn[0].text, drawn[0].ended) for drawn, _ in found]
            out["quiz"] = quiz.score(s.test, answers, prefix)
            out["rates"] |= out["quiz"].pop("rates")
        return out


# After training, and before it -----------------------------------------------------------------


def trained(config: Any, workdir: Any) -> tuple[Setting, Any]:
    """The setting and the last parameters of a run."""
    s = setting.prepare(config)
    return s, policy.trained(s.policy, workdir, STAGE if config.steps else WARM)


def evaluate(
    config: Any, workdir: Any, *, split: str = "test", n: int | None = None
) -> dict[str, float]:
    """Metrics of a trained run on its held-out data, without those that compare with the start."""
    if split != "test":
        raise UserError(f"split {split!r}: a preference run has the split test alone")
    if n is not None:
        with config.unlocked():
            config.eval.n = n
    s, params = trained(config, workdir)
    rates = Examiner(s, judges.resolve(config.judge), lambda: params)(params, "test/")["rates"]
    compared = ("test/accuracy", "test/kl")  # with the start, which is not here
    return {name: value for name, value in rates.items() if not name.startswith(compared)}


def sample(
    config: Any,
    workdir: Any,
    *,
    prompt: str | None = None,
    image: Any = None,
    n: int = 1,
    temperature: float | None = None,
    seed: int = 0,
) -> list[str]:
    """Responses of a trained run to `prompt`; without one, to n test questions."""
    if image is not None:
        raise UserError("--image: this run trained a text model; leave it out")
    s, params = trained(config, workdir)
    temperature = 1.0 if temperature is None else temperature
    writer = rollouts.Writer(s, temperature=temperature, slots=config.online.slots)
    key = jax.random.key(seed)
    if prompt is not None:
        ((drawn, _),) = writer(params, [{"id": "prompt", "problem": prompt}], n=n, key=key)
        return [d.text for d in drawn]
    asked = s.test[:n]
    found = writer(params, asked, n=1, key=key)
    return [f"question: {q['problem']}\n\n{d[0].text}" for q, (d, _) in zip(asked, found)]


def export(config: Any, workdir: Any) -> tuple[Any, Any, Any]:
    """Parameters and config of a trained run, and its tokenizer."""
    s, params = trained(config, workdir)
    return params, s.policy.cfg, policy.exported(s.policy)


def plan(config: Any) -> memory.Plan:
    """Shapes of a training step, for --dry_run; touches no file, network or device."""
    check(config)
    if config.model.shape == table.SHAPE:
        return memory.Plan(params=jax.ShapeDtypeStruct((table.ANSWERS,), np.float32), stage=STAGE)
    losses = setting.mix(config)
    kind = setting.reference(config, losses).kind
    cfg = policy.geometry(config, setting.pieces(config))
    k = SCHEMAS[losses[0][0].schema] or config.data.responses or 2
    found = policy.plan(config, cfg, config.dpo, rows=config.dpo.batch, stage=STAGE, k=k)
    copy = found.params if kind in ("live", "synced") else None
    return dataclasses.replace(found, reference=copy)
