// decode_linear for rows that no 16-byte load could read: of any size and alignment.
#include <algorithm>

#include "../include/decode_rows.cuh"
#include "../include/reduce.cuh"

namespace hf_fuse {
namespace {

constexpr const char* kOp = kDecodeLinear;

// A warp a row, one element a load, the norm anew for every row.
template <typename T>
__global__ void __launch_bounds__(256)
    decode_linear_elements_kernel(const __grid_constant__ DecodeLinear p,
                                  const __grid_constant__ RowTable<T> all, const int units) {
  __shared__ float shared[2][1][kMaxWarps];
  pdl_trigger();
  pdl_wait();
  const auto x = [&](int64_t k) {
    return p.norm_weight ? load_float(static_cast<const float*>(p.x) + k)
                         : load_float(static_cast<const T*>(p.x) + k);
  };
  const T* norm_weight = static_cast<const T*>(p.norm_weight);
  const T* norm_bias = static_cast<const T*>(p.norm_bias);
  const float inv_size = 1.f / static_cast<float>(p.size);
  float mean[1] = {}, square[1] = {};
  if (norm_weight && !p.rms) {
    for (int64_t k = threadIdx.x; k < p.size; k += blockDim.x) mean[0] += x(k);
    row_sum(mean, shared[0], blockDim.x);
    mean[0] *= inv_size;
  }
  for (int64_t k = threadIdx.x; k < p.size && norm_weight; k += blockDim.x) {
    square[0] += (x(k) - mean[0]) * (x(k) - mean[0]);
  }
  row_sum(square, shared[1], blockDim.x);
  const float rstd = rsqrtf(square[0] * inv_size + static_cast<float>(p.eps));
  const auto normed = [&](int64_t k) {
    if (!norm_weight) return x(k);
    const float y = (x(k) - mean[0]) * rstd * load_float(norm_weight + k);
    return norm_bias ? y + load_float(norm_bias + k) : y;
  };
  const int warps = blockDim.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int unit = blockIdx.x * warps + threadIdx.x / kWarpSize; unit < units;
       unit += gridDim.x * warps) {
    const T* row = all.row(unit, 0);
    const T* up = all.row(unit, all.pair);
    float y = 0.f, y_up = 0.f;
    for (int64_t k = lane; k < p.size; k += kWarpSize) {
      const float n = normed(k);
      y = fmaf(load_float(row + k), n, y);
      if (all.pair) y_up = fmaf(load_float(up + k), n, y_up);
    }
    y = warp_sum(y), y_up = warp_sum(y_up);
    if (lane == 0) {
      Extras<T, Layout::kAny> extras(all, unit);
      extras.load_old(p, unit);
      write_output(p, unit, y, y_up, extras);
    }
  }
}

}  // namespace

void decode_linear_elements(const DecodeLinear& p, int64_t units, void* stream) {
  const int64_t blocks = std::min<int64_t>(ceil_div(units, 8), 4 * device_info(kOp).num_sms);
  dispatch_dtype(kOp, p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(kOp, decode_linear_elements_kernel<T>, step_grid(p.batch, blocks), 256, 0, stream, p,
           RowTable<T>(p), static_cast<int>(units));
  });
}

}  // namespace hf_fuse
