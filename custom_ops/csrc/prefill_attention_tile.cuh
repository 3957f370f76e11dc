// What both kernels of prefill_attention's attention do with tiles of queries and keys: boxes in shared
// memory, INT8 widened, the softmax, rotation before and output behind.
#ifndef CUSTOM_OPS_PREFILL_ATTENTION_TILE_CUH_
#define CUSTOM_OPS_PREFILL_ATTENTION_TILE_CUH_

#include "prefill_attention.cuh"

namespace kogpt {

constexpr int kBoxBytes = kBoxTokens * kBoxRowBytes;
constexpr int kBoxColumns = 64;        // 16-bit values of a box's row
constexpr float kRescaleAbove = 8.0f;  // in powers of two

// Some neighbouring queries of a row. Absent: num_left is 0.
struct QueryTile {
  int begin;     // its first token
  int num_left;  // the row's tokens from there on
  int position;  // of the first
  int row;

  __device__ __forceinline__ QueryTile(const PrefillArgs& args, int index) {
    const int4 values = __ldcg(args.tiles + index);
    begin = Uniform(values.x), num_left = Uniform(values.y);
    position = Uniform(values.z), row = Uniform(values.w);
  }
};

__device__ __forceinline__ uint2 LoadSharedPair(uint32_t address) {
  uint2 value;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];\n"
               : "=r"(value.x), "=r"(value.y)
               : "r"(address)
               : "memory");
  return value;
}

// Eight INT8 keys' values, as they are, and those of values times their scale, rounded.
template <typename T>
__device__ __forceinline__ uint4 WidenKeys(uint2 bytes) {
  const Widened<T> wide(bytes.x, bytes.y);
  return make_uint4(wide.words[0], wide.words[1], wide.words[2], wide.words[3]);
}

template <typename T>
__device__ __forceinline__ uint4 WidenValues(uint2 bytes, float scale) {
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    // 2^23 and a byte below it; the byte is 128 too large.
    const uint32_t word = (i < 4 ? bytes.x : bytes.y) ^ 0x80808080u;
    const uint32_t raised = __byte_perm(word, 0x4b000000u, 0x7440 + i % 4);
    values[i] = (__uint_as_float(raised) - 8388736.0f) * scale;
  }
  return Pack<T>(values);
}

// 2^x, 0 for what would be subnormal.
__device__ __forceinline__ float PowerOfTwo(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

// The online softmax of one query.
struct Softmax {
  float maximum = -INFINITY;  // of the scores, in powers of two, as of the last rescaling
  float sum = 0.0f;           // of this lane's keys

  // Takes a tile's maximum; returns what earlier sums are multiplied by.
  __device__ __forceinline__ float Raise(float tile_maximum) {
    if (!(tile_maximum > maximum + kRescaleAbove)) return 1.0f;
    const float rescale = PowerOfTwo(maximum - tile_maximum);
    maximum = tile_maximum;
    sum *= rescale;
    return rescale;
  }
};

__device__ __forceinline__ float MaximumOfFour(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

__device__ __forceinline__ float SumOfFour(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// Scores of two queries a lane, whose keys lie as the tensor cores have them, to weights; hides keys
// after each query's own `position`, counted from the tile's first key. Returns what earlier sums
// are multiplied by.
template <int kScores>
__device__ __forceinline__ float2 TakeSoftmax(float (&scores)[kScores], Softmax (&softmax)[2],
                                              const int (&positions)[2], float log2_scale) {
  constexpr int kKeys = kScores * 2;
  const int column = threadIdx.x % 4 * 2;
  if (min(positions[0], positions[1]) < kKeys - 1) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      if (i / 4 * 8 + i % 2 + column > positions[i / 2 % 2]) scores[i] = -INFINITY;
    }
  }
  float maxima[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    maxima[i / 2 % 2] = fmaxf(maxima[i / 2 % 2], scores[i]);
  }
  const float2 rescale = {softmax[0].Raise(MaximumOfFour(maxima[0]) * log2_scale),
                          softmax[1].Raise(MaximumOfFour(maxima[1]) * log2_scale)};
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    Softmax& of_query = softmax[i / 2 % 2];
    scores[i] = PowerOfTwo(fmaf(scores[i], log2_scale, -of_query.maximum));
    of_query.sum += scores[i];
  }
  return rescale;
}

// Scores of INT8 keys by the keys' scales, an array in shared memory.
template <int kScores>
__device__ __forceinline__ void ScaleScores(float (&scores)[kScores], uint32_t scales) {
  scales += threadIdx.x % 4 * 8;
#pragma unroll
  for (int i = 0; i < kScores; i += 4) {
    const uint2 bits = LoadSharedPair(scales + i * 8);
    const float pair[2] = {__uint_as_float(bits.x), __uint_as_float(bits.y)};
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[i + j] *= pair[j % 2];
  }
}

template <int kSums>
__device__ __forceinline__ void Rescale(float (&sums)[kSums], float2 rescale) {
  const bool is_any = rescale.x != 1.0f || rescale.y != 1.0f;
  if (!__any_sync(0xffffffffu, is_any)) return;
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] *= i / 2 % 2 == 0 ? rescale.x : rescale.y;
}

// Weights as the tensor cores take them: four registers for each 16 keys.
template <typename T, int kScores>
__device__ __forceinline__ void PackWeights(const float (&scores)[kScores],
                                            uint32_t (&weights)[kScores / 2]) {
#pragma unroll
  for (int i = 0; i < kScores / 2; ++i) {
    weights[i] = Pair<T>::FromFloats(scores[2 * i], scores[2 * i + 1]);
  }
}

// Rotates 64 queries in shared memory, box after box, by 128 threads: those of tokens from `token`
// on, of which the first `num_rows` exist. Calls wait() before the first is read, with the angles of
// a box under way.
template <typename T, typename Wait>
__device__ __forceinline__ void RotateQueries(const PrefillArgs& args, uint32_t boxes, int token,
                                              int num_rows, int thread, Wait wait) {
  constexpr int kThreads = 128;
  constexpr int kPieces = kBoxBytes / 16 / kThreads;  // of a thread in a box
  const int rotated_boxes = (args.rotary_dim + kBoxColumns - 1) / kBoxColumns;
  const int dim = thread % 8 * 8, row = thread / 8;  // the next piece is kThreads / 8 rows below
  for (int box = 0; box < rotated_boxes; ++box) {
    const auto angles_of = [&](int i) {
      const int of_row = row + i * (kThreads / 8);
      return Rotation(args, token + of_row, box * kBoxColumns + dim, of_row < num_rows);
    };
    const Rotation angles[kPieces] = {angles_of(0), angles_of(1), angles_of(2), angles_of(3)};
    if (box == 0) wait();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint32_t at =
          boxes + box * kBoxBytes + PieceOffset(row + i * (kThreads / 8), thread % 8);
      StoreShared(at, angles[i].template Rotate<T>(LoadShared(at)));
    }
  }
}

// Writes a warp's 16 queries, sums over their total weight, through 16 rows of boxes that the warp
// has for itself, so that whole rows are written. The first `num_rows` exist.
template <typename T, int kHeadDim>
__device__ __forceinline__ void WriteQueries(const PrefillArgs& args, uint32_t boxes,
                                             const float (&sums)[kHeadDim / 2],
                                             const Softmax (&softmax)[2], int token, int num_rows,
                                             int head) {
  const int lane = threadIdx.x % kWarpSize;
  const float scale[2] = {1.0f / SumOfFour(softmax[0].sum), 1.0f / SumOfFour(softmax[1].sum)};
#pragma unroll
  for (int i = 0; i < kHeadDim / 4; ++i) {
    const int row = lane / 4 + i % 2 * 8, group = i / 2;
    const uint32_t at = boxes + group / 8 * kBoxBytes + PieceOffset(row, group % 8) + lane % 4 * 4;
    StoreShared(at,
                Pair<T>::FromFloats(sums[2 * i] * scale[i % 2], sums[2 * i + 1] * scale[i % 2]));
  }
  __syncwarp();
  constexpr int kRowPieces = kHeadDim / 8;
  T* out = static_cast<T*>(args.act) + static_cast<int64_t>(token) * args.act_dim + head * kHeadDim;
  const bool is_aligned = args.act_dim % 8 == 0;
#pragma unroll 4
  for (int i = lane; i < 16 * kRowPieces; i += kWarpSize) {
    const int row = i / kRowPieces, piece = i % kRowPieces;
    if (row >= num_rows) break;
    const uint4 bits = LoadShared(boxes + piece / 8 * kBoxBytes + PieceOffset(row, piece % 8));
    T* to = out + static_cast<int64_t>(row) * args.act_dim + piece * 8;
    if (is_aligned) {
      __stcg(reinterpret_cast<uint4*>(to), bits);
    } else {
      const T* values = reinterpret_cast<const T*>(&bits);
#pragma unroll
      for (int j = 0; j < 8; ++j) to[j] = values[j];
    }
  }
}

}  // namespace kogpt

#endif  // CUSTOM_OPS_PREFILL_ATTENTION_TILE_CUH_
