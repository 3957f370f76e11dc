// Causal attention of many new tokens a row over paged keys and values, bound by the tensor cores.
//
//   append   a first kernel rotates the new k and writes k and v to their pages, bound by memory, and
//            lists the tiles of queries, those with the most keys first, so that the last blocks to
//            start have the least to do.
//   attend   a block takes one head of 128 queries of one row, 64 on other than sm_90a. Keys and
//            values come from the pages, so that a prefix costs what its products cost. q is rotated
//            in shared memory. On sm_90a one warp fetches through tensor copies into rings, and two
//            groups of four warps multiply 64 queries each: while a group takes the softmax of a
//            tile's scores, the tensor cores have its weights of the tile before times the values
//            (FlashAttention-3, Shah et al. 2024), and the other group's products. Elsewhere each of
//            four warps has 16 queries, and the next keys are copied during a softmax
//            (FlashAttention-2, Dao 2023).
//   softmax  online (Milakov and Gimelshein 2018), in powers of two. Sums are rescaled only when a
//            row's maximum has grown by more than 8: until then weights are up to 2^8 too large,
//            which f32 sums and 16-bit weights hold as exactly.
//
// Which keys a tile goes through, in which order, depends on its row alone: so do a row's bits.
//
// Limits: head_dim 64, 128 or 256; pages of a multiple of 64 tokens.

#include <algorithm>
#include <climits>

#include "cuda_common.cuh"
#include "prefill_attention.h"
#include "wgmma.cuh"

namespace kogpt {
namespace {

#if __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "Compute capability 9.0 takes sm_90a"
#endif

constexpr int kBoxTokens = 64;  // keys or queries that are copied together: they share a page
constexpr int kBoxRowBytes = 128;
constexpr int kBoxBytes = kBoxTokens * kBoxRowBytes;
constexpr int kBoxColumns = 64;  // 16-bit values of a box's row
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kRescaleAbove = 8.0f;  // in powers of two

struct KernelArgs {
  const void* qkv;
  const float* cos;
  const float* sin;
  void* k_pages;
  void* v_pages;
  const int32_t* page_table;
  const int32_t* begins;
  const int32_t* num_new;
  const int32_t* lengths;
  void* act;
  int4* tiles;
  int batch;
  int total_tokens;
  int num_heads;
  int page_len;
  int max_pages;
  int rotary_dim;
  int act_dim;
  int max_tiles;
  int tile_queries;
  float log2_scale;  // log2(e) / sqrt(head_dim)
};

// A row's new tokens, as far as there are such tokens and room for them.
struct Row {
  int begin;
  int num_new;
  int length;
};

__device__ __forceinline__ Row ReadRow(const KernelArgs& args, int row) {
  Row result;
  const int capacity = args.max_pages * args.page_len;
  result.begin = min(max(__ldcg(args.begins + row), 0), args.total_tokens);
  result.length = min(max(__ldcg(args.lengths + row), 0), capacity);
  result.num_new = min(max(__ldcg(args.num_new + row), 0),
                       min(args.total_tokens - result.begin, capacity - result.length));
  return result;
}

// Some neighbouring queries of a row. Absent: num_left is 0.
struct QueryTile {
  int begin;     // its first token
  int num_left;  // the row's tokens from there on
  int position;  // of the first
  int row;

  __device__ __forceinline__ QueryTile(const KernelArgs& args, int index) {
    const int4 values = __ldcg(args.tiles + index);
    begin = Uniform(values.x), num_left = Uniform(values.y);
    position = Uniform(values.z), row = Uniform(values.w);
  }
};

// Lists the tiles of all rows, those with the most keys first, equal ones in the order of rows.
__device__ void ListTiles(const KernelArgs& args, int2* levels) {
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

// The angles of eight neighbouring dimensions of a token.
struct Angles {
  float cos[4];
  float sin[4];

  __device__ __forceinline__ Angles(const KernelArgs& args, int token, int dim, bool is_there) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_rotated = is_there && dim + 2 * i < args.rotary_dim;
      const int64_t at = static_cast<int64_t>(token) * (args.rotary_dim / 2) + dim / 2 + i;
      cos[i] = is_rotated ? __ldcg(args.cos + at) : 1.0f;
      sin[i] = is_rotated ? __ldcg(args.sin + at) : 0.0f;
    }
  }

  // Rotates the pairs and rounds them as the cache does.
  template <typename T>
  __device__ __forceinline__ uint4 Rotate(uint4 bits) const {
    float values[8], rotated[8];
    Unpack<T>(bits, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rotated[2 * i] = values[2 * i] * cos[i] - values[2 * i + 1] * sin[i];
      rotated[2 * i + 1] = values[2 * i + 1] * cos[i] + values[2 * i] * sin[i];
    }
    return Pack<T>(rotated);
  }
};

constexpr int kAppendThreads = 256;
constexpr int kAppendPieces = 4;  // of 16 bytes that a thread has under way

// Block 0 lists the tiles, each of the others writes a token's k and v.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kAppendThreads)
    PrefillAppendKernel(const __grid_constant__ KernelArgs args) {
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
                        (static_cast<int64_t>(token) * 3 + 1) * width_pieces;  // k, then v

  int64_t slot = -1;  // of the token in its page
  int64_t head_stride = 0;
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
      head_stride = static_cast<int64_t>(args.page_len) * kHeadPieces;
    }
#pragma unroll
    for (int i = 0; i < kAppendPieces; ++i) {
      int piece = first + i * kAppendThreads + static_cast<int>(threadIdx.x);
      if (piece >= 2 * width_pieces) break;
      uint4* pages = static_cast<uint4*>(args.v_pages);
      if (piece < width_pieces) {
        const int dim = piece % kHeadPieces * 8;
        if (dim < args.rotary_dim) {
          pieces[i] = Angles(args, token, dim, true).Rotate<T>(pieces[i]);
        }
        pages = static_cast<uint4*>(args.k_pages);
      } else {
        piece -= width_pieces;
      }
      const int64_t at = slot * kHeadPieces + piece / kHeadPieces * head_stride;
      __stcg(pages + at + piece % kHeadPieces, pieces[i]);
    }
  }
}

// 2^x, 0 for what would be subnormal.
__device__ __forceinline__ float PowerOfTwo(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

// The online softmax of one query.
struct Softmax {
  float maximum = -INFINITY;  // of the scores, in powers of two, as of the last rescaling
  float sum = 0.0f;           // of this lane's keys

  // Takes a tile's maximum; returns what earlier sums are multiplied by.
  __device__ __forceinline__ float Raise(float tile_maximum) {
    if (!(tile_maximum > maximum + kRescaleAbove)) return 1.0f;
    const float rescale = PowerOfTwo(maximum - tile_maximum);
    maximum = tile_maximum;
    sum *= rescale;
    return rescale;
  }
};

__device__ __forceinline__ float MaximumOfFour(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

__device__ __forceinline__ float SumOfFour(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// Scores of two queries a lane, whose keys lie as the tensor cores have them, to weights; hides keys
// after each query's own `position`, counted from the tile's first key. Returns what earlier sums
// are multiplied by.
template <int kScores>
__device__ __forceinline__ float2 TakeSoftmax(float (&scores)[kScores], Softmax (&softmax)[2],
                                              const int (&positions)[2], float log2_scale) {
  constexpr int kKeys = kScores * 2;
  const int column = threadIdx.x % 4 * 2;
  if (min(positions[0], positions[1]) < kKeys - 1) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      if (i / 4 * 8 + i % 2 + column > positions[i / 2 % 2]) scores[i] = -INFINITY;
    }
  }
  float maxima[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    maxima[i / 2 % 2] = fmaxf(maxima[i / 2 % 2], scores[i]);
  }
  const float2 rescale = {softmax[0].Raise(MaximumOfFour(maxima[0]) * log2_scale),
                          softmax[1].Raise(MaximumOfFour(maxima[1]) * log2_scale)};
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    Softmax& of_query = softmax[i / 2 % 2];
    scores[i] = PowerOfTwo(fmaf(scores[i], log2_scale, -of_query.maximum));
    of_query.sum += scores[i];
  }
  return rescale;
}

template <int kSums>
__device__ __forceinline__ void Rescale(float (&sums)[kSums], float2 rescale) {
  const bool is_any = rescale.x != 1.0f || rescale.y != 1.0f;
  if (!__any_sync(0xffffffffu, is_any)) return;
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] *= i / 2 % 2 == 0 ? rescale.x : rescale.y;
}

// Weights as the tensor cores take them: four registers for each 16 keys.
template <typename T, int kScores>
__device__ __forceinline__ void PackWeights(const float (&scores)[kScores],
                                            uint32_t (&weights)[kScores / 2]) {
#pragma unroll
  for (int i = 0; i < kScores / 2; ++i) {
    weights[i] = Pair<T>::FromFloats(scores[2 * i], scores[2 * i + 1]);
  }
}

__device__ __forceinline__ void StoreShared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void StoreShared(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};\n" ::"r"(address), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ uint4 LoadShared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// Where piece `piece` (16 bytes) of row `row` lies in a box.
__device__ __forceinline__ uint32_t PieceOffset(int row, int piece) {
  return row * kBoxRowBytes + ((piece ^ (row % 8)) * 16);
}

// Rotates 64 queries in shared memory, box after box, by 128 threads: those of tokens from `token`
// on, of which the first `num_rows` exist. Calls wait() before the first is read, with the angles of
// a box under way.
template <typename T, typename Wait>
__device__ __forceinline__ void RotateQueries(const KernelArgs& args, uint32_t boxes, int token,
                                              int num_rows, int thread, Wait wait) {
  constexpr int kThreads = 128;
  constexpr int kPieces = kBoxBytes / 16 / kThreads;  // of a thread in a box
  const int rotated_boxes = (args.rotary_dim + kBoxColumns - 1) / kBoxColumns;
  const int dim = thread % 8 * 8, row = thread / 8;  // the next piece is kThreads / 8 rows below
  for (int box = 0; box < rotated_boxes; ++box) {
    const auto angles_of = [&](int i) {
      const int of_row = row + i * (kThreads / 8);
      return Angles(args, token + of_row, box * kBoxColumns + dim, of_row < num_rows);
    };
    const Angles angles[kPieces] = {angles_of(0), angles_of(1), angles_of(2), angles_of(3)};
    if (box == 0) wait();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint32_t at =
          boxes + box * kBoxBytes + PieceOffset(row + i * (kThreads / 8), thread % 8);
      StoreShared(at, angles[i].template Rotate<T>(LoadShared(at)));
    }
  }
}

// Writes a warp's 16 queries, sums over their total weight, through 16 rows of boxes that the warp
// has for itself, so that whole rows are written. The first `num_rows` exist.
template <typename T, int kHeadDim>
__device__ __forceinline__ void WriteQueries(const KernelArgs& args, uint32_t boxes,
                                             const float (&sums)[kHeadDim / 2],
                                             const Softmax (&softmax)[2], int token, int num_rows,
                                             int head) {
  const int lane = threadIdx.x % kWarpSize;
  const float scale[2] = {1.0f / SumOfFour(softmax[0].sum), 1.0f / SumOfFour(softmax[1].sum)};
#pragma unroll
  for (int i = 0; i < kHeadDim / 4; ++i) {
    const int row = lane / 4 + i % 2 * 8, group = i / 2;
    const uint32_t at = boxes + group / 8 * kBoxBytes + PieceOffset(row, group % 8) + lane % 4 * 4;
    StoreShared(at,
                Pair<T>::FromFloats(sums[2 * i] * scale[i % 2], sums[2 * i + 1] * scale[i % 2]));
  }
  __syncwarp();
  constexpr int kRowPieces = kHeadDim / 8;
  T* out = static_cast<T*>(args.act) + static_cast<int64_t>(token) * args.act_dim + head * kHeadDim;
  const bool is_aligned = args.act_dim % 8 == 0;
#pragma unroll 4
  for (int i = lane; i < 16 * kRowPieces; i += kWarpSize) {
    const int row = i / kRowPieces, piece = i % kRowPieces;
    if (row >= num_rows) break;
    const uint4 bits = LoadShared(boxes + piece / 8 * kBoxBytes + PieceOffset(row, piece % 8));
    T* to = out + static_cast<int64_t>(row) * args.act_dim + piece * 8;
    if (is_aligned) {
      __stcg(reinterpret_cast<uint4*>(to), bits);
    } else {
      const T* values = reinterpret_cast<const T*>(&bits);
#pragma unroll
      for (int j = 0; j < 8; ++j) to[j] = values[j];
    }
  }
}

// --- sm_90a ---

constexpr int kGroups = 2;  // of four warps, with 64 queries each
constexpr int kGroupThreads = 4 * kWarpSize;
constexpr int kHopperThreads = (kGroups + 1) * kGroupThreads;
constexpr int kStages = 2;

struct HopperArgs {
  KernelArgs args;
  CUtensorMap q;
  CUtensorMap k;
  CUtensorMap v;
};

// Where things lie in shared memory: boxes first, each kind of box after box of 64 columns.
template <int kHeadDim>
struct HopperShared {
  static constexpr int kBoxes = kHeadDim / kBoxColumns;  // across a head
  static constexpr int kKeys = kHeadDim == 256 ? 64 : 128;
  static constexpr int kKeyBoxBytes = kKeys * kBoxRowBytes;  // one box below the other
  static constexpr int kQueryBytes = kBoxes * kBoxBytes;     // of a group
  static constexpr int kTileBytes = kBoxes * kKeyBoxBytes;
  static constexpr int kKeyOffset = kGroups * kQueryBytes;
  static constexpr int kValueOffset = kKeyOffset + kStages * kTileBytes;
  static constexpr int kBarrierOffset = kValueOffset + kStages * kTileBytes;
  static constexpr int kNumBarriers = kGroups + 4 * kStages;
  static constexpr int kBytes = kBarrierOffset + kNumBarriers * 8 + 1024;  // to align boxes

  uint32_t base;

  __device__ __forceinline__ explicit HopperShared(const void* shared)
      : base((SharedAddress(shared) + 1023) / 1024 * 1024) {}
  __device__ __forceinline__ uint32_t Queries(int group) const {
    return base + group * kQueryBytes;
  }
  __device__ __forceinline__ uint32_t Keys(int stage) const {
    return base + kKeyOffset + stage * kTileBytes;
  }
  __device__ __forceinline__ uint32_t Values(int stage) const {
    return base + kValueOffset + stage * kTileBytes;
  }
  __device__ __forceinline__ uint32_t QueriesFull(int group) const {
    return base + kBarrierOffset + group * 8;
  }
  __device__ __forceinline__ uint32_t KeysFull(int stage) const {
    return base + kBarrierOffset + (kGroups + stage) * 8;
  }
  __device__ __forceinline__ uint32_t KeysEmpty(int stage) const {
    return KeysFull(stage) + kStages * 8;
  }
  __device__ __forceinline__ uint32_t ValuesFull(int stage) const {
    return KeysFull(stage) + 2 * kStages * 8;
  }
  __device__ __forceinline__ uint32_t ValuesEmpty(int stage) const {
    return KeysFull(stage) + 3 * kStages * 8;
  }
};

#if __CUDA_ARCH__ == 900

template <int kRegisters>
__device__ __forceinline__ void RaiseRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void LowerRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// The threads of a group wait for one another.
__device__ __forceinline__ void GroupBarrier(int group) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(group + 1), "n"(kGroupThreads) : "memory");
}

// Written shared memory is visible to tensor copies and products that follow a barrier.
__device__ __forceinline__ void FenceForAsync() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

__device__ __forceinline__ void PrefetchMap(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

// The fetching warp: queries, and each tile of keys before the values of the tile ahead of it, in
// the order in which the groups wait for them.
template <int kHeadDim>
__device__ __forceinline__ void Fetch(const HopperArgs& hopper,
                                      const HopperShared<kHeadDim>& shared, const QueryTile& tile,
                                      int head, int num_groups, int num_tiles) {
  using Shared = HopperShared<kHeadDim>;
  constexpr int kBoxesDown = Shared::kKeys / kBoxTokens;
  const KernelArgs& args = hopper.args;
  const int lane = threadIdx.x % kWarpSize;
  const int last_box = (tile.position + min(tile.num_left, kGroups * kBoxTokens) - 1) / kBoxTokens;

  // Lane i's is where box first_box + i of the keys begins in the pages as a tensor.
  const auto rows_from = [&](int first_box) {
    // What lies after the last box of keys is never used: it comes from there.
    const int token = min(first_box + lane, last_box) * kBoxTokens;
    const int64_t entry = static_cast<int64_t>(tile.row) * args.max_pages + token / args.page_len;
    const int page = __ldcg(args.page_table + entry);
    return (page * args.num_heads + head) * args.page_len + token % args.page_len;
  };
  const auto fetch = [&](const CUtensorMap& map, uint32_t to, uint32_t full, int key_tile,
                         int rows_of_lanes) {
    int rows[kBoxesDown];
#pragma unroll
    for (int i = 0; i < kBoxesDown; ++i) {
      rows[i] = __shfl_sync(0xffffffffu, rows_of_lanes, (key_tile * kBoxesDown + i) % kWarpSize);
    }
    if (lane != 0) return;
    BarrierArriveExpecting(full, Shared::kTileBytes);
#pragma unroll
    for (int box = 0; box < Shared::kBoxes; ++box) {
#pragma unroll
      for (int i = 0; i < kBoxesDown; ++i) {
        CopyBox(to + box * Shared::kKeyBoxBytes + i * kBoxBytes, map, box * kBoxColumns, rows[i],
                full);
      }
    }
  };

  if (lane == 0) {
    for (int group = 0; group < num_groups; ++group) {
      BarrierArriveExpecting(shared.QueriesFull(group), Shared::kQueryBytes);
      for (int box = 0; box < Shared::kBoxes; ++box) {
        CopyBox(shared.Queries(group) + box * kBoxBytes, hopper.q,
                head * kHeadDim + box * kBoxColumns, tile.begin + group * kBoxTokens,
                shared.QueriesFull(group));
      }
    }
  }
  int key_rows = 0;
  for (int i = 0; i <= num_tiles; ++i) {
    const int stage = i % kStages, value_stage = (i + kStages - 1) % kStages;
    const int value_rows = key_rows;
    if (i < num_tiles) {
      if (i * kBoxesDown % kWarpSize == 0) key_rows = rows_from(i * kBoxesDown);
      if (i >= kStages) BarrierWait(shared.KeysEmpty(stage), (i / kStages + 1) % 2);
      fetch(hopper.k, shared.Keys(stage), shared.KeysFull(stage), i, key_rows);
    }
    if (i > 0) {
      if (i > kStages) BarrierWait(shared.ValuesEmpty(value_stage), ((i - 1) / kStages + 1) % 2);
      fetch(hopper.v, shared.Values(value_stage), shared.ValuesFull(value_stage), i - 1,
            value_rows);
    }
  }
}

// A group of four warps: 64 queries against `num_tiles` tiles of keys.
template <typename T, int kHeadDim>
__device__ __forceinline__ void Attend(const KernelArgs& args, const HopperShared<kHeadDim>& shared,
                                       const QueryTile& tile, int head, int group, int num_tiles) {
  using Shared = HopperShared<kHeadDim>;
  constexpr int kKeys = Shared::kKeys;
  const int thread = threadIdx.x % kGroupThreads;
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int token = tile.begin + group * kBoxTokens;
  const int num_queries = tile.num_left - group * kBoxTokens;
  const int first_position = tile.position + group * kBoxTokens;
  const uint32_t queries = shared.Queries(group);
  float sums[kHeadDim / 2], scores[kKeys / 2];
  uint32_t weights[kKeys / 4];
  Softmax softmax[2];
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) sums[i] = 0.0f;

  const auto multiply_keys = [&](int stage) {
    WgmmaFence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const uint64_t a = DescribeAlongK(queries + i / 4 * kBoxBytes + i % 4 * 32);
      const uint64_t b =
          DescribeAlongK(shared.Keys(stage) + i / 4 * Shared::kKeyBoxBytes + i % 4 * 32);
      WgmmaShared<T, kKeys>::Run(scores, a, b, i > 0);
    }
    WgmmaCommit();
  };
  const auto multiply_values = [&](int stage) {
    WgmmaFence();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      const uint64_t b =
          DescribeAcrossK(shared.Values(stage) + i * 16 * kBoxRowBytes, Shared::kKeyBoxBytes);
      WgmmaRegisters<T, kHeadDim>::Run(sums, weights + 4 * i, b);
    }
    WgmmaCommit();
  };
  const auto release = [&](uint32_t empty) {
    if (lane == 0) BarrierArrive(empty);
  };
  const auto take_softmax = [&](int i) {
    const int position = first_position + warp * 16 + lane / 4 - i * kKeys;
    const int positions[2] = {position, position + 8};
    return TakeSoftmax(scores, softmax, positions, args.log2_scale);
  };

  const auto wait_for_queries = [&] { BarrierWait(shared.QueriesFull(group), 0); };
  if (args.rotary_dim > 0) {
    RotateQueries<T>(args, queries, token, num_queries, thread, wait_for_queries);
    FenceForAsync();
    GroupBarrier(group);
  } else {
    wait_for_queries();
  }

  BarrierWait(shared.KeysFull(0), 0);
  multiply_keys(0);
  WgmmaWait<0>();
  WgmmaKeep(scores);
  release(shared.KeysEmpty(0));
  take_softmax(0);
  PackWeights<T>(scores, weights);
  for (int i = 1; i < num_tiles; ++i) {
    const int stage = i % kStages, value_stage = (i - 1) % kStages;
    BarrierWait(shared.KeysFull(stage), i / kStages % 2);
    multiply_keys(stage);
    BarrierWait(shared.ValuesFull(value_stage), (i - 1) / kStages % 2);
    multiply_values(value_stage);
    WgmmaWait<1>();
    WgmmaKeep(scores);
    release(shared.KeysEmpty(stage));
    const float2 rescale = take_softmax(i);
    WgmmaWait<0>();
    WgmmaKeep(sums);
    release(shared.ValuesEmpty(value_stage));
    Rescale(sums, rescale);
    PackWeights<T>(scores, weights);
  }
  const int last = num_tiles - 1;
  BarrierWait(shared.ValuesFull(last % kStages), last / kStages % 2);
  // Values after the row's last token may be NaN, which a weight of 0 does not hide.
  const int num_valid = tile.position + tile.num_left - last * kKeys;
  if (num_valid < kKeys) {
    const int pieces = (kKeys - num_valid) * 8;
    for (int i = thread; i < Shared::kBoxes * pieces; i += kGroupThreads) {
      StoreShared(shared.Values(last % kStages) + i / pieces * Shared::kKeyBoxBytes +
                      num_valid * kBoxRowBytes + i % pieces * 16,
                  make_uint4(0, 0, 0, 0));
    }
    FenceForAsync();
    GroupBarrier(group);
  }
  multiply_values(last % kStages);
  WgmmaWait<0>();
  WgmmaKeep(sums);

  GroupBarrier(group);  // queries have been read
  WriteQueries<T, kHeadDim>(args, queries + warp * 16 * kBoxRowBytes, sums, softmax,
                            token + warp * 16, num_queries - warp * 16, head);
}

#endif  // __CUDA_ARCH__ == 900

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kHopperThreads, 1)
    PrefillAttentionHopperKernel(const __grid_constant__ HopperArgs hopper) {
#if __CUDA_ARCH__ == 900
  using Shared = HopperShared<kHeadDim>;
  extern __shared__ uint8_t shared_bytes[];
  const Shared shared(shared_bytes);
  if (threadIdx.x == kGroups * kGroupThreads) {
    PrefetchMap(hopper.q);
    PrefetchMap(hopper.k);
    PrefetchMap(hopper.v);
  }
  LaunchDependents();
  WaitForDependency();
  const int head = static_cast<int>(blockIdx.x) % hopper.args.num_heads;
  const QueryTile tile(hopper.args, static_cast<int>(blockIdx.x) / hopper.args.num_heads);
  if (tile.num_left == 0) return;
  const int group = Uniform(static_cast<int>(threadIdx.x) / kGroupThreads);
  const int num_groups = tile.num_left > kBoxTokens ? 2 : 1;
  // Tiles of keys up to the last query of a group.
  const auto tiles_of = [&](int of_group) {
    const int last_query = min((of_group + 1) * kBoxTokens, tile.num_left) - 1;
    return (tile.position + last_query) / Shared::kKeys + 1;
  };

  if (threadIdx.x == 0) {
    for (int i = 0; i < kGroups; ++i) BarrierInit(shared.QueriesFull(i), 1);
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(shared.KeysFull(i), 1);
      BarrierInit(shared.ValuesFull(i), 1);
      BarrierInit(shared.KeysEmpty(i), 4 * num_groups);
      BarrierInit(shared.ValuesEmpty(i), 4 * num_groups);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  }
  __syncthreads();
  if (group == kGroups) {
    LowerRegisters<24>();
    if (threadIdx.x < kGroups * kGroupThreads + kWarpSize) {
      Fetch<kHeadDim>(hopper, shared, tile, head, num_groups, tiles_of(num_groups - 1));
    }
  } else {
    RaiseRegisters<240>();
    if (group < num_groups) {
      Attend<T, kHeadDim>(hopper.args, shared, tile, head, group, tiles_of(group));
    }
  }
#endif
}

// --- everything else ---

constexpr int kPortableThreads = 4 * kWarpSize;

template <int kHeadDim>
constexpr int kPortableTileBytes = kHeadDim / kBoxColumns * kBoxBytes;

#if __CUDA_ARCH__ != 900

// Four 8 x 8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
template <bool kIsTransposed>
__device__ __forceinline__ void LoadMatrices(uint32_t (&values)[4], uint32_t address) {
  if constexpr (kIsTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
                 : "r"(address)
                 : "memory");
  }
}

// Copies 64 rows of a head, `stride` values apart, to boxes; rows from `num_rows` on become zeros.
template <typename T, int kHeadDim>
__device__ __forceinline__ void CopyRows(uint32_t boxes, const T* from, int64_t stride,
                                         int num_rows) {
  constexpr int kRowPieces = kHeadDim / 8;
#pragma unroll 4
  for (int i = threadIdx.x; i < kBoxTokens * kRowPieces; i += kPortableThreads) {
    const int row = i / kRowPieces, piece = i % kRowPieces;
    CopyAsync16(boxes + piece / 8 * kBoxBytes + PieceOffset(row, piece % 8),
                from + row * stride + piece * 8, row < num_rows);
  }
}

#endif  // __CUDA_ARCH__ != 900

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kPortableThreads)
    PrefillAttentionKernel(const __grid_constant__ KernelArgs args) {
#if __CUDA_ARCH__ != 900
  constexpr int kKeys = kBoxTokens;
  extern __shared__ uint4 shared_pieces[];
  LaunchDependents();
  WaitForDependency();
  const int head = static_cast<int>(blockIdx.x) % args.num_heads;
  const QueryTile tile(args, static_cast<int>(blockIdx.x) / args.num_heads);
  if (tile.num_left == 0) return;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int num_queries = min(tile.num_left, kBoxTokens);
  const int num_tiles = (tile.position + num_queries - 1) / kKeys + 1;
  const uint32_t queries = SharedAddress(shared_pieces);
  const uint32_t keys = queries + kPortableTileBytes<kHeadDim>;
  const uint32_t values = keys + kPortableTileBytes<kHeadDim>;

  const auto copy_tile = [&](uint32_t to, const void* pages, int i) {
    const int token = i * kKeys;
    const int64_t entry = static_cast<int64_t>(tile.row) * args.max_pages + token / args.page_len;
    const int64_t page = __ldcg(args.page_table + entry);
    const int64_t slot = (page * args.num_heads + head) * args.page_len + token % args.page_len;
    CopyRows<T, kHeadDim>(to, static_cast<const T*>(pages) + slot * kHeadDim, kHeadDim,
                          tile.position + num_queries - token);
    CopyAsyncCommit();
  };

  const int64_t token_stride = static_cast<int64_t>(3) * args.num_heads * kHeadDim;
  CopyRows<T, kHeadDim>(
      queries, static_cast<const T*>(args.qkv) + tile.begin * token_stride + head * kHeadDim,
      token_stride, num_queries);
  copy_tile(keys, args.k_pages, 0);

  float sums[kHeadDim / 2];
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) sums[i] = 0.0f;
  Softmax softmax[2];
  for (int i = 0; i < num_tiles; ++i) {
    copy_tile(values, args.v_pages, i);
    CopyAsyncWait<1>();
    __syncthreads();
    if (i == 0 && args.rotary_dim > 0) {
      RotateQueries<T>(args, queries, tile.begin, num_queries, threadIdx.x, [] {});
      __syncthreads();
    }
    float scores[kKeys / 2];
#pragma unroll
    for (int j = 0; j < kKeys / 2; ++j) scores[j] = 0.0f;
#pragma unroll 4
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t a[4];
      LoadMatrices<false>(a, queries + k / 4 * kBoxBytes +
                                 PieceOffset(warp * 16 + lane % 16, k % 4 * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        uint32_t b[4];
        LoadMatrices<false>(
            b, keys + k / 4 * kBoxBytes +
                   PieceOffset(j * 16 + lane / 16 * 8 + lane % 8, k % 4 * 2 + lane / 8 % 2));
        MultiplyAdd<T>(scores + j * 8, a, b[0], b[1]);
        MultiplyAdd<T>(scores + j * 8 + 4, a, b[2], b[3]);
      }
    }
    __syncthreads();
    if (i + 1 < num_tiles) {
      copy_tile(keys, args.k_pages, i + 1);
    } else {
      CopyAsyncCommit();
    }
    const int position = tile.position + warp * 16 + lane / 4 - i * kKeys;
    const int positions[2] = {position, position + 8};
    uint32_t weights[kKeys / 4];
    Rescale(sums, TakeSoftmax(scores, softmax, positions, args.log2_scale));
    PackWeights<T>(scores, weights);
    CopyAsyncWait<1>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
      for (int j = 0; j < kHeadDim / 16; ++j) {
        uint32_t b[4];
        LoadMatrices<true>(
            b, values + j / 4 * kBoxBytes + PieceOffset(k * 16 + lane % 16, j % 4 * 2 + lane / 16));
        MultiplyAdd<T>(sums + j * 8, weights + 4 * k, b[0], b[1]);
        MultiplyAdd<T>(sums + j * 8 + 4, weights + 4 * k, b[2], b[3]);
      }
    }
    __syncthreads();
  }
  WriteQueries<T, kHeadDim>(args, queries + warp * 16 * kBoxRowBytes, sums, softmax,
                            tile.begin + warp * 16, num_queries - warp * 16, head);
#endif
}

// --- launch ---

int64_t MaxTiles(const PrefillAttentionParams& params, int64_t tile_queries) {
  const int64_t max_new = std::min(params.max_new, params.total_tokens);
  return std::min(params.total_tokens / tile_queries + params.batch,
                  params.batch * ((max_new + tile_queries - 1) / tile_queries));
}

KernelArgs ArgsOf(const PrefillAttentionParams& params, int tile_queries) {
  KernelArgs args;
  args.qkv = params.qkv;
  args.cos = params.cos;
  args.sin = params.sin;
  args.k_pages = params.k_pages;
  args.v_pages = params.v_pages;
  args.page_table = params.page_table;
  args.begins = params.begins;
  args.num_new = params.num_new;
  args.lengths = params.lengths;
  args.act = params.act;
  args.tiles = reinterpret_cast<int4*>(params.tiles);
  args.batch = static_cast<int>(params.batch);
  args.total_tokens = static_cast<int>(params.total_tokens);
  args.num_heads = static_cast<int>(params.num_heads);
  args.page_len = static_cast<int>(params.page_len);
  args.max_pages = static_cast<int>(params.max_pages);
  args.rotary_dim = static_cast<int>(params.rotary_dim);
  args.act_dim = static_cast<int>(params.act_dim);
  args.max_tiles = static_cast<int>(MaxTiles(params, tile_queries));
  args.tile_queries = tile_queries;
  args.log2_scale = kLog2E / sqrtf(static_cast<float>(params.head_dim));
  return args;
}

template <typename T, int kHeadDim>
struct Launcher {
  const PrefillAttentionParams& params;
  cudaStream_t stream;

  // The portable kernel, which says for what the library's code on this device was compiled.
  const KernelTraits& PortableTraits() const {
    return TraitsOf<PrefillAttentionKernel<T, kHeadDim>>(
        [](bool) { return 3 * kPortableTileBytes<kHeadDim>; });
  }
  bool HasWgmma() const { return PortableTraits().ptx_version == 90; }
  int TileQueries() const { return HasWgmma() ? kGroups * kBoxTokens : kBoxTokens; }

  const char* Append() const {
    constexpr auto kKernel = PrefillAppendKernel<T, kHeadDim>;
    const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return 0; });
    if (traits.error != cudaSuccess) return MessageOf(traits.error);
    if (PortableTraits().error != cudaSuccess) return MessageOf(PortableTraits().error);
    const dim3 grid(static_cast<unsigned>(params.total_tokens + 1));
    return MessageOf(
        Launch<kKernel>(traits, grid, kAppendThreads, 0, stream, ArgsOf(params, TileQueries())));
  }

  const char* Attend() const {
    if (PortableTraits().error != cudaSuccess) return MessageOf(PortableTraits().error);
    const KernelArgs args = ArgsOf(params, TileQueries());
    const int64_t blocks = static_cast<int64_t>(args.max_tiles) * params.num_heads;
    if (blocks > INT_MAX) return "prefill_attention on CUDA takes fewer tokens and heads";
    if (blocks == 0) return nullptr;
    const dim3 grid(static_cast<unsigned>(blocks));
    if (!HasWgmma()) {
      return MessageOf(Launch<PrefillAttentionKernel<T, kHeadDim>>(
          PortableTraits(), grid, kPortableThreads, 3 * kPortableTileBytes<kHeadDim>, stream,
          args));
    }
    constexpr auto kKernel = PrefillAttentionHopperKernel<T, kHeadDim>;
    constexpr int kSharedBytes = HopperShared<kHeadDim>::kBytes;
    const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return kSharedBytes; });
    if (traits.error != cudaSuccess) return MessageOf(traits.error);
    HopperArgs hopper;
    hopper.args = args;
    const int64_t cache_rows = params.num_pages * params.num_heads * params.page_len;
    const char* message = DescribeBoxes(&hopper.q, params.qkv, params.total_tokens,
                                        3 * params.num_heads * kHeadDim, 2, kBoxTokens);
    if (message == nullptr) {
      message = DescribeBoxes(&hopper.k, params.k_pages, cache_rows, kHeadDim, 2, kBoxTokens);
    }
    if (message == nullptr) {
      message = DescribeBoxes(&hopper.v, params.v_pages, cache_rows, kHeadDim, 2, kBoxTokens);
    }
    if (message != nullptr) return message;
    return MessageOf(Launch<kKernel>(traits, grid, kHopperThreads, kSharedBytes, stream, hopper));
  }
};

// Calls run(Launcher) for the parameters' type and head_dim.
template <typename Run>
const char* ForLauncher(const PrefillAttentionParams& params, void* stream, Run run) {
  if (params.batch == 0 || params.total_tokens == 0) return nullptr;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto for_type = [&](auto value) {
    using T = decltype(value);
    switch (params.head_dim) {
      case 64:
        return run(Launcher<T, 64>{params, cuda_stream});
      case 128:
        return run(Launcher<T, 128>{params, cuda_stream});
      case 256:
        return run(Launcher<T, 256>{params, cuda_stream});
      default:
        return "prefill_attention on CUDA takes a head_dim of 64, 128 or 256";
    }
  };
  switch (params.dtype) {
    case DataType::kFloat16:
      return for_type(__half());
    case DataType::kBfloat16:
      return for_type(__nv_bfloat16());
    default:
      return "prefill_attention on CUDA takes float16 or bfloat16";
  }
}

}  // namespace

int64_t PrefillAttentionTilesBytes(const PrefillAttentionParams& params) {
  return MaxTiles(params, kBoxTokens) * static_cast<int64_t>(sizeof(int4));
}

const char* LaunchPrefillAppend(const PrefillAttentionParams& params, void* stream) {
  return ForLauncher(params, stream, [](const auto& launcher) { return launcher.Append(); });
}

const char* LaunchPrefillAttend(const PrefillAttentionParams& params, void* stream) {
  return ForLauncher(params, stream, [](const auto& launcher) { return launcher.Attend(); });
}

const char* LaunchPrefillAttention(const PrefillAttentionParams& params, void* stream) {
  const char* message = LaunchPrefillAppend(params, stream);
  return message != nullptr ? message : LaunchPrefillAttend(params, stream);
}

}  // namespace kogpt
