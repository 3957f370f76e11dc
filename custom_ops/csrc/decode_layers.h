// The layers of a decode step, and the logits behind them: linear, decode_attention and all_reduce one
// after another, as one call.
//
// Raw pointers: no header of XLA or of another framework here.
#ifndef CUSTOM_OPS_DECODE_LAYERS_H_
#define CUSTOM_OPS_DECODE_LAYERS_H_

#include <cstdint>
#include <functional>
#include <string>

#include "all_reduce.h"
#include "decode_attention.h"
#include "linear.h"
#include "op_common.h"

namespace kogpt {

// A layer's arrays; what they are is told in linear.h and decode_attention.h. A null pointer stands for
// one that is absent.
struct DecodeLayer {
  const void* ln_scale;       // [model_dim]
  const void* ln_bias;        // [model_dim]
  const void* w_in;           // [3 N H + ffn_dim, model_dim]
  const float* w_in_scale;    // of an INT8 weight
  const void* b_ffn_in;       // [ffn_dim]
  const void* w_out;          // [model_dim, N H + ffn_dim]
  const float* w_out_scale;   // of an INT8 weight
  const float* k_multiplier;  // [N H + ffn_dim], of w_out's input
  const void* b_ffn_out;      // [model_dim]
  void* k_pages;
  float* k_scales;
  void* v_pages;
  float* v_scales;
};

// For each layer, with N heads of H values:
//   qkv, act[N H :] = LayerNorm(x) w_in^T, GELU behind the bias
//   act[: N H]      = attention over the pages, which get the new token
//   x               = x + act w_out^T + bias; summed over the group's ranks if there is one
// then, if lm_head is there, logits = LayerNorm(x) lm_head^T + bias.
struct DecodeLayersParams {
  int64_t rows;       // 1 to kLinearMaxRows
  int64_t model_dim;  // D
  int64_t ffn_dim;
  int64_t num_heads;
  int64_t head_dim;
  int64_t page_len;
  int64_t num_pages;
  int64_t max_pages;
  int64_t rotary_dim;
  int64_t vocab_size;     // outputs of lm_head
  DataType dtype;         // activations, biases, LayerNorm's scale and bias
  DataType weight_dtype;  // dtype or kInt8
  float epsilon;
  bool prefetch_weights;  // as LinearParams has it, and the page table and pages likewise
  bool int8_activations;  // as LinearParams has it

  const DecodeLayer* layers;
  int64_t num_layers;
  // Calls that may be under way at the same time must not share marks (linear.h): this one has those
  // behind `marks_before`, one a layer.
  int32_t marks_before;

  const float* x;  // [rows, model_dim]
  bool has_h;      // the first layer's LayerNorm of x is in `h` already
  const float* cos;
  const float* sin;
  const int32_t* page_table;
  const int32_t* lengths;
  const int32_t* num_new;
  const void* lm_head;
  const float* lm_head_scale;
  const void* lm_head_bias;
  const void* ln_f_scale;
  const void* ln_f_bias;

  float* y;       // [rows, model_dim]
  float* logits;  // [rows, vocab_size]

  // Scratch.
  float* other_x;  // [rows, model_dim]
  void* qkv;       // [rows, 3 N H] dtype
  void* act;       // [rows, N H + ffn_dim] dtype
  void* h;         // rows * max(model_dim, N H + ffn_dim) values of dtype
  float* part;     // [rows, model_dim], with a group
  float* linear_partials;
  int64_t linear_partials_bytes;
  float* attention_partials;
  int64_t attention_partials_bytes;
  int32_t* semaphores;

  const AllReduceGroup* group;
  int rank;
  int64_t timeout_ms;
};

// What runs the ops; each returns null or a message of static lifetime.
struct DecodeOps {
  // Whether linear and attention are the kernels for sm_90a, which take activations as integers.
  bool has_integers;
  std::function<const char*(const LinearParams&)> linear;
  std::function<const char*(const DecodeAttentionParams&)> attention;
  std::function<const char*(const AllReduceParams&)> all_reduce;
};

// Checks and runs the ops in order. Returns null or the first message.
const char* RunDecodeLayers(const DecodeLayersParams& params, const DecodeOps& ops);

// All that the ops of such parameters depend on, as bytes.
std::string KeyOf(const DecodeLayersParams& params);

}  // namespace kogpt

#endif  // CUSTOM_OPS_DECODE_LAYERS_H_
