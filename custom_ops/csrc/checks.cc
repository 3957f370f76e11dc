// Whether parameters fit together: extents, types, and that what is needed is there. Scratch is the
// bindings' to check.
#include "all_reduce.h"
#include "choose_token.h"
#include "decode_attention.h"
#include "linear.h"
#include "prefill_attention.h"

namespace kogpt {
namespace {

bool IsFloat(DataType dtype) {
  return dtype == DataType::kFloat32 || dtype == DataType::kFloat16 || dtype == DataType::kBfloat16;
}

}  // namespace

const char* CheckLinear(const LinearParams& params) {
  const bool is_int8 = params.weight_dtype == DataType::kInt8;
  const bool has_layer_norm = params.ln_scale != nullptr;
  const int64_t num_gelu = params.num_outputs - params.gelu_from;
  if (params.rows < 1 || params.rows > kLinearMaxRows) return "x must have 1 to 64 rows";
  if (params.num_outputs < 1) return "weight must have at least one output";
  constexpr int64_t kMaxExtent = int64_t{1} << 30;  // sizes are 32-bit integers in the kernels
  if (params.num_outputs > kMaxExtent || params.k_dim > kMaxExtent) {
    return "weight must have at most 2^30 outputs, and K";
  }
  if (params.k_dim < 1 || params.k_dim % (is_int8 ? 16 : 8) != 0) {
    return is_int8 ? "K must be a multiple of 16 with an INT8 weight" : "K must be a multiple of 8";
  }
  if (!IsFloat(params.dtype)) return "activations must be f32, f16 or bf16";
  if (!is_int8 && params.weight_dtype != params.dtype) {
    return "weight must be INT8 or of the activations' type";
  }
  if (params.x_dtype != params.dtype && !(has_layer_norm && params.x_dtype == DataType::kFloat32)) {
    return "x must be of the activations' type, or f32 with LayerNorm";
  }
  if (params.y_dtype != params.dtype && params.y_dtype != DataType::kFloat32) {
    return "y must be of the activations' type or f32";
  }
  if (params.residual != nullptr && params.y_dtype != DataType::kFloat32) {
    return "y must be f32 with a residual";
  }
  if (params.gelu_from < 0 || num_gelu < 0) return "gelu_from must be in [0, outputs of weight]";
  if (num_gelu > 0 && params.act_dim < num_gelu)
    return "act must hold the outputs from gelu_from on";
  if (params.x == nullptr || params.weight == nullptr) return "x and weight must be there";
  if (is_int8 != (params.weight_scale != nullptr)) {
    return "weight_scale belongs to an INT8 weight, and to no other";
  }
  if (has_layer_norm != (params.ln_bias != nullptr)) {
    return "LayerNorm needs both its scale and its bias";
  }
  if (params.parts != nullptr &&
      (params.bias != nullptr || params.residual != nullptr || num_gelu > 0 ||
       params.y_dtype != DataType::kFloat32 || params.done_mark != 0)) {
    return "parts belong to a product with neither bias, residual, GELU nor mark, with y in f32";
  }
  if (params.next != nullptr &&
      (is_int8 || num_gelu > 0 || params.y_dtype != DataType::kFloat32 || params.h == nullptr)) {
    return "a LayerNorm behind a product takes a 16-bit weight, no GELU, y in f32 and h";
  }
  if (params.has_h && params.h == nullptr) return "h must be there with has_h";
  if (params.done_mark < 0 || params.awaited_mark < 0) return "marks must not be negative";
  if (params.awaited_mark != 0) {
    if (has_layer_norm || params.k_multiplier != nullptr) {
      return "early columns belong to an x that neither LayerNorm nor a multiplier changes";
    }
    if (is_int8 && params.has_h && params.rows <= kLinearMaxRowsRounded) {
      return "a product of so few rows that awaits a mark rounds its x itself";
    }
    if (params.early_from < 0 || params.early_from > params.k_dim) {
      return "early columns must begin in [0, K]";
    }
  }
  if (params.gelu_from > 0 && params.y == nullptr) return "y must be there when gelu_from is not 0";
  if (num_gelu > 0 && params.act == nullptr) return "act must be there with gelu_from";
  return nullptr;
}

const char* CheckDecodeAttention(const DecodeAttentionParams& params) {
  if (params.batch < 0) return "the batch must not be negative";
  if (params.num_heads < 1) return "the cache must have at least one head";
  if (params.head_dim != 64 && params.head_dim != 128 && params.head_dim != 256) {
    return "head_dim must be 64, 128 or 256";
  }
  if (params.page_len < 16 || params.page_len % 16 != 0) return "page_len must be a multiple of 16";
  if (params.num_pages < 1 || params.max_pages < 1) return "there must be at least one page";
  if (params.rotary_dim < 0 || params.rotary_dim % 2 != 0 || params.rotary_dim > params.head_dim) {
    return "rotary_dim must be even and at most head_dim";
  }
  if (params.act_dim < params.num_heads * params.head_dim) {
    return "act must hold the outputs of all heads";
  }
  if (!IsFloat(params.dtype)) return "qkv, pages and act must be f32, f16 or bf16";
  if (params.batch == 0) return nullptr;
  if (params.qkv == nullptr || params.k_pages == nullptr || params.v_pages == nullptr ||
      params.page_table == nullptr || params.lengths == nullptr || params.num_new == nullptr ||
      params.act == nullptr) {
    return "qkv, the pages, page_table, lengths, num_new and act must be there";
  }
  if ((params.k_scales == nullptr) != (params.v_scales == nullptr)) {
    return "k_pages and v_pages must both have scales or neither";
  }
  if (params.rotary_dim > 0 && (params.cos == nullptr || params.sin == nullptr)) {
    return "cos and sin must be there when rotary_dim is not 0";
  }
  const RoundedAct& rounded = params.rounded;
  if (rounded.num_digits < 0 || rounded.num_digits > 2) return "integers have one or two digits";
  if (rounded.num_digits != 0 && (params.head_dim != 256 || params.act_dim % 8 != 0 ||
                                  rounded.digits == nullptr || rounded.scales == nullptr)) {
    return "act becomes integers with a head_dim of 256 and rows of a multiple of 8, where there "
           "are places for them and their scales";
  }
  return nullptr;
}

const char* CheckPrefillAttention(const PrefillAttentionParams& params) {
  constexpr int64_t kMaxInt = 0x7fffffff;
  if (params.total_tokens < 0 || params.total_tokens >= kMaxInt) {
    return "there must be less than 2^31 - 1 tokens";
  }
  if (params.batch < 0 || params.batch > kPrefillAttentionMaxRows) {
    return "there must be at most 1024 rows";
  }
  if (params.num_heads < 1) return "the cache must have at least one head";
  if (params.head_dim != 64 && params.head_dim != 128 && params.head_dim != 256) {
    return "head_dim must be 64, 128 or 256";
  }
  if (params.page_len < 64 || params.page_len % 64 != 0) return "page_len must be a multiple of 64";
  if (params.num_pages < 1 || params.max_pages < 1) return "there must be at least one page";
  if (params.num_pages * params.num_heads * params.page_len > kMaxInt ||
      params.max_pages * params.page_len > kMaxInt) {
    return "the pages must hold less than 2^31 tokens of all heads";
  }
  if (params.max_new < 0) return "max_new must not be negative";
  if (params.rotary_dim < 0 || params.rotary_dim % 2 != 0 || params.rotary_dim > params.head_dim) {
    return "rotary_dim must be even and at most head_dim";
  }
  if (params.act_dim < params.num_heads * params.head_dim) {
    return "act must hold the outputs of all heads";
  }
  if (params.dtype != DataType::kFloat16 && params.dtype != DataType::kBfloat16) {
    return "qkv and act must be f16 or bf16";
  }
  if (params.batch == 0 || params.total_tokens == 0) return nullptr;
  if (params.qkv == nullptr || params.k_pages == nullptr || params.v_pages == nullptr ||
      params.page_table == nullptr || params.begins == nullptr || params.num_new == nullptr ||
      params.lengths == nullptr || params.act == nullptr) {
    return "qkv, the pages, page_table, begins, num_new, lengths and act must be there";
  }
  if ((params.k_scales == nullptr) != (params.v_scales == nullptr)) {
    return "k_pages and v_pages must both have scales or neither";
  }
  if (params.rotary_dim > 0 && (params.cos == nullptr || params.sin == nullptr)) {
    return "cos and sin must be there when rotary_dim is not 0";
  }
  return nullptr;
}

const char* CheckAllReduce(const AllReduceParams& params) {
  if (params.rows < 1 || params.row_len < 4 || params.row_len % 4 != 0) {
    return "x must have at least one row, of a multiple of 4 values";
  }
  if (params.rows > kAllReduceMaxValues || params.row_len > kAllReduceMaxValues ||
      params.rows * params.row_len > kAllReduceMaxValues) {
    return "x must have at most 2^19 values";
  }
  if (!IsFloat(params.bias_dtype)) return "bias must be f32, f16 or bf16";
  if (params.x.values == nullptr || params.y == nullptr) return "x and y must be there";
  if (params.x.splits < 1 || params.x.stride < params.row_len || params.x.stride % 4 != 0) {
    return "x must have at least one part, in rows of a multiple of 4 values";
  }
  if (params.ln_scale != nullptr) {
    if (params.rows > kLinearMaxRows || params.row_len > kAllReduceMaxNormLen ||
        params.row_len % 8 != 0) {
      return "LayerNorm takes at most 64 rows, of a multiple of 8 values, at most 4096";
    }
    if (params.h_dtype != DataType::kFloat16 && params.h_dtype != DataType::kBfloat16) {
      return "LayerNorm's output must be f16 or bf16";
    }
    if (params.ln_bias == nullptr || params.h == nullptr) {
      return "LayerNorm needs its bias and a place for its output";
    }
  }
  if (params.group == nullptr || params.rank < 0) return "the device must be in a group";
  if (params.timeout_ms < 1) return "the timeout must be at least a millisecond";
  return nullptr;
}

const char* CheckChooseToken(const ChooseTokenParams& params) {
  constexpr int64_t kMaxExtent = int64_t{1} << 30;  // sizes are 32-bit integers in the kernels
  if (params.rows < 1 || params.rows > kLinearMaxRows) return "there must be 1 to 64 rows";
  if (params.model_dim < 8 || params.model_dim % 8 != 0 || params.model_dim > kMaxExtent) {
    return "embedding's width must be a multiple of 8";
  }
  if (params.local_vocab < 1 || params.vocab_size < 1 || params.local_vocab > kMaxExtent ||
      params.vocab_size > kMaxExtent) {
    return "there must be 1 to 2^30 tokens";
  }
  if (params.half_rotary_dim < 0 || params.num_positions < 1 || params.num_positions > kMaxExtent) {
    return "there must be angles of 1 to 2^30 positions";
  }
  if (!IsFloat(params.dtype)) return "embedding must be f32, f16 or bf16";
  if (params.num_eos_tokens < 0 || params.num_eos_tokens > kMaxEosTokens) {
    return "there must be at most 16 tokens that end a text";
  }
  if (params.embedding == nullptr || params.ignore_eos == nullptr || params.tokens == nullptr ||
      params.lengths == nullptr || params.num_remaining == nullptr || params.num_new == nullptr ||
      params.x == nullptr) {
    return "embedding, ignore_eos, tokens, lengths, num_remaining, num_new and x must be there";
  }
  if (params.half_rotary_dim > 0 && (params.all_cos == nullptr || params.all_sin == nullptr ||
                                     params.cos == nullptr || params.sin == nullptr)) {
    return "cos and sin must be there, of all positions and of the rows";
  }
  if (params.logits != nullptr && (params.new_tokens == nullptr || params.logprobs == nullptr ||
                                   params.candidates == nullptr)) {
    return "new_tokens, logprobs and candidates must be there with logits";
  }
  if ((params.h != nullptr || params.group != nullptr) && params.model_dim > kAllReduceMaxNormLen) {
    return "embedding's width must be at most 4096 with LayerNorm or several devices";
  }
  if (params.h != nullptr && (params.ln_scale == nullptr || params.ln_bias == nullptr)) {
    return "LayerNorm needs both its scale and its bias";
  }
  if (params.group != nullptr && (params.rank < 0 || params.timeout_ms < 1)) {
    return "the device must be in the group, and the timeout at least a millisecond";
  }
  return nullptr;
}

}  // namespace kogpt
