#include "decode_layers.h"

#include <cstring>

namespace kogpt {
namespace {

const char* Linear(const LinearParams& params, const DecodeOps& ops) {
  if (const char* message = CheckLinear(params)) return message;
  return ops.linear(params);
}

// What all products of a step have in common.
LinearParams Product(const DecodeLayersParams& params) {
  LinearParams linear = {};
  linear.rows = params.rows;
  linear.dtype = params.dtype;
  linear.weight_dtype = params.weight_dtype;
  linear.y_dtype = DataType::kFloat32;
  linear.epsilon = params.epsilon;
  linear.int8_activations = params.int8_activations;
  linear.h = params.h;
  linear.partials = params.linear_partials;
  linear.partials_bytes = params.linear_partials_bytes;
  linear.semaphores = params.semaphores;
  linear.prefetch_weight = params.prefetch_weights;
  return linear;
}

struct Norm {
  const void* scale;
  const void* bias;
};

// The residual stream, and whether its LayerNorm for the product that follows is in `h` already, as that
// product takes it.
struct Stream {
  const float* x;
  bool has_h;
};

// LayerNorm in front.
LinearParams ProductOfStream(const DecodeLayersParams& params, const Stream& stream,
                             const Norm& norm) {
  LinearParams linear = Product(params);
  linear.k_dim = params.model_dim;
  linear.x_dtype = DataType::kFloat32;
  linear.x = stream.x;
  linear.ln_scale = norm.scale;
  linear.ln_bias = norm.bias;
  linear.has_h = stream.has_h;
  return linear;
}

// Whether attention rounds w_out's input to integers, in place of a kernel behind it.
bool AttentionRounds(const DecodeLayersParams& params, const DecodeOps& ops) {
  return ops.has_integers && params.weight_dtype == DataType::kInt8 && params.head_dim == 256 &&
         params.rows > kLinearMaxRowsRounded;
}

// Whether the sum over the ranks makes the LayerNorm behind it, too: one kernel less on the way from one
// layer to the next. Beside an INT8 weight that was slower than a kernel of its own, which rounds to
// integers besides (docs/performance-notes.md).
bool SumsMakeNorms(const DecodeLayersParams& params) {
  return params.group != nullptr && params.model_dim <= kAllReduceMaxNormLen &&
         params.model_dim % 8 == 0 && params.weight_dtype != DataType::kInt8;
}

// `next`: the LayerNorm behind the layer, or null if nobody takes it here.
const char* RunLayer(const DecodeLayersParams& params, const DecodeLayer& layer, int32_t number,
                     const Norm* next, float* y, Stream* stream, const DecodeOps& ops) {
  const int64_t attention_dim = params.num_heads * params.head_dim;
  const int64_t act_dim = attention_dim + params.ffn_dim;
  // w_out begins with GELU's columns, while attention still fills its own where no kernel of its own
  // first rounds or multiplies all of w_out's input.
  const bool has_early = layer.k_multiplier == nullptr;
  const bool is_early = has_early && (params.weight_dtype != DataType::kInt8 ||
                                      (ops.has_integers && params.rows <= kLinearMaxRowsRounded));

  const float* const x = stream->x;
  LinearParams w_in = ProductOfStream(params, *stream, {layer.ln_scale, layer.ln_bias});
  *stream = {y, false};
  w_in.num_outputs = 3 * attention_dim + params.ffn_dim;
  w_in.gelu_from = 3 * attention_dim;
  w_in.act_dim = act_dim;
  w_in.y_dtype = params.dtype;
  w_in.weight = layer.w_in;
  w_in.weight_scale = layer.w_in_scale;
  w_in.bias = layer.b_ffn_in;
  w_in.y = params.qkv;
  w_in.act = params.act;
  w_in.done_mark = has_early ? number : 0;
  if (const char* message = Linear(w_in, ops)) return message;

  DecodeAttentionParams attention = {};
  attention.batch = params.rows;
  attention.num_heads = params.num_heads;
  attention.head_dim = params.head_dim;
  attention.page_len = params.page_len;
  attention.num_pages = params.num_pages;
  attention.max_pages = params.max_pages;
  attention.rotary_dim = params.rotary_dim;
  attention.act_dim = act_dim;
  attention.dtype = params.dtype;
  attention.qkv = params.qkv;
  attention.cos = params.cos;
  attention.sin = params.sin;
  attention.k_pages = layer.k_pages;
  attention.v_pages = layer.v_pages;
  attention.k_scales = layer.k_scales;
  attention.v_scales = layer.v_scales;
  attention.page_table = params.page_table;
  attention.lengths = params.lengths;
  attention.num_new = params.num_new;
  attention.act = params.act;
  attention.partials = params.attention_partials;
  attention.partials_bytes = params.attention_partials_bytes;
  attention.semaphores = params.semaphores;
  attention.prefetch_cache = params.prefetch_weights;
  attention.leaves_room = is_early;
  const bool attention_rounds = AttentionRounds(params, ops);
  if (attention_rounds) {
    attention.rounded = {params.int8_activations ? 1 : 2, layer.k_multiplier, params.h,
                         params.linear_partials};
  }
  if (const char* message = CheckDecodeAttention(attention)) return message;
  if (const char* message = ops.attention(attention)) return message;

  LinearParams w_out = Product(params);
  w_out.num_outputs = w_out.gelu_from = params.model_dim;
  w_out.k_dim = act_dim;
  w_out.x_dtype = params.dtype;
  w_out.x = params.act;
  w_out.weight = layer.w_out;
  w_out.weight_scale = layer.w_out_scale;
  w_out.k_multiplier = layer.k_multiplier;
  w_out.has_h = attention_rounds;
  if (has_early) {
    w_out.awaited_mark = number;
    w_out.early_from = attention_dim;
  }
  if (params.group == nullptr) {
    w_out.bias = layer.b_ffn_out;
    w_out.residual = x;
    w_out.y = y;
    LinearNext made = {};
    if (next != nullptr && params.weight_dtype != DataType::kInt8) {
      made = {next->scale, next->bias, false};
      w_out.next = &made;
    }
    const char* message = Linear(w_out, ops);
    stream->has_h = made.is_made;
    return message;
  }
  AllReduceParams sum = {};
  w_out.y = params.part;
  w_out.parts = &sum.x;
  if (const char* message = Linear(w_out, ops)) return message;

  sum.rows = params.rows;
  sum.row_len = params.model_dim;
  sum.bias_dtype = params.dtype;
  sum.bias = layer.b_ffn_out;
  sum.residual = x;
  sum.y = y;
  sum.prefetch_bias = params.prefetch_weights;
  sum.group = params.group;
  sum.rank = params.rank;
  sum.timeout_ms = params.timeout_ms;
  if (next != nullptr && SumsMakeNorms(params)) {
    sum.h_dtype = params.dtype;
    sum.ln_scale = next->scale;
    sum.ln_bias = next->bias;
    sum.h = params.h;
    sum.epsilon = params.epsilon;
    stream->has_h = true;
  }
  if (const char* message = CheckAllReduce(sum)) return message;
  return ops.all_reduce(sum);
}

}  // namespace

const char* RunDecodeLayers(const DecodeLayersParams& params, const DecodeOps& ops) {
  Stream stream = {params.x, params.has_h};
  const bool has_head = params.lm_head != nullptr;
  const Norm last_norm = {params.ln_f_scale, params.ln_f_bias};
  for (int64_t i = 0; i < params.num_layers; ++i) {
    const DecodeLayer& layer = params.layers[i];
    const bool is_last = i + 1 == params.num_layers;
    const Norm next =
        is_last ? last_norm : Norm{params.layers[i + 1].ln_scale, params.layers[i + 1].ln_bias};
    float* const y = (params.num_layers - i) % 2 == 1 ? params.y : params.other_x;
    const char* message = RunLayer(params, layer, params.marks_before + static_cast<int32_t>(i) + 1,
                                   is_last && !has_head ? nullptr : &next, y, &stream, ops);
    if (message != nullptr) return message;
  }
  if (!has_head) return nullptr;
  LinearParams head = ProductOfStream(params, stream, last_norm);
  head.num_outputs = head.gelu_from = params.vocab_size;
  head.int8_activations = false;  // few of a step's products, and those nearest to its token
  head.weight = params.lm_head;
  head.weight_scale = params.lm_head_scale;
  head.bias = params.lm_head_bias;
  head.y = params.logits;
  return Linear(head, ops);
}

std::string KeyOf(const DecodeLayersParams& params) {
  DecodeLayersParams own;
  std::memcpy(static_cast<void*>(&own), &params, sizeof(own));  // padding too
  own.layers = nullptr;
  std::string key(reinterpret_cast<const char*>(&own), sizeof(own));
  key.append(reinterpret_cast<const char*>(params.layers), params.num_layers * sizeof(DecodeLayer));
  return key;
}

}  // namespace kogpt
