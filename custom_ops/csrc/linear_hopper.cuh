// Decode-sized products on sm_90a: every row of activations meets all of a block's outputs in one
// instruction (wgmma), so that 64 rows cost what one does, and reading the weight is what remains.
//
//   work      tiles of 112, 128, 224 or 256 outputs, and where these are few, parts of their K. How a
//             weight is cut depends on its shape and the device alone, and nothing in a row's sums
//             on the other rows.
//   a tile    goes through a ring in shared memory that two threads fill with tensor copies, 128
//             bytes of K at a time: one the weight before the kernel ahead has ended, the other
//             the activations behind it. Two groups of four warps multiply, half of the outputs
//             each, or one group where they are 112; twice as many where the operand has 128 rows.
//   INT8      meets integers: the tensor cores multiply the weight as it lies by the two digits of
//             16-bit activations (linear_prepare.cuh), two rows of an operand for a row of x. Sums
//             are exact.
//   outputs   go from the sums' registers through the ring, so that all threads share what there is
//             to do, however few the rows: through the last chunk's place where that is enough, else
//             through all of it, and the next tile's chunks wait.
//   parts     of K go to scratch; a kernel behind adds them up in order, while the next product's
//             blocks fill their rings.
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
// Of a tile's outputs, with warpgroups of their own.
template <int kTileOutputs>
inline constexpr int kColumnGroups = kTileOutputs <= 112 ? 1 : 2;
inline constexpr int kMaxStages = 16;
inline constexpr int kStepsPerChunk = 4;  // of 32 bytes of K
inline constexpr int kStepBytes = 32;
// Leaves room beside it for attention, and what goes ahead of the next product.
inline constexpr int kRingBytes = 203 * 1024;
inline constexpr int kUnderWayBytes = 64 * 1024;  // of a block's weights at a time
inline constexpr int kMaxSplits = 8;
inline constexpr int kMaxParts = 192;  // tiles times splits, where there are splits
inline constexpr int kMaxTileOutputs = 256;
// That a warpgroup multiplies.
template <int kTileOutputs>
inline constexpr int kGroupColumns = kTileOutputs / kColumnGroups<kTileOutputs>;
// Of a row of a warpgroup's sums in shared memory: padded so that rows begin in other banks.
template <int kTileOutputs>
inline constexpr int kStagingStride = kGroupColumns<kTileOutputs> + 8;
// Three warps with 96 on a quarter of a multiprocessor leave room for two of attention with 112, and
// a block of 18 warps with less for what goes ahead of the next product.
template <int kTileOutputs>
inline constexpr int kProductRegisters = kGroupColumns<kTileOutputs> <= 64    ? 64
                                         : kGroupColumns<kTileOutputs> <= 112 ? 88
                                                                              : 96;

struct ProductArgs {
  CUtensorMap weight_map;
  CUtensorMap x_map;
  LinearOutputs outputs;
  const float* x_scale;  // [rows, x_parts], of INT8
  float* parts;          // [splits, rows, part_stride]
  int part_stride;
  int num_tiles;
  int num_units;  // tiles times splits
  int splits;
  int num_chunks;  // of K
  int num_stages;
  int max_under_way;  // of stages' weights
  int x_bytes;        // of a chunk
  int x_parts;        // of a row, each with a scale
  int group_bytes;    // of a warpgroup's sums in shared memory
  bool drains;        // the ring, for these
  bool prefetch_weight;
  int num_late_chunks = 0;  // the first ones, with an awaited mark
  int done_mark = 0;
  int awaited_mark = 0;
  int32_t* marks;

  explicit ProductArgs(const LinearParams& params)
      : outputs(params), parts(params.partials), prefetch_weight(params.prefetch_weight) {}
};

// A tile's part of K: its share of the chunks that are early, then of those that are late, which
// products with an INT8 weight do not have.
template <bool kMayBeLate>
struct Unit {
  int tile, split, num_early, num_chunks, first_early, first_late;

  __device__ __forceinline__ Unit(const ProductArgs& args, int index)
      : tile(index % args.num_tiles), split(index / args.num_tiles) {
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
template <int kTileOutputs>
struct ProductRing {
  static constexpr int kWeightBytes = kTileOutputs * kBoxRowBytes;
  uint32_t begin, weights, barriers;
  int x_bytes;

  __device__ __forceinline__ ProductRing(const ProductArgs& args, uint32_t shared,
                                         uint32_t barriers_in)
      : begin((shared + kBoxAlignment - 1) / kBoxAlignment * kBoxAlignment),
        weights(begin + args.num_stages * args.x_bytes),
        barriers(barriers_in),
        x_bytes(args.x_bytes) {}

  __device__ __forceinline__ uint32_t X(int stage) const { return begin + stage * x_bytes; }
  __device__ __forceinline__ uint32_t Weights(int stage) const {
    return weights + stage * kWeightBytes;
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

// Calls copy(chunk of K, tile, stage) for all of a block's chunks, once their places are free.
template <bool kMayBeLate, typename Ring, typename Copy>
__device__ __forceinline__ void ForEachChunk(const ProductArgs& args, const Ring& ring,
                                             Copy&& copy) {
  RingCursor stage;
  bool is_around = false;
  int parity = 0;  // of the units
  for (int index = blockIdx.x; index < args.num_units; index += gridDim.x) {
    const Unit<kMayBeLate> unit(args, index);
    if (args.drains && index >= gridDim.x) {
      BarrierWait(ring.Drained(), parity);
      parity ^= 1;
    }
    for (int i = 0; i < unit.num_chunks; ++i) {
      if (is_around) BarrierWait(ring.Empty(stage.index), stage.parity ^ 1);
      copy(unit.Chunk(i), unit.tile, stage);
      stage.Advance(args.num_stages);
      is_around = is_around || stage.index == 0;
    }
  }
}

// One thread. No more than what saturates device memory is under way at a time: what a small kernel
// reads meanwhile, attention ahead of this product above all, waits behind it.
template <typename Weight, int kTileOutputs>
__device__ void CopyWeights(const ProductArgs& args, const ProductRing<kTileOutputs>& ring) {
  constexpr int kChunkK = kBoxRowBytes / static_cast<int>(sizeof(Weight));
  const uint64_t policy = EvictFirst();  // what is read once must not drive out what is read again
  if (!args.prefetch_weight) WaitForDependency();
  RingCursor arrived;
  int num_under_way = 0;
  ForEachChunk<sizeof(Weight) != 1>(args, ring, [&](int chunk, int tile, const RingCursor& stage) {
    if (num_under_way < args.max_under_way) {
      ++num_under_way;
    } else {
      BarrierWait(ring.FullWeights(arrived.index), arrived.parity);
      arrived.Advance(args.num_stages);
    }
    BarrierArriveExpecting(ring.FullWeights(stage.index), ring.kWeightBytes);
    CopyBox(ring.Weights(stage.index), args.weight_map, chunk * kChunkK, tile * kTileOutputs,
            ring.FullWeights(stage.index), policy);
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

// One thread.
template <typename Weight, int kTileOutputs>
__device__ void CopyActivations(const ProductArgs& args, const ProductRing<kTileOutputs>& ring) {
  constexpr int kChunkK = kBoxRowBytes / static_cast<int>(sizeof(Weight));
  constexpr bool kMayBeLate = sizeof(Weight) != 1;
  if (kMayBeLate && args.awaited_mark != 0) {
    AwaitMark(args.marks, args.awaited_mark);
    TellMark(args.marks, 0);  // once all blocks have seen it
  } else {
    WaitForDependency();
  }
  ForEachChunk<kMayBeLate>(args, ring, [&](int chunk, int, const RingCursor& stage) {
    if (kMayBeLate && chunk < args.num_late_chunks) WaitForDependency();
    BarrierArriveExpecting(ring.FullX(stage.index), args.x_bytes);
    CopyBox(ring.X(stage.index), args.x_map, chunk * kChunkK, 0, ring.FullX(stage.index));
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

// Calls body(row, column, sums of eight neighbouring columns) for a warpgroup's sums of `x_rows` rows
// of the operand, which go through shared memory at `staging`. Instructions come from device memory,
// too, behind all weights that are under way, so that what is done for eight sums stands here once.
template <typename Sum, int kTileOutputs, typename Body>
__device__ __forceinline__ void ForEachVector(int warpgroup, int x_rows, Sum* staging,
                                              const Sum (&sums)[kGroupColumns<kTileOutputs> / 2],
                                              Body&& body) {
  constexpr int kColumns = kGroupColumns<kTileOutputs>;
  constexpr int kStride = kStagingStride<kTileOutputs>;
  constexpr int kVector = LinearOutputs::kVector;
  constexpr int kVectors = kColumns / kVector;  // of a row
  constexpr bool kHasDigits = std::is_same_v<Sum, int32_t>;
  using Two = std::conditional_t<kHasDigits, int2, float2>;
  using Four = std::conditional_t<kHasDigits, int4, float4>;
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int warp_row = thread / kWarpSize * 16;
  const int lane = thread % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (warp_row + half * 8 >= x_rows) continue;
    Sum* const to = staging + (warp_row + half * 8 + lane / 4) * kStride + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      *reinterpret_cast<Two*>(to + i * 8) = Two{sums[4 * i + 2 * half], sums[4 * i + 2 * half + 1]};
    }
  }
  WarpgroupBarrier(warpgroup);
  const int count = (kHasDigits ? x_rows / 2 : x_rows) * kVectors;
#pragma unroll 1
  for (int i = thread; i < count; i += kWarpgroupThreads) {
    const int row = i / kVectors;
    const int column = i % kVectors * kVector;
    const auto load = [&](int x_row, float (&values)[kVector]) {
      const auto* from = reinterpret_cast<const Four*>(staging + x_row * kStride + column);
      const Four low = from[0], high = from[1];
      values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
      values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    };
    float values[kVector];
    if constexpr (kHasDigits) {
      float low[kVector];
      load(2 * row, values);
      load(2 * row + 1, low);
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[j] = __fmaf_rn(256.0f, values[j], low[j]);
    } else {
      load(row, values);
    }
    body(row, column, values);
  }
}
#endif

// That multiply; kRowTiles: of 64 rows of the activations' operand.
template <int kTileOutputs, int kRowTiles>
inline constexpr int kWarpgroups = kColumnGroups<kTileOutputs> * kRowTiles;
// And two warps that copy.
template <int kTileOutputs, int kRowTiles>
inline constexpr int kProductThreads =
    kWarpgroups<kTileOutputs, kRowTiles> * kWarpgroupThreads + 2 * kWarpSize;

template <typename T, typename Weight, int kTileOutputs, int kRowTiles>
__global__ void __maxnreg__(kProductRegisters<kTileOutputs>)
    ProductKernel(const __grid_constant__ ProductArgs args) {
#if __CUDA_ARCH__ == 900
  constexpr bool kIsInt8 = sizeof(Weight) == 1;
  using Sum = std::conditional_t<kIsInt8, int32_t, float>;
  constexpr int kGroups = kWarpgroups<kTileOutputs, kRowTiles>;
  constexpr int kColumns = kGroupColumns<kTileOutputs>;
  constexpr int kTileRows = kIsInt8 ? kWgmmaRows / 2 : kWgmmaRows;  // of x
  constexpr int kVector = LinearOutputs::kVector;
  extern __shared__ unsigned char shared[];
  __shared__ uint64_t barriers[3 * kMaxStages + 1];
  // Of the outputs and rows of a unit and the one before it.
  __shared__ float scales[2][kTileOutputs], biases[2][kTileOutputs];
  __shared__ float x_scales[2][kGroups][kTileRows];
  const ProductRing<kTileOutputs> ring(args, SharedAddress(shared), SharedAddress(barriers));
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
    if (thread == 0) CopyWeights<Weight, kTileOutputs>(args, ring);
    if (thread == kWarpSize) CopyActivations<Weight, kTileOutputs>(args, ring);
    return;
  }
  // What is read ahead of the products may come from the kernel ahead; x itself is behind its copies.
  if (kIsInt8 || !args.prefetch_weight) WaitForDependency();

  const int first_column = warpgroup % kColumnGroups<kTileOutputs> * kColumns;
  const int row_tile = warpgroup / kColumnGroups<kTileOutputs>;
  const int first_row = row_tile * kTileRows;
  const LinearOutputs& outputs = args.outputs;
  const int num_rows = min(outputs.rows - first_row, kTileRows);
  const auto release = [&](int stage) {
    if (thread == 0) BarrierArrive(ring.Empty(stage));
  };
  RingCursor stage;
  int parity = 0;  // of the units
  for (int index = blockIdx.x; index < args.num_units; index += gridDim.x, parity ^= 1) {
    const Unit<!kIsInt8> unit(args, index);
    const int first_output = unit.tile * kTileOutputs;
    if (args.splits == 1 && thread < kColumns) {
      const int column = first_column + thread;
      scales[parity][column] = outputs.Scale(first_output + column);
      biases[parity][column] = outputs.Bias<T>(first_output + column);
    }
    if (kIsInt8 && thread < num_rows) {
      const int part = args.x_parts == 1 ? 0 : unit.split;
      x_scales[parity][warpgroup][thread] =
          __ldcg(args.x_scale + (first_row + thread) * args.x_parts + part);
    }
    Sum sums[kColumns / 2];
    int last_stage = 0;
    for (int i = 0; i < unit.num_chunks; ++i) {
      BarrierWait(ring.FullWeights(stage.index), stage.parity);
      BarrierWait(ring.FullX(stage.index), stage.parity);
      WgmmaFence();
#pragma unroll
      for (int step = 0; step < kStepsPerChunk; ++step) {
        const uint64_t a = DescribeAlongK(ring.X(stage.index) +
                                          row_tile * kWgmmaRows * kBoxRowBytes + step * kStepBytes);
        const uint64_t b = DescribeAlongK(ring.Weights(stage.index) + first_column * kBoxRowBytes +
                                          step * kStepBytes);
        WgmmaShared<Weight, kColumns>::Run(sums, a, b, i > 0 || step > 0);
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
    WgmmaKeep(sums);

    if constexpr (!kIsInt8) WaitForDependency();  // before the first write
    // All groups are done with the weights; and the scales and biases are there.
    asm volatile("bar.sync 5, %0;\n" ::"n"(kGroups * kWarpgroupThreads) : "memory");
    const auto for_each = [&](auto&& body) {
      const uint32_t staging = args.drains ? ring.begin : ring.Weights(last_stage);
      unsigned char* const own =
          shared + (staging - SharedAddress(shared)) + warpgroup * args.group_bytes;
      const int x_rows = (kIsInt8 ? 2 : 1) * num_rows;
      ForEachVector<Sum, kTileOutputs>(warpgroup, x_rows, reinterpret_cast<Sum*>(own), sums,
                                       [&](int row, int column, float (&values)[kVector]) {
                                         if constexpr (kIsInt8) {
                                           const float scale = x_scales[parity][warpgroup][row];
#pragma unroll
                                           for (int i = 0; i < kVector; ++i) values[i] *= scale;
                                         }
                                         body(first_row + row, first_column + column, values);
                                       });
    };
    if (args.splits > 1) {
      float* const part = args.parts + first_output +
                          static_cast<int64_t>(unit.split) * outputs.rows * args.part_stride;
      for_each([&](int row, int column, const float (&values)[kVector]) {
        auto* const to =
            reinterpret_cast<float4*>(part + static_cast<int64_t>(row) * args.part_stride + column);
        __stcg(to, make_float4(values[0], values[1], values[2], values[3]));
        __stcg(to + 1, make_float4(values[4], values[5], values[6], values[7]));
      });
    } else {
      for_each([&](int row, int column, float (&values)[kVector]) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          values[i] = values[i] * scales[parity][column + i] + biases[parity][column + i];
        }
        outputs.StoreVector<T>(row, first_output + column, values);
      });
    }
    FenceForAsync();
    WarpgroupBarrier(warpgroup);
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

template <typename T, typename Weight, int kTileOutputs, int kRowTiles>
const char* LaunchProduct(const LinearParams& params, const void* x, const float* x_scale,
                          int x_parts, int splits, cudaStream_t stream) {
  constexpr auto kKernel = ProductKernel<T, Weight, kTileOutputs, kRowTiles>;
  constexpr int kSharedBytes = kRingBytes + kBoxAlignment;
  const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return kSharedBytes; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  const int64_t x_rows = (sizeof(Weight) == 1 ? 2 : 1) * params.rows;
  const int box_rows = static_cast<int>((x_rows + 7) / 8 * 8);
  ProductArgs args(params);
  args.x_scale = x_scale;
  const char* error = DescribeBoxes(&args.weight_map, params.weight, params.num_outputs,
                                    params.k_dim, sizeof(Weight), kTileOutputs);
  if (error == nullptr) {
    error = DescribeBoxes(&args.x_map, x, x_rows, params.k_dim, sizeof(Weight), box_rows);
  }
  if (error != nullptr) return error;
  const int64_t tiles = (params.num_outputs + kTileOutputs - 1) / kTileOutputs;
  args.part_stride = static_cast<int>(tiles * kTileOutputs);
  args.num_tiles = static_cast<int>(tiles);
  args.num_units = args.num_tiles * splits;
  args.splits = splits;
  args.num_chunks = static_cast<int>(NumChunks(params));
  args.marks = Marks(params);
  const bool tells_mark = UsesMarks(params.rows) && params.done_mark != 0;
  if (tells_mark && splits == 1) args.done_mark = params.done_mark;
  if (params.awaited_mark != 0) {
    if (UsesMarks(params.rows)) args.awaited_mark = params.awaited_mark;
    constexpr int64_t kChunkK = kBoxRowBytes / sizeof(Weight);
    args.num_late_chunks = static_cast<int>((params.early_from + kChunkK - 1) / kChunkK);
  }
  args.x_bytes = box_rows * kBoxRowBytes;
  args.x_parts = x_parts;
  args.num_stages = std::min(kMaxStages, kRingBytes / (kTileOutputs * kBoxRowBytes + args.x_bytes));
  args.max_under_way = std::max(2, kUnderWayBytes / (kTileOutputs * kBoxRowBytes));
  constexpr int kStride = kStagingStride<kTileOutputs>;
  args.group_bytes = std::min(box_rows, kWgmmaRows) * kStride * static_cast<int>(sizeof(float));
  args.drains =
      args.group_bytes * kWarpgroups<kTileOutputs, kRowTiles> > kTileOutputs * kBoxRowBytes;
  static_assert(kWarpgroups<kTileOutputs, kRowTiles> * kWgmmaRows * kStride * sizeof(float) <=
                kRingBytes);
  const int grid = std::min(args.num_units, traits.num_multiprocessors);
  error = MessageOf(Launch<kKernel>(traits, dim3(grid), kProductThreads<kTileOutputs, kRowTiles>,
                                    kSharedBytes, stream, args));
  if (error != nullptr || splits == 1) return error;
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
  const Cut cut = ChooseCut(params.num_outputs, NumChunks(params), kIsInt8, num_multiprocessors);
  const void* x = params.x;
  float* const x_scale = kIsInt8 ? params.partials + PartsSize(params.rows) : nullptr;
  const bool has_layer_norm = params.ln_scale != nullptr;
  const int x_parts = kIsInt8 && !has_layer_norm ? cut.splits : 1;
  if (has_layer_norm || params.k_multiplier != nullptr || kIsInt8) {
    if (const char* error = LaunchPrepare<T>(params, x_scale, x_parts, stream)) return error;
    x = params.h;
  }
  const auto launch = [&](auto tile_outputs) {
    constexpr int kTileOutputs = decltype(tile_outputs)::value;
    if constexpr (kIsInt8) {
      if (params.rows > kWgmmaRows / 2) {
        return LaunchProduct<T, Weight, kTileOutputs, 2>(params, x, x_scale, x_parts, cut.splits,
                                                         stream);
      }
    }
    return LaunchProduct<T, Weight, kTileOutputs, 1>(params, x, x_scale, x_parts, cut.splits,
                                                     stream);
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
