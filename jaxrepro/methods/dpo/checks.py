"""Settings and data of a preference run that cannot work: a UserError of one line, before the first step.

`settings` reads the config alone; `items` the data in tokens.
"""

from collections.abc import Sequence
from typing import Any

from jaxrepro.config import UserError
from jaxrepro.methods.dpo import online
from jaxrepro.methods.dpo.programs import Mix, needs_of
from jaxrepro.methods.dpo.rows import Item

PAIRS = {"pair", "scored", "tie", "multi", "step"}  # schemas whose records are pairs, and more
LETTERS = "jaxrepro.methods.dpo.world:judge"


def settings(config: Any, losses: Mix) -> None:
    """UserError for settings of data, batches, rounds and judge that can't work."""
    _source(config)
    _batch(config, losses)
    _responses(config, "pair" if config.online.kind else schema(config, losses))
    if config.online.keep is not None and not config.online.kind:
        raise UserError(
            f"online.keep={config.online.keep} keeps rounds of drawn pairs; set online.kind, or leave it out"
        )
    _judge(config)


def schema(config: Any, losses: Mix) -> str:
    """The schema of the data: the configured one, else the one that the losses read."""
    read = {spec.schema for spec, _ in losses}
    plain = read - {"pair"} if read <= PAIRS else read
    if len(plain) > 1:
        raise UserError(
            f"losses {config.loss.name} read different data: {', '.join(sorted(plain))}; mix losses "
            "of one schema"
        )
    own = (plain or {"pair"}).pop()
    given = config.data.schema or own
    if given != own and not {given, own} <= PAIRS:
        raise UserError(
            f"data.schema={given}, but loss {config.loss.name} reads {own} records; leave data.schema out"
        )
    return given


def items(losses: Mix, found: Sequence[Item]) -> None:
    """UserError for data that a loss cannot read, such as scores in a wrong order; it names the example."""
    for spec, _ in losses:
        for one in found if spec.name in _ONE else ():
            _ONE[spec.name](spec.hyper, one)
        if spec.name in ("mdpo_multi", "d2o"):
            _equal(spec.name, found)


def _odpo(hyper: Any, one: Item) -> None:
    if hyper["offset"] == "log" and one["scores"][0] <= one["scores"][1]:
        raise UserError(
            f"example {one['id']}: odpo needs a chosen score above the rejected one; drop such pairs "
            "(of the letters: data.annotator=best), or use loss.offset=identity"
        )


def _sppo_soft(hyper: Any, one: Item) -> None:
    if not all(0 <= p <= 1 for p in one["scores"]):
        raise UserError(
            f"example {one['id']}: sppo_soft reads scores as win probabilities, and they are "
            f"{one['scores']}; give numbers in [0, 1]"
        )


def _modpo(hyper: Any, one: Item) -> None:
    weights, rewards = len(hyper["weights"]), len(one["rewards"][0])
    if rewards != weights - 1:
        raise UserError(
            f"example {one['id']} has {rewards} further rewards, and modpo has {weights} weights; give "
            "loss.weights one more than rewards"
        )


_ONE = {"odpo": _odpo, "sppo_soft": _sppo_soft, "modpo": _modpo}


def _equal(name: str, found: Sequence[Item]) -> None:
    """Groups are known by their place: as many responses everywhere, and two equal groups of MDPO."""
    counts = {len(one["responses"]): one["id"] for one in found}
    if len(counts) > 1:
        (a, first), (b, other), *_ = counts.items()
        raise UserError(
            f"example {first} has {a} responses, example {other} has {b}; {name} wants as many everywhere"
        )
    if name == "mdpo_multi" and (odd := next((n for n in counts if n % 2), None)):
        raise UserError(
            f"example {counts[odd]} has {odd} responses; mdpo_multi compares two halves, give an even number"
        )


def letters(config: Any) -> bool:
    """Whether every text is made of the world's letters, of a model that knows nothing else."""
    return config.data.generator == "letters" and not config.model.path


def _source(config: Any) -> None:
    if config.data.generator != "letters" or config.data.path:
        return
    if config.model.path or config.study:
        which = f"model.path={config.model.path}" if config.model.path else f"study={config.study}"
        raise UserError(
            f"data.generator=letters is for a model from scratch, not {which}; set data.path, or "
            "data.generator=gsm_symbolic and online.kind"
        )


def _batch(config: Any, losses: Mix) -> None:
    batch, parts = config.dpo.batch, config.dpo.micro_batches
    for spec, _ in losses:
        if batch < spec.min_batch:
            raise UserError(
                f"dpo.batch={batch}: loss {spec.name!r} compares the items of a batch; use {spec.min_batch} "
                "or more"
            )
    if "kl_p" in needs_of(losses) and batch < 2 * parts:
        raise UserError(
            f"dpo.batch={batch} in dpo.micro_batches={parts}: kto reads each prompt with another item's "
            "response; use 2 items or more in each"
        )


def _responses(config: Any, of: str) -> None:
    n = config.data.responses
    if of in ("ranked", "forget") and not config.data.path:
        return  # refused as no data of the letters
    if not {"ranked": n >= 2, "forget": n in (0, 1, 2)}.get(of, n == 0):
        raise UserError(
            f"data.responses={n} with {of} records; rankings take 2 or more, records to forget 1 or 2, "
            "others 0"
        )


def _judge(config: Any) -> None:
    kind = config.online.kind
    asked = config.eval.samples > 0 or (kind and online.KINDS[kind].other != "demonstration")
    if config.judge == LETTERS and asked and not letters(config):
        raise UserError(
            f"judge={LETTERS} knows 16 letters and would score any text; name another in config.judge"
            f"{'' if kind else ', or set eval.samples=0'}"
        )
