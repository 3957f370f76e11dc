// Decode-sized products on tensor cores, bound by reading the weight once.
//
// The weight is the m16n8k16 instruction's A operand (outputs x k), the activations its B operand
// (k x rows), so that 1 to 64 rows are 1, 2, 4 or 8 tiles of 8 columns and nothing else changes: an
// output's sum is taken in the same order whatever the number of rows.
//
//   work      tiles of 128 outputs x all of K, cut along K into chunks; each block of the grid
//             takes one share of all chunks in order (stream-K, Osama et al. 2023). A tile that
//             several blocks share is added up by the one that has its first chunk, in the order
//             of k. The cuts depend on the weight's shape and the device alone.
//   a chunk   goes through a ring in shared memory. On Hopper one thread fills it with tensor
//             copies and eight warps multiply; before Hopper the eight warps copy too.
//   launch    a block that has ended makes room for one of the next kernel, which fills its ring
//             while slower blocks of this kernel, or an attention between the two products, still
//             run.
//
// Limits: K a multiple of 8 (16 with an INT8 weight), 16-bit activations.

#include <algorithm>
#include <type_traits>

#include "cuda_common.cuh"
#include "linear.h"

namespace kogpt {
namespace {

constexpr int kWarps = 8;  // that multiply
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kHopperThreads = kThreads + kWarpSize;  // and one that fills the ring
constexpr int kWarpOutputs = 16;                      // of one m16n8k16
constexpr int kTileOutputs = kWarps * kWarpOutputs;
constexpr int kTileRows = 8;
constexpr int kMaxGrid = 192;        // bounds the partial sums' scratch
constexpr int kMaxChunks = 1 << 20;  // so that shares are counted in 32 bits

// How large the shares of the blocks that start first are beside the others'. Those blocks run on
// the multiprocessors that read faster, a fifth of an H100's; still, equal shares have been the
// fastest (docs/performance-notes.md).
constexpr int kBlocksPerLargeShare = 5;
constexpr uint32_t kLargeShare = 8;
constexpr uint32_t kSmallShare = 8;

// A chunk is boxes of 128 bytes of each row: of the weight, on Hopper two of them so that device
// memory is read in pieces of 256 bytes, and of the activations that meet it.
constexpr int kBoxRowBytes = 128;
constexpr int kWeightBoxBytes = kTileOutputs * kBoxRowBytes;
constexpr int kRingAlignment = 1024;  // of a swizzled box

// Sizes of the ring. On Hopper it takes nearly all shared memory of a multiprocessor: what is under
// way there goes on coming while the next kernel's blocks start. 96 KiB fit every GPU from compute
// capability 8.0 on.
template <typename Weight, int kRowTiles, bool kIsHopper>
struct Ring {
  static constexpr int kWeightBoxes = kIsHopper ? 2 : 1;
  static constexpr int kChunkK = kWeightBoxes * kBoxRowBytes / static_cast<int>(sizeof(Weight));
  static constexpr int kActivationBoxes = kChunkK * 2 / kBoxRowBytes;
  static constexpr int kActivationBoxBytes = kRowTiles * kTileRows * kBoxRowBytes;
  static constexpr int kStageBytes =
      kWeightBoxes * kWeightBoxBytes + kActivationBoxes * kActivationBoxBytes;
  static constexpr int kStages = (kIsHopper ? 208 : 96) * 1024 / kStageBytes;
  static_assert(kStages >= 3);

  static constexpr int kSharedBytes = kStages * kStageBytes + kRingAlignment;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kOnHopper = true;
#else
constexpr bool kOnHopper = false;
#endif
// The ring of the architecture that device code is compiled for.
template <typename Weight, int kRowTiles>
using DeviceRing = Ring<Weight, kRowTiles, kOnHopper>;

struct KernelArgs {
  CUtensorMap weight_map;
  CUtensorMap x_map;
  const void* x;
  const void* weight;
  const float* weight_scale;
  const void* bias;
  const float* residual;
  void* y;
  void* act;
  float* partials;
  int32_t* semaphores;
  int rows;
  int num_outputs;
  int k_dim;
  int gelu_from;
  int act_dim;
  int chunks_per_tile;
  int num_chunks;
  int num_large_shares;
  bool is_y_float32;
  bool prefetch_weight;
};

// Eight INT8 values as pairs of 16-bit numbers, exactly; their scale is applied to the sum.
template <typename T>
struct Widened {
  uint32_t words[4];

  __device__ __forceinline__ Widened(uint32_t low, uint32_t high) {
    const uint32_t bytes[2] = {low, high};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t selector =
          i % 2 == 0 ? 0x4140 : 0x4342;  // each value below the constant's byte
      if constexpr (std::is_same_v<T, __half>) {
        // 0x6400 + u is 1024 + u; u = value + 128.
        const uint32_t raised = __byte_perm(bytes[i / 2] ^ 0x80808080u, 0x64646464u, selector);
        const __half2 pair = __hsub2(*reinterpret_cast<const __half2*>(&raised),
                                     __half2(__half_raw{0x6480}, __half_raw{0x6480}));
        words[i] = *reinterpret_cast<const uint32_t*>(&pair);
      } else {
        // 0x4300 + u is 128 + u for seven bits u; the eighth bit, as the sign, turns the 128 to
        // subtract into 256.
        const uint32_t raised = __byte_perm(bytes[i / 2], 0x43434343u, selector);
        const uint32_t low = raised & 0xff7fff7fu;
        const uint32_t offset = raised & 0xff80ff80u;
        const __nv_bfloat162 pair = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&low),
                                            *reinterpret_cast<const __nv_bfloat162*>(&offset));
        words[i] = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
  }
};

// sums += A B for 16 outputs, 8 rows and 16 k, in f32.
template <typename T>
__device__ __forceinline__ void MultiplyAdd(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};\n"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// tanh form: x / 2 (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3);
// Hendrycks and Gimpel 2016.
__device__ __forceinline__ float Gelu(float x) {
  const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return x / (1.0f + __expf(-2.0f * u));
}

// Where piece `piece` (16 bytes) of row `row` lies in a box.
__device__ __forceinline__ uint32_t PieceOffset(int row, int piece) {
  return row * kBoxRowBytes + ((piece ^ (row % 8)) * 16);
}

__device__ __forceinline__ uint4 LoadShared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

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
  const uint32_t box = stage + step / kStepsPerBox<Weight> * kWeightBoxBytes;
  const int step_of_box = step % kStepsPerBox<Weight>;
  if constexpr (sizeof(Weight) == 1) {
    const int piece = step_of_box * 2 + lane % 4;
    weights[0] = LoadShared(box + PieceOffset(output + lane / 4, piece));
    weights[1] = LoadShared(box + PieceOffset(output + lane / 4 + 8, piece));
  } else {
    const int piece = step_of_box * 4 + lane / 16;
    weights[0] = LoadMatrices(box + PieceOffset(output + lane % 16, piece));
    weights[1] = LoadMatrices(box + PieceOffset(output + lane % 16, piece + 2));
  }
}

template <typename Weight, int kRowTiles>
__device__ __forceinline__ void LoadActivations(uint32_t stage, int step, uint4 (&x)[kRowTiles]) {
  const int lane = threadIdx.x % kWarpSize;
  using Ring = DeviceRing<Weight, kRowTiles>;
  const uint32_t box =
      stage + Ring::kWeightBoxes * kWeightBoxBytes + step / 2 * Ring::kActivationBoxBytes;
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
  constexpr int kSteps = DeviceRing<Weight, kRowTiles>::kWeightBoxes * kStepsPerBox<Weight>;
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

// What is added to the sums of this lane's outputs, lane / 4 and lane / 4 + 8 of its warp's 16.
struct OutputTerms {
  float scale[2];
  float bias[2];
};

template <typename T, typename Weight>
__device__ __forceinline__ OutputTerms LoadOutputTerms(const KernelArgs& args, int first_output) {
  OutputTerms terms;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = min(first_output + static_cast<int>(threadIdx.x) % kWarpSize / 4 + half * 8,
                      args.num_outputs - 1);
    // With GELU the bias covers only the outputs that go through it.
    const int m_of_bias = args.gelu_from == args.num_outputs ? m : m - args.gelu_from;
    terms.scale[half] = sizeof(Weight) == 1 ? __ldg(args.weight_scale + m) : 1.0f;
    terms.bias[half] = args.bias != nullptr && m_of_bias >= 0
                           ? ToFloat(static_cast<const T*>(args.bias)[m_of_bias])
                           : 0.0f;
  }
  return terms;
}

// Calls body(i, m, row) for each of this lane's sums of a tile that are outputs: sum i is output m
// of row `row`.
template <int kRowTiles, typename Body>
__device__ __forceinline__ void ForEachOutput(const KernelArgs& args, int first_output,
                                              Body&& body) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kRowTiles * 4; ++i) {
    const int m = first_output + lane / 4 + i % 4 / 2 * 8;
    const int row = i / 4 * kTileRows + lane % 4 * 2 + i % 2;
    if (m < args.num_outputs && row < args.rows) body(i, m, row);
  }
}

template <int kRowTiles>
__device__ __forceinline__ void LoadResidual(const KernelArgs& args, int first_output,
                                             float (&residual)[kRowTiles * 4]) {
  ForEachOutput<kRowTiles>(args, first_output, [&](int i, int m, int row) {
    residual[i] = args.residual != nullptr && m < args.gelu_from
                      ? __ldcg(args.residual + static_cast<int64_t>(row) * args.gelu_from + m)
                      : 0.0f;
  });
}

// Writes this warp's outputs of a finished tile.
template <typename T, int kRowTiles>
__device__ __forceinline__ void Finish(const KernelArgs& args, int first_output,
                                       const OutputTerms& terms,
                                       const float (&residual)[kRowTiles * 4],
                                       const float (&sums)[kRowTiles][4]) {
  ForEachOutput<kRowTiles>(args, first_output, [&](int i, int m, int row) {
    const int half = i % 4 / 2;
    const float value = sums[i / 4][i % 4] * terms.scale[half] + terms.bias[half] + residual[i];
    if (m >= args.gelu_from) {
      const int64_t at =
          static_cast<int64_t>(row) * args.act_dim + args.act_dim - args.num_outputs + m;
      static_cast<T*>(args.act)[at] = FromFloat<T>(Gelu(value));
    } else if (args.is_y_float32) {
      static_cast<float*>(args.y)[static_cast<int64_t>(row) * args.gelu_from + m] = value;
    } else {
      static_cast<T*>(args.y)[static_cast<int64_t>(row) * args.gelu_from + m] = FromFloat<T>(value);
    }
  });
}

// Parts of a tile go from warp to warp: the eight warps of a block need not meet.
template <int kRowTiles>
__device__ __forceinline__ float* PartOf(const KernelArgs& args, int share) {
  return args.partials + static_cast<int64_t>(share) * kRowTiles * 4 * kThreads + threadIdx.x;
}

__device__ __forceinline__ int32_t* SemaphoreOf(const KernelArgs& args, int share) {
  return args.semaphores + share * kWarps + threadIdx.x / kWarpSize;
}

// The first chunk of a share: first come the others' shares, then those of the blocks that start
// first. Products fit 32 bits, which the launch sees to.
__device__ __forceinline__ int FirstChunk(const KernelArgs& args, int share) {
  const uint32_t num_large = args.num_large_shares;
  const uint32_t num_small = gridDim.x - num_large;
  const uint32_t in_small = min(static_cast<uint32_t>(share), num_small);
  const uint32_t weight = kSmallShare * in_small + kLargeShare * (share - in_small);
  const uint32_t total = kSmallShare * num_small + kLargeShare * num_large;
  return static_cast<int>(weight * static_cast<uint32_t>(args.num_chunks) / total);
}

// Hands this warp's part of a tile to the block that finishes it.
template <int kRowTiles>
__device__ void SendPart(const KernelArgs& args, int share, const float (&sums)[kRowTiles][4]) {
  float* part = PartOf<kRowTiles>(args, share);
#pragma unroll
  for (int i = 0; i < kRowTiles * 4; ++i) __stcg(part + i * kThreads, sums[i / 4][i % 4]);
  __syncwarp();  // the release below covers what the other lanes have written
  if (threadIdx.x % kWarpSize == 0) {
    asm volatile("st.release.gpu.global.s32 [%0], 1;\n" ::"l"(SemaphoreOf(args, share)) : "memory");
  }
}

// Adds this warp's parts of the shares after `share` that begin before chunk `tile_end`, in order,
// and leaves their semaphores zero.
template <int kRowTiles>
__device__ void ReceiveParts(const KernelArgs& args, int share, int tile_end,
                             float (&sums)[kRowTiles][4]) {
  int last = share;
  while (last + 1 < static_cast<int>(gridDim.x) && FirstChunk(args, last + 1) < tile_end) ++last;
  for (int other = share + 1 + static_cast<int>(threadIdx.x) % kWarpSize; other <= last;
       other += kWarpSize) {
    int32_t* semaphore = SemaphoreOf(args, other);
    int is_there = 0;
    while (is_there == 0) {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n"
                   : "=r"(is_there)
                   : "l"(semaphore)
                   : "memory");
    }
    *semaphore = 0;
  }
  __syncwarp();
  constexpr int kTogether = kRowTiles >= 4 ? 1 : 4 / kRowTiles;  // parts that are read at once
  for (int first = share + 1; first <= last; first += kTogether) {
    float values[kTogether][kRowTiles * 4];
#pragma unroll
    for (int p = 0; p < kTogether; ++p) {
#pragma unroll
      for (int i = 0; i < kRowTiles * 4; ++i) {
        values[p][i] =
            first + p <= last ? __ldcg(PartOf<kRowTiles>(args, first + p) + i * kThreads) : 0.0f;
      }
    }
#pragma unroll
    for (int p = 0; p < kTogether; ++p) {
      if (first + p > last) break;
#pragma unroll
      for (int i = 0; i < kRowTiles * 4; ++i) sums[i / 4][i % 4] += values[p][i];
    }
  }
}

// A place in a share of chunks: which tile, and how far in it.
struct Cursor {
  int tile;
  int in_tile;

  __device__ Cursor(const KernelArgs& args, int chunk)
      : tile(chunk / args.chunks_per_tile), in_tile(chunk - tile * args.chunks_per_tile) {}

  __device__ __forceinline__ void Advance(const KernelArgs& args) {
    if (++in_tile == args.chunks_per_tile) {
      in_tile = 0;
      ++tile;
    }
  }
};

// The stages of the ring in turn.
template <typename Ring>
struct RingCursor {
  int index = 0;
  int parity = 0;  // flips with each time around

  __device__ __forceinline__ uint32_t offset() const { return index * Ring::kStageBytes; }
  __device__ __forceinline__ void Advance() {
    if (++index == Ring::kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

#if __CUDA_ARCH__ >= 900
// Fills the ring with chunks [begin, end): one thread.
template <typename Weight, int kRowTiles>
__device__ void Produce(const KernelArgs& args, uint32_t ring, uint32_t full, uint32_t empty,
                        int begin, int end) {
  using Ring = DeviceRing<Weight, kRowTiles>;
  RingCursor<Ring> stage;
  const auto copy_weight = [&](const Cursor& at) {
    const uint32_t barrier = full + stage.index * 8;
    BarrierArriveExpecting(barrier, Ring::kStageBytes);
#pragma unroll
    for (int box = 0; box < Ring::kWeightBoxes; ++box) {
      const int k =
          at.in_tile * Ring::kChunkK + box * (kBoxRowBytes / static_cast<int>(sizeof(Weight)));
      CopyBox(ring + stage.offset() + box * kWeightBoxBytes, args.weight_map, k,
              at.tile * kTileOutputs, barrier);
    }
  };
  const auto copy_activations = [&](const Cursor& at) {
    const uint32_t to = ring + stage.offset() + Ring::kWeightBoxes * kWeightBoxBytes;
#pragma unroll
    for (int box = 0; box < Ring::kActivationBoxes; ++box) {
      const int k = at.in_tile * Ring::kChunkK + box * (kBoxRowBytes / 2);
      CopyBox(to + box * Ring::kActivationBoxBytes, args.x_map, k, 0, full + stage.index * 8);
    }
  };

  if (!args.prefetch_weight) WaitForDependency();
  const int num_ahead = min(Ring::kStages, end - begin);
  Cursor weights(args, begin);
  Cursor activations = weights;
  for (int i = 0; i < num_ahead; ++i) {
    copy_weight(weights);
    weights.Advance(args);
    stage.Advance();
  }
  WaitForDependency();  // before the first activation is read
  stage = {};
  for (int i = 0; i < num_ahead; ++i) {
    copy_activations(activations);
    activations.Advance(args);
    stage.Advance();
  }
  for (int chunk = begin + num_ahead; chunk < end; ++chunk) {
    BarrierWait(empty + stage.index * 8, stage.parity ^ 1);
    copy_weight(weights);
    copy_activations(weights);
    weights.Advance(args);
    stage.Advance();
  }
}
#else
// Copies a chunk into a stage: all threads of the block.
template <typename T, typename Weight, int kRowTiles>
__device__ __forceinline__ void CopyChunk(const KernelArgs& args, uint32_t stage,
                                          const Cursor& at) {
  using Ring = DeviceRing<Weight, kRowTiles>;
  constexpr int kPiecesPerRow = kBoxRowBytes / 16;
  const int piece = threadIdx.x % kPiecesPerRow;
  const auto copy_boxes = [&](uint32_t to, const auto* from, int num_boxes, int num_rows,
                              int first_row, int end_row) {
    const int values = static_cast<int>(16 / sizeof(*from));  // of a piece
    for (int box = 0; box < num_boxes; ++box) {
      const int k = at.in_tile * Ring::kChunkK + (box * kPiecesPerRow + piece) * values;
#pragma unroll
      for (int row = threadIdx.x / kPiecesPerRow; row < num_rows; row += kThreads / kPiecesPerRow) {
        const bool is_valid = first_row + row < end_row && k < args.k_dim;
        CopyAsync16(to + box * num_rows * kBoxRowBytes + PieceOffset(row, piece),
                    is_valid ? from + static_cast<int64_t>(first_row + row) * args.k_dim + k : from,
                    is_valid);
      }
    }
  };
  copy_boxes(stage, static_cast<const Weight*>(args.weight), Ring::kWeightBoxes, kTileOutputs,
             at.tile * kTileOutputs, args.num_outputs);
  copy_boxes(stage + Ring::kWeightBoxes * kWeightBoxBytes, static_cast<const T*>(args.x),
             Ring::kActivationBoxes, kRowTiles * kTileRows, 0, args.rows);
}
#endif

template <typename T, typename Weight, int kRowTiles>
__global__ void __launch_bounds__(kHopperThreads, 1)
    LinearKernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ unsigned char shared[];
  using Ring = DeviceRing<Weight, kRowTiles>;
  const uint32_t ring =
      (SharedAddress(shared) + kRingAlignment - 1) / kRingAlignment * kRingAlignment;
  // The last share goes to the first block: a block waits only for later shares, so for blocks of
  // a lower index, which in practice are dispatched before it.
  const int share = gridDim.x - 1 - blockIdx.x;
  const int begin = FirstChunk(args, share);
  const int end = FirstChunk(args, share + 1);

  LaunchDependents();
#if __CUDA_ARCH__ >= 900
  __shared__ uint64_t barriers[2 * Ring::kStages];
  const uint32_t full = SharedAddress(barriers);
  const uint32_t empty = full + Ring::kStages * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Ring::kStages; ++i) {
      BarrierInit(full + i * 8, 1);
      BarrierInit(empty + i * 8, kWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x >= kThreads) {
    if (threadIdx.x == kThreads) Produce<Weight, kRowTiles>(args, ring, full, empty, begin, end);
    return;
  }
  WaitForDependency();  // before anything is written
#else
  constexpr int kAhead = Ring::kStages - 1;
  Cursor fetch(args, begin);
  for (int i = 0; i < kAhead; ++i) {
    if (begin + i < end) CopyChunk<T, Weight, kRowTiles>(args, ring + i * Ring::kStageBytes, fetch);
    CopyAsyncCommit();
    fetch.Advance(args);
  }
#endif

  float sums[kRowTiles][4] = {};
  Cursor at(args, begin);
  RingCursor<Ring> stage;
  for (int chunk = begin; chunk < end; ++chunk) {
    const bool is_part_end = at.in_tile == args.chunks_per_tile - 1 || chunk == end - 1;
    const int first_output =
        at.tile * kTileOutputs + static_cast<int>(threadIdx.x) / kWarpSize * kWarpOutputs;
    OutputTerms terms;
    if (is_part_end) terms = LoadOutputTerms<T, Weight>(args, first_output);
#if __CUDA_ARCH__ >= 900
    BarrierWait(full + stage.index * 8, stage.parity);
    MultiplyChunk<T, Weight, kRowTiles>(ring + stage.offset(), sums);
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) BarrierArrive(empty + stage.index * 8);
#else
    CopyAsyncWait<kAhead - 1>();
    __syncthreads();  // the chunk is there, and the stage of the one before is free
    if (chunk + kAhead < end) {
      const int free_stage = stage.index == 0 ? kAhead : stage.index - 1;
      CopyChunk<T, Weight, kRowTiles>(args, ring + free_stage * Ring::kStageBytes, fetch);
      fetch.Advance(args);
    }
    CopyAsyncCommit();
    MultiplyChunk<T, Weight, kRowTiles>(ring + stage.offset(), sums);
#endif
    stage.Advance();

    const int tile_begin = chunk - at.in_tile;
    at.Advance(args);
    if (!is_part_end) continue;
    if (tile_begin < begin) {
      SendPart<kRowTiles>(args, share, sums);
    } else {
      float residual[kRowTiles * 4];
      LoadResidual<kRowTiles>(args, first_output, residual);
      ReceiveParts<kRowTiles>(args, share, tile_begin + args.chunks_per_tile, sums);
      Finish<T, kRowTiles>(args, first_output, terms, residual, sums);
    }
#pragma unroll
    for (int i = 0; i < kRowTiles * 4; ++i) sums[i / 4][i % 4] = 0.0f;
  }
}

struct PrepareArgs {
  const void* x;
  const void* ln_scale;
  const void* ln_bias;
  const float* k_multiplier;
  void* h;
  int k_dim;
  bool is_x_float32;
  float epsilon;
};

constexpr int kPrepareThreads = 512;
constexpr int kPrepareWarps = kPrepareThreads / kWarpSize;
constexpr int kPrepareVectors =
    2;  // of 8 values a thread that stay in registers; K above 8192 is read again

__device__ __forceinline__ float SumOfBlock(float value, float* shared) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPrepareWarps; ++i) sum += shared[i];
  return sum;
}

// h = LayerNorm(x) (Ba et al. 2016) and the multiplier along k, a block a row. In f32: mean first,
// then the mean square of what is left.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads)
    PrepareKernel(const __grid_constant__ PrepareArgs args) {
  __shared__ float shared[kPrepareWarps];
  LaunchDependents();
  WaitForDependency();
  const int64_t row_begin = static_cast<int64_t>(blockIdx.x) * args.k_dim;
  const int num_vectors = args.k_dim / 8;

  const auto load = [&](int vector, float (&values)[8]) {
    if (args.is_x_float32) {
      const float4* x =
          reinterpret_cast<const float4*>(static_cast<const float*>(args.x) + row_begin) +
          vector * 2;
      const float4 low = __ldcg(x);
      const float4 high = __ldcg(x + 1);
      values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
      values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    } else {
      Unpack<T>(__ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(args.x) + row_begin) +
                       vector),
                values);
    }
  };
  float kept[kPrepareVectors][8];
#pragma unroll
  for (int i = 0; i < kPrepareVectors; ++i) {
    const int vector = i * kPrepareThreads + threadIdx.x;
    if (vector < num_vectors) load(vector, kept[i]);
  }
  const auto for_each = [&](auto&& body) {
#pragma unroll
    for (int i = 0; i < kPrepareVectors; ++i) {
      const int vector = i * kPrepareThreads + threadIdx.x;
      if (vector < num_vectors) body(vector, kept[i]);
    }
    for (int vector = kPrepareVectors * kPrepareThreads + threadIdx.x; vector < num_vectors;
         vector += kPrepareThreads) {
      float values[8];
      load(vector, values);
      body(vector, values);
    }
  };

  float mean = 0.0f;
  float inverse_deviation = 1.0f;
  if (args.ln_scale != nullptr) {
    float sum = 0.0f;
    for_each([&](int, const float (&values)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += values[i];
    });
    mean = SumOfBlock(sum, shared) / args.k_dim;
    float squares = 0.0f;
    for_each([&](int, const float (&values)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += (values[i] - mean) * (values[i] - mean);
    });
    inverse_deviation = rsqrtf(SumOfBlock(squares, shared) / args.k_dim + args.epsilon);
  }
  for_each([&](int vector, const float (&values)[8]) {
    float out[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = (values[i] - mean) * inverse_deviation;
    if (args.ln_scale != nullptr) {
      float scale[8], bias[8];
      Unpack<T>(reinterpret_cast<const uint4*>(args.ln_scale)[vector], scale);
      Unpack<T>(reinterpret_cast<const uint4*>(args.ln_bias)[vector], bias);
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = out[i] * scale[i] + bias[i];
    }
    if (args.k_multiplier != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] *= args.k_multiplier[vector * 8 + i];
    }
    __stcg(reinterpret_cast<uint4*>(static_cast<T*>(args.h) + row_begin) + vector, Pack<T>(out));
  });
}

template <typename T>
const char* LaunchPrepare(const LinearParams& params, cudaStream_t stream) {
  const KernelTraits& traits = TraitsOf<PrepareKernel<T>>([](bool) { return 0; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  const PrepareArgs args = {params.x,
                            params.ln_scale,
                            params.ln_bias,
                            params.k_multiplier,
                            params.h,
                            static_cast<int>(params.k_dim),
                            params.x_dtype == DataType::kFloat32,
                            params.epsilon};
  return MessageOf(Launch<PrepareKernel<T>>(traits, dim3(static_cast<unsigned>(params.rows)),
                                            kPrepareThreads, 0, stream, args));
}

template <typename T, typename Weight, int kRowTiles, bool kIsHopper>
const char* LaunchProduct(const LinearParams& params, const void* x, const KernelTraits& traits,
                          cudaStream_t stream) {
  using Ring = Ring<Weight, kRowTiles, kIsHopper>;
  KernelArgs args = {};
  if (kIsHopper) {
    const char* error = DescribeBoxes(&args.weight_map, params.weight, params.num_outputs,
                                      params.k_dim, sizeof(Weight), kTileOutputs);
    if (error == nullptr) {
      error = DescribeBoxes(&args.x_map, x, params.rows, params.k_dim, 2, kRowTiles * kTileRows);
    }
    if (error != nullptr) return error;
  }
  args.x = x;
  args.weight = params.weight;
  args.weight_scale = params.weight_scale;
  args.bias = params.bias;
  args.residual = params.residual;
  args.y = params.y;
  args.act = params.act;
  args.partials = params.partials;
  args.semaphores = params.semaphores;
  args.rows = static_cast<int>(params.rows);
  args.num_outputs = static_cast<int>(params.num_outputs);
  args.k_dim = static_cast<int>(params.k_dim);
  args.gelu_from = static_cast<int>(params.gelu_from);
  args.act_dim = static_cast<int>(params.act_dim);
  args.is_y_float32 = params.y_dtype == DataType::kFloat32;
  args.prefetch_weight = params.prefetch_weight;
  const int64_t chunks_per_tile = (params.k_dim + Ring::kChunkK - 1) / Ring::kChunkK;
  const int64_t num_chunks =
      (params.num_outputs + kTileOutputs - 1) / kTileOutputs * chunks_per_tile;
  if (num_chunks > kMaxChunks) return "linear on CUDA takes weights of at most 16 GiB";
  args.chunks_per_tile = static_cast<int>(chunks_per_tile);
  args.num_chunks = static_cast<int>(num_chunks);
  const int grid = std::min({traits.num_multiprocessors, kMaxGrid, args.num_chunks});
  // With few chunks a share might be empty.
  args.num_large_shares =
      kIsHopper && args.num_chunks >= 4 * grid ? grid / kBlocksPerLargeShare : 0;
  return MessageOf(Launch<LinearKernel<T, Weight, kRowTiles>>(
      traits, dim3(grid), kIsHopper ? kHopperThreads : kThreads, Ring::kSharedBytes, stream, args));
}

template <typename T, typename Weight, int kRowTiles>
const char* LaunchProduct(const LinearParams& params, const void* x, cudaStream_t stream) {
  const KernelTraits& traits = TraitsOf<LinearKernel<T, Weight, kRowTiles>>([](bool is_hopper) {
    return is_hopper ? Ring<Weight, kRowTiles, true>::kSharedBytes
                     : Ring<Weight, kRowTiles, false>::kSharedBytes;
  });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  return traits.is_hopper ? LaunchProduct<T, Weight, kRowTiles, true>(params, x, traits, stream)
                          : LaunchProduct<T, Weight, kRowTiles, false>(params, x, traits, stream);
}

template <typename T, typename Weight>
const char* LaunchForRows(const LinearParams& params, const void* x, cudaStream_t stream) {
  if (params.rows <= 8) return LaunchProduct<T, Weight, 1>(params, x, stream);
  if (params.rows <= 16) return LaunchProduct<T, Weight, 2>(params, x, stream);
  if (params.rows <= 32) return LaunchProduct<T, Weight, 4>(params, x, stream);
  return LaunchProduct<T, Weight, 8>(params, x, stream);
}

template <typename T>
const char* LaunchForType(const LinearParams& params, cudaStream_t stream) {
  const void* x = params.x;
  if (params.ln_scale != nullptr || params.k_multiplier != nullptr) {
    if (const char* error = LaunchPrepare<T>(params, stream)) return error;
    x = params.h;
  }
  if (params.weight_dtype == DataType::kInt8) return LaunchForRows<T, int8_t>(params, x, stream);
  return LaunchForRows<T, T>(params, x, stream);
}

}  // namespace

int64_t LinearPartialsBytes(int64_t rows) {
  const int64_t padded = rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64;
  return kMaxGrid * kTileOutputs * padded * static_cast<int64_t>(sizeof(float));
}

const char* LaunchLinear(const LinearParams& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DataType::kFloat16:
      return LaunchForType<__half>(params, cuda_stream);
    case DataType::kBfloat16:
      return LaunchForType<__nv_bfloat16>(params, cuda_stream);
    default:
      return "linear on CUDA takes float16 or bfloat16 activations";
  }
}

}  // namespace kogpt
