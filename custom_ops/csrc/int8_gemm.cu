// Which kernel takes an INT8 product of many rows, and the one that serves every GPU.
#include "gemm.h"
#include "gemm_ampere.cuh"
#include "gemm_dispatch.h"

namespace kogpt {

const char* LaunchInt8Gemm(const GemmParams& params, void* stream) {
  if (const char* message = CheckGemm(params)) return message;
  if (OnHopper(params)) return LaunchInt8GemmHopper(params, stream);
  return AmpereGemm<int8_t>(params, static_cast<cudaStream_t>(stream));
}

}  // namespace kogpt
