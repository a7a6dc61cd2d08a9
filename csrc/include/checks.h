// Checks and small helpers of the bindings: what an op accepts, said in the words of the caller's
// tensors.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace hf_fuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Plain strings, no streams: a stream in an extension needs the very libstdc++ that torch loaded.
inline const std::string& text_of(const std::string& part) { return part; }
inline std::string text_of(const char* part) { return part; }
inline std::string text_of(int64_t part) { return std::to_string(part); }

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error("hf_fuse " + (std::string() + ... + text_of(parts)));
}

// The C shim answers with an error code.
inline void check_torch(int32_t error) {
  if (error) fail("a call into torch failed, error code ", error);
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return "an unsupported dtype";
  }
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      if (!t.is_cuda()) return DType::kFloat64;
      [[fallthrough]];
    default:
      fail(op, ": ", name, " must be float32, float16 or bfloat16 (on CPU also float64), got ",
           name_of(t.scalar_type()));
  }
}

inline void check_device(const char* op, const char* name, const Tensor& t, const char* like_name,
                         const Tensor& like) {
  if (t.is_cuda() != like.is_cuda() || t.get_device_index() != like.get_device_index())
    fail(op, ": ", name, " must be on the device of ", like_name, ", ",
         like.is_cuda() ? "cuda:" : "cpu ", like.get_device_index(), ", got ",
         t.is_cuda() ? "cuda:" : "cpu ", t.get_device_index());
}

// `t` must live where `like` lives and have its dtype.
inline void check_like(const char* op, const char* name, const Tensor& t, const char* like_name,
                       const Tensor& like) {
  if (t.scalar_type() != like.scalar_type())
    fail(op, ": ", name, " must have the dtype of ", like_name, ", ", name_of(like.scalar_type()),
         ", got ", name_of(t.scalar_type()));
  check_device(op, name, t, like_name, like);
}

inline Act act_of(const char* op, int64_t act) {
  if (act < 0 || act > static_cast<int64_t>(Act::kRelu2))
    fail(op, ": act must be 0 to 4, got ", act);
  return static_cast<Act>(act);
}

inline void check_same_shape(const char* op, const char* name, const Tensor& t,
                             const char* like_name, const Tensor& like) {
  check_like(op, name, t, like_name, like);
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  if (!same)
    fail(op, ": ", name, " must have the shape of ", like_name, ", ", shape_of(like), ", got ",
         shape_of(t));
}

inline void check_vector(const char* op, const char* name, const Tensor& t, const char* like_name,
                         const Tensor& like) {
  check_like(op, name, t, like_name, like);
  const int64_t size = like.size(like.dim() - 1);
  if (t.dim() != 1 || t.size(0) != size)
    fail(op, ": ", name, " must have shape [", size, "], the last dimension of ", like_name,
         ", got ", shape_of(t));
  if (size > 1 && t.stride(0) != 1) fail(op, ": ", name, " must be contiguous");
}

// The rows of a tensor [..., size] as (pointer, row stride). A tensor whose leading dimensions do
// not collapse into one stride is copied; `tensor` keeps the copy alive.
struct Rows {
  Tensor tensor;
  int64_t stride;
  const void* data() const { return tensor.data_ptr(); }
};

inline bool collapses(const Tensor& t, int64_t* stride) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) return false;
  *stride = t.size(last);
  bool seen = false;
  int64_t expected = 0;
  for (int64_t i = last - 1; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (!seen) *stride = t.stride(i);
    if (seen && t.stride(i) != expected) return false;
    seen = true;
    expected = t.stride(i) * t.size(i);
  }
  return true;
}

inline Rows rows_of(const Tensor& t) {
  int64_t stride = 0;
  if (t.numel() == 0) return {t, t.size(t.dim() - 1)};
  if (collapses(t, &stride)) return {t, stride};
  return {torch::stable::contiguous(t), t.size(t.dim() - 1)};
}

inline Tensor empty_strided(const Tensor& like, const int64_t* sizes, const int64_t* strides,
                            int64_t dim, ScalarType type) {
  AtenTensorHandle handle = nullptr;
  int32_t device_type = 0;
  check_torch(aoti_torch_get_device_type(like.get(), &device_type));
  check_torch(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// A new contiguous tensor [..sizes of like..], or of the given sizes, on like's device.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[8], running = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = running;
    running *= sizes.begin()[i] > 0 ? sizes.begin()[i] : 1;
  }
  return empty_strided(like, sizes.begin(), strides, static_cast<int64_t>(sizes.size()), type);
}

inline Tensor empty_contiguous_like(const Tensor& like) {
  const int64_t dim = like.dim();
  if (dim > 16) fail("tensors of more than 16 dimensions are not supported, got ", dim);
  int64_t sizes[16], strides[16], running = 1;
  for (int64_t i = dim; i-- > 0;) {
    sizes[i] = like.size(i);
    strides[i] = running;
    running *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return empty_strided(like, sizes, strides, dim, like.scalar_type());
}

// An output that was not asked for; Python sees None.
inline Tensor nothing() { return Tensor(); }

inline const void* data_or_null(const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; }

inline int64_t rows_in(const Tensor& t) {
  const int64_t size = t.size(t.dim() - 1);
  return size ? t.numel() / size : 0;
}

#ifdef HF_FUSE_CUDA
inline void* stream_of(const Tensor& t) {
  void* stream = nullptr;
  check_torch(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}
// Kernels launch on the tensors' device, whatever the current one is.
struct DeviceGuard {
  explicit DeviceGuard(const Tensor& t) : guard(t.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};
#else
inline void* stream_of(const Tensor&) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};
#endif

}  // namespace hf_fuse
