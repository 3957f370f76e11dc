// Products on sm_90a (linear_hopper.cuh): what a block multiplies at a time, what it is told, and the
// marks that order early columns.
#ifndef CUSTOM_OPS_LINEAR_TILE_CUH_
#define CUSTOM_OPS_LINEAR_TILE_CUH_

#include <cstdint>

#include "linear_outputs.cuh"
#include "linear_prepare.cuh"
#include "wgmma.cuh"

namespace kogpt {

inline constexpr int kWgmmaRows = 64;
inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kMaxStages = 16;
inline constexpr int kStepsPerChunk = 4;  // of 32 bytes of K
inline constexpr int kStepBytes = 32;
// Leaves room beside it for attention, and what goes ahead of the next product.
inline constexpr int kRingBytes = 203 * 1024;
// Scales of a group's rows: of 64, or of four parts of 16, for two stages.
inline constexpr int kStageScaleBytes = 128;
inline constexpr int kMaxSplits = 8;
inline constexpr int kMaxParts = 192;  // tiles times splits, where there are splits
inline constexpr int kMaxTileOutputs = 256;
inline constexpr int64_t kMaxInt8K = 131056;  // times 128 times 128 fits 32 bits
// Rows up to which a block adds up the parts of K itself: each block then reads all of x.
inline constexpr int kMaxRowsOfWholeSums = 16;

// What a product multiplies the weight by; beside an INT8 weight integers.
enum class Activations {
  kAsTheyAre,      // 16 bits
  kRowScales,      // integers with a scale a row
  kGroupScales,    // with a scale for each group of columns of a row
  kRoundedInBlock  // the same, of one row that each block rounds
};

template <Activations kActivations>
constexpr bool kIsGrouped =
    kActivations == Activations::kGroupScales || kActivations == Activations::kRoundedInBlock;

// Chunks that are multiplied with one scale.
template <Activations kActivations>
constexpr int kChunksOfGroup = kIsGrouped<kActivations> ? kDigitGroup / kBoxRowBytes : 1;

// What a block multiplies at a time, and how its warpgroups share it.
template <int kOutputs_, int kRowTiles_, int kParts_>
struct Tile {
  static constexpr int kOutputs = kOutputs_;
  static constexpr int kRowTiles = kRowTiles_;  // of 64 rows of the activations' operand
  static constexpr int kParts = kParts_;        // of K, to be added up
  static constexpr int kPartGroups = kParts > 1 ? 2 : 1;
  static constexpr int kColumnGroups = kParts > 1 || kOutputs <= 112 ? 1 : 2;
  static constexpr int kGroups = kColumnGroups * kPartGroups * kRowTiles;
  // A warpgroup's.
  static constexpr int kOwnParts = kParts / kPartGroups;
  static constexpr int kColumns = kOutputs / kColumnGroups;
  // Of a row of its sums in shared memory: padded so that rows begin in other banks.
  static constexpr int kStagingStride = kColumns + 8;
  // A chunk's weights, of one part.
  static constexpr int kWeightBytes = kOutputs * kBoxRowBytes;
  static constexpr int kNumSums = kOwnParts * kColumns;
};

// Warps of a block that round: one for each part.
template <typename Tile, Activations kActivations>
constexpr int kRoundingWarps = kActivations == Activations::kRoundedInBlock ? Tile::kParts : 0;

// One warp copies weights, one activations.
template <typename Tile, Activations kActivations>
constexpr int kProductThreads =
    Tile::kGroups * kWarpgroupThreads + (2 + kRoundingWarps<Tile, kActivations>)*kWarpSize;

// Three warps with 96 on a quarter of a multiprocessor leave room for two of attention with 112, four
// with 72, and a block of 18 warps with less for what goes ahead of the next product.
template <typename Tile, Activations kActivations, int kDigits>
constexpr int kProductRegisters =
    kIsGrouped<kActivations> ? (kRoundingWarps<Tile, kActivations> > 0 || kDigits == 2 ? 72 : 96)
    : Tile::kNumSums <= 64   ? 64
    : Tile::kNumSums <= 112  ? 88
                             : 96;

// The scales of digits are at the beginning of `partials`, the parts of K behind them.
inline int64_t ScalesSize(int64_t rows) {
  return (NumDigitGroups(kMaxInt8K) + 1) * PaddedRows(static_cast<int>(rows));
}
inline int64_t PartsSize(int64_t rows) { return int64_t{kMaxParts} * kMaxTileOutputs * rows; }
inline float* Parts(const LinearParams& params) {
  return params.partials + ScalesSize(params.rows);
}

struct ProductArgs {
  CUtensorMap weight_map;
  CUtensorMap x_map;
  LinearOutputs outputs;
  const void* x;         // [k_dim] of 16 bits, where blocks round it
  const float* x_scale;  // of digits: [rows], or [groups + 1, PaddedRows(rows)]
  float* parts;          // [splits, rows, part_stride]
  int part_stride;
  int num_tiles;
  int num_units;  // tiles, times splits where a block has one part of K
  int splits;
  int k_dim;
  int num_groups;     // of K's chunks
  int num_stages;     // a multiple of a group's chunks
  int max_under_way;  // of stages' weights
  int x_bytes;        // of a chunk of a part
  int staging_bytes;  // of a warpgroup's sums in shared memory, or of a part's
  bool drains;        // the ring, for these
  bool prefetch_weight;
  int num_late_groups = 0;  // the first ones, with an awaited mark
  int done_mark = 0;
  int awaited_mark = 0;
  int32_t* marks;

  explicit ProductArgs(const LinearParams& params)
      : outputs(params), parts(Parts(params)), prefetch_weight(params.prefetch_weight) {}
};

// A part of K: its share of the groups of chunks that are early, then of those that are late. No part
// has more chunks than the last one.
template <Activations kActivations>
struct Part {
  static constexpr int kGroupChunks = kChunksOfGroup<kActivations>;
  // Of products behind a LayerNorm all columns are there at once.
  static constexpr bool kMayBeLate = kActivations != Activations::kRowScales;
  int num_early, num_chunks, first_early, first_late;

  __device__ __forceinline__ Part(const ProductArgs& args, int split) {
    const int late = kMayBeLate ? args.num_late_groups : 0;
    const int early = args.num_groups - late;
    first_early = (late + split * early / args.splits) * kGroupChunks;
    num_early = (late + (split + 1) * early / args.splits) * kGroupChunks - first_early;
    first_late = kMayBeLate ? split * late / args.splits * kGroupChunks : 0;
    num_chunks = num_early;
    if (kMayBeLate) num_chunks += (split + 1) * late / args.splits * kGroupChunks - first_late;
  }

  __device__ __forceinline__ int Chunk(int i) const {
    return !kMayBeLate || i < num_early ? first_early + i : first_late + i - num_early;
  }
};

inline int32_t* Marks(const LinearParams& params) {
  return params.semaphores + kNumSemaphores - kNumMarkSemaphores;
}

// One thread of each block, behind all that the block has written: of the grid's last one the mark
// tells that all of it is there.
__device__ __forceinline__ void TellMark(int32_t* marks, int mark) {
  __threadfence();
  const unsigned last = gridDim.x * gridDim.y - 1;
  if (atomicInc(reinterpret_cast<unsigned*>(marks), last) == last) {
    __threadfence();
    atomicExch(marks + 1, mark);
  }
}

}  // namespace kogpt

#endif  // CUSTOM_OPS_LINEAR_TILE_CUH_
