// residual += delta or its norm, then the norm of the sum (decode.h).
//
// Bytes: a few rows of the model's size for each sequence: nothing but latency. A block takes a
// row, which stays in its registers; the weights are on their way before the wait.
#include "../include/decode_rms.cuh"

namespace hf_fuse {
namespace {

constexpr const char* kOp = "decode_add_norm";

template <typename T, int kPer>
__global__ void __launch_bounds__(kRmsThreads)
    decode_add_norm_kernel(const __grid_constant__ DecodeAddNorm p) {
  using Row = RmsRow<T, kPer>;
  __shared__ float shared[2][1][kMaxWarps];
  pdl_trigger();
  const int64_t first = blockIdx.x * p.size;
  const Row row(p.size);
  float delta_weight[kPer], weight[kPer], x[kPer], delta[kPer] = {};
  row.load_weight(delta_weight, p.delta_weight);
  row.load_weight(weight, p.weight);
  pdl_wait();
  row.load_floats(x, p.residual + first);
  if (p.delta) {
    row.load_floats(delta, p.delta + first);
    if (p.delta_weight) row.normalize(delta, delta_weight, p.offset, p.eps, shared[0]);
#pragma unroll
    for (int i = 0; i < kPer; ++i) x[i] += delta[i];
    row.store_as(p.residual + first, x);
  }
  if (p.weight) row.normalize(x, weight, p.offset, p.eps, shared[1]);
  row.store_as(static_cast<T*>(p.out) + first, x);
}

}  // namespace

void decode_add_norm(const DecodeAddNorm& p, void* stream) {
  dispatch_dtype(kOp, p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_rms(kOp, p.size, [&](auto per, int threads) {
      launch(kOp, decode_add_norm_kernel<T, decltype(per)::value>, step_grid(p.batch, p.batch),
             threads, 0, stream, p);
    });
  });
}

}  // namespace hf_fuse
