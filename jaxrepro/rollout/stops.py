"""Stop sequences of token ids, matched on the device as tokens are drawn.

A Shift-And automaton (Baeza-Yates and Gonnet 1992) a sequence s of length m: bit j of its state says
that the last j + 1 tokens of the text are s_0 .. s_j,

    state_j <- (j = 0 or state_{j-1}) and s_j = token,    a match where state_{m-1}

so overlapping and self-similar sequences need no special case. The text is what was generated.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


class Stops(NamedTuple):
    """Sequences of each row, padded to q sequences of l tokens; length 0 is no sequence."""

    tokens: Any  # (b, q, l) int32
    length: Any  # (b, q) int32
    state: Any  # (b, q, l) bool


def pack(sequences: list, q: int, l: int) -> Stops:
    """Host arrays of rows of sequences of token ids, before any token."""
    tokens = np.zeros((len(sequences), q, l), np.int32)
    length = np.zeros((len(sequences), q), np.int32)
    for row, several in enumerate(sequences):
        for j, one in enumerate(several):
            tokens[row, j, : len(one)] = one
            length[row, j] = len(one)
    return Stops(tokens, length, np.zeros(tokens.shape, bool))


def advance(stops: Stops, token: Int[Array, "b"]) -> tuple[Stops, Bool[Array, "b q"]]:
    """The automata after one more token of each row, and which sequences end with it."""
    before = jnp.pad(stops.state[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=True)
    state = before & (stops.tokens == token[:, None, None])
    end = jnp.arange(state.shape[-1]) == stops.length[..., None] - 1
    return stops._replace(state=state), (state & end).any(-1)
