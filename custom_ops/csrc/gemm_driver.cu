// Runs the kernels of the products of many rows without JAX: for compute-sanitizer and ncu, and to
// compare their tiles with CUTLASS's own kernels.
//
//   gemm_driver check        small products by every tile against sums in double, each twice,
//                            bit-equal; nothing written where nothing belongs
//   gemm_driver bench FILE   a layer's two products by every tile, beside gemm_rivals.h; JSON
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cuda_common.cuh"
#include "gemm.h"
#include "gemm_dispatch.h"
#include "gemm_rivals.h"
#include "quantize_rows.h"
#include "tile_sizes.h"

namespace kogpt {
namespace {

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "gemm_driver: %s\n", message.c_str());
  std::exit(1);
}

void Require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) Fail(std::string(what) + ": " + cudaGetErrorString(error));
}

void Require(const char* error) {
  if (error != nullptr) Fail(error);
}

int64_t SizeOf(DataType type) {
  return type == DataType::kFloat32 ? 4 : type == DataType::kInt8 ? 1 : 2;
}

__device__ float Random(uint64_t index, uint32_t seed) {
  uint64_t bits = index + 0x9e3779b97f4a7c15ull * (seed + 1);
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ull;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebull;
  return static_cast<float>(bits >> 40) * (1.0f / (1 << 24)) - 0.5f;
}

// offset + scale * (a number in [-1/2, 1/2)); INT8 all over its range.
__global__ void FillKernel(void* to, DataType type, int64_t count, uint32_t seed, float offset,
                           float scale) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const float random = Random(i, seed);
    const float value = offset + scale * random;
    if (type == DataType::kFloat32) static_cast<float*>(to)[i] = value;
    if (type == DataType::kFloat16) static_cast<__half*>(to)[i] = __float2half_rn(value);
    if (type == DataType::kBfloat16) {
      static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(value);
    }
    if (type == DataType::kInt8) {
      static_cast<int8_t*>(to)[i] = static_cast<int8_t>(__float2int_rn(254.0f * random));
    }
  }
}

// Device memory that lives as long as this.
class Array {
 public:
  Array(DataType type, int64_t count) : type_(type), count_(count) {
    Require(cudaMalloc(&data_, std::max<int64_t>(count * SizeOf(type), 1)), "cudaMalloc");
  }
  Array(DataType type, int64_t count, uint32_t seed, float offset, float scale)
      : Array(type, count) {
    FillKernel<<<1024, 256>>>(data_, type, count, seed, offset, scale);
    Require(cudaDeviceSynchronize(), "filling");
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { cudaFree(data_); }

  void* data() const { return data_; }
  // NaN as floating-point numbers.
  void Poison() { Require(cudaMemset(data_, 0xff, count_ * SizeOf(type_)), "cudaMemset"); }
  std::vector<char> Bytes() const {
    std::vector<char> bytes(count_ * SizeOf(type_));
    Require(cudaMemcpy(bytes.data(), data_, bytes.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return bytes;
  }
  std::vector<double> Values() const {
    const std::vector<char> bytes = Bytes();
    std::vector<double> values(count_);
    for (int64_t i = 0; i < count_; ++i) {
      const char* const at = bytes.data() + i * SizeOf(type_);
      float f = *at;
      uint16_t bits = 0;
      std::memcpy(&bits, at, std::min<size_t>(SizeOf(type_), 2));
      if (type_ == DataType::kFloat32) std::memcpy(&f, at, 4);
      if (type_ == DataType::kFloat16) {
        __half_raw raw;
        raw.x = bits;
        f = __half2float(__half(raw));
      }
      if (type_ == DataType::kBfloat16) {
        const uint32_t word = static_cast<uint32_t>(bits) << 16;
        std::memcpy(&f, &word, 4);
      }
      values[i] = f;
    }
    return values;
  }

 private:
  DataType type_;
  int64_t count_;
  void* data_ = nullptr;
};

struct Shape {
  DataType x_type;
  DataType type;
  int64_t rows;
  int64_t outputs;
  int64_t k;
  int64_t gelu_from;
  int64_t act_dim;
  bool is_y_float;
  bool has_bias;
  bool has_residual;
};

// A product's operands and results.
struct Problem {
  Shape shape;
  Array x, x_scale, weight, weight_scale, bias, residual, y, act;

  explicit Problem(const Shape& s, DataType weight_type = DataType::kInt8)
      : shape(s),
        x(s.x_type, s.rows * s.k, 1, 0.1f, 4.0f),
        x_scale(DataType::kFloat32, s.rows, 2, 0.02f, 0.01f),
        weight(weight_type, s.outputs * s.k, 3, 0.0f, 4 / std::sqrt(static_cast<float>(s.k))),
        weight_scale(
            DataType::kFloat32, s.outputs, 4,
            weight_type == DataType::kInt8 ? 0.02f / std::sqrt(static_cast<float>(s.k)) : 1.0f,
            weight_type == DataType::kInt8 ? 0.01f / std::sqrt(static_cast<float>(s.k)) : 0.0f),
        bias(s.type, s.outputs, 5, 0.0f, 1.0f),
        residual(DataType::kFloat32, s.rows * s.gelu_from, 6, 0.0f, 2.0f),
        y(s.is_y_float ? DataType::kFloat32 : s.type, s.rows * s.gelu_from),
        act(s.type, s.gelu_from < s.outputs ? s.rows * s.act_dim : 0) {}

  GemmParams Params(int64_t tile) const {
    GemmParams params = {};
    params.rows = shape.rows;
    params.num_outputs = shape.outputs;
    params.k_dim = shape.k;
    params.gelu_from = shape.gelu_from;
    params.act_dim = shape.gelu_from < shape.outputs ? shape.act_dim : 0;
    params.x_dtype = shape.x_type;
    params.dtype = shape.type;
    params.y_dtype = shape.is_y_float ? DataType::kFloat32 : shape.type;
    params.tile = tile;
    params.x = x.data();
    if (shape.x_type == DataType::kInt8) params.x_scale = static_cast<float*>(x_scale.data());
    params.weight = weight.data();
    params.weight_scale = static_cast<float*>(weight_scale.data());
    if (shape.has_bias) params.bias = bias.data();
    if (shape.has_residual) params.residual = static_cast<float*>(residual.data());
    if (shape.gelu_from > 0) params.y = y.data();
    if (shape.gelu_from < shape.outputs) params.act = act.data();
    return params;
  }

  const char* Launch(int64_t tile) const {
    const GemmParams params = Params(tile);
    return shape.x_type == DataType::kInt8 ? LaunchInt8Gemm(params, nullptr)
                                           : LaunchMixedGemm(params, nullptr);
  }
};

// The worst row's max |value - expected| / max |expected|; infinity where anything is no number.
double CheckValues(const Problem& problem, const std::vector<double>& y,
                   const std::vector<double>& act) {
  const Shape& s = problem.shape;
  const auto x = problem.x.Values(), x_scale = problem.x_scale.Values();
  const auto weight = problem.weight.Values(), weight_scale = problem.weight_scale.Values();
  const auto bias = problem.bias.Values(), residual = problem.residual.Values();
  const int64_t bias_from = s.gelu_from < s.outputs ? s.gelu_from : 0;
  double worst = 0;
  for (int64_t row = 0; row < s.rows; ++row) {
    double error[2] = {0, 0}, largest[2] = {0, 0};
    for (int64_t m = 0; m < s.outputs; ++m) {
      double z = 0;
      for (int64_t k = 0; k < s.k; ++k) z += x[row * s.k + k] * weight[m * s.k + k];
      z *= weight_scale[m] * (s.x_type == DataType::kInt8 ? x_scale[row] : 1);
      if (s.has_bias && m >= bias_from) z += bias[m - bias_from];
      const int part = m >= s.gelu_from;
      double got;
      if (part == 1) {
        z = z / 2 * (1 + std::tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)));
        got = act[row * s.act_dim + s.act_dim - s.outputs + m];
      } else {
        if (s.has_residual) z += residual[row * s.gelu_from + m];
        got = y[row * s.gelu_from + m];
      }
      const double difference = std::fabs(got - z);
      if (!std::isfinite(difference)) return INFINITY;
      error[part] = std::max(error[part], difference);
      largest[part] = std::max(largest[part], std::fabs(z));
    }
    for (int part = 0; part < 2; ++part) {
      if (largest[part] > 0) worst = std::max(worst, error[part] / largest[part]);
    }
    for (int64_t m = 0; s.gelu_from < s.outputs && m < s.act_dim - (s.outputs - s.gelu_from); ++m) {
      if (!std::isnan(act[row * s.act_dim + m])) return INFINITY;  // attention's
    }
  }
  return worst;
}

bool CheckProducts() {
  constexpr DataType kBf16 = DataType::kBfloat16, kFp16 = DataType::kFloat16;
  bool is_good = true;
  for (const DataType x_type : {DataType::kInt8, kBf16, kFp16}) {
    const DataType type = x_type == kFp16 ? kFp16 : kBf16;
    for (const Shape& shape : {Shape{x_type, type, 65, 304, 208, 104, 264, false, true, false},
                               Shape{x_type, type, 131, 272, 528, 272, 0, true, true, true},
                               Shape{x_type, type, 300, 40, 64, 0, 48, false, false, false},
                               Shape{x_type, type, 67, 99, 48, 31, 77, false, true, false},
                               Shape{x_type, type, 9, 130, 112, 130, 0, true, false, true},
                               Shape{x_type, type, 1, 1, 16, 1, 0, false, true, false}}) {
      Problem problem(shape);
      std::vector<char> first_y, first_act;
      const int tiles = NumTiles(x_type == DataType::kInt8, CurrentDevice().is_hopper);
      for (int tile = -1; tile < tiles; ++tile) {
        double error = 0;
        bool is_same = true;
        for (int run = 0; run < 2; ++run) {
          problem.y.Poison();
          problem.act.Poison();
          Require(problem.Launch(tile));
          Require(cudaDeviceSynchronize(), "product");
          const auto y = problem.y.Bytes(), act = problem.act.Bytes();
          if (tile == -1 && run == 0) {
            first_y = y;
            first_act = act;
            error = CheckValues(problem, problem.y.Values(), problem.act.Values());
          }
          is_same = is_same && y == first_y && act == first_act;
        }
        const bool is_fine = is_same && error <= 0.004;
        if (!is_fine || tile == -1) {
          std::printf("%s %s x %lld x %lld x %lld tile %d: error %.2g%s\n",
                      is_fine ? "ok  " : "FAIL",
                      x_type == DataType::kInt8 ? "int8"
                      : x_type == kFp16         ? "fp16"
                                                : "bf16",
                      static_cast<long long>(shape.rows), static_cast<long long>(shape.outputs),
                      static_cast<long long>(shape.k), tile, error, is_same ? "" : ", other bits");
        }
        is_good = is_good && is_fine;
      }
    }
  }
  return is_good;
}

bool CheckQuantization() {
  bool is_good = true;
  for (const DataType type : {DataType::kFloat32, DataType::kFloat16, DataType::kBfloat16}) {
    for (const int64_t k : {16, 1040, 20480, 20496}) {
      for (const bool has_extras : {false, true}) {
        constexpr int64_t kRows = 5;
        const Array x(type, kRows * k, 1, 0.5f, 4.0f);
        const Array ln_scale(DataType::kBfloat16, k, 2, 1.0f, 0.5f);
        const Array ln_bias(DataType::kBfloat16, k, 3, 0.0f, 0.5f);
        const Array multiplier(DataType::kFloat32, k, 4, 1.0f, 0.5f);
        Array qvalue(DataType::kInt8, kRows * k), scale(DataType::kFloat32, kRows);
        QuantizeRowsParams params = {};
        params.rows = kRows;
        params.k_dim = k;
        params.x_dtype = type;
        params.ln_dtype = DataType::kBfloat16;
        params.epsilon = 1e-5f;
        params.x = x.data();
        if (has_extras) {
          params.ln_scale = ln_scale.data();
          params.ln_bias = ln_bias.data();
          params.k_multiplier = static_cast<float*>(multiplier.data());
        }
        params.qvalue = static_cast<int8_t*>(qvalue.data());
        params.scale = static_cast<float*>(scale.data());
        qvalue.Poison();
        scale.Poison();
        Require(LaunchQuantizeRows(params, nullptr));
        Require(cudaDeviceSynchronize(), "quantize_rows");
        const auto values = x.Values(), scales = scale.Values(), integers = qvalue.Values();
        const auto s = ln_scale.Values(), b = ln_bias.Values(), f = multiplier.Values();
        double worst = 0;
        for (int64_t row = 0; row < kRows; ++row) {
          const double* const h = values.data() + row * k;
          double mean = 0, variance = 0;
          for (int64_t i = 0; i < k; ++i) mean += h[i] / k;
          for (int64_t i = 0; i < k; ++i) variance += (h[i] - mean) * (h[i] - mean) / k;
          for (int64_t i = 0; i < k; ++i) {
            const double value =
                has_extras ? ((h[i] - mean) / std::sqrt(variance + 1e-5) * s[i] + b[i]) * f[i]
                           : h[i];
            const double difference = std::fabs(value / scales[row] - integers[row * k + i]);
            worst = std::isfinite(difference) ? std::max(worst, difference) : INFINITY;
          }
        }
        const bool is_fine = worst <= 0.501;
        std::printf("%s quantize_rows type %d K %lld extras %d: %.4f of a step off\n",
                    is_fine ? "ok  " : "FAIL", static_cast<int>(type), static_cast<long long>(k),
                    has_extras, worst);
        is_good = is_good && is_fine;
      }
    }
  }
  return is_good;
}

// Median of single launches, in microseconds.
double MedianUs(const std::function<const char*()>& launch) {
  constexpr int kWarmUp = 3, kRuns = 11;
  std::vector<cudaEvent_t> events(kRuns + 1);
  for (cudaEvent_t& event : events) Require(cudaEventCreate(&event), "cudaEventCreate");
  for (int i = 0; i < kWarmUp; ++i) Require(launch());
  for (int i = 0; i < kRuns; ++i) {
    Require(cudaEventRecord(events[i]), "cudaEventRecord");
    Require(launch());
  }
  Require(cudaEventRecord(events[kRuns]), "cudaEventRecord");
  Require(cudaDeviceSynchronize(), "timing");
  std::vector<float> times(kRuns);
  for (int i = 0; i < kRuns; ++i) cudaEventElapsedTime(&times[i], events[i], events[i + 1]);
  for (cudaEvent_t event : events) cudaEventDestroy(event);
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return 1e3 * times[kRuns / 2];
}

// One line of the table and of the JSON.
class Report {
 public:
  void Add(const std::string& what, const std::string& kernel, const Shape& shape, double us) {
    const double rate = 2e-6 * shape.rows * shape.outputs * shape.k / us;
    std::printf("%-14s %5lld x %5lld x %5lld  %-34s %8.1f us  %6.0f TOP/s\n", what.c_str(),
                static_cast<long long>(shape.rows), static_cast<long long>(shape.outputs),
                static_cast<long long>(shape.k), kernel.c_str(), us, rate);
    std::ostringstream line;
    line << "{\"what\": \"" << what << "\", \"kernel\": \"" << kernel
         << "\", \"rows\": " << shape.rows << ", \"outputs\": " << shape.outputs
         << ", \"k\": " << shape.k << ", \"us\": " << us << ", \"tera_ops_per_s\": " << rate << "}";
    lines_.push_back(line.str());
  }

  void AddBytes(const std::string& what, int64_t rows, int64_t k, double us, double bytes) {
    std::printf("%-30s %5lld x %5lld %8.1f us  %6.0f GB/s\n", what.c_str(),
                static_cast<long long>(rows), static_cast<long long>(k), us, bytes / us * 1e-3);
    std::ostringstream line;
    line << "{\"what\": \"" << what << "\", \"rows\": " << rows << ", \"k\": " << k
         << ", \"us\": " << us << ", \"bytes\": " << bytes << "}";
    lines_.push_back(line.str());
  }

  void Write(const std::string& path) const {
    cudaDeviceProp properties;
    int runtime = 0, driver = 0;
    Require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    Require(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
    Require(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    std::ofstream file(path);
    file << "{\n \"device\": \"" << properties.name << "\",\n \"cuda_runtime\": " << runtime
         << ",\n \"cuda_driver\": " << driver << ",\n \"rows\": [\n";
    for (size_t i = 0; i < lines_.size(); ++i) {
      file << "  " << lines_[i] << (i + 1 < lines_.size() ? ",\n" : "\n");
    }
    file << " ]\n}\n";
    if (!file) Fail("cannot write " + path);
  }

 private:
  std::vector<std::string> lines_;
};

std::string NumberedTile(bool is_int8, int index) {
  return "tile " + std::to_string(index) + ": " + TileName(is_int8, true, index);
}

// KoGPT's two products of a layer, as a prefill in W8A8, in W8A16 and in bf16 calls them.
void BenchProducts(int64_t rows, Report& report) {
  constexpr DataType kBf16 = DataType::kBfloat16;
  for (const bool is_out : {false, true}) {
    Shape shape = {DataType::kInt8, kBf16, rows, 28672, 4096, 12288, 20480, false, true, false};
    if (is_out) shape = {DataType::kInt8, kBf16, rows, 4096, 20480, 4096, 0, true, true, true};
    {
      const Problem problem(shape);
      for (int tile = -1; tile < kNumInt8Tiles; ++tile) {
        const double us = MedianUs([&] { return problem.Launch(tile); });
        report.Add("int8_gemm", tile < 0 ? "chosen" : NumberedTile(true, tile), shape, us);
      }
      const Array whole(DataType::kFloat32, shape.rows * shape.outputs);
      GemmParams params = problem.Params(-1);
      params.y = whole.data();
      for (int i = 0; i < kNumUnfusedShapes; ++i) {
        for (const int swizzle : {1, 2, 4, 8}) {
          const double us =
              MedianUs([&] { return LaunchUnfusedInt8(params, i, swizzle, nullptr); });
          report.Add("int8 unfused",
                     std::string(UnfusedShapeName(i)) + " swizzle " + std::to_string(swizzle),
                     shape, us);
        }
      }
    }
    shape.x_type = kBf16;
    {
      const Problem problem(shape);
      for (int tile = -1; tile < kNumMixedTiles; ++tile) {
        const double us = MedianUs([&] { return problem.Launch(tile); });
        report.Add("mixed_gemm", tile < 0 ? "chosen" : NumberedTile(false, tile), shape, us);
      }
    }
    const Problem problem(shape, kBf16);
    const GemmParams params = problem.Params(-1);
    for (int i = 0; i < kNumBf16Shapes; ++i) {
      for (const int swizzle : {1, 2, 8}) {
        const double us = MedianUs([&] { return LaunchBf16(params, i, swizzle, nullptr); });
        report.Add("bf16 fused",
                   std::string(Bf16ShapeName(i)) + " swizzle " + std::to_string(swizzle), shape,
                   us);
      }
    }
  }
}

// What stands in front of the two products; over more memory than the L2 holds, launches in a row.
void BenchQuantization(int64_t rows, Report& report) {
  for (const bool is_out : {false, true}) {
    const DataType type = is_out ? DataType::kBfloat16 : DataType::kFloat32;
    const int64_t k = is_out ? 20480 : 4096;
    const int64_t bytes = rows * k * (SizeOf(type) + 1) + rows * 4;
    const int copies = static_cast<int>(std::max<int64_t>(2, 256000000 / bytes));
    const Array x(type, copies * rows * k, 1, 0.5f, 4.0f);
    const Array qvalue(DataType::kInt8, copies * rows * k), scale(DataType::kFloat32, rows);
    const Array parameters(DataType::kBfloat16, k, 2, 1.0f, 0.5f);
    const Array multiplier(DataType::kFloat32, k, 4, 1.0f, 0.5f);
    for (const bool has_multiplier : {false, true}) {
      QuantizeRowsParams params = {};
      params.rows = rows;
      params.k_dim = k;
      params.x_dtype = type;
      params.ln_dtype = DataType::kBfloat16;
      params.epsilon = 1e-5f;
      if (!is_out) params.ln_scale = params.ln_bias = parameters.data();
      if (has_multiplier) params.k_multiplier = static_cast<float*>(multiplier.data());
      params.scale = static_cast<float*>(scale.data());
      constexpr int kLaunches = 50;
      const double us = MedianUs([&] {
        const char* message = nullptr;
        for (int i = 0; i < kLaunches && message == nullptr; ++i) {
          const int64_t first = i % copies * rows * k;
          params.x = static_cast<char*>(x.data()) + first * SizeOf(type);
          params.qvalue = static_cast<int8_t*>(qvalue.data()) + first;
          message = LaunchQuantizeRows(params, nullptr);
        }
        return message;
      });
      report.AddBytes(std::string("quantize_rows") + (is_out ? "" : " LayerNorm") +
                          (has_multiplier ? " multiplier" : ""),
                      rows, k, us / kLaunches, static_cast<double>(bytes));
    }
  }
}

int Main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "check" && argc == 2) {
    const bool products = CheckProducts();
    return CheckQuantization() && products ? 0 : 1;
  }
  if (mode == "bench" && argc == 3) {
    if (!CurrentDevice().is_hopper) Fail("bench compares Hopper's kernels");
    Report report;
    for (const int64_t rows : {512, 2040, 8192}) {
      BenchProducts(rows, report);
      BenchQuantization(rows, report);
    }
    report.Write(argv[2]);
    return 0;
  }
  Fail("usage: gemm_driver check | bench FILE");
}

}  // namespace
}  // namespace kogpt

int main(int argc, char** argv) { return kogpt::Main(argc, argv); }
