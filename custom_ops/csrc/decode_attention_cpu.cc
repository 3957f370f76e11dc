// `decode_attention` on a CPU: a head of a row is one piece of work, which appends its own key and
// value first.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <memory>

#include "cpu_common.h"
#include "decode_attention.h"

#define KOGPT_ISA_BODY "decode_attention_cpu.inc"
#include "for_each_isa.inc"

namespace kogpt {
namespace {

using DecodeHeads = void (*)(const DecodeAttentionParams& params, int64_t begin, int64_t end,
                             float* scores);

DecodeHeads KernelFor(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::DecodeHeads;
  if (isa == Isa::kAvx2) return avx2::DecodeHeads;
#endif
  static_cast<void>(isa);
  return portable::DecodeHeads;
}

}  // namespace

void DecodeAttentionCpu(const DecodeAttentionParams& params, const ParallelFor& parallel_for) {
  const DecodeHeads kernel = KernelFor(HostIsa());
  // All tokens that a row can hold, and the rest of the last vector.
  const int64_t num_scores = params.max_pages * params.page_len + 16;
  parallel_for(params.batch * params.num_heads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scores(new float[num_scores]);
    kernel(params, begin, end, scores.get());
  });
}

}  // namespace kogpt
