// What gemm_driver.cu compares the products of many rows with: CUTLASS's own kernels. They are no
// part of the library.
#ifndef CUSTOM_OPS_GEMM_RIVALS_H_
#define CUSTOM_OPS_GEMM_RIVALS_H_

#include "gemm.h"

namespace kogpt {

// INT8 sums written as they are, without scales or anything else behind the product, as bf16 or f32
// (params.y_dtype) into params.y [rows, num_outputs]; CUTLASS's tile `shape` with its own epilogue.
inline constexpr int kNumUnfusedShapes = 4;
const char* UnfusedShapeName(int shape);
const char* LaunchUnfusedInt8(const GemmParams& params, int shape, int swizzle, void* stream);

// The product of 16-bit activations with a weight in bf16, and the same behind it as mixed_gemm.
inline constexpr int kNumBf16Shapes = 2;
const char* Bf16ShapeName(int shape);
const char* LaunchBf16(const GemmParams& params, int shape, int swizzle, void* stream);

}  // namespace kogpt

#endif  // CUSTOM_OPS_GEMM_RIVALS_H_
