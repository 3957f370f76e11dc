// Products of 16-bit activations and an INT8 weight on Hopper.
#include "gemm_dispatch.h"
#include "gemm_hopper.cuh"
#include "tile_sizes.h"

namespace kogpt {
namespace {

template <class X>
const char* LaunchFor(const GemmParams& params, const GemmTile& tile, cudaStream_t stream) {
  const int num_multiprocessors = CurrentDevice().num_multiprocessors;
  switch (tile.shape) {
    case TileShape::k64x256Pingpong:
      return HopperGemm<X, int8_t, HopperTile<64, 256, 64, 1, true>>::Launch(
          params, num_multiprocessors, tile.swizzle, stream);
    case TileShape::k128x256:
      return HopperGemm<X, int8_t, HopperTile<128, 256, 64, 2, false>>::Launch(
          params, num_multiprocessors, tile.swizzle, stream);
    case TileShape::k128x128Pingpong:
      break;
  }
  return "tile_sizes.h has a tile for which there is no kernel";
}

}  // namespace

const char* LaunchMixedGemmHopper(const GemmParams& params, void* stream) {
  const int64_t index = params.tile >= 0 ? params.tile : ChooseMixedTile(params.rows, params.k_dim);
  const GemmTile& tile = kMixedTiles[index];
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return params.dtype == DataType::kFloat16
             ? LaunchFor<cutlass::half_t>(params, tile, cuda_stream)
             : LaunchFor<cutlass::bfloat16_t>(params, tile, cuda_stream);
}

}  // namespace kogpt
