// The norms of the rows of q and of k, in place (decode.h): of each head (Qwen 3), or of all heads
// at once (OLMo 2). Bytes: q and k, read and written in L2: nothing but latency. A block a row.
#include "../include/decode_rms.cuh"

namespace hf_fuse {
namespace {

constexpr const char* kOp = "decode_head_norm";

template <typename T, int kPer>
__global__ void __launch_bounds__(kRmsThreads)
    decode_head_norm_kernel(const __grid_constant__ DecodeHeadNorm p) {
  __shared__ float shared[1][kMaxWarps];
  pdl_trigger();
  const int64_t q_rows = p.q_width / p.q_size, index = blockIdx.x;
  const bool of_q = index < q_rows;
  const RmsRow<T, kPer> row(of_q ? p.q_size : p.k_size);
  float* const at = p.qkv + blockIdx.y * p.stride +
                    (of_q ? index * p.q_size : p.q_width + (index - q_rows) * p.k_size);
  float weight[kPer], x[kPer];
  row.load_weight(weight, of_q ? p.q_weight : p.k_weight);
  pdl_wait();
  row.load_floats(x, at);
  row.normalize(x, weight, p.offset, p.eps, shared);
  row.store_as(at, x);
}

}  // namespace

void decode_head_norm(const DecodeHeadNorm& p, void* stream) {
  dispatch_dtype(kOp, p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t rows = p.q_width / p.q_size + p.k_width / p.k_size;
    launch_rms(kOp, std::max(p.q_size, p.k_size), [&](auto per, int threads) {
      launch(kOp, decode_head_norm_kernel<T, decltype(per)::value>,
             step_grid(p.batch, rows, p.batch), threads, 0, stream, p);
    });
  });
}

}  // namespace hf_fuse
