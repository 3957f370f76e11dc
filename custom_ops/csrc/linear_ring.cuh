// Products on sm_90a (linear_hopper.cuh): the ring of chunks in shared memory, and the warps that fill it.
#ifndef CUSTOM_OPS_LINEAR_RING_CUH_
#define CUSTOM_OPS_LINEAR_RING_CUH_

#include "linear_tile.cuh"

namespace kogpt {

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
  uint32_t begin, weights, scales, barriers;
  int x_bytes;

  __device__ __forceinline__ ProductRing(const ProductArgs& args, uint32_t shared,
                                         uint32_t barriers_in)
      : begin((shared + kBoxAlignment - 1) / kBoxAlignment * kBoxAlignment),
        weights(begin + args.num_stages * Tile::kParts * args.x_bytes),
        scales(weights + args.num_stages * Tile::kParts * Tile::kWeightBytes),
        barriers(barriers_in),
        x_bytes(args.x_bytes) {}

  __device__ __forceinline__ uint32_t X(int stage, int part) const {
    return begin + (stage * Tile::kParts + part) * x_bytes;
  }
  __device__ __forceinline__ uint32_t Weights(int stage, int part) const {
    return weights + (stage * Tile::kParts + part) * Tile::kWeightBytes;
  }
  // Of the group that begins with this stage, of a part's rows.
  __device__ __forceinline__ uint32_t Scales(int stage, int part, int padded_rows) const {
    return scales + stage * kStageScaleBytes + part * padded_rows * 4;
  }
  // Where blocks round: a group of columns before that, in rows of its first stage's operand that have no
  // digits.
  __device__ __forceinline__ uint32_t Unrounded(int stage, int part) const {
    return X(stage, part) + 4 * kBoxRowBytes;
  }
  // Barriers: what was copied is there, and all groups are done with a stage.
  __device__ __forceinline__ uint32_t FullX(int stage) const { return barriers + stage * 32; }
  __device__ __forceinline__ uint32_t FullWeights(int stage) const {
    return barriers + stage * 32 + 8;
  }
  __device__ __forceinline__ uint32_t FullUnrounded(int stage) const {
    return barriers + stage * 32 + 16;
  }
  __device__ __forceinline__ uint32_t Empty(int stage) const { return barriers + stage * 32 + 24; }
  // And with the whole ring, where a tile's outputs go through it.
  __device__ __forceinline__ uint32_t Drained() const { return barriers + kMaxStages * 32; }
};

// Where a unit of a block's work lies.
struct Unit {
  int tile, split;

  __device__ __forceinline__ Unit(const ProductArgs& args, int index)
      : tile(index % args.num_tiles), split(index / args.num_tiles) {}
};

// The number of chunks of a unit's longest part.
template <typename Tile, Activations kActivations>
__device__ __forceinline__ int ChunksOf(const ProductArgs& args, const Unit& unit) {
  return Part<kActivations>(args, unit.split + Tile::kParts - 1).num_chunks;
}

// Calls copy(chunk of a part of K, tile, stage) for all of a block's stages, once their places are
// free. The first lanes of a warp, one or several for each part: a single one that copied them in turn
// would fall behind.
template <typename Tile, Activations kActivations, typename Copy>
__device__ __forceinline__ void ForEachStage(const ProductArgs& args, const ProductRing<Tile>& ring,
                                             int part, Copy&& copy) {
  constexpr int kGroupChunks = kChunksOfGroup<kActivations>;
  RingCursor stage;
  bool is_around = false;
  int parity = 0;  // of the units
  for (int index = blockIdx.x; index < args.num_units; index += gridDim.x) {
    const Unit unit(args, index);
    const Part<kActivations> own(args, unit.split + part);
    const int num_chunks =
        Tile::kParts == 1 ? own.num_chunks : ChunksOf<Tile, kActivations>(args, unit);
    if (args.drains && index >= gridDim.x) {
      BarrierWait(ring.Drained(), parity);
      parity ^= 1;
    }
    for (int i = 0; i < num_chunks; ++i) {
      if (is_around) BarrierWait(ring.Empty(stage.index), stage.parity ^ 1);
      // Where the part has no chunk left, one beyond K's end, of which copies make zeros.
      const bool is_there = Tile::kParts == 1 || i < own.num_chunks;
      copy(is_there ? own.Chunk(i) : args.num_groups * kGroupChunks + i % kGroupChunks, unit.tile,
           stage);
      stage.Advance(args.num_stages);
      is_around = is_around || stage.index == 0;
    }
  }
}

// Lanes as ForEachStage has them, one a part. No more than what saturates device memory is under way at
// a time: what a small kernel reads meanwhile, attention ahead of this product above all, waits behind
// it.
template <typename Weight, typename Tile, Activations kActivations>
__device__ void CopyWeights(const ProductArgs& args, const ProductRing<Tile>& ring, int part) {
  constexpr int kChunkK = kBoxRowBytes / static_cast<int>(sizeof(Weight));
  const uint64_t policy = EvictFirst();  // what is read once must not drive out what is read again
  if (!args.prefetch_weight) WaitForDependency();
  RingCursor arrived;
  int num_under_way = 0;
  ForEachStage<Tile, kActivations>(
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

// Lanes as ForEachStage has them, one a part, and of two digits one for each eight rows besides.
template <typename T, typename Weight, typename Tile, Activations kActivations, int kDigits>
__device__ void CopyActivations(const ProductArgs& args, const ProductRing<Tile>& ring, int lane) {
  constexpr int kChunkK = kBoxRowBytes / static_cast<int>(sizeof(Weight));
  constexpr bool kIsRounded = kActivations == Activations::kRoundedInBlock;
  constexpr bool kMayAwaitMark = kIsRounded || kActivations == Activations::kAsTheyAre;
  const int part = lane % Tile::kParts;
  const int eight_rows = lane / Tile::kParts;
  const int padded_rows = PaddedRows(args.outputs.rows);
  if (lane >= (kDigits == 2 ? Tile::kParts * padded_rows / 8 : Tile::kParts)) return;
  if (kMayAwaitMark && args.awaited_mark != 0) {
    AwaitMark(args.marks, args.awaited_mark);
    __syncwarp((1u << Tile::kParts) - 1);
    if (lane == 0) TellMark(args.marks, 0);  // once all blocks have seen it
  } else {
    WaitForDependency();
  }
  ForEachStage<Tile, kActivations>(args, ring, part, [&](int chunk, int, const RingCursor& stage) {
    const int group = chunk / kChunksOfGroup<kActivations>;
    const bool begins_group = chunk % kChunksOfGroup<kActivations> == 0;
    if (kMayAwaitMark && group < args.num_late_groups) WaitForDependency();
    if constexpr (kIsRounded) {
      if (!begins_group) return;
      const int column = group * kDigitGroup;
      const int bytes = min(max(args.k_dim - column, 0), kDigitGroup) * 2;
      const uint32_t full = ring.FullUnrounded(stage.index);
      BarrierArriveExpecting(full, bytes);
      if (bytes > 0) {
        CopyBytes(ring.Unrounded(stage.index, part), static_cast<const T*>(args.x) + column, bytes,
                  full);
      }
      return;
    }
    const uint32_t full = ring.FullX(stage.index);
    const int scale_bytes = kIsGrouped<kActivations> && begins_group ? padded_rows * 4 : 0;
    if (lane == 0) {
      BarrierArriveExpecting(full, Tile::kParts * (args.x_bytes + scale_bytes));
    }
    const uint32_t to = ring.X(stage.index, part);
    if constexpr (kDigits == 2) {
      constexpr int kBoxBytes = 16 * kBoxRowBytes;
      CopyBox3(to + eight_rows * kBoxBytes, args.x_map, chunk * kChunkK, eight_rows * 8, full);
    } else {
      CopyBox(to, args.x_map, chunk * kChunkK, 0, full);
    }
    if (scale_bytes > 0 && eight_rows == 0) {
      CopyBytes(ring.Scales(stage.index, part, padded_rows), args.x_scale + group * padded_rows,
                scale_bytes, full);
    }
  });
}

// Makes digits of a row of x, a warp of a part of K. Little code, for what stands above `ForEachVector`.
template <typename T, typename Tile, int kDigits>
__device__ void RoundActivations(const ProductArgs& args, const ProductRing<Tile>& ring, int part) {
  constexpr auto kActivations = Activations::kRoundedInBlock;
  static_assert(kChunksOfGroup<kActivations> == 2);
  const int lane = threadIdx.x % kWarpSize;
  // Where a lane's eight columns of a group are in a stage.
  const uint32_t place = PieceOffset(0, lane % 16 / 2) + lane % 2 * 8;
  RingCursor stage;
  for (int index = blockIdx.x; index < args.num_units; index += gridDim.x) {
    const Unit unit(args, index);
    const Part<kActivations> own(args, unit.split + part);
    const int num_chunks = ChunksOf<Tile, kActivations>(args, unit);
#pragma unroll 1
    for (int i = 0; i < num_chunks; i += 2) {
      const RingCursor first = stage;
      stage.Advance(args.num_stages);
      const int second = stage.index;
      stage.Advance(args.num_stages);
      BarrierWait(ring.FullUnrounded(first.index), first.parity);
      const bool is_there =
          i < own.num_chunks && own.Chunk(i) * kBoxRowBytes + lane * 8 < args.k_dim;
      const uint4 bits = is_there ? LoadShared(ring.Unrounded(first.index, part) + lane * 16)
                                  : make_uint4(0, 0, 0, 0);
      float values[8];
      Unpack<T>(bits, values);
      float scale;
      const EightDigits<kDigits> eight = RoundGroup<kDigits>(values, &scale);
      const uint32_t to = ring.X(lane < 16 ? first.index : second, part) + place;
#pragma unroll
      for (int digit = 0; digit < kDigits; ++digit) {
        StoreShared(to + digit * 8 * kBoxRowBytes, eight.digits[digit]);
      }
      if (lane == 0) {
        StoreShared(ring.Scales(first.index, part, PaddedRows(1)), __float_as_uint(scale));
      }
      // The second stage's place is free, too: of a group's two both are released behind its last product.
      FenceForAsync();
      __syncwarp();
      if (lane == 0) {
        BarrierArrive(ring.FullX(first.index));
        BarrierArrive(ring.FullX(second));
      }
    }
  }
}
#endif

}  // namespace kogpt

#endif  // CUSTOM_OPS_LINEAR_RING_CUH_
