// Runs the CUDA kernels of prefill_attention without JAX: for compute-sanitizer and ncu, and to time
// them alone.
//
//   prefill_attention_driver check FILE
//       every case of tests/prefill_attention_shapes.txt, over 16-bit and INT8 pages, against sums in
//       double, twice, bit-equal, and each row alone, bit-equal
//   prefill_attention_driver time [key=value ...]
//       total_tokens, heads, head_dim, page_len, rotary_dim, rows, prefix, dtype; over 16-bit pages,
//       then over INT8 ones
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
#include <type_traits>
#include <vector>

#include "cuda_common.cuh"
#include "prefill_attention.h"

namespace kogpt {
namespace {

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "prefill_attention_driver: %s\n", message.c_str());
  std::exit(1);
}

void Require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) Fail(std::string(what) + ": " + cudaGetErrorString(error));
}

void Require(const char* error) {
  if (error != nullptr) Fail(error);
}

// Options of a line or of the command; what is not asked for is an error.
class Options {
 public:
  explicit Options(const std::string& text) {
    std::istringstream words(text);
    std::string word;
    while (words >> word) {
      const size_t equal = word.find('=');
      if (equal == std::string::npos) Fail("not key=value: " + word);
      values_[word.substr(0, equal)] = word.substr(equal + 1);
    }
  }
  std::string Text(const std::string& key, const std::string& otherwise) {
    const auto found = values_.find(key);
    if (found == values_.end()) return otherwise;
    const std::string value = found->second;
    values_.erase(found);
    return value;
  }
  int64_t Int(const std::string& key, int64_t otherwise) {
    return std::stoll(Text(key, std::to_string(otherwise)));
  }
  std::vector<int32_t> Ints(const std::string& key) {
    std::vector<int32_t> values;
    std::istringstream parts(Text(key, ""));
    std::string part;
    while (std::getline(parts, part, ',')) values.push_back(std::stoi(part));
    return values;
  }
  void RequireAllUsed() const {
    for (const auto& [key, value] : values_) Fail("unknown option " + key + "=" + value);
  }

 private:
  std::map<std::string, std::string> values_;
};

// Device memory with a copy of a vector, freed with the program.
template <typename V>
V* OnDevice(const std::vector<V>& values) {
  void* device;
  const size_t bytes = std::max<size_t>(values.size() * sizeof(V), 16);
  Require(cudaMalloc(&device, bytes), "cudaMalloc");
  Require(cudaMemcpy(device, values.data(), values.size() * sizeof(V), cudaMemcpyHostToDevice),
          "cudaMemcpy");
  return static_cast<V*>(device);
}

template <typename V>
std::vector<V> ToHost(const void* device, size_t count) {
  std::vector<V> values(count);
  if (count == 0) return values;
  Require(cudaMemcpy(values.data(), device, count * sizeof(V), cudaMemcpyDeviceToHost),
          "cudaMemcpy");
  return values;
}

std::mt19937_64 generator(1234);
constexpr uint16_t kPoison = 0x7fff;  // NaN in both 16-bit types

template <typename T>
uint16_t BitsOf(float value) {
  T rounded;
  if constexpr (std::is_same_v<T, __half>) {
    rounded = __float2half_rn(value);
  } else {
    rounded = __float2bfloat16_rn(value);
  }
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}

template <typename T>
float ValueOf(uint16_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, 2);
  return static_cast<float>(value);
}

// Normal values, from a table since there may be many.
template <typename T>
std::vector<uint16_t> Normal(int64_t count, float scale) {
  static const std::vector<float> table = [] {
    std::normal_distribution<float> normal;
    std::vector<float> numbers(65521);
    for (float& number : numbers) number = normal(generator);
    return numbers;
  }();
  std::vector<uint16_t> values(count);
  uint32_t state = static_cast<uint32_t>(generator());
  for (uint16_t& bits : values) {
    state = state * 1664525u + 1013904223u;
    bits = BitsOf<T>(scale * table[(state >> 8) % table.size()]);
  }
  return values;
}

// A head to INT8; returns the scale.
template <typename T>
__host__ __device__ float Quantize(int64_t width, const T* values, int8_t* out) {
  const auto value = [values](int64_t i) { return static_cast<float>(values[i]); };
  float largest = 0;
  for (int64_t i = 0; i < width; ++i) largest = fmaxf(largest, fabsf(value(i)));
  const float scale = largest == 0 ? 1 : largest / 127;
  for (int64_t i = 0; i < width; ++i) {
    out[i] = static_cast<int8_t>(fminf(fmaxf(rintf(value(i) / scale), -127), 127));
  }
  return scale;
}

template <typename T>
__global__ void ReferenceAppend(PrefillAttentionParams params, T* queries) {
  __shared__ T k[256], v[256];
  const int token = blockIdx.x, head = blockIdx.y;
  const int64_t width = params.head_dim, heads = params.num_heads;
  const T* qkv = static_cast<const T*>(params.qkv) + token * 3 * heads * width + head * width;
  for (int row = 0; row < params.batch; ++row) {
    const int i = token - params.begins[row];
    if (i < 0 || i >= params.num_new[row]) continue;
    const int64_t position = params.lengths[row] + i;
    const int64_t page = params.page_table[row * params.max_pages + position / params.page_len];
    const int64_t slot = (page * heads + head) * params.page_len + position % params.page_len;
    for (int dim = threadIdx.x; dim < width; dim += blockDim.x) {
      const auto rotated = [&](const T* values) {
        if (dim >= params.rotary_dim) return values[dim];
        const int64_t at = token * (params.rotary_dim / 2) + dim / 2;
        const double cos = params.cos[at], sin = params.sin[at];
        const double even = ToFloat(values[dim / 2 * 2]), odd = ToFloat(values[dim / 2 * 2 + 1]);
        return FromFloat<T>(
            static_cast<float>(dim % 2 == 0 ? even * cos - odd * sin : odd * cos + even * sin));
      };
      queries[(token * heads + head) * width + dim] = rotated(qkv);
      k[dim] = rotated(qkv + heads * width);
      v[dim] = qkv[2 * heads * width + dim];
      if (params.k_scales != nullptr) continue;
      static_cast<T*>(params.k_pages)[slot * width + dim] = k[dim];
      static_cast<T*>(params.v_pages)[slot * width + dim] = v[dim];
    }
    __syncthreads();
    if (params.k_scales == nullptr || threadIdx.x > 1) continue;
    const bool is_key = threadIdx.x == 0;
    const T* values = is_key ? k : v;
    int8_t* out = static_cast<int8_t*>(is_key ? params.k_pages : params.v_pages) + slot * width;
    (is_key ? params.k_scales : params.v_scales)[slot] = Quantize(width, values, out);
  }
}

// A value of a page: of head slot `slot`.
template <typename T>
__device__ double PageValue(const void* pages, const float* scales, int64_t slot, int64_t width,
                            int dim) {
  const int64_t at = slot * width + dim;
  if (scales == nullptr) return ToFloat(static_cast<const T*>(pages)[at]);
  return static_cast<double>(static_cast<const int8_t*>(pages)[at]) * scales[slot];
}

template <typename T>
__global__ void ReferenceAttend(PrefillAttentionParams params, const T* queries, double* out) {
  extern __shared__ double scores[];
  __shared__ double shared_sum;
  const int token = blockIdx.x, head = blockIdx.y;
  const int64_t width = params.head_dim, heads = params.num_heads;
  const T* q = queries + (token * heads + head) * width;
  for (int row = 0; row < params.batch; ++row) {
    const int i = token - params.begins[row];
    if (i < 0 || i >= params.num_new[row]) continue;
    const int count = params.lengths[row] + i + 1;
    const auto slot = [&](int key) {
      const int64_t page = params.page_table[row * params.max_pages + key / params.page_len];
      return (page * heads + head) * params.page_len + key % params.page_len;
    };
    for (int key = threadIdx.x; key < count; key += blockDim.x) {
      double score = 0;
      for (int dim = 0; dim < width; ++dim)
        score += static_cast<double>(ToFloat(q[dim])) *
                 PageValue<T>(params.k_pages, params.k_scales, slot(key), width, dim);
      scores[key] = score / sqrt(static_cast<double>(width));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      double maximum = scores[0], sum = 0;
      for (int key = 0; key < count; ++key) maximum = fmax(maximum, scores[key]);
      for (int key = 0; key < count; ++key) sum += scores[key] = exp(scores[key] - maximum);
      shared_sum = sum;
    }
    __syncthreads();
    for (int dim = threadIdx.x; dim < width; dim += blockDim.x) {
      double sum = 0;
      for (int key = 0; key < count; ++key)
        sum += scores[key] * PageValue<T>(params.v_pages, params.v_scales, slot(key), width, dim);
      out[(token * heads + head) * width + dim] = sum / shared_sum;
    }
  }
}

struct Rows {
  std::vector<int32_t> begins, num_new, lengths;
};

// Keys or values as bytes, and the scales of INT8 ones, none otherwise.
struct Pages {
  std::vector<uint8_t> values;
  std::vector<float> scales;

  // Slots without a token hold NaN, and -128 where a value has no NaN.
  template <typename T>
  static Pages Empty(int64_t slots, int64_t width, bool is_int8) {
    Pages pages;
    pages.values.assign(slots * width * (is_int8 ? 1 : sizeof(T)), 0x80);
    if (is_int8) {
      pages.scales.assign(slots, NAN);
    } else {
      Fill(&pages.values, kPoison);
    }
    return pages;
  }

  static void Fill(std::vector<uint8_t>* values, uint16_t bits) {
    for (size_t i = 0; i < values->size(); i += 2) std::memcpy(values->data() + i, &bits, 2);
  }

  template <typename T>
  void Write(int64_t slot, const uint16_t* head, int64_t width) {
    if (scales.empty()) {
      std::memcpy(values.data() + slot * width * 2, head, width * 2);
      return;
    }
    scales[slot] = Quantize(width, reinterpret_cast<const T*>(head),
                            reinterpret_cast<int8_t*>(values.data()) + slot * width);
  }

  static Pages From(const void* values, const float* scales, const Pages& like) {
    return {ToHost<uint8_t>(values, like.values.size()), ToHost<float>(scales, like.scales.size())};
  }
  void To(void* device_values, float* device_scales) const {
    Require(cudaMemcpy(device_values, values.data(), values.size(), cudaMemcpyHostToDevice),
            "cudaMemcpy");
    if (scales.empty()) return;
    Require(cudaMemcpy(device_scales, scales.data(), scales.size() * 4, cudaMemcpyHostToDevice),
            "cudaMemcpy");
  }
  bool IsSameIn(const Pages& other, int64_t slot, int64_t slots) const {
    const size_t bytes = values.size() / slots, at = slot * bytes;
    return std::memcmp(values.data() + at, other.values.data() + at, bytes) == 0 &&
           (scales.empty() || std::memcmp(&scales[slot], &other.scales[slot], 4) == 0);
  }
  // Bit by bit: NaN is NaN.
  bool operator==(const Pages& other) const {
    return values == other.values && scales.size() == other.scales.size() &&
           std::memcmp(scales.data(), other.scales.data(), scales.size() * 4) == 0;
  }
};

// Everything that a call takes, on the device; the cache and act as they are before it.
template <typename T>
struct Call {
  PrefillAttentionParams params = {};
  Rows rows;
  Pages k_start, v_start;
  std::vector<uint16_t> act_start;

  Call(Options* options, const Rows& rows_in, bool is_int8) : rows(rows_in) {
    params.total_tokens = options->Int("total_tokens", 1);
    params.batch = static_cast<int64_t>(rows.begins.size());
    params.num_heads = options->Int("heads", 16);
    params.head_dim = options->Int("head_dim", 256);
    params.page_len = options->Int("page_len", 64);
    int64_t most = 0, longest = 1;
    for (int64_t row = 0; row < params.batch; ++row) {
      most = std::max<int64_t>(most, rows.num_new[row]);
      longest = std::max<int64_t>(longest, rows.lengths[row] + rows.num_new[row]);
    }
    params.max_pages = options->Int("max_pages", (longest + params.page_len - 1) / params.page_len);
    params.max_new = options->Int("max_new", most);
    params.rotary_dim = options->Int("rotary_dim", 0);
    params.act_dim = options->Int("act_dim", params.num_heads * params.head_dim);
    params.qkv_dim = 3 * params.num_heads * params.head_dim;
    params.num_pages = params.batch * params.max_pages + 1;
    params.dtype = std::is_same_v<T, __half> ? DataType::kFloat16 : DataType::kBfloat16;

    const int64_t width = params.num_heads * params.head_dim;
    std::vector<int32_t> pages(params.batch * params.max_pages);
    for (size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<int32_t>(i);
    std::shuffle(pages.begin(), pages.end(), generator);
    k_start = Pages::Empty<T>(params.num_pages * params.num_heads * params.page_len,
                              params.head_dim, is_int8);
    v_start = k_start;
    for (int64_t row = 0; row < params.batch; ++row) {
      for (int64_t key = 0; key < rows.lengths[row]; ++key) {
        const std::vector<uint16_t> k = Normal<T>(width, 1), v = Normal<T>(width, 1);
        for (int64_t head = 0; head < params.num_heads; ++head) {
          const int64_t page = pages[row * params.max_pages + key / params.page_len];
          const int64_t slot =
              (page * params.num_heads + head) * params.page_len + key % params.page_len;
          k_start.Write<T>(slot, k.data() + head * params.head_dim, params.head_dim);
          v_start.Write<T>(slot, v.data() + head * params.head_dim, params.head_dim);
        }
      }
    }
    std::vector<uint16_t> qkv = Normal<T>(params.total_tokens * 3 * width, 1.5f);
    std::vector<bool> is_used(params.total_tokens, false);
    std::vector<float> cos(params.total_tokens * params.rotary_dim / 2, NAN), sin = cos;
    const int64_t half = params.rotary_dim / 2;
    for (int64_t row = 0; row < params.batch; ++row) {
      for (int64_t i = 0; i < rows.num_new[row]; ++i) {
        const int64_t token = rows.begins[row] + i;
        is_used[token] = true;
        for (int64_t j = 0; j < half; ++j) {
          const double angle =
              (rows.lengths[row] + i) * std::pow(10000.0, -2.0 * j / params.rotary_dim);
          cos[token * half + j] = static_cast<float>(std::cos(angle));
          sin[token * half + j] = static_cast<float>(std::sin(angle));
        }
      }
    }
    for (int64_t token = 0; token < params.total_tokens; ++token) {
      if (!is_used[token]) std::fill_n(qkv.begin() + token * 3 * width, 3 * width, kPoison);
    }
    act_start.assign(params.total_tokens * params.act_dim, kPoison);
    params.qkv = OnDevice(qkv);
    params.cos = OnDevice(cos);
    params.sin = OnDevice(sin);
    params.page_table = OnDevice(pages);
    params.begins = OnDevice(rows.begins);
    params.num_new = OnDevice(rows.num_new);
    params.lengths = OnDevice(rows.lengths);
    PutCache(&params);
    params.act = OnDevice(act_start);
    params.tiles_bytes = PrefillAttentionTilesBytes(params);
    params.tiles = OnDevice(std::vector<int32_t>(params.tiles_bytes / 4, 0x7fffffff));
  }

  // A copy of the cache as it is before the call.
  void PutCache(PrefillAttentionParams* to) const {
    to->k_pages = OnDevice(k_start.values);
    to->v_pages = OnDevice(v_start.values);
    to->k_scales = k_start.scales.empty() ? nullptr : OnDevice(k_start.scales);
    to->v_scales = v_start.scales.empty() ? nullptr : OnDevice(v_start.scales);
  }

  void Reset() const {
    k_start.To(params.k_pages, params.k_scales);
    v_start.To(params.v_pages, params.v_scales);
    Require(cudaMemcpy(params.act, act_start.data(), act_start.size() * 2, cudaMemcpyHostToDevice),
            "cudaMemcpy");
  }

  std::vector<uint16_t> Run(const PrefillAttentionParams& changed) const {
    Reset();
    Require(cudaMemset(params.tiles, 0x7f, params.tiles_bytes), "cudaMemset");
    Require(CheckPrefillAttention(changed));
    Require(LaunchPrefillAttention(changed, nullptr));
    Require(cudaDeviceSynchronize(), "prefill_attention");
    return ToHost<uint16_t>(params.act, act_start.size());
  }
};

// Keys of the kernel against the reference's, which rotates in double: some are the neighbouring value.
// Returns the error that this makes of 16-bit ones; INT8 ones are then taken as the kernel has them.
template <typename T>
double CompareKeys(const Pages& keys, const Pages& expected, int64_t width) {
  double error = 0;
  if (keys.scales.empty()) {
    for (size_t i = 0; i < keys.values.size(); i += 2) {
      uint16_t bits, expected_bits;
      std::memcpy(&bits, keys.values.data() + i, 2);
      std::memcpy(&expected_bits, expected.values.data() + i, 2);
      if (bits == expected_bits) continue;  // or its last bit, where a value lies between two
      const double difference = std::abs(ValueOf<T>(bits) - ValueOf<T>(expected_bits));
      error = std::max(error, difference / 8);
      if (!(difference < 0.05)) Fail("keys in the cache differ");
    }
    return error;
  }
  size_t num_off = 0;
  for (size_t slot = 0; slot < keys.scales.size(); ++slot) {
    const float scale = keys.scales[slot], expected_scale = expected.scales[slot];
    if (std::isnan(scale) != std::isnan(expected_scale) ||
        std::abs(scale - expected_scale) >
            expected_scale / (std::is_same_v<T, __half> ? 900 : 120)) {
      Fail("scales of keys in the cache differ");
    }
    for (size_t i = slot * width; i < (slot + 1) * width; ++i) {
      const int step =
          std::abs(static_cast<int8_t>(keys.values[i]) - static_cast<int8_t>(expected.values[i]));
      if (step > 1) Fail("keys in the cache differ");
      num_off += step;
    }
  }
  if (num_off * 200 > keys.values.size() + 4000) Fail("many keys in the cache differ");
  return 0;
}

// Returns the worst error of a head's output, relative to its largest value.
template <typename T>
double Check(Options options, bool is_int8) {
  Rows rows{options.Ints("begins"), options.Ints("num_new"), options.Ints("lengths")};
  const Call<T> call(&options, rows, is_int8);
  options.RequireAllUsed();
  const PrefillAttentionParams& params = call.params;
  const std::vector<uint16_t> act = call.Run(params);
  const Pages k = Pages::From(params.k_pages, params.k_scales, call.k_start);
  const Pages v = Pages::From(params.v_pages, params.v_scales, call.v_start);
  if (call.Run(params) != act) Fail("two runs differ");
  if (!(Pages::From(params.k_pages, params.k_scales, call.k_start) == k)) Fail("two runs differ");

  const int64_t width = params.num_heads * params.head_dim;
  std::vector<int> row_of(params.total_tokens, -1);
  for (int row = 0; row < params.batch; ++row) {
    std::fill_n(row_of.begin() + rows.begins[row], rows.num_new[row], row);
    PrefillAttentionParams alone = params;
    alone.batch = 1;
    alone.max_new = rows.num_new[row];
    alone.page_table += row * params.max_pages;
    alone.begins += row, alone.num_new += row, alone.lengths += row;
    const std::vector<uint16_t> of_row = call.Run(alone);
    const size_t begin = rows.begins[row] * params.act_dim;
    const size_t end = begin + rows.num_new[row] * params.act_dim;
    for (size_t i = 0; i < act.size(); ++i) {
      const bool is_mine = i >= begin && i < end;
      if (of_row[i] != (is_mine ? act[i] : kPoison)) Fail("a row alone differs");
    }
  }

  PrefillAttentionParams reference = params;
  call.PutCache(&reference);
  T* queries =
      reinterpret_cast<T*>(OnDevice(std::vector<uint16_t>(params.total_tokens * width, kPoison)));
  double* out = OnDevice(std::vector<double>(params.total_tokens * width, 0.0));
  const dim3 grid(params.total_tokens, params.num_heads);
  const int shared_bytes = static_cast<int>(params.max_pages * params.page_len * 8);
  ReferenceAppend<T><<<grid, 128>>>(reference, queries);
  const Pages k_expected = Pages::From(reference.k_pages, reference.k_scales, call.k_start);
  if (!(v == Pages::From(reference.v_pages, reference.v_scales, call.v_start))) {
    Fail("values in the cache differ");
  }
  double error = CompareKeys<T>(k, k_expected, params.head_dim);
  const int64_t slots = params.num_pages * params.num_heads * params.page_len;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const bool is_new = !k_expected.IsSameIn(call.k_start, slot, slots);
    if (!is_new && !k.IsSameIn(call.k_start, slot, slots)) Fail("an old key has changed");
  }
  if (is_int8) k.To(reference.k_pages, reference.k_scales);
  ReferenceAttend<T><<<grid, 128, shared_bytes>>>(reference, queries, out);
  Require(cudaDeviceSynchronize(), "the reference");
  const std::vector<double> expected = ToHost<double>(out, params.total_tokens * width);
  for (int64_t token = 0; token < params.total_tokens; ++token) {
    const uint16_t* of_token = act.data() + token * params.act_dim;
    for (int64_t column = row_of[token] < 0 ? 0 : width; column < params.act_dim; ++column) {
      if (of_token[column] != kPoison) Fail("what is not the op's to write has changed");
    }
    for (int64_t head = 0; row_of[token] >= 0 && head < params.num_heads; ++head) {
      double difference = 0, largest = 0;
      for (int64_t i = head * params.head_dim; i < (head + 1) * params.head_dim; ++i) {
        const double of_value = std::abs(ValueOf<T>(of_token[i]) - expected[token * width + i]);
        if (!(of_value <= difference)) difference = of_value;
        largest = std::max(largest, std::abs(expected[token * width + i]));
      }
      if (!(difference / largest <= error)) error = difference / largest;
    }
  }
  Require(cudaFree(const_cast<void*>(params.qkv)), "cudaFree");
  Require(cudaFree(reference.k_pages), "cudaFree");
  Require(cudaFree(reference.v_pages), "cudaFree");
  return error;
}

int CheckAll(const std::string& path) {
  std::ifstream file(path);
  if (!file) Fail("cannot read " + path);
  std::string line;
  int count = 0, num_bad = 0;
  while (std::getline(file, line)) {
    if (line.empty() || line[0] == '#') continue;
    Options options(line);
    const std::string dtype = options.Text("dtype", "bf16");
    if (dtype == "fp32") continue;  // for the reference alone
    const bool is_half = dtype == "fp16";
    for (const bool is_int8 : {false, true}) {
      const double error =
          is_half ? Check<__half>(options, is_int8) : Check<__nv_bfloat16>(options, is_int8);
      // Half an ulp of the results and of what is rounded on the way.
      const bool is_good = error <= (is_half ? 0.002 : 0.014);
      std::printf("%-10.3g %s %s%s\n", error, is_int8 ? "INT8 " : "16bit",
                  line.substr(0, 150).c_str(), is_good ? "" : "  TOO LARGE");
      std::fflush(stdout);
      num_bad += is_good ? 0 : 1;
      ++count;
    }
  }
  if (count == 0) Fail("no case in " + path);
  if (num_bad > 0) Fail(std::to_string(num_bad) + " cases failed");
  std::printf("%d cases passed\n", count);
  return 0;
}

// Median time of a launch in microseconds: a graph of several over different buffers, as often as it
// takes.
double MedianUs(const std::vector<PrefillAttentionParams>& calls,
                const std::function<const char*(const PrefillAttentionParams&, void*)>& launch) {
  constexpr int kRounds = 2, kWarmUps = 3, kSamples = 15;
  cudaEvent_t begin, end;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  Require(cudaEventCreate(&begin), "cudaEventCreate");
  Require(cudaEventCreate(&end), "cudaEventCreate");
  Require(cudaStreamCreate(&stream), "cudaStreamCreate");
  for (const PrefillAttentionParams& call : calls) Require(launch(call, stream));
  Require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int round = 0; round < kRounds; ++round) {
    for (const PrefillAttentionParams& call : calls) Require(launch(call, stream));
  }
  Require(cudaStreamEndCapture(stream, &graph), "capture");
  Require(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  std::vector<float> times;
  for (int sample = 0; sample < kWarmUps + kSamples; ++sample) {
    Require(cudaEventRecord(begin, stream), "cudaEventRecord");
    Require(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    Require(cudaEventRecord(end, stream), "cudaEventRecord");
    Require(cudaEventSynchronize(end), "prefill_attention");
    float ms;
    Require(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (sample >= kWarmUps) times.push_back(ms * 1000 / (kRounds * calls.size()));
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <typename T>
void Time(const std::string& text, bool is_int8) {
  std::vector<PrefillAttentionParams> calls;
  double operations = 0, bytes = 0;
  for (int i = 0; i < 4; ++i) {
    Options options(text);
    options.Text("dtype", "");
    const int64_t num_rows = options.Int("rows", 1), prefix = options.Int("prefix", 0);
    Options copy = options;
    const int64_t tokens = copy.Int("total_tokens", 1) / num_rows;
    Rows rows;
    for (int64_t row = 0; row < num_rows; ++row) {
      rows.begins.push_back(static_cast<int32_t>(row * tokens));
      rows.num_new.push_back(static_cast<int32_t>(tokens));
      rows.lengths.push_back(static_cast<int32_t>(prefix));
    }
    const Call<T> call(&options, rows, is_int8);
    options.RequireAllUsed();
    calls.push_back(call.params);
    const double width = static_cast<double>(call.params.num_heads * call.params.head_dim);
    operations = 4.0 * width * num_rows * (tokens * tokens / 2.0 + tokens * prefix);
    bytes = (is_int8 ? 6.0 + 8.0 / call.params.head_dim : 8.0) * width * num_rows * tokens;
  }
  const double append = MedianUs(calls, LaunchPrefillAppend);
  const double attend = MedianUs(calls, LaunchPrefillAttend);
  const double both = MedianUs(calls, LaunchPrefillAttention);
  std::printf("%s append %.1f us (%.0f GB/s), attend %.1f us (%.0f TFLOP/s), both %.1f us  %s\n",
              is_int8 ? "INT8 " : "16bit", append, bytes / append / 1e3, attend,
              operations / attend / 1e6, both, text.c_str());
  for (const PrefillAttentionParams& call : calls) {
    Require(cudaFree(call.k_pages), "cudaFree");
    Require(cudaFree(call.v_pages), "cudaFree");
  }
}

int Main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "check" && argc == 3) return CheckAll(argv[2]);
  if (mode == "time") {
    std::string text;
    for (int i = 2; i < argc; ++i) text += std::string(argv[i]) + " ";
    const bool is_half = text.find("dtype=fp16") != std::string::npos;
    for (const bool is_int8 : {false, true}) {
      is_half ? Time<__half>(text, is_int8) : Time<__nv_bfloat16>(text, is_int8);
    }
    return 0;
  }
  Fail("usage: prefill_attention_driver check FILE | time [key=value ...]");
}

}  // namespace
}  // namespace kogpt

int main(int argc, char** argv) { return kogpt::Main(argc, argv); }
