// Kernels that are enqueued again and again with the same arguments, as one CUDA graph: the host's
// part is one launch then, where each kernel by itself takes it microseconds, more than the GPU needs
// for a small one.
#ifndef CUSTOM_OPS_CUDA_GRAPH_H_
#define CUSTOM_OPS_CUDA_GRAPH_H_

#include <functional>
#include <string>

namespace kogpt {

// Enqueues on `stream` (a cudaStream_t of the current device) what `enqueue` would enqueue there. What
// that is must follow from `key`: it is called for a key that is not known, and its kernels are kept as
// a graph, a few of the last ones for each device. Programmatic dependent launch stays. Returns null, or
// a message of static lifetime.
const char* EnqueueAsGraph(const std::string& key, void* stream,
                           const std::function<const char*(void* stream)>& enqueue);

}  // namespace kogpt

#endif  // CUSTOM_OPS_CUDA_GRAPH_H_
