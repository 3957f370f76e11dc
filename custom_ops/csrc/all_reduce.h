// Sums over the GPUs of one process, of as few values as a decode step has: each GPU writes its part
// into the memory of the others, over NVLink, and adds up what the others have written into its own.
//
// Raw pointers and a stream: no header of XLA or of another framework here.
#ifndef CUSTOM_OPS_ALL_REDUCE_H_
#define CUSTOM_OPS_ALL_REDUCE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "linear.h"
#include "op_common.h"

namespace kogpt {

inline constexpr int kAllReduceMaxRanks = 8;
inline constexpr int64_t kAllReduceMaxValues = int64_t{1} << 19;
inline constexpr int64_t kAllReduceMaxNormLen = 4096;  // of a row whose LayerNorm follows

// What ranks that add up their parts know of each other; made once for each group of devices and never
// freed. Calls of one group follow one another on each of its devices in the same order.
class AllReduceGroup;

// The group of these CUDA devices, rank by rank, made at the first call: memory on each that the
// others write to. Any thread; a group that is there is found without waiting for one that is being
// made. Null with `error` set where the devices are not linked by NVLink, or one is named twice.
const AllReduceGroup* FindAllReduceGroup(const std::vector<int>& devices, std::string* error);

// The group of the current device, of `devices`, groups of `group_size` one behind the other, and this
// device's rank in it. Null with `error` set where there is none, or where an earlier call of the group
// has waited for one of its devices in vain.
const AllReduceGroup* FindOwnGroup(const int64_t* devices, size_t num_devices, int64_t group_size,
                                   int* rank, std::string* error);

// Ranks that share a device, each with a stream of its own: for tests on one GPU. The caller keeps it.
const AllReduceGroup* MakeAllReduceGroup(const std::vector<int>& devices, std::string* error);

// A null pointer stands for an operand that is absent.
//
//   y = residual + (x of rank 0 + x of rank 1 + ...) + bias
//
// in this order and in f32 on every rank, so that all have the same bits. And with ln_scale
//
//   h = LayerNorm(y), rounded to h_dtype: as `linear` makes it of y ahead of its product, bit for bit
struct AllReduceParams {
  int64_t rows;
  int64_t row_len;        // a multiple of 4; rows * row_len at most kAllReduceMaxValues
  DataType bias_dtype;    // kFloat32, kFloat16 or kBfloat16
  LinearParts x;          // [rows, row_len], this rank's part
  const void* bias;       // [row_len] bias_dtype
  const float* residual;  // [rows, row_len]
  float* y;               // [rows, row_len]

  // At most kLinearMaxRows rows, of a multiple of 8 values, at most kAllReduceMaxNormLen.
  DataType h_dtype;      // kFloat16 or kBfloat16: of LayerNorm's scale and bias, too
  const void* ln_scale;  // [row_len]
  const void* ln_bias;   // [row_len]
  void* h;               // [rows, row_len] h_dtype
  float epsilon;

  // bias, LayerNorm's scale and bias and the scale of `x` may be read before the kernels ahead in the
  // stream have finished.
  bool prefetch_bias;

  const AllReduceGroup* group;
  int rank;
  // After so long without another rank's part the kernel gives up: y is NaN, and so is that of all
  // later calls of the group.
  int64_t timeout_ms;
};

// Returns null, or what is wrong with the parameters.
const char* CheckAllReduce(const AllReduceParams& params);

// The device that an earlier call of the group has waited for in vain, or -1.
int MissingDevice(const AllReduceGroup& group);

// Enqueues on `stream` (a cudaStream_t) of the rank's device. Returns null, or a message of static
// lifetime.
const char* LaunchAllReduce(const AllReduceParams& params, void* stream);

// Why this process cannot run it, or null: CUDA must load its modules eagerly, since a kernel that is
// loaded late may wait for one that waits for it. Starts CUDA.
const char* AllReduceProcessProblem();

}  // namespace kogpt

#endif  // CUSTOM_OPS_ALL_REDUCE_H_
