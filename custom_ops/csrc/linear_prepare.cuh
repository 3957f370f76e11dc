// What goes ahead of a product: LayerNorm and the multiplier along k, one pass over the activations.
#ifndef CUSTOM_OPS_LINEAR_PREPARE_CUH_
#define CUSTOM_OPS_LINEAR_PREPARE_CUH_

#include "cuda_common.cuh"
#include "linear.h"

namespace kogpt {

struct PrepareArgs {
  const void* x;
  const void* ln_scale;
  const void* ln_bias;
  const float* k_multiplier;
  void* h;
  int k_dim;
  bool is_x_float32;
  bool prefetch_parameters;
  float epsilon;
};

constexpr int kPrepareThreads = 512;
constexpr int kPrepareWarps = kPrepareThreads / kWarpSize;
// Of 8 values a thread that stay in registers; what K has above 4096 is read again.
constexpr int kPrepareVectors = 1;

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

// h = LayerNorm(x) (Ba et al. 2016) and the multiplier along k, a block a row, in f32.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads, 2)  // leaves registers for a product's blocks
    PrepareKernel(const __grid_constant__ PrepareArgs args) {
  __shared__ Moments shared[kPrepareWarps];
  LaunchDependents();
  const int64_t row_begin = static_cast<int64_t>(blockIdx.x) * args.k_dim;
  const int num_vectors = args.k_dim / 8;

  const auto for_own = [&](auto&& body) {
#pragma unroll
    for (int i = 0; i < kPrepareVectors; ++i) {
      const int vector = i * kPrepareThreads + threadIdx.x;
      if (vector < num_vectors) body(i, vector);
    }
  };
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
  Parameters kept_parameters[kPrepareVectors];
  if (!args.prefetch_parameters) WaitForDependency();
  for_own([&](int i, int vector) { load_parameters(vector, kept_parameters[i]); });
  WaitForDependency();
  float kept[kPrepareVectors][8];
  for_own([&](int i, int vector) { load(vector, kept[i]); });

  float mean = 0.0f;
  float inverse_deviation = 1.0f;
  if (args.ln_scale != nullptr) {
    Moments moments;
    const auto add = [&](const float (&values)[8]) {
      Moments eight;
      eight.count = 8.0f;
      eight.mean = (((values[0] + values[1]) + (values[2] + values[3])) +
                    ((values[4] + values[5]) + (values[6] + values[7]))) /
                   8.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        eight.squares += (values[i] - eight.mean) * (values[i] - eight.mean);
      }
      moments.Add(eight);
    };
    for_own([&](int i, int) { add(kept[i]); });
    for (int vector = kPrepareVectors * kPrepareThreads + threadIdx.x; vector < num_vectors;
         vector += kPrepareThreads) {
      float values[8];
      load(vector, values);
      add(values);
    }
    moments.AddLanes<kWarpSize>();
    if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = moments;
    __syncthreads();
    moments = shared[threadIdx.x % kPrepareWarps];
    moments.AddLanes<kPrepareWarps>();
    mean = moments.mean;
    inverse_deviation = rsqrtf(moments.squares / args.k_dim + args.epsilon);
  }

  const auto store = [&](int vector, const float (&values)[8], const Parameters& parameters) {
    float out[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = (values[i] - mean) * inverse_deviation;
    if (args.ln_scale != nullptr) {
      float scale[8], bias[8];
      Unpack<T>(parameters.scale, scale);
      Unpack<T>(parameters.bias, bias);
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = out[i] * scale[i] + bias[i];
    }
    if (args.k_multiplier != nullptr) {
      const float4(&m)[2] = parameters.multipliers;
      const float multipliers[8] = {m[0].x, m[0].y, m[0].z, m[0].w, m[1].x, m[1].y, m[1].z, m[1].w};
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] *= multipliers[i];
    }
    __stcg(reinterpret_cast<uint4*>(static_cast<T*>(args.h) + row_begin) + vector, Pack<T>(out));
  };
  for_own([&](int i, int vector) { store(vector, kept[i], kept_parameters[i]); });
  for (int vector = kPrepareVectors * kPrepareThreads + threadIdx.x; vector < num_vectors;
       vector += kPrepareThreads) {
    float values[8];
    Parameters parameters;
    load(vector, values);
    load_parameters(vector, parameters);
    store(vector, values, parameters);
  }
}

template <typename T>
const char* LaunchPrepare(const LinearParams& params, cudaStream_t stream) {
  const KernelTraits& traits = TraitsOf<PrepareKernel<T>>([](bool) { return 0; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  const PrepareArgs args = {params.x,
                            params.ln_scale,
                            params.ln_bias,
                            params.k_multiplier,
                            params.h,
                            static_cast<int>(params.k_dim),
                            params.x_dtype == DataType::kFloat32,
                            params.prefetch_weight,
                            params.epsilon};
  return MessageOf(Launch<PrepareKernel<T>>(traits, dim3(static_cast<unsigned>(params.rows)),
                                            kPrepareThreads, 0, stream, args));
}

}  // namespace kogpt

#endif  // CUSTOM_OPS_LINEAR_PREPARE_CUH_
