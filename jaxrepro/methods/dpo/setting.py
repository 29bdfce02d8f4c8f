"""What a preference run is made of before its first step: losses, reference, policy, data."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxrepro.config import UserError
from jaxrepro.data import questions, sources
from jaxrepro.methods.dpo import (
    checks,
    objective,
    online,
    programs,
    records,
    registry,
    rows,
    schemas,
    world,
)
from jaxrepro.methods.dpo.encoding import Encoder
from jaxrepro.methods.dpo.programs import Mix, Reference
from jaxrepro.methods.dpo.records import Preferences
from jaxrepro.methods.dpo.rows import Item
from jaxrepro.methods.dpo.spec import SCHEMAS, LossSpec
from jaxrepro.methods.dpo.world import Annotator
from jaxrepro.train import checkpoint, policy
from jaxrepro.train.policy import Policy

# What no run here has, by input and by schema; the losses are there for use from Python.
UNTRAINED = {
    "value": "trains a value head",
    "reward_head": "trains a reward head",
    "embedding": "compares embeddings of prompts",
    "weights": "weighs tokens by two further models",
    "turn": "counts the turns of a response",
    "prompt_p": "learns the prompt too (prompt_nll)",
}
UNREAD = {
    "image": "is about images",
    "sampled": "reads a fresh sample of the policy beside each pair",
}


class Setting(NamedTuple):
    """What the parts of a run share."""

    config: Any
    policy: Policy
    encoder: Encoder
    mix: Mix
    reference: Reference
    train: Sequence[Item]  # offline items; none where all are drawn
    held: Sequence[Item]  # held-out pairs; none where all are drawn
    asked: Sequence[dict[str, Any]]  # questions of training for which responses are drawn
    test: Sequence[dict[str, Any]]  # held-out questions


def mix(config: Any) -> Mix:
    """The losses that a config names, with the hyper-parameters that it sets."""
    section = config.loss.to_dict()
    names, shares = section.pop("name").split("+"), section.pop("shares")
    if odd := [share for share in shares if not isinstance(share, int | float)]:
        raise UserError(f"loss.shares has {odd[0]!r}; give numbers from 0, such as 1,0.005")
    given = {key: value for key, value in section.items() if value is not None}
    found = tuple(registry.mix(names, shares or None, **given))
    if not found:
        raise UserError("loss.name is empty; name a loss")
    for spec, _ in found:
        refuse(spec, config.online.kind)
    return found


def refuse(spec: LossSpec, kind: str) -> None:
    """UserError for a loss that needs what no run has, or what pairs of this kind (online.kind) do not say."""
    needs = objective.needed(spec)
    whys = [why for need, why in UNTRAINED.items() if need in needs]
    whys += [UNREAD[spec.schema]] if spec.schema in UNREAD else []
    if whys:
        raise UserError(
            f"loss {spec.name!r} {whys[0]}, which no run does; it is in the registry for use from Python"
        )
    if not kind and "explore" in needs:
        raise UserError(
            f"loss {spec.name!r} needs to know what was explored; set online.kind to xpo or selm"
        )
    if kind in online.KINDS:
        made = online.KINDS[kind]
        lacks = sorted((needs & rows.GIVEN) - made.gives)
        k, want = 1 if made.single else 2, SCHEMAS[spec.schema] or 2
        if lacks or k != want:
            what = ", ".join(lacks) or f"{want} responses an item and gets {k}"
            raise UserError(
                f"loss {spec.name!r} needs {what}, which online.kind={kind} does not give; use another kind"
            )


def reference(config: Any, losses: Mix) -> Reference:
    """The reference policy of a config; kind "auto" is chosen here."""
    kind, drawn = config.reference.kind, bool(config.online.kind)
    own = config.reference.get("init_from")  # runs of before have no such field
    needs = programs.needs_of(losses)
    wanted = needs & {"reference", "kl", "ref_entropy", "tokens", "kl_q"}
    if kind == "auto":
        asks = drawn and online.KINDS[config.online.kind].other in online.REFERENCES
        if not wanted and not asks:
            kind = "none"
        elif own:
            kind = "live" if drawn or needs & {"kl", "kl_q"} else "cached"
        elif drawn and online.KINDS[config.online.kind].iterated:
            kind = "synced"  # the policy of the round, adapters or not
        elif config.lora.rank:
            kind = "adapter"
        elif drawn or needs & {"kl", "kl_q"}:
            kind = "live"
        else:
            kind = "cached"
    every, alpha = config.reference.every, config.reference.alpha
    if kind == "synced" and drawn and config.reference.kind == "auto":
        every, alpha = config.online.every, 1.0  # the reference is the policy that drew the round
    if own and kind not in ("cached", "live"):
        raise UserError(
            f"reference.init_from={own} with reference.kind={kind}: only cached and live ones can be other "
            "than the start; leave it out, or use another loss or kind"
        )
    if kind not in programs.REFERENCES:
        raise UserError(f"reference.kind={kind!r} is not one of {', '.join(programs.REFERENCES)}")
    if kind == "none" and wanted:
        names = "+".join(spec.name for spec, _ in losses)
        raise UserError(f"reference.kind=none, but loss {names} needs a reference; use auto")
    if kind == "none" and drawn and online.KINDS[config.online.kind].other in online.REFERENCES:
        raise UserError(
            f"reference.kind=none, but online.kind={config.online.kind} draws from the reference; use auto"
        )
    if kind == "adapter" and not config.lora.rank:
        raise UserError("reference.kind=adapter needs adapters: set lora.rank, or use live")
    if kind == "cached" and drawn:
        raise UserError("reference.kind=cached needs data that exists before the run; use live")
    if kind == "cached" and needs & {"kl", "kl_q"}:
        raise UserError(
            "this loss needs the reference itself at each step; use reference.kind=live"
        )
    if not (every >= 1 and 0 < alpha <= 1):
        raise UserError(
            f"reference.every={every}, reference.alpha={alpha}; use 1 or more, and (0, 1]"
        )
    if config.reference.kind == "synced" and 0 < config.steps <= every:
        raise UserError(
            f"reference.every={every} with steps={config.steps}: the reference would never move; use fewer "
            "than steps, or reference.kind=auto"
        )
    return Reference(kind, every, alpha)


def annotator(config: Any) -> Annotator:
    """Who labels the pairs of the letters."""
    data = config.data
    found = Annotator(data.annotator, data.flips, data.bias)
    found.check()
    return found


def pieces(config: Any) -> list[str]:
    """The closed vocabulary of a model that is trained from scratch."""
    return list(world.LETTERS) if config.data.generator == "letters" else questions.chain_pieces()


def prepare(config: Any) -> Setting:
    """Everything but the weights; UserError for data that does not fit the loss."""
    losses = mix(config)
    held_to = reference(config, losses)
    if own := config.reference.get("init_from"):
        checkpoint.find(own)  # refused now, not after the warm-up
    model = policy.open_policy(config, pieces=pieces(config))
    schema = "pair" if config.online.kind else checks.schema(config, losses)
    data = config.data
    encoder = Encoder(
        model.tokenizer,
        data.max_tokens,
        schemas.get(schema),
        system=data.system,
        template=data.template,
        responses=data.responses or None,
    )
    if data.path and not config.online.kind:
        found = _records(config, encoder, losses, schema)
    elif data.generator == "letters" and not data.path:
        found = _letters(config, encoder, losses, schema)
    else:
        found = Data([], [], *_questions(config, encoder))
    checks.items(losses, found.train)
    return Setting(config, model, encoder, losses, held_to, *found)


class Data(NamedTuple):
    """The last four fields of a Setting."""

    train: Sequence[Item]
    held: Sequence[Item]
    asked: Sequence[dict[str, Any]]
    test: Sequence[dict[str, Any]]


def _records(config: Any, encoder: Encoder, losses: Mix, schema: str) -> Data:
    """Preferences of data.path, as far as they fit."""
    data, needs = config.data, programs.needs_of(losses)
    found = records.load(path=data.path, schema=schema, subset=data.subset, test=config.eval.n)
    if schema == "forget":
        found = _unlearnt(found, encoder.k, config.seed)
    test = found.test and encoder.fitting(found.test, "test")[: config.eval.n]
    kept = encoder.fitting(found.train, "training")
    for note in balances(losses, kept) if schema == "unpaired" else ():
        print(f"{data.path}: {note}", flush=True)
    asked = [as_question(r) for r in kept if schema == "forget" or r.get("label", True)]
    asked += [as_question(r["keep"]) for r in kept if "keep" in r]
    _one_turn(config, asked)
    return Data(
        [rows.item(encoder, r, needs) for r in kept],
        [as_pair(rows.item(encoder, r), schema) for r in test],
        asked,
        [as_question(r) for r in test],
    )


def _letters(config: Any, encoder: Encoder, losses: Mix, schema: str) -> Data:
    """Pairs and questions of the world of letters."""
    if schema not in ("pair", "scored"):
        raise UserError(f"loss {config.loss.name} reads {schema} records; the letters are pairs")
    n, test, needs = config.data.n, range(config.eval.n), programs.needs_of(losses)
    who, stream = annotator(config), f"train {config.seed}"
    best = Annotator("edit" if who.kind == "edit" else "best")
    make = lambda *of, **held: encoder.schema.validate(world.pair(*of, **held), of[1])
    trained = range(0 if config.online.kind else n)
    return Data(
        [rows.item(encoder, make(i, stream, who), needs) for i in trained],
        [rows.item(encoder, make(i, "test", best, held=True)) for i in test],
        [world.demonstration(i, stream) for i in range(n)],
        [world.demonstration(i, "test", held=True) for i in test],
    )


def _questions(config: Any, encoder: Encoder) -> tuple[list[Any], list[Any]]:
    """What is asked in training, and held-out questions: of data.path or of the generator, as far as they fit.

    Preference records are questions too: their prompts, the preferred response as the solution.
    """
    data, room = config.data, 2 * config.eval.n
    reader = questions.Encoder(
        encoder.tokenizer, data.max_tokens, data.max_completion, system=data.system
    )
    if data.path:
        subset = data.subset or questions.SUBSETS.get(data.path)
        rows = sources.load(data.path, subset, splits=records.SPLITS)
        if not questions.are(rows["train"]):
            found = records.checked(rows, data.path, data.schema or "pair", room)
            sides = [[as_question(r) for r in s if r.get("label", True)] for s in found]
            _one_turn(config, sides[0])
            fitting = reader.fitting if config.sft.steps else partial(_answerable, config, encoder)
            asked, test = map(fitting, sides, ("training", "test"))
            return asked, test[: config.eval.n]
        found = questions.read(rows, room)
        train = found.train
    else:
        found = questions.load(generator=data.generator, n=data.n, test=room, seed=config.seed)
        train = [found.train[i] for i in range(min(len(found.train), data.n))]
    asked = reader.fitting(train, "training")
    return asked, reader.fitting(found.test, "test")[: config.eval.n]


def _answerable(config: Any, encoder: Encoder, asked: list[Any], what: str) -> list[Any]:
    """Questions whose prompts leave room for a drawn response; prints how many others there were."""
    most = config.data.max_tokens - config.data.max_completion
    kept = [q for q in asked if len(encoder.prompt(q)) <= most]
    if len(kept) < len(asked):
        print(f"{what}: left out {len(asked) - len(kept)} of {len(asked)} prompts longer than {most} tokens", flush=True)  # fmt: skip
    if not kept:
        raise UserError(
            f"none of {len(asked)} {what} prompts leaves room for data.max_completion="
            f"{config.data.max_completion} in data.max_tokens={config.data.max_tokens}; raise that"
        )
    return kept


def _one_turn(config: Any, asked: Sequence[Any]) -> None:
    if config.sft.steps and any(len(q["prompt"]) > 1 for q in asked):
        raise UserError("sft.steps: a warm-up takes prompts of one turn; use 0, or init_from")


def balances(losses: Mix, kept: Sequence[Any]) -> list[str]:
    """What `records.balance` says of the losses that weigh labels; a weight of 0 is meant."""
    weights = [[spec.hyper.get(name) for name in ("lambda_d", "lambda_u")] for spec, _ in losses]
    found = [records.balance(kept, desirable=d, undesirable=u) for d, u in weights if d and u]
    return [note for note in found if note]


def _unlearnt(found: Preferences, k: int, seed: int) -> Preferences:
    """Records to forget, each beside one to keep (k = 2) or alone; none to test where both are not there."""
    if k == 1:
        return Preferences(*([r for r in side if not r["label"]] for side in found))
    both = len({r["label"] for r in found.test}) == 2
    return Preferences(
        records.keep(found.train, seed=seed), records.keep(found.test, seed=seed) if both else []
    )


def as_pair(one: Item, schema: str) -> Item:
    """A held-out item as a chosen and a rejected response: what is kept before what is forgotten, without
    the gold response of a triple, the best and the worst of a ranking."""
    if "prompts" in one:
        return one | {name: one[name][::-1] for name in ("prompts", "responses")}
    if schema == "triple":
        return one | {"responses": one["responses"][1:]}
    if schema == "ranked":
        at = [np.argmax(one["scores"]), np.argmin(one["scores"])]
        return one | {name: [one[name][i] for i in at] for name in ("responses", "scores")}
    return one


def as_question(record: Any) -> dict[str, Any]:
    """A record as something to ask: its prompt's last turn, its first response as the solution."""
    return {
        "id": record["id"],
        "prompt": record["prompt"],
        "problem": record["prompt"][-1]["content"],
        "solution": record["responses"][0],
    }
