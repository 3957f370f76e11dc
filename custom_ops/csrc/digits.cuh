// Activations as integers, for products with an INT8 weight on tensor cores (linear_hopper.cuh).
#ifndef CUSTOM_OPS_DIGITS_CUH_
#define CUSTOM_OPS_DIGITS_CUH_

#include "cuda_common.cuh"

namespace kogpt {

// Activations that meet an INT8 weight are rounded to integers with a scale a row behind a LayerNorm,
// else with one for each group of so many columns of a row: integers of 8 bits, or of 16 that are kept as
// two digits of 8, 256 high + low, of which high lies in [-127, 127] and low in [-128, 127].
template <int kDigits>
inline constexpr float kLargestInteger = kDigits == 1 ? 127.0f : 127.0f * 256 + 127;
inline constexpr int kDigitGroup = kWarpSize * 8;

__host__ __device__ constexpr int64_t NumDigitGroups(int64_t k_dim) {
  return (k_dim + kDigitGroup - 1) / kDigitGroup;
}

// Of the scales of a group, one a row: a multiple of 32 bytes.
__host__ __device__ constexpr int PaddedRows(int rows) { return (rows + 7) / 8 * 8; }

// What becomes the largest integer, given the largest magnitude: NaN if that is not finite, and so is
// all that the row becomes. Of smaller rows than this nothing is left, but no more than that is lost.
__device__ __forceinline__ float LargestOfDigits(float largest) {
  constexpr float kTiny = 1e-30f;
  largest += largest - largest;
  return largest < kTiny ? kTiny : largest;
}

// The digits of eight values, given the largest integer over the largest magnitude; the high ones first.
template <int kDigits>
struct EightDigits {
  uint2 digits[kDigits];

  __device__ __forceinline__ EightDigits(const float (&values)[8], float inverse) {
    uint32_t integers[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) integers[i] = __float2int_rn(values[i] * inverse);
    const auto pack = [&](int byte, int offset) {
      uint32_t words[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t selector = byte | (byte + 4) << 4;
        const uint32_t first =
            __byte_perm(integers[4 * i] + offset, integers[4 * i + 1] + offset, selector);
        const uint32_t second =
            __byte_perm(integers[4 * i + 2] + offset, integers[4 * i + 3] + offset, selector);
        words[i] = __byte_perm(first, second, 0x5410);
      }
      return make_uint2(words[0], words[1]);
    };
    if constexpr (kDigits == 2) digits[0] = pack(1, 128);
    digits[kDigits - 1] = pack(0, 0);
  }
};

// Those of vector `vector` of a row of [rows, kDigits, K].
template <int kDigits>
__device__ __forceinline__ void StoreDigits(void* digits, int k_dim, int row, int vector,
                                            const EightDigits<kDigits>& eight) {
  int8_t* const to = static_cast<int8_t*>(digits) + static_cast<int64_t>(row) * kDigits * k_dim;
#pragma unroll
  for (int digit = 0; digit < kDigits; ++digit) {
    __stcg(reinterpret_cast<uint2*>(to + digit * k_dim) + vector, eight.digits[digit]);
  }
}

// What values are multiplied by to become integers, and the scale of those, for the largest magnitude.
template <int kDigits>
struct GroupScale {
  float inverse, scale;

  __device__ __forceinline__ explicit GroupScale(float largest) {
    largest = LargestOfDigits(largest);
    // A quarter of both, because this division knows no divisor above 2^126.
    inverse = __fdividef(kLargestInteger<kDigits> / 4, largest / 4);
    scale = largest * (1.0f / kLargestInteger<kDigits>);
  }
};

// Rounds a group of columns of a row, of which each lane of a warp has eight.
template <int kDigits>
__device__ __forceinline__ EightDigits<kDigits> RoundGroup(const float (&values)[8], float* scale) {
  // Magnitudes in the order of their bits, NaN above infinity.
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) bits = max(bits, __float_as_uint(fabsf(values[i])));
  const GroupScale<kDigits> of_group(__uint_as_float(__reduce_max_sync(0xffffffffu, bits)));
  *scale = of_group.scale;
  return EightDigits<kDigits>(values, of_group.inverse);
}

// [rows, K] of 16 bits as digits, [rows, kDigits, K], with a scale for each group of a row,
// [groups + 1, PaddedRows(rows)], those behind the last group finite.
struct RoundGroupsArgs {
  const void* x;
  const float* k_multiplier;  // [K], or null
  void* digits;
  float* scales;
  int rows;
  int k_dim;

  // A warp's: group `group`, or the scale behind the last one.
  template <typename T, int kDigits>
  __device__ __forceinline__ void Round(int row, int group) const {
    const int lane = threadIdx.x % kWarpSize;
    const int vector = group * kWarpSize + lane;
    const bool is_there = vector < k_dim / 8;
    float values[8] = {};
    if (is_there) {
      const T* const from = static_cast<const T*>(x) + static_cast<int64_t>(row) * k_dim;
      Unpack<T>(__ldcg(reinterpret_cast<const uint4*>(from) + vector), values);
      if (k_multiplier != nullptr) {
        const auto* multipliers = reinterpret_cast<const float4*>(k_multiplier) + vector * 2;
        const float4 low = __ldcg(multipliers), high = __ldcg(multipliers + 1);
        values[0] *= low.x, values[1] *= low.y, values[2] *= low.z, values[3] *= low.w;
        values[4] *= high.x, values[5] *= high.y, values[6] *= high.z, values[7] *= high.w;
      }
    }
    float scale;
    const EightDigits<kDigits> eight = RoundGroup<kDigits>(values, &scale);
    if (is_there) StoreDigits<kDigits>(digits, k_dim, row, vector, eight);
    if (lane == 0) __stcg(scales + group * PaddedRows(rows) + row, scale);
  }
};

}  // namespace kogpt

#endif  // CUSTOM_OPS_DIGITS_CUH_
