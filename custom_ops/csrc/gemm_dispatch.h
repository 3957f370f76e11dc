// What the launchers of the products of many rows share with their Hopper kernels, which stand in
// files of their own because they are compiled for sm_90a alone.
#ifndef CUSTOM_OPS_GEMM_DISPATCH_H_
#define CUSTOM_OPS_GEMM_DISPATCH_H_

#include "gemm.h"

namespace kogpt {

#ifdef KOGPT_HOPPER
const char* LaunchInt8GemmHopper(const GemmParams& params, void* stream);
const char* LaunchMixedGemmHopper(const GemmParams& params, void* stream);
#else
inline const char* LaunchInt8GemmHopper(const GemmParams&, void*) { return "not compiled for it"; }
inline const char* LaunchMixedGemmHopper(const GemmParams&, void*) { return "not compiled for it"; }
#endif

// Whether the Hopper kernels are compiled for the current device, and its multiprocessors.
struct HopperDevice {
  bool is_hopper = false;
  int num_multiprocessors = 0;
};
HopperDevice CurrentDevice();

// Whether the Hopper kernels take the product: the device, and whole groups of eight outputs.
inline bool OnHopper(const GemmParams& params) {
#ifdef KOGPT_HOPPER
  return (params.num_outputs | params.gelu_from | params.act_dim) % 8 == 0 &&
         CurrentDevice().is_hopper;
#else
  static_cast<void>(params);
  return false;
#endif
}

}  // namespace kogpt

#endif  // CUSTOM_OPS_GEMM_DISPATCH_H_
