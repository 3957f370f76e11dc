// Runs the CUDA kernels without JAX: for compute-sanitizer and ncu, and to time a token's kernels
// alone.
//
//   ops_driver check FILE             every case of tests/op_shapes.txt against sums in double,
//                                     each twice, bit-equal; attention over pages in 16 bits and in
//                                     INT8, and row by row, bit-equal too
//   ops_driver token [key=value ...]  one decode step of a model, as often as it takes
//   ops_driver ops [key=value ...]    each op of a step alone, over the weights and caches of all
//                                     layers
//   ops_driver attention [key=value ...]
//                                     decode_attention alone over the caches of all layers, in bf16
//                                     and in INT8, at several batches and contexts, or at the rows
//                                     and context given
//
// token and ops take rows, context, capacity, layers, model_dim, ffn_dim, head_dim, heads (fewer than
// model_dim / head_dim: those of a tensor shard), vocab, weight
// (bf16 or int8), cache (bf16 or int8), graph (0 or 1) and prefetch (0 or 1); attention takes rows,
// context, layers, model_dim, head_dim, graph and prefetch.
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
  params.int8_activations = options.Int("int8_activations", 0) != 0;
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

// Keys or values of INT8 pages: rounds heads of `width` values, NaN where there is no token, to
// integers and a scale each.
void QuantizeHeads(const std::vector<double>& heads, int64_t width, std::vector<double>* integers,
                   std::vector<double>* scales) {
  for (size_t first = 0; first < heads.size(); first += width) {
    float largest = 0;
    for (int64_t i = 0; i < width; ++i)
      largest = std::max(largest, std::abs(static_cast<float>(heads[first + i])));
    const bool is_poison = std::isnan(heads[first]);
    const float scale = is_poison ? NAN : largest == 0 ? 1.0f : largest / 127.0f;
    scales->push_back(scale);
    for (int64_t i = 0; i < width; ++i) {
      const float quotient = static_cast<float>(heads[first + i]) / scale;
      integers->push_back(is_poison ? 127 : Rounded(DataType::kInt8, quotient));
    }
  }
}

std::vector<double> Dequantized(const std::vector<double>& integers,
                                const std::vector<double>& scales) {
  const size_t width = integers.size() / scales.size();
  std::vector<double> values(integers.size());
  for (size_t i = 0; i < values.size(); ++i) values[i] = integers[i] * scales[i / width];
  return values;
}

double CheckDecodeAttentionCase(Case options, bool is_int8) {
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
  const DataType pages_type = is_int8 ? DataType::kInt8 : params.dtype;
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

  std::vector<double> k_stored, v_stored, k_scale_values, v_scale_values;
  if (is_int8) {
    QuantizeHeads(k_start, width, &k_stored, &k_scale_values);
    QuantizeHeads(v_start, width, &v_stored, &v_scale_values);
    k_start = Dequantized(k_stored, k_scale_values);
    v_start = Dequantized(v_stored, v_scale_values);
  } else {
    for (double& value : k_start) value = Rounded(params.dtype, value);
    for (double& value : v_start) value = Rounded(params.dtype, value);
    k_stored = k_start;
    v_stored = v_start;
  }
  std::vector<double> first, act_values, k_values, v_values;
  for (int run = 0; run < 2; ++run) {
    const Array k_pages(pages_type, k_stored), v_pages(pages_type, v_stored),
        k_scales(DataType::kFloat32, k_scale_values), v_scales(DataType::kFloat32, v_scale_values),
        act(params.dtype, Poison(batch * params.act_dim));
    params.k_pages = k_pages.device;
    params.v_pages = v_pages.device;
    if (is_int8) {
      params.k_scales = static_cast<float*>(k_scales.device);
      params.v_scales = static_cast<float*>(v_scales.device);
    }
    params.act = act.device;
    Require(CheckDecodeAttention(params));
    Require(LaunchDecodeAttention(params, nullptr));
    Require(cudaDeviceSynchronize(), "decode_attention");
    RequireSemaphoresZero();
    act_values = act.Read();
    k_values = k_pages.Read();
    v_values = v_pages.Read();
    if (is_int8) {
      k_values = Dequantized(k_values, k_scales.Read());
      v_values = Dequantized(v_values, v_scales.Read());
    }
    if (run == 0) first = act_values;
    // The token is in the cache by now, and is written there once more.
    for (int64_t row = 0; run == 0 && row < batch; ++row) {
      const Array alone(params.dtype, Poison(params.act_dim));
      DecodeAttentionParams of_row = params;
      of_row.batch = 1;
      of_row.qkv =
          static_cast<const char*>(params.qkv) + row * 3 * heads * width * SizeOf(params.dtype);
      of_row.cos += row * half;
      of_row.sin += row * half;
      of_row.page_table += row * params.max_pages;
      of_row.lengths += row;
      of_row.num_new += row;
      of_row.act = alone.device;
      Require(LaunchDecodeAttention(of_row, nullptr));
      Require(cudaDeviceSynchronize(), "decode_attention of one row");
      const auto begin = act_values.begin() + row * params.act_dim;
      if (!BitEqual(alone.Read(), std::vector<double>(begin, begin + params.act_dim)))
        Fail("row " + std::to_string(row) + " alone differs");
    }
  }
  if (!BitEqual(first, act_values)) Fail("two runs differ");
  cudaFree(ints);

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
  // Half a step and the rounding to dtype before it may be between a head and what INT8 makes of
  // it, and attention is that of the rounded one.
  const double ulp = params.dtype == DataType::kFloat16 ? 1.0 / 1024 : 1.0 / 128;
  const auto append = [&](const std::vector<double>& head, int64_t at,
                          const std::vector<double>& actual, std::vector<double>* cache) {
    double largest = 0;
    for (double value : head) largest = std::max(largest, std::abs(value));
    for (int64_t d = 0; d < width; ++d) {
      (*cache)[at + d] = is_int8 ? actual[at + d] : head[d];
      const double bound = largest / 127 * 0.5001 * (1 + ulp) + ulp * std::abs(head[d]);
      if (!(std::abs((*cache)[at + d] - head[d]) <= bound))
        Fail("a new token is not rounded right");
    }
  };
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t head = 0; head < heads; ++head) {
      double* out = expected.data() + row * params.act_dim + head * width;
      std::fill(out, out + width, 0.0);
      if (num_new[row] == 0) continue;
      const std::vector<double> q = rotate(row, 0, head), k_new = rotate(row, 1, head),
                                v_new = rotate(row, 2, head);
      append(k_new, slot(row, head, lengths[row]), k_values, &k_start);
      append(v_new, slot(row, head, lengths[row]), v_values, &v_start);
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
    const bool has_bytes = parsed.count("int8_activations") > 0;
    // Half an ulp of the results and of what is rounded on the way: 8 bits of the largest of a row.
    const double bound = (is_half ? 0.002 : 0.012) + (has_bytes ? 0.04 : 0.0);
    const auto report = [&](double error, const char* what) {
      std::printf("%-10.3g %s%s\n", error, line.c_str(), what);
      std::fflush(stdout);
      if (!(error <= bound)) Fail("error above " + std::to_string(bound));
      ++count;
    };
    if (op == "linear") {
      report(CheckLinearCase(Case(parsed)), "");
    } else if (op == "decode_attention") {
      report(CheckDecodeAttentionCase(Case(parsed), false), "");
      report(CheckDecodeAttentionCase(Case(parsed), true), ", INT8 pages");
    } else {
      Fail("unknown op " + op);
    }
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

// TB/s of reading these arrays alone.
double ReadRate(cudaStream_t stream, const std::vector<void*>& arrays, int64_t bytes) {
  uint32_t* sink;
  Require(cudaMalloc(&sink, 4), "cudaMalloc");
  const double ms = MedianMs(stream, false, 15, [&] {
    for (void* array : arrays)
      ReadKernel<<<132 * 4, 512, 0, stream>>>(static_cast<uint4*>(array), bytes / 16, sink);
  });
  const double rate = bytes * arrays.size() / ms / 1e9;
  std::printf("read only: %.3f TB/s\n", rate);
  return rate;
}

// The attention of a step: its caches, of all layers, and everything else that it takes.
class AttentionLayers {
 public:
  // `context`: tokens of each row, the new one with them. `act`: [rows, act_dim].
  AttentionLayers(int64_t layers, int64_t rows, int64_t context, int64_t capacity, int64_t heads,
                  int64_t head_dim, bool is_int8, bool prefetch, bool leaves_room, void* qkv,
                  void* act, int64_t act_dim) {
    constexpr int64_t kPageLen = 64;
    params_.batch = rows;
    params_.num_heads = heads;
    params_.head_dim = head_dim;
    params_.page_len = kPageLen;
    params_.max_pages = capacity / kPageLen;
    params_.num_pages = rows * params_.max_pages + 1;
    params_.rotary_dim = 64;
    params_.act_dim = act_dim;
    params_.dtype = DataType::kBfloat16;
    params_.prefetch_cache = prefetch;
    params_.leaves_room = leaves_room;
    params_.qkv = qkv;
    params_.act = act;
    const int64_t num_tokens = params_.num_pages * heads * kPageLen;  // of heads
    for (int64_t layer = 0; layer < layers * 2; ++layer) {
      pages_.push_back(Keep(Filled(num_tokens * head_dim * (is_int8 ? 1 : 2), is_int8)));
      scales_.push_back(is_int8 ? static_cast<float*>(Keep(FilledWith(num_tokens, 0.001f)))
                                : nullptr);
    }
    params_.cos = static_cast<float*>(Keep(FilledWith(rows * 32, 0.6f)));
    params_.sin = static_cast<float*>(Keep(FilledWith(rows * 32, 0.8f)));
    std::vector<int32_t> ints(rows * params_.max_pages + 2 * rows, 1);
    for (int64_t i = 0; i < rows * params_.max_pages; ++i) ints[i] = static_cast<int32_t>(i);
    for (int64_t row = 0; row < rows; ++row)
      ints[rows * params_.max_pages + row] = static_cast<int32_t>(context - 1);
    void* device_ints;
    Require(cudaMalloc(&device_ints, ints.size() * 4), "cudaMalloc");
    Require(cudaMemcpy(Keep(device_ints), ints.data(), ints.size() * 4, cudaMemcpyHostToDevice),
            "cudaMemcpy");
    params_.page_table = static_cast<int32_t*>(device_ints);
    params_.lengths = params_.page_table + rows * params_.max_pages;
    params_.num_new = params_.lengths + rows;
    params_.partials_bytes = DecodeAttentionPartialsBytes(params_);
    params_.partials = static_cast<float*>(Keep(Filled(params_.partials_bytes)));
    params_.semaphores = Semaphores();
    bytes_ = 2.0 * rows * context * heads * (is_int8 ? head_dim + 4 : 2 * head_dim);
  }
  AttentionLayers(const AttentionLayers&) = delete;
  ~AttentionLayers() {
    for (void* data : kept_) cudaFree(data);
  }

  void Run(int64_t layer, cudaStream_t stream) {
    params_.k_pages = pages_[2 * layer];
    params_.v_pages = pages_[2 * layer + 1];
    params_.k_scales = scales_[2 * layer];
    params_.v_scales = scales_[2 * layer + 1];
    Require(LaunchDecodeAttention(params_, stream));
  }

  // That a layer reads of its cache.
  double bytes() const { return bytes_; }

 private:
  void* Keep(void* data) {
    kept_.push_back(data);
    return data;
  }

  DecodeAttentionParams params_ = {};
  std::vector<void*> pages_, kept_;
  std::vector<float*> scales_;
  double bytes_;
};

int Time(Case options, bool is_token) {
  const int64_t rows = options.Int("rows", 1), context = options.Int("context", 192);
  const int64_t capacity = options.Int("capacity", (context + 64) / 64 * 64);
  const int64_t layers = options.Int("layers", 28), model_dim = options.Int("model_dim", 4096);
  const int64_t ffn_dim = options.Int("ffn_dim", 4 * model_dim),
                vocab = options.Int("vocab", 64512);
  const int64_t head_dim = options.Int("head_dim", 256);
  const int64_t heads = options.Int("heads", model_dim / head_dim),
                attention_dim = heads * head_dim;
  const std::string weight_name = options.Text("weight", "bf16");
  const std::string cache_name = options.Text("cache", "bf16");
  const bool int8_activations = options.Int("int8_activations", 0) != 0;
  const bool use_graph = options.Int("graph", 1) != 0;
  const bool prefetch = options.Int("prefetch", 1) != 0;
  const bool has_marks = options.Int("marks", 1) != 0;
  options.RequireAllUsed();
  const DataType weight_type = TypeNamed(weight_name);
  const bool is_int8 = weight_type == DataType::kInt8;
  const bool cache_is_int8 = TypeNamed(cache_name) == DataType::kInt8;
  const int64_t in_outputs = 3 * attention_dim + ffn_dim, out_k = attention_dim + ffn_dim;
  const int64_t size = SizeOf(weight_type);

  cudaStream_t stream;
  Require(cudaStreamCreate(&stream), "stream");
  std::vector<void*> w_in, w_out;
  for (int64_t layer = 0; layer < layers; ++layer) {
    w_in.push_back(Filled(in_outputs * model_dim * size, is_int8));
    w_out.push_back(Filled(model_dim * out_k * size, is_int8));
  }
  void* lm_head = Filled(vocab * model_dim * size, is_int8);
  float* scale = static_cast<float*>(FilledWith(std::max(vocab, in_outputs), 0.0003f));
  void* small = Filled(2 * std::max(vocab, in_outputs));  // LayerNorm's scale and bias, the biases
  float* x[2] = {static_cast<float*>(FilledWith(rows * model_dim, 0.5f)),
                 static_cast<float*>(FilledWith(rows * model_dim, 0.5f))};
  void* qkv = Filled(rows * 3 * attention_dim * 2);
  void* act = Filled(rows * out_k * 2);
  void* h = Filled(rows * std::max(model_dim, out_k) * 2);
  void* logits = Filled(rows * vocab * 4);

  LinearParams base = {};
  base.rows = rows;
  base.dtype = DataType::kBfloat16;
  base.weight_dtype = weight_type;
  base.epsilon = 1e-5f;
  base.int8_activations = int8_activations;
  if (is_int8) base.weight_scale = scale;
  base.bias = small;
  base.h = h;
  base.partials_bytes = LinearPartialsBytes(rows);
  base.partials = static_cast<float*>(Filled(base.partials_bytes));
  base.semaphores = Semaphores();
  base.prefetch_weight = prefetch;

  // As the model has them; single ops run one after another.
  const auto mark_of = [&](int64_t layer) {
    return is_token && has_marks ? static_cast<int32_t>(layer + 1) : 0;
  };
  const auto run_in = [&](int64_t layer) {
    LinearParams params = base;
    params.num_outputs = in_outputs;
    params.k_dim = model_dim;
    params.gelu_from = 3 * attention_dim;
    params.act_dim = out_k;
    params.x_dtype = DataType::kFloat32;
    params.y_dtype = base.dtype;
    params.x = x[layer % 2];
    params.weight = w_in[layer];
    params.ln_scale = params.ln_bias = small;
    params.y = qkv;
    params.act = act;
    params.done_mark = mark_of(layer);
    Require(LaunchLinear(params, stream));
  };
  AttentionLayers attention(
      layers, rows, context, capacity, heads, head_dim, cache_is_int8, prefetch,
      is_token && has_marks && (!is_int8 || rows <= kLinearMaxRowsRounded), qkv, act, out_k);
  const auto run_attention = [&](int64_t layer) { attention.Run(layer, stream); };
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
    params.awaited_mark = mark_of(layer);
    params.early_from = attention_dim;
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
    params.int8_activations = false;
    params.y = logits;
    Require(LaunchLinear(params, stream));
  };

  const double rate = ReadRate(stream, w_in, in_outputs * model_dim * size);
  const auto report = [&](const char* what, double ms, double bytes, int64_t calls) {
    std::printf("%-18s rows %3lld context %5lld %s, cache %s %s: %8.2f us  %6.3f TB/s  %5.1f %%\n",
                what, static_cast<long long>(rows), static_cast<long long>(context),
                weight_name.c_str(), cache_name.c_str(), use_graph ? "graph " : "stream",
                ms * 1e3 / calls, bytes / ms / 1e9, 100 * bytes / ms / 1e9 / rate);
  };
  const double in_bytes = static_cast<double>(in_outputs) * model_dim * size;
  const double out_bytes = static_cast<double>(model_dim) * out_k * size;
  const double head_bytes = static_cast<double>(vocab) * model_dim * size;
  const double attention_bytes = attention.bytes();
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

// decode_attention over both kinds of cache.
int TimeAttention(Case options) {
  const int64_t layers = options.Int("layers", 28), model_dim = options.Int("model_dim", 4096);
  const int64_t head_dim = options.Int("head_dim", 256);
  const int64_t one_rows = options.Int("rows", 0), one_context = options.Int("context", 0);
  const bool use_graph = options.Int("graph", 1) != 0;
  const bool prefetch = options.Int("prefetch", 1) != 0;
  options.RequireAllUsed();
  cudaStream_t stream;
  Require(cudaStreamCreate(&stream), "stream");
  constexpr int64_t kReadBytes = int64_t{256} << 20;
  std::vector<void*> arrays;
  for (int i = 0; i < 8; ++i) arrays.push_back(Filled(kReadBytes));
  const double rate = ReadRate(stream, arrays, kReadBytes);
  std::vector<int64_t> all_rows = {1, 8, 32, 64}, contexts = {192, 256, 512, 1024};
  if (one_rows > 0) all_rows = {one_rows};
  if (one_context > 0) contexts = {one_context};
  std::printf("rows context | bf16 cache: us, share of the limit | INT8 | speedup\n");
  for (int64_t rows : all_rows) {
    void* qkv = Filled(rows * 3 * model_dim * 2);
    void* act = Filled(rows * model_dim * 2);
    for (int64_t context : contexts) {
      double us[2], shares[2];
      for (int is_int8 = 0; is_int8 < 2; ++is_int8) {
        AttentionLayers attention(layers, rows, context, (context + 64) / 64 * 64,
                                  model_dim / head_dim, head_dim, is_int8 != 0, prefetch, false,
                                  qkv, act, model_dim);
        const double ms = MedianMs(stream, use_graph, 15, [&] {
          for (int64_t layer = 0; layer < layers; ++layer) attention.Run(layer, stream);
        });
        us[is_int8] = ms * 1e3 / layers;
        shares[is_int8] = 100 * attention.bytes() / us[is_int8] / 1e6 / rate;
      }
      std::printf("%4lld %7lld | %8.2f %6.1f %% | %8.2f %6.1f %% | %.2f\n",
                  static_cast<long long>(rows), static_cast<long long>(context), us[0], shares[0],
                  us[1], shares[1], us[0] / us[1]);
      std::fflush(stdout);
    }
    cudaFree(qkv);
    cudaFree(act);
  }
  RequireSemaphoresZero();
  return 0;
}

int Main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "check" && argc == 3) return Check(argv[2]);
  if (mode == "token" || mode == "ops" || mode == "attention") {
    std::string text;
    for (int i = 2; i < argc; ++i) text += std::string(argv[i]) + " ";
    std::istringstream words(text);
    const Case options(ParseOptions(words));
    return mode == "attention" ? TimeAttention(options) : Time(options, mode == "token");
  }
  Fail(
      "usage: ops_driver check FILE | token [key=value ...] | ops [key=value ...] | "
      "attention [key=value ...]");
}

}  // namespace
}  // namespace kogpt

int main(int argc, char** argv) { return kogpt::Main(argc, argv); }
