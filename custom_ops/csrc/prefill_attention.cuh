// What the two kernels of prefill_attention share: their arguments, rotation, and which of them a
// call takes.
#ifndef CUSTOM_OPS_PREFILL_ATTENTION_CUH_
#define CUSTOM_OPS_PREFILL_ATTENTION_CUH_

#include <algorithm>

#include "cuda_common.cuh"
#include "prefill_attention.h"

namespace kogpt {

// Keys or queries that are copied together: they share a page.
inline constexpr int kBoxTokens = 64;

struct PrefillArgs {
  const void* qkv;
  const float* cos;
  const float* sin;
  void* k_pages;
  void* v_pages;
  float* k_scales;  // of INT8 pages
  float* v_scales;
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
  int qkv_dim;
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

__device__ __forceinline__ Row ReadRow(const PrefillArgs& args, int row) {
  Row result;
  const int capacity = args.max_pages * args.page_len;
  result.begin = min(max(__ldcg(args.begins + row), 0), args.total_tokens);
  result.length = min(max(__ldcg(args.lengths + row), 0), capacity);
  result.num_new = min(max(__ldcg(args.num_new + row), 0),
                       min(args.total_tokens - result.begin, capacity - result.length));
  return result;
}

// Queries that a block of attention takes, in the code that runs on this device.
inline int TileQueries(const KernelTraits& traits) {
  return HasWgmma(traits) ? 2 * kBoxTokens : kBoxTokens;
}

inline int64_t MaxTiles(const PrefillAttentionParams& params, int64_t tile_queries) {
  const int64_t max_new = std::min(params.max_new, params.total_tokens);
  return std::min(params.total_tokens / tile_queries + params.batch,
                  params.batch * ((max_new + tile_queries - 1) / tile_queries));
}

inline PrefillArgs ArgsOf(const PrefillAttentionParams& params, int tile_queries) {
  PrefillArgs args;
  args.qkv = params.qkv;
  args.qkv_dim = static_cast<int>(params.qkv_dim);
  args.cos = params.cos;
  args.sin = params.sin;
  args.k_pages = params.k_pages;
  args.v_pages = params.v_pages;
  args.k_scales = params.k_scales;
  args.v_scales = params.v_scales;
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
  args.log2_scale = 1.4426950408889634f / sqrtf(static_cast<float>(params.head_dim));
  return args;
}

// The parameters' types and head_dim, as template arguments of a kernel.
template <typename T, typename PageT, int kHeadDimValue>
struct PrefillKind {
  using Value = T;
  using PageValue = PageT;  // T or int8_t
  static constexpr int kHeadDim = kHeadDimValue;
};

// Calls run(PrefillKind) if there is anything to do.
template <typename Run>
const char* ForPrefillKind(const PrefillAttentionParams& params, Run run) {
  if (params.batch == 0 || params.total_tokens == 0) return nullptr;
  const auto for_types = [&](auto value, auto page_value) {
    using T = decltype(value);
    using PageT = decltype(page_value);
    switch (params.head_dim) {
      case 64:
        return run(PrefillKind<T, PageT, 64>());
      case 128:
        return run(PrefillKind<T, PageT, 128>());
      case 256:
        return run(PrefillKind<T, PageT, 256>());
      default:
        return "prefill_attention on CUDA takes a head_dim of 64, 128 or 256";
    }
  };
  const auto for_type = [&](auto value) {
    return params.k_scales != nullptr ? for_types(value, int8_t()) : for_types(value, value);
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

}  // namespace kogpt

#endif  // CUSTOM_OPS_PREFILL_ATTENTION_CUH_
