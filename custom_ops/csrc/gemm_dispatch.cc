// What device the products of many rows run on, and what its tiles are called.
#include "gemm_dispatch.h"

#include <cuda_runtime_api.h>

#include "tile_sizes.h"

namespace kogpt {
namespace {

#ifdef KOGPT_HOPPER
constexpr bool kHasHopper = true;
#else
constexpr bool kHasHopper = false;
#endif

}  // namespace

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

int NumTiles(bool is_int8, bool is_hopper) {
  if (!is_hopper || !kHasHopper) return kNumPortableTiles;
  return is_int8 ? kNumInt8Tiles : kNumMixedTiles;
}

std::string TileName(bool is_int8, bool is_hopper, int index) {
  if (!is_hopper || !kHasHopper) return "128x128";
  const GemmTile& tile = (is_int8 ? kInt8Tiles : kMixedTiles)[index];
  const char* const shape = tile.shape == TileShape::k64x256Pingpong    ? "64x256 pingpong"
                            : tile.shape == TileShape::k128x128Pingpong ? "128x128 pingpong"
                                                                        : "128x256";
  return std::string(shape) + " swizzle " + std::to_string(tile.swizzle);
}

}  // namespace kogpt
