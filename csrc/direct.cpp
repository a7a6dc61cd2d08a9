// add_norm for eager calls on CPU that nothing else has to see: from Python's arguments to the
// kernel without torch's dispatcher. At one token the dispatcher takes four times as long as the
// kernel, and eager mode's add and norm together take no longer than that.
//
// A call answers None whenever it is not the plain case: an autograd graph to record, a mode, a
// profiler, a tensor subclass, a stride, a wrong size. The caller then goes through the dispatcher,
// which handles or refuses it.
//
// The one file that needs torch's C++ headers and Python's: tensors cannot cross from Python over
// the stable ABI. hf_fuse/jit.py leaves it out where Python's headers are missing.
#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "ops.h"

namespace hf_fuse {
namespace {

// Keys whose work is done elsewhere: the op has no autocast rule, and autograd was asked about.
const c10::DispatchKeySet kPlain = c10::DispatchKeySet({
                                       c10::DispatchKey::CPU,
                                       c10::DispatchKey::BackendSelect,
                                       c10::DispatchKey::ADInplaceOrView,
                                       c10::DispatchKey::AutocastCPU,
                                   }) |
                                   c10::autograd_dispatch_keyset;

// The tensors of one call, as far as they are alike and plain.
struct Call {
  const c10::impl::LocalDispatchKeySet modes = c10::impl::tls_local_dispatch_key_set();
  const bool grad = c10::GradMode::is_enabled();
  bool plain = !at::hasCallbacks() && !at::impl::torch_function_mode_enabled();
  const at::Tensor* x = nullptr;

  const at::Tensor* tensor(PyObject* object) {
    if (!THPVariable_CheckExact(object)) return plain = false, nullptr;
    const at::Tensor& t = THPVariable_Unpack(object);
    if (!t.defined()) return plain = false, nullptr;
    const auto keys = (t.key_set() | modes.included_) - modes.excluded_;
    if ((keys.raw_repr() & ~kPlain.raw_repr()) || (grad && t.requires_grad()) ||
        !t.is_contiguous() || (x && t.scalar_type() != x->scalar_type()))
      return plain = false, nullptr;
    return &t;
  }
  const void* rows(PyObject* object) {  // a tensor of the shape of x
    const at::Tensor* t = tensor(object);
    if (t && !t->sizes().equals(x->sizes())) plain = false;
    return plain ? t->const_data_ptr() : nullptr;
  }
  const void* vector(PyObject* object) {  // None, or a tensor of one row's size
    if (object == Py_None) return nullptr;
    const at::Tensor* t = tensor(object);
    if (t && (t->dim() != 1 || t->size(0) != x->size(-1))) plain = false;
    return plain ? t->const_data_ptr() : nullptr;
  }
};

bool set_dtype(AddNormForward& p, c10::ScalarType type) {
  switch (type) {
    case c10::ScalarType::Float:
      return p.dtype = DType::kFloat32, true;
    case c10::ScalarType::Half:
      return p.dtype = DType::kFloat16, true;
    case c10::ScalarType::BFloat16:
      return p.dtype = DType::kBFloat16, true;
    default:
      return false;
  }
}

bool set_kind(AddNormForward& p, PyObject* name) {
  const char* names[] = {"rms", "layer", "rms_once", "rms_offset"};
  for (int i = 0; i < 4; ++i) {
    p.kind = static_cast<Norm>(i);
    if (PyUnicode_CompareWithASCIIString(name, names[i]) == 0) return true;
  }
  return false;
}

PyObject* add_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  PyObject* const deltas = count == 8 ? args[1] : nullptr;
  if (!deltas || !PyTuple_CheckExact(deltas) || PyTuple_GET_SIZE(deltas) > 2 ||
      !PyFloat_CheckExact(args[6]) || !PyUnicode_CheckExact(args[7]))
    Py_RETURN_NONE;
  const Py_ssize_t num_deltas = PyTuple_GET_SIZE(deltas);

  Call call;
  const at::Tensor* x = call.x = call.tensor(args[0]);
  if (!x || x->dim() < 1 || x->numel() == 0) Py_RETURN_NONE;
  AddNormForward p{};
  p.hidden_size = x->size(-1);
  p.num_tokens = x->numel() / p.hidden_size;
  p.eps = PyFloat_AS_DOUBLE(args[6]);
  if (!set_dtype(p, x->scalar_type()) || p.hidden_size > 65536 || args[2] == Py_None ||
      (args[4] == Py_None && args[5] != Py_None) || !set_kind(p, args[7]) ||
      (is_rms(p.kind) && (args[3] != Py_None || args[5] != Py_None)))
    Py_RETURN_NONE;
  p.x = x->const_data_ptr();
  if (num_deltas > 0) p.delta1 = call.rows(PyTuple_GET_ITEM(deltas, 0));
  if (num_deltas > 1) p.delta2 = call.rows(PyTuple_GET_ITEM(deltas, 1));
  p.x_stride = p.delta1_stride = p.delta2_stride = p.hidden_size;
  p.weight1 = call.vector(args[2]), p.bias1 = call.vector(args[3]);
  p.weight2 = call.vector(args[4]), p.bias2 = call.vector(args[5]);
  if (!call.plain) Py_RETURN_NONE;

  const auto like_x = [&] { return at::detail::empty_cpu(x->sizes(), x->scalar_type()); };
  at::TensorBase residual, normed1 = like_x(), normed2;
  p.normed1 = normed1.mutable_data_ptr();
  if (num_deltas) residual = like_x(), p.residual = residual.mutable_data_ptr();
  if (p.weight2) normed2 = like_x(), p.normed2 = normed2.mutable_data_ptr();
  {
    pybind11::gil_scoped_release no_gil;
    add_norm_forward(p, nullptr);
  }
  PyObject* out = PyTuple_New(3);
  if (!out) return nullptr;
  PyTuple_SET_ITEM(out, 0, num_deltas ? THPVariable_Wrap(std::move(residual)) : Py_NewRef(args[0]));
  PyTuple_SET_ITEM(out, 1, THPVariable_Wrap(std::move(normed1)));
  PyTuple_SET_ITEM(out, 2, p.weight2 ? THPVariable_Wrap(std::move(normed2)) : Py_NewRef(Py_None));
  return out;
  END_HANDLE_TH_ERRORS
}

PyMethodDef kMethods[] = {
    {"add_norm", reinterpret_cast<PyCFunction>(add_norm), METH_FASTCALL,
     "add_norm(x, deltas, weight, bias, weight2, bias2, eps, kind) -> (residual, normed, normed2), "
     "or None where the call is not a plain one"},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "hf_fuse_cpu", "Calls past torch's dispatcher.", -1,
                       kMethods};

}  // namespace
}  // namespace hf_fuse

extern "C" __attribute__((visibility("default"))) PyObject* PyInit_hf_fuse_cpu() {
  return PyModule_Create(&hf_fuse::kModule);
}
