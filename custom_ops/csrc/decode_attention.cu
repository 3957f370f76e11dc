// Attention of one new token a row over paged keys and values, bound by reading the cache once.
//
//   work      a block takes 64 keys of one head of one row (a split), a warp 8 of them: 8 keys of a
//             head lie together in their page, so that a warp reads whole pieces of 16 bytes a lane
//             and has all of them, keys and values, under way before it uses the first. With one
//             query a head there is nothing for the tensor cores to do.
//   new       the block whose split the new token falls into takes it from qkv, and writes it to
//             its page.
//   combine   each split leaves its maximum, its sum and its unnormalised output in scratch, where
//             the block that finishes a head last adds them in order; or, where a head's blocks are
//             a cluster, in the shared memory of its first block, which does (flash-decoding, Dao
//             et al. 2023; online softmax, Milakov and Gimelshein 2018). A block that has a head to
//             itself adds the same splits in the same order without going through memory. Splits
//             are 64 keys whatever the batch, so a row's result does not depend on its neighbours.
//
// Limits: head_dim 64, 128 or 256; pages of a multiple of 16 tokens.

#include <algorithm>

#include "cuda_common.cuh"
#include "decode_attention.h"

namespace kogpt {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpKeys = 8;
constexpr int kSplitKeys = kWarps * kWarpKeys;
constexpr int kBlocksPerMultiprocessor = 2;  // that run at once
// A head's blocks are a cluster where they are few enough for any device, and its parts for the
// shared memory that the blocks of a product leave.
constexpr int kMaxClusterSize = 8;
constexpr int kMaxClusterParts = 8;
constexpr float kLog2E = 1.4426950408889634f;

struct KernelArgs {
  const void* qkv;
  const float* cos;
  const float* sin;
  void* k_pages;
  void* v_pages;
  const int32_t* page_table;
  const int32_t* lengths;
  const int32_t* num_new;
  void* act;
  float* partials;
  int32_t* semaphores;
  int num_heads;
  int page_len;
  int max_pages;
  int max_splits;
  int rotary_dim;
  int act_dim;
  bool is_cluster;  // the blocks of a head are one
  bool prefetch_cache;
  float log2_scale;  // log2(e) / sqrt(head_dim)
};

// Rotates the pairs of this lane's eight dimensions and rounds them as the cache does.
template <typename T>
__device__ __forceinline__ uint4 Rotate(uint4 bits, const float (&cos)[4], const float (&sin)[4]) {
  float values[8], rotated[8];
  Unpack<T>(bits, values);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    rotated[2 * i] = values[2 * i] * cos[i] - values[2 * i + 1] * sin[i];
    rotated[2 * i + 1] = values[2 * i + 1] * cos[i] + values[2 * i] * sin[i];
  }
  return Pack<T>(rotated);
}

// Part of a softmax-weighted sum: exp2 of the scores less their maximum, summed, and times the
// values.
struct Softmax {
  float maximum = -INFINITY;
  float sum = 0.0f;
  float output = 0.0f;

  __device__ __forceinline__ void Add(const Softmax& part) {
    const float new_maximum = fmaxf(maximum, part.maximum);
    const float rescale = exp2f(maximum - new_maximum);
    const float part_rescale = exp2f(part.maximum - new_maximum);
    sum = sum * rescale + part.sum * part_rescale;
    output = output * rescale + part.output * part_rescale;
    maximum = new_maximum;
  }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    DecodeAttentionKernel(const __grid_constant__ KernelArgs args) {
  constexpr int kLanesPerKey = kHeadDim / 8;
  constexpr int kKeysPerLoad = kWarpSize / kLanesPerKey;
  constexpr int kLoads = kWarpKeys / kKeysPerLoad;
  __shared__ float outputs[kWarps][kHeadDim];
  __shared__ float maxima[kWarps], sums[kWarps];
  __shared__ bool is_last;
  extern __shared__ float
      cluster_parts[];  // of the first block of a cluster: [split, head_dim + 2]

  LaunchDependents();
#if __CUDA_ARCH__ >= 900
  if (args.is_cluster) ClusterArrive();  // the first block's shared memory is there
#endif

  const int row = blockIdx.z;
  const int head = blockIdx.y;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  T* out = static_cast<T*>(args.act) + static_cast<int64_t>(row) * args.act_dim + head * kHeadDim;
  // This lane's dimensions of every key that it meets, and the key within a load.
  const int dim = lane * 8 % kHeadDim;
  const int lane_key = lane / kLanesPerKey;
  const int64_t head_stride = static_cast<int64_t>(args.num_heads) * kHeadDim;

  // Where this lane's part of its warp's keys of a split lies in the pages.
  const auto cache_offset = [&](int split) -> int64_t {
    const int first_key = split * kSplitKeys + warp * kWarpKeys;
    const int slot = min(first_key / args.page_len, args.max_pages - 1);
    const int page = __ldcg(args.page_table + static_cast<int64_t>(row) * args.max_pages + slot);
    return ((static_cast<int64_t>(page) * args.num_heads + head) * args.page_len +
            first_key % args.page_len) *
               kHeadDim +
           lane * 8;
  };
  // The new token's position, or -1 for a finished row. A row that is full would write beyond its
  // pages; its last token is replaced instead.
  const auto load_position = [&] {
    const int last = args.max_pages * args.page_len - 1;
    return __ldcg(args.num_new + row) > 0 ? min(__ldcg(args.lengths + row), last) : -1;
  };
  int position;
  int64_t offset;
  // What lies beyond the row's tokens is never read: it may hold anything.
  const auto load = [&](const void* pages, int split, uint4(&bits)[kLoads]) {
    const T* from = static_cast<const T*>(pages) + offset;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int key = split * kSplitKeys + warp * kWarpKeys + i * kKeysPerLoad + lane_key;
      bits[i] = key < position ? __ldcg(reinterpret_cast<const uint4*>(from + i * kWarpSize * 8))
                               : make_uint4(0, 0, 0, 0);
    }
  };
  uint4 k_bits[kLoads], v_bits[kLoads];
  const auto load_first = [&] {
    offset = cache_offset(blockIdx.x);
    load(args.k_pages, blockIdx.x, k_bits);
    load(args.v_pages, blockIdx.x, v_bits);
  };
  // The cache comes from device memory while the product ahead still runs. Should the position turn
  // out to be another one, it comes again.
  if (!args.prefetch_cache) WaitForDependency();
  position = load_position();
  load_first();
  if (args.prefetch_cache) {
    WaitForDependency();
    const int foreseen = position;
    position = load_position();
    if (position != foreseen) load_first();
  }

  const T* qkv = static_cast<const T*>(args.qkv) + row * 3 * head_stride + head * kHeadDim + dim;
  const uint4 q_bits = __ldcg(reinterpret_cast<const uint4*>(qkv));
  float cos[4], sin[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool is_rotated = dim + 2 * i < args.rotary_dim;
    const int64_t at = static_cast<int64_t>(row) * (args.rotary_dim / 2) + dim / 2 + i;
    cos[i] = is_rotated ? __ldcg(args.cos + at) : 1.0f;
    sin[i] = is_rotated ? __ldcg(args.sin + at) : 0.0f;
  }

  if (position < 0) {
    if (blockIdx.x == 0 && threadIdx.x < kHeadDim) out[threadIdx.x] = FromFloat<T>(0.0f);
    return;
  }
  const int num_splits = position / kSplitKeys + 1;
  if (static_cast<int>(blockIdx.x) >= num_splits) return;

  float q[8];
  Unpack<T>(Rotate<T>(q_bits, cos, sin), q);
#pragma unroll
  for (int i = 0; i < 8; ++i) q[i] *= args.log2_scale;

  const int64_t head_of_row = static_cast<int64_t>(row) * args.num_heads + head;
  float* partials = args.partials + head_of_row * args.max_splits * (kHeadDim + 2);
  const bool is_alone = gridDim.x == 1 || num_splits == 1;
#if __CUDA_ARCH__ >= 900
  if (args.is_cluster) ClusterWait();
#endif
  Softmax total;  // of the splits so far, in order; each thread has one dimension
  int num_done = 0;
  for (int split = blockIdx.x; split < num_splits; split += gridDim.x) {
    const int first_key = split * kSplitKeys + warp * kWarpKeys;
    if (first_key <= position && position < first_key + kWarpKeys) {
      const uint4 k_new =
          Rotate<T>(__ldcg(reinterpret_cast<const uint4*>(qkv + head_stride)), cos, sin);
      const uint4 v_new = __ldcg(reinterpret_cast<const uint4*>(qkv + 2 * head_stride));
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (first_key + i * kKeysPerLoad + lane_key != position) continue;
        k_bits[i] = k_new;
        v_bits[i] = v_new;
        *reinterpret_cast<uint4*>(static_cast<T*>(args.k_pages) + offset + i * kWarpSize * 8) =
            k_new;
        *reinterpret_cast<uint4*>(static_cast<T*>(args.v_pages) + offset + i * kWarpSize * 8) =
            v_new;
      }
    }

    float scores[kLoads];
    float maximum = -INFINITY;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      float k[8];
      Unpack<T>(k_bits[i], k);
      float score = 0.0f;
#pragma unroll
      for (int d = 0; d < 8; ++d) score += q[d] * k[d];
#pragma unroll
      for (int step = kLanesPerKey / 2; step > 0; step /= 2) {
        score += __shfl_xor_sync(0xffffffffu, score, step);
      }
      scores[i] = first_key + i * kKeysPerLoad + lane_key <= position ? score : -INFINITY;
      maximum = fmaxf(maximum, scores[i]);
    }
    // The next split's keys come while this one's values are summed, its values while the warps
    // meet.
    const int next = split + gridDim.x;
    if (next < num_splits) {
      offset = cache_offset(next);
      load(args.k_pages, next, k_bits);
    }
#pragma unroll
    for (int step = kLanesPerKey; step < kWarpSize; step *= 2) {
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, step));
    }
    float sum = 0.0f;
    float output[8] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float prob = scores[i] == -INFINITY ? 0.0f : exp2f(scores[i] - maximum);
      float v[8];
      Unpack<T>(v_bits[i], v);
      sum += prob;
#pragma unroll
      for (int d = 0; d < 8; ++d) output[d] += prob * v[d];
    }
    if (next < num_splits) load(args.v_pages, next, v_bits);
#pragma unroll
    for (int step = kLanesPerKey; step < kWarpSize; step *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, step);
#pragma unroll
      for (int d = 0; d < 8; ++d) output[d] += __shfl_xor_sync(0xffffffffu, output[d], step);
    }
    __syncthreads();  // the split before has been read
    if (lane < kLanesPerKey) {
#pragma unroll
      for (int d = 0; d < 8; ++d) outputs[warp][dim + d] = output[d];
    }
    if (lane == 0) {
      maxima[warp] = maximum;
      sums[warp] = sum;
    }
    __syncthreads();

    Softmax part;
    part.maximum = maxima[0];  // of a split's warps the first has a key
#pragma unroll
    for (int w = 1; w < kWarps; ++w) part.maximum = fmaxf(part.maximum, maxima[w]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float rescale = exp2f(maxima[w] - part.maximum);
      part.sum += sums[w] * rescale;
      if (threadIdx.x < kHeadDim) part.output += outputs[w][threadIdx.x] * rescale;
    }
    if (is_alone) {
      total.Add(part);
      continue;
    }
#if __CUDA_ARCH__ >= 900
    if (args.is_cluster) {
      const uint32_t to = SharedAddress(cluster_parts + split * (kHeadDim + 2));
      if (threadIdx.x < kHeadDim) StoreInFirstBlock(to + threadIdx.x * 4, part.output);
      if (threadIdx.x == 0) {
        StoreInFirstBlock(to + kHeadDim * 4, part.maximum);
        StoreInFirstBlock(to + (kHeadDim + 1) * 4, part.sum);
      }
      continue;
    }
#endif
    float* partial = partials + static_cast<int64_t>(split) * (kHeadDim + 2);
    if (threadIdx.x < kHeadDim) __stcg(partial + threadIdx.x, part.output);
    if (threadIdx.x == 0) {
      __stcg(partial + kHeadDim, part.maximum);
      __stcg(partial + kHeadDim + 1, part.sum);
    }
    ++num_done;
  }

#if __CUDA_ARCH__ >= 900
  if (!is_alone && args.is_cluster) {
    ClusterArrive();
    if (blockIdx.x != 0) return;
    ClusterWait();
    for (int split = 0; split < num_splits && threadIdx.x < kHeadDim; ++split) {
      const float* from = cluster_parts + split * (kHeadDim + 2);
      Softmax part;
      part.maximum = from[kHeadDim];
      part.sum = from[kHeadDim + 1];
      part.output = from[threadIdx.x];
      total.Add(part);
    }
  }
#endif
  if (!is_alone && !args.is_cluster) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      int32_t* semaphore = args.semaphores + head_of_row;
      is_last = atomicAdd(semaphore, num_done) + num_done == num_splits;
      if (is_last) *semaphore = 0;
      __threadfence();
    }
    __syncthreads();
    if (!is_last || threadIdx.x >= kHeadDim) return;
    constexpr int kGroup = 8;  // partial results that are read together
    for (int first = 0; first < num_splits; first += kGroup) {
      Softmax parts[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (first + i >= num_splits) break;
        const float* partial = partials + static_cast<int64_t>(first + i) * (kHeadDim + 2);
        parts[i].maximum = __ldcg(partial + kHeadDim);
        parts[i].sum = __ldcg(partial + kHeadDim + 1);
        parts[i].output = __ldcg(partial + threadIdx.x);
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (first + i < num_splits) total.Add(parts[i]);
      }
    }
  }
  if (threadIdx.x < kHeadDim) out[threadIdx.x] = FromFloat<T>(total.output / total.sum);
}

int64_t SplitsOf(const DecodeAttentionParams& params) {
  return (params.max_pages * params.page_len + kSplitKeys - 1) / kSplitKeys;
}

template <typename T, int kHeadDim>
const char* LaunchForHeadDim(const DecodeAttentionParams& params, cudaStream_t stream) {
  constexpr auto kKernel = DecodeAttentionKernel<T, kHeadDim>;
  constexpr int kPartBytes = (kHeadDim + 2) * static_cast<int>(sizeof(float));
  const KernelTraits& traits = TraitsOf<kKernel>(
      [](bool is_hopper) { return is_hopper ? kMaxClusterParts * kPartBytes : 0; });
  if (traits.error != cudaSuccess) return MessageOf(traits.error);
  KernelArgs args;
  args.qkv = params.qkv;
  args.cos = params.cos;
  args.sin = params.sin;
  args.k_pages = params.k_pages;
  args.v_pages = params.v_pages;
  args.page_table = params.page_table;
  args.lengths = params.lengths;
  args.num_new = params.num_new;
  args.act = params.act;
  args.partials = params.partials;
  args.semaphores = params.semaphores;
  args.num_heads = static_cast<int>(params.num_heads);
  args.page_len = static_cast<int>(params.page_len);
  args.max_pages = static_cast<int>(params.max_pages);
  args.max_splits = static_cast<int>(SplitsOf(params));
  args.rotary_dim = static_cast<int>(params.rotary_dim);
  args.act_dim = static_cast<int>(params.act_dim);
  args.log2_scale = kLog2E / sqrtf(static_cast<float>(kHeadDim));
  const int64_t blocks_per_split = params.batch * params.num_heads;
  // As many blocks as run at once, if there is work for them: more would wait, and a head that a
  // block has to itself needs no scratch.
  const int64_t splits =
      std::clamp<int64_t>(kBlocksPerMultiprocessor * traits.num_multiprocessors / blocks_per_split,
                          1, SplitsOf(params));
  args.is_cluster = traits.is_hopper && splits > 1 && splits <= kMaxClusterSize &&
                    args.max_splits <= kMaxClusterParts;
  args.prefetch_cache = params.prefetch_cache;
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(params.num_heads),
                  static_cast<unsigned>(params.batch));
  return MessageOf(Launch<kKernel>(traits, grid, kThreads,
                                   args.is_cluster ? args.max_splits * kPartBytes : 0, stream, args,
                                   args.is_cluster ? static_cast<int>(splits) : 1));
}

template <typename T>
const char* LaunchForType(const DecodeAttentionParams& params, cudaStream_t stream) {
  switch (params.head_dim) {
    case 64:
      return LaunchForHeadDim<T, 64>(params, stream);
    case 128:
      return LaunchForHeadDim<T, 128>(params, stream);
    case 256:
      return LaunchForHeadDim<T, 256>(params, stream);
    default:
      return "decode_attention on CUDA takes a head_dim of 64, 128 or 256";
  }
}

}  // namespace

int64_t DecodeAttentionPartialsBytes(const DecodeAttentionParams& params) {
  return params.batch * params.num_heads * SplitsOf(params) * (params.head_dim + 2) *
         static_cast<int64_t>(sizeof(float));
}

const char* LaunchDecodeAttention(const DecodeAttentionParams& params, void* stream) {
  if (params.batch == 0) return nullptr;
  if (params.batch * params.num_heads >= kNumSemaphores) {
    return "decode_attention on CUDA takes at most 65535 heads in a batch";
  }
  if (params.k_scales != nullptr) {
    return "an INT8 cache is not supported by the CUDA kernels yet";
  }
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DataType::kFloat16:
      return LaunchForType<__half>(params, cuda_stream);
    case DataType::kBfloat16:
      return LaunchForType<__nv_bfloat16>(params, cuda_stream);
    default:
      return "decode_attention on CUDA takes float16 or bfloat16";
  }
}

}  // namespace kogpt
