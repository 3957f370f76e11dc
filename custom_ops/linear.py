"""Decode-sized products: y = act(LayerNorm(x) W^T + bias) + residual, with the weight in f32, 16 bits or INT8.

A decode step is bound by reading each weight once. So the rows of a batch share one pass over the weight, INT8 is
multiplied as it lies, and what surrounds the product (bias, GELU, residual) costs no pass of its own; LayerNorm is a
short kernel ahead of it that the product's weights are fetched behind.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from custom_ops import _arguments, _library, _outputs, numerics
from custom_ops.quantization import QuantizedArray
from custom_ops.semaphores import check_semaphores

# Rows of a call with implementation "ffi"; the reference takes any number.
MAX_ROWS = 64
# Up to so many rows `linear` with an INT8 weight multiplies ``early`` columns ahead: kLinearMaxRowsRounded in
# csrc/linear.h.
MAX_EARLY_ROWS_INT8 = 1

# The scratch of the CUDA kernels, for each row, padded: a tile of 256 outputs of at most 192 blocks, and 513 scales.
_PARTIALS_PER_ROW = 192 * 256 + 513
_PADDED_ROWS = (8, 16, 32, 64)

_MAX_MARK = 2**31 - 1


class LayerNorm(NamedTuple):
    """LayerNorm (Ba et al. 2016) over K, in f32."""

    scale: Float[Array, " K"]
    bias: Float[Array, " K"]
    epsilon: float


class EarlyColumns(NamedTuple):
    """Columns of x from ``begin`` on that the call of ``mark`` has written; see `linear`."""

    begin: int
    mark: int


def linear(
    x: Float[Array, "B K"],
    weight: Float[Array, "M K"] | QuantizedArray,
    *,
    bias: Float[Array, " num_biases"] | None = None,
    layer_norm: LayerNorm | tuple[Array, Array, float] | None = None,
    k_multiplier: Float32[Array, " K"] | None = None,
    residual: Float32[Array, "B num_plain"] | None = None,
    gelu_from: int | None = None,
    act_dim: int | None = None,
    out_dtype: Any = None,
    semaphores: Int32[Array, " NUM_SEMAPHORES"] | None = None,
    prefetch_weight: bool = False,
    done_mark: int = 0,
    early: EarlyColumns | None = None,
    int8_activations: bool = False,
    implementation: str,
) -> tuple[Array, ...]:
    """A product of few rows with what surrounds it.

        h = LayerNorm(x), times k_multiplier along K, rounded to dtype
        z = h W^T + bias, accumulated in f32
        y = z[:, :gelu_from] + residual        act[:, act_dim - (M - gelu_from):] = GELU(z[:, gelu_from:])

    Sums do not depend on the number of rows: with "ffi" a row gives the same bits alone and in any batch.

    Beside an INT8 weight in 16 bits, the CUDA kernels for sm_90a round h to 16-bit integers in place of dtype, of which
    a row's largest |h| (or, without LayerNorm, of each 256 columns of a row) becomes 32639: INT8 tensor cores multiply
    their two digits by the weight as it lies, and the sums under one scale are exact. That rounds by at most 2^-16 of
    the largest |h|, bf16 by 2^-9 of each value. A row with an infinity becomes NaN; one below 1e-30 is rounded as if
    that were its largest; K is at most 131056.

    Args:
        x: activations; in dtype, or in f32 with ``layer_norm``.
        weight: output-major. "dtype" is its dtype; of a `QuantizedArray` (one scale per output) that of
            ``layer_norm.scale``, or of ``x`` without LayerNorm.
        bias: in dtype. With ``gelu_from`` of shape [M - gelu_from]: of GELU's outputs alone.
        layer_norm: scale and bias in dtype, epsilon.
        k_multiplier: what to multiply the K values of each row with, after LayerNorm.
        residual: added to y, of y's shape [B, gelu_from or M].
        gelu_from: the first output that goes through GELU (tanh form) into ``act`` instead of into y; 0 for all.
        act_dim: row length of ``act``, M - gelu_from by default. The columns in front of GELU's are for
            `decode_attention`: zeros with "reference", undefined with "ffi".
        out_dtype: of y, dtype (the default) or f32; with ``residual`` always f32.
        semaphores: from `make_semaphores` or the op before; "reference" passes them through and takes None.
        prefetch_weight: promises that the weight, its scale, bias, ``layer_norm``'s arrays and ``k_multiplier`` are
            arguments of the jitted function whose values were there before the call (`jax.block_until_ready`), not what
            an operation of the same program, or of the one just ahead, has made: the CUDA kernels then fetch them while
            the kernel ahead is still running. If the promise is broken the result is undefined. The others ignore it.
        done_mark: a number above 0 that the CUDA kernels for sm_90a leave in the semaphores once all outputs are there,
            for the one call whose ``early`` names it, of as many rows and with a weight of the same kind (both INT8, or
            both not); 0 for none. Calls of a program that follow one another take different numbers.
        early: promises that columns [begin, K) of x are outputs of the call with this ``done_mark``, through the same
            semaphores, and that it came just ahead of the op ahead of this one, such as `decode_attention`, which fills
            the other columns: the CUDA kernels for sm_90a then multiply these columns while that op still runs, and the
            others last; with an INT8 weight for up to `MAX_EARLY_ROWS_INT8` rows. If the promise is broken the call may
            never end. Not with ``layer_norm`` or ``k_multiplier``. Sums are taken in another order than without it. The
            others ignore it.
        int8_activations: permits the CUDA kernels for sm_90a to round h to 8-bit integers, of which the largest |h|
            becomes 127: by at most 1/254 of it. With an INT8 weight only. The others ignore it: they round less.
        implementation: "reference" (`jax.numpy`: any number of rows, any K), or "ffi": 1 to 64 rows; K a multiple of
            8, of 16 with INT8; fp16 and bf16 on CUDA, f32 too on a CPU.

    Returns:
        (y, semaphores), or with ``gelu_from`` (y, act, semaphores).

    Raises:
        ValueError: an argument does not fit the others, or the implementation does not support it.

    GELU is Hendrycks and Gimpel's (2016) in the tanh form that GPT-J uses.
    """
    _arguments.check_implementation(implementation)
    _check(x, weight, bias, layer_norm, k_multiplier, residual, gelu_from, act_dim, out_dtype)
    if not 0 <= done_mark <= _MAX_MARK:
        raise ValueError(f"done_mark must be in [0, {_MAX_MARK}], got {done_mark}")
    if int8_activations and not isinstance(weight, QuantizedArray):
        raise ValueError(f"int8_activations needs an INT8 weight, got one of {weight.dtype.name}")
    if early is not None:
        if layer_norm is not None or k_multiplier is not None:
            raise ValueError("early needs an x that neither layer_norm nor k_multiplier changes")
        if not (0 <= early.begin <= x.shape[1] and 1 <= early.mark <= _MAX_MARK):
            raise ValueError(f"early must begin in [0, {x.shape[1]}] with a mark in [1, {_MAX_MARK}], got {early}")
    run = linear_reference if implementation == "reference" else linear_ffi
    return run(
        x,
        weight,
        bias=bias,
        layer_norm=layer_norm,
        k_multiplier=k_multiplier,
        residual=residual,
        gelu_from=gelu_from,
        act_dim=act_dim,
        out_dtype=out_dtype,
        semaphores=semaphores,
        prefetch_weight=prefetch_weight,
        done_mark=done_mark,
        early=early,
        int8_activations=int8_activations,
    )


def linear_reference(
    x: Float[Array, "B K"],
    weight: Float[Array, "M K"] | QuantizedArray,
    *,
    bias: Array | None = None,
    layer_norm: LayerNorm | tuple[Array, Array, float] | None = None,
    k_multiplier: Array | None = None,
    residual: Array | None = None,
    gelu_from: int | None = None,
    act_dim: int | None = None,
    out_dtype: Any = None,
    semaphores: Any = None,  # passed through
    prefetch_weight: bool = False,
    done_mark: int = 0,
    early: EarlyColumns | None = None,
    int8_activations: bool = False,
) -> tuple[Array, ...]:
    """`linear` in `jax.numpy`: LayerNorm in f32, the product in dtype with f32 accumulation."""
    del prefetch_weight, done_mark, early  # XLA orders its own reads
    del int8_activations  # dtype is more exact
    dtype = _compute_dtype(x, weight, layer_norm)
    h = x
    if layer_norm is not None:
        h = numerics.layer_norm(h, *layer_norm)
    if k_multiplier is not None:
        h = h.astype(jnp.float32) * k_multiplier
    h = h.astype(dtype)
    if isinstance(weight, QuantizedArray):
        # Integers up to 127 are exact in 16 bits.
        z = numerics.product(h, weight.qvalue.astype(dtype), jnp.float32) * weight.scale[:, 0]
    else:
        z = numerics.product(h, weight, _outputs.y_dtype(dtype, residual, out_dtype))

    y, act = _outputs.finish(
        z, dtype, bias=bias, residual=residual, gelu_from=gelu_from, act_dim=act_dim, out_dtype=out_dtype
    )
    return (y, semaphores) if act is None else (y, act, semaphores)


def linear_ffi(
    x: Float[Array, "B K"],
    weight: Float[Array, "M K"] | QuantizedArray,
    *,
    bias: Array | None = None,
    layer_norm: LayerNorm | tuple[Array, Array, float] | None = None,
    k_multiplier: Array | None = None,
    residual: Array | None = None,
    gelu_from: int | None = None,
    act_dim: int | None = None,
    out_dtype: Any = None,
    semaphores: Array | None = None,
    prefetch_weight: bool = False,
    done_mark: int = 0,
    early: EarlyColumns | None = None,
    int8_activations: bool = False,
) -> tuple[Array, ...]:
    """`linear` through XLA's FFI (csrc/linear.h): the Host handler on a CPU, the CUDA handler on an NVIDIA GPU.

    On arrays that are sharded over devices, call it inside `jax.shard_map`. `jax.vmap` of it raises.
    """
    _library.register_targets()
    semaphores = check_semaphores(semaphores)
    rows, k_dim = x.shape
    num_outputs = weight.shape[0]
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f'x must have 1 to {MAX_ROWS} rows with implementation "ffi", got shape {x.shape}')
    qvalue, scale = (weight.qvalue, weight.scale[:, 0]) if isinstance(weight, QuantizedArray) else (weight, None)
    if problem := k_problem(k_dim, qvalue.dtype):
        raise ValueError(f'with implementation "ffi" {problem}: weight has shape {weight.shape}')
    dtype = _compute_dtype(x, weight, layer_norm)
    split = num_outputs if gelu_from is None else gelu_from
    num_gelu = num_outputs - split
    act_shape = (0,) if gelu_from is None else (rows, num_gelu if act_dim is None else act_dim)
    has_scratch = layer_norm is not None or k_multiplier is not None or scale is not None
    ln_scale, ln_bias, epsilon = (None, None, 0.0) if layer_norm is None else layer_norm
    results = (
        jax.ShapeDtypeStruct((rows, split), _outputs.y_dtype(dtype, residual, out_dtype)),
        jax.ShapeDtypeStruct(act_shape, dtype),
        jax.ShapeDtypeStruct((rows, k_dim) if has_scratch else (0,), dtype),
        # Sized for CUDA on every platform, since the platform is not known yet: the Host handler never touches it.
        jax.ShapeDtypeStruct((linear_partials_size(rows),), jnp.float32),
        jax.ShapeDtypeStruct(semaphores.shape, semaphores.dtype),
    )
    y, act, _, _, semaphores = jax.ffi.ffi_call("kogpt_linear", results, input_output_aliases={8: 4})(
        x,
        qvalue,
        _outputs.or_empty(scale, jnp.float32),
        _outputs.or_empty(bias, dtype),
        _outputs.or_empty(ln_scale, dtype),
        _outputs.or_empty(ln_bias, dtype),
        _outputs.or_empty(k_multiplier, jnp.float32),
        _outputs.or_empty(residual, jnp.float32),
        semaphores,
        gelu_from=np.int64(split),
        epsilon=np.float32(epsilon),
        prefetch_weight=bool(prefetch_weight),
        done_mark=np.int64(done_mark),
        awaited_mark=np.int64(0 if early is None else early.mark),
        early_from=np.int64(0 if early is None else early.begin),
        int8_activations=bool(int8_activations),
    )
    return (y, semaphores) if gelu_from is None else (y, act, semaphores)


def linear_partials_size(rows: int) -> int:
    """f32 values of scratch that "ffi" needs for so many rows."""
    return _PARTIALS_PER_ROW * next(padded for padded in _PADDED_ROWS if rows <= padded)


def linear_ffi_problem(*, platform: str, dtype: Any, weight_dtype: Any, k_dims: Sequence[int]) -> str | None:
    """Why "ffi" cannot multiply with such weights on this machine, or None if it can.

    Args:
        platform: "cpu" or "gpu".
        dtype: of the activations.
        weight_dtype: dtype, or INT8.
        k_dims: the K of each weight.
    """
    dtype, weight_dtype = np.dtype(dtype), np.dtype(weight_dtype)
    if problem := _library.load(platform).problem or _arguments.ffi_dtype_problem(platform, dtype):
        return problem
    if weight_dtype not in (dtype, np.dtype(jnp.int8)):
        return f"weights must be {dtype.name} or int8, not {weight_dtype.name}"
    return next(filter(None, (k_problem(k_dim, weight_dtype) for k_dim in k_dims)), None)


def k_problem(k_dim: int, weight_dtype: np.dtype) -> str | None:
    multiple = 16 if weight_dtype == jnp.int8 else 8
    return (
        f"K must be a multiple of {multiple} with {weight_dtype.name} weights, got {k_dim}"
        if k_dim % multiple
        else None
    )


def _compute_dtype(x: Array, weight: Array | QuantizedArray, layer_norm: tuple[Array, Array, float] | None) -> np.dtype:
    if not isinstance(weight, QuantizedArray):
        return weight.dtype
    return x.dtype if layer_norm is None else layer_norm[0].dtype


def _check(
    x: Array,
    weight: Array | QuantizedArray,
    bias: Array | None,
    layer_norm: tuple[Array, Array, float] | None,
    k_multiplier: Array | None,
    residual: Array | None,
    gelu_from: int | None,
    act_dim: int | None,
    out_dtype: Any,
) -> None:
    """What holds for every implementation."""
    _arguments.check_rank("x", x, 2)
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must have shape (M, K) with x's K = {x.shape[1]}, got {weight.shape}")
    rows, k_dim = x.shape
    num_outputs = weight.shape[0]
    if isinstance(weight, QuantizedArray):
        _arguments.check_dtype("weight.qvalue", weight.qvalue, [jnp.int8])
        _arguments.check_dtype("weight.scale", weight.scale, [jnp.float32])
        _arguments.check_shape("weight.scale", weight.scale, (num_outputs, 1))
    else:
        _arguments.check_dtype("weight", weight, _arguments.FLOAT_DTYPES)
    if layer_norm is not None:
        _arguments.check_dtype("layer_norm.scale", layer_norm[0], _arguments.FLOAT_DTYPES)
    dtype = _compute_dtype(x, weight, layer_norm)
    _arguments.check_dtype("x", x, _arguments.FLOAT_DTYPES if layer_norm is None else [dtype, jnp.float32])
    if x.dtype != dtype and layer_norm is None:
        raise ValueError(f"x must be {dtype.name} as the weight is, or f32 with layer_norm, got {x.dtype.name}")

    _outputs.check(
        rows,
        num_outputs,
        dtype,
        bias=bias,
        residual=residual,
        gelu_from=gelu_from,
        act_dim=act_dim,
        out_dtype=out_dtype,
    )
    operands = [
        ("layer_norm.scale", None if layer_norm is None else layer_norm[0], dtype),
        ("layer_norm.bias", None if layer_norm is None else layer_norm[1], dtype),
        ("k_multiplier", k_multiplier, np.dtype(jnp.float32)),
    ]
    for name, operand, operand_dtype in operands:
        if operand is not None:
            _arguments.check_dtype(name, operand, [operand_dtype])
            _arguments.check_shape(name, operand, (k_dim,))
