// decode_attention over INT8 pages: as decode_attention.cu, but half the bytes, so that the products
// go to the tensor cores, where the cache is an operand as it lies in memory.
//
//   digits    the query is rounded to integers of four digits to the base 256, in [-128, 127] each;
//             a weight, probability times the scale of its value, to two digits in [0, 255]. Each
//             digit is a column of the second operand. So all products and sums are exact, and what
//             is rounded is 2^-31 of the query's largest value (its own 24 bits: nothing) and 2^-17
//             of the largest weight of a split; a result of 11 bits has 2^-12.
//   scores    a warp takes 16 of a split's 64 keys. The key's scale multiplies the sum.
//   values    a warp takes a quarter of the dimensions of all 64 keys, once the warps have met for
//             the scores: no sums of warps are left to add. Bytes are transposed on the way, since
//             a register of the first operand has four keys of one dimension.
//   loads     lanes hold pieces of 8 and 16 bytes of an operand, which would be read from device
//             memory as slivers of lines; so whole lines are copied to shared memory, to a ring of
//             three tiles of 64 keys or values that goes on filling from one head of the block to
//             the next.
//   new       three warps rotate and round the query, the key and the value before the first split;
//             the block that meets the new token writes it to its page.
#ifndef CUSTOM_OPS_DECODE_ATTENTION_INT8_CUH_
#define CUSTOM_OPS_DECODE_ATTENTION_INT8_CUH_

#include <cstdint>
#include <type_traits>

#include "decode_attention.cuh"

namespace kogpt {
namespace int8 {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlocksPerMultiprocessor = 4;  // that run at once
constexpr int kGroupKeys = 16;               // rows of the instruction's first operand
constexpr int kGroups = kSplitKeys / kGroupKeys;
static_assert(kGroups == kWarps);
constexpr float kQuerySteps = 0x7f000000;  // below what four digits can hold
constexpr float kWeightSteps = 0xffff;

// sums += A B for 16 rows of A, 32 k in INT8, and 8 columns of B in INT8 or, as uint8_t, without
// sign; operands as the instruction m16n8k32 has them.
template <typename B>
__device__ __forceinline__ void MultiplyAdd(int32_t (&sums)[4], uint32_t a0, uint32_t a1,
                                            uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<B, uint8_t>) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};\n"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};\n"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// Byte b of word i becomes byte i of word b.
__device__ __forceinline__ void TransposeBytes(uint32_t (&words)[4]) {
  const uint32_t low01 = __byte_perm(words[0], words[1], 0x5140);
  const uint32_t low23 = __byte_perm(words[2], words[3], 0x5140);
  const uint32_t high01 = __byte_perm(words[0], words[1], 0x7362);
  const uint32_t high23 = __byte_perm(words[2], words[3], 0x7362);
  words[0] = __byte_perm(low01, low23, 0x5410);
  words[1] = __byte_perm(low01, low23, 0x7632);
  words[2] = __byte_perm(high01, high23, 0x5410);
  words[3] = __byte_perm(high01, high23, 0x7632);
}

// The four digits of the integer nearest to the value: 128 more of each, then the sign turned.
__device__ __forceinline__ uint32_t SignedDigits(float value) {
  return (static_cast<uint32_t>(__float2int_rn(value)) + 0x80808080u) ^ 0x80808080u;
}

// 2, 4 or 8 bytes as words.
template <int kBytes>
__device__ __forceinline__ void LoadBytes(const int8_t* from, uint32_t (&words)[(kBytes + 3) / 4]) {
  if constexpr (kBytes == 8) {
    const uint2 bits = *reinterpret_cast<const uint2*>(from);
    words[0] = bits.x;
    words[1] = bits.y;
  } else if constexpr (kBytes == 4) {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else {
    words[0] = *reinterpret_cast<const uint16_t*>(from);
  }
}

// Keys or values of a split in shared memory: 16-byte pieces of a key change places so that what a
// warp reads at a time, of neighbouring keys, lies in different banks.
template <int kHeadDim>
struct Tile {
  static constexpr int kPieces = kHeadDim / 16;  // of a key
  static constexpr int kBytes = kSplitKeys * kHeadDim;

  // Where byte `dim` of a key is.
  static __device__ __forceinline__ int At(int key, int dim) {
    const int swapped = ((key & 1) * 4 | (key & 2)) & (kPieces - 1);
    return key * kHeadDim + ((dim / 16) ^ swapped) * 16 + dim % 16;
  }
};

}  // namespace int8

template <typename T, int kHeadDim, int kDigits>
__global__ void __launch_bounds__(int8::kThreads, int8::kBlocksPerMultiprocessor)
    DecodeAttentionInt8Kernel(const __grid_constant__ DecodeAttentionArgs args) {
  using namespace int8;
  constexpr int kChunks = kHeadDim / 64;        // of a key: 16 bytes in each of four lanes
  constexpr int kWarpDims = kHeadDim / kWarps;  // of the values
  constexpr int kLaneDims = kWarpDims / 8;      // in each of eight lanes
  constexpr int kWords = (kLaneDims + 3) / 4;   // that hold them
  constexpr int kDims = kLaneDims < 4 ? 1 : kLaneDims / 4;  // of the result, a thread
  constexpr int kPadded = kHeadDim + 64;  // so that two digits are in different banks
  __shared__ alignas(16) int8_t q_digits[4][kPadded];
  __shared__ alignas(16) int8_t new_rows[2][kHeadDim];  // of the new token: k, v
  __shared__ float new_scales[2];
  __shared__ float score_step;           // of q's last digit, with log2(e) / sqrt(head_dim)
  __shared__ float2 scores[kSplitKeys];  // with the values' scales
  __shared__ alignas(16) uint8_t weights[kWarps][2][kSplitKeys];
  // The tiles; behind them, of the first block of a cluster, [split, head_dim + 2].
  extern __shared__ __align__(16) int8_t tiles[];
  float* const cluster_parts = reinterpret_cast<float*>(tiles + 3 * Tile<kHeadDim>::kBytes);

  LaunchDependents();
#if __CUDA_ARCH__ >= 900
  if (args.is_cluster) ClusterArrive();  // the first block's shared memory is there
#endif

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int quad = lane / 4;  // rows of the operands' and of the result's fragments
  const int member = lane % 4;
  const int dim = lane * 8 % kHeadDim;  // of q, k and v of the new token, a warp each
  const int lane_dim = member * kDims;  // of this lane's dimensions, the first that is its result's
  const int first_dim = warp * kWarpDims + quad * kLaneDims;
  const int scale_key = quad + 8 * (member % 2);  // of the keys quad and quad + 8 of the warp's 16

  // A ring of three tiles: while one is read, the next two come.
  const auto tile_of = [&](int number) { return tiles + number % 3 * Tile<kHeadDim>::kBytes; };
  // Where the warp's 16 keys of a split lie, all in one page.
  const auto slot_of = [&](int head, int split) {
    return args.SlotOf(head / args.num_heads, head % args.num_heads,
                       split * kSplitKeys + warp * kGroupKeys);
  };
  // What lies beyond the row's tokens is never read: it may hold anything.
  const auto load_tile = [&](const void* pages, int position, int split, int64_t slot,
                             int8_t* tile) {
    const int8_t* from = static_cast<const int8_t*>(pages) + slot * kHeadDim;
    const int num_keys = position - split * kSplitKeys - warp * kGroupKeys;
    constexpr int kCopies = kGroupKeys * kHeadDim / 16 / kWarpSize;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int at = (i * kWarpSize + lane) * 16;
      const int key = at / kHeadDim;
      if (key < num_keys) {
        CopyAsync16(
            SharedAddress(tile + Tile<kHeadDim>::At(warp * kGroupKeys + key, at % kHeadDim)),
            from + at, true);
      }
    }
  };
  float k_scale, v_scale;
  const auto load_scales = [&](int position, int split, int64_t slot) {
    const bool is_there = split * kSplitKeys + warp * kGroupKeys + scale_key < position;
    k_scale = is_there ? __ldcg(args.k_scales + slot + scale_key) : 0.0f;
    v_scale = is_there ? __ldcg(args.v_scales + slot + scale_key) : 0.0f;
  };
  // Groups of copies are counted: every split asks for one of keys and one of values, of the split
  // after it, if only for none. The keys of the block's second split come with the first's.
  const auto load_first = [&](int position) {
    const int second = blockIdx.x + gridDim.x;
    const int64_t slot = slot_of(blockIdx.y, blockIdx.x);
    load_tile(args.k_pages, position, blockIdx.x, slot, tile_of(0));
    CopyAsyncCommit();
    load_tile(args.v_pages, position, blockIdx.x, slot, tile_of(1));
    load_scales(position, blockIdx.x, slot);
    load_tile(args.k_pages, position, second, slot_of(blockIdx.y, second), tile_of(2));
    CopyAsyncCommit();
  };
  // q, k or v, by warp, as the product ahead has left it, and its angles.
  struct NewToken {
    uint4 bits;
    Rotation rotation;
  };
  const auto load_new = [&](int head) {
    const int row = head / args.num_heads;
    const int64_t part = static_cast<int64_t>(row) * 3 + min(warp, 2);
    const T* from = static_cast<const T*>(args.qkv) +
                    (part * args.num_heads + head % args.num_heads) * kHeadDim + dim;
    return NewToken{__ldcg(reinterpret_cast<const uint4*>(from)), Rotation(args, row, dim)};
  };

  // The cache comes from device memory while the product ahead still runs. Should the position turn
  // out to be another one, it comes again.
  if (!args.prefetch_cache) WaitForDependency();
  int next_position = args.PositionOf(blockIdx.y / args.num_heads);
  load_first(next_position);
  if (args.prefetch_cache) WaitForDependency();
  NewToken next_token = load_new(blockIdx.y);
  if (args.prefetch_cache) {
    const int foreseen = next_position;
    next_position = args.PositionOf(blockIdx.y / args.num_heads);
    if (next_position != foreseen) {
      CopyAsyncWait<0>();
      load_first(next_position);
    }
  }
  if constexpr (kDigits > 0) args.RoundShare<T, kDigits>();
  int number = 0;  // of the split among the block's
  for (int head = blockIdx.y; head < args.batch_heads; head += gridDim.y) {
    const int row = head / args.num_heads;
    const int position = next_position;
    // A finished row has one split without keys.
    const int num_splits = max(position, 0) / kSplitKeys + 1;
    if (static_cast<int>(blockIdx.x) >= num_splits) return;
    const NewToken token = next_token;
    const int next_head = head + gridDim.y;
    const bool has_next_head = next_head < args.batch_heads;
    if (has_next_head) next_position = args.PositionOf(next_head / args.num_heads);

    if (warp < 3) {
      const bool is_first = lane * 8 < kHeadDim;  // the lanes behind have the same again
      float values[8];
      Unpack<T>(warp < 2 ? token.rotation.template Rotate<T>(token.bits) : token.bits, values);
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) largest = Largest()(largest, fabsf(values[i]));
      largest = WarpReduce(largest, Largest());
      if (warp == 0) {
        uint32_t digits[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          digits[i / 4][i % 4] = SignedDigits(values[i] * (kQuerySteps / largest));
        }
        TransposeBytes(digits[0]);
        TransposeBytes(digits[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (is_first) {
            *reinterpret_cast<uint2*>(q_digits[i] + dim) = make_uint2(digits[0][i], digits[1][i]);
          }
        }
        if (lane == 0) score_step = largest / kQuerySteps * args.log2_scale;
      } else {
        const float scale = Int8Scale(largest);
        const Int8Rounding rounding(scale);
        const uint2 rounded = make_uint2(rounding.Round4(values), rounding.Round4(values + 4));
        if (is_first) *reinterpret_cast<uint2*>(new_rows[warp - 1] + dim) = rounded;
        if (lane == 0) new_scales[warp - 1] = scale;
        if (position >= 0 && position / kSplitKeys % gridDim.x == blockIdx.x) {
          const int64_t slot = args.SlotOf(row, head % args.num_heads, position);
          auto* const pages = static_cast<int8_t*>(warp == 1 ? args.k_pages : args.v_pages);
          if (is_first) *reinterpret_cast<uint2*>(pages + slot * kHeadDim + dim) = rounded;
          if (lane == 0) (warp == 1 ? args.k_scales : args.v_scales)[slot] = scale;
        }
      }
    }
    __syncthreads();

    HeadSum<kHeadDim, kDims> total(args, head, num_splits,
                                   lane_dim < kLaneDims ? first_dim + lane_dim : kHeadDim,
                                   cluster_parts);
    for (int split = blockIdx.x; split < num_splits; split += gridDim.x, ++number) {
      // What comes next may be another head's, whose only block this is.
      const bool is_last = split + static_cast<int>(gridDim.x) >= num_splits;
      const bool has_next = !is_last || has_next_head;
      const int next_split = is_last ? 0 : split + gridDim.x;
      const int next_end = is_last ? next_position : position;
      const int64_t next_slot = slot_of(is_last && has_next_head ? next_head : head, next_split);
      int8_t* const k_tile = tile_of(2 * number);
      int8_t* const v_tile = tile_of(2 * number + 1);
      const int new_key = position - split * kSplitKeys;  // of the split, if below kSplitKeys
      if (0 <= new_key && new_key < kSplitKeys) {
        if (threadIdx.x < 2 * Tile<kHeadDim>::kPieces) {
          const int part = threadIdx.x / Tile<kHeadDim>::kPieces;
          const int at = threadIdx.x % Tile<kHeadDim>::kPieces * 16;
          *reinterpret_cast<uint4*>((part == 0 ? k_tile : v_tile) +
                                    Tile<kHeadDim>::At(new_key, at)) =
              *reinterpret_cast<const uint4*>(new_rows[part] + at);
        }
        if (new_key == warp * kGroupKeys + scale_key) {
          k_scale = new_scales[0];
          v_scale = new_scales[1];
        }
      }
      CopyAsyncWait<1>();
      __syncthreads();  // the keys are there, and the values before have been read
      if (has_next && (number > 0 || is_last)) {
        load_tile(args.k_pages, next_end, next_split, next_slot, tile_of(2 * number + 2));
      }
      CopyAsyncCommit();

      // Column n has digit n % 4, so that a lane has digits 0 and 1, or 2 and 3, of both its keys.
      int32_t sums[4] = {};
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int dim_of_chunk = chunk * 64 + member * 16;
        const uint4 q = *reinterpret_cast<const uint4*>(q_digits[quad % 4] + dim_of_chunk);
        uint4 k[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          k[i] = *reinterpret_cast<const uint4*>(
              k_tile + Tile<kHeadDim>::At(warp * kGroupKeys + 8 * i + quad, dim_of_chunk));
        }
        MultiplyAdd<int8_t>(sums, k[0].x, k[1].x, k[0].y, k[1].y, q.x, q.y);
        MultiplyAdd<int8_t>(sums, k[0].z, k[1].z, k[0].w, k[1].w, q.z, q.w);
      }
      const float place = member % 2 == 0 ? 1.0f : 65536.0f;
      float pair[2] = {place * static_cast<float>(sums[0] + 256 * sums[1]),
                       place * static_cast<float>(sums[2] + 256 * sums[3])};
#pragma unroll
      for (int i = 0; i < 2; ++i) pair[i] += __shfl_xor_sync(0xffffffffu, pair[i], 1);
      // NaN for a scale that is not finite: an infinite score might count for none.
      const float score =
          (member % 2 == 0 ? pair[0] : pair[1]) * (score_step * k_scale) + 0.0f * k_scale;
      if (member < 2) {
        const int key = warp * kGroupKeys + scale_key;
        scores[key] = make_float2(key <= new_key ? score : -INFINITY, v_scale);
      }
      CopyAsyncWait<1>();
      __syncthreads();  // the scores and the values are there, and the keys have been read
      if (has_next) {
        load_tile(args.v_pages, next_end, next_split, next_slot, tile_of(2 * number + 3));
        load_scales(next_end, next_split, next_slot);
      }
      CopyAsyncCommit();

      // Each warp finds all weights.
      const float2 of_key[2] = {scores[lane], scores[lane + kWarpSize]};
      Softmax<kDims> part;
      part.maximum =
          WarpReduce(fmaxf(of_key[0].x, of_key[1].x), [](float a, float b) { return fmaxf(a, b); });
      float probs[2], weight[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        probs[i] = of_key[i].x == -INFINITY ? 0.0f : exp2f(of_key[i].x - part.maximum);
        weight[i] = probs[i] * of_key[i].y;
      }
      part.sum = WarpReduce(probs[0] + probs[1], Plus());
      const float largest = WarpReduce(Largest()(fabsf(weight[0]), fabsf(weight[1])), Largest());
      // The keys of a member lie together, as its registers of the first operand have them.
      const int at = lane % 4 * (kSplitKeys / 4) + lane / 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t steps = __float2uint_rn(weight[i] * (kWeightSteps / largest));
        weights[warp][0][at + i * (kWarpSize / 4)] = static_cast<uint8_t>(steps);
        weights[warp][1][at + i * (kWarpSize / 4)] = static_cast<uint8_t>(steps >> 8);
      }
      __syncwarp();
      const uint4 w =
          *reinterpret_cast<const uint4*>(weights[warp][quad % 2] + member * (kSplitKeys / 4));

      // Column n has digit n % 2: each lane of a quad has both digits of all its dimensions, two to
      // a tile.
      int32_t outputs[kLaneDims / 2][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t v_bits[2][4][kWords], by_dim[2][kWords][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int key = (2 * half + i) * kGroupKeys + 4 * j + member;
            LoadBytes<kLaneDims>(v_tile + Tile<kHeadDim>::At(key, first_dim), v_bits[i][j]);
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int word = 0; word < kWords; ++word) {
#pragma unroll
            for (int key = 0; key < 4; ++key) by_dim[i][word][key] = v_bits[i][key][word];
            TransposeBytes(by_dim[i][word]);
          }
        }
#pragma unroll
        for (int tile = 0; tile < kLaneDims / 2; ++tile) {
          const int word = tile / 2, dim = tile % 2 * 2;
          MultiplyAdd<uint8_t>(outputs[tile], by_dim[0][word][dim], by_dim[0][word][dim + 1],
                               by_dim[1][word][dim], by_dim[1][word][dim + 1],
                               half == 0 ? w.x : w.z, half == 0 ? w.y : w.w);
        }
      }
#pragma unroll
      for (int i = 0; i < kDims; ++i) {
        int32_t sum = 0;
#pragma unroll
        for (int dim = i; dim < kLaneDims; dim += kDims) {
          const int32_t* const digits = outputs[dim / 2] + dim % 2 * 2;
          if (dim == lane_dim + i) sum = digits[0] + 256 * digits[1];
        }
        part.output[i] = static_cast<float>(sum) * (largest / kWeightSteps);
      }
      total.Add(split, part);
    }
    if (has_next_head) next_token = load_new(next_head);
    total.template Write<T, kDigits>(args, row, head % args.num_heads, position >= 0);
  }
}

}  // namespace kogpt

#endif  // CUSTOM_OPS_DECODE_ATTENTION_INT8_CUH_
