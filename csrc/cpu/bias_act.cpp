// bias_act on CPU: out = act(round(x + bias)), one read and one write an element.
#include "cpu_activations.h"

namespace hf_fuse {
namespace {

template <typename T>
vec<acc_t<T>> load_biased(const T* x, const T* bias, int64_t i, int64_t left) {
  const vec<acc_t<T>> v = load_vec(x + i, left);
  return bias ? round_vec<T>(v + load_vec(bias + i, left)) : v;
}

template <typename T, Act kAct>
void forward_row(const BiasActForward& p, int64_t token) {
  using A = acc_t<T>;
  const T* x = at<T>(p.x, token * p.x_stride);
  const T* bias = static_cast<const T*>(p.bias);
  T* out = at<T>(p.out, token * p.size);
  for_each_vec<A>(p.size, [&](int64_t i, int64_t left) {
    store_vec<T>(activate<kAct, A>(load_biased(x, bias, i, left)), out + i, left);
  });
}

template <typename T, Act kAct>
void backward_row(const BiasActBackward& p, int64_t token) {
  using A = acc_t<T>;
  const T* grad = at<T>(p.grad, token * p.grad_stride);
  const T* x = at<T>(p.x, token * p.x_stride);
  const T* bias = static_cast<const T*>(p.bias);
  T* grad_x = at<T>(p.grad_x, token * p.size);
  for_each_vec<A>(p.size, [&](int64_t i, int64_t left) {
    const vec<A> biased = load_biased(x, bias, i, left);
    store_vec<T>(activate_backward<kAct, A>(load_vec(grad + i, left), biased).grad, grad_x + i,
                 left);
  });
}

}  // namespace

void bias_act_forward(const BiasActForward& p, void*) {
  dispatch(p.dtype, [&](auto type) {
    dispatch_act(p.act, [&](auto act) {
      for_each_row(p.num_tokens, p.size, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token)
          forward_row<decltype(type), decltype(act)::value>(p, token);
      });
    });
  });
}

void bias_act_backward(const BiasActBackward& p, void*) {
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
