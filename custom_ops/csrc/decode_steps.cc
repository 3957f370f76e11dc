#include "decode_steps.h"

#include <cstring>

namespace kogpt {
namespace {

const char* Choose(const ChooseTokenParams& params, const DecodeStepsOps& ops) {
  if (const char* message = CheckChooseToken(params)) return message;
  return ops.choose(params);
}

}  // namespace

const char* RunDecodeSteps(const DecodeStepsParams& params, const DecodeStepsOps& ops) {
  DecodeLayersParams layers = params.layers;
  ChooseTokenParams choice = params.choice;
  // LayerNorm of the first layer, as the sums over ranks make those behind: not beside an INT8 weight.
  if (ops.makes_norms && layers.model_dim <= kAllReduceMaxNormLen &&
      layers.weight_dtype != DataType::kInt8) {
    choice.ln_scale = layers.layers[0].ln_scale;
    choice.ln_bias = layers.layers[0].ln_bias;
    choice.h = layers.h;
    layers.has_h = true;
  }
  choice.logits = nullptr;
  if (const char* message = Choose(choice, ops)) return message;
  choice.logits = layers.logits;
  for (int64_t step = 0; step < params.num_steps; ++step) {
    if (const char* message = RunDecodeLayers(layers, ops.layers)) return message;
    if (const char* message = Choose(choice, ops)) return message;
    layers.marks_before += static_cast<int32_t>(layers.num_layers);
    ++choice.new_tokens;
    ++choice.logprobs;
  }
  return nullptr;
}

std::string KeyOf(const DecodeStepsParams& params) {
  std::string key = KeyOf(params.layers);
  key.append(reinterpret_cast<const char*>(&params.choice), sizeof(params.choice));
  key.append(reinterpret_cast<const char*>(&params.num_steps), sizeof(params.num_steps));
  return key;
}

}  // namespace kogpt
