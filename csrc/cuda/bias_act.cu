// out = act(round(x + bias)), or act(x), and the gradient of x.
//
// Bytes per token: forward 2, backward 3 times size * element size; the bias comes from L1.
#include "../include/activation.cuh"
#include "../include/elementwise.cuh"
#include "../include/vec.cuh"

namespace hf_fuse {
namespace {

constexpr const char* kForward = "bias_act_forward";
constexpr const char* kBackward = "bias_act_backward";

template <typename V, Act kAct>
struct Forward {
  using T = typename V::Element;
  const T *x, *bias;
  int64_t x_stride, size;
  T* out;

  __device__ void operator()(int64_t row, int64_t column) const {
    const V x_vec = load_once<V>(x + row * x_stride + column);
    auto h = (bias ? x_vec + load<V>(bias + column) : x_vec).floats();
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) h[i] = activate<kAct>(h[i]);
    store(out + row * size + column, V::from(h));
  }
};

template <typename V, Act kAct>
struct Backward {
  using T = typename V::Element;
  const T *grad, *x, *bias;
  int64_t grad_stride, x_stride, size;
  T* grad_x;

  __device__ void operator()(int64_t row, int64_t column) const {
    const V grad_vec = load_once<V>(grad + row * grad_stride + column);
    const V x_vec = load_once<V>(x + row * x_stride + column);
    const auto h = (bias ? x_vec + load<V>(bias + column) : x_vec).floats();
    auto d = grad_vec.floats();
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) d[i] = activate_backward<kAct>(d[i], h[i]);
    store(grad_x + row * size + column, V::from(d));
  }
};

}  // namespace

void bias_act_forward(const BiasActForward& p, void* stream) {
  dispatch_dtype(kForward, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.num_tokens == 0 || p.size == 0) return;
    dispatch_act(kForward, p.act, [&](auto act) {
      const auto run = [&](auto width) {
        using V = decltype(width);
        const Forward<V, decltype(act)::value> op = {static_cast<const T*>(p.x),
                                                     static_cast<const T*>(p.bias), p.x_stride,
                                                     p.size, static_cast<T*>(p.out)};
        launch_elementwise<V::kSize>(kForward, op, p.num_tokens, p.size, stream);
      };
      const bool vectors =
          p.size % Vec16<T>::kSize == 0 &&
          rows_aligned({{p.x, p.x_stride}, {p.bias}, {p.out}}, p.num_tokens, sizeof(T));
      vectors ? run(Vec16<T>()) : run(Vec<T, 1>());
    });
  });
}

void bias_act_backward(const BiasActBackward& p, void* stream) {
  dispatch_dtype(kBackward, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.num_tokens == 0 || p.size == 0) return;
    dispatch_act(kBackward, p.act, [&](auto act) {
      const auto run = [&](auto width) {
        using V = decltype(width);
        const Backward<V, decltype(act)::value> op = {static_cast<const T*>(p.grad),
                                                      static_cast<const T*>(p.x),
                                                      static_cast<const T*>(p.bias),
                                                      p.grad_stride,
                                                      p.x_stride,
                                                      p.size,
                                                      static_cast<T*>(p.grad_x)};
        launch_elementwise<V::kSize>(kBackward, op, p.num_tokens, p.size, stream);
      };
      const bool vectors =
          p.size % Vec16<T>::kSize == 0 &&
          rows_aligned({{p.grad, p.grad_stride}, {p.x, p.x_stride}, {p.bias}, {p.grad_x}},
                       p.num_tokens, sizeof(T));
      vectors ? run(Vec16<T>()) : run(Vec<T, 1>());
    });
  });
}

}  // namespace hf_fuse
