"""Checks of an op's arguments at trace time: a `ValueError` that names the argument and both values."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from custom_ops.quantization import QuantizedArray

FLOAT_DTYPES = (jnp.float32, jnp.float16, jnp.bfloat16)
IMPLEMENTATIONS = ("reference", "ffi")

Shaped = jax.Array | jax.ShapeDtypeStruct  # what stands for an array that is made later will do


def check_shape(name: str, array: Shaped | QuantizedArray, expected: tuple[int, ...]) -> None:
    """The array has exactly this shape."""
    if array.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {array.shape}")


def check_rank(name: str, array: Shaped | QuantizedArray, rank: int) -> None:
    """The array has this many axes."""
    if array.ndim != rank:
        raise ValueError(f"{name} must have {rank} axes, got shape {array.shape}")


def check_dtype(name: str, array: Shaped, allowed: Sequence[Any]) -> None:
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


def ffi_pages_problem(dtype: Any, pages_dtype: Any) -> str | None:
    """Why "ffi" cannot attend to pages of this dtype (None: that of the activations), or None if it can."""
    if pages_dtype is None or np.dtype(pages_dtype) in (np.dtype(dtype), np.dtype(jnp.int8)):
        return None
    return f"pages must be {np.dtype(dtype).name} or int8, got {np.dtype(pages_dtype).name}"


def check_attention(
    qkv: Shaped,
    rotary: Sequence[Shaped],
    k_pages: jax.Array | QuantizedArray,
    v_pages: jax.Array | QuantizedArray,
    page_table: jax.Array,
    act: Shaped,
    num_tokens: int,
    qkv_dim: int | None = None,
    **per_row: jax.Array,
) -> None:
    """What `decode_attention` and `prefill_attention` ask of their arguments: ``num_tokens`` new tokens, ``qkv_dim``
    columns of ``qkv`` (None: as many as q, k and v have), and one number a row in each of ``per_row``."""
    check_rank("k_pages", k_pages, 4)
    check_rank("act", act, 2)
    _, num_heads, _, head_dim = k_pages.shape
    check_shape("v_pages", v_pages, k_pages.shape)
    check_shape("qkv", qkv, (num_tokens, 3 * num_heads * head_dim if qkv_dim is None else qkv_dim))
    if isinstance(k_pages, QuantizedArray):
        dtype = qkv.dtype
        check_dtype("qkv", qkv, FLOAT_DTYPES)
        for name, pages in [("k_pages", k_pages), ("v_pages", v_pages)]:
            if not isinstance(pages, QuantizedArray):
                raise ValueError(f"{name} must be a QuantizedArray as k_pages is, got {pages.dtype.name}")
            check_dtype(f"{name}.qvalue", pages.qvalue, [jnp.int8])
            check_dtype(f"{name}.scale", pages.scale, [jnp.float32])
            check_shape(f"{name}.scale", pages.scale, (*pages.shape[:3], 1))
    else:
        dtype = k_pages.dtype
        check_dtype("k_pages", k_pages, FLOAT_DTYPES)
        if isinstance(v_pages, QuantizedArray):
            raise ValueError(f"v_pages must be {dtype.name} as k_pages is, got a QuantizedArray")
        check_dtype("v_pages", v_pages, [dtype])
    check_dtype("qkv", qkv, [dtype])
    check_dtype("act", act, [dtype])
    if len(rotary) != 2:
        raise ValueError(f"rotary must be (cos, sin), got {len(rotary)} arrays")
    check_rank("rotary[0]", rotary[0], 2)
    half_dim = rotary[0].shape[1]
    if 2 * half_dim > head_dim:
        raise ValueError(f"rotary must rotate at most head_dim = {head_dim} values, got {2 * half_dim}")
    for index, table in enumerate(rotary):
        check_dtype(f"rotary[{index}]", table, [jnp.float32])
        check_shape(f"rotary[{index}]", table, (num_tokens, half_dim))
    check_dtype("page_table", page_table, [jnp.int32])
    for name, array in per_row.items():
        check_dtype(name, array, [jnp.int32])
        check_shape(name, array, page_table.shape[:1])
    if act.shape[0] != num_tokens or act.shape[1] < num_heads * head_dim:
        raise ValueError(f"act must have shape ({num_tokens}, {num_heads * head_dim} or more), got {act.shape}")
