"""A debug mode: which op of a model was the first whose output is not finite.

A model with a guard looks at the output of each op, at tokens of rows only, and calls the host where something is not
finite. The calls are effects of the compiled phases, whose arguments and results stay as they are; a model without a
guard has none of it in its programs.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

# Takes an op's name and what gives its outputs, an axis of tokens first. Called only by a guard: a program without one
# has nothing of it.
Check = Callable[[str, Callable[[], Sequence[Array]]], None]

_NOWHERE = np.iinfo(np.int32).max


def no_check(op: str, outputs: Callable[[], Sequence[Array]]) -> None:
    """The check of a model without a guard."""


def of_layer(check: Check, layer: int) -> Check:
    """The check that names ops of this layer."""
    return lambda op, outputs: check(f"{op} of layer {layer}", outputs)


class _Record(NamedTuple):
    """Where a call of an op gave values that are not finite."""

    phase: str
    op: str
    order: int  # of the op in the phase
    first_row: int  # of these rows in the batch
    lengths: np.ndarray  # tokens of each row before this call of the phase
    positions: np.ndarray  # the first bad one of each row, or _NOWHERE


class NanGuard:
    """What the checks of one engine's models have found. Compared by identity: an engine has programs of its own."""

    def __init__(self) -> None:
        self._records: list[_Record] = []
        self._without_row: list[str] = []

    def by_row(
        self,
        phase: str,
        lengths: Int[Array, " B"],
        row_of_token: Int[Array, " T"],
        positions: Int[Array, " T"],
        is_token: Bool[Array, " T"],
    ) -> Check:
        """A check of tokens that belong to rows, inside `jax.shard_map`. The ops are in the order of the calls."""
        order = itertools.count()
        first_row = jax.lax.axis_index("data") * lengths.shape[0]

        def check(op: str, outputs: Callable[[], Sequence[Array]]) -> None:
            is_bad = ~_is_finite(outputs()) & is_token
            first = jnp.full(lengths.shape, _NOWHERE).at[row_of_token].min(jnp.where(is_bad, positions, _NOWHERE))
            number = next(order)

            def note(*found: Array) -> None:
                first_row, lengths, first = map(np.asarray, found)
                self._records.append(_Record(phase, op, number, int(first_row), lengths, first))

            _call_if(jnp.any(is_bad), note, first_row, lengths, first)

        return check

    def behind(self, x: Array) -> Check:
        """A check of what is made of the residual stream, token by token: where that is not finite, it is no op's of
        these. The last ops, and which rows the tokens belong to is not known."""
        is_token = _is_finite([x])

        def check(op: str, outputs: Callable[[], Sequence[Array]]) -> None:
            is_bad = ~_is_finite(outputs()) & is_token
            _call_if(jnp.any(is_bad), lambda: self._without_row.append(op))

        return check

    def clear(self) -> None:
        """Forgets what was found."""
        jax.effects_barrier()
        self._records.clear()
        self._without_row.clear()

    def first(self, row: int) -> str | None:
        """What was the first op that gave a row of the batch values that are not finite, or None if none did."""
        jax.effects_barrier()
        of_row = []
        for record in self._records:
            index = row - record.first_row
            if 0 <= index < len(record.positions) and record.positions[index] != _NOWHERE:
                of_row.append((record.lengths[index], record.order, index, record))
        if of_row:
            _, _, index, record = min(of_row, key=lambda found: found[:2])
            return f"{record.op}, in {record.phase} at position {record.positions[index]}"
        return min(self._without_row, key=("ln_f", "lm_head").index, default=None)


def _is_finite(outputs: Sequence[Array]) -> Bool[Array, " T"]:
    """Of each token, whether all of it is finite in all of these."""
    of_each = [jnp.all(jnp.isfinite(output), axis=-1) for output in outputs]
    return jnp.all(jnp.stack(of_each), axis=0)


def _call_if(is_found: Bool[Array, ""], note: Callable[..., None], *found: Array) -> None:
    """Calls the host with these values where something was found."""
    jax.lax.cond(is_found, lambda: jax.debug.callback(note, *found), lambda: None)
