"""Checks of an op's arguments at trace time: a `ValueError` that names the argument and both values."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOAT_DTYPES = (jnp.float32, jnp.float16, jnp.bfloat16)
IMPLEMENTATIONS = ("reference", "ffi")


def check_shape(name: str, array: jax.Array, expected: tuple[int, ...]) -> None:
    """The array has exactly this shape."""
    if array.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {array.shape}")


def check_rank(name: str, array: jax.Array, rank: int) -> None:
    """The array has this many axes."""
    if array.ndim != rank:
        raise ValueError(f"{name} must have {rank} axes, got shape {array.shape}")


def check_dtype(name: str, array: jax.Array, allowed: Sequence[Any]) -> None:
    """The array's dtype is one of these."""
    if array.dtype not in [np.dtype(dtype) for dtype in allowed]:
        names = " or ".join(np.dtype(dtype).name for dtype in allowed)
        raise ValueError(f"{name} must be {names}, got {array.dtype.name}")


def check_implementation(implementation: str) -> None:
    """The implementation is one that ops take: "auto" is resolved before."""
    if implementation not in IMPLEMENTATIONS:
        names = " or ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation must be {names}, got {implementation!r}")


def ffi_dtype_problem(platform: str, dtype: np.dtype) -> str | None:
    """Why "ffi" has no kernel for activations of this dtype on the platform, or None if it has one."""
    allowed = [np.dtype(kind) for kind in (FLOAT_DTYPES if platform == "cpu" else FLOAT_DTYPES[1:])]
    if dtype in allowed:
        return None
    return f"dtype must be {' or '.join(kind.name for kind in allowed)} on {platform}, got {dtype.name}"
