// Activations to INT8, bound by reading them once: a block keeps its row in registers, as it was
// read, from the first sum to the last rounding.
//
// Limits: K a multiple of 16; above 20480 a row is read anew for each of its passes (from L2).

#include <algorithm>
#include <cstdint>

#include "cuda_common.cuh"
#include "quantize_rows.h"

namespace kogpt {
namespace {

constexpr int kVector = 8;  // values that a thread takes at a time
constexpr int kMaxThreads = 512;
constexpr int kShortSteps = 2;  // of a thread: up to K = 8192
constexpr int kLongSteps = 5;   // up to K = 20480

struct KernelArgs {
  const void* x;
  const void* ln_scale;
  const void* ln_bias;
  const float* k_multiplier;
  int8_t* qvalue;
  float* scale;
  int k_dim;
  float epsilon;
  DataType x_dtype;
  DataType ln_dtype;
};

// Eight values as they lie in memory: of f32 all of it, of 16 bits the first half.
struct Bits {
  uint4 low;
  uint4 high;
};

// From index `at` on. What a kernel ahead may have written comes from L2; parameters may be in L1.
template <bool kIsFloat, bool kIsParameter>
__device__ __forceinline__ Bits LoadBits(const void* from, int64_t at) {
  const auto load = [](const uint4* source) {
    return kIsParameter ? __ldg(source) : __ldcg(source);
  };
  Bits bits = {};
  if constexpr (kIsFloat) {
    const auto* const source = reinterpret_cast<const uint4*>(static_cast<const float*>(from) + at);
    bits.low = load(source);
    bits.high = load(source + 1);
  } else {
    bits.low = load(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + at));
  }
  return bits;
}

template <bool kIsFloat>
__device__ __forceinline__ void ToFloats(const Bits& bits, DataType dtype,
                                         float (&values)[kVector]) {
  if constexpr (kIsFloat) {
    const uint32_t words[kVector] = {bits.low.x,  bits.low.y,  bits.low.z,  bits.low.w,
                                     bits.high.x, bits.high.y, bits.high.z, bits.high.w};
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = __uint_as_float(words[i]);
  } else if (dtype == DataType::kFloat16) {
    Unpack<__half>(bits.low, values);
  } else {
    Unpack<__nv_bfloat16>(bits.low, values);
  }
}

// Of parameters, whatever their type is: the branch is the same for all threads.
__device__ __forceinline__ void LoadParameters(const void* from, DataType dtype, int at,
                                               float (&values)[kVector]) {
  if (dtype == DataType::kFloat32) {
    ToFloats<true>(LoadBits<true, true>(from, at), dtype, values);
  } else {
    ToFloats<false>(LoadBits<false, true>(from, at), dtype, values);
  }
}

// The threads' values combined, in an order that only the number of threads decides.
template <class Combine>
__device__ __forceinline__ float Reduce(float value, Combine combine, float* shared) {
  value = WarpReduce(value, combine);
  const int num_warps = blockDim.x / kWarpSize;
  __syncthreads();  // the reduction before may still be read
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  value = shared[lane < num_warps ? lane : 0];
  if (lane >= num_warps) value = 0.0f;  // neutral for sums and for magnitudes
  return WarpReduce(value, combine);
}

// One block per row. kSteps: how many times kVector values a thread holds; 0: it holds none.
template <int kSteps, bool kIsFloat>
__global__ void __launch_bounds__(kMaxThreads, 2) QuantizeRowsKernel(KernelArgs args) {
  __shared__ float shared[kMaxThreads / kWarpSize];
  WaitForDependency();
  constexpr bool kIsHeld = kSteps > 0;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * args.k_dim;
  const int stride = blockDim.x * kVector;
  const int first = threadIdx.x * kVector;
  Bits held[kIsHeld ? kSteps : 1];
  if constexpr (kIsHeld) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = first + step * stride;
      if (at < args.k_dim) held[step] = LoadBits<kIsFloat, false>(args.x, row + at);
    }
  }
  // Calls body(index in the row, its values, where they are held) for all that is the thread's.
  const auto for_each = [&](const auto& body) {
    float values[kVector];
    if constexpr (kIsHeld) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int at = first + step * stride;
        if (at < args.k_dim) {
          ToFloats<kIsFloat>(held[step], args.x_dtype, values);
          body(at, values, held[step]);
        }
      }
    } else {
      for (int at = first; at < args.k_dim; at += stride) {
        ToFloats<kIsFloat>(LoadBits<kIsFloat, false>(args.x, row + at), args.x_dtype, values);
        body(at, values, held[0]);
      }
    }
  };

  float mean = 0.0f;
  float factor = 1.0f;
  if (args.ln_scale != nullptr) {
    float sum = 0.0f;
    for_each([&](int, const float (&values)[kVector], const Bits&) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += values[i];
    });
    mean = Reduce(sum, Plus(), shared) / static_cast<float>(args.k_dim);
    float squares = 0.0f;
    for_each([&](int, const float (&values)[kVector], const Bits&) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float centred = values[i] - mean;
        squares = __fmaf_rn(centred, centred, squares);
      }
    });
    const float variance = Reduce(squares, Plus(), shared) / static_cast<float>(args.k_dim);
    factor = 1.0f / sqrtf(variance + args.epsilon);
  }
  const auto prepare = [&](int at, float (&values)[kVector]) {
    if (args.ln_scale != nullptr) {
      float scale[kVector];
      float bias[kVector];
      LoadParameters(args.ln_scale, args.ln_dtype, at, scale);
      LoadParameters(args.ln_bias, args.ln_dtype, at, bias);
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        values[i] = __fmaf_rn(__fmul_rn(values[i] - mean, factor), scale[i], bias[i]);
    }
    if (args.k_multiplier != nullptr) {
      float multiplier[kVector];
      LoadParameters(args.k_multiplier, DataType::kFloat32, at, multiplier);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = __fmul_rn(values[i], multiplier[i]);
    }
  };
  const bool is_prepared = args.ln_scale != nullptr || args.k_multiplier != nullptr;

  float largest = 0.0f;
  for_each([&](int at, float (&values)[kVector], Bits& bits) {
    if (is_prepared) prepare(at, values);
    if constexpr (kIsHeld && kIsFloat) {
      bits.low = make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                            __float_as_uint(values[2]), __float_as_uint(values[3]));
      bits.high = make_uint4(__float_as_uint(values[4]), __float_as_uint(values[5]),
                             __float_as_uint(values[6]), __float_as_uint(values[7]));
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) largest = Largest()(largest, fabsf(values[i]));
  });
  largest = Reduce(largest, Largest(), shared);
  LaunchDependents();
  const float scale = Int8Scale(largest);
  if (threadIdx.x == 0) args.scale[blockIdx.x] = scale;
  const Int8Rounding rounding(scale);
  for_each([&](int at, float (&values)[kVector], const Bits&) {
    if (!(kIsHeld && kIsFloat) && is_prepared) prepare(at, values);
    *reinterpret_cast<uint2*>(args.qvalue + row + at) =
        make_uint2(rounding.Round4(values), rounding.Round4(values + 4));
  });
}

template <int kSteps, bool kIsFloat>
const char* LaunchSteps(const KernelArgs& args, int64_t rows, cudaStream_t stream) {
  constexpr auto kKernel = QuantizeRowsKernel<kSteps, kIsFloat>;
  const auto& traits = TraitsOf<kKernel>([](bool) { return 0; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  const int per_thread = kVector * std::max(kSteps, 1);
  int threads = (args.k_dim + per_thread - 1) / per_thread;
  threads = std::min((threads + kWarpSize - 1) / kWarpSize * kWarpSize, kMaxThreads);
  return MessageOf(
      Launch<kKernel>(traits, dim3(static_cast<uint32_t>(rows)), threads, 0, stream, args));
}

template <bool kIsFloat>
const char* LaunchFor(const KernelArgs& args, int64_t rows, cudaStream_t stream) {
  const int vectors = args.k_dim / kVector;
  if (vectors <= kShortSteps * kMaxThreads) {
    return LaunchSteps<kShortSteps, kIsFloat>(args, rows, stream);
  }
  if (vectors <= kLongSteps * kMaxThreads) {
    return LaunchSteps<kLongSteps, kIsFloat>(args, rows, stream);
  }
  return LaunchSteps<0, kIsFloat>(args, rows, stream);
}

}  // namespace

const char* LaunchQuantizeRows(const QuantizeRowsParams& params, void* stream) {
  if (const char* message = CheckQuantizeRows(params)) return message;
  KernelArgs args = {};
  args.x = params.x;
  args.ln_scale = params.ln_scale;
  args.ln_bias = params.ln_bias;
  args.k_multiplier = params.k_multiplier;
  args.qvalue = params.qvalue;
  args.scale = params.scale;
  args.k_dim = static_cast<int>(params.k_dim);
  args.epsilon = params.epsilon;
  args.x_dtype = params.x_dtype;
  args.ln_dtype = params.ln_dtype;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return params.x_dtype == DataType::kFloat32 ? LaunchFor<true>(args, params.rows, cuda_stream)
                                              : LaunchFor<false>(args, params.rows, cuda_stream);
}

}  // namespace kogpt
