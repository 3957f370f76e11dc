// The most likely token of each row and what the next step begins with, in two kernels:
//
//   candidates   a warp takes a slice of a row's logits, which the product ahead has just left in the
//                L2: the largest, its place and the sum of the exponentials, without a barrier.
//   choose       a block a row. Each warp combines all of the row's slices by itself, in one order, so
//                that again no barrier stands before the embedding's row is read. Where the vocabulary
//                lies over several ranks, each sends its candidate together with that candidate's
//                embedding, which only it has, in one exchange: a second trip to fetch the winner's
//                would cost as much as the first.
//
// At the beginning of a call of several steps the second kernel runs alone, with given tokens.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "choose_token.h"
#include "cuda_common.cuh"
#include "exchange.cuh"
#include "linear_prepare.cuh"

namespace kogpt {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kSliceWarps = 4;  // of a block, a slice each
constexpr int kVectors = kVocabSlice / (4 * kWarpSize);
static_assert(kVectors * 4 * kWarpSize == kVocabSlice);

struct CandidatesArgs {
  const float* logits;
  VocabCandidate* candidates;
  int local_vocab;
  int end;  // of the tokens that exist
  int num_slices;
};

struct ChooseArgs {
  const void* embedding;
  const float* all_cos;
  const float* all_sin;
  const bool* ignore_eos;
  const void* ln_scale;
  const void* ln_bias;
  const VocabCandidate* candidates;
  int32_t* tokens;
  int32_t* lengths;
  int32_t* num_remaining;
  int32_t* num_new;
  float* x;
  float* cos;
  float* sin;
  void* h;
  int32_t* new_tokens;
  float* logprobs;
  int new_stride;
  int model_dim;
  int local_vocab;
  int num_slices;
  int half_rotary_dim;
  int num_positions;
  int num_eos_tokens;
  bool prefetch_parameters;
  float epsilon;
  int32_t eos_token_ids[kMaxEosTokens];
  ExchangeArgs exchange;
};

// Integers in the order of logits: NaN above all, and zeros equal.
__device__ __forceinline__ uint32_t OrderOf(float value) {
  if (isnan(value)) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float ValueOf(uint32_t order) {
  return __uint_as_float((order & 0x80000000u) != 0 ? order ^ 0x80000000u : ~order);
}

__device__ __forceinline__ float FiniteOrZero(float value) {
  return isfinite(value) ? value : 0.0f;
}

// The largest value seen so far, and where it was seen first.
struct Best {
  uint32_t order = 0;
  int position = 0x7fffffff;

  __device__ __forceinline__ void Add(float value, int at) {
    const uint32_t other = OrderOf(value);
    if (other > order || (other == order && at < position)) {
      order = other;
      position = at;
    }
  }

  // That of all lanes, in all of them.
  __device__ __forceinline__ void AddLanes() {
    const uint32_t largest = __reduce_max_sync(kAllLanes, order);
    position = __reduce_min_sync(kAllLanes, order == largest ? position : 0x7fffffff);
    order = largest;
  }
};

// A sum of exponentials, relative to that of the largest exponent. Exponents of -inf add nothing.
struct ExpSum {
  float largest = -INFINITY;
  float sum = 0.0f;

  __device__ __forceinline__ void Add(float exponent, float count) {
    const float all = fmaxf(largest, exponent);
    const float offset = FiniteOrZero(all);
    sum = sum * expf(largest - offset) + count * expf(exponent - offset);
    largest = all;
  }

  __device__ __forceinline__ float Log() const { return FiniteOrZero(largest) + logf(sum); }
};

__global__ void __launch_bounds__(kSliceWarps* kWarpSize)
    VocabCandidatesKernel(const __grid_constant__ CandidatesArgs args) {
  LaunchDependents();
  WaitForDependency();
  const int slice = blockIdx.x * kSliceWarps + threadIdx.x / kWarpSize;
  if (slice >= args.num_slices) return;
  const int lane = threadIdx.x % kWarpSize;
  const int row = blockIdx.y;
  const float* const logits = args.logits + static_cast<int64_t>(row) * args.local_vocab;
  const bool is_aligned = args.local_vocab % 4 == 0;
  float values[kVectors][4];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int first = slice * static_cast<int>(kVocabSlice) + 4 * (i * kWarpSize + lane);
    if (is_aligned && first + 4 <= args.end) {
      const float4 four = __ldcg(reinterpret_cast<const float4*>(logits + first));
      values[i][0] = four.x, values[i][1] = four.y, values[i][2] = four.z, values[i][3] = four.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[i][j] = first + j < args.end ? __ldcg(logits + first + j) : -INFINITY;
      }
    }
  }
  Best best;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      best.Add(values[i][j],
               slice * static_cast<int>(kVocabSlice) + 4 * (i * kWarpSize + lane) + j);
    }
  }
  best.AddLanes();
  const float largest = ValueOf(best.order);
  const float offset = FiniteOrZero(largest);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += expf(values[i][j] - offset);
  }
  sum = WarpReduce(sum, Plus());
  if (lane == 0) {
    const float4 candidate = make_float4(largest, sum, __int_as_float(best.position), 0.0f);
    __stcg(reinterpret_cast<float4*>(args.candidates) +
               static_cast<int64_t>(row) * args.num_slices + slice,
           candidate);
  }
}

// The most likely of this rank's tokens.
struct Candidate {
  float largest;
  float log_sum;
  int position;  // in the rank's shard
};

// Combines a row's slices; each warp does, with the same bits.
__device__ __forceinline__ Candidate CombineSlices(const VocabCandidate* slices, int num_slices) {
  constexpr int kSlicesAtOnce = 4;  // of a lane: those of 65,536 tokens
  Best best;
  ExpSum exp_sum;
  for (int first = threadIdx.x % kWarpSize; first < num_slices;
       first += kSlicesAtOnce * kWarpSize) {
    float4 some[kSlicesAtOnce];
#pragma unroll
    for (int i = 0; i < kSlicesAtOnce; ++i) {
      const int slice = first + i * kWarpSize;
      some[i] = slice < num_slices ? __ldcg(reinterpret_cast<const float4*>(slices) + slice)
                                   : make_float4(-INFINITY, 0.0f, __int_as_float(0x7fffffff), 0.0f);
    }
#pragma unroll
    for (int i = 0; i < kSlicesAtOnce; ++i) {
      best.Add(some[i].x, __float_as_int(some[i].z));
      exp_sum.Add(some[i].x, some[i].y);
    }
  }
  best.AddLanes();
  const float largest = ValueOf(best.order);
  const float offset = FiniteOrZero(largest);
  const float sum = WarpReduce(exp_sum.sum * expf(exp_sum.largest - offset), Plus());
  return {largest, offset + logf(sum), best.position};
}

template <typename T>
__device__ __forceinline__ void LoadEmbedding(const ChooseArgs& args, int position, int vector,
                                              float (&values)[8]) {
  const T* const row =
      static_cast<const T*>(args.embedding) + static_cast<int64_t>(position) * args.model_dim;
  Unpack<T>(__ldcg(reinterpret_cast<const uint4*>(row) + vector), values);
}

__device__ __forceinline__ void StoreX(const ChooseArgs& args, int vector,
                                       const float (&values)[8]) {
  float4* const x =
      reinterpret_cast<float4*>(args.x + static_cast<int64_t>(blockIdx.x) * args.model_dim) +
      2 * vector;
  __stcg(x, make_float4(values[0], values[1], values[2], values[3]));
  __stcg(x + 1, make_float4(values[4], values[5], values[6], values[7]));
}

// Gives `candidate` and `values`, a part of its embedding, to the other ranks, and takes those of the
// most likely of all; `position` becomes the token, `log_sum` that over all ranks. By warps: the thread
// with number t carries number t % 3 of the candidate. False if a rank does not come.
__device__ __forceinline__ bool MeetRanks(const ChooseArgs& args, Exchange<ByRow>& exchange,
                                          Candidate* candidate, float (&values)[8]) {
  constexpr int kNumber = ByRow::kValues;  // the slot
  static_assert(kNumber + 1 == Exchange<ByRow>::kSlots);
  float own[kNumber + 1];
#pragma unroll
  for (int i = 0; i < kNumber; ++i) own[i] = values[i];
  const int carried = threadIdx.x % 3;
  own[kNumber] = carried == 0   ? candidate->largest
                 : carried == 1 ? candidate->log_sum
                                : __int_as_float(candidate->position);
  exchange.Tell(own);
  const int warp = threadIdx.x / kWarpSize;
  bool is_whole = true;
  uint32_t largest_order = 0;
  ExpSum exp_sum;
  for (int rank = 0; rank < args.exchange.num_ranks; ++rank) {
    float heard[kNumber + 1];
    bool is_there = true;
    if (rank == args.exchange.rank) {
#pragma unroll
      for (int i = 0; i <= kNumber; ++i) heard[i] = own[i];
    } else {
      is_there = exchange.Hear(rank, heard);
    }
    is_whole = __all_sync(kAllLanes, is_there) && is_whole;
    if (!is_whole) continue;
    // Of the warp's lanes (i + warp) % 3 is the first that carries number i.
    const float largest = __shfl_sync(kAllLanes, heard[kNumber], warp % 3);
    const float log_sum = __shfl_sync(kAllLanes, heard[kNumber], (1 + warp) % 3);
    const int position = __float_as_int(__shfl_sync(kAllLanes, heard[kNumber], (2 + warp) % 3));
    exp_sum.Add(log_sum, 1.0f);
    if (rank > 0 && OrderOf(largest) <= largest_order) continue;  // of equal ones the first
    largest_order = OrderOf(largest);
    candidate->largest = largest;
    candidate->position = rank * args.local_vocab + position;
#pragma unroll
    for (int i = 0; i < kNumber; ++i) values[i] = heard[i];
  }
  candidate->log_sum = exp_sum.Log();
  return is_whole;
}

// What a row carries from step to step; of a block only the first warp looks at it and writes it.
class RowState {
 public:
  __device__ __forceinline__ explicit RowState(const ChooseArgs& args)
      : args_(args),
        row_(blockIdx.x),
        length_(__ldcg(args.lengths + row_)),
        num_remaining_(__ldcg(args.num_remaining + row_)) {}

  // Of the position of the row's last token, with the one that is chosen if `is_counted`.
  __device__ __forceinline__ void StoreAngles(bool is_counted) const {
    const int length = length_ + (is_counted && num_remaining_ > 0 ? 1 : 0);
    const int64_t position = max(min(length, args_.num_positions - 1), 0);
    for (int i = threadIdx.x; i < args_.half_rotary_dim; i += kWarpSize) {
      const int64_t from = position * args_.half_rotary_dim + i;
      const int64_t to = static_cast<int64_t>(row_) * args_.half_rotary_dim + i;
      __stcg(args_.cos + to, __ldcg(args_.all_cos + from));
      __stcg(args_.sin + to, __ldcg(args_.all_sin + from));
    }
  }

  __device__ __forceinline__ void StoreNumNew() const {
    if (threadIdx.x == 0) __stcg(args_.num_new + row_, num_remaining_ > 0 ? 1 : 0);
  }

  __device__ __forceinline__ void Count(int token, float logprob) const {
    __syncwarp();  // all lanes have read the state
    if (threadIdx.x != 0) return;
    const bool is_running = num_remaining_ > 0;
    bool is_eos = false;
    for (int i = 0; i < args_.num_eos_tokens; ++i) {
      is_eos = is_eos || token == args_.eos_token_ids[i];
    }
    const bool goes_on = is_running && !(is_eos && !args_.ignore_eos[row_]);
    const int num_remaining = goes_on ? num_remaining_ - 1 : 0;
    if (is_running) {
      __stcg(args_.tokens + row_, token);
      __stcg(args_.lengths + row_, length_ + 1);
    }
    __stcg(args_.num_remaining + row_, num_remaining);
    __stcg(args_.num_new + row_, num_remaining > 0 ? 1 : 0);
    const int64_t to = static_cast<int64_t>(row_) * args_.new_stride;
    __stcg(args_.new_tokens + to, is_running ? token : kNoToken);
    __stcg(args_.logprobs + to, is_running ? logprob : 0.0f);
  }

 private:
  const ChooseArgs& args_;
  const int row_;
  const int length_;
  const int num_remaining_;
};

struct NoExchange {
  __device__ __forceinline__ explicit NoExchange(const ExchangeArgs&) {}
};

// `kIsGiven`: the tokens are. The registers leave room for it beside a block of the product ahead.
template <typename T, bool kIsGiven, bool kHasRanks>
__global__ void __maxnreg__(80) ChooseTokenKernel(const __grid_constant__ ChooseArgs args) {
  __shared__ Moments shared[kPrepareWarps];
  LaunchDependents();
  const int vector = threadIdx.x;
  const int num_vectors = args.model_dim / 8;
  const bool has_values = vector < num_vectors;
  uint4 ln_scale, ln_bias;
  const auto load_parameters = [&] {
    if (args.h == nullptr || !has_values) return;
    ln_scale = __ldcg(static_cast<const uint4*>(args.ln_scale) + vector);
    ln_bias = __ldcg(static_cast<const uint4*>(args.ln_bias) + vector);
  };
  if (args.prefetch_parameters) load_parameters();
  WaitForDependency();
  if (!args.prefetch_parameters) load_parameters();
  const RowState state(args);
  std::conditional_t<kHasRanks, Exchange<ByRow>, NoExchange> exchange(args.exchange);

  Candidate candidate;
  bool has_embedding = has_values;
  if constexpr (kIsGiven) {
    const int first = kHasRanks ? args.exchange.rank * args.local_vocab : 0;
    const int position = __ldcg(args.tokens + blockIdx.x) - first;
    const bool is_own = !kHasRanks || (position >= 0 && position < args.local_vocab);
    candidate = {is_own ? 0.0f : -INFINITY, 0.0f, max(min(position, args.local_vocab - 1), 0)};
    has_embedding = has_embedding && is_own;
  } else {
    candidate = CombineSlices(args.candidates + static_cast<int64_t>(blockIdx.x) * args.num_slices,
                              args.num_slices);
  }
  float values[8] = {};
  if (has_embedding) LoadEmbedding<T>(args, candidate.position, vector, values);
  const bool is_first_warp = threadIdx.x < kWarpSize;
  if (is_first_warp) state.StoreAngles(!kIsGiven);

  bool is_whole = true;
  if constexpr (kHasRanks) {
    // Some threads may have heard a rank that others have waited for in vain.
    is_whole = __syncthreads_and(MeetRanks(args, exchange, &candidate, values));
#pragma unroll
    for (float& value : values) value = is_whole ? value : NAN;
  }
  if (has_values) StoreX(args, vector, values);
  if (is_first_warp) {
    if constexpr (kIsGiven) {
      state.StoreNumNew();
    } else {
      state.Count(candidate.position, is_whole ? candidate.largest - candidate.log_sum : NAN);
    }
  }
  if (args.h != nullptr) {
    T* const h = static_cast<T*>(args.h) + static_cast<int64_t>(blockIdx.x) * args.model_dim;
    StoreLayerNorm<T>(values, has_values, args.model_dim, args.epsilon, ln_scale, ln_bias, shared,
                      reinterpret_cast<uint4*>(h) + vector);
  }
  if constexpr (kHasRanks) {
    exchange.Finish();
  } else {
    for (int next = vector + ByRow::kThreads; next < num_vectors; next += ByRow::kThreads) {
      LoadEmbedding<T>(args, candidate.position, next, values);
      StoreX(args, next, values);
    }
  }
}

const char* LaunchCandidates(const ChooseTokenParams& params, cudaStream_t stream) {
  CandidatesArgs args;
  args.logits = params.logits;
  args.candidates = params.candidates;
  args.local_vocab = static_cast<int>(params.local_vocab);
  args.end = static_cast<int>(std::clamp<int64_t>(
      params.vocab_size - params.rank * params.local_vocab, 0, params.local_vocab));
  args.num_slices = static_cast<int>(NumVocabSlices(params));
  const KernelTraits& traits = TraitsOf<VocabCandidatesKernel>([](bool) { return 0; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  const dim3 grid(static_cast<unsigned>((args.num_slices + kSliceWarps - 1) / kSliceWarps),
                  static_cast<unsigned>(params.rows));
  return MessageOf(
      Launch<VocabCandidatesKernel>(traits, grid, kSliceWarps * kWarpSize, 0, stream, args));
}

template <typename T>
const char* LaunchChoice(const ChooseTokenParams& params, cudaStream_t stream) {
  ChooseArgs args = {};
  args.embedding = params.embedding;
  args.all_cos = params.all_cos;
  args.all_sin = params.all_sin;
  args.ignore_eos = params.ignore_eos;
  args.ln_scale = params.ln_scale;
  args.ln_bias = params.ln_bias;
  args.candidates = params.candidates;
  args.tokens = params.tokens;
  args.lengths = params.lengths;
  args.num_remaining = params.num_remaining;
  args.num_new = params.num_new;
  args.x = params.x;
  args.cos = params.cos;
  args.sin = params.sin;
  args.h = params.h;
  args.new_tokens = params.new_tokens;
  args.logprobs = params.logprobs;
  args.new_stride = static_cast<int>(params.new_stride);
  args.model_dim = static_cast<int>(params.model_dim);
  args.local_vocab = static_cast<int>(params.local_vocab);
  args.num_slices = static_cast<int>(NumVocabSlices(params));
  args.half_rotary_dim = static_cast<int>(params.half_rotary_dim);
  args.num_positions = static_cast<int>(params.num_positions);
  args.num_eos_tokens = static_cast<int>(params.num_eos_tokens);
  args.prefetch_parameters = params.prefetch_parameters;
  args.epsilon = params.epsilon;
  std::copy(params.eos_token_ids, params.eos_token_ids + params.num_eos_tokens, args.eos_token_ids);
  if (params.group != nullptr) {
    args.exchange = MakeExchangeArgs(*params.group, params.rank, params.timeout_ms);
  }
  const auto launch = [&](auto is_given, auto has_ranks) {
    constexpr auto kKernel =
        ChooseTokenKernel<T, decltype(is_given)::value, decltype(has_ranks)::value>;
    const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return 0; });
    if (traits.error != cudaSuccess) return MessageOf(traits.error);
    const auto grid = static_cast<unsigned>(params.rows);
    return MessageOf(Launch<kKernel>(traits, dim3(grid), ByRow::kThreads, 0, stream, args));
  };
  const auto launch_over = [&](auto has_ranks) {
    return params.logits == nullptr ? launch(std::true_type(), has_ranks)
                                    : launch(std::false_type(), has_ranks);
  };
  return params.group == nullptr ? launch_over(std::false_type()) : launch_over(std::true_type());
}

}  // namespace

const char* LaunchChooseToken(const ChooseTokenParams& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.logits != nullptr) {
    if (const char* message = LaunchCandidates(params, cuda_stream)) return message;
  }
  switch (params.dtype) {
    case DataType::kFloat16:
      return LaunchChoice<__half>(params, cuda_stream);
    case DataType::kBfloat16:
      return LaunchChoice<__nv_bfloat16>(params, cuda_stream);
    default:
      return "choose_token on CUDA takes an embedding of float16 or bfloat16";
  }
}

}  // namespace kogpt
