// Several greedy decode steps as one call: the layers and logits of decode_layers, and choose_token
// behind them, one after another.
//
// Raw pointers: no header of XLA or of another framework here.
#ifndef CUSTOM_OPS_DECODE_STEPS_H_
#define CUSTOM_OPS_DECODE_STEPS_H_

#include <cstdint>
#include <functional>
#include <string>

#include "choose_token.h"
#include "decode_layers.h"

namespace kogpt {

struct DecodeStepsParams {
  int64_t num_steps;
  // With a head; x, its angles, lengths and num_new are what `choice` writes.
  DecodeLayersParams layers;
  // new_tokens and logprobs are [rows, num_steps].
  ChooseTokenParams choice;
};

// What runs the ops; each returns null or a message of static lifetime.
struct DecodeStepsOps {
  DecodeOps layers;
  std::function<const char*(const ChooseTokenParams&)> choose;
  bool makes_norms;  // whether `choose` can make LayerNorm of x
};

// Checks and runs the ops in order. Returns null or the first message.
const char* RunDecodeSteps(const DecodeStepsParams& params, const DecodeStepsOps& ops);

// All that the ops of such parameters depend on, as bytes.
std::string KeyOf(const DecodeStepsParams& params);

}  // namespace kogpt

#endif  // CUSTOM_OPS_DECODE_STEPS_H_
