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
//   INT8      meets integers: the tensor cores multiply the weight as it lies by the two digits of
//             16-bit activations (linear_prepare.cuh), two rows of an operand for a row of x. Sums
//             are exact.
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
inline constexpr int kMaxSplits = 8;
inline constexpr int kMaxParts = 192;  // tiles times splits, where there are splits
inline constexpr int kMaxTileOutputs = 256;
// Rows up to which a block adds up the parts of K itself: each block then reads all of x.
inline constexpr int kMaxRowsOfWholeSums = 16;

// What a block multiplies at a time, and how its warpgroups share it.
template <int kOutputs_, int kRowTiles_, int kParts_>
struct Tile {
  static constexpr int kOutputs = kOutputs_;
  static constexpr int kRowTiles = kRowTiles_;  // of 64 rows of the activations' operand
  static constexpr int kParts = kParts_;        // of K, to be added up
  static constexpr int kPartGroups = kParts > 1 ? 2 : 1;
  static constexpr int kColumnGroups = kParts > 1 || kOutputs <= 112 ? 1 : 2;
  static constexpr int kGroups = kColumnGroups * kPartGroups * kRowTiles;
  static constexpr int kThreads = kGroups * kWarpgroupThreads + 2 * kWarpSize;  // two warps copy
  // A warpgroup's.
  static constexpr int kOwnParts = kParts / kPartGroups;
  static constexpr int kColumns = kOutputs / kColumnGroups;
  // Of a row of its sums in shared memory: padded so that rows begin in other banks.
  static constexpr int kStagingStride = kColumns + 8;
  // A chunk's weights, of one part.
  static constexpr int kWeightBytes = kOutputs * kBoxRowBytes;
  // Three warps with 96 on a quarter of a multiprocessor leave room for two of attention with 112, and
  // a block of 18 warps with less for what goes ahead of the next product.
  static constexpr int kNumSums = kOwnParts * kColumns;
  static constexpr int kRegisters = kNumSums <= 64 ? 64 : kNumSums <= 112 ? 88 : 96;
};

struct ProductArgs {
  CUtensorMap weight_map;
  CUtensorMap x_map;
  LinearOutputs outputs;
  const float* x_scale;  // [rows, x_parts], of INT8
  float* parts;          // [splits, rows, part_stride]
  int part_stride;
  int num_tiles;
  int num_units;  // tiles, times splits where a block has one part of K
  int splits;
  int num_chunks;  // of K
  int num_stages;
  int max_under_way;  // of stages' weights
  int x_bytes;        // of a chunk of a part
  int x_parts;        // of a row, each with a scale
  int staging_bytes;  // of a warpgroup's sums in shared memory, or of a part's
  bool drains;        // the ring, for these
  bool prefetch_weight;
  int num_late_chunks = 0;  // the first ones, with an awaited mark
  int done_mark = 0;
  int awaited_mark = 0;
  int32_t* marks;

  explicit ProductArgs(const LinearParams& params)
      : outputs(params), parts(params.partials), prefetch_weight(params.prefetch_weight) {}
};

// A part of K: its share of the chunks that are early, then of those that are late, which products
// with an INT8 weight do not have. No part has more chunks than the last one.
template <bool kMayBeLate>
struct Part {
  int num_early, num_chunks, first_early, first_late;

  __device__ __forceinline__ Part(const ProductArgs& args, int split) {
    const int late = kMayBeLate ? args.num_late_chunks : 0;
    const int early = args.num_chunks - late;
    first_early = late + split * early / args.splits;
    num_early = late + (split + 1) * early / args.splits - first_early;
    first_late = kMayBeLate ? split * late / args.splits : 0;
    num_chunks = num_early + (kMayBeLate ? (split + 1) * late / args.splits - first_late : 0);
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
  uint32_t begin, weights, barriers;
  int x_bytes;

  __device__ __forceinline__ ProductRing(const ProductArgs& args, uint32_t shared,
                                         uint32_t barriers_in)
      : begin((shared + kBoxAlignment - 1) / kBoxAlignment * kBoxAlignment),
        weights(begin + args.num_stages * Tile::kParts * args.x_bytes),
        barriers(barriers_in),
        x_bytes(args.x_bytes) {}

  __device__ __forceinline__ uint32_t X(int stage, int part) const {
    return begin + (stage * Tile::kParts + part) * x_bytes;
  }
  __device__ __forceinline__ uint32_t Weights(int stage, int part) const {
    return weights + (stage * Tile::kParts + part) * Tile::kWeightBytes;
  }
  // Barriers: what was copied is there, and all groups are done with a stage.
  __device__ __forceinline__ uint32_t FullX(int stage) const { return barriers + stage * 24; }
  __device__ __forceinline__ uint32_t FullWeights(int stage) const {
    return barriers + stage * 24 + 8;
  }
  __device__ __forceinline__ uint32_t Empty(int stage) const { return barriers + stage * 24 + 16; }
  // And with the whole ring, where a tile's outputs go through it.
  __device__ __forceinline__ uint32_t Drained() const { return barriers + kMaxStages * 24; }
};

// Where a unit of a block's work lies.
struct Unit {
  int tile, split;

  __device__ __forceinline__ Unit(const ProductArgs& args, int index)
      : tile(index % args.num_tiles), split(index / args.num_tiles) {}
};

// Calls copy(chunk of a part of K, tile, stage) for all of a block's stages, once their places are
// free. The first lanes of a warp, one for each part, the last of which has the most chunks: a single
// one that copied them in turn would fall behind.
template <typename Tile, bool kMayBeLate, typename Copy>
__device__ __forceinline__ void ForEachStage(const ProductArgs& args, const ProductRing<Tile>& ring,
                                             int part, Copy&& copy) {
  RingCursor stage;
  bool is_around = false;
  int parity = 0;  // of the units
  for (int index = blockIdx.x; index < args.num_units; index += gridDim.x) {
    const Unit unit(args, index);
    const Part<kMayBeLate> own(args, unit.split + part);
    const int num_chunks = Tile::kParts == 1
                               ? own.num_chunks
                               : Part<kMayBeLate>(args, unit.split + Tile::kParts - 1).num_chunks;
    if (args.drains && index >= gridDim.x) {
      BarrierWait(ring.Drained(), parity);
      parity ^= 1;
    }
    for (int i = 0; i < num_chunks; ++i) {
      if (is_around) BarrierWait(ring.Empty(stage.index), stage.parity ^ 1);
      // Where the part has no chunk left, the one beyond K's end, of which copies make zeros.
      const bool is_there = Tile::kParts == 1 || i < own.num_chunks;
      copy(is_there ? own.Chunk(i) : args.num_chunks, unit.tile, stage);
      stage.Advance(args.num_stages);
      is_around = is_around || stage.index == 0;
    }
  }
}

// Lanes as ForEachStage has them. No more than what saturates device memory is under way at a time:
// what a small kernel reads meanwhile, attention ahead of this product above all, waits behind it.
template <typename Weight, typename Tile>
__device__ void CopyWeights(const ProductArgs& args, const ProductRing<Tile>& ring, int part) {
  constexpr int kChunkK = kBoxRowBytes / static_cast<int>(sizeof(Weight));
  constexpr bool kMayBeLate = sizeof(Weight) != 1;
  const uint64_t policy = EvictFirst();  // what is read once must not drive out what is read again
  if (!args.prefetch_weight) WaitForDependency();
  RingCursor arrived;
  int num_under_way = 0;
  ForEachStage<Tile, kMayBeLate>(
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

// Lanes as ForEachStage has them.
template <typename Weight, typename Tile>
__device__ void CopyActivations(const ProductArgs& args, const ProductRing<Tile>& ring, int part) {
  constexpr int kChunkK = kBoxRowBytes / static_cast<int>(sizeof(Weight));
  constexpr bool kMayBeLate = sizeof(Weight) != 1;
  if (kMayBeLate && args.awaited_mark != 0) {
    AwaitMark(args.marks, args.awaited_mark);
    __syncwarp((1u << Tile::kParts) - 1);
    if (part == 0) TellMark(args.marks, 0);  // once all blocks have seen it
  } else {
    WaitForDependency();
  }
  ForEachStage<Tile, kMayBeLate>(args, ring, part, [&](int chunk, int, const RingCursor& stage) {
    if (kMayBeLate && chunk < args.num_late_chunks) WaitForDependency();
    const uint32_t full = ring.FullX(stage.index);
    if (part == 0) BarrierArriveExpecting(full, Tile::kParts * args.x_bytes);
    CopyBox(ring.X(stage.index, part), args.x_map, chunk * kChunkK, 0, full);
  });
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

// A warpgroup's sums of `x_rows` rows of the operand, to shared memory at `staging`.
template <int kStride, typename Sum, int kNum>
__device__ __forceinline__ void StageSums(int x_rows, Sum* staging, const Sum (&sums)[kNum]) {
  using Two = std::conditional_t<std::is_same_v<Sum, int32_t>, int2, float2>;
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int warp_row = thread / kWarpSize * 16;
  const int lane = thread % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (warp_row + half * 8 >= x_rows) continue;
    Sum* const to = staging + (warp_row + half * 8 + lane / 4) * kStride + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kNum / 4; ++i) {
      *reinterpret_cast<Two*>(to + i * 8) = Two{sums[4 * i + 2 * half], sums[4 * i + 2 * half + 1]};
    }
  }
}

// Eight neighbouring columns of them, of a row of x.
template <int kStride, typename Sum>
__device__ __forceinline__ void LoadSums(const Sum* staging, int row, int column,
                                         float (&values)[LinearOutputs::kVector]) {
  constexpr bool kHasDigits = std::is_same_v<Sum, int32_t>;
  using Four = std::conditional_t<kHasDigits, int4, float4>;
  const auto load = [&](int x_row, float (&to)[LinearOutputs::kVector]) {
    const auto* from = reinterpret_cast<const Four*>(staging + x_row * kStride + column);
    const Four low = from[0], high = from[1];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  };
  if constexpr (kHasDigits) {
    float low[LinearOutputs::kVector];
    load(2 * row, values);
    load(2 * row + 1, low);
#pragma unroll
    for (int j = 0; j < LinearOutputs::kVector; ++j) {
      values[j] = __fmaf_rn(256.0f, values[j], low[j]);
    }
  } else {
    load(row, values);
  }
}

// Calls body(row, column, sums of eight neighbouring columns) for a warpgroup's sums of `x_rows` rows
// of the operand, which go through shared memory at `staging`. Instructions come from device memory,
// too, behind all weights that are under way, so that what is done for eight sums stands here once.
template <typename Tile, typename Sum, typename Body>
__device__ __forceinline__ void ForEachVector(int warpgroup, int x_rows, Sum* staging,
                                              const Sum (&sums)[Tile::kColumns / 2], Body&& body) {
  constexpr int kVectors = Tile::kColumns / LinearOutputs::kVector;  // of a row
  StageSums<Tile::kStagingStride>(x_rows, staging, sums);
  WarpgroupBarrier(warpgroup);
  const int count = (std::is_same_v<Sum, int32_t> ? x_rows / 2 : x_rows) * kVectors;
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

template <typename T, typename Weight, typename Tile>
__global__ void __maxnreg__(Tile::kRegisters)
    ProductKernel(const __grid_constant__ ProductArgs args) {
#if __CUDA_ARCH__ == 900
  constexpr bool kIsInt8 = sizeof(Weight) == 1;
  using Sum = std::conditional_t<kIsInt8, int32_t, float>;
  constexpr int kGroups = Tile::kGroups;
  constexpr int kColumns = Tile::kColumns;
  constexpr int kOwnParts = Tile::kOwnParts;
  constexpr bool kHasWholeSums = Tile::kParts > 1;
  constexpr int kTileRows = kIsInt8 ? kWgmmaRows / 2 : kWgmmaRows;  // of x
  constexpr int kVector = LinearOutputs::kVector;
  extern __shared__ unsigned char shared[];
  __shared__ uint64_t barriers[3 * kMaxStages + 1];
  // Of the outputs and rows of a unit and the one before it.
  __shared__ float scales[2][Tile::kOutputs], biases[2][Tile::kOutputs];
  __shared__ float x_scales[2][kGroups * kOwnParts][kTileRows];
  const ProductRing<Tile> ring(args, SharedAddress(shared), SharedAddress(barriers));
  const int warpgroup = Uniform(threadIdx.x / kWarpgroupThreads);
  const int thread = threadIdx.x % kWarpgroupThreads;

  LaunchDependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < args.num_stages; ++i) {
      BarrierInit(ring.FullX(i), 1);
      BarrierInit(ring.FullWeights(i), 1);
      BarrierInit(ring.Empty(i), kGroups);
    }
    BarrierInit(ring.Drained(), kGroups);
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  }
  __syncthreads();
  if (warpgroup == kGroups) {
    const int lane = thread % kWarpSize;
    if (lane < Tile::kParts && thread < kWarpSize) CopyWeights<Weight>(args, ring, lane);
    if (lane < Tile::kParts && thread >= kWarpSize) CopyActivations<Weight>(args, ring, lane);
    return;
  }
  // What is read ahead of the products may come from the kernel ahead; x itself is behind its copies.
  if (kIsInt8 || !args.prefetch_weight) WaitForDependency();

  const int first_column = warpgroup % Tile::kColumnGroups * kColumns;
  const int part_group = warpgroup / Tile::kColumnGroups % Tile::kPartGroups;
  const int row_tile = warpgroup / (Tile::kColumnGroups * Tile::kPartGroups);
  const int first_row = row_tile * kTileRows;
  const LinearOutputs& outputs = args.outputs;
  const int num_rows = min(outputs.rows - first_row, kTileRows);
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
    if (kIsInt8 && thread < num_rows) {
#pragma unroll
      for (int own = 0; own < kOwnParts; ++own) {
        const int part = args.x_parts == 1 ? 0 : unit.split + part_group * kOwnParts + own;
        x_scales[parity][warpgroup * kOwnParts + own][thread] =
            __ldcg(args.x_scale + (first_row + thread) * args.x_parts + part);
      }
    }
    const int num_chunks = Part<!kIsInt8>(args, unit.split + Tile::kParts - 1).num_chunks;
    Sum sums[kOwnParts][kColumns / 2];
    int last_stage = 0;
    for (int i = 0; i < num_chunks; ++i) {
      BarrierWait(ring.FullWeights(stage.index), stage.parity);
      BarrierWait(ring.FullX(stage.index), stage.parity);
      WgmmaFence();
#pragma unroll
      for (int own = 0; own < kOwnParts; ++own) {
        const int part = part_group * kOwnParts + own;
#pragma unroll
        for (int step = 0; step < kStepsPerChunk; ++step) {
          const uint64_t a = DescribeAlongK(
              ring.X(stage.index, part) + row_tile * kWgmmaRows * kBoxRowBytes + step * kStepBytes);
          const uint64_t b = DescribeAlongK(ring.Weights(stage.index, part) +
                                            first_column * kBoxRowBytes + step * kStepBytes);
          WgmmaShared<Weight, kColumns>::Run(sums[own], a, b, i > 0 || step > 0);
        }
      }
      WgmmaCommit();
      if (i > 0) {
        WgmmaWait<1>();
        release(last_stage);
      }
      last_stage = stage.index;
      stage.Advance(args.num_stages);
    }
    WgmmaWait<0>();
#pragma unroll
    for (int own = 0; own < kOwnParts; ++own) WgmmaKeep(sums[own]);

    if constexpr (!kIsInt8) WaitForDependency();  // before the first write
    // All groups are done with the weights; and the scales and biases are there.
    const auto wait_for_groups = [] {
      asm volatile("bar.sync 5, %0;\n" ::"n"(kGroups * kWarpgroupThreads) : "memory");
    };
    wait_for_groups();
    const uint32_t staging = args.drains ? ring.begin : ring.Weights(last_stage, 0);
    const auto staging_of = [&](int number) {
      return reinterpret_cast<Sum*>(shared + (staging - SharedAddress(shared)) +
                                    number * args.staging_bytes);
    };
    const int x_rows = (kIsInt8 ? 2 : 1) * num_rows;
    const auto scale_by_row = [&](int number, int row, float (&values)[kVector]) {
      if constexpr (kIsInt8) {
        const float scale = x_scales[parity][number][row];
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = __fmul_rn(values[i], scale);
      }
    };
    const auto store = [&](int row, int column, float (&values)[kVector]) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        values[i] = values[i] * scales[parity][column + i] + biases[parity][column + i];
      }
      outputs.StoreVector<T>(row, first_output + column, values);
    };
    if constexpr (kHasWholeSums) {
      constexpr int kVectors = kColumns / kVector;            // of a row
      static_assert(2 * kMaxRowsOfWholeSums <= kWgmmaRows &&  // digits
                    kMaxRowsOfWholeSums * kVectors <= kGroups * kWarpgroupThreads);
#pragma unroll
      for (int own = 0; own < kOwnParts; ++own) {
        StageSums<Tile::kStagingStride>(x_rows, staging_of(part_group * kOwnParts + own),
                                        sums[own]);
      }
      wait_for_groups();
      if (threadIdx.x < num_rows * kVectors) {
        const int row = threadIdx.x / kVectors;
        const int column = threadIdx.x % kVectors * kVector;
        float totals[kVector] = {};
#pragma unroll
        for (int part = 0; part < Tile::kParts; ++part) {
          float values[kVector];
          LoadSums<Tile::kStagingStride>(staging_of(part), row, column, values);
          scale_by_row(part, row, values);
#pragma unroll
          for (int j = 0; j < kVector; ++j) totals[j] = __fadd_rn(totals[j], values[j]);
        }
        store(row, column, totals);
      }
    } else {
      const auto for_each = [&](auto&& body) {
        ForEachVector<Tile>(warpgroup, x_rows, staging_of(warpgroup), sums[0],
                            [&](int row, int column, float (&values)[kVector]) {
                              scale_by_row(warpgroup, row, values);
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
  if constexpr (!kIsInt8) {
    if (args.done_mark != 0) {
      asm volatile("bar.sync 5, %0;\n" ::"n"(kGroups * kWarpgroupThreads) : "memory");
      if (threadIdx.x == 0) TellMark(args.marks, args.done_mark);
    }
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

inline constexpr int kAddThreads = 128;

// Adds up the parts of K, in order.
template <typename T, bool kTellsMark>
__global__ void __launch_bounds__(kAddThreads) AddPartsKernel(const AddPartsArgs args) {
  LaunchDependents();
  const LinearOutputs& outputs = args.outputs;
  const int row = blockIdx.y;
  constexpr int kVector = LinearOutputs::kVector;
  const int m = (blockIdx.x * kAddThreads + threadIdx.x) * kVector;
  if (!args.prefetch_terms) WaitForDependency();
  float scale[kVector], bias[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    scale[i] = outputs.Scale(m + i);
    bias[i] = outputs.Bias<T>(m + i);
  }
  WaitForDependency();
  if (!kTellsMark && m >= outputs.num_outputs) return;
  if (m < outputs.num_outputs) {
    const float* from = args.parts + static_cast<int64_t>(row) * args.part_stride + m;
    float4 parts[kMaxSplits][2];
#pragma unroll
    for (int split = 0; split < kMaxSplits; ++split) {
      if (split == args.splits) break;
      parts[split][0] = __ldcg(reinterpret_cast<const float4*>(from));
      parts[split][1] = __ldcg(reinterpret_cast<const float4*>(from) + 1);
      from += static_cast<int64_t>(outputs.rows) * args.part_stride;
    }
    float sums[kVector] = {};
#pragma unroll
    for (int split = 0; split < kMaxSplits; ++split) {
      if (split == args.splits) break;
      const float4 low = parts[split][0], high = parts[split][1];
      sums[0] += low.x, sums[1] += low.y, sums[2] += low.z, sums[3] += low.w;
      sums[4] += high.x, sums[5] += high.y, sums[6] += high.z, sums[7] += high.w;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[i] = sums[i] * scale[i] + bias[i];
    outputs.StoreVector<T>(row, m, sums);
  }
  if constexpr (kTellsMark) {
    __syncthreads();
    if (threadIdx.x == 0) TellMark(args.marks, args.done_mark);
  }
}

// Of 128 bytes of the weight's K each.
inline int64_t NumChunks(const LinearParams& params) {
  const int64_t bytes = params.k_dim * (params.weight_dtype == DataType::kInt8 ? 1 : 2);
  return (bytes + kBoxRowBytes - 1) / kBoxRowBytes;
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

inline Cut ChooseCut(int64_t num_outputs, int64_t num_chunks, bool is_int8,
                     int num_multiprocessors) {
  Cut best;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (const int tile_outputs : {224, 256, 128, 112}) {
    const int64_t tiles = (num_outputs + tile_outputs - 1) / tile_outputs;
    for (int splits = 1; splits <= kMaxSplits && splits <= num_chunks; splits *= 2) {
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

// Whether products of so many rows tell and await marks: where that is what it saves (H100, 6B
// model, context 192: 2 to 240 us a step at 1 to 8 rows and 100 at 64, less 10 and 22 at 32 and 16).
// The order of the sums does not depend on it.
inline bool UsesMarks(int64_t rows) { return rows <= 8 || rows > 32; }

template <typename T, bool kTellsMark>
const char* LaunchAddParts(const LinearParams& params, int part_stride, int splits,
                           cudaStream_t stream) {
  constexpr auto kKernel = AddPartsKernel<T, kTellsMark>;
  const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return 0; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  const int per_block = kAddThreads * LinearOutputs::kVector;
  const dim3 grid(static_cast<unsigned>((params.num_outputs + per_block - 1) / per_block),
                  static_cast<unsigned>(params.rows));
  const AddPartsArgs args = {LinearOutputs(params),  params.partials,  part_stride,  splits,
                             params.prefetch_weight, params.done_mark, Marks(params)};
  return MessageOf(Launch<kKernel>(traits, grid, kAddThreads, 0, stream, args));
}

// Chunks of x's columns in front of the early ones, with an awaited mark.
inline int64_t NumLateChunks(const LinearParams& params) {
  if (params.awaited_mark == 0) return 0;
  const int64_t chunk_k = kBoxRowBytes / (params.weight_dtype == DataType::kInt8 ? 1 : 2);
  return (params.early_from + chunk_k - 1) / chunk_k;
}

template <typename T, typename Weight, typename Tile>
const char* LaunchProduct(const LinearParams& params, const void* x, const float* x_scale,
                          int x_parts, int splits, cudaStream_t stream) {
  constexpr auto kKernel = ProductKernel<T, Weight, Tile>;
  constexpr int kSharedBytes = kRingBytes + kBoxAlignment;
  const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return kSharedBytes; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  const int64_t x_rows = (sizeof(Weight) == 1 ? 2 : 1) * params.rows;
  const int box_rows = static_cast<int>((x_rows + 7) / 8 * 8);
  ProductArgs args(params);
  args.x_scale = x_scale;
  const char* error = DescribeBoxes(&args.weight_map, params.weight, params.num_outputs,
                                    params.k_dim, sizeof(Weight), Tile::kOutputs);
  if (error == nullptr) {
    error = DescribeBoxes(&args.x_map, x, x_rows, params.k_dim, sizeof(Weight), box_rows);
  }
  if (error != nullptr) return error;
  const int64_t tiles = (params.num_outputs + Tile::kOutputs - 1) / Tile::kOutputs;
  const bool has_parts = splits > Tile::kParts;  // that another kernel adds up
  args.part_stride = static_cast<int>(tiles * Tile::kOutputs);
  args.num_tiles = static_cast<int>(tiles);
  args.num_units = args.num_tiles * (splits / Tile::kParts);
  args.splits = splits;
  args.num_chunks = static_cast<int>(NumChunks(params));
  args.marks = Marks(params);
  const bool tells_mark = UsesMarks(params.rows) && params.done_mark != 0;
  if (tells_mark && !has_parts) args.done_mark = params.done_mark;
  if (UsesMarks(params.rows)) args.awaited_mark = params.awaited_mark;
  args.num_late_chunks = static_cast<int>(NumLateChunks(params));
  args.x_bytes = box_rows * kBoxRowBytes;
  args.x_parts = x_parts;
  constexpr int kStageWeightBytes = Tile::kParts * Tile::kWeightBytes;
  args.num_stages =
      std::min(kMaxStages, kRingBytes / (kStageWeightBytes + Tile::kParts * args.x_bytes));
  constexpr int kRowBytes = Tile::kStagingStride * static_cast<int>(sizeof(float));
  constexpr int kNumStaged = Tile::kGroups * Tile::kOwnParts;
  args.staging_bytes = std::min(box_rows, kWgmmaRows) * kRowBytes;
  args.drains = args.staging_bytes * kNumStaged > kStageWeightBytes;
  static_assert(kNumStaged * kWgmmaRows * kRowBytes <= kRingBytes);
  const int grid = std::min(args.num_units, traits.num_multiprocessors);
  const int64_t weight_bytes = params.num_outputs * params.k_dim * sizeof(Weight);
  args.max_under_way =
      std::max(2, UnderWayBytes(params.rows, weight_bytes, grid) / kStageWeightBytes);
  error =
      MessageOf(Launch<kKernel>(traits, dim3(grid), Tile::kThreads, kSharedBytes, stream, args));
  if (error != nullptr || !has_parts) return error;
  if (params.parts != nullptr) {
    *params.parts = {params.partials, splits, args.part_stride, params.weight_scale};
    return nullptr;
  }
  return tells_mark ? LaunchAddParts<T, true>(params, args.part_stride, splits, stream)
                    : LaunchAddParts<T, false>(params, args.part_stride, splits, stream);
}

// Where the scales of the rows are, behind the parts.
inline int64_t PartsSize(int64_t rows) { return int64_t{kMaxParts} * kMaxTileOutputs * rows; }

template <typename T, typename Weight>
const char* LaunchHopper(const LinearParams& params, int num_multiprocessors, cudaStream_t stream) {
  constexpr bool kIsInt8 = sizeof(Weight) == 1;
  constexpr int64_t kMaxInt8K = 131056;  // times 128 times 128 fits 32 bits
  if (kIsInt8 && params.k_dim > kMaxInt8K) {
    return "linear on sm_90a takes a K of at most 131056 with an INT8 weight";
  }
  const int64_t num_chunks = NumChunks(params);
  Cut cut = ChooseCut(params.num_outputs, num_chunks, kIsInt8, num_multiprocessors);
  // A part without chunks, neither early nor late, would have no sums.
  const int64_t num_late = NumLateChunks(params);
  while (cut.splits > std::max(num_late, num_chunks - num_late)) cut.splits /= 2;
  const void* x = params.x;
  float* const x_scale = kIsInt8 ? params.partials + PartsSize(params.rows) : nullptr;
  const bool has_layer_norm = params.ln_scale != nullptr;
  const int x_parts = kIsInt8 && !has_layer_norm ? cut.splits : 1;
  if (has_layer_norm || params.k_multiplier != nullptr || kIsInt8) {
    if (const char* error = LaunchPrepare<T>(params, x_scale, x_parts, stream)) return error;
    x = params.h;
  }
  const auto launch_tile = [&](auto tile) {
    return LaunchProduct<T, Weight, decltype(tile)>(params, x, x_scale, x_parts, cut.splits,
                                                    stream);
  };
  // Sums over ranks take the parts as they are, which was faster (docs/performance-notes.md, "Two H200").
  if (cut.tile_outputs == 128 && cut.splits == 4 && params.rows <= kMaxRowsOfWholeSums &&
      params.parts == nullptr) {
    return launch_tile(Tile<32, 1, 4>());
  }
  const auto launch = [&](auto tile_outputs) {
    constexpr int kTileOutputs = decltype(tile_outputs)::value;
    if constexpr (kIsInt8) {
      if (params.rows > kWgmmaRows / 2) return launch_tile(Tile<kTileOutputs, 2, 1>());
    }
    return launch_tile(Tile<kTileOutputs, 1, 1>());
  };
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

}  // namespace kogpt

#endif  // CUSTOM_OPS_LINEAR_HOPPER_CUH_
