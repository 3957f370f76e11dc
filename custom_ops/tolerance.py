"""When is a kernel's result right? The rule that the tests and the autotuner have in common."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def allowed_error(reference_error: float, dtype: Any, *, tensor_core_k: int = 0) -> float:
    """What the error of a kernel's result may be, relative to its row: at most twice the same-precision reference's own
    against f32, plus a rounding floor, since a reference may by chance be exact where a correct kernel rounds.

    Flash-attention's tests have it so.

    Args:
        reference_error: the reference's error on the same data.
        dtype: of the result. Half an ulp of its largest value, by its rounding alone, and sums in f32 in another order
            (2^-20, some roundings of 2^-24 of terms that are larger than the sum).
        tensor_core_k: products that tensor cores sum in f32. They cut off what does not fit instead of rounding (Fasi
            et al. 2021, "Numerical behavior of NVIDIA tensor cores"): half an ulp, 2^-24, is lost on the average at
            each 16 products, always towards zero, so that losses add up.
    """
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    return 2 * reference_error + half_ulp + 2.0**-20 + tensor_core_k / 16 * 2.0**-24


@jax.jit
def relative_error(actual: Array, expected: Array) -> Array:
    """The worst row's max |actual - expected| / max |expected|, computed in f32 on the device; NaN where anything is.

    A row of zeros must be met exactly, else its error is infinite.
    """
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    difference = jnp.max(jnp.abs(actual - expected), axis=-1)
    scale = jnp.max(jnp.abs(expected), axis=-1)
    return jnp.max(jnp.where((difference == 0) & (scale == 0), 0.0, difference / scale))
