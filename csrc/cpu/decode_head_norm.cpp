// decode_head_norm on CPU: row after row; there are few, and they are in the cache.
#include "cpu_rms.h"

namespace hf_fuse {
namespace {

template <typename T>
void run(const DecodeHeadNorm& p, int64_t sequence) {
  float* q = p.qkv + sequence * p.stride;
  float* k = q + p.q_width;
  for (int64_t i = 0; i < p.q_width; i += p.q_size)
    normalise_rms(q + i, p.q_size, static_cast<const T*>(p.q_weight), p.eps, p.offset);
  for (int64_t i = 0; i < p.k_width; i += p.k_size)
    normalise_rms(k + i, p.k_size, static_cast<const T*>(p.k_weight), p.eps, p.offset);
}

}  // namespace

void decode_head_norm(const DecodeHeadNorm& p, void*) {
  dispatch_decode("decode_head_norm", p.dtype, [&](auto type) {
    for (int64_t sequence = 0; sequence < p.batch; ++sequence) run<decltype(type)>(p, sequence);
  });
}

}  // namespace hf_fuse
