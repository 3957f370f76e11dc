// What every op shares on both sides: element types, the semaphores' number, the loop over threads.
#ifndef CUSTOM_OPS_OP_COMMON_H_
#define CUSTOM_OPS_OP_COMMON_H_

#include <cstdint>
#include <functional>

namespace kogpt {

enum class DataType : int32_t { kFloat32, kFloat16, kBfloat16, kInt8 };

// Ints in the semaphore array that an op's CUDA kernels count with. All zero before and after every
// kernel.
inline constexpr int64_t kNumSemaphores = 65536;
// Of these the last ones, for marks (linear.h): a count of blocks, and the mark that the last one of
// them has written.
inline constexpr int64_t kNumMarkSemaphores = 2;

// Calls body(begin, end) over disjoint ranges that cover [0, count), on several threads, and
// returns when all have ended.
using ParallelFor =
    std::function<void(int64_t count, const std::function<void(int64_t begin, int64_t end)>& body)>;

}  // namespace kogpt

#endif  // CUSTOM_OPS_OP_COMMON_H_
