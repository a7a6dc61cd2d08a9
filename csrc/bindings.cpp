// The ops as torch sees them. Compiled twice: with the kernels of csrc/cpu it defines the schemas
// and the CPU implementations, with those of csrc/cuda (HF_FUSE_CUDA) the CUDA ones. Each function:
// check, derive, return if empty, launch. What an op computes is said in hf_fuse/ops/<op>.py, how
// its launcher reads memory in include/ops.h.
#include "checks.h"

namespace hf_fuse {

#ifndef HF_FUSE_CUDA
void parallel_for_rows(int64_t rows, int64_t grain, void (*body)(int64_t, int64_t, void*),
                       void* context) {
  if (rows <= grain) return body(0, rows, context);
  torch::stable::parallel_for(0, rows, grain,
                              [=](int64_t begin, int64_t end) { body(begin, end, context); });
}
#endif

namespace bindings {

void check_rows(const char* op, const char* name, const Tensor& t) {
  if (t.dim() < 1) fail(op, ": ", name, " must have at least one dimension, got a scalar");
}

// ---- add_norm
// -------------------------------------------------------------------------------------------------------

Norm norm_of(const char* op, int64_t kind) {
  if (kind < 0 || kind > static_cast<int64_t>(Norm::kRmsOffset))
    fail(op, ": kind must be 0 to 3 (rms, layer, rms_once, rms_offset), got ", kind);
  return static_cast<Norm>(kind);
}

void check_norm(const char* op, const char* weight_name, const OptionalTensor& weight,
                const char* bias_name, const OptionalTensor& bias, bool rms, const Tensor& x) {
  if (weight) check_vector(op, weight_name, *weight, "x", x);
  if (!bias) return;
  if (!weight || rms)
    fail(op, ": ", bias_name, " needs ", rms ? "a LayerNorm, RMSNorm has no bias" : weight_name);
  check_vector(op, bias_name, *bias, "x", x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_norm(
    Tensor x, OptionalTensor delta1, OptionalTensor delta2, Tensor weight1, OptionalTensor bias1,
    OptionalTensor weight2, OptionalTensor bias2, double eps, int64_t kind, bool stats) {
  const char* op = "add_norm";
  check_rows(op, "x", x);
  AddNormForward p{};
  p.kind = norm_of(op, kind);
  const bool rms = is_rms(p.kind);
  p.dtype = dtype_of(op, "x", x);
  if (delta1) check_same_shape(op, "delta1", *delta1, "x", x);
  if (delta2) check_same_shape(op, "delta2", *delta2, "x", x);
  if (delta2 && !delta1) fail(op, ": delta2 needs delta1");
  check_norm(op, "weight1", weight1, "bias1", bias1, rms, x);
  check_norm(op, "weight2", weight2, "bias2", bias2, rms, x);
  p.hidden_size = x.size(x.dim() - 1);
  p.num_tokens = rows_in(x);
  p.eps = eps;
  if (p.hidden_size < 1 || p.hidden_size > 65536)
    fail(op, ": the last dimension of x must be 1 to 65536, got ", p.hidden_size);

  const ScalarType stat = p.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor residual = delta1 ? empty_contiguous_like(x) : nothing();
  Tensor normed1 = empty_contiguous_like(x);
  Tensor normed2 = weight2 ? empty_contiguous_like(x) : nothing();
  Tensor mean = stats && !rms ? empty(x, {p.num_tokens}, stat) : nothing();
  Tensor rstd = stats ? empty(x, {p.num_tokens}, stat) : nothing();
  if (p.num_tokens > 0) {
    const Rows xs = rows_of(x), d1 = delta1 ? rows_of(*delta1) : xs,
               d2 = delta2 ? rows_of(*delta2) : xs;
    p.x = xs.data(), p.x_stride = xs.stride;
    p.delta1 = delta1 ? d1.data() : nullptr, p.delta1_stride = d1.stride;
    p.delta2 = delta2 ? d2.data() : nullptr, p.delta2_stride = d2.stride;
    p.weight1 = weight1.data_ptr(), p.bias1 = data_or_null(bias1);
    p.weight2 = data_or_null(weight2), p.bias2 = data_or_null(bias2);
    p.residual = delta1 ? residual.data_ptr() : nullptr;
    p.normed1 = normed1.data_ptr(), p.normed2 = weight2 ? normed2.data_ptr() : nullptr;
    p.mean = stats && !rms ? mean.data_ptr() : nullptr, p.rstd = stats ? rstd.data_ptr() : nullptr;
    DeviceGuard guard(x);
    add_norm_forward(p, stream_of(x));
  }
  return {residual, normed1, normed2, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_norm_backward(
    OptionalTensor grad_residual, OptionalTensor grad_normed1, OptionalTensor grad_normed2,
    Tensor residual, Tensor weight1, OptionalTensor weight2, OptionalTensor mean, Tensor rstd,
    int64_t kind, bool bias1, bool bias2) {
  const char* op = "add_norm_backward";
  check_rows(op, "residual", residual);
  AddNormBackward p{};
  p.dtype = dtype_of(op, "residual", residual);
  check_vector(op, "weight1", weight1, "residual", residual);
  if (weight2) check_vector(op, "weight2", *weight2, "residual", residual);
  if (grad_normed2 && !weight2) fail(op, ": grad_normed2 needs weight2");
  p.kind = norm_of(op, kind);
  const bool rms = is_rms(p.kind);
  p.hidden_size = residual.size(residual.dim() - 1);
  p.num_tokens = rows_in(residual);
  if (rstd.numel() != p.num_tokens || (!rms && (!mean || mean->numel() != p.num_tokens)))
    fail(op, ": rstd and mean must hold one number for each of the ", p.num_tokens, " tokens");

  const auto rows = [&](const char* name, const OptionalTensor& grad) {
    if (grad) check_same_shape(op, name, *grad, "residual", residual);
    return rows_of(grad ? *grad : residual);
  };
  const Rows saved = rows_of(residual), r = rows("grad_residual", grad_residual);
  const Rows g1 = rows("grad_normed1", grad_normed1), g2 = rows("grad_normed2", grad_normed2);
  p.residual = saved.data(), p.residual_stride = saved.stride;
  p.grad_residual = grad_residual ? r.data() : nullptr, p.grad_residual_stride = r.stride;
  p.grad_normed1 = grad_normed1 ? g1.data() : nullptr, p.grad_normed1_stride = g1.stride;
  p.grad_normed2 = grad_normed2 ? g2.data() : nullptr, p.grad_normed2_stride = g2.stride;
  p.weight1 = weight1.data_ptr(), p.weight2 = data_or_null(weight2);
  p.mean = rms ? nullptr : mean->data_ptr(), p.rstd = rstd.data_ptr();

  Tensor grad_input = empty_contiguous_like(residual);
  const auto sums = [&](bool wanted) {
    return wanted ? empty(residual, {p.hidden_size}, residual.scalar_type()) : nothing();
  };
  Tensor grad_weight1 = sums(true), grad_bias1 = sums(bias1),
         grad_weight2 = sums(weight2.has_value()), grad_bias2 = sums(bias2);
  p.grad_input = grad_input.data_ptr();
  p.grad_weight1 = grad_weight1.data_ptr(), p.grad_bias1 = bias1 ? grad_bias1.data_ptr() : nullptr;
  p.grad_weight2 = weight2 ? grad_weight2.data_ptr() : nullptr,
  p.grad_bias2 = bias2 ? grad_bias2.data_ptr() : nullptr;
  if (p.num_tokens == 0) {
    for (Tensor* t : {&grad_weight1, &grad_bias1, &grad_weight2, &grad_bias2})
      if (t->defined()) torch::stable::zero_(*t);
  } else {
    const int64_t bytes = add_norm_workspace_size(p);
    Tensor workspace = empty(residual, {(bytes + 3) / 4}, ScalarType::Float);
    p.workspace = bytes ? workspace.data_ptr() : nullptr;
    DeviceGuard guard(residual);
    hf_fuse::add_norm_backward(p, stream_of(residual));
  }
  return {grad_input, grad_weight1, grad_bias1, grad_weight2, grad_bias2};
}

// ---- rotary
// ---------------------------------------------------------------------------------------------------------

void set_strides(int64_t out[3], const Tensor& t) {
  for (int i = 0; i < 3; ++i) out[i] = t.stride(i);
}

void check_heads(const char* op, const char* name, const Tensor& t) {
  if (t.dim() != 4)
    fail(op, ": ", name, " must be [batch, heads, seq_len, head_dim], got ", shape_of(t));
  if (t.size(3) > 1 && t.stride(3) != 1)
    fail(op, ": the last dimension of ", name, " must be contiguous");
}

Rotary rotary_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos,
                     const Tensor& sin) {
  Rotary p{};
  p.dtype = dtype_of(op, "q", q);
  check_heads(op, "q", q);
  check_heads(op, "k", k);
  check_like(op, "k", k, "q", q);
  if (k.size(0) != q.size(0) || k.size(2) != q.size(2) || k.size(3) != q.size(3))
    fail(op, ": k must have the batch, seq_len and head_dim of q, ", shape_of(q), ", got ",
         shape_of(k));
  check_like(op, "cos", cos, "q", q);
  check_same_shape(op, "sin", sin, "cos", cos);
  if (cos.dim() != 3 || (cos.size(0) != 1 && cos.size(0) != q.size(0)) || cos.size(1) != q.size(2))
    fail(op, ": cos must be [batch or 1, seq_len, rotary_dim] for q ", shape_of(q), ", got ",
         shape_of(cos));
  p.batch = q.size(0), p.num_heads = q.size(1), p.seq_len = q.size(2), p.head_dim = q.size(3);
  p.num_kv_heads = k.size(1), p.rotary_dim = cos.size(2);
  if (p.rotary_dim > p.head_dim || p.rotary_dim % 2)
    fail(op, ": rotary_dim, the last dimension of cos, must be even and at most head_dim ",
         p.head_dim, ", got ", p.rotary_dim);
  if (p.rotary_dim > 1 && (cos.stride(2) != 1 || sin.stride(2) != 1))
    fail(op, ": the last dimension of cos and sin must be contiguous");
  set_strides(p.q_stride, q);
  set_strides(p.k_stride, k);
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.cos = cos.data_ptr(), p.sin = sin.data_ptr();
  p.cos_stride[0] = cos.size(0) == 1 ? 0 : cos.stride(0), p.cos_stride[1] = cos.stride(1);
  p.sin_stride[0] = sin.size(0) == 1 ? 0 : sin.stride(0), p.sin_stride[1] = sin.stride(1);
  return p;
}

void launch(const Rotary& p, const Tensor& q) {
  if (p.batch * p.seq_len == 0) return;
  DeviceGuard guard(q);
  rotary_forward(p, stream_of(q));
}

// [batch, heads, seq_len, head_dim] over memory [batch, seq_len, heads, head_dim], as the
// projections write it
Tensor empty_heads(const Tensor& like) {
  const int64_t heads = like.size(1), seq_len = like.size(2), head_dim = like.size(3);
  const int64_t sizes[4] = {like.size(0), heads, seq_len, head_dim};
  const int64_t strides[4] = {seq_len * heads * head_dim, head_dim, heads * head_dim, 1};
  return empty_strided(like, sizes, strides, 4, like.scalar_type());
}

std::tuple<Tensor, Tensor> rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transpose) {
  Rotary p = rotary_params("rotary", q, k, cos, sin);
  Tensor q_out = empty_heads(q), k_out = empty_heads(k);
  p.transpose = transpose;
  p.q_out = q_out.data_ptr(), p.k_out = k_out.data_ptr();
  set_strides(p.q_out_stride, q_out);
  set_strides(p.k_out_stride, k_out);
  launch(p, q);
  return {q_out, k_out};
}

void rotary_(Tensor q, Tensor k, Tensor cos, Tensor sin) {
  Rotary p = rotary_params("rotary_", q, k, cos, sin);
  p.q_out = q.data_ptr(), p.k_out = k.data_ptr();
  set_strides(p.q_out_stride, q);
  set_strides(p.k_out_stride, k);
  launch(p, q);
}

void rotary_cache_(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor key_cache,
                   Tensor value_cache, Tensor length) {
  const char* op = "rotary_cache_";
  Rotary p = rotary_params(op, q, k, cos, sin);
  check_heads(op, "v", v);
  check_same_shape(op, "v", v, "k", k);
  check_heads(op, "key_cache", key_cache);
  check_heads(op, "value_cache", value_cache);
  check_like(op, "key_cache", key_cache, "q", q);
  check_same_shape(op, "value_cache", value_cache, "key_cache", key_cache);
  if (key_cache.size(0) != k.size(0) || key_cache.size(1) != k.size(1) ||
      key_cache.size(3) != k.size(3))
    fail(op, ": key_cache must be [batch, kv_heads, capacity, head_dim] for k ", shape_of(k),
         ", got ", shape_of(key_cache));
  if (length.scalar_type() != ScalarType::Long || length.numel() != 1 ||
      length.is_cuda() != q.is_cuda())
    fail(op, ": length must be one int64 on the device of q, got ", name_of(length.scalar_type()),
         " ", shape_of(length));
  p.q_out = q.data_ptr();
  set_strides(p.q_out_stride, q);
  p.v = v.data_ptr(), p.key_cache = key_cache.data_ptr(), p.value_cache = value_cache.data_ptr();
  set_strides(p.v_stride, v);
  set_strides(p.key_cache_stride, key_cache);
  set_strides(p.value_cache_stride, value_cache);
  p.capacity = key_cache.size(2);
  p.length = static_cast<int64_t*>(length.data_ptr());
  launch(p, q);
}

// ---- gated_act, bias_act
// --------------------------------------------------------------------------------------------

Tensor gated_act(Tensor gate, Tensor up, int64_t act) {
  const char* op = "gated_act";
  check_rows(op, "gate", gate);
  check_same_shape(op, "up", up, "gate", gate);
  Tensor out = empty_contiguous_like(gate);
  const Rows g = rows_of(gate), u = rows_of(up);
  GatedActForward p{dtype_of(op, "gate", gate),
                    act_of(op, act),
                    rows_in(gate),
                    gate.size(gate.dim() - 1),
                    g.data(),
                    u.data(),
                    g.stride,
                    u.stride,
                    out.data_ptr()};
  if (p.num_tokens == 0) return out;
  DeviceGuard guard(gate);
  gated_act_forward(p, stream_of(gate));
  return out;
}

std::tuple<Tensor, Tensor> gated_act_backward(Tensor grad, Tensor gate, Tensor up, int64_t act) {
  const char* op = "gated_act_backward";
  check_rows(op, "gate", gate);
  check_same_shape(op, "up", up, "gate", gate);
  check_same_shape(op, "grad", grad, "gate", gate);
  Tensor grad_gate = empty_contiguous_like(gate), grad_up = empty_contiguous_like(gate);
  const Rows d = rows_of(grad), g = rows_of(gate), u = rows_of(up);
  GatedActBackward p{dtype_of(op, "gate", gate),
                     act_of(op, act),
                     rows_in(gate),
                     gate.size(gate.dim() - 1),
                     d.data(),
                     g.data(),
                     u.data(),
                     d.stride,
                     g.stride,
                     u.stride,
                     grad_gate.data_ptr(),
                     grad_up.data_ptr()};
  if (p.num_tokens > 0) {
    DeviceGuard guard(gate);
    hf_fuse::gated_act_backward(p, stream_of(gate));
  }
  return {grad_gate, grad_up};
}

Tensor bias_act(Tensor x, OptionalTensor bias, int64_t act) {
  const char* op = "bias_act";
  check_rows(op, "x", x);
  if (bias) check_vector(op, "bias", *bias, "x", x);
  Tensor out = empty_contiguous_like(x);
  const Rows rows = rows_of(x);
  BiasActForward p{dtype_of(op, "x", x), act_of(op, act),    rows_in(x),  x.size(x.dim() - 1),
                   rows.data(),          data_or_null(bias), rows.stride, out.data_ptr()};
  if (p.num_tokens == 0) return out;
  DeviceGuard guard(x);
  bias_act_forward(p, stream_of(x));
  return out;
}

Tensor bias_act_backward(Tensor grad, Tensor x, OptionalTensor bias, int64_t act) {
  const char* op = "bias_act_backward";
  check_rows(op, "x", x);
  check_same_shape(op, "grad", grad, "x", x);
  if (bias) check_vector(op, "bias", *bias, "x", x);
  Tensor grad_x = empty_contiguous_like(x);
  const Rows d = rows_of(grad), rows = rows_of(x);
  BiasActBackward p{
      dtype_of(op, "x", x), act_of(op, act),    rows_in(x), x.size(x.dim() - 1), d.data(),
      rows.data(),          data_or_null(bias), d.stride,   rows.stride,         grad_x.data_ptr()};
  if (p.num_tokens == 0) return grad_x;
  DeviceGuard guard(x);
  hf_fuse::bias_act_backward(p, stream_of(x));
  return grad_x;
}

}  // namespace bindings
}  // namespace hf_fuse

#ifndef HF_FUSE_CUDA
STABLE_TORCH_LIBRARY(hf_fuse, m) {
  // -> (residual, normed1, normed2, mean, rstd); None for what was not asked for, mean and rstd
  // with `stats`
  m.def(
      "add_norm(Tensor x, Tensor? delta1, Tensor? delta2, Tensor weight1, Tensor? bias1, Tensor? "
      "weight2, "
      "Tensor? bias2, float eps, int kind, bool stats) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
  // -> (grad_input, grad_weight1, grad_bias1, grad_weight2, grad_bias2)
  m.def(
      "add_norm_backward(Tensor? grad_residual, Tensor? grad_normed1, Tensor? grad_normed2, Tensor "
      "residual, "
      "Tensor weight1, Tensor? weight2, Tensor? mean, Tensor rstd, int kind, bool bias1, bool "
      "bias2) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // -> (rotated q, rotated k); transpose gives the backward
  m.def("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transpose) -> (Tensor, Tensor)");
  // q and k in place
  m.def("rotary_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()");
  // q in place; rotated k, and v, into the caches at length, which advances
  m.def(
      "rotary_cache_(Tensor(a!) q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(b!) "
      "key_cache, "
      "Tensor(c!) value_cache, Tensor(d!) length) -> ()");
  // -> act(gate) * up
  m.def("gated_act(Tensor gate, Tensor up, int act) -> Tensor");
  // -> (grad_gate, grad_up)
  m.def("gated_act_backward(Tensor grad, Tensor gate, Tensor up, int act) -> (Tensor, Tensor)");
  // -> act(x + bias)
  m.def("bias_act(Tensor x, Tensor? bias, int act) -> Tensor");
  // -> grad_x
  m.def("bias_act_backward(Tensor grad, Tensor x, Tensor? bias, int act) -> Tensor");
}
#define HF_FUSE_KEY CPU
#else
#define HF_FUSE_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(hf_fuse, HF_FUSE_KEY, m) {
  m.impl("add_norm", TORCH_BOX(&hf_fuse::bindings::add_norm));
  m.impl("add_norm_backward", TORCH_BOX(&hf_fuse::bindings::add_norm_backward));
  m.impl("rotary", TORCH_BOX(&hf_fuse::bindings::rotary));
  m.impl("rotary_", TORCH_BOX(&hf_fuse::bindings::rotary_));
  m.impl("rotary_cache_", TORCH_BOX(&hf_fuse::bindings::rotary_cache_));
  m.impl("gated_act", TORCH_BOX(&hf_fuse::bindings::gated_act));
  m.impl("gated_act_backward", TORCH_BOX(&hf_fuse::bindings::gated_act_backward));
  m.impl("bias_act", TORCH_BOX(&hf_fuse::bindings::bias_act));
  m.impl("bias_act_backward", TORCH_BOX(&hf_fuse::bindings::bias_act_backward));
}
