// What the bindings of decode_layers and decode_steps share: buffers to DecodeLayersParams, and what runs
// the ops.
#ifndef CUSTOM_OPS_DECODE_LAYERS_FFI_H_
#define CUSTOM_OPS_DECODE_LAYERS_FFI_H_

#include <cstdint>
#include <vector>

#include "decode_layers.h"
#include "ffi_helpers.h"

namespace kogpt {

struct DecodeLayersAttrs {
  float epsilon;
  bool prefetch_weights;
  bool int8_activations;
  ffi::Span<const int64_t> devices;  // groups of `group_size`
  int64_t group_size;
  int64_t timeout_ms;
};

// Sizes of an op's own arguments.
struct DecodeLayersSizes {
  int64_t rows;
  int64_t model_dim;
  int64_t half_rotary_dim;
};

// Checks the buffers behind an op's own ones and points `params` to them; its layers lie in `layers`.
// Zeros stand for what the op's own ones give: x, its angles, lengths and num_new.
//   arguments   page_table, semaphores, lm_head, its scale and bias, ln_f's scale and bias, and of each
//               layer those that DecodeLayer has
//   results     y, logits, semaphores (aliased), scratch: other_x, qkv, act, h, part, linear_partials,
//               attention_partials; and of each layer the pages of k and v with their scales (aliased)
ffi::Error TakeDecodeLayers(const ffi::RemainingArgs& args, const ffi::RemainingRets& results,
                            const DecodeLayersSizes& sizes, const DecodeLayersAttrs& attrs,
                            Checks* check, DecodeLayersParams* params,
                            std::vector<DecodeLayer>* layers);

#ifdef KOGPT_CUDA
DecodeOps DecodeOpsOn(void* stream);
#else
DecodeOps DecodeOpsOn(const ParallelFor& parallel_for);  // which must outlive them
#endif

}  // namespace kogpt

#endif  // CUSTOM_OPS_DECODE_LAYERS_FFI_H_
