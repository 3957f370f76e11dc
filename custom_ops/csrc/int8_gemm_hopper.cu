// INT8 products of many rows on Hopper.
#include "gemm_dispatch.h"
#include "gemm_hopper.cuh"
#include "tile_sizes.h"

namespace kogpt {

const char* LaunchInt8GemmHopper(const GemmParams& params, void* stream) {
  const int64_t index = params.tile >= 0 ? params.tile : ChooseInt8Tile(params.rows, params.k_dim);
  const GemmTile& tile = kInt8Tiles[index];
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int num_multiprocessors = CurrentDevice().num_multiprocessors;
  switch (tile.shape) {
    case TileShape::k64x256Pingpong:
      return HopperGemm<int8_t, int8_t, HopperTile<64, 256, 128, 1, true>>::Launch(
          params, num_multiprocessors, tile.swizzle, cuda_stream);
    case TileShape::k128x128Pingpong:
      return HopperGemm<int8_t, int8_t, HopperTile<128, 128, 128, 2, true>>::Launch(
          params, num_multiprocessors, tile.swizzle, cuda_stream);
    case TileShape::k128x256:
      return HopperGemm<int8_t, int8_t, HopperTile<128, 256, 128, 2, false>>::Launch(
          params, num_multiprocessors, tile.swizzle, cuda_stream);
  }
  return "tile_sizes.h has a tile for which there is no kernel";
}

}  // namespace kogpt
