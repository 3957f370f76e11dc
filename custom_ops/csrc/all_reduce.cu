// A one-shot all-reduce: every rank sends its part to all others and adds up all parts itself
// (exchange.cuh); where one does not come, the sum is NaN.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>

#include "all_reduce.h"
#include "cuda_common.cuh"
#include "exchange.cuh"
#include "linear_prepare.cuh"

namespace kogpt {
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
  ExchangeArgs exchange;
};

struct NormArgs {
  AllReduceArgs sum;
  const void* ln_scale;
  const void* ln_bias;
  void* h;
  float epsilon;
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
  Exchange<Flat> exchange(args.exchange);
  float y[Flat::kValues];
  SumValues(args, first, args.num_values, exchange, terms, y);
  exchange.Finish();
}

// And LayerNorm of y. The registers leave room for it beside a block of the product ahead.
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
  Exchange<ByRow> exchange(sum.exchange);
  float y[ByRow::kValues];
  SumValues(sum, first, end, exchange, terms, y);
  StoreLayerNorm<T>(y, has_values, sum.row_len, args.epsilon, ln_scale, ln_bias, shared,
                    reinterpret_cast<uint4*>(static_cast<T*>(args.h) + begin) + vector);
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
    if (error == cudaSuccess) error = cudaMalloc(&memory, ExchangeBytes(num_ranks));
    if (memory != nullptr) group->memory.push_back(memory);
    if (error == cudaSuccess) error = Clear(memory, ExchangeBytes(num_ranks));
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
  AllReduceArgs args = {};
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
  args.exchange = MakeExchangeArgs(*params.group, params.rank, params.timeout_ms);
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
