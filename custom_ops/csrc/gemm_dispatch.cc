// What device the products of many rows run on.
#include "gemm_dispatch.h"

#include <cuda_runtime_api.h>

namespace kogpt {

HopperDevice CurrentDevice() {
  constexpr int kMaxDevices = 64;
  struct Entry {
    HopperDevice device;
    bool is_known = false;
  };
  thread_local Entry entries[kMaxDevices];
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess || index >= kMaxDevices) return {};
  Entry& entry = entries[index];
  if (!entry.is_known) {
    int major = 0;
    int minor = 0;
    int count = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) != cudaSuccess ||
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index) != cudaSuccess) {
      return {};
    }
    // sm_90a runs on this capability alone.
    entry.device = {major == 9 && minor == 0, count};
    entry.is_known = true;
  }
  return entry.device;
}

}  // namespace kogpt
