// Rotary embedding, cache append and attention for one query token a row over paged keys and
// values.
//
// Raw pointers and a stream, or a loop over threads: no header of XLA or of another framework here.
#ifndef CUSTOM_OPS_DECODE_ATTENTION_H_
#define CUSTOM_OPS_DECODE_ATTENTION_H_

#include <cstddef>
#include <cstdint>

#include "op_common.h"

namespace kogpt {

// Where act becomes integers for a product with an INT8 weight.
struct RoundedAct {
  int num_digits;             // 1: of 8 bits, 2: of 16
  const float* k_multiplier;  // [act_dim], or null: what act's columns are multiplied by first
  void* digits;               // as `linear` has them in its `h`
  float* scales;              // and at the beginning of its `partials`
};

// For each row b with num_new[b] = 1 and each head n, with position p = lengths[b]:
//   q, k: the first rotary_dim values of each head rotated, neighbours (2i, 2i + 1) by the angle of
//         (cos, sin)[b, i], rounded to dtype
//   k and v are written to the row's page page_table[b, p / page_len] at offset p % page_len
//   act[b, n * head_dim + h] = sum_j softmax_j(q . k_j / sqrt(head_dim)) v_jh over j = 0 .. p
//         softmax in f32
// INT8 pages hold k and v as integers in [-127, 127] with an f32 scale a token and head, max |.| / 127
// of the head (1 for zeros), and k_j and v_j are integer times scale, those of the new token too.
// A row with num_new[b] = 0 leaves the cache as it is and gets zeros.
struct DecodeAttentionParams {
  int64_t batch;
  int64_t num_heads;
  int64_t head_dim;  // 64, 128 or 256
  int64_t page_len;  // tokens a page: a multiple of 16
  int64_t num_pages;
  int64_t max_pages;   // pages in a row of the table
  int64_t rotary_dim;  // even, at most head_dim; may be 0
  int64_t act_dim;     // row length of `act`, at least num_heads * head_dim
  DataType dtype;      // of qkv and act, and of the pages if these have no scales

  const void* qkv;            // [batch, 3, num_heads, head_dim]
  const float* cos;           // [batch, rotary_dim / 2]
  const float* sin;           // [batch, rotary_dim / 2]
  void* k_pages;              // [num_pages, num_heads, page_len, head_dim], updated in place
  void* v_pages;              // likewise
  float* k_scales;            // [num_pages, num_heads, page_len] of INT8 pages, else null; likewise
  float* v_scales;            // likewise
  const int32_t* page_table;  // [batch, max_pages]
  const int32_t* lengths;     // [batch] tokens in the cache before this one
  const int32_t* num_new;     // [batch] 0 or 1
  void* act;  // [batch, act_dim]: the first num_heads * head_dim columns are written

  // Scratch. partials: DecodeAttentionPartialsBytes.
  float* partials;
  int64_t partials_bytes;
  int32_t* semaphores;  // kNumSemaphores zeros, zeros again when the kernel ends; CUDA only

  // Pages and page table may be read before the kernels ahead in the stream have finished.
  bool prefetch_cache;
  // CUDA: the next kernel, a product, begins before this one ends if its blocks find room.
  bool leaves_room;
  // CUDA, with a head_dim of 256: all columns of act, those behind attention's, which the kernel ahead has
  // written, with them, are rounded; attention's own are not written into act then. No digits: none is.
  RoundedAct rounded;
};

// Returns null, or what is wrong with the parameters.
const char* CheckDecodeAttention(const DecodeAttentionParams& params);

// Scratch bytes of `partials` for the CUDA kernel.
int64_t DecodeAttentionPartialsBytes(const DecodeAttentionParams& params);

// CUDA: enqueues on `stream` (a cudaStream_t). Returns null, or a message of static lifetime.
const char* LaunchDecodeAttention(const DecodeAttentionParams& params, void* stream);

// Host: runs on the threads that `parallel_for` brings.
void DecodeAttentionCpu(const DecodeAttentionParams& params, const ParallelFor& parallel_for);

}  // namespace kogpt

#endif  // CUSTOM_OPS_DECODE_ATTENTION_H_
