// out = round(act(gate)) * up, and its gradients.
//
// Bytes per token: forward 3, backward 5 times size * element size. All streamed: 16 bytes of each
// input a thread, 2048 threads a multiprocessor, so about 64 KB in flight.
#include "../include/elementwise.cuh"

namespace hf_fuse {
namespace {

struct Forward {
  const void *gate, *up;
  int64_t gate_stride, up_stride, size;
  void* out;

  template <typename V, Act kAct>
  __device__ void apply(int64_t row, int64_t column) const {
    const V gate_vec = load_once<V>(elements<V>(gate) + row * gate_stride + column);
    const V up_vec = load_once<V>(elements<V>(up) + row * up_stride + column);
    auto g = gate_vec.floats();
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) g[i] = activate<kAct>(g[i]);
    store(elements<V>(out) + row * size + column, V::from(g) * up_vec);
  }
};

struct Backward {
  const void *grad, *gate, *up;
  int64_t grad_stride, gate_stride, up_stride, size;
  void *grad_gate, *grad_up;

  template <typename V, Act kAct>
  __device__ void apply(int64_t row, int64_t column) const {
    const V grad_vec = load_once<V>(elements<V>(grad) + row * grad_stride + column);
    const V gate_vec = load_once<V>(elements<V>(gate) + row * gate_stride + column);
    const V up_vec = load_once<V>(elements<V>(up) + row * up_stride + column);
    const auto d = grad_vec.floats(), g = gate_vec.floats(), u = up_vec.floats();
    Floats<V::kSize> d_gate, d_up;
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) {
      d_up[i] = activate<kAct>(g[i]);
      d_gate[i] = activate_backward<kAct>(d[i] * u[i], g[i]);
    }
    store(elements<V>(grad_gate) + row * size + column, V::from(d_gate));
    store(elements<V>(grad_up) + row * size + column, grad_vec * V::from(d_up));
  }
};

}  // namespace

void gated_act_forward(const GatedActForward& p, void* stream) {
  const Forward op = {p.gate, p.up, p.gate_stride, p.up_stride, p.size, p.out};
  launch_elementwise("gated_act_forward", p, op,
                     {{p.gate, p.gate_stride}, {p.up, p.up_stride}, {p.out}}, stream);
}

void gated_act_backward(const GatedActBackward& p, void* stream) {
  const Backward op = {p.grad,      p.gate, p.up,        p.grad_stride, p.gate_stride,
                       p.up_stride, p.size, p.grad_gate, p.grad_up};
  launch_elementwise("gated_act_backward", p, op,
                     {{p.grad, p.grad_stride},
                      {p.gate, p.gate_stride},
                      {p.up, p.up_stride},
                      {p.grad_gate},
                      {p.grad_up}},
                     stream);
}

}  // namespace hf_fuse
