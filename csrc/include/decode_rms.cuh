// RMSNorm of an fp32 row that a block holds in registers, for the small kernels of a step.
#pragma once
#include <algorithm>
#include <type_traits>

#include "decode.cuh"
#include "decode.h"
#include "reduce.cuh"

namespace hf_fuse {
namespace {

constexpr int kRmsThreads = 1024;
constexpr int kFewElements = 4, kMostElements = kMaxNormSize / kRmsThreads;  // of a thread

// Neighbouring threads hold neighbouring elements, so single loads are whole lines all the same.
template <typename T, int kPer>
struct RmsRow {
  int size;

  __device__ explicit RmsRow(int64_t size) : size(static_cast<int>(size)) {}
  __device__ static int column(int i) {
    return static_cast<int>(threadIdx.x) + i * static_cast<int>(blockDim.x);
  }
  // Before the wait: no kernel of a step writes it.
  __device__ void load_weight(float (&weight)[kPer], const void* from) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      weight[i] = 0.f;
      if (from && column(i) < size) {
        const T* const at = static_cast<const T*>(from) + column(i);
        weight[i] = load_before_wait<Vec<T, 1>>(at).floats()[0];
      }
    }
  }
  __device__ void load_floats(float (&x)[kPer], const float* from) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) x[i] = column(i) < size ? load_float(from + column(i)) : 0.f;
  }
  template <typename U>
  __device__ void store_as(U* to, const float (&x)[kPer]) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (column(i) < size) store(to + column(i), Vec<U, 1>::from({{x[i]}}));
    }
  }
  __device__ void normalize(float (&x)[kPer], const float (&weight)[kPer], float offset, float eps,
                            float (&shared)[1][kMaxWarps]) const {
    float square[1] = {};
#pragma unroll
    for (int i = 0; i < kPer; ++i) square[0] = fmaf(x[i], x[i], square[0]);
    row_sum(square, shared, blockDim.x);
    const float scale = rsqrtf(square[0] / static_cast<float>(size) + eps);
#pragma unroll
    for (int i = 0; i < kPer; ++i) x[i] *= scale * (offset + weight[i]);
  }
};

// run(elements a thread, threads) for rows of up to `size`.
template <typename Run>
void launch_rms(const char* op, int64_t size, const Run& run) {
  if (size > kMaxNormSize) {
    throw std::runtime_error(std::string("hf_fuse.") + op + ": rows of at most " +
                             std::to_string(kMaxNormSize) + " elements, got " +
                             std::to_string(size));
  }
  const auto threads = [&](int per) {
    return static_cast<int>(round_up(ceil_div(size, int64_t{per}), int64_t{kWarpSize}));
  };
  if (size <= kFewElements * kRmsThreads) {
    run(std::integral_constant<int, kFewElements>{}, threads(kFewElements));
  } else {
    run(std::integral_constant<int, kMostElements>{}, threads(kMostElements));
  }
}

}  // namespace
}  // namespace hf_fuse
