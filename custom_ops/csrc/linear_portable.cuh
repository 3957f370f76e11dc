// Decode-sized products on tensor cores before Hopper, and from PTX on any GPU.
//
//   work      tiles of 128 outputs x all of K, cut along K into chunks; each block of the grid
//             takes one share of all chunks in order (stream-K, Osama et al. 2023). A tile that
//             several blocks share is added up by the one that has its first chunk, in the order
//             of k. The cuts depend on the weight's shape and the device alone.
//   a chunk   goes through a ring in shared memory, which the eight warps that multiply also fill.
#ifndef CUSTOM_OPS_LINEAR_PORTABLE_CUH_
#define CUSTOM_OPS_LINEAR_PORTABLE_CUH_

#include <algorithm>

#include "linear_chunk.cuh"
#include "linear_outputs.cuh"

namespace kogpt {

inline constexpr int kMaxGrid = 192;        // bounds the partial sums' scratch
inline constexpr int kMaxChunks = 1 << 20;  // so that shares are counted in 32 bits

struct KernelArgs {
  LinearOutputs outputs;
  const void* x;
  const void* weight;
  float* partials;
  int32_t* semaphores;
  int k_dim;
  int chunks_per_tile;
  int num_chunks;
};

#if __CUDA_ARCH__ != 900
// What is added to the sums of this lane's outputs, lane / 4 and lane / 4 + 8 of its warp's 16.
struct OutputTerms {
  float scale[2];
  float bias[2];
};

template <typename T>
__device__ __forceinline__ OutputTerms LoadOutputTerms(const LinearOutputs& outputs,
                                                       int first_output) {
  OutputTerms terms;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = first_output + static_cast<int>(threadIdx.x) % kWarpSize / 4 + half * 8;
    terms.scale[half] = outputs.Scale(m);
    terms.bias[half] = outputs.Bias<T>(m);
  }
  return terms;
}

// Calls body(i, m, row) for each of this lane's sums of a tile that are outputs: sum i is output m
// of row `row`.
template <int kRowTiles, typename Body>
__device__ __forceinline__ void ForEachOutput(const LinearOutputs& outputs, int first_output,
                                              Body&& body) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kRowTiles * 4; ++i) {
    const int m = first_output + lane / 4 + i % 4 / 2 * 8;
    const int row = i / 4 * kTileRows + lane % 4 * 2 + i % 2;
    if (m < outputs.num_outputs && row < outputs.rows) body(i, m, row);
  }
}

template <int kRowTiles>
__device__ __forceinline__ void LoadResidual(const LinearOutputs& outputs, int first_output,
                                             float (&residual)[kRowTiles * 4]) {
  ForEachOutput<kRowTiles>(outputs, first_output,
                           [&](int i, int m, int row) { residual[i] = outputs.Residual(row, m); });
}

// Writes this warp's outputs of a finished tile.
template <typename T, int kRowTiles>
__device__ __forceinline__ void Finish(const LinearOutputs& outputs, int first_output,
                                       const OutputTerms& terms,
                                       const float (&residual)[kRowTiles * 4],
                                       const float (&sums)[kRowTiles][4]) {
  ForEachOutput<kRowTiles>(outputs, first_output, [&](int i, int m, int row) {
    const int half = i % 4 / 2;
    outputs.Store<T>(row, m,
                     sums[i / 4][i % 4] * terms.scale[half] + terms.bias[half] + residual[i]);
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

// The first chunk of a share. The product fits 32 bits, which the launch sees to.
__device__ __forceinline__ int FirstChunk(const KernelArgs& args, int share) {
  return static_cast<int>(static_cast<uint32_t>(share) * static_cast<uint32_t>(args.num_chunks) /
                          gridDim.x);
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

// Copies a chunk into a stage: all threads of the block.
template <typename T, typename Weight, int kRowTiles>
__device__ __forceinline__ void CopyChunk(const KernelArgs& args, uint32_t stage,
                                          const Cursor& at) {
  using Ring = Ring<Weight, kRowTiles>;
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
  copy_boxes(stage, static_cast<const Weight*>(args.weight), 1, kTileOutputs,
             at.tile * kTileOutputs, args.outputs.num_outputs);
  copy_boxes(stage + kWeightBoxBytes, static_cast<const T*>(args.x), Ring::kActivationBoxes,
             kRowTiles * kTileRows, 0, args.outputs.rows);
}

#endif  // __CUDA_ARCH__ != 900

template <typename T, typename Weight, int kRowTiles>
__global__ void __launch_bounds__(kThreads, 1)
    LinearKernel(const __grid_constant__ KernelArgs args) {
#if __CUDA_ARCH__ != 900
  WaitForDependency();  // compiled for newer GPUs, it is launched early
  extern __shared__ unsigned char shared[];
  using Ring = Ring<Weight, kRowTiles>;
  const uint32_t ring = (SharedAddress(shared) + kBoxAlignment - 1) / kBoxAlignment * kBoxAlignment;
  // The last share goes to the first block: a block waits only for later shares, so for blocks of
  // a lower index, which in practice are dispatched before it.
  const int share = gridDim.x - 1 - blockIdx.x;
  const int begin = FirstChunk(args, share);
  const int end = FirstChunk(args, share + 1);

  constexpr int kAhead = Ring::kStages - 1;
  Cursor fetch(args, begin);
  for (int i = 0; i < kAhead; ++i) {
    if (begin + i < end) CopyChunk<T, Weight, kRowTiles>(args, ring + i * Ring::kStageBytes, fetch);
    CopyAsyncCommit();
    fetch.Advance(args);
  }

  float sums[kRowTiles][4] = {};
  Cursor at(args, begin);
  int stage = 0;
  for (int chunk = begin; chunk < end; ++chunk) {
    const bool is_part_end = at.in_tile == args.chunks_per_tile - 1 || chunk == end - 1;
    const int first_output =
        at.tile * kTileOutputs + static_cast<int>(threadIdx.x) / kWarpSize * kWarpOutputs;
    OutputTerms terms;
    if (is_part_end) terms = LoadOutputTerms<T>(args.outputs, first_output);
    CopyAsyncWait<kAhead - 1>();
    __syncthreads();  // the chunk is there, and the stage of the one before is free
    if (chunk + kAhead < end) {
      const int free_stage = stage == 0 ? kAhead : stage - 1;
      CopyChunk<T, Weight, kRowTiles>(args, ring + free_stage * Ring::kStageBytes, fetch);
      fetch.Advance(args);
    }
    CopyAsyncCommit();
    MultiplyChunk<T, Weight, kRowTiles>(ring + stage * Ring::kStageBytes, sums);
    stage = stage + 1 == Ring::kStages ? 0 : stage + 1;

    const int tile_begin = chunk - at.in_tile;
    at.Advance(args);
    if (!is_part_end) continue;
    if (tile_begin < begin) {
      SendPart<kRowTiles>(args, share, sums);
    } else {
      float residual[kRowTiles * 4];
      LoadResidual<kRowTiles>(args.outputs, first_output, residual);
      ReceiveParts<kRowTiles>(args, share, tile_begin + args.chunks_per_tile, sums);
      Finish<T, kRowTiles>(args.outputs, first_output, terms, residual, sums);
    }
#pragma unroll
    for (int i = 0; i < kRowTiles * 4; ++i) sums[i / 4][i % 4] = 0.0f;
  }
#endif
}

template <typename T, typename Weight, int kRowTiles>
const char* LaunchPortable(const LinearParams& params, const void* x, const KernelTraits& traits,
                           cudaStream_t stream) {
  using Ring = Ring<Weight, kRowTiles>;
  const int64_t chunks_per_tile = (params.k_dim + Ring::kChunkK - 1) / Ring::kChunkK;
  const int64_t num_chunks =
      (params.num_outputs + kTileOutputs - 1) / kTileOutputs * chunks_per_tile;
  if (num_chunks > kMaxChunks) return "linear on CUDA takes weights of at most 16 GiB";
  const KernelArgs args = {LinearOutputs(params),
                           x,
                           params.weight,
                           params.partials,
                           params.semaphores,
                           static_cast<int>(params.k_dim),
                           static_cast<int>(chunks_per_tile),
                           static_cast<int>(num_chunks)};
  const int grid = std::min({traits.num_multiprocessors, kMaxGrid, args.num_chunks});
  return MessageOf(Launch<LinearKernel<T, Weight, kRowTiles>>(traits, dim3(grid), kThreads,
                                                              Ring::kSharedBytes, stream, args));
}

}  // namespace kogpt

#endif  // CUSTOM_OPS_LINEAR_PORTABLE_CUH_
