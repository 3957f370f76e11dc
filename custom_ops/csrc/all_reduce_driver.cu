// Runs the all-reduce kernel without JAX.
//
//   all_reduce_driver check [DEVICE ...]   shapes and types against sums in double, each twice,
//                                          bit-equal on all ranks; then a rank that comes late, and
//                                          one that does not come at all
//   all_reduce_driver time [DEVICE ...]    one call behind another, at several numbers of rows
//
// A rank for each device, default 0 0: two ranks of one device, each with a stream of its own.
#include <cuda_runtime.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "all_reduce.h"
#include "cuda_common.cuh"

namespace kogpt {
namespace {

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "all_reduce_driver: %s\n", message.c_str());
  std::exit(1);
}

void Require(cudaError_t error) {
  if (error != cudaSuccess) Fail(cudaGetErrorString(error));
}

void Require(const char* error) {
  if (error != nullptr) Fail(error);
}

struct Shape {
  int64_t rows, row_len;
  bool has_bias, has_residual;
  DataType bias_dtype;
  int64_t splits = 1;  // of x, with scales if there are several
  bool has_norm = false;
};

// A rank's arrays and stream.
struct Rank {
  int device;
  cudaStream_t stream;
  std::vector<double> x, x_size;  // the values, and what their parts' magnitudes add up to
  std::vector<float> residual;
  AllReduceParams params;

  void Use() const { Require(cudaSetDevice(device)); }

  template <typename T>
  T* Upload(const std::vector<T>& values) const {
    Use();
    T* memory = nullptr;
    Require(cudaMalloc(&memory, values.size() * sizeof(T)));
    Require(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyDefault));
    return memory;
  }

  std::vector<float> Output() const {
    Use();
    Require(cudaStreamSynchronize(stream));
    std::vector<float> y(params.rows * params.row_len);
    Require(cudaMemcpy(y.data(), params.y, y.size() * sizeof(float), cudaMemcpyDefault));
    return y;
  }

  // LayerNorm of y, in f32, and its bits.
  std::vector<float> NormOutput(std::vector<uint16_t>* bits) const {
    bits->resize(params.rows * params.row_len);
    Require(cudaMemcpy(bits->data(), params.h, 2 * bits->size(), cudaMemcpyDefault));
    std::vector<float> values(bits->size());
    for (size_t i = 0; i < values.size(); ++i) {
      const void* const value = bits->data() + i;
      values[i] = params.h_dtype == DataType::kFloat16
                      ? __half2float(*static_cast<const __half*>(value))
                      : __bfloat162float(*static_cast<const __nv_bfloat16*>(value));
    }
    return values;
  }

  void Poison() const {
    Use();
    const int64_t size = params.rows * params.row_len;
    Require(cudaMemset(params.y, 0xff, size * sizeof(float)));
    if (params.h != nullptr) Require(cudaMemset(params.h, 0xff, 2 * size));
    Require(cudaDeviceSynchronize());
  }

  void Launch() const {
    Use();
    Require(CheckAllReduce(params));
    Require(LaunchAllReduce(params, stream));
  }

  void Free() const {
    Use();
    Require(cudaStreamSynchronize(stream));
    for (const void* memory :
         {static_cast<const void*>(params.x.values), static_cast<const void*>(params.x.scale),
          params.bias, static_cast<const void*>(params.residual),
          static_cast<const void*>(params.y)}) {
      Require(cudaFree(const_cast<void*>(memory)));
    }
    Require(cudaStreamDestroy(stream));
  }
};

const AllReduceGroup* MakeGroup(const std::vector<int>& devices) {
  std::string error;
  const AllReduceGroup* group = MakeAllReduceGroup(devices, &error);
  if (group == nullptr) Fail(error);
  return group;
}

// Random arrays; the same bias and residual for all ranks, whose values `bias` gives.
std::vector<Rank> MakeRanks(const AllReduceGroup* group, const std::vector<int>& devices,
                            const Shape& shape, std::vector<double>* bias) {
  std::mt19937 random(static_cast<unsigned>(shape.rows * 131 + shape.row_len));
  std::student_t_distribution<double> draw(4.0);
  const size_t size = shape.rows * shape.row_len;
  std::vector<float> residual(size), bias_f32(shape.row_len);
  std::vector<__half> bias_f16(shape.row_len);
  std::vector<__nv_bfloat16> bias_bf16(shape.row_len);
  for (float& value : residual) value = static_cast<float>(draw(random));
  for (int64_t i = 0; i < shape.row_len; ++i) {
    bias_f32[i] = static_cast<float>(draw(random));
    bias_f16[i] = __float2half_rn(bias_f32[i]);
    bias_bf16[i] = __float2bfloat16_rn(bias_f32[i]);
    bias->push_back(shape.bias_dtype == DataType::kFloat32   ? bias_f32[i]
                    : shape.bias_dtype == DataType::kFloat16 ? __half2float(bias_f16[i])
                                                             : __bfloat162float(bias_bf16[i]));
  }
  std::vector<Rank> ranks;
  for (size_t i = 0; i < devices.size(); ++i) {
    Rank rank = {};
    rank.device = devices[i];
    const int64_t stride = shape.splits == 1 ? shape.row_len : shape.row_len + 12;
    std::vector<float> parts(shape.splits * shape.rows * stride, NAN), scale(shape.row_len);
    for (float& value : scale) value = static_cast<float>(std::exp(0.3 * draw(random)));
    rank.x.resize(size);
    rank.x_size.resize(size);
    for (int64_t at = 0; at < static_cast<int64_t>(size); ++at) {
      const int64_t row = at / shape.row_len, column = at % shape.row_len;
      const double factor = shape.splits == 1 ? 1.0 : scale[column];
      for (int64_t split = 0; split < shape.splits; ++split) {
        float& part = parts[(split * shape.rows + row) * stride + column];
        part = static_cast<float>(draw(random));
        rank.x[at] += factor * part;
        rank.x_size[at] += factor * std::abs(part);
      }
    }
    rank.residual = residual;
    rank.Use();
    Require(cudaStreamCreateWithFlags(&rank.stream, cudaStreamNonBlocking));
    AllReduceParams& params = rank.params;
    params.rows = shape.rows;
    params.row_len = shape.row_len;
    params.bias_dtype = shape.bias_dtype;
    params.x = {rank.Upload(parts), shape.splits, stride,
                shape.splits == 1 ? nullptr : rank.Upload(scale)};
    params.y = rank.Upload(residual);
    if (shape.has_residual) params.residual = rank.Upload(residual);
    if (shape.has_bias) {
      params.bias =
          shape.bias_dtype == DataType::kFloat32   ? static_cast<void*>(rank.Upload(bias_f32))
          : shape.bias_dtype == DataType::kFloat16 ? static_cast<void*>(rank.Upload(bias_f16))
                                                   : static_cast<void*>(rank.Upload(bias_bf16));
    }
    if (shape.has_norm) {
      params.h_dtype = shape.bias_dtype;
      params.ln_scale = params.ln_bias = params.bias;
      params.h = rank.Upload(residual);
      params.epsilon = 1e-5f;
    }
    params.prefetch_bias = true;
    params.group = group;
    params.rank = static_cast<int>(i);
    params.timeout_ms = 20000;
    ranks.push_back(rank);
  }
  for (const Rank& rank : ranks) {
    rank.Use();
    Require(cudaDeviceSynchronize());
  }
  return ranks;
}

bool IsNan(const std::vector<float>& values) {
  for (const float value : values) {
    if (!std::isnan(value)) return false;
  }
  return true;
}

void RequireSum(const std::vector<Rank>& ranks, const Shape& shape, const std::vector<double>& bias,
                const std::vector<float>& y) {
  for (size_t i = 0; i < y.size(); ++i) {
    double sum = shape.has_bias ? bias[i % shape.row_len] : 0.0;
    double size = std::abs(sum);
    if (shape.has_residual) sum += ranks[0].residual[i], size += std::abs(ranks[0].residual[i]);
    for (const Rank& rank : ranks) sum += rank.x[i], size += rank.x_size[i];
    // A sum of n terms rounds n - 1 times, and each scale rounds once.
    const double allowed = (ranks.size() + shape.splits + 1) * 0x1p-24 * size;
    if (!(std::abs(y[i] - sum) <= allowed)) {
      Fail("value " + std::to_string(i) + " is " + std::to_string(y[i]) + ", should be " +
           std::to_string(sum));
    }
  }
}

// LayerNorm of y, whose scale and bias are both `bias`.
void RequireNorm(const Shape& shape, const std::vector<double>& bias, const std::vector<float>& y,
                 const std::vector<float>& h) {
  for (int64_t row = 0; row < shape.rows; ++row) {
    const float* const values = y.data() + row * shape.row_len;
    double mean = 0.0, squares = 0.0, largest = 0.0;
    for (int64_t i = 0; i < shape.row_len; ++i) mean += values[i] / shape.row_len;
    for (int64_t i = 0; i < shape.row_len; ++i) squares += (values[i] - mean) * (values[i] - mean);
    const double inverse = 1.0 / std::sqrt(squares / shape.row_len + 1e-5);
    const auto expected = [&](int64_t i) {
      return (values[i] - mean) * inverse * bias[i] + bias[i];
    };
    for (int64_t i = 0; i < shape.row_len; ++i) largest = std::max(largest, std::abs(expected(i)));
    const double ulp = shape.bias_dtype == DataType::kFloat16 ? 0x1p-11 : 0x1p-8;
    for (int64_t i = 0; i < shape.row_len; ++i) {
      const double allowed = 1e-5 * largest + ulp * std::abs(expected(i));
      if (!(std::abs(h[row * shape.row_len + i] - expected(i)) <= allowed)) {
        Fail("LayerNorm of row " + std::to_string(row) + ", value " + std::to_string(i) + " is " +
             std::to_string(h[row * shape.row_len + i]) + ", should be " +
             std::to_string(expected(i)));
      }
    }
  }
}

void Check(const std::vector<int>& devices) {
  const AllReduceGroup* group = MakeGroup(devices);
  std::vector<Shape> shapes;
  for (const auto& [rows, row_len] : std::vector<std::pair<int64_t, int64_t>>{{1, 4},
                                                                              {1, 12},
                                                                              {1, 1536},
                                                                              {3, 20},
                                                                              {7, 1540},
                                                                              {1, 4096},
                                                                              {8, 4096},
                                                                              {64, 4096},
                                                                              {128, 4096}}) {
    for (const DataType bias_dtype :
         {DataType::kFloat32, DataType::kFloat16, DataType::kBfloat16}) {
      shapes.push_back({rows, row_len, true, true, bias_dtype});
    }
    shapes.push_back({rows, row_len, false, false, DataType::kFloat32});
    shapes.push_back({rows, row_len, false, true, DataType::kFloat32});
    shapes.push_back({rows, row_len, true, false, DataType::kBfloat16});
    for (const int64_t splits : {2, 4, 8}) {
      shapes.push_back({rows, row_len, true, true, DataType::kBfloat16, splits});
      if (rows > kLinearMaxRows || row_len % 8 != 0) continue;
      shapes.push_back({rows, row_len, true, true, DataType::kBfloat16, splits, true});
      shapes.push_back({rows, row_len, true, false, DataType::kFloat16, 1, true});
    }
  }
  for (const Shape& shape : shapes) {
    std::vector<double> bias;
    const std::vector<Rank> ranks = MakeRanks(group, devices, shape, &bias);
    std::vector<float> first;
    std::vector<uint16_t> first_bits, bits;
    for (int time = 0; time < 3; ++time) {
      for (const Rank& rank : ranks) rank.Poison();
      for (const Rank& rank : ranks) rank.Launch();
      for (const Rank& rank : ranks) {
        const std::vector<float> y = rank.Output();
        if (first.empty()) RequireSum(ranks, shape, bias, y), first = y;
        if (std::memcmp(first.data(), y.data(), y.size() * sizeof(float)) != 0) {
          Fail("ranks or calls differ in a bit");
        }
        if (!shape.has_norm) continue;
        RequireNorm(shape, bias, y, rank.NormOutput(&bits));
        if (first_bits.empty()) first_bits = bits;
        if (first_bits != bits) Fail("LayerNorms of ranks or calls differ in a bit");
      }
    }
    for (const Rank& rank : ranks) rank.Free();
  }
  std::printf("%zu shapes right on %zu ranks\n", shapes.size(), devices.size());

  const Shape shape = {8, 4096, true, true, DataType::kBfloat16};
  std::vector<double> bias;
  std::vector<Rank> ranks = MakeRanks(group, devices, shape, &bias);
  for (const Rank& rank : ranks) {
    rank.Launch();
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
  }
  for (const Rank& rank : ranks) RequireSum(ranks, shape, bias, rank.Output());
  for (const Rank& rank : ranks) rank.Free();
  std::printf("a rank that comes late is waited for\n");

  group = MakeGroup(devices);  // the other one is of no use after this
  bias.clear();
  ranks = MakeRanks(group, devices, shape, &bias);
  for (Rank& rank : ranks) rank.params.timeout_ms = 200;
  for (size_t i = 0; i + 1 < ranks.size(); ++i) ranks[i].Launch();
  const auto begin = std::chrono::steady_clock::now();
  for (size_t i = 0; i + 1 < ranks.size(); ++i) {
    if (!IsNan(ranks[i].Output())) Fail("a sum without all parts is not NaN");
  }
  const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - begin;
  if (MissingDevice(*group) != devices.back()) Fail("the rank that did not come is not named");
  ranks.back().Launch();
  if (!IsNan(ranks.back().Output())) Fail("a group that has failed still adds up");
  std::printf("a rank that does not come ends in NaN after %.2f s\n", waited.count());
}

void Time(const std::vector<int>& devices) {
  const AllReduceGroup* group = MakeGroup(devices);
  std::vector<Shape> shapes;
  for (const int64_t rows : {1, 8, 32, 64}) {
    shapes.push_back({rows, 4096, true, true, DataType::kBfloat16});
    shapes.push_back({rows, 4096, true, true, DataType::kBfloat16, 4});
    shapes.push_back({rows, 4096, true, true, DataType::kBfloat16, 4, true});
  }
  for (const Shape& shape : shapes) {
    std::vector<double> bias;
    const std::vector<Rank> ranks = MakeRanks(group, devices, shape, &bias);
    constexpr int kCalls = 1000;
    const auto run = [&] {
      std::vector<float> times(ranks.size());
      std::vector<std::thread> threads;
      for (size_t i = 0; i < ranks.size(); ++i) {
        threads.emplace_back([&, i] {
          const Rank& rank = ranks[i];
          rank.Use();
          cudaEvent_t begin, end;
          Require(cudaEventCreate(&begin));
          Require(cudaEventCreate(&end));
          rank.Launch();
          Require(cudaEventRecord(begin, rank.stream));
          for (int call = 0; call < kCalls; ++call) rank.Launch();
          Require(cudaEventRecord(end, rank.stream));
          Require(cudaStreamSynchronize(rank.stream));
          Require(cudaEventElapsedTime(&times[i], begin, end));
        });
      }
      for (std::thread& thread : threads) thread.join();
      return 1e3 * times[0] / kCalls;
    };
    run();
    std::printf("%3lld rows of 4096 in %lld parts%s: %.2f us a call\n",
                static_cast<long long>(shape.rows), static_cast<long long>(shape.splits),
                shape.has_norm ? ", LayerNorm" : "", run());
    for (const Rank& rank : ranks) rank.Free();
  }
}

}  // namespace
}  // namespace kogpt

int main(int argc, char** argv) {
  // A kernel that is loaded while another one waits for it would not end.
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  const std::string command = argc > 1 ? argv[1] : "";
  std::vector<int> devices;
  for (int i = 2; i < argc; ++i) devices.push_back(std::atoi(argv[i]));
  if (devices.empty()) devices = {0, 0};
  kogpt::Require(kogpt::AllReduceProcessProblem());
  if (command == "check") {
    kogpt::Check(devices);
  } else if (command == "time") {
    kogpt::Time(devices);
  } else {
    kogpt::Fail("usage: all_reduce_driver check|time [DEVICE ...]");
  }
  return 0;
}
