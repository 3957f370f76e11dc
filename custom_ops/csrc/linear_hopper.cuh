// Decode-sized products on sm_90a: every row of activations meets all of a block's outputs in one
// instruction (wgmma), so that 64 rows cost what one does, and reading the weight is what remains.
//
//   work      tiles of 112, 128, 224 or 256 outputs, and where these are few, parts of their K. How a
//             weight is cut depends on its shape, its early columns and the device alone, and nothing
//             in a row's sums on the other rows.
//   a tile    goes through a ring in shared memory that two warps fill with tensor copies, 128
//             bytes of K at a time: one the weight before the kernel ahead has ended, the other
//             the activations behind it. Two groups of four warps multiply, half of the outputs
//             each, or of the parts of K that a block adds up, or one group where the outputs are
//             112; twice as many where the operand has 128 rows.
//   INT8      meets integers: the tensor cores multiply the weight as it lies by 8-bit activations, or by
//             the two digits of 16-bit ones (linear_prepare.cuh), two rows of an operand for a row of
//             x, of each sixteen rows the first eight and the last. Sums are exact: those of a row
//             behind a LayerNorm, else those of a group of columns, which has a scale of its own, so
//             that nobody must have seen all of a row before its first column is multiplied. A block
//             rounds a single row itself, in place of a kernel ahead.
//   outputs   go from the sums' registers through the ring, so that all threads share what there is
//             to do, however few the rows: through the last chunk's place where that is enough, else
//             through all of it, and the next tile's chunks wait.
//   parts     of K go to scratch; a kernel behind adds them up in order, while the next product's
//             blocks fill their rings. For few rows a block takes all parts of fewer outputs instead,
//             and adds them up itself, in the same order: the same bits.
//   early     columns of x are what the product before the kernel ahead has written, which tells
//             that in the semaphores: every block multiplies them while the kernel ahead, attention,
//             still runs, and the others last.
#ifndef CUSTOM_OPS_LINEAR_HOPPER_CUH_
#define CUSTOM_OPS_LINEAR_HOPPER_CUH_

#include <algorithm>
#include <limits>
#include <type_traits>

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

#if __CUDA_ARCH__ == 900
// The stages of the ring in turn.
struct RingCursor {
  int index = 0;
  int parity = 0;  // flips with each time around

  __device__ __forceinline__ void Advance(int num_stages) {
    if (++index == num_stages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// Where a chunk's activations and weights are in the ring: those of all stages lie together, so that
// an instruction that reads 64 rows where fewer are stays within the ring.
template <typename Tile>
struct ProductRing {
  uint32_t begin, weights, scales, barriers;
  int x_bytes;

  __device__ __forceinline__ ProductRing(const ProductArgs& args, uint32_t shared,
                                         uint32_t barriers_in)
      : begin((shared + kBoxAlignment - 1) / kBoxAlignment * kBoxAlignment),
        weights(begin + args.num_stages * Tile::kParts * args.x_bytes),
        scales(weights + args.num_stages * Tile::kParts * Tile::kWeightBytes),
        barriers(barriers_in),
        x_bytes(args.x_bytes) {}

  __device__ __forceinline__ uint32_t X(int stage, int part) const {
    return begin + (stage * Tile::kParts + part) * x_bytes;
  }
  __device__ __forceinline__ uint32_t Weights(int stage, int part) const {
    return weights + (stage * Tile::kParts + part) * Tile::kWeightBytes;
  }
  // Of the group that begins with this stage, of a part's rows.
  __device__ __forceinline__ uint32_t Scales(int stage, int part, int padded_rows) const {
    return scales + stage * kStageScaleBytes + part * padded_rows * 4;
  }
  // Where blocks round: a group of columns before that, in rows of its first stage's operand that have no
  // digits.
  __device__ __forceinline__ uint32_t Unrounded(int stage, int part) const {
    return X(stage, part) + 4 * kBoxRowBytes;
  }
  // Barriers: what was copied is there, and all groups are done with a stage.
  __device__ __forceinline__ uint32_t FullX(int stage) const { return barriers + stage * 32; }
  __device__ __forceinline__ uint32_t FullWeights(int stage) const {
    return barriers + stage * 32 + 8;
  }
  __device__ __forceinline__ uint32_t FullUnrounded(int stage) const {
    return barriers + stage * 32 + 16;
  }
  __device__ __forceinline__ uint32_t Empty(int stage) const { return barriers + stage * 32 + 24; }
  // And with the whole ring, where a tile's outputs go through it.
  __device__ __forceinline__ uint32_t Drained() const { return barriers + kMaxStages * 32; }
};

// Where a unit of a block's work lies.
struct Unit {
  int tile, split;

  __device__ __forceinline__ Unit(const ProductArgs& args, int index)
      : tile(index % args.num_tiles), split(index / args.num_tiles) {}
};

// The number of chunks of a unit's longest part.
template <typename Tile, Activations kActivations>
__device__ __forceinline__ int ChunksOf(const ProductArgs& args, const Unit& unit) {
  return Part<kActivations>(args, unit.split + Tile::kParts - 1).num_chunks;
}

// Calls copy(chunk of a part of K, tile, stage) for all of a block's stages, once their places are
// free. The first lanes of a warp, one or several for each part: a single one that copied them in turn
// would fall behind.
template <typename Tile, Activations kActivations, typename Copy>
__device__ __forceinline__ void ForEachStage(const ProductArgs& args, const ProductRing<Tile>& ring,
                                             int part, Copy&& copy) {
  constexpr int kGroupChunks = kChunksOfGroup<kActivations>;
  RingCursor stage;
  bool is_around = false;
  int parity = 0;  // of the units
  for (int index = blockIdx.x; index < args.num_units; index += gridDim.x) {
    const Unit unit(args, index);
    const Part<kActivations> own(args, unit.split + part);
    const int num_chunks =
        Tile::kParts == 1 ? own.num_chunks : ChunksOf<Tile, kActivations>(args, unit);
    if (args.drains && index >= gridDim.x) {
      BarrierWait(ring.Drained(), parity);
      parity ^= 1;
    }
    for (int i = 0; i < num_chunks; ++i) {
      if (is_around) BarrierWait(ring.Empty(stage.index), stage.parity ^ 1);
      // Where the part has no chunk left, one beyond K's end, of which copies make zeros.
      const bool is_there = Tile::kParts == 1 || i < own.num_chunks;
      copy(is_there ? own.Chunk(i) : args.num_groups * kGroupChunks + i % kGroupChunks, unit.tile,
           stage);
      stage.Advance(args.num_stages);
      is_around = is_around || stage.index == 0;
    }
  }
}

// Lanes as ForEachStage has them, one a part. No more than what saturates device memory is under way at
// a time: what a small kernel reads meanwhile, attention ahead of this product above all, waits behind
// it.
template <typename Weight, typename Tile, Activations kActivations>
__device__ void CopyWeights(const ProductArgs& args, const ProductRing<Tile>& ring, int part) {
  constexpr int kChunkK = kBoxRowBytes / static_cast<int>(sizeof(Weight));
  const uint64_t policy = EvictFirst();  // what is read once must not drive out what is read again
  if (!args.prefetch_weight) WaitForDependency();
  RingCursor arrived;
  int num_under_way = 0;
  ForEachStage<Tile, kActivations>(
      args, ring, part, [&](int chunk, int tile, const RingCursor& stage) {
        if (num_under_way < args.max_under_way) {
          ++num_under_way;
        } else {
          BarrierWait(ring.FullWeights(arrived.index), arrived.parity);
          arrived.Advance(args.num_stages);
        }
        const uint32_t full = ring.FullWeights(stage.index);
        if (part == 0) BarrierArriveExpecting(full, Tile::kParts * Tile::kWeightBytes);
        CopyBox(ring.Weights(stage.index, part), args.weight_map, chunk * kChunkK,
                tile * Tile::kOutputs, full, policy);
      });
}

// What tensor copies read then is there.
__device__ __forceinline__ void AwaitMark(const int32_t* marks, int mark) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(seen) : "l"(marks + 1) : "memory");
  } while (seen != mark);
  asm volatile("fence.proxy.async;\n" ::: "memory");
}

// Lanes as ForEachStage has them, one a part, and of two digits one for each eight rows besides.
template <typename T, typename Weight, typename Tile, Activations kActivations, int kDigits>
__device__ void CopyActivations(const ProductArgs& args, const ProductRing<Tile>& ring, int lane) {
  constexpr int kChunkK = kBoxRowBytes / static_cast<int>(sizeof(Weight));
  constexpr bool kIsRounded = kActivations == Activations::kRoundedInBlock;
  constexpr bool kMayAwaitMark = kIsRounded || kActivations == Activations::kAsTheyAre;
  const int part = lane % Tile::kParts;
  const int eight_rows = lane / Tile::kParts;
  const int padded_rows = PaddedRows(args.outputs.rows);
  if (lane >= (kDigits == 2 ? Tile::kParts * padded_rows / 8 : Tile::kParts)) return;
  if (kMayAwaitMark && args.awaited_mark != 0) {
    AwaitMark(args.marks, args.awaited_mark);
    __syncwarp((1u << Tile::kParts) - 1);
    if (lane == 0) TellMark(args.marks, 0);  // once all blocks have seen it
  } else {
    WaitForDependency();
  }
  ForEachStage<Tile, kActivations>(args, ring, part, [&](int chunk, int, const RingCursor& stage) {
    const int group = chunk / kChunksOfGroup<kActivations>;
    const bool begins_group = chunk % kChunksOfGroup<kActivations> == 0;
    if (kMayAwaitMark && group < args.num_late_groups) WaitForDependency();
    if constexpr (kIsRounded) {
      if (!begins_group) return;
      const int column = group * kDigitGroup;
      const int bytes = min(max(args.k_dim - column, 0), kDigitGroup) * 2;
      const uint32_t full = ring.FullUnrounded(stage.index);
      BarrierArriveExpecting(full, bytes);
      if (bytes > 0) {
        CopyBytes(ring.Unrounded(stage.index, part), static_cast<const T*>(args.x) + column, bytes,
                  full);
      }
      return;
    }
    const uint32_t full = ring.FullX(stage.index);
    const int scale_bytes = kIsGrouped<kActivations> && begins_group ? padded_rows * 4 : 0;
    if (lane == 0) {
      BarrierArriveExpecting(full, Tile::kParts * (args.x_bytes + scale_bytes));
    }
    const uint32_t to = ring.X(stage.index, part);
    if constexpr (kDigits == 2) {
      constexpr int kBoxBytes = 16 * kBoxRowBytes;
      CopyBox3(to + eight_rows * kBoxBytes, args.x_map, chunk * kChunkK, eight_rows * 8, full);
    } else {
      CopyBox(to, args.x_map, chunk * kChunkK, 0, full);
    }
    if (scale_bytes > 0 && eight_rows == 0) {
      CopyBytes(ring.Scales(stage.index, part, padded_rows), args.x_scale + group * padded_rows,
                scale_bytes, full);
    }
  });
}

// Makes digits of a row of x, a warp of a part of K. Little code, for what stands above `ForEachVector`.
template <typename T, typename Tile, int kDigits>
__device__ void RoundActivations(const ProductArgs& args, const ProductRing<Tile>& ring, int part) {
  constexpr auto kActivations = Activations::kRoundedInBlock;
  static_assert(kChunksOfGroup<kActivations> == 2);
  const int lane = threadIdx.x % kWarpSize;
  // Where a lane's eight columns of a group are in a stage.
  const uint32_t place = PieceOffset(0, lane % 16 / 2) + lane % 2 * 8;
  RingCursor stage;
  for (int index = blockIdx.x; index < args.num_units; index += gridDim.x) {
    const Unit unit(args, index);
    const Part<kActivations> own(args, unit.split + part);
    const int num_chunks = ChunksOf<Tile, kActivations>(args, unit);
#pragma unroll 1
    for (int i = 0; i < num_chunks; i += 2) {
      const RingCursor first = stage;
      stage.Advance(args.num_stages);
      const int second = stage.index;
      stage.Advance(args.num_stages);
      BarrierWait(ring.FullUnrounded(first.index), first.parity);
      const bool is_there =
          i < own.num_chunks && own.Chunk(i) * kBoxRowBytes + lane * 8 < args.k_dim;
      const uint4 bits = is_there ? LoadShared(ring.Unrounded(first.index, part) + lane * 16)
                                  : make_uint4(0, 0, 0, 0);
      float values[8];
      Unpack<T>(bits, values);
      float scale;
      const EightDigits<kDigits> eight = RoundGroup<kDigits>(values, &scale);
      const uint32_t to = ring.X(lane < 16 ? first.index : second, part) + place;
#pragma unroll
      for (int digit = 0; digit < kDigits; ++digit) {
        StoreShared(to + digit * 8 * kBoxRowBytes, eight.digits[digit]);
      }
      if (lane == 0) {
        StoreShared(ring.Scales(first.index, part, PaddedRows(1)), __float_as_uint(scale));
      }
      // The second stage's place is free, too: of a group's two both are released behind its last product.
      FenceForAsync();
      __syncwarp();
      if (lane == 0) {
        BarrierArrive(ring.FullX(first.index));
        BarrierArrive(ring.FullX(second));
      }
    }
  }
}

// With numbers that the compiler sees: it would set all sixteen aside for one that it does not.
__device__ __forceinline__ void WarpgroupBarrier(int warpgroup) {
  switch (warpgroup) {
    case 0:
      asm volatile("bar.sync 1, %0;\n" ::"n"(kWarpgroupThreads) : "memory");
      break;
    case 1:
      asm volatile("bar.sync 2, %0;\n" ::"n"(kWarpgroupThreads) : "memory");
      break;
    case 2:
      asm volatile("bar.sync 3, %0;\n" ::"n"(kWarpgroupThreads) : "memory");
      break;
    default:
      asm volatile("bar.sync 4, %0;\n" ::"n"(kWarpgroupThreads) : "memory");
      break;
  }
}

// A warpgroup's sums of so many rows of x to shared memory at `staging`: sum_of(i) is a thread's i-th, of
// one or two rows, two neighbouring columns of each in turn.
template <typename Tile, int kRowsOfThread, typename SumOf>
__device__ __forceinline__ void StageSums(int rows, float* staging, SumOf&& sum_of) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int warp_row = thread / kWarpSize * 8 * kRowsOfThread;
  const int lane = thread % kWarpSize;
#pragma unroll
  for (int half = 0; half < kRowsOfThread; ++half) {
    if (warp_row + half * 8 >= rows) continue;
    float* const to =
        staging + (warp_row + half * 8 + lane / 4) * Tile::kStagingStride + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < Tile::kColumns / 8; ++i) {
      const int at = 2 * (kRowsOfThread * i + half);
      *reinterpret_cast<float2*>(to + i * 8) = make_float2(sum_of(at), sum_of(at + 1));
    }
  }
}

// Eight neighbouring columns of them, of a row.
template <int kStride>
__device__ __forceinline__ void LoadSums(const float* staging, int row, int column,
                                         float (&values)[LinearOutputs::kVector]) {
  const auto* from = reinterpret_cast<const float4*>(staging + row * kStride + column);
  const float4 low = from[0], high = from[1];
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

// Calls body(row, column, sums of eight neighbouring columns) for a warpgroup's sums, as `StageSums` has
// them, which go through shared memory at `staging`. Instructions come from device memory, too, behind
// all weights that are under way, so that what is done for eight sums stands here once.
template <typename Tile, int kRowsOfThread, typename SumOf, typename Body>
__device__ __forceinline__ void ForEachVector(int warpgroup, int rows, float* staging,
                                              SumOf&& sum_of, Body&& body) {
  constexpr int kVectors = Tile::kColumns / LinearOutputs::kVector;  // of a row
  StageSums<Tile, kRowsOfThread>(rows, staging, sum_of);
  WarpgroupBarrier(warpgroup);
  const int count = rows * kVectors;
#pragma unroll 1
  for (int i = threadIdx.x % kWarpgroupThreads; i < count; i += kWarpgroupThreads) {
    const int row = i / kVectors;
    const int column = i % kVectors * LinearOutputs::kVector;
    float values[LinearOutputs::kVector];
    LoadSums<Tile::kStagingStride>(staging, row, column, values);
    body(row, column, values);
  }
}
#endif

// `kDigits`: of an activation beside an INT8 weight, else 1.
template <typename T, typename Weight, typename Tile, Activations kActivations, int kDigits>
__global__ void __maxnreg__((kProductRegisters<Tile, kActivations, kDigits>))
    ProductKernel(const __grid_constant__ ProductArgs args) {
#if __CUDA_ARCH__ == 900
  constexpr bool kIsInt8 = sizeof(Weight) == 1;
  constexpr bool kHasGroups = kIsGrouped<kActivations>;
  constexpr bool kHasRowScale = kActivations == Activations::kRowScales;
  constexpr int kGroupChunks = kChunksOfGroup<kActivations>;
  using Sum = std::conditional_t<kIsInt8, int32_t, float>;
  constexpr int kGroups = Tile::kGroups;
  constexpr int kColumns = Tile::kColumns;
  constexpr int kOwnParts = Tile::kOwnParts;
  constexpr bool kHasWholeSums = Tile::kParts > 1;
  constexpr int kNumRounding = kRoundingWarps<Tile, kActivations>;
  constexpr int kTileRows = kWgmmaRows / kDigits;                         // of x
  constexpr int kRowsOfThread = kNumRounding > 0 ? 1 : 2 / kDigits;       // of x
  constexpr int kTotals = kHasGroups ? kRowsOfThread * kColumns / 4 : 1;  // of a thread
  constexpr int kVector = LinearOutputs::kVector;
  extern __shared__ unsigned char shared[];
  __shared__ uint64_t barriers[4 * kMaxStages + 1];
  // Of the outputs of a unit and the one before it.
  __shared__ float scales[2][Tile::kOutputs], biases[2][Tile::kOutputs];
  __shared__ float row_scales[kHasRowScale ? kLinearMaxRows : 1];
  const ProductRing<Tile> ring(args, SharedAddress(shared), SharedAddress(barriers));
  const int warpgroup = Uniform(threadIdx.x / kWarpgroupThreads);
  const int thread = threadIdx.x % kWarpgroupThreads;

  LaunchDependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < args.num_stages; ++i) {
      BarrierInit(ring.FullX(i), kNumRounding > 0 ? kNumRounding : 1);
      BarrierInit(ring.FullWeights(i), 1);
      BarrierInit(ring.FullUnrounded(i), Tile::kParts);
      BarrierInit(ring.Empty(i), kGroups);
    }
    BarrierInit(ring.Drained(), kGroups);
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  }
  __syncthreads();
  if (warpgroup >= kGroups) {
    const int warp = Uniform(threadIdx.x / kWarpSize) - kGroups * kWarpgroupThreads / kWarpSize;
    const int lane = thread % kWarpSize;
    if (warp == 0) {
      if (lane < Tile::kParts) CopyWeights<Weight, Tile, kActivations>(args, ring, lane);
    } else if (warp == 1) {
      CopyActivations<T, Weight, Tile, kActivations, kDigits>(args, ring, lane);
    } else if constexpr (kNumRounding > 0) {
      RoundActivations<T, Tile, kDigits>(args, ring, warp - 2);
    }
    return;
  }
  // What is read ahead of the products may come from the kernel ahead; x itself is behind its copies.
  if (kHasRowScale || !args.prefetch_weight) WaitForDependency();

  const int first_column = warpgroup % Tile::kColumnGroups * kColumns;
  const int part_group = warpgroup / Tile::kColumnGroups % Tile::kPartGroups;
  const int row_tile = warpgroup / (Tile::kColumnGroups * Tile::kPartGroups);
  const int first_row = row_tile * kTileRows;
  const LinearOutputs& outputs = args.outputs;
  const int num_rows = min(outputs.rows - first_row, kTileRows);
  if (kHasRowScale && threadIdx.x < outputs.rows) {
    row_scales[threadIdx.x] = __ldcg(args.x_scale + threadIdx.x);
  }
  // A row of x whose sums this thread has, or another that has a scale where there is none.
  const auto scaled_row = [&](int number) {
    const int row = first_row + thread / kWarpSize * (kTileRows / 4) + thread % kWarpSize / 4;
    return min(row + number * 8, outputs.rows - 1);
  };
  const auto release = [&](int stage) {
    if (thread == 0) BarrierArrive(ring.Empty(stage));
  };
  RingCursor stage;
  int parity = 0;  // of the units
  for (int index = blockIdx.x; index < args.num_units; index += gridDim.x, parity ^= 1) {
    const Unit unit(args, index);
    const int first_output = unit.tile * Tile::kOutputs;
    if ((kHasWholeSums ? part_group == 0 : args.splits == 1) && thread < kColumns) {
      const int column = first_column + thread;
      scales[parity][column] = outputs.Scale(first_output + column);
      biases[parity][column] = outputs.Bias<T>(first_output + column);
    }
    const int num_chunks = ChunksOf<Tile, kActivations>(args, unit);
    Sum sums[kOwnParts][kColumns / 2];
    float totals[kOwnParts][kTotals];
    if constexpr (kHasGroups) {
#pragma unroll
      for (int own = 0; own < kOwnParts; ++own) {
#pragma unroll
        for (float& total : totals[own]) total = 0.0f;
      }
    }
    int last_stage = 0;
    for (int first = 0; first < num_chunks; first += kGroupChunks) {
      const int first_stage = stage.index;
      float group_scales[kOwnParts][kRowsOfThread];
#pragma unroll
      for (int chunk = 0; chunk < kGroupChunks; ++chunk) {
        BarrierWait(ring.FullWeights(stage.index), stage.parity);
        BarrierWait(ring.FullX(stage.index), stage.parity);
        if constexpr (kHasGroups) {
          // Ahead of the products, which all four warps must have begun before one of them can release
          // the stage.
          if (chunk == 0) {
#pragma unroll
            for (int own = 0; own < kOwnParts; ++own) {
              const uint32_t of_group =
                  ring.Scales(first_stage, part_group * kOwnParts + own, PaddedRows(outputs.rows));
#pragma unroll
              for (int row = 0; row < kRowsOfThread; ++row) {
                group_scales[own][row] = LoadSharedFloat(of_group + scaled_row(row) * 4);
              }
            }
          }
        }
        WgmmaFence();
#pragma unroll
        for (int own = 0; own < kOwnParts; ++own) {
          const int part = part_group * kOwnParts + own;
#pragma unroll
          for (int step = 0; step < kStepsPerChunk; ++step) {
            const uint64_t a =
                DescribeAlongK(ring.X(stage.index, part) + row_tile * kWgmmaRows * kBoxRowBytes +
                               step * kStepBytes);
            const uint64_t b = DescribeAlongK(ring.Weights(stage.index, part) +
                                              first_column * kBoxRowBytes + step * kStepBytes);
            const bool adds = chunk > 0 || step > 0 || (!kHasGroups && first > 0);
            WgmmaShared<Weight, kColumns>::Run(sums[own], a, b, adds);
          }
        }
        WgmmaCommit();
        if (!kHasGroups && first > 0) {
          WgmmaWait<1>();
          release(last_stage);
        }
        last_stage = stage.index;
        stage.Advance(args.num_stages);
      }
      if constexpr (kHasGroups) {
        WgmmaWait<0>();
#pragma unroll
        for (int own = 0; own < kOwnParts; ++own) {
          WgmmaKeep(sums[own]);
#pragma unroll
          for (int i = 0; i < kTotals; ++i) {
            const int at = kRowsOfThread == 1 ? i / 2 * 4 + i % 2 : i;
            int sum = sums[own][at];
            // At most 256 times 127 times 127 and as much of the low digits, times 256: below 2^31.
            if constexpr (kDigits == 2) sum = 256 * sum + sums[own][at + 2];
            totals[own][i] = __fmaf_rn(static_cast<float>(sum),
                                       group_scales[own][i / 2 % kRowsOfThread], totals[own][i]);
          }
        }
        release(first_stage);
        if (first + kGroupChunks < num_chunks) release(last_stage);
      }
    }
    if constexpr (!kHasGroups) {
      WgmmaWait<0>();
#pragma unroll
      for (int own = 0; own < kOwnParts; ++own) WgmmaKeep(sums[own]);
    }

    if constexpr (!kHasRowScale) WaitForDependency();  // before the first write
    // All groups are done with the weights; and the scales and biases are there.
    const auto wait_for_groups = [] {
      asm volatile("bar.sync 5, %0;\n" ::"n"(kGroups * kWarpgroupThreads) : "memory");
    };
    wait_for_groups();
    float own_scales[kRowsOfThread];
#pragma unroll
    for (int row = 0; row < kRowsOfThread; ++row) {
      own_scales[row] = kHasRowScale ? row_scales[scaled_row(row)] : 1.0f;
    }
    const auto sum_of = [&](int own, int i) {
      if constexpr (kHasGroups) {
        return totals[own][i];
      } else if constexpr (kDigits == 2) {
        const int at = i / 2 * 4 + i % 2;
        const float high = static_cast<float>(sums[own][at]);
        const float sum = __fmaf_rn(256.0f, high, static_cast<float>(sums[own][at + 2]));
        return __fmul_rn(sum, own_scales[0]);
      } else if constexpr (kIsInt8) {
        return __fmul_rn(static_cast<float>(sums[own][i]), own_scales[i / 2 % kRowsOfThread]);
      } else {
        return sums[own][i];
      }
    };
    const uint32_t staging = args.drains ? ring.begin : ring.Weights(last_stage, 0);
    const auto staging_of = [&](int number) {
      return reinterpret_cast<float*>(shared + (staging - SharedAddress(shared)) +
                                      number * args.staging_bytes);
    };
    const auto store = [&](int row, int column, float (&values)[kVector]) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        values[i] = values[i] * scales[parity][column + i] + biases[parity][column + i];
      }
      outputs.StoreVector<T>(row, first_output + column, values);
    };
    if constexpr (kHasWholeSums) {
      constexpr int kVectors = kColumns / kVector;  // of a row
      static_assert(kMaxRowsOfWholeSums <= kTileRows &&
                    kMaxRowsOfWholeSums * kVectors <= kGroups * kWarpgroupThreads);
#pragma unroll
      for (int own = 0; own < kOwnParts; ++own) {
        StageSums<Tile, kRowsOfThread>(num_rows, staging_of(part_group * kOwnParts + own),
                                       [&](int i) { return sum_of(own, i); });
      }
      wait_for_groups();
      if (threadIdx.x < num_rows * kVectors) {
        const int row = threadIdx.x / kVectors;
        const int column = threadIdx.x % kVectors * kVector;
        float all_parts[kVector] = {};
#pragma unroll
        for (int part = 0; part < Tile::kParts; ++part) {
          float values[kVector];
          LoadSums<Tile::kStagingStride>(staging_of(part), row, column, values);
#pragma unroll
          for (int j = 0; j < kVector; ++j) all_parts[j] = __fadd_rn(all_parts[j], values[j]);
        }
        store(row, column, all_parts);
      }
    } else {
      const auto for_each = [&](auto&& body) {
        ForEachVector<Tile, kRowsOfThread>(
            warpgroup, num_rows, staging_of(warpgroup), [&](int i) { return sum_of(0, i); },
            [&](int row, int column, float (&values)[kVector]) {
              body(first_row + row, first_column + column, values);
            });
      };
      if (args.splits > 1) {
        float* const part = args.parts + first_output +
                            static_cast<int64_t>(unit.split) * outputs.rows * args.part_stride;
        for_each([&](int row, int column, const float (&values)[kVector]) {
          auto* const to = reinterpret_cast<float4*>(
              part + static_cast<int64_t>(row) * args.part_stride + column);
          __stcg(to, make_float4(values[0], values[1], values[2], values[3]));
          __stcg(to + 1, make_float4(values[4], values[5], values[6], values[7]));
        });
      } else {
        for_each(store);
      }
    }
    FenceForAsync();
    if constexpr (kHasWholeSums) {
      wait_for_groups();
    } else {
      WarpgroupBarrier(warpgroup);
    }
    release(last_stage);
    if (args.drains && thread == 0) BarrierArrive(ring.Drained());
  }
  if (args.done_mark != 0) {
    asm volatile("bar.sync 5, %0;\n" ::"n"(kGroups * kWarpgroupThreads) : "memory");
    if (threadIdx.x == 0) TellMark(args.marks, args.done_mark);
  }
#endif
}

struct AddPartsArgs {
  LinearOutputs outputs;
  const float* parts;
  int part_stride;
  int splits;
  bool prefetch_terms;
  int done_mark;
  int32_t* marks;
};

// Eight neighbouring sums of K's parts, added up in order.
__device__ __forceinline__ void AddUpParts(const AddPartsArgs& args, int row, int m,
                                           float (&sums)[LinearOutputs::kVector]) {
  const float* from = args.parts + static_cast<int64_t>(row) * args.part_stride + m;
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  constexpr int kTogether = 4;  // loads
#pragma unroll 1
  for (int first = 0; first < args.splits; first += kTogether) {
    float4 parts[kTogether][2];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i >= args.splits) break;
      parts[i][0] = __ldcg(reinterpret_cast<const float4*>(from));
      parts[i][1] = __ldcg(reinterpret_cast<const float4*>(from) + 1);
      from += static_cast<int64_t>(args.outputs.rows) * args.part_stride;
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i >= args.splits) break;
      const float4 low = parts[i][0], high = parts[i][1];
      sums[0] += low.x, sums[1] += low.y, sums[2] += low.z, sums[3] += low.w;
      sums[4] += high.x, sums[5] += high.y, sums[6] += high.z, sums[7] += high.w;
    }
  }
}

// Scales and biases of eight neighbouring outputs.
template <typename T>
struct EightTerms {
  float scale[LinearOutputs::kVector], bias[LinearOutputs::kVector];

  __device__ __forceinline__ EightTerms(const LinearOutputs& outputs, int m) {
#pragma unroll
    for (int i = 0; i < LinearOutputs::kVector; ++i) {
      scale[i] = outputs.Scale(m + i);
      bias[i] = outputs.Bias<T>(m + i);
    }
  }
  __device__ __forceinline__ void Apply(float (&sums)[LinearOutputs::kVector]) const {
#pragma unroll
    for (int i = 0; i < LinearOutputs::kVector; ++i) sums[i] = sums[i] * scale[i] + bias[i];
  }
};

inline constexpr int kAddThreads = 128;

// Adds up the parts of K.
template <typename T, bool kTellsMark>
__global__ void __launch_bounds__(kAddThreads) AddPartsKernel(const AddPartsArgs args) {
  LaunchDependents();
  const LinearOutputs& outputs = args.outputs;
  const int row = blockIdx.y;
  const int m = (blockIdx.x * kAddThreads + threadIdx.x) * LinearOutputs::kVector;
  if (!args.prefetch_terms) WaitForDependency();
  const EightTerms<T> terms(outputs, m);
  WaitForDependency();
  if (!kTellsMark && m >= outputs.num_outputs) return;
  if (m < outputs.num_outputs) {
    float sums[LinearOutputs::kVector];
    AddUpParts(args, row, m, sums);
    terms.Apply(sums);
    outputs.StoreVector<T>(row, m, sums);
  }
  if constexpr (kTellsMark) {
    __syncthreads();
    if (threadIdx.x == 0) TellMark(args.marks, args.done_mark);
  }
}

struct AddPartsNormArgs {
  AddPartsArgs sum;
  const void* ln_scale;
  const void* ln_bias;
  void* h;
  float epsilon;
};

// And makes LayerNorm of y: a block a row, in one kernel what would be two on the way from one product to
// the next. All that it reads is on its way together, for which it has registers: with 64, it took 2 us
// longer.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads)
    AddPartsNormKernel(const __grid_constant__ AddPartsNormArgs args) {
  __shared__ Moments shared[kPrepareWarps];
  LaunchDependents();
  const LinearOutputs& outputs = args.sum.outputs;
  const int row = blockIdx.x;
  const int vector = threadIdx.x;
  const int m = vector * LinearOutputs::kVector;
  const bool has_values = m < outputs.num_outputs;
  if (!args.sum.prefetch_terms) WaitForDependency();
  const EightTerms<T> terms(outputs, m);
  uint4 ln_scale, ln_bias;
  if (has_values) {
    ln_scale = __ldcg(static_cast<const uint4*>(args.ln_scale) + vector);
    ln_bias = __ldcg(static_cast<const uint4*>(args.ln_bias) + vector);
  }
  WaitForDependency();
  float values[LinearOutputs::kVector] = {};
  if (has_values) {
    float added[LinearOutputs::kVector];
    outputs.LoadResidual(row, m, added);
    AddUpParts(args.sum, row, m, values);
    terms.Apply(values);
#pragma unroll
    for (int i = 0; i < LinearOutputs::kVector; ++i) values[i] += added[i];
    outputs.StoreFloats(row, m, values);
  }
  T* const h = static_cast<T*>(args.h) + static_cast<int64_t>(row) * outputs.num_outputs;
  StoreLayerNorm<T>(values, has_values, outputs.num_outputs, args.epsilon, ln_scale, ln_bias,
                    shared, reinterpret_cast<uint4*>(h) + vector);
}

// Of so many chunks, 128 bytes of the weight's K each.
inline int64_t NumGroups(const LinearParams& params, int group_chunks) {
  const int64_t bytes = params.k_dim * (params.weight_dtype == DataType::kInt8 ? 1 : 2);
  const int64_t group_bytes = int64_t{kBoxRowBytes} * group_chunks;
  return (bytes + group_bytes - 1) / group_bytes;
}

// Bytes of a block's weights that are under way at a time. Where one or a few rows meet a small share of
// a weight, what the kernels between the products wait for weighs more (two H200, half of the 6B model's
// weights each, 1 row: 2 to 3 % of a step; at 8 rows 2 % less in bf16, 2 % more in INT8).
inline int UnderWayBytes(int64_t rows, int64_t weight_bytes, int num_blocks) {
  constexpr int64_t kSmallShare = 1 << 20;
  return (rows <= 4 && weight_bytes < kSmallShare * num_blocks ? 48 : 64) * 1024;
}

// How a weight is cut for a device: into tiles of so many outputs, and those into parts of K.
struct Cut {
  int tile_outputs = 128;
  int splits = 1;
};

inline Cut ChooseCut(int64_t num_outputs, int64_t num_groups, int group_chunks, bool is_int8,
                     int num_multiprocessors) {
  const int64_t num_chunks = num_groups * group_chunks;
  Cut best;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (const int tile_outputs : {224, 256, 128, 112}) {
    // The sums of groups need registers.
    if (group_chunks > 1 && tile_outputs != 128) continue;
    const int64_t tiles = (num_outputs + tile_outputs - 1) / tile_outputs;
    for (int splits = 1; splits <= kMaxSplits && splits <= num_groups; splits *= 2) {
      const int64_t units = tiles * splits;
      if (splits > 1 && units > std::min(num_multiprocessors, kMaxParts)) continue;
      // For weights that keep most multiprocessors busy so, with no parts; not in INT8, where it is
      // slower than tiles of 128 that leave more of them idle (H200, half of the 6B model's w_in).
      if (tile_outputs == 112 && (is_int8 || splits > 1 || 4 * tiles < 3 * num_multiprocessors)) {
        continue;
      }
      const int64_t waves = (units + num_multiprocessors - 1) / num_multiprocessors;
      // Rows of 128 bytes that a multiprocessor reads of the weight, and as many as its part costs.
      const int64_t rows = waves * tile_outputs * ((num_chunks + splits - 1) / splits) +
                           (splits > 1 ? 4 * tile_outputs : 0);
      if (rows < least) {
        least = rows;
        best = {tile_outputs, splits};
      }
    }
  }
  return best;
}

inline int32_t* Marks(const LinearParams& params) {
  return params.semaphores + kNumSemaphores - kNumMarkSemaphores;
}

// Whether products tell and await marks. Beside 16-bit weights where that is what it saves (H100, 6B
// model, context 192: 2 to 240 us a step at 1 to 8 rows and 100 at 64, less 10 and 22 at 32 and 16);
// beside INT8 ones where no kernel ahead rounds all of x. The order of the sums does not depend on it.
inline bool UsesMarks(const LinearParams& params) {
  if (params.weight_dtype == DataType::kInt8) return params.rows <= kLinearMaxRowsRounded;
  return params.rows <= 8 || params.rows > 32;
}

template <typename T, bool kTellsMark>
const char* LaunchAddParts(const LinearParams& params, int part_stride, int splits,
                           cudaStream_t stream) {
  constexpr auto kKernel = AddPartsKernel<T, kTellsMark>;
  const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return 0; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  const int per_block = kAddThreads * LinearOutputs::kVector;
  const dim3 grid(static_cast<unsigned>((params.num_outputs + per_block - 1) / per_block),
                  static_cast<unsigned>(params.rows));
  const AddPartsArgs args = {LinearOutputs(params),  Parts(params),    part_stride,  splits,
                             params.prefetch_weight, params.done_mark, Marks(params)};
  return MessageOf(Launch<kKernel>(traits, grid, kAddThreads, 0, stream, args));
}

// Of rows that a block has in registers.
inline bool MakesNext(const LinearParams& params) {
  return params.num_outputs <= int64_t{kPrepareThreads} * LinearOutputs::kVector &&
         params.num_outputs % LinearOutputs::kVector == 0;
}

template <typename T>
const char* LaunchAddPartsNorm(const LinearParams& params, int part_stride, int splits,
                               cudaStream_t stream) {
  constexpr auto kKernel = AddPartsNormKernel<T>;
  const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return 0; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  const AddPartsNormArgs args = {{LinearOutputs(params), Parts(params), part_stride, splits,
                                  params.prefetch_weight, 0, nullptr},
                                 params.next->ln_scale,
                                 params.next->ln_bias,
                                 params.h,
                                 params.epsilon};
  return MessageOf(Launch<kKernel>(traits, dim3(static_cast<unsigned>(params.rows)),
                                   kPrepareThreads, 0, stream, args));
}

// Groups of chunks of x's columns in front of the early ones, with an awaited mark.
inline int64_t NumLateGroups(const LinearParams& params, int group_chunks) {
  if (params.awaited_mark == 0) return 0;
  const int64_t chunk_k = kBoxRowBytes / (params.weight_dtype == DataType::kInt8 ? 1 : 2);
  const int64_t group_k = chunk_k * group_chunks;
  return (params.early_from + group_k - 1) / group_k;
}

template <typename T, typename Weight, typename Tile, Activations kActivations, int kDigits>
const char* LaunchProduct(const LinearParams& params, const void* x, const float* x_scale,
                          int splits, cudaStream_t stream) {
  constexpr auto kKernel = ProductKernel<T, Weight, Tile, kActivations, kDigits>;
  constexpr int kSharedBytes = kRingBytes + kBoxAlignment;
  constexpr int kGroupChunks = kChunksOfGroup<kActivations>;
  const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return kSharedBytes; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  const int padded_rows = PaddedRows(static_cast<int>(params.rows));
  ProductArgs args(params);
  args.x = x;
  args.x_scale = x_scale;
  const char* error = DescribeBoxes(&args.weight_map, params.weight, params.num_outputs,
                                    params.k_dim, sizeof(Weight), Tile::kOutputs);
  if (error == nullptr && kActivations != Activations::kRoundedInBlock) {
    const auto k_dim = static_cast<cuuint64_t>(params.k_dim);
    const auto rows = static_cast<cuuint64_t>(params.rows);
    error = kDigits == 2 ? DescribeTensor<3>(&args.x_map, x, 1, {k_dim, rows, 2},
                                             {2 * k_dim, k_dim}, {kBoxRowBytes, 8, 2})
                         : DescribeBoxes(&args.x_map, x, params.rows, params.k_dim, sizeof(Weight),
                                         padded_rows);
  }
  if (error != nullptr) return error;
  const int64_t tiles = (params.num_outputs + Tile::kOutputs - 1) / Tile::kOutputs;
  const bool has_parts = splits > Tile::kParts;  // that another kernel adds up
  args.part_stride = static_cast<int>(tiles * Tile::kOutputs);
  args.num_tiles = static_cast<int>(tiles);
  args.num_units = args.num_tiles * (splits / Tile::kParts);
  args.splits = splits;
  args.k_dim = static_cast<int>(params.k_dim);
  args.num_groups = static_cast<int>(NumGroups(params, kGroupChunks));
  args.marks = Marks(params);
  const bool tells_mark = UsesMarks(params) && params.done_mark != 0;
  if (tells_mark && !has_parts) args.done_mark = params.done_mark;
  if (UsesMarks(params)) args.awaited_mark = params.awaited_mark;
  args.num_late_groups = static_cast<int>(NumLateGroups(params, kGroupChunks));
  args.x_bytes = kDigits * padded_rows * kBoxRowBytes;
  constexpr int kStageWeightBytes = Tile::kParts * Tile::kWeightBytes;
  const int stage_bytes = kStageWeightBytes + Tile::kParts * args.x_bytes +
                          (kIsGrouped<kActivations> ? kStageScaleBytes : 0);
  args.num_stages = std::min(kMaxStages, kRingBytes / stage_bytes) / kGroupChunks * kGroupChunks;
  constexpr int kRowBytes = Tile::kStagingStride * static_cast<int>(sizeof(float));
  constexpr int kNumStaged = Tile::kGroups * Tile::kOwnParts;
  constexpr int kTileRows = kWgmmaRows / kDigits;  // of x
  args.staging_bytes = std::min(padded_rows, kTileRows) * kRowBytes;
  args.drains = args.staging_bytes * kNumStaged > kStageWeightBytes;
  static_assert(kNumStaged * kTileRows * kRowBytes <= kRingBytes);
  const int grid = std::min(args.num_units, traits.num_multiprocessors);
  const int64_t weight_bytes = params.num_outputs * params.k_dim * sizeof(Weight);
  args.max_under_way =
      std::max(2, UnderWayBytes(params.rows, weight_bytes, grid) / kStageWeightBytes);
  error = MessageOf(Launch<kKernel>(traits, dim3(grid), kProductThreads<Tile, kActivations>,
                                    kSharedBytes, stream, args));
  if (error != nullptr || !has_parts) return error;
  if (params.parts != nullptr) {
    *params.parts = {Parts(params), splits, args.part_stride, params.weight_scale};
    return nullptr;
  }
  if (params.next != nullptr && !tells_mark && MakesNext(params)) {
    params.next->is_made = true;
    return LaunchAddPartsNorm<T>(params, args.part_stride, splits, stream);
  }
  return tells_mark ? LaunchAddParts<T, true>(params, args.part_stride, splits, stream)
                    : LaunchAddParts<T, false>(params, args.part_stride, splits, stream);
}

template <typename T, typename Weight, Activations kActivations, int kDigits>
const char* LaunchCut(const LinearParams& params, const void* x, const float* x_scale,
                      int num_multiprocessors, cudaStream_t stream) {
  constexpr bool kIsInt8 = sizeof(Weight) == 1;
  constexpr int kGroupChunks = kChunksOfGroup<kActivations>;
  const int64_t num_groups = NumGroups(params, kGroupChunks);
  Cut cut = ChooseCut(params.num_outputs, num_groups, kGroupChunks, kIsInt8, num_multiprocessors);
  // A part without chunks, neither early nor late, would have no sums.
  const int64_t num_late = NumLateGroups(params, kGroupChunks);
  while (cut.splits > std::max(num_late, num_groups - num_late)) cut.splits /= 2;
  const auto launch_tile = [&](auto tile) {
    return LaunchProduct<T, Weight, decltype(tile), kActivations, kDigits>(params, x, x_scale,
                                                                           cut.splits, stream);
  };
  // Sums over ranks take the parts as they are, which was faster (docs/performance-notes.md, "Two H200").
  if (cut.tile_outputs == 128 && cut.splits == 4 && params.rows <= kMaxRowsOfWholeSums &&
      params.parts == nullptr) {
    return launch_tile(Tile<32, 1, 4>());
  }
  const auto launch = [&](auto tile_outputs) {
    constexpr int kTileOutputs = decltype(tile_outputs)::value;
    if constexpr (kDigits == 2 && kActivations != Activations::kRoundedInBlock) {
      if (params.rows > kWgmmaRows / 2) return launch_tile(Tile<kTileOutputs, 2, 1>());
    }
    return launch_tile(Tile<kTileOutputs, 1, 1>());
  };
  if constexpr (kIsGrouped<kActivations>) {
    return launch(std::integral_constant<int, 128>());
  } else {
    switch (cut.tile_outputs) {
      case 112:
        if constexpr (!kIsInt8) return launch(std::integral_constant<int, 112>());
        [[fallthrough]];
      case 128:
        return launch(std::integral_constant<int, 128>());
      case 224:
        return launch(std::integral_constant<int, 224>());
      default:
        return launch(std::integral_constant<int, 256>());
    }
  }
}

template <typename T, int kDigits>
const char* LaunchInt8(const LinearParams& params, int num_multiprocessors, cudaStream_t stream) {
  const auto launch = [&](auto activations, const void* x, const float* x_scale) {
    return LaunchCut<T, int8_t, decltype(activations)::value, kDigits>(params, x, x_scale,
                                                                       num_multiprocessors, stream);
  };
  if (params.k_dim > kMaxInt8K) {
    return "linear on sm_90a takes a K of at most 131056 with an INT8 weight";
  }
  float* const x_scale = params.partials;
  if (params.ln_scale != nullptr) {
    if (const char* error = Prepare<T, kDigits>(params, x_scale, stream)) return error;
    return launch(std::integral_constant<Activations, Activations::kRowScales>(), params.h,
                  x_scale);
  }
  if (params.rows <= kLinearMaxRowsRounded && params.k_multiplier == nullptr && !params.has_h) {
    return launch(std::integral_constant<Activations, Activations::kRoundedInBlock>(), params.x,
                  nullptr);
  }
  if (const char* error = RoundGroups<T, kDigits>(params, x_scale, stream)) return error;
  return launch(std::integral_constant<Activations, Activations::kGroupScales>(), params.h,
                x_scale);
}

template <typename T, typename Weight>
const char* LaunchHopper(const LinearParams& params, int num_multiprocessors, cudaStream_t stream) {
  if constexpr (sizeof(Weight) == 1) {
    return params.int8_activations ? LaunchInt8<T, 1>(params, num_multiprocessors, stream)
                                   : LaunchInt8<T, 2>(params, num_multiprocessors, stream);
  } else {
    const void* x = params.x;
    if (params.has_h || params.ln_scale != nullptr || params.k_multiplier != nullptr) {
      if (const char* error = Prepare<T, 0>(params, nullptr, stream)) return error;
      x = params.h;
    }
    return LaunchCut<T, Weight, Activations::kAsTheyAre, 1>(params, x, nullptr, num_multiprocessors,
                                                            stream);
  }
}

}  // namespace kogpt

#endif  // CUSTOM_OPS_LINEAR_HOPPER_CUH_
