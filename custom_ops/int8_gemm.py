"""W8A8 products of many rows: y = act(x W^T + bias) + residual with activations and weight in INT8.

Prefill and large batches are bound by arithmetic, and the INT8 tensor cores do twice what the 16-bit ones do. The sums
are exact in 32 bits, so neither the tile nor the other rows can change a bit of a row's result.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from custom_ops import _arguments, _gemm, _outputs
from custom_ops.quantization import QuantizedArray


def int8_gemm(
    x: QuantizedArray,
    weight: QuantizedArray,
    *,
    dtype: Any,
    bias: Float[Array, " num_biases"] | None = None,
    residual: Float32[Array, "T num_plain"] | None = None,
    gelu_from: int | None = None,
    act_dim: int | None = None,
    out_dtype: Any = None,
    tile: int | None = None,
    implementation: str,
) -> tuple[Array, Array | None]:
    """A product of INT8 activations and an INT8 weight with what stands behind it, as `linear` has it.

        z = (x.qvalue weight.qvalue^T) * x.scale * weight.scale^T + bias, the sum exact, the rest in f32
        y = z[:, :gelu_from] + residual        act[:, act_dim - (M - gelu_from):] = GELU(z[:, gelu_from:])

    A row gives the same bits alone and in any batch.

    Args:
        x: [T, K] with a scale per row, [T, 1], from `quantize_rows`.
        weight: output-major, [M, K] with a scale per output, [M, 1], from `quantize_weight`.
        dtype: of the bias, of act and, by default, of y.
        bias: in dtype. With ``gelu_from`` of shape [M - gelu_from]: of GELU's outputs alone.
        residual: added to y, of y's shape [T, gelu_from or M].
        gelu_from: the first output that goes through GELU (tanh form) into ``act`` instead of into y; 0 for all.
        act_dim: row length of ``act``, M - gelu_from by default. The columns in front of GELU's are for attention:
            zeros with "reference", undefined with "ffi".
        out_dtype: of y, dtype (the default) or f32; with ``residual`` always f32.
        tile: how "ffi" cuts the product: an index of the names in the CUDA library's ``LibraryInfo.tiles``; -1: chosen
            by the shape; None: the fastest that was measured (`custom_ops.autotune`), else -1. The result's bits are
            the same.
        implementation: "reference" (`jax.numpy`), or "ffi": CUDA; K a multiple of 16; fp16 and bf16.

    Returns:
        (y, act); act is None without ``gelu_from``.

    Raises:
        ValueError: an argument does not fit the others, or the implementation does not support it.

    GELU is Hendrycks and Gimpel's (2016) in the tanh form that GPT-J uses.
    """
    dtype = np.dtype(dtype)
    if dtype not in map(np.dtype, _arguments.FLOAT_DTYPES):
        raise ValueError(f"dtype must be float32 or float16 or bfloat16, got {dtype.name}")
    options = {
        "bias": bias,
        "residual": residual,
        "gelu_from": gelu_from,
        "act_dim": act_dim,
        "out_dtype": out_dtype,
    }
    _gemm.check(x, weight, dtype, tile=tile, implementation=implementation, **options)
    _arguments.check_dtype("x.qvalue", x.qvalue, [jnp.int8])
    _arguments.check_dtype("x.scale", x.scale, [jnp.float32])
    _arguments.check_shape("x.scale", x.scale, (x.shape[0], 1))
    _gemm.check_k_of_int8(x.shape[1])
    if implementation == "reference":
        return int8_gemm_reference(x, weight, dtype=dtype, **options)
    return int8_gemm_ffi(x, weight, dtype=dtype, tile=tile, **options)


def int8_gemm_reference(
    x: QuantizedArray, weight: QuantizedArray, *, dtype: np.dtype, **options: Any
) -> tuple[Array, Array | None]:
    """`int8_gemm` in `jax.numpy`."""
    contract_last = (((1,), (1,)), ((), ()))
    # Zeros up to 16 bytes: with K = 7 XLA's product on an H100 was wrong (jax 0.11.2).
    padding = ((0, 0), (0, -x.shape[1] % 16))
    values, weights = jnp.pad(x.qvalue, padding), jnp.pad(weight.qvalue, padding)
    sums = jax.lax.dot_general(values, weights, contract_last, preferred_element_type=jnp.int32)
    return _outputs.finish(sums.astype(jnp.float32) * x.scale * weight.scale[:, 0], dtype, **options)


def int8_gemm_ffi(
    x: QuantizedArray, weight: QuantizedArray, *, dtype: np.dtype, tile: int | None = None, **options: Any
) -> tuple[Array, Array | None]:
    """`int8_gemm` through XLA's FFI (csrc/gemm.h): the CUDA handler on an NVIDIA GPU.

    On arrays that are sharded over devices, call it inside `jax.shard_map`. `jax.vmap` of it raises.
    """
    return _gemm.call_ffi("kogpt_int8_gemm", x.qvalue, x.scale, weight, dtype, tile=tile, **options)


def int8_gemm_ffi_problem(*, platform: str, dtype: Any, k_dims: Sequence[int]) -> str | None:
    """Why "ffi" cannot multiply on this machine, or None if it can.

    Args:
        platform: "cpu" or "gpu".
        dtype: of bias and act.
        k_dims: the K of each weight.
    """
    return _gemm.ffi_problem(platform=platform, dtypes=[dtype], k_dims=k_dims)
