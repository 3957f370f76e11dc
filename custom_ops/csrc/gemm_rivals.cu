#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <type_traits>

#include "gemm_dispatch.h"
#include "gemm_hopper.cuh"
#include "gemm_rivals.h"

namespace kogpt {
namespace {

template <class Tile, class Out>
class UnfusedGemm {
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename Tile::Shape,
      typename Tile::Cluster, cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void,
      cutlass::layout::RowMajor, 16 / sizeof(Out), Out, cutlass::layout::RowMajor, 16 / sizeof(Out),
      std::conditional_t<
          std::is_same_v<typename Tile::Schedule, cutlass::gemm::KernelTmaWarpSpecializedPingpong>,
          cutlass::epilogue::TmaWarpSpecialized,
          cutlass::epilogue::TmaWarpSpecializedCooperative>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16,
      int8_t, cutlass::layout::ColumnMajor, 16, int32_t, typename Tile::Shape,
      typename Tile::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      typename Tile::Schedule>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

 public:
  static const char* Launch(const GemmParams& params, int swizzle, cudaStream_t stream) {
    typename Gemm::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape =
        cute::make_shape(static_cast<int>(params.rows), static_cast<int>(params.num_outputs),
                         static_cast<int>(params.k_dim), 1);
    arguments.mainloop.ptr_A = static_cast<const int8_t*>(params.x);
    arguments.mainloop.dA = {params.k_dim, cute::_1{}, 0};
    arguments.mainloop.ptr_B = static_cast<const int8_t*>(params.weight);
    arguments.mainloop.dB = {params.k_dim, cute::_1{}, 0};
    arguments.epilogue.thread.alpha = 1.0f;
    arguments.epilogue.ptr_D = static_cast<Out*>(params.y);
    arguments.epilogue.dD = {params.num_outputs, cute::_1{}, 0};
    arguments.hw_info.sm_count = CurrentDevice().num_multiprocessors;
    arguments.scheduler.max_swizzle_size = swizzle;
    Gemm gemm;
    cutlass::Status status = gemm.can_implement(arguments);
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
  }
};

template <class Out>
const char* LaunchUnfused(const GemmParams& params, int shape, int swizzle, cudaStream_t stream) {
  switch (shape) {
    case 0:
      return UnfusedGemm<HopperTile<64, 256, 128, 1, true>, Out>::Launch(params, swizzle, stream);
    case 1:
      return UnfusedGemm<HopperTile<64, 256, 128, 2, true>, Out>::Launch(params, swizzle, stream);
    case 2:
      return UnfusedGemm<HopperTile<128, 256, 128, 2, false>, Out>::Launch(params, swizzle, stream);
    case 3:
      return UnfusedGemm<HopperTile<128, 128, 128, 2, true>, Out>::Launch(params, swizzle, stream);
    default:
      return "no such shape";
  }
}

}  // namespace

const char* UnfusedShapeName(int shape) {
  constexpr const char* kNames[kNumUnfusedShapes] = {"64x256 pingpong", "64x256 pingpong cluster 2",
                                                     "128x256 cluster 2",
                                                     "128x128 pingpong cluster 2"};
  return kNames[shape];
}

const char* LaunchUnfusedInt8(const GemmParams& params, int shape, int swizzle, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return params.y_dtype == DataType::kFloat32
             ? LaunchUnfused<float>(params, shape, swizzle, cuda_stream)
             : LaunchUnfused<cutlass::bfloat16_t>(params, shape, swizzle, cuda_stream);
}

const char* Bf16ShapeName(int shape) {
  constexpr const char* kNames[kNumBf16Shapes] = {"128x256 cluster 2", "64x256 pingpong cluster 2"};
  return kNames[shape];
}

const char* LaunchBf16(const GemmParams& params, int shape, int swizzle, void* stream) {
  using Bf16 = cutlass::bfloat16_t;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int num_multiprocessors = CurrentDevice().num_multiprocessors;
  switch (shape) {
    case 0:
      return HopperGemm<Bf16, Bf16, HopperTile<128, 256, 64, 2, false>>::Launch(
          params, num_multiprocessors, swizzle, cuda_stream);
    case 1:
      return HopperGemm<Bf16, Bf16, HopperTile<64, 256, 64, 2, true>>::Launch(
          params, num_multiprocessors, swizzle, cuda_stream);
    default:
      return "no such shape";
  }
}

}  // namespace kogpt
