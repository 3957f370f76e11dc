// prefill_attention's attention on sm_90a: see prefill_attention.cu.
#ifndef CUSTOM_OPS_PREFILL_ATTENTION_HOPPER_CUH_
#define CUSTOM_OPS_PREFILL_ATTENTION_HOPPER_CUH_

#include <type_traits>

#include "prefill_attention_tile.cuh"
#include "wgmma.cuh"

namespace kogpt {

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

}  // namespace kogpt

#endif  // CUSTOM_OPS_PREFILL_ATTENTION_HOPPER_CUH_
