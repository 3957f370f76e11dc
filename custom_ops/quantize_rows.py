"""Activations to INT8 with one scale per row (token), LayerNorm and a multiplier along K in front."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from custom_ops import _arguments, _gemm, _outputs, numerics
from custom_ops.linear import LayerNorm
from custom_ops.quantization import QuantizedArray, quantize_weight


def quantize_rows(
    x: Float[Array, "T K"],
    *,
    layer_norm: LayerNorm | tuple[Array, Array, float] | None = None,
    k_multiplier: Float32[Array, " K"] | None = None,
    implementation: str,
) -> QuantizedArray:
    """Rounds each row of LayerNorm(x), times k_multiplier along K, to integers in [-127, 127].

    Symmetric, as `quantize_weight` is: the scale of a row is max |h| / 127, 1 for a row of zeros, and halves round to
    even. All in f32. A row with a value that is not finite gets a scale that is not, whatever its integers are, so
    that a product's result shows it.

    Args:
        x: activations in f32, fp16 or bf16.
        layer_norm: scale and bias of one dtype, epsilon.
        k_multiplier: what to multiply the K values of each row with, after LayerNorm.
        implementation: "reference" (`jax.numpy`), or "ffi": CUDA, in one pass over memory; K a multiple of 16.

    Returns:
        The integers [T, K] with their scales [T, 1].

    Raises:
        ValueError: an argument does not fit the others, or the implementation does not support it.
    """
    _arguments.check_implementation(implementation)
    _arguments.check_rank("x", x, 2)
    _arguments.check_dtype("x", x, _arguments.FLOAT_DTYPES)
    k_dim = x.shape[1]
    if layer_norm is not None:
        scale, bias, _ = layer_norm
        _arguments.check_dtype("layer_norm.scale", scale, _arguments.FLOAT_DTYPES)
        _arguments.check_dtype("layer_norm.bias", bias, [scale.dtype])
        _arguments.check_shape("layer_norm.scale", scale, (k_dim,))
        _arguments.check_shape("layer_norm.bias", bias, (k_dim,))
    if k_multiplier is not None:
        _arguments.check_dtype("k_multiplier", k_multiplier, [jnp.float32])
        _arguments.check_shape("k_multiplier", k_multiplier, (k_dim,))
    run = quantize_rows_reference if implementation == "reference" else quantize_rows_ffi
    return run(x, layer_norm=layer_norm, k_multiplier=k_multiplier)


def quantize_rows_reference(
    x: Float[Array, "T K"],
    *,
    layer_norm: LayerNorm | tuple[Array, Array, float] | None = None,
    k_multiplier: Array | None = None,
) -> QuantizedArray:
    """`quantize_rows` in `jax.numpy`."""
    h = x.astype(jnp.float32)
    if layer_norm is not None:
        h = numerics.layer_norm(h, *layer_norm)
    if k_multiplier is not None:
        h = h * k_multiplier
    return quantize_weight(h)


def quantize_rows_ffi(
    x: Float[Array, "T K"],
    *,
    layer_norm: LayerNorm | tuple[Array, Array, float] | None = None,
    k_multiplier: Array | None = None,
) -> QuantizedArray:
    """`quantize_rows` through XLA's FFI (csrc/quantize_rows.h): the CUDA handler on an NVIDIA GPU.

    On arrays that are sharded over devices, call it inside `jax.shard_map`. `jax.vmap` of it raises.
    """
    _gemm.require_cuda()
    rows, k_dim = x.shape
    if problem := _gemm.k_problem(k_dim):
        raise ValueError(f'with implementation "ffi" {problem}: x has shape {x.shape}')
    if rows < 1:
        raise ValueError(f'x must have at least one row with implementation "ffi", got shape {x.shape}')
    ln_scale, ln_bias, epsilon = (None, None, 0.0) if layer_norm is None else layer_norm
    results = (jax.ShapeDtypeStruct((rows, k_dim), jnp.int8), jax.ShapeDtypeStruct((rows,), jnp.float32))
    qvalue, scale = jax.ffi.ffi_call("kogpt_quantize_rows", results)(
        x,
        _outputs.or_empty(ln_scale, jnp.float32),
        _outputs.or_empty(ln_bias, jnp.float32),
        _outputs.or_empty(k_multiplier, jnp.float32),
        epsilon=np.float32(epsilon),
    )
    return QuantizedArray(qvalue, scale[:, None])


def quantize_rows_ffi_problem(*, platform: str, dtype: Any, k_dims: tuple[int, ...]) -> str | None:
    """Why "ffi" cannot quantise on this machine, or None if it can.

    Args:
        platform: "cpu" or "gpu".
        dtype: of the activations that are not in f32.
        k_dims: the K of each product.
    """
    return _gemm.ffi_problem(platform=platform, dtypes=[dtype], k_dims=k_dims)
