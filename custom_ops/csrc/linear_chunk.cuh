// One chunk of a decode-sized product on tensor cores: how it lies in shared memory, and how the warps
// of a block multiply it.
//
// The weight is the m16n8k16 instruction's A operand (outputs x k), the activations its B operand
// (k x rows), so that 1 to 64 rows are 1, 2, 4 or 8 tiles of 8 columns and nothing else changes: an
// output's sum is taken in the same order whatever the number of rows.
#ifndef CUSTOM_OPS_LINEAR_CHUNK_CUH_
#define CUSTOM_OPS_LINEAR_CHUNK_CUH_

#include <type_traits>

#include "cuda_common.cuh"

namespace kogpt {

inline constexpr int kWarps = 8;
inline constexpr int kThreads = kWarps * kWarpSize;
inline constexpr int kWarpOutputs = 16;  // of one m16n8k16
inline constexpr int kTileOutputs = kWarps * kWarpOutputs;
inline constexpr int kTileRows = 8;

// A chunk is 128 bytes of each row of the weight, and the activations that meet it, in boxes of 128
// bytes a row.
inline constexpr int kWeightBoxBytes = kTileOutputs * kBoxRowBytes;

// Sizes of the ring: 96 KiB fit every GPU from compute capability 8.0 on.
template <typename Weight, int kRowTiles>
struct Ring {
  static constexpr int kChunkK = kBoxRowBytes / static_cast<int>(sizeof(Weight));
  static constexpr int kActivationBoxes = kChunkK * 2 / kBoxRowBytes;
  static constexpr int kActivationBoxBytes = kRowTiles * kTileRows * kBoxRowBytes;
  static constexpr int kStageBytes = kWeightBoxBytes + kActivationBoxes * kActivationBoxBytes;
  static constexpr int kStages = 96 * 1024 / kStageBytes;
  static_assert(kStages >= 3);

  static constexpr int kSharedBytes = kStages * kStageBytes + kBoxAlignment;
};

// Four 8 x 8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ uint4 LoadMatrices(uint32_t address) {
  uint4 value;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// What a lane multiplies in one step is 32 k of 16 outputs' weights and of all rows' activations.
// 16-bit weights and their activations come as the instruction names them. Of 64 INT8 weights of a
// row lane t takes 16 neighbouring ones instead, for two steps, and the activations that belong to
// them: a sum may visit k in any order.
template <typename Weight>
constexpr int kStepsPerBox = kBoxRowBytes / static_cast<int>(sizeof(Weight)) / 32;

template <typename Weight>
__device__ __forceinline__ void LoadWeights(uint32_t stage, int step, uint4 (&weights)[2]) {
  const int lane = threadIdx.x % kWarpSize;
  const int output = threadIdx.x / kWarpSize * kWarpOutputs;
  if constexpr (sizeof(Weight) == 1) {
    const int piece = step * 2 + lane % 4;
    weights[0] = LoadShared(stage + PieceOffset(output + lane / 4, piece));
    weights[1] = LoadShared(stage + PieceOffset(output + lane / 4 + 8, piece));
  } else {
    const int piece = step * 4 + lane / 16;
    weights[0] = LoadMatrices(stage + PieceOffset(output + lane % 16, piece));
    weights[1] = LoadMatrices(stage + PieceOffset(output + lane % 16, piece + 2));
  }
}

template <typename Weight, int kRowTiles>
__device__ __forceinline__ void LoadActivations(uint32_t stage, int step, uint4 (&x)[kRowTiles]) {
  const int lane = threadIdx.x % kWarpSize;
  using Ring = Ring<Weight, kRowTiles>;
  const uint32_t box = stage + kWeightBoxBytes + step / 2 * Ring::kActivationBoxBytes;
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
    const uint32_t rows = box + row_tile * kTileRows * kBoxRowBytes;
    if constexpr (sizeof(Weight) == 1) {
      x[row_tile] = LoadShared(rows + PieceOffset(lane / 4, lane % 4 * 2 + step % 2));
    } else {
      x[row_tile] = LoadMatrices(rows + PieceOffset(lane % 8, step % 2 * 4 + lane / 8));
    }
  }
}

// sums += the products of steps kStep, kStep + 1, ... of the chunk in the stage at `stage`. One
// step's operands are multiplied while the next one's are loaded; the caller loads the first.
template <typename T, typename Weight, int kRowTiles, int kStep>
__device__ __forceinline__ void MultiplySteps(uint32_t stage, uint4 (&weights)[2][2],
                                              uint4 (&x)[2][kRowTiles],
                                              float (&sums)[kRowTiles][4]) {
  constexpr int kSteps = kStepsPerBox<Weight>;
  constexpr int kStepsPerLoad = sizeof(Weight) == 1 ? 2 : 1;
  constexpr int kNext = kStep + 1;
  if constexpr (kNext < kSteps) {
    if constexpr (kNext % kStepsPerLoad == 0) {
      LoadWeights<Weight>(stage, kNext, weights[kNext / kStepsPerLoad % 2]);
    }
    LoadActivations<Weight>(stage, kNext, x[kNext % 2]);
  }
  const uint4(&now)[2] = weights[kStep / kStepsPerLoad % 2];
  // A operands of the step's two instructions: top and bottom eight outputs, low and high half of
  // k.
  uint32_t a[2][4];
  if constexpr (sizeof(Weight) == 1) {
    constexpr bool kIsEven = kStep % 2 == 0;
    const Widened<T> top(kIsEven ? now[0].x : now[0].z, kIsEven ? now[0].y : now[0].w);
    const Widened<T> bottom(kIsEven ? now[1].x : now[1].z, kIsEven ? now[1].y : now[1].w);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[i][0] = top.words[2 * i], a[i][1] = bottom.words[2 * i];
      a[i][2] = top.words[2 * i + 1], a[i][3] = bottom.words[2 * i + 1];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      a[i][0] = now[i].x, a[i][1] = now[i].y, a[i][2] = now[i].z, a[i][3] = now[i].w;
  }
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
    MultiplyAdd<T>(sums[row_tile], a[0], x[kStep % 2][row_tile].x, x[kStep % 2][row_tile].y);
  }
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
    MultiplyAdd<T>(sums[row_tile], a[1], x[kStep % 2][row_tile].z, x[kStep % 2][row_tile].w);
  }
  if constexpr (kNext < kSteps) MultiplySteps<T, Weight, kRowTiles, kNext>(stage, weights, x, sums);
}

template <typename T, typename Weight, int kRowTiles>
__device__ __forceinline__ void MultiplyChunk(uint32_t stage, float (&sums)[kRowTiles][4]) {
  uint4 weights[2][2], x[2][kRowTiles];
  LoadWeights<Weight>(stage, 0, weights[0]);
  LoadActivations<Weight>(stage, 0, x[0]);
  MultiplySteps<T, Weight, kRowTiles, 0>(stage, weights, x, sums);
}

}  // namespace kogpt

#endif  // CUSTOM_OPS_LINEAR_CHUNK_CUH_
