// Which kernel takes a product of 16-bit activations and an INT8 weight, and the one that serves
// every GPU.
#include "gemm.h"
#include "gemm_ampere.cuh"
#include "gemm_dispatch.h"

namespace kogpt {

const char* LaunchMixedGemm(const GemmParams& params, void* stream) {
  if (const char* message = CheckGemm(params)) return message;
  if (OnHopper(params)) return LaunchMixedGemmHopper(params, stream);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return params.dtype == DataType::kFloat16 ? AmpereGemm<cutlass::half_t>(params, cuda_stream)
                                            : AmpereGemm<cutlass::bfloat16_t>(params, cuda_stream);
}

}  // namespace kogpt
