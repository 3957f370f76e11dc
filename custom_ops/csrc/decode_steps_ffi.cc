// `kogpt_decode_steps`: buffers to DecodeStepsParams.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "decode_layers_ffi.h"
#include "decode_steps.h"
#include "ffi_helpers.h"
#ifdef KOGPT_CUDA
#include "cuda_graph.h"
#endif

namespace kogpt {
namespace {

ffi::Error DecodeStepsImpl(Executor executor, Buffer tokens, Buffer lengths, Buffer num_remaining,
                           Buffer ignore_eos, Buffer embedding, Buffer all_cos, Buffer all_sin,
                           ffi::RemainingArgs args, ResultBuffer tokens_out,
                           ResultBuffer lengths_out, ResultBuffer num_remaining_out,
                           ResultBuffer new_tokens, ResultBuffer logprobs, ResultBuffer x,
                           ResultBuffer cos, ResultBuffer sin, ResultBuffer num_new,
                           ResultBuffer candidates, ffi::RemainingRets results, int64_t vocab_size,
                           ffi::Span<const int64_t> eos_token_ids, float epsilon,
                           bool prefetch_weights, bool int8_activations,
                           ffi::Span<const int64_t> devices, int64_t group_size,
                           int64_t timeout_ms) {
  Checks check("kogpt_decode_steps");
  check.Rank("tokens", tokens, 1);
  check.Rank("embedding", embedding, 2);
  check.Rank("cos", all_cos, 2);
  check.Rank("result new_tokens", *new_tokens, 2);
  if (check.failed()) return check.error();
  const int64_t rows = tokens.dimensions()[0];
  const int64_t local_vocab = embedding.dimensions()[0];
  const int64_t model_dim = embedding.dimensions()[1];
  const int64_t num_positions = all_cos.dimensions()[0];
  const int64_t half_rotary_dim = all_cos.dimensions()[1];
  const int64_t num_steps = new_tokens->dimensions()[1];
  const auto check_state = [&](const char* name, const char* result_name, const Buffer& buffer,
                               const Buffer& result) {
    check.Dtype(name, buffer, {ffi::S32});
    check.Shape(name, buffer, {rows});
    check.Dtype(result_name, result, {ffi::S32});
    check.Shape(result_name, result, {rows});
    check.Aliased(name, buffer, result);
  };
  check_state("tokens", "result tokens", tokens, *tokens_out);
  check_state("lengths", "result lengths", lengths, *lengths_out);
  check_state("num_remaining", "result num_remaining", num_remaining, *num_remaining_out);
  check.Dtype("ignore_eos", ignore_eos, {ffi::PRED});
  check.Shape("ignore_eos", ignore_eos, {rows});
  check.Dtype("cos", all_cos, {ffi::F32});
  check.Dtype("sin", all_sin, {ffi::F32});
  check.Shape("sin", all_sin, {num_positions, half_rotary_dim});
  check.Dtype("result new_tokens", *new_tokens, {ffi::S32});
  check.Shape("result new_tokens", *new_tokens, {rows, num_steps});
  check.Dtype("result logprobs", *logprobs, {ffi::F32});
  check.Shape("result logprobs", *logprobs, {rows, num_steps});
  check.Dtype("result x", *x, {ffi::F32});
  check.Shape("result x", *x, {rows, model_dim});
  check.Dtype("result cos", *cos, {ffi::F32});
  check.Shape("result cos", *cos, {rows, half_rotary_dim});
  check.Dtype("result sin", *sin, {ffi::F32});
  check.Shape("result sin", *sin, {rows, half_rotary_dim});
  check.Dtype("result num_new", *num_new, {ffi::S32});
  check.Shape("result num_new", *num_new, {rows});
  const auto num_eos_tokens = static_cast<int64_t>(eos_token_ids.size());
  check.That(num_eos_tokens <= kMaxEosTokens, "eos_token_ids",
             "hold at most " + std::to_string(kMaxEosTokens), std::to_string(num_eos_tokens));
  if (check.failed()) return check.error();

  DecodeStepsParams params;
  std::vector<DecodeLayer> layers;
  const DecodeLayersAttrs attrs = {epsilon, prefetch_weights, int8_activations,
                                   devices, group_size,       timeout_ms};
  if (ffi::Error error = TakeDecodeLayers(args, results, {rows, model_dim, half_rotary_dim}, attrs,
                                          &check, &params.layers, &layers);
      error.failure()) {
    return error;
  }
  check.That(params.layers.vocab_size == local_vocab, "lm_head",
             "have a row for each of embedding's, " + std::to_string(local_vocab),
             std::to_string(params.layers.vocab_size));

  params.num_steps = num_steps;
  ChooseTokenParams& choice = params.choice;
  std::memset(static_cast<void*>(&choice), 0, sizeof(choice));  // a part of a key
  choice.rows = rows;
  choice.model_dim = model_dim;
  choice.local_vocab = local_vocab;
  choice.vocab_size = vocab_size;
  choice.half_rotary_dim = half_rotary_dim;
  choice.num_positions = num_positions;
  choice.dtype = params.layers.dtype;
  choice.epsilon = epsilon;
  choice.embedding = DataOrNull<const void>(embedding);
  choice.all_cos = DataOrNull<const float>(all_cos);
  choice.all_sin = DataOrNull<const float>(all_sin);
  choice.ignore_eos = DataOrNull<const bool>(ignore_eos);
  for (size_t i = 0; i < eos_token_ids.size(); ++i) {
    const int64_t token = eos_token_ids[i];
    check.That(token >= 0 && token <= std::numeric_limits<int32_t>::max(), "eos_token_ids",
               "be in [0, 2^31)", std::to_string(token));
    choice.eos_token_ids[i] = static_cast<int32_t>(token);
  }
  choice.num_eos_tokens = num_eos_tokens;
  choice.prefetch_parameters = prefetch_weights;
  choice.tokens = DataOrNull<int32_t>(*tokens_out);
  choice.lengths = DataOrNull<int32_t>(*lengths_out);
  choice.num_remaining = DataOrNull<int32_t>(*num_remaining_out);
  choice.num_new = DataOrNull<int32_t>(*num_new);
  choice.x = DataOrNull<float>(*x);
  choice.cos = DataOrNull<float>(*cos);
  choice.sin = DataOrNull<float>(*sin);
  choice.new_tokens = DataOrNull<int32_t>(*new_tokens);
  choice.logprobs = DataOrNull<float>(*logprobs);
  choice.new_stride = num_steps;
  choice.candidates = static_cast<VocabCandidate*>(candidates->untyped_data());
  choice.group = params.layers.group;
  choice.rank = params.layers.rank;
  choice.timeout_ms = timeout_ms;
  check.That(candidates->size_bytes() >= rows * NumVocabSlices(choice) * sizeof(VocabCandidate),
             "result candidates", "have 16 bytes for each slice of the vocabulary and row",
             std::to_string(candidates->size_bytes()));
  switch (choice.dtype) {
    case DataType::kFloat32:
      check.Dtype("embedding", embedding, {ffi::F32});
      break;
    case DataType::kFloat16:
      check.Dtype("embedding", embedding, {ffi::F16});
      break;
    default:
      check.Dtype("embedding", embedding, {ffi::BF16});
  }
  check.That(vocab_size <= local_vocab * group_size, "vocab_size",
             "be at most the " + std::to_string(group_size) + " times " +
                 std::to_string(local_vocab) + " rows of embedding",
             std::to_string(vocab_size));
  check.Message(CheckChooseToken(choice));
  if (check.failed()) return check.error();
  params.layers.x = choice.x;
  params.layers.cos = choice.cos;
  params.layers.sin = choice.sin;
  params.layers.lengths = choice.lengths;
  params.layers.num_new = choice.num_new;

#ifdef KOGPT_CUDA
  const char* message = EnqueueAsGraph(KeyOf(params), executor, [&](void* stream) {
    const auto choose = [stream](const ChooseTokenParams& each) {
      return LaunchChooseToken(each, stream);
    };
    return RunDecodeSteps(params, {DecodeOpsOn(stream), choose, true});
  });
#else
  const ParallelFor parallel_for = MakeParallelFor(executor);
  const auto choose = [&](const ChooseTokenParams& each) -> const char* {
    ChooseTokenCpu(each, parallel_for);
    return nullptr;
  };
  const char* message = RunDecodeSteps(params, {DecodeOpsOn(parallel_for), choose, false});
#endif
  return message == nullptr ? ffi::Error::Success() : check.Internal(message);
}

}  // namespace
}  // namespace kogpt

extern "C" KOGPT_EXPORT XLA_FFI_Error* DecodeSteps(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeSteps, kogpt::DecodeStepsImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<kogpt::ExecutorContext>()
                                  .Arg<kogpt::Buffer>()  // tokens
                                  .Arg<kogpt::Buffer>()  // lengths
                                  .Arg<kogpt::Buffer>()  // num_remaining
                                  .Arg<kogpt::Buffer>()  // ignore_eos
                                  .Arg<kogpt::Buffer>()  // embedding
                                  .Arg<kogpt::Buffer>()  // cos
                                  .Arg<kogpt::Buffer>()  // sin
                                  .RemainingArgs()       // as decode_layers_ffi.h lists them
                                  .Ret<kogpt::Buffer>()  // tokens, aliased
                                  .Ret<kogpt::Buffer>()  // lengths, aliased
                                  .Ret<kogpt::Buffer>()  // num_remaining, aliased
                                  .Ret<kogpt::Buffer>()  // new_tokens
                                  .Ret<kogpt::Buffer>()  // logprobs
                                  .Ret<kogpt::Buffer>()  // x: scratch, as all up to candidates
                                  .Ret<kogpt::Buffer>()  // cos
                                  .Ret<kogpt::Buffer>()  // sin
                                  .Ret<kogpt::Buffer>()  // num_new
                                  .Ret<kogpt::Buffer>()  // candidates
                                  .RemainingRets()       // likewise
                                  .Attr<int64_t>("vocab_size")
                                  .Attr<xla::ffi::Span<const int64_t>>("eos_token_ids")
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("prefetch_weights")
                                  .Attr<bool>("int8_activations")
                                  .Attr<xla::ffi::Span<const int64_t>>("devices")
                                  .Attr<int64_t>("group_size")
                                  .Attr<int64_t>("timeout_ms"),
                              kogpt::kHandlerTraits);
