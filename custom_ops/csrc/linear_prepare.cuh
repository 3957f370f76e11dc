// What goes ahead of a product: LayerNorm, the multiplier along k and rounding, one pass over the
// activations.
#ifndef CUSTOM_OPS_LINEAR_PREPARE_CUH_
#define CUSTOM_OPS_LINEAR_PREPARE_CUH_

#include "cuda_common.cuh"
#include "digits.cuh"
#include "linear.h"

namespace kogpt {

struct PrepareArgs {
  const void* x;
  const void* ln_scale;
  const void* ln_bias;
  const float* k_multiplier;
  void* h;
  float* x_scale;
  int k_dim;
  bool is_x_float32;
  bool prefetch_parameters;
  float epsilon;
};

constexpr int kPrepareThreads = 512;
constexpr int kPrepareWarps = kPrepareThreads / kWarpSize;

// Number, mean and sum of squared differences from the mean of some values; Chan, Golub and LeVeque
// 1979. Exact where E[x^2] - E[x]^2 loses the digits of a small spread around a large mean, and one
// pass over the threads where mean first, spread then takes two.
struct Moments {
  float count = 0.0f;
  float mean = 0.0f;
  float squares = 0.0f;

  __device__ __forceinline__ void Add(const Moments& other) {
    const float total = count + other.count;
    if (total == 0.0f) return;
    const float difference = other.mean - mean;
    const float share = other.count / total;
    squares += other.squares + difference * difference * count * share;
    mean += difference * share;
    count = total;
  }

  // Of lanes [0, kLanes), to all of them.
  template <int kLanes>
  __device__ __forceinline__ void AddLanes() {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      Moments other;
      other.count = __shfl_down_sync(0xffffffffu, count, offset);
      other.mean = __shfl_down_sync(0xffffffffu, mean, offset);
      other.squares = __shfl_down_sync(0xffffffffu, squares, offset);
      Add(other);
    }
    count = __shfl_sync(0xffffffffu, count, 0);
    mean = __shfl_sync(0xffffffffu, mean, 0);
    squares = __shfl_sync(0xffffffffu, squares, 0);
  }
};

// Combines the values of all threads, for all of them.
template <typename Combine>
__device__ __forceinline__ float CombineThreads(float value, Combine combine, float* shared) {
  value = WarpReduce(value, combine);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  return WarpReduce<kPrepareWarps>(shared[threadIdx.x % kPrepareWarps], combine);
}

// Those of the values of all threads, to all of them.
__device__ __forceinline__ Moments CombineMoments(Moments moments, Moments* shared) {
  moments.AddLanes<kWarpSize>();
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = moments;
  __syncthreads();
  moments = shared[threadIdx.x % kPrepareWarps];
  moments.AddLanes<kPrepareWarps>();
  return moments;
}

__device__ __forceinline__ void AddEight(const float (&values)[8], Moments* moments) {
  Moments eight;
  eight.count = 8.0f;
  eight.mean = (((values[0] + values[1]) + (values[2] + values[3])) +
                ((values[4] + values[5]) + (values[6] + values[7]))) /
               8.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    eight.squares += (values[i] - eight.mean) * (values[i] - eight.mean);
  }
  moments->Add(eight);
}

// h = LayerNorm of a row that its block has in registers, eight neighbouring values a thread, as
// PrepareKernel makes it, bit for bit: this thread's part of it, with those of scale and bias. Not those
// of threads without values. All threads of the block.
template <typename T>
__device__ __forceinline__ void StoreLayerNorm(const float (&values)[8], bool has_values,
                                               int row_len, float epsilon, uint4 ln_scale,
                                               uint4 ln_bias, Moments* shared, uint4* h) {
  Moments moments;
  if (has_values) AddEight(values, &moments);
  moments = CombineMoments(moments, shared);
  const float inverse_deviation = rsqrtf(moments.squares / row_len + epsilon);
  if (!has_values) return;
  float scale[8], bias[8], normalized[8];
  Unpack<T>(ln_scale, scale);
  Unpack<T>(ln_bias, bias);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    normalized[i] = (values[i] - moments.mean) * inverse_deviation * scale[i] + bias[i];
  }
  __stcg(h, Pack<T>(normalized));
}

// h = LayerNorm(x) (Ba et al. 2016) and the multiplier along k, a block a row, in f32; rounded to T, or as
// digits, if there are some, with a scale for each row: h is [rows, kDigits, K] then.
template <typename T, int kDigits>
__global__ void __launch_bounds__(kPrepareThreads, 2)  // leaves registers for a product's blocks
    PrepareKernel(const __grid_constant__ PrepareArgs args) {
  __shared__ Moments shared[kPrepareWarps];
  __shared__ float shared_largest[kPrepareWarps];
  LaunchDependents();
  const int64_t row_begin = static_cast<int64_t>(blockIdx.x) * args.k_dim;
  const int first = threadIdx.x;
  const int end = args.k_dim / 8;
  const bool has_first = first < end;

  struct Parameters {
    uint4 scale, bias;
    float4 multipliers[2];
  };
  const auto load_parameters = [&](int vector, Parameters& parameters) {
    if (args.ln_scale != nullptr) {
      parameters.scale = __ldcg(static_cast<const uint4*>(args.ln_scale) + vector);
      parameters.bias = __ldcg(static_cast<const uint4*>(args.ln_bias) + vector);
    }
    if (args.k_multiplier != nullptr) {
      const auto* from = reinterpret_cast<const float4*>(args.k_multiplier) + vector * 2;
      parameters.multipliers[0] = __ldcg(from);
      parameters.multipliers[1] = __ldcg(from + 1);
    }
  };
  const auto load = [&](int vector, float (&values)[8]) {
    if (args.is_x_float32) {
      const float4* x =
          reinterpret_cast<const float4*>(static_cast<const float*>(args.x) + row_begin) +
          vector * 2;
      const float4 low = __ldcg(x);
      const float4 high = __ldcg(x + 1);
      values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
      values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    } else {
      Unpack<T>(__ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(args.x) + row_begin) +
                       vector),
                values);
    }
  };

  // The parameters come from device memory while the kernel ahead still runs.
  Parameters first_parameters;
  if (!args.prefetch_parameters) WaitForDependency();
  if (has_first) load_parameters(first, first_parameters);
  WaitForDependency();
  // These stay in registers, 4096 values of a block; what it has beyond is read again for each pass.
  float first_values[8];
  if (has_first) load(first, first_values);

  float mean = 0.0f;
  float inverse_deviation = 1.0f;
  if (args.ln_scale != nullptr) {
    Moments moments;
    if (has_first) AddEight(first_values, &moments);
    for (int vector = first + kPrepareThreads; vector < end; vector += kPrepareThreads) {
      float values[8];
      load(vector, values);
      AddEight(values, &moments);
    }
    moments = CombineMoments(moments, shared);
    mean = moments.mean;
    inverse_deviation = rsqrtf(moments.squares / args.k_dim + args.epsilon);
  }

  const auto normalize = [&](float (&values)[8], const Parameters& parameters) {
    if (args.ln_scale != nullptr) {
      float scale[8], bias[8];
      Unpack<T>(parameters.scale, scale);
      Unpack<T>(parameters.bias, bias);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        values[i] = (values[i] - mean) * inverse_deviation * scale[i] + bias[i];
      }
    }
    if (args.k_multiplier != nullptr) {
      const float4(&m)[2] = parameters.multipliers;
      const float multipliers[8] = {m[0].x, m[0].y, m[0].z, m[0].w, m[1].x, m[1].y, m[1].z, m[1].w};
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] *= multipliers[i];
    }
  };
  if (has_first) normalize(first_values, first_parameters);
  const auto for_all = [&](auto&& body) {
    if (has_first) body(first, first_values);
    for (int vector = first + kPrepareThreads; vector < end; vector += kPrepareThreads) {
      float values[8];
      Parameters parameters;
      load(vector, values);
      load_parameters(vector, parameters);
      normalize(values, parameters);
      body(vector, values);
    }
  };
  if constexpr (kDigits > 0) {
    float largest = 0.0f;
    for_all([&](int, const float (&values)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) largest = Largest()(largest, fabsf(values[i]));
    });
    largest = LargestOfDigits(CombineThreads(largest, Largest(), shared_largest));
    if (threadIdx.x == 0) args.x_scale[blockIdx.x] = largest / kLargestInteger<kDigits>;
    const float inverse = kLargestInteger<kDigits> / largest;
    for_all([&](int vector, const float (&values)[8]) {
      StoreDigits<kDigits>(args.h, args.k_dim, blockIdx.x, vector,
                           EightDigits<kDigits>(values, inverse));
    });
  } else {
    for_all([&](int vector, const float (&values)[8]) {
      __stcg(reinterpret_cast<uint4*>(static_cast<T*>(args.h) + row_begin) + vector,
             Pack<T>(values));
    });
  }
}

constexpr int kRoundThreads = 128;
constexpr int kRoundWarps = kRoundThreads / kWarpSize;

// A group of columns of a row a warp.
template <typename T, int kDigits>
__global__ void __launch_bounds__(kRoundThreads)
    RoundGroupsKernel(const __grid_constant__ RoundGroupsArgs args) {
  LaunchDependents();
  WaitForDependency();
  const int group = blockIdx.x * kRoundWarps + threadIdx.x / kWarpSize;
  if (group <= NumDigitGroups(args.k_dim)) args.Round<T, kDigits>(blockIdx.y, group);
}

// Writes params.h, unless it is there; as digits, if there are some, with a scale for each row.
template <typename T, int kDigits>
const char* Prepare(const LinearParams& params, float* x_scale, cudaStream_t stream) {
  if (params.has_h) return nullptr;
  constexpr auto kKernel = PrepareKernel<T, kDigits>;
  const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return 0; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  const PrepareArgs args = {params.x,
                            params.ln_scale,
                            params.ln_bias,
                            params.k_multiplier,
                            params.h,
                            x_scale,
                            static_cast<int>(params.k_dim),
                            params.x_dtype == DataType::kFloat32,
                            params.prefetch_weight,
                            params.epsilon};
  return MessageOf(Launch<kKernel>(traits, dim3(static_cast<unsigned>(params.rows)),
                                   kPrepareThreads, 0, stream, args));
}

// Writes params.h, unless it is there, as digits, with a scale for each group of columns of a row.
template <typename T, int kDigits>
const char* RoundGroups(const LinearParams& params, float* x_scale, cudaStream_t stream) {
  if (params.has_h) return nullptr;
  constexpr auto kKernel = RoundGroupsKernel<T, kDigits>;
  const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return 0; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  const int64_t warps = NumDigitGroups(params.k_dim) + 1;
  const dim3 grid(static_cast<unsigned>((warps + kRoundWarps - 1) / kRoundWarps),
                  static_cast<unsigned>(params.rows));
  const RoundGroupsArgs args = {
      params.x, params.k_multiplier,           params.h,
      x_scale,  static_cast<int>(params.rows), static_cast<int>(params.k_dim)};
  return MessageOf(Launch<kKernel>(traits, grid, kRoundThreads, 0, stream, args));
}

}  // namespace kogpt

#endif  // CUSTOM_OPS_LINEAR_PREPARE_CUH_
