"""W8A16 products of many rows: y = act(x W^T + bias) + residual with 16-bit activations and the weight in INT8.

What `linear` is for up to 64 rows, from the same weights: they are widened on their way to the tensor cores, exactly,
and their scales are applied to the sums.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from custom_ops import _arguments, _gemm, _outputs, numerics
from custom_ops.quantization import QuantizedArray


def mixed_gemm(
    x: Float[Array, "T K"],
    weight: QuantizedArray,
    *,
    bias: Float[Array, " num_biases"] | None = None,
    residual: Float32[Array, "T num_plain"] | None = None,
    gelu_from: int | None = None,
    act_dim: int | None = None,
    out_dtype: Any = None,
    tile: int | None = None,
    implementation: str,
) -> tuple[Array, Array | None]:
    """A product of activations and an INT8 weight with what stands behind it, as `linear` has it.

        z = (x weight.qvalue^T) * weight.scale^T + bias, accumulated in f32
        y = z[:, :gelu_from] + residual        act[:, act_dim - (M - gelu_from):] = GELU(z[:, gelu_from:])

    Sums do not depend on the number of rows: with "ffi" a row gives the same bits alone and in any batch.

    Args:
        x: activations; its dtype is that of the bias, of act and, by default, of y.
        weight: output-major, [M, K] with a scale per output, [M, 1], from `quantize_weight`.
        bias: in x's dtype. With ``gelu_from`` of shape [M - gelu_from]: of GELU's outputs alone.
        residual: added to y, of y's shape [T, gelu_from or M].
        gelu_from: the first output that goes through GELU (tanh form) into ``act`` instead of into y; 0 for all.
        act_dim: row length of ``act``, M - gelu_from by default. The columns in front of GELU's are for attention:
            zeros with "reference", undefined with "ffi".
        out_dtype: of y, x's dtype (the default) or f32; with ``residual`` always f32.
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
    options = {
        "bias": bias,
        "residual": residual,
        "gelu_from": gelu_from,
        "act_dim": act_dim,
        "out_dtype": out_dtype,
    }
    _arguments.check_dtype("x", x, _arguments.FLOAT_DTYPES)
    _gemm.check(x, weight, x.dtype, tile=tile, implementation=implementation, **options)
    if implementation == "reference":
        return mixed_gemm_reference(x, weight, **options)
    return mixed_gemm_ffi(x, weight, tile=tile, **options)


def mixed_gemm_reference(x: Float[Array, "T K"], weight: QuantizedArray, **options: Any) -> tuple[Array, Array | None]:
    """`mixed_gemm` in `jax.numpy`."""
    # Integers up to 127 are exact in 16 bits.
    sums = numerics.product(x, weight.qvalue.astype(x.dtype), jnp.float32)
    return _outputs.finish(sums * weight.scale[:, 0], np.dtype(x.dtype), **options)


def mixed_gemm_ffi(
    x: Float[Array, "T K"], weight: QuantizedArray, *, tile: int | None = None, **options: Any
) -> tuple[Array, Array | None]:
    """`mixed_gemm` through XLA's FFI (csrc/gemm.h): the CUDA handler on an NVIDIA GPU.

    On arrays that are sharded over devices, call it inside `jax.shard_map`. `jax.vmap` of it raises.
    """
    return _gemm.call_ffi("kogpt_mixed_gemm", x, None, weight, np.dtype(x.dtype), tile=tile, **options)


def mixed_gemm_ffi_problem(*, platform: str, dtype: Any, k_dims: Sequence[int]) -> str | None:
    """Why "ffi" cannot multiply on this machine, or None if it can.

    Args:
        platform: "cpu" or "gpu".
        dtype: of the activations.
        k_dims: the K of each weight.
    """
    return _gemm.ffi_problem(platform=platform, dtypes=[dtype], k_dims=k_dims)
