// Elementwise work with an activation on matrices of strided rows: one thread, one vector.
//
// An op is a struct of pointers and strides with an apply<V, kAct>(row, column), which does the
// vector that starts there. The pointers are untyped, as in ops.h: one struct serves all dtypes.
#pragma once
#include <algorithm>

#include "activation.cuh"
#include "launch.cuh"
#include "vec.cuh"

namespace hf_fuse {

template <typename V>
__device__ inline const typename V::Element* elements(const void* data) {
  return static_cast<const typename V::Element*>(data);
}
template <typename V>
__device__ inline typename V::Element* elements(void* data) {
  return static_cast<typename V::Element*>(data);
}

template <typename V, Act kAct, typename Op>
__global__ void __launch_bounds__(256)
    elementwise_kernel(const Op op, const int64_t num_rows, const int64_t size) {
  pdl_trigger_and_wait();
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * V::kSize;
  if (column >= size) return;
  const int64_t step = int64_t{gridDim.y} * blockDim.y;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < num_rows; row += step) {
    op.template apply<V, kAct>(row, column);
  }
}

// `p` is the struct of ops.h, `tensors` all that the op touches: a thread takes 16 bytes of each
// where every row is aligned to them, else one element.
template <typename Params, typename Op>
void launch_elementwise(const char* name, const Params& p, const Op& op,
                        std::initializer_list<Rows> tensors, void* stream) {
  dispatch_dtype(name, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.num_tokens == 0 || p.size == 0) return;
    dispatch_act(name, p.act, [&](auto act) {
      const auto run = [&](auto vec) {
        using V = decltype(vec);
        const int64_t vectors = ceil_div(p.size, V::kSize);
        int threads = 256;  // along a row; short rows share a block
        while (threads / 2 >= std::max<int64_t>(vectors, 8)) threads /= 2;
        const dim3 block(threads, 256 / threads);
        const int64_t rows = ceil_div(p.num_tokens, block.y);
        launch(name, elementwise_kernel<V, decltype(act)::value, Op>,
               {ceil_div(vectors, threads), std::min<int64_t>(rows, 65535)}, block, 0, stream, op,
               p.num_tokens, p.size);
      };
      const bool aligned =
          p.size % Vec16<T>::kSize == 0 && rows_aligned(tensors, p.num_tokens, sizeof(T));
      aligned ? run(Vec16<T>()) : run(Vec<T, 1>());
    });
  });
}

}  // namespace hf_fuse
