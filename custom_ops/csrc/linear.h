// Decode-sized products: y = act(LayerNorm(x) W^T * scale + bias) + residual for 1 to 64 rows.
//
// Raw pointers and a stream, or a loop over threads: no header of XLA or of another framework here.
#ifndef CUSTOM_OPS_LINEAR_H_
#define CUSTOM_OPS_LINEAR_H_

#include <cstddef>
#include <cstdint>

#include "op_common.h"

namespace kogpt {

inline constexpr int kLinearMaxRows = 64;
// Up to so many rows the kernels for sm_90a round activations that meet an INT8 weight without a kernel
// of its own ahead, unless LayerNorm or a multiplier stands before it.
inline constexpr int kLinearMaxRowsRounded = 1;

// Sums that are not whole yet: y_rm = scale_m * sum_s values[(s * rows + r) * stride + m], added up in
// order. A null scale stands for ones.
struct LinearParts {
  const float* values;
  int64_t splits;
  int64_t stride;
  const float* scale;
};

// LayerNorm of y for the product that follows, which takes it from `h` with `has_h`.
struct LinearNext {
  const void* ln_scale;  // [num_outputs] dtype
  const void* ln_bias;   // [num_outputs] dtype
  bool is_made;          // the launch tells here whether it makes it
};

// A null pointer stands for an operand that is absent.
//
//   h   = LayerNorm(x) if ln_scale, else x;  times k_multiplier along k if there
//         rounded to `dtype`; beside an INT8 weight the kernels for sm_90a round to integers instead, of
//         which a row's largest |h| becomes 32639, or without LayerNorm that of each 256 columns of a
//         row; 127 with `int8_activations`
//   z_m = weight_scale_m * sum_k h_k weight_mk + bias_m
//   outputs [0, gelu_from)             y   = z + residual
//   outputs [gelu_from, num_outputs)   act = GELU(z), tanh form, in the last columns
struct LinearParams {
  int64_t rows;           // 1 to kLinearMaxRows
  int64_t num_outputs;    // M
  int64_t k_dim;          // K: a multiple of 8, of 16 with an INT8 weight
  int64_t gelu_from;      // num_outputs: no GELU
  int64_t act_dim;        // row length of `act`, at least num_outputs - gelu_from
  DataType dtype;         // activations, bias, LayerNorm's scale and bias
  DataType weight_dtype;  // dtype or kInt8
  DataType x_dtype;       // dtype, or kFloat32 with LayerNorm
  DataType y_dtype;       // dtype or kFloat32
  float epsilon;
  bool int8_activations;  // the kernels may round those that meet an INT8 weight to 8 bits

  const void* x;              // [rows, k_dim] x_dtype
  const void* weight;         // [num_outputs, k_dim] weight_dtype
  const float* weight_scale;  // [num_outputs], INT8 only
  const void* bias;  // [num_outputs] dtype; with GELU: [num_outputs - gelu_from], of its outputs
  const void* ln_scale;       // [k_dim] dtype
  const void* ln_bias;        // [k_dim] dtype
  const float* k_multiplier;  // [k_dim]
  const float* residual;      // [rows, gelu_from]

  void* y;  // [rows, gelu_from] y_dtype; null when gelu_from is 0
  // [rows, act_dim] dtype; columns before the last num_outputs - gelu_from stay as they are.
  void* act;

  // Scratch. h: [rows, k_dim] dtype, needed with LayerNorm, k_multiplier or an INT8 weight.
  // partials: LinearPartialsBytes; the scales of h's integers lie at its beginning.
  void* h;
  // CUDA: h is there already (with its scales), made by a kernel ahead: x is not read.
  bool has_h;
  float* partials;
  int64_t partials_bytes;
  // kNumSemaphores zeros but for a mark, and again so when the kernel ends; CUDA.
  int32_t* semaphores;

  // Weight, its scale, bias, LayerNorm's scale and bias, and multiplier may be read before the kernels
  // ahead in the stream have finished.
  bool prefetch_weight;

  // Numbers above 0, or 0 for none. The kernels for sm_90a write `done_mark` into the semaphores once
  // all outputs are there, and wait for `awaited_mark` in place of the kernel ahead before they read
  // columns [early_from, k_dim) of x; then the mark goes. Others run one after another.
  int32_t done_mark;
  int32_t awaited_mark;
  int64_t early_from;

  // Where it is there, which takes a product with neither bias, residual nor GELU and with y in f32: on
  // CUDA the launch tells here where y is to be found, in parts if the product is cut along K. All else
  // writes y.
  LinearParts* parts;

  // Where it is there, which takes a 16-bit weight, y in f32, no GELU, and an `h` of [rows, num_outputs] at
  // least: the kernels for sm_90a may make it where they add up y.
  LinearNext* next;
};

// Returns null, or what is wrong with the parameters.
const char* CheckLinear(const LinearParams& params);

// Scratch bytes of `partials` that serve any device, for the CUDA kernel.
int64_t LinearPartialsBytes(int64_t rows);

// CUDA: whether the kernels of the current device take activations that meet an INT8 weight as integers.
bool LinearHasIntegers();

// CUDA: enqueues on `stream` (a cudaStream_t). Returns null, or a message of static lifetime.
const char* LaunchLinear(const LinearParams& params, void* stream);

// Host: runs on the threads that `parallel_for` brings.
void LinearCpu(const LinearParams& params, const ParallelFor& parallel_for);

}  // namespace kogpt

#endif  // CUSTOM_OPS_LINEAR_H_
