// What a library tells of itself. custom_ops/_library.py asks before it registers anything.
#include <cstdint>

#include "build_info.h"  // which CMake writes
#include "ffi_helpers.h"
#include "xla/ffi/api/c_api.h"

// The version of XLA's FFI that the library was compiled against. Registering a handler of a newer
// version than the running jaxlib's ends JAX's backend, so the caller compares first.
extern "C" KOGPT_EXPORT void KogptOpsFfiVersion(int32_t* major, int32_t* minor) {
  *major = XLA_FFI_API_MAJOR;
  *minor = XLA_FFI_API_MINOR;
}

// As CMake names them, with commas: code for "90a-real", PTX for "80-virtual". Empty in the Host
// library.
extern "C" KOGPT_EXPORT const char* KogptOpsCudaArchitectures() { return KOGPT_CUDA_ARCHITECTURES; }

// Of the package that it was compiled from, and digests of the sources: of all, and of those of products
// of many rows, whose times with other kernels count for nothing (custom_ops/autotune.py).
extern "C" KOGPT_EXPORT const char* KogptOpsVersion() { return KOGPT_VERSION; }
extern "C" KOGPT_EXPORT const char* KogptOpsSourceHash() { return KOGPT_SOURCE_HASH; }
extern "C" KOGPT_EXPORT const char* KogptOpsGemmHash() { return KOGPT_GEMM_HASH; }

// Name and version, with commas if there are several.
extern "C" KOGPT_EXPORT const char* KogptOpsCompilers() { return KOGPT_COMPILERS; }
