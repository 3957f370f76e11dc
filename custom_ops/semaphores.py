"""The counters that the CUDA kernels of all ops share, as an array that is threaded through their calls."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from custom_ops import _arguments

NUM_SEMAPHORES = 65536


def make_semaphores() -> Int32[Array, " NUM_SEMAPHORES"]:
    """Zeros for the first op of a program.

    Blocks of a kernel tell one another in this array that their part is there, and leave zeros behind, but for a mark
    that a later call is waiting for (`linear`'s ``done_mark``). Each op takes
    it, aliased, and returns it: so it stays in place, and XLA runs the ops one after another, since two kernels that
    use one array at the same time would disturb each other. It can be donated from call to call of a jitted function,
    or made in it.
    """
    return jnp.zeros(NUM_SEMAPHORES, jnp.int32)


def check_semaphores(semaphores: jax.Array | None) -> jax.Array:
    """Raises `ValueError` unless this is such an array."""
    if semaphores is None:
        raise ValueError('semaphores must be given with implementation "ffi" (make_semaphores()), got None')
    _arguments.check_dtype("semaphores", semaphores, [jnp.int32])
    _arguments.check_shape("semaphores", semaphores, (NUM_SEMAPHORES,))
    return semaphores
