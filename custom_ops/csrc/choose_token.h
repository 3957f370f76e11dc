// The most likely token of each row, given its logits, and what the next decode step begins with: the
// token's embedding, the angles of its position, and whether the row goes on.
//
// Raw pointers and a stream: no header of XLA or of another framework here.
#ifndef CUSTOM_OPS_CHOOSE_TOKEN_H_
#define CUSTOM_OPS_CHOOSE_TOKEN_H_

#include <cstdint>

#include "all_reduce.h"
#include "linear.h"
#include "op_common.h"

namespace kogpt {

inline constexpr int64_t kMaxEosTokens = 16;
// Logits that are looked at together: a fixed number, so that a row's result does not depend on how
// many rows there are.
inline constexpr int64_t kVocabSlice = 512;
inline constexpr int32_t kNoToken = -1;

// What is known of a slice: its largest logit, of equal ones the first's place in the shard, and the sum
// of exp(logit - largest), or of exp(logit) where the largest is not finite. NaN counts as the largest.
struct alignas(16) VocabCandidate {
  float largest;
  float sum;
  int32_t position;
};

// A null pointer stands for an operand that is absent. For each row:
//
//   is_running    = num_remaining > 0
//   token         = the most likely, of equal ones the first
//   lengths      += is_running
//   num_remaining = is_running and not (token ends texts and not ignore_eos) ? num_remaining - 1 : 0
//   tokens        = is_running ? token : tokens
//   new_tokens    = is_running ? token : kNoToken
//   logprobs      = is_running ? log-softmax at token : 0
// and for the step that follows:
//   num_new       = num_remaining > 0
//   x             = embedding of the token; of a row that does not go on anything finite
//   cos, sin      = those of position `lengths`, or of the last one there is
//   h             = LayerNorm(x), rounded: as `linear` makes it of x ahead of its product, bit for bit
// Without logits only the latter, of the tokens that are there.
struct ChooseTokenParams {
  int64_t rows;         // 1 to kLinearMaxRows
  int64_t model_dim;    // a multiple of 8; at most kAllReduceMaxNormLen with a group or with h
  int64_t local_vocab;  // of each rank: rank r has tokens from r * local_vocab on
  int64_t vocab_size;   // tokens of all ranks: those behind do not exist
  int64_t half_rotary_dim;
  int64_t num_positions;
  DataType dtype;  // of embedding, LayerNorm's scale and bias, and h
  float epsilon;

  const float* logits;    // [rows, local_vocab]
  const void* embedding;  // [local_vocab, model_dim] dtype
  const float* all_cos;   // [num_positions, half_rotary_dim]
  const float* all_sin;
  const bool* ignore_eos;  // [rows]
  int32_t eos_token_ids[kMaxEosTokens];
  int64_t num_eos_tokens;
  const void* ln_scale;  // [model_dim], with h; CUDA
  const void* ln_bias;
  bool prefetch_parameters;  // LayerNorm's, as LinearParams has it

  int32_t* tokens;  // [rows], updated in place
  int32_t* lengths;
  int32_t* num_remaining;

  int32_t* num_new;  // [rows]
  float* x;          // [rows, model_dim]
  float* cos;        // [rows, half_rotary_dim]
  float* sin;
  void* h;              // [rows, model_dim]
  int32_t* new_tokens;  // of row b at b * new_stride
  float* logprobs;      // likewise
  int64_t new_stride;

  VocabCandidate* candidates;  // scratch: [rows, NumVocabSlices]

  // The ranks that the vocabulary lies over. One that does not come makes logprobs NaN.
  const AllReduceGroup* group;
  int rank;
  int64_t timeout_ms;
};

inline int64_t NumVocabSlices(const ChooseTokenParams& params) {
  return (params.local_vocab + kVocabSlice - 1) / kVocabSlice;
}

// Returns null, or what is wrong with the parameters.
const char* CheckChooseToken(const ChooseTokenParams& params);

// CUDA: enqueues on `stream` (a cudaStream_t). Returns null, or a message of static lifetime.
const char* LaunchChooseToken(const ChooseTokenParams& params, void* stream);

// Host: without a group or LayerNorm; runs on the threads that `parallel_for` brings.
void ChooseTokenCpu(const ChooseTokenParams& params, const ParallelFor& parallel_for);

}  // namespace kogpt

#endif  // CUSTOM_OPS_CHOOSE_TOKEN_H_
