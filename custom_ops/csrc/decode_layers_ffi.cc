// `kogpt_decode_layers`: buffers to DecodeLayersParams.
#include "decode_layers_ffi.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#ifdef KOGPT_CUDA
#include "cuda_graph.h"
#endif

namespace kogpt {
namespace {

// As the header lists them.
constexpr size_t kFixedArgs = 7;
constexpr size_t kFixedResults = 10;
constexpr size_t kLayerArgs = 13;
constexpr size_t kLayerResults = 4;

class DecodeLayersBuffers {
 public:
  DecodeLayersBuffers(const ffi::RemainingArgs& args, const ffi::RemainingRets& results)
      : args_(args), results_(results) {}

  size_t num_layers() const {
    return args_.size() < kFixedArgs ? 0 : (args_.size() - kFixedArgs) / kLayerArgs;
  }
  bool fit() const {
    return num_layers() > 0 && args_.size() == kFixedArgs + num_layers() * kLayerArgs &&
           results_.size() == kFixedResults + num_layers() * kLayerResults;
  }
  Buffer Arg(size_t index) const { return *args_.get<Buffer>(index); }
  Buffer Result(size_t index) const { return **results_.get<Buffer>(index); }
  Buffer LayerArg(size_t layer, size_t index) const {
    return Arg(kFixedArgs + layer * kLayerArgs + index);
  }
  Buffer LayerResult(size_t layer, size_t index) const {
    return Result(kFixedResults + layer * kLayerResults + index);
  }

 private:
  const ffi::RemainingArgs& args_;
  const ffi::RemainingRets& results_;
};

}  // namespace

ffi::Error TakeDecodeLayers(const ffi::RemainingArgs& args, const ffi::RemainingRets& results,
                            const DecodeLayersSizes& sizes, const DecodeLayersAttrs& attrs,
                            Checks* check, DecodeLayersParams* params,
                            std::vector<DecodeLayer>* layers) {
  const DecodeLayersBuffers buffers(args, results);
  check->That(buffers.fit(), "layers", "have 13 arrays and 4 results each",
              std::to_string(args.size()) + " and " + std::to_string(results.size()) +
                  ", with 7 and 10 in front");
  if (check->failed()) return check->error();
  const Buffer page_table = buffers.Arg(0), semaphores = buffers.Arg(1);
  const Buffer lm_head = buffers.Arg(2), lm_head_scale = buffers.Arg(3);
  const Buffer lm_head_bias = buffers.Arg(4);
  const Buffer ln_f_scale = buffers.Arg(5), ln_f_bias = buffers.Arg(6);
  const Buffer y = buffers.Result(0), logits = buffers.Result(1);
  const Buffer semaphores_out = buffers.Result(2), other_x = buffers.Result(3);
  const Buffer qkv = buffers.Result(4), act = buffers.Result(5), h = buffers.Result(6);
  const Buffer part = buffers.Result(7), linear_partials = buffers.Result(8);
  const Buffer attention_partials = buffers.Result(9);
  check->Rank("page_table", page_table, 2);
  check->Rank("w_in", buffers.LayerArg(0, 2), 2);
  check->Rank("k_pages", buffers.LayerArg(0, 9), 4);
  if (check->failed()) return check->error();

  const int64_t rows = sizes.rows, model_dim = sizes.model_dim;
  const Buffer pages = buffers.LayerArg(0, 9);
  const ffi::DataType pages_dtype = pages.element_type();
  const int64_t num_pages = pages.dimensions()[0];
  const int64_t num_heads = pages.dimensions()[1];
  const int64_t page_len = pages.dimensions()[2];
  const int64_t head_dim = pages.dimensions()[3];
  const int64_t attention_dim = num_heads * head_dim;
  const int64_t in_dim = buffers.LayerArg(0, 2).dimensions()[0];
  const int64_t ffn_dim = in_dim - 3 * attention_dim;
  const int64_t act_dim = attention_dim + ffn_dim;
  const int64_t max_pages = page_table.dimensions()[1];
  const ffi::DataType dtype = buffers.LayerArg(0, 0).element_type();
  const ffi::DataType weight_dtype = buffers.LayerArg(0, 2).element_type();
  const bool is_quantized = weight_dtype == ffi::S8;
  const bool is_int8_cache = pages_dtype == ffi::S8;
  const bool has_head = !IsAbsent(lm_head);
  const bool has_group = attrs.group_size > 1;
  check->Dtype("ln_scale", buffers.LayerArg(0, 0), {ffi::F32, ffi::F16, ffi::BF16});
  check->Dtype("w_in", buffers.LayerArg(0, 2), {dtype, ffi::S8});
  check->Dtype("k_pages", pages, {dtype, ffi::S8});
  if (ffn_dim < 1) {
    check->That(false, "w_in", "have more outputs than q, k and v", std::to_string(in_dim));
  }
  if (check->failed()) return check->error();

  check->Dtype("page_table", page_table, {ffi::S32});
  check->Shape("page_table", page_table, {rows, max_pages});
  check->Dtype("semaphores", semaphores, {ffi::S32});
  check->Shape("semaphores", semaphores, {kNumSemaphores});
  check->Dtype("result semaphores", semaphores_out, {ffi::S32});
  check->Shape("result semaphores", semaphores_out, {kNumSemaphores});
  check->Aliased("semaphores", semaphores, semaphores_out);

  layers->resize(buffers.num_layers());
  for (size_t i = 0; i < layers->size(); ++i) {
    DecodeLayer& layer = (*layers)[i];
    size_t next = 0;
    const auto take = [&](const char* name, ffi::DataType of,
                          std::initializer_list<int64_t> shape) {
      const Buffer buffer = buffers.LayerArg(i, next++);
      check->Dtype(name, buffer, {of});
      check->Shape(name, buffer, shape);
      return DataOrNull<void>(buffer);
    };
    const auto take_scales = [&](const char* name, int64_t num_outputs) {
      const int64_t size = is_quantized ? num_outputs : 0;
      return static_cast<const float*>(take(name, ffi::F32, {size}));
    };
    layer.ln_scale = take("ln_scale", dtype, {model_dim});
    layer.ln_bias = take("ln_bias", dtype, {model_dim});
    layer.w_in = take("w_in", weight_dtype, {in_dim, model_dim});
    layer.w_in_scale = take_scales("w_in_scale", in_dim);
    layer.b_ffn_in = take("b_ffn_in", dtype, {ffn_dim});
    layer.w_out = take("w_out", weight_dtype, {model_dim, act_dim});
    layer.w_out_scale = take_scales("w_out_scale", model_dim);
    const Buffer multiplier = buffers.LayerArg(i, next++);
    check->Dtype("k_multiplier", multiplier, {ffi::F32});
    check->OptionalShape("k_multiplier", multiplier, {act_dim});
    layer.k_multiplier = DataOrNull<const float>(multiplier);
    layer.b_ffn_out = take("b_ffn_out", dtype, {model_dim});
    const auto take_pages = [&](const char* name, const char* scales_name, size_t result,
                                void** values, float** scales) {
      const Buffer buffer = buffers.LayerArg(i, next);
      *values = take(name, pages_dtype, {num_pages, num_heads, page_len, head_dim});
      check->Dtype(name, buffers.LayerResult(i, result), {pages_dtype});
      check->Shape(name, buffers.LayerResult(i, result),
                   {num_pages, num_heads, page_len, head_dim});
      check->Aliased(name, buffer, buffers.LayerResult(i, result));
      const Buffer scale_buffer = buffers.LayerArg(i, next++);
      check->PageScales(scales_name, scale_buffer, is_int8_cache,
                        {num_pages, num_heads, page_len, 1});
      check->PageScales(scales_name, buffers.LayerResult(i, result + 1), is_int8_cache,
                        {num_pages, num_heads, page_len, 1});
      if (is_int8_cache)
        check->Aliased(scales_name, scale_buffer, buffers.LayerResult(i, result + 1));
      *scales = DataOrNull<float>(scale_buffer);
    };
    take_pages("k_pages", "k_scales", 0, &layer.k_pages, &layer.k_scales);
    take_pages("v_pages", "v_scales", 2, &layer.v_pages, &layer.v_scales);
    if (check->failed()) return check->error();
  }

  int64_t vocab_size = 0;
  if (has_head) {
    check->Rank("lm_head", lm_head, 2);
    if (check->failed()) return check->error();
    vocab_size = lm_head.dimensions()[0];
    check->Dtype("lm_head", lm_head, {weight_dtype});
    check->Shape("lm_head", lm_head, {vocab_size, model_dim});
    check->Dtype("lm_head_scale", lm_head_scale, {ffi::F32});
    check->Shape("lm_head_scale", lm_head_scale, {is_quantized ? vocab_size : 0});
    check->Dtype("lm_head_bias", lm_head_bias, {dtype});
    check->Shape("lm_head_bias", lm_head_bias, {vocab_size});
    check->Dtype("ln_f_scale", ln_f_scale, {dtype});
    check->Shape("ln_f_scale", ln_f_scale, {model_dim});
    check->Dtype("ln_f_bias", ln_f_bias, {dtype});
    check->Shape("ln_f_bias", ln_f_bias, {model_dim});
    check->Shape("result logits", logits, {rows, vocab_size});
  }
  check->Dtype("result y", y, {ffi::F32});
  check->Shape("result y", y, {rows, model_dim});
  check->Dtype("result logits", logits, {ffi::F32});
  check->Dtype("result other_x", other_x, {ffi::F32});
  check->Shape("result other_x", other_x, {rows, model_dim});
  check->Dtype("result qkv", qkv, {dtype});
  check->Shape("result qkv", qkv, {rows, 3 * attention_dim});
  check->Dtype("result act", act, {dtype});
  check->Shape("result act", act, {rows, act_dim});
  check->Dtype("result h", h, {dtype});
  check->Shape("result h", h, {rows, std::max(model_dim, act_dim)});
  check->Dtype("result part", part, {ffi::F32});
  check->Shape("result part", part, {has_group ? rows : 0, model_dim});
  check->Dtype("result linear_partials", linear_partials, {ffi::F32});
  check->Dtype("result attention_partials", attention_partials, {ffi::F32});
  if (has_group) {
    check->That(attrs.devices.size() > 0 && attrs.devices.size() % attrs.group_size == 0, "devices",
                "be groups of " + std::to_string(attrs.group_size),
                std::to_string(attrs.devices.size()) + " devices");
    check->That(attrs.timeout_ms >= 1, "timeout_ms", "be at least 1",
                std::to_string(attrs.timeout_ms));
  }
  if (check->failed()) return check->error();

  std::memset(static_cast<void*>(params), 0, sizeof(*params));  // a part of a key
  params->rows = rows;
  params->model_dim = model_dim;
  params->ffn_dim = ffn_dim;
  params->num_heads = num_heads;
  params->head_dim = head_dim;
  params->page_len = page_len;
  params->num_pages = num_pages;
  params->max_pages = max_pages;
  params->rotary_dim = 2 * sizes.half_rotary_dim;
  params->vocab_size = vocab_size;
  params->dtype = *ToDataType(dtype);
  params->weight_dtype = *ToDataType(weight_dtype);
  params->epsilon = attrs.epsilon;
  params->prefetch_weights = attrs.prefetch_weights;
  params->int8_activations = attrs.int8_activations;
  params->layers = layers->data();
  params->num_layers = static_cast<int64_t>(layers->size());
  params->page_table = DataOrNull<const int32_t>(page_table);
  if (has_head) {
    params->lm_head = DataOrNull<const void>(lm_head);
    params->lm_head_scale = DataOrNull<const float>(lm_head_scale);
    params->lm_head_bias = DataOrNull<const void>(lm_head_bias);
    params->ln_f_scale = DataOrNull<const void>(ln_f_scale);
    params->ln_f_bias = DataOrNull<const void>(ln_f_bias);
    params->logits = DataOrNull<float>(logits);
  }
  params->y = DataOrNull<float>(y);
  params->other_x = DataOrNull<float>(other_x);
  params->qkv = DataOrNull<void>(qkv);
  params->act = DataOrNull<void>(act);
  params->h = DataOrNull<void>(h);
  params->part = DataOrNull<float>(part);
  params->linear_partials = DataOrNull<float>(linear_partials);
  params->linear_partials_bytes = static_cast<int64_t>(linear_partials.size_bytes());
  params->attention_partials = DataOrNull<float>(attention_partials);
  params->attention_partials_bytes = static_cast<int64_t>(attention_partials.size_bytes());
  params->semaphores = DataOrNull<int32_t>(semaphores_out);
  params->timeout_ms = attrs.timeout_ms;

  if (!has_group) return ffi::Error::Success();
#ifdef KOGPT_CUDA
  std::string error;
  params->group = FindOwnGroup(attrs.devices.begin(), attrs.devices.size(), attrs.group_size,
                               &params->rank, &error);
  return params->group == nullptr ? check->Internal(error) : ffi::Error::Success();
#else
  return check->Internal("there is no sum over devices on a CPU");
#endif
}

#ifdef KOGPT_CUDA

DecodeOps DecodeOpsOn(void* stream) {
  return {LinearHasIntegers(),
          [stream](const LinearParams& linear) -> const char* {
            if (linear.partials_bytes < LinearPartialsBytes(linear.rows)) {
              return "result linear_partials is too small";
            }
            return LaunchLinear(linear, stream);
          },
          [stream](const DecodeAttentionParams& attention) -> const char* {
            if (attention.partials_bytes < DecodeAttentionPartialsBytes(attention)) {
              return "result attention_partials is too small";
            }
            return LaunchDecodeAttention(attention, stream);
          },
          [stream](const AllReduceParams& sum) { return LaunchAllReduce(sum, stream); }};
}

#else

DecodeOps DecodeOpsOn(const ParallelFor& parallel_for) {
  return {false,
          [&parallel_for](const LinearParams& linear) -> const char* {
            LinearCpu(linear, parallel_for);
            return nullptr;
          },
          [&parallel_for](const DecodeAttentionParams& attention) -> const char* {
            DecodeAttentionCpu(attention, parallel_for);
            return nullptr;
          },
          nullptr};
}

#endif

namespace {

ffi::Error DecodeLayersImpl(Executor executor, Buffer x, Buffer cos, Buffer sin, Buffer lengths,
                            Buffer num_new, ffi::RemainingArgs args, ffi::RemainingRets results,
                            float epsilon, bool prefetch_weights, bool int8_activations,
                            ffi::Span<const int64_t> devices, int64_t group_size,
                            int64_t timeout_ms) {
  Checks check("kogpt_decode_layers");
  check.Rank("x", x, 2);
  check.Rank("cos", cos, 2);
  if (check.failed()) return check.error();
  const DecodeLayersSizes sizes = {x.dimensions()[0], x.dimensions()[1], cos.dimensions()[1]};
  check.Dtype("x", x, {ffi::F32});
  check.Dtype("cos", cos, {ffi::F32});
  check.Shape("cos", cos, {sizes.rows, sizes.half_rotary_dim});
  check.Dtype("sin", sin, {ffi::F32});
  check.Shape("sin", sin, {sizes.rows, sizes.half_rotary_dim});
  check.Dtype("lengths", lengths, {ffi::S32});
  check.Shape("lengths", lengths, {sizes.rows});
  check.Dtype("num_new", num_new, {ffi::S32});
  check.Shape("num_new", num_new, {sizes.rows});
  if (check.failed()) return check.error();

  DecodeLayersParams params;
  std::vector<DecodeLayer> layers;
  const DecodeLayersAttrs attrs = {epsilon, prefetch_weights, int8_activations,
                                   devices, group_size,       timeout_ms};
  if (ffi::Error error = TakeDecodeLayers(args, results, sizes, attrs, &check, &params, &layers);
      error.failure()) {
    return error;
  }
  params.x = DataOrNull<const float>(x);
  params.cos = DataOrNull<const float>(cos);
  params.sin = DataOrNull<const float>(sin);
  params.lengths = DataOrNull<const int32_t>(lengths);
  params.num_new = DataOrNull<const int32_t>(num_new);

#ifdef KOGPT_CUDA
  const char* message = EnqueueAsGraph(KeyOf(params), executor, [&](void* stream) {
    return RunDecodeLayers(params, DecodeOpsOn(stream));
  });
#else
  const ParallelFor parallel_for = MakeParallelFor(executor);
  const char* message = RunDecodeLayers(params, DecodeOpsOn(parallel_for));
#endif
  return message == nullptr ? ffi::Error::Success() : check.Internal(message);
}

}  // namespace
}  // namespace kogpt

extern "C" KOGPT_EXPORT XLA_FFI_Error* DecodeLayers(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeLayers, kogpt::DecodeLayersImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<kogpt::ExecutorContext>()
                                  .Arg<kogpt::Buffer>()  // x
                                  .Arg<kogpt::Buffer>()  // cos
                                  .Arg<kogpt::Buffer>()  // sin
                                  .Arg<kogpt::Buffer>()  // lengths
                                  .Arg<kogpt::Buffer>()  // num_new
                                  .RemainingArgs()       // as decode_layers_ffi.h lists them
                                  .RemainingRets()
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("prefetch_weights")
                                  .Attr<bool>("int8_activations")
                                  .Attr<xla::ffi::Span<const int64_t>>("devices")
                                  .Attr<int64_t>("group_size")
                                  .Attr<int64_t>("timeout_ms"),
                              kogpt::kHandlerTraits);
