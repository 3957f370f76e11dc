// What becomes of a product's sums: scales, bias, GELU, residual, in this order in every kernel.
#ifndef CUSTOM_OPS_LINEAR_OUTPUTS_CUH_
#define CUSTOM_OPS_LINEAR_OUTPUTS_CUH_

#include "cuda_common.cuh"
#include "linear.h"

namespace kogpt {

// tanh form: x / 2 (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3);
// Hendrycks and Gimpel 2016.
__device__ __forceinline__ float Gelu(float x) {
  const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1.0f + __expf(-2.0f * u));
}

struct LinearOutputs {
  static constexpr int kVector = 8;

  const float* weight_scale;  // of an INT8 weight
  const void* bias;
  const float* residual;
  void* y;
  void* act;
  int rows;
  int num_outputs;
  int gelu_from;
  int act_dim;
  bool is_y_float32;
  bool is_vector;  // outputs 8 i to 8 i + 7 go the same way, to where 16 bytes begin

  explicit LinearOutputs(const LinearParams& params)
      : weight_scale(params.weight_scale),
        bias(params.bias),
        residual(params.residual),
        y(params.y),
        act(params.act),
        rows(static_cast<int>(params.rows)),
        num_outputs(static_cast<int>(params.num_outputs)),
        gelu_from(static_cast<int>(params.gelu_from)),
        act_dim(static_cast<int>(params.act_dim)),
        is_y_float32(params.y_dtype == DataType::kFloat32),
        is_vector(params.num_outputs % kVector == 0 && params.gelu_from % kVector == 0 &&
                  params.act_dim % kVector == 0) {}

  __device__ __forceinline__ float Scale(int m) const {
    return weight_scale != nullptr && m < num_outputs ? __ldg(weight_scale + m) : 1.0f;
  }

  // With GELU the bias covers only the outputs that go through it.
  template <typename T>
  __device__ __forceinline__ float Bias(int m) const {
    const int i = gelu_from == num_outputs ? m : m - gelu_from;
    return bias != nullptr && i >= 0 && m < num_outputs ? ToFloat(static_cast<const T*>(bias)[i])
                                                        : 0.0f;
  }

  __device__ __forceinline__ float Residual(int row, int m) const {
    return residual != nullptr && m < gelu_from
               ? __ldcg(residual + static_cast<int64_t>(row) * gelu_from + m)
               : 0.0f;
  }

  __device__ __forceinline__ int64_t ActIndex(int row, int m) const {
    return static_cast<int64_t>(row) * act_dim + act_dim - num_outputs + m;
  }

  // Writes what an output's scaled sum, bias and residual add up to.
  template <typename T>
  __device__ __forceinline__ void Store(int row, int m, float value) const {
    const int64_t at = static_cast<int64_t>(row) * gelu_from + m;
    if (m >= gelu_from) {
      static_cast<T*>(act)[ActIndex(row, m)] = FromFloat<T>(Gelu(value));
    } else if (is_y_float32) {
      static_cast<float*>(y)[at] = value;
    } else {
      static_cast<T*>(y)[at] = FromFloat<T>(value);
    }
  }

  // The same of outputs m to m + 7, m a multiple of 8, residual not yet included.
  template <typename T>
  __device__ __forceinline__ void StoreVector(int row, int m, float (&values)[kVector]) const {
    if (!is_vector) {
#pragma unroll 1
      for (int i = 0; i < kVector && m + i < num_outputs; ++i) {
        Store<T>(row, m + i, values[0] + Residual(row, m + i));
#pragma unroll
        for (int j = 1; j < kVector; ++j) values[j - 1] = values[j];
      }
      return;
    }
    if (m >= num_outputs) return;
    if (m >= gelu_from) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = Gelu(values[i]);
      __stcg(reinterpret_cast<uint4*>(static_cast<T*>(act) + ActIndex(row, m)), Pack<T>(values));
      return;
    }
    const int64_t at = static_cast<int64_t>(row) * gelu_from + m;
    if (!is_y_float32) {
      __stcg(reinterpret_cast<uint4*>(static_cast<T*>(y) + at), Pack<T>(values));
      return;
    }
    float added[kVector];
    LoadResidual(row, m, added);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] += added[i];
    StoreFloats(row, m, values);
  }

  // Of outputs m to m + 7, where these are a vector of y in f32.
  __device__ __forceinline__ void LoadResidual(int row, int m, float (&values)[kVector]) const {
    float4 low = make_float4(0.0f, 0.0f, 0.0f, 0.0f), high = low;
    if (residual != nullptr) {
      const auto* from =
          reinterpret_cast<const float4*>(residual + static_cast<int64_t>(row) * gelu_from + m);
      low = __ldcg(from), high = __ldcg(from + 1);
    }
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  }
  __device__ __forceinline__ void StoreFloats(int row, int m,
                                              const float (&values)[kVector]) const {
    auto* to = reinterpret_cast<float4*>(static_cast<float*>(y) +
                                         static_cast<int64_t>(row) * gelu_from + m);
    __stcg(to, make_float4(values[0], values[1], values[2], values[3]));
    __stcg(to + 1, make_float4(values[4], values[5], values[6], values[7]));
  }
};

}  // namespace kogpt

#endif  // CUSTOM_OPS_LINEAR_OUTPUTS_CUH_
