// Elementwise work on a matrix of strided rows: one thread, one vector.
#pragma once
#include <algorithm>

#include "launch.cuh"

namespace hf_fuse {

// `op` is called as op(row, column) at every kWidth-th column, and holds the pointers.
template <int kWidth, typename Op>
__global__ void __launch_bounds__(256)
    elementwise_kernel(const Op op, const int64_t num_rows, const int64_t size) {
  pdl_trigger_and_wait();
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kWidth;
  if (column >= size) return;
  const int64_t step = int64_t{gridDim.y} * blockDim.y;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < num_rows; row += step) {
    op(row, column);
  }
}

template <int kWidth, typename Op>
void launch_elementwise(const char* name, const Op& op, int64_t num_rows, int64_t size,
                        void* stream) {
  const int64_t vectors = ceil_div(size, kWidth);
  int threads = 256;  // along a row; short rows share a block
  while (threads / 2 >= std::max<int64_t>(vectors, 8)) threads /= 2;
  const dim3 block(threads, 256 / threads);
  const int64_t rows = ceil_div(num_rows, block.y);
  launch(name, elementwise_kernel<kWidth, Op>,
         {ceil_div(vectors, threads), std::min<int64_t>(rows, 65535)}, block, 0, stream, op,
         num_rows, size);
}

}  // namespace hf_fuse
