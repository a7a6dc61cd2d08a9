// Attention sinks directly before the window, in every layer (decode.h).
//
// Bytes: a few rows of every layer's cache, read and written: nothing but latency. A block a key
// head.
#include "../include/decode.cuh"
#include "../include/decode.h"

namespace hf_fuse {
namespace {

constexpr const char* kOp = "decode_sinks";
constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads) decode_sinks_kernel(const DecodeSinks p) {
  // decode_attention reads the cache ahead of its own wait. So this kernel stands before
  // decode_embed, which lets no other start until it has waited for this one's end, and it
  // triggers, as that one does, only when the last step has ended.
  pdl_wait();
  pdl_trigger();
  const int64_t row = blockIdx.x, index = row / p.num_kv_heads, layer = index / p.batch;
  const int64_t slot = *p.length + 1 - p.window - p.sinks;
  const int64_t shift = slot - p.start[index - layer * p.batch];
  if (shift <= 0) return;
  if (slot < 0 || slot + p.sinks > p.capacity) __trap();  // the slots would be another head's
  const int64_t from = row * p.sinks * p.head_dim, to = (row * p.capacity + slot) * p.head_dim;
  const T *const from_keys = static_cast<const T*>(p.sink_keys) + from, *const from_values =
                                                                            static_cast<const T*>(
                                                                                p.sink_values) +
                                                                            from;
  T *const keys = static_cast<T*>(p.keys) + to, *const values = static_cast<T*>(p.values) + to;
  const auto of = [](const T* ptr) { return load<Vec<T, 1>>(ptr).floats()[0]; };
  const auto put = [](T* ptr, float x) { store(ptr, Vec<T, 1>::from(Floats<1>{{x}})); };

  const int size = static_cast<int>(p.head_dim), half = static_cast<int>(p.rotary_dim / 2);
  for (int i = threadIdx.x; i < static_cast<int>(p.sinks) * size; i += kThreads) {
    put(values + i, of(from_values + i));
    const int column = i % size;
    if (column >= 2 * half) {
      put(keys + i, of(from_keys + i));
    } else if (column < half) {
      float sin, cos;
      sincosf(static_cast<float>(shift) * p.inv_freq[layer * half + column], &sin, &cos);
      const float first = of(from_keys + i), second = of(from_keys + i + half);
      put(keys + i, first * cos - second * sin);
      put(keys + i + half, second * cos + first * sin);
    }
  }
}

}  // namespace

void decode_sinks(const DecodeSinks& p, void* stream) {
  dispatch_dtype(kOp, p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(kOp, decode_sinks_kernel<T>, step_grid(p.batch, p.num_layers * p.batch * p.num_kv_heads),
           kThreads, 0, stream, p);
  });
}

}  // namespace hf_fuse
