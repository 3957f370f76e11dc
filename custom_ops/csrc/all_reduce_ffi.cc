// `kogpt_all_reduce`: buffers to AllReduceParams, and the groups of devices ahead of the first call.
// CUDA only.
#include <cstdint>
#include <string>
#include <vector>

#include "all_reduce.h"
#include "ffi_helpers.h"

namespace kogpt {
namespace {

ffi::Error AllReduceImpl(Executor executor, Buffer x, Buffer bias, Buffer residual, ResultBuffer y,
                         ffi::Span<const int64_t> devices, int64_t group_size, bool prefetch_bias,
                         int64_t timeout_ms) {
  Checks check("kogpt_all_reduce");
  check.Rank("x", x, 2);
  check.Dtype("x", x, {ffi::F32});
  if (check.failed()) return check.error();
  const int64_t rows = x.dimensions()[0];
  const int64_t row_len = x.dimensions()[1];
  check.Dtype("bias", bias, {ffi::F32, ffi::F16, ffi::BF16});
  check.OptionalShape("bias", bias, {row_len});
  check.Dtype("residual", residual, {ffi::F32});
  check.OptionalShape("residual", residual, {rows, row_len});
  check.Dtype("result y", *y, {ffi::F32});
  check.Shape("result y", *y, {rows, row_len});
  check.That(group_size >= 1 && devices.size() > 0 && devices.size() % group_size == 0, "devices",
             "be groups of " + std::to_string(group_size),
             std::to_string(devices.size()) + " devices");
  check.That(timeout_ms >= 1, "timeout_ms", "be at least 1", std::to_string(timeout_ms));
  if (check.failed()) return check.error();

  std::string message;
  AllReduceParams params = {};
  params.rows = rows;
  params.row_len = row_len;
  params.bias_dtype = *ToDataType(bias.element_type());
  params.x = {DataOrNull<const float>(x), 1, row_len, nullptr};
  params.bias = DataOrNull<const void>(bias);
  params.residual = DataOrNull<const float>(residual);
  params.y = DataOrNull<float>(*y);
  params.prefetch_bias = prefetch_bias;
  params.timeout_ms = timeout_ms;
  params.group = FindOwnGroup(devices.begin(), devices.size(), group_size, &params.rank, &message);
  if (params.group == nullptr) {
    return ffi::Error::Internal("kogpt_all_reduce: " + message);
  }
  check.Message(CheckAllReduce(params));
  if (check.failed()) return check.error();
  if (const char* error = LaunchAllReduce(params, executor)) {
    return ffi::Error::Internal(std::string("kogpt_all_reduce: ") + error);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace kogpt

// Makes the groups of `devices`, `group_size` one behind the other, before a program that needs them
// runs. Returns null, or why it cannot: until the same thread's next call.
extern "C" KOGPT_EXPORT const char* KogptOpsPrepareAllReduce(const int64_t* devices,
                                                             int64_t num_devices,
                                                             int64_t group_size) {
  if (const char* problem = kogpt::AllReduceProcessProblem()) return problem;
  thread_local std::string error;
  for (int64_t first = 0; first + group_size <= num_devices; first += group_size) {
    const std::vector<int> group(devices + first, devices + first + group_size);
    if (kogpt::FindAllReduceGroup(group, &error) == nullptr) return error.c_str();
  }
  return nullptr;
}

extern "C" KOGPT_EXPORT XLA_FFI_Error* AllReduce(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(AllReduce, kogpt::AllReduceImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<kogpt::ExecutorContext>()
                                  .Arg<kogpt::Buffer>()  // x
                                  .Arg<kogpt::Buffer>()  // bias
                                  .Arg<kogpt::Buffer>()  // residual
                                  .Ret<kogpt::Buffer>()  // y
                                  .Attr<xla::ffi::Span<const int64_t>>("devices")
                                  .Attr<int64_t>("group_size")
                                  .Attr<bool>("prefetch_bias")
                                  .Attr<int64_t>("timeout_ms"),
                              kogpt::kHandlerTraits);
