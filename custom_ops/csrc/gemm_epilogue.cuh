// What stands behind a product of many rows: scales, bias, GELU, residual, the stores.
//
// It works on pairs of neighbouring outputs of a row, as the tensor cores leave them in registers,
// and writes them straight to device memory: no shared memory is taken from the product, and one
// kernel serves every type of result and any division of the outputs between y and act.
#ifndef CUSTOM_OPS_GEMM_EPILOGUE_CUH_
#define CUSTOM_OPS_GEMM_EPILOGUE_CUH_

#include <cstdint>

#include "cuda_common.cuh"
#include "gemm.h"

namespace kogpt {

struct GemmEpilogue {
  const float* x_scale;
  const float* weight_scale;
  const void* bias;
  const float* residual;
  void* y;
  void* act;
  int rows;
  int num_outputs;
  int gelu_from;
  int act_dim;
  int bias_from;  // the output that the bias begins with
  bool is_half;   // dtype is fp16, not bf16
  bool is_y_float;

  explicit GemmEpilogue(const GemmParams& params)
      : x_scale(params.x_scale),
        weight_scale(params.weight_scale),
        bias(params.bias),
        residual(params.residual),
        y(params.y),
        act(params.act),
        rows(static_cast<int>(params.rows)),
        num_outputs(static_cast<int>(params.num_outputs)),
        gelu_from(static_cast<int>(params.gelu_from)),
        act_dim(static_cast<int>(params.act_dim)),
        bias_from(params.gelu_from < params.num_outputs ? static_cast<int>(params.gelu_from) : 0),
        is_half(params.dtype == DataType::kFloat16),
        is_y_float(params.y_dtype == DataType::kFloat32) {}
  GemmEpilogue() = default;

  __device__ __forceinline__ float RowScale(int row) const {
    return x_scale == nullptr || row >= rows ? 1.0f : __ldg(x_scale + row);
  }

  __device__ __forceinline__ float2 Floats(uint32_t bits) const {
    const float2 half = Pair<__half>::ToFloats(bits);
    const float2 bfloat = Pair<__nv_bfloat16>::ToFloats(bits);
    return make_float2(is_half ? half.x : bfloat.x, is_half ? half.y : bfloat.y);
  }

  __device__ __forceinline__ uint32_t Pack16(float2 values) const {
    const uint32_t half = Pair<__half>::FromFloats(values.x, values.y);
    const uint32_t bfloat = Pair<__nv_bfloat16>::FromFloats(values.x, values.y);
    return is_half ? half : bfloat;
  }

  __device__ __forceinline__ float Bias(int m) const {
    if (bias == nullptr || m < bias_from) return 0.0f;
    const uint16_t bits = __ldg(static_cast<const uint16_t*>(bias) + (m - bias_from));
    return Floats(bits).x;
  }

  // tanh form: x / 2 (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3);
  // Hendrycks and Gimpel 2016. In few instructions, the power as one of 2: GELU of a tile takes as
  // long as a tenth of its product otherwise.
  static __device__ __forceinline__ float Gelu(float x) {
    constexpr float kLinear = -2.0f * 1.4426950408889634f * 0.7978845608028654f;
    constexpr float kCubic = kLinear * 0.044715f;
    const float exponent = x * __fmaf_rn(kCubic, x * x, kLinear);
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
    return x * inverse;
  }

  // A sum with its scales and its bias, in this order of operations in every kernel.
  static __device__ __forceinline__ float Scaled(float sum, float row_scale, float scale,
                                                 float bias) {
    return __fmaf_rn(__fmul_rn(sum, row_scale), scale, bias);
  }

  // Two outputs of a row.
  static __device__ __forceinline__ float2 Scaled(float2 sum, float row_scale, float2 scale,
                                                  float2 bias) {
    return make_float2(Scaled(sum.x, row_scale, scale.x, bias.x),
                       Scaled(sum.y, row_scale, scale.y, bias.y));
  }

  static __device__ __forceinline__ float2 Gelu(float2 z) {
    return make_float2(Gelu(z.x), Gelu(z.y));
  }

  // Where a row of y, of the residual, of act begins; act's outputs are counted from output 0.
  __device__ __forceinline__ uint16_t* Y16(int row) const {
    return static_cast<uint16_t*>(y) + static_cast<int64_t>(row) * gelu_from;
  }
  __device__ __forceinline__ float* Y32(int row) const {
    return static_cast<float*>(y) + static_cast<int64_t>(row) * gelu_from;
  }
  __device__ __forceinline__ const float* Residual(int row) const {
    return residual + static_cast<int64_t>(row) * gelu_from;
  }
  __device__ __forceinline__ uint16_t* Act(int row) const {
    return static_cast<uint16_t*>(act) + static_cast<int64_t>(row) * act_dim +
           (act_dim - num_outputs);
  }

  // What a thread holds of an accumulator: of rows `row` and `row + 8` two neighbouring outputs in
  // every group of eight, from `first` on; sum(half, group) gives them. kIsAligned: AreAligned().
  template <bool kIsAligned, int kGroups, class SumAt>
  __device__ __forceinline__ void Finish(int row, int first, const SumAt& sum) const {
    if constexpr (kIsAligned) {
      if (gelu_from < num_outputs && first + 8 * (kGroups - 1) >= gelu_from) {
        FinishAs<Target::kAct, kGroups>(row, first, sum);
      }
      if (first >= gelu_from) return;
      if (is_y_float) {
        FinishAs<Target::kY32, kGroups>(row, first, sum);
      } else {
        FinishAs<Target::kY16, kGroups>(row, first, sum);
      }
    } else {
      const float row_scales[2] = {RowScale(row), RowScale(row + 8)};
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 pair = sum(half, group);
          FinishOne(row + 8 * half, first + 8 * group, pair.x, row_scales[half]);
          FinishOne(row + 8 * half, first + 8 * group + 1, pair.y, row_scales[half]);
        }
      }
    }
  }

  // Whether every pair of outputs lies whole on one side of gelu_from, and aligned.
  __host__ __device__ bool AreAligned() const {
    return (num_outputs | gelu_from | act_dim) % 2 == 0;
  }

  static __device__ __forceinline__ void StorePair(uint16_t* to, uint32_t bits) {
    *reinterpret_cast<uint32_t*>(to) = bits;
  }

 private:
  enum class Target { kAct, kY16, kY32 };

  // What some groups' sums need from memory.
  template <int kSize>
  struct Batch {
    float2 scale[kSize];
    uint32_t bias[kSize];
    float2 residual[kSize][2];
  };

  // Finish for the outputs that go to kTarget. Straight-line code: with a branch for each pair,
  // each would wait for the one before.
  template <Target kTarget, int kGroups, class SumAt>
  __device__ __forceinline__ void FinishAs(int row, int first, const SumAt& sum) const {
    // The loads of a batch are under way while the one before is worked on; the compiler may not
    // move a load in front of a store.
    constexpr int kBatch = kTarget == Target::kY32 ? 4 : 8;
    static_assert(kGroups % kBatch == 0);
    const float row_scales[2] = {RowScale(row), RowScale(row + 8)};
    const bool is_there[2] = {row < rows, row + 8 < rows};
    const int from_output = kTarget == Target::kAct ? gelu_from : 0;
    const int to_output = kTarget == Target::kAct ? num_outputs : gelu_from;
    // With GELU the bias covers only the outputs that go through it.
    const bool has_bias = bias != nullptr && (kTarget == Target::kAct || bias_from == 0);
    Batch<kBatch> batches[2];
    const auto load = [&](Batch<kBatch>& batch, int begin) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        int m = first + 8 * (begin + i);
        if (m < from_output || m >= to_output) m = from_output;
        batch.scale[i] = __ldg(reinterpret_cast<const float2*>(weight_scale + m));
        batch.bias[i] = 0;
        if (has_bias) {
          batch.bias[i] = __ldg(reinterpret_cast<const uint32_t*>(
              static_cast<const uint16_t*>(bias) + (m - bias_from)));
        }
        if constexpr (kTarget == Target::kY32) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            batch.residual[i][half] = make_float2(0.0f, 0.0f);
            if (residual != nullptr && is_there[half]) {
              batch.residual[i][half] =
                  __ldcs(reinterpret_cast<const float2*>(Residual(row + 8 * half) + m));
            }
          }
        }
      }
    };
    load(batches[0], 0);
#pragma unroll
    for (int begin = 0; begin < kGroups; begin += kBatch) {
      const Batch<kBatch>& now = batches[begin / kBatch % 2];
      if (begin + kBatch < kGroups) load(batches[(begin / kBatch + 1) % 2], begin + kBatch);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int m = first + 8 * (begin + i);
        const float2 bias_pair = Floats(now.bias[i]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float2 z = Scaled(sum(half, begin + i), row_scales[half], now.scale[i], bias_pair);
          const bool is_stored = is_there[half] && m >= from_output && m < to_output;
          if constexpr (kTarget == Target::kAct) {
            const uint32_t bits = Pack16(Gelu(z));
            if (is_stored) StorePair(Act(row + 8 * half) + m, bits);
          } else if constexpr (kTarget == Target::kY16) {
            const uint32_t bits = Pack16(z);
            if (is_stored) StorePair(Y16(row + 8 * half) + m, bits);
          } else {
            z.x += now.residual[i][half].x;
            z.y += now.residual[i][half].y;
            if (is_stored) *reinterpret_cast<float2*>(Y32(row + 8 * half) + m) = z;
          }
        }
      }
    }
  }

  // One output, anywhere.
  __device__ __forceinline__ void FinishOne(int row, int m, float sum, float row_scale) const {
    if (row >= rows || m >= num_outputs) return;
    float z = Scaled(sum, row_scale, weight_scale[m], Bias(m));
    if (m >= gelu_from) {
      Act(row)[m] = static_cast<uint16_t>(Pack16(make_float2(Gelu(z), 0.0f)));
    } else if (is_y_float) {
      if (residual != nullptr) z += Residual(row)[m];
      Y32(row)[m] = z;
    } else {
      Y16(row)[m] = static_cast<uint16_t>(Pack16(make_float2(z, 0.0f)));
    }
  }
};

}  // namespace kogpt

#endif  // CUSTOM_OPS_GEMM_EPILOGUE_CUH_
