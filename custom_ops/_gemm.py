"""What `int8_gemm` and `mixed_gemm` have in common: their arguments, and the call of their kernels."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from custom_ops import _arguments, _library, _outputs, autotune
from custom_ops.quantization import QuantizedArray

# The kernels count rows, outputs and K in 32 bits, and tiles of them too.
_MAX_EXTENT = 2**24
# What a sum of products of two INT8 values can reach must fit into 32 bits.
_MAX_K = 2**31 // 127**2


def check(
    x: Array | QuantizedArray,
    weight: QuantizedArray,
    dtype: np.dtype,
    *,
    bias: Array | None,
    residual: Array | None,
    gelu_from: int | None,
    act_dim: int | None,
    out_dtype: Any,
    tile: int | None,
    implementation: str,
) -> None:
    """What holds for every implementation."""
    _arguments.check_implementation(implementation)
    if tile is not None and implementation != "ffi":
        raise ValueError(f'tile must be None with implementation "{implementation}", got {tile}')
    _arguments.check_rank("weight.qvalue", weight.qvalue, 2)
    num_outputs, k_dim = weight.shape
    if x.ndim != 2 or x.shape[1] != k_dim:
        raise ValueError(f"x must have shape (T, K) with weight's K = {k_dim}, got {x.shape}")
    _arguments.check_dtype("weight.qvalue", weight.qvalue, [jnp.int8])
    _arguments.check_dtype("weight.scale", weight.scale, [jnp.float32])
    _arguments.check_shape("weight.scale", weight.scale, (num_outputs, 1))
    _outputs.check(
        x.shape[0],
        num_outputs,
        dtype,
        bias=bias,
        residual=residual,
        gelu_from=gelu_from,
        act_dim=act_dim,
        out_dtype=out_dtype,
    )


def check_k_of_int8(k_dim: int) -> None:
    """The sum over K fits into 32 bits."""
    if k_dim > _MAX_K:
        raise ValueError(f"K must be at most {_MAX_K}, so that a sum fits into 32 bits, got {k_dim}")


def call_ffi(
    target: str,
    x: Array,
    x_scale: Array | None,
    weight: QuantizedArray,
    dtype: np.dtype,
    *,
    bias: Array | None,
    residual: Array | None,
    gelu_from: int | None,
    act_dim: int | None,
    out_dtype: Any,
    tile: int | None,
) -> tuple[Array, Array | None]:
    """(y, act) of a handler of csrc/gemm_ffi.cc."""
    require_cuda()
    num_outputs, k_dim = weight.shape
    rows = x.shape[0]
    if problem := k_problem(k_dim):
        raise ValueError(f'with implementation "ffi" {problem}: weight has shape {weight.shape}')
    if dtype not in map(np.dtype, _arguments.FLOAT_DTYPES[1:]):
        raise ValueError(f'dtype must be float16 or bfloat16 with implementation "ffi", got {dtype.name}')
    for name, extent in (("x", rows), ("weight", num_outputs)):
        if not 1 <= extent <= _MAX_EXTENT:
            raise ValueError(f'{name} must have 1 to {_MAX_EXTENT} rows with implementation "ffi", got {extent}')
    if tile is None:
        tile = autotune.tile_index(target.removeprefix("kogpt_"), dtype, num_outputs, k_dim, rows)
    split = num_outputs if gelu_from is None else gelu_from
    num_gelu = num_outputs - split
    act_shape = (0,) if gelu_from is None else (rows, num_gelu if act_dim is None else act_dim)
    results = (
        jax.ShapeDtypeStruct((rows, split), _outputs.y_dtype(dtype, residual, out_dtype)),
        jax.ShapeDtypeStruct(act_shape, dtype),
    )
    y, act = jax.ffi.ffi_call(target, results)(
        x,
        _outputs.or_empty(None if x_scale is None else x_scale[:, 0], jnp.float32),
        weight.qvalue,
        weight.scale[:, 0],
        _outputs.or_empty(bias, dtype),
        _outputs.or_empty(residual, jnp.float32),
        gelu_from=np.int64(split),
        tile=np.int64(tile),
    )
    return y, None if gelu_from is None else act


def require_cuda() -> None:
    """These ops have no Host handler.

    Raises:
        ValueError: the CUDA library cannot be used.
    """
    if problem := _library_problem("gpu"):
        raise ValueError(f'implementation "ffi" has no library to run: the cuda library: {problem}')


def _library_problem(platform: str) -> str | None:
    library = _library.load(platform)
    if library.problem is None and library.left_out:
        return f"it was built without {', '.join(library.left_out)}, which take CUTLASS's headers"
    return library.problem


def ffi_problem(*, platform: str, dtypes: Sequence[Any], k_dims: Sequence[int]) -> str | None:
    """Why "ffi" cannot serve on this machine, or None if it can."""
    if platform != "gpu":
        return f"there is no kernel for {platform}"
    problems = [_library_problem(platform)]
    problems += [_arguments.ffi_dtype_problem(platform, np.dtype(dtype)) for dtype in dtypes]
    return next(filter(None, problems + [k_problem(k_dim) for k_dim in k_dims]), None)


def k_problem(k_dim: int) -> str | None:
    """Why the kernels cannot take such a K, or None if they can."""
    return f"K must be a multiple of 16, got {k_dim}" if k_dim % 16 or k_dim < 1 else None
