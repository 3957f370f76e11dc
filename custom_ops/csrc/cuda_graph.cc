#include "cuda_graph.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

namespace kogpt {
namespace {

// A program of two buckets of rows and capacities, with arrays that lie here and there from call to call.
constexpr size_t kMaxGraphs = 16;
constexpr int kMaxDevices = 64;
constexpr int kFirstDriver = 12030;  // whose graphs keep programmatic dependent launch

struct Graph {
  std::string key;
  cudaGraphExec_t exec;
  uint64_t last_use;
};

struct Graphs {
  std::mutex mutex;
  cudaStream_t stream = nullptr;  // to capture on
  std::vector<Graph> graphs;
  uint64_t num_uses = 0;
};

// What `enqueue` enqueues.
cudaError_t Capture(Graphs* graphs, const std::function<const char*(void*)>& enqueue,
                    cudaGraph_t* graph, const char** message) {
  if (graphs->stream == nullptr) {
    const cudaError_t error = cudaStreamCreateWithFlags(&graphs->stream, cudaStreamNonBlocking);
    if (error != cudaSuccess) return error;
  }
  // Relaxed: a kernel's first launch may load it.
  cudaError_t error = cudaStreamBeginCapture(graphs->stream, cudaStreamCaptureModeRelaxed);
  if (error != cudaSuccess) return error;
  *message = enqueue(graphs->stream);
  error = cudaStreamEndCapture(graphs->stream, graph);
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

// In place of the least recently used graph if there are as many as are kept. Not that one updated:
// cudaGraphExecUpdate leaves a kernel's clusters as they were (driver 580; MLX's pull request 2813).
cudaError_t Keep(Graphs* graphs, const std::string& key, cudaGraph_t graph, Graph** kept) {
  cudaGraphExec_t exec = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&exec, graph, 0);
  if (error != cudaSuccess) return error;
  if (graphs->graphs.size() < kMaxGraphs) {
    graphs->graphs.push_back({key, exec, 0});
    *kept = &graphs->graphs.back();
    return cudaSuccess;
  }
  Graph& oldest =
      *std::min_element(graphs->graphs.begin(), graphs->graphs.end(),
                        [](const Graph& a, const Graph& b) { return a.last_use < b.last_use; });
  static_cast<void>(cudaGraphExecDestroy(oldest.exec));  // once its launches have ended
  oldest = {key, exec, 0};
  *kept = &oldest;
  return cudaSuccess;
}

}  // namespace

const char* EnqueueAsGraph(const std::string& key, void* stream,
                           const std::function<const char*(void* stream)>& enqueue) {
  static auto* const all = new Graphs[kMaxDevices];
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(cuda_stream, &status);
  int device = 0, driver = 0;
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  // Into somebody else's graph a graph cannot be launched.
  if (status != cudaStreamCaptureStatusNone || device >= kMaxDevices || driver < kFirstDriver) {
    return enqueue(stream);
  }

  Graphs& graphs = all[device];
  const std::lock_guard<std::mutex> lock(graphs.mutex);
  const auto found = std::find_if(graphs.graphs.begin(), graphs.graphs.end(),
                                  [&](const Graph& graph) { return graph.key == key; });
  Graph* graph = found == graphs.graphs.end() ? nullptr : &*found;
  if (graph == nullptr) {
    cudaGraph_t captured = nullptr;
    const char* message = nullptr;
    error = Capture(&graphs, enqueue, &captured, &message);
    if (message == nullptr && error == cudaSuccess) error = Keep(&graphs, key, captured, &graph);
    if (captured != nullptr) static_cast<void>(cudaGraphDestroy(captured));
    if (message != nullptr) return message;
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  graph->last_use = ++graphs.num_uses;
  error = cudaGraphLaunch(graph->exec, cuda_stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace kogpt
