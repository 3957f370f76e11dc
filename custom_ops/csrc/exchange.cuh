// What ranks tell each other within a kernel: each writes into the memory of the others.
//
//   message   16 bytes, three values and the number of the call, written and read at once (PTX ISA:
//             an access of type b128 is one): a message says itself that it is there, and nothing is
//             waited for but the messages. That is what NCCL's protocol LL does with 8 bytes.
//   inbox     of each rank, two for each other rank, of which calls take turns: who sends its part of
//             call n + 2 has all parts of call n + 1, whose senders had read theirs of call n.
//   call      a block counts its own, on all ranks alike. The number is in device memory, where a
//             CUDA graph that is launched again finds the next one.
//   a part that does not come: the kernel gives up after a while, tells the host and the other ranks,
//             and says so to its caller.
#ifndef CUSTOM_OPS_EXCHANGE_CUH_
#define CUSTOM_OPS_EXCHANGE_CUH_

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "all_reduce.h"
#include "cuda_common.cuh"
#include "linear_prepare.cuh"

namespace kogpt {

// A kernel's shape: threads of a block, and how many values each has.
struct Flat {  // an array's values one after another
  static constexpr int kThreads = 128;
  static constexpr int kValues = 12;
  static constexpr int kMaxBlocks =
      (kAllReduceMaxValues + kThreads * kValues - 1) / (kThreads * kValues);
};
struct ByRow {  // a block a row, whose LayerNorm follows
  static constexpr int kThreads = kPrepareThreads;
  static constexpr int kValues = 8;
  static constexpr int kMaxBlocks = kLinearMaxRows;
};
static_assert(ByRow::kThreads * ByRow::kValues == kAllReduceMaxNormLen);

template <typename Shape>
constexpr int kMessages = (Shape::kValues + 2) / 3;  // of a thread for each rank
template <typename Shape>
constexpr int64_t kInboxBytes =
    int64_t{16} * Shape::kMaxBlocks * Shape::kThreads * kMessages<Shape>;

// A rank's memory, in bytes: whether the group has failed, and for each shape, whose calls do not mix,
// the blocks' numbers of their last calls and the inboxes [turn, from rank, message].
inline constexpr int64_t kExchangeAlignment = 128;
template <typename Shape>
constexpr int64_t kNumbersBytes = (Shape::kMaxBlocks * sizeof(uint32_t) + kExchangeAlignment - 1) /
                                  kExchangeAlignment * kExchangeAlignment;
inline constexpr int64_t kExchangeFailedAt = 0;

template <typename Shape>
constexpr __host__ __device__ int64_t NumbersAt(int num_ranks) {
  const int64_t of_flat = kNumbersBytes<Flat> + 2 * num_ranks * kInboxBytes<Flat>;
  return kExchangeAlignment + (std::is_same_v<Shape, Flat> ? 0 : of_flat);
}

inline int64_t ExchangeBytes(int num_ranks) {
  return NumbersAt<ByRow>(num_ranks) + kNumbersBytes<ByRow> + 2 * num_ranks * kInboxBytes<ByRow>;
}

class AllReduceGroup {
 public:
  std::vector<int> devices;
  std::vector<unsigned char*> memory;
  // In the host's memory, where kernels write it: for each rank 0, or 1 + the rank that did not come.
  int* missing = nullptr;
};

// What a kernel needs to know of its group.
struct ExchangeArgs {
  int rank;
  int num_ranks;
  uint64_t timeout_ns;
  int* missing;
  unsigned char* memory[kAllReduceMaxRanks];
};

inline ExchangeArgs MakeExchangeArgs(const AllReduceGroup& group, int rank, int64_t timeout_ms) {
  ExchangeArgs args = {};
  args.rank = rank;
  args.num_ranks = static_cast<int>(group.devices.size());
  args.timeout_ns = static_cast<uint64_t>(timeout_ms) * 1000000;
  args.missing = group.missing;
  std::copy(group.memory.begin(), group.memory.end(), args.memory);
  return args;
}

struct Message {
  float values[3];
  uint32_t number;
};

__device__ __forceinline__ void Send(unsigned char* to, const Message& message) {
  const uint64_t low = static_cast<uint64_t>(__float_as_uint(message.values[1])) << 32 |
                       __float_as_uint(message.values[0]);
  const uint64_t high =
      static_cast<uint64_t>(message.number) << 32 | __float_as_uint(message.values[2]);
  asm volatile(
      "{\n.reg .b128 message;\nmov.b128 message, {%1, %2};\n"
      "st.relaxed.sys.global.b128 [%0], message;\n}\n" ::"l"(to),
      "l"(low), "l"(high)
      : "memory");
}

__device__ __forceinline__ Message Receive(const unsigned char* from) {
  uint64_t low, high;
  asm volatile(
      "{\n.reg .b128 message;\nld.relaxed.sys.global.b128 message, [%2];\n"
      "mov.b128 {%0, %1}, message;\n}\n"
      : "=l"(low), "=l"(high)
      : "l"(from)
      : "memory");
  return {{__uint_as_float(static_cast<uint32_t>(low)),
           __uint_as_float(static_cast<uint32_t>(low >> 32)),
           __uint_as_float(static_cast<uint32_t>(high))},
          static_cast<uint32_t>(high >> 32)};
}

__device__ __forceinline__ uint64_t Nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %globaltimer;\n" : "=l"(time));
  return time;
}

__device__ __forceinline__ uint32_t* FailedFlag(unsigned char* memory) {
  return reinterpret_cast<uint32_t*>(memory + kExchangeFailedAt);
}

// A block's part of a call.
template <typename Shape>
class Exchange {
 public:
  // Behind what the kernels ahead have written.
  __device__ __forceinline__ explicit Exchange(const ExchangeArgs& args)
      : args_(args),
        own_(args.memory[args.rank]),
        last_number_(reinterpret_cast<uint32_t*>(own_ + NumbersAt<Shape>(args.num_ranks)) +
                     blockIdx.x),
        number_(__ldcg(last_number_) + 1),
        is_whole_(*const_cast<volatile uint32_t*>(FailedFlag(own_)) == 0) {}

  // A thread's values: three a message.
  static constexpr int kSlots = 3 * kMessages<Shape>;

  // Gives the other ranks' threads of this number this one's values.
  __device__ __forceinline__ void Tell(const float (&values)[kSlots]) const {
    if (!is_whole_) return;
    // Each rank begins with another one, so that not all write to one at the same time.
    for (int step = 1; step < args_.num_ranks; ++step) {
      const int to = (args_.rank + step) % args_.num_ranks;
      unsigned char* const inbox = args_.memory[to] + InboxOffset(args_.rank);
#pragma unroll
      for (int i = 0; i < kNum; ++i) {
        Send(inbox + 16 * i * Shape::kThreads,
             {{values[3 * i], values[3 * i + 1], values[3 * i + 2]}, number_});
      }
    }
  }

  // Those of another rank's thread of this number; false if they do not come, and from then on.
  __device__ __forceinline__ bool Hear(int from, float (&values)[kSlots]) {
    if (!is_whole_) return false;
    const unsigned char* const inbox = own_ + InboxOffset(from);
    constexpr uint32_t kPollsPerLook = 1024;
    uint64_t begin = 0;
    Message messages[kNum];
    for (uint32_t polls = 1;; ++polls) {
      bool all_there = true;
#pragma unroll
      for (int i = 0; i < kNum; ++i) {
        messages[i] = Receive(inbox + 16 * i * Shape::kThreads);
        all_there = all_there && messages[i].number == number_;
      }
      if (all_there) break;
      if (polls % kPollsPerLook == 0 && HasFailed(from, &begin)) {
        is_whole_ = false;
        return false;
      }
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) values[i] = messages[i / 3].values[i % 3];
    return true;
  }

  // The sums over all ranks, in their order, of this rank's values and those of the others; false if
  // these do not come.
  __device__ __forceinline__ bool Sum(const float (&values)[Shape::kValues],
                                      float (&sums)[Shape::kValues]) {
    float slots[kSlots] = {};
#pragma unroll
    for (int i = 0; i < Shape::kValues; ++i) slots[i] = values[i];
    Tell(slots);
#pragma unroll
    for (int i = 0; i < Shape::kValues; ++i) sums[i] = 0.0f;
    for (int from = 0; is_whole_ && from < args_.num_ranks; ++from) {
      if (from != args_.rank) {
        if (!Hear(from, slots)) break;
#pragma unroll
        for (int i = 0; i < Shape::kValues; ++i) sums[i] += slots[i];
      } else {
#pragma unroll
        for (int i = 0; i < Shape::kValues; ++i) sums[i] += values[i];
      }
    }
    return is_whole_;
  }

  // All threads of the block.
  __device__ __forceinline__ void Finish() const {
    __syncthreads();  // all have read the number
    if (threadIdx.x == 0) __stcg(last_number_, number_);
  }

 private:
  static constexpr int kNum = kMessages<Shape>;

  // A block's messages lie together, those of neighbouring threads side by side.
  __device__ __forceinline__ int64_t InboxOffset(int from) const {
    const int64_t inbox = static_cast<int64_t>(number_ % 2) * args_.num_ranks + from;
    return NumbersAt<Shape>(args_.num_ranks) + kNumbersBytes<Shape> + inbox * kInboxBytes<Shape> +
           16 * static_cast<int64_t>(blockIdx.x * (Shape::kThreads * kNum) + threadIdx.x);
  }

  // Whether the group has, or does so because it has been waited too long since `begin`.
  __device__ __forceinline__ bool HasFailed(int from, uint64_t* begin) const {
    const uint64_t now = Nanoseconds();
    if (*begin == 0) *begin = now;
    if (*const_cast<volatile uint32_t*>(FailedFlag(own_)) != 0) return true;
    if (now - *begin < args_.timeout_ns) return false;
    *const_cast<volatile int*>(args_.missing + args_.rank) = 1 + from;
    for (int rank = 0; rank < args_.num_ranks; ++rank) {
      *const_cast<volatile uint32_t*>(FailedFlag(args_.memory[rank])) = 1;
    }
    __threadfence_system();
    return true;
  }

  const ExchangeArgs& args_;
  unsigned char* const own_;
  uint32_t* const last_number_;
  const uint32_t number_;
  bool is_whole_;
};

}  // namespace kogpt

#endif  // CUSTOM_OPS_EXCHANGE_CUH_
