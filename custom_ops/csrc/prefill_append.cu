// The kernel ahead of prefill_attention's: rotates the new k and writes k and v to their pages, bound
// by memory, and lists the tiles of queries, those with the most keys first, so that the last blocks
// of attention to start have the least to do. Into INT8 pages each head is rounded as `quantize_weight`
// rounds an output of a weight, after the rounding to the activations' type.
#include <algorithm>

#include "prefill_attention.cuh"

namespace kogpt {
namespace {

// Lists the tiles of all rows, those with the most keys first, equal ones in the order of rows.
__device__ void ListTiles(const PrefillArgs& args, int2* levels) {
  __shared__ int num_tiles, most;
  if (threadIdx.x == 0) num_tiles = most = 0;
  __syncthreads();
  // Tile j of a row stands at level first + j, which counts the keys before it in tiles.
  for (int row = threadIdx.x; row < args.batch; row += blockDim.x) {
    const Row tokens = ReadRow(args, row);
    const int count = (tokens.num_new + args.tile_queries - 1) / args.tile_queries;
    levels[row] = make_int2(tokens.length / args.tile_queries, count);
    atomicAdd(&num_tiles, count);
    atomicMax(&most, count);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < args.batch * most; i += blockDim.x) {
    const int row = i / most, tile = i % most;
    if (tile >= levels[row].y) continue;
    const int level = levels[row].x + tile;
    int rank = 0;
    for (int other = 0; other < args.batch; ++other) {
      const int2 theirs = levels[other];
      const int above = theirs.x + theirs.y - level - (other < row ? 0 : 1);
      rank += min(max(above, 0), theirs.y);
    }
    if (rank >= args.max_tiles) continue;  // a row has more than max_new
    const Row tokens = ReadRow(args, row);
    const int first = tile * args.tile_queries;
    args.tiles[rank] =
        make_int4(tokens.begin + first, tokens.num_new - first, tokens.length + first, row);
  }
  for (int i = num_tiles + threadIdx.x; i < args.max_tiles; i += blockDim.x) {
    args.tiles[i] = make_int4(0, 0, 0, 0);
  }
}

constexpr int kAppendThreads = 256;
constexpr int kAppendPieces = 4;  // of 16 bytes that a thread has under way

// The largest of what the lanes that share a head have.
template <int kLanes>
__device__ __forceinline__ float LargestOfHead(float value) {
  const unsigned lanes = 0xffffffffu >> (kWarpSize - kLanes);
  const unsigned mask = lanes << (threadIdx.x % kWarpSize / kLanes * kLanes);
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    value = Largest()(value, __shfl_xor_sync(mask, value, step));
  }
  return value;
}

// Rounds eight values of a head to INT8; its other values are in neighbouring lanes.
template <typename T, int kLanes>
__device__ __forceinline__ uint2 Quantize(uint4 bits, float* scale) {
  float values[8], largest = 0.0f;
  Unpack<T>(bits, values);
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = Largest()(largest, fabsf(values[i]));
  largest = LargestOfHead<kLanes>(largest);
  *scale = Int8Scale(largest);
  const Int8Rounding rounding(*scale);
  return make_uint2(rounding.Round4(values), rounding.Round4(values + 4));
}

// Block 0 lists the tiles, each of the others writes a token's k and v.
template <typename T, typename PageT, int kHeadDim>
__global__ void __launch_bounds__(kAppendThreads)
    PrefillAppendKernel(const __grid_constant__ PrefillArgs args) {
  __shared__ int2 levels[kPrefillAttentionMaxRows];
  LaunchDependents();
  WaitForDependency();
  if (blockIdx.x == 0) {
    ListTiles(args, levels);
    return;
  }
  constexpr int kHeadPieces = kHeadDim / 8;
  const int token = blockIdx.x - 1;
  const int width_pieces = args.num_heads * kHeadPieces;
  const uint4* source = static_cast<const uint4*>(args.qkv) +
                        static_cast<int64_t>(token) * (args.qkv_dim / 8) +
                        width_pieces;  // k, then v

  int64_t slot = -1;  // of the token in its page
  for (int first = 0; first < 2 * width_pieces; first += kAppendThreads * kAppendPieces) {
    uint4 pieces[kAppendPieces];
#pragma unroll
    for (int i = 0; i < kAppendPieces; ++i) {
      const int piece = first + i * kAppendThreads + static_cast<int>(threadIdx.x);
      if (piece < 2 * width_pieces) pieces[i] = __ldcg(source + piece);
    }
    if (first == 0) {  // each warp looks for the token's row
      for (int row = 0; row < args.batch && slot < 0; row += kWarpSize) {
        const int mine = row + static_cast<int>(threadIdx.x) % kWarpSize;
        Row tokens = {0, 0, 0};
        if (mine < args.batch) tokens = ReadRow(args, mine);
        const bool is_here = token >= tokens.begin && token - tokens.begin < tokens.num_new;
        const unsigned found = __ballot_sync(0xffffffffu, is_here);
        if (found == 0) continue;
        const int lane = __ffs(static_cast<int>(found)) - 1;
        const int position = __shfl_sync(0xffffffffu, tokens.length + token - tokens.begin, lane);
        const int64_t entry =
            static_cast<int64_t>(row + lane) * args.max_pages + position / args.page_len;
        const int64_t page = __ldcg(args.page_table + entry);
        slot = page * args.num_heads * args.page_len + position % args.page_len;
      }
      if (slot < 0) return;
    }
#pragma unroll
    for (int i = 0; i < kAppendPieces; ++i) {
      int piece = first + i * kAppendThreads + static_cast<int>(threadIdx.x);
      if (piece >= 2 * width_pieces) break;
      void* pages = args.v_pages;
      float* scales = args.v_scales;
      if (piece < width_pieces) {
        const int dim = piece % kHeadPieces * 8;
        if (dim < args.rotary_dim) {
          pieces[i] = Rotation(args, token, dim).Rotate<T>(pieces[i]);
        }
        pages = args.k_pages;
        scales = args.k_scales;
      } else {
        piece -= width_pieces;
      }
      const int64_t at = slot + piece / kHeadPieces * args.page_len;
      const int64_t piece_at = at * kHeadPieces + piece % kHeadPieces;
      if constexpr (std::is_same_v<PageT, int8_t>) {
        float scale;
        __stcg(static_cast<uint2*>(pages) + piece_at, Quantize<T, kHeadPieces>(pieces[i], &scale));
        if (piece % kHeadPieces == 0) __stcg(scales + at, scale);
      } else {
        __stcg(static_cast<uint4*>(pages) + piece_at, pieces[i]);
      }
    }
  }
}

}  // namespace

const char* LaunchPrefillAppend(const PrefillAttentionParams& params, void* stream) {
  return ForPrefillKind(params, [&](auto kind) {
    using Kind = decltype(kind);
    constexpr auto kKernel =
        PrefillAppendKernel<typename Kind::Value, typename Kind::PageValue, Kind::kHeadDim>;
    const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return 0; });
    if (traits.error != cudaSuccess) return MessageOf(traits.error);
    const dim3 grid(static_cast<unsigned>(params.total_tokens + 1));
    return MessageOf(Launch<kKernel>(traits, grid, kAppendThreads, 0,
                                     static_cast<cudaStream_t>(stream),
                                     ArgsOf(params, TileQueries(traits))));
  });
}

}  // namespace kogpt
