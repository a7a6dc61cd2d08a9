// Sums over the threads of a row, in an order that depends on the block's shape alone.
#pragma once

namespace hf_fuse {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;

// Every lane gets the sum.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
}

// Every thread of the row gets the sums. A row is one warp (any blockDim.y) or a whole block
// (blockDim.y == 1). One barrier: two calls in a row need different `shared`, the third may use the
// first one's again.
template <int kValues>
__device__ inline void row_sum(float (&values)[kValues], float (&shared)[kValues][kMaxWarps],
                               int threads) {
#pragma unroll
  for (int k = 0; k < kValues; ++k) values[k] = warp_sum(values[k]);
  if (threads == kWarpSize) return;
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
    for (int k = 0; k < kValues; ++k) shared[k][warp] = values[k];
  }
  __syncthreads();
  // Every warp adds the warps' sums again, one a lane: measured faster than reading all of them.
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int k = 0; k < kValues; ++k) {
    values[k] = warp_sum(lane < threads / kWarpSize ? shared[k][lane] : 0.f);
  }
}

}  // namespace hf_fuse
