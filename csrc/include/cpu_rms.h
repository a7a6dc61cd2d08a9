// RMSNorm of an fp32 row in place, for the small kernels of a step.
#pragma once
#include "cpu_vec.h"
#include "decode.h"

namespace hf_fuse {

// row * rsqrt(mean(row^2) + eps) * (offset + weight)
template <typename T>
void normalise_rms(float* row, int64_t size, const T* weight, float eps, float offset) {
  vec<float> squares = {};
  for_each_vec<float>(size, [&](int64_t i, int64_t left) {
    const vec<float> v = load_vec(row + i, left);  // zero beyond the row
    squares += v * v;
  });
  const float rstd = 1 / std::sqrt(sum_lanes<float>(squares) / size + eps);
  for_each_vec<float>(size, [&](int64_t i, int64_t left) {
    store_vec<float>(load_vec(row + i, left) * rstd * (load_vec(weight + i, left) + offset),
                     row + i, left);
  });
}

}  // namespace hf_fuse
