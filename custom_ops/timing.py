"""How long does a call of an op take where its weight is not in a cache, as in a model, which has one a layer?"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# One call: a number from the call before and its operands -> the number for the next call and the results.
Step = Callable[[jax.Array, Any], tuple[jax.Array, Any]]

_TINY = 1e-30  # of a result that goes into the next call


def with_next(*results: Any) -> tuple[jax.Array, Any]:
    """What a `Step` returns: a number that depends on the first result, and all of them."""
    return _TINY * jnp.asarray(results[0])[0, 0].astype(jnp.float32), results


def compile_rotation(step: Step, operands: Sequence[Any], *, turns: int) -> Callable[[], float]:
    """Compiles a loop of ``turns`` times over ``operands``: those of a step each, with weights of its own. Each call of
    what is returned runs it and gives the microseconds of one step; the first is to be thrown away.

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

    before = jnp.zeros((), jnp.float32)
    compiled = jax.jit(run).lower(before, operands).compile()

    def sample() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(compiled(before, operands))
        return 1e6 * (time.perf_counter() - begin) / (turns * len(operands))

    return sample
