// Products of many rows before Hopper, and on Hopper where its own kernels do not serve: CUTLASS's
// multistage main loop (mma, asynchronous copies) with the epilogue of gemm_epilogue.cuh.
#ifndef CUSTOM_OPS_GEMM_AMPERE_CUH_
#define CUSTOM_OPS_GEMM_AMPERE_CUH_

#include <cutlass/cutlass.h>
#include <cutlass/gemm/threadblock/default_mma.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda_common.cuh"
#include "gemm.h"
#include "gemm_epilogue.cuh"

namespace kogpt {

// X: the activations' type of CUTLASS; the weight is INT8.
template <class X>
struct AmpereTile {
  static constexpr bool kIsInt8 = std::is_same_v<X, int8_t>;
  using Sum = std::conditional_t<kIsInt8, int32_t, float>;
  using Block = cutlass::gemm::GemmShape<128, 128, 64>;
  using Warp = cutlass::gemm::GemmShape<64, 64, 64>;
  using Instruction = cutlass::gemm::GemmShape<16, 8, kIsInt8 ? 32 : 16>;
  using Operator = std::conditional_t<kIsInt8, cutlass::arch::OpMultiplyAddSaturate,
                                      cutlass::arch::OpMultiplyAddMixedInputUpcast>;
  static constexpr int kStages = kIsInt8 ? 4 : 3;
  using Mma = typename cutlass::gemm::threadblock::DefaultMma<
      X, cutlass::layout::RowMajor, 16 / sizeof(X), int8_t, cutlass::layout::ColumnMajor, 16, Sum,
      cutlass::layout::RowMajor, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Block, Warp,
      Instruction, kStages, Operator>::ThreadblockMma;
  static constexpr int kWarpsM = Block::kM / Warp::kM;
  static constexpr int kThreads = kWarpsM * (Block::kN / Warp::kN) * kWarpSize;
  // Tiles of so many rows' tiles are taken together, so that their weights are still in L2.
  static constexpr int kRowTilesTogether = 8;
};

struct AmpereArgs {
  const void* x;
  const void* weight;
  int k_dim;
  GemmEpilogue epilogue;
};

template <class X, bool kIsAligned>
__global__ void __launch_bounds__(AmpereTile<X>::kThreads) AmpereGemmKernel(AmpereArgs args) {
  using Tile = AmpereTile<X>;
  using Mma = typename Tile::Mma;
  extern __shared__ __align__(16) unsigned char shared[];
  WaitForDependency();
  const int row_tiles = (args.epilogue.rows + Tile::Block::kM - 1) / Tile::Block::kM;
  const int output_tiles = (args.epilogue.num_outputs + Tile::Block::kN - 1) / Tile::Block::kN;
  const int band = static_cast<int>(blockIdx.x) / (Tile::kRowTilesTogether * output_tiles);
  const int first_tile = band * Tile::kRowTilesTogether;
  const int band_tiles = min(Tile::kRowTilesTogether, row_tiles - first_tile);
  const int in_band = static_cast<int>(blockIdx.x) % (Tile::kRowTilesTogether * output_tiles);
  const int first_row = (first_tile + in_band % band_tiles) * Tile::Block::kM;
  const int first_output = in_band / band_tiles * Tile::Block::kN;

  const int thread = threadIdx.x;
  const int warp = cutlass::canonical_warp_idx_sync();
  const int lane = thread % kWarpSize;
  typename Mma::IteratorA x_iterator(
      typename Mma::IteratorA::Params(cutlass::layout::RowMajor(args.k_dim)),
      static_cast<X*>(const_cast<void*>(args.x)), {args.epilogue.rows, args.k_dim}, thread,
      {first_row, 0});
  typename Mma::IteratorB weight_iterator(
      typename Mma::IteratorB::Params(cutlass::layout::ColumnMajor(args.k_dim)),
      static_cast<int8_t*>(const_cast<void*>(args.weight)), {args.k_dim, args.epilogue.num_outputs},
      thread, {0, first_output});
  Mma mma(*reinterpret_cast<typename Mma::SharedStorage*>(shared), thread, warp, lane);
  typename Mma::FragmentC sums;
  sums.clear();
  mma((args.k_dim + Tile::Block::kK - 1) / Tile::Block::kK, sums, x_iterator, weight_iterator,
      sums);

  // A fragment: 16 x 8 tiles, those of a column of them first; of each two neighbours of a row and
  // two of the row eight below.
  constexpr int kRowTiles = Tile::Warp::kM / 16;
  constexpr int kGroups = Tile::Warp::kN / 8;
  static_assert(Mma::FragmentC::kElements == kRowTiles * kGroups * 4);
  const int row = first_row + warp % Tile::kWarpsM * Tile::Warp::kM + lane / 4;
  const int output = first_output + warp / Tile::kWarpsM * Tile::Warp::kN + lane % 4 * 2;
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
    args.epilogue.Finish<kIsAligned, kGroups>(row + 16 * tile, output, [&](int half, int group) {
      const int at = (group * kRowTiles + tile) * 4 + half * 2;
      return make_float2(static_cast<float>(sums[at]), static_cast<float>(sums[at + 1]));
    });
  }
}

template <class X, bool kIsAligned>
const char* LaunchAmpere(const AmpereArgs& args, cudaStream_t stream) {
  using Tile = AmpereTile<X>;
  constexpr int kSharedBytes = sizeof(typename Tile::Mma::SharedStorage);
  const auto& traits = TraitsOf<AmpereGemmKernel<X, kIsAligned>>([](bool) { return kSharedBytes; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  const int64_t row_tiles = (args.epilogue.rows + Tile::Block::kM - 1) / Tile::Block::kM;
  const int64_t output_tiles = (args.epilogue.num_outputs + Tile::Block::kN - 1) / Tile::Block::kN;
  if (row_tiles * output_tiles > INT32_MAX) return "the product has too many tiles";
  return MessageOf(Launch<AmpereGemmKernel<X, kIsAligned>>(
      traits, dim3(static_cast<uint32_t>(row_tiles * output_tiles)), Tile::kThreads, kSharedBytes,
      stream, args));
}

template <class X>
const char* AmpereGemm(const GemmParams& params, cudaStream_t stream) {
  const AmpereArgs args = {params.x, params.weight, static_cast<int>(params.k_dim),
                           GemmEpilogue(params)};
  return args.epilogue.AreAligned() ? LaunchAmpere<X, true>(args, stream)
                                    : LaunchAmpere<X, false>(args, stream);
}

}  // namespace kogpt

#endif  // CUSTOM_OPS_GEMM_AMPERE_CUH_
