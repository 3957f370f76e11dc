// prefill_attention's attention on other than sm_90a: see prefill_attention.cu.
#ifndef CUSTOM_OPS_PREFILL_ATTENTION_PORTABLE_CUH_
#define CUSTOM_OPS_PREFILL_ATTENTION_PORTABLE_CUH_

#include <type_traits>

#include "prefill_attention_tile.cuh"

namespace kogpt {

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

  const int64_t token_stride = args.qkv_dim;
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

}  // namespace kogpt

#endif  // CUSTOM_OPS_PREFILL_ATTENTION_PORTABLE_CUH_
