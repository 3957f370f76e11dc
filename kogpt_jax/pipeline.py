"""The schedule of a pipeline: what each stage works on in each tick, and how microbatches travel. Runs inside
`jax.shard_map`.

A microbatch enters at stage 0 and moves on by one stage a tick; each stage runs its own layers over its own pages.

    3 stages, prompts in 4 chunks: 4 + 3 - 1 ticks      3 stages, decoding 3 microbatches of rows, 0 1 2
    tick      0  1  2  3  4  5                          tick      0  1  2  3  4  5  6 ...
    stage 0   0  1  2  3  .  .                          stage 0   0  1  2  0  1  2  0
    stage 1   .  0  1  2  3  .                          stage 1   .  0  1  2  0  1  2
    stage 2   .  .  0  1  2  3                          stage 2   .  .  0  1  2  0  1

Decoding has as many microbatches as stages: the one that leaves the last stage in a tick gets its token, and enters
stage 0 with it in the next, so that no stage ever waits again: ``microbatches x tokens + stages - 1`` ticks in all. In
a tick marked by a dot a stage computes what nobody reads, and writes to its scratch page. All devices do the same
collectives in every tick. GPipe (Huang et al. 2019) names stages and microbatches so.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_Carry = TypeVar("_Carry")


def run_ticks(
    num_stages: int,
    ticks: range,
    enter: Callable[[Any, _Carry], Float[Array, "*rows D"]],
    run: Callable[[Any, Array, _Carry], tuple[Array, _Carry]],
    leave: Callable[[Any, Array, _Carry], _Carry] | None,
    in_flight: Float[Array, "*rows D"] | None,
    carry: _Carry,
) -> tuple[Float[Array, "*rows D"] | None, _Carry]:
    """Runs ticks of the schedule. Over one stage a tick is a call of each of the three functions.

    Args:
        ticks: their numbers; a microbatch's is the tick it enters in.
        enter: (number, carry) -> what goes into stage 0, the same on all stages.
        run: (number, x, carry) -> this stage's layers. The number is below 0, or beyond the last microbatch's, where
            there is none: then it must leave no trace in the carry.
        leave: (number, x, carry) -> what happens behind the last stage, computed on all stages alike; numbers as for
            ``run``. None: nothing.
        in_flight: what the stage before made in the tick before; zeros at first. None over one stage.
        carry: of the three functions.

    Returns:
        ``in_flight`` and ``carry`` after the ticks.
    """
    stage = 0 if num_stages == 1 else jax.lax.axis_index("pipe")

    def tick(number: Any, state: tuple[Array | None, _Carry]) -> tuple[Array | None, _Carry]:
        received, carry = state
        x = enter(number, carry)
        if received is not None:
            x = jnp.where(stage == 0, x, received)
        x, carry = run(number - stage, x, carry)
        if leave is not None:
            carry = leave(number - (num_stages - 1), from_last_stage(x, num_stages), carry)
        if received is not None:
            received = jax.lax.ppermute(x, "pipe", [(s, s + 1) for s in range(num_stages - 1)])
        return received, carry

    if len(ticks) <= 1:
        return tick(ticks[0], (in_flight, carry)) if ticks else (in_flight, carry)
    return jax.lax.fori_loop(ticks.start, ticks.stop, tick, (in_flight, carry))


def from_last_stage(x: Array, num_stages: int) -> Array:
    """The last stage's array, on all stages."""
    if num_stages == 1:
        return x
    return jax.lax.psum(jnp.where(jax.lax.axis_index("pipe") == num_stages - 1, x, 0), "pipe")


def microbatch(rows: Any, number: Int[Array, ""] | int, num_stages: int) -> Any:
    """The rows of one of ``num_stages`` microbatches, of arrays [B, ...] in any structure; numbers count round."""
    if num_stages == 1:
        return rows

    def cut(array: Array) -> Array:
        size = array.shape[0] // num_stages
        return jax.lax.dynamic_slice_in_dim(array, jnp.mod(number, num_stages) * size, size)

    return jax.tree.map(cut, rows)


def with_microbatch(rows: Any, part: Any, number: Int[Array, ""] | int, num_stages: int) -> Any:
    """All rows with those of a microbatch replaced."""
    if num_stages == 1:
        return part

    def put(array: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(array, part, jnp.mod(number, num_stages) * part.shape[0], 0)

    return jax.tree.map(put, rows, part)
