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
// INT8 pages have a kernel of their own, which cuts and combines alike: decode_attention_int8.cuh.
//
// Limits: head_dim 64, 128 or 256; pages of a multiple of 16 tokens.

#include <algorithm>

#include "decode_attention.cuh"
#include "decode_attention.h"
#include "decode_attention_int8.cuh"

namespace kogpt {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpKeys = 8;
static_assert(kWarps * kWarpKeys == kSplitKeys);
constexpr int kBlocksPerMultiprocessor = 2;  // that run at once
// Up to these, of 64 keys, attention is short enough to hide behind a product with half the blocks.
constexpr int kMaxRoomySplits = 4;
// A head's blocks are a cluster where they are few enough for any device, and its parts for the
// shared memory that the blocks of a product leave.
constexpr int kMaxClusterSize = 8;
constexpr int kMaxClusterParts = 8;
constexpr int kMaxClusterBlocks = 2;  // a multiprocessor: more clusters are slow to find room
constexpr float kLog2E = 1.4426950408889634f;

// Where blocks are few and short, they have fewer registers, so that they find room beside those of a
// product: on a quarter of a multiprocessor two warps, and three of a product with 96.
constexpr int kManyRegisters = 128;
constexpr int kFewRegisters = 112;

// `kDigits`: of act's integers, or 0.
template <typename T, int kHeadDim, int kRegisters, int kDigits>
__global__ void __maxnreg__(kRegisters)
    DecodeAttentionKernel(const __grid_constant__ DecodeAttentionArgs args) {
  constexpr int kLanesPerKey = kHeadDim / 8;
  constexpr int kKeysPerLoad = kWarpSize / kLanesPerKey;
  constexpr int kLoads = kWarpKeys / kKeysPerLoad;
  __shared__ float outputs[kWarps][kHeadDim];
  __shared__ float maxima[kWarps], sums[kWarps];
  extern __shared__ float
      cluster_parts[];  // of the first block of a cluster: [split, head_dim + 2]

  LaunchDependents();
#if __CUDA_ARCH__ >= 900
  if (args.is_cluster) ClusterArrive();  // the first block's shared memory is there
#endif

  const int row = blockIdx.y / args.num_heads;
  const int head = blockIdx.y % args.num_heads;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  // This lane's dimensions of every key that it meets, and the key within a load.
  const int dim = lane * 8 % kHeadDim;
  const int lane_key = lane / kLanesPerKey;
  const int64_t head_stride = static_cast<int64_t>(args.num_heads) * kHeadDim;

  // Where this lane's part of its warp's keys of a split lies in the pages.
  const auto cache_offset = [&](int split) {
    return args.SlotOf(row, head, split * kSplitKeys + warp * kWarpKeys) * kHeadDim + lane * 8;
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
  position = args.PositionOf(row);
  load_first();
  if (args.prefetch_cache) {
    WaitForDependency();
    const int foreseen = position;
    position = args.PositionOf(row);
    if (position != foreseen) load_first();
  }

  const T* qkv = static_cast<const T*>(args.qkv) + row * 3 * head_stride + head * kHeadDim + dim;
  const uint4 q_bits = __ldcg(reinterpret_cast<const uint4*>(qkv));
  const Rotation rotation(args, row, dim);

  if constexpr (kDigits > 0) args.RoundShare<T, kDigits>();

  const int own_dim = threadIdx.x < kHeadDim ? threadIdx.x : kHeadDim;
  if (position < 0) {
    constexpr float kZero[1] = {0.0f};
    if (blockIdx.x == 0) StoreHead<T, kHeadDim, kDigits>(args, row, head, own_dim, kZero);
    return;
  }
  const int num_splits = position / kSplitKeys + 1;
  if (static_cast<int>(blockIdx.x) >= num_splits) return;

  float q[8];
  Unpack<T>(rotation.Rotate<T>(q_bits), q);
#pragma unroll
  for (int i = 0; i < 8; ++i) q[i] *= args.log2_scale;

  HeadSum<kHeadDim, 1> total(args, static_cast<int64_t>(row) * args.num_heads + head, num_splits,
                             own_dim, cluster_parts);
  for (int split = blockIdx.x; split < num_splits; split += gridDim.x) {
    const int first_key = split * kSplitKeys + warp * kWarpKeys;
    if (first_key <= position && position < first_key + kWarpKeys) {
      const uint4 k_new =
          rotation.Rotate<T>(__ldcg(reinterpret_cast<const uint4*>(qkv + head_stride)));
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

    Softmax<1> part;
    part.maximum = maxima[0];  // of a split's warps the first has a key
#pragma unroll
    for (int w = 1; w < kWarps; ++w) part.maximum = fmaxf(part.maximum, maxima[w]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float rescale = exp2f(maxima[w] - part.maximum);
      part.sum += sums[w] * rescale;
      if (threadIdx.x < kHeadDim) part.output[0] += outputs[w][threadIdx.x] * rescale;
    }
    total.Add(split, part);
  }
  total.template Write<T, kDigits>(args, row, head);
}

int64_t SplitsOf(const DecodeAttentionParams& params) {
  return (params.max_pages * params.page_len + kSplitKeys - 1) / kSplitKeys;
}

// `takes_heads`: the kernel's blocks may go through several heads. kShortKernel: where blocks are few
// and short.
template <auto kKernel, auto kShortKernel, int kHeadDim>
const char* LaunchKernel(const DecodeAttentionParams& params, int threads, int shared_bytes,
                         int blocks_per_multiprocessor, bool takes_heads, cudaStream_t stream) {
  constexpr int kPartBytes = (kHeadDim + 2) * static_cast<int>(sizeof(float));
  const auto most_bytes = [shared_bytes](bool is_hopper) {
    return shared_bytes + (is_hopper ? kMaxClusterParts * kPartBytes : 0);
  };
  const KernelTraits& traits = TraitsOf<kKernel>(most_bytes);
  const KernelTraits& short_traits = TraitsOf<kShortKernel>(most_bytes);
  for (const KernelTraits& each : {traits, short_traits}) {
    if (each.error != cudaSuccess) return MessageOf(each.error);
  }
  DecodeAttentionArgs args;
  args.qkv = params.qkv;
  args.cos = params.cos;
  args.sin = params.sin;
  args.k_pages = params.k_pages;
  args.v_pages = params.v_pages;
  args.k_scales = params.k_scales;
  args.v_scales = params.v_scales;
  args.page_table = params.page_table;
  args.lengths = params.lengths;
  args.num_new = params.num_new;
  args.act = params.act;
  args.partials = params.partials;
  args.semaphores = params.semaphores;
  args.batch_heads = static_cast<int>(params.batch * params.num_heads);
  args.num_heads = static_cast<int>(params.num_heads);
  args.page_len = static_cast<int>(params.page_len);
  args.max_pages = static_cast<int>(params.max_pages);
  args.max_splits = static_cast<int>(SplitsOf(params));
  args.rotary_dim = static_cast<int>(params.rotary_dim);
  args.act_dim = static_cast<int>(params.act_dim);
  args.log2_scale = kLog2E / sqrtf(static_cast<float>(kHeadDim));
  // As many blocks as run at once, if there is work for them: more would wait, and a head that a
  // block has to itself needs no scratch. One a multiprocessor leaves room for one of a product.
  // (Of INT8 pages nobody has measured it.)
  if (params.leaves_room && args.max_splits <= kMaxRoomySplits && params.k_scales == nullptr) {
    blocks_per_multiprocessor = 1;
  }
  const int64_t num_blocks = blocks_per_multiprocessor * traits.num_multiprocessors;
  const int64_t splits = std::clamp<int64_t>(num_blocks / args.batch_heads, 1, SplitsOf(params));
  const int64_t heads_per_block =
      takes_heads && splits == 1 ? (args.batch_heads + num_blocks - 1) / num_blocks : 1;
  const bool is_short = args.max_splits <= kMaxClusterParts &&
                        splits * args.batch_heads <= kMaxClusterBlocks * traits.num_multiprocessors;
  args.is_cluster = traits.is_hopper && splits > 1 && splits <= kMaxClusterSize && is_short;
  args.prefetch_cache = params.prefetch_cache;
  args.rounded = {params.act,
                  params.rounded.k_multiplier,
                  params.rounded.digits,
                  params.rounded.scales,
                  static_cast<int>(params.batch),
                  args.act_dim};
  const dim3 grid(
      static_cast<unsigned>(splits),
      static_cast<unsigned>((args.batch_heads + heads_per_block - 1) / heads_per_block));
  if (args.is_cluster) shared_bytes += args.max_splits * kPartBytes;
  const int cluster_size = args.is_cluster ? static_cast<int>(splits) : 1;
  return MessageOf(
      is_short ? Launch<kShortKernel>(short_traits, grid, threads, shared_bytes, stream, args,
                                      cluster_size)
               : Launch<kKernel>(traits, grid, threads, shared_bytes, stream, args, cluster_size));
}

template <typename T, int kHeadDim, int kDigits>
const char* LaunchForDigits(const DecodeAttentionParams& params, cudaStream_t stream) {
  return params.k_scales != nullptr
             ? LaunchKernel<DecodeAttentionInt8Kernel<T, kHeadDim, kDigits>,
                            DecodeAttentionInt8Kernel<T, kHeadDim, kDigits>, kHeadDim>(
                   params, int8::kThreads, 3 * int8::Tile<kHeadDim>::kBytes,
                   int8::kBlocksPerMultiprocessor, true, stream)
             : LaunchKernel<DecodeAttentionKernel<T, kHeadDim, kManyRegisters, kDigits>,
                            DecodeAttentionKernel<T, kHeadDim, kFewRegisters, kDigits>, kHeadDim>(
                   params, kThreads, 0, kBlocksPerMultiprocessor, false, stream);
}

template <typename T, int kHeadDim>
const char* LaunchForHeadDim(const DecodeAttentionParams& params, cudaStream_t stream) {
  if constexpr (kHeadDim == kDigitGroup) {
    if (params.rounded.num_digits == 1) return LaunchForDigits<T, kHeadDim, 1>(params, stream);
    if (params.rounded.num_digits == 2) return LaunchForDigits<T, kHeadDim, 2>(params, stream);
  }
  return LaunchForDigits<T, kHeadDim, 0>(params, stream);
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
  static_assert(kNumSemaphores - kNumMarkSemaphores == 65534);
  if (params.batch * params.num_heads > kNumSemaphores - kNumMarkSemaphores) {
    return "decode_attention on CUDA takes at most 65534 heads in a batch";
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
