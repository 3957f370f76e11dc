// `kogpt_decode_attention`: buffers to DecodeAttentionParams.
#include <cstdint>
#include <string>

#include "decode_attention.h"
#include "ffi_helpers.h"

namespace kogpt {
namespace {

ffi::Error DecodeAttentionImpl(Executor executor, Buffer qkv, Buffer cos, Buffer sin,
                               Buffer k_pages, Buffer k_scales, Buffer v_pages, Buffer v_scales,
                               Buffer page_table, Buffer lengths, Buffer num_new, Buffer act,
                               Buffer semaphores, ResultBuffer act_out, ResultBuffer k_pages_out,
                               ResultBuffer k_scales_out, ResultBuffer v_pages_out,
                               ResultBuffer v_scales_out, ResultBuffer partials,
                               ResultBuffer semaphores_out, bool prefetch_cache, bool leaves_room) {
  Checks check("kogpt_decode_attention");
  check.Dtype("qkv", qkv, {ffi::F32, ffi::F16, ffi::BF16});
  check.Rank("k_pages", k_pages, 4);
  check.Rank("page_table", page_table, 2);
  check.Rank("cos", cos, 2);
  check.Rank("act", act, 2);
  if (check.failed()) return check.error();

  const ffi::DataType dtype = qkv.element_type();
  const ffi::DataType pages_dtype = k_pages.element_type();
  const bool is_int8 = pages_dtype == ffi::S8;
  const int64_t num_pages = k_pages.dimensions()[0];
  const int64_t num_heads = k_pages.dimensions()[1];
  const int64_t page_len = k_pages.dimensions()[2];
  const int64_t head_dim = k_pages.dimensions()[3];
  const int64_t batch = page_table.dimensions()[0];
  const int64_t max_pages = page_table.dimensions()[1];
  const int64_t half_rotary_dim = cos.dimensions()[1];
  const int64_t act_dim = act.dimensions()[1];

  check.Dtype("k_pages", k_pages, {dtype, ffi::S8});
  check.Shape("qkv", qkv, {batch, 3 * num_heads * head_dim});
  check.Dtype("cos", cos, {ffi::F32});
  check.Shape("cos", cos, {batch, half_rotary_dim});
  check.Dtype("sin", sin, {ffi::F32});
  check.Shape("sin", sin, {batch, half_rotary_dim});
  check.Dtype("v_pages", v_pages, {pages_dtype});
  check.Shape("v_pages", v_pages, {num_pages, num_heads, page_len, head_dim});
  check.PageScales("k_scales", k_scales, is_int8, {num_pages, num_heads, page_len, 1});
  check.PageScales("v_scales", v_scales, is_int8, {num_pages, num_heads, page_len, 1});
  check.Dtype("page_table", page_table, {ffi::S32});
  check.Dtype("lengths", lengths, {ffi::S32});
  check.Shape("lengths", lengths, {batch});
  check.Dtype("num_new", num_new, {ffi::S32});
  check.Shape("num_new", num_new, {batch});
  check.Dtype("act", act, {dtype});
  check.Shape("act", act, {batch, act_dim});
  check.Dtype("semaphores", semaphores, {ffi::S32});
  check.Shape("semaphores", semaphores, {kNumSemaphores});

  check.Dtype("result act", *act_out, {dtype});
  check.Shape("result act", *act_out, {batch, act_dim});
  check.Aliased("act", act, *act_out);
  check.Dtype("result k_pages", *k_pages_out, {pages_dtype});
  check.Shape("result k_pages", *k_pages_out, {num_pages, num_heads, page_len, head_dim});
  check.Aliased("k_pages", k_pages, *k_pages_out);
  check.Dtype("result v_pages", *v_pages_out, {pages_dtype});
  check.Shape("result v_pages", *v_pages_out, {num_pages, num_heads, page_len, head_dim});
  check.Aliased("v_pages", v_pages, *v_pages_out);
  check.PageScales("result k_scales", *k_scales_out, is_int8, {num_pages, num_heads, page_len, 1});
  check.PageScales("result v_scales", *v_scales_out, is_int8, {num_pages, num_heads, page_len, 1});
  if (is_int8) {
    check.Aliased("k_scales", k_scales, *k_scales_out);
    check.Aliased("v_scales", v_scales, *v_scales_out);
  }
  check.Dtype("result partials", *partials, {ffi::F32});
  check.Rank("result partials", *partials, 1);
  check.Dtype("result semaphores", *semaphores_out, {ffi::S32});
  check.Shape("result semaphores", *semaphores_out, {kNumSemaphores});
  check.Aliased("semaphores", semaphores, *semaphores_out);
  if (check.failed()) return check.error();

  DecodeAttentionParams params = {};
  params.batch = batch;
  params.num_heads = num_heads;
  params.head_dim = head_dim;
  params.page_len = page_len;
  params.num_pages = num_pages;
  params.max_pages = max_pages;
  params.rotary_dim = 2 * half_rotary_dim;
  params.act_dim = act_dim;
  params.dtype = *ToDataType(dtype);
  params.qkv = DataOrNull<const void>(qkv);
  params.cos = DataOrNull<const float>(cos);
  params.sin = DataOrNull<const float>(sin);
  params.k_pages = DataOrNull<void>(*k_pages_out);
  params.v_pages = DataOrNull<void>(*v_pages_out);
  params.k_scales = DataOrNull<float>(*k_scales_out);
  params.v_scales = DataOrNull<float>(*v_scales_out);
  params.page_table = DataOrNull<const int32_t>(page_table);
  params.lengths = DataOrNull<const int32_t>(lengths);
  params.num_new = DataOrNull<const int32_t>(num_new);
  params.act = DataOrNull<void>(*act_out);
  params.partials = DataOrNull<float>(*partials);
  params.partials_bytes = static_cast<int64_t>(partials->size_bytes());
  params.semaphores = DataOrNull<int32_t>(*semaphores_out);
  params.prefetch_cache = prefetch_cache;
  params.leaves_room = leaves_room;
  check.Message(CheckDecodeAttention(params));
  if (check.failed()) return check.error();

#ifdef KOGPT_CUDA
  check.That(params.partials_bytes >= DecodeAttentionPartialsBytes(params), "result partials",
             "have at least " + std::to_string(DecodeAttentionPartialsBytes(params)) + " bytes",
             std::to_string(params.partials_bytes));
  if (check.failed()) return check.error();
  if (const char* message = LaunchDecodeAttention(params, executor)) {
    return ffi::Error::Internal(std::string("kogpt_decode_attention: ") + message);
  }
#else
  DecodeAttentionCpu(params, MakeParallelFor(executor));
#endif
  return ffi::Error::Success();
}

}  // namespace
}  // namespace kogpt

extern "C" KOGPT_EXPORT XLA_FFI_Error* DecodeAttention(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeAttention, kogpt::DecodeAttentionImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<kogpt::ExecutorContext>()
                                  .Arg<kogpt::Buffer>()  // qkv
                                  .Arg<kogpt::Buffer>()  // cos
                                  .Arg<kogpt::Buffer>()  // sin
                                  .Arg<kogpt::Buffer>()  // k_pages
                                  .Arg<kogpt::Buffer>()  // k_scales
                                  .Arg<kogpt::Buffer>()  // v_pages
                                  .Arg<kogpt::Buffer>()  // v_scales
                                  .Arg<kogpt::Buffer>()  // page_table
                                  .Arg<kogpt::Buffer>()  // lengths
                                  .Arg<kogpt::Buffer>()  // num_new
                                  .Arg<kogpt::Buffer>()  // act
                                  .Arg<kogpt::Buffer>()  // semaphores
                                  .Ret<kogpt::Buffer>()  // act, aliased
                                  .Ret<kogpt::Buffer>()  // k_pages, aliased
                                  .Ret<kogpt::Buffer>()  // k_scales, aliased
                                  .Ret<kogpt::Buffer>()  // v_pages, aliased
                                  .Ret<kogpt::Buffer>()  // v_scales, aliased
                                  .Ret<kogpt::Buffer>()  // partials: scratch
                                  .Ret<kogpt::Buffer>()  // semaphores, aliased
                                  .Attr<bool>("prefetch_cache")
                                  .Attr<bool>("leaves_room"),
                              kogpt::kHandlerTraits);
