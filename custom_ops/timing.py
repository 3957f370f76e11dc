"""How long does a call of an op take where its weight is not in a cache, as in a model, which has one a layer?"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# One call: a number from the call before and its operands -> the number for the next call and the results.
Step = Callable[[jax.Array, Any], tuple[jax.Array, Any]]

FIRST = np.zeros((), np.float32)  # what the first step gets
_TINY = 1e-30  # of a result that goes into the next call: added to any number of a usual size it changes nothing


def with_next(*results: Any) -> tuple[jax.Array, Any]:
    """What a `Step` returns: a number that depends on the first result, and all of them."""
    return _TINY * jnp.asarray(results[0])[0, 0].astype(jnp.float32), results


@dataclasses.dataclass(frozen=True)
class Rotation:
    """A compiled loop over operands, from `compile_rotation`. The first run is to be thrown away."""

    run: Callable[[np.ndarray, Any], tuple[jax.Array, Any]]
    operands: tuple[Any, ...]
    turns: int

    def results(self) -> Any:
        """Of the first operands, in the last turn."""
        _, all_results = self.run(FIRST, self.operands)
        return all_results[0]

    def sample(self) -> float:
        """Microseconds of one step."""
        begin = time.perf_counter()
        jax.block_until_ready(self.run(FIRST, self.operands))
        return 1e6 * (time.perf_counter() - begin) / (self.turns * len(self.operands))


def compile_rotation(step: Step, operands: Sequence[Any], *, turns: int) -> Rotation:
    """Compiles a loop of ``turns`` times over ``operands``: those of a step each, with weights of its own.

    A step must let its weight, its bias or its input depend on the number that it gets. All results of a turn leave the
    loop: so XLA can neither take calls out of it nor leave out parts of them.
    """
    operands = tuple(operands)

    def turn(carry: tuple[jax.Array, Any], operands: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        before, _ = carry
        all_results = []
        for each in operands:
            before, results = step(before, each)
            all_results.append(results)
        return before, tuple(all_results)

    def run(before: jax.Array, operands: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        first = turn((before, None), operands)
        return jax.lax.fori_loop(0, turns - 1, lambda _, carry: turn(carry, operands), first)

    return Rotation(jax.jit(run).lower(FIRST, operands).compile(), operands, turns)
