// gated_act on CPU: out = round(act(gate)) * up, two reads and one write an element.
#include "cpu_activations.h"

namespace hf_fuse {
namespace {

template <typename T, Act kAct>
void forward_row(const T* gate_ptr, const T* up_ptr, T* out, int64_t n) {
  using A = acc_t<T>;
  A* gate = scratch<A>(0, n);
  A* up = scratch<A>(1, n);
  load_row(gate_ptr, gate, n);
  load_row(up_ptr, up, n);
  for (int64_t i = 0; i < n; ++i) gate[i] = activate<kAct>(gate[i]);
  round_row<T>(gate, n);
  for (int64_t i = 0; i < n; ++i) gate[i] *= up[i];
  store_row<T>(gate, out, n);
}

template <typename T, Act kAct>
void backward_row(const T* grad_ptr, const T* gate_ptr, const T* up_ptr, T* grad_gate, T* grad_up, int64_t n) {
  using A = acc_t<T>;
  A* grad = scratch<A>(0, n);
  A* gate = scratch<A>(1, n);
  A* up = scratch<A>(2, n);
  A* activated = scratch<A>(3, n);
  load_row(grad_ptr, grad, n);
  load_row(gate_ptr, gate, n);
  load_row(up_ptr, up, n);
  for (int64_t i = 0; i < n; ++i) activated[i] = activate<kAct>(gate[i]);
  round_row<T>(activated, n);
  for (int64_t i = 0; i < n; ++i) activated[i] *= grad[i];
  store_row<T>(activated, grad_up, n);
  for (int64_t i = 0; i < n; ++i) up[i] *= grad[i] * activate_grad<kAct>(gate[i]);
  store_row<T>(up, grad_gate, n);
}

}  // namespace

void gated_act_forward(const GatedActForward& p, void*) {
  dispatch(p.dtype, [&](auto type) {
    dispatch_act(p.act, [&](auto act) {
      using T = decltype(type);
      for_each_row(p.num_tokens, p.size, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          forward_row<T, decltype(act)::value>(at<T>(p.gate, t * p.gate_stride), at<T>(p.up, t * p.up_stride),
                                               at<T>(p.out, t * p.size), p.size);
      });
    });
  });
}

void gated_act_backward(const GatedActBackward& p, void*) {
  dispatch(p.dtype, [&](auto type) {
    dispatch_act(p.act, [&](auto act) {
      using T = decltype(type);
      for_each_row(p.num_tokens, p.size, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          backward_row<T, decltype(act)::value>(at<T>(p.grad, t * p.grad_stride), at<T>(p.gate, t * p.gate_stride),
                                                at<T>(p.up, t * p.up_stride), at<T>(p.grad_gate, t * p.size),
                                                at<T>(p.grad_up, t * p.size), p.size);
      });
    });
  });
}

}  // namespace hf_fuse
