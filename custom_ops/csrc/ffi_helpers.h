// What the FFI handlers share: checks of buffers whose errors name the op, the argument and both
// values, and what an op runs on.
//
// Only this file, *_ffi.cc, decode_layers_ffi.h and library.cc include XLA's headers. They are
// compiled once for each library: libkogpt_ops_host.so with KOGPT_HOST defined,
// libkogpt_ops_cuda.so with KOGPT_CUDA.
#ifndef CUSTOM_OPS_FFI_HELPERS_H_
#define CUSTOM_OPS_FFI_HELPERS_H_

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

#include "op_common.h"
#include "parallel_for.h"
#include "xla/ffi/api/ffi.h"

#if defined(KOGPT_HOST) == defined(KOGPT_CUDA)
#error "Define one of KOGPT_HOST and KOGPT_CUDA"
#endif

// The libraries are compiled with hidden visibility: two of them live in one process.
#define KOGPT_EXPORT __attribute__((visibility("default")))

namespace kogpt {

namespace ffi = ::xla::ffi;

using Buffer = ffi::AnyBuffer;
using ResultBuffer = ffi::Result<ffi::AnyBuffer>;

#ifdef KOGPT_CUDA

using ExecutorContext = ffi::PlatformStream<void*>;
using Executor = void*;  // a cudaStream_t
// Kernels are only enqueued, and scratch is a result: what a captured command buffer writes to
// stays allocated.
inline constexpr std::initializer_list<ffi::Traits> kHandlerTraits = {
    ffi::Traits::kCmdBufferCompatible};

#else

using ExecutorContext = ffi::ThreadPool;
using Executor = ffi::ThreadPool;
inline constexpr std::initializer_list<ffi::Traits> kHandlerTraits = {};

// `pool` must outlive what is returned.
inline ParallelFor MakeParallelFor(ffi::ThreadPool& pool) {
  return [&pool](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
    RunParallel(count, pool.num_threads(), body,
                [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); });
  };
}

#endif

inline std::string DtypeName(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return "f32";
    case ffi::DataType::F16:
      return "f16";
    case ffi::DataType::BF16:
      return "bf16";
    case ffi::DataType::S8:
      return "s8";
    case ffi::DataType::S32:
      return "s32";
    case ffi::DataType::PRED:
      return "pred";
    default:
      // The number in XLA's PrimitiveType.
      return "type " + std::to_string(static_cast<int>(dtype));
  }
}

// Null for what no op computes with.
inline std::optional<DataType> ToDataType(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return DataType::kFloat32;
    case ffi::DataType::F16:
      return DataType::kFloat16;
    case ffi::DataType::BF16:
      return DataType::kBfloat16;
    case ffi::DataType::S8:
      return DataType::kInt8;
    default:
      return std::nullopt;
  }
}

template <typename Extents>
std::string ShapeName(const Extents& extents) {
  std::string name = "[";
  for (const int64_t extent : extents)
    name += (name.size() > 1 ? ", " : "") + std::to_string(extent);
  return name + "]";
}

// An operand that a call leaves out has the shape [0].
inline bool IsAbsent(const Buffer& buffer) {
  return buffer.dimensions().size() == 1 && buffer.dimensions()[0] == 0;
}

// The buffer's values as T, which its dtype must have been checked to be; null without any.
template <typename T>
T* DataOrNull(const Buffer& buffer) {
  return buffer.element_count() == 0 ? nullptr : static_cast<T*>(buffer.untyped_data());
}

// Checks the buffers of one call and keeps the first error. Sizes that come out of a buffer
// (`Extent`) count only while there is none.
class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}

  bool failed() const { return error_.failure(); }
  const ffi::Error& error() const { return error_; }
  // Of what is not an argument's fault.
  ffi::Error Internal(const std::string& message) const {
    return ffi::Error::Internal(std::string(op_) + ": " + message);
  }

  void Rank(const char* name, const Buffer& buffer, size_t rank) {
    if (buffer.dimensions().size() == rank) return;
    Fail(name, "have rank " + std::to_string(rank), "shape " + ShapeName(buffer.dimensions()));
  }

  void Shape(const char* name, const Buffer& buffer, std::initializer_list<int64_t> shape) {
    const Buffer::Dimensions extents = buffer.dimensions();
    if (extents.size() == shape.size() && std::equal(extents.begin(), extents.end(), shape.begin()))
      return;
    Fail(name, "have shape " + ShapeName(shape), ShapeName(extents));
  }

  // The shape, or [0] for an operand that is left out. Returns whether it is there.
  bool OptionalShape(const char* name, const Buffer& buffer, std::initializer_list<int64_t> shape) {
    if (IsAbsent(buffer)) return false;
    Shape(name, buffer, shape);
    return true;
  }

  void Dtype(const char* name, const Buffer& buffer, std::initializer_list<ffi::DataType> allowed) {
    std::string names;
    for (const ffi::DataType dtype : allowed) {
      if (buffer.element_type() == dtype) return;
      names += (names.empty() ? "" : " or ") + DtypeName(dtype);
    }
    Fail(name, "have dtype " + names, DtypeName(buffer.element_type()));
  }

  // The scales of pages, a token and head each, of `shape`; of 16-bit pages the shape [0].
  void PageScales(const char* name, const Buffer& scales, bool is_int8,
                  std::initializer_list<int64_t> shape) {
    Dtype(name, scales, {ffi::F32});
    if (is_int8) {
      Shape(name, scales, shape);
    } else {
      Shape(name, scales, {0});
    }
  }

  // The result is the argument's memory.
  void Aliased(const char* name, const Buffer& argument, const Buffer& result) {
    if (argument.untyped_data() == result.untyped_data()) return;
    Fail(name, "be aliased to its result (input_output_aliases)", "two buffers");
  }

  void That(bool condition, const char* name, const std::string& expected, const std::string& got) {
    if (!condition) Fail(name, expected, got);
  }

  // What a Check function of the op's header says: null, or a message.
  void Message(const char* message) {
    if (message != nullptr) SetError(message);
  }

 private:
  void Fail(const char* name, const std::string& expected, const std::string& got) {
    SetError(std::string(name) + " must " + expected + ", got " + got);
  }

  void SetError(const std::string& message) {
    if (!failed()) error_ = ffi::Error::InvalidArgument(std::string(op_) + ": " + message);
  }

  const char* op_;
  ffi::Error error_;
};

}  // namespace kogpt

#endif  // CUSTOM_OPS_FFI_HELPERS_H_
