// Rotary position embedding of q and k (ops.h has the formula), and with a static cache the write
// of the rotated k and of v into it.
//
// Bytes per token: 2 * (num_heads + num_kv_heads) * head_dim * element size, with a cache
// 2 * num_kv_heads * head_dim more; in place only the rotated elements move. cos and sin are read
// once per head, from L1. A thread owns a vector of both halves, so q_out may be q.
#include <algorithm>
#include <cstdio>

#include "../include/launch.cuh"
#include "../include/vec.cuh"

namespace hf_fuse {
namespace {

constexpr const char* kOp = "rotary";

__device__ int64_t offset(const int64_t (&stride)[3], int64_t batch, int head, int64_t position) {
  return batch * stride[0] + head * stride[1] + position * stride[2];
}

// Out of line: printf would cost the kernel registers.
__device__ __noinline__ void fail_capacity(int64_t length, int64_t seq_len, int64_t capacity) {
  printf(
      "hf_fuse.rotary: the key/value cache is full: length %lld + seq_len %lld > capacity %lld\n",
      static_cast<long long>(length), static_cast<long long>(seq_len),
      static_cast<long long>(capacity));
  __trap();
}

// blockIdx.x: token; a thread: one vector of each half of a head, or one of what passes through.
// Heads are q's, then k's, then with a cache v's.
template <typename T, int kWidth>
__global__ void __launch_bounds__(256)
    rotary_kernel(const Rotary p, const int vectors_per_head, const int num_items) {
  using V = Vec<T, kWidth>;
  pdl_trigger_and_wait();
  const int half = static_cast<int>(p.rotary_dim / 2);
  const int64_t batch = blockIdx.x / static_cast<unsigned>(p.seq_len);
  const int64_t position = blockIdx.x % static_cast<unsigned>(p.seq_len);
  int64_t length = 0;
  if (p.length) {
    length = *p.length;
    if (length < 0 || length + p.seq_len > p.capacity) {
      if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
        fail_capacity(length, p.seq_len, p.capacity);
      }
      return;
    }
  }
  const int item = blockIdx.y * blockDim.x + threadIdx.x;
  if (item >= num_items) return;
  const int num_heads = static_cast<int>(p.num_heads), num_kv = static_cast<int>(p.num_kv_heads);
  const int head = item / vectors_per_head;
  const int vector = item % vectors_per_head;

  const T* in;
  T* out;
  bool rotated = true;
  if (head < num_heads) {
    in = static_cast<const T*>(p.q) + offset(p.q_stride, batch, head, position);
    out = static_cast<T*>(p.q_out) + offset(p.q_out_stride, batch, head, position);
  } else if (head < num_heads + num_kv) {
    const int kv_head = head - num_heads;
    in = static_cast<const T*>(p.k) + offset(p.k_stride, batch, kv_head, position);
    out = p.length ? static_cast<T*>(p.key_cache) +
                         offset(p.key_cache_stride, batch, kv_head, length + position)
                   : static_cast<T*>(p.k_out) + offset(p.k_out_stride, batch, kv_head, position);
  } else {
    const int kv_head = head - num_heads - num_kv;
    in = static_cast<const T*>(p.v) + offset(p.v_stride, batch, kv_head, position);
    out = static_cast<T*>(p.value_cache) +
          offset(p.value_cache_stride, batch, kv_head, length + position);
    rotated = false;
  }

  const int column = vector * kWidth;
  if (column >= half) {  // behind the rotated part
    store(out + half + column, load_once<V>(in + half + column));
    return;
  }
  V first = load_once<V>(in + column), second = load_once<V>(in + half + column);
  if (rotated) {
    const T* cos = static_cast<const T*>(p.cos) + batch * p.cos_stride[0] +
                   position * p.cos_stride[1] + column;
    const T* sin = static_cast<const T*>(p.sin) + batch * p.sin_stride[0] +
                   position * p.sin_stride[1] + column;
    // The transposed map takes each half's sine from the other half, and the other sign.
    const V cos1 = load<V>(cos), cos2 = load<V>(cos + half);
    const V sin1 = load<V>(sin + (p.transpose ? half : 0));
    const V sin2 = load<V>(sin + (p.transpose ? 0 : half));
    const V even1 = first * cos1, odd1 = second * sin1;
    const V even2 = second * cos2, odd2 = first * sin2;
    first = p.transpose ? even1 + odd1 : even1 - odd1;
    second = p.transpose ? even2 - odd2 : even2 + odd2;
  }
  store(out + column, first);
  store(out + half + column, second);
}

// A launch of its own: every block of the first must have read the old length.
__global__ void advance_length_kernel(int64_t* length, const int64_t seq_len) {
  pdl_trigger_and_wait();
  *length += seq_len;
}

// Whether vectors of `width` elements tile the halves, the rest and every row of every tensor.
bool width_fits(const Rotary& p, int width, int element_size) {
  const auto fits = [&](const void* data, const int64_t* strides, int count) {
    if (data == nullptr) return true;
    if (reinterpret_cast<uintptr_t>(data) % (width * element_size) != 0) return false;
    return std::all_of(strides, strides + count, [&](int64_t s) { return s % width == 0; });
  };
  return p.rotary_dim / 2 % width == 0 && (p.head_dim - p.rotary_dim) % width == 0 &&
         fits(p.q, p.q_stride, 3) && fits(p.q_out, p.q_out_stride, 3) && fits(p.k, p.k_stride, 3) &&
         fits(p.k_out, p.k_out_stride, 3) && fits(p.v, p.v_stride, 3) &&
         fits(p.key_cache, p.key_cache_stride, 3) && fits(p.value_cache, p.value_cache_stride, 3) &&
         fits(p.cos, p.cos_stride, 2) && fits(p.sin, p.sin_stride, 2);
}

// The stride of a dimension of size 1 means nothing; 0 spares it the alignment test.
Rotary without_idle_strides(Rotary p) {
  for (int64_t* s : {p.q_stride, p.k_stride, p.v_stride, p.q_out_stride, p.k_out_stride}) {
    if (p.batch == 1) s[0] = 0;
    if (p.seq_len == 1) s[2] = 0;
  }
  for (int64_t* s : {p.cos_stride, p.sin_stride}) {
    if (p.batch == 1) s[0] = 0;
    if (p.seq_len == 1) s[1] = 0;
  }
  return p;
}

template <typename T, int kWidth>
void launch_widest(const Rotary& p, void* stream) {
  if constexpr (kWidth > 1) {
    if (!width_fits(p, kWidth, sizeof(T))) return launch_widest<T, kWidth / 2>(p, stream);
  }
  const bool in_place = !p.length && p.q_out == p.q && p.k_out == p.k;
  const int64_t vectors = (p.rotary_dim / 2 + (in_place ? 0 : p.head_dim - p.rotary_dim)) / kWidth;
  const int64_t items = (p.num_heads + p.num_kv_heads * (p.length ? 2 : 1)) * vectors;
  if (items == 0) return;
  const int64_t blocks = ceil_div(items, 256);
  const int threads = static_cast<int>(round_up(ceil_div(items, blocks), 32));
  launch(kOp, rotary_kernel<T, kWidth>, {p.batch * p.seq_len, blocks}, threads, 0, stream, p,
         static_cast<int>(vectors), static_cast<int>(items));
}

}  // namespace

void rotary_forward(const Rotary& p, void* stream) {
  dispatch_dtype(kOp, p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.batch == 0 || p.seq_len == 0) return;
    launch_widest<T, Vec16<T>::kSize>(without_idle_strides(p), stream);
    if (p.length) launch(kOp, advance_length_kernel, {1}, 1, 0, stream, p.length, p.seq_len);
  });
}

}  // namespace hf_fuse
