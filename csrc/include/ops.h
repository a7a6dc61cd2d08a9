// The launchers behind the ops. csrc/cpu and csrc/cuda each implement all of them, on raw pointers
// and sizes, without a torch header; csrc/bindings.cpp checks the tensors, allocates the outputs
// and calls them.
//
// Conventions: strides are in elements; the last dimension is always contiguous; a null pointer is
// an absent optional. `stream` is a cudaStream_t on CUDA and unused on CPU. Statistics are fp32
// (float64 when the tensors are float64).
#pragma once
#include <cstdint>

namespace hf_fuse {

enum class DType { kFloat32, kFloat16, kBFloat16, kFloat64 };  // float64: CPU only, for gradcheck

// The order is ops/add_norm.py's. With rstd = rsqrt(mean(x^2) + eps), or of var(x) for kLayer:
enum class Norm {
  kRms,        // weight * round(x * rstd), as in LLaMA
  kLayer,      // round((x - mean) * rstd * weight + bias)
  kRmsOnce,    // round(weight * x * rstd), as in OLMo 2
  kRmsOffset,  // round((1 + weight) * x * rstd), as in Gemma
};
constexpr bool is_rms(Norm kind) { return kind != Norm::kLayer; }
constexpr float weight_offset(Norm kind) { return kind == Norm::kRmsOffset ? 1.f : 0.f; }

// residual = (delta1 + delta2) + x, or delta1 + x, or x; every sum rounded to the dtype, as eager
// torch does; then one or two norms of it.
struct AddNormForward {
  DType dtype;
  Norm kind;
  int64_t num_tokens, hidden_size;
  double eps;
  const void *x, *delta1, *delta2;  // [num_tokens, hidden_size]; delta2 only with delta1
  int64_t x_stride, delta1_stride, delta2_stride;
  const void *weight1, *bias1, *weight2, *bias2;  // [hidden_size]
  void* residual;           // [num_tokens, hidden_size] contiguous; null without a delta
  void *normed1, *normed2;  // likewise; normed2 null without weight2
  void *mean, *rstd;        // [num_tokens] for the backward, or null; mean always null for rms
};
void add_norm_forward(const AddNormForward& p, void* stream);

// grad_input = grad_residual + the norms' gradients; it is the gradient of x, delta1 and delta2
// alike. Weight and bias gradients are summed over the tokens in fp32 and in a fixed order.
struct AddNormBackward {
  DType dtype;
  Norm kind;
  int64_t num_tokens, hidden_size;
  const void *grad_residual, *grad_normed1,
      *grad_normed2;  // [num_tokens, hidden_size] or null, rows strided
  int64_t grad_residual_stride, grad_normed1_stride, grad_normed2_stride;
  const void* residual;  // [num_tokens, hidden_size], as the forward saved it
  int64_t residual_stride;
  const void *weight1, *weight2;  // [hidden_size]
  const void *mean, *rstd;        // [num_tokens]
  void* grad_input;               // [num_tokens, hidden_size] contiguous
  void *grad_weight1, *grad_bias1, *grad_weight2,
      *grad_bias2;  // [hidden_size], the dtype; null where not wanted
  void* workspace;  // add_norm_workspace_size() bytes, uninitialised; null if that is 0
};
int64_t add_norm_workspace_size(
    const AddNormBackward& p);  // reads the sizes and which gradients are non-null
void add_norm_backward(const AddNormBackward& p, void* stream);

// q1' = q1*cos1 - q2*sin1, q2' = q2*cos2 + q1*sin2, where 1 and 2 are the halves of the first
// rotary_dim elements of a head; the rest passes through. Each product and the sum are rounded to
// the dtype. The same for k. transpose: the transposed map (the backward): q1' = q1*cos1 + q2*sin2,
// q2' = q2*cos2 - q1*sin1.
struct Rotary {
  DType dtype;
  int64_t batch, seq_len, num_heads, num_kv_heads, head_dim, rotary_dim;
  bool transpose;
  const void *q, *k;  // [batch, heads, seq_len, head_dim], strides (batch, head, seq)
  int64_t q_stride[3], k_stride[3];
  void *q_out, *k_out;  // may be q and k themselves; k_out null with a cache
  int64_t q_out_stride[3], k_out_stride[3];
  const void *cos, *sin;  // [batch or 1, seq_len, rotary_dim], strides (batch or 0, seq)
  int64_t cos_stride[2], sin_stride[2];
  // With a static cache: k' and v go to rows length .. length + seq_len - 1 of the caches, then
  // length += seq_len.
  const void* v;
  int64_t v_stride[3];
  void *key_cache, *value_cache;  // [batch, num_kv_heads, capacity, head_dim]
  int64_t key_cache_stride[3], value_cache_stride[3];
  int64_t capacity;
  int64_t* length;  // one int64 on the tensors' device; a null length means no cache
};
void rotary_forward(const Rotary& p, void* stream);

enum class Act { kGelu, kGeluTanh, kRelu, kSilu, kRelu2 };  // the order is ops/activations.py's

// out = round(act(gate)) * up
struct GatedActForward {
  DType dtype;
  Act act;
  int64_t num_tokens, size;
  const void *gate, *up;  // [num_tokens, size], rows strided
  int64_t gate_stride, up_stride;
  void* out;  // contiguous
};
void gated_act_forward(const GatedActForward& p, void* stream);

struct GatedActBackward {
  DType dtype;
  Act act;
  int64_t num_tokens, size;
  const void *grad, *gate, *up;
  int64_t grad_stride, gate_stride, up_stride;
  void *grad_gate, *grad_up;  // contiguous
};
void gated_act_backward(const GatedActBackward& p, void* stream);

// out = act(round(x + bias)), or act(x)
struct BiasActForward {
  DType dtype;
  Act act;
  int64_t num_tokens, size;
  const void *x, *bias;  // [num_tokens, size] rows strided; [size] or null
  int64_t x_stride;
  void* out;  // contiguous
};
void bias_act_forward(const BiasActForward& p, void* stream);

struct BiasActBackward {
  DType dtype;
  Act act;
  int64_t num_tokens, size;
  const void *grad, *x, *bias;
  int64_t grad_stride, x_stride;
  void* grad_x;  // contiguous; the bias gradient is its sum over the tokens (torch)
};
void bias_act_backward(const BiasActBackward& p, void* stream);

}  // namespace hf_fuse
