// `kogpt_linear`: buffers to LinearParams.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "ffi_helpers.h"
#include "linear.h"

namespace kogpt {
namespace {

ffi::Error LinearImpl(Executor executor, Buffer x, Buffer weight, Buffer weight_scale, Buffer bias,
                      Buffer ln_scale, Buffer ln_bias, Buffer k_multiplier, Buffer residual,
                      Buffer semaphores, ResultBuffer y, ResultBuffer act, ResultBuffer h,
                      ResultBuffer partials, ResultBuffer semaphores_out, int64_t gelu_from,
                      float epsilon, bool prefetch_weight, int64_t done_mark, int64_t awaited_mark,
                      int64_t early_from, bool int8_activations) {
  Checks check("kogpt_linear");
  check.Rank("x", x, 2);
  check.Rank("weight", weight, 2);
  check.Dtype("weight", weight, {ffi::F32, ffi::F16, ffi::BF16, ffi::S8});
  if (check.failed()) return check.error();

  const int64_t rows = x.dimensions()[0];
  const int64_t k_dim = x.dimensions()[1];
  const int64_t num_outputs = weight.dimensions()[0];
  const bool is_quantized = weight.element_type() == ffi::S8;
  const bool has_layer_norm = !IsAbsent(ln_scale);
  const char* dtype_from = !is_quantized ? "weight" : has_layer_norm ? "ln_scale" : "x";
  const Buffer& dtype_buffer = !is_quantized ? weight : has_layer_norm ? ln_scale : x;
  check.Dtype(dtype_from, dtype_buffer, {ffi::F32, ffi::F16, ffi::BF16});
  const ffi::DataType dtype = dtype_buffer.element_type();
  constexpr int64_t kMaxMark = std::numeric_limits<int32_t>::max();
  check.That(std::max(done_mark, awaited_mark) <= kMaxMark, "marks", "fit 32 bits",
             std::to_string(std::max(done_mark, awaited_mark)));
  check.That(0 <= gelu_from && gelu_from <= num_outputs, "gelu_from",
             "be in [0, " + std::to_string(num_outputs) + "]", std::to_string(gelu_from));
  if (check.failed()) return check.error();

  const int64_t num_gelu = num_outputs - gelu_from;
  if (has_layer_norm) {
    check.Dtype("x", x, {dtype, ffi::F32});
  } else {
    check.Dtype("x", x, {dtype});
  }
  check.Shape("weight", weight, {num_outputs, k_dim});
  check.Dtype("weight_scale", weight_scale, {ffi::F32});
  check.Shape("weight_scale", weight_scale, {is_quantized ? num_outputs : 0});
  check.Dtype("bias", bias, {dtype});
  check.OptionalShape("bias", bias, {num_gelu > 0 ? num_gelu : num_outputs});
  check.Dtype("ln_scale", ln_scale, {dtype});
  check.OptionalShape("ln_scale", ln_scale, {k_dim});
  check.Dtype("ln_bias", ln_bias, {dtype});
  check.Shape("ln_bias", ln_bias, {has_layer_norm ? k_dim : 0});
  check.Dtype("k_multiplier", k_multiplier, {ffi::F32});
  const bool has_multiplier = check.OptionalShape("k_multiplier", k_multiplier, {k_dim});
  check.Dtype("residual", residual, {ffi::F32});
  const bool has_residual = check.OptionalShape("residual", residual, {rows, gelu_from});
  check.Dtype("semaphores", semaphores, {ffi::S32});
  check.Shape("semaphores", semaphores, {kNumSemaphores});

  check.Dtype("result y", *y, {dtype, ffi::F32});
  check.Shape("result y", *y, {rows, gelu_from});
  check.Dtype("result act", *act, {dtype});
  if (num_gelu > 0) {
    check.Rank("result act", *act, 2);
  } else {
    check.Shape("result act", *act, {0});
  }
  if (check.failed()) return check.error();
  const int64_t act_dim = num_gelu > 0 ? act->dimensions()[1] : 0;
  if (num_gelu > 0) check.Shape("result act", *act, {rows, act_dim});
  const bool needs_h = has_layer_norm || has_multiplier || is_quantized;
  check.Dtype("result h", *h, {dtype});
  if (needs_h) {
    check.Shape("result h", *h, {rows, k_dim});
  } else {
    check.Shape("result h", *h, {0});
  }
  check.Dtype("result partials", *partials, {ffi::F32});
  check.Rank("result partials", *partials, 1);
  check.Dtype("result semaphores", *semaphores_out, {ffi::S32});
  check.Shape("result semaphores", *semaphores_out, {kNumSemaphores});
  check.Aliased("semaphores", semaphores, *semaphores_out);
  if (check.failed()) return check.error();

  LinearParams params = {};
  params.rows = rows;
  params.num_outputs = num_outputs;
  params.k_dim = k_dim;
  params.gelu_from = gelu_from;
  params.act_dim = act_dim;
  params.dtype = *ToDataType(dtype);
  params.weight_dtype = *ToDataType(weight.element_type());
  params.x_dtype = *ToDataType(x.element_type());
  params.y_dtype = *ToDataType(y->element_type());
  params.epsilon = epsilon;
  params.int8_activations = int8_activations;
  params.x = DataOrNull<const void>(x);
  params.weight = DataOrNull<const void>(weight);
  params.weight_scale = DataOrNull<const float>(weight_scale);
  params.bias = DataOrNull<const void>(bias);
  params.ln_scale = DataOrNull<const void>(ln_scale);
  params.ln_bias = DataOrNull<const void>(ln_bias);
  params.k_multiplier = DataOrNull<const float>(k_multiplier);
  params.residual = has_residual ? DataOrNull<const float>(residual) : nullptr;
  params.y = DataOrNull<void>(*y);
  params.act = DataOrNull<void>(*act);
  params.h = DataOrNull<void>(*h);
  params.partials = DataOrNull<float>(*partials);
  params.partials_bytes = static_cast<int64_t>(partials->size_bytes());
  params.semaphores = DataOrNull<int32_t>(*semaphores_out);
  params.prefetch_weight = prefetch_weight;
  params.done_mark = static_cast<int32_t>(done_mark);
  params.awaited_mark = static_cast<int32_t>(awaited_mark);
  params.early_from = early_from;
  check.Message(CheckLinear(params));
  if (check.failed()) return check.error();

#ifdef KOGPT_CUDA
  check.That(params.partials_bytes >= LinearPartialsBytes(rows), "result partials",
             "have at least " + std::to_string(LinearPartialsBytes(rows)) + " bytes",
             std::to_string(params.partials_bytes));
  if (check.failed()) return check.error();
  if (const char* message = LaunchLinear(params, executor)) {
    return ffi::Error::Internal(std::string("kogpt_linear: ") + message);
  }
#else
  LinearCpu(params, MakeParallelFor(executor));
#endif
  return ffi::Error::Success();
}

}  // namespace
}  // namespace kogpt

extern "C" KOGPT_EXPORT XLA_FFI_Error* Linear(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(Linear, kogpt::LinearImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<kogpt::ExecutorContext>()
                                  .Arg<kogpt::Buffer>()  // x
                                  .Arg<kogpt::Buffer>()  // weight
                                  .Arg<kogpt::Buffer>()  // weight_scale
                                  .Arg<kogpt::Buffer>()  // bias
                                  .Arg<kogpt::Buffer>()  // ln_scale
                                  .Arg<kogpt::Buffer>()  // ln_bias
                                  .Arg<kogpt::Buffer>()  // k_multiplier
                                  .Arg<kogpt::Buffer>()  // residual
                                  .Arg<kogpt::Buffer>()  // semaphores
                                  .Ret<kogpt::Buffer>()  // y
                                  .Ret<kogpt::Buffer>()  // act
                                  .Ret<kogpt::Buffer>()  // h: scratch
                                  .Ret<kogpt::Buffer>()  // partials: scratch
                                  .Ret<kogpt::Buffer>()  // semaphores, aliased
                                  .Attr<int64_t>("gelu_from")
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("prefetch_weight")
                                  .Attr<int64_t>("done_mark")
                                  .Attr<int64_t>("awaited_mark")
                                  .Attr<int64_t>("early_from")
                                  .Attr<bool>("int8_activations"),
                              kogpt::kHandlerTraits);
