// Which instruction set the Host implementations use, and two C functions for `kogpt info` and for
// tests.
#include "cpu_common.h"

#include <atomic>

namespace kogpt {
namespace {

Isa DetectIsa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return Isa::kPortable;
  }
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has_avx512 ? Isa::kAvx512 : Isa::kAvx2;
#else
  return Isa::kPortable;
#endif
}

std::atomic<int>& LimitedIsa() {
  static std::atomic<int> isa{static_cast<int>(DetectIsa())};
  return isa;
}

}  // namespace

Isa HostIsa() { return static_cast<Isa>(LimitedIsa().load(std::memory_order_relaxed)); }

}  // namespace kogpt

// The libraries are compiled with hidden visibility.
#define KOGPT_EXPORT __attribute__((visibility("default")))

// The name of the instruction set in use.
extern "C" KOGPT_EXPORT const char* KogptOpsHostIsa() {
  static constexpr const char* kNames[] = {"portable", "avx2", "avx512"};
  return kNames[static_cast<int>(kogpt::HostIsa())];
}

// Uses at most the given one of the names above, by its index, from the next call on; so that tests
// reach all of them.
extern "C" KOGPT_EXPORT void KogptOpsLimitHostIsa(int limit) {
  const int best = static_cast<int>(kogpt::DetectIsa());
  kogpt::LimitedIsa().store(limit < 0 ? 0 : limit < best ? limit : best, std::memory_order_relaxed);
}
