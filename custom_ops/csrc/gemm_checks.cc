// Whether parameters of the products of many rows fit together, and those of quantize_rows.
#include "gemm.h"
#include "gemm_dispatch.h"
#include "quantize_rows.h"

namespace kogpt {
namespace {

// Rows, outputs and tiles of them are counted in 32 bits.
constexpr int64_t kMaxExtent = int64_t{1} << 24;
// Above it a sum of INT8 products might not fit into 32 bits.
constexpr int64_t kMaxInt8K = (int64_t{1} << 31) / (127 * 127);

bool Is16Bit(DataType dtype) { return dtype == DataType::kFloat16 || dtype == DataType::kBfloat16; }

bool IsFloat(DataType dtype) { return Is16Bit(dtype) || dtype == DataType::kFloat32; }

}  // namespace

const char* CheckGemm(const GemmParams& params) {
  const bool is_int8 = params.x_dtype == DataType::kInt8;
  const int64_t num_gelu = params.num_outputs - params.gelu_from;
  if (params.rows < 1 || params.rows > kMaxExtent) return "x must have 1 to 2^24 rows";
  if (params.num_outputs < 1 || params.num_outputs > kMaxExtent) {
    return "weight must have 1 to 2^24 outputs";
  }
  if (params.k_dim < 16 || params.k_dim % 16 != 0 || params.k_dim > kMaxExtent) {
    return "K must be a multiple of 16, at most 2^24";
  }
  if (is_int8 && params.k_dim > kMaxInt8K) return "K is so large that INT8 sums may overflow";
  if (!Is16Bit(params.dtype)) return "bias and act must be f16 or bf16";
  if (!is_int8 && params.x_dtype != params.dtype) return "x must be INT8 or of the bias's type";
  if (params.y_dtype != params.dtype && params.y_dtype != DataType::kFloat32) {
    return "y must be of the bias's type or f32";
  }
  if (params.residual != nullptr && params.y_dtype != DataType::kFloat32) {
    return "y must be f32 with a residual";
  }
  if (params.gelu_from < 0 || num_gelu < 0) return "gelu_from must be in [0, outputs of weight]";
  if (num_gelu > 0 && (params.act_dim < num_gelu || params.act_dim > kMaxExtent)) {
    return "act must hold the outputs from gelu_from on, and at most 2^24";
  }
  if (params.tile < -1 || params.tile >= NumTiles(is_int8, CurrentDevice().is_hopper)) {
    return "tile must be -1 or an index of the device's tiles";
  }
  if (params.x == nullptr || params.weight == nullptr || params.weight_scale == nullptr) {
    return "x, weight and its scales must be there";
  }
  if (is_int8 != (params.x_scale != nullptr)) {
    return "x_scale belongs to an INT8 x, and to no other";
  }
  if (params.gelu_from > 0 && params.y == nullptr) return "y must be there when gelu_from is not 0";
  if (num_gelu > 0 && params.act == nullptr) return "act must be there with gelu_from";
  return nullptr;
}

const char* CheckQuantizeRows(const QuantizeRowsParams& params) {
  if (params.rows < 1 || params.rows > kMaxExtent) return "x must have 1 to 2^24 rows";
  if (params.k_dim < 16 || params.k_dim % 16 != 0 || params.k_dim > kMaxExtent) {
    return "K must be a multiple of 16, at most 2^24";
  }
  if (!IsFloat(params.x_dtype)) return "x must be f32, f16 or bf16";
  if (!IsFloat(params.ln_dtype)) return "LayerNorm's scale and bias must be f32, f16 or bf16";
  if ((params.ln_scale != nullptr) != (params.ln_bias != nullptr)) {
    return "LayerNorm needs both its scale and its bias";
  }
  if (params.x == nullptr || params.qvalue == nullptr || params.scale == nullptr) {
    return "x, qvalue and scale must be there";
  }
  return nullptr;
}

}  // namespace kogpt
