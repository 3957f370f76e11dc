// Activations to INT8 with one scale per row, LayerNorm and a multiplier along K in front, in one
// pass over memory.
//
// Raw pointers and a stream: no header of XLA or of another framework here.
#ifndef CUSTOM_OPS_QUANTIZE_ROWS_H_
#define CUSTOM_OPS_QUANTIZE_ROWS_H_

#include <cstdint>

#include "op_common.h"

namespace kogpt {

// A null pointer stands for an operand that is absent.
//
//   h      = LayerNorm(x) if ln_scale, else x;  times k_multiplier along k if there; all in f32
//   scale  = max |h| / 127 of the row, 1 for a row of zeros
//   qvalue = h / scale, rounded to the nearest even integer, at most 127 either way
//
// A row with a value that is not finite gets a scale that is not.
struct QuantizeRowsParams {
  int64_t rows;
  int64_t k_dim;      // K: a multiple of 16
  DataType x_dtype;   // kFloat32, kFloat16 or kBfloat16
  DataType ln_dtype;  // of LayerNorm's scale and bias, likewise
  float epsilon;

  const void* x;              // [rows, k_dim] x_dtype
  const void* ln_scale;       // [k_dim] ln_dtype
  const void* ln_bias;        // [k_dim] ln_dtype
  const float* k_multiplier;  // [k_dim]

  int8_t* qvalue;  // [rows, k_dim]
  float* scale;    // [rows]
};

// Returns null, or what is wrong with the parameters.
const char* CheckQuantizeRows(const QuantizeRowsParams& params);

// Enqueues on `stream` (a cudaStream_t). Returns null, or a message of static lifetime.
const char* LaunchQuantizeRows(const QuantizeRowsParams& params, void* stream);

}  // namespace kogpt

#endif  // CUSTOM_OPS_QUANTIZE_ROWS_H_
