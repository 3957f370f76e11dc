// `kogpt_int8_gemm` and `kogpt_mixed_gemm`: buffers to GemmParams. CUDA only.
#include <cstdint>
#include <cstring>
#include <string>

#include "ffi_helpers.h"
#include "gemm.h"

namespace kogpt {
namespace {

using LaunchFunction = const char*(const GemmParams& params, void* stream);

ffi::Error Gemm(const char* op, bool is_int8, LaunchFunction* launch, Executor executor, Buffer x,
                Buffer x_scale, Buffer weight, Buffer weight_scale, Buffer bias, Buffer residual,
                ResultBuffer y, ResultBuffer act, int64_t gelu_from, int64_t tile) {
  Checks check(op);
  check.Rank("x", x, 2);
  check.Rank("weight", weight, 2);
  check.Dtype("weight", weight, {ffi::S8});
  check.Dtype("bias", bias, {ffi::F16, ffi::BF16});
  if (check.failed()) return check.error();

  const ffi::DataType dtype = bias.element_type();
  const int64_t rows = x.dimensions()[0];
  const int64_t k_dim = x.dimensions()[1];
  const int64_t num_outputs = weight.dimensions()[0];
  check.That(0 <= gelu_from && gelu_from <= num_outputs, "gelu_from",
             "be in [0, " + std::to_string(num_outputs) + "]", std::to_string(gelu_from));
  if (check.failed()) return check.error();

  const int64_t num_gelu = num_outputs - gelu_from;
  check.Dtype("x", x, {is_int8 ? ffi::S8 : dtype});
  check.Dtype("x_scale", x_scale, {ffi::F32});
  check.Shape("x_scale", x_scale, {is_int8 ? rows : 0});
  check.Shape("weight", weight, {num_outputs, k_dim});
  check.Dtype("weight_scale", weight_scale, {ffi::F32});
  check.Shape("weight_scale", weight_scale, {num_outputs});
  check.OptionalShape("bias", bias, {num_gelu > 0 ? num_gelu : num_outputs});
  check.Dtype("residual", residual, {ffi::F32});
  const bool has_residual = check.OptionalShape("residual", residual, {rows, gelu_from});

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
  if (check.failed()) return check.error();

  GemmParams params = {};
  params.rows = rows;
  params.num_outputs = num_outputs;
  params.k_dim = k_dim;
  params.gelu_from = gelu_from;
  params.act_dim = act_dim;
  params.x_dtype = *ToDataType(x.element_type());
  params.dtype = *ToDataType(dtype);
  params.y_dtype = *ToDataType(y->element_type());
  params.tile = tile;
  params.x = DataOrNull<const void>(x);
  params.x_scale = DataOrNull<const float>(x_scale);
  params.weight = DataOrNull<const void>(weight);
  params.weight_scale = DataOrNull<const float>(weight_scale);
  params.bias = DataOrNull<const void>(bias);
  params.residual = has_residual ? DataOrNull<const float>(residual) : nullptr;
  params.y = DataOrNull<void>(*y);
  params.act = DataOrNull<void>(*act);
  check.Message(CheckGemm(params));
  if (check.failed()) return check.error();
  if (const char* message = launch(params, executor)) {
    return ffi::Error::Internal(std::string(op) + ": " + message);
  }
  return ffi::Error::Success();
}

ffi::Error Int8GemmImpl(Executor executor, Buffer x, Buffer x_scale, Buffer weight,
                        Buffer weight_scale, Buffer bias, Buffer residual, ResultBuffer y,
                        ResultBuffer act, int64_t gelu_from, int64_t tile) {
  return Gemm("kogpt_int8_gemm", true, LaunchInt8Gemm, executor, x, x_scale, weight, weight_scale,
              bias, residual, y, act, gelu_from, tile);
}

ffi::Error MixedGemmImpl(Executor executor, Buffer x, Buffer x_scale, Buffer weight,
                         Buffer weight_scale, Buffer bias, Buffer residual, ResultBuffer y,
                         ResultBuffer act, int64_t gelu_from, int64_t tile) {
  return Gemm("kogpt_mixed_gemm", false, LaunchMixedGemm, executor, x, x_scale, weight,
              weight_scale, bias, residual, y, act, gelu_from, tile);
}

auto Binding() {
  return xla::ffi::Ffi::Bind()
      .Ctx<ExecutorContext>()
      .Arg<Buffer>()  // x
      .Arg<Buffer>()  // x_scale
      .Arg<Buffer>()  // weight
      .Arg<Buffer>()  // weight_scale
      .Arg<Buffer>()  // bias
      .Arg<Buffer>()  // residual
      .Ret<Buffer>()  // y
      .Ret<Buffer>()  // act
      .Attr<int64_t>("gelu_from")
      .Attr<int64_t>("tile");
}

}  // namespace
}  // namespace kogpt

// The names of an op's tiles, with commas, on a device of this compute capability (90 for 9.0); the
// ops take an index of this list as `tile`. `op`: "int8_gemm" or "mixed_gemm". The caller has copied
// a list before it asks for the next one.
extern "C" KOGPT_EXPORT const char* KogptOpsGemmTiles(const char* op, int32_t compute_capability) {
  static thread_local std::string names;
  const bool is_int8 = std::strcmp(op, "int8_gemm") == 0;
  const bool is_hopper = compute_capability == 90;
  names.clear();
  for (int index = 0; index < kogpt::NumTiles(is_int8, is_hopper); ++index) {
    if (index > 0) names += ",";
    names += kogpt::TileName(is_int8, is_hopper, index);
  }
  return names.c_str();
}

extern "C" KOGPT_EXPORT XLA_FFI_Error* Int8Gemm(XLA_FFI_CallFrame* call_frame);
extern "C" KOGPT_EXPORT XLA_FFI_Error* MixedGemm(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(Int8Gemm, kogpt::Int8GemmImpl, kogpt::Binding(),
                              kogpt::kHandlerTraits);
XLA_FFI_DEFINE_HANDLER_SYMBOL(MixedGemm, kogpt::MixedGemmImpl, kogpt::Binding(),
                              kogpt::kHandlerTraits);
