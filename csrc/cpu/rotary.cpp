// rotary on CPU: one (batch, position) at a time over all heads, so a position's cos and sin are
// read once.
#include "cpu.h"

namespace hf_fuse {
namespace {

// One head: src and dst may be the same row.
template <typename T>
void rotate_head(const Rotary& p, const T* src, T* dst, const acc_t<T>* cos, const acc_t<T>* sin) {
  using A = acc_t<T>;
  const int64_t half = p.rotary_dim / 2;
  A* first = scratch<A>(2, 3 * p.head_dim);
  A* products = first + p.head_dim;  // x * cos, then rotate_half(x) * sin
  load_row(src, first, p.rotary_dim);
  const A* second = first + half;
  for (int64_t i = 0; i < p.rotary_dim; ++i) products[i] = first[i] * cos[i];
  A* rotated = products + p.head_dim;
  if (p.transpose) {
    for (int64_t i = 0; i < half; ++i) {
      rotated[i] = second[i] * sin[half + i];
      rotated[half + i] = -(first[i] * sin[i]);
    }
  } else {
    for (int64_t i = 0; i < half; ++i) {
      rotated[i] = -second[i] * sin[i];
      rotated[half + i] = first[i] * sin[half + i];
    }
  }
  round_row<T>(products, p.rotary_dim);
  round_row<T>(rotated, p.rotary_dim);
  for (int64_t i = 0; i < p.rotary_dim; ++i) products[i] += rotated[i];
  if (src != dst)
    std::memcpy(dst + p.rotary_dim, src + p.rotary_dim, (p.head_dim - p.rotary_dim) * sizeof(T));
  store_row<T>(products, dst, p.rotary_dim);
}

int64_t offset(const int64_t stride[3], int64_t batch, int64_t head, int64_t position) {
  return batch * stride[0] + head * stride[1] + position * stride[2];
}

template <typename T>
void rotate_position(const Rotary& p, int64_t batch, int64_t position, int64_t cache_row) {
  using A = acc_t<T>;
  A* cos = scratch<A>(0, p.rotary_dim);
  A* sin = scratch<A>(1, p.rotary_dim);
  load_row(at<T>(p.cos, batch * p.cos_stride[0] + position * p.cos_stride[1]), cos, p.rotary_dim);
  load_row(at<T>(p.sin, batch * p.sin_stride[0] + position * p.sin_stride[1]), sin, p.rotary_dim);
  for (int64_t h = 0; h < p.num_heads; ++h)
    rotate_head<T>(p, at<T>(p.q, offset(p.q_stride, batch, h, position)),
                   at<T>(p.q_out, offset(p.q_out_stride, batch, h, position)), cos, sin);
  for (int64_t h = 0; h < p.num_kv_heads; ++h) {
    const T* k = at<T>(p.k, offset(p.k_stride, batch, h, position));
    if (!p.length) {
      rotate_head<T>(p, k, at<T>(p.k_out, offset(p.k_out_stride, batch, h, position)), cos, sin);
      continue;
    }
    rotate_head<T>(p, k, at<T>(p.key_cache, offset(p.key_cache_stride, batch, h, cache_row)), cos,
                   sin);
    std::memcpy(at<T>(p.value_cache, offset(p.value_cache_stride, batch, h, cache_row)),
                at<T>(p.v, offset(p.v_stride, batch, h, position)), p.head_dim * sizeof(T));
  }
}

}  // namespace

void rotary_forward(const Rotary& p, void*) {
  const int64_t length = p.length ? *p.length : 0;
  if (p.length && length + p.seq_len > p.capacity)
    throw std::runtime_error("hf_fuse rotary: the static cache holds " + std::to_string(length) +
                             " of " + std::to_string(p.capacity) + " positions and cannot take " +
                             std::to_string(p.seq_len) + " more");
  dispatch(p.dtype, [&](auto type) {
    for_each_row(p.batch * p.seq_len, (p.num_heads + p.num_kv_heads) * p.head_dim,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i)
                     rotate_position<decltype(type)>(p, i / p.seq_len, i % p.seq_len,
                                                     length + i % p.seq_len);
                 });
  });
  if (p.length) *p.length = length + p.seq_len;
}

}  // namespace hf_fuse
