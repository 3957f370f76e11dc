// Runs the CUDA kernels without JAX: for compute-sanitizer and ncu, and to time a token's kernels
// alone.
//
//   ops_driver check FILE             every case of tests/op_shapes.txt against sums in double,
//                                     each twice, bit-equal
//   ops_driver token [key=value ...]  one decode step of a model, as often as it takes
//   ops_driver ops [key=value ...]    each op of a step alone, over the weights and caches of all
//                                     layers
//
// token and ops take rows, context, capacity, layers, model_dim, ffn_dim, head_dim, vocab, weight
// (bf16 or int8), graph (0 or 1) and prefetch (0 or 1).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cuda_common.cuh"
#include "decode_attention.h"
#include "linear.h"

namespace kogpt {
namespace {

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "ops_driver: %s\n", message.c_str());
  std::exit(1);
}

void Require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) Fail(std::string(what) + ": " + cudaGetErrorString(error));
}

void Require(const char* error) {
  if (error != nullptr) Fail(error);
}

using Options = std::map<std::string, std::string>;

Options ParseOptions(std::istream& words) {
  Options options;
  std::string word;
  while (words >> word) {
    const size_t equal = word.find('=');
    if (equal == std::string::npos) Fail("not key=value: " + word);
    options[word.substr(0, equal)] = word.substr(equal + 1);
  }
  return options;
}

// An option that the code looks up, or its default. What is never looked up is an error: see
// `RequireAllUsed`.
class Case {
 public:
  explicit Case(Options options) : options_(std::move(options)) {}

  std::string Text(const std::string& key, const std::string& otherwise) {
    const auto found = options_.find(key);
    if (found == options_.end()) return otherwise;
    used_[key] = true;
    return found->second;
  }
  int64_t Int(const std::string& key, int64_t otherwise) {
    const std::string text = Text(key, "");
    return text.empty() ? otherwise : std::stoll(text);
  }
  std::vector<int32_t> Ints(const std::string& key) {
    std::vector<int32_t> values;
    std::istringstream parts(Text(key, ""));
    std::string part;
    while (std::getline(parts, part, ',')) values.push_back(std::stoi(part));
    return values;
  }
  void RequireAllUsed() const {
    for (const auto& [key, value] : options_) {
      if (used_.find(key) == used_.end()) Fail("unknown option " + key + "=" + value);
    }
  }

 private:
  Options options_;
  std::map<std::string, bool> used_;
};

DataType TypeNamed(const std::string& name) {
  if (name == "fp32" || name == "f32") return DataType::kFloat32;
  if (name == "fp16") return DataType::kFloat16;
  if (name == "bf16") return DataType::kBfloat16;
  if (name == "int8") return DataType::kInt8;
  Fail("unknown type " + name);
}

int64_t SizeOf(DataType type) {
  return type == DataType::kFloat32 ? 4 : type == DataType::kInt8 ? 1 : 2;
}

// Rounds to the type and back.
double Rounded(DataType type, double value) {
  const float f = static_cast<float>(value);
  if (type == DataType::kFloat16) return __half2float(__float2half_rn(f));
  if (type == DataType::kBfloat16) return __bfloat162float(__float2bfloat16_rn(f));
  if (type == DataType::kInt8) return std::clamp(std::nearbyint(f), -127.0f, 127.0f);
  return f;
}

// A device array and the values that it was filled with.
struct Array {
  DataType type;
  std::vector<double> values;
  void* device = nullptr;

  Array(DataType type_in, std::vector<double> values_in)
      : type(type_in), values(std::move(values_in)) {
    std::vector<char> bytes(std::max<size_t>(values.size() * SizeOf(type), 1));
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = Rounded(type, values[i]);
      const float f = static_cast<float>(values[i]);
      char* at = bytes.data() + i * SizeOf(type);
      if (type == DataType::kFloat32) std::memcpy(at, &f, 4);
      if (type == DataType::kInt8) *at = static_cast<char>(static_cast<int>(f));
      if (type == DataType::kFloat16) {
        const __half h = __float2half_rn(f);
        std::memcpy(at, &h, 2);
      }
      if (type == DataType::kBfloat16) {
        const __nv_bfloat16 b = __float2bfloat16_rn(f);
        std::memcpy(at, &b, 2);
      }
    }
    Require(cudaMalloc(&device, bytes.size()), "cudaMalloc");
    Require(cudaMemcpy(device, bytes.data(), bytes.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(device); }

  std::vector<double> Read() const {
    std::vector<char> bytes(values.size() * SizeOf(type));
    Require(cudaMemcpy(bytes.data(), device, bytes.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    std::vector<double> result(values.size());
    for (size_t i = 0; i < result.size(); ++i) {
      const char* at = bytes.data() + i * SizeOf(type);
      if (type == DataType::kFloat32) {
        float f;
        std::memcpy(&f, at, 4);
        result[i] = f;
      }
      if (type == DataType::kInt8) result[i] = *at;
      if (type == DataType::kFloat16) {
        __half h;
        std::memcpy(&h, at, 2);
        result[i] = __half2float(h);
      }
      if (type == DataType::kBfloat16) {
        __nv_bfloat16 b;
        std::memcpy(&b, at, 2);
        result[i] = __bfloat162float(b);
      }
    }
    return result;
  }
};

std::mt19937_64 generator(1234);

std::vector<double> Normal(int64_t count, double scale) {
  std::normal_distribution<double> normal(0, scale);
  std::vector<double> values(count);
  for (double& value : values) value = normal(generator);
  return values;
}

std::vector<double> Poison(int64_t count) { return std::vector<double>(count, NAN); }

int32_t* Semaphores() {
  static int32_t* semaphores = nullptr;
  if (semaphores == nullptr) {
    Require(cudaMalloc(&semaphores, kNumSemaphores * 4), "cudaMalloc");
    Require(cudaMemset(semaphores, 0, kNumSemaphores * 4), "cudaMemset");
  }
  return semaphores;
}

void RequireSemaphoresZero() {
  std::vector<int32_t> values(kNumSemaphores);
  Require(cudaMemcpy(values.data(), Semaphores(), values.size() * 4, cudaMemcpyDeviceToHost),
          "cudaMemcpy");
  for (int32_t value : values) {
    if (value != 0) Fail("a kernel left a semaphore that is not zero");
  }
}

// Largest difference over the largest reference value; NaN where they disagree about what is
// written.
double RelativeError(const std::vector<double>& actual, const std::vector<double>& expected) {
  double error = 0, largest = 1e-30;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::isnan(expected[i]) && std::isnan(actual[i])) continue;  // poison that stays
    const double difference = std::abs(actual[i] - expected[i]);
    if (!(difference <= error)) error = difference;
    if (!std::isnan(expected[i])) largest = std::max(largest, std::abs(expected[i]));
  }
  return error / largest;
}

bool BitEqual(const std::vector<double>& a, const std::vector<double>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

double Gelu(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

double CheckLinearCase(Case options) {
  LinearParams params = {};
  params.rows = options.Int("rows", 1);
  params.num_outputs = options.Int("outputs", 0);
  params.k_dim = options.Int("k", 0);
  params.gelu_from = options.Int("gelu_from", params.num_outputs);
  const bool has_gelu = params.gelu_from != params.num_outputs;
  params.act_dim = options.Int("act_dim", has_gelu ? params.num_outputs - params.gelu_from : 0);
  params.dtype = TypeNamed(options.Text("dtype", "bf16"));
  const std::string weight_name = options.Text("weight", "same");
  params.weight_dtype = weight_name == "same" ? params.dtype : TypeNamed(weight_name);
  const bool has_norm = options.Int("ln", 0), has_residual = options.Int("residual", 0);
  const bool has_bias = options.Int("bias", 0), has_multiplier = options.Int("k_multiplier", 0);
  params.x_dtype = has_norm ? DataType::kFloat32 : params.dtype;
  const DataType y_type = TypeNamed(options.Text("y", "f32"));
  params.y_dtype = has_residual ? DataType::kFloat32 : y_type;
  params.epsilon = 1e-5f;
  options.RequireAllUsed();

  const int64_t rows = params.rows, m_dim = params.num_outputs, k_dim = params.k_dim;
  const bool is_int8 = params.weight_dtype == DataType::kInt8;
  const Array x(params.x_dtype, Normal(rows * k_dim, 1));
  const Array weight(params.weight_dtype, Normal(m_dim * k_dim, is_int8 ? 40 : 0.05));
  std::vector<double> scales = Normal(m_dim, 1);
  for (double& scale : scales) scale = 0.001 + 0.001 * std::abs(scale);
  const Array weight_scale(DataType::kFloat32, scales);
  const Array bias(params.dtype, Normal(has_gelu ? m_dim - params.gelu_from : m_dim, 0.5));
  const Array ln_scale(params.dtype, Normal(k_dim, 1)), ln_bias(params.dtype, Normal(k_dim, 0.2));
  const Array multiplier(DataType::kFloat32, Normal(k_dim, 1));
  const Array residual(DataType::kFloat32, Normal(rows * params.gelu_from, 1));
  const Array h(params.dtype, Poison(rows * k_dim));
  params.partials_bytes = LinearPartialsBytes(rows);
  const Array partials(DataType::kFloat32, Poison(params.partials_bytes / 4));
  params.x = x.device;
  params.weight = weight.device;
  if (is_int8) params.weight_scale = static_cast<float*>(weight_scale.device);
  if (has_bias) params.bias = bias.device;
  if (has_norm) params.ln_scale = ln_scale.device, params.ln_bias = ln_bias.device;
  if (has_multiplier) params.k_multiplier = static_cast<float*>(multiplier.device);
  if (has_residual) params.residual = static_cast<float*>(residual.device);
  params.h = h.device;
  params.partials = static_cast<float*>(partials.device);
  params.semaphores = Semaphores();

  std::vector<double> first_y, first_act, y_values, act_values;
  for (int run = 0; run < 2; ++run) {
    const Array y(params.y_dtype, Poison(rows * params.gelu_from));
    const Array act(params.dtype, Poison(rows * params.act_dim));
    params.y = params.gelu_from > 0 ? y.device : nullptr;
    params.act = has_gelu ? act.device : nullptr;
    Require(CheckLinear(params));
    Require(LaunchLinear(params, nullptr));
    Require(cudaDeviceSynchronize(), "linear");
    RequireSemaphoresZero();
    y_values = y.Read();
    act_values = act.Read();
    if (run == 0) first_y = y_values, first_act = act_values;
  }
  if (!BitEqual(first_y, y_values) || !BitEqual(first_act, act_values)) Fail("two runs differ");

  std::vector<double> expected_y(rows * params.gelu_from),
      expected_act = Poison(rows * params.act_dim);
  std::vector<double> hidden(k_dim);
  for (int64_t row = 0; row < rows; ++row) {
    double mean = 0, variance = 0;
    for (int64_t k = 0; k < k_dim; ++k) mean += x.values[row * k_dim + k] / k_dim;
    for (int64_t k = 0; k < k_dim; ++k)
      variance += std::pow(x.values[row * k_dim + k] - mean, 2) / k_dim;
    for (int64_t k = 0; k < k_dim; ++k) {
      double value = x.values[row * k_dim + k];
      if (has_norm)
        value =
            (value - mean) / std::sqrt(variance + 1e-5) * ln_scale.values[k] + ln_bias.values[k];
      if (has_multiplier) value *= multiplier.values[k];
      hidden[k] = Rounded(params.dtype, value);
    }
    for (int64_t m = 0; m < m_dim; ++m) {
      double sum = 0;
      for (int64_t k = 0; k < k_dim; ++k) sum += hidden[k] * weight.values[m * k_dim + k];
      if (is_int8) sum *= weight_scale.values[m];
      if (m < params.gelu_from) {
        if (has_bias && !has_gelu) sum += bias.values[m];
        if (has_residual) sum += residual.values[row * params.gelu_from + m];
        expected_y[row * params.gelu_from + m] = sum;
      } else {
        if (has_bias) sum += bias.values[m - params.gelu_from];
        expected_act[row * params.act_dim + params.act_dim - m_dim + m] = Gelu(sum);
      }
    }
  }
  return std::max(RelativeError(y_values, expected_y), RelativeError(act_values, expected_act));
}

double CheckDecodeAttentionCase(Case options) {
  DecodeAttentionParams params = {};
  params.batch = options.Int("batch", 1);
  params.num_heads = options.Int("heads", 1);
  params.head_dim = options.Int("head_dim", 64);
  params.page_len = options.Int("page_len", 64);
  params.max_pages = options.Int("max_pages", 1);
  params.rotary_dim = options.Int("rotary_dim", 0);
  params.act_dim = options.Int("act_dim", params.num_heads * params.head_dim);
  params.dtype = TypeNamed(options.Text("dtype", "bf16"));
  params.num_pages = params.batch * params.max_pages + 1;
  const std::vector<int32_t> lengths = options.Ints("lengths"), num_new = options.Ints("num_new");
  options.RequireAllUsed();
  const int64_t batch = params.batch, heads = params.num_heads, width = params.head_dim,
                page_len = params.page_len;
  if (static_cast<int64_t>(lengths.size()) != batch || num_new.size() != lengths.size())
    Fail("lengths and num_new must have a value a row");

  std::vector<int32_t> pages(batch * params.max_pages);
  for (size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<int32_t>(i);
  std::shuffle(pages.begin(), pages.end(), generator);
  const auto slot = [&](int64_t row, int64_t head, int64_t key) {
    return ((pages[row * params.max_pages + key / page_len] * heads + head) * page_len +
            key % page_len) *
           width;
  };
  const int64_t cache_size = params.num_pages * heads * page_len * width;
  std::vector<double> k_start = Poison(cache_size), v_start = Poison(cache_size);
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t key = 0; key < lengths[row]; ++key) {
        const std::vector<double> k = Normal(width, 1), v = Normal(width, 1);
        std::copy(k.begin(), k.end(), k_start.begin() + slot(row, head, key));
        std::copy(v.begin(), v.end(), v_start.begin() + slot(row, head, key));
      }
    }
  }
  const Array qkv(params.dtype, Normal(batch * 3 * heads * width, 2));
  const int64_t half = params.rotary_dim / 2;
  std::vector<double> cosines(batch * half), sines(batch * half);
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = lengths[row] * std::pow(10000.0, -2.0 * i / params.rotary_dim);
      cosines[row * half + i] = std::cos(angle);
      sines[row * half + i] = std::sin(angle);
    }
  }
  const Array cos(DataType::kFloat32, cosines), sin(DataType::kFloat32, sines);
  int32_t* ints;
  Require(cudaMalloc(&ints, (pages.size() + 2 * batch) * 4), "cudaMalloc");
  Require(cudaMemcpy(ints, pages.data(), pages.size() * 4, cudaMemcpyHostToDevice), "cudaMemcpy");
  Require(cudaMemcpy(ints + pages.size(), lengths.data(), batch * 4, cudaMemcpyHostToDevice),
          "cudaMemcpy");
  Require(
      cudaMemcpy(ints + pages.size() + batch, num_new.data(), batch * 4, cudaMemcpyHostToDevice),
      "cudaMemcpy");
  params.qkv = qkv.device;
  params.cos = static_cast<float*>(cos.device);
  params.sin = static_cast<float*>(sin.device);
  params.page_table = ints;
  params.lengths = ints + pages.size();
  params.num_new = ints + pages.size() + batch;
  params.semaphores = Semaphores();
  params.partials_bytes = DecodeAttentionPartialsBytes(params);
  const Array partials(DataType::kFloat32, Poison(params.partials_bytes / 4));
  params.partials = static_cast<float*>(partials.device);

  std::vector<double> first, act_values, k_values, v_values;
  for (int run = 0; run < 2; ++run) {
    const Array k_pages(params.dtype, k_start), v_pages(params.dtype, v_start),
        act(params.dtype, Poison(batch * params.act_dim));
    params.k_pages = k_pages.device;
    params.v_pages = v_pages.device;
    params.act = act.device;
    Require(CheckDecodeAttention(params));
    Require(LaunchDecodeAttention(params, nullptr));
    Require(cudaDeviceSynchronize(), "decode_attention");
    RequireSemaphoresZero();
    act_values = act.Read();
    k_values = k_pages.Read();
    v_values = v_pages.Read();
    if (run == 0) first = act_values;
  }
  if (!BitEqual(first, act_values)) Fail("two runs differ");
  cudaFree(ints);

  for (double& value : k_start) value = Rounded(params.dtype, value);
  for (double& value : v_start) value = Rounded(params.dtype, value);
  std::vector<double> expected = Poison(batch * params.act_dim);
  const auto rotate = [&](int64_t row, int64_t part, int64_t head) {
    const double* in = qkv.values.data() + ((row * 3 + part) * heads + head) * width;
    std::vector<double> out(in, in + width);
    for (int64_t i = 0; part < 2 && i < half; ++i) {
      const double c = cos.values[row * half + i], s = sin.values[row * half + i];
      out[2 * i] = Rounded(params.dtype, in[2 * i] * c - in[2 * i + 1] * s);
      out[2 * i + 1] = Rounded(params.dtype, in[2 * i + 1] * c + in[2 * i] * s);
    }
    return out;
  };
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t head = 0; head < heads; ++head) {
      double* out = expected.data() + row * params.act_dim + head * width;
      std::fill(out, out + width, 0.0);
      if (num_new[row] == 0) continue;
      const std::vector<double> q = rotate(row, 0, head), k_new = rotate(row, 1, head),
                                v_new = rotate(row, 2, head);
      std::copy(k_new.begin(), k_new.end(), k_start.begin() + slot(row, head, lengths[row]));
      std::copy(v_new.begin(), v_new.end(), v_start.begin() + slot(row, head, lengths[row]));
      std::vector<double> scores(lengths[row] + 1);
      double maximum = -INFINITY, sum = 0;
      for (int64_t key = 0; key <= lengths[row]; ++key) {
        for (int64_t d = 0; d < width; ++d)
          scores[key] += q[d] * k_start[slot(row, head, key) + d] / std::sqrt(width);
        maximum = std::max(maximum, scores[key]);
      }
      for (double& score : scores) sum += score = std::exp(score - maximum);
      for (int64_t key = 0; key <= lengths[row]; ++key) {
        for (int64_t d = 0; d < width; ++d)
          out[d] += scores[key] / sum * v_start[slot(row, head, key) + d];
      }
    }
  }
  // The appended token may differ in its last bit, where a rotated value lies between two; nothing
  // else may change.
  return std::max({RelativeError(act_values, expected), RelativeError(k_values, k_start),
                   RelativeError(v_values, v_start)});
}

int Check(const std::string& path) {
  std::ifstream file(path);
  if (!file) Fail("cannot read " + path);
  std::string line;
  int count = 0;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string op;
    if (!(words >> op) || op[0] == '#') continue;
    Options parsed = ParseOptions(words);
    const bool is_half = parsed["dtype"] == "fp16";
    if (parsed["dtype"] == "fp32") continue;  // for the Host alone
    double error;
    if (op == "linear") {
      error = CheckLinearCase(Case(parsed));
    } else if (op == "decode_attention") {
      error = CheckDecodeAttentionCase(Case(parsed));
    } else {
      Fail("unknown op " + op);
    }
    // Half an ulp of the results and of what is rounded on the way.
    const double bound = is_half ? 0.002 : 0.012;
    std::printf("%-10.3g %s\n", error, line.c_str());
    if (!(error <= bound)) Fail("error above " + std::to_string(bound));
    ++count;
  }
  if (count == 0) Fail("no case in " + path);
  std::printf("%d cases passed\n", count);
  return 0;
}

__global__ void FillKernel(uint32_t* words, int64_t count, uint32_t seed, bool is_int8) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    uint64_t state = (static_cast<uint64_t>(seed) << 32) + i;
    state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9ull;
    state = (state ^ (state >> 27)) * 0x94d049bb133111ebull;
    const uint32_t bits = static_cast<uint32_t>(state >> 31);
    const float low = (static_cast<float>(bits & 0xffff) / 65536.0f - 0.5f) * 0.08f;
    const float high = (static_cast<float>(bits >> 16) / 65536.0f - 0.5f) * 0.08f;
    words[i] = is_int8 ? bits : Pair<__nv_bfloat16>::FromFloats(low, high);
  }
}

__global__ void ReadKernel(const uint4* data, int64_t count, uint32_t* out) {
  uint32_t sum = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  for (; i + 7 * stride < count; i += 8 * stride) {
    uint4 values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum ^= values[j].x ^ values[j].y ^ values[j].z ^ values[j].w;
  }
  for (; i < count; i += stride) sum ^= __ldcs(data + i).x;
  if (sum == 0x12345678) *out = sum;
}

void* Filled(int64_t bytes, bool is_int8 = false) {
  static uint32_t seed = 1;
  void* data;
  Require(cudaMalloc(&data, bytes), "cudaMalloc");
  FillKernel<<<1024, 256>>>(static_cast<uint32_t*>(data), bytes / 4, seed++, is_int8);
  Require(cudaGetLastError(), "FillKernel");
  return data;
}

void* FilledWith(int64_t count, float value) {
  std::vector<float> values(count, value);
  void* data;
  Require(cudaMalloc(&data, count * 4), "cudaMalloc");
  Require(cudaMemcpy(data, values.data(), count * 4, cudaMemcpyHostToDevice), "cudaMemcpy");
  return data;
}

// Median milliseconds of `repeats` runs of `body`, once warmed up.
double MedianMs(cudaStream_t stream, bool use_graph, int repeats,
                const std::function<void()>& body) {
  cudaGraphExec_t graph_exec = nullptr;
  if (use_graph) {
    cudaGraph_t graph;
    Require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
    body();
    Require(cudaStreamEndCapture(stream, &graph), "capture");
    Require(cudaGraphInstantiate(&graph_exec, graph, 0), "instantiate");
  }
  const auto run = [&] {
    if (use_graph) {
      Require(cudaGraphLaunch(graph_exec, stream), "graph launch");
    } else {
      body();
    }
  };
  for (int i = 0; i < 3; ++i) run();
  cudaEvent_t begin, end;
  Require(cudaEventCreate(&begin), "event");
  Require(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < repeats; ++i) {
    Require(cudaEventRecord(begin, stream), "event");
    for (int j = 0; j < 4; ++j) run();
    Require(cudaEventRecord(end, stream), "event");
    Require(cudaEventSynchronize(end), "run");
    float ms;
    Require(cudaEventElapsedTime(&ms, begin, end), "event");
    times.push_back(ms / 4);
  }
  std::sort(times.begin(), times.end());
  if (graph_exec != nullptr) cudaGraphExecDestroy(graph_exec);
  return times[times.size() / 2];
}

int Time(Case options, bool is_token) {
  const int64_t rows = options.Int("rows", 1), context = options.Int("context", 192);
  const int64_t capacity = options.Int("capacity", (context + 64) / 64 * 64);
  const int64_t layers = options.Int("layers", 28), model_dim = options.Int("model_dim", 4096);
  const int64_t ffn_dim = options.Int("ffn_dim", 4 * model_dim),
                vocab = options.Int("vocab", 64512);
  const int64_t head_dim = options.Int("head_dim", 256), heads = model_dim / head_dim;
  const std::string weight_name = options.Text("weight", "bf16");
  const bool use_graph = options.Int("graph", 1) != 0;
  const bool prefetch = options.Int("prefetch", 1) != 0;
  options.RequireAllUsed();
  const DataType weight_type = TypeNamed(weight_name);
  const bool is_int8 = weight_type == DataType::kInt8;
  const int64_t in_outputs = 3 * model_dim + ffn_dim, out_k = model_dim + ffn_dim;
  const int64_t size = SizeOf(weight_type);

  cudaStream_t stream;
  Require(cudaStreamCreate(&stream), "stream");
  std::vector<void*> w_in, w_out, k_pages, v_pages;
  const int64_t max_pages = capacity / 64, num_pages = rows * max_pages + 1;
  const int64_t cache_bytes = num_pages * 64 * model_dim * 2;
  for (int64_t layer = 0; layer < layers; ++layer) {
    w_in.push_back(Filled(in_outputs * model_dim * size, is_int8));
    w_out.push_back(Filled(model_dim * out_k * size, is_int8));
    k_pages.push_back(Filled(cache_bytes));
    v_pages.push_back(Filled(cache_bytes));
  }
  void* lm_head = Filled(vocab * model_dim * size, is_int8);
  float* scale = static_cast<float*>(FilledWith(std::max(vocab, in_outputs), 0.0003f));
  void* small = Filled(2 * std::max(vocab, in_outputs));  // LayerNorm's scale and bias, the biases
  float* cos = static_cast<float*>(FilledWith(rows * 32, 0.6f));
  float* sin = static_cast<float*>(FilledWith(rows * 32, 0.8f));
  float* x[2] = {static_cast<float*>(FilledWith(rows * model_dim, 0.5f)),
                 static_cast<float*>(FilledWith(rows * model_dim, 0.5f))};
  std::vector<int32_t> ints(rows * max_pages + 2 * rows);
  for (int64_t i = 0; i < rows * max_pages; ++i) ints[i] = static_cast<int32_t>(i);
  for (int64_t row = 0; row < rows; ++row) {
    ints[rows * max_pages + row] = static_cast<int32_t>(context - 1);
    ints[rows * max_pages + rows + row] = 1;
  }
  int32_t* device_ints;
  Require(cudaMalloc(&device_ints, ints.size() * 4), "cudaMalloc");
  Require(cudaMemcpy(device_ints, ints.data(), ints.size() * 4, cudaMemcpyHostToDevice),
          "cudaMemcpy");
  void* qkv = Filled(rows * 3 * model_dim * 2);
  void* act = Filled(rows * out_k * 2);
  void* h = Filled(rows * model_dim * 2);
  void* logits = Filled(rows * vocab * 4);

  LinearParams base = {};
  base.rows = rows;
  base.dtype = DataType::kBfloat16;
  base.weight_dtype = weight_type;
  base.epsilon = 1e-5f;
  if (is_int8) base.weight_scale = scale;
  base.bias = small;
  base.h = h;
  base.partials_bytes = LinearPartialsBytes(rows);
  base.partials = static_cast<float*>(Filled(base.partials_bytes));
  base.semaphores = Semaphores();
  base.prefetch_weight = prefetch;

  const auto run_in = [&](int64_t layer) {
    LinearParams params = base;
    params.num_outputs = in_outputs;
    params.k_dim = model_dim;
    params.gelu_from = 3 * model_dim;
    params.act_dim = out_k;
    params.x_dtype = DataType::kFloat32;
    params.y_dtype = base.dtype;
    params.x = x[layer % 2];
    params.weight = w_in[layer];
    params.ln_scale = params.ln_bias = small;
    params.y = qkv;
    params.act = act;
    Require(LaunchLinear(params, stream));
  };
  DecodeAttentionParams attention = {};
  attention.batch = rows;
  attention.num_heads = heads;
  attention.head_dim = head_dim;
  attention.page_len = 64;
  attention.num_pages = num_pages;
  attention.max_pages = max_pages;
  attention.rotary_dim = 64;
  attention.act_dim = out_k;
  attention.dtype = base.dtype;
  attention.prefetch_cache = prefetch;
  attention.qkv = qkv;
  attention.cos = cos;
  attention.sin = sin;
  attention.page_table = device_ints;
  attention.lengths = device_ints + rows * max_pages;
  attention.num_new = attention.lengths + rows;
  attention.act = act;
  attention.partials_bytes = DecodeAttentionPartialsBytes(attention);
  attention.partials = static_cast<float*>(Filled(attention.partials_bytes));
  attention.semaphores = Semaphores();
  const auto run_attention = [&](int64_t layer) {
    attention.k_pages = k_pages[layer];
    attention.v_pages = v_pages[layer];
    Require(LaunchDecodeAttention(attention, stream));
  };
  const auto run_out = [&](int64_t layer) {
    LinearParams params = base;
    params.num_outputs = params.gelu_from = model_dim;
    params.k_dim = out_k;
    params.x_dtype = base.dtype;
    params.y_dtype = DataType::kFloat32;
    params.x = act;
    params.weight = w_out[layer];
    params.residual = x[layer % 2];
    params.y = x[(layer + 1) % 2];
    Require(LaunchLinear(params, stream));
  };
  const auto run_head = [&] {
    LinearParams params = base;
    params.num_outputs = params.gelu_from = vocab;
    params.k_dim = model_dim;
    params.x_dtype = params.y_dtype = DataType::kFloat32;
    params.x = x[layers % 2];
    params.weight = lm_head;
    params.ln_scale = params.ln_bias = small;
    params.y = logits;
    Require(LaunchLinear(params, stream));
  };

  uint32_t* sink;
  Require(cudaMalloc(&sink, 4), "cudaMalloc");
  const int64_t read_bytes = in_outputs * model_dim * size;
  const double read_ms = MedianMs(stream, false, 15, [&] {
    for (void* weight : w_in)
      ReadKernel<<<132 * 4, 512, 0, stream>>>(static_cast<uint4*>(weight), read_bytes / 16, sink);
  });
  const double rate = read_bytes * layers / read_ms / 1e9;  // TB/s
  std::printf("read only: %.3f TB/s\n", rate);
  const auto report = [&](const char* what, double ms, double bytes, int64_t calls) {
    std::printf("%-18s rows %3lld context %5lld %s %s: %8.2f us  %6.3f TB/s  %5.1f %%\n", what,
                static_cast<long long>(rows), static_cast<long long>(context), weight_name.c_str(),
                use_graph ? "graph " : "stream", ms * 1e3 / calls, bytes / ms / 1e9,
                100 * bytes / ms / 1e9 / rate);
  };
  const double in_bytes = static_cast<double>(in_outputs) * model_dim * size;
  const double out_bytes = static_cast<double>(model_dim) * out_k * size;
  const double head_bytes = static_cast<double>(vocab) * model_dim * size;
  const double attention_bytes = 2.0 * rows * context * model_dim * 2;
  if (is_token) {
    const double ms = MedianMs(stream, use_graph, 15, [&] {
      for (int64_t layer = 0; layer < layers; ++layer) {
        run_in(layer);
        run_attention(layer);
        run_out(layer);
      }
      run_head();
    });
    report("token", ms, (in_bytes + out_bytes + attention_bytes) * layers + head_bytes, 1);
  } else {
    const auto each = [&](const std::function<void(int64_t)>& run) {
      return [&, run] {
        for (int64_t layer = 0; layer < layers; ++layer) run(layer);
      };
    };
    report("linear in", MedianMs(stream, use_graph, 15, each(run_in)), in_bytes * layers, layers);
    report("linear out", MedianMs(stream, use_graph, 15, each(run_out)), out_bytes * layers,
           layers);
    report("decode_attention", MedianMs(stream, use_graph, 15, each(run_attention)),
           attention_bytes * layers, layers);
    report("linear lm_head",
           MedianMs(stream, use_graph, 15,
                    [&] {
                      for (int i = 0; i < 4; ++i) run_head();
                    }),
           head_bytes * 4, 4);
  }
  RequireSemaphoresZero();
  return 0;
}

int Main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "check" && argc == 3) return Check(argv[2]);
  if (mode == "token" || mode == "ops") {
    std::string text;
    for (int i = 2; i < argc; ++i) text += std::string(argv[i]) + " ";
    std::istringstream words(text);
    return Time(Case(ParseOptions(words)), mode == "token");
  }
  Fail("usage: ops_driver check FILE | token [key=value ...] | ops [key=value ...]");
}

}  // namespace
}  // namespace kogpt

int main(int argc, char** argv) { return kogpt::Main(argc, argv); }
