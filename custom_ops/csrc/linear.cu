// Decode-sized products, bound by reading the weight once: linear_hopper.cuh on sm_90a,
// linear_portable.cuh elsewhere, behind what goes ahead of a product (linear_prepare.cuh).
//
// Limits: K a multiple of 8 (16 with an INT8 weight, and there on sm_90a at most 131056), 16-bit
// activations.

#include "linear_hopper.cuh"
#include "linear_portable.cuh"
#include "linear_prepare.cuh"

#if __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "Compute capability 9.0 takes sm_90a"
#endif

namespace kogpt {
namespace {

template <typename T, typename Weight, int kRowTiles>
const char* LaunchForRows(const LinearParams& params, cudaStream_t stream) {
  const KernelTraits& traits = TraitsOf<LinearKernel<T, Weight, kRowTiles>>(
      [](bool) { return Ring<Weight, kRowTiles>::kSharedBytes; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  if (HasWgmma(traits)) return LaunchHopper<T, Weight>(params, traits.num_multiprocessors, stream);
  const void* x = params.x;
  if (params.has_h || params.ln_scale != nullptr || params.k_multiplier != nullptr) {
    if (const char* error = Prepare<T, 0>(params, nullptr, stream)) return error;
    x = params.h;
  }
  return LaunchPortable<T, Weight, kRowTiles>(params, x, traits, stream);
}

template <typename T, typename Weight>
const char* LaunchForWeight(const LinearParams& params, cudaStream_t stream) {
  if (params.rows <= 8) return LaunchForRows<T, Weight, 1>(params, stream);
  if (params.rows <= 16) return LaunchForRows<T, Weight, 2>(params, stream);
  if (params.rows <= 32) return LaunchForRows<T, Weight, 4>(params, stream);
  return LaunchForRows<T, Weight, 8>(params, stream);
}

template <typename T>
const char* LaunchForType(const LinearParams& params, cudaStream_t stream) {
  if (params.weight_dtype == DataType::kInt8) return LaunchForWeight<T, int8_t>(params, stream);
  return LaunchForWeight<T, T>(params, stream);
}

}  // namespace

int64_t LinearPartialsBytes(int64_t rows) {
  const int64_t padded = rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64;
  static_assert(kMaxParts * kMaxTileOutputs >= kMaxGrid * kTileOutputs);
  return (ScalesSize(padded) + PartsSize(padded)) * static_cast<int64_t>(sizeof(float));
}

bool LinearHasIntegers() {
  const KernelTraits& traits = TraitsOf<PrepareKernel<__nv_bfloat16, 2>>([](bool) { return 0; });
  return traits.error == cudaSuccess && HasWgmma(traits);
}

const char* LaunchLinear(const LinearParams& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.parts != nullptr) {
    *params.parts = {static_cast<const float*>(params.y), 1, params.num_outputs, nullptr};
  }
  if (params.next != nullptr) params.next->is_made = false;
  switch (params.dtype) {
    case DataType::kFloat16:
      return LaunchForType<__half>(params, cuda_stream);
    case DataType::kBfloat16:
      return LaunchForType<__nv_bfloat16>(params, cuda_stream);
    default:
      return "linear on CUDA takes float16 or bfloat16 activations";
  }
}

}  // namespace kogpt
