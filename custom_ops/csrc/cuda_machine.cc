// What the CUDA library sees of the machine, without a CUDA context: custom_ops/_library.py asks
// before an op runs.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

// CUDA versions as CUDART_VERSION has them: of the driver, 0 if there is none, and of the runtime
// in this library. The lowest compute capability of the visible GPUs as 10 * major + minor, 0
// without a GPU.
extern "C" __attribute__((visibility("default"))) void KogptOpsCudaMachine(
    int32_t* driver_version, int32_t* runtime_version, int32_t* compute_capability) {
  *runtime_version = CUDART_VERSION;
  *compute_capability = 0;
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  *driver_version = driver;
  int num_devices = 0;
  if (driver == 0 || cudaGetDeviceCount(&num_devices) != cudaSuccess) num_devices = 0;
  for (int device = 0; device < num_devices; ++device) {
    int major = 0;
    int minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
      continue;
    }
    const int32_t capability = 10 * major + minor;
    *compute_capability =
        *compute_capability == 0 ? capability : std::min(*compute_capability, capability);
  }
  // An error that the calls above left behind is not the next kernel's.
  static_cast<void>(cudaGetLastError());
}
