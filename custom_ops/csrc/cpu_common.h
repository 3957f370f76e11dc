// What the Host implementations share: which instruction set this machine has, and bits of floats.
#ifndef CUSTOM_OPS_CPU_COMMON_H_
#define CUSTOM_OPS_CPU_COMMON_H_

#include <cstdint>
#include <cstring>

#include "op_common.h"

namespace kogpt {

// In rising order: a machine that has one has those before it.
enum class Isa : int { kPortable, kAvx2, kAvx512 };

// The best that the machine has, or less if it was limited. Every kernel is compiled once for each
// (for_each_isa.inc).
Isa HostIsa();

inline int64_t ElementBytes(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat32:
      return 4;
    case DataType::kFloat16:
    case DataType::kBfloat16:
      return 2;
    case DataType::kInt8:
      return 1;
  }
  return 0;
}

inline float FloatFromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t BitsFromFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Rounds to nearest, ties to even; beyond the largest float16 to infinity.
inline uint16_t Float16FromFloat(float value) {
  const uint32_t bits = BitsFromFloat(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    result = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520: halfway to what would be the next float16
    result = 0x7c00;
  } else if (
      magnitude <
      0x38800000) {  // below 2^-14: adding 0.5 leaves the float16's bits, rounded, at the end
    result = BitsFromFloat(FloatFromBits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    result = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (uint32_t{112} << 23)) >> 13;
  }
  return static_cast<uint16_t>(sign | result);
}

}  // namespace kogpt

#endif  // CUSTOM_OPS_CPU_COMMON_H_
