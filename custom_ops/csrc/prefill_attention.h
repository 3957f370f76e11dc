// Rotary embedding, cache append and causal attention for many query tokens a row over paged keys
// and values.
//
// Raw pointers and a stream: no header of XLA or of another framework here.
#ifndef CUSTOM_OPS_PREFILL_ATTENTION_H_
#define CUSTOM_OPS_PREFILL_ATTENTION_H_

#include <cstdint>

#include "op_common.h"

namespace kogpt {

inline constexpr int64_t kPrefillAttentionMaxRows = 1024;

// Row b's new tokens are the num_new[b] ones from begins[b] on; rows share no token. The i-th of
// them, at token t = begins[b] + i, has position p = lengths[b] + i, and for each head n:
//   q, k: the first rotary_dim values of each head rotated, neighbours (2i, 2i + 1) by the angle of
//         (cos, sin)[t, i], rounded to dtype
//   k and v are written to the row's page page_table[b, p / page_len] at offset p % page_len; into
//         INT8 pages rounded once more, each head with the scale max |.| / 127
//   act[t, n * head_dim + h] = sum_j softmax_j(q . k_j / sqrt(head_dim)) v_jh over j = 0 .. p
//         softmax in f32; k_j and v_j are those of the pages
// Tokens of no row, and cache slots beside the new tokens, stay as they are.
struct PrefillAttentionParams {
  int64_t total_tokens;
  int64_t batch;  // at most kPrefillAttentionMaxRows
  int64_t num_heads;
  int64_t head_dim;  // 64, 128 or 256
  int64_t page_len;  // tokens a page: a multiple of 64
  int64_t num_pages;
  int64_t max_pages;   // pages in a row of the table
  int64_t max_new;     // no row has more new tokens
  int64_t rotary_dim;  // even, at most head_dim; may be 0
  int64_t qkv_dim;     // row length of `qkv`, at least 3 * num_heads * head_dim; a multiple of 8
  int64_t act_dim;     // row length of `act`, at least num_heads * head_dim
  DataType dtype;      // of qkv, act and, without scales, the pages

  const void* qkv;   // [total_tokens, qkv_dim]: q, k and v, each [num_heads, head_dim], come first
  const float* cos;  // [total_tokens, rotary_dim / 2]
  const float* sin;  // [total_tokens, rotary_dim / 2]
  void* k_pages;     // [num_pages, num_heads, page_len, head_dim], updated in place
  void* v_pages;     // likewise
  float* k_scales;   // [num_pages, num_heads, page_len] of INT8 pages; null otherwise
  float* v_scales;   // likewise
  const int32_t* page_table;  // [batch, max_pages]
  const int32_t* begins;      // [batch]
  const int32_t* num_new;     // [batch]
  const int32_t* lengths;     // [batch] tokens in the cache before the new ones
  void* act;  // [total_tokens, act_dim]: the first num_heads * head_dim columns are written

  // Scratch: PrefillAttentionTilesBytes.
  int32_t* tiles;
  int64_t tiles_bytes;
};

// Returns null, or what is wrong with the parameters.
const char* CheckPrefillAttention(const PrefillAttentionParams& params);

// Scratch bytes of `tiles`.
int64_t PrefillAttentionTilesBytes(const PrefillAttentionParams& params);

// CUDA: enqueues on `stream` (a cudaStream_t). Returns null, or a message of static lifetime.
const char* LaunchPrefillAttention(const PrefillAttentionParams& params, void* stream);

// Its two halves, one after the other: cache append and list of tiles, then attention.
const char* LaunchPrefillAppend(const PrefillAttentionParams& params, void* stream);
const char* LaunchPrefillAttend(const PrefillAttentionParams& params, void* stream);

}  // namespace kogpt

#endif  // CUSTOM_OPS_PREFILL_ATTENTION_H_
