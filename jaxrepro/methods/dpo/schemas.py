"""What a preference record looks like, and the check of one: `SCHEMAS[name].validate(record, where)`.

| schema   | fields of a record                                        | responses of the result, in order |
|----------|-----------------------------------------------------------|-----------------------------------|
| pair     | prompt, chosen, rejected                                  | chosen, rejected                  |
| scored   | pair, score_chosen, score_rejected                        | chosen, rejected                  |
| tie      | pair, tie (true: neither is better)                       | chosen, rejected                  |
| multi    | pair, rewards_chosen, rewards_rejected (lists of numbers) | chosen, rejected                  |
| step     | pair, prefix (the steps so far, may be empty)             | one next step each, no end of turn |
| triple   | gold, pair                                                | gold, chosen, rejected            |
| unpaired | prompt, completion, label (true: desirable)               | completion                        |
| forget   | prompt, completion, retain (false: to be unlearnt)        | completion                        |
| ranked   | prompt, completions (two or more), scores                 | completions                       |
| image    | chosen, rejected (latents), noise, timestep; prompt       | none: arrays, see `validate_image` |

A prompt is text (one user turn) or messages {"role", "content"}; a response is text or the assistant's message.
Responses may also be whole conversations: what they share is the prompt, whether the record names one (as
ultrafeedback_binarized does) or not; so may transcripts "\\n\\nHuman: ... \\n\\nAssistant: ..." without a prompt.
Other names that are read: initial_reason_steps (Math-Step-DPO-10K) is prefix, reference (TRL's triples) is gold.

Optional fields: pairs may have probability (that chosen beats rejected), age (time steps since it was labelled),
unsafe_chosen and unsafe_rejected; an unpaired record may have a score. Fields that a schema does not have are ignored.

A checked record is {"id", "prompt": messages, "responses": texts} and, where the record has them, "scores" (k),
"rewards" (k, m), "label", "tie", "prefix", "probability", "age", "unsafe" (k).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxrepro.config import UserError, did_you_mean

ROLES = ("system", "user", "assistant", "tool")
ALIASES = {"initial_reason_steps": "prefix", "reference": "gold"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
Turns = list[dict[str, str]]
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Schema:
    """Fields of a record, beside its optional id."""

    name: str
    title: str  # for messages: "a pair"
    responses: tuple[str, ...]  # fields with one response each; ranked: one field with several
    extra: Mapping[str, Callable[[Any, str], Any]] = field(default_factory=dict)
    optional: Mapping[str, Callable[[Any, str], Any]] = field(default_factory=dict)
    finish: Callable[[dict[str, Any], int, str], dict[str, Any]] = lambda found, k, where: found
    end_of_turn: bool = True  # whether an end of turn follows a response

    @property
    def k(self) -> int | None:
        """Responses of a record; None where records differ, 0 where they have none."""
        return None if self.name == "ranked" else len(self.responses)

    @property
    def fields(self) -> tuple[str, ...]:
        """All that a record needs."""
        return ("prompt", *self.responses, *self.extra)

    @property
    def optional_names(self) -> frozenset[str]:
        """Names that optional fields have in a checked record."""
        return frozenset(_GATHERED.get(name, name) for name in self.optional)

    def validate(self, record: Any, where: str, *, id: str | None = None) -> dict[str, Any]:
        """The checked record; UserError names the place (`where`: "x.jsonl line 3") and the field.

        id: for a record that has none; else it is called by its place.
        """
        if not isinstance(record, Mapping):
            raise UserError(f"{where}: a {type(record).__name__}, not an object")
        named = {ALIASES[k]: v for k, v in record.items() if k in ALIASES} | dict(record)
        name = _id(named.get("id"), id or where, where)
        if self.name == "image":
            return {"id": name, **validate_image(named, where)}
        for need in (*self.responses, *self.extra):
            if named.get(need) is None and not (need == "prefix"):
                raise self._missing(where, need)
        at = lambda need: f"{where}: field '{need}'"
        if self.k is None:
            prompt, texts = self._listed(named, where)
        else:
            given = [(at(need), named[need]) for need in self.responses]
            prompt, texts = self._separate(named.get("prompt"), given, where)
        found = {need: read(named.get(need), at(need)) for need, read in self.extra.items()}
        found = self.finish(found, len(texts), where)
        given = {o: r for o, r in self.optional.items() if named.get(o) is not None}
        found |= _gathered({o: read(named[o], at(o)) for o, read in given.items()}, where)
        return {"id": name, "prompt": prompt, "responses": texts, **found}

    def _missing(self, where: str, need: str) -> UserError:
        has = ", ".join(self.fields)
        return UserError(f"{where}: field '{need}' is missing; {self.title} has {has}")

    def _listed(self, named: Mapping[str, Any], where: str) -> tuple[Turns, list[str]]:
        values = named[self.responses[0]]
        at = f"{where}: field '{self.responses[0]}'"
        if not isinstance(values, list | tuple) or len(values) < 2:
            raise UserError(f"{at} is {values!r:.40}; it must be a list of two or more responses")
        given = [(f"{at} number {i}", value) for i, value in enumerate(values, 1)]
        return self._separate(named.get("prompt"), given, where)

    def _separate(
        self, prompt: Any, given: Sequence[tuple[str, Any]], where: str
    ) -> tuple[Turns, list[str]]:
        """Prompt and responses apart, whichever way the record holds them."""
        asked = None if prompt is None else _prompt(prompt, f"{where}: field 'prompt'")
        if asked is None and all(
            isinstance(v, str) and v.startswith("\n\nHuman:") for _, v in given
        ):
            given = [(at, _transcript(value)) for at, value in given]
        if all(isinstance(value, str) for _, value in given):
            if asked is None:
                raise self._missing(where, "prompt")
            return asked, [_response(value, at) for at, value in given]
        if any(isinstance(value, str) for _, value in given):
            raise UserError(f"{where}: some responses are text and some are messages; use one form")
        talks = [_turns(value, at) for at, value in given]
        if any(len(talk) > 1 for talk in talks):
            if not isinstance(prompt, list | tuple):
                asked = _shared(talks, where)
            if any(talk[: len(asked)] != asked for talk in talks):
                raise UserError(
                    f"{where}: the conversations do not begin with the prompt; give the "
                    "assistant's answer alone, or no prompt"
                )
            talks = [talk[len(asked) :] for talk in talks]
        elif asked is None:
            raise self._missing(where, "prompt")
        for (at, _), talk in zip(given, talks):
            if len(talk) != 1 or talk[0]["role"] != "assistant":
                roles = ", ".join(turn["role"] for turn in talk) or "nothing"
                raise UserError(
                    f"{at} has {roles} after the prompt; a response is one turn of the assistant"
                )
        texts = [_response(talk[0]["content"], at) for (at, _), talk in zip(given, talks)]
        return _prompt(asked, f"{where}: the shared prompt"), texts


# Values of fields --------------------------------------------------------------------------------


def _id(value: Any, fallback: str, where: str) -> str:
    if value is None:
        return fallback
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(f"{where}: field 'id' is {value!r:.40}; it must be text or a whole number")
    return str(value)


def _prompt(value: Any, at: str) -> Turns:
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{at} is empty")
        return [{"role": "user", "content": value}]
    turns = _turns(value, at)
    if turns[-1]["role"] == "assistant":
        raise UserError(f"{at} ends with the assistant's turn; the responses are that turn")
    if not turns[-1]["content"].strip():
        raise UserError(f"{at} ends with an empty turn")
    return turns


def _turns(value: Any, at: str) -> Turns:
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{at} is {value!r:.40}; it must be text or a list of messages")
    for i, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise UserError(
                f"{at} message {i} is {turn!r:.40}; it must be {{'role': ..., 'content': text}}"
            )
        if turn.get("role") not in ROLES:
            raise UserError(
                f"{at} message {i} has the role {turn.get('role')!r:.40}; use one of {', '.join(ROLES)}"
            )
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _transcript(text: str) -> Turns:
    parts = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[a], "content": b.strip()} for a, b in zip(parts[::2], parts[1::2])]


def _shared(talks: Sequence[Turns], where: str) -> Turns:
    """The turns with which all conversations begin; each keeps one turn at least."""
    most = min(map(len, talks)) - 1
    differs = (i for i in range(most) if any(talk[i] != talks[0][i] for talk in talks))
    shared = talks[0][: next(differs, most)]
    if not shared:
        raise UserError(f"{where}: the conversations share no first turn, so there is no prompt")
    return shared


def _response(value: str, at: str) -> str:
    if not value.strip():
        raise UserError(f"{at} is empty; leave this record out, or give the response")
    return value


def _number(value: Any, at: str) -> float:
    # Comparisons hold for whole numbers of any size, and not for nan.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise UserError(f"{at} is {value!r:.40}; it must be a finite number in float32")
    return float(value)


def _probability(value: Any, at: str) -> float:
    if not 0.5 <= _number(value, at) <= 1:
        raise UserError(
            f"{at} is {value!r:.40}; chosen beats rejected with 0.5 to 1, else swap them"
        )
    return float(value)


def _age(value: Any, at: str) -> float:
    if _number(value, at) < 0:
        raise UserError(f"{at} is {value!r:.40}; it must be 0 (the latest) or more")
    return float(value)


def _numbers(value: Any, at: str) -> list[float]:
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{at} is {value!r:.40}; it must be a list of numbers")
    return [_number(x, f"{at} number {i}") for i, x in enumerate(value, 1)]


def _flag(value: Any, at: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"{at} is {value!r:.40}; it must be true or false")
    return bool(value)


def _prefix(value: Any, at: str) -> str:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{at} is {value!r:.40}; it must be text, or empty at the first step")
    return value or ""


# From fields to the names of a checked record ------------------------------------------------------


def _scored(found: dict[str, Any], k: int, where: str) -> dict[str, Any]:
    return {"scores": [found["score_chosen"], found["score_rejected"]]}


def _multi(found: dict[str, Any], k: int, where: str) -> dict[str, Any]:
    w, l = found["rewards_chosen"], found["rewards_rejected"]
    if len(w) != len(l):
        raise UserError(
            f"{where}: field 'rewards_chosen' has {len(w)} numbers, 'rewards_rejected' has {len(l)}; "
            "use one for each objective"
        )
    return {"rewards": [w, l]}


def _ranked(found: dict[str, Any], k: int, where: str) -> dict[str, Any]:
    if len(found["scores"]) != k:
        raise UserError(
            f"{where}: field 'scores' has {len(found['scores'])} numbers for {k} completions; "
            "use one for each"
        )
    return {"scores": found["scores"]}


def _gathered(found: dict[str, Any], where: str) -> dict[str, Any]:
    """Optional values of single responses as one list."""
    if "score" in found:
        found["scores"] = [found.pop("score")]
    unsafe = [found.pop(f"unsafe_{side}", None) for side in PAIR]
    if unsafe != [None, None]:
        if None in unsafe:
            raise UserError(f"{where}: unsafe_chosen and unsafe_rejected come together; give both")
        found["unsafe"] = unsafe
    return found


def _retain(found: dict[str, Any], k: int, where: str) -> dict[str, Any]:
    return {"label": found["retain"]}


def validate_image(named: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An image pair as arrays: latents (2, *c), chosen first, noise (*c), timestep; prompt or None.

    Both images get the same noise at the same time step (arXiv:2311.12908), so the record has one of each.
    """
    for need in ("chosen", "rejected", "noise", "timestep"):
        if named.get(need) is None:
            raise UserError(
                f"{where}: field '{need}' is missing; an image pair has chosen, rejected, noise, timestep"
            )
    chosen, rejected, noise = (
        _array(named[need], f"{where}: field '{need}'") for need in ("chosen", "rejected", "noise")
    )
    if not chosen.shape == rejected.shape == noise.shape:
        raise UserError(
            f"{where}: chosen {chosen.shape}, rejected {rejected.shape} and noise {noise.shape} differ; "
            "use one shape"
        )
    step, prompt = named["timestep"], named.get("prompt")
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
        raise UserError(
            f"{where}: field 'timestep' is {step!r:.40}; it must be a whole number from 0"
        )
    return {
        "prompt": None if prompt is None else _prompt(prompt, f"{where}: field 'prompt'"),
        "latents": np.stack([chosen, rejected]),
        "noise": noise,
        "timestep": int(step),
    }


def _array(value: Any, at: str) -> np.ndarray:
    try:
        found = np.asarray(value)
    except ValueError as e:
        raise UserError(f"{at} has rows of different lengths; make it an array") from e
    if found.dtype.kind not in "iuf" or not found.size or not found.ndim:
        raise UserError(
            f"{at} has the type {found.dtype} and the shape {found.shape}; it must be an array of numbers"
        )
    if not (np.abs(found) <= LARGEST).all():
        raise UserError(f"{at} holds numbers that are not finite in float32; leave this record out")
    return found.astype(np.float32)


PAIR = ("chosen", "rejected")
_GATHERED = {"score": "scores", "unsafe_chosen": "unsafe", "unsafe_rejected": "unsafe"}
OPTIONAL = {
    "probability": _probability,
    "age": _age,
    "unsafe_chosen": _flag,
    "unsafe_rejected": _flag,
}
SCHEMAS = {
    s.name: s
    for s in (
        Schema("pair", "a pair", PAIR, optional=OPTIONAL),
        Schema(
            "scored", "a scored pair", PAIR,
            {"score_chosen": _number, "score_rejected": _number}, OPTIONAL, _scored,
        ),
        Schema("tie", "a pair with ties", PAIR, {"tie": _flag}, OPTIONAL),
        Schema(
            "multi", "a pair with several objectives", PAIR,
            {"rewards_chosen": _numbers, "rewards_rejected": _numbers}, OPTIONAL, _multi,
        ),
        Schema("step", "a pair of steps", PAIR, {"prefix": _prefix}, OPTIONAL, end_of_turn=False),
        Schema("triple", "a triple", ("gold", *PAIR)),
        Schema("unpaired", "an unpaired record", ("completion",), {"label": _flag}, {"score": _number}),
        Schema("forget", "a record to forget or retain", ("completion",), {"retain": _flag}, finish=_retain),
        Schema("ranked", "a ranking", ("completions",), {"scores": _numbers}, finish=_ranked),
        Schema("image", "an image pair", ()),
    )
}  # fmt: skip


def get(name: str) -> Schema:
    """The schema of a name; UserError with a suggestion for an unknown one."""
    if name not in SCHEMAS:
        raise UserError(f"no data schema {name!r}{did_you_mean(name, list(SCHEMAS))}")
    return SCHEMAS[name]
