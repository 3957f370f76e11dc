// Decode-sized products on tensor cores, bound by reading the weight once.
//
//   work      tiles of 128 outputs x all of K, cut along K into chunks; each block of the grid
//             takes one share of all chunks in order (stream-K, Osama et al. 2023). Blocks that
//             share a tile add it up in the order of k, each some of the rows. The cuts depend on
//             the weight's shape and the device alone.
//   a chunk   goes through a ring in shared memory. On Hopper one thread fills it with tensor
//             copies and two warpgroups multiply; before Hopper eight warps do both.
//   launch    a block that has ended makes room for one of the next kernel, which fills its ring
//             while slower blocks of this kernel, or an attention between the two products, still
//             run.
//
// Limits: K a multiple of 8 (16 with an INT8 weight), 16-bit activations.

#include <algorithm>

#include "linear_chunk.cuh"
#include "linear_prepare.cuh"

namespace kogpt {
namespace {

constexpr int kWarps = kLinearWarps;
constexpr int kThreads = kLinearThreads;
constexpr int kHopperThreads = kThreads + kWarpSize;  // and one that fills the ring
constexpr int kMaxGrid = 192;                         // bounds the partial sums' scratch
constexpr int kMaxChunks = 1 << 20;                   // so that shares are counted in 32 bits

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
  bool is_y_float32;
  bool prefetch_weight;
};

// tanh form: x / 2 (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3);
// Hendrycks and Gimpel 2016.
__device__ __forceinline__ float Gelu(float x) {
  const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return x / (1.0f + __expf(-2.0f * u));
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

// Calls body(i, m, row) for each of this lane's four sums of a tile of rows that are outputs: sum i
// is output m of row `row`.
template <typename Body>
__device__ __forceinline__ void ForEachOutput(const KernelArgs& args, int first_output,
                                              int row_tile, Body&& body) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = first_output + lane / 4 + i / 2 * 8;
    const int row = row_tile * kTileRows + lane % 4 * 2 + i % 2;
    if (m < args.num_outputs && row < args.rows) body(i, m, row);
  }
}

__device__ __forceinline__ void LoadResidual(const KernelArgs& args, int first_output, int row_tile,
                                             float (&residual)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) residual[i] = 0.0f;
  if (args.residual == nullptr) return;
  ForEachOutput(args, first_output, row_tile, [&](int i, int m, int row) {
    if (m < args.gelu_from) {
      residual[i] = __ldcg(args.residual + static_cast<int64_t>(row) * args.gelu_from + m);
    }
  });
}

// Writes this warp's outputs of a finished tile of rows.
template <typename T>
__device__ __forceinline__ void Finish(const KernelArgs& args, int first_output, int row_tile,
                                       const OutputTerms& terms, const float (&residual)[4],
                                       const float (&sums)[4]) {
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = sums[i] * terms.scale[i / 2] + terms.bias[i / 2] + residual[i];
  }
  // Where the warp's outputs are neighbours in one array, which is the rule, they are written
  // without a branch for each.
  const int end = first_output + kWarpOutputs;
  const bool is_gelu = first_output >= args.gelu_from;
  const bool are_neighbours = end <= args.num_outputs && (is_gelu || end <= args.gelu_from);
  const int row_length = is_gelu ? args.act_dim : args.gelu_from;
  const int column = first_output + (is_gelu ? args.act_dim - args.num_outputs : 0);
  const int lane = threadIdx.x % kWarpSize;
  if (are_neighbours && !is_gelu && args.is_y_float32) {
    const int row = row_tile * kTileRows + lane % 4 * 2;
    float* to =
        static_cast<float*>(args.y) + static_cast<int64_t>(row) * row_length + column + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + i % 2 < args.rows) to[i % 2 * int64_t{row_length} + i / 2 * 8] = values[i];
    }
    return;
  }
  if (are_neighbours && row_length % 2 == 0 && column % 2 == 0) {
    // Pairs of 16-bit values: turned so that a lane has two of one row.
    const int row = row_tile * kTileRows + lane / 4;
    T* to = static_cast<T*>(is_gelu ? args.act : args.y) + static_cast<int64_t>(row) * row_length +
            column + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float first = is_gelu ? Gelu(values[half * 2]) : values[half * 2];
      const float second = is_gelu ? Gelu(values[half * 2 + 1]) : values[half * 2 + 1];
      const uint32_t pair = TransposeMatrix(Pair<T>::FromFloats(first, second));
      if (row < args.rows) *reinterpret_cast<uint32_t*>(to + half * 8) = pair;
    }
    return;
  }
  ForEachOutput(args, first_output, row_tile, [&](int i, int m, int row) {
    if (m >= args.gelu_from) {
      const int64_t at =
          static_cast<int64_t>(row) * args.act_dim + args.act_dim - args.num_outputs + m;
      static_cast<T*>(args.act)[at] = FromFloat<T>(Gelu(values[i]));
    } else if (args.is_y_float32) {
      static_cast<float*>(args.y)[static_cast<int64_t>(row) * args.gelu_from + m] = values[i];
    } else {
      static_cast<T*>(args.y)[static_cast<int64_t>(row) * args.gelu_from + m] =
          FromFloat<T>(values[i]);
    }
  });
}

// The first chunk of a share. The product fits 32 bits, which the launch sees to.
__device__ __forceinline__ int FirstChunk(const KernelArgs& args, int share) {
  return static_cast<int>(static_cast<uint32_t>(share) * static_cast<uint32_t>(args.num_chunks) /
                          gridDim.x);
}

// The shares that have parts of a tile, and which of its rows a share adds up and finishes. Where
// parts are the last of their shares, so that all of those end at the same time, each takes some of
// the rows; a share that goes on with another tile leaves its part to them.
struct TileShares {
  int first;
  int last;
  int num_finishers;  // the first of them

  __device__ __forceinline__ TileShares(const KernelArgs& args, int share, int tile_begin)
      : first(share), last(share) {
    const int tile_end = tile_begin + args.chunks_per_tile;
    while (FirstChunk(args, first) > tile_begin) --first;
    while (FirstChunk(args, last + 1) < tile_end) ++last;
    const bool ends_there = FirstChunk(args, last + 1) == tile_end;
    num_finishers = max(last - first + (ends_there ? 1 : 0), 1);
  }

  template <int kRowTiles>
  __device__ __forceinline__ int FirstRowTile(int share) const {
    return kRowTiles * min(share - first, num_finishers) / num_finishers;
  }
};

// Where a share leaves its part of a tile, and the semaphore that tells of it: one place for the tile
// that it begins with and one for the tile that it begins. Parts go from warp to warp: the eight
// warps of a block need not meet.
struct PartPlace {
  int index;

  __device__ __forceinline__ PartPlace(const TileShares& shares, int share)
      : index(share * 2 + (share == shares.first ? 1 : 0)) {}

  template <int kRowTiles>
  __device__ __forceinline__ float* Sums(const KernelArgs& args) const {
    return args.partials + static_cast<int64_t>(index) * kRowTiles * 4 * kThreads + threadIdx.x;
  }
  __device__ __forceinline__ int32_t* Semaphore(const KernelArgs& args) const {
    return args.semaphores + index * kWarps + threadIdx.x / kWarpSize;
  }
};

// Adds up and writes this warp's outputs of a tile, or of those of its rows that are this share's.
template <typename T, int kRowTiles>
__device__ __forceinline__ void FinishTile(const KernelArgs& args, int share,
                                           const TileShares& shares, int first_output,
                                           const OutputTerms& terms, float (&sums)[kRowTiles * 4]) {
  const int begin = shares.FirstRowTile<kRowTiles>(share);
  const int end = shares.FirstRowTile<kRowTiles>(share + 1);
  if (shares.first < shares.last) {
    // What others finish of this part: they wait until it is there.
    const int num_readers = min(shares.num_finishers, kRowTiles) - (begin < end ? 1 : 0);
    if (end - begin < kRowTiles) {
      float* part = PartPlace(shares, share).Sums<kRowTiles>(args);
#pragma unroll
      for (int i = 0; i < kRowTiles * 4; ++i) {
        if (i / 4 < begin || i / 4 >= end) __stcg(part + i * kThreads, sums[i]);
      }
    }
    __syncwarp();  // the release below covers what the other lanes have written
    const int lane = threadIdx.x % kWarpSize;
    if (lane == 0 && num_readers > 0) {
      asm volatile(
          "st.release.gpu.global.s32 [%0], %1;\n" ::"l"(PartPlace(shares, share).Semaphore(args)),
          "r"(num_readers)
          : "memory");
    }
    if (begin == end) return;
    for (int other = shares.first + lane; other <= shares.last; other += kWarpSize) {
      if (other == share) continue;
      int32_t* semaphore = PartPlace(shares, other).Semaphore(args);
      int is_there = 0;
      while (is_there == 0) {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n"
                     : "=r"(is_there)
                     : "l"(semaphore)
                     : "memory");
      }
      asm volatile("red.relaxed.gpu.global.add.s32 [%0], -1;\n" ::"l"(semaphore) : "memory");
    }
    __syncwarp();
    float totals[kRowTiles * 4] = {};
    constexpr int kTogether = kRowTiles >= 4 ? 2 : 8 / kRowTiles;  // parts that are read at once
    for (int other = shares.first; other <= shares.last; other += kTogether) {
      float values[kTogether][kRowTiles * 4];
#pragma unroll
      for (int p = 0; p < kTogether; ++p) {
        const float* part = PartPlace(shares, other + p).Sums<kRowTiles>(args);
        const bool is_other = other + p <= shares.last && other + p != share;
#pragma unroll
        for (int i = 0; i < kRowTiles * 4; ++i) {
          values[p][i] = is_other && i / 4 >= begin && i / 4 < end ? __ldcg(part + i * kThreads)
                         : other + p == share                      ? sums[i]
                                                                   : 0.0f;
        }
      }
#pragma unroll
      for (int p = 0; p < kTogether; ++p) {
#pragma unroll
        for (int i = 0; i < kRowTiles * 4; ++i) totals[i] += values[p][i];
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles * 4; ++i) sums[i] = totals[i];
  }
  constexpr int kResiduals = kRowTiles >= 4 ? 4 : kRowTiles;  // tiles of rows read at once
#pragma unroll
  for (int first = 0; first < kRowTiles; first += kResiduals) {
    float residual[kResiduals][4];
#pragma unroll
    for (int i = 0; i < kResiduals; ++i) {
      if (first + i >= begin && first + i < end) {
        LoadResidual(args, first_output, first + i, residual[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kResiduals; ++i) {
      if (first + i >= begin && first + i < end) {
        const float (&of_tile)[4] = *reinterpret_cast<const float (*)[4]>(&sums[(first + i) * 4]);
        Finish<T>(args, first_output, first + i, terms, residual[i], of_tile);
      }
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
      CopyBox(ring + stage.offset() + box * kWeightBoxBytes, args.weight_map,
              at.in_tile * Ring::kChunkK + box * kBoxK<Weight>, at.tile * kTileOutputs, barrier);
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
  const int warp = Uniform(static_cast<int>(threadIdx.x) / kWarpSize);
  const int share = blockIdx.x;
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
  if (warp == kWarps) {
    if (threadIdx.x == kThreads) Produce<Weight, kRowTiles>(args, ring, full, empty, begin, end);
    return;
  }
  WaitForDependency();  // before anything is written
  // What this warp has multiplied may be overwritten.
  const auto release = [&](int stage) {
    if (threadIdx.x % kWarpSize == 0) BarrierArrive(empty + stage * 8);
  };
#else
  constexpr int kAhead = Ring::kStages - 1;
  Cursor fetch(args, begin);
  for (int i = 0; i < kAhead; ++i) {
    if (begin + i < end) CopyChunk<T, Weight, kRowTiles>(args, ring + i * Ring::kStageBytes, fetch);
    CopyAsyncCommit();
    fetch.Advance(args);
  }
#endif

  RingCursor<Ring> stage;
  for (int chunk = begin; chunk < end;) {  // a part of a tile each
    const Cursor at(args, chunk);
    const int tile_begin = chunk - at.in_tile;
    const int num_chunks = min(end, tile_begin + args.chunks_per_tile) - chunk;
    const int first_output = at.tile * kTileOutputs + warp * kWarpOutputs;
    const OutputTerms terms = LoadOutputTerms<T, Weight>(args, first_output);
    const TileShares shares(args, share, tile_begin);
    float sums[kRowTiles * 4] = {};
#if __CUDA_ARCH__ == 900
    Operands<Weight> operands;
    int last = 0;
    for (int i = 0; i < num_chunks; ++i) {
      BarrierWait(full + stage.index * 8, stage.parity);
      StartMultiply<T, Weight, kRowTiles>(ring + stage.offset(), operands, sums);
      if (i > 0) release(last);
      last = stage.index;
      stage.Advance();
    }
    WgmmaWait<0>();
    WgmmaKeep(sums);
    release(last);
#elif __CUDA_ARCH__ > 900
    for (int i = 0; i < num_chunks; ++i) {
      BarrierWait(full + stage.index * 8, stage.parity);
      MultiplyChunk<T, Weight, kRowTiles>(ring + stage.offset(), sums);
      __syncwarp();
      release(stage.index);
      stage.Advance();
    }
#else
    for (int i = 0; i < num_chunks; ++i) {
      CopyAsyncWait<kAhead - 1>();
      __syncthreads();  // the chunk is there, and the stage of the one before is free
      if (chunk + i + kAhead < end) {
        const int free_stage = stage.index == 0 ? kAhead : stage.index - 1;
        CopyChunk<T, Weight, kRowTiles>(args, ring + free_stage * Ring::kStageBytes, fetch);
        fetch.Advance(args);
      }
      CopyAsyncCommit();
      MultiplyChunk<T, Weight, kRowTiles>(ring + stage.offset(), sums);
      stage.Advance();
    }
#endif

    FinishTile<T, kRowTiles>(args, share, shares, first_output, terms, sums);
    chunk += num_chunks;
  }
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
  return 2 * kMaxGrid * kTileOutputs * padded * static_cast<int64_t>(sizeof(float));
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
