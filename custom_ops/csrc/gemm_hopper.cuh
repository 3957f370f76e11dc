// Products of many rows on Hopper: CUTLASS's warp-specialised kernels (wgmma, tensor copies,
// persistent blocks) with the epilogue of gemm_epilogue.cuh.
//
// Only *_gemm_hopper.cu include this; they are compiled for sm_90a alone.
#ifndef CUSTOM_OPS_GEMM_HOPPER_CUH_
#define CUSTOM_OPS_GEMM_HOPPER_CUH_

#include <cutlass/arch/arch.h>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cstdint>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/pipeline/pipeline.hpp>
#include <type_traits>

#include "gemm.h"
#include "gemm_epilogue.cuh"

namespace kogpt {

// In CUTLASS's words M is the first operand's extent and N the second's. An INT8 x is the first
// operand, and a thread's neighbouring sums are neighbouring outputs of a row. A weight that is
// widened in registers has to be the first operand (`kIsWeightFirst`): then they are neighbouring
// rows of an output, and pass through a transposition.
//
// The warp that CUTLASS's kernels keep for the epilogue's loads runs ahead of the sums: it brings
// what belongs to a tile's columns and rows into shared memory, and its residual into L2.
template <bool kIsWeightFirst, int kTileM, int kTileN>
class HopperEpilogue {
  static constexpr int kTileRows = kIsWeightFirst ? kTileN : kTileM;
  static constexpr int kTileOutputs = kIsWeightFirst ? kTileM : kTileN;
  static constexpr int kStages = 2;
  static constexpr int kConsumerWarps = 8;
  static constexpr int kFlushGroups = 8;  // of eight outputs, that a warp writes at a time
  static constexpr int kWarpRows = 16;

 public:
  // What CUTLASS's kernels ask of an epilogue.
  using EpilogueSchedule = cutlass::epilogue::NoSmemWarpSpecialized;
  using DispatchPolicy = EpilogueSchedule;
  using ElementC = float;
  using ElementD = float;
  using ElementOutput = float;
  using ElementCompute = float;
  using ElementAccumulator = float;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;
  using GmemTiledCopyC = void;
  using GmemTiledCopyD = void;
  struct ThreadEpilogueOp {
    using ElementOutput = float;
    using ElementAccumulator = float;
    using ElementCompute = float;
    using ElementScalar = float;
    using ElementC = float;
    using ElementD = float;
    static constexpr int kCount = 1;
  };
  using LoadPipeline = cutlass::PipelineTransactionAsync<kStages>;
  using LoadPipelineState = cutlass::PipelineState<kStages>;
  using StorePipeline = cutlass::PipelineTmaStore<0>;
  using StorePipelineState = cutlass::PipelineState<0>;
  static constexpr uint32_t TmaTransactionBytes = 0;
  static constexpr bool RequiresTransactionBytes = false;
  using PipelineStorage = typename LoadPipeline::SharedStorage;
  struct StraightStorage {
    // Of each warp, 16 rows of 64 outputs in 16 bits; piece p of row r lies at p ^ (r % 8).
    uint4 staging[kConsumerWarps][kWarpRows * kFlushGroups];
    float4 columns[kStages][kTileOutputs / 2];  // scales and biases of two outputs
    float row_scales[kStages][kTileRows];
  };
  struct NoStorage {};
  using SharedStorage = std::conditional_t<kIsWeightFirst, NoStorage, StraightStorage>;
  using TensorStorage = SharedStorage;
  using TensorMapStorage = NoStorage;
  using Arguments = GemmEpilogue;
  using Params = GemmEpilogue;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments,
                                                  void*) {
    return arguments;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*,
                                              cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }
  template <class Tile>
  CUTLASS_HOST_DEVICE static constexpr int get_load_pipe_increment(Tile) {
    return 1;
  }
  template <class Tile>
  CUTLASS_HOST_DEVICE static constexpr int get_store_pipe_increment(Tile) {
    return 1;
  }
  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params&) {}

  CUTLASS_DEVICE HopperEpilogue(const Params& params, TensorStorage&) : epilogue_(params) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return true; }

  // Called by one warp for each tile of its block, in order.
  template <class ProblemShape, class BlockShape, class BlockCoord, class TiledMma>
  CUTLASS_DEVICE auto load(LoadPipeline pipeline, LoadPipelineState state, ProblemShape, BlockShape,
                           BlockCoord coord, TiledMma, int lane, TensorStorage& shared,
                           int = -1) const {
    const int tile_m = cute::get<0>(coord) * kTileM;
    const int tile_n = cute::get<1>(coord) * kTileN;
    const int first_row = kIsWeightFirst ? tile_n : tile_m;
    const int first_output = kIsWeightFirst ? tile_m : tile_n;
    pipeline.producer_acquire(state);
    if constexpr (!kIsWeightFirst) {
      for (int pair = lane; pair < kTileOutputs / 2; pair += kWarpSize) {
        const int m = first_output + 2 * pair;
        float4 columns = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (m < epilogue_.num_outputs) {
          columns = make_float4(epilogue_.weight_scale[m], epilogue_.weight_scale[m + 1],
                                epilogue_.Bias(m), epilogue_.Bias(m + 1));
        }
        shared.columns[state.index()][pair] = columns;
      }
      for (int row = lane; row < kTileRows; row += kWarpSize) {
        shared.row_scales[state.index()][row] = epilogue_.RowScale(first_row + row);
      }
    }
    if (epilogue_.residual != nullptr) {
      const int num_outputs = min(kTileOutputs, epilogue_.gelu_from - first_output);
      const int num_rows = num_outputs > 0 ? min(kTileRows, epilogue_.rows - first_row) : 0;
      for (int row = lane; row < num_rows; row += kWarpSize) {
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(
                         epilogue_.Residual(first_row + row) + first_output),
                     "r"(num_outputs * 4)
                     : "memory");
      }
    }
    pipeline.producer_commit(state);
    ++state;
    return state;
  }

  CUTLASS_DEVICE auto load_tail(LoadPipeline pipeline, LoadPipelineState state) const {
    pipeline.producer_tail(state);
    return state;
  }

  // Called by the threads that hold a tile's sums.
  template <class ProblemShape, class BlockShape, class BlockCoord, class Engine, class Layout,
            class TiledMma>
  CUTLASS_DEVICE auto store(LoadPipeline pipeline, LoadPipelineState state, StorePipeline,
                            StorePipelineState store_state, ProblemShape, BlockShape block_shape,
                            BlockCoord coord, const cute::Tensor<Engine, Layout>& sums,
                            TiledMma tiled_mma, int thread, TensorStorage& shared, int = -1) const {
    using namespace cute;
    const auto coords = tiled_mma.get_thread_slice(thread).partition_C(
        make_identity_tensor(take<0, 2>(block_shape)));
    const int tile_m = get<0>(coord) * kTileM;
    const int tile_n = get<1>(coord) * kTileN;
    pipeline.consumer_wait(state);
    // A thread's sums: ((pair, two of them eight apart along M, eight apart along N), tiles of M,
    // of N).
    static_assert(size<0, 0>(Layout{}) == 2 && size<0, 1>(Layout{}) == 2);
    constexpr int kGroups = size<0, 2>(Layout{});
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size<1>(Layout{}); ++i) {
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < size<2>(Layout{}); ++j) {
        const auto pair = [&](int half, int group) {
          return make_float2(static_cast<float>(sums(make_coord(0, half, group), i, j)),
                             static_cast<float>(sums(make_coord(1, half, group), i, j)));
        };
        const auto at = coords(make_coord(0, 0, 0), i, j);
        if constexpr (kIsWeightFirst) {
          FinishTransposed<kGroups>(tile_m + get<0>(at), tile_n + get<1>(at), pair);
        } else {
          const int lane = thread % kWarpSize;
          FinishStraight<kGroups>(tile_m, get<0>(at) - lane / 4, tile_n, get<1>(at) - lane % 4 * 2,
                                  pair, state.index(), shared);
        }
      }
    }
    pipeline.consumer_release(state);
    ++state;
    return cute::make_tuple(state, store_state);
  }

  CUTLASS_DEVICE auto store_tail(LoadPipeline, LoadPipelineState state, StorePipeline,
                                 StorePipelineState store_state) const {
    return cute::make_tuple(state, store_state);
  }

 private:
  enum class Target { kAct, kY16, kY32 };

  // Rows row and row + 8 of the warp's 16, from first_row on, by outputs from first_output on; both
  // are counted from the tile's.
  template <int kGroups, class PairAt>
  CUTLASS_DEVICE void FinishStraight(int tile_row, int first_row, int tile_output, int first_output,
                                     const PairAt& pair, int stage, TensorStorage& shared) const {
    const int from = tile_output + first_output;
    if (epilogue_.gelu_from < epilogue_.num_outputs && from + 8 * kGroups > epilogue_.gelu_from) {
      FinishAs<Target::kAct, kGroups>(tile_row, first_row, tile_output, first_output, pair, stage,
                                      shared);
    }
    if (from >= epilogue_.gelu_from) return;
    if (epilogue_.is_y_float) {
      FinishAs<Target::kY32, kGroups>(tile_row, first_row, tile_output, first_output, pair, stage,
                                      shared);
    } else {
      FinishAs<Target::kY16, kGroups>(tile_row, first_row, tile_output, first_output, pair, stage,
                                      shared);
    }
  }

  // For the outputs that go to kTarget. Straight-line code: with a branch for each pair, each would
  // wait for the one before.
  template <Target kTarget, int kGroups, class PairAt>
  CUTLASS_DEVICE void FinishAs(int tile_row, int first_row, int tile_output, int first_output,
                               const PairAt& pair, int stage, TensorStorage& shared) const {
    static_assert(kGroups % kFlushGroups == 0);
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int from_output = kTarget == Target::kAct ? epilogue_.gelu_from : 0;
    const int to_output = kTarget == Target::kAct ? epilogue_.num_outputs : epilogue_.gelu_from;
    const float row_scales[2] = {shared.row_scales[stage][first_row + lane / 4],
                                 shared.row_scales[stage][first_row + lane / 4 + 8]};
    const float4* const columns = shared.columns[stage] + first_output / 2 + lane % 4;
    const int row = tile_row + first_row;
    const int output = tile_output + first_output;
    if constexpr (kTarget == Target::kY32) {
      const bool is_there[2] = {row + lane / 4 < epilogue_.rows,
                                row + lane / 4 + 8 < epilogue_.rows};
      const int64_t start =
          static_cast<int64_t>(row + lane / 4) * epilogue_.gelu_from + output + lane % 4 * 2;
      const int64_t step = 8 * static_cast<int64_t>(epilogue_.gelu_from);
      float* const to = static_cast<float*>(epilogue_.y) + start;
      // The residual of a batch is under way while the one before is worked on.
      constexpr int kBatch = 4;
      float2 residual[2][kBatch][2];
      const auto load = [&](float2(&batch)[kBatch][2], int begin) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          CUTLASS_PRAGMA_UNROLL
          for (int half = 0; half < 2; ++half) {
            batch[i][half] = make_float2(0.0f, 0.0f);
            if (epilogue_.residual != nullptr && is_there[half] &&
                output + 8 * (begin + i) < to_output) {
              batch[i][half] = __ldcs(reinterpret_cast<const float2*>(
                  epilogue_.residual + start + half * step + 8 * (begin + i)));
            }
          }
        }
      };
      load(residual[0], 0);
      CUTLASS_PRAGMA_UNROLL
      for (int begin = 0; begin < kGroups; begin += kBatch) {
        if (begin + kBatch < kGroups) load(residual[(begin / kBatch + 1) % 2], begin + kBatch);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          const float4 column = columns[4 * (begin + i)];
          CUTLASS_PRAGMA_UNROLL
          for (int half = 0; half < 2; ++half) {
            float2 z = GemmEpilogue::Scaled(pair(half, begin + i), row_scales[half],
                                            make_float2(column.x, column.y),
                                            make_float2(column.z, column.w));
            z.x += residual[begin / kBatch % 2][i][half].x;
            z.y += residual[begin / kBatch % 2][i][half].y;
            if (is_there[half] && output + 8 * (begin + i) < to_output) {
              *reinterpret_cast<float2*>(to + half * step + 8 * (begin + i)) = z;
            }
          }
        }
      }
    } else {
      uint4* const staging = shared.staging[threadIdx.x / kWarpSize % kConsumerWarps];
      // This lane writes piece lane % 8 of rows lane / 8, lane / 8 + 4, and so on.
      const int own_row = lane / 8;
      const int piece = lane % 8;
      const int64_t row_length = kTarget == Target::kAct ? epilogue_.act_dim : epilogue_.gelu_from;
      uint16_t* const to =
          (kTarget == Target::kAct ? epilogue_.Act(row + own_row) : epilogue_.Y16(row + own_row)) +
          output + 8 * piece;
      CUTLASS_PRAGMA_UNROLL
      for (int begin = 0; begin < kGroups; begin += kFlushGroups) {
        uint32_t words[2][kFlushGroups];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kFlushGroups; ++i) {
          const float4 column = columns[4 * (begin + i)];
          CUTLASS_PRAGMA_UNROLL
          for (int half = 0; half < 2; ++half) {
            const float2 z = GemmEpilogue::Scaled(pair(half, begin + i), row_scales[half],
                                                  make_float2(column.x, column.y),
                                                  make_float2(column.z, column.w));
            words[half][i] = epilogue_.Pack16(kTarget == Target::kAct ? GemmEpilogue::Gelu(z) : z);
          }
        }
        __syncwarp();  // what was staged before has been read
        CUTLASS_PRAGMA_UNROLL
        for (int half = 0; half < 2; ++half) {
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < kFlushGroups; i += 4) {
            // Lane l names row l % 8 of matrix l / 8.
            const int staged_row = 8 * half + lane % 8;
            StoreMatrices(staging + staged_row * kFlushGroups + ((i + lane / 8) ^ (lane % 8)),
                          words[half][i], words[half][i + 1], words[half][i + 2],
                          words[half][i + 3]);
          }
        }
        __syncwarp();
        const int m = output + 8 * (begin + piece);
        const bool is_stored = m >= from_output && m < to_output;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kWarpRows; i += 4) {
          const uint4 bits = staging[(own_row + i) * kFlushGroups + (piece ^ ((own_row + i) % 8))];
          if (is_stored && row + own_row + i < epilogue_.rows) {
            *reinterpret_cast<uint4*>(to + i * row_length + 8 * begin) = bits;
          }
        }
      }
    }
  }

  // Four 8 x 8 matrices of 16-bit values.
  static CUTLASS_DEVICE void StoreMatrices(void* to, uint32_t a, uint32_t b, uint32_t c,
                                           uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                     SharedAddress(to)),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
  }

  // An 8 x 8 matrix of 16-bit values over a warp, two neighbours of a row in each lane.
  static CUTLASS_DEVICE uint32_t Transpose(uint32_t bits) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(transposed) : "r"(bits));
    return transposed;
  }

  // The same of f32 values, as their upper and lower halves.
  static CUTLASS_DEVICE float2 Transpose(float2 values) {
    const uint32_t first = __float_as_uint(values.x);
    const uint32_t second = __float_as_uint(values.y);
    const uint32_t low = Transpose(__byte_perm(first, second, 0x5410));
    const uint32_t high = Transpose(__byte_perm(first, second, 0x7632));
    return make_float2(__uint_as_float(__byte_perm(low, high, 0x5410)),
                       __uint_as_float(__byte_perm(low, high, 0x7632)));
  }

  // Two outputs, m and m + 8, of neighbouring rows in every group of eight, from `row` on. Groups
  // of eight outputs have one type of result (OnHopper).
  template <int kGroups, class PairAt>
  CUTLASS_DEVICE void FinishTransposed(int m, int row, const PairAt& pair) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    // After the transposition: two neighbouring outputs of every eighth row.
    row += lane / 4 - lane % 4 * 2;
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half, m += 8) {
      const bool is_there = m < epilogue_.num_outputs;
      const float scale = is_there ? __ldg(epilogue_.weight_scale + m) : 0.0f;
      const float bias = is_there ? epilogue_.Bias(m) : 0.0f;
      const float2 scales = make_float2(scale, scale);
      const float2 biases = make_float2(bias, bias);
      const int first = m - lane / 4 + lane % 4 * 2;
      const int rows_left = first < epilogue_.num_outputs ? epilogue_.rows - row : 0;
      if (m >= epilogue_.gelu_from) {
        uint16_t* const to = epilogue_.Act(row) + first;
        const int64_t step = 8 * static_cast<int64_t>(epilogue_.act_dim);
        CUTLASS_PRAGMA_UNROLL
        for (int group = 0; group < kGroups; ++group) {
          const float2 z = GemmEpilogue::Scaled(pair(half, group), 1.0f, scales, biases);
          const uint32_t bits = Transpose(epilogue_.Pack16(GemmEpilogue::Gelu(z)));
          if (8 * group < rows_left) GemmEpilogue::StorePair(to + group * step, bits);
        }
        continue;
      }
      const int64_t step = 8 * static_cast<int64_t>(epilogue_.gelu_from);
      if (!epilogue_.is_y_float) {
        uint16_t* const to = epilogue_.Y16(row) + first;
        CUTLASS_PRAGMA_UNROLL
        for (int group = 0; group < kGroups; ++group) {
          const float2 z = GemmEpilogue::Scaled(pair(half, group), 1.0f, scales, biases);
          const uint32_t bits = Transpose(epilogue_.Pack16(z));
          if (8 * group < rows_left) GemmEpilogue::StorePair(to + group * step, bits);
        }
        continue;
      }
      constexpr int kBatch = 8;
      static_assert(kGroups % kBatch == 0);
      float* const to = epilogue_.Y32(row) + first;
      float2 residual[2][kBatch];
      const auto load = [&](float2(&batch)[kBatch], int from) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          batch[i] = make_float2(0.0f, 0.0f);
          if (epilogue_.residual != nullptr && 8 * (from + i) < rows_left) {
            batch[i] = __ldcs(reinterpret_cast<const float2*>(epilogue_.Residual(row) + first +
                                                              (from + i) * step));
          }
        }
      };
      load(residual[0], 0);
      CUTLASS_PRAGMA_UNROLL
      for (int from = 0; from < kGroups; from += kBatch) {
        const float2(&now)[kBatch] = residual[from / kBatch % 2];
        if (from + kBatch < kGroups) load(residual[(from / kBatch + 1) % 2], from + kBatch);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          float2 z = Transpose(GemmEpilogue::Scaled(pair(half, from + i), 1.0f, scales, biases));
          z.x += now[i].x;
          z.y += now[i].y;
          if (8 * (from + i) < rows_left) *reinterpret_cast<float2*>(to + (from + i) * step) = z;
        }
      }
    }
  }

  GemmEpilogue epilogue_;
};

// A kernel for activations and weights of these types of CUTLASS. Tile: extents of a block's part
// of the product (the first operand's, the second's, K), of a cluster of blocks, the schedule.
template <class X, class Weight, class Tile>
class HopperGemm {
  static constexpr bool kIsWeightFirst = sizeof(Weight) < sizeof(X);
  using ElementA = std::conditional_t<kIsWeightFirst, Weight, X>;
  using ElementB = std::conditional_t<kIsWeightFirst, X, Weight>;
  using Sum = std::conditional_t<std::is_same_v<X, int8_t>, int32_t, float>;
  using Epilogue = HopperEpilogue<kIsWeightFirst, cute::size<0>(typename Tile::Shape{}),
                                  cute::size<1>(typename Tile::Shape{})>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, ElementA, cutlass::layout::RowMajor,
      16 / sizeof(ElementA), ElementB, cutlass::layout::ColumnMajor, 16 / sizeof(ElementB), Sum,
      typename Tile::Shape, typename Tile::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<
          static_cast<int>(sizeof(typename Epilogue::SharedStorage)) + 1024>,
      typename Tile::Schedule>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

 public:
  // `swizzle`: tiles that blocks take side by side before they go on along the other extent.
  static const char* Launch(const GemmParams& params, int num_multiprocessors, int swizzle,
                            cudaStream_t stream) {
    const int rows = static_cast<int>(params.rows);
    const int num_outputs = static_cast<int>(params.num_outputs);
    typename Gemm::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape =
        cute::make_shape(kIsWeightFirst ? num_outputs : rows, kIsWeightFirst ? rows : num_outputs,
                         static_cast<int>(params.k_dim), 1);
    arguments.mainloop.ptr_A =
        static_cast<const ElementA*>(kIsWeightFirst ? params.weight : params.x);
    arguments.mainloop.dA = {params.k_dim, cute::_1{}, 0};
    arguments.mainloop.ptr_B =
        static_cast<const ElementB*>(kIsWeightFirst ? params.x : params.weight);
    arguments.mainloop.dB = {params.k_dim, cute::_1{}, 0};
    arguments.epilogue = GemmEpilogue(params);
    arguments.hw_info.sm_count = num_multiprocessors;
    arguments.scheduler.max_swizzle_size = swizzle;
    Gemm gemm;
    cutlass::Status status = gemm.can_implement(arguments);
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
  }
};

template <int kM, int kN, int kK, int kClusterM, bool kIsPingpong>
struct HopperTile {
  using Shape = cute::Shape<cute::Int<kM>, cute::Int<kN>, cute::Int<kK>>;
  using Cluster = cute::Shape<cute::Int<kClusterM>, cute::_1, cute::_1>;
  using Schedule = std::conditional_t<kIsPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                      cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
};

}  // namespace kogpt

#endif  // CUSTOM_OPS_GEMM_HOPPER_CUH_
