// gated_act on CPU: out = round(act(gate)) * up, two reads and one write an element.
#include "cpu_activations.h"

namespace hf_fuse {
namespace {

template <typename T, Act kAct>
void forward_row(const GatedActForward& p, int64_t token) {
  using A = acc_t<T>;
  const T* gate = at<T>(p.gate, token * p.gate_stride);
  const T* up = at<T>(p.up, token * p.up_stride);
  T* out = at<T>(p.out, token * p.size);
  for_each_vec<A>(p.size, [&](int64_t i, int64_t left) {
    const vec<A> activated = round_vec<T>(activate<kAct, A>(load_vec(gate + i, left)));
    store_vec<T>(activated * load_vec(up + i, left), out + i, left);
  });
}

template <typename T, Act kAct>
void backward_row(const GatedActBackward& p, int64_t token) {
  using A = acc_t<T>;
  const T* grad_row = at<T>(p.grad, token * p.grad_stride);
  const T* gate_row = at<T>(p.gate, token * p.gate_stride);
  const T* up = at<T>(p.up, token * p.up_stride);
  T* grad_gate = at<T>(p.grad_gate, token * p.size);
  T* grad_up = at<T>(p.grad_up, token * p.size);
  for_each_vec<A>(p.size, [&](int64_t i, int64_t left) {
    const vec<A> grad = load_vec(grad_row + i, left), gate = load_vec(gate_row + i, left);
    const Backward<A> act = activate_backward<kAct, A>(grad * load_vec(up + i, left), gate);
    store_vec<T>(grad * round_vec<T>(act.value), grad_up + i, left);
    store_vec<T>(act.grad, grad_gate + i, left);
  });
}

}  // namespace

void gated_act_forward(const GatedActForward& p, void*) {
  dispatch(p.dtype, [&](auto type) {
    dispatch_act(p.act, [&](auto act) {
      for_each_row(p.num_tokens, p.size, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token)
          forward_row<decltype(type), decltype(act)::value>(p, token);
      });
    });
  });
}

void gated_act_backward(const GatedActBackward& p, void*) {
  dispatch(p.dtype, [&](auto type) {
    dispatch_act(p.act, [&](auto act) {
      for_each_row(p.num_tokens, p.size, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token)
          backward_row<decltype(type), decltype(act)::value>(p, token);
      });
    });
  });
}

}  // namespace hf_fuse
