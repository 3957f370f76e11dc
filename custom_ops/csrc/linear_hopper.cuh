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
//
// In the order in which things happen: what a block is told and its part of K (linear_tile.cuh), the ring
// and the warps that fill it (linear_ring.cuh), the products and their outputs (here), sums of parts
// (linear_parts.cuh); then how a weight is cut and launched.
#ifndef CUSTOM_OPS_LINEAR_HOPPER_CUH_
#define CUSTOM_OPS_LINEAR_HOPPER_CUH_

#include <algorithm>
#include <limits>
#include <type_traits>

#include "linear_parts.cuh"
#include "linear_ring.cuh"
#include "linear_tile.cuh"

namespace kogpt {

#if __CUDA_ARCH__ == 900
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

// Whether products tell and await marks. Beside 16-bit weights where that is what it saves (H100, 6B
// model, context 192: 2 to 240 us a step at 1 to 8 rows and 100 at 64, less 10 and 22 at 32 and 16);
// beside INT8 ones where no kernel ahead rounds all of x. The order of the sums does not depend on it.
inline bool UsesMarks(const LinearParams& params) {
  if (params.weight_dtype == DataType::kInt8) return params.rows <= kLinearMaxRowsRounded;
  return params.rows <= 8 || params.rows > 32;
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
