"""What stands behind a product of `linear`, `int8_gemm` or `mixed_gemm`: bias, GELU and residual."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from custom_ops import _arguments


def check(
    rows: int,
    num_outputs: int,
    dtype: np.dtype,
    *,
    bias: Array | None,
    residual: Array | None,
    gelu_from: int | None,
    act_dim: int | None,
    out_dtype: Any,
) -> None:
    """What holds for every implementation."""
    split = num_outputs
    if gelu_from is not None:
        if not 0 <= gelu_from < num_outputs:
            raise ValueError(f"gelu_from must be in [0, {num_outputs}), the outputs of weight, got {gelu_from}")
        split = gelu_from
    if act_dim is not None and (gelu_from is None or act_dim < num_outputs - split):
        needed = "None without gelu_from" if gelu_from is None else f"at least {num_outputs - split}, GELU's outputs"
        raise ValueError(f"act_dim must be {needed}, got {act_dim}")
    if bias is not None:
        _arguments.check_dtype("bias", bias, [dtype])
        _arguments.check_shape("bias", bias, (num_outputs if gelu_from is None else num_outputs - split,))
    if residual is not None:
        _arguments.check_dtype("residual", residual, [jnp.float32])
        _arguments.check_shape("residual", residual, (rows, split))
    if out_dtype is not None:
        allowed = [np.dtype(jnp.float32)] if residual is not None else [dtype, np.dtype(jnp.float32)]
        if np.dtype(out_dtype) not in allowed:
            names = " or ".join(dict.fromkeys(choice.name for choice in allowed))
            raise ValueError(f"out_dtype must be {names}, got {np.dtype(out_dtype).name}")


def finish(
    z: Array,
    dtype: np.dtype,
    *,
    bias: Array | None,
    residual: Array | None,
    gelu_from: int | None,
    act_dim: int | None,
    out_dtype: Any,
) -> tuple[Array, Array | None]:
    """(y, act) from the scaled sums, in f32 or rounded already, in `jax.numpy`."""
    rows, num_outputs = z.shape
    split = num_outputs if gelu_from is None else gelu_from
    y = z[:, :split]
    if bias is not None and gelu_from is None:
        y = y.astype(jnp.float32) + bias.astype(jnp.float32)
    if residual is not None:
        y = y + residual
    y = y.astype(y_dtype(dtype, residual, out_dtype))
    if gelu_from is None:
        return y, None
    ffn = z[:, split:].astype(jnp.float32)
    if bias is not None:
        ffn = ffn + bias.astype(jnp.float32)
    gelu = jax.nn.gelu(ffn, approximate=True).astype(dtype)
    num_columns = (gelu.shape[1] if act_dim is None else act_dim) - gelu.shape[1]
    # As a concatenation, which `decode_attention_reference` takes apart again: XLA makes one of the two.
    return y, jnp.concatenate([jnp.zeros((rows, num_columns), dtype), gelu], axis=1)


def y_dtype(dtype: np.dtype, residual: Array | None, out_dtype: Any) -> np.dtype:
    """Of the outputs that do not go through GELU."""
    if residual is not None:
        return np.dtype(jnp.float32)
    return dtype if out_dtype is None else np.dtype(out_dtype)


def or_empty(array: Array | None, dtype: Any) -> Array:
    """To a kernel, an operand that is absent is an array without elements."""
    return jnp.zeros(0, dtype) if array is None else array
