// `linear` on a CPU: each weight is read once and multiplied with all rows, in f32.
//
// Bound by reading the weight, so it is converted in registers on its way: INT8 to f32 costs two instructions for 16
// values. INT8 dot products (VNNI) would need INT8 activations, which is another op: activations of 16 or 32 bits are
// not a small number of INT8 parts with one scale.
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
  void (*multiply_blocks)(const LinearParams& params, const float* h, int64_t h_stride, int64_t begin, int64_t end);
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
    for (int64_t row = begin; row < end; ++row) kernels.prepare_row(params, row, h.get() + row * h_stride, operand.get());
  };
  if (params.rows == 1) {
    prepare_rows(0, 1);
  } else {
    parallel_for(params.rows, prepare_rows);
  }
  parallel_for((params.num_outputs + kernels.block - 1) / kernels.block, [&](int64_t begin, int64_t end) {
    kernels.multiply_blocks(params, h.get(), h_stride, begin, end);
  });
}

}  // namespace kogpt
