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
//            scales and rounded, as the weights are.
//   softmax  online (Milakov and Gimelshein 2018), in powers of two. Sums are rescaled only when a
//            row's maximum has grown by more than 8: until then weights are up to 2^8 too large,
//            which f32 sums and 16-bit weights hold as exactly.
//
// Which keys a tile goes through, in which order, depends on its row alone: so do a row's bits.
//
// Limits: head_dim 64, 128 or 256; pages of a multiple of 64 tokens.

#include <climits>

#include "prefill_attention_hopper.cuh"
#include "prefill_attention_portable.cuh"

#if __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "Compute capability 9.0 takes sm_90a"
#endif

namespace kogpt {
namespace {

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
  const char* message =
      DescribeBoxes(&hopper.q, params.qkv, params.total_tokens, params.qkv_dim, 2, kBoxTokens);
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
