// What the CUDA kernels share: asynchronous copies, dependent launch, conversions, the launch
// itself.
#ifndef CUSTOM_OPS_CUDA_COMMON_CUH_
#define CUSTOM_OPS_CUDA_COMMON_CUH_

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "op_common.h"

namespace kogpt {

inline constexpr int kWarpSize = 32;

// A value that is the same in the whole warp, so that the compiler knows it, too: products behind a
// branch that it takes for divergent run one after another.
__device__ __forceinline__ int Uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// The values of each kLanes neighbouring lanes combined, the same bits in all of them.
template <int kLanes = kWarpSize, typename Combine>
__device__ __forceinline__ float WarpReduce(float value, Combine combine) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

struct Plus {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// Loads and stores of what other kernels write go to L2 (__ldcg and the like): under dependent
// launch a kernel starts while the one ahead still writes, so that L1 might keep an older value.

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory asynchronously, or writes 16 zero bytes when not `is_valid`.
__device__ __forceinline__ void CopyAsync16(uint32_t shared, const void* global, bool is_valid) {
  const int bytes = is_valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared),
               "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void CopyAsyncCommit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most `kPending` of this thread's committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint4 LoadShared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ float LoadSharedFloat(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ void StoreShared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(value) : "memory");
}
__device__ __forceinline__ void StoreShared(uint32_t address, uint2 value) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};\n" ::"r"(address), "r"(value.x), "r"(value.y)
               : "memory");
}
__device__ __forceinline__ void StoreShared(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};\n" ::"r"(address), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

#if __CUDA_ARCH__ >= 900
// Barriers in shared memory and the tensor copies that complete on them (PTX ISA, mbarrier and
// cp.async.bulk.tensor).
__device__ __forceinline__ void BarrierInit(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void BarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void BarrierArriveExpecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits until the barrier's phase of this parity is complete.
__device__ __forceinline__ void BarrierWait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Blocks of a cluster: a barrier that all threads of theirs that have not ended pass, and stores
// into the shared memory of the cluster's first block (PTX ISA, barrier.cluster and mapa).
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void StoreInFirstBlock(uint32_t shared, float value) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, 0;\n" : "=r"(there) : "r"(shared));
  asm volatile("st.shared::cluster.f32 [%0], %1;\n" ::"r"(there), "f"(value) : "memory");
}

// Written shared memory is visible to tensor copies and products that follow a barrier.
__device__ __forceinline__ void FenceForAsync() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Copies bytes that lie together: a multiple of 16, from where 16 bytes begin to where they do.
__device__ __forceinline__ void CopyBytes(uint32_t shared, const void* global, int bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

// Copies a box of a two-dimensional array; what lies outside of the array comes as zeros.
__device__ __forceinline__ void CopyBox(uint32_t shared, const CUtensorMap& map, int column,
                                        int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];\n" ::"r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same of a three-dimensional one, from the beginning of its third dimension on.
__device__ __forceinline__ void CopyBox3(uint32_t shared, const CUtensorMap& map, int column,
                                         int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(0), "r"(barrier)
      : "memory");
}

// The L2's policy for what is read once (PTX ISA, createpolicy).
__device__ __forceinline__ uint64_t EvictFirst() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void CopyBox(uint32_t shared, const CUtensorMap& map, int column,
                                        int row, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}
#endif

// Programmatic dependent launch (CUDA C++ Programming Guide): the next kernel in the stream may
// start once every block of this one has called LaunchDependents; it sees what this one wrote after
// its own WaitForDependency. Without hardware for it (before sm_90) kernels run one after the other
// and both do nothing.
__device__ __forceinline__ void WaitForDependency() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void LaunchDependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

__device__ __forceinline__ float ToFloat(float value) { return value; }
__device__ __forceinline__ float ToFloat(__half value) { return __half2float(value); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T FromFloat(float value);
template <>
__device__ __forceinline__ float FromFloat<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half FromFloat<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Two 16-bit values in one register.
template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  using Type = __half2;
  static __device__ __forceinline__ float2 ToFloats(uint32_t bits) {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  }
  static __device__ __forceinline__ uint32_t FromFloats(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ __forceinline__ float2 ToFloats(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  }
  static __device__ __forceinline__ uint32_t FromFloats(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

// Eight 16-bit values to f32.
template <typename T>
__device__ __forceinline__ void Unpack(uint4 bits, float (&values)[8]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Pair<T>::ToFloats(words[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

template <typename T>
__device__ __forceinline__ uint4 Pack(const float (&values)[8]) {
  return make_uint4(
      Pair<T>::FromFloats(values[0], values[1]), Pair<T>::FromFloats(values[2], values[3]),
      Pair<T>::FromFloats(values[4], values[5]), Pair<T>::FromFloats(values[6], values[7]));
}

// The angles of the pairs of eight neighbouring dimensions, of a row of a kernel's rotary tables `cos`
// and `sin`, [rows, rotary_dim / 2] each.
struct Rotation {
  float cos[4], sin[4];

  template <typename Args>
  __device__ __forceinline__ Rotation(const Args& args, int row, int dim, bool is_there = true) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_rotated = is_there && dim + 2 * i < args.rotary_dim;
      const int64_t at = static_cast<int64_t>(row) * (args.rotary_dim / 2) + dim / 2 + i;
      cos[i] = is_rotated ? __ldcg(args.cos + at) : 1.0f;
      sin[i] = is_rotated ? __ldcg(args.sin + at) : 0.0f;
    }
  }

  // Rotates the pairs and rounds them to the element type.
  template <typename T>
  __device__ __forceinline__ uint4 Rotate(uint4 bits) const {
    float values[8], rotated[8];
    Unpack<T>(bits, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rotated[2 * i] = values[2 * i] * cos[i] - values[2 * i + 1] * sin[i];
      rotated[2 * i + 1] = values[2 * i + 1] * cos[i] + values[2 * i] * sin[i];
    }
    return Pack<T>(rotated);
  }
};

// Rounding to INT8 as `quantize_weight` does it: max |.| / 127 is the scale (1 for zeros), halves go to
// even.

// Of magnitudes. As integers, because NaN is then above infinity, not left out.
struct Largest {
  __device__ __forceinline__ float operator()(float a, float b) const {
    return __uint_as_float(max(__float_as_uint(a), __float_as_uint(b)));
  }
};

// NaN if `largest` is not finite: times the rounded values infinity might be a score of minus infinity,
// which does not show.
__device__ __forceinline__ float Int8Scale(float largest) {
  largest += largest - largest;
  return largest == 0.0f ? 1.0f : __fdiv_rn(largest, 127.0f);
}

// Divides by the scale and rounds four values to bytes.
class Int8Rounding {
 public:
  __device__ __forceinline__ explicit Int8Rounding(float scale)
      : scale_(scale), inverse_(1.0f / scale), is_normal_(scale > 0x1p-100f) {}

  __device__ __forceinline__ uint32_t Round4(const float* values) const {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float quotient;
      if (is_normal_) {
        // The quotient's nearest value (Markstein 1990), for a fraction of a division's price.
        // Its magnitude is below 127.5.
        const float estimate = __fmul_rn(values[i], inverse_);
        const float rest = __fmaf_rn(-estimate, scale_, values[i]);
        quotient = __fmaf_rn(rest, inverse_, estimate);
      } else {
        quotient = fminf(fmaxf(__fdiv_rn(values[i], scale_), -127.0f), 127.0f);
      }
      // The sum's last bits are the integer: with 1.5 * 2^23 there is no place for a fraction.
      words[i] = __float_as_uint(__fadd_rn(quotient, 12582912.0f));
    }
    return __byte_perm(__byte_perm(words[0], words[1], 0x0040),
                       __byte_perm(words[2], words[3], 0x0040), 0x5410);
  }

 private:
  float scale_;
  float inverse_;
  bool is_normal_;
};

// Two INT8 values, those of `word` that `selector` puts into bytes 0 and 2, as 16-bit numbers, exactly;
// their scale is applied to the sum.
template <typename T>
__device__ __forceinline__ uint32_t WidenPair(uint32_t word, uint32_t selector) {
  if constexpr (std::is_same_v<T, __half>) {
    // 0x6400 + u is 1024 + u; u = value + 128.
    const uint32_t raised = __byte_perm(word ^ 0x80808080u, 0x64646464u, selector);
    const __half2 pair = __hsub2(*reinterpret_cast<const __half2*>(&raised),
                                 __half2(__half_raw{0x6480}, __half_raw{0x6480}));
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    // 0x4300 + u is 128 + u for seven bits u; the eighth bit, as the sign, turns the 128 to
    // subtract into 256.
    const uint32_t raised = __byte_perm(word, 0x43434343u, selector);
    const uint32_t low = raised & 0xff7fff7fu;
    const uint32_t offset = raised & 0xff80ff80u;
    const __nv_bfloat162 pair = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&low),
                                        *reinterpret_cast<const __nv_bfloat162*>(&offset));
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// The selectors of `WidenPair` for the first and the last two values of a word: each below the
// constant's byte.
inline constexpr uint32_t kFirstTwo = 0x4140;
inline constexpr uint32_t kLastTwo = 0x4342;

// Eight INT8 values as pairs of 16-bit numbers.
template <typename T>
struct Widened {
  uint32_t words[4];

  __device__ __forceinline__ Widened(uint32_t low, uint32_t high)
      : words{WidenPair<T>(low, kFirstTwo), WidenPair<T>(low, kLastTwo),
              WidenPair<T>(high, kFirstTwo), WidenPair<T>(high, kLastTwo)} {}
};

// sums += A B for 16 rows of A, 8 columns of B and 16 k, in f32; operands as the instruction m16n8k16
// has them: four registers of A, two of B.
template <typename T>
__device__ __forceinline__ void MultiplyAdd(float* sums, const uint32_t* a, uint32_t b0,
                                            uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};\n"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// A box is 128 bytes of each of some rows, in shared memory; their 16-byte pieces are swizzled so that
// no banks collide where a piece of several rows is read.
inline constexpr int kBoxRowBytes = 128;
inline constexpr int kBoxAlignment = 1024;

// Where piece `piece` (16 bytes) of row `row` lies in a box.
__device__ __forceinline__ uint32_t PieceOffset(int row, int piece) {
  return row * kBoxRowBytes + ((piece ^ (row % 8)) * 16);
}

inline const char* MessageOf(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// What a launch needs to know of a kernel; asked of the driver once per kernel and device.
struct KernelTraits {
  cudaError_t error = cudaErrorUnknown;
  bool is_hopper = false;  // compiled for sm_90 or newer: dependent launch, clusters, tensor copies
  int ptx_version = 0;     // such as 90: that of the code that runs
  int num_multiprocessors = 0;
};

// Whether the code that runs is that for sm_90a: all kernels of the library are compiled for the same.
inline bool HasWgmma(const KernelTraits& traits) { return traits.ptx_version == 90; }

// Finds out how `kKernel` was compiled, and lets it have shared_bytes(is_hopper) of dynamic shared
// memory. A kernel that runs from PTX older than sm_90 has no instruction that waits for the kernel
// ahead, and must not start early.
template <auto kKernel, typename SharedBytes>
const KernelTraits& TraitsOf(SharedBytes shared_bytes) {
  constexpr int kMaxDevices = 64;
  struct Entry {
    KernelTraits traits;
    bool is_known = false;
  };
  thread_local Entry entries[kMaxDevices];
  static const KernelTraits no_device;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return no_device;
  Entry& entry = entries[device];
  if (!entry.is_known) {
    KernelTraits& traits = entry.traits;
    cudaFuncAttributes attributes;
    traits.error = cudaFuncGetAttributes(&attributes, kKernel);
    if (traits.error == cudaSuccess) {
      traits.ptx_version = attributes.ptxVersion;
      traits.is_hopper = attributes.ptxVersion >= 90;
      const int bytes = shared_bytes(traits.is_hopper);
      traits.error =
          cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      // Such a kernel's data goes through it, and its blocks share what there is.
      constexpr int kMuch = 48 * 1024;
      if (traits.error == cudaSuccess && bytes >= kMuch) {
        traits.error = cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                            cudaSharedmemCarveoutMaxShared);
      }
    }
    if (traits.error == cudaSuccess) {
      traits.error = cudaDeviceGetAttribute(&traits.num_multiprocessors,
                                            cudaDevAttrMultiProcessorCount, device);
    }
    entry.is_known = traits.error == cudaSuccess;
  }
  return entry.traits;
}

// Launches so that the kernel may start before the one ahead has ended, in clusters of
// `cluster_size` blocks along x (1 before Hopper).
template <auto kKernel, typename Args>
cudaError_t Launch(const KernelTraits& traits, dim3 grid, int threads, int shared_bytes,
                   cudaStream_t stream, const Args& args, int cluster_size = 1) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster_size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !traits.is_hopper ? 0 : cluster_size == 1 ? 1 : 2;
  return cudaLaunchKernelEx(&config, kKernel, args);
}

// Describes an array of 1- or 2-byte values to the tensor copies, whose boxes have 128 bytes along the
// first dimension, as pieces that lie as `PieceOffset` says. Sizes from the one that runs fastest on;
// strides in bytes, of all but that. Returns null or a message.
template <int kRank>
const char* DescribeTensor(CUtensorMap* map, const void* data, int value_bytes,
                           const cuuint64_t (&sizes)[kRank], const cuuint64_t (&strides)[kRank - 1],
                           const cuuint32_t (&box)[kRank]) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(function)
               : nullptr;
  }();
  if (encode == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled";
  cuuint32_t element_strides[kRank];
  for (cuuint32_t& stride : element_strides) stride = 1;
  const CUresult result =
      encode(map, value_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16,
             kRank, const_cast<void*>(data), sizes, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled failed";
}

// A row-major array [rows, columns], in boxes of `box_rows` rows.
inline const char* DescribeBoxes(CUtensorMap* map, const void* data, int64_t rows, int64_t columns,
                                 int value_bytes, int box_rows) {
  return DescribeTensor<2>(
      map, data, value_bytes, {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
      {static_cast<cuuint64_t>(columns * value_bytes)},
      {static_cast<cuuint32_t>(kBoxRowBytes / value_bytes), static_cast<cuuint32_t>(box_rows)});
}

}  // namespace kogpt

#endif  // CUSTOM_OPS_CUDA_COMMON_CUH_
