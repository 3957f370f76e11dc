// Warpgroup matrix products of sm_90a (PTX ISA, wgmma): sums in registers, 64 rows of A times a tile
// of B in shared memory. All four warps of a warpgroup call each of these together.
#ifndef CUSTOM_OPS_WGMMA_CUH_
#define CUSTOM_OPS_WGMMA_CUH_

#include <cstdint>

#include "cuda_common.cuh"

#if __CUDA_ARCH__ == 900

namespace kogpt {

// Before the first product, and after registers that a product takes were written.
__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most `kPending` of the committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving what it does with registers across a wait for the products that
// write them.
template <int kCount>
__device__ __forceinline__ void WgmmaKeep(int32_t (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void WgmmaKeep(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// Describes a tile of 16- or 8-bit values in boxes of 128 bytes a row with swizzled pieces, as
// `DescribeBoxes` makes them.
//
// An operand whose rows run along k: `box` is the box that holds its k, 16 k are 32 bytes on, and
// eight rows are 1024 bytes. (The leading offset has no meaning with this swizzle.)
__device__ __forceinline__ uint64_t DescribeAlongK(uint32_t box) {
  return (uint64_t{1} << 62) | (uint64_t{1024 / 16} << 32) | (uint64_t{1} << 16) |
         ((box & 0x3ffff) / 16);
}

// An operand with k going down the rows (transposed): `box` is its first, `next_box` bytes before
// that of the next 64 columns; 16 k are 16 rows, 2048 bytes on.
__device__ __forceinline__ uint64_t DescribeAcrossK(uint32_t box, uint32_t next_box) {
  return (uint64_t{1} << 62) | (uint64_t{1024 / 16} << 32) | (uint64_t{next_box / 16} << 16) |
         ((box & 0x3ffff) / 16);
}

// sums = A B^T (+ sums when `adds`) for 64 rows, 32 bytes of k and kColumns columns, both along k in
// shared memory; of 16-bit values in f32, of INT8 in 32-bit integers. Lane l of warp w has rows 16 w + l / 4 and 8 below it, and columns 8 i + 2 (l % 4) and the
// one after it: sums[4 i .. 4 i + 1] of the first row, sums[4 i + 2 .. 4 i + 3] of the second.
template <typename T, int kColumns>
struct WgmmaShared;

// sums += A B for 64 rows, 16 k and kColumns columns, B across k in shared memory, and A in
// registers: of lane l a[0] and a[1] have k = 2 (l % 4) and the one after it for the rows that it has
// of sums, a[2] and a[3] those of k + 8.
template <typename T, int kColumns>
struct WgmmaRegisters;

// clang-format off
#define KOGPT_REGISTERS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define KOGPT_REGISTERS_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KOGPT_REGISTERS_112 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55"
#define KOGPT_REGISTERS_128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KOGPT_REGISTERS_256 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define KOGPT_SUMS_8(C, i) \
    C(sums[i]), C(sums[i + 1]), C(sums[i + 2]), C(sums[i + 3]), \
    C(sums[i + 4]), C(sums[i + 5]), C(sums[i + 6]), C(sums[i + 7])
#define KOGPT_SUMS_32(C) KOGPT_SUMS_8(C, 0), KOGPT_SUMS_8(C, 8)
#define KOGPT_SUMS_64(C) KOGPT_SUMS_32(C), KOGPT_SUMS_8(C, 16), KOGPT_SUMS_8(C, 24)
#define KOGPT_SUMS_112(C) \
    KOGPT_SUMS_64(C), KOGPT_SUMS_8(C, 32), KOGPT_SUMS_8(C, 40), KOGPT_SUMS_8(C, 48)
#define KOGPT_SUMS_128(C) KOGPT_SUMS_112(C), KOGPT_SUMS_8(C, 56)
#define KOGPT_SUMS_256(C) \
    KOGPT_SUMS_128(C), KOGPT_SUMS_8(C, 64), KOGPT_SUMS_8(C, 72), KOGPT_SUMS_8(C, 80), \
    KOGPT_SUMS_8(C, 88), KOGPT_SUMS_8(C, 96), KOGPT_SUMS_8(C, 104), KOGPT_SUMS_8(C, 112), \
    KOGPT_SUMS_8(C, 120)

#define KOGPT_WGMMA_SHARED(T, TYPE, N, A, B, ADDS) \
  template <> \
  struct WgmmaShared<T, N> { \
    static __device__ __forceinline__ void Run(float (&sums)[N / 2], uint64_t a, uint64_t b, \
                                               bool adds) { \
      asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS ", 0;\n" \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" \
                   KOGPT_REGISTERS_##N "}, " A ", " B ", adds, 1, 1, 0, 0;\n}\n" \
                   : KOGPT_SUMS_##N("+f") \
                   : "l"(a), "l"(b), "r"(static_cast<int>(adds))); \
    } \
  };
#define KOGPT_WGMMA_INT8(N, A, B, ADDS) \
  template <> \
  struct WgmmaShared<int8_t, N> { \
    static __device__ __forceinline__ void Run(int32_t (&sums)[N / 2], uint64_t a, uint64_t b, \
                                               bool adds) { \
      asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS ", 0;\n" \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" \
                   KOGPT_REGISTERS_##N "}, " A ", " B ", adds;\n}\n" \
                   : KOGPT_SUMS_##N("+r") \
                   : "l"(a), "l"(b), "r"(static_cast<int>(adds))); \
    } \
  };
#define KOGPT_WGMMA_REGISTERS(T, TYPE, N, A0, A1, A2, A3, B) \
  template <> \
  struct WgmmaRegisters<T, N> { \
    static __device__ __forceinline__ void Run(float (&sums)[N / 2], const uint32_t* a, \
                                               uint64_t b) { \
      asm volatile("{\n.reg .pred adds;\nsetp.eq.b32 adds, 0, 0;\n" \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" \
                   KOGPT_REGISTERS_##N "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B \
                   ", adds, 1, 1, 1;\n}\n" \
                   : KOGPT_SUMS_##N("+f") \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
    } \
  };
KOGPT_WGMMA_SHARED(__half, "f16", 32, "%16", "%17", "%18")
KOGPT_WGMMA_SHARED(__half, "f16", 64, "%32", "%33", "%34")
KOGPT_WGMMA_SHARED(__half, "f16", 112, "%56", "%57", "%58")
KOGPT_WGMMA_SHARED(__half, "f16", 128, "%64", "%65", "%66")
KOGPT_WGMMA_REGISTERS(__half, "f16", 64, "%32", "%33", "%34", "%35", "%36")
KOGPT_WGMMA_REGISTERS(__half, "f16", 128, "%64", "%65", "%66", "%67", "%68")
KOGPT_WGMMA_REGISTERS(__half, "f16", 256, "%128", "%129", "%130", "%131", "%132")
KOGPT_WGMMA_SHARED(__nv_bfloat16, "bf16", 32, "%16", "%17", "%18")
KOGPT_WGMMA_SHARED(__nv_bfloat16, "bf16", 64, "%32", "%33", "%34")
KOGPT_WGMMA_SHARED(__nv_bfloat16, "bf16", 112, "%56", "%57", "%58")
KOGPT_WGMMA_SHARED(__nv_bfloat16, "bf16", 128, "%64", "%65", "%66")
KOGPT_WGMMA_REGISTERS(__nv_bfloat16, "bf16", 64, "%32", "%33", "%34", "%35", "%36")
KOGPT_WGMMA_REGISTERS(__nv_bfloat16, "bf16", 128, "%64", "%65", "%66", "%67", "%68")
KOGPT_WGMMA_REGISTERS(__nv_bfloat16, "bf16", 256, "%128", "%129", "%130", "%131", "%132")
KOGPT_WGMMA_INT8(32, "%16", "%17", "%18")
KOGPT_WGMMA_INT8(64, "%32", "%33", "%34")
KOGPT_WGMMA_INT8(112, "%56", "%57", "%58")
KOGPT_WGMMA_INT8(128, "%64", "%65", "%66")
#undef KOGPT_WGMMA_SHARED
#undef KOGPT_WGMMA_INT8
#undef KOGPT_WGMMA_REGISTERS
#undef KOGPT_SUMS_8
#undef KOGPT_SUMS_32
#undef KOGPT_SUMS_64
#undef KOGPT_SUMS_112
#undef KOGPT_SUMS_128
#undef KOGPT_SUMS_256
#undef KOGPT_REGISTERS_32
#undef KOGPT_REGISTERS_64
#undef KOGPT_REGISTERS_112
#undef KOGPT_REGISTERS_128
#undef KOGPT_REGISTERS_256
// clang-format on

}  // namespace kogpt

#endif  // __CUDA_ARCH__ == 900

#endif  // CUSTOM_OPS_WGMMA_CUH_
