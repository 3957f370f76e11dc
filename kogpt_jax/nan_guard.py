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
from jaxtyping import Array, Bool, Float, Int

# Takes an op's name, its layer among those of this stage (None: of none) and what gives its outputs, with an axis of
# tokens first. A program without a guard does not call the last, and has nothing of it.
Check = Callable[[str, int | None, Callable[[], Sequence[Array]]], None]

_NOWHERE = np.iinfo(np.int32).max


def no_check(op: str, layer: int | None, outputs: Callable[[], Sequence[Array]]) -> None:
    """The check of a model without a guard."""


class _Found(NamedTuple):
    """Where a row was not finite, in the order of what happens to a row: it has so many tokens before a call of a
    phase, which goes through the stages of a pipeline, and through the ops of each."""

    num_before: int
    stage: int
    order: int
    description: str


class NanGuard:
    """What the checks of one engine's model have found. Compared by identity: an engine has programs of its own."""

    def __init__(self, layers_per_stage: int) -> None:
        self._layers_per_stage = layers_per_stage
        self._found: list[_Found] = []
        self._last_ops: set[str] = set()

    def for_rows(
        self,
        phase: str,
        x: Float[Array, "T D"],
        lengths: Int[Array, " B"],
        row_of_token: Int[Array, " T"],
        positions: Int[Array, " T"],
        is_token: Bool[Array, " T"],
    ) -> Check:
        """A check of tokens that belong to rows, inside `jax.shard_map`.

        Args:
            phase: its name.
            x: the residual stream that comes in: to the first stage of a pipeline the embedding, which is checked.
            lengths: tokens of each row before this call.
            row_of_token: of the new tokens.
            positions: of the new tokens.
            is_token: which of them are any row's.
        """
        stage = jax.lax.axis_index("pipe")
        orders = itertools.count()

        def check(op: str, layer: int | None, outputs: Callable[[], Sequence[Array]]) -> None:
            is_bad = ~_is_finite(outputs()) & is_token & ((layer is not None) | (stage == 0))
            first = jnp.full(lengths.shape, _NOWHERE).at[row_of_token].min(jnp.where(is_bad, positions, _NOWHERE))
            order = next(orders)

            def note(stage: Array, lengths: Array, first: Array) -> None:
                stage_number = int(stage)
                name = op if layer is None else f"{op} of layer {stage_number * self._layers_per_stage + layer}"
                for num_before, position in zip(np.asarray(lengths), np.asarray(first), strict=True):
                    if position != _NOWHERE:
                        where = f"{name}, in {phase} at position {position}"
                        self._found.append(_Found(int(num_before), stage_number, order, where))

            _call_if(jnp.any(is_bad), note, stage, lengths, first)

        check("embedding", None, lambda: (x,))
        return check

    def for_last_ops(self, x: Float[Array, "*T D"]) -> Check:
        """A check of what is made of the residual stream behind the layers, token by token: where that is not finite,
        none of these ops is to blame. Whose the tokens are is not known."""
        is_input_finite = _is_finite([x])

        def check(op: str, layer: int | None, outputs: Callable[[], Sequence[Array]]) -> None:
            _call_if(jnp.any(~_is_finite(outputs()) & is_input_finite), lambda: self._last_ops.add(op))

        return check

    def clear(self) -> None:
        """Forgets what was found."""
        jax.effects_barrier()
        self._found.clear()
        self._last_ops.clear()

    def first(self) -> str | None:
        """The op, phase and position where a row was not finite first; None if no op was found."""
        jax.effects_barrier()
        if self._found:
            return min(self._found).description
        return next((op for op in ("ln_f", "lm_head") if op in self._last_ops), None)


def _is_finite(outputs: Sequence[Array]) -> Bool[Array, " T"]:
    """Of each token, whether all of it is finite in all of these."""
    of_each = [jnp.all(jnp.isfinite(output), axis=-1) for output in outputs]
    return jnp.all(jnp.stack(of_each), axis=0)


def _call_if(is_found: Bool[Array, ""], note: Callable[..., None], *arrays: Array) -> None:
    """Calls the host with these values where something was found."""
    jax.lax.cond(is_found, lambda: jax.debug.callback(note, *arrays), lambda: None)
