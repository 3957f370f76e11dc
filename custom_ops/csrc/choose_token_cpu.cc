// `choose_token` on a CPU: slices of the logits first, then rows.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "choose_token.h"
#include "cpu_common.h"

#define KOGPT_ISA_BODY "choose_token_cpu.inc"
#include "for_each_isa.inc"

namespace kogpt {
namespace {

struct ChooseKernels {
  void (*find_candidates)(const ChooseTokenParams& params, int64_t begin, int64_t end);
  void (*embed)(const ChooseTokenParams& params, int64_t token, float* x);
};

ChooseKernels KernelsFor(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return {avx512::FindCandidates, avx512::Embed};
  if (isa == Isa::kAvx2) return {avx2::FindCandidates, avx2::Embed};
#endif
  static_cast<void>(isa);
  return {portable::FindCandidates, portable::Embed};
}

struct Choice {
  int32_t token;
  float logprob;
};

Choice CombineSlices(const VocabCandidate* slices, int64_t num_slices) {
  VocabCandidate best = slices[0];
  for (int64_t i = 1; i < num_slices && !std::isnan(best.largest); ++i) {
    if (slices[i].largest > best.largest || std::isnan(slices[i].largest)) best = slices[i];
  }
  float sum = 0.0f;
  for (int64_t i = 0; i < num_slices; ++i) {
    sum += slices[i].sum * std::exp(slices[i].largest - best.largest);
  }
  // Of a largest that is not finite nothing can be subtracted.
  const bool is_finite = std::isfinite(best.largest);
  return {best.position, is_finite ? best.largest - (best.largest + std::log(sum)) : NAN};
}

void Count(const ChooseTokenParams& params, int64_t row, const Choice& choice) {
  const bool is_running = params.num_remaining[row] > 0;
  const int32_t* const end = params.eos_token_ids + params.num_eos_tokens;
  const bool is_eos = std::find(params.eos_token_ids, end, choice.token) != end;
  const bool goes_on = is_running && !(is_eos && !params.ignore_eos[row]);
  if (is_running) {
    params.tokens[row] = choice.token;
    ++params.lengths[row];
  }
  params.num_remaining[row] = goes_on ? params.num_remaining[row] - 1 : 0;
  params.new_tokens[row * params.new_stride] = is_running ? choice.token : kNoToken;
  params.logprobs[row * params.new_stride] = is_running ? choice.logprob : 0.0f;
}

}  // namespace

void ChooseTokenCpu(const ChooseTokenParams& params, const ParallelFor& parallel_for) {
  const ChooseKernels kernels = KernelsFor(HostIsa());
  const int64_t num_slices = NumVocabSlices(params);
  if (params.logits != nullptr) {
    parallel_for(params.rows * num_slices,
                 [&](int64_t begin, int64_t end) { kernels.find_candidates(params, begin, end); });
  }
  for (int64_t row = 0; row < params.rows; ++row) {
    if (params.logits != nullptr) {
      Count(params, row, CombineSlices(params.candidates + row * num_slices, num_slices));
    }
    params.num_new[row] = params.num_remaining[row] > 0 ? 1 : 0;
    const int64_t token = std::clamp<int64_t>(params.tokens[row], 0, params.local_vocab - 1);
    kernels.embed(params, token, params.x + row * params.model_dim);
    const int64_t position = std::clamp<int64_t>(params.lengths[row], 0, params.num_positions - 1);
    const int64_t half_dim = params.half_rotary_dim;
    std::copy_n(params.all_cos + position * half_dim, half_dim, params.cos + row * half_dim);
    std::copy_n(params.all_sin + position * half_dim, half_dim, params.sin + row * half_dim);
  }
}

}  // namespace kogpt
