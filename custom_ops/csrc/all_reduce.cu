// A one-shot all-reduce: every rank sends its part to all others and adds up all parts itself.
//
//   message   16 bytes, three values and the number of the call, written and read at once (PTX ISA:
//             an access of type b128 is one): a message says itself that it is there, and nothing is
//             waited for but the messages. That is what NCCL's protocol LL does with 8 bytes.
//   inbox     of each rank, two for each other rank, of which calls take turns: who sends its part of
//             call n + 2 has all parts of call n + 1, whose senders had read theirs of call n.
//   call      a block counts its own, on all ranks alike. The number is in device memory, where a
//             CUDA graph that is launched again finds the next one.
//   a part that does not come: the kernel gives up after a while, tells the host and the other ranks,
//             and gives NaN.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>

#include "all_reduce.h"
#include "cuda_common.cuh"
#include "linear_prepare.cuh"

namespace kogpt {
namespace {

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
constexpr int64_t kAlignment = 128;
template <typename Shape>
constexpr int64_t kNumbersBytes =
    (Shape::kMaxBlocks * sizeof(uint32_t) + kAlignment - 1) / kAlignment * kAlignment;
constexpr int64_t kFailedAt = 0;

template <typename Shape>
constexpr __host__ __device__ int64_t NumbersAt(int num_ranks) {
  const int64_t of_flat = kNumbersBytes<Flat> + 2 * num_ranks * kInboxBytes<Flat>;
  return kAlignment + (std::is_same_v<Shape, Flat> ? 0 : of_flat);
}

int64_t MemoryBytes(int num_ranks) {
  return NumbersAt<ByRow>(num_ranks) + kNumbersBytes<ByRow> + 2 * num_ranks * kInboxBytes<ByRow>;
}

}  // namespace

class AllReduceGroup {
 public:
  std::vector<int> devices;
  std::vector<unsigned char*> memory;
  // In the host's memory, where kernels write it: for each rank 0, or 1 + the rank that did not come.
  int* missing = nullptr;
};

namespace {

struct AllReduceArgs {
  const float* x;  // [splits, rows, x_stride]
  const float* x_scale;
  const void* bias;
  const float* residual;
  float* y;
  int splits;
  int x_stride;
  int num_values;
  int row_len;
  DataType bias_dtype;
  bool prefetch_parameters;
  int rank;
  int num_ranks;
  uint64_t timeout_ns;
  int* missing;
  unsigned char* memory[kAllReduceMaxRanks];
};

struct NormArgs {
  AllReduceArgs sum;
  const void* ln_scale;
  const void* ln_bias;
  void* h;
  float epsilon;
};

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
  return reinterpret_cast<uint32_t*>(memory + kFailedAt);
}

// A block's part of a call.
template <typename Shape>
class Exchange {
 public:
  // Behind what the kernels ahead have written.
  __device__ __forceinline__ explicit Exchange(const AllReduceArgs& args)
      : args_(args),
        own_(args.memory[args.rank]),
        last_number_(reinterpret_cast<uint32_t*>(own_ + NumbersAt<Shape>(args.num_ranks)) +
                     blockIdx.x),
        number_(__ldcg(last_number_) + 1),
        is_whole_(*const_cast<volatile uint32_t*>(FailedFlag(own_)) == 0) {}

  // The sums over all ranks, in their order, of this rank's values and those of the others; false if
  // these do not come.
  __device__ __forceinline__ bool Sum(const float (&values)[Shape::kValues],
                                      float (&sums)[Shape::kValues]) {
    if (is_whole_) {
      // Each rank begins with another one, so that not all write to one at the same time.
      for (int step = 1; step < args_.num_ranks; ++step) {
        const int to = (args_.rank + step) % args_.num_ranks;
        unsigned char* const inbox = args_.memory[to] + InboxOffset(args_.rank);
#pragma unroll
        for (int i = 0; i < kNum; ++i) {
          Message message = {{0.0f, 0.0f, 0.0f}, number_};
#pragma unroll
          for (int j = 0; j < 3; ++j) {
            if (3 * i + j < Shape::kValues) message.values[j] = values[3 * i + j];
          }
          Send(inbox + 16 * i * Shape::kThreads, message);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Shape::kValues; ++i) sums[i] = 0.0f;
    for (int from = 0; is_whole_ && from < args_.num_ranks; ++from) {
      if (from != args_.rank) {
        AddReceived(from, sums);
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

  __device__ __forceinline__ void AddReceived(int from, float (&sums)[Shape::kValues]) {
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
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < Shape::kValues; ++i) sums[i] += messages[i / 3].values[i % 3];
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

  const AllReduceArgs& args_;
  unsigned char* const own_;
  uint32_t* const last_number_;
  const uint32_t number_;
  bool is_whole_;
};

__device__ __forceinline__ void Copy(const float4& from, float* to) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}

// Four values of the bias from column `column` on.
__device__ __forceinline__ void LoadBias(const AllReduceArgs& args, int column, float* to) {
  const auto copy = [&](const auto* values) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = ToFloat(values[i]);
  };
  if (args.bias_dtype == DataType::kFloat32) {
    Copy(__ldcg(reinterpret_cast<const float4*>(static_cast<const float*>(args.bias) + column)),
         to);
    return;
  }
  const uint2 bits =
      __ldcg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(args.bias) + column));
  if (args.bias_dtype == DataType::kFloat16) {
    copy(reinterpret_cast<const __half*>(&bits));
  } else {
    copy(reinterpret_cast<const __nv_bfloat16*>(&bits));
  }
}

// A thread's terms, groups of four neighbouring values.
template <int kValues>
struct Terms {
  static constexpr int kGroups = kValues / 4;
  float bias[kValues] = {};
  float scale[kValues];
  float values[kValues] = {};
  float residual[kValues] = {};

  __device__ __forceinline__ Terms() {
#pragma unroll
    for (float& one : scale) one = 1.0f;
  }

  // Calls body(first of a group of four, where that lies in the array) for those that are there.
  template <typename Body>
  static __device__ __forceinline__ void ForEach(int first, int end, Body&& body) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (first + 4 * i < end) body(4 * i, first + 4 * i);
    }
  }

  __device__ __forceinline__ void LoadParameters(const AllReduceArgs& args, int first, int end) {
    ForEach(first, end, [&](int i, int at) {
      const int column = at % args.row_len;
      if (args.bias != nullptr) LoadBias(args, column, bias + i);
      if (args.x_scale != nullptr) {
        Copy(__ldcg(reinterpret_cast<const float4*>(args.x_scale + column)), scale + i);
      }
    });
  }

  // This rank's values, their parts added up in order, and the residual.
  __device__ __forceinline__ void Load(const AllReduceArgs& args, int first, int end) {
    const int64_t part_size = static_cast<int64_t>(args.num_values / args.row_len) * args.x_stride;
    constexpr int kPartsAtOnce = 4;
    for (int split = 0; split < args.splits; split += kPartsAtOnce) {
      float4 parts[kPartsAtOnce][kGroups];
#pragma unroll
      for (int j = 0; j < kPartsAtOnce; ++j) {
        ForEach(first, end, [&](int i, int at) {
          const int64_t from = (split + j) * part_size +
                               static_cast<int64_t>(at / args.row_len) * args.x_stride +
                               at % args.row_len;
          if (split + j < args.splits) {
            parts[j][i / 4] = __ldcg(reinterpret_cast<const float4*>(args.x + from));
          }
        });
      }
#pragma unroll
      for (int j = 0; j < kPartsAtOnce; ++j) {
        ForEach(first, end, [&](int i, int) {
          if (split + j >= args.splits) return;
          float part[4];
          Copy(parts[j][i / 4], part);
#pragma unroll
          for (int k = 0; k < 4; ++k) values[i + k] += part[k];
        });
      }
    }
    if (args.residual != nullptr) {
      ForEach(first, end, [&](int i, int at) {
        Copy(__ldcg(reinterpret_cast<const float4*>(args.residual + at)), residual + i);
      });
    }
  }
};

// A thread's values of y, from `first` on; written too.
template <typename Shape>
__device__ __forceinline__ void SumValues(const AllReduceArgs& args, int first, int end,
                                          Exchange<Shape>& exchange, Terms<Shape::kValues>& terms,
                                          float (&y)[Shape::kValues]) {
  terms.Load(args, first, end);
  if (!args.prefetch_parameters) terms.LoadParameters(args, first, end);
#pragma unroll
  for (int i = 0; i < Shape::kValues; ++i) {
    // Rounded as it is sent: not a part of the addition that follows.
    terms.values[i] = __fmul_rn(terms.values[i], terms.scale[i]);
  }
  const bool is_whole = exchange.Sum(terms.values, y);
#pragma unroll
  for (int i = 0; i < Shape::kValues; ++i) {
    y[i] = is_whole ? terms.residual[i] + y[i] + terms.bias[i] : __int_as_float(0x7fc00000);
  }
  terms.ForEach(first, end, [&](int i, int at) {
    __stcg(reinterpret_cast<float4*>(args.y + at), make_float4(y[i], y[i + 1], y[i + 2], y[i + 3]));
  });
}

__global__ void __launch_bounds__(Flat::kThreads)
    AllReduceKernel(const __grid_constant__ AllReduceArgs args) {
  LaunchDependents();
  const int first = (blockIdx.x * Flat::kThreads + threadIdx.x) * Flat::kValues;
  Terms<Flat::kValues> terms;
  if (args.prefetch_parameters) terms.LoadParameters(args, first, args.num_values);
  WaitForDependency();
  Exchange<Flat> exchange(args);
  float y[Flat::kValues];
  SumValues(args, first, args.num_values, exchange, terms, y);
  exchange.Finish();
}

// And LayerNorm of y, as PrepareKernel makes it ahead of a product, bit for bit. The registers leave
// room for it beside a block of the product ahead.
template <typename T>
__global__ void __maxnreg__(80) AllReduceNormKernel(const __grid_constant__ NormArgs args) {
  __shared__ Moments shared[kPrepareWarps];
  LaunchDependents();
  const AllReduceArgs& sum = args.sum;
  const int vector = threadIdx.x;
  const int begin = blockIdx.x * sum.row_len;
  const int end = begin + sum.row_len;
  const int first = begin + vector * ByRow::kValues;
  const bool has_values = first < end;
  Terms<ByRow::kValues> terms;
  uint4 ln_scale, ln_bias;
  const auto load_parameters = [&] {
    if (!has_values) return;
    ln_scale = __ldcg(static_cast<const uint4*>(args.ln_scale) + vector);
    ln_bias = __ldcg(static_cast<const uint4*>(args.ln_bias) + vector);
  };
  if (sum.prefetch_parameters) {
    terms.LoadParameters(sum, first, end);
    load_parameters();
  }
  WaitForDependency();
  if (!sum.prefetch_parameters) load_parameters();
  Exchange<ByRow> exchange(sum);
  float y[ByRow::kValues];
  SumValues(sum, first, end, exchange, terms, y);

  Moments moments;
  if (has_values) AddEight(y, &moments);
  moments = CombineMoments(moments, shared);
  const float inverse_deviation = rsqrtf(moments.squares / sum.row_len + args.epsilon);
  if (has_values) {
    float scale[8], bias[8];
    Unpack<T>(ln_scale, scale);
    Unpack<T>(ln_bias, bias);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      y[i] = (y[i] - moments.mean) * inverse_deviation * scale[i] + bias[i];
    }
    __stcg(reinterpret_cast<uint4*>(static_cast<T*>(args.h) + begin) + vector, Pack<T>(y));
  }
  exchange.Finish();
}

// Makes devices able to write to each other's memory, this one to `peer`'s.
cudaError_t EnableAccess(int peer) {
  const cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
  if (error != cudaErrorPeerAccessAlreadyEnabled) return error;
  static_cast<void>(cudaGetLastError());
  return cudaSuccess;
}

// Zeros, by a stream of its own: kernels of other programs that are under way are not waited for.
cudaError_t Clear(void* memory, int64_t bytes) {
  cudaStream_t stream;
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(memory, 0, bytes, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  const cudaError_t destroyed = cudaStreamDestroy(stream);
  return error == cudaSuccess ? destroyed : error;
}

cudaError_t FillGroup(AllReduceGroup* group) {
  const int num_ranks = static_cast<int>(group->devices.size());
  for (const int device : group->devices) {
    cudaError_t error = cudaSetDevice(device);
    for (const int peer : group->devices) {
      if (error == cudaSuccess && peer != device) error = EnableAccess(peer);
    }
    unsigned char* memory = nullptr;
    if (error == cudaSuccess) error = cudaMalloc(&memory, MemoryBytes(num_ranks));
    if (memory != nullptr) group->memory.push_back(memory);
    if (error == cudaSuccess) error = Clear(memory, MemoryBytes(num_ranks));
    if (error != cudaSuccess) return error;
  }
  void* missing = nullptr;
  const cudaError_t error =
      cudaHostAlloc(&missing, num_ranks * sizeof(int), cudaHostAllocPortable | cudaHostAllocMapped);
  if (error != cudaSuccess) return error;
  group->missing = static_cast<int*>(missing);
  for (int rank = 0; rank < num_ranks; ++rank) group->missing[rank] = 0;
  return cudaSuccess;
}

}  // namespace

const AllReduceGroup* MakeAllReduceGroup(const std::vector<int>& devices, std::string* error) {
  const int num_ranks = static_cast<int>(devices.size());
  if (num_ranks < 1 || num_ranks > kAllReduceMaxRanks) {
    *error = "a group must have 1 to " + std::to_string(kAllReduceMaxRanks) + " devices, got " +
             std::to_string(num_ranks);
    return nullptr;
  }
  for (const int device : devices) {
    for (const int peer : devices) {
      if (peer == device) continue;
      // A message must arrive whole, which over PCIe nobody promises: the link must be one that
      // carries atomic operations, NVLink.
      int is_linked = 0;
      const cudaError_t status =
          cudaDeviceGetP2PAttribute(&is_linked, cudaDevP2PAttrNativeAtomicSupported, device, peer);
      if (status != cudaSuccess || is_linked == 0) {
        static_cast<void>(cudaGetLastError());
        *error = "CUDA devices " + std::to_string(device) + " and " + std::to_string(peer) +
                 " are not linked by NVLink";
        return nullptr;
      }
    }
  }
  auto group = std::make_unique<AllReduceGroup>();
  group->devices = devices;
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = FillGroup(group.get());
  const cudaError_t restored = cudaSetDevice(before);
  if (status == cudaSuccess) status = restored;
  if (status != cudaSuccess) {
    for (unsigned char* const memory : group->memory) static_cast<void>(cudaFree(memory));
    static_cast<void>(cudaGetLastError());
    *error = cudaGetErrorString(status);
    return nullptr;
  }
  return group.release();
}

const AllReduceGroup* FindAllReduceGroup(const std::vector<int>& devices, std::string* error) {
  static std::mutex making, mutex;  // calls of other groups go on while one is made
  static auto* const groups = new std::map<std::vector<int>, const AllReduceGroup*>();
  for (size_t i = 0; i < devices.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (devices[i] != devices[j]) continue;
      *error = "a group must have different devices, got " + std::to_string(devices[i]) + " twice";
      return nullptr;
    }
  }
  const auto find = [&]() -> const AllReduceGroup* {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = groups->find(devices);
    return found == groups->end() ? nullptr : found->second;
  };
  if (const AllReduceGroup* const group = find()) return group;
  const std::lock_guard<std::mutex> lock_making(making);
  if (const AllReduceGroup* const group = find()) return group;
  const AllReduceGroup* const group = MakeAllReduceGroup(devices, error);
  if (group == nullptr) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  (*groups)[devices] = group;
  return group;
}

int MissingDevice(const AllReduceGroup& group) {
  for (size_t rank = 0; rank < group.devices.size(); ++rank) {
    const int missing = static_cast<volatile int*>(group.missing)[rank];
    if (missing != 0) return group.devices[missing - 1];
  }
  return -1;
}

const AllReduceGroup* FindOwnGroup(const int64_t* devices, size_t num_devices, int64_t group_size,
                                   int* rank, std::string* error) {
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) {
    *error = cudaGetErrorString(status);
    return nullptr;
  }
  const int64_t* const found = std::find(devices, devices + num_devices, device);
  if (found == devices + num_devices) {
    *error = "devices must name CUDA device " + std::to_string(device) + ", which runs the call";
    return nullptr;
  }
  *rank = static_cast<int>((found - devices) % group_size);
  const std::vector<int> members(found - *rank, found - *rank + group_size);
  const AllReduceGroup* const group = FindAllReduceGroup(members, error);
  if (group == nullptr) return nullptr;
  const int missing = MissingDevice(*group);
  if (missing < 0) return group;
  *error = "CUDA device " + std::to_string(missing) +
           " did not come to an earlier sum in time, and this process can add up no more with it";
  return nullptr;
}

const char* LaunchAllReduce(const AllReduceParams& params, void* stream) {
  const AllReduceGroup& group = *params.group;
  AllReduceArgs args = {};
  args.num_ranks = static_cast<int>(group.devices.size());
  for (int rank = 0; rank < args.num_ranks; ++rank) args.memory[rank] = group.memory[rank];
  args.x = params.x.values;
  args.x_scale = params.x.scale;
  args.splits = static_cast<int>(params.x.splits);
  args.x_stride = static_cast<int>(params.x.stride);
  args.bias = params.bias;
  args.residual = params.residual;
  args.y = params.y;
  args.num_values = static_cast<int>(params.rows * params.row_len);
  args.row_len = static_cast<int>(params.row_len);
  args.bias_dtype = params.bias_dtype;
  args.prefetch_parameters = params.prefetch_bias;
  args.rank = params.rank;
  args.timeout_ns = static_cast<uint64_t>(params.timeout_ms) * 1000000;
  args.missing = group.missing;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.ln_scale == nullptr) {
    const KernelTraits& traits = TraitsOf<AllReduceKernel>([](bool) { return 0; });
    if (traits.error != cudaSuccess) return MessageOf(traits.error);
    constexpr int kBlockValues = Flat::kThreads * Flat::kValues;
    const int grid = (args.num_values + kBlockValues - 1) / kBlockValues;
    return MessageOf(
        Launch<AllReduceKernel>(traits, dim3(grid), Flat::kThreads, 0, cuda_stream, args));
  }
  const NormArgs norm = {args, params.ln_scale, params.ln_bias, params.h, params.epsilon};
  const auto launch = [&](auto of_type) {
    constexpr auto kKernel = AllReduceNormKernel<decltype(of_type)>;
    const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return 0; });
    if (traits.error != cudaSuccess) return MessageOf(traits.error);
    const auto grid = static_cast<unsigned>(params.rows);
    return MessageOf(Launch<kKernel>(traits, dim3(grid), ByRow::kThreads, 0, cuda_stream, norm));
  };
  return params.h_dtype == DataType::kFloat16 ? launch(__half()) : launch(__nv_bfloat16());
}

const char* AllReduceProcessProblem() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  // The driver is not ready before the runtime has made a call.
  if (cudaFree(nullptr) != cudaSuccess ||
      cudaGetDriverEntryPointByVersion("cuModuleGetLoadingMode", &function, 11070,
                                       cudaEnableDefault, &result) != cudaSuccess ||
      result != cudaDriverEntryPointSuccess) {
    static_cast<void>(cudaGetLastError());
    return "the CUDA driver does not tell how it loads modules";
  }
  CUmoduleLoadingMode mode;
  if (reinterpret_cast<decltype(&cuModuleGetLoadingMode)>(function)(&mode) != CUDA_SUCCESS) {
    return "the CUDA driver does not tell how it loads modules";
  }
  return mode == CU_MODULE_EAGER_LOADING
             ? nullptr
             : "CUDA loads modules lazily: set CUDA_MODULE_LOADING=EAGER before CUDA starts";
}

}  // namespace kogpt
