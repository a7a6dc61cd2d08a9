// decode_add_norm on CPU: a row a sequence, which stays in the cache.
#include "cpu_rms.h"

namespace hf_fuse {
namespace {

template <typename T>
void run(const DecodeAddNorm& p, int64_t sequence) {
  float* residual = p.residual + sequence * p.size;
  float* row = scratch<float>(2, p.size);
  if (p.delta) {
    std::memcpy(row, p.delta + sequence * p.size, p.size * sizeof(float));
    if (p.delta_weight) {
      normalise_rms(row, p.size, static_cast<const T*>(p.delta_weight), p.eps, p.offset);
    }
    for (int64_t i = 0; i < p.size; ++i) residual[i] += row[i];
  }
  std::memcpy(row, residual, p.size * sizeof(float));
  if (p.weight) normalise_rms(row, p.size, static_cast<const T*>(p.weight), p.eps, p.offset);
  store_row(row, at<T>(p.out, sequence * p.size), p.size);
}

}  // namespace

void decode_add_norm(const DecodeAddNorm& p, void*) {
  dispatch_decode("decode_add_norm", p.dtype, [&](auto type) {
    for (int64_t sequence = 0; sequence < p.batch; ++sequence) run<decltype(type)>(p, sequence);
  });
}

}  // namespace hf_fuse
