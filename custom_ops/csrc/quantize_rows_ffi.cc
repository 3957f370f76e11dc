// `kogpt_quantize_rows`: buffers to QuantizeRowsParams. CUDA only.
#include <cstdint>
#include <string>

#include "ffi_helpers.h"
#include "quantize_rows.h"

namespace kogpt {
namespace {

ffi::Error QuantizeRowsImpl(Executor executor, Buffer x, Buffer ln_scale, Buffer ln_bias,
                            Buffer k_multiplier, ResultBuffer qvalue, ResultBuffer scale,
                            float epsilon) {
  Checks check("kogpt_quantize_rows");
  check.Rank("x", x, 2);
  check.Dtype("x", x, {ffi::F32, ffi::F16, ffi::BF16});
  check.Dtype("ln_scale", ln_scale, {ffi::F32, ffi::F16, ffi::BF16});
  if (check.failed()) return check.error();

  const int64_t rows = x.dimensions()[0];
  const int64_t k_dim = x.dimensions()[1];
  const bool has_layer_norm = check.OptionalShape("ln_scale", ln_scale, {k_dim});
  check.Dtype("ln_bias", ln_bias, {ln_scale.element_type()});
  check.Shape("ln_bias", ln_bias, {has_layer_norm ? k_dim : 0});
  check.Dtype("k_multiplier", k_multiplier, {ffi::F32});
  check.OptionalShape("k_multiplier", k_multiplier, {k_dim});
  check.Dtype("result qvalue", *qvalue, {ffi::S8});
  check.Shape("result qvalue", *qvalue, {rows, k_dim});
  check.Dtype("result scale", *scale, {ffi::F32});
  check.Shape("result scale", *scale, {rows});
  if (check.failed()) return check.error();

  QuantizeRowsParams params = {};
  params.rows = rows;
  params.k_dim = k_dim;
  params.x_dtype = *ToDataType(x.element_type());
  params.ln_dtype = *ToDataType(ln_scale.element_type());
  params.epsilon = epsilon;
  params.x = DataOrNull<const void>(x);
  params.ln_scale = DataOrNull<const void>(ln_scale);
  params.ln_bias = DataOrNull<const void>(ln_bias);
  params.k_multiplier = DataOrNull<const float>(k_multiplier);
  params.qvalue = DataOrNull<int8_t>(*qvalue);
  params.scale = DataOrNull<float>(*scale);
  check.Message(CheckQuantizeRows(params));
  if (check.failed()) return check.error();
  if (const char* message = LaunchQuantizeRows(params, executor)) {
    return ffi::Error::Internal(std::string("kogpt_quantize_rows: ") + message);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace kogpt

extern "C" KOGPT_EXPORT XLA_FFI_Error* QuantizeRows(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(QuantizeRows, kogpt::QuantizeRowsImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<kogpt::ExecutorContext>()
                                  .Arg<kogpt::Buffer>()  // x
                                  .Arg<kogpt::Buffer>()  // ln_scale
                                  .Arg<kogpt::Buffer>()  // ln_bias
                                  .Arg<kogpt::Buffer>()  // k_multiplier
                                  .Ret<kogpt::Buffer>()  // qvalue
                                  .Ret<kogpt::Buffer>()  // scale
                                  .Attr<float>("epsilon"),
                              kogpt::kHandlerTraits);
