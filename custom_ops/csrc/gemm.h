// Products of many rows on tensor cores: y = act(x W^T * scales + bias) + residual, x in INT8
// (int8_gemm) or in 16 bits (mixed_gemm), the weight in INT8.
//
// Raw pointers and a stream: no header of XLA, of CUTLASS or of another framework here.
#ifndef CUSTOM_OPS_GEMM_H_
#define CUSTOM_OPS_GEMM_H_

#include <cstdint>
#include <string>

#include "op_common.h"

namespace kogpt {

// A null pointer stands for an operand that is absent.
//
//   z_rm = weight_scale_m * (x_scale_r *) sum_k x_rk weight_mk + bias_m
//   outputs [0, gelu_from)             y   = z + residual
//   outputs [gelu_from, num_outputs)   act = GELU(z), tanh form, in the last columns
//
// The sum is exact with an INT8 x: K is small enough for 32 bits.
struct GemmParams {
  int64_t rows;         // at least 1
  int64_t num_outputs;  // M
  int64_t k_dim;        // K: a multiple of 16
  int64_t gelu_from;    // num_outputs: no GELU
  int64_t act_dim;      // row length of `act`, at least num_outputs - gelu_from
  DataType x_dtype;     // kInt8, or dtype
  DataType dtype;       // bias and act: kFloat16 or kBfloat16
  DataType y_dtype;     // dtype or kFloat32; kFloat32 with a residual
  int64_t tile;         // an index of the device's tiles; -1: chosen by the shape

  const void* x;              // [rows, k_dim] x_dtype
  const float* x_scale;       // [rows], of an INT8 x
  const void* weight;         // [num_outputs, k_dim] INT8
  const float* weight_scale;  // [num_outputs]
  const void* bias;  // [num_outputs] dtype; with GELU: [num_outputs - gelu_from], of its outputs
  const float* residual;  // [rows, gelu_from]

  void* y;  // [rows, gelu_from] y_dtype; null when gelu_from is 0
  // [rows, act_dim] dtype; columns before the last num_outputs - gelu_from stay as they are.
  void* act;
};

// Returns null, or what is wrong with the parameters.
const char* CheckGemm(const GemmParams& params);

// How many tiles a device has for products of INT8 or of 16-bit activations, and their names:
// "128x256 swizzle 2" and the like, without a comma. On Hopper a product that its kernels do not
// take has one way, whichever tile it is told.
int NumTiles(bool is_int8, bool is_hopper);
std::string TileName(bool is_int8, bool is_hopper, int index);

// Enqueues on `stream` (a cudaStream_t). Returns null, or a message of static lifetime.
const char* LaunchInt8Gemm(const GemmParams& params, void* stream);
const char* LaunchMixedGemm(const GemmParams& params, void* stream);

}  // namespace kogpt

#endif  // CUSTOM_OPS_GEMM_H_
