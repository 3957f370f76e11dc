// `linear` on a CPU: each weight is read once and multiplied with all rows, in f32.
//
// A few rows are bound by reading the weight, so it is converted in registers on its way: INT8 to
// f32 costs two instructions for 16 values. On a Sapphire Rapids core that reads 13.9 GB/s, one row
// with an INT8 weight of [8192, 4096] takes 13.1 GB/s of it, three rows 12, four 10; from eight
// rows on arithmetic decides, 90 GFLOP/s.
//
// INT8 dot products (VNNI) would not serve here. They need INT8 activations: those of 16 or 32 bits
// are not a sum of few INT8 parts with one scale a row, so a product of such parts would round what
// this op must not. And where arithmetic decides, three parts for 24 bits take half the
// instructions of f32, at best; where reading decides, nothing is left to gain.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <memory>

#include "cpu_common.h"
#include "linear.h"

#define KOGPT_ISA_BODY "linear_cpu.inc"
#include "for_each_isa.inc"

namespace kogpt {
namespace {

struct LinearKernels {
  void (*prepare_row)(const LinearParams& params, int64_t row, float* h, float* operand);
  void (*multiply_blocks)(const LinearParams& params, const float* h, int64_t h_stride,
                          int64_t begin, int64_t end);
  int64_t block;
};

LinearKernels KernelsFor(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return {avx512::PrepareRow, avx512::MultiplyBlocks, avx512::kBlock};
  if (isa == Isa::kAvx2) return {avx2::PrepareRow, avx2::MultiplyBlocks, avx2::kBlock};
#endif
  static_cast<void>(isa);
  return {portable::PrepareRow, portable::MultiplyBlocks, portable::kBlock};
}

}  // namespace

void LinearCpu(const LinearParams& params, const ParallelFor& parallel_for) {
  const LinearKernels kernels = KernelsFor(HostIsa());
  const int64_t h_stride = (params.k_dim + 15) / 16 * 16;  // whole vectors on every instruction set
  const std::unique_ptr<float[]> h(new float[params.rows * h_stride]);
  const auto prepare_rows = [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> operand(new float[h_stride]);
    for (int64_t row = begin; row < end; ++row)
      kernels.prepare_row(params, row, h.get() + row * h_stride, operand.get());
  };
  if (params.rows == 1) {
    prepare_rows(0, 1);
  } else {
    parallel_for(params.rows, prepare_rows);
  }
  parallel_for((params.num_outputs + kernels.block - 1) / kernels.block,
               [&](int64_t begin, int64_t end) {
                 kernels.multiply_blocks(params, h.get(), h_stride, begin, end);
               });
}

}  // namespace kogpt
