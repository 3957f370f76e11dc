// Times greedy decode steps without JAX, on one GPU or a shard on each of several.
//
//   decode_steps_driver [DEVICE ...] [key=value ...]   default: device 0
//
// A rank for each device; ranks that share one are for the sanitizer. Keys: rows, context, capacity, layers, model_dim, heads, head_dim, ffn_dim, vocab of the whole model
// (KoGPT 6B's), weight (bf16, int8), activations (bf16, int8: those that meet an INT8 weight), cache
// (bf16, int8), steps (of a call; 0: a call is the layers of a
// step, and its logits), calls (of a run). A call is one CUDA graph, as the FFI handlers have it. Prints
// the median of nine runs, and at what rate a device reads what it must.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "cuda_common.cuh"
#include "cuda_graph.h"
#include "decode_steps.h"

namespace kogpt {
namespace {

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "decode_steps_driver: %s\n", message.c_str());
  std::exit(1);
}

void Require(cudaError_t error) {
  if (error != cudaSuccess) Fail(cudaGetErrorString(error));
}

void Require(const char* error) {
  if (error != nullptr) Fail(error);
}

__global__ void FillKernel(uint16_t* values, int64_t count, uint32_t seed, bool is_int8) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    uint64_t state = (static_cast<uint64_t>(seed) << 32) + i;
    state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9ull;
    state = (state ^ (state >> 27)) * 0x94d049bb133111ebull;
    const auto bits = static_cast<uint16_t>(state >> 40);
    const float value = (static_cast<float>(bits) / 65536.0f - 0.5f) * 0.08f;
    values[i] = is_int8 ? bits : __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
}

struct Model {
  std::map<std::string, int64_t> sizes = {{"rows", 1},       {"context", 192},    {"capacity", 256},
                                          {"layers", 28},    {"model_dim", 4096}, {"heads", 16},
                                          {"head_dim", 256}, {"ffn_dim", 16384},  {"vocab", 64512},
                                          {"steps", 8},      {"calls", 8}};
  bool is_int8 = false;
  bool has_int8_activations = false;
  bool is_int8_cache = false;

  int64_t operator[](const char* name) const { return sizes.at(name); }

  void Set(const std::string& key, const std::string& value) {
    const bool is_type = value == "bf16" || value == "int8";
    if (key == "weight" && is_type) {
      is_int8 = value == "int8";
    } else if (key == "activations" && is_type) {
      has_int8_activations = value == "int8";
    } else if (key == "cache" && is_type) {
      is_int8_cache = value == "int8";
    } else if (sizes.count(key) != 0 && std::atoll(value.c_str()) >= (key == "steps" ? 0 : 1)) {
      sizes[key] = std::atoll(value.c_str());
    } else {
      Fail("unknown key or value: " + key + "=" + value);
    }
  }
};

// A shard of the model on a device.
class Shard {
 public:
  Shard(const Model& model, int device, const AllReduceGroup* group, int rank, int num_ranks)
      : device_(device), num_steps_(model["steps"]), layers_(model["layers"]) {
    Require(cudaSetDevice(device));
    Require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    constexpr int64_t kPageLen = 64;
    const int64_t rows = model["rows"], dim = model["model_dim"];
    std::memset(static_cast<void*>(&params_), 0, sizeof(params_));
    DecodeLayersParams& params = params_.layers;
    params.rows = rows;
    params.model_dim = dim;
    params.ffn_dim = model["ffn_dim"] / num_ranks;
    params.num_heads = model["heads"] / num_ranks;
    params.head_dim = model["head_dim"];
    params.page_len = kPageLen;
    params.max_pages = model["capacity"] / kPageLen;
    params.num_pages = rows * params.max_pages + 1;
    params.rotary_dim = 2 * kHalfRotaryDim;
    params.vocab_size = model["vocab"] / num_ranks;
    params.dtype = DataType::kBfloat16;
    params.weight_dtype = model.is_int8 ? DataType::kInt8 : DataType::kBfloat16;
    params.epsilon = 1e-5f;
    params.prefetch_weights = true;
    params.int8_activations = model.has_int8_activations;
    const int64_t attention_dim = params.num_heads * params.head_dim;
    const int64_t act_dim = attention_dim + params.ffn_dim;
    const int64_t in_dim = 3 * attention_dim + params.ffn_dim;
    const void* const small = Filled(std::max(in_dim, std::max(dim, params.vocab_size)), false);
    const float* const scale =
        model.is_int8 ? Floats(std::max(in_dim, params.vocab_size), 3e-4f) : nullptr;
    const auto matrix = [&](int64_t outputs, int64_t k) {
      bytes_ += static_cast<double>(outputs) * k * (model.is_int8 ? 1 : 2);
      return Filled(outputs * k, model.is_int8);
    };
    const int64_t num_tokens = params.num_pages * params.num_heads * kPageLen;  // of heads
    for (DecodeLayer& layer : layers_) {
      layer.ln_scale = layer.ln_bias = layer.b_ffn_in = layer.b_ffn_out = small;
      layer.w_in = matrix(in_dim, dim);
      layer.w_out = matrix(dim, act_dim);
      layer.w_in_scale = layer.w_out_scale = scale;
      layer.k_pages = Filled(num_tokens * params.head_dim, model.is_int8_cache);
      layer.v_pages = Filled(num_tokens * params.head_dim, model.is_int8_cache);
      if (model.is_int8_cache) {
        layer.k_scales = Floats(num_tokens, 1e-3f);
        layer.v_scales = Floats(num_tokens, 1e-3f);
      }
    }
    bytes_ += 2.0 * layers_.size() * rows * model["context"] * params.num_heads *
              (model.is_int8_cache ? params.head_dim + 4 : 2 * params.head_dim);
    params.layers = layers_.data();
    params.num_layers = static_cast<int64_t>(layers_.size());
    // What steps go on from; where `choice` writes it.
    ChooseTokenParams& choice = params_.choice;
    params.x = choice.x = Floats(rows * dim, 0.5f);
    params.cos = choice.cos = Floats(rows * kHalfRotaryDim, 0.6f);
    params.sin = choice.sin = Floats(rows * kHalfRotaryDim, 0.8f);
    std::vector<int32_t> pages(rows * params.max_pages);
    for (size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<int32_t>(i);
    params.page_table = Integers(pages);
    lengths_.assign(rows, static_cast<int32_t>(model["context"] - 1));
    params.lengths = choice.lengths = Integers(lengths_);
    params.num_new = choice.num_new = Integers(std::vector<int32_t>(rows, 1));
    params.lm_head = matrix(params.vocab_size, dim);
    params.lm_head_scale = scale;
    params.lm_head_bias = params.ln_f_scale = params.ln_f_bias = small;
    params.y = Floats(rows * dim, 0.0f);
    params.logits = Floats(rows * params.vocab_size, 0.0f);
    params.other_x = Floats(rows * dim, 0.0f);
    params.qkv = Filled(rows * 3 * attention_dim, false);
    params.act = Filled(rows * act_dim, false);
    params.h = Filled(rows * std::max(dim, act_dim), false);
    params.part = Floats(rows * dim, 0.0f);
    params.linear_partials_bytes = LinearPartialsBytes(rows);
    params.linear_partials = Floats(params.linear_partials_bytes / 4, 0.0f);
    DecodeAttentionParams attention = {};
    attention.batch = rows;
    attention.num_heads = params.num_heads;
    attention.head_dim = params.head_dim;
    attention.page_len = kPageLen;
    attention.max_pages = params.max_pages;
    params.attention_partials_bytes = DecodeAttentionPartialsBytes(attention);
    params.attention_partials = Floats(params.attention_partials_bytes / 4, 0.0f);
    params.semaphores = Integers(std::vector<int32_t>(kNumSemaphores, 0));
    params.group = group;
    params.rank = rank;
    params.timeout_ms = 20000;
    params_.num_steps = num_steps_;
    choice.rows = rows;
    choice.model_dim = dim;
    choice.local_vocab = params.vocab_size;
    choice.vocab_size = model["vocab"];
    choice.half_rotary_dim = kHalfRotaryDim;
    choice.num_positions = model["capacity"];
    choice.dtype = params.dtype;
    choice.epsilon = params.epsilon;
    choice.embedding = Filled(params.vocab_size * dim, false);
    choice.all_cos = Floats(choice.num_positions * kHalfRotaryDim, 0.6f);
    choice.all_sin = Floats(choice.num_positions * kHalfRotaryDim, 0.8f);
    choice.ignore_eos = reinterpret_cast<bool*>(Uploaded(std::vector<uint8_t>(rows, 1)));
    choice.prefetch_parameters = true;
    choice.tokens = Integers(std::vector<int32_t>(rows, 1));
    choice.num_remaining = Integers(std::vector<int32_t>(rows, 1 << 30));
    choice.new_tokens = Integers(std::vector<int32_t>(rows * (num_steps_ + 1), 0));
    choice.logprobs = Floats(rows * (num_steps_ + 1), 0.0f);
    choice.new_stride = num_steps_;
    choice.candidates =
        reinterpret_cast<VocabCandidate*>(Floats(rows * NumVocabSlices(choice) * 4, 0.0f));
    choice.group = group;
    choice.rank = rank;
    choice.timeout_ms = params.timeout_ms;
    Require(cudaDeviceSynchronize());
  }

  double bytes() const { return bytes_; }

  // Milliseconds a step.
  double Run(int64_t num_calls) {
    Require(cudaSetDevice(device_));
    // The context of a run's middle is the one that is asked for.
    const auto num_tokens = static_cast<int32_t>(num_steps_ * num_calls / 2);
    std::vector<int32_t> lengths = lengths_;
    for (int32_t& length : lengths) length = std::max(length - num_tokens, 1);
    Require(cudaMemcpyAsync(params_.choice.lengths, lengths.data(), 4 * lengths.size(),
                            cudaMemcpyHostToDevice, stream_));
    cudaEvent_t begin, end;
    Require(cudaEventCreate(&begin));
    Require(cudaEventCreate(&end));
    Call();  // on several devices a start in common
    Require(cudaEventRecord(begin, stream_));
    for (int64_t call = 0; call < num_calls; ++call) Call();
    Require(cudaEventRecord(end, stream_));
    Require(cudaStreamSynchronize(stream_));
    float ms = 0.0f;
    Require(cudaEventElapsedTime(&ms, begin, end));
    return ms / (num_calls * std::max<int64_t>(num_steps_, 1));
  }

 private:
  void Call() {
    const std::string key = num_steps_ == 0 ? KeyOf(params_.layers) : KeyOf(params_);
    Require(EnqueueAsGraph(key, stream_, [&](void* stream) {
      const DecodeOps ops = {
          LinearHasIntegers(),
          [=](const LinearParams& linear) { return LaunchLinear(linear, stream); },
          [=](const DecodeAttentionParams& attention) {
            return LaunchDecodeAttention(attention, stream);
          },
          [=](const AllReduceParams& sum) { return LaunchAllReduce(sum, stream); }};
      if (num_steps_ == 0) return RunDecodeLayers(params_.layers, ops);
      const auto choose = [=](const ChooseTokenParams& choice) {
        return LaunchChooseToken(choice, stream);
      };
      return RunDecodeSteps(params_, {ops, choose, true});
    }));
  }

  // bf16 or, of half as many bytes, INT8 values.
  void* Filled(int64_t count, bool is_int8) {
    static uint32_t seed = 1;
    void* data = nullptr;
    const int64_t words = is_int8 ? (count + 1) / 2 : count;
    Require(cudaMalloc(&data, words * 2));
    FillKernel<<<1024, 256>>>(static_cast<uint16_t*>(data), words, seed++, is_int8);
    Require(cudaGetLastError());
    return data;
  }

  template <typename T>
  T* Uploaded(const std::vector<T>& values) {
    T* data = nullptr;
    Require(cudaMalloc(&data, values.size() * sizeof(T)));
    Require(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return data;
  }
  float* Floats(int64_t count, float value) { return Uploaded(std::vector<float>(count, value)); }
  int32_t* Integers(const std::vector<int32_t>& values) { return Uploaded(values); }

  static constexpr int64_t kHalfRotaryDim = 32;

  int device_;
  int64_t num_steps_;
  cudaStream_t stream_;
  DecodeStepsParams params_;
  std::vector<int32_t> lengths_;
  std::vector<DecodeLayer> layers_;
  double bytes_ = 0.0;
};

int Main(int argc, char** argv) {
  // As all_reduce needs it, of a process with several devices.
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  Model model;
  std::vector<int> devices;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const size_t equal = word.find('=');
    if (equal == std::string::npos) {
      devices.push_back(std::atoi(argv[i]));
    } else {
      model.Set(word.substr(0, equal), word.substr(equal + 1));
    }
  }
  if (devices.empty()) devices = {0};
  const int num_ranks = static_cast<int>(devices.size());
  std::string error;
  const AllReduceGroup* const group =
      num_ranks == 1 ? nullptr : MakeAllReduceGroup(devices, &error);
  if (num_ranks > 1 && group == nullptr) Fail(error);
  std::vector<Shard> shards;
  shards.reserve(num_ranks);
  for (int rank = 0; rank < num_ranks; ++rank) {
    shards.emplace_back(model, devices[rank], group, rank, num_ranks);
  }
  std::vector<double> times;
  for (int run = 0; run < 10; ++run) {
    std::vector<double> of_ranks(num_ranks);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < num_ranks; ++rank) {
      threads.emplace_back(
          [&, rank] { of_ranks[rank] = shards[rank].Run(run == 0 ? 1 : model["calls"]); });
    }
    for (std::thread& thread : threads) thread.join();
    if (run > 0) times.push_back(*std::max_element(of_ranks.begin(), of_ranks.end()));
  }
  std::sort(times.begin(), times.end());
  const double ms = times[times.size() / 2];
  std::printf(
      "%d devices, %lld steps a call, rows %lld, context %lld, %s weights, %s%s cache: "
      "%.1f us a step, %.3f TB/s\n",
      num_ranks, static_cast<long long>(model["steps"]), static_cast<long long>(model["rows"]),
      static_cast<long long>(model["context"]), model.is_int8 ? "int8" : "bf16",
      model.has_int8_activations ? "int8 activations, " : "", model.is_int8_cache ? "int8" : "bf16",
      1e3 * ms, shards[0].bytes() / ms / 1e9);
  return 0;
}

}  // namespace
}  // namespace kogpt

int main(int argc, char** argv) { return kogpt::Main(argc, argv); }
