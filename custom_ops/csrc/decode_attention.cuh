// What the two kernels of decode_attention share: of a cache in 16 bits (decode_attention.cu) and of
// one in INT8 (decode_attention_int8.cuh).
#ifndef CUSTOM_OPS_DECODE_ATTENTION_CUH_
#define CUSTOM_OPS_DECODE_ATTENTION_CUH_

#include <cstdint>

#include "cuda_common.cuh"
#include "digits.cuh"

namespace kogpt {

inline constexpr int kSplitKeys = 64;

struct DecodeAttentionArgs {
  const void* qkv;
  const float* cos;
  const float* sin;
  void* k_pages;
  void* v_pages;
  float* k_scales;  // of INT8 pages
  float* v_scales;
  const int32_t* page_table;
  const int32_t* lengths;
  const int32_t* num_new;
  void* act;
  float* partials;
  int32_t* semaphores;
  int batch_heads;  // of all rows
  int num_heads;
  int page_len;
  int max_pages;
  int max_splits;
  int rotary_dim;
  int act_dim;
  bool is_cluster;  // the blocks of a head are one
  bool prefetch_cache;
  float log2_scale;         // log2(e) / sqrt(head_dim)
  RoundGroupsArgs rounded;  // act

  // Where the token with this position in a row lies in the pool: tokens of heads ahead of it.
  __device__ __forceinline__ int64_t SlotOf(int row, int head, int position) const {
    const int page_slot = min(position / page_len, max_pages - 1);
    const int page = __ldcg(page_table + static_cast<int64_t>(row) * max_pages + page_slot);
    return (static_cast<int64_t>(page) * num_heads + head) * page_len + position % page_len;
  }

  // The new token's position, or -1 for a finished row. A row that is full would write beyond its
  // pages; its last token is replaced instead.
  __device__ __forceinline__ int PositionOf(int row) const {
    const int last = max_pages * page_len - 1;
    return __ldcg(num_new + row) > 0 ? min(__ldcg(lengths + row), last) : -1;
  }

  // This warp's share of rounding the columns behind attention's, while the keys are on their way.
  template <typename T, int kDigits>
  __device__ __forceinline__ void RoundShare() const {
    const int warps = blockDim.x / kWarpSize;
    const int blocks = gridDim.x * gridDim.y;
    const int end = (static_cast<int>(NumDigitGroups(act_dim)) + 1 - num_heads) * rounded.rows;
    int task = (blockIdx.y * gridDim.x + blockIdx.x) * warps + threadIdx.x / kWarpSize;
#pragma unroll 1
    for (; task < end; task += blocks * warps) {
      rounded.Round<T, kDigits>(task % rounded.rows, num_heads + task / rounded.rows);
    }
  }
};

// Writes a head's result, of which each of the block's threads has kDims neighbouring values from `dim` on.
template <typename T, int kHeadDim, int kDigits, int kDims>
__device__ __forceinline__ void StoreHead(const DecodeAttentionArgs& args, int row, int head,
                                          int dim, const float (&values)[kDims]) {
  const int column = head * kHeadDim + dim;
  if constexpr (kDigits == 0) {
    if (dim >= kHeadDim) return;
    T* const out = static_cast<T*>(args.act) + static_cast<int64_t>(row) * args.act_dim + column;
#pragma unroll
    for (int i = 0; i < kDims; ++i) out[i] = FromFloat<T>(values[i]);
  } else {
    static_assert(kHeadDim == kDigitGroup);
    __shared__ uint32_t largest_of[kDigitGroup / kWarpSize];
    float rounded[kDims];
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kDims; ++i) {
      rounded[i] = ToFloat(FromFloat<T>(values[i]));
      if (args.rounded.k_multiplier != nullptr) {
        rounded[i] *= __ldcg(args.rounded.k_multiplier + column + i);
      }
      bits = max(bits, __float_as_uint(fabsf(rounded[i])));
    }
    bits = __reduce_max_sync(0xffffffffu, bits);
    if (threadIdx.x % kWarpSize == 0) largest_of[threadIdx.x / kWarpSize] = bits;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kDigitGroup / kDims / kWarpSize; ++warp) {
      bits = max(bits, largest_of[warp]);
    }
    const GroupScale<kDigits> scale(__uint_as_float(bits));
    int8_t* const to = static_cast<int8_t*>(args.rounded.digits) +
                       static_cast<int64_t>(row) * kDigits * args.act_dim + column;
#pragma unroll
    for (int i = 0; i < kDims; ++i) {
      const int integer = __float2int_rn(rounded[i] * scale.inverse);
      if constexpr (kDigits == 2) to[i] = static_cast<int8_t>((integer + 128) >> 8);
      to[(kDigits - 1) * args.act_dim + i] = static_cast<int8_t>(integer);
    }
    if (threadIdx.x == 0) {
      __stcg(args.rounded.scales + head * PaddedRows(args.rounded.rows) + row, scale.scale);
    }
  }
}

// Part of a softmax-weighted sum: exp2 of the scores less their maximum, summed, and times the
// values, of which a thread has kDims.
template <int kDims>
struct Softmax {
  float maximum = -INFINITY;
  float sum = 0.0f;
  float output[kDims] = {};

  __device__ __forceinline__ void Add(const Softmax& part) {
    const float new_maximum = fmaxf(maximum, part.maximum);
    const float rescale = exp2f(maximum - new_maximum);
    const float part_rescale = exp2f(part.maximum - new_maximum);
    sum = sum * rescale + part.sum * part_rescale;
#pragma unroll
    for (int i = 0; i < kDims; ++i) {
      output[i] = output[i] * rescale + part.output[i] * part_rescale;
    }
    maximum = new_maximum;
  }
};

// Adds up the parts of a head's splits, in order, in one block: where a block has the head to
// itself, there; where the head's blocks are a cluster, in the shared memory of the first; else
// through device memory, in the block that finishes last.
template <int kHeadDim, int kDims>
class HeadSum {
 public:
  // `dim`: the first of this thread's, kHeadDim where it has none. `cluster_parts`: [split,
  // head_dim + 2] in shared memory where the blocks are a cluster.
  __device__ __forceinline__ HeadSum(const DecodeAttentionArgs& args, int64_t head_of_row,
                                     int num_splits, int dim, float* cluster_parts)
      : num_splits_(num_splits),
        dim_(dim),
        is_alone_(gridDim.x == 1 || num_splits == 1),
        is_cluster_(args.is_cluster),
        cluster_parts_(cluster_parts),
        partials_(args.partials + head_of_row * args.max_splits * kPartSize),
        semaphore_(args.semaphores + head_of_row) {
#if __CUDA_ARCH__ >= 900
    if (is_cluster_) ClusterWait();  // the first block's shared memory is there
#endif
  }

  __device__ __forceinline__ void Add(int split, const Softmax<kDims>& part) {
    if (is_alone_) {
      total_.Add(part);
      return;
    }
#if __CUDA_ARCH__ >= 900
    if (is_cluster_) {
      const uint32_t to = SharedAddress(cluster_parts_ + split * kPartSize);
      if (dim_ < kHeadDim) {
#pragma unroll
        for (int i = 0; i < kDims; ++i) StoreInFirstBlock(to + (dim_ + i) * 4, part.output[i]);
      }
      if (threadIdx.x == 0) {
        StoreInFirstBlock(to + kHeadDim * 4, part.maximum);
        StoreInFirstBlock(to + (kHeadDim + 1) * 4, part.sum);
      }
      return;
    }
#endif
    float* partial = partials_ + static_cast<int64_t>(split) * kPartSize;
    if (dim_ < kHeadDim) {
#pragma unroll
      for (int i = 0; i < kDims; ++i) __stcg(partial + dim_ + i, part.output[i]);
    }
    if (threadIdx.x == 0) {
      __stcg(partial + kHeadDim, part.maximum);
      __stcg(partial + kHeadDim + 1, part.sum);
    }
    ++num_done_;
  }

  // Once the block has added its splits: writes the head's result where this thread and block have
  // it, or zeros. All of a block's threads call it.
  template <typename T, int kDigits>
  __device__ __forceinline__ void Write(const DecodeAttentionArgs& args, int row, int head,
                                        bool has_keys = true) {
#if __CUDA_ARCH__ >= 900
    if (!is_alone_ && is_cluster_) {
      ClusterArrive();
      if (blockIdx.x != 0) return;
      ClusterWait();
      for (int split = 0; split < num_splits_ && dim_ < kHeadDim; ++split) {
        const float* from = cluster_parts_ + split * kPartSize;
        Softmax<kDims> part;
        part.maximum = from[kHeadDim];
        part.sum = from[kHeadDim + 1];
#pragma unroll
        for (int i = 0; i < kDims; ++i) part.output[i] = from[dim_ + i];
        total_.Add(part);
      }
    }
#endif
    if (!is_alone_ && !is_cluster_) {
      __shared__ bool is_last;
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        is_last = atomicAdd(semaphore_, num_done_) + num_done_ == num_splits_;
        if (is_last) *semaphore_ = 0;
        __threadfence();
      }
      __syncthreads();
      if (!is_last) return;
      constexpr int kGroup = 8;  // partial results that are read together
      for (int first = 0; first < num_splits_ && dim_ < kHeadDim; first += kGroup) {
        Softmax<kDims> parts[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          if (first + i >= num_splits_) break;
          const float* partial = partials_ + static_cast<int64_t>(first + i) * kPartSize;
          parts[i].maximum = __ldcg(partial + kHeadDim);
          parts[i].sum = __ldcg(partial + kHeadDim + 1);
#pragma unroll
          for (int j = 0; j < kDims; ++j) parts[i].output[j] = __ldcg(partial + dim_ + j);
        }
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          if (first + i < num_splits_) total_.Add(parts[i]);
        }
      }
    }
    float values[kDims];
#pragma unroll
    for (int i = 0; i < kDims; ++i) values[i] = has_keys ? total_.output[i] / total_.sum : 0.0f;
    StoreHead<T, kHeadDim, kDigits>(args, row, head, dim_, values);
  }

 private:
  static constexpr int kPartSize = kHeadDim + 2;  // output, maximum, sum

  int num_splits_;
  int dim_;
  bool is_alone_;
  bool is_cluster_;
  float* cluster_parts_;
  float* partials_;
  int32_t* semaphore_;
  Softmax<kDims> total_;  // of the splits so far
  int num_done_ = 0;
};

}  // namespace kogpt

#endif  // CUSTOM_OPS_DECODE_ATTENTION_CUH_
