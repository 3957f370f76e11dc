"""Kernels of a model's steps behind `jax.numpy` references and XLA's FFI, usable from plain JAX (docs/custom-ops.md).

Each op has the implementations "reference" and "ffi"; which of them a machine has is asked before (`*_ffi_problem`),
and an op raises where the one it is told to use cannot serve.
"""

from custom_ops._library import LibraryInfo, jaxlib_ffi_version, library_info
from custom_ops.all_reduce import all_reduce, all_reduce_ffi_problem, all_reduce_in_order, all_reduce_reference
from custom_ops.decode_attention import decode_attention, decode_attention_ffi_problem, decode_attention_reference
from custom_ops.decode_layers import DecodeHead, DecodeLayer, decode_layers, decode_layers_reference
from custom_ops.decode_steps import NO_TOKEN, DecodedSteps, decode_steps, decode_steps_reference
from custom_ops.int8_gemm import int8_gemm, int8_gemm_ffi_problem, int8_gemm_reference
from custom_ops.linear import (
    MAX_EARLY_ROWS_INT8,
    MAX_ROWS,
    EarlyColumns,
    LayerNorm,
    linear,
    linear_ffi_problem,
    linear_reference,
)
from custom_ops.mixed_gemm import mixed_gemm, mixed_gemm_ffi_problem, mixed_gemm_reference
from custom_ops.prefill_attention import (
    MAX_ATTENTION_ROWS,
    prefill_attention,
    prefill_attention_ffi_problem,
    prefill_attention_reference,
)
from custom_ops.quantization import QuantizedArray, dequantize, quantize_weight
from custom_ops.quantize_rows import quantize_rows, quantize_rows_ffi_problem, quantize_rows_reference
from custom_ops.semaphores import NUM_SEMAPHORES, make_semaphores

__all__ = [
    "MAX_ATTENTION_ROWS",
    "MAX_EARLY_ROWS_INT8",
    "MAX_ROWS",
    "NO_TOKEN",
    "NUM_SEMAPHORES",
    "DecodeHead",
    "DecodeLayer",
    "DecodedSteps",
    "EarlyColumns",
    "LayerNorm",
    "LibraryInfo",
    "QuantizedArray",
    "all_reduce",
    "all_reduce_ffi_problem",
    "all_reduce_in_order",
    "all_reduce_reference",
    "decode_attention",
    "decode_attention_ffi_problem",
    "decode_attention_reference",
    "decode_layers",
    "decode_layers_reference",
    "decode_steps",
    "decode_steps_reference",
    "dequantize",
    "int8_gemm",
    "int8_gemm_ffi_problem",
    "int8_gemm_reference",
    "jaxlib_ffi_version",
    "library_info",
    "linear",
    "linear_ffi_problem",
    "linear_reference",
    "make_semaphores",
    "mixed_gemm",
    "mixed_gemm_ffi_problem",
    "mixed_gemm_reference",
    "prefill_attention",
    "prefill_attention_ffi_problem",
    "prefill_attention_reference",
    "quantize_rows",
    "quantize_rows_ffi_problem",
    "quantize_rows_reference",
    "quantize_weight",
]
