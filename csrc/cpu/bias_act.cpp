// bias_act on CPU: out = act(round(x + bias)), one read and one write an element.
#include "cpu_activations.h"

namespace hf_fuse {
namespace {

template <typename T>
void load_biased(const T* x, const void* bias_ptr, acc_t<T>* row, int64_t n) {
  load_row(x, row, n);
  if (!bias_ptr) return;
  acc_t<T>* bias = scratch<acc_t<T>>(3, n);
  load_row(at<T>(bias_ptr, 0), bias, n);
  for (int64_t i = 0; i < n; ++i) row[i] += bias[i];
  round_row<T>(row, n);
}

}  // namespace

void bias_act_forward(const BiasActForward& p, void*) {
  dispatch(p.dtype, [&](auto type) {
    dispatch_act(p.act, [&](auto act) {
      using T = decltype(type);
      for_each_row(p.num_tokens, p.size, [&](int64_t begin, int64_t end) {
        acc_t<T>* row = scratch<acc_t<T>>(0, p.size);
        for (int64_t t = begin; t < end; ++t) {
          load_biased<T>(at<T>(p.x, t * p.x_stride), p.bias, row, p.size);
          for (int64_t i = 0; i < p.size; ++i) row[i] = activate<decltype(act)::value>(row[i]);
          store_row<T>(row, at<T>(p.out, t * p.size), p.size);
        }
      });
    });
  });
}

void bias_act_backward(const BiasActBackward& p, void*) {
  dispatch(p.dtype, [&](auto type) {
    dispatch_act(p.act, [&](auto act) {
      using T = decltype(type);
      for_each_row(p.num_tokens, p.size, [&](int64_t begin, int64_t end) {
        acc_t<T>* row = scratch<acc_t<T>>(0, p.size);
        acc_t<T>* grad = scratch<acc_t<T>>(1, p.size);
        for (int64_t t = begin; t < end; ++t) {
          load_biased<T>(at<T>(p.x, t * p.x_stride), p.bias, row, p.size);
          load_row(at<T>(p.grad, t * p.grad_stride), grad, p.size);
          for (int64_t i = 0; i < p.size; ++i) grad[i] *= activate_grad<decltype(act)::value>(row[i]);
          store_row<T>(grad, at<T>(p.grad_x, t * p.size), p.size);
        }
      });
    });
  });
}

}  // namespace hf_fuse
