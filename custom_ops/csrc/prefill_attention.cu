// Causal attention of many new tokens a row over paged keys and values, bound by the tensor cores.
//
//   append   the kernel of prefill_append.cu, ahead of this one, writes the new k and v to their pages
//            and lists the tiles of queries.
//   attend   a block takes one head of 128 queries of one row, 64 on other than sm_90a. Keys and
//            values come from the pages, so that a prefix costs what its products cost. q is rotated
//            in shared memory. On sm_90a one warp fetches through tensor copies into rings, and two
//            groups of four warps multiply 64 queries each: while a group takes the softmax of a
//            tile's scores, the tensor cores have its weights of the tile before times the values
//            (FlashAttention-3, Shah et al. 2024), and the other group's products. Elsewhere each of
//            four warps has 16 queries, and the next keys are copied during a softmax
//            (FlashAttention-2, Dao 2023).
//   INT8     the tensor cores take 16 bits: tiles are widened on their way into the rings, on sm_90a
//            by the four warps of a third group, behind copies of contiguous bytes, elsewhere by all.
//            Keys stay the integers, which 16 bits hold, and their scales multiply the scores: scores
//            may be large, and to round keys would move their weights. Values are multiplied by their
//            scales and rounded, by less than the weights are.
//   softmax  online (Milakov and Gimelshein 2018), in powers of two. Sums are rescaled only when a
//            row's maximum has grown by more than 8: until then weights are up to 2^8 too large,
//            which f32 sums and 16-bit weights hold as exactly.
//
// Which keys a tile goes through, in which order, depends on its row alone: so do a row's bits.
//
// Limits: head_dim 64, 128 or 256; pages of a multiple of 64 tokens.

#include <climits>

#include "prefill_attention.cuh"
#include "wgmma.cuh"

namespace kogpt {
namespace {

#if __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "Compute capability 9.0 takes sm_90a"
#endif

constexpr int kBoxRowBytes = 128;
constexpr int kBoxBytes = kBoxTokens * kBoxRowBytes;
constexpr int kBoxColumns = 64;        // 16-bit values of a box's row
constexpr float kRescaleAbove = 8.0f;  // in powers of two

// A value that is the same in the whole warp, so that the compiler knows it, too: products behind a
// branch that it takes for divergent run one after another.
__device__ __forceinline__ int Uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Some neighbouring queries of a row. Absent: num_left is 0.
struct QueryTile {
  int begin;     // its first token
  int num_left;  // the row's tokens from there on
  int position;  // of the first
  int row;

  __device__ __forceinline__ QueryTile(const PrefillArgs& args, int index) {
    const int4 values = __ldcg(args.tiles + index);
    begin = Uniform(values.x), num_left = Uniform(values.y);
    position = Uniform(values.z), row = Uniform(values.w);
  }
};

__device__ __forceinline__ void StoreShared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void StoreShared(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};\n" ::"r"(address), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ uint2 LoadSharedPair(uint32_t address) {
  uint2 value;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];\n"
               : "=r"(value.x), "=r"(value.y)
               : "r"(address)
               : "memory");
  return value;
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

// Eight INT8 keys' values, as they are, and those of values times their scale, rounded.
template <typename T>
__device__ __forceinline__ uint4 WidenKeys(uint2 bytes) {
  const Widened<T> wide(bytes.x, bytes.y);
  return make_uint4(wide.words[0], wide.words[1], wide.words[2], wide.words[3]);
}

template <typename T>
__device__ __forceinline__ uint4 WidenValues(uint2 bytes, float scale) {
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    // 2^23 and a byte below it; the byte is 128 too large.
    const uint32_t word = (i < 4 ? bytes.x : bytes.y) ^ 0x80808080u;
    const uint32_t raised = __byte_perm(word, 0x4b000000u, 0x7440 + i % 4);
    values[i] = (__uint_as_float(raised) - 8388736.0f) * scale;
  }
  return Pack<T>(values);
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

// Scores of INT8 keys by the keys' scales, an array in shared memory.
template <int kScores>
__device__ __forceinline__ void ScaleScores(float (&scores)[kScores], uint32_t scales) {
  scales += threadIdx.x % 4 * 8;
#pragma unroll
  for (int i = 0; i < kScores; i += 4) {
    const uint2 bits = LoadSharedPair(scales + i * 8);
    const float pair[2] = {__uint_as_float(bits.x), __uint_as_float(bits.y)};
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[i + j] *= pair[j % 2];
  }
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

// Rotates 64 queries in shared memory, box after box, by 128 threads: those of tokens from `token`
// on, of which the first `num_rows` exist. Calls wait() before the first is read, with the angles of
// a box under way.
template <typename T, typename Wait>
__device__ __forceinline__ void RotateQueries(const PrefillArgs& args, uint32_t boxes, int token,
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
__device__ __forceinline__ void WriteQueries(const PrefillArgs& args, uint32_t boxes,
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
  PrefillArgs args;
  CUtensorMap q;
  CUtensorMap k;
  CUtensorMap v;
};

// Where things lie in shared memory: boxes first, each kind of box after box of 64 columns.
template <int kHeadDim, bool kIsInt8>
struct HopperShared {
  static constexpr int kBoxes = kHeadDim / kBoxColumns;  // across a head
  static constexpr int kKeys = kHeadDim == 256 ? 64 : 128;
  static constexpr int kKeyBoxBytes = kKeys * kBoxRowBytes;  // one box below the other
  static constexpr int kQueryBytes = kBoxes * kBoxBytes;     // of a group
  static constexpr int kTileBytes = kBoxes * kKeyBoxBytes;
  static constexpr int kKeyOffset = kGroups * kQueryBytes;
  static constexpr int kValueOffset = kKeyOffset + kStages * kTileBytes;
  // Of INT8 pages: the scales of the keys in the ring, and a tile each of keys and of values with its
  // scales behind it, as they come.
  static constexpr int kStagedValueBytes = kIsInt8 ? kKeys * kHeadDim : 0;
  static constexpr int kStagedBytes = kStagedValueBytes + (kIsInt8 ? kKeys * 4 : 0);
  static constexpr int kKeyScaleOffset = kValueOffset + kStages * kTileBytes;
  static constexpr int kStagedOffset = kKeyScaleOffset + (kIsInt8 ? kStages * kKeys * 4 : 0);
  static constexpr int kBarrierOffset = kStagedOffset + 2 * kStagedBytes;
  static constexpr int kNumBarriers = kGroups + 4 * kStages + (kIsInt8 ? 2 : 0);
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
  __device__ __forceinline__ uint32_t KeyScales(int stage) const {
    return base + kKeyScaleOffset + stage * kKeys * 4;
  }
  __device__ __forceinline__ uint32_t Staged(bool is_keys) const {
    return base + kStagedOffset + (is_keys ? 0 : kStagedBytes);
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
  __device__ __forceinline__ uint32_t StagedFull(bool is_keys) const {
    return KeysFull(0) + (4 * kStages + (is_keys ? 0 : 1)) * 8;
  }
};

#if __CUDA_ARCH__ == 900

__device__ __forceinline__ float LoadSharedFloat(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(value) : "r"(address) : "memory");
  return value;
}

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

// Where the keys that a block needs begin in the pages, in rows of a head: the fetching warp's lane i
// has it of box first_box + i.
__device__ __forceinline__ int RowOfLane(const PrefillArgs& args, const QueryTile& tile, int head,
                                         int first_box) {
  const int lane = threadIdx.x % kWarpSize;
  const int last_box = (tile.position + min(tile.num_left, kGroups * kBoxTokens) - 1) / kBoxTokens;
  // What lies after the last box of keys is never used: it comes from there.
  const int token = min(first_box + lane, last_box) * kBoxTokens;
  const int64_t entry = static_cast<int64_t>(tile.row) * args.max_pages + token / args.page_len;
  const int page = __ldcg(args.page_table + entry);
  return (page * args.num_heads + head) * args.page_len + token % args.page_len;
}

// Where each box of a tile of keys begins, in all lanes.
template <int kBoxes>
struct BoxRows {
  int rows[kBoxes];

  __device__ __forceinline__ BoxRows(int rows_of_lanes, int key_tile) {
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
      rows[i] = __shfl_sync(0xffffffffu, rows_of_lanes, (key_tile * kBoxes + i) % kWarpSize);
    }
  }
};

// By one thread.
template <int kHeadDim, typename Shared>
__device__ __forceinline__ void FetchQueries(const HopperArgs& hopper, const Shared& shared,
                                             const QueryTile& tile, int head, int num_groups) {
  for (int group = 0; group < num_groups; ++group) {
    BarrierArriveExpecting(shared.QueriesFull(group), Shared::kQueryBytes);
    for (int box = 0; box < Shared::kBoxes; ++box) {
      CopyBox(shared.Queries(group) + box * kBoxBytes, hopper.q,
              head * kHeadDim + box * kBoxColumns, tile.begin + group * kBoxTokens,
              shared.QueriesFull(group));
    }
  }
}

// The fetching warp: queries, and each tile of keys before the values of the tile ahead of it, in
// the order in which the groups wait for them.
template <int kHeadDim>
__device__ __forceinline__ void Fetch(const HopperArgs& hopper,
                                      const HopperShared<kHeadDim, false>& shared,
                                      const QueryTile& tile, int head, int num_groups,
                                      int num_tiles) {
  using Shared = HopperShared<kHeadDim, false>;
  constexpr int kBoxesDown = Shared::kKeys / kBoxTokens;
  const int lane = threadIdx.x % kWarpSize;
  const auto fetch = [&](const CUtensorMap& map, uint32_t to, uint32_t full, int key_tile,
                         int rows_of_lanes) {
    const BoxRows<kBoxesDown> from(rows_of_lanes, key_tile);
    if (lane != 0) return;
    BarrierArriveExpecting(full, Shared::kTileBytes);
#pragma unroll
    for (int box = 0; box < Shared::kBoxes; ++box) {
#pragma unroll
      for (int i = 0; i < kBoxesDown; ++i) {
        CopyBox(to + box * Shared::kKeyBoxBytes + i * kBoxBytes, map, box * kBoxColumns,
                from.rows[i], full);
      }
    }
  };

  if (lane == 0) FetchQueries<kHeadDim>(hopper, shared, tile, head, num_groups);
  int key_rows = 0;
  for (int i = 0; i <= num_tiles; ++i) {
    const int stage = i % kStages, value_stage = (i + kStages - 1) % kStages;
    const int value_rows = key_rows;
    if (i < num_tiles) {
      if (i * kBoxesDown % kWarpSize == 0) {
        key_rows = RowOfLane(hopper.args, tile, head, i * kBoxesDown);
      }
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

// The fetching group where pages are INT8, in the same order: one warp copies the next tile of keys,
// and of values, and all four widen what has come, which only then makes room.
template <typename T, int kHeadDim>
__device__ __forceinline__ void FetchInt8(const HopperArgs& hopper,
                                          const HopperShared<kHeadDim, true>& shared,
                                          const QueryTile& tile, int head, int num_groups,
                                          int num_tiles) {
  using Shared = HopperShared<kHeadDim, true>;
  constexpr int kBoxesDown = Shared::kKeys / kBoxTokens;
  const PrefillArgs& args = hopper.args;
  const int thread = threadIdx.x % kGroupThreads, lane = thread % kWarpSize;
  const bool is_fetching = Uniform(thread / kWarpSize) == 0;
  const auto fetch = [&](bool is_keys, int key_tile, int rows_of_lanes) {
    const BoxRows<kBoxesDown> from(rows_of_lanes, key_tile);
    if (lane != 0) return;
    const auto* pages = static_cast<const int8_t*>(is_keys ? args.k_pages : args.v_pages);
    const float* scales = is_keys ? args.k_scales : args.v_scales;
    const uint32_t to = shared.Staged(is_keys), full = shared.StagedFull(is_keys);
    BarrierArriveExpecting(full, Shared::kStagedBytes);
#pragma unroll
    for (int i = 0; i < kBoxesDown; ++i) {
      const int64_t row = from.rows[i];
      CopyBytes(to + i * kBoxTokens * kHeadDim, pages + row * kHeadDim, kBoxTokens * kHeadDim,
                full);
      CopyBytes(to + Shared::kStagedValueBytes + i * kBoxTokens * 4, scales + row, kBoxTokens * 4,
                full);
    }
  };
  const auto widen = [&](bool is_keys, uint32_t to) {
    constexpr int kRowPieces = kHeadDim / 8;
    const uint32_t values = shared.Staged(is_keys), scales = values + Shared::kStagedValueBytes;
#pragma unroll 4
    for (int i = 0; i < Shared::kKeys * kRowPieces / kGroupThreads; ++i) {
      const int at = i * kGroupThreads + thread, row = at / kRowPieces, piece = at % kRowPieces;
      const uint2 bytes = LoadSharedPair(values + at * 8);
      StoreShared(
          to + piece / 8 * Shared::kKeyBoxBytes + PieceOffset(row, piece % 8),
          is_keys ? WidenKeys<T>(bytes) : WidenValues<T>(bytes, LoadSharedFloat(scales + row * 4)));
    }
  };
  // The tile is there for the products, and its place for the next copy.
  const auto finish = [&](uint32_t full) {
    FenceForAsync();
    GroupBarrier(kGroups);
    if (thread == 0) BarrierArrive(full);
  };

  int key_rows = 0, value_rows = 0;
  if (is_fetching) {
    if (lane == 0) FetchQueries<kHeadDim>(hopper, shared, tile, head, num_groups);
    key_rows = RowOfLane(args, tile, head, 0);
    fetch(true, 0, key_rows);
    fetch(false, 0, key_rows);
  }
  for (int i = 0; i <= num_tiles; ++i) {
    const int stage = i % kStages, value_stage = (i + kStages - 1) % kStages;
    if (i < num_tiles) {
      BarrierWait(shared.StagedFull(true), i % 2);
      if (i >= kStages) BarrierWait(shared.KeysEmpty(stage), (i / kStages + 1) % 2);
      widen(true, shared.Keys(stage));
      if (thread < Shared::kKeys) {
        const uint32_t scales = shared.Staged(true) + Shared::kStagedValueBytes;
        StoreShared(shared.KeyScales(stage) + thread * 4,
                    __float_as_uint(LoadSharedFloat(scales + thread * 4)));
      }
      finish(shared.KeysFull(stage));
      if (is_fetching) {
        value_rows = key_rows;
        if (i + 1 < num_tiles) {
          if ((i + 1) * kBoxesDown % kWarpSize == 0) {
            key_rows = RowOfLane(args, tile, head, (i + 1) * kBoxesDown);
          }
          fetch(true, i + 1, key_rows);
        }
      }
    }
    if (i > 0) {
      BarrierWait(shared.StagedFull(false), (i - 1) % 2);
      if (i > kStages) BarrierWait(shared.ValuesEmpty(value_stage), ((i - 1) / kStages + 1) % 2);
      widen(false, shared.Values(value_stage));
      finish(shared.ValuesFull(value_stage));
      if (is_fetching && i < num_tiles) fetch(false, i, value_rows);
    }
  }
}

// A group of four warps: 64 queries against `num_tiles` tiles of keys.
template <typename T, bool kIsInt8, int kHeadDim>
__device__ __forceinline__ void Attend(const PrefillArgs& args,
                                       const HopperShared<kHeadDim, kIsInt8>& shared,
                                       const QueryTile& tile, int head, int group, int num_tiles) {
  using Shared = HopperShared<kHeadDim, kIsInt8>;
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
  const auto release_keys = [&](int stage) {
    if constexpr (kIsInt8) {
      ScaleScores(scores, shared.KeyScales(stage));
      __syncwarp();
    }
    release(shared.KeysEmpty(stage));
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
  release_keys(0);
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
    release_keys(stage);
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

template <typename T, typename PageT, int kHeadDim>
__global__ void __launch_bounds__(kHopperThreads, 1)
    PrefillAttentionHopperKernel(const __grid_constant__ HopperArgs hopper) {
#if __CUDA_ARCH__ == 900
  constexpr bool kIsInt8 = std::is_same_v<PageT, int8_t>;
  using Shared = HopperShared<kHeadDim, kIsInt8>;
  extern __shared__ uint8_t shared_bytes[];
  const Shared shared(shared_bytes);
  if (threadIdx.x == kGroups * kGroupThreads) {
    PrefetchMap(hopper.q);
    if constexpr (!kIsInt8) {
      PrefetchMap(hopper.k);
      PrefetchMap(hopper.v);
    }
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
    if constexpr (kIsInt8) {
      BarrierInit(shared.StagedFull(true), 1);
      BarrierInit(shared.StagedFull(false), 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  }
  __syncthreads();
  if (group == kGroups) {
    const int num_tiles = tiles_of(num_groups - 1);
    if constexpr (kIsInt8) {
      LowerRegisters<40>();
      FetchInt8<T, kHeadDim>(hopper, shared, tile, head, num_groups, num_tiles);
    } else {
      LowerRegisters<24>();
      if (threadIdx.x < kGroups * kGroupThreads + kWarpSize) {
        Fetch<kHeadDim>(hopper, shared, tile, head, num_groups, num_tiles);
      }
    }
  } else {
    RaiseRegisters<kIsInt8 ? 232 : 240>();
    if (group < num_groups) {
      Attend<T, kIsInt8, kHeadDim>(hopper.args, shared, tile, head, group, tiles_of(group));
    }
  }
#endif
}

// --- everything else ---

constexpr int kPortableThreads = 4 * kWarpSize;

template <int kHeadDim>
constexpr int kPortableTileBytes = kHeadDim / kBoxColumns * kBoxBytes;
// Queries, keys and values, and the scales of INT8 keys.
template <typename PageT, int kHeadDim>
constexpr int kPortableSharedBytes =
    3 * kPortableTileBytes<kHeadDim> + (std::is_same_v<PageT, int8_t> ? kBoxTokens * 4 : 0);

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

// Widens 64 rows of an INT8 head to boxes; rows from `num_rows` on become zeros.
template <typename T, int kHeadDim>
__device__ __forceinline__ void WidenRows(bool is_keys, uint32_t boxes, const int8_t* from,
                                          const float* scales, int num_rows) {
  constexpr int kRowPieces = kHeadDim / 8;
#pragma unroll 4
  for (int i = threadIdx.x; i < kBoxTokens * kRowPieces; i += kPortableThreads) {
    const int row = i / kRowPieces, piece = i % kRowPieces;
    uint4 wide = make_uint4(0, 0, 0, 0);
    if (row < num_rows) {
      const uint2 bytes = __ldcg(reinterpret_cast<const uint2*>(from) + i);
      wide = is_keys ? WidenKeys<T>(bytes) : WidenValues<T>(bytes, __ldcg(scales + row));
    }
    StoreShared(boxes + piece / 8 * kBoxBytes + PieceOffset(row, piece % 8), wide);
  }
}

#endif  // __CUDA_ARCH__ != 900

template <typename T, typename PageT, int kHeadDim>
__global__ void __launch_bounds__(kPortableThreads)
    PrefillAttentionKernel(const __grid_constant__ PrefillArgs args) {
#if __CUDA_ARCH__ != 900
  constexpr bool kIsInt8 = std::is_same_v<PageT, int8_t>;
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
  const uint32_t key_scales = values + kPortableTileBytes<kHeadDim>;

  const auto copy_tile = [&](bool is_keys, int i) {
    const int token = i * kKeys, num_rows = tile.position + num_queries - token;
    const uint32_t to = is_keys ? keys : values;
    const void* pages = is_keys ? args.k_pages : args.v_pages;
    const int64_t entry = static_cast<int64_t>(tile.row) * args.max_pages + token / args.page_len;
    const int64_t page = __ldcg(args.page_table + entry);
    const int64_t slot = (page * args.num_heads + head) * args.page_len + token % args.page_len;
    if constexpr (kIsInt8) {
      const float* scales = (is_keys ? args.k_scales : args.v_scales) + slot;
      WidenRows<T, kHeadDim>(is_keys, to, static_cast<const int8_t*>(pages) + slot * kHeadDim,
                             scales, num_rows);
      if (is_keys && threadIdx.x < kKeys) {
        const int row = threadIdx.x;
        StoreShared(key_scales + row * 4,
                    __float_as_uint(row < num_rows ? __ldcg(scales + row) : 0.0f));
      }
    } else {
      CopyRows<T, kHeadDim>(to, static_cast<const T*>(pages) + slot * kHeadDim, kHeadDim, num_rows);
    }
    CopyAsyncCommit();
  };

  const int64_t token_stride = static_cast<int64_t>(3) * args.num_heads * kHeadDim;
  CopyRows<T, kHeadDim>(
      queries, static_cast<const T*>(args.qkv) + tile.begin * token_stride + head * kHeadDim,
      token_stride, num_queries);
  copy_tile(true, 0);

  float sums[kHeadDim / 2];
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) sums[i] = 0.0f;
  Softmax softmax[2];
  for (int i = 0; i < num_tiles; ++i) {
    copy_tile(false, i);
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
    if constexpr (kIsInt8) ScaleScores(scores, key_scales);
    __syncthreads();
    if (i + 1 < num_tiles) {
      copy_tile(true, i + 1);
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

template <typename T, typename PageT, int kHeadDim>
const char* LaunchAttend(const PrefillAttentionParams& params, cudaStream_t stream) {
  constexpr bool kIsInt8 = std::is_same_v<PageT, int8_t>;
  constexpr auto kPortableKernel = PrefillAttentionKernel<T, PageT, kHeadDim>;
  constexpr int kPortableBytes = kPortableSharedBytes<PageT, kHeadDim>;
  const KernelTraits& portable = TraitsOf<kPortableKernel>([](bool) { return kPortableBytes; });
  if (portable.error != cudaSuccess) return MessageOf(portable.error);
  const PrefillArgs args = ArgsOf(params, TileQueries(portable));
  const int64_t blocks = static_cast<int64_t>(args.max_tiles) * params.num_heads;
  if (blocks > INT_MAX) return "prefill_attention on CUDA takes fewer tokens and heads";
  if (blocks == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(blocks));
  if (!HasWgmma(portable)) {
    return MessageOf(
        Launch<kPortableKernel>(portable, grid, kPortableThreads, kPortableBytes, stream, args));
  }
  constexpr auto kKernel = PrefillAttentionHopperKernel<T, PageT, kHeadDim>;
  constexpr int kSharedBytes = HopperShared<kHeadDim, kIsInt8>::kBytes;
  const KernelTraits& traits = TraitsOf<kKernel>([](bool) { return kSharedBytes; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  HopperArgs hopper = {};
  hopper.args = args;
  const int64_t cache_rows = params.num_pages * params.num_heads * params.page_len;
  const char* message = DescribeBoxes(&hopper.q, params.qkv, params.total_tokens,
                                      3 * params.num_heads * kHeadDim, 2, kBoxTokens);
  if (message == nullptr && !kIsInt8) {
    message = DescribeBoxes(&hopper.k, params.k_pages, cache_rows, kHeadDim, 2, kBoxTokens);
  }
  if (message == nullptr && !kIsInt8) {
    message = DescribeBoxes(&hopper.v, params.v_pages, cache_rows, kHeadDim, 2, kBoxTokens);
  }
  if (message != nullptr) return message;
  return MessageOf(Launch<kKernel>(traits, grid, kHopperThreads, kSharedBytes, stream, hopper));
}

}  // namespace

int64_t PrefillAttentionTilesBytes(const PrefillAttentionParams& params) {
  return MaxTiles(params, kBoxTokens) * static_cast<int64_t>(sizeof(int4));
}

const char* LaunchPrefillAttend(const PrefillAttentionParams& params, void* stream) {
  return ForPrefillKind(params, [&](auto kind) {
    using Kind = decltype(kind);
    return LaunchAttend<typename Kind::Value, typename Kind::PageValue, Kind::kHeadDim>(
        params, static_cast<cudaStream_t>(stream));
  });
}

const char* LaunchPrefillAttention(const PrefillAttentionParams& params, void* stream) {
  const char* message = LaunchPrefillAppend(params, stream);
  return message != nullptr ? message : LaunchPrefillAttend(params, stream);
}

}  // namespace kogpt
