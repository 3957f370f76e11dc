// Products on sm_90a (linear_hopper.cuh): the kernels that add up parts of K, one of them with the next
// LayerNorm.
#ifndef CUSTOM_OPS_LINEAR_PARTS_CUH_
#define CUSTOM_OPS_LINEAR_PARTS_CUH_

#include "linear_tile.cuh"

namespace kogpt {

struct AddPartsArgs {
  LinearOutputs outputs;
  const float* parts;
  int part_stride;
  int splits;
  bool prefetch_terms;
  int done_mark;
  int32_t* marks;
};

// Eight neighbouring sums of K's parts, added up in order.
__device__ __forceinline__ void AddUpParts(const AddPartsArgs& args, int row, int m,
                                           float (&sums)[LinearOutputs::kVector]) {
  const float* from = args.parts + static_cast<int64_t>(row) * args.part_stride + m;
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  constexpr int kTogether = 4;  // loads
#pragma unroll 1
  for (int first = 0; first < args.splits; first += kTogether) {
    float4 parts[kTogether][2];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i >= args.splits) break;
      parts[i][0] = __ldcg(reinterpret_cast<const float4*>(from));
      parts[i][1] = __ldcg(reinterpret_cast<const float4*>(from) + 1);
      from += static_cast<int64_t>(args.outputs.rows) * args.part_stride;
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i >= args.splits) break;
      const float4 low = parts[i][0], high = parts[i][1];
      sums[0] += low.x, sums[1] += low.y, sums[2] += low.z, sums[3] += low.w;
      sums[4] += high.x, sums[5] += high.y, sums[6] += high.z, sums[7] += high.w;
    }
  }
}

// Scales and biases of eight neighbouring outputs.
template <typename T>
struct EightTerms {
  float scale[LinearOutputs::kVector], bias[LinearOutputs::kVector];

  __device__ __forceinline__ EightTerms(const LinearOutputs& outputs, int m) {
#pragma unroll
    for (int i = 0; i < LinearOutputs::kVector; ++i) {
      scale[i] = outputs.Scale(m + i);
      bias[i] = outputs.Bias<T>(m + i);
    }
  }
  __device__ __forceinline__ void Apply(float (&sums)[LinearOutputs::kVector]) const {
#pragma unroll
    for (int i = 0; i < LinearOutputs::kVector; ++i) sums[i] = sums[i] * scale[i] + bias[i];
  }
};

inline constexpr int kAddThreads = 128;

// Adds up the parts of K.
template <typename T, bool kTellsMark>
__global__ void __launch_bounds__(kAddThreads) AddPartsKernel(const AddPartsArgs args) {
  LaunchDependents();
  const LinearOutputs& outputs = args.outputs;
  const int row = blockIdx.y;
  const int m = (blockIdx.x * kAddThreads + threadIdx.x) * LinearOutputs::kVector;
  if (!args.prefetch_terms) WaitForDependency();
  const EightTerms<T> terms(outputs, m);
  WaitForDependency();
  if (!kTellsMark && m >= outputs.num_outputs) return;
  if (m < outputs.num_outputs) {
    float sums[LinearOutputs::kVector];
    AddUpParts(args, row, m, sums);
    terms.Apply(sums);
    outputs.StoreVector<T>(row, m, sums);
  }
  if constexpr (kTellsMark) {
    __syncthreads();
    if (threadIdx.x == 0) TellMark(args.marks, args.done_mark);
  }
}

struct AddPartsNormArgs {
  AddPartsArgs sum;
  const void* ln_scale;
  const void* ln_bias;
  void* h;
  float epsilon;
};

// And makes LayerNorm of y: a block a row, in one kernel what would be two on the way from one product to
// the next. All that it reads is on its way together, for which it has registers: with 64, it took 2 us
// longer.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads)
    AddPartsNormKernel(const __grid_constant__ AddPartsNormArgs args) {
  __shared__ Moments shared[kPrepareWarps];
  LaunchDependents();
  const LinearOutputs& outputs = args.sum.outputs;
  const int row = blockIdx.x;
  const int vector = threadIdx.x;
  const int m = vector * LinearOutputs::kVector;
  const bool has_values = m < outputs.num_outputs;
  if (!args.sum.prefetch_terms) WaitForDependency();
  const EightTerms<T> terms(outputs, m);
  uint4 ln_scale, ln_bias;
  if (has_values) {
    ln_scale = __ldcg(static_cast<const uint4*>(args.ln_scale) + vector);
    ln_bias = __ldcg(static_cast<const uint4*>(args.ln_bias) + vector);
  }
  WaitForDependency();
  float values[LinearOutputs::kVector] = {};
  if (has_values) {
    float added[LinearOutputs::kVector];
    outputs.LoadResidual(row, m, added);
    AddUpParts(args.sum, row, m, values);
    terms.Apply(values);
#pragma unroll
    for (int i = 0; i < LinearOutputs::kVector; ++i) values[i] += added[i];
    outputs.StoreFloats(row, m, values);
  }
  T* const h = static_cast<T*>(args.h) + static_cast<int64_t>(row) * outputs.num_outputs;
  StoreLayerNorm<T>(values, has_values, outputs.num_outputs, args.epsilon, ln_scale, ln_bias,
                    shared, reinterpret_cast<uint4*>(h) + vector);
}

template <typename T, bool kTellsMark>
const char* LaunchAddParts(const LinearParams& params, int part_stride, int splits,
                           cudaStream_t stream) {
  constexpr auto kKernel = AddPartsKernel<T, kTellsMark>;
  const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return 0; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  const int per_block = kAddThreads * LinearOutputs::kVector;
  const dim3 grid(static_cast<unsigned>((params.num_outputs + per_block - 1) / per_block),
                  static_cast<unsigned>(params.rows));
  const AddPartsArgs args = {LinearOutputs(params),  Parts(params),    part_stride,  splits,
                             params.prefetch_weight, params.done_mark, Marks(params)};
  return MessageOf(Launch<kKernel>(traits, grid, kAddThreads, 0, stream, args));
}

// Of rows that a block has in registers.
inline bool MakesNext(const LinearParams& params) {
  return params.num_outputs <= int64_t{kPrepareThreads} * LinearOutputs::kVector &&
         params.num_outputs % LinearOutputs::kVector == 0;
}

template <typename T>
const char* LaunchAddPartsNorm(const LinearParams& params, int part_stride, int splits,
                               cudaStream_t stream) {
  constexpr auto kKernel = AddPartsNormKernel<T>;
  const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return 0; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  const AddPartsNormArgs args = {{LinearOutputs(params), Parts(params), part_stride, splits,
                                  params.prefetch_weight, 0, nullptr},
                                 params.next->ln_scale,
                                 params.next->ln_bias,
                                 params.h,
                                 params.epsilon};
  return MessageOf(Launch<kKernel>(traits, dim3(static_cast<unsigned>(params.rows)),
                                   kPrepareThreads, 0, stream, args));
}

}  // namespace kogpt

#endif  // CUSTOM_OPS_LINEAR_PARTS_CUH_
