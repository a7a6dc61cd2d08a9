// out = round(act(gate)) * up, and its gradients.
//
// Bytes per token: forward 3, backward 5 times size * element size. All streamed: 16 bytes of each
// input a thread, 2048 threads a multiprocessor, so about 64 KB in flight.
#include "../include/activation.cuh"
#include "../include/elementwise.cuh"
#include "../include/vec.cuh"

namespace hf_fuse {
namespace {

constexpr const char* kForward = "gated_act_forward";
constexpr const char* kBackward = "gated_act_backward";

template <typename V, Act kAct>
struct Forward {
  using T = typename V::Element;
  const T *gate, *up;
  int64_t gate_stride, up_stride, size;
  T* out;

  __device__ void operator()(int64_t row, int64_t column) const {
    const V gate_vec = load_once<V>(gate + row * gate_stride + column);
    const V up_vec = load_once<V>(up + row * up_stride + column);
    auto g = gate_vec.floats();
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) g[i] = activate<kAct>(g[i]);
    store(out + row * size + column, V::from(g) * up_vec);
  }
};

template <typename V, Act kAct>
struct Backward {
  using T = typename V::Element;
  const T *grad, *gate, *up;
  int64_t grad_stride, gate_stride, up_stride, size;
  T *grad_gate, *grad_up;

  __device__ void operator()(int64_t row, int64_t column) const {
    const V grad_vec = load_once<V>(grad + row * grad_stride + column);
    const V gate_vec = load_once<V>(gate + row * gate_stride + column);
    const V up_vec = load_once<V>(up + row * up_stride + column);
    const auto d = grad_vec.floats(), g = gate_vec.floats(), u = up_vec.floats();
    Floats<V::kSize> d_gate, d_up;
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) {
      d_up[i] = activate<kAct>(g[i]);
      d_gate[i] = activate_backward<kAct>(d[i] * u[i], g[i]);
    }
    store(grad_gate + row * size + column, V::from(d_gate));
    store(grad_up + row * size + column, grad_vec * V::from(d_up));
  }
};

}  // namespace

void gated_act_forward(const GatedActForward& p, void* stream) {
  dispatch_dtype(kForward, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.num_tokens == 0 || p.size == 0) return;
    dispatch_act(kForward, p.act, [&](auto act) {
      const auto run = [&](auto width) {
        using V = decltype(width);
        const Forward<V, decltype(act)::value> op = {static_cast<const T*>(p.gate),
                                                     static_cast<const T*>(p.up),
                                                     p.gate_stride,
                                                     p.up_stride,
                                                     p.size,
                                                     static_cast<T*>(p.out)};
        launch_elementwise<V::kSize>(kForward, op, p.num_tokens, p.size, stream);
      };
      const bool vectors = p.size % Vec16<T>::kSize == 0 &&
                           rows_aligned({{p.gate, p.gate_stride}, {p.up, p.up_stride}, {p.out}},
                                        p.num_tokens, sizeof(T));
      vectors ? run(Vec16<T>()) : run(Vec<T, 1>());
    });
  });
}

void gated_act_backward(const GatedActBackward& p, void* stream) {
  dispatch_dtype(kBackward, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.num_tokens == 0 || p.size == 0) return;
    dispatch_act(kBackward, p.act, [&](auto act) {
      const auto run = [&](auto width) {
        using V = decltype(width);
        const Backward<V, decltype(act)::value> op = {static_cast<const T*>(p.grad),
                                                      static_cast<const T*>(p.gate),
                                                      static_cast<const T*>(p.up),
                                                      p.grad_stride,
                                                      p.gate_stride,
                                                      p.up_stride,
                                                      p.size,
                                                      static_cast<T*>(p.grad_gate),
                                                      static_cast<T*>(p.grad_up)};
        launch_elementwise<V::kSize>(kBackward, op, p.num_tokens, p.size, stream);
      };
      const bool vectors = p.size % Vec16<T>::kSize == 0 && rows_aligned({{p.grad, p.grad_stride},
                                                                          {p.gate, p.gate_stride},
                                                                          {p.up, p.up_stride},
                                                                          {p.grad_gate},
                                                                          {p.grad_up}},
                                                                         p.num_tokens, sizeof(T));
      vectors ? run(Vec16<T>()) : run(Vec<T, 1>());
    });
  });
}

}  // namespace hf_fuse
